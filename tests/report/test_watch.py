"""`rhc watch` follows a run that grows; `rhc init` writes a runner that trains as it stands."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from rhc.cli.main import main
from rhc.report.live import Screen
from rhc.report.watch import follow

RESULT = {
    "test_loss": 0.25,
    "cost": {
        "plain_run_equivalents": 2.5,
        "windows": 3,
        "rejected_windows": 1,
        "rewound_windows": 1,
    },
}


def plain_screen() -> tuple[Screen, io.StringIO]:
    file = io.StringIO()
    return Screen(file=file, width=120), file


def test_a_run_is_followed_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"run": "demo", "steps": 4, "stride": 2, "window": 2}')
    row = '{"step": %d, "loss": %d, "lr": 0.5}\n'
    tape = tmp_path / "tape.jsonl"
    rounds = iter(range(3))

    def wait() -> None:
        match next(rounds):
            case 0:
                tape.write_text(row % (0, 3) + row % (1, 1) + '{"step": 2')
            case 1:
                tape.write_text(row % (0, 3) + row % (1, 1) + row % (2, 7))
            case 2:
                tape.write_text(row % (0, 9))  # resumed at an earlier checkpoint
                (tmp_path / "result.json").write_text(json.dumps(RESULT))

    screen, file = plain_screen()
    follow(tmp_path, screen, wait)
    lines = file.getvalue().splitlines()
    assert lines[1] == "demo: 4 steps, window 2, not rewriting"
    assert [line.split("  eta")[0].split() for line in lines[2:5]] == [
        ["step", "2/4", "loss", "2", "lr", "0.5"],
        ["step", "3/4", "loss", "7", "lr", "0.5"],
        ["step", "1/4", "loss", "9", "lr", "0.5"],
    ]
    assert "0.2500" in file.getvalue() and "2.50 plain runs" in file.getvalue()


def test_a_terminal_shows_the_display_of_the_run(tmp_path: Path) -> None:
    """The counts are those of the run's own display; rows that are damaged are passed over."""
    config = {"run": "demo", "steps": 150, "window": 50, "stride": 50, "controls": ["lr"],
              "rewrite": {"x": 1}}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = [{"step": s, "loss": 1 / (1 + s), "lr": 0.5} for s in range(150)]
    attempts = [
        {"start": a, "stop": a + 50, "attempt": n, "outcome": outcome, "reason": None,
         "objective_before": 1.0, "objective_after": 0.9}
        for a, n, outcome in (
            (0, 0, "rewound"), (0, 1, "accepted"), (0, 2, "rejected"), (50, 1, "rejected"),
        )
    ]  # fmt: skip

    def lines(*values: Any) -> str:
        return "".join(json.dumps(value) + "\n" for value in values)

    shown, file = list[str](), io.StringIO()
    screen = Screen(file=file, force_terminal=True, width=80, height=24)
    rounds = iter(range(3))

    def wait() -> None:
        shown.append(file.getvalue())
        match next(rounds):
            case 0:
                (tmp_path / "start.jsonl").write_text('{"kind": "probe", "steps": 3}\n[]\n')
                record = {"kind": "probe", "steps": 3, "from": 0.1, "loss": 1.0}
                (tmp_path / "start.jsonl").write_text(lines({"kind": 1}, record))
            case 1:
                (tmp_path / "windows.jsonl").write_text(lines({"outcome": "x"}, *attempts))
                (tmp_path / "tape.jsonl").write_text(lines({"loss": "x"}, *rows[:100]))
            case 2:
                (tmp_path / "tape.jsonl").write_text(lines({"loss": "x"}, *rows))
                (tmp_path / "result.json").write_text(json.dumps(RESULT))

    follow(tmp_path, screen, wait)
    plain = [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text) for text in (*shown, file.getvalue())]
    assert "0/150" in plain[0] and "3 steps at lr 0.1: loss 1" in plain[1]
    third = plain[2][len(plain[1]) :]
    assert "100/150" in third and "accepted 1  rejected 1  rewound 1" in third
    assert "cost" not in third and "J 1 → 0.9" in third and "looking for a start" not in third
    assert (
        "150/150" in plain[3] and "cost 2.50x plain" in plain[3] and "2.50 plain runs" in plain[3]
    )


def test_it_is_said_once_that_nothing_trains_a_run(tmp_path: Path) -> None:
    """A run that was killed leaves no result; one that lives holds a lock, which is left alone."""
    fcntl = pytest.importorskip("fcntl", reason="locks are of POSIX")
    if not Path("/proc/locks").exists():
        pytest.skip("what holds a lock is not to be seen here")
    (tmp_path / "config.json").write_text('{"steps": 4}')
    attempt = {"start": 0, "stop": 2, "attempt": 0, "outcome": "rewound", "reason": "nan"}
    (tmp_path / "windows.jsonl").write_text((json.dumps(attempt) + "\n") * 11)
    rounds, (screen, file) = iter(range(7)), plain_screen()
    with open(tmp_path / ".lock", "w") as lock:

        def wait() -> None:
            match next(rounds):
                case 0:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    record = {"kind": "probe", "steps": 3, "from": 0.1, "loss": 1.0}
                    (tmp_path / "start.jsonl").write_text(json.dumps(record) + "\n")
                case 2:
                    assert len(file.getvalue().splitlines()) == 11, "one who trains is quiet"
                    fcntl.flock(lock, fcntl.LOCK_UN)
                case 6:
                    (tmp_path / "result.json").write_text(json.dumps(RESULT))

        follow(tmp_path, screen, wait)
    lines = file.getvalue().splitlines()
    assert lines[2:10] == ["step 2/4  rewound: nan"] * 8, "three of eleven came before these"
    assert lines[10] == "start  3 steps at lr 0.1: loss 1"
    told = [n for n, line in enumerate(lines) if f"to go on: rhc resume {tmp_path}" in line]
    assert told == [11]


def test_what_may_not_be_read_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"steps": 4}')
    (tmp_path / "windows.jsonl").mkdir()  # as with no permission, which root always has
    assert main(["watch", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"rhc: error: {tmp_path}/windows.jsonl cannot be")


def test_the_template_trains_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my_run.py"]) == 0
    command = capsys.readouterr().out.split()
    assert command == ["rhc", "train", "my_run.py:my_run"]
    flags = ["--steps", "4", "--no-rewrite", "--directory", "run"]
    assert main([*command[1:], *flags]) == 0
    assert (tmp_path / "run" / "result.json").exists()
    before = (tmp_path / "my_run.py").read_text()
    assert main(["init", "my_run.py"]) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert (tmp_path / "my_run.py").read_text() == before
    assert main(["init", "no-name.py"]) == 2
    assert main(["watch", "nowhere"]) == 2

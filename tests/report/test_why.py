"""The sentences that say why a run did what it did: one source for display, inspect and report."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rhc.cli.main import main
from rhc.report import why
from rhc.report.records import RunRecord, read_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("why") / "run"
    line = f"train digits --steps 100 --window 10 --directory {directory}"
    assert main(line.split()) == 0
    return directory


def test_display_inspect_and_report_use_the_same_words(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("jinja2", reason="the extra `report` is not installed")
    run = read_run(trained)
    found = {answer.label: answer.sentence for answer in why.answers(run)}
    assert {"start", "jumps", "windows", "worth", "examples", "sweep", "spent", "replay"} <= set(
        found
    )
    capsys.readouterr()
    assert main(["inspect", str(trained)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert main(["report", str(trained)]) == 0
    page = re.sub(r"</?abbr[^>]*>", "", (trained / "report.html").read_text())
    for sentence in (*found.values(), why.headline(run)):
        assert " ".join(sentence.split()) in printed
    for sentence in (found["start"], found["sweep"], why.headline(run)):
        assert sentence.replace("'", "&#39;") in page


def test_the_start_is_the_roll_that_was_chosen_over_what_it_was_divided_by(trained: Path) -> None:
    run = read_run(trained)
    chosen = run.result["chosen_start"]
    assert chosen["rule"] == "rolls" and chosen["start"] == "zero"
    assert chosen["lr"] == pytest.approx(chosen["best"] / chosen["divided_by"])
    longest = [r for r in run.starts if r["kind"] == "probe" and r["steps"] == chosen["steps"]]
    assert chosen["loss"] == min(r["loss"] for r in longest if r["loss"] is not None)
    assert f"divided by {chosen['divided_by']:.3g}" in why.start(chosen)


def test_every_window_was_looked_at_or_is_said_why_not(trained: Path) -> None:
    run = read_run(trained)
    covered = {row["start"] for row in run.windows}
    for first, stop, reason in run.result["skipped"]:
        assert reason in why.SKIPPED
        covered |= set(range(first, stop, 10))
    assert covered == set(range(0, 100, 10))
    assert run.tally.looked + sum((b - a) // 10 for a, b, _ in run.result["skipped"]) == 10


@pytest.mark.parametrize(
    "change, cause",
    [
        ({"windows": [("accepted", 20, 30, "")]}, "steps 20–30 were rewritten"),
        ({"windows": [("rewound", 20, 30, "")]}, "diverged, so lr was lowered"),
        ({"windows": [("accepted", 10, 20, "")]}, "50% of what is left of the rewrite"),
        ({"windows": [("accepted", 20, 30, "the template begun anew at step 20")]}, "begins anew"),
        ({"planning": "the loss rose"}, "the loss rose"),
        ({}, "its schedule has that step"),
    ],
)
def test_a_jump_of_lr_has_its_cause(tmp_path: Path, change: dict[str, Any], cause: str) -> None:
    rule = {"carry": 0.5, "until": 1.0}
    config = {"steps": 40, "window": 10, "stride": 10, "rewrite": rule, "controls": ["lr"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tape: list[dict[str, Any]] = [
        {"step": i, "loss": 1.0, "lr": 0.1 if i < 20 else 0.2} for i in range(40)
    ]
    if "planning" in change:
        tape[20]["planning"] = {"guards": [{"kind": "guard", "reason": change["planning"]}]}
    (tmp_path / "tape.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tape))
    windows = [
        {"start": a, "stop": b, "attempt": 0, "outcome": outcome, "reason": reason,
         "objective_before": 1.0, "objective_after": 0.9}
        for outcome, a, b, reason in change.get("windows", ())
    ]  # fmt: skip
    (tmp_path / "windows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in windows))
    run = read_run(tmp_path)
    ((step, sentence),) = why.jumps(run)
    assert step == 20 and cause in sentence
    asked = {answer.label: answer.question for answer in why.answers(run)}
    assert asked["jumps"] == "Why does lr jump at 20?"


def test_a_run_beside_it_says_what_rewriting_was_worth(trained: Path) -> None:
    run = read_run(trained)
    (worth,) = [a.sentence for a in why.answers(run) if a.label == "worth"]
    (command,) = re.findall(r"rhc (train .*)\.$", worth)
    beside = trained.parent / "without"
    assert main([*command.split(), "--directory", str(beside)]) == 0
    (worth,) = [a.sentence for a in why.answers(read_run(trained)) if a.label == "worth"]
    loss = json.loads((beside / "result.json").read_text())["test_loss"]
    assert f"(without) ends at a test loss of {loss:.4g}" in worth


def test_passes_say_whether_they_paid_and_what_they_cost(tmp_path: Path) -> None:
    rows = [
        {"kept": kept, "held_out_before": before, "held_out_after": after,
         "plain_run_equivalents": cost}
        for kept, before, after, cost in ((True, 0.5, 0.4, 4.0), (False, 0.4, 0.45, 1.5))
    ]  # fmt: skip
    run = RunRecord(tmp_path, {"steps": 10}, {"cost": {"plain_run_equivalents": 7.5}}, passes=rows)
    told = {answer.label: answer.sentence for answer in why.answers(run)}
    assert "of which 1 kept" in told["passes"] and "from 0.5 to 0.4, for 5.50" in told["passes"]
    assert "1.00 for looking at windows" in told["spent"] and "5.50 for passes" in told["spent"]

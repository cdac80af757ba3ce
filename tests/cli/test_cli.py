"""The command line: what it runs, what it writes, and one sentence for everything it refuses."""

from __future__ import annotations

import io
import json
import math
import os
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console

import rhc
from rhc import InputError
from rhc.cli.main import COMMANDS, main, parsed
from rhc.events import (
    CheckpointSaved,
    Committed,
    Event,
    Notice,
    RunEnded,
    RunStarted,
    StepTaken,
    VerbStarted,
    WindowAttempted,
)
from rhc.hypergradient import PRODUCTS as KNOWN_PRODUCTS
from rhc.loop.update_rule import usual_law, usual_objective
from rhc.optimizers import DIFFERENTIABLE
from rhc.report.live import (
    LiveDisplay,
    PlainLines,
    Progress,
    duration,
    frame,
    sparkline,
)
from rhc.report.records import one_number
from rhc.report.text import print_result
from rhc.settings import TrainConfig, parsed_bytes
from rhc.settings.owners import PRODUCTS
from rhc.workload import OPTIMIZERS

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

OWN_RUNNERS = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from rhc import Workload

def own(*, seed=0, data=None):
    '''A runner in a file of its own.'''
    x = torch.randn(96, 4)
    if data is not None:
        assert (data / "present").exists()
    y = x.sin().sum(1, keepdim=True)
    train, val = TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:])
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))
    loss_fn = lambda model, batch: F.mse_loss(model(batch[0]), batch[1])
    return Workload(model, loss_fn, DataLoader(train, 8, shuffle=True), DataLoader(val, 32),
                    DataLoader(val, 32), steps=20)

def changed(**changes):
    workload = own()
    for name, value in changes.items():
        setattr(workload, name, value)
    return workload

def grouped(*, seed=0, data=None):
    workload = own()
    parameters = list(workload.model.parameters())
    workload.parameter_groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 1e-3}]
    return workload

def empty(*, seed=0, data=None): return changed(train_loader=[])
def empty_val(*, seed=0, data=None): return changed(val_loader=[])
def vector(*, seed=0, data=None): return changed(loss_fn=lambda m, b: (m(b[0]) - b[1]) ** 2)
def nograph(*, seed=0, data=None): return changed(loss_fn=lambda m, b: m(b[0]).mean().detach())
def number(*, seed=0, data=None): return changed(loss_fn=lambda m, b: m(b[0]).mean().item())
def nan(*, seed=0, data=None): return changed(loss_fn=lambda m, b: m(b[0]).mean() * float("nan"))
def lion(*, seed=0, data=None): return changed(optimizer="lion")
def no_lr(*, seed=0, data=None): return changed(lr={"adam": 1e-3})
def something(*, seed=0, data=None): return 3
def raises(*, seed=0, data=None): raise RuntimeError("a fault of its own")
"""


class Outcome(NamedTuple):
    """What a command line came to."""

    status: int
    out: str
    err: str


Call = Callable[..., Outcome]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Call:
    """`rhc …` in this process, in an empty folder that has own.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "own.py").write_text(OWN_RUNNERS)

    def call(line: str) -> Outcome:
        capsys.readouterr()
        status = main(shlex.split(line))
        return Outcome(status, *capsys.readouterr())

    return call


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file below a folder with its bytes, and every folder."""
    found = (p for p in folder.rglob("*") if "__pycache__" not in p.parts)
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in found}


def process(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        capture_output=True,
        timeout=120,
        **options,
    )


def test_a_path_is_shown_as_it_was_given(call: Call, tmp_path: Path) -> None:
    name = "run[v2] :x: [bold] a[/b]"  # brackets are rich's markup, `:x:` an emoji of it
    given = shlex.quote(name)
    train = f"train own.py --no-rewrite --lr 0.1 --steps 2 --directory {given}"
    for line in (train, train, f"resume {given}", f"inspect {given}", f"hypergradient {given}"):
        done = call(line)
        assert (done.status, done.err) == (0, "") and name in done.out
    for same in (name, str(tmp_path / name)):  # two paths to one schedule
        done = call(f"replay {shlex.quote(same)} --seed 1")
        assert (done.status, done.err) == (0, "")
        assert done.out.startswith(f"schedule  {same}/schedule.json, all 2 steps")


# A run, end to end --------------------------------------------------------------------------------


def test_digits_from_end_to_end(call: Call, tmp_path: Path) -> None:
    done = call("train --window 20 --steps 100 --keep-checkpoints 2")
    assert (done.status, done.err) == (0, "")

    (directory,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"digits-[0-9a-f]{8}", directory.name)
    config = json.loads((directory / "config.json").read_text())
    expected = {"run": "digits", "window": 20, "stride": 20, "steps": 100, "seed": 0, "lr": 0.01}
    assert config | expected == config
    assert config["optimizer"] == "sgd" and "lr" in config["controls"]
    assert {"versions", "hardware", "rewrite", "objective"} <= config.keys()

    tape = [json.loads(line) for line in (directory / "tape.jsonl").read_text().splitlines()]
    assert [row["step"] for row in tape] == list(range(100))
    windows = [json.loads(line) for line in (directory / "windows.jsonl").read_text().splitlines()]
    assert {row["start"] for row in windows} == {0}  # the others are passed over, or after `until`
    schedule = rhc.Schedule.load(directory / "schedule.json")
    assert len(schedule) == 100 and schedule["lr"].tolist() == [row["lr"] for row in tape]

    result = json.loads((directory / "result.json").read_text())
    losses = {f"{a}{s}_loss" for a in ("", "average_", "best_") for s in ("train", "val", "test")}
    assert {"steps", "test_accuracy", "wall_seconds", "cost", *losses} <= result.keys()
    counted = {"gradient_evaluations", "hessian_products", "plain_run_equivalents", "windows"}
    counted |= {"peak_memory_bytes", "rejected_windows", "rewound_windows"}
    assert counted <= result["cost"].keys()
    assert result["steps"] == 100 and result["test_loss"] < 1 and result["cost"]["windows"] == 5

    checkpoints = sorted((directory / "checkpoints").iterdir())
    assert [p.name for p in checkpoints] == ["best", "window-00000080", "window-00000100"]
    assert all((p / "manifest.json").exists() for p in checkpoints)

    for part in (f"{result['test_loss']:.4f}", "plain runs", f"{directory.name}/schedule.json"):
        assert part in done.out
    assert "to_lr_scheduler" in done.out and "rhc inspect" in done.out


def test_a_small_screen_keeps_the_labels_of_the_result() -> None:
    record = {"train_loss": 0.25, "average_train_loss": 0.5, "test_accuracy": 1.0,
              "average_metrics": {"test": {"accuracy": 0.75}},
              "cost": {"plain_run_equivalents": 1.0, "windows": 1, "rejected_windows": 0,
                       "rewound_windows": 0}}  # fmt: skip
    for width in (30, 40, 80):
        file = io.StringIO()
        print_result(Console(file=file, width=width), record, Path("run"), inspect=False)
        text = " ".join(file.getvalue().split())
        for part in ("0.2500", "averaged", "0.5000", "accuracy", "1.0000", "0.7500", "train"):
            assert part in text, (width, part)


def test_plain_lines_where_there_is_no_terminal(call: Call) -> None:
    lines = call("train own.py:own --window 5 --lr 0.1 --until 1 --budget 99").out.splitlines()
    number = r"[-+.\de]+"
    committed = re.compile(
        rf"step +(\d+)/20  loss {number} +lr {number} +J {number} -> {number} +"
        r"(?:accepted|rejected)  cost \d+\.\dx  eta \S+"
    )
    found = [m.group(1) for m in map(committed.fullmatch, lines) if m]
    assert found == ["5", "10", "15", "20"]
    assert lines[0].startswith("own: 20 steps, window 5, rewriting lr")
    assert "rhc resume runs/own-" in lines[1]
    assert re.fullmatch(rf"start  10 steps at lr 0\.1: loss {number}", lines[2])
    assert re.search(
        rf"^start  lr {number} in place of 0.1 \(--start given", "\n".join(lines), re.M
    )


def test_without_rewriting(call: Call, tmp_path: Path) -> None:
    done = call("train own.py:own --no-rewrite --window 5 --directory plain")
    assert done.status == 0 and " J " not in done.out and "not rewriting" in done.out
    assert set(rhc.Schedule.load(tmp_path / "plain/schedule.json")["lr"].tolist()) == {0.01}
    assert (tmp_path / "plain/windows.jsonl").read_bytes() == b""


def test_without_rewriting_stopped_and_resumed(
    call: Call, tmp_path: Path, interrupt: Callable[[int], None]
) -> None:
    line = "train own.py:own --no-rewrite --window 5"
    assert call(f"{line} --directory straight").status == 0
    interrupt(20)
    assert call(f"{line} --directory stopped").status == 130
    assert "from step" in call("resume stopped").out
    tapes = [(tmp_path / name / "tape.jsonl").read_bytes() for name in ("straight", "stopped")]
    assert tapes[0] == tapes[1]


def test_asked_for_again_a_finished_run_says_so(call: Call, tmp_path: Path) -> None:
    line = "train own.py:own --window 5"
    first = call(line)
    before = contents(tmp_path / "runs")
    again = call(line)
    assert again.status == 0 and "finished" in again.out and "--seed" in again.out
    assert again.out.splitlines()[-8:] == first.out.splitlines()[-8:]
    assert contents(tmp_path / "runs") == before
    assert call(f"{line} --keep-checkpoints 5 --device cpu").status == 0
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert call(f"{line} --seed 1").status == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_flags_reach_the_optimizer(call: Call, tmp_path: Path, optimizer: str) -> None:
    flags = f"--optimizer {optimizer} --lr 0.005 --weight-decay 0.02"
    initial = {"lr": 0.005, "weight_decay": 0.02, "noise": 0.0}
    if optimizer == "adagrad":
        refused = call(f"train own.py:own {flags} --momentum 0.8")
        assert refused.status == 2 and "adagrad has no momentum, got 0.8" in refused.err
    else:
        flags, initial = f"{flags} --momentum 0.8", initial | {"momentum": 0.8}
    line = f"train own.py:own {flags} --steps 3 --window 3 --clip-norm 2 --directory run"
    assert call(line).status == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["optimizer"], config["initial"]) == (optimizer, initial)
    assert config["clip_norm"] == 2


def test_accumulation_and_clipping_reach_the_run(call: Call, tmp_path: Path) -> None:
    """And are recorded where they are given, so that a resumed run goes on with them."""
    line = "train own.py:own --no-rewrite --steps 4 --window 2"
    assert call(f"{line} --accumulate 3 --clip-value 0.01 --directory run").status == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["accumulate"], config["clip_value"]) == (3, 0.01)
    assert call(f"{line} --directory plain").status == 0
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert "accumulate" not in config and "clip_value" not in config
    refuses(call(f"{line} --accumulate 2 --directory plain"), ["accumulate was null, is 2"])
    assert call("resume run").status == 0
    tapes = [(tmp_path / name / "tape.jsonl").read_text() for name in ("run", "plain")]
    assert tapes[0] != tapes[1]


def test_parameter_groups(call: Call, tmp_path: Path) -> None:
    """Of a runner with two groups: each has its lr, and what is shown is their geometric mean."""
    line = "train own.py:grouped --window 5 --controls lr,momentum --per-group lr"
    done = call(f"{line} --directory run")
    assert done.status == 0
    schedule = rhc.Schedule.load(tmp_path / "run/schedule.json")
    assert schedule["lr"].shape == (20, 2) and schedule["momentum"].shape == (20,)
    tape = [json.loads(x) for x in (tmp_path / "run/tape.jsonl").read_text().splitlines()]
    assert tape[4]["lr"] == schedule["lr"][4].tolist()
    shown = float(re.search(r"step +5/20 .* lr (\S+)", done.out).group(1))
    assert shown == pytest.approx(float(schedule["lr"][4].log().mean().exp()), rel=1e-2)
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["per_group"] == ["lr"] and config["initial"]["lr"] == [0.01, 0.001]
    shown_again = call("inspect run")
    assert shown_again.status == 0
    assert re.search(r"^lr +\S+ [▁▂▃▄▅▆▇█ ]+ \S+$", shown_again.out, re.MULTILINE)
    assert call("resume run").status == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("500MB", 500 * 10**6),
        ("500 mb", 500 * 10**6),
        ("2GiB", 2 * 2**30),
        ("1.5KiB", 1536),
        ("3kB", 3000),
        ("7B", 7),
        (".5GB", 500 * 10**6),
        ("1TiB", 2**40),
    ],
)
def test_sizes_in_bytes(text: str, size: int) -> None:
    assert parsed_bytes(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-5", "1e3", "5 M B", "0.1", "nan", "1.2.3", "5MBB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="memory_budget must be a number of bytes"):
        parsed_bytes(text)


def test_a_plan_is_printed_and_nothing_written(call: Call, tmp_path: Path) -> None:
    before = contents(tmp_path)
    line = "train own.py:own --window 5 --memory-budget 2MiB --plan"
    done = call(line)
    assert (done.status, done.err) == (0, "") and contents(tmp_path) == before
    assert "5 steps" in done.out and re.search(r"\d gradient evaluations per step", done.out)
    assert re.search(r"memory .* [\d.]+ MB of a budget of 2\.1 MB", done.out)
    other = call("train own.py:own --window 5 --product exact --plan").out
    assert "product exact" in other and other != done.out


def test_remedies_and_a_budget_reach_the_run(
    call: Call, tmp_path: Path, interrupt: Callable[[int], None]
) -> None:
    """And are taken up by `rhc resume`; without them config.json is as it was before they were."""
    line = (
        "train own.py:own --window 5 --budget 99 --discount 0.9 --costate-clip 5 "
        "--memory-budget 2MiB"
    )
    assert call(f"{line} --directory straight").status == 0
    interrupt(40)
    assert call(f"{line} --directory stopped").status == 130
    assert call("resume stopped").status == 0
    for name in ("schedule.json", "tape.jsonl", "windows.jsonl"):
        files = [(tmp_path / d / name).read_bytes() for d in ("straight", "stopped")]
        assert files[0] == files[1], name
    config = json.loads((tmp_path / "stopped/config.json").read_text())
    given = {"discount": 0.9, "costate_clip": 5.0, "memory_budget": 2 * 2**20}
    assert config | given == config
    assert call("train own.py:own --window 5 --directory plain").status == 0
    config = json.loads((tmp_path / "plain/config.json").read_text())
    new = {*given, "accumulate", "clip_value", "per_group", "plan"}
    assert not new & config.keys()
    schedules = [(tmp_path / d / "schedule.json").read_bytes() for d in ("straight", "plain")]
    assert schedules[0] != schedules[1]


def test_a_plan_leaves_the_run_as_it_is(call: Call, tmp_path: Path) -> None:
    """Asked for beside a run that is there already, in the same words."""
    assert call("train own.py:own --window 5").status == 0
    before = contents(tmp_path)
    assert "5 steps" in call("train own.py:own --window 5 --plan").out
    assert contents(tmp_path) == before
    assert "finished" in call("train own.py:own --window 5").out


def test_own_defaults_of_an_optimizer(call: Call, tmp_path: Path) -> None:
    assert call("train own.py:own --optimizer adamw --steps 2 --directory run").status == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["initial"]["weight_decay"] == 0.01 and config["lr"] == 1e-3


def test_a_diverging_run_ends_with_status_1(call: Call) -> None:
    done = call("train own.py:nan --window 5")
    assert done.status == 1
    assert done.err.startswith("rhc: error: no lr within its bounds keeps a short roll finite")
    done = call("train own.py:nan --window 5 --start given")
    assert done.status == 1
    assert (
        done.err.startswith("rhc: error: the loss is nan at step 0") and done.err.count("\n") == 1
    )
    assert "rewound" in done.out


def test_a_fault_of_the_runner_passes_through(call: Call) -> None:
    with pytest.raises(RuntimeError, match="a fault of its own"):
        call("train own.py:raises")


# Stopping and resuming ----------------------------------------------------------------------------


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """interrupt(n): Ctrl-C at the n-th event of the next run."""

    def interrupt(count: int) -> None:
        original = PlainLines.__call__
        seen = 0

        def stopping(self: PlainLines, event: Event) -> None:
            nonlocal seen
            seen += 1
            if seen == count:
                raise KeyboardInterrupt
            original(self, event)

        monkeypatch.setattr(PlainLines, "__call__", stopping)

    return interrupt


@pytest.mark.parametrize("count", [2, 60])
def test_a_stopped_run_resumed_equals_one_that_was_not(
    call: Call, tmp_path: Path, interrupt: Callable[[int], None], count: int
) -> None:
    line = "train own.py:own --window 5 --stride 3 --controls lr momentum"
    assert call(f"{line} --directory straight").status == 0
    interrupt(count)
    stopped = call(f"{line} --directory stopped")
    assert stopped.status == 130
    assert stopped.err.startswith("rhc: stopped") and "Traceback" not in stopped.err
    assert not (tmp_path / "stopped/result.json").exists()
    assert count == 2 or "resume with: rhc resume stopped" in stopped.err

    resumed = call("resume stopped")
    assert resumed.status == 0
    assert count == 2 or re.search(r"own: 20 steps, from step \d+", resumed.out)
    for name in ("schedule.json", "tape.jsonl", "windows.jsonl"):
        straight = (tmp_path / "straight" / name).read_bytes()
        assert (tmp_path / "stopped" / name).read_bytes() == straight, name
    assert call("resume stopped").out.startswith("stopped holds this run, finished")


def test_a_signal_from_the_keyboard(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_RUNNERS)
    flags = ["--steps", "100000", "--window", "5", "--directory", "a run", "--start", "given"]
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "rhc", "train", "own.py:own", *flags],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that a shell runs in the background ignores the signal, and its children with it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert child.stdout is not None
    while not (line := child.stdout.readline()).startswith("step"):
        assert line, "the run ended"
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert re.fullmatch(r"rhc: stopped; \d+ of 100000 steps .* rhc resume 'a run'\n", err)


def test_resume_from_elsewhere_with_moved_data(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupt: Callable[[int], None]
) -> None:
    for folder in ("data", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data/present").touch()
    interrupt(30)
    assert call("train own.py:own --data data --window 5 --directory run").status == 130
    (tmp_path / "data").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    refused = call("resume ../run")
    assert refused.status == 2 and "outside the current folder" in refused.err
    refused = call("resume ../run --trust")
    assert refused.status == 2 and "give --data" in refused.err
    assert call("resume ../run --data ../moved --trust").status == 0


def broken_run(tmp_path: Path, config: str | None) -> None:
    (tmp_path / "run").mkdir()
    if config is not None:
        (tmp_path / "run/config.json").write_text(config)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (None, ["directory run is no run", "no config.json", "`rhc runs`"]),
        ('{"run": ', ["run/config.json is damaged", "not valid JSON", "--directory"]),
        ("[1]", ["run/config.json is damaged", "list"]),
        ('{"steps": 3}', ["written by rhc.Runner", "run that script again"]),
        ('{"run": "digits", "version": 99}', ["version 99", "reads version 1"]),
        (
            '{"run": "digits", "version": 1, "window": "x"}',
            ["run/config.json: window must be a whole number, got 'x'"],
        ),
    ],
)
def test_what_is_no_run_cannot_be_resumed(
    call: Call, tmp_path: Path, config: str | None, parts: list[str]
) -> None:
    broken_run(tmp_path, config)
    before = contents(tmp_path)
    refuses(call("resume run"), parts)
    assert contents(tmp_path) == before


# What is refused ----------------------------------------------------------------------------------


def refuses(outcome: Outcome, parts: list[str]) -> None:
    """Status 2, and one line that begins as every error does and has these parts."""
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err.startswith("rhc: error: ") and outcome.err.count("\n") == 1, outcome.err
    assert "Traceback" not in outcome.err and "│" not in outcome.err
    for part in parts:
        assert part in outcome.err, outcome.err


BAD_INPUT: dict[str, list[str]] = {
    # argument, value and mend
    "train --window 0": ["window must be ≥ 1", "got 0", "--window 50"],
    "train --window -3": ["window must be ≥ 1", "got -3"],
    "train --stride 80": ["stride must be in [1, 50] for window=50", "got 80", "raise --window"],
    "train --stride 0": ["stride", "got 0"],
    "train --steps 0": ["steps must be ≥ 1", "got 0"],
    "train --lr nan": ["lr must be in [1e-08, 10]", "got nan", "choose"],
    "train --lr -1": ["lr must be in", "got -1"],
    "train --lr 0": ["lr must be in", "got 0"],
    "train --lr 100": ["lr must be in", "got 100"],
    "train --lr 100 --no-rewrite": ["lr must be in", "got 100"],
    "train --momentum 1": ["momentum must be", "got 1"],
    "train --weight-decay -1": ["weight_decay must be", "got -1"],
    "train --clip-norm 0": ["clip_norm must be > 0", "got 0", "leave --clip-norm out"],
    "train --clip-value -2": ["clip_value must be > 0", "got -2", "leave --clip-value out"],
    "train --clip-norm 1 --clip-value 2": ["clip_norm and clip_value", "got 1 and 2", "leave"],
    "train --accumulate 0": ["accumulate must be ≥ 1", "got 0", "--accumulate 1"],
    "train --seed -1": ["seed must be in [0, 2**32)", "got -1"],
    "train --seed 4294967296": ["seed must be in [0, 2**32)", "got 4294967296"],
    "train --threads 0": ["threads must be ≥ 1", "got 0"],
    "train --keep-checkpoints 0": ["keep_checkpoints must be ≥ 1", "got 0"],
    "train --cooldown 1": ["cooldown must be in [0, 1)", "got 1", "--cooldown 0.2"],
    "train --average 1": ["average must be in [0, 1)", "got 1", "--average 0.99"],
    "train --objective-batches 0": ["objective_batches must be ≥ 1", "got 0"],
    "train --segment 99": ["segment must be auto or in [1, 50]", "'99'", "--segment auto"],
    "train --segment 5 --product forward-difference": ["forward-difference", "segment 1"],
    "train --discount 0": ["discount must be in (0, 1]", "got 0", "leave --discount out"],
    "train --discount 1.5": ["discount must be in (0, 1]", "got 1.5"],
    "train --costate-clip 0": ["costate_clip must be > 0", "got 0", "leave --costate-clip out"],
    "train --no-rewrite --discount 0.9": ["discount", "got 0.9", "leave --discount"],
    "train --no-rewrite --costate-clip 9": ["costate_clip", "got 9", "leave --costate-clip"],
    "train --memory-budget lots": ["memory_budget must be", "'lots'", "500MB", "2GiB"],
    "train --memory-budget 5XB": ["memory_budget must be", "'5XB'"],
    "train --memory-budget 0": ["memory_budget must be", "'0'"],
    "train --no-rewrite --memory-budget 5MB": ["memory_budget", "got 5MB", "leave --memory-budget"],
    "train --no-rewrite --plan": ["plan is about rewriting", "leave --plan"],
    "train --per-group noise": ["noise has no parameter groups", "leave it out"],
    "train --per-group": ["per_group is empty", "leave --per-group out"],
    "train --per-group weight_decay": ["'weight_decay'", "not rewritten", "add it to controls"],
    "train --per-group momentun": ["'momentun'", "did you mean 'momentum'"],
    "train --no-rewrite --per-group lr": ["per_group", "got lr", "leave --per-group"],
    # unknown names: which exist, and the nearest
    "train --controls lr momentun": ["'momentun'", "did you mean 'momentum'", "weight_decay"],
    "train --controls": ["controls is empty", "--no-rewrite"],
    "train digts": ["'digts'", "did you mean 'digits'", "mnist", "sine", "path/to/file.py"],
    "train --optimizer adamm": ["'adamm'", "did you mean 'adam'", "sgd, adam, adamw"],
    "train --optimizer lion": ["'lion'", "sgd, adam, adamw", "dynamics"],
    "train --product exat": ["'exat'", "did you mean 'exact'", "central-difference"],
    "train --start porbe": ["start must be one of zero, probe, given", "'porbe'"],
    "train --template sine": ["template must be one of constant, cosine, linear, wsd", "'sine'"],
    "train --device gpu": ["'gpu'", "auto, cpu, cuda"],
    "train --resume maybe": ["'maybe'", "auto, never"],
    # settings that would be ignored
    "train --no-rewrite --controls lr": ["controls", "got lr", "leave --controls"],
    "train --no-rewrite --cooldown 0.1": ["cooldown", "got 0.1", "leave --cooldown"],
    "train --controls momentum --cooldown 0.1": ["cooldown", "add lr to --controls"],
    "train --optimizer adagrad --momentum 0.5": ["adagrad", "got 0.5", "leave --momentum out"],
    "train --nesterov --optimizer adam": ["nesterov", "adam", "leave --nesterov out"],
    "train --momentum 0 --controls momentum": ["momentum", "from 0", "leave momentum out"],
    # runners of one's own
    "train unnamed.py": ["no file unnamed.py", "correct the path"],
    "train nowhere.py:own": ["no file nowhere.py", "correct the path"],
    "train own.py:nothing": ["no function 'nothing'"],
    "train own.py:something": ["returned int", "Workload"],
    "train own.py:lion": ["'lion'", "sgd, adam, adamw"],
    "train own.py:no_lr": ["no default for sgd", "give --lr"],
    "train own.py:empty": ["train_loader yields no batches", "batch_size"],
    "train own.py:empty_val": ["val_loader yields no batches"],
    "train own.py:vector": ["scalar", "shape (8, 1)", ".mean()"],
    "train own.py:nograph": ["without a graph", "detach"],
    "train own.py:number": ["scalar tensor", "float", "not .item()"],
    # data, directories and files
    "train mnist": ["--data DIR"],
    "train mnist --data nowhere": ["data nowhere does not exist", "--data"],
    "train mnist --data .": ["t10k-images-idx3-ubyte", "MNIST"],
    "train --data .": ["digits takes no data", "leave --data out"],
    "train --directory own.py": ["directory own.py cannot be written", "another --directory"],
    "train --directory own.py/run": ["directory own.py/run cannot be written"],
    "train --config nowhere.toml": ["config nowhere.toml cannot be read", "TOML"],
    "inspect nowhere": ["directory nowhere is no run"],
    # the command line itself
    "train --windwo 3": ["unknown flag --windwo", "did you mean --window?", "rhc train --help"],
    "train --window": ["--window needs a value"],
    "train --window --steps 3": ["--window needs a value"],
    "train --window abc": ["--window must be a whole number", "'abc'"],
    "train --window=abc": ["--window must be a whole number", "'abc'"],
    "train --window 3.5": ["--window must be a whole number", "'3.5'"],
    "train --weight_decay x": ["--weight-decay must be a number", "'x'"],
    "train digits mnist": ["mnist", "rhc train --help"],
    "train -x": ["-x", "rhc train --help"],
    "resume": ["DIR is missing", "rhc resume --help"],
    "trian": ["'trian'", "did you mean 'train'", "there are: train, resume, "],
    "--versoin": ["--versoin", "rhc --help"],
}


@pytest.mark.parametrize("line", BAD_INPUT)
def test_bad_input_is_one_sentence_and_changes_nothing(
    call: Call, tmp_path: Path, line: str
) -> None:
    before = contents(tmp_path)
    refuses(call(line), BAD_INPUT[line])
    assert contents(tmp_path) == before


def test_cuda_that_is_not_there(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refuses(call("train --device cuda"), ["device", "'cuda'", "use --device cpu"])


def test_malformed_idx_files(call: Call, tmp_path: Path) -> None:
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(b"no images")
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"no labels")
    refuses(call("train mnist --data ."), ["t10k-images-idx3-ubyte", "IDX", "fetch it again"])


def test_the_directory_of_another_run(call: Call, tmp_path: Path) -> None:
    assert call("train own.py:own --window 5 --directory run").status == 0
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/tape.jsonl").write_text("{}")
    before = contents(tmp_path)
    other = call("train own.py:own --window 4 --lr 0.02 --directory run")
    refuses(other, ["another configuration", "lr was 0.01, is 0.02", "window was 5, is 4"])
    never = call("train own.py:own --window 5 --directory run --resume never")
    refuses(never, ["holds a run already", "--resume auto"])
    refuses(call("train own.py:own --directory strange"), ["tape.jsonl but no config.json"])
    assert contents(tmp_path) == before


# Settings in a file -------------------------------------------------------------------------------


def test_flags_override_a_file_which_overrides_defaults(call: Call, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(
        'run = "own.py:own"\nwindow = 5\nlr = 1\nobjective-batches = 2\ncontrols = ["lr"]\n'
    )
    done = call("train --config run.toml --lr 0.05 --directory run")
    assert done.status == 0
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (config["window"], config["lr"], config["controls"]) == (5, 0.05, ["lr"])
    assert config["objective"]["batches"] == 2 and config["momentum"] == 0.9


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("windwo = 3", ["run.toml: unknown setting 'windwo'", "did you mean 'window'"]),
        ("window = 3.5", ["run.toml: window must be a whole number", "3.5"]),
        ("seed = true", ["run.toml: seed must be a whole number", "True"]),
        ("rewrite = 1", ["run.toml: rewrite must be true or false"]),
        ("controls = [1]", ["run.toml: controls must be a list of names"]),
        ("window = ", ["config run.toml is not valid TOML", "mend the file"]),
        ("[window]\nsteps = 3", ["run.toml: window must be a whole number"]),
        ('config = "other.toml"', ["must not name another file"]),
        (
            "engine = 'higher'",
            ["engine must be 'adjoint'", "'higher'", "rhc.hypergradient"],
        ),
        ("stride = 80", ["stride must be in [1, 50]", "got 80"]),
    ],
)
def test_a_file_that_is_wrong(call: Call, tmp_path: Path, text: str, parts: list[str]) -> None:
    (tmp_path / "run.toml").write_text(text)
    refuses(call("train --config run.toml"), parts)


@pytest.mark.parametrize(
    "line",
    [
        "train sine --steps 24 --window 8 --controls lr momentum --optimizer adam",
        "train sine --steps 24 --no-rewrite --lr 0.01 --seed 3",
        "train own.py:own --steps 12 --window 4 --lr 0.02 --start given",
    ],
)
def test_a_run_is_trained_again_by_its_own_configuration(
    call: Call, tmp_path: Path, line: str
) -> None:
    assert call(f"{line} --directory first").status == 0
    assert call("train --config first/config.json --directory second").status == 0
    for name in ("tape.jsonl", "windows.jsonl", "schedule.json"):
        one, other = (tmp_path / folder / name for folder in ("first", "second"))
        assert one.exists() == other.exists()
        assert not one.exists() or one.read_bytes() == other.read_bytes()
    assert call("train --config first/config.json --directory third --seed 9").status == 0
    record = json.loads((tmp_path / "third" / "config.json").read_text())
    assert record["seed"] == 9 and record["steps"] == len(
        (tmp_path / "third" / "tape.jsonl").read_text().splitlines()
    )


def test_a_repetition_stands_beside_the_run(call: Call, tmp_path: Path) -> None:
    assert call("train sine --steps 30 --no-rewrite --lr 0.01 --template constant").status == 0
    (first,) = (tmp_path / "runs").iterdir()
    for number in (2, 3):
        assert call(f"train --config {first}/config.json").status == 0
        again = first.with_name(f"{first.name}-{number}")
        assert (again / "tape.jsonl").read_bytes() == (first / "tape.jsonl").read_bytes()


def test_a_repetition_has_the_name_of_its_run(call: Call, tmp_path: Path) -> None:
    """By config.json, where the template, the warm-up and the controls stand as they were found."""
    line = "train own.py:own --window 5 --optimizer adamw --memory-budget 1GB"
    assert call(line).status == 0
    (first,) = (tmp_path / "runs").iterdir()
    assert call(f"train --config {first}/config.json").status == 0
    assert {path.name for path in first.parent.iterdir()} == {first.name, f"{first.name}-2"}
    assert call(f"{line} --template linear --warmup 0.1 --controls lr").out.startswith(
        f"runs/{first.name} holds this run, finished"
    )


def test_validation_while_it_trains_changes_nothing_else(call: Call, tmp_path: Path) -> None:
    for rewriting in ("--no-rewrite --lr 0.1", "--lr 0.1 --until 1"):
        line = f"train own.py:own --window 5 --resume never {rewriting}"
        folder = tmp_path / rewriting.split()[0]
        assert call(f"{line} --directory {folder}/without").status == 0
        assert call(f"{line} --directory {folder}/with --validate-every 8").status == 0
        tapes = []
        for name in ("without", "with"):
            lines = (folder / name / "tape.jsonl").read_text().splitlines()
            tapes.append([json.loads(line) for line in lines])
        found = [row["step"] for row in tapes[1] if "val_loss" in row]
        assert found == [9, 19], "after the windows in which steps 8 and 16 fall"
        result = json.loads((folder / "with/result.json").read_text())
        assert tapes[1][19]["val_loss"] == result["val_loss"]
        for row in tapes[1]:
            for name in [name for name in row if name.startswith("val_")]:
                del row[name]
        assert tapes[0] == tapes[1]
    refuses(call("train own.py:own --validate-every 0"), ["validate_every", "0"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{"windwo": 3}', ["unknown setting 'windwo'", "did you mean 'window'"]),
        ("[3]", ["holds no settings", "config.json"]),
        ("{", ["is not valid JSON"]),
        ('{"format": "rhc.config"}', ["written by rhc.Runner in a script"]),
        (
            '{"format": "rhc.config", "run": "sine", "version": 99}',
            ["version 99", "reads version"],
        ),
        ('{"format": "rhc.config", "run": "sine", "command": "replay"}', ["use rhc replay"]),
    ],
)
def test_a_configuration_of_nonsense(
    call: Call, tmp_path: Path, text: str, parts: list[str]
) -> None:
    (tmp_path / "run.json").write_text(text)
    refuses(call("train --config run.json"), parts)


def test_print_config_is_a_file_that_config_reads(call: Call, tmp_path: Path) -> None:
    line = "train own.py:own --window 5 --seed 3 --controls lr,momentum --average 0"
    printed = call(f"{line} --print-config")
    assert printed.status == 0 and not (tmp_path / "runs").exists()
    (tmp_path / "run.toml").write_text(printed.out)
    assert "lr = 0.01\n" in printed.out and "steps = 20\n" in printed.out
    assert call("train --config run.toml --print-config").out == printed.out
    assert call(line).status == call("train --config run.toml").status == 0
    assert len(list((tmp_path / "runs").iterdir())) == 1


# Help ---------------------------------------------------------------------------------------------


def test_the_overview_fits_a_screen(call: Call) -> None:
    shown = call("--help")
    assert (shown.status, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    for name in COMMANDS:
        assert f"rhc {name}" in shown.out
    assert call("").out == call("help").out == shown.out


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_fits_a_screen(call: Call, name: str) -> None:
    shown = call(f"{name} --help")
    assert (shown.status, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    assert call(f"help {name}").out == shown.out
    assert call(f"{name} -h").out == call(f"{name} x --help --seed").out == shown.out
    whole = call(f"{name} --help-all")
    assert whole.status == 0 and max(map(len, whole.out.splitlines())) <= 80
    assert "--help-all" in shown.out or len(whole.out) < len(shown.out) + 50
    for each in COMMANDS[name][0].known().values():
        flag = f"--no-{each.flag[2:]}" if each.default is True else each.flag
        written = rf"\n  (-o, )?{re.escape(flag)}[ \n]"
        if each.setting.place == "argument":
            written = rf"\n  {re.escape(each.setting.metavar)}"
        assert each.text
        assert bool(re.search(written, whole.out)) == (each.setting.place != "none")
        assert bool(re.search(written, shown.out)) == (each.setting.place in ("usual", "argument"))
    assert "None" not in whole.out, "every flag says what its default means"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_each_command_has_examples_that_parse(call: Call, name: str) -> None:
    for flag in ("--help", "--help-all"):
        text = call(f"{name} {flag}").out.replace("\\\n", " ")
        examples = re.findall(r"^  rhc (?! )(.*)", text, re.MULTILINE)
        assert any(example.split()[0] == name for example in examples)
        for example in examples:
            for line in example.replace("> run.toml", "").split("&&"):
                words = shlex.split(line.strip().removeprefix("rhc "), comments=True)
                rest = [word for word in words[1:] if word not in ("--config", "run.toml")]
                assert isinstance(parsed(words[0], rest), COMMANDS[words[0]][0])


def test_the_defaults_in_the_help_of_train_are_those_of_the_law() -> None:
    said = {name: each.setting.unset for name, each in TrainConfig.known().items()}
    given, found = usual_law("given"), usual_law("zero")
    assert said["until"] == f"{found.until:g}; {given.until:g} for a given start"
    assert said["budget"] == f"{found.budget:g}; none for a given start"
    assert math.isinf(given.budget)
    assert said["cooldown"] == f"{found.cooldown:g}" == f"{given.cooldown:g}"
    for start in ("given", "zero"):
        objective = usual_objective(start, 50)
        assert said["average"] == f"{objective.average:g}"
        assert said["objective_batches"] == f"{objective.count}"


def test_version(call: Call) -> None:
    assert call("--version") == (0, f"rhc {rhc.__version__}\n", "")


@pytest.mark.parametrize(
    "line", ["--help", "--version", "train --help", "train --windwo 3", "train --window 0", "runs"]
)
def test_torch_is_not_imported_before_it_is_needed(tmp_path: Path, line: str) -> None:
    code = (
        "import sys; from rhc.cli.main import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'numpy'} & sys.modules.keys(); sys.exit(status)"
    )
    done = process("-c", code, *shlex.split(line), cwd=tmp_path)
    assert done.returncode == (2 if "windwo" in line or "0" in line else 0), done.stderr


def test_module_and_status(tmp_path: Path) -> None:
    done = process("-m", "rhc", "train", "--window", "0", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "rhc: error: window must be ≥ 1, got 0; try --window 50\n"
    ascii_only = process("-X", "utf8=0", "-m", "rhc", "train", "--window", "0", cwd=tmp_path)
    assert ascii_only.returncode == 2


def test_the_names_that_are_offered_are_those_that_exist() -> None:
    assert ("auto", *KNOWN_PRODUCTS) == PRODUCTS
    assert set(OPTIMIZERS) <= {kind.__name__.lower() for kind in DIFFERENTIABLE}


# Listing and looking ------------------------------------------------------------------------------


def test_runs_and_inspect(call: Call, tmp_path: Path, interrupt: Callable[[int], None]) -> None:
    shown = call("runs")
    assert shown.status == 0 and "In runs/" not in shown.out
    for name in ("digits", "mnist", "sine", "FILE.py:NAME"):
        assert re.search(rf"^{re.escape(name)} +\S", shown.out, re.MULTILINE)
    assert call("train own.py:own --window 5").status == 0
    interrupt(60)
    assert call("train own.py:own --window 5 --seed 1 --budget 99").status == 130
    (tmp_path / "runs/broken").mkdir()
    (tmp_path / "runs/broken/config.json").write_text("{")
    lines = call("runs").out.splitlines()
    assert [line for line in lines if "finished, test loss" in line]
    (stopped,) = [line.split()[0] for line in lines if re.search(r"at step \d+ of 20", line)]
    assert [line for line in lines if line.startswith("runs/broken") and "damaged" in line]

    shown = call(f"inspect {stopped}")
    assert shown.status == 0 and "rhc resume" in shown.out
    assert re.search(r"stopped or running, at step \d+ of 20", shown.out)
    assert call(f"resume {stopped}").status == 0
    shown = call(f"inspect {stopped}")
    assert "finished" in shown.out and "plain runs" in shown.out and "to_lr_scheduler" in shown.out
    assert re.search(r"^lr +\S+ [▁▂▃▄▅▆▇█ ]+ \S+$", shown.out, re.MULTILINE)


# The display --------------------------------------------------------------------------------------


class Clock:
    """A clock that is set by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def record(start: int, attempt: int, outcome: str, after: float | None) -> dict[str, Any]:
    return {
        "start": start,
        "stop": start + 50,
        "attempt": attempt,
        "outcome": outcome,
        "reason": "the loss is nan at step 61" if outcome == "rewound" else None,
        "objective_before": 0.21,
        "objective_after": after,
    }


def rows(start: int, loss: float) -> list[dict[str, Any]]:
    return [{"step": start + i, "loss": loss, "lr": 0.03, "momentum": 0.9} for i in range(50)]


def feed(listener: PlainLines | LiveDisplay, clock: Clock, until: int | None = None) -> None:
    """The events of a run that was resumed at step 50, with a rewound and a rejected window."""
    controls = {"lr": 0.03, "momentum": 0.9, "noise": 0.0}
    events: list[Event] = [
        RunStarted(50, 200, 50, 50, ("lr",), True, None),
        VerbStarted("roll", 1, 50, 100, 0),
        WindowAttempted(record(50, 0, "rewound", None)),
        VerbStarted("roll", 1, 50, 100, 1),
        *(StepTaken(step, 0.5, controls) for step in range(50, 100)),
        VerbStarted("rewrite", 1, 50, 100, 1),
        VerbStarted("restore", 1, 50, 100, 2),
        VerbStarted("replay", 1, 50, 100, 2),
        *(StepTaken(step, 0.4, controls) for step in range(50, 75)),
        WindowAttempted(record(50, 2, "accepted", 0.19)),
        VerbStarted("commit", 1, 50, 100, 2),
        Committed(50, 100, rows(50, 0.4), 5.25),
        CheckpointSaved(100, Path("checkpoint")),
        Notice("a notice"),
        VerbStarted("roll", 2, 100, 150, 0),
        *(StepTaken(step, 0.4, controls) for step in range(100, 150)),
        WindowAttempted(record(100, 1, "rejected", 0.3)),
        Committed(100, 150, rows(100, 0.2), 5.5),
        RunEnded({"steps": 200}),
    ]
    with listener:
        for event in events[:until]:
            clock.now += 0.1
            listener(event)


def test_plain_lines_tell_what_happened() -> None:
    text, clock = io.StringIO(), Clock()
    feed(PlainLines(Progress("demo", clock), Console(file=text, width=80)), clock)
    assert [re.sub(r"\s+", " ", line) for line in text.getvalue().splitlines()] == [
        "demo: 200 steps, from step 50, window 50, rewriting lr",
        "step 100/200 rewound: the loss is nan at step 61",
        "step 100/200 loss 0.4 lr 0.03 J 0.21 -> 0.19 accepted cost 5.2x eta 17s",
        "why steps 50–100 accepted: as rewritten J fell from 0.21 to 0.19",
        "notice: a notice",
        "step 150/200 loss 0.2 lr 0.03 J 0.21 -> 0.3 rejected cost 5.5x eta 7s",
        "why steps 100–150 rejected: as rewritten J rose from 0.21 to 0.3",
    ]


@pytest.mark.parametrize("width", [20, 30, 60, 80, 200])
@pytest.mark.parametrize("until", [1, 2, 20, 60, 90, None])
def test_the_frame_fits_any_terminal(width: int, until: int | None) -> None:
    clock, file = Clock(), io.StringIO()
    progress = Progress("demo", clock)
    feed(PlainLines(progress, Console(file=io.StringIO())), clock, until)
    for height in (24, 12, 9, 6, 3):
        file = io.StringIO()
        Console(file=file, width=width).print(frame(progress, width, height))
        lines = file.getvalue().splitlines()
        # One row is the prompt's; rich would cut what is more with dots.
        assert len(lines) < height and max(map(len, lines)) <= min(width, 92)


def test_a_screen_that_shrinks_is_drawn_anew() -> None:
    """Its terminal broke the lines of the frame, so that nothing above can be trusted."""
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, height=24)
    display = LiveDisplay(Progress("demo", clock), console)
    with display:
        display(RunStarted(0, 200, 50, 50, ("lr",), True, None))
        display(VerbStarted("roll", 0, 0, 50, 0))
        for step, width in ((0, 80), (1, 80), (2, 40), (3, 40)):
            console.width, clock.now = width, clock.now + 1
            before = len(file.getvalue())
            display(StepTaken(step, 0.1, {"lr": 0.1}))
            cleared = "\x1b[2J" in file.getvalue()[before:]
            assert cleared == (step == 2)
            assert not cleared or "window 50" in file.getvalue()[before:]


def test_a_reader_that_goes_away_ends_the_run_as_a_signal_would(tmp_path: Path) -> None:
    """`rhc train | head -1`: status 141 and one line, and the run can be resumed."""
    command = f"{shlex.quote(sys.executable)} -m rhc train digits --steps 3000 --directory run"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} | head -1"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout.count("\n")) == (141, 1)
    assert re.fullmatch(r"rhc: stopped; \d+ of 3000 steps .* rhc resume run\n", done.stderr)


def test_the_display_shows_the_loop() -> None:
    clock = Clock()
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, record=True)
    feed(LiveDisplay(Progress("demo", clock), console), clock)
    shown = console.export_text()
    for part in (
        "50/200", "100/200", "150/200", "done", "roll", "replay", "reverse pass", "25/50, try 2",
        "lr 0.03", "momentum 0.9", "train loss 0.2", "-50%", "J 0.21 → 0.19", "accepted 1",
        "rejected 1", "rewound 1", "cost 5.50x", "a notice",
    ):  # fmt: skip
        assert part in shown, part


def test_the_display_without_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, height=24)
    feed(LiveDisplay(Progress("demo", clock), console), clock, 30)
    assert not re.search(r"\x1b\[[\d;]*3\d", file.getvalue())
    assert "\x1b[1;7mroll" in file.getvalue(), "the current verb stands out without colour too"


def test_drawing_takes_little_of_the_time() -> None:
    """A step a millisecond: no more than eight frames a second."""
    clock, drawn = Clock(), 0

    class Counting(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            nonlocal drawn
            drawn += 1

    display = LiveDisplay(
        Progress("demo", clock), Counting(file=io.StringIO(), force_terminal=True, width=80)
    )
    with display:
        display(RunStarted(0, 2000, 500, 500, ("lr",), True, None))
        display(VerbStarted("roll", 0, 0, 5000, 0))
        before = drawn
        for step in range(2000):
            clock.now += 0.001
            display(StepTaken(step, 0.1, {"lr": 0.1}))
        assert 4 <= drawn - before <= 16


def test_words_and_numbers() -> None:
    assert [duration(s) for s in (None, 0.4, 59, 200, 3900)] == ["?", "0s", "59s", "3m20s", "1h05m"]
    assert sparkline([1, 10, 100]) == "▁▅█" or sparkline([1, 10, 100]) == "▁▄█"
    assert sparkline([0.0, 1.0, float("nan")]) == " ▁ " and sparkline([]) == ""
    assert (one_number(0.3), one_number(None), one_number([0.0, 0.0])) == (0.3, None, 0.0)
    assert one_number((0.1, 0.0, 0.4)) == pytest.approx(0.2)


# The settings -------------------------------------------------------------------------------------


def test_settings_survive_their_record() -> None:
    config = TrainConfig(
        run="mnist", data=Path("x"), controls=("lr", "noise"), lr=0.1, segment=3, rewrite=False
    )
    assert TrainConfig.from_record(json.loads(json.dumps(config.to_record())), "here") == config
    assert TrainConfig.from_record({"segment": 3, "lr": 1}, "here").lr == 1.0
    assert TrainConfig.from_record({"memory_budget": 3000}, "here").memory_budget == 3000


# The examples -------------------------------------------------------------------------------------


def example(name: str, folder: Path, monkeypatch: Any, capsys: Any) -> str:
    """What an example prints, run in a folder."""
    monkeypatch.chdir(folder)
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        torch.set_default_dtype(torch.float32)
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_an_own_model_in_25_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len((EXAMPLES / "custom_model.py").read_text().splitlines()) <= 25
    out = example("custom_model.py", tmp_path, monkeypatch, capsys)
    match = re.match(r"validation loss (\S+),", out)
    assert match and float(match.group(1)) < 0.1
    assert len(rhc.Schedule.load(tmp_path / "schedule.json")) == 400


def test_a_hypergradient_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = example("hypergradient_by_hand.py", tmp_path, monkeypatch, capsys)
    error = re.search(r"relative error (\S+)", out)
    assert error and float(error.group(1)) < 1e-6
    first, rewritten, replayed = re.findall(r"^J\b.*?(\d\.\d{6})", out, re.MULTILINE)
    assert float(rewritten) < float(first) and rewritten == replayed


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_a_screen_that_takes_nothing(tmp_path: Path) -> None:
    """A full disk or a closed pipe behind stdout: one sentence, or none; no traceback."""
    command = [sys.executable, "-m", "rhc", "runs"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr == "rhc: error: the output cannot be written (No space left on device)\n"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(writing)
    # 1 where rich wrote: it has an end of its own for that.
    assert done.returncode in (1, 141) and done.stderr == ""


def test_completion_in_bash(tmp_path: Path) -> None:
    """Sourced by bash, it completes commands and flags."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    script = subprocess.run(
        [sys.executable, "-m", "rhc", "--completion", "bash"], capture_output=True, text=True
    )
    assert script.returncode == 0
    (tmp_path / "complete.sh").write_text(script.stdout)
    function = re.search(r"complete (?:-o \S+ )*-F (\S+) rhc", script.stdout)
    assert function is not None

    def completions(*words: str) -> list[str]:
        line = " ".join(words)
        quoted = " ".join(f"'{word}'" for word in words)
        asked = f"""
            source complete.sh; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}
            COMP_LINE='{line}'; COMP_POINT={len(line)}
            {function[1]} rhc '{words[-1]}' '{words[-2]}'; printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        found = subprocess.run([bash, "-c", asked], cwd=tmp_path, capture_output=True, text=True)
        return [word.strip() for word in found.stdout.split("\n") if word.strip()]

    assert {"replay", "report", "resume"} <= set(completions("rhc", "re"))
    assert "--window" in completions("rhc", "train", "--win")


def test_completion_of_an_unknown_shell(call: Call) -> None:
    refuses(call("--completion fish"), ["bash, zsh, tcsh", "fish"])


def test_help_is_there_at_once() -> None:
    """A fifth of a second on an idle machine; torch alone takes two and more."""
    listed = [sys.executable, "-X", "importtime", "-m", "rhc", "--help"]
    found = subprocess.run(listed, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert "rhc.cli.main" in imported and not {"torch", "numpy"} & imported
    # Of the process's own time, which others on the machine do not lengthen; the best of three.
    spent = []
    for line in ("--help", "train --help", "--help"):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "rhc", *line.split()], capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5


# What somebody else wrote -------------------------------------------------------------------------


def of_a_stranger(folder: Path) -> None:
    """A run's directory with a file beside it that its config.json names."""
    folder.mkdir()
    (folder / "payload.py").write_text(
        "from pathlib import Path\nPath('OWNED').touch()\ndef f(**k): raise SystemExit(0)\n"
    )
    documents = {
        "config": {"format": "rhc.run", "version": 1, "run": f"{folder.name}/payload.py:f",
                   "optimizer": "sgd", "lr": 0.1, "steps": 2, "window": 2, "trust": True},
        "schedule": {"format": "rhc.schedule", "version": 1, "start": 0,
                     "controls": {"lr": {"values": [0.1] * 2}}},
        "result": {"status": "finished", "steps": 2, "cost": dict.fromkeys(
            ("plain_run_equivalents", "windows", "rejected_windows", "rewound_windows"), 1)},
    }  # fmt: skip
    for name, document in documents.items():
        (folder / f"{name}.json").write_text(json.dumps(document))
    row = {"loss": 1.0, "lr": 0.1, "gradient_norm": 1.0}
    lines = [json.dumps({"step": step, **row}) for step in range(2)]
    (folder / "tape.jsonl").write_text("".join(f"{line}\n" for line in lines))


STRANGERS = (
    "train --config stranger/config.json --directory out",
    "resume stranger",
    "replay stranger --directory out",
    "hypergradient stranger",
    "distill stranger -o policy",
)


@pytest.mark.parametrize("command", STRANGERS)
def test_a_run_directory_names_no_code_that_is_run(
    command: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_a_stranger(tmp_path / "stranger")
    refused = call(command)
    assert refused.status == 2 and not (tmp_path / "OWNED").exists()
    names = "stranger/config.json names the file", "in the run's own directory", "--trust"
    assert all(part in refused.err for part in names), refused.err
    # Nor from outside of the current folder, by way of a link or not.
    config = json.loads((tmp_path / "stranger/config.json").read_text())
    (tmp_path / "here").mkdir()
    (tmp_path / "here/link.py").symlink_to(tmp_path / "stranger/payload.py")
    (tmp_path / "stranger").rename(tmp_path / "here/stranger")
    monkeypatch.chdir(tmp_path / "here")
    for name in ("../own.py:own", "link.py:f"):
        config["run"] = name
        Path("stranger/config.json").write_text(json.dumps(config))
        assert call(command).status == 2


@pytest.mark.parametrize("command", STRANGERS)
def test_a_run_directory_that_is_trusted(command: str, call: Call, tmp_path: Path) -> None:
    of_a_stranger(tmp_path / "stranger")
    (tmp_path / "stranger/config.json").write_text(
        (tmp_path / "stranger/config.json").read_text().replace(', "trust": true', "")
    )
    call(f"{command} --trust")
    assert (tmp_path / "OWNED").exists()


def test_a_file_that_is_named_as_run_is_run(call: Call, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.py").write_text(OWN_RUNNERS)
    line = "train run/mine.py:own --steps 4 --window 2 --lr 0.1 --start given --directory run"
    assert call(line).status == 0
    assert call(line).status == 0
    assert call("resume run").status == 2
    assert call("train run/mine.py:own --config run/config.json --directory again").status == 0
    assert call("replay run run/mine.py:own --directory other").status == 0


ESCAPES = "\x1b]0;pwned\x07\x1b[2J\x9b31m\u202egnikcah"


@pytest.mark.parametrize("command", ["inspect", "watch", "resume", "report"])
def test_nothing_from_a_file_commands_the_terminal(
    command: str, call: Call, tmp_path: Path
) -> None:
    of_a_stranger(tmp_path / "stranger")
    config = json.loads((tmp_path / "stranger/config.json").read_text())
    text = json.dumps(config | {"run": f"digits{ESCAPES}", "optimizer": ESCAPES})
    (tmp_path / "stranger/config.json").write_text(text)
    row = {"start": 0, "stop": 2, "outcome": f"rewound{ESCAPES}", "reason": ESCAPES}
    (tmp_path / "stranger/windows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "stranger").rename(tmp_path / f"a{ESCAPES[:8]}")
    shown = call(f"{command} 'a{ESCAPES[:8]}'")
    assert not set(shown.out + shown.err) & set(ESCAPES[:2] + "\x07\x9b\u202e") - {"]"}
    if command in ("inspect", "watch"):
        assert r"\x1b[2J\x9b31m\u202egnikcah" in shown.out


@pytest.mark.parametrize(
    "flags",
    [
        *("train --steps 1000000000000000000", "train --steps 1000000000"),
        *("train --threads 1000000000", "train --window 1000000000", "train --accumulate 1000000"),
        *("train --objective-batches 1000000000", "smooth --steps 1000000000"),
        *("compare --seeds 0-999999999", "compare --jobs 100000", "compare --width 1000000"),
        *("compare --steps 1000000000", "smooth --threads 100000"),
    ],
)
def test_a_size_beyond_reason(flags: str, call: Call) -> None:
    refused = call(flags)
    assert refused.status == 2 and refused.err.count("\n") == 1
    assert re.search(r"must be ≤ \d+, got \d+; lower --", refused.err), refused.err


def test_memory_that_does_not_suffice_is_a_sentence(call: Call, tmp_path: Path) -> None:
    (tmp_path / "large.py").write_text(
        "import torch\ndef large(*, seed, data): torch.empty(2**60, dtype=torch.uint8)\n"
    )
    refused = call("train large.py")
    assert refused.status == 2 and "memory does not suffice" in refused.err
    assert refused.err.count("\n") == 1

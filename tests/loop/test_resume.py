"""An interrupted run ends as the uninterrupted one does, to the bit, wherever it was stopped."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_disk import OPERATIONS, FaultyDisk, Killed
from runs import (
    OPTIMIZERS,
    Run,
    Stop,
    classify,
    clouds,
    files,
    make_run,
    seed_everything,
    state_of,
    stop_at_event,
    unequal,
)
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader

from rhc import InputError, Objective, Rewrite, Runner, Schedule
from rhc.errors import StorageError
from rhc.events import CheckpointSaved, Notice, RunStarted, StepTaken
from rhc.storage.checkpoint import Checkpoint, CheckpointStore

STEPS = 11
"""Three or four windows of 4, the last one shorter; the epoch ends at 10."""

LAW = Rewrite(step={"lr": 1.5, "momentum": 0.5, "noise": 4.0}, damping=1e-9)
"""Far steps, so that some windows are rejected, and noise."""


@pytest.fixture(autouse=True)
def three_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are with every optimizer: more can go wrong than with lr alone."""
    monkeypatch.setattr("rhc.runner.DEFAULT_CONTROLS", ("lr", "momentum", "noise"))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def runner(run: Run, directory: Path, listener: Any = None, **options: Any) -> Runner:
    options = {"window": 4, "rewrite": LAW} | options
    listeners = [] if listener is None else [listener]
    return Runner(*run, directory=directory, listeners=listeners, **options)


def shared_generator(seed: int = 0) -> Run:
    """Training and validation loader shuffle with one generator, as PyTorch's notes advise."""
    run = make_run("adam", seed=seed)
    generator = torch.Generator().manual_seed(3)
    train, val = (
        DataLoader(clouds(rows, seed=s), 8, shuffle=True, generator=generator)
        for s, rows in enumerate((75, 60))
    )
    return run._replace(train=train, val=val)


class Branching(nn.Module):
    """A layer that few batches use: the blocks of the reverse pass are split in mid-run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.extra, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.extra(h)) if x[0, 0] > 1.0 else h)


def shuffled_validation(seed: int = 0) -> Run:
    """Seven batches and a half, in an order of the validation stream's own."""
    val = DataLoader(clouds(60, seed=1), 8, shuffle=True)
    return make_run("adamw", seed=seed)._replace(val=val)


def steep(seed: int = 0) -> Run:
    """One batch of low loss, then others: a window that only the one before tells to be normal."""
    run = make_run("sgd", "list", seed=seed, lr=1e-4, norm=False, dropout=0.0)
    train = [(x * (0 if t == 6 else 40), y) for t, (x, y) in enumerate(run.train)]
    return run._replace(train=[*train, *train])


def private_generator(seed: int = 0) -> Run:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(clouds(75), 8, shuffle=True, generator=generator)
    return make_run("sgd", seed=seed)._replace(train=loader)


def branching(seed: int = 0) -> Run:
    run = make_run(seed=seed)
    model = Branching()
    return run._replace(model=model, optimizer=OPTIMIZERS["adam"](model.parameters()))


def two_rates(seed: int = 0) -> Run:
    """Weights and biases in groups of their own, the latter without weight decay."""
    run = make_run("adamw", "augmented", seed=seed)
    parameters = list(run.model.parameters())
    groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": 0.003}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    optimizer.param_groups[1]["weight_decay"] = 0.0
    return run._replace(optimizer=optimizer)


SLOW = pytest.mark.slow

CASES: dict[str, tuple[Callable[[int], Run], dict[str, Any]]] = {
    "chunks": (lambda seed: make_run("adamw", seed=seed), {}),
    "sliding": (lambda seed: make_run("sgd", seed=seed), {"stride": 3}),
    "augmented": (lambda seed: make_run("adam", "augmented", seed=seed), {"stride": 3}),
    "held out": (lambda seed: make_run("sgd", seed=seed)._replace(val=None), {"stride": 2}),
    "shuffled validation": (shuffled_validation, {}),
    "steep": (steep, {"controls": ["lr"], "window": 6}),
    "shared generator": (shared_generator, {}),
    "branching": (branching, {}),
    "accumulated": (
        lambda seed: make_run("sgd", "augmented", seed=seed),
        {"accumulate": 3, "stride": 3},
    ),
    "held out, accumulated": (
        lambda seed: private_generator(seed)._replace(val=None),
        {"accumulate": 3, "clip_value": 0.05},
    ),
    "parameter groups": (
        two_rates,
        {"per_group": ["lr", "weight_decay"], "controls": ["lr", "weight_decay", "noise"]},
    ),
    "stage costs": (
        private_generator,
        {"objective": Objective(loss_weight=1.0, terminal_weight=0.0, average=None)},
    ),
}


def outcome(run: Run, directory: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Everything that must not depend on whether a run was interrupted."""
    record = json.loads(json.dumps(record))
    del record["wall_seconds"], record["cost"]["peak_memory_bytes"]
    return {"state": state_of(run), "files": files(directory), "record": record}


def uninterrupted(name: str, directory: Path, listener: Any = None) -> dict[str, Any]:
    make, options = CASES[name]
    run = make(0)
    result = runner(run, directory, listener, **options).fit(STEPS)
    return outcome(run, directory, result.record)


def resumed(name: str, directory: Path, *, seed: int) -> dict[str, Any]:
    """To the end with new objects; another seed shows that nothing is left to chance."""
    make, options = CASES[name]
    run = make(seed)
    result = runner(run, directory, **options).fit(STEPS)
    assert result.tape == [json.loads(x) for x in files(directory)["tape.jsonl"].splitlines()]
    assert result.windows == [json.loads(x) for x in files(directory)["windows.jsonl"].splitlines()]
    return outcome(run, directory, result.record)


def interrupt(name: str, directory: Path, number: int, *, seed: int) -> bool:
    """Runs until `number` events have passed; False where the run ended before that."""
    make, options = CASES[name]
    try:
        runner(make(seed), directory, stop_at_event(number), **options).fit(STEPS)
    except Stop:
        return True
    return False


# Interrupted at every event ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "every"),
    [
        *((name, 4 if name == "sliding" else 9) for name in CASES),
        pytest.param("sliding", 1, marks=pytest.mark.slow),
    ],
)
def test_interrupted_at_every_verb(name: str, every: int, tmp_path: Path) -> None:
    """And at every checkpoint, commit and attempt, and in the middle of some rolls."""
    events: list[Any] = []
    expected = uninterrupted(name, tmp_path / "whole", events.append)
    numbers = [i for i, e in enumerate(events) if not isinstance(e, StepTaken) or e.step % 7 == 1]
    for number in numbers[::every]:
        directory = tmp_path / f"stopped-{number}"
        assert interrupt(name, directory, number, seed=0)
        # Before the first checkpoint there is nothing to continue but the seed.
        seed = 99 if (directory / "checkpoints").exists() else 0
        assert unequal(expected, resumed(name, directory, seed=seed)) == [], events[number]
        shutil.rmtree(directory)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("sliding", "augmented", "held out") else pytest.param(name, marks=SLOW)
        for name in CASES
    ],
)
def test_interrupted_again_and_again(name: str, tmp_path: Path) -> None:
    """Always a little later than the last time, often twice before anything is committed."""
    expected = uninterrupted(name, tmp_path / "whole")
    directory, draw, stops = tmp_path / "stopped", random.Random(name), 0
    assert interrupt(name, directory, 5, seed=0)
    while stops < 60 and interrupt(name, directory, draw.randrange(20), seed=stops):
        stops += 1
    assert stops >= 3
    assert unequal(expected, resumed(name, directory, seed=99)) == []


# Killed in the middle of a write -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "every"),
    [("sliding", 83), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in CASES)],
)
def test_killed_at_every_operation_on_the_disk(name: str, every: int, tmp_path: Path) -> None:
    """Half a write, a file without a name, a name without a file: nothing of it matters.

    At every one of the first, and of the last; in between at each `every`-th of them.
    """
    make, options = CASES[name]
    options = options | {"keep_checkpoints": 1}
    expected = uninterrupted(name, tmp_path / "whole")
    with FaultyDisk() as disk:
        runner(make(0), tmp_path / "counted", **options).fit(STEPS)
    assert {*OPERATIONS} - {"truncate", "ftruncate"} <= {*disk.names}
    count = len(disk.names)
    numbers = [n for n in range(count) if n < 16 or n > count - 16 or n % every == 0]
    for fatal in numbers:
        directory = tmp_path / str(fatal)
        fault = lambda n, _, at=fatal: Killed() if n == at else None  # noqa: E731
        with FaultyDisk(fault), pytest.raises(Killed):
            runner(make(0), directory, **options).fit(STEPS)
        again = make(0)
        result = runner(again, directory, **options).fit(STEPS)
        found = outcome(again, directory, result.record)
        assert unequal(expected, found) == [], (fatal, disk.names[fatal])
        # What the last save of all did not remove stays, but nothing half written does.
        assert (directory / "checkpoints" / f"window-{STEPS:08d}").is_dir()
        assert list(directory.rglob(".writing*")) == [], fatal
        shutil.rmtree(directory)


# Damaged checkpoints -----------------------------------------------------------------------------


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "flipped": ("model.safetensors", flipped),
    "flipped values": ("values.json", flipped),
    "halved": ("optimizer.safetensors", halved),
    "emptied": ("rng.safetensors", lambda path: path.write_bytes(b"")),
    "missing": ("train_batches.safetensors", Path.unlink),
    "manifest flipped": ("manifest.json", flipped),
    "manifest halved": ("manifest.json", halved),
    "manifest missing": ("manifest.json", Path.unlink),
}


def stopped_late(directory: Path) -> list[Path]:
    """A run that was interrupted with checkpoints at steps 0, 4 and 8; returns them, ascending."""
    run = make_run("adamw")

    def listener(event: Any) -> None:
        if isinstance(event, StepTaken) and event.step == 9:
            raise Stop

    with pytest.raises(Stop):
        runner(run, directory, listener).fit(STEPS)
    found = sorted((directory / "checkpoints").iterdir())
    assert [p.name[-1] for p in found] == ["0", "4", "8"]
    return found


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("how_many", [1, 2])
def test_a_damaged_checkpoint_is_passed_over(damage: str, how_many: int, tmp_path: Path) -> None:
    """Said loudly, with the file's name; the one before it is used, and the end is the same."""
    expected = uninterrupted("chunks", tmp_path / "whole")
    checkpoints = stopped_late(tmp_path / "run")
    name, damaged = DAMAGES[damage]
    for checkpoint in checkpoints[-how_many:]:
        damaged(checkpoint / name)
    events: list[Any] = []
    run = make_run("adamw", seed=99)
    result = runner(run, tmp_path / "run", events.append).fit(STEPS)
    notices = [e.message for e in events if isinstance(e, Notice)]
    if how_many == 2:  # from the start, where the first window says what it follows
        assert notices.pop().startswith("running statistics")
    assert len(notices) == how_many
    for notice, checkpoint in zip(notices, reversed(checkpoints), strict=False):
        # A flipped manifest may accuse the file whose digest was hit.
        assert str(checkpoint if damage == "manifest flipped" else checkpoint / name) in notice
    started = next(e for e in events if isinstance(e, RunStarted))
    assert started.start == 8 - 4 * how_many
    assert unequal(expected, outcome(run, tmp_path / "run", result.record)) == []


def contents(directory: Path) -> dict[str, bytes]:
    found = [p for p in directory.rglob("*") if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(directory)): p.read_bytes() for p in found}


def refused(run: Run, directory: Path, message: str, steps: int = STEPS, **options: Any) -> str:
    """The InputError of a fit that must leave everything as it is."""
    before, state = contents(directory), state_of(run)
    resume = options.pop("resume", "auto")
    with pytest.raises(InputError, match=message) as error:
        runner(run, directory, **options).fit(steps, resume)
    assert contents(directory) == before
    # The runner seeds its streams of batches before it looks at the directory.
    assert unequal(state["model"], state_of(run)["model"]) == []
    assert unequal(state["optimizer"], state_of(run)["optimizer"]) == []
    return str(error.value)


@pytest.mark.parametrize("finished", [True, False])
def test_no_checkpoint_that_can_be_used(finished: bool, tmp_path: Path) -> None:
    """A run whose every checkpoint is damaged is not begun anew on top of what it left."""
    directory = tmp_path / "run"
    if finished:
        uninterrupted("chunks", directory)
    else:
        stopped_late(directory)
    for checkpoint in (directory / "checkpoints").iterdir():
        flipped(checkpoint / "values.json")
    message = "holds a run, but no checkpoint of it can be used; start again in another --directory"
    refused(make_run("adamw"), directory, message)
    shutil.rmtree(directory / "checkpoints")
    refused(make_run("adamw"), directory, message)


def test_a_finished_run_whose_last_checkpoint_is_damaged(tmp_path: Path) -> None:
    """Its last window is run again, and nothing of the tape is lost."""
    directory = tmp_path / "run"
    expected = uninterrupted("chunks", directory)
    flipped(directory / "checkpoints" / f"window-{STEPS:08d}" / "model.safetensors")
    assert unequal(expected, resumed("chunks", directory, seed=99)) == []


# The same configuration, or none -----------------------------------------------------------------

CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "window": ({"window": 5}, "stride was 4, is 5; window was 4, is 5"),
    "stride": ({"stride": 2}, "stride was 4, is 2"),
    "seed": ({"seed": 3}, "seed was 0, is 3"),
    "controls": ({"controls": ["lr"]}, r'controls was \["lr", "momentum", "noise"\], is \["lr"\]'),
    "law": (
        {"rewrite": Rewrite(step={**LAW.step, "noise": 5.0})},
        r"rewrite.step.noise was 4.0, is 5.0",
    ),
    "no law": ({"rewrite": False}, "rewrite was {.*, is false"),
    "objective": ({"objective": Objective(batches=3)}, "objective.batches was 4, is 3"),
    "clipping": ({"clip_norm": 2.0}, "clip_norm was null, is 2.0"),
    "product": ({"product": "central-difference"}, 'product was "auto", is "central-difference"'),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("name", CHANGED)
def test_another_configuration_is_refused(name: str, finished: bool, tmp_path: Path) -> None:
    if finished:
        uninterrupted("chunks", tmp_path)
    else:
        stopped_late(tmp_path)
    options, difference = CHANGED[name]
    message = refused(
        make_run("adamw"), tmp_path, f"belongs to another configuration .*{difference}", **options
    )
    assert message.endswith("choose another --directory, or give the same settings")


def test_another_number_of_steps_model_optimizer_or_data(tmp_path: Path) -> None:
    stopped_late(tmp_path)
    message = "steps was 11, is 10.*steps can be raised, not lowered: give as many or more"
    refused(make_run("adamw"), tmp_path, message, steps=10)
    refused(make_run("adam"), tmp_path, 'optimizer was "adamw", is "adam"')
    refused(make_run("adamw", lr=0.02), tmp_path, "initial.lr was 0.01, is 0.02")
    refused(make_run("adamw", norm=False), tmp_path, r"parameters was \d+, is \d+")
    refused(make_run("adamw")._replace(val=None), tmp_path, "validation was true, is false")


def test_a_model_of_as_many_but_other_parameters(tmp_path: Path) -> None:
    def made(model: nn.Module) -> Run:
        seed_everything(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Run(model, optimizer, classify, list(make_run(loader="list").train), None)

    uninterrupted_run = made(nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 3)))

    def stop_once_saved(event: Any) -> None:
        if isinstance(event, CheckpointSaved) and event.step > 0:
            raise Stop

    with pytest.raises(Stop):
        runner(uninterrupted_run, tmp_path, stop_once_saved).fit(STEPS)
    renamed = nn.Sequential(nn.Identity(), nn.Linear(6, 3, bias=False), nn.Linear(3, 3))
    refused(
        made(renamed),
        tmp_path,
        r"parameter\.\d\.(weight|bias) is in the (model|checkpoint) only; resume with the model",
    )
    other = nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 3)).double()
    other_loss = lambda model, batch: classify(model, (batch[0].double(), batch[1]))  # noqa: E731
    refused(
        made(other)._replace(loss_fn=other_loss),
        tmp_path,
        r"is \(.*\) of torch.float32 in the checkpoint, \(.*\) of torch.float64 in the model; resu",
    )
    model = nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 3))
    groups = [{"params": [p]} for p in model.parameters()]
    refused(
        made(model)._replace(optimizer=torch.optim.SGD(groups, lr=0.1)),
        tmp_path,
        "the checkpoint's optimizer has 3 parameters in 1 groups, this one 3 in 3; resume with the",
    )


def test_less_data_than_before(tmp_path: Path) -> None:
    stopped_late(tmp_path)
    fewer = DataLoader(clouds(20), 8, shuffle=True)
    refused(
        make_run("adamw")._replace(train=fewer),
        tmp_path,
        "train_loader ended after 3 batches, but the run that is resumed was at batch 8 of its epo",
    )


def test_never_resuming(tmp_path: Path) -> None:
    stopped_late(tmp_path)
    refused(make_run("adamw"), tmp_path, "holds a run already; use --resume auto", resume="never")
    made = runner(make_run("adamw"), tmp_path / "new").fit(STEPS, resume="never")
    assert made.record["steps"] == STEPS


def test_a_directory_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "schedule.json").write_text("mine")
    refused(make_run("adamw"), tmp_path, "holds schedule.json but no config.json, so it is no run")
    (tmp_path / "config.json").write_text("[1]")
    refused(make_run("adamw"), tmp_path, "config.json must hold a JSON object, got list")
    (tmp_path / "config.json").write_text("{")
    refused(make_run("adamw"), tmp_path, r"config.json is not valid JSON \(")


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    """A second run in the directory is refused while the first one trains, and not afterwards."""
    messages = []

    def listener(event: Any) -> None:
        if isinstance(event, StepTaken) and event.step == 6 and not messages:
            with pytest.raises(InputError) as error:
                runner(make_run("adamw"), tmp_path).fit(STEPS)
            messages.append(str(error.value))

    seed_everything(0)
    result = runner(make_run("adamw"), tmp_path, listener).fit(STEPS)
    assert len(messages) == 1 and "is being written by another process; wait for it" in messages[0]
    assert [row["step"] for row in result.tape] == list(range(STEPS))
    assert runner(make_run("adamw"), tmp_path).fit(STEPS).record == result.record


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    """A DataLoader's worker outlives a killed run for seconds; the run must resume at once."""
    children = []

    def listener(event: Any) -> None:
        if isinstance(event, StepTaken) and event.step == 6:
            if (child := os.fork()) == 0:
                time.sleep(60)
                os._exit(0)
            children.append(child)
            raise Stop

    try:
        with pytest.raises(Stop):
            runner(make_run("adamw"), tmp_path, listener).fit(STEPS)
        assert runner(make_run("adamw"), tmp_path).fit(STEPS).record["steps"] == STEPS
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def line_flipped(path: Path) -> None:
    """One digit of the last line but one."""
    lines = path.read_bytes().splitlines(keepends=True)
    digits = [i for i, byte in enumerate(lines[-2]) if chr(byte).isdigit()]
    line = bytearray(lines[-2])
    line[digits[-1]] ^= 1
    path.write_bytes(b"".join([*lines[:-2], bytes(line), lines[-1]]))


LINES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped": (line_flipped, r"{name}.*, line \d+, does not match its checksum in .{name}.crc32"),
    "halved": (halved, r"{name} has \d+ bytes of whole lines"),
    "line lost": (
        lambda path: path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:-2]) + b"\n"),
        r"{name} has \d+ bytes of whole lines",
    ),
    "checksums halved": (
        lambda path: halved(path.with_name(f".{path.name}.crc32")),
        r".{name}.crc32 has no checksum of line \d+",
    ),
}


@pytest.mark.parametrize("name", ["tape.jsonl", "windows.jsonl"])
@pytest.mark.parametrize("damage", LINES)
def test_a_damaged_line_is_named_and_made_again(damage: str, name: str, tmp_path: Path) -> None:
    """By the newest checkpoint that all its lines are there for; the end is the same."""
    expected = uninterrupted("chunks", tmp_path / "whole")
    stopped_late(tmp_path / "run")
    damaged, message = LINES[damage]
    damaged(tmp_path / "run" / name)
    events: list[Any] = []
    run = make_run("adamw", seed=99)
    result = runner(run, tmp_path / "run", events.append).fit(STEPS)
    notices = [e.message for e in events if isinstance(e, Notice)]
    assert notices and re.search(message.format(name=name), notices[0]), notices
    assert next(e for e in events if isinstance(e, RunStarted)).start in (0, 4)
    assert unequal(expected, outcome(run, tmp_path / "run", result.record)) == []


def test_a_line_that_no_checkpoint_can_make_again(tmp_path: Path) -> None:
    stopped_late(tmp_path)
    for step in (0, 4):
        shutil.rmtree(tmp_path / "checkpoints" / f"window-{step:08d}")
    halved(tmp_path / "tape.jsonl")
    message = r"no checkpoint of it can be used \(.*tape.jsonl has \d+ bytes of whole lines where"
    refused(make_run("adamw"), tmp_path, message)


def test_a_run_of_before_there_were_checksums(tmp_path: Path) -> None:
    """Its lines are taken at their word, and get checksums."""
    expected = uninterrupted("chunks", tmp_path / "whole")
    stopped_late(tmp_path / "run")
    for name in ("tape.jsonl", "windows.jsonl", "start.jsonl"):
        (tmp_path / "run" / f".{name}.crc32").unlink(missing_ok=True)
    assert unequal(expected, resumed("chunks", tmp_path / "run", seed=99)) == []
    lines = (tmp_path / "run" / "tape.jsonl").read_bytes().splitlines()
    sums = (tmp_path / "run" / ".tape.jsonl.crc32").read_bytes().splitlines()
    assert sums == [b"%08x" % zlib.crc32(line) for line in lines]


# Longer than before ------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [True, False])
def test_more_steps(finished: bool, tmp_path: Path) -> None:
    """The plan is made anew from there; also that run can be stopped anywhere."""
    longer = 2 * STEPS
    if finished:
        uninterrupted("sliding", tmp_path / "whole")
    else:
        interrupt("sliding", tmp_path / "whole", 60, seed=0)
    before = files(tmp_path / "whole")["tape.jsonl"]
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    make, options = CASES["sliding"]
    events: list[Any] = []
    run = make(98)
    result = runner(run, tmp_path / "whole", events.append, **options).fit(longer)
    expected = outcome(run, tmp_path / "whole", result.record)
    notices = [e.message for e in events if isinstance(e, Notice)]
    assert f"steps was {STEPS}, is {longer}: the plan is made anew" in notices[0]
    assert [row["step"] for row in result.tape] == list(range(longer))
    assert len(result.schedule) == longer and result.record["steps"] == longer
    assert expected["files"]["tape.jsonl"].startswith(before)
    assert (tmp_path / "whole" / f"result-{STEPS}.json").exists() == finished
    for number in (3, 25, 20):
        with pytest.raises(Stop):
            runner(make(97), tmp_path / "stopped", stop_at_event(number), **options).fit(longer)
    again = make(96)
    result = runner(again, tmp_path / "stopped", **options).fit(longer)
    assert unequal(expected, outcome(again, tmp_path / "stopped", result.record)) == []
    with pytest.raises(
        InputError, match=r"steps was 22, is 11\); steps can be raised, not lowered"
    ):
        runner(make(0), tmp_path / "stopped", **options).fit(STEPS)


def test_more_memory_is_said_and_tolerated(tmp_path: Path) -> None:
    stopped_late(tmp_path)
    events: list[Any] = []
    runner(make_run("adamw"), tmp_path, events.append, memory_budget=10**9).fit(STEPS)
    assert [e.message for e in events if isinstance(e, Notice)] == [
        "memory_budget was null, is 1000000000: what the reverse pass keeps changes, and its "
        "bits may differ"
    ]
    assert json.loads((tmp_path / "config.json").read_text())["memory_budget"] == 10**9


# Finished ----------------------------------------------------------------------------------------


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    run = make_run("adamw")
    result = runner(run, tmp_path).fit(STEPS)
    before = contents(tmp_path)
    events: list[Any] = []
    again = make_run("adamw", seed=99)
    found = runner(again, tmp_path, events.append).fit(STEPS)
    assert found.record == result.record
    assert (found.tape, found.windows) == (result.tape, result.windows)
    assert found.schedule == result.schedule
    assert [type(e).__name__ for e in events] == ["RunEnded"]
    assert contents(tmp_path) == before
    assert unequal(state_of(run)["model"], state_of(again)["model"]) == []


def test_other_versions_are_said_and_tolerated(tmp_path: Path) -> None:
    stopped_late(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["versions"]["torch"] = "1.0"
    config["hardware"] |= {"cores": 1000, "threads": 77}
    (tmp_path / "config.json").write_text(json.dumps(config))
    events: list[Any] = []
    runner(make_run("adamw"), tmp_path, events.append).fit(STEPS)
    told = [e.message for e in events if isinstance(e, Notice)]
    assert "config.json was altered since it was written" in told.pop(0)
    assert told == [
        f"the run began with torch 1.0, this is {torch.__version__}: its bits may differ",
        f"the run began with threads 77, here it is {torch.get_num_threads()}: its bits may differ",
    ]


def test_settings_that_were_altered(tmp_path: Path) -> None:
    """Of the file alone, as `rhc resume` would read them: the checkpoints know better."""
    stopped_late(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["seed"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    events: list[Any] = []
    with pytest.raises(InputError, match=r"config.json is not of the settings that its checkpoint"):
        runner(make_run("adamw"), tmp_path, events.append, seed=3).fit(STEPS)
    assert any("config.json was altered" in e.message for e in events if isinstance(e, Notice))


@pytest.mark.parametrize("damage", ["a figure", "its end", "its checksum"])
def test_a_result_that_was_altered_is_made_again(damage: str, tmp_path: Path) -> None:
    first = runner(make_run("adamw"), tmp_path).fit(STEPS).record
    path = tmp_path / "result.json"
    text = path.read_text()
    if damage == "a figure":
        path.write_text(text.replace('"val_loss": ', '"val_loss": 1'))
    elif damage == "its end":
        path.write_text(text[:-9])
    else:
        (tmp_path / ".result.json.crc32").write_text("00000000\n")
    events: list[Any] = []
    again = runner(make_run("adamw", seed=9), tmp_path, events.append).fit(STEPS).record
    (told,) = [e.message for e in events if isinstance(e, Notice)]
    assert "result.json" in told and told.endswith("it is made again")
    apart = {k for k in first if first[k] != again[k]}
    assert apart <= {"wall_seconds", "cost"} and json.loads(path.read_text()) == again
    assert runner(make_run("adamw"), tmp_path).fit(STEPS).record == again


def test_a_schedule_that_was_altered_is_taken_and_told(tmp_path: Path) -> None:
    """People edit schedules; without the entry that the edit breaks, nothing is said."""
    runner(make_run("adamw"), tmp_path).fit(STEPS)
    path = tmp_path / "schedule.json"
    document = json.loads(path.read_text())
    document["controls"]["lr"]["values"][0] = 0.5
    path.write_text(json.dumps(document))
    with pytest.warns(UserWarning, match=r"schedule.json was altered since it was written"):
        assert float(Schedule.load(path)["lr"][0]) == 0.5
    del document["sha256"]
    path.write_text(json.dumps(document))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Schedule.load(path)


# SIGKILL -----------------------------------------------------------------------------------------


class Child:
    """killed_run.py as a process; `phase` is what it said last."""

    def __init__(self, directory: Path) -> None:
        script = Path(__file__).parents[1] / "killed_run.py"
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(directory), "0"],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), True)
        assert self.process.stdout.readline() == "READY\n"
        self.began = time.monotonic()

    def finish(self) -> float:
        """Waits for the end, and returns how long it trained."""
        out, _ = self.process.communicate(timeout=300)
        assert self.process.returncode == 0 and out.endswith("DONE\n")
        return time.monotonic() - self.began

    def kill(self, after: float) -> str | None:
        """SIGKILL after so many seconds: the phase it was in, or None where it had ended."""
        time.sleep(after)
        self.process.send_signal(signal.SIGKILL)
        out, _ = self.process.communicate()
        if out.endswith("DONE\n"):
            return None
        assert self.process.returncode == -signal.SIGKILL
        return out.splitlines()[-1] if out else "open"


def final(directory: Path) -> dict[str, Any]:
    return {"tensors": load_file(directory / "final.safetensors"), "files": files(directory)}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], float]]:
    """What the uninterrupted process leaves, and how long it trains."""
    directory = tmp_path_factory.mktemp("reference")
    seconds = Child(directory).finish()
    yield final(directory), seconds


@pytest.mark.parametrize(("kills", "seed"), [(1, 0), pytest.param(20, 1, marks=SLOW)])
def test_sigkill_at_random_moments(
    kills: int, seed: int, reference: tuple[dict[str, Any], float], tmp_path: Path
) -> None:
    """A run is killed until it ends, and others after it until there were enough kills."""
    expected, seconds = reference
    draw = random.Random(seed)
    phases: Counter[str] = Counter()
    directories = [tmp_path / "0"]
    while phases.total() < kills:
        phase = Child(directories[-1]).kill(draw.uniform(0, 0.3) * seconds)
        if phase is not None:
            phases[phase] += 1
        else:
            directories.append(tmp_path / str(len(directories)))
    Child(directories[-1]).finish()
    print(f"killed while: {dict(phases)}, in {len(directories)} runs")
    for directory in directories:
        assert unequal(expected, final(directory)) == [], phases
    assert re.search(r'"noise": [^0]|"noise": 0\.0*[1-9]', expected["files"]["tape.jsonl"].decode())


# Links, litter, and what somebody else sealed -----------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run, to be copied."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    runner(make_run("adamw"), directory).fit(STEPS)
    return directory


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "schedule.json", "tape.jsonl", ".tape.jsonl.crc32", "windows.jsonl"),
        *("start.jsonl", "result.json", ".lock", ".writing-probe", "wandb.id", "report.html"),
        *("checkpoints", "tensorboard"),
    ],
)
@pytest.mark.parametrize("dangling", [False, True])
def test_what_is_written_through_a_link_is_refused(
    name: str, dangling: bool, trained: Path, tmp_path: Path
) -> None:
    """And nothing outside is written, emptied, removed or made."""
    shutil.copytree(trained, tmp_path / "run")
    folder = name in ("checkpoints", "tensorboard")
    outside, inside = tmp_path / "outside", tmp_path / "run" / name
    outside.mkdir()
    if inside.exists():
        inside.rename(outside / name)
    elif folder:
        (outside / name).mkdir()
    else:
        (outside / name).write_text("precious")
    if folder:
        (outside / name / ".removing-8").mkdir()
    inside.symlink_to(outside / ("missing" if dangling else name))
    before = contents(outside)
    with pytest.raises(InputError, match=rf"{re.escape(name)} is a link: remove it, or put"):
        runner(make_run("adamw"), tmp_path / "run").fit(STEPS + 4)
    assert contents(outside) == before


def test_a_link_that_appears_while_it_trains(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    notices: list[str] = []

    def listener(event: Any) -> None:
        if isinstance(event, Notice):
            notices.append(event.message)
        store = tmp_path / "run/checkpoints"
        if isinstance(event, StepTaken) and event.step == 5 and not store.is_symlink():
            store.rename(tmp_path / "run/others")
            store.symlink_to(tmp_path / "outside")

    with pytest.raises(StorageError, match="checkpoints is a link"):
        runner(make_run("adamw"), tmp_path / "run", listener).fit(STEPS)
    assert list((tmp_path / "outside").iterdir()) == []
    assert any("checkpoints is a link" in text for text in notices)


def test_the_directory_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    first = runner(make_run("adamw"), tmp_path / "run").fit(STEPS)
    (tmp_path / "run/notes").symlink_to(tmp_path)  # a person's own
    assert runner(make_run("adamw"), tmp_path / "run").fit(STEPS).record == first.record
    runner(make_run("adamw"), tmp_path / "run").fit(STEPS + 4)
    assert (tmp_path / "disk/result.json").exists()


def test_a_file_with_two_names_is_changed_under_one(tmp_path: Path) -> None:
    """As in a copy by `cp -al`."""
    runner(make_run("adamw"), tmp_path / "run").fit(STEPS)
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=os.link)
    before = contents(tmp_path / "copy")
    runner(make_run("adamw"), tmp_path / "run").fit(STEPS + 4)
    assert contents(tmp_path / "copy") == before


def test_what_a_killed_removal_left_goes(tmp_path: Path) -> None:
    runner(make_run("adamw"), tmp_path / "run").fit(STEPS)
    store = tmp_path / "run/checkpoints"
    kept = sorted(p.name for p in store.iterdir())
    for name in (".removing-00000004", ".writing-window-00000008"):
        shutil.copytree(store / kept[0], store / name)
    runner(make_run("adamw"), tmp_path / "run").fit(STEPS)
    assert sorted(p.name for p in store.iterdir()) == kept


@pytest.mark.parametrize("name", ["start.jsonl", ".start.jsonl.crc32"])
def test_a_damaged_line_of_the_search_is_told(name: str, tmp_path: Path) -> None:
    """Where the run is under way nothing is lost by it; before, it is tried again."""
    whole = make_run("adamw")
    options: dict[str, Any] = {"window": 4, "keep_checkpoints": 9}
    expected = Runner(*whole, directory=tmp_path / "run", **options).fit(STEPS)
    for stopped in ("late", "early"):
        shutil.copytree(tmp_path / "run", tmp_path / stopped)
        (tmp_path / stopped / "result.json").unlink()
        for step in (STEPS, 8, 4) if stopped == "early" else (STEPS,):
            shutil.rmtree(tmp_path / stopped / f"checkpoints/window-{step:08d}")
        path = tmp_path / stopped / name
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        before, notices = (tmp_path / stopped / "start.jsonl").read_bytes(), []

        def listener(event: Any, notices: list[str] = notices) -> None:
            if isinstance(event, Notice):
                notices.append(event.message)

        again = make_run("adamw")
        go_on = Runner(*again, directory=tmp_path / stopped, listeners=[listener], **options)
        found = go_on.fit(STEPS)
        words = "not needed any more" if stopped == "late" else "tried again"
        assert any("start.jsonl, line 1," in text and words in text for text in notices), notices
        assert unequal(state_of(whole), state_of(again)) == []
        assert (
            found.record["cost"]["plain_run_equivalents"]
            == (expected.record["cost"]["plain_run_equivalents"])
        )
        if stopped == "late":
            assert (tmp_path / stopped / "start.jsonl").read_bytes() == before


KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a loss": ("tape.jsonl", {"loss": "x"}, 'line 1, is damaged: loss must be .* got "x"'),
    "a step": ("tape.jsonl", {"step": None}, "step must be a whole number, got null"),
    "an outcome": ("windows.jsonl", {"outcome": []}, r"outcome must be a string, got \[\]"),
    "a ledger": ("values.json", {"cost": {"windows": "3"}}, "windows must be a whole number"),
    "a correction": ("values.json", {"correction": [1]}, "correction must be an object or nothing"),
    "patience": ("values.json", {"patience": {}}, "patience must be a list"),
}


@pytest.mark.parametrize("name", KINDS)
def test_values_of_another_kind_that_somebody_sealed(name: str, tmp_path: Path) -> None:
    file, change, message = KINDS[name]
    runner(make_run("adamw"), tmp_path / "run").fit(STEPS)
    (tmp_path / "run/result.json").unlink()
    path = tmp_path / "run" / file
    store = CheckpointStore(tmp_path / "run/checkpoints", keep=1)
    newest = store.load(store.steps()[-1])
    values = newest.values
    if file == "values.json":
        values |= change
    else:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        rows[0] |= change
        lines = [json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        sums = b"".join(b"%08x\n" % zlib.crc32(line) for line in lines)
        path.with_name(f".{file}.crc32").write_bytes(sums)
        values["lengths"][file.removesuffix(".jsonl")] = path.stat().st_size
    store.save(Checkpoint(newest.step, newest.tensors, values))
    with pytest.raises(InputError, match=message) as raised:
        runner(make_run("adamw"), tmp_path / "run").fit(STEPS + 4)
    assert file in str(raised.value)

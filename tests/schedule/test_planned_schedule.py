"""A plan by a few numbers: the values that it stands for, its file, and what it does not cost."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FILES, Stop, make_run, stop_at_step
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rhc import EpochPlanner, InputError, Rewrite, Runner, Schedule
from rhc.loop.update_rule import carried, replanned
from rhc.schedule import TEMPLATES, Template, shaped, template_factors
from rhc.schedule.planned import Piece, PlannedSchedule, Shape
from rhc.storage.checkpoint import CheckpointStore

STEPS = 30
LAW = Rewrite(step={"lr": 0.7}, damping=1e-9, carry=0.5, restart=(1.0, 0.5))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def plan(template: Template = "cosine", lr: Any = 0.1, **others: Any) -> PlannedSchedule:
    held = Schedule.constant(1, 5, lr=lr, momentum=0.9, **others)
    return PlannedSchedule((Piece(0, held, Shape(template, STEPS, 0.2, 0.1)),), STEPS)


# Values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("steps", [1, 2, 7, 64, 1001])
def test_a_step_has_one_factor_whichever_are_asked_for(template: Template, steps: int) -> None:
    """To the bit: a window that is cut elsewhere, by a stop, goes on with the same lr."""
    whole = template_factors(template, steps, 0.3, 0.2)
    for start in range(0, steps, 13):
        stop = min(start + 29, steps)
        at = torch.arange(start, stop, dtype=torch.float64)
        part = template_factors(template, steps, 0.3, 0.2, at)
        assert torch.equal(part, whole[start:stop]) and part.dtype == torch.float64
    assert Shape(template, steps, 0.3, 0.2).flat == bool((whole == 1).all())


@pytest.mark.parametrize("lr", [0.1, (0.1, 0.0, 0.02)])
def test_a_plan_stands_for_a_value_at_every_step(lr: Any) -> None:
    planned = plan(lr=lr, noise=0.01)
    factors = template_factors("cosine", STEPS, 0.2, 0.1)
    expected = shaped(torch.tensor(lr, dtype=torch.float64), factors)
    assert len(planned) == STEPS and planned.names == ("lr", "momentum", "noise")
    for start, stop in ((0, STEPS), (7, 8), (13, 20)):
        window = planned.window(start, stop)
        assert (window.start, window.stop, window.seed) == (start, stop, 5)
        assert torch.equal(window["lr"], expected[start:stop])
        assert window["momentum"].tolist() == [0.9] * (stop - start)
    with pytest.raises(
        InputError, match=r"window \[20, 31\) must lie within the planned steps \[0"
    ):
        planned.window(20, 31)


@pytest.mark.parametrize("lr", [0.1, (0.1, 0.0, 0.02)])
def test_moves_are_those_of_every_value(lr: Any) -> None:
    """What is held is moved to the same bits; what a template shapes, to rounding."""
    planned = plan(lr=lr, noise=0.0)
    every = planned.window(0, STEPS)
    groups = 1 if isinstance(lr, float) else len(lr)
    for start in (5, 5, 12):
        by = -0.3 if groups == 1 else (0.4, 0.2, -0.1)
        shifts = {"lr": by, "momentum": 0.2, "noise": 0.1}
        planned, every = replanned(planned, start, shifts), carried(every, start, shifts)
        assert planned.start == start
    for name in planned.names:
        expected = every.window(12, STEPS)[name]
        found = planned.window(12, STEPS)[name]
        if name == "lr":
            assert torch.allclose(found, expected, rtol=1e-13, atol=0)
        else:
            assert torch.equal(found, expected)
    assert replanned(planned, 20, {"lr": 0.0}) is planned


def test_a_template_that_begins_anew() -> None:
    first = plan()
    lr = torch.tensor(0.05, dtype=torch.float64)
    anew = first.begun_anew(25, lr, Shape("cosine", STEPS - 25, 0.2, start=25))
    assert torch.equal(anew.window(20, 25)["lr"], first.window(20, 25)["lr"])
    expected = shaped(lr, template_factors("cosine", STEPS - 25, 0.2))
    assert torch.equal(anew.window(22, STEPS)["lr"][3:], expected)
    moved = replanned(anew, 22, {"lr": 0.5})
    factor = moved.window(22, STEPS)["lr"] / anew.window(22, STEPS)["lr"]
    assert torch.allclose(factor, torch.tensor(0.5, dtype=torch.float64).exp())
    assert len(replanned(moved, 25, {"lr": 0.1}).pieces) == 1  # what is over is forgotten


# Files -------------------------------------------------------------------------------------------


def test_a_plan_comes_back_from_json_to_the_bit() -> None:
    lr = torch.tensor(0.123456789, dtype=torch.float64)
    first = plan().begun_anew(25, lr, Shape("wsd", STEPS - 25, 0.2, start=25))
    found, committed = PlannedSchedule.from_json(json.loads(json.dumps(first.to_json(20))), "x")
    assert committed == 20
    assert found.window(0, STEPS) == first.window(0, STEPS)


def broken(change: Callable[[Any], Any]) -> Any:
    document = json.loads(json.dumps(plan().to_json(0)))
    change(document)
    return document


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=3), "version 3, this rhc reads a plan of version 2"),
        (lambda d: d.update(committed=31), "a plan from step 0, of 31 and 30 steps"),
        (lambda d: d.update(plan=[]), "IndexError"),
        (lambda d: d["plan"].append(d["plan"][0]), "pieces that are not one after the other"),
        (lambda d: d["plan"][0].update(start=-1), "a plan from step -1"),
        (lambda d: d["plan"][0]["template"].update(template="x"), "a template 'x' over 30 steps"),
        (lambda d: d["plan"][0]["template"].update(steps=0), "a template over 0 steps"),
        (lambda d: d["plan"][0]["template"].update(steps="a"), "template 'cosine' over 'a'"),
        (lambda d: d["plan"][0]["template"].update(depth=1), "TypeError"),
        (lambda d: d["plan"][0]["values"]["controls"].pop("lr"), "no single lr for it"),
        (
            lambda d: d["plan"].append({**d["plan"][0], "start": 9, "template": None}
                                       | {"values": Schedule.constant(1, lr=1.0).to_json()}),
            "pieces of other controls or parameter groups",
        ),
        (lambda d: d.update(steps=10**18), "no more than 200000000 values are read"),
    ],
)  # fmt: skip
def test_what_is_no_plan_is_refused(
    change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps(broken(change)))
    with pytest.raises(InputError, match=message) as error:
        Schedule.load(path)
    assert str(error.value).startswith(str(path))


def run_of(directory: Path | None, listener: Any = None, seed: int = 0, **options: Any) -> Runner:
    options = {"window": 5, "start": "given", "rewrite": LAW} | options
    listeners = [] if listener is None else [listener]
    return Runner(*make_run("sgd", seed=seed), directory=directory, listeners=listeners, **options)


RUNS: dict[str, dict[str, Any]] = {
    "rewritten": {},
    "cosine": {"template": "cosine", "warmup": 0.1, "stride": 3},
    "plain": {"rewrite": False},
    "plain cosine": {"rewrite": False, "template": "cosine"},
    "followed": {"rewrite": False, "schedule": Schedule({"lr": torch.linspace(0.1, 0.01, 45)})},
}


@pytest.mark.parametrize("case", RUNS)
def test_the_schedule_of_a_run_that_was_stopped(case: str, tmp_path: Path) -> None:
    """What is committed as it was trained, then the plan; and in the end all as it was trained."""
    options = RUNS[case]
    with pytest.raises(Stop):
        run_of(tmp_path, stop_at_step(17), **options).fit(STEPS)
    rows = [json.loads(line) for line in (tmp_path / "tape.jsonl").read_text().splitlines()]
    stopped = Schedule.load(tmp_path / "schedule.json")
    assert (len(stopped), stopped.start) == (STEPS, 0) and len(rows) >= 15
    for name, values in stopped.values.items():
        assert values[: len(rows)].tolist() == [row[name] for row in rows]
    result = run_of(tmp_path, seed=9, **options).fit(STEPS)
    assert Schedule.load(tmp_path / "schedule.json") == result.schedule
    assert result.schedule["lr"].tolist() == [row["lr"] for row in result.tape]
    if options.get("rewrite") is False:
        assert stopped == result.schedule


def test_a_schedule_without_its_tape(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        run_of(tmp_path, stop_at_step(17)).fit(STEPS)
    tape = (tmp_path / "tape.jsonl").read_bytes()
    (tmp_path / "tape.jsonl").write_bytes(tape[:-40])
    message = r"schedule.json is of a run that has not ended, and its first \d+ steps are on the "
    with pytest.raises(InputError, match=f"{message}tape beside: .*tape.jsonl has"):
        Schedule.load(tmp_path / "schedule.json")
    (tmp_path / "tape.jsonl").unlink()
    with pytest.raises(InputError, match=f"{message}.* is missing; give the whole directory"):
        Schedule.load(tmp_path / "schedule.json")
    (tmp_path / "tape.jsonl").write_text('{"step": 0}\n' * 30)
    (tmp_path / ".tape.jsonl.crc32").unlink()
    with pytest.raises(InputError, match="has a line without the controls of its step"):
        Schedule.load(tmp_path / "schedule.json")


# Checkpoints of a version that kept a value for every step ----------------------------------------


@pytest.mark.parametrize("case", ["rewritten", "cosine", "plain", "followed"])
def test_an_old_checkpoint_continues(case: str, tmp_path: Path) -> None:
    expected = run_of(tmp_path / "whole", **RUNS[case]).fit(STEPS)
    with pytest.raises(Stop):
        run_of(tmp_path / "old", stop_at_step(17), **RUNS[case]).fit(STEPS)
    store = CheckpointStore(tmp_path / "old" / "checkpoints", keep=1)
    new = store.latest()
    assert new is not None and "schedule" not in new.tensors
    every = dict(Schedule.load(tmp_path / "old" / "schedule.json").values)
    values = {name: value for name, value in new.values.items() if name != "plan"}
    shutil.rmtree(store.root)
    store.save(replace(new, tensors={**new.tensors, "schedule": every}, values=values))
    (tmp_path / "old" / "schedule.json").write_text("of old")
    found = run_of(tmp_path / "old", seed=9, **RUNS[case]).fit(STEPS)
    assert [row["loss"] for row in found.tape] == [row["loss"] for row in expected.tape]
    for name, lrs in expected.schedule.values.items():
        assert torch.allclose(found.schedule[name], lrs, rtol=1e-13, atol=0)
    assert Schedule.load(tmp_path / "old" / "schedule.json") == found.schedule
    if case in ("plain", "followed"):
        for name in FILES:
            assert (tmp_path / "old" / name).read_bytes() == (
                tmp_path / "whole" / name
            ).read_bytes()


# What it does not cost ----------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator gives."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.elements = max(self.elements, found.numel())
        return found


@pytest.mark.parametrize(
    "case",
    ["rewritten", "plain"]
    + [pytest.param(case, marks=pytest.mark.slow) for case in ("cosine", "planned", "in memory")],
)
def test_a_window_costs_the_same_however_long_the_run(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes to the disk, the largest tensor, and the most of Python's memory, over two windows."""
    written = [0]
    write = os.write

    def counted(descriptor: int, data: Any) -> int:
        written[0] += len(data)
        return write(descriptor, data)

    monkeypatch.setattr("os.write", counted)

    def cost(steps: int, name: str) -> tuple[int, int, int]:
        options = {"planner": EpochPlanner()} if case == "planned" else RUNS.get(case, {})
        directory = None if case == "in memory" else tmp_path / name
        run = run_of(directory, stop_at_step(11), **options)
        written[0] = 0
        tracemalloc.start()
        with pytest.raises(Stop), Largest() as largest:
            run.fit(steps)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return written[0], largest.elements, peak

    cost(1000, "imports")
    short, long = cost(1000, "short"), cost(10_000_000, "long")
    assert long[0] <= 1.02 * short[0]
    assert long[1] == short[1]
    assert long[2] <= short[2] + 200_000

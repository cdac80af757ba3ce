"""With rewriting off, Runner.fit is the plain loop, bit for bit: also checkpointed and resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import (
    OPTIMIZERS,
    ROWS,
    Augmented,
    Run,
    Stop,
    clouds,
    make_run,
    plain_loop,
    state_of,
    stop_at_step,
    unequal,
)
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from rhc import Runner

STEPS = 200
"""Twenty epochs of ten batches; no multiple of the windows below."""


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def runner(run: Run, **options: Any) -> Runner:
    options = {"window": 30, "rewrite": False} | options
    return Runner(run.model, run.optimizer, run.loss_fn, run.train, run.val, **options)


def expected(
    steps: int = STEPS, loop: Mapping[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    run = make_run(**options)
    plain_loop(run, steps, **(loop or {}))
    return state_of(run)


RANDOM = ["shuffled", "drop_last", "generator", "augmented"]


@pytest.mark.parametrize(
    ("optimizer", "loader"),
    [(optimizer, loader) for optimizer in OPTIMIZERS for loader in RANDOM]
    + [("sgd", "in_order"), ("sgd", "list")],
)
def test_fit_is_the_plain_loop(optimizer: str, loader: str) -> None:
    run = make_run(optimizer, loader)
    before = state_of(run)
    runner(run).fit(STEPS)
    assert unequal(expected(optimizer=optimizer, loader=loader), state_of(run)) == []
    changed = {where.split("/")[1] for where in unequal(before, state_of(run))}
    assert {"model", "torch"} <= changed  # the comparison sees what training changes


@pytest.mark.parametrize("loader", ["shuffled", "generator", "augmented"])
def test_a_directory_changes_nothing(loader: str, tmp_path: Path) -> None:
    run = make_run("adam", loader)
    test_loader = DataLoader(clouds(20, seed=2), 8, shuffle=True)
    runner(run, directory=tmp_path, test_loader=test_loader).fit(STEPS)
    assert unequal(expected(optimizer="adam", loader=loader), state_of(run)) == []


@pytest.mark.parametrize("steps", [1, 10, 34])
@pytest.mark.parametrize(("window", "stride"), [(1, 1), (10, 10), (20, 7), (500, 500)])
def test_windows_and_epochs_leave_no_trace(
    steps: int, window: int, stride: int, tmp_path: Path
) -> None:
    run = make_run("adam", "augmented")
    result = runner(run, window=window, stride=stride, directory=tmp_path).fit(steps)
    assert unequal(expected(steps, optimizer="adam", loader="augmented"), state_of(run)) == []
    assert [row["step"] for row in result.tape] == list(range(steps))


@pytest.mark.parametrize(
    ("optimizer", "loader", "stop"),
    [("sgd", loader, stop) for loader in ("augmented", "generator") for stop in (0, 9, 30, 61)]
    + [(optimizer, loader, 44) for optimizer in OPTIMIZERS for loader in RANDOM],
)
def test_resumed_in_the_middle_of_an_epoch(
    optimizer: str, loader: str, stop: int, tmp_path: Path
) -> None:
    """Windows of 13 end anywhere in an epoch; the objects after the stop know nothing of it."""
    first = make_run(optimizer, loader)
    options = {"directory": tmp_path, "window": 13}
    with pytest.raises(Stop):
        runner(first, listeners=[stop_at_step(stop)], **options).fit(70)
    again = make_run(optimizer, loader, seed=99)
    runner(again, **options).fit(70)
    assert unequal(expected(70, optimizer=optimizer, loader=loader), state_of(again)) == []


@pytest.mark.parametrize("stop", [None, 17])
def test_worker_processes(stop: int | None, tmp_path: Path) -> None:
    """Workers read ahead, and draw augmentations from generators of their own."""

    def made(seed: int) -> Run:
        run = make_run("sgd", seed=seed)
        data = Augmented(clouds(ROWS))
        return run._replace(train=DataLoader(data, 8, shuffle=True, num_workers=2))

    plain = made(0)
    plain_loop(plain, 25)
    run = made(0)
    if stop is not None:
        with pytest.raises(Stop):
            runner(run, window=6, directory=tmp_path, listeners=[stop_at_step(stop)]).fit(25)
        run = made(99)
    runner(run, window=6, directory=tmp_path).fit(25)
    assert unequal(state_of(plain), state_of(run)) == []


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.NAdam])
def test_any_optimizer_will_do(kind: Any, tmp_path: Path) -> None:
    """Without rewriting nothing is asked of the optimizer but that its state is tensors."""

    def made(seed: int) -> Run:
        run = make_run(seed=seed)
        return run._replace(optimizer=kind(run.model.parameters(), lr=0.01))

    plain = made(0)
    plain_loop(plain, 45)
    with pytest.raises(Stop):
        runner(made(0), window=20, directory=tmp_path, listeners=[stop_at_step(33)]).fit(45)
    run = made(99)
    runner(run, window=20, directory=tmp_path).fit(45)
    assert unequal(state_of(plain), state_of(run)) == []


class Stream(IterableDataset[Any]):
    """Rows in an order that numpy's global generator draws while they are read; no length."""

    def __iter__(self) -> Any:
        import numpy as np

        rows = clouds(ROWS)
        for _ in range(40):
            yield rows[np.random.randint(ROWS)]


@pytest.mark.parametrize("stop", [None, 12])
def test_iterable_dataset(stop: int | None, tmp_path: Path) -> None:
    def made(seed: int) -> Run:
        return make_run(seed=seed)._replace(train=DataLoader(Stream(), 8))

    plain = made(0)
    plain_loop(plain, 23)
    run = made(0)
    if stop is not None:
        with pytest.raises(Stop):
            runner(run, window=6, directory=tmp_path, listeners=[stop_at_step(stop)]).fit(23)
        run = made(99)
    runner(run, window=6, directory=tmp_path).fit(23)
    assert unequal(state_of(plain), state_of(run)) == []


def test_modes_groups_and_frozen_parameters(tmp_path: Path) -> None:
    """A frozen layer, BatchNorm left in eval mode, two groups and a buffer of -inf."""

    def made(seed: int) -> Run:
        run = make_run(seed=seed)
        run.model[1].eval()
        run.model[4].bias.requires_grad_(False)
        run.model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        parameters = list(run.model.parameters())
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.3, "momentum": 0}]
        return run._replace(optimizer=torch.optim.SGD(groups, lr=0.01, momentum=0.9))

    plain = made(0)
    plain_loop(plain, 45)
    with pytest.raises(Stop):
        runner(made(0), window=20, directory=tmp_path, listeners=[stop_at_step(33)]).fit(45)
    run = made(99)
    runner(run, window=20, directory=tmp_path).fit(45)
    assert unequal(state_of(plain), state_of(run)) == []
    assert [m.training for m in run.model] == [True, False, True, True, True]


def test_the_tape_is_what_the_plain_loop_saw() -> None:
    run = make_run("adamw")
    losses: list[float] = []

    def noted(model: nn.Module, batch: Any) -> Any:
        loss, metrics = run.loss_fn(model, batch)
        losses.append(float(loss.detach()))
        return loss, metrics

    plain_loop(run._replace(loss_fn=noted), 40)
    result = runner(make_run("adamw")).fit(40)
    assert [row["loss"] for row in result.tape] == losses
    assert all(row["lr"] == 0.01 and row["momentum"] == 0.9 for row in result.tape)
    assert result.windows == []
    assert result.record["cost"]["plain_run_equivalents"] == 1.0


# Accumulation and clipping ------------------------------------------------------------------------

LOOPS: dict[str, dict[str, Any]] = {
    "accumulated": {"accumulate": 3},
    "accumulated and clipped": {"accumulate": 3, "clip_norm": 0.3},
    "clipped by value": {"clip_value": 0.02},
    "both": {"accumulate": 4, "clip_value": 0.02},
}


@pytest.mark.parametrize("loader", [*RANDOM, "list"])
@pytest.mark.parametrize("loop", LOOPS)
def test_accumulation_and_clipping_are_the_plain_loops(loop: str, loader: str) -> None:
    """Steps of three batches straddle the epochs of ten; dropout and loader share a generator."""
    run = make_run("adam", loader)
    runner(run, **LOOPS[loop]).fit(40)
    options = {"optimizer": "adam", "loader": loader}
    assert unequal(expected(40, LOOPS[loop], **options), state_of(run)) == []
    assert unequal(expected(40, **options), state_of(run)) != []


@pytest.mark.parametrize("stop", [0, 9, 17])
@pytest.mark.parametrize("loader", ["augmented", "generator"])
@pytest.mark.parametrize("loop", LOOPS)
def test_accumulation_resumed(loop: str, loader: str, stop: int, tmp_path: Path) -> None:
    options = {"directory": tmp_path, "window": 7, **LOOPS[loop]}
    with pytest.raises(Stop):
        runner(make_run("adam", loader), listeners=[stop_at_step(stop)], **options).fit(23)
    run = make_run("adam", loader, seed=99)
    runner(run, **options).fit(23)
    expectation = expected(23, LOOPS[loop], optimizer="adam", loader=loader)
    assert unequal(expectation, state_of(run)) == []


def test_accumulation_with_worker_processes() -> None:
    """A second epoch begins in the middle of a step."""

    def made() -> Run:
        data = DataLoader(Augmented(clouds(ROWS)), 8, shuffle=True, num_workers=2)
        return make_run("sgd")._replace(train=data)

    plain = made()
    plain_loop(plain, 5, accumulate=4)
    run = made()
    runner(run, accumulate=4).fit(5)
    assert unequal(state_of(plain), state_of(run)) == []


def test_the_tape_of_accumulated_steps() -> None:
    """A step's loss, and its metrics, are the means over its batches."""
    run = make_run("sgd", "list", dropout=0.0, norm=False)
    batches = list(run.train)
    with torch.no_grad():
        seen = [run.loss_fn(run.model, batch) for batch in batches[:3]]
    result = runner(run, accumulate=3).fit(4)
    first = result.tape[0]
    assert first["loss"] == pytest.approx(sum(float(x) for x, _ in seen) / 3, rel=1e-6)
    accuracy = sum(float(m["accuracy"]) for _, m in seen) / 3
    assert first["accuracy"] == pytest.approx(accuracy, rel=1e-6)
    assert result.record["cost"]["gradient_evaluations"] == 4

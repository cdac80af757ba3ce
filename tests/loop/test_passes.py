"""Passes over the whole run: exact across segments, resumed to the bit, and never worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rhc
from rhc.events import Event, VerbStarted
from rhc.hypergradient import ReversePass
from rhc.loop import passes
from rhc.schedule import Schedule
from rhc.training.objective import Average, Objective
from rhc.training.plant import Plant

STEPS = 24


def _batches(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    own = torch.Generator().manual_seed(seed)
    truth = torch.randn(5, generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(count):
        x = torch.randn(16, 5, generator=own)
        found.append((x, (x @ truth).tanh()[:, None]))
    return found


def _loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def _runner(
    directory: Path | None = None, listener: Any = None, dropout: float = 0.1, **changed: Any
) -> rhc.Runner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    settings: dict[str, Any] = {"window": 6, "start": "given", "passes": 2, **changed}
    return rhc.Runner(
        model,
        optimizer,
        _loss,
        _batches(7, 2),
        _batches(4, 3),
        test_loader=_batches(4, 4),
        directory=directory,
        listeners=[] if listener is None else [listener],
        **settings,
    )


def _bits(runner: rhc.Runner, result: Any) -> tuple[Any, ...]:
    cost = {k: v for k, v in result.cost.items() if k != "peak_memory_bytes"}
    weights = [p.tolist() for p in runner.plant.model.parameters()]
    return weights, result.tape, result.windows, result.passes, cost, result.notices


@pytest.mark.parametrize("kind", ["sgd", "adamw", "frozen", "norm"])
def test_a_reverse_pass_in_segments_is_that_of_the_whole(kind: str) -> None:
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(8)] if kind == "norm" else []
    model = nn.Sequential(nn.Linear(5, 8), *norm, nn.Tanh(), nn.Linear(8, 1)).double()
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

    def loss(module: nn.Module, batch: Any) -> torch.Tensor:
        x, y = (t.double() for t in batch)
        # "frozen": a layer without a gradient in the last segment
        hidden = module[0](x)
        hidden = hidden.detach() if kind == "frozen" and len(x) < 16 else hidden
        return F.mse_loss(nn.Sequential(*module[1:])(hidden), y)

    batches = [
        (x[: 16 if i < 8 else 15], y[: 16 if i < 8 else 15])
        for i, (x, y) in enumerate(_batches(12, 2))
    ]
    plant = Plant(model, optimizer, loss, seed=0)
    objective = Objective(loss_weight=0.01, average=None)
    held_out = _batches(1, 3)[0]

    def terminal(module: nn.Module) -> torch.Tensor:
        with plant.evaluating():
            return loss(module, held_out)

    schedule = Schedule.constant(12, 0, **plant.controls.initial)

    def reverse(start: int, stop: int, later: Any) -> Any:
        reverse_pass = ReversePass(plant, objective, ("lr", "momentum"), product="exact")
        mean = Average(None)
        recorder = reverse_pass.roll(
            batches[start:stop], schedule.window(start, stop), average=mean
        )
        h = reverse_pass.differentiate(recorder, mean, None if later else terminal, later=later)
        return h, reverse_pass.before

    beginning = plant.snapshot()
    whole, _ = reverse(0, 12, None)
    plant.restore(beginning)
    starts = []
    for start in (0, 4, 8):
        starts.append(plant.snapshot())
        plant.roll(batches[start : start + 4], schedule.window(start, start + 4))
    found, later = list[Any](), None
    for start, snapshot in zip((8, 4, 0), reversed(starts), strict=True):
        plant.restore(snapshot)
        h, later = reverse(start, start + 4, later)
        found.insert(0, h)
    for name in ("lr", "momentum"):
        pieces = torch.cat([h.grad[name] for h in found])
        torch.testing.assert_close(pieces, whole.grad[name], rtol=1e-12, atol=1e-15)
    assert later is not None


def test_what_is_kept_is_the_run_by_its_schedule() -> None:
    result = _runner().fit(STEPS)
    assert [line["kept"] for line in result.passes].count(True) >= 1
    assert result.passes[0]["held_out_after"] < result.passes[0]["held_out_before"]
    assert any(notice.startswith("pass 1 over the whole run") for notice in result.notices)
    # Each kept pass continues from the one before, and the last is the result.
    kept = [line for line in result.passes if line["kept"]]
    assert [row["lr"] for row in result.tape] == [lr for _, lr in kept[-1]["after"]["lr"]]
    assert len(result.tape) == STEPS
    without = _runner(passes=0).fit(STEPS)
    assert result.val_loss < without.val_loss  # type: ignore[operator]
    # A roll, two reverse passes of 1 + 3 and two replays at least.
    assert result.cost["plain_run_equivalents"] > without.cost["plain_run_equivalents"] + 5


def test_a_run_still_says_why_it_began_where_it_did() -> None:
    settings = {"start": "probe", "template": "constant", "dropout": 0.0}
    told = [_runner(passes=passes_, **settings).fit(60).record for passes_ in (1, 0)]
    assert told[0]["chosen_start"] == told[1]["chosen_start"] is not None
    assert told[0]["skipped"] == told[1]["skipped"]


def test_the_committed_steps_are_those_of_the_plain_loop() -> None:
    result = _runner(dropout=0.0).fit(STEPS)
    again = _runner(dropout=0.0, passes=0, rewrite=False, schedule=result.schedule).fit(STEPS)
    assert [row["loss"] for row in again.tape] == [row["loss"] for row in result.tape]
    assert again.test_loss == result.test_loss


def test_a_short_step_does_what_the_hypergradient_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "STEP", 0.03)
    line = _runner(dropout=0.0, passes=1).fit(STEPS).passes[0]
    assert line["smoothness"] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    "stop_at",
    [4, 11, 18, 26, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 7, 9, 16, 21, 31, 35))],
)
def test_a_stopped_run_ends_with_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    straight = _runner(tmp_path / "straight")
    whole = _bits(straight, straight.fit(STEPS))
    count = 0

    def stop(event: Event) -> None:
        nonlocal count
        count += isinstance(event, VerbStarted) and event.verb in ("roll", "replay", "commit")
        if count == stop_at:
            raise KeyboardInterrupt

    stopped = _runner(tmp_path / "stopped", stop)
    with pytest.raises(KeyboardInterrupt):
        stopped.fit(STEPS)
    resumed = _runner(tmp_path / "stopped")
    assert _bits(resumed, resumed.fit(STEPS)) == whole
    assert not (tmp_path / "stopped" / "passes").exists()
    again = _runner(tmp_path / "stopped")
    with pytest.warns(rhc.errors.RunWarning, match="finished"):
        assert again.fit(STEPS).passes == whole[3]


def test_in_memory_it_is_the_same_run(tmp_path: Path) -> None:
    saved = _runner(tmp_path / "run")
    whole = _bits(saved, saved.fit(STEPS))
    memory = _runner()
    assert _bits(memory, memory.fit(STEPS)) == whole


def test_a_replay_that_diverges_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "STEP", 400.0)
    result = _runner(passes=1, controls=["lr"]).fit(STEPS)
    assert not any(line["kept"] for line in result.passes)
    assert result.tape == _runner(passes=0).fit(STEPS).tape


def test_chaos_is_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the costate has grown, steps before it keep their controls to the bit."""
    monkeypatch.setattr(passes, "GROWN", 1e-6)
    result = _runner(passes=1).fit(STEPS)
    line = result.passes[0]
    assert 0 < line["moved_from"] < STEPS
    before, after = (dict(line[name]["lr"]) for name in ("before", "after"))
    moved = [step for step in before if before[step] != after[step]]
    assert moved and min(moved) >= line["moved_from"]


def test_without_validation_data_training_batches_judge() -> None:
    torch.manual_seed(0)
    runner = _runner()
    runner = rhc.Runner(
        runner.plant.model,
        runner.plant.optimizer,
        _loss,
        _batches(60, 2),
        window=6,
        passes=1,
        start="given",
    )
    assert runner.fit(STEPS).passes[0]["held_out_after"] is not None


def test_what_cannot_be_replayed_as_a_whole_is_refused() -> None:
    with pytest.raises(rhc.errors.InputError, match="epochs are planned"):
        _runner(planner=rhc.EpochPlanner(epoch_steps=6))
    with pytest.raises(rhc.errors.InputError, match="leave one of them out"):
        _runner(rewrite=False)
    with pytest.raises(rhc.errors.InputError, match="held-out loss"):
        _runner(objective=rhc.Objective(loss_weight=1.0, terminal_weight=0.0))
    with pytest.raises(rhc.errors.InputError, match="passes"):
        _runner(passes=-1)

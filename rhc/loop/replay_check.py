"""Replay, asserted: the first window of a run is rolled once more and compared to the bit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rhc.containers import same
from rhc.loop.budget import REWRITE, affords, within_budget
from rhc.loop.fit import Fit
from rhc.loop.state import Attempt, Moment, Replay, Window
from rhc.loop.steps import restore, take_same_steps
from rhc.loop.update_rule import Twin
from rhc.training.batches import micro_batches
from rhc.training.recovery import nondeterministic, out_of_memory
from rhc.training.snapshot import state_difference
from rhc.training.trajectory import Trajectory

TIMES = 11
"""Evaluations of the first step's loss: a counter's period may divide the window's calls, such as
that of every fifth call, so that the replay alone would be in step with the roll again."""


def assert_replay(fit: Fit, window: Window, attempt: Attempt) -> Attempt:
    """The attempt, its end live, after the run's first window was replayed from its start.

    Losses, norms of gradients and the state at the end must have the same bits. Where they have
    not, no window is rewritten, unless the run has `inexact_replay`. It costs the window's steps
    and `TIMES` losses, once a run. Where budget or memory do not suffice, this window is not
    rewritten, and the next is tried.
    """
    state = fit.state
    if state.replay is not None or not fit.rewrites:
        return attempt
    # With what a rewrite takes then: a replay, and a roll by plain kernels unless this was one.
    ways = REWRITE if isinstance(fit.rule, Twin) or not attempt.plain else REWRITE - 1
    if not affords(fit, window, ways):
        return attempt
    times = TIMES if within_budget(fit, window, ways, evaluations=TIMES) else 0
    end, again = fit.here(), attempt.again()
    restore(fit, window, attempt)
    fit.announce("replay", window.start, window.stop, attempt.number)
    try:
        losses = _evaluated(fit, window, attempt, times)
        take_same_steps(fit, window, attempt, again)
    except (RuntimeError, MemoryError, OSError) as error:
        if not out_of_memory(error) or fit.plant.ranks is not None:
            raise
        fit.go_back(end)
    else:
        state.replay = _judged(fit, window, attempt, again, end, losses)
    if attempt.plain:
        attempt.end = end
    state.live = attempt
    return attempt


def _evaluated(fit: Fit, window: Window, attempt: Attempt, times: int) -> Tensor:
    """(times,) the loss of the window's first step, each from its start, which is restored."""
    assert window.before is not None
    plant, batch = fit.plant, next(iter(attempt.batches))
    micro = plant.weighed(next(iter(micro_batches(batch))), window.start)
    losses = []
    for _ in range(times):
        with torch.no_grad():
            losses.append(plant.value(plant.loss(micro)[0]))
        fit.go_back(window.before)
    fit.state.cost.gradient_equivalents += times / (3 * fit.data.accumulate)
    return torch.tensor(losses, dtype=torch.float64)


def _judged(
    fit: Fit, window: Window, first: Attempt, again: Attempt, end: Moment, losses: Tensor
) -> Replay:
    """How the two ended, alike on all ranks; the plant stands at the end of the first. losses: of
    the first step, evaluated several times."""
    found = _difference(fit, first, again, end)
    if found is None and not same(losses, losses[:1].expand(len(losses))):
        apart = (losses.max() - losses.min()) / losses.abs().max()
        found = window.start, "the loss", float(apart.nan_to_num(math.inf))
    if fit.plant.ranks is not None:
        told = fit.plant.ranks.gather_json(found)
        found = min((tuple(each) for each in told if each is not None), default=None)
    if found is None:
        return Replay(True, window.start, window.stop)
    step, what, largest = found
    assert window.before is not None
    fit.go_back(window.before)
    batch = list(first.batches)[step - window.start]
    operators = nondeterministic(fit.plant, batch, first.schedule.at(step), step)
    fit.state.cost.gradients(1)
    fit.plant.optimizer.zero_grad()
    fit.go_back(end)
    named = tuple(fit.plant.parallel.union(operators))
    replay = Replay(False, window.start, window.stop, step, what, largest, named)
    fit.events.tell(replay.sentence(rewrites=fit.inexact_replay))
    return replay


def _difference(
    fit: Fit, first: Attempt, again: Attempt, end: Moment
) -> tuple[int, str, float] | None:
    """(step, what differs there first, by which share of its size); None for nothing. Where the
    ends alone differ, the step is the window's last."""
    assert first.trajectory is not None and again.trajectory is not None
    seen, now = _observed(first.trajectory), _observed(again.trajectory)
    steps = min(seen.shape[1], now.shape[1])
    seen, now = seen[:, :steps], now[:, :steps]
    differs = ~((seen == now) | (seen.isnan() & now.isnan()))
    if bool(differs.any()):
        i = int(differs.any(0).nonzero()[0])
        row = int(differs[:, i].nonzero()[0])
        apart = float((seen[row, i] - now[row, i]).abs() / seen[row, i].abs().clamp(min=1e-30))
        what = ("the loss", "the gradient")[row]
        return first.schedule.start + i, what, apart if math.isfinite(apart) else math.inf
    found = state_difference(fit.plant, end.snapshot, fit.plant.snapshot())
    return None if found is None else (first.schedule.stop - 1, *found)


def _observed(trajectory: Trajectory) -> Tensor:
    """(2, K) losses and norms of gradients."""
    norms = [float(norm) for norm in trajectory.gradient_norms]
    losses = torch.stack(trajectory.losses).double().cpu()
    return torch.stack([losses, torch.tensor(norms, dtype=torch.float64)])

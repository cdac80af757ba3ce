"""Shift detection: whether the data change within a window, and the reaction to it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rhc.loop.budget import affords
from rhc.loop.fit import Fit
from rhc.loop.records import record
from rhc.loop.state import Attempt, Window
from rhc.loop.steps import replay, restore, take_steps
from rhc.schedule.planned import PlannedSchedule
from rhc.training.plant import PATIENCE

REMEMBERED = 50
"""Committed steps whose losses a window is compared with."""

FEWEST = 20
"""Committed steps needed to estimate the spread of losses."""


def adapt_to_shift(fit: Fit, window: Window, attempt: Attempt) -> Attempt:
    """The live attempt after a test for a shift: cut where losses rise, or, if that is in its first
    steps, with the base schedule restarted."""
    rule, step = fit.rule, _shift_of(fit, attempt)
    if step is None or not affords(fit, window, len(rule.restart) + 4, reverse_passes=1):
        return attempt
    window.shift = step
    if step - window.start > PATIENCE:
        return _cut(fit, window, attempt, step)
    assert fit.reverse_passes is not None
    if rule.restart and "lr" in fit.reverse_passes.controls:
        return _restart(fit, window, attempt, step)
    return attempt


def _shift_of(fit: Fit, attempt: Attempt) -> int | None:
    """The step from which losses exceed those committed lately."""
    state, errors = fit.state, fit.rule.surprise
    if not fit.may_rewrite or errors is None or attempt.trajectory is None:
        return None
    first = max(state.patience.data_since, state.step - REMEMBERED)
    before = [row["loss"] for row in state.tape[first:] if row.get("loss") is not None]
    losses = torch.stack(attempt.trajectory.losses).double().tolist()
    at = rise(before, losses, errors)
    return None if at is None else attempt.schedule.start + at


def rise(before: Sequence[float], losses: Sequence[float], errors: float) -> int | None:
    """The index in `losses` at which they rose above `before`; None for none.

    Some block of a tenth of them, at least five, must have a mean `errors` of its standard errors
    and 10 % above that of `before`, and all but a fifth of it must lie a standard deviation above:
    one outlier is no shift. The spread is that of `before`, if it has `FEWEST` losses.
    """
    if len(before) < FEWEST or not losses:
        return None
    block = min(max(5, len(losses) // 10), len(losses))
    level = sum(before) / len(before)
    spread = math.sqrt(sum((x - level) ** 2 for x in before) / (len(before) - 1))
    bar = max(level + errors * spread / math.sqrt(block), level + 0.1 * abs(level))

    def risen(part: Sequence[float]) -> bool:
        return sum(part) / block > bar and sorted(part)[block // 5] > level + spread

    places = range(len(losses) - block + 1)
    high = next((i for i in places if risen(losses[i : i + block])), None)
    if high is None:
        return None
    # The first block above the threshold may start before the rise.
    return next((i for i in range(high, high + block) if losses[i] > bar), high)


def _cut(fit: Fit, window: Window, rolled: Attempt, step: int) -> Attempt:
    """The same steps up to `step`, where the window now ends."""
    fit.events.notice(f"the losses rise at step {step}, and the window ends there")
    window.stop, window.commit, window.cut = step, step, True
    short = rolled.again(
        schedule=rolled.schedule.window(window.start, step),
        batches=list(rolled.batches)[: step - window.start],
    )
    restore(fit, window, short)
    fit.announce("roll", window.start, step, short.number)
    take_steps(fit, window, short)
    return short


def _restart(fit: Fit, window: Window, rolled: Attempt, step: int) -> Attempt:
    """The window with the base schedule restarted at `step`, unless the plan is better."""
    rule, state = fit.rule, fit.state
    if rolled.hypergradient is None:
        restore(fit, window, rolled)
        replay(fit, window, rolled)
    tried: list[tuple[Attempt, PlannedSchedule]] = []
    for number, factor in enumerate(rule.restart, start=1):
        plan = fit.base.restarted(state, step, factor)
        schedule = plan.window(window.start, window.stop)
        trial = rolled.again(number=rolled.number + number, schedule=schedule)
        restore(fit, window, trial)
        replay(fit, window, trial)
        if trial.failure is None:
            tried.append((trial, plan))
        else:
            record(fit, trial, "rejected", trial.failure, rolled)
    bar = rolled.value + rule.worth * abs(rolled.value)
    good = [pair for pair in tried if not pair[0].value >= bar]
    best, plan = min(good, key=lambda pair: pair[0].value, default=(rolled, state.schedule))
    for trial, _ in tried:
        outcome = "accepted" if trial is best else "rejected"
        record(fit, trial, outcome, f"the template begun anew at step {step}", rolled)
    if best is not rolled:
        state.schedule, state.correction = plan, {}
        fit.events.notice(f"the template begins anew at step {step}")
    return best

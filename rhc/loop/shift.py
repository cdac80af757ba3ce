"""Shift detection: whether the data change within a window, and what is done about it."""

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
"""Committed steps whose losses a window is compared with, to see whether the data changed."""

FEWEST = 20
"""Committed steps that say enough of how losses spread."""


def adapt_to_shift(fit: Fit, window: Window, attempt: Attempt) -> Attempt:
    """Sees whether the window's losses have risen. Then the window ends there, or, at its first
    steps, the base schedule is restarted if that is not worse. An attempt whose end is live."""
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
    """The step from which losses are higher than those committed lately."""
    state, errors = fit.state, fit.rule.surprise
    if not fit.rewrites or errors is None or attempt.trajectory is None:
        return None
    first = max(state.patience.data_since, state.step - REMEMBERED)
    before = [row["loss"] for row in state.tape[first:] if row.get("loss") is not None]
    losses = torch.stack(attempt.trajectory.losses).double().tolist()
    at = rise(before, losses, errors)
    return None if at is None else attempt.schedule.start + at


def rise(before: Sequence[float], losses: Sequence[float], errors: float) -> int | None:
    """The first of `losses` at which they have risen above what they were before; None for none.

    They have where the mean of some block of a tenth of their number, five at least, lies `errors`
    of its standard errors and a tenth above the mean of `before`, and all but a fifth of the block
    a standard deviation: one outlier is no shift. The spread is that of `before`.
    Multiplying all losses by a number changes nothing. Fewer than `FEWEST` losses before say too
    little of their spread.
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
    # The block that is first above the bar may have begun before the rise.
    return next((i for i in range(high, high + block) if losses[i] > bar), high)


def _cut(fit: Fit, window: Window, rolled: Attempt, step: int) -> Attempt:
    """The same way up to `step`, where the window ends now."""
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
    """The window with the base schedule restarted at `step`, unless it is better as planned."""
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

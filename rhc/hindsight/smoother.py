"""Two-pass smoother: AdaptiveRL's laws with trends from past and future of a probe run.

A trend at step t is the mean after t minus the mean before, exponentially weighted: a zero-phase
filter. It needs no derivatives, so rewards and models without them work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from rhc.errors import InputError
from rhc.schedule import CONTROLS, Schedule
from rhc.schedulers.laws import Bounds, Cap, Controls, Gains, check_source, lowered, updated
from rhc.schedulers.plan import STEERED, gains_of
from rhc.schedulers.signals import (
    STILL,
    Smoothing,
    Trends,
    clip,
    is_usable,
    plateau_score,
    share,
)
from rhc.workload import Goal

USUAL_GAINS = Gains(
    lr_reward=0.24,
    lr_loss=0.24,
    momentum_reward=0.03,
    momentum_loss=0.06,
    noise_plateau=0.05,
    noise_reward=0.04,
)
"""AdaptiveRL's specified gains, × 12 for lr and × 3 for momentum, since two-sided trends need less
caution. Chosen on seeds 0-4 of MNIST, digits and sine (docs/hindsight.md)."""

MOVED = ("lr", "momentum")
"""Controls that pay, lr alone where the data change; noise pays nowhere (docs/hindsight.md)."""

BOUNDS, SMOOTHING = Bounds(), Smoothing()

CAP: Cap = (0.8, 1.25)
"""Smallest and largest factor per block of steps."""

ROSE_AGAIN = 0.25
"""The data changed if the smoothed loss rises again by this share of its fall."""

AGAINST = -0.25
"""Factor on the gains if the data changed: lr then rises with the loss."""


@dataclass(frozen=True)
class Tape:
    """Observations at T steps, NaN where not finite; None for columns that the run lacks."""

    losses: Sequence[float]
    rewards: Sequence[float] | None = None
    gradient_norms: Sequence[float] | None = None

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Any]], reward: str = "reward") -> Tape:
        if not rows:
            raise InputError("the tape is empty; train the probe first")

        def column(name: str) -> list[float] | None:
            if all(row.get(name) is None for row in rows):
                return None
            return [math.nan if row.get(name) is None else float(row[name]) for row in rows]

        losses = column("loss")
        return cls(losses or [math.nan] * len(rows), column(reward), column("gradient_norm"))


@dataclass(frozen=True)
class Smoother:
    """Computes the next run's schedule from a probe's tape and schedule.
    every, source: as in AdaptiveRL, as are the bounds and the cap; smoothing is two-sided.
    controls: those of lr, momentum and noise that move; None for `MOVED`. baseline: subtract the
    tape's mean trend, so that controls rise only where progress is above average; without it every
    fall of the loss raises lr, up to the last step. The laws give factors on lr and noise and
    shifts of logit μ per block of `every` steps, relative to the probe's schedule, so that passes
    accumulate."""

    every: int = 20
    controls: Sequence[str] | None = None
    gains: Gains = USUAL_GAINS
    source: str = "both"
    baseline: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"every must be ≥ 1 steps, got {self.every}")
        for name in ("lr",) if self.controls is None else self.controls or ("",):
            if name not in STEERED:
                raise InputError(
                    f"controls must be some of {', '.join(STEERED)}, got {name or 'none'}"
                )
        check_source(self.source)

    def trends(self, tape: Tape) -> list[Trends]:
        """The trends at the start of every block but the first.
        Δ = mean after − mean before; Δ̃ = clip(Δ / S, −1, 1), S the tape's mean |Δ|, minus the mean
        Δ̃ with a baseline. Without a reward Δ̃r = −Δ̃ℓ."""
        if self.source == "reward" and tape.rewards is None:
            raise InputError(
                "source 'reward' needs a reward, and the tape has none; return a metric called "
                "'reward' from loss_fn, or use source 'loss'"
            )
        marks = range(self.every, len(tape.losses), self.every)
        loss = self._shares(tape.losses, SMOOTHING.loss, marks)
        reward = [-share for share in loss]
        if tape.rewards is not None and self.source != "loss":
            reward = self._shares(tape.rewards, SMOOTHING.reward, marks)
        plateaus = _plateaus(tape.losses, marks)
        return [Trends(*values) for values in zip(loss, reward, plateaus, strict=True)]

    def schedule(self, tape: Tape, probe: Schedule) -> Schedule:
        if len(tape.losses) != len(probe):
            raise InputError(
                f"the tape has {len(tape.losses)} steps and the schedule {len(probe)}; give both "
                "of one run"
            )
        gains = gains_of(self._moved_controls, self.gains.for_source(self.source))
        lost = _lost(tape, self.every)
        first = BOUNDS.clipped(_controls(probe))
        current = lowered(first, BOUNDS) if 0 in lost else first
        walk = [current]
        for block, trends in enumerate(self.trends(tape), start=1):
            current = updated(current, trends, gains, BOUNDS, CAP)
            if block in lost:  # not finite in the probe: lower lr in advance
                current = lowered(current, BOUNDS)
            walk.append(current)
        return self._moved(probe, first, walk)

    @property
    def _moved_controls(self) -> Sequence[str]:
        return MOVED if self.controls is None else self.controls

    def _shares(self, values: Sequence[float], beta: float, marks: range) -> list[float]:
        before, after = _both_ways(values, beta)
        deltas = [after[m] - before[m] for m in marks]
        deltas = [d if math.isfinite(d) else 0.0 for d in deltas]
        scale = sum(map(abs, deltas)) / len(deltas) if deltas else 0.0
        shares = [share(d, scale) for d in deltas]
        if self.baseline and shares:
            usual = sum(shares) / len(shares)
            shares = [clip(one - usual, (-1.0, 1.0)) for one in shares]
        return shares

    def _moved(self, probe: Schedule, first: Controls, walk: Sequence[Controls]) -> Schedule:
        """The probe's schedule, changed as the walk departs from its first controls."""
        values = dict(probe.values)
        for name in self._moved_controls:
            start, (low, high) = getattr(first, name), getattr(BOUNDS, name)
            path = [getattr(controls, name) for controls in walk]
            old = probe.values.get(name)
            if old is None or start is None or (name == "momentum" and not bool((old > 0).all())):
                continue
            if name == "noise" and not start > 0:
                # No factor moves a probe at 0: the walk itself, if it leaves 0.
                moved = torch.tensor(path, dtype=torch.float64).repeat_interleave(self.every)
                values[name] = moved[: len(old)] if any(path) else old
                continue
            blocks = []
            for part, value in zip(old.split(self.every), path, strict=True):
                ratio = CONTROLS[name].ratio(value, start)
                moved = torch.as_tensor(CONTROLS[name].rescale(part, ratio))
                # A template that is already outside the bounds stays there.
                within = moved.maximum(part.clamp(max=low)).minimum(part.clamp(min=high))
                blocks.append(part if ratio == 1 else within)
            values[name] = torch.cat(blocks)
        return Schedule(values, probe.start, probe.seed)


@dataclass(frozen=True)
class Pass:
    """A run by the smoother. held_out: its criterion, lower is better. result: for the caller."""

    schedule: Schedule
    rows: Sequence[Mapping[str, Any]]
    held_out: float
    result: Any = None


def smooth(
    train: Callable[[int, Schedule | None], Pass],
    smoother: Smoother,
    passes: int,
    reward: str = "reward",
) -> tuple[list[Pass], int]:
    """(all runs, the probe first; the index of the one with the lowest held-out loss).

    train: trains from scratch with the same seed, by a schedule or, for None, by the run's own
    controls; called passes + 1 times. Each pass starts from the best run so far; after a run that
    was no better it goes half as far in the opposite direction. The first goes `AGAINST` if the
    data changed, and then moves lr alone unless the smoother names controls.
    """
    if passes < 1:
        raise InputError(f"passes must be ≥ 1, got {passes}")
    runs = [train(0, None)]
    best, scale = 0, 1.0
    if data_changed(Tape.of(runs[0].rows, reward)):
        scale = AGAINST
        smoother = replace(smoother, controls=smoother.controls or ("lr",))
    for number in range(1, passes + 1):
        law = replace(smoother, gains=smoother.gains.times(scale))
        schedule = law.schedule(Tape.of(runs[best].rows, reward), runs[best].schedule)
        runs.append(train(number, schedule))
        if runs[number].held_out < runs[best].held_out:
            best = number
        else:
            scale *= -0.5
    return runs, best


def data_changed(tape: Tape) -> bool:
    """Whether the losses indicate a change of the data; always False with a reward.
    For stationary data lr should be high where there is progress; for changing data where the loss
    rises, since much is to be learned."""
    if tape.rewards is not None:  # a policy-gradient loss has no meaningful level
        return False
    mean = [m for m in _centred(tape.losses, 0.05) if math.isfinite(m)]
    lowest, highest_rise = math.inf, 0.0
    for m in mean:
        lowest = min(lowest, m)
        highest_rise = max(highest_rise, m - lowest)
    return bool(mean) and highest_rise > ROSE_AGAIN * (mean[0] - lowest)


def reward_of(goal: Goal | None) -> str:
    """The goal's metric if higher is better, else "reward"."""
    return goal.metric if goal is not None and goal.higher else "reward"


def held_out(
    record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], goal: Goal | None = None
) -> float:
    """A run's criterion, lower is better: its goal, else validation loss, else negative mean
    reward, else mean training loss (held-out for endless streams)."""
    if goal is not None:
        values = [math.nan if r.get(goal.metric) is None else float(r[goal.metric]) for r in rows]
        values = values[-goal.over :] if goal.last else values
        return _or_infinite((-1 if goal.higher else 1) * sum(values) / len(values))
    if record["val_loss"] is not None:
        return _or_infinite(record["val_loss"])
    tape = Tape.of(rows)
    if tape.rewards is not None:
        given = [r for r in tape.rewards if math.isfinite(r)]
        return -sum(given) / len(given)
    return _or_infinite(sum(tape.losses) / len(tape.losses))


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _controls(probe: Schedule) -> Controls:
    def first(name: str) -> float | None:
        return float(probe[name][0].reshape(-1)[0]) if name in probe else None

    momentum = first("momentum")
    return Controls(float(probe["lr"].max()), momentum or None, first("noise") or 0.0)


def _both_ways(values: Sequence[float], beta: float) -> tuple[list[float], list[float]]:
    """(exponential means before each index, from each index on), T + 1 each; β is the weight of the
    nearest value, unusable values are excluded."""

    def one_way(ordered: Sequence[float]) -> list[float]:
        mean, weight, means = 0.0, 0.0, [math.nan]
        for value in ordered:
            weight *= 1 - beta
            if is_usable(value):
                weight += beta
                mean += beta / weight * (value - mean)
            means.append(mean if weight > 1e-12 else math.nan)
        return means

    return one_way(values), one_way(values[::-1])[::-1]


def _centred(values: Sequence[float], beta: float) -> list[float]:
    """The average of both one-sided means: a zero-phase filter."""
    before, after = _both_ways(values, beta)
    pairs = zip(before[1:], after[:-1], strict=True)
    return [(b + a) / 2 if math.isfinite(b + a) else math.nan for b, a in pairs]


def _plateaus(losses: Sequence[float], marks: range) -> list[float]:
    """P of `signals.plateau` at the marks, from two-sided means."""
    mean = _centred(losses, SMOOTHING.loss)
    squares = [
        (x - m) ** 2 if is_usable(x) else math.nan for x, m in zip(losses, mean, strict=True)
    ]
    variance = _centred(squares, SMOOTHING.variance)
    finite = [v for v in variance if math.isfinite(v)]
    usual = sum(finite) / len(finite) if finite else 0.0
    change = [*(b - a for a, b in pairwise(mean)), 0.0]
    moved = _centred(change, SMOOTHING.loss)
    still = STILL * SMOOTHING.loss
    sizes = [max(abs(c), still * math.sqrt(v)) for c, v in zip(change, variance, strict=True)]
    size = _centred(sizes, SMOOTHING.loss)
    found = []
    for m in marks:
        still = abs(moved[m]) / size[m] if size[m] > 0 else 0.0
        p = plateau_score(still, variance[m], usual)
        found.append(p if math.isfinite(p) else 0.0)
    return found


def _lost(tape: Tape, every: int) -> set[int]:
    columns = [tape.losses] + ([] if tape.gradient_norms is None else [tape.gradient_norms])
    return {i // every for column in columns for i, x in enumerate(column) if not is_usable(x)}

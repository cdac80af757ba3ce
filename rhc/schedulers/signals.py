"""What a causal scheduler knows of a run: trends of loss and reward, their scales, a plateau score.

All of it is pure: an update takes a state and an observation and returns a new state, so that a
tape, a scheduler and a planner compute the same numbers. Every mean is exponential with β the
weight of the newest value, and corrected for its start as Adam's are (Kingma & Ba 2015). Every
signal that leaves this module is free of units: a loss times 1000 gives the same trends and scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, get_type_hints

from rhc.errors import InputError

Record = TypeVar("Record")

LARGEST = 1e100
"""Observations beyond ±this count as not finite: their squares must be numbers."""

FEWEST = 20
"""Observations before a plateau can be told from a beginning."""

SURPRISING = 3.0
"""Standard deviations of single losses above ℓ̄ from which on losses are of another kind."""


@dataclass(frozen=True)
class RunningMean:
    """An exponential mean: total / weight, 0 before the first observation."""

    total: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight > 0 else 0.0

    def updated(self, new: float, beta: float) -> RunningMean:
        """With one more value, of weight `beta` in (0, 1]."""
        return RunningMean((1 - beta) * self.total + beta * new, (1 - beta) * self.weight + beta)


@dataclass(frozen=True)
class Smoothing:
    """β of every mean, each the weight of the newest value."""

    loss: float = 0.02
    """Of ℓ̄, per step; 0.01 to 0.05 suits most runs."""

    reward: float = 0.02
    """Of r̄, per step: a reward that comes every n steps weighs 1 − (1 − β)ⁿ."""

    variance: float = 0.01
    """Of the variance v of the loss, per step."""

    usual: float = 0.002
    """Of the variance that v is compared with, per step."""

    scale: float = 0.1
    """Of the usual changes S_ℓ and S_r, per update."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value <= 1:
                raise InputError(f"smoothing {field.name} must be in (0, 1], got {value:g}")


@dataclass(frozen=True)
class Signals:
    """State of all signals, after `steps` finite losses and `rewards` finite rewards.

    variance: v of (ℓ − ℓ̄)². change, size: means of Δℓ̄ and |Δℓ̄| per step. loss_scale S_ℓ,
    reward_scale S_r: means of |Δℓ|, |Δr| per update. loss_mark, reward_mark: ℓ̄ and r̄ at the last
    update; fresh_losses, fresh_rewards: observations since. waited: steps since the last reward;
    gap: between the last two; reward_trend: that of the last reward.
    """

    loss: RunningMean = RunningMean()
    variance: RunningMean = RunningMean()
    usual_variance: RunningMean = RunningMean()
    change: RunningMean = RunningMean()
    size: RunningMean = RunningMean()
    reward: RunningMean = RunningMean()
    loss_scale: RunningMean = RunningMean()
    reward_scale: RunningMean = RunningMean()
    loss_mark: float | None = None
    reward_mark: float | None = None
    steps: int = 0
    rewards: int = 0
    fresh_rewards: int = 0
    fresh_losses: int = 0
    waited: int = 0
    gap: int = 0
    reward_trend: float = 0.0


@dataclass(frozen=True)
class Trends:
    """What the laws are driven by.

    loss: Δ̃ℓ in [−1, 1], positive where the loss rises. reward: Δ̃r in [−1, 1], positive where the
    reward rises; where no reward was ever given, the fall of the loss as far as it stands out from
    its noise. plateau: P in [0, 1].
    """

    loss: float = 0.0
    reward: float = 0.0
    plateau: float = 0.0


def restored(kind: type[Record], record: Mapping[str, Any]) -> Record:
    """A dataclass from what `asdict` made of it; dataclasses in its fields are restored too."""
    kinds = get_type_hints(kind)
    values = {
        name: restored(kinds[name], value) if isinstance(value, Mapping) else value
        for name, value in record.items()
    }
    return kind(**values)


def is_usable(value: float) -> bool:
    """Whether an observation is finite, and its square too."""
    return math.isfinite(value) and abs(value) <= LARGEST


def observed(signals: Signals, loss: float, reward: float | None, smoothing: Smoothing) -> Signals:
    """After one step's loss, and its reward where there is one. What is not finite is ignored."""
    if is_usable(loss):
        signals = _with_loss(signals, float(loss), smoothing)
    waited = signals.waited + 1
    if reward is None or not is_usable(reward):
        return replace(signals, waited=waited)
    weight = smoothing.reward if waited == 1 else 1 - (1 - smoothing.reward) ** waited
    mean = signals.reward.updated(float(reward), weight)
    return replace(
        signals,
        reward=mean,
        reward_mark=mean.value if signals.reward_mark is None else signals.reward_mark,
        rewards=signals.rewards + 1,
        fresh_rewards=signals.fresh_rewards + 1,
        waited=0,
        gap=waited if signals.rewards else 0,
    )


def _with_loss(signals: Signals, loss: float, smoothing: Smoothing) -> Signals:
    mean = signals.loss.updated(loss, smoothing.loss)
    if signals.loss_mark is None:
        return replace(signals, loss=mean, loss_mark=mean.value, steps=1, fresh_losses=1)
    apart = loss - mean.value
    delta = mean.value - signals.loss.value
    variance = signals.variance.updated(apart * apart, smoothing.variance)
    return replace(
        signals,
        loss=mean,
        variance=variance,
        usual_variance=signals.usual_variance.updated(variance.value, smoothing.usual),
        change=signals.change.updated(delta, smoothing.loss),
        size=signals.size.updated(abs(delta), smoothing.loss),
        steps=signals.steps + 1,
        fresh_losses=signals.fresh_losses + 1,
    )


def trends(signals: Signals, smoothing: Smoothing) -> tuple[Trends, Signals]:
    """The trends over all steps since this was last called, and the state that begins anew there.

    Δℓ is the change of ℓ̄ since then, Δ̃ℓ = clip(Δℓ / S_ℓ, −1, 1), likewise for the reward; both
    are 0 where nothing was observed. A reward that comes more seldom than this is called keeps its
    trend until the next is due.

    Where no reward was ever given, the loss stands in for it: Δ̃r = −Δℓ / (|Δℓ| + s), s the
    standard deviation that Δℓ has by noise alone. −Δ̃ℓ itself would be ±1 as soon as the falls are
    alike, however small: lr then grows for as long as the training loss falls at all.
    """
    loss, reward = 0.0, 0.0
    if signals.loss_mark is not None:
        delta = _beyond_rounding(signals.loss.value - signals.loss_mark, signals.loss.value)
        scale = signals.loss_scale.updated(abs(delta), smoothing.scale)
        loss = share(delta, scale.value)
        spread = math.sqrt(max(signals.variance.value, 0.0)) * _spread(
            smoothing.loss, signals.fresh_losses
        )
        reward = 0.0 if delta == 0 else -delta / (abs(delta) + spread)
        signals = replace(signals, loss_scale=scale, loss_mark=signals.loss.value)
    if signals.reward_mark is not None:
        reward = signals.reward_trend if signals.waited < signals.gap else 0.0
        if signals.fresh_rewards:
            delta = signals.reward.value - signals.reward_mark
            delta = _beyond_rounding(delta, signals.reward.value)
            scale = signals.reward_scale.updated(abs(delta), smoothing.scale)
            reward = share(delta, scale.value)
            signals = replace(signals, reward_scale=scale, reward_mark=signals.reward.value)
    signals = replace(signals, fresh_rewards=0, fresh_losses=0, reward_trend=reward)
    return Trends(loss, reward, plateau(signals)), signals


def surprise(signals: Signals, losses: Sequence[float]) -> int | None:
    """Where these losses, which are not yet part of the signals, begin to be of another kind: the
    first that lies `SURPRISING` standard deviations of single losses above ℓ̄, if their mean does.

    The mean of n losses of an unchanged run has 1/√n of that deviation. None with fewer than
    `FEWEST` observations, and where the losses have no variance.
    """
    usable = [loss for loss in losses if is_usable(loss)]
    if signals.steps < FEWEST or not usable or signals.variance.value <= 0:
        return None
    bar = signals.loss.value + SURPRISING * math.sqrt(signals.variance.value)
    if sum(usable) / len(usable) <= bar:
        return None
    return next(i for i, loss in enumerate(losses) if is_usable(loss) and loss > bar)


def begun_anew(signals: Signals) -> Signals:
    """Without what is known of the loss; what is known of the reward stays."""
    return Signals(
        reward=signals.reward,
        reward_scale=signals.reward_scale,
        reward_mark=signals.reward_mark,
        rewards=signals.rewards,
        fresh_rewards=signals.fresh_rewards,
        waited=signals.waited,
        gap=signals.gap,
        reward_trend=signals.reward_trend,
    )


def plateau(signals: Signals) -> float:
    """The `plateau_score` of a run at its last step; 0 with fewer than `FEWEST` observations."""
    if signals.steps < FEWEST:
        return 0.0
    moved = abs(share(signals.change.value, signals.size.value))
    return plateau_score(moved, signals.variance.value, signals.usual_variance.value)


def plateau_score(moved: float, variance: float, usual: float) -> float:
    """P = σ((0.3 − moved) / 0.05) · σ((2 − v / usual) / 0.5), near 1 where the loss neither moves
    nor swings.

    moved: |mean change| over mean |change|, per step: noise alone gives about 0.1, a steady descent
    1. usual: the variance that v is compared with.
    """
    swings = min(variance / usual, 1e3) if usual > 0 else 0.0
    return sigmoid((0.3 - moved) / 0.05) * sigmoid((2.0 - swings) / 0.5)


def clip(value: float, bounds: tuple[float, float]) -> float:
    """The nearest value within the bounds."""
    return min(max(value, bounds[0]), bounds[1])


def logit(p: float) -> float:
    """log(p / (1 − p)), of p in (0, 1)."""
    return math.log(p) - math.log1p(-p)


def sigmoid(x: float) -> float:
    """The inverse of `logit`."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _spread(beta: float, steps: int) -> float:
    """Standard deviation of the change of an exponential mean over `steps` values of variance 1:
    √(2β/(2 − β) · (1 − (1 − β)ⁿ))."""
    return math.sqrt(2 * beta / (2 - beta) * (1 - (1 - beta) ** max(steps, 1)))


def _beyond_rounding(delta: float, mean: float) -> float:
    """0 for a change that summing up numbers of this size makes by itself."""
    return 0.0 if abs(delta) <= 1e-12 * abs(mean) else delta


def share(delta: float, scale: float) -> float:
    """A change in units of its usual size, within ±1; 0 where there is none."""
    return clip(delta / scale, (-1.0, 1.0)) if scale > 0 else 0.0

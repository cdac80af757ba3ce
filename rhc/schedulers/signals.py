"""Causal signals of a run: trends of loss and reward, their scales, a plateau score.

All updates are pure. Means are exponential, β the weight of the newest value, with Adam's bias
correction (Kingma & Ba 2015). Trends and scores do not depend on the loss's unit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, get_type_hints

from rhc.errors import InputError

Record = TypeVar("Record")

LARGEST = 1e100
"""Observations beyond ±this count as not finite, since their squares overflow."""

FEWEST = 20
"""Observations before a plateau can be detected."""

SURPRISING = 3.0
"""Standard deviations of single losses above ℓ̄ that count as a surprise."""


STILL = 0.2
"""Share of the usual spread of the losses below which ℓ̄ does not move: after a descent that ends in
constant losses ℓ̄ approaches them for ever, always in one direction."""


@dataclass(frozen=True)
class RunningMean:
    """An exponential mean, 0 without observations. weight: of all observations, 1 in the end.

    The mean moves by its distance to the new value, so that equal values leave it as it is, to the
    bit: a quotient of two sums would change by rounding, which looks like a trend."""

    value: float = 0.0
    weight: float = 0.0

    def updated(self, new: float, beta: float) -> RunningMean:
        weight = (1 - beta) * self.weight + beta
        return RunningMean(self.value + beta / weight * (new - self.value), weight)


@dataclass(frozen=True)
class Smoothing:
    loss: float = 0.02
    """Of ℓ̄, per step; 0.01 to 0.05 suits most runs."""

    reward: float = 0.02
    """Of r̄, per step: a reward every n steps weighs 1 − (1 − β)ⁿ."""

    variance: float = 0.01
    """Of the variance v of the loss, per step."""

    usual: float = 0.002
    """Of the usual variance, per step."""

    scale: float = 0.1
    """Of the usual changes S_ℓ and S_r, per update."""

    plateau: float = 0.05
    """Of the usual plateau score, per update."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value <= 1:
                raise InputError(f"smoothing {field.name} must be in (0, 1], got {value:g}")

    def faster(self, factor: float) -> Smoothing:
        """For a shorter run: β of ℓ̄ and r̄ times the factor, at most 0.05."""
        loss, reward = (min(beta * factor, 0.05) for beta in (self.loss, self.reward))
        return replace(self, loss=loss, reward=reward)


@dataclass(frozen=True)
class Signals:
    """State of all signals after `steps` finite losses and `rewards` finite rewards.
    variance: v of (ℓ − ℓ̄)². change, size: means of Δℓ̄ and |Δℓ̄| per step, size at
    least `STILL` times that of the noise. loss_scale S_ℓ,
    reward_scale S_r: means of |Δℓ|, |Δr| per update. loss_mark, reward_mark: ℓ̄ and r̄ at the last
    update; fresh_*: observations since. waited: steps since the last reward; gap: steps between the
    last two."""

    loss: RunningMean = RunningMean()
    variance: RunningMean = RunningMean()
    usual_variance: RunningMean = RunningMean()
    change: RunningMean = RunningMean()
    size: RunningMean = RunningMean()
    usual_plateau: RunningMean = RunningMean()
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
    """Δ̃ℓ and Δ̃r in [−1, 1], > 0 when rising (without rewards Δ̃r is the fall of the loss relative
    to its noise), P in [0, 1], and how far P exceeds its usual value: a stall is a plateau that is
    new."""

    loss: float = 0.0
    reward: float = 0.0
    plateau: float = 0.0
    stall: float = 0.0


def restored(kind: type[Record], record: Mapping[str, Any]) -> Record:
    """The inverse of `asdict`, also for nested dataclasses and means that were saved as sums."""
    if "total" in record and kind is RunningMean:
        total, weight = record["total"], record["weight"]
        record = {"value": total / weight if weight > 0 else 0.0, "weight": weight}
    kinds = get_type_hints(kind)
    values = {
        name: restored(kinds[name], value) if isinstance(value, Mapping) else value
        for name, value in record.items()
    }
    return kind(**values)


def is_usable(value: float) -> bool:
    return math.isfinite(value) and abs(value) <= LARGEST


def observed(signals: Signals, loss: float, reward: float | None, smoothing: Smoothing) -> Signals:
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
    still = STILL * smoothing.loss * math.sqrt(variance.value)
    return replace(
        signals,
        loss=mean,
        variance=variance,
        usual_variance=signals.usual_variance.updated(variance.value, smoothing.usual),
        change=signals.change.updated(delta, smoothing.loss),
        size=signals.size.updated(max(abs(delta), still), smoothing.loss),
        steps=signals.steps + 1,
        fresh_losses=signals.fresh_losses + 1,
    )


def trends(signals: Signals, smoothing: Smoothing) -> tuple[Trends, Signals]:
    """The trends since the last call, and the state with the marks reset.
    Δ̃ℓ = clip(Δℓ / S_ℓ, −1, 1) with Δℓ the change of ℓ̄, likewise Δ̃r; 0 without observations. A
    reward that is rarer than updates keeps its trend until the next is due. Without rewards Δ̃r =
    −Δℓ / (|Δℓ| + s), s the standard deviation of Δℓ under noise alone; −Δ̃ℓ would be ±1 for any
    steady fall, however small, and raise lr as long as the training loss falls."""
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
    score = plateau(signals)
    usual = signals.usual_plateau.updated(score, smoothing.plateau)
    signals = replace(
        signals, fresh_rewards=0, fresh_losses=0, reward_trend=reward, usual_plateau=usual
    )
    return Trends(loss, reward, score, max(score - usual.value, 0.0)), signals


def surprise(signals: Signals, losses: Sequence[float]) -> int | None:
    """Index of the first of these new losses above ℓ̄ + `SURPRISING` standard deviations from which
    on their mean is too, of two at least; an outlier counts as twice as far. None with fewer than
    `FEWEST` observations or without variance."""
    if signals.steps < FEWEST or signals.variance.value <= 0:
        return None
    far = SURPRISING * math.sqrt(signals.variance.value)
    above = [min(loss - signals.loss.value - far, far) for loss in losses]
    for i, loss in enumerate(losses):
        rest = [a for a, other in zip(above[i:], losses[i:], strict=True) if is_usable(other)]
        if is_usable(loss) and above[i] > 0 and len(rest) > 1 and sum(rest) > 0:
            return i
    return None


def begun_anew(signals: Signals) -> Signals:
    """The signals with the loss's state reset and the reward's kept."""
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
    """The current `plateau_score`; 0 with fewer than `FEWEST` observations."""
    if signals.steps < FEWEST:
        return 0.0
    moved = abs(share(signals.change.value, signals.size.value))
    return plateau_score(moved, signals.variance.value, signals.usual_variance.value)


def plateau_score(moved: float, variance: float, usual: float) -> float:
    """P = σ((0.3 − moved) / 0.05) · σ((2 − v / usual) / 0.5). moved: |mean change| / mean |change|
    per step, about 0.1 for noise and 1 for steady descent."""
    swings = min(variance / usual, 1e3) if usual > 0 else 0.0
    return sigmoid((0.3 - moved) / 0.05) * sigmoid((2.0 - swings) / 0.5)


def clip(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])


def logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _spread(beta: float, steps: int) -> float:
    """√(2β/(2 − β) · (1 − (1 − β)ⁿ)): standard deviation of the change of an exponential mean over
    n values of variance 1."""
    return math.sqrt(2 * beta / (2 - beta) * (1 - (1 - beta) ** max(steps, 1)))


def _beyond_rounding(delta: float, mean: float) -> float:
    return 0.0 if abs(delta) <= 1e-12 * abs(mean) else delta


def share(delta: float, scale: float) -> float:
    """delta / scale, clipped to ±1; 0 without a scale."""
    return clip(delta / scale, (-1.0, 1.0)) if scale > 0 else 0.0

"""What a causal scheduler knows of a run: trends of loss and reward, their scales, a plateau score.

All of it is pure: an update takes a state and an observation and returns a new state, so that a
tape, a scheduler and a planner compute the same numbers. Every average is exponential with β the
weight of the newest value, and corrected for its start as Adam's are (Kingma & Ba 2015). Every
signal that leaves this module is free of units: a loss times 1000 gives the same trends and scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from rhc.errors import InputError

LARGEST = 1e100
"""Observations beyond ±this count as not finite: their squares must be numbers."""

FEWEST = 20
"""Observations before a plateau can be told from a beginning."""


@dataclass(frozen=True)
class Average:
    """An exponential average. total / weight is its value; 0 before the first observation."""

    total: float = 0.0
    weight: float = 0.0

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight > 0 else 0.0

    def updated(self, new: float, beta: float) -> Average:
        """With one more value, of weight `beta` in (0, 1]."""
        return Average((1 - beta) * self.total + beta * new, (1 - beta) * self.weight + beta)


@dataclass(frozen=True)
class Smoothing:
    """β of every average, each the weight of the newest value.

    loss, reward: of ℓ̄ and r̄, per step; between 0.01 and 0.05 suits most runs. A reward that comes
    every n steps weighs 1 − (1 − β)ⁿ. variance: of v, per
    step. usual: of the variance that v is compared with, per step. scale: of S_ℓ and S_r, per
    update.
    """

    loss: float = 0.02
    reward: float = 0.02
    variance: float = 0.01
    usual: float = 0.002
    scale: float = 0.1

    def __post_init__(self) -> None:
        for name in ("loss", "reward", "variance", "usual", "scale"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise InputError(f"smoothing {name} must be in (0, 1], got {value:g}")


@dataclass(frozen=True)
class Signals:
    """State of all signals, after `steps` finite losses and `rewards` finite rewards.

    loss ℓ̄, reward r̄, and variance v of (ℓ − ℓ̄)²; change and size: averages of Δℓ̄ and |Δℓ̄| per
    step; loss_scale S_ℓ and reward_scale S_r: averages of |Δℓ|, |Δr| per update; loss_mark,
    reward_mark: ℓ̄ and r̄ at the last update, None before the first observation. fresh_losses,
    fresh_rewards: observations since then. waited: steps since the last reward, and gap: between
    the last two. reward_trend: that of the last reward.
    """

    loss: Average = Average()
    variance: Average = Average()
    usual_variance: Average = Average()
    change: Average = Average()
    size: Average = Average()
    reward: Average = Average()
    loss_scale: Average = Average()
    reward_scale: Average = Average()
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
        loss = _share(delta, scale.value)
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
            reward = _share(delta, scale.value)
            signals = replace(signals, reward_scale=scale, reward_mark=signals.reward.value)
    signals = replace(signals, fresh_rewards=0, fresh_losses=0, reward_trend=reward)
    return Trends(loss, reward, plateau(signals)), signals


def surprise(signals: Signals, losses: Sequence[float]) -> int | None:
    """Where these losses, which are not yet part of the signals, begin to be of another kind: the
    first that lies 3 standard deviations of single losses above ℓ̄, if their mean does too.

    The mean of n losses of an unchanged run has 1/√n of that deviation. None with fewer than
    `FEWEST` observations, and where the losses have no variance.
    """
    usable = [loss for loss in losses if is_usable(loss)]
    if signals.steps < FEWEST or not usable or signals.variance.value <= 0:
        return None
    bar = signals.loss.value + 3 * math.sqrt(signals.variance.value)
    if sum(usable) / len(usable) <= bar:
        return None
    return next(i for i, loss in enumerate(losses) if is_usable(loss) and loss > bar)


def begun_anew(signals: Signals) -> Signals:
    """Without what is known of the loss; what is known of the reward stays."""
    new = Signals()
    kept = ("reward", "reward_scale", "reward_mark", "rewards", "fresh_rewards", "waited", "gap")
    return replace(new, **{name: getattr(signals, name) for name in (*kept, "reward_trend")})


def _spread(beta: float, steps: int) -> float:
    """Standard deviation of the change of an exponential average over `steps` values of variance
    1: √(2β/(2 − β) · (1 − (1 − β)ⁿ))."""
    return math.sqrt(2 * beta / (2 - beta) * (1 - (1 - beta) ** max(steps, 1)))


def _beyond_rounding(delta: float, mean: float) -> float:
    """0 for a change that summing up numbers of this size makes by itself."""
    return 0.0 if abs(delta) <= 1e-12 * abs(mean) else delta


def plateau(signals: Signals) -> float:
    """P = σ((ε_Δ − |Δℓ|) / s_ℓ) · σ((ε_v − v) / s_v), near 1 where the loss neither moves nor
    swings.

    Δℓ is the average change per step; ε_Δ and s_ℓ are 0.3 and 0.05 of the average |change|: noise
    alone gives a ratio of about 0.1, a steady descent 1. ε_v and s_v are 2 and 0.5 of the usual
    variance. 0 with fewer than `FEWEST` observations.
    """
    if signals.steps < FEWEST:
        return 0.0
    moved = abs(_share(signals.change.value, signals.size.value))
    usual = signals.usual_variance.value
    swings = min(signals.variance.value / usual, 1e3) if usual > 0 else 0.0
    return _sigmoid((0.3 - moved) / 0.05) * _sigmoid((2.0 - swings) / 0.5)


# A change of level --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChangeTest:
    """What counts as a change of level, and how seldom it may be claimed where there is none.

    shift: of the level, in standard deviations of the values, that is to be found soon.
    false_alarms: probability of a claim in 1000 steps of a stationary sequence. warmup: values
    before the first claim. lag: the newest values, which are not yet part of what they are compared
    with.
    """

    shift: float = 2.0
    false_alarms: float = 0.01
    warmup: int = 100
    lag: int = 50

    def __post_init__(self) -> None:
        if not 0 < self.shift < math.inf:
            raise InputError(f"shift must be > 0 standard deviations, got {self.shift:g}")
        if not 0 < self.false_alarms < 1:
            raise InputError(f"false_alarms must be in (0, 1), got {self.false_alarms:g}")
        if not 1 <= self.lag < self.warmup:
            raise InputError(
                f"lag must be in [1, warmup) for warmup={self.warmup}, got {self.lag}; "
                "lower lag or raise warmup"
            )


class ChangePoint(NamedTuple):
    """State of a two-sided CUSUM of the values since the last change, or since the beginning.

    mean, variance, product: of the `settled` values older than the lag: their level, and the
    averages of w² and of w times the one before, w the distance to the level, cut at 3 standard
    deviations. slow, slow_square: a running average of w and the average of its square. newest:
    the last values. upper, lower: CUSUMs; falling: steps for which lower has not been 0. last: the
    newest w. changes: upward changes so far.
    """

    mean: float = 0.0
    variance: float = 0.0
    product: float = 0.0
    slow: float = 0.0
    slow_square: float = 0.0
    previous: float = 0.0
    settled: int = 0
    newest: tuple[float, ...] = ()
    upper: float = 0.0
    lower: float = 0.0
    falling: int = 0
    last: float = 0.0
    changes: int = 0


_MEMORY = 0.005
"""Weight of one value in the reference, once there are 200 of them."""

_CUT = 3.0
_SLOW = 0.1
_MOST_CORRELATED = 0.95


def changed(state: ChangePoint, value: float, test: ChangeTest) -> tuple[ChangePoint, bool]:
    """(the state after one more value, whether the level has risen).

    A CUSUM (Page 1954) of the innovations e = (w − φ w₋₁) / (s √(1 − φ²)), which are white where
    the values are autoregressive; e is cut at k + 1, so that no few outliers make a change. φ is
    the larger of the correlation of neighbours and of what the variance of a slow average implies,
    plus half a standard error; k is half of what the shift is in units of e, and the threshold is
    Siegmund's (1985) for the mean distance between false alarms, times 1.3 for what estimating
    costs. Multiplying all values by a number, or adding one, changes nothing. A level that falls
    begins the reference anew and is no alarm; hand returns over with their sign turned.

    Measured, 1000 runs of 1000 stationary steps each: runs with an alarm 0.0 to 0.1 % of normal,
    Student-t (2, 3), exponential, log-normal, gamma and Cauchy noise, 0.0 to 0.2 % with
    autocorrelation 0.5, 0.2 to 1.0 % with 0.8 to 0.95 or a tenfold slower part. Delay of a 2-sd
    shift, median and 90 %: normal 12 and 19 steps, heavy tails 7 to 10 and 9 to 18, autocorrelation
    0.5 27 and 49. Where neighbours correlate by 0.8 or more, the shift is within what such values
    do by themselves in 1000 steps, and it is found late or never.
    What is not finite is ignored.
    """
    if not is_usable(value):
        return state, False
    value = float(value)
    newest = (*state.newest, value)
    seen = state.settled + len(newest)
    if seen <= test.warmup:
        return state._replace(newest=newest), False
    while len(newest) > test.lag:
        state, newest = _settled(state, newest[0]), newest[1:]
    state = state._replace(newest=newest)
    if state.variance <= 0:
        return state, False
    correlation = _correlation(state)
    s = math.sqrt(state.variance)
    w = min(max(value - state.mean, -_CUT * s), _CUT * s)
    e = (w - correlation * state.last) / (s * math.sqrt(1 - correlation**2))
    k = 0.5 * test.shift * math.sqrt((1 - correlation) / (1 + correlation))
    bar = 1.3 * (math.log1p(2 * k * k * 1000 / test.false_alarms) / (2 * k) - 1.166)
    upper = max(0.0, state.upper + min(e, k + 1) - k)
    lower = max(0.0, state.lower + min(-e, k + 1) - k)
    if upper > bar:
        return ChangePoint(changes=state.changes + 1), True
    if lower > bar:
        since = newest[-min(state.falling + 1, test.lag) :]  # the new level's own values
        return ChangePoint(newest=since, changes=state.changes), False
    falling = state.falling + 1 if lower > 0 else 0
    return state._replace(upper=upper, lower=lower, falling=falling, last=w), False


def _settled(state: ChangePoint, value: float) -> ChangePoint:
    """With one more value that has grown old enough to be compared with."""
    n = state.settled
    if n == 0:
        return state._replace(mean=value, settled=1)
    s = math.sqrt(state.variance) if n >= 5 and state.variance > 0 else math.inf
    w = min(max(value - state.mean, -_CUT * s), _CUT * s)
    share, of_squares = max(_MEMORY, 1 / (n + 1)), max(_MEMORY, 1 / n)
    own = w * w * (1 - share) if n < 100 else w * w
    slow = state.slow + _SLOW * (w - state.slow)
    spread = slow * slow * (2 - _SLOW) / _SLOW
    return state._replace(
        mean=state.mean + share * w,
        variance=state.variance + of_squares * (own - state.variance),
        product=state.product + of_squares * (w * state.previous - state.product),
        slow=slow,
        slow_square=state.slow_square + of_squares * (spread - state.slow_square),
        previous=w,
        settled=n + 1,
    )


def _correlation(state: ChangePoint) -> float:
    """φ of an autoregressive sequence that swings as slowly as this one."""
    ratio = state.slow_square / state.variance
    found = max(state.product / state.variance, (ratio - 1) / (ratio + 1))
    error = 1 / math.sqrt(min(state.settled, 2 / _MEMORY))
    return min(max(found + 0.5 * error, 0.0), _MOST_CORRELATED)


def _share(delta: float, scale: float) -> float:
    return min(max(delta / scale, -1.0), 1.0) if scale > 0 else 0.0


def _sigmoid(x: float) -> float:
    if x >= 0:
        return 1 / (1 + math.exp(-x))
    return math.exp(x) / (1 + math.exp(x))

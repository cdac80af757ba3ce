"""Unit-free statistics of an epoch, as pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rhc.schedulers.drift import ChangePoint, cusum
from rhc.schedulers.signals import (
    RunningMean,
    Signals,
    Smoothing,
    is_usable,
    observed,
    plateau,
    restored,
    share,
)

SMOOTHING = Smoothing()

SCALE = 0.3
"""Weight of the newest epoch in the usual size of changes."""

FALLEN = 0.5
"""Without validation, an epoch is worse if its reward trend is below −this; returns are noisy."""


@dataclass(frozen=True)
class EpochStats:
    """Statistics of epoch `epoch` (from 0), over `steps` finite losses.

    *_change: since the epoch before; 0 in the first. *_trend: in [−1, 1], the change over its usual
    size or two standard errors, whichever is larger. variance: mean of (ℓ − ℓ̄)², ℓ̄ the running
    mean. worse, better: consecutive epochs with a higher or lower validation loss, else with a
    clearly lower or higher reward. source: of the reward. drifts: detected rises of the loss's
    level or falls of the reward's. ignored: values that were not finite.
    """

    epoch: int = 0
    steps: int = 0
    loss: float | None = None
    loss_change: float = 0.0
    loss_trend: float = 0.0
    reward: float | None = None
    reward_change: float = 0.0
    reward_trend: float = 0.0
    gradient_rms: float | None = None
    variance: float = 0.0
    variance_ratio: float = 1.0
    plateau: float = 0.0
    validation: float | None = None
    validation_change: float = 0.0
    validation_trend: float = 0.0
    worse: int = 0
    better: int = 0
    source: str = "validation"
    drifts: int = 0
    ignored: int = 0


@dataclass(frozen=True)
class Tally:
    """Running count, mean and sum of squared deviations (Welford 1962)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def updated(self, value: float) -> Tally:
        count = self.count + 1
        apart = value - self.mean
        mean = self.mean + apart / count
        return Tally(count, mean, self.squares + apart * (value - mean))

    @property
    def error(self) -> float:
        return self.squares / (self.count - 1) / self.count if self.count > 1 else 0.0


@dataclass(frozen=True)
class EpochLevel:
    level: float | None = None
    error: float = 0.0
    size: RunningMean = field(default_factory=RunningMean)

    def moved(self, level: float, error: float = 0.0) -> tuple[EpochLevel, float, float]:
        """(the record after an epoch at `level`, the change, its trend)."""
        if self.level is None:
            return EpochLevel(level, error, self.size), 0.0, 0.0
        change = level - self.level
        size = self.size.updated(abs(change), SCALE)
        scale = max(size.value, 2 * math.sqrt(error + self.error))
        return EpochLevel(level, error, size), change, share(change, scale)


@dataclass(frozen=True)
class EpochState:
    signals: Signals = field(default_factory=Signals)
    loss_level: ChangePoint = field(default_factory=ChangePoint)
    reward_level: ChangePoint = field(default_factory=ChangePoint)
    loss: EpochLevel = EpochLevel()
    reward: EpochLevel = EpochLevel()
    validation: EpochLevel = EpochLevel()
    usual_variance: RunningMean = field(default_factory=RunningMean)
    epoch: int = 0
    worse: int = 0
    better: int = 0
    losses: Tally = Tally()
    rewards: Tally = Tally()
    spread: float = 0.0
    plateaus: float = 0.0
    squared_norms: float = 0.0
    norms: int = 0
    drifts: int = 0
    ignored: int = 0

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> EpochState:
        """The inverse of `asdict`, also after a round trip through JSON."""
        values = dict(record)
        for name in ("loss_level", "reward_level"):
            level = ChangePoint(*values[name])
            values[name] = level._replace(newest=tuple(level.newest))
        return restored(cls, values)


OF_ONE_EPOCH = (
    "losses", "rewards", "spread", "plateaus", "squared_norms", "norms", "drifts", "ignored"
)  # fmt: skip
"""Fields of `EpochState` that are reset at every epoch."""

FRESH = {name: getattr(EpochState(), name) for name in OF_ONE_EPOCH}


def after_step(
    state: EpochState,
    loss: float | None,
    reward: float | None = None,
    gradient_norm: float | None = None,
) -> tuple[EpochState, bool]:
    """(the state after one committed step, whether the level of loss or reward got worse)."""
    drifted = False
    ignored = sum(x is not None and not is_usable(x) for x in (loss, reward))
    values: dict[str, Any] = {}
    if loss is not None and is_usable(loss):
        signals = observed(state.signals, loss, None, SMOOTHING)
        apart = float(loss) - signals.loss.value
        level, drifted = cusum(state.loss_level, loss)
        values |= {
            "signals": signals,
            "loss_level": level,
            "losses": state.losses.updated(float(loss)),
            "spread": state.spread + apart * apart,
            "plateaus": state.plateaus + plateau(signals),
        }
    if reward is not None and is_usable(reward):
        values["rewards"] = state.rewards.updated(float(reward))
        values["reward_level"], fallen = cusum(state.reward_level, -reward)
        drifted = drifted or fallen
    if gradient_norm is not None and is_usable(gradient_norm):
        values["squared_norms"] = state.squared_norms + float(gradient_norm) ** 2
        values["norms"] = state.norms + 1
    values |= {"drifts": state.drifts + drifted, "ignored": state.ignored + ignored}
    return replace(state, **values), drifted


def after_epoch(
    state: EpochState,
    validation: float | None = None,
    reward: float | None = None,
    source: str = "validation",
) -> tuple[EpochStats, EpochState]:
    """(the statistics of the epoch that ends, the state for the next).
    validation: held-out loss at the end of the epoch. reward: of the whole epoch, instead of the
    mean of its steps. source: "validation" uses the fall of the validation loss as the reward."""
    values: dict[str, Any] = {**FRESH, "epoch": state.epoch + 1}
    steps, ignored = state.losses.count, state.ignored
    stats: dict[str, Any] = {"steps": steps}

    def moved(name: str, level: float, error: float = 0.0) -> tuple[float, float]:
        """(change, trend) of one of loss, reward and validation since the last epoch."""
        values[name], change, trend = getattr(state, name).moved(level, error)
        stats.update({name: level, f"{name}_change": change, f"{name}_trend": trend})
        return change, trend

    if steps:
        variance = state.spread / steps
        usual = state.usual_variance
        values["usual_variance"] = usual.updated(variance, SCALE)
        moved("loss", state.losses.mean, variance / steps)
        stats |= {
            "variance": variance,
            "variance_ratio": min(variance / usual.value, 1e3) if usual.value > 0 else 1.0,
            "plateau": state.plateaus / steps,
        }
    if state.norms:
        stats["gradient_rms"] = math.sqrt(state.squared_norms / state.norms)
    worse = better = False
    if validation is not None and is_usable(validation):
        change, _ = moved("validation", float(validation))
        worse, better = change > 0, change < 0
    elif validation is not None:
        worse, ignored = True, ignored + 1
        stats["validation_trend"] = 1.0
    if source == "validation":
        if "validation" in stats:
            stats["reward"] = -stats["validation"]
        for name in ("change", "trend"):
            stats[f"reward_{name}"] = -stats.get(f"validation_{name}", 0.0)
    elif reward is not None and not is_usable(reward):
        ignored += 1
    elif reward is not None or state.rewards.count:
        mean, error = (state.rewards.mean, state.rewards.error) if reward is None else (reward, 0.0)
        _, trend = moved("reward", float(mean), error)
        if validation is None:
            worse, better = trend <= -FALLEN, trend >= FALLEN
    values["worse"] = state.worse + 1 if worse else 0
    values["better"] = state.better + 1 if better else 0
    after = replace(state, **values)
    return EpochStats(
        epoch=state.epoch,
        source=source,
        worse=after.worse,
        better=after.better,
        drifts=state.drifts,
        ignored=ignored,
        **stats,
    ), after

"""The plan of the next epoch, a pure function of the last epoch's statistics.

    log α   ← log α   + k_r Δ̃r − k_ℓ max(Δ̃ℓ, 0)             likewise logit μ (Adam's β1)
    log σ   ← log σ   + k_P P − k_r max(Δ̃r, 0)
    a, s    ← up by k_P P L(v), down by k_v max(Δ̃val, 0)     augmentation, sampling strength
    log η   ← log η   + k_P P − k_r max(Δ̃r, 0)              entropy coefficient
    log ε   ← log ε   + k_P P − k_r max(−Δ̃r, 0)             PPO's clip range
    logit λ ← logit λ + k_P P − k_v max(v̂ − 1, 0)            generalized advantage

v̂: variance of the loss over its usual value; L(v) = σ((1 − v̂) / ¼) applies to augmentation only.
Every value is bounded and changes by ×[0.8, 1.25] per epoch at most.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from rhc.errors import InputError
from rhc.schedulers.laws import (
    IGNITES,
    IGNITION,
    Bounds,
    Cap,
    Controls,
    Gains,
    lowered,
    updated,
)
from rhc.schedulers.signals import Trends, clip
from rhc.schedulers.statistics import EpochStats

STEERED = ("lr", "momentum", "noise")
"""Values set on the optimizer."""

KNOBS = ("augmentation", "sampling", "entropy", "clip_range", "gae_lambda")
"""Values set on knobs."""

VALUES = (*STEERED, *KNOBS)

CAP: Cap = (0.8, 1.25)
"""Smallest and largest factor on a value per epoch."""

PLAN_GAINS = Gains(
    lr_reward=0.1,
    lr_loss=0.1,
    momentum_reward=0.1,
    momentum_loss=0.2,
    noise_plateau=0.2,
    noise_reward=0.2,
)

PLAN_BOUNDS = Bounds(lr=(1e-6, 1.0))

MAY_BE_ZERO = ("noise", "augmentation", "sampling")

LIT = 0.05
"""Augmentation and sampling jump from 0 to this, and to 0 below half of it."""

DRIFT_LOGIT = 0.5
"""Decrease of logit momentum after a drift."""

MOST = 50.0
"""Largest move in nats or logits, which keeps exp finite."""


@dataclass(frozen=True)
class Intervention:
    kind: str
    reason: str


@dataclass(frozen=True)
class EpochPlan:
    """Values for epoch `epoch`; None for those that the run does not have.
    lr: the largest of the groups; a template multiplies it. momentum: SGD's or β1. augmentation,
    sampling: in [0, 1]. first_lr: of the run's first epoch. mode: "planned" or the name of a
    preset."""

    lr: float
    momentum: float | None = None
    noise: float = 0.0
    augmentation: float | None = None
    sampling: float | None = None
    entropy: float | None = None
    clip_range: float | None = None
    gae_lambda: float | None = None
    epoch: int = 0
    first_lr: float | None = None
    mode: str = "planned"
    interventions: tuple[Intervention, ...] = ()

    @property
    def values(self) -> dict[str, float]:
        found = {name: getattr(self, name) for name in VALUES}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> EpochPlan:
        done = tuple(Intervention(**i) for i in record["interventions"])
        return cls(**{**record, "interventions": done})

    def changed(self, values: Mapping[str, float | None], **others: Any) -> EpochPlan:
        return replace(self, **{**values, **others})


def plan_next_epoch(
    stats: EpochStats,
    previous: EpochPlan,
    gains: Gains | None = None,
    bounds: Bounds | None = None,
    cap: Cap = CAP,
) -> EpochPlan:
    """The plan of the epoch after `stats`, deterministic and within bounds and cap.

    NaN statistics count as no trend. Losses that were not finite lower lr by the cap.

    Args:
        stats: Statistics of the last epoch.
        previous: The plan of that epoch.
        gains: Sizes of the changes.
        bounds: Lowest and highest values.
        cap: Smallest and largest factor on any value.
    """
    gains, bounds = gains or PLAN_GAINS, bounds or PLAN_BOUNDS
    before = _sane(previous, bounds)
    trends = Trends(
        _within(stats.loss_trend, -1.0, 1.0),
        _within(stats.reward_trend, -1.0, 1.0),
        _within(stats.plateau, 0.0, 1.0),
    )
    controls = Controls(before.lr, before.momentum, before.noise)
    new = updated(controls, trends, gains, bounds, cap)
    interventions: tuple[Intervention, ...] = ()
    if stats.ignored:
        new = replace(new, lr=lowered(controls, bounds, cap[0]).lr)
        why = f"{stats.ignored} values of epoch {stats.epoch} were not finite"
        interventions = (Intervention("not finite", why),)
    moves = _moves(stats, trends, gains)
    knobs = {
        name: _moved(name, value, moves[name], trends.plateau, bounds, cap)
        for name, value in before.values.items()
        if name in KNOBS
    }
    plan = before.changed(
        {**asdict(new), **knobs}, epoch=stats.epoch + 1, interventions=interventions
    )
    return capped(plan, before, bounds, cap)


def after_drift(plan: EpochPlan, reason: str, bounds: Bounds | None = None) -> EpochPlan:
    """The plan after a drift (stale momentum): α × 0.8, logit μ − ½ (capped), σ × 1.25 or on."""
    bounds = bounds or PLAN_BOUNDS
    before = _sane(plan, bounds)
    momentum = before.momentum
    if momentum is not None and 0 < momentum < 1:
        momentum = _moved_odds(momentum, -DRIFT_LOGIT)
    changed = replace(
        before,
        lr=before.lr * CAP[0],
        momentum=momentum,
        noise=max(before.noise * CAP[1], IGNITION),
        interventions=(*plan.interventions, Intervention("drift", reason)),
    )
    return capped(changed, before, bounds)


def capped(
    plan: EpochPlan, begun: EpochPlan, bounds: Bounds | None = None, cap: Cap = CAP
) -> EpochPlan:
    """`plan` within ×cap of `begun`, except for changes from and to 0, then within its bounds."""
    bounds = bounds or PLAN_BOUNDS
    values = plan.values
    for name, value in values.items():
        old = getattr(begun, name)
        if old is not None and old > 0 and value > 0:
            value = clip(value, (old * cap[0], old * cap[1]))
        allowed = getattr(bounds, name)
        off = name in MAY_BE_ZERO and value == 0 and allowed[0] <= 0
        not_steered = name == "momentum" and not 0 < value < 1
        values[name] = value if off or not_steered else clip(value, allowed)
    return plan.changed(values)


def checked_names(names: Iterable[str]) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(names))
    for name in found:
        if name not in VALUES:
            raise InputError(f"unknown value {name!r} of a plan: there are: {', '.join(VALUES)}")
    return found


def gains_of(names: Iterable[str], gains: Gains) -> Gains:
    kept = tuple(f"{name}_" for name in checked_names(names))
    return replace(gains, **{f.name: 0.0 for f in fields(gains) if not f.name.startswith(kept)})


def _moves(stats: EpochStats, trends: Trends, gains: Gains) -> dict[str, float]:
    """Moves of the knobs in nats; of `gae_lambda` in logits."""
    up, ratio = trends.plateau, _within(stats.variance_ratio, 0.0, 1e3, 1.0)
    calm = 1 / (1 + math.exp(clip((ratio - 1) / 0.25, (-MOST, MOST))))
    worse = max(_within(stats.validation_trend, -1.0, 1.0), 0.0)
    return {
        "augmentation": gains.augmentation_plateau * up * calm
        - gains.augmentation_validation * worse,
        "sampling": gains.sampling_plateau * up - gains.sampling_validation * worse,
        "entropy": gains.entropy_plateau * up - gains.entropy_reward * max(trends.reward, 0.0),
        "clip_range": gains.clip_range_plateau * up
        - gains.clip_range_reward * max(-trends.reward, 0.0),
        "gae_lambda": gains.gae_lambda_plateau * up
        - gains.gae_lambda_variance * clip(ratio - 1, (0.0, 1.0)),
    }


def _moved(name: str, value: float, move: float, plateau: float, bounds: Bounds, cap: Cap) -> float:
    if name in MAY_BE_ZERO and value == 0:
        return LIT if move > 0 and plateau > IGNITES else 0.0
    move = clip(move, (-MOST, MOST))
    new = value * math.exp(move)
    if name == "gae_lambda" and 0 < value < 1:
        new = _moved_odds(value, move)
    new = clip(new, (value * cap[0], value * cap[1]))
    if name in MAY_BE_ZERO and new < LIT / 2 and move < 0 and getattr(bounds, name)[0] <= 0:
        return 0.0
    return new


def _moved_odds(value: float, logits: float) -> float:
    odds = value / (1 - value) * math.exp(logits)
    return odds / (1 + odds)


def _sane(plan: EpochPlan, bounds: Bounds) -> EpochPlan:
    """Values that are negative or not finite are replaced by their lower bound."""
    return plan.changed(
        {
            name: value if math.isfinite(value) and value >= 0 else getattr(bounds, name)[0]
            for name, value in plan.values.items()
        }
    )


def _within(value: float | None, low: float, high: float, otherwise: float = 0.0) -> float:
    if value is None or math.isnan(value):
        return otherwise
    return clip(float(value), (low, high))

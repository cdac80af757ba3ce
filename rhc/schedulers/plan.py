"""The next epoch's plan: bounded laws from the statistics of the last one. Pure, deterministic.

    log α   ← log α   + k_r Δ̃r − k_ℓ max(Δ̃ℓ, 0)             likewise logit μ (Adam's β1)
    log σ   ← log σ   + k_P P − k_r max(Δ̃r, 0)
    a, s    ← up by k_P P L(v), down by k_v max(Δ̃val, 0)     augmentation, sampling strength
    log η   ← log η   + k_P P − k_r max(Δ̃r, 0)              entropy coefficient
    log ε   ← log ε   + k_P P − k_r max(−Δ̃r, 0)             PPO's clip range
    logit λ ← logit λ + k_P P − k_v max(v̂ − 1, 0)            of the generalised advantage

The first three are `rhc.schedulers.laws` at the granularity of an epoch. v̂ is the variance of the
loss over its usual value and L(v) = σ((1 − v̂) / ¼): augmentation rises where nothing moves and
little swings. Every value stays within its bounds and changes by ×[0.8, 1.25] per epoch at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from rhc.errors import InputError
from rhc.schedulers import laws
from rhc.schedulers.laws import IGNITION, Cap, Controls
from rhc.schedulers.signals import Trends
from rhc.schedulers.statistics import EpochStats

CAP: Cap = (0.8, 1.25)
"""By what factors one epoch may change any value."""

LIT = 0.05
"""Augmentation and sampling go from 0 to here, and to exactly 0 from below half of it."""

DRIFT_LOGIT = 0.5
"""By how much momentum falls in logits where the data drift."""


@dataclass(frozen=True)
class PlanGains(laws.Gains):
    """How far an epoch may go: nats of α, σ, η, ε, a and s; logits of μ and λ."""

    lr_reward: float = 0.1
    lr_loss: float = 0.1
    momentum_reward: float = 0.1
    momentum_loss: float = 0.2
    noise_plateau: float = 0.2
    noise_reward: float = 0.2
    augmentation_plateau: float = 0.2
    augmentation_validation: float = 0.2
    sampling_plateau: float = 0.2
    sampling_validation: float = 0.2
    entropy_plateau: float = 0.2
    entropy_reward: float = 0.1
    clip_range_plateau: float = 0.1
    clip_range_reward: float = 0.1
    gae_lambda_plateau: float = 0.1
    gae_lambda_variance: float = 0.1

    def only(self, *names: str) -> PlanGains:
        """These gains for the values of `names`, and 0 for all others."""
        unknown = [n for n in names if n not in VALUES]
        if unknown:
            raise InputError(
                f"unknown value {unknown[0]!r} of a plan: there are: {', '.join(VALUES)}"
            )
        kept = {
            f.name: getattr(self, f.name)
            if any(f.name.startswith(f"{name}_") for name in names)
            else 0.0
            for f in fields(self)
        }
        return PlanGains(**kept)


@dataclass(frozen=True)
class PlanBounds(laws.Bounds):
    """Lowest and highest value of everything that a plan holds."""

    lr: tuple[float, float] = (1e-6, 1.0)
    augmentation: tuple[float, float] = (0.0, 1.0)
    sampling: tuple[float, float] = (0.0, 1.0)
    entropy: tuple[float, float] = (1e-4, 0.1)
    clip_range: tuple[float, float] = (0.05, 0.4)
    gae_lambda: tuple[float, float] = (0.8, 0.99)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("augmentation", "sampling", "entropy", "clip_range", "gae_lambda"):
            low, high = getattr(self, name)
            most = math.inf if name == "entropy" else 1.0
            if not 0 <= low <= high <= most or not math.isfinite(high):
                raise InputError(
                    f"bounds of {name} must be 0 ≤ lowest ≤ highest"
                    f"{'' if most == math.inf else ' ≤ 1'}, got ({low:g}, {high:g})"
                )


@dataclass(frozen=True)
class Intervention:
    """What a guard or a drift did beyond the laws, and why."""

    kind: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What epoch `epoch` is trained with; None for what the run does not have.

    lr α: the largest of the groups, as a level: a template multiplies it. momentum μ or β1; noise
    σ. augmentation and sampling: strengths in [0, 1]; entropy η; clip_range ε; gae_lambda λ.
    first_lr: that the run began with. mode: "planned", or the name of the preset in force.
    interventions: that led here.
    """

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
    interventions: tuple[Intervention, ...] = field(default=())

    @property
    def values(self) -> dict[str, float]:
        """By name, without what the run does not have."""
        found = {name: getattr(self, name) for name in VALUES}
        return {name: value for name, value in found.items() if value is not None}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Plan:
        done = tuple(Intervention(**i) for i in record["interventions"])
        return cls(**{**record, "interventions": done})


VALUES = (
    *("lr", "momentum", "noise", "augmentation", "sampling"),
    *("entropy", "clip_range", "gae_lambda"),
)
"""What a plan holds a value of."""


def plan_next_epoch(
    stats: EpochStats,
    previous: Plan,
    gains: laws.Gains | None = None,
    bounds: laws.Bounds | None = None,
    cap: Cap = CAP,
) -> Plan:
    """The plan of the epoch after `stats`, of which `previous` was the plan.

    Deterministic, and within bounds and cap whatever the statistics are: what is not a number
    counts as no trend. Losses that were not finite lower lr by the cap, whatever else happened.
    """
    gains, bounds = _gains(gains), _bounds(bounds)
    drives = Drives.of(stats)
    before = _sane(previous, bounds)
    controls = laws.updated(
        Controls(before.lr, before.momentum, before.noise),
        Trends(drives.loss, drives.reward, drives.plateau),
        gains,
        bounds,
        cap,
    )
    interventions: tuple[Intervention, ...] = ()
    if stats.ignored:
        controls = replace(controls, lr=laws.lowered(Controls(before.lr), bounds, cap[0]).lr)
        why = f"{stats.ignored} values of epoch {stats.epoch} were not finite"
        interventions = (Intervention("not finite", why),)
    values: dict[str, Any] = {
        name: _next_value(name, value, drives, gains, bounds, cap)
        for name, value in before.values.items()
        if name in LAWS
    }
    plan = replace(
        before,
        lr=controls.lr,
        momentum=controls.momentum,
        noise=controls.noise,
        epoch=stats.epoch + 1,
        interventions=interventions,
        **values,
    )
    return capped(plan, before, bounds, cap)


def next_value(
    name: str,
    value: float,
    stats: EpochStats,
    gains: laws.Gains | None = None,
    bounds: laws.Bounds | None = None,
    cap: Cap = CAP,
) -> float:
    """One value of the next plan: what `plan_next_epoch` makes of it, for a knob that is alone."""
    if name not in VALUES:
        raise InputError(f"unknown value {name!r} of a plan: there are: {', '.join(VALUES)}")
    lr = value if name == "lr" else 1.0
    values: dict[str, Any] = {"lr": lr, name: value}
    plan = Plan(**values)
    return float(getattr(plan_next_epoch(stats, plan, gains, bounds, cap), name))


def after_drift(plan: Plan, reason: str, bounds: laws.Bounds | None = None, cap: Cap = CAP) -> Plan:
    """The plan from the step on at which the data were found to drift: lower α and μ, higher σ.

    A surprise makes the gradients of the next steps large and stale: α falls by the cap, logit μ by
    ½ (within the cap), σ rises by the cap or to where it begins.
    """
    bounds = _bounds(bounds)
    before = _sane(plan, bounds)
    momentum = before.momentum
    if momentum is not None and 0 < momentum < 1:
        odds = momentum / (1 - momentum) * math.exp(-DRIFT_LOGIT)
        momentum = odds / (1 + odds)
    changed = replace(
        before,
        lr=before.lr * cap[0],
        momentum=momentum,
        noise=max(before.noise * cap[1], IGNITION),
        interventions=(*plan.interventions, Intervention("drift", reason)),
    )
    return capped(changed, before, bounds, cap)


def capped(plan: Plan, begun: Plan, bounds: laws.Bounds | None = None, cap: Cap = CAP) -> Plan:
    """`plan` with every value within ×cap of the one in `begun`, and within its bounds.

    The leaving of 0 and the way back to it are not capped, nor is the way back into the bounds.
    """
    bounds = _bounds(bounds)
    values: dict[str, Any] = {}
    for name, value in plan.values.items():
        old = getattr(begun, name)
        if old is not None and old > 0 and value > 0:
            value = min(max(value, old * cap[0]), old * cap[1])
        low, high = getattr(bounds, name)
        if name in MAY_BE_ZERO and value == 0 and low <= 0:
            values[name] = 0.0
        elif name == "momentum" and not 0 < value < 1:
            values[name] = value  # nothing to steer
        else:
            values[name] = min(max(value, low), high)
    return replace(plan, **values)


# The laws of single values ------------------------------------------------------------------------

MAY_BE_ZERO = ("noise", "augmentation", "sampling")


@dataclass(frozen=True)
class Drives:
    """What the laws look at, each a number within its range whatever was observed."""

    loss: float
    reward: float
    plateau: float
    calm: float
    swings: float
    validation: float

    @classmethod
    def of(cls, stats: EpochStats) -> Drives:
        ratio = _number(stats.variance_ratio, 0.0, 1e3, 1.0)
        return cls(
            loss=_number(stats.loss_trend, -1.0, 1.0),
            reward=_number(stats.reward_trend, -1.0, 1.0),
            plateau=_number(stats.plateau, 0.0, 1.0),
            calm=1 / (1 + math.exp(min(max((ratio - 1) / 0.25, -50.0), 50.0))),
            swings=min(max(ratio - 1, 0.0), 1.0),
            validation=_number(stats.validation_trend, -1.0, 1.0),
        )


LAWS: Mapping[str, tuple[str, Callable[[Drives, PlanGains], float]]] = {
    "augmentation": (
        "log",
        lambda d, g: (
            g.augmentation_plateau * d.plateau * d.calm
            - g.augmentation_validation * max(d.validation, 0.0)
        ),
    ),
    "sampling": (
        "log",
        lambda d, g: (
            g.sampling_plateau * d.plateau - g.sampling_validation * max(d.validation, 0.0)
        ),
    ),
    "entropy": (
        "log",
        lambda d, g: g.entropy_plateau * d.plateau - g.entropy_reward * max(d.reward, 0.0),
    ),
    "clip_range": (
        "log",
        lambda d, g: g.clip_range_plateau * d.plateau - g.clip_range_reward * max(-d.reward, 0.0),
    ),
    "gae_lambda": (
        "logit",
        lambda d, g: g.gae_lambda_plateau * d.plateau - g.gae_lambda_variance * d.swings,
    ),
}
"""Value -> (coordinate, by how much it moves in it)."""


def _next_value(
    name: str, value: float, drives: Drives, gains: PlanGains, bounds: PlanBounds, cap: Cap
) -> float:
    coordinate, law = LAWS[name]
    move = law(drives, gains)
    if name in MAY_BE_ZERO and value == 0:
        return LIT if move > 0 and drives.plateau > laws.IGNITES else 0.0
    if coordinate == "logit" and 0 < value < 1:
        odds = value / (1 - value) * math.exp(min(max(move, -50.0), 50.0))
        new = odds / (1 + odds)
    else:
        new = value * math.exp(min(max(move, -50.0), 50.0))
    new = min(max(new, value * cap[0]), value * cap[1])
    if name in MAY_BE_ZERO and new < LIT / 2 and move < 0 and getattr(bounds, name)[0] <= 0:
        return 0.0
    return new


def _sane(plan: Plan, bounds: PlanBounds) -> Plan:
    """The plan with the lowest bound in place of what is not a number, or negative."""
    values: dict[str, Any] = {
        name: value if math.isfinite(value) and value >= 0 else getattr(bounds, name)[0]
        for name, value in plan.values.items()
    }
    return replace(plan, **values)


def _number(value: float | None, low: float, high: float, otherwise: float = 0.0) -> float:
    if value is None or math.isnan(value):
        return otherwise
    return min(max(float(value), low), high)


def _gains(gains: laws.Gains | None) -> PlanGains:
    return gains if isinstance(gains, PlanGains) else PlanGains(**_own(gains))


def _bounds(bounds: laws.Bounds | None) -> PlanBounds:
    return bounds if isinstance(bounds, PlanBounds) else PlanBounds(**_own(bounds))


def _own(record: Any) -> dict[str, Any]:
    """Fields of the causal laws' gains or bounds, to which a plan adds its own."""
    return {} if record is None else asdict(record)


def names_of(values: Iterable[str]) -> tuple[str, ...]:
    """The names, each once and checked."""
    found = tuple(dict.fromkeys(values))
    for name in found:
        if name not in VALUES:
            raise InputError(f"unknown value {name!r} of a plan: there are: {', '.join(VALUES)}")
    return found

"""Guardrails: laws wrapped around laws, each a pure function (stats, previous plan) -> plan.

    law = Failsafe(Smoothed(Planned(gains, bounds), penalty=0.02), preset=CONSERVATIVE)

`rhc.EpochPlanner` takes any such law. What a guard does beyond the law inside is an `Intervention`
of the plan that it returns, with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from rhc.errors import InputError, whole_number
from rhc.schedulers import laws
from rhc.schedulers.laws import Cap
from rhc.schedulers.plan import CAP, Intervention, Plan, PlanGains, plan_next_epoch
from rhc.schedulers.statistics import EpochStats

Law = Callable[[EpochStats, Plan], Plan]


@dataclass(frozen=True)
class Planned:
    """The bounded laws, `plan_next_epoch`, with their gains, bounds and cap."""

    gains: laws.Gains | None = None
    bounds: laws.Bounds | None = None
    cap: Cap = CAP

    def __call__(self, stats: EpochStats, previous: Plan) -> Plan:
        return plan_next_epoch(stats, previous, self.gains, self.bounds, self.cap)


@dataclass(frozen=True)
class Smoothed:
    """The law with a total-variation penalty on the values of successive epochs.

    x_e = argmin ½ (x − x̂_e)² + penalty · |x − x_{e−1}| for every value in its raw coordinate (log,
    or logit of momentum and λ): moves are shortened by `penalty`, and those below it not made.
    Rudin, Osher, Fatemi 1992; the leaving of 0 and the way back to it are let through.
    """

    law: Law
    penalty: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.penalty < math.inf:
            raise InputError(f"penalty must be ≥ 0, got {self.penalty:g}; use 0 for none")

    def __call__(self, stats: EpochStats, previous: Plan) -> Plan:
        plan = self.law(stats, previous)
        if plan.mode != previous.mode or stats.ignored:
            return plan
        values: dict[str, Any] = {}
        for name, new in plan.values.items():
            old = getattr(previous, name)
            if old is not None and old > 0 and new > 0 and new != old:
                values[name] = _shortened(name, old, new, self.penalty)
        return replace(plan, **values)


@dataclass(frozen=True)
class Preset:
    """Cautious values under a name. lr: a factor of the lr that the run began with, and of no use
    where the plan is lower already; None leaves a value as it is."""

    name: str = "conservative"
    lr: float | None = 0.3
    momentum: float | None = None
    noise: float | None = 0.0
    augmentation: float | None = None
    sampling: float | None = 0.0
    entropy: float | None = None
    clip_range: float | None = 0.1
    gae_lambda: float | None = 0.95

    def __post_init__(self) -> None:
        if self.name == "planned" or not self.name:
            raise InputError(f"a preset needs a name of its own, got {self.name!r}")
        if self.lr is not None and not 0 < self.lr <= 1:
            raise InputError(f"lr of a preset must be a factor in (0, 1], got {self.lr:g}")

    def applied(self, plan: Plan) -> Plan:
        """The plan with these values in force."""
        values = {
            name: getattr(self, name)
            for name in plan.values
            if name != "lr" and getattr(self, name) is not None
        }
        lr = plan.lr
        if self.lr is not None:
            lr = min(lr, self.lr * (plan.lr if plan.first_lr is None else plan.first_lr))
        return replace(plan, lr=lr, mode=self.name, **values)


CONSERVATIVE = Preset()


@dataclass(frozen=True)
class Failsafe:
    """The law, until validation is worse `patience` epochs in a row; then the preset.

    The preset stays in force, and nothing is planned, until validation has become better `rearm`
    epochs in a row: then the law goes on from there, and the failsafe is armed again. It is not
    bound by the cap of an epoch.
    """

    law: Law
    preset: Preset = CONSERVATIVE
    patience: int = 2
    rearm: int = 2

    def __post_init__(self) -> None:
        for name in ("patience", "rearm"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be ≥ 1 epochs, got {getattr(self, name)}")

    def __call__(self, stats: EpochStats, previous: Plan) -> Plan:
        kept = replace(previous, epoch=stats.epoch + 1, interventions=())
        if previous.mode == self.preset.name:
            if stats.better < self.rearm:
                return kept
            why = f"validation has been better {stats.better} epochs in a row: planning again"
            plan = self.law(stats, replace(previous, mode="planned"))
            return _with(plan, Intervention("re-armed", why))
        if stats.worse >= self.patience:
            why = (
                f"validation has been worse {stats.worse} epochs in a row: preset "
                f"{self.preset.name!r}"
            )
            return _with(self.preset.applied(kept), Intervention("failsafe", why))
        return self.law(stats, previous)


@dataclass(frozen=True)
class Always:
    """A preset from the end of the first epoch to the end of the run, whatever happens."""

    preset: Preset = CONSERVATIVE

    def __call__(self, stats: EpochStats, previous: Plan) -> Plan:
        kept = replace(previous, epoch=stats.epoch + 1, interventions=())
        return self.preset.applied(kept)


def usual_law(gains: laws.Gains | None = None, bounds: laws.Bounds | None = None) -> Law:
    """The bounded laws, smoothed, with the failsafe around them."""
    return Failsafe(Smoothed(Planned(gains or PlanGains(), bounds)))


# Where rewards come from --------------------------------------------------------------------------


@dataclass(frozen=True)
class Validation:
    """The reward of an epoch is the fall of a loss on data that is not trained on."""

    source: str = field(default="validation", init=False)


@dataclass(frozen=True)
class FreshSeeds:
    """The reward is a return played with seeds that nothing was trained on.

    play: (seed) -> return, called once at the end of every epoch with a seed of its own, from
    `first` on; or the name of a metric of every step that is such a return, as an on-policy run has
    it: its episodes are played before anything learns from them.
    """

    play: Callable[[int], float] | str = "return"
    first: int = 10**6
    source: str = field(default="fresh seeds", init=False)


@dataclass(frozen=True)
class TrainingTape:
    """The reward is what the training steps themselves report: named, because it flatters.

    A loss that falls on the data that were trained on says nothing of other data. metric: the name
    of a metric of every step; None for the loss, with its sign turned.
    """

    metric: str | None = None
    source: str = field(default="training tape", init=False)


RewardSource = Validation | FreshSeeds | TrainingTape


def _with(plan: Plan, intervention: Intervention) -> Plan:
    return replace(plan, interventions=(*plan.interventions, intervention))


def _shortened(name: str, old: float, new: float, penalty: float) -> float:
    logit = name in ("momentum", "gae_lambda") and old < 1 and new < 1
    move = _raw(new, logit) - _raw(old, logit)
    if abs(move) <= penalty:
        return old
    x = _raw(old, logit) + math.copysign(abs(move) - penalty, move)
    return 1 / (1 + math.exp(-x)) if logit else math.exp(x)


def _raw(value: float, logit: bool) -> float:
    return math.log(value) - math.log1p(-value) if logit else math.log(value)

"""Guards: laws around laws, pure functions (stats, previous plan) -> plan, for example
Failsafe(Smoothed(Planned(gains, bounds), penalty=0.02), preset=CONSERVATIVE)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from rhc.errors import InputError, whole_number
from rhc.schedulers.laws import Bounds, Cap, Gains
from rhc.schedulers.plan import CAP, EpochPlan, Intervention, plan_next_epoch
from rhc.schedulers.signals import logit, sigmoid
from rhc.schedulers.statistics import EpochStats

Law = Callable[[EpochStats, EpochPlan], EpochPlan]


@dataclass(frozen=True)
class Planned:
    gains: Gains | None = None
    bounds: Bounds | None = None
    cap: Cap = CAP

    def __call__(self, stats: EpochStats, previous: EpochPlan) -> EpochPlan:
        return plan_next_epoch(stats, previous, self.gains, self.bounds, self.cap)


@dataclass(frozen=True)
class Smoothed:
    """The law with a total-variation penalty over epochs (Rudin, Osher, Fatemi 1992).
    x_e = argmin ½ (x − x̂_e)² + penalty · |x − x_{e−1}| in raw coordinates (log; logit for momentum
    and λ). Changes from and to 0 are not penalized."""

    law: Law
    penalty: float = 0.02

    def __post_init__(self) -> None:
        if not 0 <= self.penalty < math.inf:
            raise InputError(f"penalty must be ≥ 0, got {self.penalty:g}; use 0 for none")

    def __call__(self, stats: EpochStats, previous: EpochPlan) -> EpochPlan:
        plan = self.law(stats, previous)
        if plan.mode != previous.mode or stats.ignored:
            return plan
        values = plan.values
        for name, new in values.items():
            old = getattr(previous, name)
            if old is not None and old > 0 and new > 0 and new != old:
                values[name] = self._shortened(name, old, new)
        return plan.changed(values)

    def _shortened(self, name: str, old: float, new: float) -> float:
        bounded = name in ("momentum", "gae_lambda") and old < 1 and new < 1
        to_raw, from_raw = (logit, sigmoid) if bounded else (math.log, math.exp)
        move = to_raw(new) - to_raw(old)
        if abs(move) <= self.penalty:
            return old
        return from_raw(to_raw(old) + math.copysign(abs(move) - self.penalty, move))


@dataclass(frozen=True)
class Preset:
    """Cautious values; None keeps one. lr: factor on the first epoch's lr, never raising it."""

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

    def applied(self, plan: EpochPlan) -> EpochPlan:
        values = plan.values
        for name in values:
            own = getattr(self, name)
            if own is not None:
                values[name] = own
        if self.lr is not None:
            first = plan.lr if plan.first_lr is None else plan.first_lr
            values["lr"] = min(plan.lr, self.lr * first)
        return plan.changed(values, mode=self.name)


CONSERVATIVE = Preset()


@dataclass(frozen=True)
class Failsafe:
    """Switches to the preset after `patience` epochs of worse validation in a row.
    The law resumes after `rearm` better epochs in a row. The cap per epoch does not apply to the
    switch."""

    law: Law
    preset: Preset = CONSERVATIVE
    patience: int = 2
    rearm: int = 2

    def __post_init__(self) -> None:
        for name in ("patience", "rearm"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be ≥ 1 epochs, got {getattr(self, name)}")

    def __call__(self, stats: EpochStats, previous: EpochPlan) -> EpochPlan:
        kept = replace(previous, epoch=stats.epoch + 1, interventions=())
        if previous.mode == self.preset.name:
            if stats.better < self.rearm:
                return kept
            plan = self.law(stats, replace(previous, mode="planned"))
            why = f"validation has been better {stats.better} epochs in a row: planning again"
            done = Intervention("re-armed", why)
        elif stats.worse >= self.patience:
            plan = self.preset.applied(kept)
            why = (
                f"validation has been worse {stats.worse} epochs in a row: preset "
                f"{self.preset.name!r}"
            )
            done = Intervention("failsafe", why)
        else:
            return self.law(stats, previous)
        return replace(plan, interventions=(*plan.interventions, done))

"""Unit-free causal features of tapes and live runs, the inputs of a distilled scheduler."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rhc.schedule import CONTROLS
from rhc.schedulers.laws import Controls
from rhc.schedulers.signals import (
    RunningMean,
    Signals,
    Smoothing,
    clip,
    is_usable,
    logit,
    observed,
    restored,
    sigmoid,
    trends,
)

SCALES: Mapping[str, Smoothing] = {
    "fast": Smoothing(loss=0.1, reward=0.1, variance=0.05),
    "usual": Smoothing(),
    "slow": Smoothing(loss=0.005, reward=0.005, variance=0.005),
}
"""Time constants of 10, 50 and 200 steps."""

STEERED = ("lr", "momentum", "noise")
"""Controls that a policy may steer, in order."""

_NORM = 0.2
"""β of the mean log gradient norm, per update."""


@dataclass(frozen=True)
class Form:
    """steered: controls that the policy moves and reads. gradient_norm: the trend of log |g|."""

    steered: tuple[str, ...] = ("lr", "momentum")
    reward: bool = False
    gradient_norm: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        of_scales = [
            f"{scale}.{what}"
            for scale in SCALES
            for what in ("loss", "rise", *(["reward"] if self.reward else []), "plateau")
        ]
        own = [f"moved.{name}" for name in self.steered]
        norm = ["gradient_norm"] if self.gradient_norm else []
        return (*of_scales, "fallen", "known", "progress", *own, *norm)


@dataclass
class Observer:
    """The past of a run: call `observe` at every step and `features` at every update."""

    form: Form
    start: Controls
    signals: dict[str, Signals] = field(default_factory=lambda: {n: Signals() for n in SCALES})
    first: float | None = None
    log_norm: RunningMean = field(default_factory=RunningMean)
    norm: float | None = None

    def observe(self, loss: float | None, reward: float | None) -> None:
        seen = math.nan if loss is None else loss
        wanted = reward if self.form.reward else None
        self.signals = {
            name: observed(state, seen, wanted, SCALES[name])
            for name, state in self.signals.items()
        }

    def observe_norm(self, norm: float | None) -> None:
        self.norm = norm

    def features(self, controls: Controls, progress: float | None) -> list[float]:
        """Features in `form.names` order; resets the trends. progress: share of the run done."""
        values: list[float] = []
        for name, smoothing in SCALES.items():
            found, self.signals[name] = trends(self.signals[name], smoothing)
            reward = [found.reward] if self.form.reward else []
            values += [found.loss, max(found.loss, 0.0), *reward, found.plateau]
        mean = self.signals["usual"].loss.value
        if self.first is None and self.signals["usual"].steps:
            self.first = mean
        values.append(_fallen(self.first, mean))
        values += [0.0, 0.0] if progress is None else [1.0, progress]
        values += [moved(name, controls, self.start) for name in self.form.steered]
        if self.form.gradient_norm:
            values.append(self._norm_trend())
        return values

    def _norm_trend(self) -> float:
        """log |g| minus its mean over earlier updates."""
        if self.norm is None or not is_usable(self.norm) or self.norm <= 0:
            return 0.0
        log = math.log(self.norm)
        trend = log - self.log_norm.value if self.log_norm.weight else 0.0
        self.log_norm = self.log_norm.updated(log, _NORM)
        return clip(trend, (-3.0, 3.0))

    def state(self) -> dict[str, Any]:
        return {
            "signals": {name: asdict(s) for name, s in self.signals.items()},
            "first": self.first,
            "log_norm": asdict(self.log_norm),
            "norm": self.norm,
            "start": asdict(self.start),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, values in state["signals"].items():
            self.signals[name] = restored(Signals, values)
        self.first, self.norm = state["first"], state["norm"]
        self.log_norm = restored(RunningMean, state["log_norm"])
        self.start = Controls(**state["start"])


def raw(name: str, value: float) -> float:
    """The unconstrained coordinate of a control, clipped to its bounds."""
    known = CONTROLS[name]
    clipped = clip(value, (known.lower, known.upper))
    return math.log(clipped) if known.coordinate == "log" else logit(clipped)


def natural(name: str, coordinate: float) -> float:
    """The inverse of `raw`; 0 at or below the lower bound where 0 is allowed."""
    known = CONTROLS[name]
    if known.zero and coordinate <= raw(name, known.lower):
        return 0.0
    inverse = math.exp if known.coordinate == "log" else sigmoid
    return clip(inverse(min(coordinate, 50.0)), (known.lower, known.upper))


def moved(name: str, controls: Controls, start: Controls) -> float:
    """Distance of a control from its start in its coordinate; 0 if absent."""
    now, then = getattr(controls, name), getattr(start, name)
    return 0.0 if now is None or then is None else raw(name, now) - raw(name, then)


def stepped(controls: Controls, moves: Mapping[str, float]) -> Controls:
    """The controls after moves in their coordinates; absent ones are unchanged."""
    new = {
        name: natural(name, raw(name, value) + move)
        for name, move in moves.items()
        if (value := getattr(controls, name)) is not None and move != 0
    }
    return replace(controls, **new)


def _fallen(first: float | None, now: float) -> float:
    """log(mean loss now / at first) for positive losses; else 0."""
    if first is None or first <= 0 or now <= 0:
        return 0.0
    return clip(math.log(now / first), (-8.0, 4.0))

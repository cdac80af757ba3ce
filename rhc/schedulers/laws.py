"""The bounded update laws: from trends to the next controls, in unconstrained coordinates.

    log α   ← log α   + k_r Δ̃r  − k_ℓ max(Δ̃ℓ, 0)
    logit μ ← logit μ + k_μr Δ̃r − k_μℓ max(Δ̃ℓ, 0)
    log σ   ← log σ   + k_σP P  − k_σr max(Δ̃r, 0)

each clipped to its bounds. Without a reward both trends are of the loss: a fall raises log α by k_r
as far as it stands out from the noise, a rise lowers it by k_ℓ and that much. On a noisy plateau,
where falls and rises take turns, α and μ therefore come down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from rhc.errors import InputError
from rhc.schedulers.signals import Trends

IGNITION = 1e-3
"""σ goes from 0 to here on a plateau, and to exactly 0 below here: log σ could never leave 0."""

IGNITES = 0.5
"""The plateau score above which σ leaves 0."""


@dataclass(frozen=True)
class Controls:
    """lr α ≥ 0; momentum μ (SGD's momentum, Adam's β1), None where the optimizer has none; noise σ
    ≥ 0, relative to the RMS of what it is added to."""

    lr: float
    momentum: float | None = None
    noise: float = 0.0


@dataclass(frozen=True)
class Gains:
    """How far one update may go, in nats of α and σ and logits of μ."""

    lr_reward: float = 0.02
    lr_loss: float = 0.02
    momentum_reward: float = 0.01
    momentum_loss: float = 0.02
    noise_plateau: float = 0.05
    noise_reward: float = 0.04


@dataclass(frozen=True)
class Bounds:
    """Lowest and highest value of every control."""

    lr: tuple[float, float] = (1e-5, 1e-1)
    momentum: tuple[float, float] = (0.6, 0.995)
    noise: tuple[float, float] = (0.0, 0.2)

    def __post_init__(self) -> None:
        for name, least, most in (
            ("lr", 0.0, math.inf), ("momentum", 0.0, 1.0), ("noise", 0.0, math.inf)
        ):  # fmt: skip
            low, high = getattr(self, name)
            if not (least <= low <= high <= most) or math.isinf(high) or low == 1.0:
                raise InputError(
                    f"bounds of {name} must be {least:g} ≤ lowest ≤ highest"
                    f"{'' if math.isinf(most) else f' ≤ {most:g}'}, got ({low:g}, {high:g})"
                )

    def clipped(self, controls: Controls) -> Controls:
        """The nearest controls within the bounds."""
        momentum = controls.momentum
        return Controls(
            _clip(controls.lr, self.lr),
            None if momentum is None else _clip(momentum, self.momentum),
            _clip(controls.noise, self.noise),
        )


DIP = 1.35
"""Logits by which μ falls where the losses are suddenly of another kind: 0.9 becomes 0.7."""


def paced(gains: Gains, every: int, steps: int | None) -> tuple[Gains, int, float]:
    """(gains, steps between updates, factor on the β of ℓ̄) for a run of `steps` steps.

    The laws' gains and `every` are those of runs of `USUAL_STEPS`: 500 updates. A run of 1000 steps
    would have 50, which move lr by a factor of e at most. Shorter runs are updated more often and
    further at a time, so that the sum of gains times updates is the same; longer ones and None are
    left as they are.
    """
    if steps is None or steps >= USUAL_STEPS:
        return gains, every, 1.0
    pace = USUAL_STEPS / max(steps, USUAL_STEPS // 20)
    between = max(1, round(every / pace**0.6))
    further = pace * between / every
    values = {f.name: getattr(gains, f.name) * further for f in fields(gains)}
    return Gains(**values), between, pace**0.4


USUAL_STEPS = 10_000


def annealed(done: int, steps: int) -> float:
    """The factor on lr after `done` of `steps` steps: half a cosine, from 1 to 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * min(done / steps, 1.0)))


def dipped(controls: Controls, bounds: Bounds) -> Controls:
    """After losses of another kind, on which the momentum of before points the wrong way."""
    momentum = controls.momentum
    if momentum is None or not 0 < momentum < 1:
        return controls
    return bounds.clipped(replace(controls, momentum=_sigmoid(_logit(momentum) - DIP)))


Cap = tuple[float, float]
"""Lowest and highest factor by which one update may change a control."""


def updated(
    controls: Controls, trends: Trends, gains: Gains, bounds: Bounds, cap: Cap | None = None
) -> Controls:
    """The next controls, within the bounds whatever the trends are.

    cap: factors within which every control changes, the leaving of 0 and the way back to it
    excepted.
    """
    rise = max(trends.loss, 0.0)
    lr = controls.lr * math.exp(gains.lr_reward * trends.reward - gains.lr_loss * rise)
    lr = _capped(lr, controls.lr, cap)
    momentum = controls.momentum
    if momentum is not None and 0 < momentum < 1:
        shift = gains.momentum_reward * trends.reward - gains.momentum_loss * rise
        momentum = _capped(_sigmoid(_logit(momentum) + shift), momentum, cap)
    noise = _noise(controls.noise, trends, gains, bounds, cap)
    return bounds.clipped(Controls(lr, momentum, noise))


def lowered(controls: Controls, bounds: Bounds, factor: float = 0.5) -> Controls:
    """After an observation that is not finite: lr times `factor`, the rest as it is."""
    return bounds.clipped(replace(controls, lr=controls.lr * factor))


def _noise(noise: float, trends: Trends, gains: Gains, bounds: Bounds, cap: Cap | None) -> float:
    change = gains.noise_plateau * trends.plateau - gains.noise_reward * max(trends.reward, 0.0)
    if noise == 0:
        return IGNITION if change > 0 and trends.plateau > IGNITES else 0.0
    new = _capped(noise * math.exp(change), noise, cap)
    # The floor is where log σ would go on for ever: 0, unless the bounds say that it stays on.
    return new if new >= IGNITION or bounds.noise[0] > 0 or new >= noise else 0.0


def _capped(new: float, old: float, cap: Cap | None) -> float:
    return new if cap is None else min(max(new, old * cap[0]), old * cap[1])


def _clip(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])


def _logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

"""The bounded update laws: from trends to the next controls, in unconstrained coordinates.

    log α   ← log α   + k_r Δ̃r  − k_ℓ max(Δ̃ℓ, 0)
    logit μ ← logit μ + k_μr Δ̃r − k_μℓ max(Δ̃ℓ, 0)
    log σ   ← log σ   + k_σP P  − k_σr max(Δ̃r, 0)

each clipped to its bounds. Without a reward Δ̃r = −Δ̃ℓ: the two trends are one signal, a fall of
the loss raises log α by k_r and a rise lowers it by k_r + k_ℓ. On a noisy plateau, where falls and
rises take turns, α therefore comes down slowly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from rhc.errors import InputError
from rhc.signals import Trends

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

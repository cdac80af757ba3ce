"""Bounded update laws from trends to controls, in unconstrained coordinates.

    log α   ← log α   + k_r Δ̃r  − k_ℓ max(Δ̃ℓ, 0)
    logit μ ← logit μ + k_μr Δ̃r − k_μℓ max(Δ̃ℓ, 0)
    log σ   ← log σ   + k_σP P  − k_σr max(Δ̃r, 0)

These are the specified laws (`updated`). AdaptiveRL's own (`adapted`) move in the same directions:

    μ is pulled to a set point while nothing stands out from the noise, α · 1/(1 − μ) kept;
    σ rises with the stall, the part of P that is new, and leaks away;
    α rises twice as fast at first, and after a surprise.

Without a reward Δ̃r is the fall of the loss relative to its noise, so α decreases on a noisy
plateau, where falls and rises alternate.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace

from rhc.errors import InputError
from rhc.schedulers.signals import Trends, clip, logit, sigmoid

USUAL_STEPS = 10_000
"""Run length for which AdaptiveRL's gains are tuned."""

IGNITION = 1e-3
"""σ jumps from 0 to this on a plateau and to 0 below it; log σ cannot reach 0."""

IGNITES = 0.5
"""Plateau score above which σ leaves 0."""

DIP, DIPPED = 1.35, 0.75
"""A surprise lowers logit μ by this, 0.9 to 0.7, and μ to 0.75 at most."""

SETTLED, PULL = 0.97, 1 / 400
"""Momentum of a run that has settled, and the share of the way to it per step."""

SPIKE, STALLED, LEAK = 0.02, 0.005, 1 / 60
"""Noise at a surprise and in the beginning of a stall, and the nats that it loses per step."""

SLOWER = 0.5
"""Factor on the effective step α / (1 − μ) at a surprise: it may be that α was too high."""

YOUNG = 12
"""Updates in which the additional rise of α falls to 1/e."""

SOURCES = ("both", "loss", "reward")
"""Trends that the laws use."""

Cap = tuple[float, float]
"""Smallest and largest factor on a control per update."""


@dataclass(frozen=True)
class Controls:
    """The controls. momentum: SGD's or Adam's β1; None if absent. noise: σ relative to an RMS."""

    lr: float
    momentum: float | None = None
    noise: float = 0.0


@dataclass(frozen=True)
class Gains:
    """Sizes of updates, in nats, or in logits for momentum and λ.

    The first six apply to AdaptiveRL per update and to `EpochPlanner` per epoch (with larger
    values); the others apply to the planner's knobs.
    """

    lr_reward: float = 0.02
    lr_loss: float = 0.02
    momentum_reward: float = 0.01
    momentum_loss: float = 0.02
    noise_plateau: float = 0.05
    noise_reward: float = 0.04
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

    def __post_init__(self) -> None:
        for name, gain in vars(self).items():
            if not math.isfinite(gain):
                raise InputError(f"gain {name} must be finite, got {gain:g}; use 0 for none")

    def times(self, factor: float) -> Gains:
        return Gains(**{name: gain * factor for name, gain in asdict(self).items()})

    def for_source(self, source: str) -> Gains:
        return replace(self, lr_loss=0.0, momentum_loss=0.0) if source == "reward" else self


@dataclass(frozen=True)
class Bounds:
    """Lowest and highest value of every control and of every `EpochPlanner` knob."""

    lr: tuple[float, float] = (1e-5, 1e-1)
    momentum: tuple[float, float] = (0.6, 0.995)
    noise: tuple[float, float] = (0.0, 0.2)
    augmentation: tuple[float, float] = (0.0, 1.0)
    sampling: tuple[float, float] = (0.0, 1.0)
    entropy: tuple[float, float] = (1e-4, 0.1)
    clip_range: tuple[float, float] = (0.05, 0.4)
    gae_lambda: tuple[float, float] = (0.8, 0.99)

    def __post_init__(self) -> None:
        for field in fields(self):
            low, high = getattr(self, field.name)
            most = math.inf if field.name in ("lr", "noise", "entropy") else 1.0
            without_logit = field.name == "momentum" and low == 1.0
            if not 0.0 <= low <= high <= most or math.isinf(high) or without_logit:
                raise InputError(
                    f"bounds of {field.name} must be 0 ≤ lowest ≤ highest"
                    f"{'' if math.isinf(most) else ' ≤ 1'}, got ({low:g}, {high:g})"
                )

    def clipped(self, controls: Controls) -> Controls:
        momentum = controls.momentum
        return Controls(
            clip(controls.lr, self.lr),
            None if momentum is None else clip(momentum, self.momentum),
            clip(controls.noise, self.noise),
        )


def updated(
    controls: Controls, trends: Trends, gains: Gains, bounds: Bounds, cap: Cap | None = None
) -> Controls:
    """The next controls, within bounds. cap: not applied to changes from and to 0."""
    rise = max(trends.loss, 0.0)
    lr = controls.lr * math.exp(gains.lr_reward * trends.reward - gains.lr_loss * rise)
    lr = _capped(lr, controls.lr, cap)
    momentum = controls.momentum
    if momentum is not None and 0 < momentum < 1:
        shift = gains.momentum_reward * trends.reward - gains.momentum_loss * rise
        momentum = _capped(sigmoid(logit(momentum) + shift), momentum, cap)
    change = gains.noise_plateau * trends.plateau - gains.noise_reward * max(trends.reward, 0.0)
    noise = _noise(controls.noise, change, trends.plateau, bounds, cap)
    return bounds.clipped(Controls(lr, momentum, noise))


def lowered(controls: Controls, bounds: Bounds, factor: float = 0.5) -> Controls:
    """lr times `factor`, after an observation that is not finite."""
    return bounds.clipped(replace(controls, lr=controls.lr * factor))


def adapted(
    controls: Controls,
    trends: Trends,
    gains: Gains,
    bounds: Bounds,
    cap: Cap | None,
    *,
    every: int,
    age: float,
    coupled: bool = True,
) -> Controls:
    """The next controls by AdaptiveRL's own laws, within bounds.

    every: Steps since the last update. age: Updates since the run or the last surprise began.
    coupled: Whether the effective step is α / (1 − μ), as in SGD; Adam's does not depend on β1.
    """
    fall, rise = trends.reward, max(trends.loss, 0.0)
    young = 1 + math.exp(-age / YOUNG) if fall > 0 else 1.0
    change = gains.lr_reward * young * fall - gains.lr_loss * rise
    momentum = controls.momentum
    if momentum is not None and 0 < momentum < 1:
        # Of noise alone falls and rises cancel in Δ̃r; in max(Δ̃ℓ, 0) they would push μ down.
        shift = gains.momentum_reward * fall - gains.momentum_loss * max(-2 * fall - 1, 0.0)
        nudged = clip(sigmoid(logit(momentum) + shift), bounds.momentum)
        pull = min(PULL * every, 1.0) * (1 - abs(fall)) * (logit(SETTLED) - logit(nudged))
        momentum = clip(sigmoid(logit(nudged) + pull), bounds.momentum)
        if coupled:
            change += math.log((1 - momentum) / (1 - nudged))
    lr = _capped(controls.lr * math.exp(change), controls.lr, cap)
    stall = trends.stall
    change = gains.noise_plateau * stall - gains.noise_reward * max(fall, 0.0)
    change -= LEAK * every * (1 - stall)
    noise = _noise(controls.noise, change, stall, bounds, cap, STALLED)
    return bounds.clipped(Controls(lr, momentum, noise))


def shocked(controls: Controls, bounds: Bounds, cap: Cap | None) -> Controls:
    """The controls at a surprise: α and μ dip, σ spikes."""
    lr = controls.lr * (SLOWER if cap is None else max(cap[0], SLOWER))
    noise = max(controls.noise, SPIKE)
    return bounds.clipped(replace(dipped(controls, bounds), lr=lr, noise=noise))


def rebound(before: Controls, after: Controls) -> float:
    """The factor ≥ 1 on α, one update after a surprise, with which the effective step is `SLOWER`
    times that before it: a lower momentum needs a higher α."""
    if before.momentum is None or after.momentum is None:
        return 1.0
    effective = before.lr * (1 - after.momentum) / (1 - before.momentum)
    return max(SLOWER * effective / after.lr, 1.0) if after.lr > 0 else 1.0


def dipped(controls: Controls, bounds: Bounds) -> Controls:
    """Lower momentum after a surprise, since the old direction is wrong for the new losses."""
    momentum = controls.momentum
    if momentum is None or not 0 < momentum < 1:
        return controls
    lower = min(sigmoid(logit(momentum) - DIP), DIPPED)
    return bounds.clipped(replace(controls, momentum=lower))


def paced(gains: Gains, every: int, steps: int | None) -> tuple[Gains, int, float]:
    """(gains, steps between updates, factor on the β of ℓ̄) for a run of `steps` steps. At the
    default 20 steps per update a run of 1000 steps has 50 updates, which change lr by at most e.
    Runs below `USUAL_STEPS` get more frequent, larger updates with the same sum of gains."""
    if steps is None or steps >= USUAL_STEPS:
        return gains, every, 1.0
    pace = USUAL_STEPS / max(steps, USUAL_STEPS // 20)
    between = max(1, round(every / pace**0.6))
    return gains.times(pace * between / every), between, pace**0.4


def annealed(done: int, steps: int) -> float:
    """The square of half a cosine."""
    return 0.25 * (1 + math.cos(math.pi * min(done / steps, 1.0))) ** 2


def check_source(source: str) -> None:
    if source not in SOURCES:
        raise InputError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")


def _noise(
    noise: float,
    change: float,
    score: float,
    bounds: Bounds,
    cap: Cap | None,
    first: float = IGNITION,
) -> float:
    if noise == 0:
        return first if change > 0 and score > IGNITES else 0.0
    new = _capped(noise * math.exp(change), noise, cap)
    # log σ would fall for ever: below the floor it is 0, unless the bounds keep noise on.
    return new if new >= IGNITION or bounds.noise[0] > 0 or new >= noise else 0.0


def _capped(new: float, old: float, cap: Cap | None) -> float:
    return new if cap is None else clip(new, (old * cap[0], old * cap[1]))

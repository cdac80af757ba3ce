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
from dataclasses import asdict, dataclass, fields, replace

from rhc.errors import InputError
from rhc.schedulers.signals import Trends, clip, logit, sigmoid

USUAL_STEPS = 10_000
"""Steps of the runs that AdaptiveRL's gains are meant for."""

IGNITION = 1e-3
"""σ goes from 0 to here on a plateau, and to exactly 0 below here: log σ could never leave 0."""

IGNITES = 0.5
"""The plateau score above which σ leaves 0."""

DIP = 1.35
"""Logits by which μ falls where the losses are suddenly of another kind: 0.9 becomes 0.7."""

SOURCES = ("both", "loss", "reward")
"""Which trends the laws look at."""

Cap = tuple[float, float]
"""Lowest and highest factor by which one update may change a control."""


@dataclass(frozen=True)
class Controls:
    """What is steered. momentum: SGD's, or Adam's β1; None where the optimizer has none. noise: σ,
    relative to the RMS of what it is added to."""

    lr: float
    momentum: float | None = None
    noise: float = 0.0


@dataclass(frozen=True)
class Gains:
    """How far one update may go: nats, or logits of momentum and λ.

    The first six are AdaptiveRL's, per update; an `EpochPlanner` has larger ones, per epoch. The
    others are those of its knobs.
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

    def times(self, factor: float) -> Gains:
        """Every gain times a factor."""
        return Gains(**{name: gain * factor for name, gain in asdict(self).items()})

    def for_source(self, source: str) -> Gains:
        """Without the terms of the loss where only the reward counts."""
        return replace(self, lr_loss=0.0, momentum_loss=0.0) if source == "reward" else self


@dataclass(frozen=True)
class Bounds:
    """Lowest and highest value of every control, and of an `EpochPlanner`'s knobs."""

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
        """The nearest controls within the bounds."""
        momentum = controls.momentum
        return Controls(
            clip(controls.lr, self.lr),
            None if momentum is None else clip(momentum, self.momentum),
            clip(controls.noise, self.noise),
        )


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
        momentum = _capped(sigmoid(logit(momentum) + shift), momentum, cap)
    noise = _noise(controls.noise, trends, gains, bounds, cap)
    return bounds.clipped(Controls(lr, momentum, noise))


def lowered(controls: Controls, bounds: Bounds, factor: float = 0.5) -> Controls:
    """After an observation that is not finite: lr times `factor`, the rest as it is."""
    return bounds.clipped(replace(controls, lr=controls.lr * factor))


def dipped(controls: Controls, bounds: Bounds) -> Controls:
    """After losses of another kind, on which the momentum of before points the wrong way."""
    momentum = controls.momentum
    if momentum is None or not 0 < momentum < 1:
        return controls
    return bounds.clipped(replace(controls, momentum=sigmoid(logit(momentum) - DIP)))


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
    return gains.times(pace * between / every), between, pace**0.4


def annealed(done: int, steps: int) -> float:
    """The factor on lr after `done` of `steps` steps: half a cosine, from 1 to 0 at the end."""
    return 0.5 * (1 + math.cos(math.pi * min(done / steps, 1.0)))


def check_source(source: str) -> None:
    """Raises InputError unless `source` is one of `SOURCES`."""
    if source not in SOURCES:
        raise InputError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")


def _noise(noise: float, trends: Trends, gains: Gains, bounds: Bounds, cap: Cap | None) -> float:
    change = gains.noise_plateau * trends.plateau - gains.noise_reward * max(trends.reward, 0.0)
    if noise == 0:
        return IGNITION if change > 0 and trends.plateau > IGNITES else 0.0
    new = _capped(noise * math.exp(change), noise, cap)
    # The floor is where log σ would go on for ever: 0, unless the bounds say that it stays on.
    return new if new >= IGNITION or bounds.noise[0] > 0 or new >= noise else 0.0


def _capped(new: float, old: float, cap: Cap | None) -> float:
    return new if cap is None else clip(new, (old * cap[0], old * cap[1]))

"""Knobs: small objects with a value, which a planner drives.

    knob = Entropy(0.01)
    planner = EpochPlanner(…, knobs=[knob])
    ...
    loss = policy_loss - knob.value * entropy

A knob has the `name` of its value in an `EpochPlan`, and a `value` that can be set.
`rhc.schedulers.LossSampler` is one too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rhc.errors import InputError
from rhc.schedulers.plan import PLAN_BOUNDS
from rhc.schedulers.signals import clip


class Knob(Protocol):
    """What a planner can drive: `name` is one of `rhc.schedulers.KNOBS`."""

    name: str

    @property
    def value(self) -> float: ...

    @value.setter
    def value(self, value: float) -> None: ...


class Value:
    """A number within bounds."""

    name: ClassVar[str]
    usual: ClassVar[float]

    def __init__(
        self, value: float | None = None, *, bounds: tuple[float, float] | None = None
    ) -> None:
        self.bounds = bounds or getattr(PLAN_BOUNDS, self.name)
        self._value = float(self.usual if value is None else value)
        if self._value != clip(self._value, self.bounds):
            low, high = self.bounds
            raise InputError(
                f"{self.name} must be in [{low:g}, {high:g}], got {value:g}; give other bounds for "
                "more room"
            )

    @property
    def value(self) -> float:
        return self._value

    @value.setter
    def value(self, value: float) -> None:
        self._value = clip(float(value), self.bounds)


class Entropy(Value):
    """The coefficient of the entropy bonus: up on a plateau, down while returns improve."""

    name, usual = "entropy", 0.01


class ClipRange(Value):
    """PPO's ε: up on a plateau, down while returns fall."""

    name, usual = "clip_range", 0.2


class GaeLambda(Value):
    """λ of the generalised advantage: up on a plateau (less bias), down where the loss swings more
    than usual (less variance)."""

    name, usual = "gae_lambda", 0.95


class Augmentation(Value):
    """The strength of an augmentation: up on a plateau that is calm, down where validation worsens.

    transform: (batch, strength in [0, 1]) -> batch, applied by calling the knob in a training loop.
    In eval mode, that is with `training=False`, and at strength 0 it returns the batch itself and
    draws nothing.
    """

    name, usual = "augmentation", 0.0

    def __init__(
        self,
        value: float | None = None,
        transform: Callable[[Tensor, float], Tensor] | None = None,
        *,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(value, bounds=bounds)
        self.transform = transform or shifted

    def __call__(self, batch: Tensor, training: bool = True) -> Tensor:
        if not training or self.value == 0:
            return batch
        return self.transform(batch, self.value)


def shifted(images: Tensor, strength: float) -> Tensor:
    """Images moved by whole pixels, each by its own random offset, up to 4 · strength of them.

    images: (B, H, W), (B, C, H, W), or (B, n²) square ones in a row. What comes in from outside has
    the value of the corner. Draws from torch's global generator.
    """
    flat = images.dim() == 2
    side = round(images.shape[-1] ** 0.5)
    if flat and side * side != images.shape[-1]:
        raise InputError(
            f"rows of {images.shape[-1]} values are no square images; give Augmentation a "
            "transform of your own"
        )
    shape = images.shape
    stack = images.reshape(len(images), -1, *((side, side) if flat else shape[-2:]))
    reach = max(1, round(4 * strength))
    height, width = stack.shape[-2:]
    padded = F.pad(stack, (reach, reach, reach, reach), value=float(images.reshape(-1)[0]))
    # At small strengths only some of the images move, so that the strength acts continuously.
    moves = torch.rand(len(images)) < min(1.0, 4 * strength)
    rows, columns = torch.randint(0, 2 * reach + 1, (2, len(images)))
    rows, columns = torch.where(moves, rows, reach), torch.where(moves, columns, reach)
    at_row = (rows[:, None] + torch.arange(height)).to(images.device)
    at_column = (columns[:, None] + torch.arange(width)).to(images.device)
    batch = torch.arange(len(images), device=images.device)
    # Advanced indices around a slice come first: (B, H, W, C).
    picked = padded[batch[:, None, None], :, at_row[:, :, None], at_column[:, None, :]]
    return picked.permute(0, 3, 1, 2).reshape(shape)

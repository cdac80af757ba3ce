"""Values that a planner sets and the training loop reads: `loss - entropy.value * bonus`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from rhc.errors import InputError
from rhc.schedulers.plan import KNOBS, PLAN_BOUNDS
from rhc.schedulers.signals import clip


class Knob(Protocol):
    """A settable `value`; `name` is one of `rhc.schedulers.KNOBS`."""

    name: str

    @property
    def value(self) -> float: ...

    @value.setter
    def value(self, value: float) -> None: ...


class Value:
    name: str
    usual: float

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
    """Coefficient of the entropy bonus: rises on a plateau, falls while returns improve."""

    name, usual = "entropy", 0.01


class ClipRange(Value):
    """PPO's ε: rises on a plateau, falls while returns fall."""

    name, usual = "clip_range", 0.2


class GaeLambda(Value):
    """λ of generalized advantage estimation: rises on a plateau (less bias), falls when the
    variance of the loss is above usual (less variance)."""

    name, usual = "gae_lambda", 0.95


class Augmentation(Value):
    """Strength of an augmentation: rises on a calm plateau, falls when validation worsens.
    transform: (batch, strength in [0, 1]) -> batch, applied by calling the knob. With
    `training=False` or strength 0 the call returns the batch unchanged and draws no random numbers.
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


def made(name: str) -> Knob:
    """The knob of that name with its usual value."""
    kind: type[Value]
    for kind in (Entropy, ClipRange, GaeLambda, Augmentation):
        if kind.name == name:
            return kind()
    if name in KNOBS:
        raise InputError(f"{name!r} needs to know the examples; give a LossSampler(examples)")
    raise InputError(f"unknown knob {name!r}: there are: {', '.join(KNOBS)}")


def shifted(images: Tensor, strength: float) -> Tensor:
    """Images shifted by random whole pixels, up to 4 · strength in each direction.
    images: (B, H, W), (B, C, H, W) or (B, n²). The border is filled with the corner's value. Uses
    torch's global generator."""
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

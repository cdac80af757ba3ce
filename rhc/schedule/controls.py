"""The controls: their coordinates and bounds."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rhc.errors import InputError

Scalar = float | Tensor


@dataclass(frozen=True)
class Control:
    """A scheduled hyperparameter: its unconstrained coordinate, and its bounds in natural units.

    0 has no finite coordinate. Where it is allowed, `to_raw(0)` is the coordinate of `lower` and
    `from_raw` maps that and everything below to 0, so that an update rule can leave 0 and return.
    """

    name: str
    coordinate: Literal["log", "logit"]
    lower: float
    upper: float
    zero: bool = False
    """Whether exactly 0 is allowed beside [lower, upper]."""

    def to_raw(self, natural: Tensor) -> Tensor:
        """Unconstrained coordinate of `natural` (any shape), clipped to the bounds; float64."""
        clipped = natural.to(torch.float64).clamp(self.lower, self.upper)
        return clipped.log() if self.coordinate == "log" else clipped.logit()

    def from_raw(self, raw: Tensor) -> Tensor:
        """Natural value of `raw` (any shape), within the bounds, or exactly 0 if allowed."""
        raw = raw.to(torch.float64)
        natural = raw.exp() if self.coordinate == "log" else raw.sigmoid()
        natural = natural.clamp(self.lower, self.upper)
        if self.zero:
            lowest = self.to_raw(torch.tensor(self.lower, dtype=torch.float64))
            natural = torch.where(raw <= lowest, torch.zeros_like(natural), natural)
        return natural

    def slope(self, natural: Tensor) -> Tensor:
        """d natural / d raw: α for a log coordinate, μ(1 − μ) for a logit; at 0 that of `lower`."""
        clipped = natural.to(torch.float64).clamp(self.lower, self.upper)
        return clipped if self.coordinate == "log" else clipped * (1 - clipped)

    def rescale(self, value: Scalar, ratio: float) -> Scalar:
        """`value` moved by log(ratio) in its coordinate; unchanged at ratio 1.

        Args:
            value: in natural units.
            ratio: a factor of lr, noise and weight decay; of the odds μ/(1 − μ) of momentum.
        """
        if ratio == 1.0:
            return value
        if self.coordinate == "log":
            return value * ratio
        return value * ratio / (1 - value + value * ratio)

    def ratio(self, value: float, reference: float) -> float:
        """The ratio for which `rescale(reference, ratio) == value`; 1 where both are equal."""
        if value == reference:
            return 1.0
        if self.coordinate == "log":
            return value / reference
        return value * (1 - reference) / (reference * (1 - value))

    def check(self, value: float, argument: str | None = None) -> None:
        """Raises InputError unless `value` is within the bounds, or 0 where that is allowed."""
        if (self.zero and value == 0) or self.lower <= value <= self.upper:
            return
        zero = "0 or " if self.zero else ""
        raise InputError(
            f"{argument or self.name} must be {zero}in [{self.lower:g}, {self.upper:g}], "
            f"got {value:g}; choose a value within these bounds"
        )


CONTROLS: Mapping[str, Control] = {
    control.name: control
    for control in (
        Control("lr", "log", 1e-8, 10.0),
        Control("momentum", "logit", 0.01, 0.995, zero=True),
        Control("noise", "log", 1e-4, 1.0, zero=True),
        Control("weight_decay", "log", 1e-7, 1.0, zero=True),
    )
}


def control(name: str) -> Control:
    """The control called `name`; InputError for an unknown name."""
    if name in CONTROLS:
        return CONTROLS[name]
    near = difflib.get_close_matches(name, CONTROLS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"unknown control {name!r}: {hint}there are: {', '.join(CONTROLS)}")

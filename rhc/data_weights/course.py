"""Weights of few cells over the steps of a run: sources, classes or loss terms have a course, which
is what a replay follows; the weights that it ends with are another thing (docs/data-weights.md)."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rhc.errors import InputError, whole_number

FEW = 256
"""Largest number of cells whose course is kept: more are examples, which have a last weight."""


@dataclass(frozen=True, eq=False)
class Course:
    """The weights of n cells at every step of a run.

    Attributes:
        steps: Length of the run.
        since: (m,) steps at which the weights change, ascending from 0.
        values: (m, n) weights from these steps on, positive.
    """

    steps: int
    since: Sequence[int]
    values: Tensor

    def __post_init__(self) -> None:
        whole_number("steps", self.steps)
        rising = all(a < b for a, b in pairwise(self.since))
        if not self.since or self.since[0] != 0 or not rising or self.since[-1] >= self.steps:
            raise InputError(
                f"the steps of a course must rise from 0 to below {self.steps}, got "
                f"{list(self.since)!r:.80}"
            )
        usable = self.values.dim() == 2 and bool((self.values > 0).all())
        if not usable or len(self.values) != len(self.since) or not self.values.isfinite().all():
            raise InputError(
                f"the weights of a course must be positive, ({len(self.since)}, cells), got shape "
                f"{tuple(self.values.shape)}"
            )

    def __len__(self) -> int:
        return self.steps

    @property
    def last(self) -> Tensor:
        """(n,) the weights at the end."""
        return self.values[-1]

    def at(self, step: int) -> Tensor:
        """(n,) the weights of a step; beyond the end the last ones."""
        return self.values[bisect.bisect_right(self.since, step) - 1]

    def changes(self, start: int, stop: int) -> list[int]:
        """`start`, and the steps in (start, stop) at which weights change."""
        return [start, *(step for step in self.since if start < step < stop)]

    def stretched(self, steps: int) -> Course:
        """The same course over another number of steps."""
        steps = whole_number("steps", steps)
        places = {since * steps // self.steps: row for row, since in enumerate(self.since)}
        return Course(steps, tuple(places), self.values[list(places.values())])

    def digest(self) -> str:
        numbers = self.values.double().numpy().tobytes() + str([self.steps, *self.since]).encode()
        return hashlib.sha256(numbers).hexdigest()[:16]

    def csv(self, names: Sequence[str]) -> str:
        """A line per change: its step, and the weight of every cell."""
        lines = [",".join(["step", *names])]
        for since, row in zip(self.since, self.values.tolist(), strict=True):
            lines.append(",".join([str(since), *(f"{value:.6g}" for value in row)]))
        return "\n".join(lines) + "\n"

    def to_tensors(self) -> dict[str, Tensor]:
        return {"since": torch.tensor(self.since), "values": self.values.contiguous()}

    @classmethod
    def from_tensors(cls, steps: int, tensors: Mapping[str, Tensor]) -> Course:
        return cls(steps, tuple(tensors["since"].tolist()), tensors["values"])

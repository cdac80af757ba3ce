"""The update rule of data weights: how far the evidence of a window moves them.

A row is seen once in many windows, and says little at a time. So what a cell said is remembered,
and weights move by the share of it that comes true: with r a window's normalised slopes and m̄ the
mean of a cell's earlier ones, b = Σ r m̄ / Σ m̄² is the slope of the regression of the new on the
old, 1 where slopes repeat themselves and 0 where they are noise, as on clean data, whose weights
then stay. Δ log w = −step · b · r.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

STEP = 0.7
"""Nats per window and unit of r. On MNIST-10k with 40 % random labels 0.4, 0.7, 1.0 end at .250,
.228, .237, on clean labels at .1623, .1632, .1649 (.1641 without weights; docs/log.md)."""

CLIP = 2.0
"""Largest |r|, in root mean squares over the window's cells."""

FADES = 0.9
"""Share of the sums behind b that is left after a window."""


@dataclass(frozen=True)
class Observation:
    """What a window says of the cells that it has seen. slopes: r (m,)."""

    cells: Tensor  # (m,) int64
    slopes: Tensor
    share: float  # b
    products: float  # Σ r m̄ and Σ m̄², of this window and fading earlier ones
    squares: float
    predicted: float  # first-order change of J by the whole move

    @property
    def by(self) -> Tensor:
        """(m,) moves of log w."""
        return -STEP * self.share * self.slopes


def _share(products: float, squares: float) -> float:
    return min(max(products / squares, 0.0), 1.0) if squares > 0 else 0.0


class Evidence:
    """What the cells' derivatives said so far: sums of r, how often, and how well they repeat."""

    def __init__(self, cells: int) -> None:
        self.total = torch.zeros(cells)
        self.count = torch.zeros(cells, dtype=torch.int32)
        self.products = self.squares = 0.0

    @property
    def share(self) -> float:
        """b in [0, 1]."""
        return _share(self.products, self.squares)

    def observe(self, gradient: Tensor, weights: Tensor) -> Observation | None:
        """gradient: (n,) dJ/dw of a window, 0 for cells that it has not seen; weights: (n,). None
        where it says nothing. Changes nothing: see `take`."""
        cells = gradient.nonzero()[:, 0]
        slopes = (gradient[cells] * weights[cells]).double()
        size = float(slopes.square().mean().sqrt()) if len(cells) else 0.0
        if not 0 < size < float("inf"):
            return None
        r = (slopes / size).clamp(-CLIP, CLIP)
        seen = self.count[cells] > 0
        before = (self.total[cells][seen] / self.count[cells][seen]).double()
        products = FADES * self.products + float((r[seen] * before).sum())
        squares = FADES * self.squares + float(before.square().sum())
        share = _share(products, squares)
        predicted = -STEP * share * float((slopes * r).sum())
        return Observation(cells, r, share, products, squares, predicted)

    def take(self, seen: Observation) -> None:
        self.total[seen.cells] += seen.slopes.float()
        self.count[seen.cells] += 1
        self.products, self.squares = seen.products, seen.squares

    def by_cell(self) -> dict[str, Tensor]:
        return {"total": self.total, "count": self.count}

    # Checkpoints ---------------------------------------------------------------------------------

    def to_tensors(self) -> dict[str, Tensor]:
        sums = torch.tensor([self.products, self.squares], dtype=torch.float64)
        return {**self.by_cell(), "sums": sums}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors["total"].shape != self.total.shape:
            raise ValueError(f"evidence of {len(tensors['total'])} cells, not {len(self.total)}")
        self.total, self.count = tensors["total"].clone(), tensors["count"].clone()
        self.products, self.squares = tensors["sums"].tolist()

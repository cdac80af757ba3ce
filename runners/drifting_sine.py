"""A sine that changes under the model, at steps that no schedule knows: to be tracked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from rhc.runners.sine import hidden
from torch import Tensor, nn
from torch.nn import functional as F

from rhc.errors import InputError
from rhc.workload import Workload

STEPS, BATCH, GRID = 1500, 64, 128
NOISE = 0.1  # standard deviation of y
WAVES = ((1.0, 1.0), (1.5, 2.0), (0.7, 1.5), (1.2, 2.5))
"""(amplitude, frequency), one after the other."""


def drifting_sine(
    *, seed: int = 0, data: Path | None = None, width: int = 1, batch_size: int = BATCH
) -> Workload:
    """y = a sin(f x) + noise on [-π, π]; a and f jump three times at unknown steps.

    Endless fresh batches, generated. An MLP 1-64-64-1 under squared error; the metric "tracking" of
    every step is the squared distance to the curve of that step on a grid.
    seed: decides the steps of the jumps and the points; the weights are drawn from the global
    generator, which the caller has seeded with it.
    data: must be None.
    width, batch_size: the hidden layers are `width` times as wide; examples per training batch.
    """
    if data is not None:
        raise InputError(f"runner drifting_sine takes no data, got --data {data}: leave it out")
    stream = Waves(seed, batch_size)
    x = _grid()
    amplitude, frequency = WAVES[-1]
    last = (x, amplitude * torch.sin(frequency * x))
    return Workload(
        model=nn.Sequential(
            *hidden(1, 64 * width), *hidden(64 * width, 64 * width), nn.Linear(64 * width, 1)
        ),
        loss_fn=squared_error,
        train_loader=stream,
        test_loader=[last],
        steps=STEPS,
        optimizer="sgd",
        lr={"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3},
        threads=1,
    )


class Waves:
    """Batches (x, y, curve): x and y (batch_size, 1), curve (GRID, 1) without noise; the
    same at every pass."""

    def __init__(self, seed: int, batch_size: int = BATCH) -> None:
        self.seed, self.batch_size = seed, batch_size
        generator = torch.Generator().manual_seed(seed)
        jumps = torch.randint(300, 501, (len(WAVES) - 1,), generator=generator)
        self.jumps = [int(j) + 400 * i for i, j in enumerate(jumps)]
        """The first step of the second wave, the third, …"""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        grid = _grid()
        for step in count():
            amplitude, frequency = WAVES[sum(step >= jump for jump in self.jumps)]
            x = math.pi * (2 * torch.rand(self.batch_size, 1, generator=generator) - 1)
            noise = NOISE * torch.randn(self.batch_size, 1, generator=generator)
            curve = amplitude * torch.sin(frequency * grid)
            yield x, amplitude * torch.sin(frequency * x) + noise, curve


def squared_error(
    model: nn.Module, batch: tuple[Tensor, ...]
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Mean of (model(x) − y)² over a batch; "tracking" where it brings its curve."""
    x, y, *rest = batch
    loss = F.mse_loss(model(x), y)
    if not rest:
        return loss
    with torch.no_grad():
        tracking = F.mse_loss(model(_grid().to(x)), rest[0])
    return loss, {"tracking": tracking}


def _grid() -> Tensor:
    return torch.linspace(-math.pi, math.pi, GRID)[:, None]

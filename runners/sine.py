"""Regression of a noisy sine: the smallest run, for trying things out."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from rhc.runners.data import split, tensor_loader
from torch import Tensor, nn
from torch.nn import functional as F

from rhc.errors import InputError
from rhc.workload import Workload

TRAIN, VALIDATION, TEST = 2048, 512, 512
BATCH = 64
NOISE = 0.1  # standard deviation of y: the best reachable loss is NOISE² = 0.01


def sine(
    *, seed: int = 0, data: Path | None = None, width: int = 1, batch_size: int = BATCH
) -> Workload:
    """y = sin(x) + noise on [-π, π], generated, and an MLP 1-64-64-1 under squared error.

    seed: the weights are drawn from the global generator, which the caller has seeded with it.
    data: must be None, as the points are generated, the same for every seed.
    width, batch_size: the hidden layers are `width` times as wide; examples per training batch.
    """
    if data is not None:
        raise InputError(f"runner sine takes no data, got --data {data}: leave --data out")
    train, validation, test = split(_points(), (TRAIN, VALIDATION, TEST))
    return Workload(
        model=nn.Sequential(
            *hidden(1, 64 * width), *hidden(64 * width, 64 * width), nn.Linear(64 * width, 1)
        ),
        loss_fn=mean_squared_error,
        train_loader=tensor_loader(train, batch_size, shuffle=True),
        val_loader=tensor_loader(validation, VALIDATION, shuffle=False),
        test_loader=tensor_loader(test, TEST, shuffle=False),
        steps=1000,
        optimizer="sgd",
        lr={"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3},
        threads=1,
    )


def hidden(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    """A hidden layer."""
    return nn.Linear(inputs, outputs), nn.ReLU()


def mean_squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean of (model(x) − y)² over a batch."""
    x, y = batch
    return F.mse_loss(model(x), y)


def _points() -> tuple[Tensor, Tensor]:
    """x and y, each (N, 1), x uniform on [-π, π]."""
    generator = torch.Generator().manual_seed(0)
    count = TRAIN + VALIDATION + TEST
    x = math.pi * (2 * torch.rand(count, 1, generator=generator) - 1)
    return x, torch.sin(x) + NOISE * torch.randn(count, 1, generator=generator)

"""MNIST again, with a small convolutional network, BatchNorm and AdamW."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from rhc.workload import Workload
from runners.mnist import mnist


def mnist_cnn(*, seed: int = 0, data: Path | None = None) -> Workload:
    """Handwritten digits as `mnist` has them, and two convolutions with BatchNorm.

    seed and data are those of `mnist`.
    """
    workload = mnist(seed=seed, data=data)
    workload.model = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *_block(1, 8),
        *_block(8, 16),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 10),
    )
    workload.steps = 600
    workload.optimizer = "adamw"
    return workload


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ]

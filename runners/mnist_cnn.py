"""MNIST again, with a small convolutional network, BatchNorm and AdamW."""

from __future__ import annotations

from pathlib import Path

from rhc.runners.mnist import BATCH, mnist
from torch import nn

from rhc.workload import Workload


def mnist_cnn(
    *, seed: int = 0, data: Path | None = None, width: int = 1, batch_size: int = BATCH
) -> Workload:
    """Handwritten digits as `mnist` has them, and two convolutions with BatchNorm.

    seed, data and batch_size are those of `mnist`; width multiplies the channels.
    """
    workload = mnist(seed=seed, data=data, batch_size=batch_size)
    workload.model = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *_block(1, 8 * width),
        *_block(8 * width, 16 * width),
        nn.Flatten(),
        nn.Linear(16 * width * 7 * 7, 10),
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

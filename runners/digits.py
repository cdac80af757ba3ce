"""Handwritten digits of 8x8 pixels: a run of seconds that needs no download."""

from __future__ import annotations

from pathlib import Path

import torch
from rhc.runners.data import split, tensor_loader
from rhc.runners.planned import PLANNABLE
from torch import Tensor, nn
from torch.nn import functional as F

from rhc.errors import InputError
from rhc.workload import Workload

TRAIN, VALIDATION, TEST = 1100, 300, 397
BATCH = 64


def digits(
    *, seed: int = 0, data: Path | None = None, width: int = 1, batch_size: int = BATCH
) -> Workload:
    """Real handwritten digits of 8x8 pixels, from scikit-learn, and an MLP 64-128-10.

    seed: the weights are drawn from the global generator, which the caller has seeded with it.
    data: must be None, as the images come with scikit-learn.
    width, batch_size: the hidden layers are `width` times as wide; examples per training batch.
    """
    if data is not None:
        raise InputError(
            f"runner digits takes no data, got --data {data}: leave --data out, or run mnist"
        )
    images, labels = _load()
    train, validation, test = split((images, labels), (TRAIN, VALIDATION, TEST))
    return Workload(
        model=nn.Sequential(nn.Linear(64, 128 * width), nn.ReLU(), nn.Linear(128 * width, 10)),
        loss_fn=cross_entropy,
        train_loader=tensor_loader(train, batch_size, shuffle=True),
        val_loader=tensor_loader(validation, VALIDATION, shuffle=False),
        test_loader=tensor_loader(test, TEST, shuffle=False),
        steps=600,
        optimizer="sgd",
        lr={"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3},
        threads=1,
        plannable=PLANNABLE,
    )


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict]:
    """Mean cross-entropy of a batch in nats, and its accuracy in [0, 1]."""
    images, labels = batch
    logits = model(images)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels), {"accuracy": accuracy}


def _load() -> tuple[Tensor, Tensor]:
    """Images (1797, 64) in [-1, 1], labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            "runner digits needs scikit-learn, which is not installed: pip install 'rhc[runners]'"
        ) from None
    images, labels = load_digits(return_X_y=True)
    # The pixels are counts from 0 to 16.
    return torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(labels)

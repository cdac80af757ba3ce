"""MNIST of which a share of the training labels is random: what data weights are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rhc.runners.data import tensor_loader
from rhc.runners.mnist import BATCH, EVALUATION_BATCH, load_mnist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from rhc.data_weights import DataWeights, indexed
from rhc.workload import Workload

NOISE = 0.4


def noisy_mnist(*, seed: int = 0, data: Path | None = None, noise: float = NOISE) -> Workload:
    """MNIST, 40 % of the training labels random, and an MLP; with --data-weights a weight per row.

    The held-out and the test labels are right. noise: the share of random labels.
    """
    (images, labels), validation, test = load_mnist(data)
    generator = torch.Generator().manual_seed(1000 + seed)
    drawn = torch.rand(len(labels), generator=generator) < noise
    given = labels.clone()
    given[drawn] = torch.randint(10, (int(drawn.sum()),), generator=generator)
    return Workload(
        model=nn.Sequential(
            nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
        ),
        loss_fn=rows_of_loss,
        train_loader=DataLoader(
            indexed(TensorDataset(images, given)), BATCH, shuffle=True, drop_last=True
        ),
        val_loader=tensor_loader(validation, BATCH, shuffle=True),
        test_loader=tensor_loader(test, EVALUATION_BATCH, shuffle=False),
        steps=1500,
        lr={"sgd": 0.03, "adam": 1e-3, "adamw": 1e-3},
        threads=1,
        data_weights=DataWeights(len(labels)),
    )


def rows_of_loss(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats of every row of a batch, (B,), and the accuracy."""
    images, labels = batch["sample"] if isinstance(batch, dict) else batch
    logits = model(images)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels, reduction="none"), {"accuracy": accuracy}

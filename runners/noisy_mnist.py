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
from rhc.errors import InputError
from rhc.workload import Workload

NOISE = 0.4
Parts = tuple[Tensor, ...]


def noisy_mnist(
    *,
    seed: int = 0,
    data: Path | None = None,
    noise: float = NOISE,
    noise_kind: str = "symmetric",
    held_out: str = "clean",
) -> Workload:
    """MNIST, 40 % of the training labels random, and an MLP; with --data-weights a weight per row.

    The labels are the same for every seed, and the test's are right. noise: the share of labels
    that are drawn anew: with noise_kind symmetric from all classes, with class as the next class,
    so that 3 is given as 4. held_out: clean or noisy, as the training labels are: then the weights
    need an objective that is bounded, as with --bounded.
    """
    if noise_kind not in ("symmetric", "class") or held_out not in ("clean", "noisy"):
        raise InputError(
            "noise_kind must be symmetric or class, and held_out clean or noisy, got "
            f"{noise_kind!r} and {held_out!r}"
        )
    (images, labels), validation, test = load_mnist(data)
    generator = torch.Generator().manual_seed(1000)

    def spoilt(labels: Tensor) -> Tensor:
        drawn = torch.rand(len(labels), generator=generator) < noise
        others = torch.randint(10, (len(labels),), generator=generator)
        return torch.where(
            drawn, others if noise_kind == "symmetric" else (labels + 1) % 10, labels
        )

    given = spoilt(labels)
    if held_out == "noisy":
        validation = (validation[0], spoilt(validation[1]))
    weights = DataWeights(len(labels))
    return weighed_mnist((images, given), validation, test, weights, steps=1500)


def weighed_mnist(
    train: Parts, validation: Parts, test: Parts, weights: DataWeights, *, steps: int
) -> Workload:
    """An MLP on images whose training rows are weighed."""
    return Workload(
        model=mlp(),
        loss_fn=rows_of_loss,
        train_loader=DataLoader(
            indexed(TensorDataset(*train)), BATCH, shuffle=True, drop_last=True
        ),
        val_loader=tensor_loader(validation, BATCH, shuffle=True),
        test_loader=tensor_loader(test, EVALUATION_BATCH, shuffle=False),
        steps=steps,
        lr={"sgd": 0.03, "adam": 1e-3, "adamw": 1e-3},
        threads=1,
        data_weights=weights,
    )


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def rows_of_loss(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy in nats of every row of a batch, (B,), and the accuracy."""
    images, labels = batch["sample"] if isinstance(batch, dict) else batch
    logits = model(images)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels, reduction="none"), {"accuracy": accuracy}

"""MNIST whose classes are unequally common in training, and equally in the test."""

from __future__ import annotations

from pathlib import Path

import torch
from rhc.runners.mnist import load_mnist
from rhc.runners.noisy_mnist import weighed_mnist

from rhc.data_weights import DataWeights
from rhc.errors import InputError
from rhc.workload import Workload

CLASSES = 10


def long_tail_mnist(
    *,
    seed: int = 0,
    data: Path | None = None,
    imbalance: float = 100.0,
    cells: str = "classes",
) -> Workload:
    """MNIST with class 0 as common as it is, class 9 an `imbalance`-th of that, and an MLP; with
    --data-weights a weight per class, or with --cells rows per row.

    In between the classes' sizes fall by the same factor. The rows are the same for every seed.
    """
    if cells not in ("classes", "rows") or imbalance < 1:
        raise InputError(
            f"cells must be classes or rows, and imbalance ≥ 1, got {cells!r} and {imbalance:g}"
        )
    (images, labels), validation, test = load_mnist(data)
    most = int((labels == 0).sum())
    kept = []
    for c in range(CLASSES):
        rows = (labels == c).nonzero()[:, 0]
        kept.append(rows[: max(2, round(most * imbalance ** (-c / (CLASSES - 1))))])
    rows = torch.cat(kept)
    images, labels = images[rows], labels[rows]
    weights = (
        DataWeights(len(labels))
        if cells == "rows"
        else DataWeights([str(c) for c in range(CLASSES)], lambda batch: batch["sample"][1])
    )
    return weighed_mnist((images, labels), validation, test, weights, steps=1000)

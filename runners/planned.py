"""Image classification with the knobs that an epoch planner drives: sampling and augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from rhc.schedulers import Augmentation, LossSampler
from rhc.workload import Plannable, Workload

STRENGTH, MOVED = 0.5, 0.25
"""Of sampling and augmentation in the first epoch."""


def with_knobs(workload: Workload, names: Sequence[str]) -> tuple[Workload, list[Any]]:
    """The same run with those of the knobs "sampling" and "augmentation" that are named."""
    knobs: list[Any] = []
    sampler = augmentation = None
    train: Any = workload.train_loader
    if "sampling" in names:
        images, labels = train.dataset.tensors
        sampler = LossSampler(len(images), strength=STRENGTH)
        rows = TensorDataset(images, labels, torch.arange(len(images)))
        batches = BatchSampler(sampler, train.sampler.batch_size, drop_last=True)
        train = DataLoader(rows, sampler=batches, batch_size=None)
        knobs.append(sampler)
    if "augmentation" in names:
        augmentation = Augmentation(MOVED)
        knobs.append(augmentation)
    if not knobs:
        return workload, []
    loss_fn = WeightedCrossEntropy(sampler, augmentation)
    return replace(workload, train_loader=train, loss_fn=loss_fn), knobs


PLANNABLE = Plannable(("sampling", "augmentation"), with_knobs)
"""For batches of [images, labels] that are held in memory, under cross-entropy."""


class WeightedCrossEntropy:
    """Mean cross-entropy of a batch in nats, weighted as its sampler asks, and its accuracy.

    Batches are [images, labels], or [images, labels, indices]; then the metrics tell a planner the
    loss of every example.
    """

    def __init__(self, sampler: LossSampler | None, augmentation: Augmentation | None) -> None:
        self.sampler, self.augmentation = sampler, augmentation

    def __call__(self, model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels, *indices = batch
        if self.augmentation is not None:
            images = self.augmentation(images, training=model.training)
        logits = model(images)
        losses = F.cross_entropy(logits, labels, reduction="none")
        metrics = {"accuracy": (logits.argmax(1) == labels).float().mean()}
        if self.sampler is None or not indices:
            return losses.mean(), metrics
        if model.training:
            metrics |= {"example_index": indices[0], "example_loss": losses.detach()}
        return (self.sampler.importance(indices[0]) * losses).mean(), metrics

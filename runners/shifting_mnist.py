"""MNIST whose pixels, and later whose labels, change places: another layer must learn each time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from rhc.runners.data import tensor_loader
from rhc.runners.mnist import BATCH, cross_entropy, mnist
from torch import Tensor, nn

from rhc.workload import Workload

STEPS, WATCHED = 1200, 256


def shifting_mnist(*, seed: int = 0, data: Path | None = None) -> Workload:
    """MNIST's MLP, one parameter group per layer; pixels and then labels are permuted mid-run.

    After the first shift the first layer alone has to learn anew, after the second the last one
    alone: the right ratio between the groups' learning rates changes. The metric "tracking" of
    every step is the loss on examples that are never trained on, as they are at that step.
    seed: decides the steps of the shifts and the order of the examples; the weights are drawn from
    the global generator, which the caller has seeded with it. data: as of `mnist`.
    """
    workload = mnist(seed=seed, data=data)
    shifts = Shifts(seed)
    layers = [layer for layer in workload.model.modules() if isinstance(layer, nn.Linear)]
    loaders = (workload.train_loader, workload.val_loader, workload.test_loader)
    train, validation, test = (cast(Any, loader).dataset.tensors for loader in loaders)
    workload.train_loader = Shifted(shifts, train, validation, seed)
    workload.val_loader = None
    workload.test_loader = tensor_loader(shifts.apply(shifts.last, *test), 500, shuffle=False)
    workload.loss_fn = tracked_cross_entropy
    workload.parameter_groups = [{"params": list(layer.parameters())} for layer in layers]
    workload.steps = STEPS
    return workload


class Shifts:
    """When pixels and labels change places, and to where."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        early, late = torch.randint(-80, 81, (2,), generator=generator).tolist()
        self.pixels_at, self.labels_at = 400 + early, 800 + late
        self.pixels = torch.randperm(28 * 28, generator=generator)
        self.labels = torch.randperm(10, generator=generator)
        self.last = max(self.pixels_at, self.labels_at)

    def apply(self, step: int, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, 784) and labels (N,) as they are at `step`."""
        if step >= self.pixels_at:
            images = images[:, self.pixels]
        return images, self.labels[labels] if step >= self.labels_at else labels


class Shifted:
    """Batches (images, labels, watched images, watched labels) without end, the same at every
    pass."""

    def __init__(
        self,
        shifts: Shifts,
        train: tuple[Tensor, Tensor],
        watched: tuple[Tensor, Tensor],
        seed: int,
    ) -> None:
        self.shifts, self.train, self.watched, self.seed = shifts, train, watched, seed

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        order = torch.empty(0, dtype=torch.long)
        for step in count():
            if len(order) < BATCH:
                order = torch.randperm(len(self.train[0]), generator=generator)
            rows, order = order[:BATCH], order[BATCH:]
            among = torch.randint(len(self.watched[0]), (WATCHED,), generator=generator)
            yield (
                *self.shifts.apply(step, *(t[rows] for t in self.train)),
                *self.shifts.apply(step, *(t[among] for t in self.watched)),
            )


def tracked_cross_entropy(model: nn.Module, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict]:
    """`cross_entropy`; and "tracking", that of the watched examples, where the batch has any."""
    images, labels, *watched = batch
    loss, metrics = cross_entropy(model, (images, labels))
    if watched:
        with torch.no_grad():
            metrics["tracking"] = cross_entropy(model, (watched[0], watched[1]))[0]
    return loss, metrics

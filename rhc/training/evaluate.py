"""Losses of a model over whole loaders, without changes to modes, buffers or random state."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rhc.containers import length, spare, to_device
from rhc.training.batches import batch_size
from rhc.training.loaders import begun, loader_preserved
from rhc.training.module_state import Buffers
from rhc.training.objective import Average
from rhc.training.plant import Plant

TRAIN_BATCHES = 200
"""Batches of train_loader for the training loss, at most."""
UNSIZED_BATCHES = 1000
"""Batches of a loader without a length, which may be endless."""


class Losses(NamedTuple):
    """Means over examples: loss, and every metric of loss_fn. NaN without data. batches: drawn."""

    loss: float
    metrics: dict[str, float]
    batches: int


@torch.no_grad()
def evaluate(
    plant: Plant, loader: Iterable[Any] | None, *, most: int | None = None
) -> Losses | None:
    """Mean loss and metrics in eval mode over the loader's first `most` batches; by default all."""
    if loader is None:
        return None
    unsized = most is None and length(loader) is None
    most = UNSIZED_BATCHES if unsized else most
    drawn, rows, total = 0, 0, 0.0
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    with _drawn(plant, loader, most) as batches:
        for batch in batches:
            n = batch_size(batch)
            loss, metrics = plant.loss(spare(batch))  # a list yields the same batch again
            drawn += 1
            rows += n
            total += n * float(loss)
            for name, value in metrics.items():
                sums[name][0] += n * float(value.double().mean())
                sums[name][1] += n  # a metric may be missing at some batches
    if unsized and drawn == most:
        warnings.warn(
            f"a loader without a length has not ended after {most} batches: its figures are of "
            "these; give one that ends, or has a length, for all of it",
            stacklevel=2,
        )
    names = plant.parallel.union(sums)
    whole, total, *pairs = plant.parallel.sums([rows, total, *(x for n in names for x in sums[n])])
    if not whole:
        return Losses(math.nan, {}, drawn)
    means = (value / own for value, own in zip(pairs[::2], pairs[1::2], strict=True))
    return Losses(total / whole, dict(zip(names, means, strict=True)), drawn)


@contextmanager
def _drawn(plant: Plant, loader: Iterable[Any], most: int | None) -> Iterator[Iterator[Any]]:
    device = plant.parameters[0].device
    moved = None if device.type == "cpu" else device
    with plant.evaluating(), loader_preserved(loader):
        plant.parallel.share_random_state()
        yield (to_device(batch, moved) for batch in islice(begun(loader), most))


@contextmanager
def at_average(plant: Plant, average: Average, train_loader: Iterable[Any]) -> Iterator[None]:
    """Inside, the model has its averaged weights, with BatchNorm statistics estimated for them."""
    if average.values is None:
        yield
        return
    parameters = [p.detach() for p in plant.parameters]
    live = [p.clone() for p in parameters]
    buffers = Buffers(plant.model)
    before = buffers.copies()
    swapped, plant.has_evaluation_weights = plant.has_evaluation_weights, False
    try:
        with torch.no_grad():
            torch._foreach_copy_(parameters, average.values)
            _estimate_statistics(plant, train_loader)
        yield
    finally:
        plant.has_evaluation_weights = swapped
        with torch.no_grad():
            torch._foreach_copy_(parameters, live)
        buffers.put(before)


def _estimate_statistics(plant: Plant, loader: Iterable[Any]) -> None:
    """Like torch.optim.swa_utils.update_bn, but through loss_fn, which understands batches."""
    layers = [
        m for m in plant.model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None
    ]
    if not layers:
        return
    momenta = [m.momentum for m in layers]
    statistics = [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]
    with _drawn(plant, loader, TRAIN_BATCHES) as batches:
        for m in layers:
            m.reset_running_stats()
            m.momentum = None  # a plain mean over all batches
            m.train()
        for batch in batches:
            plant.loss(spare(batch))
        found = [b.clone() for b in statistics]  # an evaluation leaves buffers as they were
    torch._foreach_copy_(statistics, found)
    plant.parallel.mean_(statistics)
    for m, momentum in zip(layers, momenta, strict=True):
        m.momentum = momentum


def batch_statistics(model: nn.Module) -> None:
    """Makes BatchNorm layers of a model in eval mode use the batch's statistics."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.training = True

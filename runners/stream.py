"""A table in time order, learned as it comes: rows of a CSV file, whose law drifts as it does."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path

import torch
from rhc.runners.sine import hidden
from torch import Tensor, nn
from torch.nn import functional as F

from rhc.errors import InputError
from rhc.workload import Workload

BATCH = 16
"""Rows that a step trains on; it takes twice as many of the table, and watches every other one."""

FIRST = 0.02
"""Share of the table, its beginning, whose mean and spread every column is scaled by."""


def stream(*, seed: int = 0, data: Path | None = None, batch_size: int = BATCH) -> Workload:
    """A CSV file in time order, given by --data, whose last column is told by the others.

    A step trains on every second of 32 consecutive rows; the metric "tracking" is the loss on the
    rows between them, which nothing is trained on, before the step. An MLP with two layers of 64;
    cross-entropy in nats where the last column is 0 or 1, else squared error, scaled.
    seed: the weights are drawn from the global generator, which the caller has seeded with it.
    data: a header, then numbers. batch_size: rows of a step.
    """
    table = read_table(data)
    binary = bool(((table[:, -1] == 0) | (table[:, -1] == 1)).all())
    first = table[: max(2, int(FIRST * len(table)))]
    scaled = (table - first.mean(0)) / first.std(0).clamp(min=1e-6)
    target = table[:, -1:] if binary else scaled[:, -1:]
    inputs, steps = scaled[:, :-1], len(table) // (2 * batch_size)
    if not steps:
        raise InputError(
            f"{data} has {len(table)} rows, fewer than the {2 * batch_size} of a step; give a "
            "longer table"
        )
    last = (inputs[-2 * batch_size :], target[-2 * batch_size :])
    width = inputs.shape[1]
    return Workload(
        model=nn.Sequential(*hidden(width, 64), *hidden(64, 64), nn.Linear(64, 1)),
        loss_fn=tracked_cross_entropy if binary else tracked_squared_error,
        train_loader=Rows(inputs, target, batch_size),
        test_loader=[last],
        steps=steps,
        optimizer="sgd",
        lr={"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3},
        threads=1,
    )


class Rows:
    """Batches (inputs, targets, watched inputs, watched targets) in time order, and again from the
    beginning where more are asked for."""

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int) -> None:
        self.parts = [
            (x[::2], y[::2], x[1::2], y[1::2])
            for x, y in zip(
                inputs.split(2 * batch_size), targets.split(2 * batch_size), strict=True
            )
            if len(x) == 2 * batch_size
        ]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for parts in repeat(self.parts):
            yield from parts


def tracked_cross_entropy(
    model: nn.Module, batch: tuple[Tensor, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of a batch, and of the rows that it only watches."""
    return _tracked(F.binary_cross_entropy_with_logits, model, batch)


def tracked_squared_error(
    model: nn.Module, batch: tuple[Tensor, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean squared error of a batch, and of the rows that it only watches."""
    return _tracked(F.mse_loss, model, batch)


def _tracked(
    loss: Callable[[Tensor, Tensor], Tensor], model: nn.Module, batch: tuple[Tensor, ...]
) -> tuple[Tensor, dict[str, Tensor]]:
    inputs, targets, *watched = batch
    found = loss(model(inputs), targets)
    if not watched:
        return found, {}
    with torch.no_grad():
        return found, {"tracking": loss(model(watched[0]), watched[1])}


def read_table(path: Path | None) -> Tensor:
    """The numbers of a CSV file with a header, (rows, columns); InputError for anything else."""
    if path is None:
        raise InputError("runner stream needs a table: give --data FILE.csv, rows in time order")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file)
            rows = [[float(cell) for cell in line] for line in lines if line]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is no table of numbers with a header ({error}); give --data FILE.csv"
        ) from None
    wrong = next((i for i, row in enumerate(rows, 2) if len(row) != len(header)), None)
    if wrong is not None or len(header) < 2 or not rows:
        fault = (
            "has no rows of two columns" if wrong is None else f"line {wrong} is of other length"
        )
        raise InputError(f"{path}: it {fault}; give a CSV file, one row a moment")
    if not all(math.isfinite(cell) for row in rows for cell in row):
        raise InputError(f"{path} holds numbers that are not finite; leave these rows out")
    return torch.tensor(rows, dtype=torch.float32)

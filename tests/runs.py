"""Small training runs: what a Runner takes, made afresh, and what it leaves behind, to compare."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset, TensorDataset

from rhc.containers import Kept
from rhc.schedule import Schedule

FEATURES, CLASSES = 6, 3

ROWS = 75
"""Of the training data: nine batches of eight, and a tenth of three."""

FILES = ("schedule.json", "tape.jsonl", "windows.jsonl")
"""Files of a run's directory that hold nothing which differs between two equal runs."""


class Run(NamedTuple):
    """What a user brings. val may be None."""

    model: nn.Module
    optimizer: Optimizer
    loss_fn: Callable[[nn.Module, Any], Any]
    train: Iterable[Any]
    val: Iterable[Any] | None


def make_run(
    optimizer: str = "sgd",
    loader: str = "shuffled",
    *,
    seed: int = 0,
    dropout: float = 0.2,
    norm: bool = True,
    lr: float | None = None,
) -> Run:
    """A run whose weights, loaders and global random state follow from `seed` alone."""
    seed_everything(seed)
    model = network(dropout, norm)
    options = {} if lr is None else {"lr": lr}
    return Run(
        model,
        OPTIMIZERS[optimizer](model.parameters(), **options),
        classify,
        LOADERS[loader](clouds(ROWS), seed),
        DataLoader(clouds(32, seed=1), 8),
    )


def seed_everything(seed: int) -> None:
    """Sets every global generator."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def clouds(rows: int, seed: int = 0) -> TensorDataset:
    """Three overlapping clouds of points, one per class."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (rows,), generator=draw)
    return TensorDataset(
        torch.randn(rows, FEATURES, generator=draw) + F.one_hot(labels, FEATURES), labels
    )


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Rows that are moved at random, by each of the three global generators, when they are read."""

    def __init__(self, rows: TensorDataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, label = self.rows[index]
        scale = 1 + 0.1 * np.random.standard_normal() + 0.1 * random.random()
        return x * scale + 0.1 * torch.randn(FEATURES), label


def network(dropout: float = 0.2, norm: bool = True) -> nn.Module:
    """6-10-3 with BatchNorm (no bias before it) and dropout."""
    middle = nn.BatchNorm1d(10) if norm else nn.Identity()
    return nn.Sequential(
        nn.Linear(FEATURES, 10, bias=not norm),
        middle,
        nn.Tanh(),
        nn.Dropout(dropout),
        nn.Linear(10, CLASSES),
    )


def classify(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy, and the accuracy beside it."""
    x, labels = batch
    logits = model(x)
    accuracy = (logits.argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits, labels), {"accuracy": accuracy}


def sgd(parameters: Any, lr: float = 0.05) -> Optimizer:
    return SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.01)


def adam(parameters: Any, lr: float = 0.01) -> Optimizer:
    return Adam(parameters, lr=lr)


def adamw(parameters: Any, lr: float = 0.01) -> Optimizer:
    return AdamW(parameters, lr=lr)


OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {"sgd": sgd, "adam": adam, "adamw": adamw}

LOADERS: Mapping[str, Callable[[TensorDataset, int], Iterable[Any]]] = {
    "shuffled": lambda data, seed: DataLoader(data, 8, shuffle=True),
    "drop_last": lambda data, seed: DataLoader(data, 8, shuffle=True, drop_last=True),
    "generator": lambda data, seed: DataLoader(
        data, 8, shuffle=True, generator=torch.Generator().manual_seed(seed + 7)
    ),
    "augmented": lambda data, seed: DataLoader(Augmented(data), 8, shuffle=True),
    "in_order": lambda data, seed: DataLoader(data, 8),
    "list": lambda data, seed: list(DataLoader(data, 8)),
}


# Ordinary loops ----------------------------------------------------------------------------------


def plain_loop(
    run: Run,
    steps: int,
    schedule: Schedule | None = None,
    clip_norm: float | None = None,
    *,
    clip_value: float | None = None,
    accumulate: int = 1,
) -> None:
    """The loop that everybody writes, for so many steps, with a schedule where one is given."""
    scheduler = None if schedule is None else schedule.to_lr_scheduler(run.optimizer)
    step = micro = 0
    run.optimizer.zero_grad()
    while step < steps:
        for batch in run.train:
            result = run.loss_fn(run.model, batch)
            loss = result[0] if isinstance(result, tuple) else result
            (loss / accumulate if accumulate > 1 else loss).backward()
            micro += 1
            if micro % accumulate:
                continue
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(run.model.parameters(), clip_norm)
            if clip_value is not None:
                nn.utils.clip_grad_value_(run.model.parameters(), clip_value)
            run.optimizer.step()
            run.optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            step += 1
            if step == steps:
                break
    if scheduler is not None:
        for group in run.optimizer.param_groups:
            del group["initial_lr"]  # every lr_scheduler of torch leaves it there


# Comparing ---------------------------------------------------------------------------------------


def state_of(run: Run) -> dict[str, Any]:
    """Copies of parameters, buffers, optimizer state and global random states, by name."""
    generator = getattr(run.train, "generator", None)
    return {
        "model": {k: v.detach().clone() for k, v in run.model.state_dict().items()},
        "optimizer": _copied(run.optimizer.state_dict()),
        "torch": torch.get_rng_state(),
        "numpy": list(np.random.get_state()),
        "python": random.getstate(),
        "generator": None if generator is None else generator.get_state(),
    }


def unequal(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested states differ: no bit may. Batches that are kept count as what they are."""
    a, b = (x.batch if isinstance(x, Kept) else x for x in (a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
        return [] if same else [path]
    if isinstance(a, np.ndarray):
        return [] if np.array_equal(a, b) else [path]
    if isinstance(a, Mapping):
        if a.keys() != b.keys():
            return [f"{path}: {sorted(map(str, a))} {sorted(map(str, b))}"]
        return [found for k in a for found in unequal(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [path]
        return [f for i in range(len(a)) for f in unequal(a[i], b[i], f"{path}/{i}")]
    return [] if a == b else [f"{path}: {a!r} {b!r}"]


def files(directory: Path) -> dict[str, bytes]:
    """The content of FILES."""
    return {name: (directory / name).read_bytes() for name in FILES}


class Stop(Exception):
    """Raised by a listener in order to interrupt a run."""


def stop_at_event(number: int) -> Callable[[Any], None]:
    """A listener that lets `number` events pass and raises Stop at the next."""
    seen = 0

    def listener(event: Any) -> None:
        nonlocal seen
        seen += 1
        if seen > number:
            raise Stop

    return listener


def stop_at_step(step: int) -> Callable[[Any], None]:
    """A listener that raises Stop when step `step` has been taken."""

    def listener(event: Any) -> None:
        if getattr(event, "step", None) == step and hasattr(event, "controls"):
            raise Stop

    return listener


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(v) for v in value]
    return value

"""A workload of seconds: dropout, BatchNorm, an uneven last batch, noise in the loader."""

from __future__ import annotations

from pathlib import Path

from runs import Augmented, classify, clouds, network
from torch.utils.data import DataLoader

from rhc import Workload


def make(*, seed: int = 0, data: Path | None = None) -> Workload:
    """Random in all that can be: a resumed run must find every stream where it was."""
    return Workload(
        model=network(dropout=0.3),
        loss_fn=classify,
        train_loader=DataLoader(Augmented(clouds(75)), 8, shuffle=True),
        val_loader=DataLoader(clouds(64, seed=1), 16, shuffle=True),
        test_loader=None,
        steps=60,
        optimizer="adamw",
        lr={"adamw": 0.01},
        threads=1,
    )

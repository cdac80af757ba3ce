"""A loss of several terms, of which one helps, one harms and one does neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rhc.runners.data import tensor_loader
from torch import Tensor, nn
from torch.nn import functional as F

from rhc.data_weights import DataWeights
from rhc.errors import InputError
from rhc.workload import Workload

INPUTS, RELATED, TRAIN, HELD_OUT, BATCH = 20, 8, 200, 500, 40
TERMS = ("target", "related", "misleading", "idle")


def auxiliary(*, seed: int = 0, data: Path | None = None, noise: float = 1.0) -> Workload:
    """Regression on 200 rows with noisy targets, with a weight per loss term under --data-weights.

    *related* (helps): eight clean outputs of the same hidden features. *misleading* (harms): the
    target's output at other rows' targets. *idle*: an offset of its own. Losses of the target alone
    are validated and tested. noise: of the targets, in their standard deviations. The data are the
    same for every seed.
    """
    if data is not None:
        raise InputError(f"runner auxiliary takes no data, got --data {data}: leave --data out")
    generator = torch.Generator().manual_seed(1000)
    count = TRAIN + 2 * HELD_OUT
    x = torch.randn(count, INPUTS, generator=generator)
    first = torch.randn(INPUTS, RELATED, generator=generator) / INPUTS**0.5
    hidden = torch.tanh(2 * x @ first)
    target = hidden @ torch.randn(RELATED, 1, generator=generator) / RELATED**0.5
    noisy = target + noise * target.std() * torch.randn(count, 1, generator=generator)
    misleading = noisy[torch.randperm(count, generator=generator)]
    rows = (x, noisy, hidden, misleading)
    train = tuple(part[:TRAIN] for part in rows)
    held_out, test = (
        (x[start : start + HELD_OUT], target[start : start + HELD_OUT])
        for start in (TRAIN, TRAIN + HELD_OUT)
    )
    return Workload(
        model=Model(),
        loss_fn=terms_of_loss,
        train_loader=tensor_loader(train, BATCH, shuffle=True),
        val_loader=tensor_loader(held_out, 50, shuffle=True),
        test_loader=tensor_loader(test, HELD_OUT, shuffle=False),
        steps=1000,
        lr={"sgd": 0.03, "adam": 3e-3, "adamw": 3e-3},
        threads=1,
        data_weights=DataWeights(TERMS),
    )


class Model(nn.Module):
    """Two hidden layers with a head for the target, one for what is related, and an offset."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(INPUTS, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.target, self.related = nn.Linear(64, 1), nn.Linear(64, RELATED)
        self.offset = nn.Parameter(torch.zeros(()))


def terms_of_loss(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The terms' mean squared errors; of held-out batches (x, target) the target's alone."""
    assert isinstance(model, Model)
    x, noisy, *others = batch
    features = model.trunk(x)
    found = model.target(features)
    if not others:
        zero = torch.zeros((), device=x.device)
        return {**dict.fromkeys(TERMS, zero), "target": F.mse_loss(found, noisy)}
    hidden, misleading = others
    return {
        "target": F.mse_loss(found, noisy),
        "related": F.mse_loss(model.related(features), hidden),
        "misleading": F.mse_loss(found, misleading),
        "idle": (model.offset - 1).square(),
    }

"""The best validated state of a run: the one with the lowest loss on val_loader."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rhc.containers import length
from rhc.distributed import RankLoader
from rhc.errors import InputError
from rhc.training.evaluate import Losses
from rhc.training.module_state import Buffers
from rhc.training.plant import Plant

VALIDATIONS = 20
"""Of a run, at most, where `validate_every` is not given."""

BATCHES_APART = 30
"""Steps between such validations for every batch of val_loader: a batch costs a third of a
gradient, so that all of them cost at most 1.1 % of a run."""


@dataclass(frozen=True)
class Best:
    """The model after `step` steps, and its losses on val_loader."""

    step: int
    loss: float
    metrics: Mapping[str, float]
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor | None]

    @classmethod
    def of(cls, plant: Plant, step: int, losses: Losses) -> Best:
        parameters = {n: p.detach().clone() for n, p in plant.model.named_parameters()}
        buffers = Buffers(plant.model).copies()
        return cls(step, losses.loss, losses.metrics, parameters, buffers)

    @torch.no_grad()
    def put(self, plant: Plant) -> None:
        """Gives the live model these parameters and buffers; the optimizer keeps its state."""
        for name, parameter in plant.model.named_parameters():
            parameter.copy_(self.parameters[name])
        Buffers(plant.model).put(self.buffers)

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "loss": self.loss, "metrics": dict(self.metrics)}


def better(best: Best | None, plant: Plant, step: int, losses: Losses) -> Best | None:
    """The live state if its loss is lower than that of `best`, else `best`."""
    if not math.isfinite(losses.loss) or (best is not None and losses.loss >= best.loss):
        return best
    return Best.of(plant, step, losses)


def validation_steps(
    every: int | None, keep_best: bool | None, val_loader: Any, steps: int
) -> int | None:
    """Steps from one validation to the next; None for no validation before the end.

    Without `every` a run is validated where it may end with the best state: where that is asked
    for, or, if keep_best is None, where another pass over val_loader disturbs no other.
    """
    if every is not None or keep_best is False or val_loader is None:
        return every
    batches = length(val_loader)
    if keep_best is None and (batches is None or not _is_repeatable(val_loader)):
        return None
    apart = max(math.ceil(steps / VALIDATIONS), BATCHES_APART * (batches or 1))
    return apart if apart < steps or keep_best else None


def _is_repeatable(loader: Any) -> bool:
    """Whether passes over a loader are surely independent of each other."""
    if isinstance(loader, RankLoader):
        loader = loader.loader
    usual = isinstance(loader, (DataLoader, list, tuple))
    return usual and not hasattr(getattr(loader, "dataset", None), "__next__")


def check_keep_best(keep_best: bool, val_loader: Any, plant: Plant) -> None:
    """Raises InputError where no best state can be kept."""
    if not keep_best:
        return
    if val_loader is None:
        raise InputError(
            "keep_best needs a val_loader, by which states are judged, got none; give one, or "
            "leave keep_best out"
        )
    if plant.has_evaluation_weights:
        raise InputError(
            f"keep_best cannot restore weights of {type(plant.optimizer).__name__}, which "
            "evaluates others than it trains; leave keep_best out"
        )

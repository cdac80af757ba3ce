"""Reward sources: `HeldOut` and `ZScored` are functions (model, steps taken, metrics) -> number or
None, e.g. `scheduler.step(loss, reward(model, step))`; the others are for `EpochPlanner`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import nn

from rhc.containers import spare
from rhc.errors import InputError, whole_number
from rhc.rng import preserved
from rhc.training.batches import batch_size
from rhc.training.loaders import begun, loader_preserved


class HeldOut:
    """A metric, or the negative loss, on up to `batches` held-out batches every `every` steps.
    `forward_passes` counts its cost in forward passes of a batch of `trained_on` examples. The
    model's mode and the random state are preserved."""

    def __init__(
        self,
        loss_fn: Callable[[nn.Module, Any], Any],
        loader: Iterable[Any],
        *,
        metric: str | None = None,
        every: int = 100,
        batches: int | None = None,
        trained_on: int = 64,
    ) -> None:
        every = whole_number("every", every)
        batches = None if batches is None else whole_number("batches", batches)
        if every < 1:
            raise InputError(f"every must be ≥ 1 steps, got {every}; try 100")
        self.loss_fn, self.loader, self.metric = loss_fn, loader, metric
        self.every, self.batches, self.trained_on = every, batches, trained_on
        self.forward_passes = 0.0

    def __call__(
        self, model: nn.Module, step: int, metrics: Mapping[str, Any] | None = None
    ) -> float | None:
        if step % self.every:
            return None
        total, count = 0.0, 0
        training = model.training
        with preserved(), loader_preserved(self.loader), torch.no_grad():
            model.eval()
            try:
                for batch in islice(begun(self.loader), self.batches):
                    examples = batch_size(batch)
                    total += examples * float(self._value(model, spare(batch)))
                    count += examples
            finally:
                model.train(training)
        self.forward_passes += count / self.trained_on
        return total / count if count else None

    def _value(self, model: nn.Module, batch: Any) -> Any:
        outcome = self.loss_fn(model, batch)
        loss, metrics = outcome if isinstance(outcome, tuple) else (outcome, {})
        if self.metric is None:
            return -loss
        if self.metric not in metrics:
            raise InputError(
                f"metric {self.metric!r} is not what loss_fn returns, which has "
                f"{', '.join(metrics) or 'none'}: give one of these, or None for the loss"
            )
        return metrics[self.metric]


class ZScored:
    """A step metric as a z-score over its last `over` values; 0 if they are all equal."""

    def __init__(self, metric: str, over: int = 100) -> None:
        if over < 2:
            raise InputError(f"over must be ≥ 2 steps, got {over}; try 100")
        self.metric = metric
        self._last: deque[float] = deque(maxlen=over)

    def __call__(
        self, model: nn.Module | None, step: int, metrics: Mapping[str, Any]
    ) -> float | None:
        value = float(metrics[self.metric])
        self._last.append(value)
        n = len(self._last)
        mean = sum(self._last) / n
        spread = (sum((x - mean) ** 2 for x in self._last) / n) ** 0.5
        return (value - mean) / spread if spread > 1e-9 * abs(mean) else 0.0


# Of an epoch --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ValidationLoss:
    """The reward is the fall of the validation loss."""

    source: str = field(default="validation", init=False)


@dataclass(frozen=True)
class FreshSeeds:
    """The reward is a return on seeds that were not trained on. play: (seed) -> return, called once
    per epoch with seeds from `first` on; or a step metric that is such a return, as in on-policy
    training."""

    play: Callable[[int], float] | str = "return"
    first: int = 10**6
    source: str = field(default="fresh seeds", init=False)


@dataclass(frozen=True)
class TrainingTape:
    """The reward is a training metric, or the negative training loss for None. It is optimistic:
    the data were trained on. So it is never the default."""

    metric: str | None = None
    source: str = field(default="training tape", init=False)


RewardSource = ValidationLoss | FreshSeeds | TrainingTape

"""Where rewards come from: functions that a causal scheduler is told the value of, and the sources
that an `EpochPlanner` can take the reward of an epoch from.

`HeldOut` and `ZScored` are functions (model, steps taken, metrics of the step) -> number or None,
as `Workload.reward` wants it and as a loop of one's own can call it:

    reward = rhc.schedulers.HeldOut(loss_fn, val_loader, metric="accuracy")
    ...
    scheduler.step(loss, reward(model, step))
"""

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
    """A metric, or the loss with its sign turned, on held-out data, every `every` steps.

    loss_fn: as a workload's. batches: of the loader, at most. `forward_passes` counts those of a
    training batch, of `trained_on` examples, that it has spent. The model's mode and the random
    state stay as they are.
    """

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
    """A metric of every step in standard deviations of its last `over` values, from their mean.

    0 until there are two values, and where they do not differ.
    """

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
    """The reward of an epoch is the fall of a loss on data that is not trained on."""

    source: str = field(default="validation", init=False)


@dataclass(frozen=True)
class FreshSeeds:
    """The reward is a return played with seeds that nothing was trained on.

    play: (seed) -> return, called once at the end of every epoch with a seed of its own, from
    `first` on; or the name of a metric of every step that is such a return, as an on-policy run has
    it: its episodes are played before anything learns from them.
    """

    play: Callable[[int], float] | str = "return"
    first: int = 10**6
    source: str = field(default="fresh seeds", init=False)


@dataclass(frozen=True)
class TrainingTape:
    """The reward is what the training steps themselves report: named, because it flatters.

    A loss that falls on the data that were trained on says nothing of other data. metric: the name
    of a metric of every step; None for the loss, with its sign turned.
    """

    metric: str | None = None
    source: str = field(default="training tape", init=False)


RewardSource = ValidationLoss | FreshSeeds | TrainingTape

"""The value of a window: its objective, on data that its steps did not train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rhc.containers import length
from rhc.data_weights import Judged
from rhc.hypergradient import stage_sum
from rhc.hypergradient.evaluation import visible_statistics
from rhc.loop.fit import Fit
from rhc.loop.state import Attempt, Window
from rhc.training.batches import batch_size, micro_batches
from rhc.training.evaluate import batch_statistics
from rhc.training.objective import Average
from rhc.training.plant import Plant


@dataclass(frozen=True)
class HeldOutLoss:
    """The mean loss on batches in eval mode. share: their size in training batches."""

    plant: Plant
    batches: Sequence[Any]
    sizes: Sequence[int]
    share: float
    rows: Callable[[Tensor], Tensor] | None = None

    def __call__(self, model: nn.Module) -> Tensor:
        return self.mean(self.each())

    def each(self) -> list[Tensor]:
        # Running statistics are of the last iterate, not of the average that is judged.
        with self.plant.evaluating() as model:
            batch_statistics(model)
            batches = self.batches
            if self.rows is not None:
                batches = [Judged(batch, self.rows) for batch in batches]
            return [self.plant.loss(batch)[0] for batch in batches]

    def mean(self, losses: Sequence[Tensor]) -> Tensor:
        weighed = [loss * size for loss, size in zip(losses, self.sizes, strict=True)]
        return torch.stack(weighed).sum() / sum(self.sizes)


def held_out_loss(
    plant: Plant,
    batches: Sequence[Any],
    train: Any = None,
    rows: Callable[[Tensor], Tensor] | None = None,
) -> HeldOutLoss:
    """The mean loss on `batches`; its share is their size beside `train`, else their number."""
    batches = [micro for batch in batches for micro in micro_batches(batch)]
    sizes = [batch_size(b) for b in batches]
    share = float(len(batches))
    if train is not None:
        share = sum(sizes) / max(1, batch_size(train))
    return HeldOutLoss(plant, batches, sizes, share, rows)


def terminal_loss(fit: Fit, window: Window) -> HeldOutLoss | None:
    """The terminal loss on held-out batches; None where it has no weight."""
    if fit.objective.terminal_weight == 0:
        return None
    if window.terminal is None:
        train, validation = fit.data.train, fit.data.validation
        if validation is not None:
            first, last = judged_on(fit, window.start)
            batches = validation.take(first, last)
            validation.release(first)
        else:
            ahead = train.take(window.start, window.stop + fit.objective.count)
            batches = ahead[window.stop - window.start :]
        first_batch = train.take(window.start, window.start + 1)[0]
        rows = fit.objective.rows
        window.terminal = held_out_loss(fit.plant, batches, first_batch, rows)
    return cast(HeldOutLoss, window.terminal)


def judged_on(fit: Fit, step: int) -> tuple[int, int]:
    """[first, last) of the validation batches of the window at `step`: others for every stride."""
    n = at_most(fit.data.val_loader, fit.objective.count)
    first = n * (step // fit.stride)
    return first, first + n


def at_most(loader: Any, count: int) -> int:
    """The number of batches of a loader, if it has one, up to `count`."""
    batches = length(loader)
    return count if batches is None else max(1, min(batches, count))


@torch.no_grad()
def value_of(fit: Fit, window: Window, attempt: Attempt, mean: Average) -> float:
    """J of a replayed window, by the roll's formula and data. mean: average of its iterates."""
    assert attempt.trajectory is not None
    plant, terminal = fit.plant, terminal_loss(fit, window)
    value = stage_sum(fit.objective, attempt.trajectory)
    if terminal is not None and mean.values is not None:
        parameters = [p.detach() for p in plant.parameters]
        live = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, mean.values)
        with visible_statistics(plant.model, update=False):
            value += fit.objective.terminal_weight * plant.value(terminal(plant.model))
        torch._foreach_copy_(parameters, live)
    return value + penalty_of(fit, attempt)


def penalty_of(fit: Fit, attempt: Attempt) -> float:
    assert fit.reverse_passes is not None
    return fit.rule.penalty(attempt.schedule, fit.reverse_passes.controls)

"""What a window is judged by: the objective, on data that its steps did not train on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rhc.hypergradient import stage_sum
from rhc.hypergradient.evaluation import visible_statistics
from rhc.loop.state import AVERAGE_EVERY, Attempt, Loop, Window
from rhc.loop.steps import Steps
from rhc.schedule import Schedule
from rhc.training.batches import MicroBatches, batch_size
from rhc.training.evaluate import batch_statistics
from rhc.training.objective import Average, Objective
from rhc.training.plant import Plant
from rhc.training.trajectory import Trajectory


class Judge:
    """Draws a window's terminal loss, and says what a way through the window is worth.

    penalty: of a window's schedule, on top of the objective. judged_on: counts validation batches.
    Writes in the loop: cost.
    """

    def __init__(
        self,
        plant: Plant,
        loop: Loop,
        steps: Steps,
        objective: Objective,
        penalty: Callable[[Schedule], float],
        judged_on: JudgedOn,
    ) -> None:
        self.plant, self.loop, self.steps = plant, loop, steps
        self.objective, self.penalty, self.judged_on = objective, penalty, judged_on

    def terminal(self, start: int, stop: int) -> HeldOutLoss | None:
        """The terminal loss on this window's objective data; None where it has no weight."""
        if self.objective.terminal_weight == 0:
            return None
        if self.loop.validation is not None:
            first, last = self.judged_on.batches_at(start)
            batches = self.loop.validation.take(first, last)
            self.loop.validation.release(first)
        else:
            after = self.loop.train.take(start, stop + self.objective.count)[stop - start :]
            batches = after
        return held_out_loss(self.plant, batches, self.loop.train.take(start, start + 1)[0])

    def replay(self, attempt: Attempt, window: Window, terminal: HeldOutLoss | None) -> None:
        """The attempt's window by plain steps from its beginning, and its objective."""
        start, stop = attempt.schedule.start, attempt.schedule.stop
        self.steps.back_to(window, attempt, "replay")
        mean, past = Average(self.objective.average), self.past()
        self.steps.run(attempt, window.commit, mean)
        if attempt.failure is None:
            self.remember(mean, past)
            assert attempt.trajectory is not None
            attempt.value = self._value(attempt, attempt.trajectory, terminal, mean)
            if terminal is not None:
                self.loop.cost.gradient_equivalents += terminal.share / 3
            if not math.isfinite(attempt.value):
                attempt.failure = f"the objective is not finite at steps [{start}, {stop})"

    @torch.no_grad()
    def _value(
        self, attempt: Attempt, trajectory: Trajectory, terminal: HeldOutLoss | None, mean: Average
    ) -> float:
        """J of a replayed window, by the same formula and data as the roll's."""
        value = stage_sum(self.objective, trajectory)
        if terminal is not None and mean.values is not None:
            parameters = [p.detach() for p in self.plant.parameters]
            live = [p.clone() for p in parameters]
            torch._foreach_copy_(parameters, mean.values)
            with visible_statistics(self.plant.model, update=False):
                value += self.objective.terminal_weight * self.plant.value(
                    terminal(self.plant.model)
                )
            torch._foreach_copy_(parameters, live)
        return value + self.penalty(attempt.schedule)

    def past(self) -> Average | None:
        """The average of the steps committed so far, where the objective remembers it."""
        return self.loop.average.copy() if self.objective.memory else None

    def remember(self, mean: Average, past: Average | None) -> float:
        """Lets a window's average go on from that of the steps before; its share in the result."""
        if past is None or past.values is None or mean.values is None:
            return 0.0
        share = self.objective.remembered(mean.count, AVERAGE_EVERY * past.count)
        with torch.no_grad():
            torch._foreach_lerp_(mean.values, past.values, share)
        return share


@dataclass(frozen=True)
class JudgedOn:
    """Which validation batches a window is judged on: `count` at most, others for every stride."""

    val_loader: Any
    count: int
    stride: int

    def batches_at(self, step: int) -> tuple[int, int]:
        """(first, last + 1) of the window that begins at `step`."""
        n = at_most(self.val_loader, self.count)
        first = n * (step // self.stride)
        return first, first + n


def at_most(loader: Any, count: int) -> int:
    """The number of batches of a loader, if it says so, up to `count`."""
    try:
        return max(1, min(len(loader), count))
    except TypeError:
        return count


@dataclass(frozen=True)
class HeldOutLoss:
    """The mean loss on batches in eval mode. share: their size in training batches."""

    plant: Plant
    batches: Sequence[Any]
    sizes: Sequence[int]
    share: float

    def __call__(self, model: nn.Module) -> Tensor:
        return self.mean(self.each())

    def each(self) -> list[Tensor]:
        """The live model's loss on each batch, ()."""
        # Running statistics belong to the last iterate, not to the average that is judged.
        with self.plant.evaluating() as model:
            batch_statistics(model)
            return [self.plant.loss(batch)[0] for batch in self.batches]

    def mean(self, losses: Sequence[Tensor]) -> Tensor:
        """The loss that those of the batches make, ()."""
        weighed = [loss * size for loss, size in zip(losses, self.sizes, strict=True)]
        return torch.stack(weighed).sum() / sum(self.sizes)

    def parts(self) -> list[HeldOutLoss]:
        """The loss on each batch alone."""
        share = self.share / len(self.batches)
        pairs = zip(self.batches, self.sizes, strict=True)
        return [HeldOutLoss(self.plant, [batch], [size], share) for batch, size in pairs]


def held_out_loss(plant: Plant, batches: Sequence[Any], train: Any = None) -> HeldOutLoss:
    """The mean loss on `batches`. share: their size beside `train`'s, else their number."""
    batches = [m for b in batches for m in (b if isinstance(b, MicroBatches) else (b,))]
    sizes = [batch_size(b) for b in batches]
    share = float(len(batches))
    if train is not None:
        share = sum(sizes) / max(1, batch_size(train))
    return HeldOutLoss(plant, batches, sizes, share)

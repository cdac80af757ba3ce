"""The run as planned: the schedule before anything is rewritten, and what the run may cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rhc.hypergradient import PRODUCT_COST
from rhc.loop.state import Loop
from rhc.loop.update_rule import Rewrite, replanned
from rhc.schedule import Schedule, Template
from rhc.schedule.planned import Piece, PlannedSchedule, Shape
from rhc.training.plant import Plant


@dataclass(frozen=True)
class Course:
    """The schedule that a run follows where nothing is rewritten.

    template, warmup, cooldown: the shape of lr, where it is `shaped`. per_group: controls with a
    value per parameter group. followed: in place of the template.
    """

    plant: Plant
    template: Template
    warmup: float
    cooldown: float
    shaped: bool
    per_group: tuple[str, ...]
    seed: int
    followed: Schedule | None = None

    def own(self) -> dict[str, Any]:
        """The optimizer's own controls: a number each, or a list of one per parameter group."""
        controls = self.plant.controls
        return controls.initial | {name: controls.own[name] for name in self.per_group}

    def unshaped(self, steps: int) -> PlannedSchedule:
        """The optimizer's own controls at every step."""
        return PlannedSchedule((Piece(0, Schedule.constant(1, self.seed, **self.own())),), steps)

    def planned(self, steps: int, lr: Tensor) -> PlannedSchedule:
        """The optimizer's own controls at every step; lr, () or (G,), in the template's shape."""
        if self.followed is not None:
            own = Schedule.constant(steps, self.seed, **self.own())
            given = self.followed.window(0, steps)
            whole = Schedule({**own.values, **given.values}, 0, self.seed)
            return PlannedSchedule((Piece(0, whole),), steps)
        held = Schedule.constant(1, self.seed, **self.own() | {"lr": lr.tolist()})
        shape = Shape(self.template, steps, self.cooldown, self.warmup)
        # What is not rewritten keeps the optimizer's bits.
        moves = self.shaped and not shape.flat
        return PlannedSchedule((Piece(0, held, shape if moves else None),), steps)

    def as_begun(self, loop: Loop) -> PlannedSchedule:
        """What the run began with, from the lr that was found or given."""
        return self.planned(loop.steps, loop.first_lr)

    def lengthened(self, known: PlannedSchedule | None, loop: Loop) -> PlannedSchedule:
        """The plan of a run that is resumed; made anew from here where it has more steps.

        known: the plan that it had; None where that is what it began with.
        """
        if known is not None and known.stop >= loop.steps:
            return known
        return replanned(self.as_begun(loop), loop.step, loop.correction)

    def begun_anew(self, loop: Loop, step: int, factor: float) -> PlannedSchedule:
        """The plan with the template over the steps that are left, from where it began × factor."""
        shape = Shape(self.template, loop.steps - step, self.cooldown, start=step)
        return loop.schedule.begun_anew(step, factor * loop.first_lr, shape)

    def highest(self, loop: Loop, start: int, stop: int) -> Tensor:
        """What the law's bound on lr is counted from, (K,) or (K, G) of the window.

        That is the template's highest lr, but in its warm-up the template itself: what a short
        window wins there by going faster, the run loses later (docs/log.md).
        """
        lr = self.as_begun(loop).window(start, stop)["lr"]
        steps = torch.arange(start, stop)
        rises = steps < self.warmup * loop.steps
        highest = loop.first_lr.expand(stop - start, *lr.shape[1:])
        return torch.where(rises.view(-1, *[1] * (lr.dim() - 1)), lr, highest)


LOOK = 3
"""Ways through a window that a look back at it takes: the roll, a replay, and once more."""


class Budget:
    """What a run may cost by its law, in plain runs, and what it will."""

    def __init__(
        self, law: Rewrite, window: int, rewriting: bool, notice: Callable[[str], None]
    ) -> None:
        self.law, self.window, self.rewriting, self.notice = law, window, rewriting, notice
        self._spent = False

    def for_search(self, loop: Loop) -> float:
        """Evaluations that the search for a start may take: beside it there is the run itself, and
        a look back at the first window, unless that takes more than a third of the rest."""
        rest = (self.law.budget - 1) * loop.steps - loop.cost.gradient_equivalents
        if not self.rewriting:
            return rest
        length = min(self.window, loop.steps)
        return rest - min(LOOK * length + self._reverse_pass(loop, length), rest / 3)

    def affords(self, loop: Loop, length: int, ways: int, judged: float, looks: int = 0) -> bool:
        """Whether there is room for so many more ways through a window of `length` steps, beside
        plain steps to the end.

        judged: what the window's end is judged on, in training batches; a replay takes a third of
        that. looks: of these ways, those that are looked back at.
        """
        more = ways * (length + judged / 3) + looks * (self._reverse_pass(loop, length) + judged)
        whole = loop.cost.gradient_equivalents + more + loop.steps - loop.step
        if whole <= self.law.budget * loop.steps:
            return True
        if not self._spent:
            self._spent = True
            self.notice(
                f"the budget of {self.law.budget:g} plain runs is spent: the rest is followed as "
                "planned"
            )
        return False

    def _reverse_pass(self, loop: Loop, length: int) -> float:
        """Evaluations of one, at most, where memory is not short."""
        reverse_pass = loop.reverse_pass
        if reverse_pass is None:
            return 0.0
        return length * PRODUCT_COST[reverse_pass.product] + reverse_pass.owed

    def projected(self, loop: Loop) -> float:
        """Of the whole run, in plain runs: the windows that will be looked back at as dear as those
        so far, the others plain, the start paid for once."""
        spent = loop.cost.gradient_equivalents - loop.start_gradients
        looked = math.ceil(self.law.until * loop.steps) if self.rewriting else 0
        dear = max(0, looked - loop.step) * spent / loop.step
        plain = loop.steps - max(looked, loop.step)
        projected = (loop.start_gradients + spent + dear + plain) / loop.steps
        least = (loop.start_gradients + spent + loop.steps - loop.step) / loop.steps
        return min(projected, max(least, self.law.budget))

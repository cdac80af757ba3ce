"""The schedule of a run before anything is rewritten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rhc.loop.state import State
from rhc.loop.update_rule import replanned
from rhc.schedule import Schedule, Template
from rhc.schedule.planned import Piece, PlannedSchedule, Shape
from rhc.training.plant import Plant


@dataclass(frozen=True)
class BaseSchedule:
    """The schedule that a run follows where nothing is rewritten.

    template, warmup, cooldown: the shape of lr, where it is `shaped`. per_group: controls with a
    value per parameter group. followed: a schedule in place of the template.
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

    def at_first(self, state: State) -> PlannedSchedule:
        """What the run began with, from the lr that was found or given."""
        return self.planned(state.steps, state.first_lr)

    def lengthened(self, known: PlannedSchedule | None, state: State) -> PlannedSchedule:
        """The plan of a run that is resumed; made anew from here where it has more steps.

        known: the plan that it had; None where that is what it began with.
        """
        if known is not None and known.stop >= state.steps:
            return known
        return replanned(self.at_first(state), state.step, state.correction)

    def restarted(self, state: State, step: int, factor: float) -> PlannedSchedule:
        """The plan with the template over the steps that are left, from its first lr × factor."""
        shape = Shape(self.template, state.steps - step, self.cooldown, start=step)
        return state.schedule.begun_anew(step, factor * state.first_lr, shape)

    def highest(self, state: State, start: int, stop: int) -> Tensor:
        """What the rule's bound on lr is counted from, (K,) or (K, G) of the window.

        That is the template's highest lr, but in its warm-up the template itself: what a short
        window wins there by going faster, the run loses later (docs/log.md).
        """
        lr = self.at_first(state).window(start, stop)["lr"]
        rises = torch.arange(start, stop) < self.warmup * state.steps
        highest = state.first_lr.expand(stop - start, *lr.shape[1:])
        return torch.where(rises.view(-1, *[1] * (lr.dim() - 1)), lr, highest)

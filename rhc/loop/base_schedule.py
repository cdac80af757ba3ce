"""The base schedule: what a run follows where nothing is rewritten."""

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
    """The schedule before rewriting: `followed`, or a template with warmup and cooldown on lr.
    shaped: whether lr follows it. per_group: controls with a value per parameter group."""

    plant: Plant
    template: Template
    warmup: float
    cooldown: float
    shaped: bool
    per_group: tuple[str, ...]
    seed: int
    followed: Schedule | None = None

    def own(self) -> dict[str, Any]:
        """The optimizer's own controls: a number each, or a list with one per parameter group."""
        controls = self.plant.controls
        return controls.initial | {name: controls.own[name] for name in self.per_group}

    def unshaped(self, steps: int) -> PlannedSchedule:
        return PlannedSchedule((Piece(0, Schedule.constant(1, self.seed, **self.own())),), steps)

    def planned(self, steps: int, lr: Tensor) -> PlannedSchedule:
        """The plan with lr, () or (G,), in the template's shape, other controls constant."""
        if self.followed is not None:
            own = Schedule.constant(steps, self.seed, **self.own())
            given = self.followed.window(0, steps)
            whole = Schedule({**own.values, **given.values}, 0, self.seed)
            return PlannedSchedule((Piece(0, whole),), steps)
        held = Schedule.constant(1, self.seed, **self.own() | {"lr": lr.tolist()})
        shape = Shape(self.template, steps, self.cooldown, self.warmup)
        # Without a shape, controls keep the optimizer's exact bits.
        moves = self.shaped and not shape.flat
        return PlannedSchedule((Piece(0, held, shape if moves else None),), steps)

    def at_first(self, state: State) -> PlannedSchedule:
        """The plan at step 0, from the first lr."""
        return self.planned(state.steps, state.first_lr)

    def lengthened(self, known: PlannedSchedule | None, state: State) -> PlannedSchedule:
        """The plan of a resumed run: `known` if it is long enough, else a new one from here."""
        if known is not None and known.stop >= state.steps:
            return known
        return replanned(self.at_first(state), state.step, state.correction)

    def restarted(self, state: State, step: int, factor: float) -> PlannedSchedule:
        """The plan with the template over the remaining steps, from factor × the first lr."""
        shape = Shape(self.template, state.steps - step, self.cooldown, start=step)
        return state.schedule.begun_anew(step, factor * state.first_lr, shape)

    def highest(self, state: State, start: int, stop: int) -> Tensor:
        """The reference of the bound on lr, (K,) or (K, G): the template's peak; in warm-up the
        template, as a short window gains there by a higher lr what the run loses later
        (docs/log.md)."""
        lr = self.at_first(state).window(start, stop)["lr"]
        rises = torch.arange(start, stop) < self.warmup * state.steps
        highest = state.first_lr.expand(stop - start, *lr.shape[1:])
        return torch.where(rises.view(-1, *[1] * (lr.dim() - 1)), lr, highest)

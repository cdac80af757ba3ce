"""Epochs planned by an `EpochPlanner`: it observes committed steps and replans the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rhc.containers import length
from rhc.errors import InputError
from rhc.events import EpochPlanned, Intervened, Notice
from rhc.loop.fit import Fit
from rhc.loop.records import PER_EXAMPLE, validation_losses
from rhc.loop.state import Attempt, State
from rhc.schedule import CONTROLS, Schedule
from rhc.schedulers import EpochPlan, EpochPlanner
from rhc.storage.files import finite


def epoch_steps(
    planner: EpochPlanner | None,
    train_loader: Iterable[Any],
    accumulate: int,
    *,
    validated: bool,
    ahead: bool,
) -> int:
    """The steps of an epoch, once the planner fits the run; 0 without one."""
    if planner is None:
        return 0
    if planner.optimizer is not None:
        raise InputError(
            "planner steers its optimizer by itself, and so would the Runner; build it without "
            "one: EpochPlanner(…)"
        )
    if planner.needs_validation and not validated:
        raise InputError(
            "planner takes its rewards from a validation loss and there is no val_loader; give "
            "one, or EpochPlanner(reward=FreshSeeds(…)), or reward=TrainingTape()"
        )
    steps = planner.epoch_steps
    if steps is None:
        batches = length(train_loader)
        if batches is None:
            raise InputError(
                "train_loader does not say how many batches an epoch has; give "
                "EpochPlanner(epoch_steps=…)"
            )
        steps = max(1, batches // accumulate)
    if planner.samples and accumulate > 1:
        raise InputError(
            f"a LossSampler needs every batch to be a step, got accumulate={accumulate}; "
            "use 1, or larger batches"
        )
    if planner.samples and ahead:
        raise InputError(
            "windows are judged on training batches of the next epoch, which a LossSampler has "
            "not planned yet; give a val_loader, or rewrite=False"
        )
    return steps


def begin_planning(fit: Fit, lr: float) -> None:
    """Makes the planner's first plan, from the first lr and the optimizer's other controls."""
    if fit.planner is not None:
        own = fit.plant.controls.initial
        fit.planner.begin(lr, own.get("momentum"), own.get("noise", 0.0))


def announce_planning(fit: Fit) -> None:
    planner = fit.planner
    if planner is not None:
        values = ", ".join([*planner.steer, *(knob.name for knob in planner.knobs)])
        text = (
            f"epochs of {fit.data.epoch_steps} steps are planned in {values}; reward: "
            f"{planner.reward.source}"
        )
        fit.events.emit(Notice(text))


def epoch_end(fit: Fit, step: int) -> int:
    return (step // fit.data.epoch_steps + 1) * fit.data.epoch_steps


def plan_epochs(fit: Fit, attempt: Attempt, rows: list[dict[str, Any]]) -> None:
    """Passes committed steps to the planner, and the rest of the schedule to its new plan."""
    planner, trajectory, state = fit.planner, attempt.trajectory, fit.state
    assert planner is not None and planner.plan is not None and trajectory is not None
    before, reward = planner.plan, planner.reward_metric
    for row, metrics in zip(rows, trajectory.metrics, strict=False):
        planner.observe(
            math.nan if row["loss"] is None else row["loss"],
            row.get(reward) if reward else None,
            row["gradient_norm"],
            metrics.get(f"{PER_EXAMPLE}index"),
            metrics.get(f"{PER_EXAMPLE}loss"),
        )
    epoch = planner.state.epoch
    done = planner.read()
    for step, what in done:
        marks = rows[step - rows[0]["step"]].setdefault("planning", {"interventions": []})
        marks["interventions"].append(asdict(what))
    if state.step % fit.data.epoch_steps == 0:
        validated = fit.data.val_loader is not None and planner.needs_validation
        plan = planner.on_epoch_end(validation_losses(fit).loss if validated else None)
        last = rows[-1]
        own = [asdict(what) for what in plan.interventions]
        earlier = last.get("planning", {"interventions": []})["interventions"]
        last["planning"] = finite(
            {
                "epoch": asdict(planner.history[-1]),
                "plan": plan.values | {"mode": plan.mode},
                "interventions": earlier + own,
            }
        )
        done = [*done, *((state.step - 1, what) for what in plan.interventions)]
        fit.events.emit(EpochPlanned(state.step, epoch, last["planning"]["epoch"], asdict(plan)))
    for step, what in done:
        fit.events.notice(f"{what.kind}: {what.reason}")
        fit.events.emit(Intervened(step, epoch, what.kind, what.reason))
    _follow(state, before, planner.plan)


def _follow(state: State, before: EpochPlan, after: EpochPlan) -> None:
    moves = dict[str, Callable[[Tensor], Tensor]]()
    if state.step >= state.steps:
        return
    if after.lr != before.lr:
        ratio = after.lr / before.lr
        moves["lr"] = partial(_rescaled, "lr", ratio)
        state.first_lr = state.first_lr * ratio
    if after.momentum != before.momentum and after.momentum and before.momentum:
        ratio = CONTROLS["momentum"].ratio(after.momentum, before.momentum)
        moves["momentum"] = partial(_rescaled, "momentum", ratio)
    if after.noise != before.noise:
        moves["noise"] = partial(torch.full_like, fill_value=after.noise)

    def moved(held: Schedule) -> Schedule:
        values = {name: move(held[name]) for name, move in moves.items()}
        return Schedule({**held.values, **values}, held.start, held.seed)

    if moves:
        state.schedule = state.schedule.changed(state.step, moved)


def _rescaled(name: str, ratio: float, values: Tensor) -> Tensor:
    """Values moved by log(ratio) in the control's coordinate, within its bounds; 0 stays 0."""
    known = CONTROLS[name]
    moved = torch.as_tensor(known.rescale(values, ratio)).clamp(known.lower, known.upper)
    return torch.where(values == 0, values, moved)

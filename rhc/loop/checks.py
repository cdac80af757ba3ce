"""Checks of settings against the model, the optimizer and the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rhc.containers import spare
from rhc.data_weights import DataWeights
from rhc.distributed import Ranks
from rhc.errors import InputError
from rhc.hypergradient import check_steerable
from rhc.loop.agreement import loaders_of
from rhc.loop.fit import Fit
from rhc.schedule import CONTROLS, Schedule, control
from rhc.training.batches import StepBatches
from rhc.training.diagnostics import check_loader, explained
from rhc.training.loaders import pristine
from rhc.training.losses import checked_loss
from rhc.training.plant import Plant
from rhc.training.recovery import out_of_memory


def steered(plant: Plant, asked: Sequence[str] | None, usual: Sequence[str]) -> tuple[str, ...]:
    """The controls to rewrite: `asked`, or those of `usual` that can move."""
    initial = plant.controls.initial
    if asked is None:
        known = [name for name in usual if name in plant.controls.available]
        asked = [n for n in known if n != "momentum" or CONTROLS[n].lower <= initial[n]]
    controls = tuple(dict.fromkeys(asked))
    if not controls and plant.data_weights is None:
        raise InputError(
            f"controls is empty; name some of {', '.join(CONTROLS)}, or turn rewriting off"
        )
    check_steerable(plant, Schedule({n: torch.tensor([v]) for n, v in initial.items()}), controls)
    for name in controls:
        CONTROLS[name].check(initial[name])
    return controls


def check_course(weights: DataWeights | None, steps: int) -> None:
    if weights is not None and weights.course is not None and len(weights.course) < steps:
        raise InputError(
            f"the course of the data weights has {len(weights.course)} steps, fewer than the run's "
            f"{steps}; give data_weights.stretched({steps})"
        )


def checked_loaders(
    train_loader: Iterable[Any],
    val_loader: Iterable[Any] | None,
    test_loader: Iterable[Any] | None,
    validate_every: int | None,
    ranks: Ranks | None,
) -> tuple[Any, Any, Any]:
    """The three loaders of this process."""
    if train_loader is None:
        raise InputError("train_loader is missing; give one that yields batches")
    if validate_every is not None and val_loader is None:
        raise InputError(
            f"validate_every needs a val_loader, got {validate_every} and none; leave it out, or "
            "give both"
        )
    check_loader("train_loader", train_loader)
    check_loader("val_loader", val_loader)
    check_loader("test_loader", test_loader)
    if ranks is None:
        return train_loader, val_loader, test_loader
    train, val, test = loaders_of(ranks, train_loader, val_loader, test_loader)
    return train, val, test


def check_storable(model: nn.Module) -> None:
    """Raises InputError for dtypes that safetensors cannot hold."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.dtype == torch.complex128:
            raise InputError(
                f"{name!r} is of torch.complex128, which checkpoints cannot hold; use "
                "torch.complex64, or no directory"
            )


_left: WeakKeyDictionary[Optimizer, tuple[list[float], list[float]]] = WeakKeyDictionary()
"""Optimizer -> the lrs that a fit in this process found, and the lrs that it left."""

_LOW = 0.1
"""An lr is low below this share of what an earlier fit started at."""


def leave(plant: Plant) -> None:
    """Remembers at which lr a fit leaves its optimizer."""
    now = [float(group["lr"]) for group in plant.optimizer.param_groups]
    _left[plant.optimizer] = (list(plant.controls.own["lr"]), now)


def low_lr(plant: Plant, start: str) -> str | None:
    """A warning where lr is 0, or what an earlier fit left; InputError if a search starts at 0."""
    own = list(plant.controls.own["lr"])
    mend = "set it anew, by group['lr'] = … for every group of optimizer.param_groups"
    if not any(own):
        if start != "given":
            raise InputError(
                f"lr is 0 in every parameter group of the optimizer, and start={start!r} leaves a "
                f"group at 0 alone; {mend}"
            )
        return f"lr is 0 in every parameter group of the optimizer: nothing is learned; {mend}"
    before, left = _left.get(plant.optimizer, ([], []))
    if start == "given" and own == left and max(own) < _LOW * max(before):
        return (
            f"lr is {max(own):.3g}, where an earlier fit left the optimizer that it found at "
            f"{max(before):.3g}; {mend}, to begin there again"
        )
    return None


def grouped(plant: Plant, controls: Sequence[str], asked: Sequence[str]) -> tuple[str, ...]:
    names = (asked,) if isinstance(asked, str) else tuple(dict.fromkeys(asked))
    for name in names:
        control(name)
        if name == "noise":
            raise InputError("noise has no parameter groups; leave it out of per_group")
        if name not in controls:
            raise InputError(
                f"per_group names {name!r}, which is not rewritten; add it to controls, of which "
                f"there are now {', '.join(controls) or 'none'}"
            )
        for value in plant.controls.own[name]:
            if value != 0:  # a group at 0 stays there
                CONTROLS[name].check(value)
    return names


def followed(plant: Plant, schedule: Schedule, *, free: bool) -> Schedule:
    """The schedule to follow, checked. free: whether nothing else writes one."""
    if not free:
        raise InputError(
            "a schedule that is given is followed as it is: use it with rewrite=False, and "
            "without start, template, warmup and planner"
        )
    if schedule.start != 0:
        raise InputError(
            f"a schedule that is followed must start at step 0, got {schedule.start}; give a "
            "whole run's"
        )
    known = plant.controls.available
    for name in schedule.values:
        if name not in known:
            raise InputError(
                f"the schedule has {name}, which {type(plant.optimizer).__name__} has "
                f"not; leave it out of the schedule, which can have {', '.join(known)}"
            )
    plant.controls.check_groups(schedule.groups)
    return schedule


def try_first_batch(fit: Fit) -> None:
    """Raises InputError for an unusable loader or loss before anything is written."""

    # Separate streams: the run's own position is saved with the first checkpoint.
    def first(loader: Iterable[Any], name: str) -> Any:
        stream = StepBatches(loader, isolated=True, device=fit.data.train.device, name=name)
        with pristine(loader):
            batch = spare(next(stream.lazily(0, 1)))
            stream.close()
        return batch

    batches = {"train_loader": first(fit.data.train_loader, "train_loader")}
    if fit.data.validation is not None:
        assert fit.data.val_loader is not None
        batches["val_loader"] = first(fit.data.val_loader, "val_loader")
    for name, batch in batches.items():
        try:
            with fit.plant.evaluating() as model:
                checked_loss(fit.plant.loss_fn(model, batch))
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            if isinstance(error, InputError) or out_of_memory(error):
                raise
            where = f"at the first batch of {name}"
            raise InputError(explained(error, where, fit.plant.model, batch)) from error

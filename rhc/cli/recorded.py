"""Recorded runs as they were at step 0, to be rolled again: their batches are put on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from rhc.cli.building import (
    PlainRun,
    built_optimizer,
    built_plant,
    config_of,
    device_of,
    plain_run,
    planned_knobs,
    sizes_of,
)
from rhc.containers import copied, spare
from rhc.data_weights import Numbered, with_index
from rhc.errors import InputError
from rhc.hindsight.whole_run import DiskBatches
from rhc.rng import RandomState, preserved
from rhc.schedule import Schedule
from rhc.settings import TrainConfig
from rhc.settings.commands import Recorded
from rhc.storage.jsonl import read_rows
from rhc.storage.run_files import WEIGHTS, read_record
from rhc.training.batches import StepBatches
from rhc.training.losses import LossFn
from rhc.training.plant import Plant
from rhc.workload import Workload


@dataclass(frozen=True)
class RecordedRun:
    """batches: references, `accumulate` per step. judged: validation batches. losses: of the tape.
    numbered: whether batches have the indices of their rows."""

    plain: PlainRun
    workload: Workload
    optimizer: torch.optim.Optimizer
    device: torch.device
    batches: list[Any]
    judged: list[Any]
    schedule: Schedule
    losses: list[float]
    numbered: bool


@contextmanager
def recorded(
    config: Recorded,
    *,
    steps: int | None,
    judging: int,
    numbered: bool = False,
    weighed: bool = False,
) -> Iterator[RecordedRun]:
    """The run of a directory at step 0, its batches on disk. steps: the first ones; None for all.
    judging: validation batches at most. numbered: batches are `Numbered` where the loader knows
    the indices of rows. weighed: with the data weights that the run ended with, if any."""
    directory = config.directory
    record = read_record(directory)
    old = config_of(directory, trust=config.trust, data=config.data, device=config.device)
    if knobs := planned_knobs(old):
        raise InputError(
            f"directory {directory} is of a run that was planned in {knobs}, which its schedule "
            "does not hold; give a run that was planned in lr, momentum or noise alone"
        )
    schedule = Schedule.load(directory / "schedule.json")
    rows = read_rows(directory / "tape.jsonl")
    if not rows:
        raise InputError(f"directory {directory} has committed no step yet; resume the run first")
    steps = len(rows) if steps is None else steps
    if steps > len(rows):
        raise InputError(
            f"directory {directory} has {len(rows)} committed steps, got steps {steps}; give "
            f"--steps {len(rows)} or fewer"
        )
    settings = old.without_rewriting()
    if weighed and (weights := directory / WEIGHTS).is_file():
        settings = replace(settings, data_weights=str(weights))
    plain = plain_run(settings.checked(), sizes_of(directory))
    workload, device = plain.workload(), device_of(old.device)
    optimizer = built_optimizer(plain.config, workload)
    loader = with_index(workload.train_loader) if numbered else None
    if loader is not None:
        workload = replace(workload, train_loader=loader, loss_fn=_of_sample(workload.loss_fn))
    isolated = record.get("rewrite", False) is not False
    # Like Runner._begin: a rewriting run draws its batches from a separate stream.
    seed = int(torch.randint(2**31, ())) if isolated else 0
    stream = StepBatches(
        workload.train_loader,
        isolated=isolated,
        seed=seed,
        device=None if device.type == "cpu" else device,
    )
    judged: list[Any] = []
    if workload.val_loader is not None:
        with preserved():
            judged = list(islice(iter(workload.val_loader), judging))
    losses = [math.nan if r.get("loss") is None else float(r["loss"]) for r in rows[:steps]]
    with DiskBatches() as disk:
        references = _put_on_disk(disk, stream, plain.config, workload, optimizer, schedule, steps)
        yield RecordedRun(
            plain,
            workload,
            optimizer,
            device,
            references,
            judged,
            schedule.window(0, steps),
            losses,
            loader is not None,
        )


def _of_sample(loss_fn: LossFn) -> LossFn:
    """loss_fn of numbered batches, and of others."""

    def loss(model: torch.nn.Module, batch: Any) -> Any:
        return loss_fn(model, batch.sample if isinstance(batch, Numbered) else batch)

    return loss


def _put_on_disk(
    disk: DiskBatches,
    stream: StepBatches,
    config: TrainConfig,
    workload: Workload,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    steps: int,
) -> list[Any]:
    """References to the run's batches, `accumulate` of them per step. A model that draws is trained
    once more, since batches and dropout take turns on one random state."""
    plant = built_plant(config, workload, optimizer)
    n = config.accumulate
    if stream.isolated or not _draws(plant, workload):
        # Nothing else draws meanwhile, so that the order of drawing does not matter.
        after = RandomState.capture()
        references = [
            disk.put(number, batch) for number, batch in enumerate(stream.lazily(0, steps * n))
        ]
        if stream.isolated:
            after.restore()
        return references
    before, references = plant.snapshot(), []
    seen: list[tuple[Any, RandomState]] = []
    plain = plant.loss_fn

    def watched(model: torch.nn.Module, batch: Any) -> Any:
        seen.append((copied(batch), RandomState.capture()))
        return plain(model, batch)

    plant.loss_fn = watched
    steps_of = StepBatches(
        workload.train_loader, isolated=False, device=stream.device, accumulate=n
    )
    for step, batch in enumerate(steps_of.lazily(0, steps)):
        plant.step(batch, schedule.at(step), step)
        for micro, state in seen:
            references.append(disk.put(len(references), micro, state))
        seen.clear()
    plant.restore(before)
    return references


def _draws(plant: Plant, workload: Workload) -> bool:
    """Whether the loss draws from the global random state."""
    before = plant.snapshot()
    with preserved(), torch.no_grad():
        batch = spare(next(iter(workload.train_loader)))
        state = RandomState.capture()
        plant.loss(batch)
        drew = not RandomState.capture().same(state)
    plant.restore(before)
    return drew

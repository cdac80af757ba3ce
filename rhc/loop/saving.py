"""Saving and resuming: a checkpoint of everything that the next window depends on, and back."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from typing import Any

import torch

from rhc.batches import Position
from rhc.checkpoint import SHARDS, VALUES, Checkpoint
from rhc.distributed import part_of, placed_as, shared_as
from rhc.errors import InputError
from rhc.events import CheckpointSaved
from rhc.faults import Deviation, Relief
from rhc.files import NUMBER, check_kinds
from rhc.loop.course import Course
from rhc.loop.judge import JudgedOn
from rhc.loop.looking import LookbackMaker
from rhc.loop.records import Teller
from rhc.loop.state import AVERAGE_DECAY, Cost, Loop
from rhc.objective import Average
from rhc.planning import EpochPlanner, joined, parted
from rhc.plant import Plant
from rhc.rewrite import Twin
from rhc.run_directory import RunDirectory
from rhc.schedule import Schedule
from rhc.state import snapshot_from_tensors, snapshot_to_tensors, with_parts

_KINDS = {
    **dict.fromkeys(("optimizer", "cost"), (dict,)),
    **dict.fromkeys(("correction", "history", "relief", "deviation"), (dict, type(None))),
    **dict.fromkeys(("reference", "twin", "patience"), (list, type(None))),
    "average_count": (int,),
    "seconds": NUMBER,
    "singletons": (bool,),
}
"""Of values.json: what later steps would trip over."""


class Saving:
    """Brings the loop's state to the run's directory, and takes it over from there.

    make: of the lookback, where windows are rewritten.
    Writes in the loop: all of it, when it loads.
    """

    def __init__(
        self,
        plant: Plant,
        loop: Loop,
        directory: RunDirectory,
        course: Course,
        judged_on: JudgedOn,
        planner: EpochPlanner | None,
        make: LookbackMaker | None,
        teller: Teller,
    ) -> None:
        self.plant, self.loop, self.directory, self.course = plant, loop, directory, course
        self.judged_on, self.planner, self.make = judged_on, planner, make
        self.teller = teller

    def save(self) -> None:
        """Writes a checkpoint; the event says so, unless the disk did not take it."""
        path = self.directory.save(self._checkpoint(), self.loop.schedule)
        if path is not None:
            self.teller.emit(CheckpointSaved(self.loop.step, path))

    def load(self, checkpoint: Checkpoint) -> None:
        """The loop and the plant as they were saved. InputError where it is of another run."""
        try:
            self._load(checkpoint)
        except (
            *(LookupError, TypeError, ValueError, ArithmeticError, RuntimeError),
            *(AttributeError, AssertionError),
        ) as error:
            if isinstance(error, InputError):
                raise
            path = self.directory.checkpoints.path(checkpoint.step)
            raise InputError(
                f"{path} is no checkpoint of this run ({type(error).__name__}: {error}); "
                "start again in another --directory"
            ) from error

    def _checkpoint(self) -> Checkpoint:
        loop, plant = self.loop, self.plant
        tensors, rest = snapshot_to_tensors(plant.snapshot())
        tensors["schedule"] = dict(loop.schedule.values)
        average = zip(loop.average.values or [], plant.owned, strict=False)
        tensors["average"] = {str(i): placed_as(v, p) for i, (v, p) in enumerate(average)}
        tensors["train_batches"] = loop.train.position(loop.step).to_tensors()
        if loop.validation is not None:
            # A window that was cut short, or the last of a run that goes on, is followed by one
            # that is judged on the same batches.
            first, _ = self.judged_on.batches_at(loop.step)
            place = loop.validation.position(min(first, loop.validation.next_step))
            tensors["validation_batches"] = place.to_tensors()
        values: dict[str, Any] = {
            "optimizer": rest,
            "reference": loop.reference,
            "average_count": loop.average.count,
            "first_lr": loop.first_lr.tolist(),
            "correction": loop.correction,
            "twin": [loop.delta, loop.upwards],
            "patience": [loop.in_vain, loop.passed_over, loop.alert, loop.regime],
            "history": loop.history,
            "relief": loop.relief.to_json(),
            "deviation": loop.deviation and asdict(loop.deviation),
            "singletons": plant.singletons,
            "lookback": None if loop.lookback is None else loop.lookback.state(),
            "cost": asdict(loop.cost),
            "start_gradients": loop.start_gradients,
            "seconds": loop.seconds(),
        }
        if self.planner is not None:
            tensors["controller"], values["controller"] = parted(self.planner.state_dict())
        return Checkpoint(loop.step, tensors, values)

    def _load(self, checkpoint: Checkpoint) -> None:
        loop, plant = self.loop, self.plant
        tensors, values = checkpoint.tensors, checkpoint.values
        path = self.directory.checkpoints.path(checkpoint.step) / VALUES
        check_kinds(values, _KINDS, path)
        check_kinds(values["cost"], dict.fromkeys(values["cost"], NUMBER), path)
        if checkpoint.shards:
            folder = self.directory.checkpoints.path(checkpoint.step) / SHARDS
            tensors = with_parts(plant, tensors, folder)
        snapshot = snapshot_from_tensors(plant, tensors, values["optimizer"])
        if self.planner is not None:  # before the loader is asked for this epoch's order again
            state = joined(tensors.get("controller", {}), values["controller"])
            self.planner.load_state_dict(state, place=False)
        place = Position.from_tensors(tensors["train_batches"])
        if place.step != checkpoint.step:
            raise ValueError(f"batches of step {place.step} at step {checkpoint.step}")
        loop.train.seek(place)
        if loop.validation is not None:
            loop.validation.seek(Position.from_tensors(tensors["validation_batches"]))
        plant.singletons = bool(values["singletons"])
        loop.relief = Relief(**values.get("relief", {}))
        deviation = values.get("deviation")
        if deviation is not None:
            loop.deviation = Deviation(deviation["largest"], tuple(deviation["operators"]))
        if self.make is not None and values.get("lookback") is not None:
            loop.lookback = self.make.resumed(loop.relief, values["lookback"])
        loop.step = checkpoint.step
        # safetensors gives names back in any order, and the tape's lines keep the schedule's.
        values_by_name = {name: tensors["schedule"][name] for name in loop.schedule.values}
        known = Schedule(values_by_name, 0, self.course.seed)
        owned = plant.owned
        average = [
            part_of(shared_as(tensors["average"][str(i)], owned[i]))
            for i in range(len(tensors["average"]))
        ]
        device = plant.parameters[0].device
        loop.average = Average(
            AVERAGE_DECAY,
            [v.to(device) for v in average] or None,
            int(values["average_count"]),
        )
        loop.first_lr = torch.tensor(
            values.get("first_lr", self.course.own()["lr"]), dtype=torch.float64
        )
        loop.correction = {
            name: tuple(shift) if isinstance(shift, list) else shift
            for name, shift in values.get("correction", {}).items()
        }
        loop.schedule = self.course.lengthened(known, loop)
        loop.delta, loop.upwards = values.get("twin", (Twin.first, None))
        patience = values.get("patience", (0, 0, False, 0))
        loop.in_vain, loop.passed_over, loop.alert, loop.regime = patience
        loop.history = values.get("history", {})
        reference = values["reference"]
        loop.reference = None if reference is None else (reference[0], reference[1])
        loop.cost = Cost(**values["cost"])
        loop.seconds_before = float(values["seconds"])
        if "start_gradients" in values:
            loop.start_gradients = float(values["start_gradients"])
        elif loop.step:  # of a run before checkpoints had it
            with contextlib.suppress(InputError):
                tried = self.directory.starts.read()
                loop.start_gradients = sum(record["gradients"] for record in tried)
        for mean, live in zip(loop.average.values or [], plant.parameters, strict=bool(average)):
            if mean.shape != live.shape:
                raise ValueError(f"an average of shape {tuple(mean.shape)} for {tuple(live.shape)}")
        plant.restore(snapshot)  # now that nothing can fail any more
        loop.tape = self.directory.tape.read()
        loop.windows = self.directory.windows.read()

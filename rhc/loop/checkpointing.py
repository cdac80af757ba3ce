"""Saving and resuming: a checkpoint of everything that the next window depends on, and back."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict
from typing import Any

import torch

from rhc.distributed import local_part, placed_as, shared_as
from rhc.errors import InputError
from rhc.events import CheckpointSaved
from rhc.loop.base_schedule import Course
from rhc.loop.records import Teller
from rhc.loop.reverse_passes import ReversePassMaker
from rhc.loop.state import AVERAGE_DECAY, Cost, Loop
from rhc.loop.update_rule import Twin
from rhc.loop.window_objective import JudgedOn
from rhc.schedule import Schedule
from rhc.schedule.planned import Piece, PlannedSchedule
from rhc.schedulers import EpochPlanner, joined, parted
from rhc.storage.checkpoint import SHARDS, VALUES, Checkpoint
from rhc.storage.files import NUMBER, check_kinds
from rhc.storage.run_directory import RunDirectory
from rhc.training.batches import DrawnAsNeeded, MicroBatches, Position
from rhc.training.objective import Average
from rhc.training.plant import Plant
from rhc.training.recovery import Deviation, OomFallback
from rhc.training.snapshot import (
    adopt,
    places,
    snapshot_from_tensors,
    snapshot_to_tensors,
    with_parts,
)

HERE, ELSEWHERE = 1e-4, 1e-2
"""Relative difference of a loss that tells other code: on the machine and by the versions that the
run had, where it has the same bits but for the kernels, and on others."""

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

    make: of the reverse_pass, where windows are rewritten.
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
        make: ReversePassMaker | None,
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

    def load(self, checkpoint: Checkpoint) -> list[str]:
        """The loop and the plant as they were saved; what in code or data is not as it was then.

        The first step after the checkpoint before it is looked at once more: its loss is on the
        tape, so that nothing had to be kept for this. InputError where it is of another run.
        """
        said: list[str] = []
        with contextlib.suppress(InputError):  # which is raised once more if it stands in the way
            said = self._loss_again(self.directory.earlier(checkpoint.step))
        self._taken_over(checkpoint)
        streams = (self.loop.train, self.loop.validation)
        data = [s.differs for s in streams if s is not None and s.differs is not None]
        return [*self.directory.differences, *(data or said)]

    def _loss_again(self, earlier: Checkpoint | None) -> list[str]:
        """How the loss of the step after a checkpoint differs from the tape's, if it does."""
        if earlier is None:
            return []
        step, tolerance = earlier.step, ELSEWHERE if self.directory.elsewhere else HERE
        found = self._loss_after(earlier)
        tape = self.loop.tape
        told = tape[step]["loss"] if step < len(tape) and tape[step]["step"] == step else None
        if told is None:
            return []
        # A loss that is all but zero is what rounding left of the first one.
        least = 1e-6 * abs(tape[0]["loss"] or 0.0)
        if math.isclose(found, told, rel_tol=tolerance, abs_tol=least) or self.loop.train.differs:
            return []
        again = self._loss_after(earlier)
        if math.isclose(found, again, rel_tol=tolerance, abs_tol=least):
            return [f"the loss of step {step} was {told:.6g}, is {found:.6g}"]
        return [
            f"the loss of step {step} was {told:.6g}, is {found:.6g} and then {again:.6g}: the "
            "model or loss_fn has a generator or a counter of its own, which no checkpoint holds"
        ]

    def _loss_after(self, checkpoint: Checkpoint) -> float:
        """The loss of the first step after a checkpoint, without the step."""
        self._taken_over(checkpoint)
        step, stream, plant = checkpoint.step, self.loop.train, self.plant
        batch = next(stream.lazily(step, step + 1))
        several = isinstance(batch, (MicroBatches, DrawnAsNeeded))
        losses = [plant.loss(b)[0].detach() for b in (batch if several else [batch])]
        plant.parallel.settle()
        return plant.value(torch.stack(losses).mean())

    def _taken_over(self, checkpoint: Checkpoint) -> None:
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
        tensors, rest = snapshot_to_tensors(plant, plant.snapshot())
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
            "plan": loop.schedule.to_json(loop.step) if self._replans else None,
            "twin": [loop.delta, loop.upwards],
            "patience": [loop.in_vain, loop.passed_over, loop.alert, loop.regime],
            "history": loop.history,
            "relief": loop.relief.to_json(),
            "deviation": loop.deviation and asdict(loop.deviation),
            "singletons": plant.singletons,
            "lookback": None if loop.reverse_pass is None else loop.reverse_pass.state(),
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
        rest = values["optimizer"]
        if checkpoint.shards:
            folder = self.directory.checkpoints.path(checkpoint.step) / SHARDS
            tensors = with_parts(plant, tensors, rest, folder)
        snapshot = snapshot_from_tensors(plant, tensors, rest)
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
        loop.relief = OomFallback.from_json(values.get("relief", {}))
        deviation = values.get("deviation")
        if deviation is not None:
            loop.deviation = Deviation(deviation["largest"], tuple(deviation["operators"]))
        if self.make is not None and values.get("lookback") is not None:
            loop.reverse_pass = self.make.resumed(loop.relief, values["lookback"])
        loop.step = checkpoint.step
        owned = plant.owned
        average = [
            local_part(shared_as(tensors["average"][str(place)], p))
            for place, p in zip(places(plant, rest), owned, strict=True)
            if tensors["average"]
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
        loop.schedule = self.course.lengthened(self._plan(checkpoint), loop)
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
        adopt(plant, tensors, rest, snapshot)  # now that nothing can fail any more
        loop.tape = self.directory.tape.read()
        loop.windows = self.directory.windows.read()

    @property
    def _replans(self) -> bool:
        """Whether the plan can become another than what the run began with."""
        return self.make is not None or self.planner is not None

    def _plan(self, checkpoint: Checkpoint) -> PlannedSchedule | None:
        """The plan as it was saved; None where it is what the run began with."""
        if not self._replans:
            return None
        if "plan" in checkpoint.values:
            source = str(self.directory.checkpoints.path(checkpoint.step))
            return PlannedSchedule.from_json(checkpoint.values["plan"], source)[0]
        # Of a version that kept a value for every step. safetensors gives names back in any order,
        # and the tape's lines keep the schedule's.
        kept = checkpoint.tensors["schedule"]
        values = {name: kept[name] for name in self.loop.schedule.names}
        whole = Schedule(values, 0, self.course.seed)
        return PlannedSchedule((Piece(0, whole),), len(whole))

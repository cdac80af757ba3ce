"""Saving and resuming: a checkpoint holds everything that the next window depends on."""

from __future__ import annotations

import contextlib
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch

from rhc.distributed import local_part, placed_as, shared_as
from rhc.distributed.directory import directory_of
from rhc.errors import InputError, RunWarning
from rhc.events import CheckpointSaved
from rhc.loop.agreement import agreed
from rhc.loop.best import Best
from rhc.loop.checks import check_storable
from rhc.loop.data_weights import learned
from rhc.loop.fit import Data, Fit
from rhc.loop.records import final_result
from rhc.loop.state import AVERAGE_DECAY, AntitheticSearch, Cost, Patience, Replay
from rhc.loop.window_objective import judged_on
from rhc.schedule import Schedule
from rhc.schedule.planned import Piece, PlannedSchedule
from rhc.schedulers import joined, parted
from rhc.settings import TrainConfig
from rhc.storage.checkpoint import SHARDS, VALUES, Checkpoint
from rhc.storage.files import NUMBER, check_kinds
from rhc.storage.run_directory import RunDirectory
from rhc.storage.run_files import PASSES, WEIGHTS
from rhc.training import interrupts
from rhc.training.batches import Position, micro_batches
from rhc.training.objective import Average
from rhc.training.plant import Plant
from rhc.training.recovery import OomFallback
from rhc.training.snapshot import (
    Snapshot,
    adopt,
    places,
    snapshot_from_tensors,
    snapshot_to_tensors,
    with_parts,
)

HERE, ELSEWHERE = 1e-4, 1e-2
"""Relative difference of a loss that indicates changed code: on the same machine and versions,
where only kernels may differ, and elsewhere."""

SHOWN = 4
"""Differences from the resumed run that a warning mentions."""

_KINDS = {
    **dict.fromkeys(("optimizer", "cost"), (dict,)),
    **dict.fromkeys(
        ("correction", "relief", "deviation", "replay", "chosen_start", "best"), (dict, type(None))
    ),
    **dict.fromkeys(("reference", "twin", "patience", "notices", "skipped"), (list, type(None))),
    "average_count": (int,),
    "seconds": NUMBER,
    "singletons": (bool,),
}
"""Types of those entries of values.json on which later steps would fail."""


def run_directory(
    directory: str | Path | None, keep: int, notice: Callable[[str], None], plant: Plant
) -> RunDirectory | None:
    """The run's directory, open to nobody yet; None for a run in memory. keep: checkpoints."""
    if directory is None:
        return None
    check_storable(plant.model)
    known = TrainConfig.known().items()
    may_change = {n: text for n, s in known if (text := s.setting.on_resume) is not None}
    opened = directory_of(Path(directory), keep, notice, may_change, plant.ranks)
    size = sum(p.nbytes for p in plant.model.parameters())
    opened.checkpoints.most_bytes = 2**30 + 64 * size
    return opened


# Save ---------------------------------------------------------------------------------------------


def save(fit: Fit) -> None:
    """Saves a committed window once ranks agree on it; raises what a signal asked for."""
    stop = fit.plant.ranks is not None and agreed(fit)
    write_checkpoint(fit)
    interrupts.check()
    if stop:
        raise KeyboardInterrupt


def write_checkpoint(fit: Fit) -> None:
    """Writes a checkpoint and emits an event, if there is a directory and its disk accepts it."""
    if fit.directory is not None:
        path = fit.directory.save(_checkpoint(fit), fit.state.schedule)
        if path is not None:
            fit.events.emit(CheckpointSaved(fit.state.step, path))


def _checkpoint(fit: Fit) -> Checkpoint:
    state, plant, validation = fit.state, fit.plant, fit.data.validation
    tensors, rest = snapshot_to_tensors(plant, plant.snapshot())
    average = zip(state.average.values or [], plant.owned, strict=False)
    tensors["average"] = {str(i): placed_as(v, p) for i, (v, p) in enumerate(average)}
    tensors["train_batches"] = fit.data.train.position(state.step).to_tensors()
    if validation is not None:
        # After a window that was cut short, and after the last of a run that goes on, the next
        # window is judged on the same batches.
        first, _ = judged_on(fit, state.step)
        place = validation.position(min(first, validation.next_step))
        tensors["validation_batches"] = place.to_tensors()
    reverse_pass = state.reverse_pass
    values: dict[str, Any] = {
        "optimizer": rest,
        "reference": state.reference,
        "average_count": state.average.count,
        "first_lr": state.first_lr.tolist(),
        "correction": state.correction,
        "plan": state.schedule.to_json(state.step) if _replans(fit) else None,
        "twin": astuple(state.antithetic),
        "patience": astuple(state.patience),
        "history": {},  # of update rules that no longer exist
        "relief": state.fallback.to_json(),
        "replay": state.replay and asdict(state.replay),
        "notices": fit.events.told,
        "chosen_start": state.chosen_start,
        "skipped": state.skipped,
        "singletons": plant.singletons,
        "lookback": None if reverse_pass is None else reverse_pass.state(),
        "cost": asdict(state.cost),
        "start_gradients": state.start_gradients,
        "seconds": state.seconds(),
        "best": state.best and state.best.to_json(),
    }
    if state.evidence is not None and plant.data_weights is not None:
        tensors["data_weights"] = {"raw": plant.data_weights.raw, **state.evidence.to_tensors()}
    if fit.planner is not None:
        tensors["controller"], values["controller"] = parted(fit.planner.state_dict())
    return Checkpoint(state.step, tensors, values)


def _replans(fit: Fit) -> bool:
    """Whether the plan can differ from the one at step 0."""
    return fit.rewrites or fit.planner is not None


def finish(fit: Fit) -> None:
    """Evaluates the final and the averaged weights and writes the result, once."""
    state, directory = fit.state, fit.directory
    if state.result is not None:
        return
    if directory is not None and directory.saved != state.steps:
        write_checkpoint(fit)  # an earlier attempt failed
    for stream in (fit.data.train, fit.data.validation):
        if stream is not None:
            stream.close()  # its loader is iterated anew
    state.result = final_result(fit)
    if directory is not None:
        _save_weights(fit, directory)
        directory.finish(state.committed(), state.result)
        if fit.plant.ranks is None or fit.plant.ranks.first:
            shutil.rmtree(directory.path / PASSES, ignore_errors=True)


def _save_weights(fit: Fit, directory: RunDirectory) -> None:
    weights, ranks, evidence = learned(fit.plant, fit.state), fit.plant.ranks, fit.state.evidence
    if weights is not None and (ranks is None or ranks.first):
        weights.save(directory.path / WEIGHTS, None if evidence is None else evidence.by_cell())


# Resume -------------------------------------------------------------------------------------------


def open_run(
    fit: Fit, directory: RunDirectory, checkpoint: Checkpoint | None, prior_cost: float
) -> None:
    """Resumes a run, or writes its first checkpoint. prior_cost: evaluations of its schedule."""
    state = fit.state
    if checkpoint is None:
        state.cost.gradients(prior_cost)
        state.start_gradients = prior_cost
        if state.evidence is None:  # for a replay that outlives what it follows
            _save_weights(fit, directory)
        write_checkpoint(fit)
        return
    differs = _resume(fit, directory, checkpoint)
    state.passes = directory.passes.read() if state.step else []
    if state.step == state.steps:
        state.result = directory.result()
        if state.result and state.result.get("ends_with") == "best" and state.best is not None:
            state.best.put(fit.plant)
    if fit.plant.ranks is None or fit.plant.ranks.first:
        _tell_of(fit, directory.path, differs)


def _tell_of(fit: Fit, path: Path, differs: list[str]) -> None:
    """Reports how a resumed run differs from before, and whether it is finished."""
    finished = fit.state.result is not None
    goes_on = (
        "it is finished: nothing was trained, and its result is returned"
        if finished
        else f"it goes on from step {fit.state.step} with what it is given now"
    )
    if differs:
        more = f"; and {len(differs) - SHOWN} more" if len(differs) > SHOWN else ""
        fit.events.warn(
            f"{path} holds a run of other code or data ({'; '.join(differs[:SHOWN])}{more}); "
            f"{goes_on}. Give what it began with, or another directory for a new run; a "
            "sampler, dataset or loader with a state of its own needs state_dict and "
            "load_state_dict, as for torchdata's StatefulDataLoader, and no persistent_workers"
        )
    elif finished:
        warnings.warn(
            f"{path} holds this run, and {goes_on}; give more steps to train on, or another "
            "directory for a new run",
            RunWarning,
            stacklevel=2,
        )


def _resume(fit: Fit, directory: RunDirectory, checkpoint: Checkpoint) -> list[str]:
    """Loads state and plant; returns how code or data differ from before, by the loss of an earlier
    step. InputError where the checkpoint is of another run."""
    said: list[str] = []
    with contextlib.suppress(InputError):  # raised again below if it matters
        earlier = directory.earlier(checkpoint.step)
        said = [] if earlier is None else _loss_differs(fit, directory, earlier)
    _take_over(fit, directory, checkpoint)
    streams = (fit.data.train, fit.data.validation)
    data = [s.differs for s in streams if s is not None and s.differs is not None]
    return [*directory.differences, *(data or said)]


def _loss_differs(fit: Fit, directory: RunDirectory, earlier: Checkpoint) -> list[str]:
    """How the loss of the step after a checkpoint differs from the tape's."""
    if fit.state.evidence is not None:  # the step had the weights that its window was rewritten to
        return []
    step, tolerance = earlier.step, ELSEWHERE if directory.elsewhere else HERE
    found = _loss_after(fit, directory, earlier)
    tape = fit.state.tape
    told = tape[step]["loss"] if step < len(tape) and tape[step]["step"] == step else None
    if told is None:
        return []
    # A loss near zero is mostly rounding of the first one.
    least = 1e-6 * abs(tape[0]["loss"] or 0.0)
    if math.isclose(found, told, rel_tol=tolerance, abs_tol=least) or fit.data.train.differs:
        return []
    again = _loss_after(fit, directory, earlier)
    if math.isclose(found, again, rel_tol=tolerance, abs_tol=least):
        return [f"the loss of step {step} was {told:.6g}, is {found:.6g}"]
    return [
        f"the loss of step {step} was {told:.6g}, is {found:.6g} and then {again:.6g}: the "
        "model or loss_fn has a generator or a counter of its own, which no checkpoint holds"
    ]


def _loss_after(fit: Fit, directory: RunDirectory, checkpoint: Checkpoint) -> float:
    """The loss of the first step after a checkpoint; the step is not taken."""
    _take_over(fit, directory, checkpoint)
    step, plant = checkpoint.step, fit.plant
    batch = next(fit.data.train.lazily(step, step + 1))
    weighed = micro_batches(plant.weighed(batch, step))
    losses = [plant.loss(micro)[0].detach() for micro in weighed]
    plant.parallel.settle()
    return plant.value(torch.stack(losses).mean())


def _take_over(fit: Fit, directory: RunDirectory, checkpoint: Checkpoint) -> None:
    """Loads a checkpoint into state, plant and streams; InputError where it is of another run."""
    try:
        _load(fit, directory, checkpoint)
    except (
        *(LookupError, TypeError, ValueError, ArithmeticError, RuntimeError),
        *(AttributeError, AssertionError),
    ) as error:
        if isinstance(error, InputError):
            raise
        path = directory.checkpoints.path(checkpoint.step)
        raise InputError(
            f"{path} is no checkpoint of this run ({type(error).__name__}: {error}); "
            "start again in another --directory"
        ) from error


def _load(fit: Fit, directory: RunDirectory, checkpoint: Checkpoint) -> None:
    state, plant, data = fit.state, fit.plant, fit.data
    tensors, values = checkpoint.tensors, checkpoint.values
    folder = directory.checkpoints.path(checkpoint.step)
    check_kinds(values, _KINDS, folder / VALUES)
    check_kinds(values["cost"], dict.fromkeys(values["cost"], NUMBER), folder / VALUES)
    rest = values["optimizer"]
    if checkpoint.shards:
        tensors = with_parts(plant, tensors, rest, folder / SHARDS)
    snapshot = snapshot_from_tensors(plant, tensors, rest)
    if fit.planner is not None:  # before the loader is asked for this epoch's order
        planned = joined(tensors.get("controller", {}), values["controller"])
        fit.planner.load_state_dict(planned, place=False)
    _seek(data, checkpoint)
    if state.evidence is not None and plant.data_weights is not None:
        state.evidence.load(tensors["data_weights"])
        plant.data_weights.adopt(tensors["data_weights"]["raw"])
    plant.singletons = bool(values["singletons"])
    state.fallback = OomFallback.from_json(values.get("relief", {}))
    state.replay = _replay(values, checkpoint.step)
    fit.events.told[:] = values.get("notices") or []
    state.chosen_start = values.get("chosen_start")
    state.skipped = values.get("skipped") or []
    if fit.reverse_passes is not None and values.get("lookback") is not None:
        state.reverse_pass = fit.reverse_passes.make(state.fallback, values["lookback"])
    state.step = checkpoint.step
    average = [
        local_part(shared_as(tensors["average"][str(place)], p))
        for place, p in zip(places(plant, rest), plant.owned, strict=True)
        if tensors["average"]
    ]
    for mean, live in zip(average, plant.parameters, strict=bool(average)):
        if mean.shape != live.shape:
            raise ValueError(f"an average of shape {tuple(mean.shape)} for {tuple(live.shape)}")
    moved = [v.to(plant.parameters[0].device) for v in average]
    state.average = Average(AVERAGE_DECAY, moved or None, int(values["average_count"]))
    first_lr = values.get("first_lr", fit.base.own()["lr"])
    state.first_lr = torch.tensor(first_lr, dtype=torch.float64)
    state.correction = {
        name: tuple(shift) if isinstance(shift, list) else shift
        for name, shift in values.get("correction", {}).items()
    }
    state.schedule = fit.base.lengthened(_plan(fit, checkpoint, str(folder)), state)
    state.antithetic = AntitheticSearch(*values.get("twin", ()))
    state.patience = Patience(*values.get("patience", ()))
    reference = values["reference"]
    state.reference = None if reference is None else (reference[0], reference[1])
    state.cost = Cost(**values["cost"])
    state.seconds_before = float(values["seconds"])
    if "start_gradients" in values:
        state.start_gradients = float(values["start_gradients"])
    elif state.step:  # a run of an older version
        with contextlib.suppress(InputError):
            tried = directory.starts.read()
            state.start_gradients = sum(record["gradients"] for record in tried)
    state.best = _best(fit, directory, checkpoint, snapshot)
    adopt(plant, tensors, rest, snapshot)  # last, when nothing can fail any more
    state.tape = directory.tape.read()
    state.windows = directory.windows.read()
    with contextlib.suppress(InputError):  # told when the run was opened
        state.starts = directory.starts.read()


def stand_at(fit: Fit, checkpoint: Checkpoint) -> None:
    """Brings plant and streams alone to a checkpoint of a roll of this run, without parts."""
    tensors, rest = checkpoint.tensors, checkpoint.values["optimizer"]
    snapshot = snapshot_from_tensors(fit.plant, tensors, rest)
    _seek(fit.data, checkpoint)
    fit.plant.singletons = bool(checkpoint.values["singletons"])
    adopt(fit.plant, tensors, rest, snapshot)


def _seek(data: Data, checkpoint: Checkpoint) -> None:
    place = Position.from_tensors(checkpoint.tensors["train_batches"])
    if place.step != checkpoint.step:
        raise ValueError(f"batches of step {place.step} at step {checkpoint.step}")
    data.train.seek(place)
    if data.validation is not None:
        data.validation.seek(Position.from_tensors(checkpoint.tensors["validation_batches"]))


def _best(fit: Fit, directory: RunDirectory, checkpoint: Checkpoint, here: Snapshot) -> Best | None:
    """The best validated state until the checkpoint. here: the checkpoint's own state."""
    known = checkpoint.values.get("best")
    if known is None:
        return None
    step = int(known["step"])
    if step != checkpoint.step:
        found = directory.best(step)
        if found is None:
            fit.events.notice(f"the best validated state, of step {step}, is lost")
            return None
        tensors, rest = found.tensors, found.values["optimizer"]
        if found.shards:
            tensors = with_parts(fit.plant, tensors, rest, directory.checkpoints.best / SHARDS)
        here = snapshot_from_tensors(fit.plant, tensors, rest)
    loss, metrics = float(known["loss"]), dict(known["metrics"])
    return Best(step, loss, metrics, here.parameters, here.buffers)


def _replay(values: Mapping[str, Any], step: int) -> Replay | None:
    """What the run found of its replay; older ones kept only how far a first step differed."""
    found = values.get("replay")
    older = values.get("deviation")
    if found is None and older is not None:
        found = {**older, "equal": False, "start": 0, "stop": step, "what": "the loss"}
    return None if found is None else Replay(**found | {"operators": tuple(found["operators"])})


def _plan(fit: Fit, checkpoint: Checkpoint, source: str) -> PlannedSchedule | None:
    """The saved plan; None where it equals the one at step 0."""
    if not _replans(fit):
        return None
    if "plan" in checkpoint.values:
        return PlannedSchedule.from_json(checkpoint.values["plan"], source)[0]
    # Older versions kept a value per step. safetensors returns names in any order; the tape has the
    # schedule's.
    kept = checkpoint.tensors["schedule"]
    values = {name: kept[name] for name in fit.state.schedule.names}
    whole = Schedule(values, 0, fit.base.seed)
    return PlannedSchedule((Piece(0, whole),), len(whole))

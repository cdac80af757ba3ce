"""What is told and written of the loop: events, the tape's rows, the lines of windows.jsonl, losses
of whole loaders and the result at the end."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from rhc.distributed import Ranks
from rhc.errors import RunWarning
from rhc.events import Event, Listener, Notice, Verb, VerbStarted, WindowAttempted
from rhc.loop.state import Attempt, Cost, Loop
from rhc.rng import preserved
from rhc.storage.files import finite
from rhc.storage.run_directory import RunDirectory
from rhc.training import interrupts as stopping
from rhc.training.evaluate import TRAIN_BATCHES, UNSIZED_BATCHES, Losses, at_average, evaluate
from rhc.training.loaders import loader_preserved
from rhc.training.plant import Plant

PER_EXAMPLE = "example_"
"""Metrics that begin so have a value per example: they are a LossSampler's, and not of the tape."""


class Teller:
    """Tells the listeners what happens.

    aloud: whether what is told is a warning where nobody listens; of several ranks one is enough.
    """

    def __init__(self, listeners: Sequence[Listener], *, aloud: bool = True) -> None:
        self.listeners, self.aloud = listeners, aloud

    def emit(self, event: Event) -> None:
        """Tells every listener of it."""
        for listener in self.listeners:
            listener(event)

    def notice(self, message: str) -> None:
        """Tells what happens, in words."""
        self.emit(Notice(message))

    def tell(self, message: str) -> None:
        """Tells what a person should know: as a warning, where nobody listens."""
        if self.aloud and not self.listeners:
            warnings.warn(message, RunWarning, stacklevel=2)
        self.notice(message)

    def warn(self, message: str) -> None:
        """Tells what a person must not miss, also where nobody listens."""
        self.notice(message)
        warnings.warn(message, RunWarning, stacklevel=2)


class Chronicle(Teller):
    """Tells what happens to the loop's windows, and keeps what became of every attempt: in the
    loop's state, in the run's directory. Between verbs it looks whether the run is to stop.

    Writes in the loop: windows.
    """

    def __init__(
        self,
        listeners: Sequence[Listener],
        loop: Loop,
        directory: RunDirectory | None,
        ranks: Ranks | None,
    ) -> None:
        super().__init__(listeners, aloud=ranks is None or ranks.first)
        self.loop, self.directory, self.ranks = loop, directory, ranks

    def verb(self, verb: Verb, start: int, stop: int, attempt: int) -> None:
        """Says what comes next. Raises what a signal meant, but where a window is done: that is
        saved first."""
        if verb not in ("commit", "slide"):
            self.check_stop()
        self.emit(VerbStarted(verb, self.loop.cost.windows, start, stop, attempt))

    def check_stop(self) -> None:
        """Raises what a signal meant. Ranks stop together, when a window is done."""
        if self.ranks is None:
            stopping.check()

    def record(
        self, attempt: Attempt, outcome: str, reason: str | None, rolled: Attempt | None = None
    ) -> None:
        """One line of windows.jsonl: an attempt at a window, and what became of it.

        rolled: what it was compared with.
        """
        record = _line(self.loop.cost.windows, attempt, outcome, reason, rolled)
        self.loop.windows.append(record)
        if self.directory is not None:
            self.directory.windows.append([record])  # on the disk with the next save
        self.emit(WindowAttempted(record))


# The tape -----------------------------------------------------------------------------------------


def tape_rows(attempt: Attempt, commit: int) -> list[dict[str, Any]]:
    """The tape's lines of the attempt's steps up to `commit`."""
    trajectory = attempt.trajectory
    assert trajectory is not None
    n = commit - attempt.schedule.start
    losses = finite(torch.stack(trajectory.losses[:n]).double().tolist())
    norms = finite(_numbers(trajectory.gradient_norms[:n]))
    controls = {name: values[:n].tolist() for name, values in attempt.schedule.values.items()}
    rows = []
    for i in range(n):
        row: dict[str, Any] = {
            "step": attempt.schedule.start + i,
            "loss": losses[i],
            "gradient_norm": norms[i],
        }
        for name, values in controls.items():
            row[name] = values[i]
        for name, value in trajectory.metrics[i].items():
            # A metric called "loss" or "lr" does not take the place of the loop's own.
            if name not in row and not name.startswith(PER_EXAMPLE):
                row[name] = finite(_number(value))  # as it will be read back
        rows.append(row)
    return rows


def _numbers(values: Sequence[float | Tensor]) -> list[float]:
    """The values on the host, which waits once for all that are tensors."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    moved = iter(torch.stack(tensors).double().tolist() if tensors else [])
    return [next(moved) if isinstance(v, Tensor) else v for v in values]


def _number(value: Tensor) -> float | list[Any]:
    if value.numel() == 1:
        return float(value)
    return (value.long() if value.dtype == torch.bool else value).tolist()


# Attempts at windows ------------------------------------------------------------------------------


def _line(
    window: int, attempt: Attempt, outcome: str, reason: str | None, rolled: Attempt | None
) -> dict[str, Any]:
    schedule = attempt.schedule
    h = None if rolled is None else rolled.hypergradient
    look = (rolled or attempt).first_look
    predicted = None if attempt.proposal is None else attempt.proposal.predicted
    measured = None if rolled is None else attempt.value - rolled.value
    record: dict[str, Any] = {
        "window": window,
        "start": schedule.start,
        "stop": schedule.stop,
        "attempt": attempt.number,
        "outcome": outcome,
        "reason": reason,
        "objective_before": attempt.value if rolled is None else rolled.value,
        "objective_after": None if rolled is None else attempt.value,
        "predicted_change": predicted,
        "measured_change": measured,
        "smoothness": smoothness(measured, predicted),
        "outcome_of_hypergradient": None if look is None else look.name,
        "outcome_step": None if look is None else look.step,
        "before": (rolled or attempt).schedule.means(),
        "after": schedule.means(),
    }
    if h is not None:
        record |= {
            "hypergradient": {name: g.tolist() for name, g in h.grad.items()},
            "costate_norms": h.costate_norms.tolist(),
            "product": h.product,
            "segment": h.segment,
            "check": h.check,
        }
    return finite(record)  # as it will be read back


def smoothness(measured: float | None, predicted: float | None) -> float | None:
    """Measured change of J over the first-order prediction: 1 where the linear model holds.

    Below 0 the objective rose where it should have fallen. None where there is no such ratio.
    """
    if measured is None or not predicted or not math.isfinite(measured + predicted):
        return None
    return measured / predicted


# Evaluation ---------------------------------------------------------------------------------------


class Validation:
    """The validation loader, evaluated between windows."""

    def __init__(self, plant: Plant, loader: Iterable[Any]) -> None:
        self.plant, self.loader = plant, loader
        self._batches: float | None = None

    def losses(self, cost: Cost) -> Losses:
        """The mean loss and metrics of the live weights; a batch costs a third of a gradient."""
        found = evaluate(self.plant, self.loader)
        assert found is not None
        cost.gradient_equivalents += self._size() / 3
        return found

    def _size(self) -> float:
        """The batches of the loader, once counted."""
        if self._batches is None:
            try:
                self._batches = float(len(self.loader))  # type: ignore[arg-type]
            except TypeError:
                with loader_preserved(self.loader), preserved():
                    drawn = islice(self.loader, UNSIZED_BATCHES)
                    self._batches = float(sum(1 for _ in drawn))
        return self._batches


def final_result(
    plant: Plant,
    loop: Loop,
    train: Iterable[Any],
    val: Iterable[Any] | None,
    test: Iterable[Any] | None,
) -> dict[str, Any]:
    """The content of result.json: the final and the averaged weights, evaluated."""

    def evaluated() -> dict[str, Losses | None]:
        return {
            "train": evaluate(plant, train, most=TRAIN_BATCHES),
            "val": evaluate(plant, val),
            "test": evaluate(plant, test),
        }

    final = evaluated()
    with at_average(plant, loop.average, train):
        averaged = evaluated()
    tested = final["test"]
    result: dict[str, Any] = {
        "status": "finished",
        "steps": loop.step,
        **{f"{name}_loss": losses and losses.loss for name, losses in final.items()},
        "test_accuracy": tested.metrics.get("accuracy") if tested else None,
        **{f"average_{name}_loss": losses and losses.loss for name, losses in averaged.items()},
        "metrics": {name: losses.metrics for name, losses in final.items() if losses},
        "average_metrics": {name: losses.metrics for name, losses in averaged.items() if losses},
        "wall_seconds": loop.seconds(),
        "smoothness": _smoothness_summary(loop.windows),
        "cost": loop.cost.to_json(loop.step),
    }
    if loop.deviation is not None:
        result["replay"] = asdict(loop.deviation)
    return result


def _smoothness_summary(windows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Over all attempts that have a smoothness: its median, and the share of those above 0."""
    values = [w["smoothness"] for w in windows if w.get("smoothness") is not None]
    if not values:
        return {"median": None, "share_positive": None}
    return {
        "median": statistics.median(values),
        "share_positive": sum(v > 0 for v in values) / len(values),
    }

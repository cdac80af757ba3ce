"""Records of a run: rows of the tape, lines of windows.jsonl, losses and the result."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from rhc.data_weights import DATA_WEIGHTS
from rhc.events import WindowAttempted
from rhc.loop.best import Best, better
from rhc.loop.fit import Fit
from rhc.loop.state import Attempt, Window
from rhc.storage.files import finite
from rhc.training.evaluate import TRAIN_BATCHES, Losses, at_average, evaluate
from rhc.training.loaders import pristine

PER_EXAMPLE = "example_"
"""Prefix of metrics with a value per example: for a LossSampler, not for the tape."""

MOST_CHANGES, MOST_COURSES = 200, 12
"""Steps and cells of a course in result.json, for the report; another file has all of them."""

# The tape -----------------------------------------------------------------------------------------


def tape_rows(attempt: Attempt, commit: int) -> list[dict[str, Any]]:
    """The tape's rows of the attempt's steps up to `commit`."""
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
            # A metric called "loss" or "lr" must not replace the loop's own.
            if name not in row and not name.startswith(PER_EXAMPLE):
                row[name] = finite(_number(value))  # as it will be read back
        rows.append(row)
    return rows


TRACKING = "tracking"
"""The metric of runs whose data drift: the loss on rows that are not trained on, as they come."""


def note_online(fit: Fit, window: Window, attempt: Attempt) -> None:
    """Keeps what the first roll of a window tracks: its model has not seen the window's data."""
    if fit.rewrites and attempt.trajectory is not None:
        window.online = [metrics.get(TRACKING) for metrics in attempt.trajectory.metrics]


def tell_online(window: Window, rows: Sequence[dict[str, Any]]) -> None:
    """Adds to the rows of a window what was tracked before it was rewritten."""
    for row, value in zip(rows, window.online, strict=False):
        if value is not None and TRACKING in row:
            row[f"online_{TRACKING}"] = finite(_number(value))


def _tracked(tape: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over the run of what steps tracked, as committed and online, where all have it."""
    found: dict[str, float] = {}
    for name in (TRACKING, f"online_{TRACKING}"):
        values = [row.get(name) for row in tape]
        if values and all(isinstance(value, float) for value in values):
            found[name] = statistics.fmean(value for value in values if value is not None)
    return found


def _numbers(values: Sequence[float | Tensor]) -> list[float]:
    tensors = [v for v in values if isinstance(v, Tensor)]
    moved = iter(torch.stack(tensors).double().tolist() if tensors else [])
    return [next(moved) if isinstance(v, Tensor) else v for v in values]


def _number(value: Tensor) -> float | list[Any]:
    if value.numel() == 1:
        return float(value)
    return (value.long() if value.dtype == torch.bool else value).tolist()


# Attempts at windows ------------------------------------------------------------------------------


def record(
    fit: Fit, attempt: Attempt, outcome: str, reason: str | None, compared: Attempt | None = None
) -> None:
    """Adds a line to windows.jsonl: an attempt, its outcome, and what it was compared with."""
    line = _line(fit.state.cost.windows, attempt, outcome, reason, compared)
    fit.state.windows.append(line)
    if fit.directory is not None:
        fit.directory.windows.append([line])  # written with the next save
    fit.events.emit(WindowAttempted(line))


def _line(
    window: int, attempt: Attempt, outcome: str, reason: str | None, compared: Attempt | None
) -> dict[str, Any]:
    schedule, before = attempt.schedule, compared or attempt
    h = None if compared is None else compared.hypergradient
    ended = before.first_outcome
    predicted = None if attempt.proposal is None else attempt.proposal.predicted
    measured = None if compared is None else attempt.value - compared.value
    line: dict[str, Any] = {
        "window": window,
        "start": schedule.start,
        "stop": schedule.stop,
        "attempt": attempt.number,
        "outcome": outcome,
        "reason": reason,
        "objective_before": before.value,
        "objective_after": None if compared is None else attempt.value,
        "predicted_change": predicted,
        "measured_change": measured,
        "smoothness": smoothness(measured, predicted),
        "outcome_of_hypergradient": None if ended is None else ended.name,
        "outcome_step": None if ended is None else ended.step,
        "before": before.schedule.means(),
        "after": schedule.means(),
    }
    if h is not None:
        line |= {
            "hypergradient": {n: g.tolist() for n, g in h.grad.items() if n != DATA_WEIGHTS},
            "costate_norms": h.costate_norms.tolist(),
            "product": h.product,
            "segment": h.segment,
            "check": h.check,
        }
    return finite(line)  # as it will be read back


def smoothness(measured: float | None, predicted: float | None) -> float | None:
    """Measured over predicted change of J: 1 where the linear model holds, < 0 where J rose."""
    if measured is None or not predicted or not math.isfinite(measured + predicted):
        return None
    return measured / predicted


# Evaluation ---------------------------------------------------------------------------------------


def validation_losses(fit: Fit) -> Losses:
    """Mean loss and metrics of the live weights, which are kept where they are the best so far. A
    batch costs a third of a gradient; at the end nothing, unless it was asked for: the result has
    this loss in any case."""
    state, loader = fit.state, fit.data.val_loader
    with pristine(loader):
        found = evaluate(fit.plant, loader)
    assert found is not None
    if state.step < state.steps or fit.data.validation_asked:
        state.cost.gradient_equivalents += found.batches / 3
    state.best = better(state.best, fit.plant, state.step, found)
    return found


Evaluated = Mapping[str, Losses | None]
"""The losses on the train, val and test loaders; None where there is none."""


def final_result(fit: Fit) -> dict[str, Any]:
    """The content of result.json; the model is left with the weights that the run ends with."""
    plant, state, data = fit.plant, fit.state, fit.data

    def evaluated() -> Evaluated:
        return {
            "train": evaluate(plant, data.train_loader, most=TRAIN_BATCHES),
            "val": evaluate(plant, data.val_loader),
            "test": evaluate(plant, data.test_loader),
        }

    final = last = evaluated()
    with at_average(plant, state.average, data.train_loader):
        averaged = evaluated()
    best: Evaluated = dict.fromkeys(last) if data.val_loader is None else last
    kept = state.best
    if kept is not None and kept.step < state.step and (judged := last["val"]) is not None:
        live = Best.of(plant, state.step, judged)
        kept.put(plant)
        best = evaluated()
        if data.keep_best:
            final = best
            fit.events.tell(
                f"the run ends with the state of step {kept.step}, whose validation loss is "
                f"{kept.loss:.4g}; that of the last one is {judged.loss:.4g}"
            )
        else:
            live.put(plant)
    result: dict[str, Any] = {
        "status": "finished",
        "steps": state.step,
        **_told(final),
        **_told(averaged, "average_"),
        **_told(best, "best_"),
        "best_step": None if best["val"] is None else kept.step if kept else state.step,
        **_tracked(state.tape),
        "ends_with": "last" if final is last else "best",
        **({} if final is last else _told(last, "last_")),
        "wall_seconds": state.seconds(),
        "smoothness": _smoothness_summary(state.windows),
        "cost": state.cost.to_json(state.step),
        "replay": finite(state.replay and asdict(state.replay)),
        "notices": list(fit.events.told),
        "passes": state.passes,
        "chosen_start": state.chosen_start,
        "skipped": state.skipped,
    }
    if state.evidence is not None and plant.data_weights is not None:
        spread = float(plant.data_weights.values.log().std(correction=0))
        result["data_weights"] = {
            "cells": len(plant.data_weights),
            "observed": int((state.evidence.count > 0).sum()),
            "spread": spread,
            "share": state.evidence.share,
            "quantiles": _quantiles(plant.data_weights.values),
        }
        course = state.evidence.course(state.step)
        if course is not None:
            every = max(1, len(course.since) // MOST_CHANGES)
            result["data_weights"] |= {
                "names": plant.data_weights.names,
                "since": course.since[::every],
                "course": course.values[::every, :MOST_COURSES].tolist(),
            }
    return result


def _told(found: Evaluated, prefix: str = "") -> dict[str, Any]:
    """Entries of result.json about the weights with this prefix."""
    test = found["test"]
    return {
        **{f"{prefix}{name}_loss": losses and losses.loss for name, losses in found.items()},
        f"{prefix}test_accuracy": test.metrics.get("accuracy") if test else None,
        f"{prefix}metrics": {name: losses.metrics for name, losses in found.items() if losses},
    }


def _quantiles(values: Tensor) -> list[float]:
    """From the lowest weight to the highest, in twentieths of the cells."""
    ordered = values.double().sort().values
    return ordered[[round(i / 20 * (len(ordered) - 1)) for i in range(21)]].tolist()


def _smoothness_summary(windows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Median smoothness of all attempts that have one, and the share above 0."""
    values = [w["smoothness"] for w in windows if w.get("smoothness") is not None]
    if not values:
        return {"median": None, "share_positive": None}
    return {
        "median": statistics.median(values),
        "share_positive": sum(v > 0 for v in values) / len(values),
    }

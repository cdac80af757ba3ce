"""What the report says in words and tables."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rhc import __version__
from rhc.report.charts import groups_of, interval
from rhc.report.records import RunRecord, entry, number
from rhc.settings import TrainConfig

_DECIDED = {
    "steps", "stride", "optimizer", "lr", "weight_decay", "controls", "start", "template", "warmup",
    "cooldown", "until", "budget", "average", "objective_batches", "threads", "device",
}  # fmt: skip
"""Settings that the run fills in where they are left open: their values say not who chose them."""
_NOT_SETTINGS = ("format", "version", "versions", "hardware", "directory", "resume", "config")


def facts_of(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """The variables of the template beside its charts."""
    only = runs[0] if len(runs) == 1 else None
    return {
        "title": only.name if only else f"{len(runs)} runs",
        "state": _state(only) if only else "",
        "numbers": _numbers(only) if only else [],
        "faults": [f"{run.name}: {fault}" for run in runs for fault in run.faults],
        "table": _comparison(runs) if only is None else [],
        "settings": _settings(only) if only else [],
        "product": _product(only) if only else "",
        "events": only.events[:100] if only else [],
        "schedule": str(only.directory / "schedule.json")
        if only and (only.directory / "schedule.json").exists()
        else "",
        "version": __version__,
    }


def _state(run: RunRecord) -> str:
    what = str(run.config.get("run", "a Runner of a script"))
    if run.finished:
        return f"{what}: finished, {run.steps} steps"
    return f"{what}: unfinished, {len(run.tape)} of {run.steps} steps are recorded"


def _numbers(run: RunRecord) -> list[tuple[str, str]]:
    """Label and value of the figures at the top."""
    found = []
    for name, label in (
        ("test_loss", "test loss"),
        ("average_test_loss", "test loss, averaged weights"),
        ("test_accuracy", "test accuracy"),
        ("val_loss", "validation loss"),
    ):
        value = number(run.result.get(name))
        if value is not None:
            found.append((label, f"{value:.4g}"))
    cost = number(entry(run.result, "cost", "plain_run_equivalents"))
    if cost is not None:
        found.append(("cost in plain runs", f"{cost:.2f}"))
    seconds = number(run.result.get("wall_seconds"))
    if seconds is not None:
        found.append(("seconds", f"{seconds:.1f}"))
    outcomes = Counter(row["outcome"] for row in run.windows)
    if outcomes:
        found.append(("attempts", ", ".join(f"{n} {o}" for o, n in outcomes.most_common())))
    return found


def _settings(run: RunRecord) -> list[tuple[str, str, str]]:
    """(name, value, default where it differs), those that differ first."""
    usual = TrainConfig().to_record()
    rows = []
    for name, value in run.config.items():
        if name in _NOT_SETTINGS:
            continue
        default = usual.get(name)
        # What the run resolved by itself, as the law of its rewriting, was not set by anybody.
        decided = isinstance(value, dict) or name in _DECIDED
        differs = name in usual and value != default and not decided
        given = json.dumps(default, ensure_ascii=False) if differs else ""
        rows.append((name, json.dumps(value, ensure_ascii=False), given))
    return sorted(rows, key=lambda row: not row[2])


def _product(run: RunRecord) -> str:
    found = Counter(str(row["product"]) for row in run.windows if row.get("product"))
    if not found:
        return ""
    names = ", ".join(f"{name} ({count} attempts)" for name, count in found.most_common())
    none = ": the Hessian was left out, H = 0" if set(found) == {"none"} else ""
    return f"Hessian products: {names}{none}."


def _comparison(runs: Sequence[RunRecord]) -> list[dict[str, str]]:
    """A row per group of runs that differ in the seed alone: mean and 95 % interval."""
    rows = []
    for name, members in groups_of(runs):
        row = {
            "runs": name if len(members) == 1 else f"{name} and {len(members) - 1} further seeds",
            "steps": str(members[0].steps),
            "finished": f"{sum(run.finished for run in members)} of {len(members)}",
        }
        for label, path in (
            ("val loss", ("val_loss",)),
            ("test loss", ("test_loss",)),
            ("test accuracy", ("test_accuracy",)),
            ("cost in plain runs", ("cost", "plain_run_equivalents")),
        ):
            found = [number(entry(run.result, *path)) for run in members]
            values = [value for value in found if value is not None]
            row[label] = "–"
            if values:
                row[label] = f"{sum(values) / len(values):.4g}"
                around = interval(values)
                if around is not None:
                    row[label] += f" [{around[0]:.4g}, {around[1]:.4g}]"
        rows.append(row)
    return rows

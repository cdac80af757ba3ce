"""What the files of a run's directory say, as far as they are there and whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rhc.errors import InputError
from rhc.storage.files import parsed_json, read_document, read_regular
from rhc.storage.jsonl import MOST_BYTES

CONTROLS = ("lr", "momentum", "noise", "weight_decay")
_NO_METRIC = {"step", "loss", "val_loss", "gradient_norm", "planning", *CONTROLS}


@dataclass
class RunRecord:
    """One run: its rows, its records, and a sentence for each file that is not whole."""

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    tape: list[dict[str, Any]] = field(default_factory=list)
    windows: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    whole: dict[str, Any] = field(default_factory=dict)
    """hypergradient.json: the run looked back at as one window."""
    faults: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.directory.name or str(self.directory.resolve().name)

    @property
    def steps(self) -> int:
        """Steps in all, as configured; what is on the tape where nothing says more."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) and steps > 0 else len(self.tape)

    @property
    def finished(self) -> bool:
        return bool(self.result)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of an entry of the tape, where it is a finite number.

        One value per parameter group is averaged, as for an lr that differs by group.
        """
        steps, values = [], []
        for row in self.tape:
            step, value = number(row.get("step")), number(row.get(name))
            if step is not None and value is not None:
                steps.append(step)
                values.append(value)
        return steps, values

    def groups(self, name: str) -> int:
        """How many parameter groups a control has values for; 1 where it is one number."""
        sizes = [len(row[name]) for row in self.tape[:1] if isinstance(row.get(name), list)]
        return max(sizes, default=1)

    @property
    def metrics(self) -> list[str]:
        """Names on the tape that are neither loss nor control."""
        names = dict.fromkeys(name for row in self.tape[:2000] for name in row)
        return [n for n in names if n not in _NO_METRIC and self.series(n)[0]]

    @property
    def validation(self) -> tuple[list[float], list[float]]:
        """(steps, losses) on validation data, where they were taken while it trained."""
        return self.series("val_loss")

    @property
    def kept(self) -> list[dict[str, Any]]:
        """The attempt that each window was committed with: the newest accepted, else the newest."""
        newest: dict[Any, dict[str, Any]] = {}
        for row in self.windows:
            before = newest.get(row.get("start"))
            if before is None or before["outcome"] != "accepted" or row["outcome"] == "accepted":
                newest[row.get("start")] = row
        return list(newest.values())

    @property
    def events(self) -> list[tuple[int, str, str]]:
        """(step, kind, reason) of drifts, guards and plateaus that the tape has."""
        found = []
        for row in self.tape:
            planning = row.get("planning")
            if not isinstance(planning, Mapping):
                continue
            for values in planning.values():
                for what in values if isinstance(values, list) else [values]:
                    if isinstance(what, Mapping) and "kind" in what:
                        step = number(row.get("step")) or 0
                        found.append((int(step), str(what["kind"]), str(what.get("reason", ""))))
        return found


def read_run(directory: Path) -> RunRecord:
    """The run in `directory`; an InputError where there is nothing of a run."""
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise InputError(f"directory {directory} {what}; give one that `rhc runs` lists")
    run = RunRecord(directory)
    run.config = _document(run, "config.json")
    run.result = _document(run, "result.json")
    run.tape = _rows(run, "tape.jsonl")
    run.windows = [
        row
        for row in _rows(run, "windows.jsonl")
        if isinstance(row.get("outcome"), str) and number(row.get("start")) is not None
    ]
    run.starts = _rows(run, "start.jsonl")
    run.whole = _document(run, "hypergradient.json")
    if not (run.config or run.result or run.tape or run.windows or run.starts):
        why = f" ({'; '.join(run.faults)})" if run.faults else ": it has no config.json and no tape"
        raise InputError(
            f"directory {directory} is no run that can be shown{why}; give one that `rhc runs` "
            "lists"
        )
    return run


def number(value: Any) -> float | None:
    """A finite number, the mean of a list of them, or None."""
    if isinstance(value, (list, tuple)):
        values = [number(v) for v in value]
        finite = [v for v in values if v is not None]
        return sum(finite) / len(finite) if finite and len(finite) == len(values) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None


def entry(record: Mapping[str, Any], *path: str) -> Any:
    """record[path[0]][path[1]]…, None where something on the way is missing."""
    value: Any = record
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def thinned(
    steps: Sequence[float], values: Sequence[float], most: int = 1500
) -> tuple[list[float], list[float]]:
    """At most about `most` of the points: the least and the greatest of every stretch.

    Peaks stay, which a mean or every n-th point would lose.
    """
    count = len(values)
    if count <= most:
        return list(steps), list(values)
    kept = {0, count - 1}
    for start, stop in stretches(count, max(1, most // 2)):
        stretch = range(start, stop)
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]


def means(
    steps: Sequence[float], values: Sequence[float], most: int
) -> tuple[list[float], list[float]]:
    """Means over at most `most` stretches, at the middle of each."""
    found_steps, found = [], []
    for start, stop in stretches(len(values), most):
        found_steps.append(sum(steps[start:stop]) / (stop - start))
        found.append(sum(values[start:stop]) / (stop - start))
    return found_steps, found


def stretches(count: int, most: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of at most `most` stretches of about the same length."""
    pieces = min(count, most)
    for i in range(pieces):
        yield count * i // pieces, count * (i + 1) // pieces


def _document(run: RunRecord, name: str) -> dict[str, Any]:
    path = run.directory / name
    try:
        value, changed = read_document(path)
        if changed:
            run.faults.append(f"{name} was altered since it was written")
        if isinstance(value, dict):
            return value
        run.faults.append(f"{name} holds no object")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        run.faults.append(f"{name} cannot be read ({getattr(error, 'strerror', None) or error})")
    return {}


def _rows(run: RunRecord, name: str) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines up to the first that is damaged."""
    path = run.directory / name
    try:
        data = read_regular(path.resolve(), MOST_BYTES)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        run.faults.append(f"{name} cannot be read ({getattr(error, 'strerror', None) or error})")
        return []
    rows: list[dict[str, Any]] = []
    lines = data.split(b"\n")
    for at, line in enumerate(lines, 1):
        if at == len(lines):
            break  # nothing, or a line that is being written
        try:
            row = parsed_json(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError:
            run.faults.append(f"{name} is damaged at line {at}; what comes before is shown")
            break
        rows.append(row)
    return rows

"""RunRecord: what the files of a run's directory contain, for everything that displays a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from rhc.errors import InputError
from rhc.storage.files import read_document, reason
from rhc.storage.jsonl import read_lines
from rhc.storage.run_files import FILES, checkpoint_path, checkpoint_steps, read_record

CONTROLS = ("lr", "momentum", "noise", "weight_decay")
SIGNALS = ("loss_trend", "reward_trend", "plateau")
"""What a causal scheduler records at every step."""

REWARDS = ("reward", "return", "accuracy")
"""Metrics that are a reward, if config.json names none: higher is better."""

WITHOUT_RUNNER = ("compare", "loop")
"""Commands of runs that are only recorded."""

_NO_METRIC = {"step", "loss", "val_loss", "gradient_norm", "planning", *CONTROLS, *SIGNALS}


Attempt = TypeVar("Attempt", bound=Mapping[str, Any])


@dataclass
class Tally:
    """Counts of the windows that were looked at, by their decisive attempts. rewound: those whose
    first roll diverged; they can be accepted nevertheless."""

    judged: dict[int, str] = field(default_factory=dict)
    """Start of a window -> its outcome."""
    of_newest: list[Mapping[str, Any]] = field(default_factory=list)
    """Attempts at the newest window."""
    attempts: int = 0
    rewound: int = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Counts a line of windows.jsonl."""
        if self.of_newest and self.of_newest[-1]["start"] != row["start"]:
            self.of_newest.clear()
        self.of_newest.append(row)
        self.attempts += 1
        self.judged[row["start"]] = decisive(self.of_newest)["outcome"]
        self.rewound += row["outcome"] == "rewound" and row.get("attempt", 0) == 0

    @property
    def looked(self) -> int:
        return len(self.judged)

    @property
    def accepted(self) -> int:
        return list(self.judged.values()).count("accepted")

    @property
    def counts(self) -> dict[str, int]:
        """Windows by outcome."""
        rejected = list(self.judged.values()).count("rejected")
        return {"accepted": self.accepted, "rejected": rejected, "rewound": self.rewound}

    @property
    def words(self) -> str:
        """`2 windows looked at: 1 accepted, 1 rejected, 0 rewound, in 5 attempts`."""
        counts = ", ".join(f"{n} {outcome}" for outcome, n in self.counts.items())
        windows, attempts = _many(self.looked, "window"), _many(self.attempts, "attempt")
        return f"{windows} looked at: {counts}, in {attempts}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


@dataclass
class RunRecord:
    """The rows and records of one run, and a message for each damaged file."""

    directory: Path
    config: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    tape: list[dict[str, Any]] = field(default_factory=list)
    windows: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)
    """Replays of the whole run."""
    whole: dict[str, Any] = field(default_factory=dict)
    """hypergradient.json: the reverse pass through the whole run."""
    attribution: dict[str, Any] = field(default_factory=dict)
    """attribution.json: what training rows did for the run and its predictions."""
    faults: list[str] = field(default_factory=list)
    known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """What was computed of the tape, for several charts."""

    @property
    def name(self) -> str:
        return self.directory.name or str(self.directory.resolve().name)

    @property
    def steps(self) -> int:
        """Configured steps, else those on the tape."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) and steps > 0 else len(self.tape)

    @property
    def runner(self) -> str:
        of_script = "a Runner of a script" if self.is_resumable else "a loop of a script"
        return str(self.config.get("run", of_script))

    @property
    def is_resumable(self) -> bool:
        """Whether a Runner trained it, which leaves checkpoints."""
        return self.config.get("command") not in WITHOUT_RUNNER

    @property
    def controls(self) -> tuple[str, ...]:
        """The controls that are rewritten."""
        controls = self.config.get("controls")
        return tuple(map(str, controls)) if isinstance(controls, list) else ()

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, finite values) of a tape entry; values per parameter group are averaged."""
        if name not in self.known:
            pairs = [(float(row["step"]), number(row.get(name))) for row in self.tape]
            self.known[name] = finite_pairs(pairs)
        found: tuple[list[float], list[float]] = self.known[name]
        return found

    def groups(self, name: str) -> int:
        """Number of parameter groups with values of their own for a control."""
        sizes = [len(row[name]) for row in self.tape[:1] if isinstance(row.get(name), list)]
        return max(sizes, default=1)

    @cached_property
    def metrics(self) -> list[str]:
        """Names on the tape that are neither loss nor control."""
        names = dict.fromkeys(name for row in self.tape[:2000] for name in row)
        return [n for n in names if n not in _NO_METRIC and self.series(n)[0]]

    @cached_property
    def reward(self) -> str:
        """The name on the tape of what a scheduler would take for the reward; or ""."""
        names = ("reward", str(self.config.get("reward")), *REWARDS)
        return next((name for name in names if self.series(name)[0]), "")

    @property
    def kept(self) -> list[dict[str, Any]]:
        """The decisive attempt at each window."""
        windows: dict[int, list[dict[str, Any]]] = {}
        for row in self.windows:
            windows.setdefault(row["start"], []).append(row)
        return [decisive(attempts) for attempts in windows.values()]

    @cached_property
    def tally(self) -> Tally:
        tally = Tally()
        for row in self.windows:
            tally.add(row)
        return tally

    @cached_property
    def told(self) -> dict[str, Any]:
        """result.json, or of an unfinished run values.json of its newest checkpoint."""
        if self.result:
            return self.result
        root = self.directory / "checkpoints"
        steps = checkpoint_steps(root)
        try:
            return read_record(checkpoint_path(root, steps[-1]), "values.json") if steps else {}
        except InputError:
            return {}

    @property
    def product(self) -> str:
        """What approximated the hvp, as a sentence; empty without hvps."""
        found = Counter(str(row["product"]) for row in self.windows if row.get("product"))
        if not found:
            return ""
        names = ", ".join(f"{name} ({count} attempts)" for name, count in found.most_common())
        none = ": the Hessian was left out, H = 0" if set(found) == {"none"} else ""
        return f"Hessian products: {names}{none}."

    @property
    def attributions(self) -> list[tuple[str, list[tuple[str, str, str]]]]:
        """Per attributed loss (its name and value, (row, label, dJ/dw) from the most helpful to the
        most harmful)."""
        found = []
        for target in self.attribution.get("targets") or []:
            helpful, harmful = (entry(target, kind) or [] for kind in ("helpful", "harmful"))
            rows = [*helpful, *reversed(harmful)]
            value, label = number(entry(target, "value")), entry(target, "label")
            name = f"{entry(target, 'name')}{'' if label is None else f', label {label}'}"
            found.append(
                (
                    f"{name}: J {'unknown' if value is None else f'{value:.4g}'}",
                    [
                        (
                            str(entry(row, "cell")),
                            "" if entry(row, "label") is None else str(entry(row, "label")),
                            f"{number(entry(row, 'derivative')) or 0.0:+.3g}",
                        )
                        for row in rows
                    ],
                )
            )
        return found

    @property
    def events(self) -> list[tuple[int, str, str]]:
        """(step, kind, reason) of drifts, guards and plateaus on the tape."""
        return [
            (row["step"], str(what["kind"]), str(what.get("reason", "")))
            for row in self.tape
            if isinstance(planning := row.get("planning"), dict)
            for values in planning.values()
            for what in (values if isinstance(values, list) else [values])
            if isinstance(what, dict) and "kind" in what
        ]


def runs_in(directory: Path) -> list[Path]:
    """The directory, or the runs in a folder of runs that is none itself, as of rhc compare."""
    if any((directory / name).exists() for name in FILES):
        return [directory]
    return sorted(path.parent for path in directory.glob("*/config.json")) or [directory]


def read_run(directory: Path) -> RunRecord:
    """The run in `directory`; InputError where there is none."""
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise InputError(f"directory {directory} {what}; give one that `rhc runs` lists")
    run = RunRecord(directory)
    run.config = _document(run, "config.json")
    run.result = _document(run, "result.json")
    run.tape = _rows(run, "tape.jsonl")
    run.windows = _rows(run, "windows.jsonl")
    run.starts = _rows(run, "start.jsonl")
    run.passes = _rows(run, "passes.jsonl")
    run.whole = _document(run, "hypergradient.json")
    run.attribution = _document(run, "attribution.json")
    if not (run.config or run.result or run.tape or run.windows or run.starts):
        why = f" ({'; '.join(run.faults)})" if run.faults else ": it has no config.json and no tape"
        raise InputError(
            f"directory {directory} is no run that can be shown{why}; give one that `rhc runs` "
            "lists"
        )
    return run


def _document(run: RunRecord, name: str) -> dict[str, Any]:
    try:
        value, changed = read_document(run.directory / name)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        run.faults.append(f"{name} cannot be read ({reason(error)})")
        return {}
    if changed:
        run.faults.append(f"{name} was altered since it was written")
    if not isinstance(value, dict):
        run.faults.append(f"{name} holds no object")
        return {}
    return value


def _rows(run: RunRecord, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        for line in read_lines(run.directory / name):
            if line.row is None:
                text = f"{name} is damaged at line {line.number}; what comes before is shown"
                run.faults.append(text)
                break
            rows.append(line.row)
    except InputError as error:
        run.faults.append(str(error).removeprefix(f"{run.directory}/"))
    return rows


def decisive(attempts: Sequence[Attempt]) -> Attempt:
    """Of the attempts at one window the newest accepted, else the newest."""
    accepted = [attempt for attempt in attempts if attempt["outcome"] == "accepted"]
    return (accepted or attempts)[-1]


# Numbers ------------------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """A finite number, the mean of a list of them, or None."""
    if type(value) is float:  # nearly all are
        return value if math.isfinite(value) else None
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


def one_number(value: Any) -> Any:
    """A control's value, or the geometric mean of its nonzero values per group."""
    if not isinstance(value, list | tuple):
        return value
    positive = [v for v in value if isinstance(v, int | float) and v > 0]
    return math.exp(sum(map(math.log, positive)) / len(positive)) if positive else 0.0


def entry(record: Mapping[str, Any], *path: str) -> Any:
    """record[path[0]][path[1]]…, or None."""
    value: Any = record
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def finite_pairs(pairs: Any) -> tuple[list[float], list[float]]:
    """(xs, ys) of the pairs without None."""
    known = [(x, y) for x, y in pairs if x is not None and y is not None]
    return [x for x, _ in known], [y for _, y in known]


def thinned(
    steps: list[float], values: list[float], most: int = 1500
) -> tuple[list[float], list[float]]:
    """About `most` points, the minimum and maximum of every stretch, to keep peaks."""
    count = len(values)
    if count <= most:
        return steps, values
    kept = {0, count - 1}
    for start, stop in stretches(count, max(1, most // 2)):
        stretch = range(start, stop)
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]


def means(steps: list[float], values: list[float], most: int) -> tuple[list[float], list[float]]:
    """Means over at most `most` stretches, at the middle of each."""
    parts = list(stretches(len(values), most))
    return (
        [sum(steps[start:stop]) / (stop - start) for start, stop in parts],
        [sum(values[start:stop]) / (stop - start) for start, stop in parts],
    )


def stretches(count: int, most: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of at most `most` stretches of similar length."""
    pieces = min(count, most)
    for i in range(pieces):
        yield count * i // pieces, count * (i + 1) // pieces

"""`rhc compare`: runs in parallel, cached on disk, and the table of their results.

A cell is (method, lr, seed); its row is reused while the task is the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from rhc import __version__
from rhc.compare.launchers import PROCESSES, launched, parsed_launcher
from rhc.compare.methods import ABLATIONS, cells, method_of
from rhc.compare.runs import Row, Task, check_files, run
from rhc.compare.statistics import costs, share_of_gain, summarise, table, tuned
from rhc.errors import InputError
from rhc.schedule import CONTROLS
from rhc.settings import Run
from rhc.settings.commands import CompareConfig
from rhc.storage.files import (
    NUMBER,
    NUMBER_OR_NONE,
    cut,
    misfit,
    plain_document,
    refuse_links,
    replace_durably,
    unshare,
)
from rhc.storage.jsonl import encode, read_lines

Cell = tuple[str, float | None, int]

GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""Default lrs of `--tune`."""

PATHS = ("data", "schedule", "policy", "directory")
"""Fields of a Task that are paths."""

CONTENTS = ("schedule.json", "policy.json", "weights.safetensors")

ROWS, RESULT = "rows.jsonl", "comparison.json"


@dataclass(frozen=True)
class Failure:
    """A cell that failed, and why, as a sentence."""

    method: str
    lr: float | None
    seed: int
    why: str


def print_comparison(console: Console, asked: CompareConfig) -> int:
    """Runs everything, prints tables, writes files; exit status 1 if nothing ran, else 0."""
    methods = [*asked.methods, *(ABLATIONS if asked.ablations else ())] or [*USUAL_METHODS]
    reference = asked.versus or ("adaptive" if asked.ablations else methods[-1])
    oracle = asked.oracle
    names = list(dict.fromkeys([*methods, *([oracle] if oracle else []), reference]))
    seeds, tuning = _checked(asked, names)
    if oracle == reference:
        raise InputError(
            f"oracle and versus are both {oracle}, so that there is no gain; give another --versus"
        )
    sizes = asked.width, asked.batch_size
    task = Task(asked.run, asked.data, asked.steps, asked.schedule, asked.policy, *sizes)
    check_files(task, names)
    goal = task.workload(seeds[0]).goal  # errors of the run itself are raised here, once
    folder = asked.directory or Path("runs") / f"compare-{asked.run.rpartition(':')[2]}"
    pool = WorkerPool(console, task, folder, asked.jobs, asked.launcher)

    grid: Sequence[float | None] = list(asked.lrs)
    spent: dict[str, float] = {}
    wanted = list(cells(names, grid, seeds))
    if tuning:
        grid = grid or list(GRID)
        trial = pool.rows([c for c in cells(names, grid, tuning) if method_of(c[0]).needs_lr])
        best, spent = tuned(trial)
        for name, lr in best.items():
            console.print(
                f"{name}: lr {lr:g}, the best of {', '.join(f'{a:g}' for a in grid)} on seeds "
                f"{asked.tune}, for {spent[name]:.0f} plain runs",
                highlight=False,
            )
        wanted = [c for n in names for c in cells([n], [best.get(n)], seeds)]
        wanted = [c for c in wanted if not method_of(c[0]).needs_lr or c[0] in best]
    rows = pool.rows(wanted)
    if not rows:
        console.print("nothing could be run", style="bold", highlight=False)
        return 1
    target = goal.target if asked.target is None and goal is not None else asked.target
    lines = summarise(rows, reference, target=target, tuning=spent)
    for shown in (table(lines), costs(lines)):
        console.print()
        console.print(shown)
    if oracle is not None:
        console.print()
        for name in names:
            if name not in (oracle, reference):
                console.print(share_of_gain(rows, reference, oracle, name), highlight=False)
    console.print(f"\n{_explained(rows, reference, len(seeds))}", highlight=False, style="dim")
    document = {
        "format": "rhc.comparison",
        "version": 2,
        "run": asked.run,
        "steps": asked.steps,
        "versus": reference,
        "target": lines[0].target,
        "grid": list(grid) if tuning else None,
        "rows": [asdict(row) for row in rows],
        "lines": [asdict(line) for line in lines],
        "failures": [asdict(failure) for failure in pool.failures],
    }
    content = plain_document(document)
    if asked.output is not None:
        asked.output.write_bytes(content)
    replace_durably(pool.folder / RESULT, content)
    console.print(f"rows and {RESULT} are in {pool.folder}", highlight=False, style="dim")
    page = f"rhc report {shlex.quote(str(pool.folder))}"
    console.print(f"{page} shows the runs side by side", highlight=False, style="dim")
    return 0


def _checked(asked: CompareConfig, names: Sequence[str]) -> tuple[list[int], list[int]]:
    """The seeds that are reported, and those that choose the lr."""
    for name in names:
        method_of(name)
    for lr in asked.lrs:
        CONTROLS["lr"].check(lr)
    parsed_launcher(asked.launcher)
    if asked.target is not None and not math.isfinite(asked.target):
        raise InputError(f"target must be a finite number, got {asked.target}")
    if asked.output is not None and not asked.output.parent.is_dir():
        raise InputError(f"output {asked.output} is in no folder; make {asked.output.parent} first")
    seeds = parsed_seeds(asked.seeds)
    tuning = [] if asked.tune is None else parsed_seeds(asked.tune)
    if set(tuning) & set(seeds):
        raise InputError(
            f"tune {asked.tune} and seeds {asked.seeds} have seeds in common: choose on seeds that "
            "are not reported, such as --tune 0-2"
        )
    return seeds, tuning


USUAL_METHODS = ("rhc", "zero-probe-cosine", "cosine")


def _explained(rows: Sequence[Row], reference: str, seeds: int) -> str:
    best = "higher is better" if rows[0].higher else "lower is better"
    return (
        "score: of the run's goal where it has one, else the test loss of the final weights or the "
        f"mean of the metric tracking, {best}; 95 %: bootstrap over {seeds} seeds; apart: paired "
        f"difference to {reference}; steps: mean of the seeds that reach the target, which is that "
        f"of the run, of --target, or the final score of {reference}, 5 % worse; gradients: "
        "evaluations a run; cost: in plain runs, tuning: of choosing the lr"
    )


MOST_SEEDS = 10**5


def parsed_seeds(text: str) -> list[int]:
    """Ten seeds for `100-109`; N seeds from 100 on for a number N."""
    match = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", text.strip())
    seeds = range(0)
    if match is not None and match[2] is None:
        seeds = range(100, 100 + int(match[1]))
    elif match is not None:
        seeds = range(int(match[1]), int(match[2]) + 1)
    if not seeds:
        raise InputError(f"seeds must be N or FIRST-LAST, got {text!r}; try 100-109")
    if len(seeds) > MOST_SEEDS:
        raise InputError(f"seeds must be ≤ {MOST_SEEDS}, got {len(seeds)}; lower --seeds")
    Run(seed=seeds[-1]).checked()
    return list(seeds)


class WorkerPool:
    """Runs cells, prints each row as it arrives, and stores rows in a folder."""

    def __init__(
        self, console: Console, task: Task, folder: Path, jobs: int, launcher: str = PROCESSES
    ) -> None:
        # Absolute, for launchers whose processes begin elsewhere.
        self.task = replace(task, directory=folder.resolve())
        self.console, self.jobs = console, jobs
        self.launcher, self.folder = launcher, folder
        self.failures: list[Failure] = []
        self._kept: dict[Cell, Row] = {}
        self._identity = _identity(task)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"directory {folder} is a file; give --directory a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            refuse_links(folder)
        except OSError as error:
            raise InputError(
                f"directory {folder} cannot be written ({error.strerror}); choose another "
                "--directory"
            ) from None
        unshare(folder / ROWS)
        for record in _read(folder / ROWS):
            row = _row(record.get("row")) if record.get("task") == self._identity else None
            if row is not None:
                self._kept[row.method, row.lr, row.seed] = row

    def rows(self, wanted: Sequence[Cell]) -> list[Row]:
        """The rows of these cells, in order, without failures."""
        missing = [cell for cell in wanted if cell not in self._kept]
        if len(missing) < len(wanted):
            self.console.print(
                f"{len(wanted) - len(missing)} of {len(wanted)} rows are already in "
                f"{self.folder / ROWS}",
                highlight=False,
                style="dim",
            )
        jobs = min(self.jobs, len(missing))
        for outcome in _outcomes(self.launcher, self.task, missing, jobs, self.folder):
            if isinstance(outcome, Failure):
                self._fail(outcome)
                continue
            self._kept[outcome.method, outcome.lr, outcome.seed] = outcome
            with (self.folder / ROWS).open("a", encoding="utf-8") as file:
                file.write(encode({"task": self._identity, "row": asdict(outcome)}) + "\n")
            self._tell(outcome)
        return [self._kept[cell] for cell in wanted if cell in self._kept]

    def _tell(self, row: Row) -> None:
        ended = f"{row.score:.4g}" if math.isfinite(row.score) else "diverged"
        what = _named(row.method, row.lr)
        self.console.print(f"{what} seed {row.seed}: {ended}, cost {row.cost:.2f}", highlight=False)

    def _fail(self, failure: Failure) -> None:
        """Prints a failure, once for seeds with the same one."""
        if (failure.method, failure.why) not in {(f.method, f.why) for f in self.failures}:
            what = _named(failure.method, failure.lr)
            self.console.print(f"{what} is left out: {failure.why}", highlight=False)
        self.failures.append(failure)


def _named(method: str, lr: float | None) -> str:
    return method if lr is None else f"{method} lr {lr:g}"


def _identity(task: Task) -> dict[str, Any]:
    """What rows must share to be compared, with the contents of files."""
    path, separator, _ = task.run.rpartition(":")
    source = None
    if separator and Path(path).is_file():
        source = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    data = None if task.data is None else str(task.data.resolve())
    return {
        "run": task.run,
        "data": data,
        "steps": task.steps,
        "source": source,
        "rhc": __version__,
        **{n: v for n in ("width", "batch_size") if (v := getattr(task, n)) is not None},
        **{n: v for n in ("schedule", "policy") if (v := _content(getattr(task, n))) is not None},
    }


def _content(path: Path | None) -> str | None:
    if path is None:
        return None
    files = sorted(p for p in path.glob("*") if p.name in CONTENTS) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; truncates an incomplete last line and skips damaged ones."""
    lines = list(read_lines(path))
    whole = lines[-1].stop if lines else 0
    if path.exists() and path.stat().st_size > whole:
        cut(path, whole)
    yield from (line.row for line in lines if line.row is not None)


_FIELDS = {
    "method": (str,),
    "seed": (int,),
    "cost": NUMBER,
    "curve": (list,),
    "course": (dict,),
    "higher": (bool,),
    **dict.fromkeys(("lr", "score", "validation"), NUMBER_OR_NONE),
    **dict.fromkeys(("test_loss", "test_accuracy", "average_test_loss"), NUMBER_OR_NONE),
}


def _row(record: Any) -> Row | None:
    """A row from JSON, which has no infinities; None if it is damaged."""
    if not isinstance(record, dict) or _FIELDS.keys() - record or misfit(record, _FIELDS):
        return None
    row = {f.name: record[f.name] for f in fields(Row) if f.name in record}
    points = [p for p in row["curve"] if isinstance(p, list) and len(p) == 2]
    columns = [*points, *row["course"].values()]
    numbers = all(
        isinstance(c, list) and all(type(v) in NUMBER_OR_NONE for v in c) for c in columns
    )
    if len(points) < len(row["curve"]) or not numbers:
        return None
    worst = -math.inf if row.get("higher") else math.inf
    for name, value in (("score", worst), ("validation", math.inf)):
        row[name] = value if row[name] is None else row[name]
    return Row(**row)


# Running ------------------------------------------------------------------------------------------


def _outcomes(
    launcher: str, task: Task, wanted: Sequence[Cell], jobs: int, folder: Path
) -> Iterator[Row | Failure]:
    if not wanted or (jobs == 1 and launcher == PROCESSES):
        yield from (_attempted(task, cell) for cell in wanted)
        return
    lines = [asked(task, cell) for cell in wanted]
    for index, answer in launched(launcher, answered, lines, jobs, folder):
        if isinstance(answer, str):
            record = json.loads(answer)
            row = None if "why" in record else _row(record["row"])
            why = record.get("why", "it gave no row")
        else:
            row, why = None, _sentence(answer)
            if launcher != PROCESSES:
                why = f"{launcher}: {type(answer).__name__}: {why}"
        yield Failure(*wanted[index], why) if row is None else row


def asked(task: Task, cell: Cell) -> str:
    plain = {n: str(v) if isinstance(v, Path) else v for n, v in asdict(task).items()}
    return encode({"task": plain, "cell": list(cell)})


def answered(line: str) -> str:
    """Runs the cell of a JSON line; returns its row or failure as JSON."""
    asked = json.loads(line)
    task = asked["task"]
    paths = {n: None if task[n] is None else Path(task[n]) for n in PATHS}
    method, lr, seed = asked["cell"]
    outcome = _attempted(Task(**{**task, **paths}), (method, lr, seed))
    if isinstance(outcome, Failure):
        return encode({"why": outcome.why})
    return encode({"row": asdict(outcome)})


def _attempted(task: Task, cell: Cell) -> Row | Failure:
    try:
        return run(task, *cell)
    except InputError as error:
        return Failure(*cell, str(error))
    except Exception as error:  # one method of many: the others go on
        return Failure(*cell, f"{type(error).__name__}: {_sentence(error)}")


def _sentence(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["without a message"])[0]

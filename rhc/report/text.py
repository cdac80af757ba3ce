"""What a run did, in words: the end of `rhc train`, `rhc inspect` and `rhc runs`.

Reads a run's directory as a person would, file by file, and needs no torch.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rhc.errors import InputError
from rhc.report.live import duration, one_number, sparkline
from rhc.storage.jsonl import read_lines
from rhc.storage.run_files import RUNS, read_record, read_result
from rhc.workload import available_runners


def print_result(
    console: Console, record: Mapping[str, Any], directory: Path, *, inspect: bool
) -> None:
    """Losses, cost, where the files are and how to use the schedule."""
    cost = record["cost"]
    if console.width < 56:  # the table would lose its labels
        for name, final, averaged in _values(record):
            _line(console, name, f"{final}, averaged {averaged}")
    else:
        console.print(_losses(record))
    _line(
        console,
        "cost",
        f"{cost['plain_run_equivalents']:.2f} plain runs, {duration(record.get('wall_seconds'))}; "
        f"{cost['windows']} windows, {cost['rejected_windows']} rejected, "
        f"{cost['rewound_windows']} rewound",
    )
    _line(console, "files", f"{directory}")
    if inspect:
        _line(console, "look", f"rhc inspect {shlex.quote(str(directory))}")
    _line(console, "reuse", f'schedule = rhc.Schedule.load("{directory / "schedule.json"}")')
    _line(console, "", "scheduler = schedule.to_lr_scheduler(optimizer)")
    _line(console, "", "scheduler.step()  # after each optimizer.step()")


def print_run(console: Console, directory: Path) -> None:
    """A run's configuration, progress, schedule and result."""

    def told(sentence: str) -> None:
        _line(console, "altered", sentence)

    config = read_record(directory, told=told)
    if (directory / "schedule.json").exists():
        read_record(directory, "schedule.json", told)
    step, steps = _committed(directory), config.get("steps")
    finished = (directory / "result.json").exists()
    state = "finished" if finished else f"stopped or running, at step {step} of {steps}"
    console.print(Text(f"{directory}: {state}", style="bold"))
    _line(console, "run", _described(config))
    windows = rows_of(directory / "windows.jsonl")
    if windows:
        outcomes = Counter(str(row.get("outcome")) for row in windows)
        found = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        _line(console, "attempts", f"{len(windows)}: {found}")
    tape = rows_of(directory / "tape.jsonl")
    if tape:
        for name in ("loss", "lr", "momentum", "noise", "weight_decay"):
            numbers = (one_number(row.get(name)) for row in tape)
            values = [float(v) for v in numbers if isinstance(v, (int, float))]
            if any(values):
                _line(console, name, _course(values))
    checkpoints = sorted((directory / "checkpoints").glob("window-*"))
    if checkpoints:
        names = ", ".join(p.name.removeprefix("window-").lstrip("0") or "0" for p in checkpoints)
        _line(console, "saved", f"checkpoints of step {names}")
    if finished:
        print_result(console, read_result(directory, told), directory, inspect=False)
    else:
        _line(console, "go on", f"rhc resume {shlex.quote(str(directory))}")


def print_runs(console: Console) -> None:
    """What can be trained, and which runs lie in `runs/`."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column()
    for info in available_runners().values():
        grid.add_row(info.name, info.summary)
    grid.add_row("FILE.py:NAME", "A runner of your own: NAME(*, seed, data) -> rhc.Workload.")
    example = ("rhc train digits", "bold")
    console.print(Text.assemble("Can be trained, as in ", example, ":"))
    console.print(grid)
    found = sorted(path.parent for path in RUNS.glob("*/config.json"))
    if found:
        console.print("\nIn runs/:")
        for directory in found:
            console.print(f"{directory}  {_state(directory)}", highlight=False, soft_wrap=True)


def _losses(record: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("", style="dim", min_width=8)
    for name in ("train loss", "val loss", "test loss", "test accuracy"):
        table.add_column(name, justify="right", no_wrap=True)
    _, finals, averages = zip(*_values(record), strict=True)
    table.add_row("final", *finals)
    table.add_row("averaged", *averages)
    return table


def _values(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, of the final, of the averaged weights) of the losses and the accuracy, as text."""
    averaged = ((record.get("average_metrics") or {}).get("test") or {}).get("accuracy")
    found = [
        (name, record.get(f"{name}_loss"), record.get(f"average_{name}_loss"))
        for name in ("train", "val", "test")
    ]
    found.append(("accuracy", record.get("test_accuracy"), averaged))
    return [(name, _four(final), _four(average)) for name, final, average in found]


def _four(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _described(config: Mapping[str, Any]) -> str:
    what = config.get("run", "a Runner of a script")
    steered = config.get("controls")
    controls = ", ".join(map(str, steered)) if steered and isinstance(steered, list) else "nothing"
    return (
        f"{what}, {config.get('optimizer')}, {config.get('steps')} steps, window "
        f"{config.get('window')}, rewriting {controls}, seed {config.get('seed')}"
    )


def _state(directory: Path) -> str:
    try:
        steps = read_record(directory).get("steps")
        if not (directory / "result.json").exists():
            return f"at step {_committed(directory)} of {steps}"
        loss = read_result(directory).get("test_loss")
        return "finished" + ("" if loss is None else f", test loss {loss:.4f}")
    except InputError as error:
        return str(error)


def _committed(directory: Path) -> int:
    """The step that a resumed run would continue at."""
    names = [p.name.removeprefix("window-") for p in (directory / "checkpoints").glob("window-*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a file up to the first that is damaged."""
    return [line.row for line in read_lines(path) if line.row is not None]


def _course(values: list[float]) -> str:
    """The first and the last value, and the course between them in 40 means."""
    size = max(1, -(-len(values) // 40))
    parts = [values[i : i + size] for i in range(0, len(values), size)]
    means = [sum(part) / len(part) for part in parts]
    return f"{values[0]:.4g} {sparkline(means)} {values[-1]:.4g}"


def _line(console: Console, label: str, text: str) -> None:
    line = Text(f"{label:<10}", style="dim")
    line.append(text, style="not dim")
    # In a pipe a line stays a line.
    console.print(line, soft_wrap=not console.is_terminal)

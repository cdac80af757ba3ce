"""A run in words, for `rhc train`, `rhc inspect` and `rhc runs`; does not import torch."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rhc.errors import InputError
from rhc.report import why
from rhc.report.live import duration, sparkline
from rhc.report.records import (
    CONTROLS,
    RunRecord,
    entry,
    means,
    number,
    one_number,
    read_run,
)
from rhc.storage.run_files import (
    RUNS,
    checkpoint_steps,
    read_record,
    read_result,
)
from rhc.workload import available_runners, runner_summary

MOST_COLUMNS = 7
"""Losses and metrics of the final table."""
_ALWAYS = ("train loss", "val loss", "test loss", "test accuracy")


def print_result(
    console: Console, record: Mapping[str, Any], directory: Path, *, inspect: bool
) -> None:
    rows = final_table(record)
    if console.width < 56:  # the table would lose its labels
        for name, final, averaged in rows:
            _line(console, name, f"{final}, averaged {averaged}")
    else:
        table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
        table.add_column("", style="dim", min_width=8)
        for name, *_ in rows:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_row("final", *(final for _, final, _ in rows))
        table.add_row("averaged", *(averaged for _, _, averaged in rows))
        console.print(table)
    if record.get("best_step") not in (None, record.get("steps")):
        _line(console, "best", _best(record))
    cost = record["cost"]
    _line(
        console,
        "cost",
        f"{cost['plain_run_equivalents']:.2f} plain runs, {duration(record.get('wall_seconds'))}; "
        f"{cost['windows']} windows, {cost['rejected_windows']} rejected, "
        f"{cost['rewound_windows']} rewound",
    )
    if inspect and record.get("replay") and not entry(record, "replay", "equal"):
        _line(console, "replay", why.replayed(record["replay"]))
    _line(console, "files", f"{directory}")
    if inspect:
        _line(console, "look", f"rhc inspect {shlex.quote(str(directory))}")
    if not (directory / "schedule.json").exists():
        return
    _line(console, "reuse", f'schedule = rhc.Schedule.load("{directory / "schedule.json"}")')
    _line(console, "", "scheduler = schedule.to_lr_scheduler(optimizer)")
    _line(console, "", "scheduler.step()  # after each optimizer.step()")


def _best(record: Mapping[str, Any]) -> str:
    """The best validated state, and whether the run ends with it."""
    ends, losses = record.get("ends_with") == "best", [record.get("best_val_loss")]
    losses.append(record.get("last_val_loss" if ends else "val_loss"))
    best, last = ("–" if loss is None else f"{loss:.4f}" for loss in losses)
    told = "the run ends with it" if ends else "the run ends with the last state"
    return f"step {record['best_step']}, val loss {best} where the last has {last}; {told}"


def final_table(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, of the final weights, of the averaged ones) of losses and metrics, as text."""
    found = [
        (f"{name} loss", record.get(f"{name}_loss"), record.get(f"average_{name}_loss"))
        for name in ("train", "val", "test")
    ]
    averaged = entry(record, "average_metrics", "test", "accuracy")
    found.append(("test accuracy", record.get("test_accuracy"), averaged))
    data = next((n for n in ("test", "val", "train") if entry(record, "metrics", n)), "")
    for name, value in (entry(record, "metrics", data) or {}).items():
        if (name, data) != ("accuracy", "test") and len(found) < MOST_COLUMNS:
            of_average = entry(record, "average_metrics", data, name)
            found.append((f"{data} {name}", number(value), number(of_average)))
    return [
        (name, *("–" if value is None else f"{value:.4f}" for value in values))  # type: ignore[misc]
        for name, *values in found
        if name in _ALWAYS or values != [None, None]
    ]


def print_run(console: Console, directory: Path) -> None:
    def altered(sentence: str) -> None:
        _line(console, "altered", sentence)

    read_record(directory, told=altered)
    if (directory / "schedule.json").exists():
        read_record(directory, "schedule.json", altered)
    run = read_run(directory)
    finished = (directory / "result.json").exists()
    saved = checkpoint_steps(directory / "checkpoints")
    state = "finished" if finished else f"stopped or running, {_place(run)}"
    console.print(Text(f"{directory}: {state}", style="bold"))
    _line(console, "run", ", ".join(_settings(run)))
    if planner := run.config.get("planner"):
        _line(console, "planned", ", ".join([*planner["steer"], *planner["knobs"]]))
    _line(console, "in short", why.headline(run))
    for name in ("loss", *CONTROLS):
        numbers = (one_number(row.get(name)) for row in run.tape)
        values = [float(v) for v in numbers if isinstance(v, (int, float))]
        if any(values):
            course = sparkline(means(values, values, 40)[1])
            _line(console, name, f"{values[0]:.4g} {course} {values[-1]:.4g}")
    if finished:
        run.result = read_result(directory, altered)
    for label, _, sentence in why.answers(run):
        _line(console, label, sentence)
    for notice in run.told.get("notices") or ():
        _line(console, "notice", str(notice))
    if saved:
        _line(console, "saved", f"checkpoints of step {', '.join(map(str, saved))}")
    if finished:
        print_result(console, run.result, directory, inspect=False)
    elif run.is_resumable:
        _line(console, "go on", f"rhc resume {shlex.quote(str(directory))}")


def _settings(run: RunRecord) -> Iterator[str]:
    """What the run is, in a few words."""
    config = run.config
    yield run.runner
    for name in ("optimizer", "scheduler", "method"):
        if config.get(name) is not None:
            yield str(config[name])
    yield f"{config.get('steps')} steps"
    if "window" in config:
        yield f"window {config['window']}, rewriting {', '.join(run.controls) or 'nothing'}"
    if "seed" in config:
        yield f"seed {config['seed']}"


def print_runs(console: Console) -> None:
    """Prints the available runners and the runs in `runs/`."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold")
    grid.add_column()
    for name, target in available_runners().items():
        grid.add_row(name, runner_summary(target))
    grid.add_row("FILE.py:NAME", "A runner of your own: NAME(*, seed, data) -> rhc.Workload.")
    example = ("rhc train digits", "bold")
    console.print(Text.assemble("Can be trained, as in ", example, ":"))
    console.print(grid)
    found = sorted(path.parent for path in RUNS.glob("*/config.json"))
    if found:
        console.print("\nIn runs/:")
        for directory in found:
            console.print(f"{directory}  {_state(directory)}", highlight=False, soft_wrap=True)


def _state(directory: Path) -> str:
    try:
        run = RunRecord(directory, read_record(directory))
        if not (directory / "result.json").exists():
            return _place(run if run.is_resumable else read_run(directory))
        loss = read_result(directory).get("test_loss")
        return "finished" + ("" if loss is None else f", test loss {loss:.4f}")
    except InputError as error:
        return str(error)


def _place(run: RunRecord) -> str:
    """The step at which the run would resume, or that it has reached."""
    steps = run.config.get("steps")
    if not run.is_resumable:
        return f"at step {len(run.tape)} of {steps or 'an unknown number'}"
    saved = checkpoint_steps(run.directory / "checkpoints")
    return f"at step {max(saved, default=0)} of {steps}"


def _line(console: Console, label: str, text: str) -> None:
    line = Text(f"{label:<10}", style="dim")
    line.append(text, style="not dim")
    # No wrapping in a pipe.
    console.print(line, soft_wrap=not console.is_terminal)

"""The files of a run's directory: what each holds, who writes it, and what its readers rely on.

    config.json      settings, versions, machine, code: by `RunDirectory.open`, compared on resume
    start.jsonl      a line for each roll of the lr search (loop/start.py), by `record_start`
    tape.jsonl       a line for each committed step (loop/committing.py), by `RunDirectory.save`
    windows.jsonl    a line for each attempt at a window (loop/records.py), by `RunDirectory.save`
    schedule.json    the plan while the run goes on, then the committed schedule
    checkpoints/     window-00000050/ …: by `rhc.storage.checkpoint`
    result.json      losses and cost; it comes last and says that the run has ended
    report.html      by `rhc report`; hypergradient.json by `rhc hypergradient`

Beside *.jsonl and result.json lie their CRC-32s (.NAME.crc32); config.json and schedule.json end
with their own SHA-256. The process that writes holds `.lock`.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rhc.errors import InputError, plain
from rhc.storage.files import NUMBER, NUMBER_OR_NONE, Kinds, misfit, read_json

FILES = ("config.json", "schedule.json", "tape.jsonl", "windows.jsonl", "result.json")
"""A directory that has any of these holds a run, or a part of one."""

RUNS = Path("runs")
"""Where `rhc train` puts its runs, below the current folder."""

_CHECKPOINT = "window-"

ROWS: Mapping[str, Kinds] = {
    "tape.jsonl": {
        "step": (int,),
        **dict.fromkeys(("loss", "gradient_norm"), NUMBER_OR_NONE),
        "reward": (*NUMBER_OR_NONE, list),
    },
    "windows.jsonl": {
        **dict.fromkeys(("start", "stop"), (int,)),
        "outcome": (str,),
        "reason": (str, type(None)),
        **dict.fromkeys(
            ("attempt", "objective_before", "objective_after", "smoothness"), NUMBER_OR_NONE
        ),
    },
}
"""What each line of a file must have."""

RESULT: Kinds = {
    **{
        f"{prefix}{name}_loss": NUMBER_OR_NONE
        for prefix in ("", "average_")
        for name in ("train", "val", "test")
    },
    **dict.fromkeys(("test_accuracy", "wall_seconds"), NUMBER_OR_NONE),
    "cost": dict.fromkeys(
        ("plain_run_equivalents", "windows", "rejected_windows", "rewound_windows"), NUMBER
    ),
    "average_metrics": {"test": {"accuracy": NUMBER_OR_NONE}},
}
"""What result.json must have."""


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is, in the folder of a run's checkpoints."""
    return root / f"{_CHECKPOINT}{step:08d}"


def checkpoint_steps(root: Path) -> list[int]:
    """Steps that have a checkpoint there, valid or not, ascending."""
    if not root.is_dir():
        return []
    names = [path.name.removeprefix(_CHECKPOINT) for path in root.glob(f"{_CHECKPOINT}*")]
    steps = sorted(int(n) for n in names if n.isascii() and n.isdecimal() and len(n) < 19)
    return [step for step in steps if os.path.lexists(checkpoint_path(root, step))]


def read_record(
    directory: Path, name: str = "config.json", told: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """A JSON object of a run's directory; where there is none, an InputError says what to give.

    told: called with a sentence where the file was altered; None prints it once a process.
    """
    path = directory / name
    try:
        return read_json(path, told or _warned)
    except InputError as error:
        if not path.exists():
            raise InputError(
                f"directory {directory} is no run: it has no {name}; give a directory that "
                "`rhc runs` lists"
            ) from None
        fault = str(error).removeprefix(f"{path} ")
        raise InputError(
            f"{path} is damaged: it {fault}; restore it, or begin the run anew in another "
            "--directory"
        ) from None


@functools.cache
def _warned(sentence: str) -> None:
    print(plain(f"rhc: warning: {sentence}"), file=sys.stderr)


def read_result(directory: Path, told: Callable[[str], None] | None = None) -> dict[str, Any]:
    """result.json of a run that has ended; an InputError where it is not what a run writes."""
    record = read_record(directory, "result.json", told)
    fault = misfit(record, RESULT)
    if fault is not None:
        raise InputError(
            f"{directory / 'result.json'} is damaged: {fault}; restore it, or remove it and resume "
            "the run"
        )
    return record

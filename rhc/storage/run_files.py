"""Files of a run's directory, and where in rhc/ their content is made.

    config.json      settings, versions, machine, code; compared on resume   loop/description.py
    start.jsonl      one line per roll of the lr search                      loop/trials.py
    tape.jsonl       one line per committed step                             loop/records.py
    windows.jsonl    one line per attempt at a window                        loop/records.py
    passes.jsonl     one line per rewrite of the whole run                   loop/passes.py
    passes/          their rolls, while the run lasts                        loop/passes.py
    schedule.json    the plan during the run, then the committed schedule    schedule/planned.py
    checkpoints/     what a run is resumed from, see `checkpoint`            loop/checkpointing.py
    result.json      losses and cost; written last                           loop/records.py
    weights.safetensors, weights.json  where data are weighed                data_weights/cells.py
    weights.course.safetensors         of few cells, their weights by step   data_weights/course.py
    report.html      by `rhc report`; hypergradient.json by `rhc hypergradient`;
                     attribution.safetensors, .csv, .json by `rhc attribute`

CRC-32s of *.jsonl and result.json are in .NAME.crc32; config.json and schedule.json end with their
SHA-256. The training process holds `.lock`.
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
"""A directory with any of these holds a run, or part of one."""

PASSES = "passes"
"""Folder of the rolls of passes over the whole run, until the run has ended."""

WEIGHTS = "weights.safetensors"
"""Weights of the data, with weights.json beside it."""

RUNS = Path("runs")
"""Where `rhc train` puts its runs."""

_CHECKPOINT = "window-"

BEST = "best"
"""Beside them, the checkpoint of the best validated state."""

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
"""Required entries of every line."""

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
"""Required entries of result.json."""


def checkpoint_path(root: Path, step: int) -> Path:
    return root / f"{_CHECKPOINT}{step:08d}"


def checkpoint_steps(root: Path) -> list[int]:
    """Steps with a checkpoint directory, valid or not, ascending."""
    if not root.is_dir():
        return []
    names = [path.name.removeprefix(_CHECKPOINT) for path in root.glob(f"{_CHECKPOINT}*")]
    steps = sorted(int(n) for n in names if n.isascii() and n.isdecimal() and len(n) < 19)
    return [step for step in steps if os.path.lexists(checkpoint_path(root, step))]


def read_record(
    directory: Path, name: str = "config.json", told: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """A JSON object of a run's directory. `told` is called if it was altered; None prints that."""
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
    """result.json of a finished run; InputError where it is damaged."""
    record = read_record(directory, "result.json", told)
    fault = misfit(record, RESULT)
    if fault is not None:
        raise InputError(
            f"{directory / 'result.json'} is damaged: {fault}; restore it, or remove it and resume "
            "the run"
        )
    return record

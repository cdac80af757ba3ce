"""`rhc smooth`: a probe, then runs by what the smoother writes from the best of those so far."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from rhc.cli.replay import PlainRun, Sizes, plain_run
from rhc.cli.train import device_of
from rhc.errors import InputError, plain
from rhc.events import Event, RunStarted
from rhc.hindsight import USUAL_GAINS, Pass, Smoother, Tape, held_out, reward_of, smooth
from rhc.report.live import Progress, display
from rhc.report.text import print_result
from rhc.runner import DivergedError
from rhc.schedule import Schedule, Template, shaped, template_factors
from rhc.schedulers import Gains
from rhc.settings import RECORD_VERSION, TrainConfig, from_record
from rhc.settings.commands import PlainSettings, SmoothConfig
from rhc.storage.files import (
    NUMBER,
    check_kinds,
    finite,
    plain_document,
    read_json,
    refuse_links,
    remove,
    replace_durably,
    replace_summed,
    sealed,
)
from rhc.storage.run_directory import hardware, versions
from rhc.storage.run_files import RUNS, read_result
from rhc.workload import Goal, refuse_strange

COPIED = ("schedule.json", "tape.jsonl", "windows.jsonl")
"""Files of the best run that the whole has too."""


def smooth_run(config: SmoothConfig, console: Console) -> int:
    """Trains passes + 1 times, and returns the exit status."""
    smoother = smoother_of(config)
    run = plain_run_of(config)
    goal = run.workload().goal
    record = _record(config, run)
    directory = config.directory or _default_directory(run, record)
    open_directory(directory, record)
    result = directory / "result.json"
    if result.exists():
        console.print(
            f"{directory} holds this, finished; to train anew give another --seed or --directory",
            highlight=False,
            soft_wrap=True,
        )
    else:
        try:
            runs, best = smooth(
                lambda number, schedule: _train(
                    run, config, goal, directory, number, schedule, console
                ),
                smoother,
                config.passes,
                reward_of(goal),
            )
        except KeyboardInterrupt:
            print(
                "rhc: stopped; what is finished stays, and the same command goes on from there",
                file=sys.stderr,
            )
            return 130
        except DivergedError as error:
            what = str(error).partition(";")[0]
            print(plain(f"rhc: error: {what}; begin at a lower --lr"), file=sys.stderr)
            return 1
        finish(directory, runs, best)
    found = read_result(directory)
    check_kinds(found, {"passes": (list,)}, result)
    console.print()
    for row in found["passes"]:
        if not isinstance(row, dict):
            raise InputError(f"{result} is damaged: a pass is no object; restore it")
        check_kinds(row, {"pass": (int,), "held_out": NUMBER, "kept": (bool,)}, result)
        name = "probe" if row["pass"] == 0 else f"pass {row['pass']}"
        kept = "  kept" if row["kept"] else ""
        console.print(f"{name:<8}  held-out loss {row['held_out']:.5g}{kept}", highlight=False)
    console.print()
    print_result(console, found, directory, inspect=True)
    return 0


def smoother_of(config: SmoothConfig) -> Smoother:
    """The smoother that the flags describe."""
    gains = {name: config.gain * gain for name, gain in asdict(USUAL_GAINS).items()}
    return Smoother(
        every=config.every, gains=Gains(**gains), source=config.source, baseline=config.baseline
    )


def plain_run_of(config: PlainSettings) -> PlainRun:
    """The run that is trained again and again."""
    settings = TrainConfig(
        run=config.run,
        steps=config.steps,
        optimizer=config.optimizer,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        seed=config.seed,
        data=config.data,
        device=config.device,
        threads=config.threads,
        rewrite=False,
    )
    return plain_run(settings.checked(), Sizes())


def templated(run: PlainRun, template: str) -> Schedule | None:
    """lr in the shape of a template; None for a constant one, which the optimizer has already."""
    if template == "constant":
        return None
    assert run.config.lr is not None and run.config.steps is not None
    import torch

    lr = torch.tensor(run.config.lr, dtype=torch.float64)
    shape: Template = template  # type: ignore[assignment]
    return Schedule({"lr": shaped(lr, template_factors(shape, run.config.steps, 0.2))})


def _train(
    run: PlainRun,
    config: SmoothConfig,
    goal: Goal | None,
    directory: Path,
    number: int,
    schedule: Schedule | None,
    console: Console,
) -> Pass:
    """One plain run in a directory of its own; what is there already is not trained again."""
    assert run.config.steps is not None
    name = "probe" if number == 0 else f"pass {number}"
    progress = Progress(f"{run.config.short_name}, {name}")
    if number == 0:
        schedule = templated(run, config.template)
    path = directory / f"pass-{number}"
    record = {"command": "smooth", "pass": number}
    with display(progress, console) as listener:

        def told(event: Event) -> None:
            # What can be gone on with is the whole, not one of its runs.
            if isinstance(event, RunStarted):
                event = replace(event, directory=directory)
            listener(event)

        result = run.runner(schedule, path, record, [told]).fit(run.config.steps)
    if number == 0 and config.source == "reward":
        smoother_of(config).trends(
            Tape.of(result.tape, reward_of(goal))
        )  # refused before a second run
    judged = held_out(result.record, result.tape, goal)
    return Pass(result.schedule, result.tape, judged, (path, result.record))


# The directory of the whole -----------------------------------------------------------------------


def _record(config: SmoothConfig, run: PlainRun) -> dict[str, Any]:
    """config.json: the settings, resolved."""
    own = {
        name: getattr(config, name)
        for name in ("passes", "template", "source", "every", "gain", "baseline")
    }
    return described(run, "smooth", own)


def described(run: PlainRun, command: str, own: dict[str, Any]) -> dict[str, Any]:
    """config.json of what trains by plain runs: as of `rhc train`, so that it can be replayed."""
    device = device_of(run.config.device)
    record = {
        k: v
        for k, v in run.config.to_record().items()
        if k not in ("directory", "resume", "config", "print_config", "plan")
    }
    return {
        "format": "rhc.config",
        "version": RECORD_VERSION,
        **record,
        "controls": [],
        "command": command,
        command: own,
        "versions": versions(),
        "hardware": hardware(device),
    }


def _default_directory(run: PlainRun, record: dict[str, Any]) -> Path:
    told = {
        k: v
        for k, v in record.items()
        if k not in ("versions", "hardware", "device", "keep_checkpoints")
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    return RUNS / f"{run.config.short_name}-{record['command']}-{digest}"


def open_directory(directory: Path, record: dict[str, Any]) -> None:
    """Makes the directory with its config.json, or checks that it holds the same."""
    path = directory / "config.json"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        refuse_links(directory)
        if not path.exists():
            if any(directory.iterdir()):
                raise InputError(
                    f"directory {directory} holds something else; choose another --directory"
                )
            replace_durably(path, sealed(record))
            return
    except OSError as error:
        raise InputError(
            f"directory {directory} cannot be written ({error.strerror}); choose another "
            "--directory"
        ) from None
    old, new = read_json(path), json.loads(json.dumps(finite(record)))
    differ = [
        name
        for name in sorted(old.keys() | new.keys())
        if name not in ("versions", "hardware", "device") and old.get(name) != new.get(name)
    ]
    if differ:
        raise InputError(
            f"directory {directory} belongs to another configuration ({', '.join(differ)} "
            "differ); choose another --directory, or give the same settings"
        )


def finish(directory: Path, runs: list[Pass], best: int) -> None:
    """The best run's files, and a result with what all of them cost."""
    path, record = runs[best].result
    for name in COPIED:
        replace_durably(directory / name, (path / name).read_bytes())
    remove(directory / "checkpoints")  # of an attempt that was killed
    shutil.copytree(path / "checkpoints", directory / "checkpoints")
    costs = [run.result[1]["cost"] for run in runs]
    total = {
        name: max(c[name] for c in costs)
        if name == "peak_memory_bytes"
        else sum(c[name] for c in costs)
        for name in costs[best]
        if isinstance(costs[best][name], int | float)
    }
    result = {
        **record,
        "wall_seconds": sum(run.result[1]["wall_seconds"] for run in runs),
        "cost": {**costs[best], **total},
        "passes": [
            {
                "pass": number,
                "held_out": run.held_out,
                "test_loss": run.result[1]["test_loss"],
                "kept": number == best,
            }
            for number, run in enumerate(runs)
        ],
    }
    replace_summed(directory / "result.json", plain_document(result))


def resume_smooth(record: dict[str, Any], directory: Path, console: Console, *, trust: bool) -> int:
    """Goes on with the smoothing that `directory` holds, and returns the exit status."""
    path = directory / "config.json"
    check_kinds(record, {"smooth": (dict,)}, path)
    names = {name: record[name] for name in PlainSettings.__dataclass_fields__ if name in record}
    config = from_record(SmoothConfig, {**names, **record["smooth"]}, str(path))
    refuse_strange(config.run, path, trust=trust)
    return smooth_run(replace(config, directory=directory).checked(), console)

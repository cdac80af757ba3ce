"""`rhc smooth`: a probe, then runs by the smoother's schedules from the best run so far."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rhc.cli.building import PlainRun, device_of, hashed, plain_run, plain_settings
from rhc.errors import DivergedError, InputError, plain
from rhc.events import Event, RunStarted
from rhc.hindsight import USUAL_GAINS, Pass, Smoother, Tape, held_out, reward_of, smooth
from rhc.report.live import Progress, Screen, display
from rhc.report.text import print_result
from rhc.schedule import Schedule, Template, shaped, template_factors
from rhc.settings import RECORD_VERSION, TrainConfig
from rhc.settings.commands import SmoothConfig
from rhc.storage.files import (
    NUMBER,
    check_kinds,
    remove,
    replace_durably,
    sealed,
)
from rhc.storage.run_directory import RunDirectory, hardware, versions
from rhc.storage.run_files import read_result
from rhc.workload import Goal, refuse_strange

COPIED = ("tape.jsonl", "windows.jsonl")
"""Files of the best run that are copied into the whole's directory."""

OWN = ("passes", "template", "source", "every", "gain", "baseline")
"""Settings of the smoother that are always recorded."""


def run(config: SmoothConfig, screen: Screen) -> int:
    smoother = _smoother(config)
    base = plain_run(TrainConfig(**plain_settings(config), rewrite=False).checked(), {})
    goal = base.workload().goal
    record = _record(config, base)
    directory = config.directory or _default_directory(base, record)
    whole = RunDirectory(directory, 1, screen.say, {"device": ""})
    if whole.claim(record, "auto")[0] is None:
        replace_durably(directory / "config.json", sealed(record))
    result = directory / "result.json"
    if result.exists():
        screen.say(
            f"{directory} holds this, finished; to train anew give another --seed or --directory"
        )
    else:

        def train(number: int, schedule: Schedule | None) -> Pass:
            if number == 0:
                schedule = _templated(base, config.template)
            done = _train(base, goal, directory, number, schedule, screen)
            if number == 0 and config.source == "reward":
                smoother.trends(Tape.of(done.rows, reward_of(goal)))  # refused before a second run
            return done

        try:
            runs, best = smooth(train, smoother, config.passes, reward_of(goal))
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
        _finish(whole, runs, best)
    found = read_result(directory)
    check_kinds(found, {"passes": (list,)}, result)
    screen.print()
    for row in found["passes"]:
        if not isinstance(row, dict):
            raise InputError(f"{result} is damaged: a pass is no object; restore it")
        check_kinds(row, {"pass": (int,), "held_out": NUMBER, "kept": (bool,)}, result)
        kept = "  kept" if row["kept"] else ""
        screen.say(f"{_name(row['pass']):<8}  held-out loss {row['held_out']:.5g}{kept}")
    screen.print()
    print_result(screen, found, directory, inspect=True)
    return 0


def resume(record: Mapping[str, Any], directory: Path, screen: Screen, *, trust: bool) -> int:
    path = directory / "config.json"
    check_kinds(record, {"smooth": (dict,)}, path)
    names = {name: record[name] for name in SmoothConfig.known() if name in record}
    own = {"controls": ["lr"], **record["smooth"]}
    config = SmoothConfig.from_record({**names, **own}, str(path))
    refuse_strange(config.run, path, trust=trust)
    return run(replace(config, directory=directory).checked(), screen)


def _name(number: int) -> str:
    return "probe" if number == 0 else f"pass {number}"


def _smoother(config: SmoothConfig) -> Smoother:
    gains = replace(USUAL_GAINS, **_gains(config)).times(config.gain)
    return Smoother(config.every, config.controls, gains, config.source, config.baseline)


def _gains(config: SmoothConfig) -> dict[str, float]:
    """Those of the six gains that are given."""
    known = {name: getattr(config, name, None) for name in vars(USUAL_GAINS)}
    return {name: gain for name, gain in known.items() if gain is not None}


def _templated(base: PlainRun, template: str) -> Schedule | None:
    """lr in the shape of a template; None for a constant one."""
    if template == "constant":
        return None
    assert base.config.lr is not None and base.config.steps is not None
    lr = torch.tensor(base.config.lr, dtype=torch.float64)
    shape: Template = template  # type: ignore[assignment]
    return Schedule({"lr": shaped(lr, template_factors(shape, base.config.steps, 0.2))})


def _train(
    base: PlainRun,
    goal: Goal | None,
    directory: Path,
    number: int,
    schedule: Schedule | None,
    screen: Screen,
) -> Pass:
    """One plain run in a directory of its own; a finished one is not repeated."""
    assert base.config.steps is not None
    progress = Progress(f"{base.config.short_name}, {_name(number)}")
    path = directory / f"pass-{number}"
    record = {"command": "smooth", "pass": number}
    with display(progress, screen) as listener:

        def told(event: Event) -> None:
            # The whole can be resumed, not one of its runs.
            if isinstance(event, RunStarted):
                event = replace(event, directory=directory)
            listener(event)

        result = base.runner(schedule, path, record, told).fit(base.config.steps)
    judged = held_out(result.record, result.tape, goal)
    return Pass(result.schedule, result.tape, judged, (path, result.record))


# The directory of the whole -----------------------------------------------------------------------


def _record(config: SmoothConfig, run: PlainRun) -> dict[str, Any]:
    own = {name: getattr(config, name) for name in OWN} | _gains(config)
    if config.controls != ("lr",):  # all that moved before others did
        own["controls"] = config.controls and list(config.controls)
    return {
        "format": "rhc.config",
        "version": RECORD_VERSION,
        **run.to_record("directory", "resume", "config", "print_config", "plan"),
        "controls": [],
        "command": "smooth",
        "smooth": own,
        "versions": versions(),
        "hardware": hardware(device_of(run.config.device)),
    }


def _default_directory(run: PlainRun, record: dict[str, Any]) -> Path:
    left_out = ("versions", "hardware", "device", "keep_checkpoints")
    told = {name: value for name, value in record.items() if name not in left_out}
    return hashed(f"{run.config.short_name}-smooth", told)


def _finish(whole: RunDirectory, runs: list[Pass], best: int) -> None:
    directory, (path, record) = whole.path, runs[best].result
    for name in COPIED:
        replace_durably(directory / name, (path / name).read_bytes())
    remove(directory / "checkpoints")  # of a killed attempt
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
    whole.finish(runs[best].schedule, result)

"""`rhc replay`: a plain run by an existing schedule, with any seed, batch size or width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rhc.cli.building import (
    PlainRun,
    check_sizes,
    config_of,
    hashed,
    plain_run,
    planned_knobs,
    sizes_of,
    usual_sizes,
)
from rhc.data_weights import DataWeights
from rhc.errors import InputError
from rhc.report.live import Screen
from rhc.schedule import Schedule
from rhc.settings import TrainConfig
from rhc.settings.commands import SIZES, ReplayConfig
from rhc.storage.jsonl import read_lines
from rhc.storage.run_files import WEIGHTS, read_record, read_result
from rhc.workload import refuse_strange

_OF_THE_SOURCE = (
    *("optimizer", "lr", "momentum", "weight_decay", "nesterov", "clip_norm", "clip_value"),
    *("accumulate", "data", "threads", "options"),
)
"""Settings taken from the run that wrote the schedule."""


def run(config: ReplayConfig, screen: Screen) -> int:
    source = _Source.read(config.schedule)
    if config.run is None and source.run is not None:
        refuse_strange(source.run, source.path.with_name("config.json"), trust=config.trust)
    name = config.run or source.run
    if name is None:
        raise InputError(
            f"{config.schedule} does not say what it was made on; name the RUN too, as in "
            f"rhc replay {config.schedule} digits"
        )
    sizes = {size: value for size in SIZES if (value := getattr(config, size)) is not None}
    check_sizes(name, sizes)
    schedule = source.schedule
    length = len(schedule)
    steps = length if config.steps is None else config.steps
    if steps > length and not config.stretch:
        raise InputError(
            f"the schedule {source.path} has {length} steps, fewer than the run's {steps}; add "
            f"--stretch to draw it out, or give --steps {length}"
        )
    stretched = config.stretch and steps != length
    if stretched:
        schedule = schedule.stretched(steps)
    usual = usual_sizes(name)
    factor, why = rescaling(config.rescale, usual | source.sizes, usual | sizes)
    schedule = schedule.rescaled(factor)
    if config.run is not None and source.run != name:
        source = replace(source, weights=None)
        source.settings.pop("options", None)
    given = {"optimizer": config.optimizer, "data": config.data, "threads": config.threads}
    settings = {**source.settings, **{k: v for k, v in given.items() if v is not None}}
    plain = plain_run(
        TrainConfig(
            run=name,
            steps=steps,
            seed=config.seed,
            device=config.device,
            resume=config.resume,
            keep_checkpoints=config.keep_checkpoints,
            data_weights=source.weights or False,
            **settings,
        ),
        sizes,
        stretch=stretched,
    )
    followed = f"the first {steps} steps of {length}"
    if stretched:
        followed = f"stretched from {length} to {steps} steps"
    elif steps == length:
        followed = f"all {steps} steps"
    replayed = {
        "schedule": str(source.path),
        "made_of": source.schedule.digest(),
        "steps": length,
        "stretched": stretched,
        "rescale": config.rescale,
        "factor": factor,
    }
    if source.weights is not None:
        weights = DataWeights.load(source.weights)
        replayed["weights"] = str(weights.describe())
        how = "as they ended" if weights.course is None else "by their course over the steps"
        screen.say(f"weights   {source.weights}, {how}")
    screen.say(f"schedule  {source.path}, {followed}")
    screen.say(f"rescaled  {why}")
    record = {"command": "replay", "replay": replayed}
    for remark in source.remarks(plain.config):
        screen.say(f"note      {remark}")
    directory = config.directory or _default_directory(plain, schedule, record)
    return plain.follow(schedule, directory, record, screen)


def resume(config: TrainConfig, directory: Path, was: Mapping[str, Any], screen: Screen) -> int:
    """Continues the replay in `directory`, and returns the exit status. was: its config.json."""
    schedule = Schedule.load(directory / "schedule.json")
    replayed = was.get("replay") or {}
    own = directory / WEIGHTS  # if the other run's are gone
    if config.data_weights and own.exists():
        config = replace(config, data_weights=str(own))
    config = config.checked()
    plain = plain_run(config, sizes_of(directory), stretch=bool(replayed.get("stretched")))
    record = {"command": "replay", "replay": was.get("replay"), "data": was.get("data")}
    return plain.follow(schedule, directory, record, screen)


def rescaling(rule: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[float, str]:
    """(factor on lr, its explanation). was, now: sizes by name, None if unknown.

    rule: "none"; "linear": × B/B₀ (Goyal et al. 2017); "sqrt": × √(B/B₀), for Adam (Malladi et al.
    2022); "width": × N₀/N, as muP for hidden weights under Adam (Yang et al. 2022). muP exempts
    biases and the first layer: one factor for all, or its use with SGD, is a simplification.
    """
    if rule == "none":
        changed = [name for name in SIZES if was.get(name) != now.get(name)]
        return 1.0, "none: lr as it was" + (f", at another {changed[0]}" if changed else "")
    name = "width" if rule == "width" else "batch_size"
    before, after = was.get(name), now.get(name)
    if not isinstance(before, int) or not isinstance(after, int):
        raise InputError(
            f"rescale {rule} needs to know the {name} that the schedule was made with, which the "
            f"run does not say; give its function a default {name}, or use --rescale none"
        )
    ratio = after / before
    factor = {"linear": ratio, "sqrt": math.sqrt(ratio), "width": 1 / ratio}[rule]
    return factor, f"{rule}: lr x {factor:.4g}, {name.replace('_', ' ')} {before} -> {after}"


def _default_directory(run: PlainRun, schedule: Schedule, record: Mapping[str, Any]) -> Path:
    """runs/<run>-replay-<hash of what the run's numbers depend on, and of the record>."""
    config = run.to_record("directory", "resume", "device", "keep_checkpoints")
    document = [config, run.sizes, schedule.digest(), record]
    return hashed(f"{run.config.short_name}-replay", document)


@dataclass(frozen=True)
class _Source:
    """A schedule and the run that wrote it. planned: first step that was never run."""

    path: Path
    schedule: Schedule
    run: str | None
    settings: dict[str, Any]
    sizes: dict[str, int]
    planned: int | None
    knobs: str = ""
    weights: str | None = None

    @classmethod
    def read(cls, given: Path) -> _Source:
        """From a run's directory, or from a file, which may be in one."""
        if not given.exists():
            raise InputError(
                f"schedule {given} does not exist; give a schedule.json or the directory of a run"
            )
        path = given / "schedule.json" if given.is_dir() else given
        if given.is_dir() and not path.exists():
            raise InputError(
                f"directory {given} has no schedule.json; give a directory that `rhc runs` lists"
            )
        schedule = Schedule.load(path)
        if schedule.start:
            raise InputError(
                f"{path} starts at step {schedule.start}, and a run starts at 0; give a whole "
                "run's schedule"
            )
        directory = path.parent
        record = read_record(directory) if (directory / "config.json").exists() else {}
        if path.name != "schedule.json" or "run" not in record:
            return cls(path, schedule, None, {}, {}, None)
        old = config_of(directory, trust=True)  # for its settings only: its code is not run here
        settings = {name: getattr(old, name) for name in _OF_THE_SOURCE}
        result = directory / "result.json"
        if result.exists() and read_result(directory).get("ends_with") == "best":
            settings |= {"keep_best": True, "validate_every": old.validate_every}
            settings["window"] = old.stride or old.window  # after which states are validated
        if settings["data"] is not None and not settings["data"].exists():
            del settings["data"]
        rows = sum(1 for _ in read_lines(directory / "tape.jsonl"))
        planned = rows if rows < len(schedule) else None
        sizes, knobs = sizes_of(directory), planned_knobs(old)
        weights = str(directory / WEIGHTS) if (directory / WEIGHTS).is_file() else None
        return cls(path, schedule, old.run, settings, sizes, planned, knobs, weights)

    def remarks(self, config: TrainConfig) -> list[str]:
        found = []
        if self.planned is not None:
            found.append(
                f"the run that wrote it has not ended: from step {self.planned} it is a plan"
            )
        if self.knobs:
            found.append(f"what was planned in {self.knobs} is not in it, and not replayed")
        made_with = self.settings.get("optimizer")
        if made_with not in (None, config.optimizer):
            found.append(f"it was made with {made_with}, and is followed with {config.optimizer}")
        return found

"""`rhc replay`: a plain run by a schedule that is there already, on any seed, batch size or width.

`PlainRun` is such a run before it has a schedule; the smoother, which trains again and again by
schedules of its own, goes through it too.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rhc.cli.train import built_optimizer, config_of, device_of, recorded, shown
from rhc.errors import InputError
from rhc.events import Listener
from rhc.rng import seed_everything
from rhc.runner import DivergedError, Runner
from rhc.schedule import CONTROLS, Schedule
from rhc.settings import TrainConfig
from rhc.settings.commands import ReplayConfig
from rhc.storage.files import check_kinds
from rhc.storage.jsonl import read_lines
from rhc.storage.run_files import RUNS, read_record
from rhc.workload import Workload, load_runner, refuse_strange

_OF_THE_SOURCE = (
    *("optimizer", "lr", "momentum", "weight_decay", "nesterov", "clip_norm", "clip_value"),
    *("accumulate", "data", "threads"),
)
"""Settings that a replay takes over from the run that wrote the schedule."""

_SIZES = ("batch_size", "width")


@dataclass(frozen=True)
class Sizes:
    """What the run function is asked for besides seed and data; None leaves it to the function."""

    batch_size: int | None = None
    width: int | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any], path: Path) -> Sizes:
        """Those that config.json, which is at `path`, says a run was asked for."""
        check_kinds(record, dict.fromkeys(_SIZES, (int, type(None))), path)
        return cls(*(record.get(name) for name in ("batch_size", "width")))

    def given(self) -> dict[str, int]:
        """Those that are asked for."""
        return {name: v for name in _SIZES if (v := getattr(self, name)) is not None}

    def check(self, run: str) -> None:
        """Raises InputError where the run function knows no such size."""
        known = _parameters(run)
        for name, value in self.given().items():
            if name not in known:
                raise InputError(
                    f"run {run!r} has no {name} of its own choosing, got {value}; leave "
                    f"--{name.replace('_', '-')} out, or let its function take {name}"
                )

    def usual(self, run: str) -> Sizes:
        """These, with the run function's own defaults filled in."""
        own = {name: _parameters(run).get(name) for name in _SIZES}
        return Sizes(**{**own, **self.given()})


def _parameters(run: str) -> dict[str, Any]:
    """The run function's arguments and their defaults."""
    found = inspect.signature(load_runner(run)).parameters
    return {name: p.default for name, p in found.items()}


@dataclass(frozen=True)
class PlainRun:
    """A run with no rewriting, ready for a schedule. config: resolved by `plain_run`."""

    config: TrainConfig
    sizes: Sizes = Sizes()

    def workload(self) -> Workload:
        """The run's model and data, as they are at step 0, on its device."""
        config = self.config
        assert config.threads is not None
        seed_everything(config.seed)
        workload = load_runner(config.run)(seed=config.seed, data=config.data, **self.sizes.given())
        torch.set_num_threads(config.threads)
        workload.model.to(device_of(config.device))
        return workload

    def runner(
        self,
        schedule: Schedule | None,
        directory: Path | None,
        record: Mapping[str, Any],
        listeners: Sequence[Listener] = (),
        *,
        spent: float = 0.0,
    ) -> Runner:
        """A Runner that follows `schedule`, or keeps the optimizer's own controls without one.

        record: what config.json has besides the settings. spent: plain runs on its ledger already.
        """
        config, workload = self.config, self.workload()
        runner = Runner(
            workload.model,
            built_optimizer(config, workload),
            workload.loss_fn,
            workload.train_loader,
            workload.val_loader,
            test_loader=workload.test_loader,
            window=config.window,
            rewrite=False,
            schedule=schedule,
            accumulate=config.accumulate,
            clip_norm=config.clip_norm,
            clip_value=config.clip_value,
            directory=directory,
            keep_checkpoints=config.keep_checkpoints,
            seed=config.seed,
            listeners=listeners,
            config={**recorded(config), **self.sizes.given(), **record},
        )
        assert config.steps is not None
        runner.owed = spent * config.steps
        return runner


def plain_run(config: TrainConfig, sizes: Sizes) -> PlainRun:
    """The run of these settings, those that they leave open filled in from the workload."""
    sizes.check(config.run)
    device_of(config.device)
    for name in ("lr", "momentum", "weight_decay"):
        if (value := getattr(config, name)) is not None:
            CONTROLS[name].check(value)
    seed_everything(config.seed)
    workload = load_runner(config.run)(seed=config.seed, data=config.data, **sizes.given())
    resolved = replace(config, rewrite=False, start="given").resolved(
        workload, torch.get_num_threads()
    )
    return PlainRun(resolved, sizes)


# The command --------------------------------------------------------------------------------------


def replay(config: ReplayConfig, console: Console) -> int:
    """Trains by the schedule that is named, and returns the exit status."""
    source = _Source.read(config.schedule)
    if config.run is None and source.run is not None:
        refuse_strange(source.run, source.path.with_name("config.json"), trust=config.trust)
    name = config.run or source.run
    if name is None:
        raise InputError(
            f"{config.schedule} does not say what it was made on; name the RUN too, as in "
            f"rhc replay {config.schedule} digits"
        )
    sizes = Sizes(config.batch_size, config.width)
    sizes.check(name)
    schedule = source.schedule
    length = len(schedule)
    steps = length if config.steps is None else config.steps
    if steps > length and not config.stretch:
        raise InputError(
            f"the schedule {source.path} has {length} steps, fewer than the run's {steps}; add "
            f"--stretch to draw it out, or give --steps {length}"
        )
    if config.stretch:
        schedule = schedule.stretched(steps)
    factor, why = rescaling(config.rescale, source.sizes.usual(name), sizes.usual(name))
    schedule = schedule.rescaled(factor)
    given = {"optimizer": config.optimizer, "data": config.data, "threads": config.threads}
    settings = {**source.settings, **{k: v for k, v in given.items() if v is not None}}
    run = plain_run(
        TrainConfig(
            run=name,
            steps=steps,
            seed=config.seed,
            device=config.device,
            resume=config.resume,
            keep_checkpoints=config.keep_checkpoints,
            **settings,
        ),
        sizes,
    )
    followed = (
        f"stretched from {length} to {steps} steps"
        if steps != length and config.stretch
        else f"{'all' if steps == length else 'the first'} {steps} steps"
        + ("" if steps == length else f" of {length}")
    )
    record = {
        "command": "replay",
        "replay": {
            "schedule": str(source.path),
            "made_of": source.schedule.digest(),
            "steps": length,
            "stretched": config.stretch and steps != length,
            "rescale": config.rescale,
            "factor": factor,
        },
    }
    console.print(f"schedule  {source.path}, {followed}", highlight=False, soft_wrap=True)
    console.print(f"rescaled  {why}", highlight=False, soft_wrap=True)
    for remark in source.remarks(run.config):
        console.print(f"note      {remark}", highlight=False, soft_wrap=True)
    directory = config.directory or _default_directory(run, schedule, record)
    return follow(run, schedule, directory, record, console)


def resume_replay(
    directory: Path, data: Path | None, device: str | None, console: Console, *, trust: bool
) -> int:
    """Continues the replay in `directory`, and returns the exit status."""
    old = read_record(directory)
    config = config_of(directory, trust=trust)
    config = replace(config, data=data or config.data, device=device or config.device)
    sizes = Sizes.of(old, directory / "config.json")
    schedule = Schedule.load(directory / "schedule.json")
    run = plain_run(config.checked(), sizes)
    record = {"command": "replay", "replay": old.get("replay"), "data": old.get("data")}
    return follow(run, schedule, directory, record, console)


def rescaling(rule: str, was: Sizes, now: Sizes) -> tuple[float, str]:
    """(the factor on lr, what it is and why, in words).

    rule: "none"; "linear": × B/B₀ (Goyal et al. 2017); "sqrt": × √(B/B₀), for Adam (Malladi et al.
    2022); "width": × N₀/N, as muP has it for hidden weights under Adam (Yang et al. 2022). muP
    leaves the lr of biases and of the first layer: one factor for all is a simplification, and so
    is its use with SGD.
    """
    if rule == "none":
        changed = [n for n in _SIZES if getattr(was, n) != getattr(now, n)]
        return 1.0, "none: lr as it was" + (f", at another {changed[0]}" if changed else "")
    name = "width" if rule == "width" else "batch_size"
    before, after = getattr(was, name), getattr(now, name)
    if not isinstance(before, int) or not isinstance(after, int):
        raise InputError(
            f"rescale {rule} needs to know the {name} that the schedule was made with, which the "
            f"run does not say; give its function a default {name}, or use --rescale none"
        )
    ratio = after / before
    factor = {"linear": ratio, "sqrt": math.sqrt(ratio), "width": 1 / ratio}[rule]
    return factor, f"{rule}: lr x {factor:.4g}, {name.replace('_', ' ')} {before} -> {after}"


def _default_directory(run: PlainRun, schedule: Schedule, record: Mapping[str, Any]) -> Path:
    """runs/<run>-replay-<hash of everything that the run's numbers depend on, and of the record>.

    Two runs can have written the same schedule, and each has a replay of its own.
    """
    config = run.config.to_record()
    for name in ("directory", "resume", "device", "keep_checkpoints"):
        del config[name]
    content = json.dumps([config, run.sizes.given(), schedule.digest(), record], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()[:8]
    return RUNS / f"{run.config.short_name}-replay-{digest}"


def follow(
    run: PlainRun,
    schedule: Schedule,
    directory: Path,
    record: Mapping[str, Any],
    console: Console,
    *,
    spent: float = 0.0,
) -> int:
    """The run, shown while it goes, and its exit status.

    spent: plain runs that went into the schedule and belong on this run's ledger.
    """
    return shown(
        run.config,
        directory,
        console,
        lambda listener: run.runner(schedule, directory, record, [listener], spent=spent),
        _mended,
    )


def _mended(error: DivergedError) -> str:
    """What went wrong, with what a replay can do about it."""
    what = str(error).partition(";")[0]
    return f"{what}; choose another --rescale, or a schedule with a lower lr"


@dataclass(frozen=True)
class _Source:
    """A schedule and what is known of the run that wrote it.

    settings: fields of TrainConfig. sizes: that the run was asked for. planned: the step from which
    on the schedule was never run; None where it was run to its end, or where nobody knows.
    """

    path: Path
    schedule: Schedule
    run: str | None
    settings: dict[str, Any]
    sizes: Sizes
    planned: int | None

    @classmethod
    def read(cls, given: Path) -> _Source:
        """From the directory of a run, or from a file, which may lie in such a directory."""
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
        beside = path.parent / "config.json"
        record = read_record(path.parent) if beside.exists() else {}
        if path.name != "schedule.json" or "run" not in record:
            return cls(path, schedule, None, {}, Sizes(), None)
        old = config_of(path.parent, trust=True)  # for its settings: what it names is not run here
        settings = {name: getattr(old, name) for name in _OF_THE_SOURCE}
        if settings["data"] is not None and not settings["data"].exists():
            del settings["data"]
        sizes = Sizes.of(record, beside)
        rows = sum(1 for _ in read_lines(path.parent / "tape.jsonl"))
        return cls(path, schedule, old.run, settings, sizes, rows if rows < len(schedule) else None)

    def remarks(self, config: TrainConfig) -> list[str]:
        """What a person should know before the run begins."""
        found = []
        if self.planned is not None:
            found.append(
                f"the run that wrote it has not ended: from step {self.planned} it is a plan"
            )
        made_with = self.settings.get("optimizer")
        if made_with not in (None, config.optimizer):
            found.append(f"it was made with {made_with}, and is followed with {config.optimizer}")
        return found

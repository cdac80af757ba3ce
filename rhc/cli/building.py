"""From settings to what is trained: device, optimizer, Runner, and runs as recorded."""

from __future__ import annotations

import hashlib
import inspect
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from rhc.data_weights import DataWeights, unweighed
from rhc.distributed import synchronised
from rhc.errors import DivergedError, InputError, RunWarning, plain
from rhc.events import Listener
from rhc.loop.update_rule import Rewrite
from rhc.report.live import Progress, Screen, display
from rhc.report.loggers import TensorBoard
from rhc.report.text import print_result
from rhc.rng import seed_everything
from rhc.runner import Runner
from rhc.schedule import CONTROLS, Schedule, control
from rhc.schedulers.planner import STEERED, planned
from rhc.settings import Engine, Run, Shape, Step, TrainConfig, Window
from rhc.settings.commands import SIZES, SmoothConfig
from rhc.settings.owners import OptimizerSettings
from rhc.storage.files import check_kinds, parsed_json
from rhc.storage.run_files import RUNS, read_record
from rhc.training.objective import Objective
from rhc.training.plant import Plant
from rhc.workload import Workload, load_runner, optimizer_of, refuse_strange

LATER = ("planner", "inexact_replay", "data_weights", "options", "passes", "keep_best", "bounded")
"""Settings that no plain run has, and that did not exist when the first directories were named."""


def device_of(name: str) -> torch.device:
    """The torch device of a setting; an InputError where it is not available."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError(
            "device must be one that torch finds, got 'cuda' where torch.cuda.is_available() is "
            "False; use --device cpu"
        )
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def check_controls(config: TrainConfig) -> None:
    """Raises InputError for unknown controls and values out of bounds."""
    for name in (*(config.controls or ()), *(config.per_group or ())):
        control(name)
    for name in ("lr", "momentum", "weight_decay"):
        value = getattr(config, name)
        if value is not None:
            CONTROLS[name].check(value)


def hashed(name: str, document: Any) -> Path:
    """runs/<name>-<hash of the document>: the default directory of a run."""
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    return RUNS / f"{name}-{digest[:8]}"


def built_workload(
    config: TrainConfig, sizes: Mapping[str, int], *, stretch: bool = True
) -> Workload:
    """The run's model and data at step 0. sizes: keywords of its function. stretch: whether the
    course of data weights is fitted to the run's length."""
    seed_everything(config.seed)
    options = keywords_from(config.run, config.options or ())
    workload = load_runner(config.run)(seed=config.seed, data=config.data, **options, **sizes)
    if not config.data_weights:
        return unweighed(workload)
    own = workload.data_weights
    if own is None:
        raise InputError(
            f"runner {config.run!r} has no data weights: give its Workload data_weights="
            "rhc.DataWeights(…) and let loss_fn return one loss per row; or leave --data-weights "
            "out"
        )
    if isinstance(config.data_weights, str):
        found = DataWeights.load(config.data_weights, None if own.of_terms else own.cell_of)
        if (len(found), found.names) != (len(own), own.names):
            raise InputError(
                f"{config.data_weights} has {len(found)} cells, and the data of {config.run} "
                f"{len(own)}, or others; give weights that were learned on these data"
            )
        steps = config.steps or workload.steps
        found = found.stretched(steps) if stretch else found
        return replace(workload, data_weights=found)
    return workload


def keywords_of(run: str) -> dict[str, Any]:
    """name -> default of the keywords of a run's function; {} of what is no run."""
    try:
        function = inspect.signature(load_runner(run))
    except (InputError, ImportError, OSError):
        return {}
    given = {n: p.default for n, p in function.parameters.items() if n not in ("seed", "data")}
    return {n: v for n, v in given.items() if v is not inspect.Parameter.empty}


def keywords_from(run: str, options: Sequence[str]) -> dict[str, Any]:
    """The values of NAME=VALUE, of the type of the keyword's default."""
    usual, found = keywords_of(run), dict[str, Any]()
    for option in options:
        name, _, text = option.partition("=")
        if name not in usual:
            raise InputError(
                f"run {run!r} has no option {name!r}; it has: {', '.join(usual) or 'none'}"
            )
        kind = type(usual[name])
        try:
            found[name] = parsed_json(text.encode()) if kind in (bool, type(None)) else kind(text)
        except ValueError:
            raise InputError(
                f"option {name} of run {run!r} must be like {usual[name]!r}, got {text!r}; try "
                f"--{name.replace('_', '-')} {usual[name]}"
            ) from None
    return found


def built_optimizer(config: TrainConfig, workload: Workload) -> torch.optim.Optimizer:
    parameters: Any = workload.parameter_groups or workload.model.parameters()
    assert config.optimizer is not None and config.lr is not None
    return optimizer_of(
        config.optimizer,
        parameters,
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def built_plant(config: TrainConfig, workload: Workload, optimizer: torch.optim.Optimizer) -> Plant:
    return Plant(
        workload.model,
        optimizer,
        workload.loss_fn,
        seed=config.seed,
        clip_norm=config.clip_norm,
        clip_value=config.clip_value,
        data_weights=workload.data_weights,
    )


def built_runner(
    config: TrainConfig,
    workload: Workload,
    directory: Path | None,
    listeners: Sequence[Listener] = (),
    *,
    rewrite: Rewrite | Literal[False] = False,
    objective: Objective | None = None,
    schedule: Schedule | None = None,
    record: Mapping[str, Any],
) -> Runner:
    """The Runner of a workload. config: resolved. record: of config.json, beside the settings."""
    owners = (Window, Shape, Engine, Step)
    settings = {name: getattr(config, name) for owner in owners for name in owner.known()}
    optimizer, planner = built_optimizer(config, workload), None
    if config.planner is not None:
        workload, planner = planned(workload, config.planner, optimizer)
    # Existing event files are continued.
    events = None if directory is None else directory / "tensorboard"
    logged = events is not None and (config.tensorboard or events.is_dir())
    return Runner(
        workload.model,
        optimizer,
        workload.loss_fn,
        workload.train_loader,
        workload.val_loader,
        test_loader=workload.test_loader,
        **{**settings, "per_group": config.per_group or (), "data_weights": workload.data_weights},
        rewrite=rewrite,
        schedule=schedule,
        objective=objective,
        directory=directory,
        validate_every=config.validate_every,
        keep_best=config.keep_best,
        keep_checkpoints=config.keep_checkpoints,
        seed=config.seed,
        planner=planner,
        progress=False,
        listeners=listeners,
        logger=TensorBoard(events) if logged and events is not None else None,
        config={**config.recorded(), **record},
    )


def shown(
    config: TrainConfig,
    directory: Path,
    screen: Screen,
    build: Callable[[Listener], Runner],
    told: Callable[[DivergedError], str] = str,
) -> int:
    """Runs what `build` makes, with a display; the exit status. told: words for a diverged run."""
    assert config.steps is not None
    progress = Progress(config.short_name)
    try:
        with display(progress, screen) as listener, warnings.catch_warnings():
            warnings.simplefilter("ignore", RunWarning)  # the display says the same
            runner = build(listener)
            # N ranks do what one process does, statistics of batches included.
            with synchronised(runner.plant.model, runner.ranks, every=True):
                runner.fit(config.steps, cast(Literal["auto", "never"], config.resume))
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        # Earlier work is saved, whether the run was stopped or lost its reader.
        text = " before the first step"
        if progress.started:
            saved = f"{progress.saved} of {progress.steps} steps are saved"
            text = f"; {saved}; resume with: rhc resume {shlex.quote(str(directory))}"
        print(f"rhc: stopped{text}", file=sys.stderr)
        if isinstance(stop, BrokenPipeError):
            raise
        return 130
    except DivergedError as error:
        print(plain(f"rhc: error: {told(error)}"), file=sys.stderr)
        return 1
    assert progress.result is not None
    if not progress.started:
        screen.say(
            f"{directory} holds this run, finished; to train anew give another --seed or "
            "--directory"
        )
    screen.print()
    print_result(screen, progress.result, directory, inspect=True)
    return 0


# Plain runs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlainRun:
    """A run without rewriting, ready for a schedule. config: resolved. sizes: of its function.
    stretch: whether a course of data weights is stretched to its length."""

    config: TrainConfig
    sizes: Mapping[str, int]
    stretch: bool = False

    def to_record(self, *without: str) -> dict[str, Any]:
        """Its settings. Directories are named by their hash."""
        return self.config.to_record(*LATER, *without)

    def workload(self) -> Workload:
        workload = built_workload(self.config, self.sizes, stretch=self.stretch)
        assert self.config.threads is not None
        torch.set_num_threads(self.config.threads)
        workload.model.to(device_of(self.config.device))
        return workload

    def runner(
        self,
        schedule: Schedule | None,
        directory: Path,
        record: Mapping[str, Any],
        listener: Listener,
        *,
        spent: float = 0.0,
    ) -> Runner:
        """A Runner that follows `schedule`, if any. spent: plain runs on its ledger."""
        runner = built_runner(
            self.config,
            self.workload(),
            directory,
            [listener],
            schedule=schedule,
            record={**self.sizes, **record},
        )
        assert self.config.steps is not None
        runner.prior_cost = spent * self.config.steps
        return runner

    def follow(
        self,
        schedule: Schedule,
        directory: Path,
        record: Mapping[str, Any],
        screen: Screen,
        *,
        spent: float = 0.0,
    ) -> int:
        return shown(
            self.config,
            directory,
            screen,
            lambda listener: self.runner(schedule, directory, record, listener, spent=spent),
            lambda error: (
                f"{str(error).partition(';')[0]}; choose another --rescale, or a "
                "schedule with a lower lr"
            ),
        )


def plain_settings(config: SmoothConfig | TrainConfig) -> dict[str, Any]:
    """Settings that a run's numbers depend on where nothing is rewritten."""
    owners = (Run, OptimizerSettings, Step)
    return {name: getattr(config, name) for owner in owners for name in owner.known()}


def plain_run(config: TrainConfig, sizes: Mapping[str, int], *, stretch: bool = False) -> PlainRun:
    """The run of these settings, completed by the workload's defaults."""
    check_sizes(config.run, sizes)
    device_of(config.device)
    check_controls(config)
    workload = built_workload(config, sizes)
    plain = replace(config, rewrite=False, start="given", planner=None)
    return PlainRun(plain.resolved(workload, torch.get_num_threads()), sizes, stretch)


def check_sizes(run: str, sizes: Mapping[str, int]) -> None:
    for name, value in sizes.items():
        if name not in usual_sizes(run):
            raise InputError(
                f"run {run!r} has no {name} of its own choosing, got {value}; leave "
                f"--{name.replace('_', '-')} out, or let its function take {name}"
            )


def usual_sizes(run: str) -> dict[str, Any]:
    found = inspect.signature(load_runner(run)).parameters
    return {name: found[name].default for name in SIZES if name in found}


# Runs as they were --------------------------------------------------------------------------------


def config_of(
    directory: Path, *, trust: bool, data: Path | None = None, device: str | None = None
) -> TrainConfig:
    """The settings of the run in `directory`. trust: whether they may name any file to run."""
    path = directory / "config.json"
    was = TrainConfig.from_run(read_record(directory), path)
    refuse_strange(was.run, path, trust=trust)
    data, device = data or was.data, device or was.device
    return replace(was, directory=directory, data=data, device=device)


def planned_knobs(config: TrainConfig) -> str:
    """Names of what an epoch planner drove in the loss or the data, which no schedule holds."""
    return ", ".join(name for name in config.planner or () if name not in STEERED)


def sizes_of(directory: Path) -> dict[str, int]:
    record = read_record(directory)
    check_kinds(record, dict.fromkeys(SIZES, (int, type(None))), directory / "config.json")
    return {name: record[name] for name in SIZES if record.get(name) is not None}

"""`rhc train` once its flags are read: from a TrainConfig to a run that is finished or stopped.

Nothing is created before everything that can be checked has been.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from rich.text import Text

from rhc.distributed import ranks_of, synchronised
from rhc.errors import InputError, RunWarning, plain
from rhc.events import Listener
from rhc.hypergradient import Engine, Product
from rhc.loop.lr_search import Start
from rhc.loop.update_rule import Rewrite, usual_law, usual_objective, usual_template, usual_warmup
from rhc.report.live import Progress, display
from rhc.report.loggers import Logging, TensorBoard
from rhc.report.text import print_result
from rhc.report.watch import Followed
from rhc.rng import seed_everything
from rhc.runner import DivergedError, Runner
from rhc.schedule import CONTROLS, Template, control
from rhc.settings import RECORD_VERSION, TrainConfig, parsed_bytes
from rhc.storage.run_files import RUNS, read_record
from rhc.training.objective import Objective
from rhc.workload import Workload, load_runner, optimizer_of, refuse_strange

NOT_HASHED = (
    *("directory", "resume", "device", "keep_checkpoints", "tensorboard"),
    *("config", "print_config", "plan"),
)
"""Settings that two runs in one directory may differ in."""

_DESCRIBED = ("rewrite", "controls", "segment", "device", "memory_budget")
"""Entries of config.json that the Runner writes in its own, resolved form."""

_RECORDED_IF_GIVEN = (
    "accumulate",
    "deterministic",
    "clip_value",
    "per_group",
    "discount",
    "costate_clip",
    "template",
    "warmup",
    "validate_every",
)
"""Settings that runs which were begun before they existed do not have in their config.json."""


def train(config: TrainConfig, console: Console, *, recorded_data: Path | None = None) -> int:
    """Trains, and returns the exit status. config: checked by itself (`TrainConfig.checked`).

    recorded_data: what config.json says of a resumed run's data, where they have moved since.
    """
    runner_function = load_runner(config.run)
    _check_controls(config)
    device = device_of(config.device)
    seed_everything(config.seed)
    workload = runner_function(seed=config.seed, data=config.data)
    config = config.resolved(workload, torch.get_num_threads())
    law, objective, config = _law(config)
    _check_controls(config)
    if config.print_config:
        console.out(config.to_toml(), end="", highlight=False)
        return 0

    if recorded_data is not None:
        config = replace(config, data=recorded_data)
    assert config.threads is not None and config.steps is not None
    torch.set_num_threads(config.threads)
    workload.model.to(device)
    directory = config.directory or _default_directory(config, law, objective)
    if config.config is not None and config.directory is None:
        directory = _apart(directory, config.config)
    if config.plan:
        for line in _runner(config, workload, law, objective, directory).plan():
            console.out(line, highlight=False)
        return 0
    status = shown(
        config,
        directory,
        console,
        lambda listener: _runner(config, workload, law, objective, directory, listener),
    )
    ranks = ranks_of("auto")
    if status == 0 and (ranks is None or ranks.first):
        if config.tensorboard and not (directory / "tensorboard").is_dir():
            _log_again(directory)
        _report(console, directory)
    return status


def shown(
    config: TrainConfig,
    directory: Path,
    console: Console,
    build: Callable[[Listener], Runner],
    told: Callable[[DivergedError], str] = str,
) -> int:
    """Runs to the end what `build` makes, shown while it goes, and returns the exit status.

    told: what is said of a run that diverged.
    """
    assert config.steps is not None
    progress = Progress(config.short_name)
    try:
        with display(progress, console) as listener, warnings.catch_warnings():
            warnings.simplefilter("ignore", RunWarning)  # the display says the same
            runner = build(listener)
            # N ranks do what one process does, statistics of batches included.
            with synchronised(runner.plant.model, runner.ranks, every=True):
                runner.fit(config.steps, cast(Literal["auto", "never"], config.resume))
    except (KeyboardInterrupt, BrokenPipeError) as stop:
        # What a run did until then is saved, whether it was stopped or lost its reader.
        status = _interrupted(progress, directory)
        if isinstance(stop, BrokenPipeError):
            raise
        return status
    except DivergedError as error:
        print(plain(f"rhc: error: {told(error)}"), file=sys.stderr)
        return 1
    assert progress.result is not None
    if not progress.started:
        already = "holds this run, finished; to train anew give another --seed or --directory"
        console.print(f"{directory} {already}", highlight=False, soft_wrap=True)
    console.print()
    print_result(console, progress.result, directory, inspect=True)
    return 0


def _log_again(directory: Path) -> None:
    """Event files of a run that had ended before they were asked for, from its own files."""
    logging = Logging(TensorBoard(directory / "tensorboard"), read_record(directory))
    files = Followed(directory)
    for event in (files.begun, *files.news()):
        logging(event)


def _report(console: Console, directory: Path) -> None:
    """Writes report.html into the run's directory; whatever hinders it is one line, no error."""
    from rhc.report import missing_packages, write_report

    missing = missing_packages()
    if missing:
        text = f"no page: {' and '.join(missing)} are not installed; pip install 'rhc[report]'"
    else:
        try:
            text = str(write_report([directory]))
        except Exception as error:  # the run has ended well, and its files are all there
            text = f"no page: {error}"
    console.print(Text.assemble(("report    ", "dim"), text), soft_wrap=True)


def config_of(directory: Path, *, trust: bool) -> TrainConfig:
    """The settings of the run in `directory`, from its config.json, to continue it.

    trust: whether they may name any file to run, see `rhc.workload.refuse_strange`.
    """
    record = read_record(directory)
    path = directory / "config.json"
    config = replace(TrainConfig.from_run(record, path), directory=directory)
    refuse_strange(config.run, path, trust=trust)
    return config


# Checks -------------------------------------------------------------------------------------------


def _check_controls(config: TrainConfig) -> None:
    """Unknown names, and values outside their bounds."""
    for name in (*(config.controls or ()), *(config.per_group or ())):
        control(name)
    for name in ("lr", "momentum", "weight_decay"):
        value = getattr(config, name)
        if value is not None:
            CONTROLS[name].check(value)


def device_of(name: str) -> torch.device:
    """The device that a setting means; one that torch does not find is an InputError."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError(
            "device must be one that torch finds, got 'cuda' where torch.cuda.is_available() is "
            "False; use --device cpu"
        )
    return torch.device("cuda" if available and name != "cpu" else "cpu")


# Parts of a run -----------------------------------------------------------------------------------


def _law(config: TrainConfig) -> tuple[Rewrite | Literal[False], Objective, TrainConfig]:
    """The law and the objective, and the settings with what these left open filled in."""
    if not config.rewrite:
        return False, Objective(), config
    given: dict[str, Any] = {
        "cooldown": config.cooldown,
        "until": config.until,
        "budget": config.budget,
    }
    assert config.start is not None
    law = replace(
        usual_law(config.start),
        **{name: value for name, value in given.items() if value is not None},
    )
    chosen: dict[str, Any] = {}
    if config.average is not None:
        chosen["average"] = config.average or None
    if config.objective_batches is not None:
        chosen["batches"] = config.objective_batches
    objective = replace(usual_objective(config.start, config.window), **chosen)
    steers_lr = config.controls is None or "lr" in config.controls
    return (
        law,
        objective,
        replace(
            config,
            cooldown=law.cooldown if steers_lr else None,
            until=law.until,
            budget=law.budget if math.isfinite(law.budget) else None,
            average=objective.average or 0.0,
            objective_batches=objective.count,
        ),
    )


def _runner(
    config: TrainConfig,
    workload: Workload,
    law: Rewrite | Literal[False],
    objective: Objective,
    directory: Path,
    *listeners: Listener,
) -> Runner:
    return Runner(
        workload.model,
        built_optimizer(config, workload),
        workload.loss_fn,
        workload.train_loader,
        workload.val_loader,
        test_loader=workload.test_loader,
        window=config.window,
        stride=config.stride,
        controls=config.controls,
        per_group=config.per_group or (),
        start=cast(Start, config.start),
        template=cast(Template | None, config.template),
        warmup=config.warmup,
        rewrite=law,
        objective=objective,
        engine=cast(Engine, config.engine),
        product=cast(Literal["auto"] | Product, config.product),
        segment="auto" if config.segment == "auto" else int(config.segment),
        memory_budget=None if config.memory_budget is None else parsed_bytes(config.memory_budget),
        discount=config.discount,
        costate_clip=config.costate_clip,
        accumulate=config.accumulate,
        clip_norm=config.clip_norm,
        clip_value=config.clip_value,
        directory=directory,
        deterministic=config.deterministic,
        validate_every=config.validate_every,
        keep_checkpoints=config.keep_checkpoints,
        seed=config.seed,
        listeners=listeners,
        logger=_tensorboard(config, directory),
        config=recorded(config),
    )


def _tensorboard(config: TrainConfig, directory: Path) -> TensorBoard | None:
    """The run's event files, where they are asked for or were begun."""
    folder = directory / "tensorboard"
    return TensorBoard(folder) if config.tensorboard or folder.is_dir() else None


def built_optimizer(config: TrainConfig, workload: Workload) -> torch.optim.Optimizer:
    """The optimizer of the workload's parameters. config: resolved."""
    parameters: Any = workload.parameter_groups or workload.model.parameters()
    assert config.lr is not None and config.weight_decay is not None
    assert config.optimizer is not None
    return optimizer_of(
        config.optimizer,
        parameters,
        config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def recorded(config: TrainConfig) -> dict[str, Any]:
    """The command line's part of config.json."""
    record = {k: v for k, v in config.to_record().items() if k not in _DESCRIBED}
    for name in ("print_config", "plan", "keep_checkpoints", "tensorboard"):
        del record[name]
    usual = TrainConfig().to_record()
    for name in _RECORDED_IF_GIVEN:
        if record[name] == usual[name]:
            del record[name]
    return {"format": "rhc.config", "version": RECORD_VERSION, **record}


def _default_directory(
    config: TrainConfig, law: Rewrite | Literal[False], objective: Objective
) -> Path:
    """runs/<run>-<hash of everything that the run's numbers depend on>.

    The same for a run and its repetition by config.json, where what was left open stands resolved;
    and a setting at its default is left out, so that a new one changes no run's directory.
    """
    adaptive = "adam" in str(config.optimizer)
    start = str(config.start)
    controls = config.controls or (("lr",) if config.rewrite else None)
    warmup = usual_warmup(start, adaptive) if config.warmup is None else config.warmup
    budget = config.memory_budget and str(parsed_bytes(config.memory_budget))
    resolved = replace(
        config,
        template=config.template or usual_template(start, adaptive, config.rewrite),
        warmup=warmup,
        controls=controls,
        memory_budget=budget,
    ).to_record()
    usual = TrainConfig().to_record()
    record: Mapping[str, Any] = {
        **{k: v for k, v in resolved.items() if k not in NOT_HASHED and v != usual[k]},
        "law": law and asdict(law),
        "objective": vars(objective),
    }
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return RUNS / f"{config.short_name}-{digest[:8]}"


def _apart(directory: Path, source: Path) -> Path:
    """The directory, or the next one, NAME-2 …, where it is that of the run that is repeated.

    A repetition that was interrupted is continued by the same command.
    """
    number, found = 1, directory
    while found.resolve() == source.resolve().parent or (
        number > 1 and (found / "result.json").exists()
    ):
        number += 1
        found = directory.with_name(f"{directory.name}-{number}")
    return found


def _interrupted(progress: Progress, directory: Path) -> int:
    """Says how to go on after Ctrl-C or SIGTERM, and returns the exit status of the former."""
    saved = f"{progress.saved} of {progress.steps} steps are saved"
    print(
        f"rhc: stopped; {saved}; resume with: rhc resume {shlex.quote(str(directory))}"
        if progress.started
        else "rhc: stopped before the first step",
        file=sys.stderr,
    )
    return 130

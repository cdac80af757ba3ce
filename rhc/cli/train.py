"""`rhc train`: from a TrainConfig to a finished run. Nothing is created before all checks."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.text import Text

from rhc.cli.building import (
    built_runner,
    built_workload,
    check_controls,
    device_of,
    hashed,
    shown,
)
from rhc.distributed import ranks_of
from rhc.events import Listener
from rhc.loop.description import GONE_RULE, of_objective
from rhc.loop.update_rule import Rewrite, usual_law, usual_objective, usual_template, usual_warmup
from rhc.report.live import Screen
from rhc.report.loggers import Logging, TensorBoard
from rhc.report.watch import Followed
from rhc.runner import Runner
from rhc.settings import TrainConfig
from rhc.settings.fields import plain_value
from rhc.storage.run_files import read_record
from rhc.training.objective import Objective, bounded
from rhc.workload import load_runner


def run(config: TrainConfig, screen: Screen, *, recorded_data: Path | None = None) -> int:
    """Trains, and returns the exit status. recorded_data: of a run whose data have moved."""
    load_runner(config.run)
    check_controls(config)
    device = device_of(config.device)
    workload = built_workload(config, {})
    config = config.resolved(workload, torch.get_num_threads())
    law, objective, config = _law(config)
    check_controls(config)
    if config.print_config:
        screen.out(config.to_toml(), end="", highlight=False)
        return 0

    if recorded_data is not None:
        config = replace(config, data=recorded_data)
    assert config.threads is not None
    torch.set_num_threads(config.threads)
    workload.model.to(device)
    directory = config.directory or _default_directory(config, law, objective)
    if config.config is not None and config.directory is None:
        directory = _apart(directory, config.config)

    def built(*listeners: Listener) -> Runner:
        return built_runner(
            config, workload, directory, listeners, rewrite=law, objective=objective, record={}
        )

    if config.plan:
        for line in built().plan():
            screen.out(line, highlight=False)
        return 0
    status = shown(config, directory, screen, built)
    ranks = ranks_of("auto")
    if status == 0 and (ranks is None or ranks.first):
        if config.tensorboard:
            if not (directory / "tensorboard").is_dir():
                _log_again(directory)
            folder = shlex.quote(str(directory / "tensorboard"))
            text = Text.assemble(("events    ", "dim"), f"tensorboard --logdir {folder}")
            screen.print(text, soft_wrap=True)
        _report(screen, directory)
    return status


def _log_again(directory: Path) -> None:
    """Writes event files of a finished run, from its own files."""
    logging = Logging(TensorBoard(directory / "tensorboard"), read_record(directory))
    files = Followed(directory)
    for event in (files.begun, *files.news()):
        logging(event)


def _report(screen: Screen, directory: Path) -> None:
    """Writes report.html into the run's directory; a failure is one line, no error."""
    from rhc.report import write_report

    try:
        text = str(write_report([directory]))
    except Exception as error:  # the run ended well, and its files are complete
        text = f"no page: {error}"
    screen.print(Text.assemble(("report    ", "dim"), text), soft_wrap=True)


def _law(config: TrainConfig) -> tuple[Rewrite | Literal[False], Objective, TrainConfig]:
    """The update rule, the objective, and the settings with defaults filled in."""
    if not config.rewrite:
        return False, Objective(), config
    assert config.start is not None
    asked = {name: getattr(config, name) for name in ("cooldown", "until", "budget")}
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    law = replace(usual_law(config.start), **given)
    weighed = bool(config.data_weights)
    objective = usual_objective(config.start, config.window, weighed=weighed)
    if config.bounded:
        objective = replace(objective, rows=bounded)
    if config.average is not None:
        objective = replace(objective, average=config.average or None)
    if config.objective_batches is not None:
        objective = replace(objective, batches=config.objective_batches)
    steers_lr = config.controls is None or "lr" in config.controls
    resolved = replace(
        config,
        cooldown=law.cooldown if steers_lr else None,
        until=law.until,
        budget=law.budget if math.isfinite(law.budget) else None,
        average=objective.average or 0.0,
        objective_batches=objective.count,
    )
    return law, objective, resolved


def _default_directory(
    config: TrainConfig, law: Rewrite | Literal[False], objective: Objective
) -> Path:
    """runs/<run>-<hash of what its numbers depend on>, resolved, without settings at their default,
    so that a repetition has the same and a new setting changes none."""
    adaptive, start = "adam" in str(config.optimizer), str(config.start)
    resolved = replace(
        config,
        template=config.template or usual_template(start, adaptive, config.rewrite),
        warmup=usual_warmup(start, adaptive) if config.warmup is None else config.warmup,
        controls=config.controls or (("lr",) if config.rewrite else None),
        segment=str(config.segment),
    ).to_record()
    if config.memory_budget is not None:
        resolved["memory_budget"] = str(config.memory_budget)
    known = config.known().items()
    usual = {name: plain_value(each.default) for name, each in known if each.setting.hashed}
    record = {
        **{name: value for name, value in resolved.items() if value != usual.get(name, value)},
        "law": law and asdict(law) | GONE_RULE,
        "objective": of_objective(objective),
    }
    return hashed(config.short_name, record)


def _apart(directory: Path, source: Path) -> Path:
    """The directory, or the next of NAME-2 … where it is the repeated run's."""
    number, found = 1, directory
    while found.resolve() == source.resolve().parent or (
        number > 1 and (found / "result.json").exists()
    ):
        number += 1
        found = directory.with_name(f"{directory.name}-{number}")
    return found

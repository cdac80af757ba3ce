"""Loggers: what a run committed, told to TensorBoard, Weights & Biases, MLflow or your own.

    rhc.Runner(…, logger=rhc.loggers.TensorBoard("runs/demo/tensorboard"))
    rhc train --tensorboard

A logger hears of committed steps only, in their order, each once: rewinding never makes it go back.
Attempts at windows are a series of their own, counted from the beginning of the run. A run that is
resumed goes on where its checkpoint is; what was logged beyond it is written over, or passed over
where a service cannot do that (the steps are the same to the bit).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rhc.errors import InputError
from rhc.events import (
    Committed,
    EpochPlanned,
    Event,
    Intervened,
    Notice,
    RunEnded,
    RunStarted,
    StartFound,
    WindowAttempted,
)
from rhc.files import read_regular, replace_durably


class Logger(Protocol):
    """What a service has to offer; values are finite numbers by name."""

    def begin(self, step: int, attempts: int, settings: Mapping[str, Any]) -> None:
        """A run begins, or goes on, before this step and after so many attempts at windows."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A committed step: loss, controls, metrics."""

    def attempt(self, number: int, values: Mapping[str, float]) -> None:
        """An attempt at a window: J before and after, and whether it was accepted."""

    def text(self, step: int, kind: str, message: str) -> None:
        """Something that happened: an intervention of a guard, a notice."""

    def end(self, result: Mapping[str, float]) -> None:
        """The run is over: the numbers of result.json."""


class Logging:
    """The listener of a run that tells a logger; one that raises is left alone from there on."""

    def __init__(self, logger: Logger, settings: Mapping[str, Any] | None = None) -> None:
        self.logger, self.settings = logger, dict(settings or {})
        self.step = self.attempts = 0
        self.failed = self.begun = False
        self._early: list[tuple[str, str]] = []

    def __call__(self, event: Event) -> None:
        if self.failed:
            return
        try:
            self._tell(event)
        except Exception as error:
            self.failed = True
            name = type(self.logger).__name__
            warnings.warn(
                f"logger {name} failed at step {self.step} ({type(error).__name__}: {error}): the "
                "run goes on without it",
                stacklevel=3,
            )

    def _tell(self, event: Event) -> None:
        match event:
            case RunStarted():
                self.step = event.start
                self.attempts = _lines(event.directory) if event.start else 0
                run = {
                    "steps": event.steps,
                    "window": event.window,
                    "stride": event.stride,
                    "rewriting": event.rewriting,
                    "controls": ", ".join(event.controls),
                    "directory": None if event.directory is None else str(event.directory),
                }
                self.logger.begin(self.step, self.attempts, {**self.settings, **run})
                self.begun = True
                for kind, message in self._early:
                    self.logger.text(self.step, kind, message)
            case Notice() if not self.begun:
                self._early.append(("notice", event.message))
            case _ if not self.begun:
                pass  # of a run that had ended before
            case Committed():
                for row in event.rows:
                    self.logger.step(int(row["step"]), dict(_numbers(row)))
                self.step = event.stop
            case WindowAttempted():
                self.logger.attempt(self.attempts, _attempted(event.record))
                self.attempts += 1
            case StartFound():
                self.logger.text(self.step, "start", f"lr {event.lr}, {event.cost:.2f} plain runs")
            case Intervened():
                self.logger.text(event.step, event.kind, event.reason)
            case EpochPlanned():
                self.logger.text(event.step, "plan", json.dumps(event.plan))
            case Notice():
                self.logger.text(self.step, "notice", event.message)
            case RunEnded():
                self.logger.end(dict(_numbers(event.result)))


def tell_run(
    logger: Logger,
    settings: Mapping[str, Any],
    tape: Sequence[Mapping[str, Any]],
    windows: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any],
) -> None:
    """Tells a logger a run that has ended: the rows of its tape and windows, and its result."""
    logger.begin(0, 0, settings)
    for number, record in enumerate(windows):
        logger.attempt(number, _attempted(record))
    for row in tape:
        logger.step(int(row["step"]), dict(_numbers(row)))
    logger.end(dict(_numbers(result)))


def listeners_of(
    loggers: Logger | Sequence[Logger] | None, settings: Mapping[str, Any] | None
) -> list[Logging]:
    """The listeners of one logger, several or none."""
    given = [] if loggers is None else loggers
    several: list[Any] = list(given) if isinstance(given, (list, tuple)) else [given]
    for logger in several:
        lacking = [n for n in ("begin", "step", "attempt", "text", "end") if not hasattr(logger, n)]
        if lacking:
            raise InputError(
                f"logger {type(logger).__name__} has no {', '.join(lacking)}; see "
                "rhc.loggers.Logger for what one needs"
            )
    return [Logging(logger, settings) for logger in several]


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every finite number in it, by name; those within by name/name, lists by name/index."""
    for name, value in values.items():
        if name == "step" and not prefix:
            continue
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (list, tuple)):
            yield from _numbers({str(i): v for i, v in enumerate(value)}, f"{prefix}{name}/")
        elif type(value) in (int, float) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


def _attempted(record: Mapping[str, Any]) -> dict[str, float]:
    names = ("window", "start", "stop", "attempt", "objective_before", "objective_after")
    found = dict(_numbers({name: record.get(name) for name in names}))
    return found | {"accepted": float(record.get("outcome") == "accepted")}


def _lines(directory: Path | None) -> int:
    """Attempts so far of a run that is resumed."""
    try:
        return 0 if directory is None else (directory / "windows.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _imported(module: str, package: str, who: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{who} needs the package {package}, which cannot be imported ({error}); "
            f"pip install {package}"
        ) from None


# Services -----------------------------------------------------------------------------------------


class TensorBoard:
    """Event files in `folder`; of a run that is resumed, what lies beyond its checkpoint is hidden.

    Attempts at windows are under `windows/`, by their number.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._module = _imported("torch.utils.tensorboard", "tensorboard", "TensorBoard")
        self._writers: list[Any] = []

    def begin(self, step: int, attempts: int, settings: Mapping[str, Any]) -> None:
        # Steps and attempts count apart, and a file can be cut at one number only.
        of_steps, of_attempts = (
            self._module.SummaryWriter(str(self.folder / name), purge_step=first if first else None)
            for name, first in (("steps", step), ("windows", attempts))
        )
        self._writers = [of_steps, of_attempts]
        if not step:
            text = json.dumps(dict(settings), indent=2, default=str)
            of_steps.add_text("settings", f"```\n{text}\n```", 0)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writers[0].add_scalar(name, value, step)

    def attempt(self, number: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writers[1].add_scalar(f"windows/{name}", value, number)

    def text(self, step: int, kind: str, message: str) -> None:
        self._writers[0].add_text(kind, message, step)

    def end(self, result: Mapping[str, float]) -> None:
        for name, value in result.items():
            self._writers[0].add_scalar(f"result/{name}", value, 0)
        for writer in self._writers:
            writer.close()


class WandB:
    """A Weights & Biases run; settings: as of wandb.init (project, mode="offline", id, resume …).

    Steps are the axis `step`, attempts at windows the axis `windows/number`. wandb cannot go back:
    of a run that is resumed, steps that it has are passed over. What it has is not to be seen
    offline; so every row has the number that it had before, and wandb drops what comes again.
    A run that is active is logged into, and left active; that of a run which is resumed from its
    directory is taken up again.
    """

    def __init__(self, **settings: Any) -> None:
        self._module = _imported("wandb", "wandb", "WandB")
        self.settings = settings
        self.run: Any = None
        self._steps = self._attempts = -1
        self._row = 0
        self._own = True

    def begin(self, step: int, attempts: int, settings: Mapping[str, Any]) -> None:
        if self.run is None:
            known = _known(settings, "wandb") if step else None
            again = {"id": known, "resume": "allow"} if known else {}
            active = getattr(self._module, "run", None)
            self._own = active is None or active.id == known
            self.run = active or self._module.init(
                **{"config": dict(settings), **again, **self.settings}
            )
            _know(settings, "wandb", self.run.id)
            self.run.define_metric("step")
            self.run.define_metric("*", step_metric="step")
            self.run.define_metric("windows/number")
            self.run.define_metric("windows/*", step_metric="windows/number")
        summary = getattr(self.run, "summary", None) or {}
        self._steps = int(summary.get("step", step - 1))
        self._attempts = int(summary.get("windows/number", attempts - 1))
        self._row = step + attempts

    def step(self, step: int, values: Mapping[str, float]) -> None:
        if step > self._steps:
            self._log({**values, "step": step})
            self._steps = step
        self._row += 1

    def attempt(self, number: int, values: Mapping[str, float]) -> None:
        if number > self._attempts:
            named = {f"windows/{name}": value for name, value in values.items()}
            self._log({**named, "windows/number": number})
            self._attempts = number
        self._row += 1

    def text(self, step: int, kind: str, message: str) -> None:
        self._log({f"events/{kind}": message})  # with the row that comes next

    def _log(self, values: Mapping[str, Any]) -> None:
        # A run that was active before has rows of its own.
        self.run.log(values, step=max(self._row, int(self.run.step)))

    def end(self, result: Mapping[str, float]) -> None:
        for name, value in result.items():
            self.run.summary[f"result/{name}"] = value
        if self._own:
            self.run.finish()


class MLflow:
    """An MLflow run; settings: as of mlflow.start_run (run_name, run_id, experiment_id …).

    Attempts at windows are metrics `windows/…`, by their number as step. A run that is active is
    logged into, and left active; that of a run which is resumed from its directory is taken up
    again, and steps that it has are passed over.
    """

    def __init__(self, **settings: Any) -> None:
        self._module = _imported("mlflow", "mlflow", "MLflow")
        self.settings = settings
        self._begun = False
        self._own = True
        self._steps = self._attempts = -1

    def begin(self, step: int, attempts: int, settings: Mapping[str, Any]) -> None:
        if not self._begun:
            known = _known(settings, "mlflow") if step else None
            again = {"run_id": known} if known else {}
            active = self._module.active_run()
            self._own = active is None or active.info.run_id == known
            run = active or self._module.start_run(**{**again, **self.settings})
            _know(settings, "mlflow", run.info.run_id)
            self._begun = True
            self._steps = self._last(run.info.run_id, "loss", step - 1)
            self._attempts = self._last(run.info.run_id, "windows/window", attempts - 1)
            if not step:
                # MLflow takes parameters of 500 characters.
                self._module.log_params({k: str(v)[:500] for k, v in settings.items()})

    def _last(self, run: str, metric: str, otherwise: int) -> int:
        """The last step of a metric that the run has."""
        history = self._module.MlflowClient().get_metric_history(run, metric)
        return max((int(entry.step) for entry in history), default=otherwise)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        if step > self._steps:
            self._module.log_metrics(dict(values), step=step)
            self._steps = step

    def attempt(self, number: int, values: Mapping[str, float]) -> None:
        if number > self._attempts:
            named = {f"windows/{name}": value for name, value in values.items()}
            self._module.log_metrics(named, step=number)
            self._attempts = number

    def text(self, step: int, kind: str, message: str) -> None:
        self._module.set_tag(f"rhc.{kind}.{step}", message[:5000])

    def end(self, result: Mapping[str, float]) -> None:
        self._module.log_metrics({f"result/{k}": v for k, v in result.items()})
        if self._own:
            self._module.end_run()


def _known(settings: Mapping[str, Any], service: str) -> str | None:
    """The id that the service gave the run of this directory."""
    if not settings.get("directory"):
        return None
    try:
        path = Path(settings["directory"]) / f"{service}.id"
        name = read_regular(path, 2**10).decode().strip()
    except (OSError, ValueError):
        return None
    return name or None


def _know(settings: Mapping[str, Any], service: str, name: Any) -> None:
    """Keeps the id for a run that is resumed; without it that begins a run of the service anew."""
    if settings.get("directory") and isinstance(name, str):
        with contextlib.suppress(OSError):
            replace_durably(Path(settings["directory"]) / f"{service}.id", name.encode())

"""Loggers: what a run committed, told to TensorBoard, Weights & Biases, MLflow or your own.

    rhc.Runner(…, logger=rhc.report.loggers.TensorBoard("runs/demo/tensorboard"))
    rhc train --tensorboard

A logger hears of committed steps only, in their order, each once: rewinding never makes it go back.
Attempts at windows are a series of their own, counted from the beginning of the run. A run that is
resumed goes on where its checkpoint is; what was logged beyond it is written over, or passed over
where a service cannot do that (the steps are the same to the bit).
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from rhc.storage.files import read_regular, replace_durably


class Logger(Protocol):
    """What a service has to offer; values are finite numbers by name.

    Where `step` or `attempt` raises, it is called again with one value at a time, to find the names
    that it does not take.
    """

    def begin(self, step: int, attempts: int, settings: Mapping[str, Any]) -> None:
        """A run begins, or goes on, before this step and after so many attempts at windows."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A committed step: loss, controls, metrics."""

    def attempt(self, number: int, values: Mapping[str, float]) -> None:
        """An attempt at a window: J before and after, and whether it was accepted."""

    def text(self, step: int, kind: str, message: str) -> None:
        """Something that happened: an intervention of a guard, a notice."""

    def end(self, result: Mapping[str, float]) -> None:
        """The run is over: the numbers of result.json; none where it was stopped, or where this
        logger has failed."""


class Logging:
    """The listener of a run that tells a logger. A name that it does not take is left out; one that
    raises otherwise is ended, and left alone from there on."""

    def __init__(self, logger: Logger, settings: Mapping[str, Any] | None = None) -> None:
        self.logger, self.settings = logger, dict(settings or {})
        self.step = self.attempts = 0
        self.failed = self.begun = False
        self._early: list[tuple[str, str]] = []
        self._taken: set[str] = set()
        self._refused: set[str] = set()

    def __call__(self, event: Event) -> None:
        if self.failed:
            return
        try:
            self._tell(event)
        except Exception as error:
            self.failed = True
            warnings.warn(
                f"{self._where()} failed at step {self.step} ({type(error).__name__}: {error}): "
                "the run goes on without it",
                stacklevel=3,
            )
            self.close()

    def close(self) -> None:
        """Ends the logger of a run that did not end by itself, so that the next has its own."""
        if self.begun:
            self.begun = False
            with contextlib.suppress(Exception):
                self.logger.end({})

    def _where(self) -> str:
        return f"logger {type(self.logger).__name__}"

    def _values(
        self, tell: Callable[[int, Mapping[str, float]], None], at: int, values: Mapping[str, Any]
    ) -> None:
        """Tells values; names that the logger does not take are left out from here on.

        They are those that fail while the first, which is the loop's own, does not.
        """
        values = {name: v for name, v in values.items() if name not in self._refused}
        try:
            tell(at, values)
        except Exception:
            if self._taken.issuperset(values):
                raise
            for number, (name, value) in enumerate(values.items()):
                try:
                    tell(at, {name: value})
                except Exception as error:
                    if number == 0 or name in self._taken:
                        raise
                    self._refused.add(name)
                    warnings.warn(
                        f"{self._where()} does not take the name {name!r} "
                        f"({type(error).__name__}: {error}): all but it is logged",
                        stacklevel=5,
                    )
                else:
                    self._taken.add(name)
        else:
            self._taken.update(values)

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
                    self._values(self.logger.step, int(row["step"]), dict(_numbers(row)))
                self.step = event.stop
            case WindowAttempted():
                self._values(self.logger.attempt, self.attempts, _attempted(event.record))
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
                self.begun = False
                refused = tuple(f"/{name}" for name in self._refused)
                found = dict(_numbers(event.result)).items()
                self.logger.end({n: v for n, v in found if not f"/{n}".endswith(refused)})


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
                "rhc.report.loggers.Logger for what one needs"
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
        self._had_steps = self._had_attempts = -1
        self._next_step = self._next_attempt = 0
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
        self._had_steps = int(summary.get("step", step - 1))
        self._had_attempts = int(summary.get("windows/number", attempts - 1))
        self._next_step, self._next_attempt = step, attempts

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self._next_step = step
        if step > self._had_steps:
            self._log({**values, "step": step})
        self._next_step += 1

    def attempt(self, number: int, values: Mapping[str, float]) -> None:
        self._next_attempt = number
        if number > self._had_attempts:
            named = {f"windows/{name}": value for name, value in values.items()}
            self._log({**named, "windows/number": number})
        self._next_attempt += 1

    def text(self, step: int, kind: str, message: str) -> None:
        self._log({f"events/{kind}": message})  # with the row that comes next

    def _log(self, values: Mapping[str, Any]) -> None:
        # A run that was active before has rows of its own.
        row = self._next_step + self._next_attempt
        self.run.log(values, step=max(row, int(self.run.step)))

    def end(self, result: Mapping[str, float]) -> None:
        for name, value in result.items():
            self.run.summary[f"result/{name}"] = value
        run, self.run = self.run, None
        if self._own:
            run.finish()


class MLflow:
    """An MLflow run; settings: as of mlflow.start_run (run_name, run_id, experiment_id …).

    Attempts at windows are metrics `windows/…`, by their number as step. What MLflow does not take
    in a name ("acc@1") is an underscore in its place. A run that is active is logged into, and left
    active; that of a run which is resumed from its directory is taken up again, and steps that it
    has are passed over.
    """

    def __init__(self, **settings: Any) -> None:
        self._module = _imported("mlflow", "mlflow", "MLflow")
        self.settings = settings
        self._own = True
        self._had_steps = self._had_attempts = -1
        self._names: dict[str, str] = {}

    def begin(self, step: int, attempts: int, settings: Mapping[str, Any]) -> None:
        known = _known(settings, "mlflow") if step else None
        again = {"run_id": known} if known else {}
        active = self._module.active_run()
        self._own = active is None or active.info.run_id == known
        run = active or self._module.start_run(**{**again, **self.settings})
        _know(settings, "mlflow", run.info.run_id)
        self._had_steps = self._last(run.info.run_id, "loss", step - 1)
        self._had_attempts = self._last(run.info.run_id, "windows/window", attempts - 1)
        if not step:
            try:  # MLflow takes parameters of 500 characters, and each once in a run.
                named = {self._name(k): str(v)[:500] for k, v in settings.items()}
                self._module.log_params(named)
            except Exception as error:
                warnings.warn(f"MLflow does not take the settings: {error}", stacklevel=2)

    def _last(self, run: str, metric: str, otherwise: int) -> int:
        """The last step of a metric that the run has."""
        history = self._module.MlflowClient().get_metric_history(run, metric)
        return max((int(entry.step) for entry in history), default=otherwise)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        if step > self._had_steps:
            self._module.log_metrics({self._name(k): v for k, v in values.items()}, step=step)

    def attempt(self, number: int, values: Mapping[str, float]) -> None:
        if number > self._had_attempts:
            named = {f"windows/{name}": value for name, value in values.items()}
            self._module.log_metrics(named, step=number)

    def text(self, step: int, kind: str, message: str) -> None:
        self._module.set_tag(self._name(f"rhc.{kind}.{step}"), message[:5000])

    def end(self, result: Mapping[str, float]) -> None:
        try:
            named = {self._name(f"result/{k}"): v for k, v in result.items()}
            self._module.log_metrics(named)
        finally:
            if self._own:
                self._module.end_run("FINISHED" if result else "FAILED")

    def _name(self, name: str) -> str:
        """What MLflow takes for this name: letters, digits and "_-. " in parts between slashes, 250
        at most; and for no other name."""
        if name not in self._names:
            parts = re.sub(r"[^\w\-. /]", "_", name).split("/")
            taken = "/".join(p if p.strip(". ") else "_" for p in parts)[:240]
            others = set(self._names.values())
            numbered = (f"{taken}_{n}" for n in itertools.count(2))
            self._names[name] = (
                taken if taken not in others else next(n for n in numbered if n not in others)
            )
        return self._names[name]


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

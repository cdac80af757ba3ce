"""Loggers of committed steps, as `rhc.Runner(…, logger=rhc.loggers.TensorBoard("runs/demo/tb"))`.

Each step is logged once, in order; attempts at windows are a series of their own. On resume,
entries beyond the checkpoint are overwritten, or skipped where a service cannot do that.
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
from rhc.report import live, why
from rhc.storage.files import read_regular, replace_durably
from rhc.storage.jsonl import read_lines


class Logger(Protocol):
    """What a service implements; values are finite numbers by name. If `step` or `attempt` raises,
    it is called again with one value at a time, to find unsupported names."""

    def begin(self, step: int, attempts: int, settings: Mapping[str, Any]) -> None:
        """A run begins or resumes before `step`, after this many attempts."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """A committed step: loss, controls, metrics."""

    def attempt(self, number: int, values: Mapping[str, float]) -> None:
        """An attempt at a window: J before and after, and whether it was accepted."""

    def text(self, step: int, kind: str, message: str) -> None:
        """A notice, or an intervention of a guard."""

    def end(self, result: Mapping[str, float]) -> None:
        """The run ends. result: numbers of result.json; empty if the run or this logger failed."""


class Logging:
    """Calls a logger, leaving out names that it refuses; one that raises otherwise is ended."""

    def __init__(self, logger: Logger, settings: Mapping[str, Any] | None = None) -> None:
        self.logger, self.settings = logger, dict(settings or {})
        self.step = self.attempts = 0
        self.failed = self.begun = False
        self._early: list[str] = []
        self._refused: set[str] = set()

    def __call__(self, event: Event) -> None:
        if self.failed:
            return
        try:
            self._tell(event)
        except Exception as error:
            self.failed = True
            warnings.warn(
                f"logger {type(self.logger).__name__} failed at step {self.step} "
                f"({type(error).__name__}: {error}): the run goes on without it",
                stacklevel=3,
            )
            self.close()

    def close(self) -> None:
        """Ends the logger of an interrupted run."""
        if self.begun:
            self.begun = False
            with contextlib.suppress(Exception):
                self.logger.end({})

    def _values(
        self, tell: Callable[[int, Mapping[str, float]], None], at: int, values: Mapping[str, Any]
    ) -> None:
        """Logs values; if that fails, one by one without the names that fail."""
        values = {name: v for name, v in values.items() if name not in self._refused}
        try:
            tell(at, values)
            return
        except Exception as error:
            whole = error
        refused = {}
        for name, value in values.items():
            try:
                tell(at, {name: value})
            except Exception as error:
                refused[name] = error
        if len(refused) == len(values):
            raise whole
        for name, fault in refused.items():
            self._refused.add(name)
            warnings.warn(
                f"logger {type(self.logger).__name__} does not take the name {name!r} "
                f"({type(fault).__name__}: {fault}): all but it is logged",
                stacklevel=5,
            )

    def _tell(self, event: Event) -> None:
        match event:
            case RunStarted():
                self.step = event.start
                self.attempts = 0
                if event.start and event.directory is not None:
                    self.attempts = sum(1 for _ in read_lines(event.directory / "windows.jsonl"))
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
                for message in self._early:
                    self.logger.text(self.step, "notice", message)
            case Notice() if not self.begun:
                self._early.append(event.message)
            case _ if not self.begun:
                pass  # an attempt of a run that had ended
            case Committed():
                for row in event.rows:
                    self._values(self.logger.step, int(row["step"]), dict(numbers_of(row)))
                self.step = event.stop
            case WindowAttempted(record):
                self._values(self.logger.attempt, self.attempts, _attempted(record))
                self.attempts += 1
                self.logger.text(self.step, "window", why.attempt(record))
            case StartFound():
                self.logger.text(self.step, "start", live.found(event))
            case Intervened():
                self.logger.text(event.step, event.kind, event.reason)
            case EpochPlanned():
                self.logger.text(event.step, "plan", json.dumps(event.plan))
            case Notice():
                self.logger.text(self.step, "notice", event.message)
            case RunEnded():
                self.begun = False
                refused = tuple(f"/{name}" for name in self._refused)
                found = dict(numbers_of(event.result)).items()
                self.logger.end({n: v for n, v in found if not f"/{n}".endswith(refused)})


def listeners_of(
    loggers: Logger | Sequence[Logger] | None, settings: Mapping[str, Any] | None
) -> list[Logging]:
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


def numbers_of(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every finite number by path: name/name in mappings, name/index in lists."""
    for name, value in values.items():
        if name == "step" and not prefix:
            continue
        if isinstance(value, Mapping):
            yield from numbers_of(value, f"{prefix}{name}/")
        elif isinstance(value, (list, tuple)):
            yield from numbers_of({str(i): v for i, v in enumerate(value)}, f"{prefix}{name}/")
        elif type(value) in (int, float) and math.isfinite(value):
            yield f"{prefix}{name}", float(value)


def _attempted(record: Mapping[str, Any]) -> dict[str, float]:
    names = ("window", "start", "stop", "attempt", "objective_before", "objective_after")
    found = dict(numbers_of({name: record.get(name) for name in names}))
    return found | {"accepted": float(record.get("outcome") == "accepted")}


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
    """Event files in `folder`, attempts under `windows/`; resuming hides later entries."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._module = _imported("torch.utils.tensorboard", "tensorboard", "TensorBoard")
        self._writers: list[Any] = []

    def begin(self, step: int, attempts: int, settings: Mapping[str, Any]) -> None:
        # Steps and attempts have separate counts, and purge_step cuts a file at one.
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


class _Service:
    """A service that cannot overwrite: each step and attempt is sent once, even after a resume."""

    package = ""

    def __init__(self, **settings: Any) -> None:
        self._module = _imported(self.package, self.package, type(self).__name__)
        self.settings = settings
        self._own = True
        self._had_steps = self._had_attempts = -1
        """The last step and attempt that the service has."""

    def _log(self, values: Mapping[str, Any], at: int) -> None:
        raise NotImplementedError

    def step(self, step: int, values: Mapping[str, float]) -> None:
        if step > self._had_steps:
            self._log(values, step)

    def attempt(self, number: int, values: Mapping[str, float]) -> None:
        if number > self._had_attempts:
            self._log({f"windows/{name}": value for name, value in values.items()}, number)

    def _known(self, settings: Mapping[str, Any]) -> str | None:
        """The service's id of the run in this directory."""
        try:
            path = Path(settings["directory"]) / f"{self.package}.id"
            return read_regular(path, 2**10).decode().strip() or None
        except (KeyError, TypeError, OSError, ValueError):
            return None

    def _know(self, settings: Mapping[str, Any], name: Any) -> None:
        if settings.get("directory") and isinstance(name, str):
            with contextlib.suppress(OSError):
                path = Path(settings["directory"]) / f"{self.package}.id"
                replace_durably(path, name.encode())


class WandB(_Service):
    """A Weights & Biases run; settings: of wandb.init (project, mode="offline", id, resume …).

    The axis is `step`, or `windows/number` for attempts. A resumed run numbers its rows as before,
    and wandb drops duplicates. An active run is used and left active.
    """

    package = "wandb"
    run: Any = None
    _next_step = _next_attempt = 0

    def begin(self, step: int, attempts: int, settings: Mapping[str, Any]) -> None:
        if self.run is None:
            known = self._known(settings) if step else None
            again = {"id": known, "resume": "allow"} if known else {}
            active = getattr(self._module, "run", None)
            self._own = active is None or active.id == known
            self.run = active or self._module.init(
                **{"config": dict(settings), **again, **self.settings}
            )
            self._know(settings, self.run.id)
            for axis, names in (("step", "*"), ("windows/number", "windows/*")):
                self.run.define_metric(axis)
                self.run.define_metric(names, step_metric=axis)
        summary = getattr(self.run, "summary", None) or {}
        self._had_steps = int(summary.get("step", step - 1))
        self._had_attempts = int(summary.get("windows/number", attempts - 1))
        self._next_step, self._next_attempt = step, attempts

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self._next_step = step
        super().step(step, {**values, "step": step})
        self._next_step += 1

    def attempt(self, number: int, values: Mapping[str, float]) -> None:
        self._next_attempt = number
        super().attempt(number, {**values, "number": number})
        self._next_attempt += 1

    def text(self, step: int, kind: str, message: str) -> None:
        self._log({f"events/{kind}": message}, step)  # with the row that comes next

    def _log(self, values: Mapping[str, Any], at: int) -> None:
        # A run that was active before has other rows.
        row = self._next_step + self._next_attempt
        self.run.log(values, step=max(row, int(self.run.step)))

    def end(self, result: Mapping[str, float]) -> None:
        for name, value in result.items():
            self.run.summary[f"result/{name}"] = value
        run, self.run = self.run, None
        if self._own:
            run.finish()


class MLflow(_Service):
    """An MLflow run; settings: of mlflow.start_run (run_name, run_id, experiment_id …).

    Attempts are metrics `windows/…`. Characters that MLflow refuses in names ("acc@1") become
    underscores. An active run is used and left active.
    """

    package = "mlflow"

    def begin(self, step: int, attempts: int, settings: Mapping[str, Any]) -> None:
        self._names: dict[str, str] = {}
        known = self._known(settings) if step else None
        again = {"run_id": known} if known else {}
        active = self._module.active_run()
        self._own = active is None or active.info.run_id == known
        run = active or self._module.start_run(**{**again, **self.settings})
        self._know(settings, run.info.run_id)
        self._had_steps = self._last(run.info.run_id, "loss", step - 1)
        self._had_attempts = self._last(run.info.run_id, "windows/window", attempts - 1)
        if not step:
            try:  # MLflow takes parameters of 500 characters, and each once in a run.
                named = {self._name(k): str(v)[:500] for k, v in settings.items()}
                self._module.log_params(named)
            except Exception as error:
                warnings.warn(f"MLflow does not take the settings: {error}", stacklevel=2)

    def _last(self, run: str, metric: str, otherwise: int) -> int:
        history = self._module.MlflowClient().get_metric_history(run, metric)
        return max((int(entry.step) for entry in history), default=otherwise)

    def _log(self, values: Mapping[str, Any], at: int) -> None:
        self._module.log_metrics({self._name(k): v for k, v in values.items()}, step=at)

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
        """A unique name that MLflow accepts: letters, digits, "_-. " and slashes, at most 250."""
        if name not in self._names:
            parts = re.sub(r"[^\w\-. /]", "_", name).split("/")
            taken = "/".join(p if p.strip(". ") else "_" for p in parts)[:240]
            candidates = itertools.chain([taken], (f"{taken}_{n}" for n in itertools.count(2)))
            others = set(self._names.values())
            self._names[name] = next(each for each in candidates if each not in others)
        return self._names[name]

"""TrainConfig: the one source of `rhc train`'s flags, of a --config file and of config.json. Checks
here are cheap and need no torch, so that wrong flags fail at once."""

# ruff: noqa: RUF009  (the default of a setting is a field)
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from rhc.errors import InputError, whole_number
from rhc.settings.fields import Settings, setting, shown
from rhc.settings.owners import (
    Engine,
    Law,
    OptimizerSettings,
    Planning,
    Run,
    Shape,
    Step,
    Storage,
    Window,
)
from rhc.storage.files import MOST_TOML_BYTES, parsed_json, parsed_toml, read_regular
from rhc.workload import Workload, usual_lr, usual_weight_decay

RECORD_VERSION = 1
"""Version of the command line's part of config.json."""


@dataclass(frozen=True, kw_only=True)
class Files(Settings):
    """What a command reads and writes beside the run."""

    heading = "files"

    tensorboard: bool = setting(False, place="rare", recorded="never")
    """Write event files to DIR/tensorboard. Needs the package tensorboard."""
    config: Path | None = setting(None, "FILE", on_resume="")
    """A TOML file of such settings, or a run's config.json. Flags override it."""
    print_config: bool = setting(False, place="rare", recorded="never")
    """Print the settings as a TOML file and exit."""
    plan: bool = setting(False, place="rare", recorded="never", rewriting=True)
    """Print the time and memory that a window will take, and exit."""
    trust: bool = setting(False, place="rare", recorded="never")
    """Run the file that --config names, wherever it lies. It may be somebody else's."""


# The fields of a class come before those of the bases to its left.
@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    Files, Storage, Engine, Law, Window, Planning, Shape, Step, OptimizerSettings, Run
):
    """Train RUN and write its schedule with hindsight: roll K steps, take the
    derivative by every control of every step, rewrite, restore, replay, slide on.
    The same command continues a run that was stopped; so does rhc resume DIR.

    examples:
      rhc train --window 50                           # digits, 50 steps at once
      rhc train mnist --data mnist/ --optimizer adam  # a folder of IDX files
      rhc train my_run.py:make --seed 1               # your own, see rhc init
      rhc train --no-rewrite --start zero             # 2 plain runs, no lr

    more examples:
      rhc train my_run.py:make --controls lr momentum
      rhc train --no-rewrite                          # the plain loop, to compare
      rhc train --no-rewrite --planner                # lr, momentum, noise by epoch
      rhc train --print-config > run.toml && rhc train --config run.toml --seed 1
      rhc train --memory-budget 500MB --plan          # what a window will cost
      torchrun --nproc-per-node 2 -m rhc -- train     # two ranks, one result
    """

    def checked(self) -> Self:
        """Also raises for settings that would be ignored."""
        for name, each in self.known().items():
            given = getattr(self, name)
            if not self.rewrite and each.setting.rewriting and given != each.default:
                raise InputError(
                    f"{name} is about rewriting, which --no-rewrite turns off, and got "
                    f"{shown(given)}; leave {each.flag} or --no-rewrite out"
                )
        if not self.rewrite and self.data_weights is True:
            raise InputError(
                "data_weights are learned by rewriting, which --no-rewrite turns off; give a run's "
                "directory, whose weights are then followed, or leave --no-rewrite out"
            )
        if self.bounded and not self.data_weights:
            raise InputError(
                "bounded is about what data weights are judged by; add --data-weights, or leave "
                "--bounded out"
            )
        checked = super().checked()
        if isinstance(checked.segment, int) and checked.segment > checked.window:
            raise InputError(
                f"segment must be auto or in [1, {self.window}] for window={self.window}, got "
                f"{self.segment!r}; try --segment auto"
            )
        if checked.cooldown and checked.controls is not None and "lr" not in checked.controls:
            raise InputError(
                f"cooldown is of an lr that is rewritten, got {self.cooldown:g} with controls "
                f"{shown(checked.controls)}; add lr to --controls or leave --cooldown out"
            )
        return checked

    def without_rewriting(self) -> Self:
        known = self.known().items()
        usual = {name: each.default for name, each in known if each.setting.rewriting}
        usual["data_weights"] = False
        return replace(self, rewrite=False, template=None, warmup=None, **usual)

    def resolved(self, workload: Workload, threads: int) -> Self:
        """These settings with the workload's defaults; threads: where it has none."""
        optimizer = self.known()["optimizer"].checked(self.optimizer or workload.optimizer)
        if optimizer == "adagrad" and self.momentum != TrainConfig.momentum:
            raise InputError(
                f"adagrad has no momentum, got {self.momentum:g}; leave --momentum out"
            )
        lr = self.lr if self.lr is not None else usual_lr(workload, optimizer)
        if lr is None:
            raise InputError(f"lr: run {self.run!r} has no default for {optimizer}; give --lr")
        decay = self.weight_decay
        searched = "zero" if self.lr is None else "probe"
        planner = self.planner
        if planner == ():
            steady = optimizer == "adagrad" or self.momentum == 0
            planner = ("lr", "noise") if steady else ("lr", "momentum", "noise")
        return replace(
            self,
            optimizer=optimizer,
            lr=float(lr),
            weight_decay=usual_weight_decay(optimizer) if decay is None else decay,
            steps=whole_number("steps", workload.steps if self.steps is None else self.steps),
            stride=self.window if self.stride is None else self.stride,
            start=self.start or (searched if self.rewrite else "given"),
            data=None if self.data is None else self.data.resolve(),
            threads=whole_number("threads", self.threads or workload.threads or threads),
            run=_absolute(self.run),
            planner=planner,
        ).checked()

    @property
    def short_name(self) -> str:
        """The run's name in a directory's name: a file's runner by its function."""
        return self.run.rpartition(":")[2]

    def recorded(self) -> dict[str, Any]:
        known = self.known().items()
        always = {name for name, each in known if each.setting.recorded == "always"}
        record = {name: v for name, v in self.to_record().items() if name in always}
        return {
            "format": "rhc.config",
            "version": RECORD_VERSION,
            **record,
            **self.if_given(),
        }

    # Files ----------------------------------------------------------------------------------------

    @classmethod
    def from_run(cls, record: Mapping[str, Any], path: Path) -> Self:
        """The settings in config.json, at `path`, of `rhc train`, without its directory."""
        if "run" not in record:
            raise InputError(
                f"{path} was written by rhc.Runner in a script, not by rhc train; run that script "
                "again to continue"
            )
        if record.get("version") != RECORD_VERSION:
            raise InputError(
                f"{path} has version {record.get('version')!r}, this rhc reads version "
                f"{RECORD_VERSION}; continue with the rhc that began the run"
            )
        values = {name: record[name] for name in cls().to_record() if name in record}
        values["rewrite"] = record.get("rewrite") is not False
        values["controls"] = record.get("controls") or None
        planned = record.get("planner")
        values["planner"] = planned and [*planned["steer"], *planned["knobs"]]
        values["device"] = str(record.get("device", "auto")).partition(":")[0]
        found = cls.from_record(values, str(path))
        return replace(found, directory=None, resume="auto", config=None)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Settings from a TOML file, or from the config.json of a run; errors name the file."""
        if path.suffix != ".json":
            values = _read(path, parsed_toml, "TOML", "a TOML file")
            if "config" in values:
                raise InputError(f"{path}: config must not name another file; leave it out")
            return cls.from_record(values, str(path))
        record = _read(path, parsed_json, "JSON", "the config.json of a run")
        if not isinstance(record, dict):
            raise InputError(f"config {path} holds no settings; give the config.json of a run")
        command = "smooth" if "pass" in record else record.get("command")
        if command is not None:
            raise InputError(
                f"{path} is of a run of rhc {command}, which rhc train cannot repeat; use "
                f"rhc {command}"
            )
        # Without a format it is somebody's own file, with names as in TOML.
        if "format" not in record:
            return cls.from_record(record, str(path))
        return cls.from_run(record, path)

    def to_toml(self) -> str:
        """A file that `from_file` reads; settings that are None are left out."""
        record = self.to_record("config", "print_config", "plan")
        lines = [
            f"{name} = {json.dumps(value, ensure_ascii=False)}"
            for name, value in record.items()
            if value is not None
        ]
        return "\n".join(lines) + "\n"


def _read(path: Path, parsed: Callable[[bytes], Any], language: str, what: str) -> Any:
    try:
        return parsed(read_regular(path.resolve(), MOST_TOML_BYTES))
    except OSError as error:
        raise InputError(
            f"config {path} cannot be read ({error.strerror}); give --config {what}"
        ) from None
    except ValueError as error:
        raise InputError(
            f"config {path} is not valid {language} ({error}); mend the file"
        ) from None


def _absolute(run: str) -> str:
    """The name with a file's absolute path, so that a run resumes from anywhere."""
    path, separator, function = run.rpartition(":")
    return f"{Path(path).resolve()}:{function}" if separator and path.endswith(".py") else run

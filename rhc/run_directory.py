"""A run's directory: configuration, tape, windows, checkpoints, schedule and result.

Opening it is the one place where an existing run is recognised, continued or refused; nothing is
overwritten that another run wrote.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from rhc import __version__
from rhc.checkpoint import Checkpoint, CheckpointStore, replace_durably
from rhc.errors import InputError
from rhc.schedule import Schedule
from rhc.tape import JsonLines, finite

FILES = ("config.json", "schedule.json", "tape.jsonl", "windows.jsonl", "result.json")
NOT_COMPARED = ("versions", "hardware", "directory", "resume", "device", "config")
"""Entries of config.json that may differ when a run is continued."""


class RunDirectory:
    """The files of one run. `open` must be called first."""

    def __init__(self, path: Path, keep_checkpoints: int, notice: Callable[[str], None]) -> None:
        self.path = path
        self.notice = notice
        self.checkpoints = CheckpointStore(path / "checkpoints", keep_checkpoints, notice)
        self._lock: int | None = None

    def open(
        self, config: Mapping[str, Any], resume: Literal["auto", "never"]
    ) -> Checkpoint | None:
        """The checkpoint to continue from, or None for a run that begins.

        Raises InputError where the directory cannot be written, holds a run although resume is
        "never", or holds a run of another configuration (the message shows what differs).
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writing-probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"directory {self.path} cannot be written ({error.strerror}); choose another "
                "--directory"
            ) from None
        present = [name for name in FILES if (self.path / name).exists()]
        if "config.json" not in present:
            if present:
                raise InputError(
                    f"directory {self.path} holds {present[0]} but no config.json, so it is no run "
                    "that can be continued; choose another --directory"
                )
        else:
            if resume == "never":
                raise InputError(
                    f"directory {self.path} holds a run already; use --resume auto to continue it, "
                    "or choose another --directory"
                )
            self._check_same(config)
        try:
            self._lock = _locked(self.path / ".lock")
        except BlockingIOError:
            raise InputError(
                f"directory {self.path} is being written by another process; wait for it, "
                "or choose another --directory"
            ) from None
        if "config.json" not in present:
            replace_durably(self.path / "config.json", _document(config))
        self.tape = JsonLines(self.path / "tape.jsonl")
        self.windows = JsonLines(self.path / "windows.jsonl")
        # What was tried before the first checkpoint stays: it is not tried again.
        self.starts = JsonLines(self.path / "start.jsonl")
        self.starts.mend()
        self.tape.append([])
        self.windows.append([])
        checkpoint = self.checkpoints.latest()
        if checkpoint is None and (self.tape.length or self.checkpoints.steps()):
            raise InputError(
                f"directory {self.path} holds a run, but no checkpoint of it can be used; start "
                "again in another --directory"
            )
        lengths = {} if checkpoint is None else checkpoint.values["lengths"]
        self.tape.truncate(int(lengths.get("tape", 0)))
        self.windows.truncate(int(lengths.get("windows", 0)))
        return checkpoint

    def close(self) -> None:
        """Lets another process write here. A process that dies does so by itself."""
        if self._lock is not None:
            _LOCKS.remove(self._lock)
            os.close(self._lock)
            self._lock = None

    def result(self) -> dict[str, Any] | None:
        """The content of result.json where the run has ended."""
        path = self.path / "result.json"
        return read_json(path) if path.exists() else None

    def finish(self, schedule: Schedule, result: Mapping[str, Any]) -> None:
        """Writes the committed schedule and, last, the result."""
        self.save_schedule(schedule)
        replace_durably(self.path / "result.json", _document(result))

    def save_schedule(self, schedule: Schedule) -> None:
        """Replaces schedule.json."""
        replace_durably(self.path / "schedule.json", _document(schedule.to_json()))

    def _check_same(self, config: Mapping[str, Any]) -> None:
        old = read_json(self.path / "config.json")
        new = json.loads(json.dumps(finite(config)))
        was, now = ({k: v for k, v in c.items() if k not in NOT_COMPARED} for c in (old, new))
        differences = _differences(was, now)
        if differences:
            raise InputError(
                f"directory {self.path} belongs to another configuration "
                f"({'; '.join(differences)}); choose another --directory, or give the same settings"
            )
        versions = {
            key: (old.get("versions", {}).get(key), value)
            for key, value in new.get("versions", {}).items()
            if old.get("versions", {}).get(key) != value
        }
        for key, (before, here) in versions.items():
            self.notice(f"the run began with {key} {before}, this is {here}: its bits may differ")


def _locked(path: Path) -> int | None:
    """A lock on a file that ends with this process; BlockingIOError where another holds it."""
    try:
        import fcntl
    except ImportError:  # not on this operating system
        return None
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    _LOCKS.add(descriptor)
    return descriptor


_LOCKS: set[int] = set()


def _let_go() -> None:
    """In a forked process: a DataLoader's worker that outlives the run must not hold its lock."""
    while _LOCKS:
        os.close(_LOCKS.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def versions() -> dict[str, str]:
    """Versions that a run's numbers depend on."""
    return {"rhc": __version__, "torch": torch.__version__, "python": platform.python_version()}


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine that a run's numbers depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; anything else is an InputError that names the file."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(document, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(document).__name__}")
    return document


def _document(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode()


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in sorted(was.keys() | now.keys()):
        a, b = was.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} was {_short(a)}, is {_short(b)}")
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"

"""A run's directory: configuration, tape, windows, checkpoints, schedule and result.

Opening it is the one place where an existing run is recognised, continued or refused; nothing is
overwritten that another run wrote.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from rhc import __version__
from rhc.errors import InputError, StorageError
from rhc.storage.checkpoint import Checkpoint, CheckpointStore
from rhc.storage.files import (
    CLOSED_ON_EXEC,
    NO_LINK,
    make_directory,
    read_json,
    refuse_links,
    replace_durably,
    replace_summed,
    sealed,
    write_durably,
)
from rhc.storage.jsonl import JsonLines, finite, misfit_of_result

FILES = ("config.json", "schedule.json", "tape.jsonl", "windows.jsonl", "result.json")
NOT_COMPARED = ("versions", "hardware", "directory", "resume", "device", "config", "code")
"""Entries of config.json that may differ when a run is continued."""

MOST_OF_A_MODULE = 200
"""Letters of a module's text in config.json."""

SAFE = {
    "memory_budget": "what looking back keeps changes, and its bits may differ",
    "threads": "its bits may differ",
    "data": "its data must be the same",
    "ranks": "it goes on to rounding, not to the bit",
}
"""Entries that may differ too, where the difference is said, and what it means."""


class Plan(Protocol):
    """A schedule while its run goes on."""

    def to_json(self, committed: int) -> dict[str, Any]: ...


class Whole(Protocol):
    """A schedule whose run has ended."""

    def to_json(self) -> dict[str, Any]: ...


class RunDirectory:
    """The files of one run. `open` must be called first.

    A disk that is full, read-only or broken stops no training: what could not be written is kept
    in memory and tried again with every save, a notice says so once, and `finish` raises a
    StorageError if in the end something is missing.
    """

    def __init__(self, path: Path, keep_checkpoints: int, notice: Callable[[str], None]) -> None:
        self.path = path
        self.notice = notice
        self.checkpoints = CheckpointStore(path / "checkpoints", keep_checkpoints, notice)
        self.saved: int | None = None
        self.differences: list[str] = []
        """What shows of the code and the data that is not as it was when the run began."""
        self.elsewhere = False
        """Whether other versions or another machine began it, so that its bits may differ."""
        self.trouble: OSError | None = None
        self._first: Checkpoint | None = None
        self._late: tuple[Checkpoint, Plan] | None = None
        self._plan: Plan | None = None
        self._lock: int | None = None
        self._config = b""
        self._settings = ""

    # Opening -------------------------------------------------------------------------------------

    def open(
        self, config: Mapping[str, Any], resume: Literal["auto", "never"]
    ) -> Checkpoint | None:
        """The checkpoint to continue from, or None for a run that begins.

        Raises InputError where the directory cannot be written, holds a run although resume is
        "never", or holds a run of another configuration (the message shows what differs).
        """
        try:
            make_directory(self.path)
            refuse_links(self.path)
            probe = self.path / ".writing-probe"
            write_durably(probe, b"", wait=False)
            os.unlink(probe)
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
        changed = "config.json" in present and self._check_same(config)
        longer = changed and read_json(self.path / "config.json").get("steps") != config["steps"]
        try:
            self._lock = _locked(self.path / ".lock")
        except BlockingIOError:
            raise InputError(
                f"directory {self.path} is being written by another process; wait for it, "
                "or choose another --directory"
            ) from None
        except OSError as error:
            raise InputError(
                f"directory {self.path} cannot be locked ({error.strerror}); choose another "
                "--directory"
            ) from None
        self.tape = JsonLines(self.path / "tape.jsonl")
        self.windows = JsonLines(self.path / "windows.jsonl")
        # What was tried before the first checkpoint stays: it is not tried again.
        self.starts = JsonLines(self.path / "start.jsonl")
        checkpoint = self._newest()
        self._settings = _digest(config)
        began = None if checkpoint is None else checkpoint.values.get("settings")
        if began not in (None, self._settings):
            self.close()
            raise InputError(
                f"{self.path / 'config.json'} is not of the settings that its checkpoints were "
                "written with; restore it, or choose another --directory"
            )
        lengths = {} if checkpoint is None else checkpoint.values["lengths"]
        try:
            if longer and "result.json" in present:
                # What the shorter run ended with stays, by another name.
                old = read_json(self.path / "config.json").get("steps")
                os.replace(self.path / "result.json", self.path / f"result-{old}.json")
            if "config.json" not in present or changed:
                replace_durably(self.path / "config.json", _document(config))
            self._config = (self.path / "config.json").read_bytes()
            self._take_starts(0 if checkpoint is None else checkpoint.step)
            self.tape.truncate(int(lengths.get("tape", 0)))
            self.windows.truncate(int(lengths.get("windows", 0)))
            self.tape.flush()
            self.windows.flush()
        except OSError as error:
            raise InputError(
                f"directory {self.path} cannot be written ({error.strerror}); make room there, or "
                "choose another --directory"
            ) from None
        with contextlib.suppress(OSError):  # what is left over can wait
            self.checkpoints.tidy(ended="result.json" in present and not longer)
        self.saved = None if checkpoint is None else checkpoint.step
        return checkpoint

    def _take_starts(self, step: int) -> None:
        """Cuts start.jsonl back to what can be trusted of it, and says if that is not all.

        Nothing is cut once the run is under way: nothing is tried any more.
        """
        found = self.starts.intact()
        if found.damaged:
            then = "what was tried for a start is not needed any more"
            self.notice(f"{found.fault}: {then if step else 'from there on it is tried again'}")
        if not step:
            self.starts.truncate(found.length)

    def _newest(self) -> Checkpoint | None:
        """The newest checkpoint that can be continued: whole, and with all lines that it saw."""
        lines = {"tape": self.tape.intact(), "windows": self.windows.intact()}
        lost = ""
        for checkpoint in self.checkpoints.usable():
            lengths = checkpoint.values.get("lengths")
            if not isinstance(lengths, dict) or not all(
                isinstance(lengths.get(name), int) and lengths[name] >= 0 for name in lines
            ):
                path = self.checkpoints.path(checkpoint.step) / "values.json"
                self.checkpoints.pass_over(checkpoint.step, f"{path} has no lengths of the tape")
                continue
            short = [found.fault for name, found in lines.items() if found.length < lengths[name]]
            if not short:
                return checkpoint
            lost = f" ({short[0]} where the checkpoint of step {checkpoint.step} saw more)"
            self.checkpoints.pass_over(
                checkpoint.step, f"{short[0]}, too few for {checkpoint.step}"
            )
        if self.tape.length or self.windows.length or self.checkpoints.steps():
            self.close()
            raise InputError(
                f"directory {self.path} holds a run, but no checkpoint of it can be used{lost}; "
                "start again in another --directory"
            )
        return None

    def earlier(self, step: int) -> Checkpoint | None:
        """The newest checkpoint before that of `step` that is whole; nothing is said of others."""
        for other in reversed(self.checkpoints.steps()):
            if other < step:
                with contextlib.suppress(InputError):
                    return self.checkpoints.load(other)
        return None

    def close(self) -> None:
        """Lets another process write here. A process that dies does so by itself."""
        for lines in (getattr(self, n, None) for n in ("tape", "windows", "starts")):
            if lines is not None:
                lines.close()
        if self._lock is not None:
            _LOCKS.remove(self._lock)
            os.close(self._lock)
            self._lock = None

    # Writing -------------------------------------------------------------------------------------

    def save(self, checkpoint: Checkpoint, schedule: Plan) -> Path | None:
        """Brings tape, windows, the checkpoint and then the plan to the disk; its directory.

        None where the disk does not take them: the next call tries again.
        """
        if self._first is None and self.saved is None:
            self._first = checkpoint  # before any line of the tape there is a checkpoint
        self._late = checkpoint, schedule
        for attempt in (0, 1):
            try:
                self._present()
                path = self._save(checkpoint, schedule)
            except OSError as error:
                # Older checkpoints make room for a newer one; the newest that is good stays.
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                if attempt == 0 and full and not checkpoint.shards and self.checkpoints.make_room():
                    self.notice(f"{self.path} is full: older checkpoints are removed to make room")
                    continue
                self._troubled(error)
                return None
            self._late = None
            if self.trouble is not None:
                self.trouble = None
                self.notice(f"{self.path} can be written again, and nothing of the run is missing")
            return path
        return None

    def _save(self, checkpoint: Checkpoint, schedule: Plan) -> Path:
        if self._first is not None and self._first is not checkpoint:
            values = self._first.values | self._told({"tape": 0, "windows": 0})
            self.checkpoints.save(replace(self._first, values=values))
            self.saved = self._first.step
            self._first = None
        if self.starts.pending:
            self.starts.flush()
        if self._first is None:
            self.tape.flush()
            self.windows.flush()
        lengths = {"tape": self.tape.length, "windows": self.windows.length}
        values = checkpoint.values | self._told(lengths)
        path = self.checkpoints.save(replace(checkpoint, values=values))
        self.saved, self._first = checkpoint.step, None
        self._save_plan(schedule, checkpoint.step)
        return path

    def _told(self, lengths: Mapping[str, int]) -> dict[str, Any]:
        """What a checkpoint says of the files beside it."""
        return {"lengths": lengths, "settings": self._settings}

    def record_start(self, record: Mapping[str, Any]) -> None:
        """Adds a line to start.jsonl, at once: it is not tried again after a stop."""
        self.starts.append([record])
        try:
            self.starts.flush()
        except OSError as error:
            self._troubled(error)

    def flush(self) -> None:
        """Brings what was recorded to the disk, if it takes it."""
        try:
            if self._first is None:
                self.tape.flush()
                self.windows.flush()
        except OSError as error:
            self._troubled(error)

    def _troubled(self, error: OSError) -> None:
        if self.trouble is None:
            self.notice(
                f"{self.path} cannot be written ({error.strerror or error}): training goes on, "
                "the last good checkpoint stays, and every window tries again"
            )
        self.trouble = error

    def _present(self) -> None:
        """Puts back what somebody removed, and makes sure that nobody else writes here."""
        make_directory(self.path)
        refuse_links(self.path)
        config = self.path / "config.json"
        if not config.exists():
            replace_durably(config, self._config)
        if self._lock is None or not hasattr(os, "register_at_fork"):
            return
        lock, held = self.path / ".lock", os.fstat(self._lock)
        with contextlib.suppress(FileNotFoundError):
            named = os.stat(lock)
            if (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino):
                return
        try:
            fresh = _locked(lock)
        except BlockingIOError:
            raise StorageError(
                f"another process took {self.path} over after its lock was removed; stop one of "
                "the two"
            ) from None
        assert fresh is not None
        _LOCKS.remove(self._lock)
        os.close(self._lock)
        self._lock = fresh

    def result(self) -> dict[str, Any] | None:
        """The content of result.json where the run has ended; None for one that is damaged."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        faults: list[str] = []
        try:
            found = read_json(path, faults.append)
        except InputError as error:
            faults.append(str(error))
        else:
            if fault := misfit_of_result(found):
                faults.append(f"{path} is damaged ({fault})")
        if faults:
            self.notice(f"{faults[0]}; it is made again")
            return None
        return found

    def finish(self, schedule: Whole, result: Mapping[str, Any]) -> None:
        """Writes the committed schedule and, last, the result; StorageError where that fails."""
        steps = result["steps"]
        for seconds in (0.0, 0.2, 1.0):
            time.sleep(seconds)
            # No line of the tape comes to the disk before a checkpoint has. Ranks have gathered
            # theirs already: this is the first rank alone.
            if self._late is not None and RunDirectory.save(self, *self._late) is None:
                continue
            try:
                self._present()
                self.tape.flush()
                self.windows.flush()
                self._replace_schedule(schedule.to_json())
                replace_summed(self.path / "result.json", plain_document(result))
                break
            except OSError as error:
                self._troubled(error)
        else:
            assert self.trouble is not None
            self._unfinished(f"the result of {steps} steps", self.trouble)
        if self.saved != steps and self.trouble is not None:
            self._unfinished(f"the checkpoint of step {steps}", self.trouble)

    def _unfinished(self, what: str, error: OSError) -> None:
        kept = "no checkpoint" if self.saved is None else f"the checkpoint of step {self.saved}"
        raise StorageError(
            f"the run has ended, but {what} could not be written to {self.path} "
            f"({error.strerror or error}); {kept} is there: mend the disk and run the same command "
            "again"
        )

    def _save_plan(self, plan: Plan, committed: int) -> None:
        """Brings schedule.json up to date; what is committed stands on the tape beside it.

        Not before the tape: a reader is never without a step that the document says is committed.
        One that is there, of the same plan, does.
        """
        if plan is not self._plan or not (self.path / "schedule.json").exists():
            self._replace_schedule(plan.to_json(committed))
            self._plan = plan

    def _replace_schedule(self, document: Mapping[str, Any]) -> None:
        replace_durably(self.path / "schedule.json", _document(document))

    def _check_same(self, config: Mapping[str, Any]) -> bool:
        """Whether the run has other settings than before; an InputError where it is another run.

        What differs is said. More steps, or another place or budget of memory, leave a run what
        it is; anything else would make it another one in the middle.
        """
        old = read_json(self.path / "config.json", self.notice)
        new = json.loads(json.dumps(finite(config)))
        was, now = ({k: v for k, v in c.items() if k not in NOT_COMPARED} for c in (old, new))
        safe = {name for name in SAFE if was.get(name) != now.get(name)}
        before, steps = was.get("steps"), now.get("steps")
        if isinstance(before, int) and isinstance(steps, int) and steps > before:
            safe.add("steps")
        kept = [{k: v for k, v in c.items() if k not in safe} for c in (was, now)]
        differences = _differences(kept[0], kept[1])
        if differences:
            shorter = differences == [f"steps was {before}, is {steps}"]
            mend = (
                "steps can be raised, not lowered: give as many or more, or choose another "
                "--directory"
                if shorter
                else "choose another --directory, or give the same settings"
            )
            raise InputError(
                f"directory {self.path} belongs to another configuration "
                f"({'; '.join(differences)}); {mend}"
            )
        for name in sorted(safe):
            text = f"{name} was {_short(was.get(name))}, is {_short(now.get(name))}"
            self.notice(f"{text}: {SAFE.get(name, 'the plan is made anew for the steps to come')}")
        for part, remark in (("versions", "this is"), ("hardware", "here it is")):
            began = old.get(part)
            for key, here in new.get(part, {}).items():
                then = began.get(key) if isinstance(began, dict) else None
                if then != here and key != "cores":
                    self.elsewhere = True
                    self.notice(
                        f"the run began with {key} {then}, {remark} {here}: its bits may differ"
                    )
        if old.get("versions") == new.get(
            "versions"
        ):  # modules describe themselves by torch's words
            self.differences = _differences(old.get("code") or new["code"], new["code"])
        return bool(safe)


def _locked(path: Path) -> int | None:
    """A lock on a file that ends with this process; BlockingIOError where another holds it."""
    try:
        import fcntl
    except ImportError:  # not on this operating system
        return None
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | CLOSED_ON_EXEC | NO_LINK, 0o644)
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


def module_text(module: torch.nn.Module) -> str:
    """A module alone in words, `Dropout(p=0.2, inplace=False)`: the same in every process."""
    # FSDP gives a module a class of its own, made of the one that it had; ranks share statistics.
    kind = re.sub(r"^FSDP|(?<=BatchNorm)[123]d$|^Sync(?=BatchNorm)", "", type(module).__name__)
    text = f"{kind}({module.extra_repr()})"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)[:MOST_OF_A_MODULE]


def length(loader: Any) -> int | None:
    """How many batches a loader says that it has; None where it does not."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def plain_document(value: Mapping[str, Any]) -> bytes:
    """result.json: nothing but its content, as `RunResult.record` has it."""
    return (json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode()


def _document(value: Mapping[str, Any]) -> bytes:
    return sealed(finite(value))


def _digest(config: Mapping[str, Any]) -> str:
    """Of the settings that a run cannot be continued without."""
    kept = {k: v for k, v in config.items() if k not in (*NOT_COMPARED, *SAFE, "steps")}
    return hashlib.sha256(json.dumps(finite(kept), sort_keys=True).encode()).hexdigest()[:16]


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

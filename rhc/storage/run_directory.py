"""A run's directory while its run is trained: opened, continued or refused, and written to.

Opening it is the one place where an existing run is recognised; nothing is overwritten that another
run wrote. What lies in it is in `rhc.storage.run_files`.
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
from collections.abc import Callable, Iterator, Mapping
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
    finite,
    make_directory,
    misfit,
    plain_document,
    read_json,
    reason,
    refuse_links,
    replace_durably,
    replace_summed,
    sealed,
    write_durably,
)
from rhc.storage.jsonl import JsonLines
from rhc.storage.run_files import FILES, RESULT

NOT_COMPARED = ("versions", "hardware", "code")
"""Entries of config.json that may differ when a run is continued, beside settings that may."""

MOST_OF_A_MODULE = 200
"""Letters of a module's text in config.json."""


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
    StorageError if something is missing in the end.
    """

    def __init__(
        self,
        path: Path,
        keep_checkpoints: int,
        notice: Callable[[str], None],
        may_change: Mapping[str, str],
    ) -> None:
        self.path = path
        self.may_change = may_change
        """Settings that a resumed run may have otherwise, and what is then said; "" for nothing."""
        self.notice = notice
        self.checkpoints = CheckpointStore(path / "checkpoints", keep_checkpoints, notice)
        self.tape = JsonLines(path / "tape.jsonl")
        self.windows = JsonLines(path / "windows.jsonl")
        self.starts = JsonLines(path / "start.jsonl")
        self.saved: int | None = None
        """The step of the newest checkpoint that was saved."""
        self.differences: list[str] = []
        """What shows of the code and the data that is not as it was when the run began."""
        self.elsewhere = False
        """Whether other versions or another machine began it, so that its bits may differ."""
        self.trouble: OSError | None = None
        """Why the disk does not take what is written; None while it does."""
        self._first: Checkpoint | None = None
        """The run's first checkpoint, until it or a later one is saved."""
        self._late: tuple[Checkpoint, Plan] | None = None
        """What the last `save` was given, where it failed."""
        self._plan: Plan | None = None
        """The plan that schedule.json holds."""
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
        with self._refusing("written"):
            make_directory(self.path)
            refuse_links(self.path)
            probe = self.path / ".writing-probe"
            write_durably(probe, b"", wait=False)
            os.unlink(probe)
        present = [name for name in FILES if (self.path / name).exists()]
        old: dict[str, Any] | None = None
        if "config.json" in present:
            if resume == "never":
                raise InputError(
                    f"directory {self.path} holds a run already; use --resume auto to continue it, "
                    "or choose another --directory"
                )
            old = read_json(self.path / "config.json", self.notice)
        elif present:
            raise InputError(
                f"directory {self.path} holds {present[0]} but no config.json, so it is no run "
                "that can be continued; choose another --directory"
            )
        changed = old is not None and self._compare(old, config)
        try:
            with self._refusing("locked"):
                self._lock = _locked(self.path / ".lock")
        except BlockingIOError:
            raise InputError(
                f"directory {self.path} is being written by another process; wait for it, "
                "or choose another --directory"
            ) from None
        try:
            return self._continue(config, old, changed)
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        """Makes an OSError an InputError: the directory cannot be used as it is."""
        try:
            yield
        except BlockingIOError:
            raise
        except OSError as error:
            raise InputError(
                f"directory {self.path} cannot be {what} ({error.strerror}); make room there, or "
                "choose another --directory"
            ) from None

    def _continue(
        self, config: Mapping[str, Any], old: Mapping[str, Any] | None, changed: bool
    ) -> Checkpoint | None:
        """The newest checkpoint, with the other files as they were when it was saved."""
        checkpoint = self._newest()
        self._settings = self._digest(config)
        began = None if checkpoint is None else checkpoint.values.get("settings")
        if began not in (None, self._settings):
            raise InputError(
                f"{self.path / 'config.json'} is not of the settings that its checkpoints were "
                "written with; restore it, or choose another --directory"
            )
        lengths = {} if checkpoint is None else checkpoint.values["lengths"]
        result = self.path / "result.json"
        with self._refusing("written"):
            before = None if old is None else old.get("steps")
            if changed and before != config["steps"] and result.exists():
                os.replace(result, self.path / f"result-{before}.json")
            if old is None or changed:
                replace_durably(self.path / "config.json", sealed(config))
            self._config = (self.path / "config.json").read_bytes()
            self._take_starts(0 if checkpoint is None else checkpoint.step)
            self.tape.truncate(int(lengths.get("tape", 0)))
            self.windows.truncate(int(lengths.get("windows", 0)))
            self.tape.flush()
            self.windows.flush()
        with contextlib.suppress(OSError):  # what is left over can wait
            self.checkpoints.tidy(ended=result.exists())
        self.saved = None if checkpoint is None else checkpoint.step
        return checkpoint

    def _take_starts(self, step: int) -> None:
        """Cuts start.jsonl back to what can be trusted of it, and says if that is not all.

        Once the run is under way nothing is tried any more, and the file stays as it is. What was
        tried before the first checkpoint is not tried again.
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
                self.checkpoints.leave_out(checkpoint.step, f"{path} has no lengths of the tape")
                continue
            short = [found.fault for name, found in lines.items() if found.length < lengths[name]]
            if not short:
                return checkpoint
            lost = f" ({short[0]} where the checkpoint of step {checkpoint.step} saw more)"
            self.checkpoints.leave_out(
                checkpoint.step, f"{short[0]}, too few for {checkpoint.step}"
            )
        paths = [path for path in (self.tape.path, self.windows.path) if path.exists()]
        if any(path.stat().st_size for path in paths) or self.checkpoints.steps():
            raise InputError(
                f"directory {self.path} holds a run, but no checkpoint of it can be used{lost}; "
                "start again in another --directory"
            )
        return None

    def earlier(self, step: int) -> Checkpoint | None:
        """The newest checkpoint before that of `step` that is whole, without a notice of others."""
        for other in reversed(self.checkpoints.steps()):
            if other < step:
                with contextlib.suppress(InputError):
                    return self.checkpoints.load(other)
        return None

    def close(self) -> None:
        """Lets another process write here. A process that dies does so by itself."""
        for lines in (self.tape, self.windows, self.starts):
            lines.close()
        if self._lock is not None:
            _LOCKS.remove(self._lock)
            os.close(self._lock)
            self._lock = None

    # Writing -------------------------------------------------------------------------------------

    def save(self, checkpoint: Checkpoint, schedule: Plan) -> Path | None:
        """Writes tape, windows, the checkpoint and then the plan; the checkpoint's directory.

        None where the disk does not take them: the next call tries again.
        """
        if self._first is None and self.saved is None:
            self._first = checkpoint
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
        # No line of the tape is on the disk before a checkpoint is, so that a run can always go on
        # or begin again.
        if self._first is not None and self._first is not checkpoint:
            self._save_checkpoint(self._first, 0, 0)
        if self.starts.pending:
            self.starts.flush()
        if self._first is None:
            self.tape.flush()
            self.windows.flush()
        path = self._save_checkpoint(checkpoint, self.tape.length, self.windows.length)
        # After the tape: a reader never lacks a step that the document says is committed.
        if schedule is not self._plan or not (self.path / "schedule.json").exists():
            document = schedule.to_json(checkpoint.step)
            replace_durably(self.path / "schedule.json", sealed(document))
            self._plan = schedule
        return path

    def _save_checkpoint(self, checkpoint: Checkpoint, tape: int, windows: int) -> Path:
        """Saves a checkpoint with the lengths of the files beside it."""
        beside = {"lengths": {"tape": tape, "windows": windows}, "settings": self._settings}
        path = self.checkpoints.save(replace(checkpoint, values=checkpoint.values | beside))
        self.saved, self._first = checkpoint.step, None
        return path

    def record_start(self, record: Mapping[str, Any]) -> None:
        """Adds a line to start.jsonl, at once: it is not tried again after a stop."""
        self.starts.append([record])
        try:
            self.starts.flush()
        except OSError as error:
            self._troubled(error)

    def flush(self) -> None:
        """Writes what was recorded, if the disk takes it."""
        try:
            if self._first is None:
                self.tape.flush()
                self.windows.flush()
        except OSError as error:
            self._troubled(error)

    def _troubled(self, error: OSError) -> None:
        if self.trouble is None:
            self.notice(
                f"{self.path} cannot be written ({reason(error)}): training goes on, "
                "the last good checkpoint stays, and every window tries again"
            )
        self.trouble = error

    def _present(self) -> None:
        """Puts back what was removed, and makes sure that nobody else writes here."""
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
            if fault := misfit(found, RESULT):
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
            # Ranks have gathered their parts already: this is the first rank alone.
            if self._late is not None and RunDirectory.save(self, *self._late) is None:
                continue
            try:
                self._present()
                self.tape.flush()
                self.windows.flush()
                replace_durably(self.path / "schedule.json", sealed(schedule.to_json()))
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
            f"({reason(error)}); {kept} is there: mend the disk and run the same command again"
        )

    def _compare(self, old: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        """Whether the run has other settings than before; an InputError where it is another run.

        What differs is said. More steps, or another place or budget of memory, leave a run what
        it is; anything else would make it another one in the middle.
        """
        new = json.loads(json.dumps(finite(config)))
        said = {name: text for name, text in self.may_change.items() if text}
        silent = {*NOT_COMPARED, *self.may_change} - said.keys()
        was, now = ({k: v for k, v in c.items() if k not in silent} for c in (old, new))
        safe = {name for name in said if was.get(name) != now.get(name)}
        before, steps = was.get("steps"), now.get("steps")
        if isinstance(before, int) and isinstance(steps, int) and steps > before:
            safe.add("steps")
        kept = [{k: v for k, v in c.items() if k not in safe} for c in (was, now)]
        differences = _differences(kept[0], kept[1])
        if differences:
            mend = "choose another --directory, or give the same settings"
            if differences == [f"steps was {before}, is {steps}"]:
                mend = (
                    "steps can be raised, not lowered: give as many or more, or choose another "
                    "--directory"
                )
            raise InputError(
                f"directory {self.path} belongs to another configuration "
                f"({'; '.join(differences)}); {mend}"
            )
        for name in sorted(safe):
            text = f"{name} was {_short(was.get(name))}, is {_short(now.get(name))}"
            self.notice(f"{text}: {said.get(name, 'the plan is made anew for the steps to come')}")
        for part, remark in (("versions", "this is"), ("hardware", "here it is")):
            began = old.get(part)
            for key, here in new.get(part, {}).items():
                then = began.get(key) if isinstance(began, dict) else None
                if then != here and key != "cores":
                    self.elsewhere = True
                    self.notice(
                        f"the run began with {key} {then}, {remark} {here}: its bits may differ"
                    )
        # Modules describe themselves in torch's words, which its versions change.
        if old.get("versions") == new.get("versions"):
            self.differences = _differences(old.get("code") or new["code"], new["code"])
        return bool(safe)

    def _digest(self, config: Mapping[str, Any]) -> str:
        """Of the settings that a run cannot be continued without."""
        kept = {
            k: v for k, v in config.items() if k not in (*NOT_COMPARED, *self.may_change, "steps")
        }
        return hashlib.sha256(json.dumps(finite(kept), sort_keys=True).encode()).hexdigest()[:16]


def _locked(path: Path) -> int | None:
    """A lock that ends with this process; BlockingIOError where another process has it."""
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

"""The directory of a run in training: opened, resumed or refused, and written."""

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
    differences,
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
    short,
    write_durably,
)
from rhc.storage.jsonl import JsonLines
from rhc.storage.run_files import FILES, RESULT

NOT_COMPARED = ("versions", "hardware", "code")
"""Entries of config.json that may differ on resume, beside `may_change`."""

MOST_OF_A_MODULE = 200
"""Characters of a module's text in config.json."""


class Plan(Protocol):
    def to_json(self, committed: int) -> dict[str, Any]: ...


class Whole(Protocol):
    def to_json(self) -> dict[str, Any]: ...


class RunDirectory:
    """The files of one run; call `open` first.

    A failed write does not stop training: it is reported once and retried at every save. `finish`
    raises StorageError if something is still missing.
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
        """Setting that may differ on resume -> the message then; "" for none."""
        self.notice = notice
        self.checkpoints = CheckpointStore(path / "checkpoints", keep_checkpoints, notice)
        self.tape = JsonLines(path / "tape.jsonl")
        self.windows = JsonLines(path / "windows.jsonl")
        self.starts = JsonLines(path / "start.jsonl")
        self.passes = JsonLines(path / "passes.jsonl")
        self.saved: int | None = None
        """Step of the newest saved checkpoint."""
        self.differences: list[str] = []
        """Visible changes of code and data since the run began."""
        self.elsewhere = False
        """Whether versions or hardware differ from those at the beginning, so that bits may."""
        self.trouble: OSError | None = None
        """The last write error; None while writes succeed."""
        self._first: Checkpoint | None = None
        """The first checkpoint, until one is saved."""
        self._late: tuple[Checkpoint, Plan] | None = None
        """Arguments of the last `save`, if it failed."""
        self._plan: Plan | None = None
        """The plan in schedule.json."""
        self._lock: int | None = None
        self._config = b""
        self._settings = ""

    # Opening -------------------------------------------------------------------------------------

    def open(
        self, config: Mapping[str, Any], resume: Literal["auto", "never"]
    ) -> Checkpoint | None:
        """The checkpoint to resume from, or None for a new run. InputError where the directory
        cannot be written, or holds a run that is not to be resumed or has another configuration."""
        old, changed = self.claim(config, resume)
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

    def claim(
        self, config: Mapping[str, Any], resume: Literal["auto", "never"]
    ) -> tuple[dict[str, Any] | None, bool]:
        """(config.json of the run that is there, whether settings that may change did). Makes the
        directory; InputError as of `open`."""
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
        return old, old is not None and self._compare(old, config)

    @contextlib.contextmanager
    def _refusing(self, what: str) -> Iterator[None]:
        try:
            yield
        except BlockingIOError:
            raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise InputError(
                f"directory {self.path} cannot be {what} ({error.strerror}); "
                f"{'make room there, or ' if full else ''}choose another --directory"
            ) from None

    def _continue(
        self, config: Mapping[str, Any], old: Mapping[str, Any] | None, changed: bool
    ) -> Checkpoint | None:
        """The newest checkpoint, after cutting the other files back to it."""
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
        with contextlib.suppress(OSError):  # leftovers do no harm
            self.checkpoints.tidy(ended=result.exists())
            if checkpoint is not None:
                self._keep_best(checkpoint)  # its run may have ended just before
        self.saved = None if checkpoint is None else checkpoint.step
        return checkpoint

    def _take_starts(self, step: int) -> None:
        """Reports damage in start.jsonl and, at step 0, cuts the file to its valid lines."""
        found = self.starts.intact()
        if found.damaged:
            then = "what was tried for a start is not needed any more"
            self.notice(f"{found.fault}: {then if step else 'from there on it is tried again'}")
        if not step:
            self.starts.truncate(found.length)
            self.passes.truncate(self.passes.intact().length)

    def _newest(self) -> Checkpoint | None:
        """The newest valid checkpoint whose lines of tape and windows are all intact."""
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
        """The newest valid checkpoint before `step`; invalid ones are not reported."""
        for other in reversed(self.checkpoints.steps()):
            if other < step:
                with contextlib.suppress(InputError):
                    return self.checkpoints.load(other)
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step; InputError where it is damaged."""
        return self.checkpoints.load(step)

    def best(self, step: int) -> Checkpoint | None:
        """The best validated checkpoint, if it is of this step and valid."""
        with contextlib.suppress(InputError):
            return self.checkpoints.load(step, best=True)
        return None

    def close(self) -> None:
        """Releases the lock; the end of the process would, too."""
        for lines in (self.tape, self.windows, self.starts, self.passes):
            lines.close()
        if self._lock is not None:
            _LOCKS.remove(self._lock)
            os.close(self._lock)
            self._lock = None

    # Writing -------------------------------------------------------------------------------------

    def save(self, checkpoint: Checkpoint, schedule: Plan) -> Path | None:
        """Writes tape, windows, the checkpoint and then the plan; returns the checkpoint's
        directory, or None where writing fails and the next call retries."""
        if self._first is None and self.saved is None:
            self._first = checkpoint
        self._late = checkpoint, schedule
        for attempt in (0, 1):
            try:
                self._present()
                path = self._save(checkpoint, schedule)
            except OSError as error:
                # Frees space by removing all but the newest valid checkpoint.
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
        # The first checkpoint precedes the tape, so that a run can always resume or start again.
        if self._first is not None and self._first is not checkpoint:
            self._save_checkpoint(self._first, 0, 0)
        for lines in (self.starts, self.passes):
            if lines.pending:
                lines.flush()
        if self._first is None:
            self.tape.flush()
            self.windows.flush()
        path = self._save_checkpoint(checkpoint, self.tape.length, self.windows.length)
        self._keep_best(checkpoint)
        # After the tape, which must have all steps that the document calls committed.
        if schedule is not self._plan or not (self.path / "schedule.json").exists():
            document = schedule.to_json(checkpoint.step)
            replace_durably(self.path / "schedule.json", sealed(document))
            self._plan = schedule
        return path

    def _save_checkpoint(self, checkpoint: Checkpoint, tape: int, windows: int) -> Path:
        beside = {"lengths": {"tape": tape, "windows": windows}, "settings": self._settings}
        path = self.checkpoints.save(replace(checkpoint, values=checkpoint.values | beside))
        self.saved, self._first = checkpoint.step, None
        return path

    def _keep_best(self, checkpoint: Checkpoint) -> None:
        """Keeps the checkpoint if it is of the best validated state."""
        best = checkpoint.values.get("best")
        if best is not None and best["step"] == checkpoint.step:
            self.checkpoints.keep_best(self.checkpoints.path(checkpoint.step))

    def record_now(self, lines: JsonLines, record: Mapping[str, Any]) -> None:
        """Appends a line, durably: a resumed run does not do again what it tells."""
        lines.append([record])
        try:
            lines.flush()
        except OSError as error:
            self._troubled(error)

    def flush(self) -> None:
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
        """Restores removed files and checks that no other process holds the lock."""
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
        """result.json of a finished run; None where it is missing or damaged."""
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
            # Not the override, which gathers the ranks' parts: only the first rank runs this.
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
        """Whether settings that may change did, each with a notice; InputError if others did."""
        new = json.loads(json.dumps(finite(config)))
        said = {name: text for name, text in self.may_change.items() if text}
        silent = {*NOT_COMPARED, *self.may_change} - said.keys()
        was, now = ({k: v for k, v in c.items() if k not in silent} for c in (old, new))
        safe = {name for name in said if was.get(name) != now.get(name)}
        before, steps = was.get("steps"), now.get("steps")
        if isinstance(before, int) and isinstance(steps, int) and steps > before:
            safe.add("steps")
        kept = [{k: v for k, v in c.items() if k not in safe} for c in (was, now)]
        differences = _told(*kept)
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
            text = f"{name} was {short(was.get(name))}, is {short(now.get(name))}"
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
        # The text of modules depends on torch's version.
        if old.get("versions") == new.get("versions"):
            code = new.get("code", {})
            self.differences = _told(old.get("code") or code, code)
        return bool(safe)

    def _digest(self, config: Mapping[str, Any]) -> str:
        """Digest of the settings that must not change on resume."""
        kept = {
            k: v for k, v in config.items() if k not in (*NOT_COMPARED, *self.may_change, "steps")
        }
        return hashlib.sha256(json.dumps(finite(kept), sort_keys=True).encode()).hexdigest()[:16]


def _locked(path: Path) -> int | None:
    """Locks a file until the process ends; BlockingIOError where another process holds the lock."""
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
    """After a fork: a DataLoader worker that outlives the run must not hold its lock."""
    while _LOCKS:
        os.close(_LOCKS.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def versions() -> dict[str, str]:
    return {"rhc": __version__, "torch": torch.__version__, "python": platform.python_version()}


def hardware(device: torch.device) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def module_text(module: torch.nn.Module) -> str:
    """A module without its children, as `Dropout(p=0.2, inplace=False)`: equal in every process."""
    # FSDP subclasses a module's class; SyncBatchNorm replaces BatchNorm.
    kind = re.sub(r"^FSDP|(?<=BatchNorm)[123]d$|^Sync(?=BatchNorm)", "", type(module).__name__)
    text = f"{kind}({module.extra_repr()})"
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)[:MOST_OF_A_MODULE]


def _told(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [f"{name} was {before}, is {here}" for name, before, here in differences(was, now)]

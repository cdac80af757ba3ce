"""The tape: what was observed at every committed step, and at every attempt at a window.

Both files are JSON lines, appended to and never rewritten; a resumed run cuts them back to the
length that its checkpoint recorded. They hold nothing that differs between two runs of the same
computation (no wall-clock times), so that an interrupted run's tape equals an uninterrupted one's
byte by byte.

Beside a file NAME lies .NAME.crc32 with the CRC-32 of each of its lines, so that the lines stay
what a reader expects and a damaged one is known by its number.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rhc.errors import InputError
from rhc.storage.files import (
    CLOSED_ON_EXEC,
    NO_LINK,
    NUMBER,
    NUMBER_OR_NONE,
    Kinds,
    check_kinds,
    cut,
    misfit,
    opened_regular,
    parsed_json,
    read_regular,
    replace_durably,
    sync_directory,
    unshare,
    write_all,
)

KINDS: Mapping[str, Kinds] = {
    "tape.jsonl": {
        "step": (int,),
        **dict.fromkeys(("loss", "gradient_norm"), NUMBER_OR_NONE),
        "reward": (*NUMBER_OR_NONE, list),
    },
    "windows.jsonl": {
        **dict.fromkeys(("start", "stop"), (int,)),
        "outcome": (str,),
        "reason": (str, type(None)),
        **dict.fromkeys(
            ("attempt", "objective_before", "objective_after", "smoothness"), NUMBER_OR_NONE
        ),
    },
}
"""What the lines of a file must have for those who read them, by its name."""

RESULT: Mapping[str, Kinds] = {
    "": {
        "cost": (dict,),
        **{
            f"{prefix}{name}_loss": NUMBER_OR_NONE
            for prefix in ("", "average_")
            for name in ("train", "val", "test")
        },
        **dict.fromkeys(("test_accuracy", "wall_seconds"), NUMBER_OR_NONE),
        "average_metrics": (dict, type(None)),
    },
    "cost": dict.fromkeys(
        ("plain_run_equivalents", "windows", "rejected_windows", "rewound_windows"), NUMBER
    ),
    "average_metrics": {"test": (dict, type(None))},
}
"""What result.json must have, and the objects in it, for those who show it."""


def misfit_of_result(record: Mapping[str, Any]) -> str | None:
    """What is wrong with a result.json, in a clause; None where it is what a run writes."""
    for name, kinds in RESULT.items():
        part = record if not name else record.get(name) or {}
        if fault := misfit(part, kinds):
            return f"{name}.{fault}" if name else fault
    test = (record.get("average_metrics") or {}).get("test") or {}
    fault = misfit(test, {"accuracy": NUMBER_OR_NONE})
    return fault and f"average_metrics.test.{fault}"


MOST_BYTES = 2**34
"""Of such a file: more is not read."""

_SUM = 9
"""Bytes of a line's checksum: eight hexadecimal digits and a newline."""


@dataclass(frozen=True)
class Intact:
    """How much of a file can be trusted: bytes, lines, and why it is no more.

    damaged: there are whole lines behind these; False where a last one was never finished.
    """

    length: int
    lines: int
    fault: str
    damaged: bool = True


class JsonLines:
    """An append-only file of JSON objects, one per line.

    `append` keeps rows in memory, `flush` brings them to the disk; where that fails they stay, and
    the next flush tries again. `length`: bytes that are on the disk for good.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sums = path.with_name(f".{path.name}.crc32")
        self.length = path.stat().st_size if path.exists() else 0
        self.lines = 0
        self._pending: list[bytes] = []
        self._files: tuple[int, int] | None = None

    # Writing -------------------------------------------------------------------------------------

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds rows, which the next `flush` writes."""
        self._pending += [encode(row).encode() for row in rows]

    @property
    def pending(self) -> int:
        """Rows that are not on the disk yet."""
        return len(self._pending)

    def flush(self) -> None:
        """Writes what was appended and returns when it is on disk; an OSError leaves it pending."""
        rows, self._files = list(self._pending), self._files or self._opened()
        file, sums = self._files
        self._put_back(file, self.path, self.length)
        self._put_back(sums, self.sums, _SUM * self.lines)
        if not rows:
            return
        data = b"".join(row + b"\n" for row in rows)
        try:
            write_all(file, data)
            os.fsync(file)
            write_all(sums, b"".join(b"%08x\n" % zlib.crc32(row) for row in rows))
            os.fsync(sums)
        except OSError:
            with contextlib.suppress(OSError):
                self._put_back(file, self.path, self.length)
                self._put_back(sums, self.sums, _SUM * self.lines)
            raise
        self.length += len(data)
        self.lines += len(rows)
        del self._pending[: len(rows)]

    def _opened(self) -> tuple[int, int]:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | CLOSED_ON_EXEC | NO_LINK
        file = os.open(self.path, flags, 0o644)
        try:
            sums = os.open(self.sums, flags, 0o644)
        except OSError:
            os.close(file)
            raise
        try:
            sync_directory(self.path.parent)
        except OSError:
            os.close(file)
            os.close(sums)
            raise
        return file, sums

    def _put_back(self, descriptor: int, path: Path, length: int) -> None:
        """Makes `path` the open file again, of `length` bytes, whoever removed or lengthened it."""
        here = os.fstat(descriptor)
        if here.st_size > length:
            os.ftruncate(descriptor, length)
        with contextlib.suppress(FileNotFoundError):
            named = os.stat(path, follow_symlinks=False)
            if (named.st_dev, named.st_ino) == (here.st_dev, here.st_ino):
                return
        # The name is gone, the content is not as long as the file is open.
        os.lseek(descriptor, 0, os.SEEK_SET)
        content = bytearray()
        while len(content) < length and (part := os.read(descriptor, length - len(content))):
            content += part
        replace_durably(path, bytes(content))
        flags = os.O_RDWR | os.O_APPEND | CLOSED_ON_EXEC | NO_LINK
        fresh = os.open(path, flags)
        os.dup2(fresh, descriptor, inheritable=False)
        os.close(fresh)

    def close(self) -> None:
        """Lets go of the file."""
        files, self._files = self._files, None
        for descriptor in files or ():
            os.close(descriptor)

    # Checking ------------------------------------------------------------------------------------

    def intact(self) -> Intact:
        """The lines from the first on that are whole and as they were written.

        A file without checksums, of a run before there were any, is taken at its word.
        """
        if not self.path.exists():
            return Intact(0, 0, f"{self.path} is missing", damaged=False)
        try:
            data = read_regular(self.path, MOST_BYTES)
            sums = read_regular(self.sums, MOST_BYTES) if self.sums.exists() else None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            return Intact(0, 0, f"{self.path} cannot be read ({reason})")
        length = lines = 0
        while (end := data.find(b"\n", length)) >= 0:
            line = data[length:end]
            if sums is None:
                try:
                    if not isinstance(json.loads(line), dict):
                        raise ValueError("not an object")
                except (ValueError, RecursionError) as error:
                    fault = f"{self.path}, line {lines + 1}: not JSON ({error})"
                    return Intact(length, lines, fault)
            else:
                given = sums[_SUM * lines : _SUM * (lines + 1)]
                if len(given) < _SUM:
                    fault = f"{self.sums} has no checksum of line {lines + 1}"
                    return Intact(length, lines, fault)
                if given != b"%08x\n" % zlib.crc32(line):
                    fault = (
                        f"{self.path}, line {lines + 1}, does not match its checksum in "
                        f"{self.sums.name}"
                    )
                    return Intact(length, lines, fault)
            length, lines = end + 1, lines + 1
        fault = f"{self.path} has {length} bytes of whole lines"
        return Intact(length, lines, fault, damaged=False)

    def truncate(self, length: int) -> None:
        """Cuts the file back to `length` bytes, which must be whole lines that are intact."""
        if not self.path.exists():
            self.length = self.lines = 0
            return
        unshare(self.path)
        unshare(self.sums)
        with opened_regular(self.path) as file:
            kept = file.read(length)
        if len(kept) < length:
            raise InputError(
                f"{self.path} has {len(kept)} bytes where the checkpoint saw {length}; lines "
                "were lost, so start again in another --directory"
            )
        self.lines = kept.count(b"\n")
        if os.stat(self.path).st_size > length:
            cut(self.path, length)
        self.length = length
        whole = _SUM * self.lines
        if not self.sums.exists():
            rows = kept.splitlines()
            replace_durably(self.sums, b"".join(b"%08x\n" % zlib.crc32(row) for row in rows))
        elif os.stat(self.sums).st_size > whole:
            cut(self.sums, whole)

    # Reading -------------------------------------------------------------------------------------

    def read(self) -> list[dict[str, Any]]:
        """All rows, on the disk and pending; a line that is not JSON is an InputError naming it."""
        data = b""
        if self.path.exists():
            try:
                data = read_regular(self.path, MOST_BYTES)
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise InputError(f"{self.path} cannot be read ({reason})") from None
        rows = []
        for number, line in enumerate([*data.splitlines(), *self._pending], 1):
            try:
                row = parsed_json(line)
                if not isinstance(row, dict):
                    raise ValueError(f"{type(row).__name__} in place of an object")
                check_kinds(row, KINDS.get(self.path.name, {}), f"{self.path}, line {number},")
            except InputError:
                raise
            except ValueError as error:
                raise InputError(f"{self.path}, line {number}: not JSON ({error})") from None
            rows.append(row)
        return rows


def encode(row: Mapping[str, Any]) -> str:
    """One line of strict JSON: NaN and infinities, which JSON lacks, become null."""
    return json.dumps(finite(row), allow_nan=False)


def finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if hasattr(value, "tolist"):  # a number or an array of numpy or torch
        return finite(value.tolist())
    return value

"""Append-only files of JSON lines; .NAME.crc32 has the CRC-32 of every line of NAME.

They hold no wall-clock times: a resumed run writes the tape of an uninterrupted one, byte by byte.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rhc.errors import InputError
from rhc.storage.files import (
    CLOSED_ON_EXEC,
    NO_LINK,
    Kinds,
    crc32_line,
    cut,
    finite,
    misfit,
    opened_regular,
    parsed_json,
    read_regular,
    reason,
    replace_durably,
    sum_beside,
    sync,
    unshare,
    write_all,
)
from rhc.storage.run_files import ROWS

MOST_BYTES = 2**34
"""Limit of a file that is read."""

_SUM = len(crc32_line(b""))


def encode(row: Mapping[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False)


# Reading -----------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of a file: its row, or None and the fault."""

    number: int
    stop: int
    """Byte at which the line ends."""
    row: dict[str, Any] | None
    fault: str = ""


def read_lines(path: Path, at: int = 0) -> Iterator[Line]:
    """The lines of a file from byte `at` on, but for an incomplete last one; none where it is
    missing. InputError where it cannot be read."""
    try:
        with opened_regular(path.resolve()) as file:
            if file.seek(0, os.SEEK_END) > MOST_BYTES:
                raise ValueError(f"it has more than the {MOST_BYTES} bytes that are read")
            file.seek(at)
            data = file.read()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)}); restore it") from None
    yield from _lines(data, ROWS.get(path.name, {}), at)


def _lines(data: bytes, kinds: Kinds, at: int = 0) -> Iterator[Line]:
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        at += len(line) + 1
        try:
            row = parsed_json(line)
            if not isinstance(row, dict):
                raise ValueError(f"{type(row).__name__} in place of an object")
        except ValueError as error:
            yield Line(number, at, None, f"line {number}: not JSON ({error})")
            continue
        fault = misfit(row, kinds)
        if fault is None:
            yield Line(number, at, row)
        else:
            yield Line(number, at, None, f"line {number}, is damaged: {fault}; restore it")


def read_rows(path: Path, most: int | None = None) -> list[dict[str, Any]]:
    """The first `most` rows, or all; InputError names the first damaged line."""
    return _rows_of(path, itertools.islice(read_lines(path), most))


def _rows_of(path: Path, lines: Iterable[Line]) -> list[dict[str, Any]]:
    rows = []
    for line in lines:
        if line.row is None:
            raise InputError(f"{path}, {line.fault}")
        rows.append(line.row)
    return rows


# Writing -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Intact:
    """The valid start of a file: its bytes and lines, and why it ends there. damaged: whole lines
    follow it, not only an incomplete one."""

    length: int
    lines: int
    fault: str
    damaged: bool = True


class JsonLines:
    """An append-only file of JSON objects, one per line; `length` is its durable size in bytes.
    `append` buffers rows; `flush` writes them, or keeps them buffered where it fails."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.sums = sum_beside(path)
        self.length = path.stat().st_size if path.exists() else 0
        self.lines = 0
        self._pending: list[bytes] = []
        self._files: list[int] = []

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._pending += [encode(row).encode() for row in rows]

    @property
    def pending(self) -> int:
        """Number of buffered rows."""
        return len(self._pending)

    def flush(self) -> None:
        rows, self._files = list(self._pending), self._files or self._opened()
        self._put_back()
        if not rows:
            return
        data = b"".join(row + b"\n" for row in rows)
        try:
            for file, content in zip(
                self._files, (data, b"".join(map(crc32_line, rows))), strict=True
            ):
                write_all(file, content)
                os.fsync(file)
        except OSError:
            with contextlib.suppress(OSError):
                self._put_back()
            raise
        self.length += len(data)
        self.lines += len(rows)
        del self._pending[: len(rows)]

    def _opened(self) -> list[int]:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | CLOSED_ON_EXEC | NO_LINK
        opened = []
        try:
            for path in (self.path, self.sums):
                opened.append(os.open(path, flags, 0o644))
            sync(self.path.parent)
        except OSError:
            for descriptor in opened:
                os.close(descriptor)
            raise
        return opened

    def _put_back(self) -> None:
        """Restores both files at their paths and lengths if another process changed them."""
        lengths = (self.length, _SUM * self.lines)
        for file, path, length in zip(self._files, (self.path, self.sums), lengths, strict=True):
            here = os.fstat(file)
            if here.st_size > length:
                os.ftruncate(file, length)
            with contextlib.suppress(FileNotFoundError):
                named = os.stat(path, follow_symlinks=False)
                if (named.st_dev, named.st_ino) == (here.st_dev, here.st_ino):
                    continue
            # The name was removed; the content stays as long as the file is open.
            os.lseek(file, 0, os.SEEK_SET)
            content = bytearray()
            while len(content) < length and (part := os.read(file, length - len(content))):
                content += part
            replace_durably(path, bytes(content))
            fresh = os.open(path, os.O_RDWR | os.O_APPEND | CLOSED_ON_EXEC | NO_LINK)
            os.dup2(fresh, file, inheritable=False)
            os.close(fresh)

    def close(self) -> None:
        files, self._files = self._files, []
        for descriptor in files:
            os.close(descriptor)

    def intact(self) -> Intact:
        """The leading lines that match their checksums; without checksums, those that are JSON."""
        if not self.path.exists():
            return Intact(0, 0, f"{self.path} is missing", damaged=False)
        try:
            data = read_regular(self.path, MOST_BYTES)
            sums = read_regular(self.sums, MOST_BYTES) if self.sums.exists() else None
        except (OSError, ValueError) as error:
            return Intact(0, 0, f"{self.path} cannot be read ({reason(error)})")
        length = lines = 0
        for line in data.split(b"\n")[:-1]:
            if fault := self._fault(lines, line, sums):
                return Intact(length, lines, fault)
            length, lines = length + len(line) + 1, lines + 1
        fault = f"{self.path} has {length} bytes of whole lines"
        return Intact(length, lines, fault, damaged=False)

    def _fault(self, before: int, line: bytes, sums: bytes | None) -> str:
        """What is wrong with the line after the first `before`; empty where it is valid."""
        number = before + 1
        if sums is None:
            (found,) = _lines(line + b"\n", {})
            return "" if found.row is not None else f"{self.path}, line {number}: not JSON"
        given = sums[_SUM * before : _SUM * number]
        if len(given) < _SUM:
            return f"{self.sums} has no checksum of line {number}"
        if given != crc32_line(line):
            return f"{self.path}, line {number}, does not match its checksum in {self.sums.name}"
        return ""

    def truncate(self, length: int) -> None:
        """Cuts the file to `length` bytes, which must be whole, intact lines."""
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
            replace_durably(self.sums, b"".join(map(crc32_line, kept.split(b"\n")[:-1])))
        elif os.stat(self.sums).st_size > whole:
            cut(self.sums, whole)

    def read(self) -> list[dict[str, Any]]:
        """All rows, written and buffered; InputError names a damaged line."""
        pending = b"".join(row + b"\n" for row in self._pending)
        return read_rows(self.path) + _rows_of(self.path, _lines(pending, {}))

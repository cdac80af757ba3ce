"""The tape: what was observed at every committed step, and at every attempt at a window.

Both files are JSON lines, appended to and never rewritten; a resumed run cuts them back to the
length that its checkpoint recorded. They hold nothing that differs between two runs of the same
computation (no wall-clock times), so that an interrupted run's tape equals an uninterrupted one's
byte by byte.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rhc.errors import InputError


class JsonLines:
    """An append-only file of JSON objects, one per line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.length = path.stat().st_size if path.exists() else 0

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds the rows and returns when they are on disk."""
        data = "".join(encode(row) + "\n" for row in rows).encode()
        with self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.length += len(data)

    def mend(self) -> None:
        """Cuts off a last line that was not written to its end."""
        if self.length:
            self.truncate(self.path.read_bytes().rfind(b"\n") + 1)

    def truncate(self, length: int) -> None:
        """Cuts the file back to `length` bytes; a shorter file is an InputError."""
        if self.length < length:
            raise InputError(
                f"{self.path} has {self.length} bytes where the checkpoint saw {length}; lines "
                "were lost, so start again in another --directory"
            )
        if self.path.exists():
            os.truncate(self.path, length)
        self.length = length

    def read(self) -> list[dict[str, Any]]:
        """All rows; a line that is not JSON is an InputError that names it."""
        if not self.path.exists():
            return []
        rows = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise InputError(f"{self.path}, line {number}: not JSON ({error})") from None
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
    return value

"""A file system layer that fails on demand, in the place of the functions of `os` that rhc calls.

No root, no LD_PRELOAD: `rhc.storage.files`, `rhc.storage.jsonl` and `rhc.storage.checkpoint` reach
the disk through these names alone, and so do `pathlib` and `shutil` where they change anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

OPERATIONS = (
    *("write", "fsync", "ftruncate", "truncate", "rename", "replace"),
    *("mkdir", "unlink", "rmdir", "open"),
)
"""Functions of `os` that change what is on the disk; `open` where it is opened to be written."""


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


class FaultyDisk:
    """Counts every operation on the disk; `fault(number, name)` decides what becomes of it.

    It returns None for "as usual", an OSError to be raised once half a write is done, or a Killed:
    after that nothing touches the disk any more, whatever `finally` wants. `names`: of all so far.
    """

    def __init__(self, fault: Callable[[int, str], BaseException | None] = lambda n, _: None):
        self.fault = fault
        self.names: list[str] = []
        self.failed = 0
        self.dead = False
        self._originals = {name: getattr(os, name) for name in OPERATIONS}

    def __enter__(self) -> FaultyDisk:
        for name, original in self._originals.items():
            setattr(os, name, self._wrapped(name, original))
        return self

    def __exit__(self, *exception: object) -> None:
        for name, original in self._originals.items():
            setattr(os, name, original)

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **options: Any) -> Any:
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR):
                return original(*args, **options)
            if self.dead:
                raise Killed
            number = len(self.names)
            self.names.append(name)
            error = self.fault(number, name)
            if error is None:
                return original(*args, **options)
            if name == "write":
                original(args[0], bytes(args[1])[: len(args[1]) // 2])
            self.failed += 1
            self.dead = isinstance(error, Killed)
            raise error

        return operation

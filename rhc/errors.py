"""Exceptions for users, checks of numeric settings, and text that is safe on a terminal."""

from __future__ import annotations

import operator
import re
from typing import Any

_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, and those that change the direction of text."""


def plain(text: str) -> str:
    """`text` with control characters escaped, so that a file or path cannot control a terminal."""
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class InputError(ValueError):
    """A setting, file or object given to rhc cannot be used.

    The message is one sentence with the argument, its value and the remedy; the command line prints
    it and exits with status 2.
    """


class Unseen(InputError):
    """The reverse pass cannot differentiate a step; a run goes on without reverse passes."""


class DivergedError(RuntimeError):
    """No lr within its bounds makes the next window finite; the last checkpoint is intact."""


class StorageError(RuntimeError):
    """A run ended, but the disk failed and part of it is not saved (exit status 3). result: of
    `Runner.fit`, or None."""

    result: object = None


class RunWarning(UserWarning):
    """Nothing failed, but the run differs from what the caller may expect."""


def whole_number(name: str, value: Any) -> int:
    """`value` as an int, also from numpy integers and one-element tensors. InputError for other
    numbers and for bools, which are most often misplaced flags."""
    flag = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    try:
        if not flag:
            return operator.index(value)
    except TypeError:
        pass
    raise InputError(f"{name} must be a whole number, got {value!r}; give an int")


def plain_numbers(settings: Any) -> None:
    """Converts scalars of numpy and torch in a frozen dataclass to Python's; for __post_init__."""
    for name, value in vars(settings).items():
        if hasattr(value, "item"):
            object.__setattr__(settings, name, value.item())

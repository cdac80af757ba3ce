"""Exceptions that a person can act on, checks of settings that are numbers, text for terminals."""

from __future__ import annotations

import operator
import re
from typing import Any

_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but for tabs and ends of lines, and those that turn the order of a line."""


def plain(text: str) -> str:
    """The text with what a terminal would obey written out: `\\x1b[2J` does not clear the screen.

    For whatever comes from a file or a path: these may be somebody else's.
    """
    return _COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class InputError(ValueError):
    """A setting, file or object that rhc was given cannot be used.

    Its message is one sentence that names the argument, its value and the mend; the command line
    prints it without a traceback and exits with status 2.
    """


class Unseen(InputError):
    """A step does what a hypergradient cannot see through; a run goes on without reverse passes."""


class DivergedError(RuntimeError):
    """No lr within its bounds makes the next window finite; the last checkpoint is intact."""


class StorageError(RuntimeError):
    """A run went on to its end although the disk failed, and something of it is not saved.

    Its message is one sentence; the command line prints it and exits with status 3. result: what
    the run ended with, as `Runner.fit` would have returned it; None where it did not end.
    """

    result: object = None


class RunWarning(UserWarning):
    """Nothing failed, but a run is not what the caller may take it for. The message says why."""


def whole_number(name: str, value: Any) -> int:
    """`value` as Python's int: of any type that counts (numpy's integers, a tensor of one).

    Raises InputError for other numbers, and for True and False, which are most often a flag in the
    wrong place.
    """
    flag = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    try:
        if not flag:
            return operator.index(value)
    except TypeError:
        pass
    raise InputError(f"{name} must be a whole number, got {value!r}; give an int")


def plain_numbers(settings: Any) -> None:
    """Makes Python's own of numbers of numpy and torch in a frozen dataclass, in its making."""
    for name, value in vars(settings).items():
        if hasattr(value, "item"):
            object.__setattr__(settings, name, value.item())

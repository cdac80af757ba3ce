"""The help of the command line: `--help` is one screen, `--help-all` every flag in full.

Flags are those of a command's dataclass. The first sentence of a field is its line in `--help`;
what comes after it, and flags that are rarely given, are in `--help-all`. Needs no torch.
"""

from __future__ import annotations

import textwrap
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

import docstring_parser
import tyro.conf

from rhc.settings import field_kind

WIDTH = 80
_COLUMN = 24
"""Where the sentences begin; flags that reach it are on a line of their own."""

Groups = Mapping[str, tuple[str, str]]
"""Headings of flags: the names that are given often, and those that are rare."""


@dataclass(frozen=True)
class Flag:
    """A flag or an argument as it is written, what it does, and its default in words."""

    written: str
    sentences: str
    default: str
    positional: bool

    def lines(self, whole: bool) -> list[str]:
        """The flag in help; whole: with all that its field says."""
        text = self.sentences if whole else self.sentences.partition(". ")[0].rstrip(".")
        if self.default:
            text += f" (default: {self.default})" if whole else f" [{self.default}]"
        beside = len(self.written) + 2 < _COLUMN
        wrapped = textwrap.wrap(text, WIDTH - _COLUMN, break_on_hyphens=False)
        lines = [f"{'':{_COLUMN}}{line}" for line in wrapped]
        if beside:
            return [f"  {self.written:<{_COLUMN - 2}}{wrapped[0]}", *lines[1:]]
        return [f"  {self.written}", *lines]


def page(name: str, flags: type[Any], groups: Groups, about: str, more: str, *, whole: bool) -> str:
    """The help of a command; whole: with every flag, all its sentences, and what `more` adds."""
    found = flags_of(flags)
    shown = {
        heading: [*common.split(), *(rare.split() if whole else ())]
        for heading, (common, rare) in groups.items()
    }
    arguments = [flag.written for flag in found.values() if flag.positional]
    optional = ["[FLAGS]"] if len(arguments) < len(found) else []
    lines = [" ".join(["usage: rhc", name, *arguments, *optional]), "", *about.splitlines()]
    if whole and more:
        lines += ["", *more.splitlines()]
    for heading, names in shown.items():
        if names:
            lines += [*([""] if whole or heading == next(iter(groups)) else []), f"{heading}:"]
        for each in names:
            lines += found[each].lines(whole)
    left_out = sum(len(rare.split()) for _, rare in groups.values())
    if not whole and (left_out or more or any(". " in each.sentences for each in found.values())):
        further = f"{left_out} further flags" if left_out else "more about these"
        lines += ["", f"[…]: the default; {further}: rhc {name} --help-all"]
    return "\n".join(lines)


def flags_of(flags: type[Any]) -> dict[str, Flag]:
    """The flags of a command's dataclass by the name of their field."""
    hints = typing.get_type_hints(flags, include_extras=True)
    told = _sentences(flags)
    return {f.name: _flag(f, hints[f.name], told[f.name]) for f in fields(flags)}


def _flag(field: Field[Any], hint: Any, sentences: str) -> Flag:
    notes = _notes(hint)
    metavar = next(filter(None, (getattr(note, "metavar", None) for note in notes)), None)
    meaning = next(
        filter(None, (getattr(note, "help_behavior_hint", None) for note in notes)), None
    )
    kind, _ = field_kind(_plain(hint))
    written = "--" + field.name.replace("_", "-")
    positional = tyro.conf.Positional in notes
    default = ""
    if isinstance(meaning, str):
        default = meaning.strip("()").removeprefix("default: ")
    elif kind is not bool and field.default is not MISSING:
        default = f"{field.default}"
    if kind is bool and field.default is True:
        written = f"--no-{field.name.replace('_', '-')}"
        sentences, default = sentences.removeprefix(f"{written} "), ""
        sentences = sentences[0].upper() + sentences[1:]
    if default in ("none", "one or more"):
        default = ""
    if positional:
        written = str(metavar)
    elif metavar is not None:
        aliases = [a for note in notes for a in getattr(note, "aliases", None) or ()]
        written = f"{', '.join([*aliases, written])} {metavar}"
    return Flag(written, sentences, default, positional)


def _notes(hint: Any) -> list[Any]:
    """What Annotated says of a field, nested ones and those of its parts too."""
    found = list(getattr(hint, "__metadata__", ()))
    for part in typing.get_args(hint):
        if hasattr(part, "__metadata__"):
            found += _notes(part)
    return found


def _plain(hint: Any) -> Any:
    """The type without what Annotated says of it."""
    while hasattr(hint, "__metadata__"):
        hint = typing.get_args(hint)[0]
    return hint


def _sentences(flags: type[Any]) -> dict[str, str]:
    """The sentences below each field, on one line, those of the classes it inherits from too."""
    return {
        each.arg_name: " ".join((each.description or "").split())
        for owner in reversed(flags.__mro__)
        if owner.__module__.startswith("rhc.")
        for each in docstring_parser.parse_from_object(owner).params
    }

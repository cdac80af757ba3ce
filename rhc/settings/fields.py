"""A setting: default, help, check and recording, defined once, on the field of a dataclass."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

from rhc.errors import InputError, whole_number


@dataclass(frozen=True)
class Check:
    """What a value must be, in words and as a predicate, and how to fix it. known: its names."""

    words: str
    holds: Callable[[Any], bool]
    mend: str
    known: tuple[str, ...] = ()


def at_least(least: int, example: int, unit: str = "", mend: str = "try") -> Check:
    words = f"≥ {least} {unit}".rstrip()
    return Check(words, lambda x: x >= least, f"{mend} {{flag}} {example}")


def above_0(what: str) -> Check:
    """what: the meaning of None."""
    return Check("> 0", lambda x: x > 0, f"use None {what}, or leave {{flag}} out")


def fraction(example: float, what: str = "a fraction of the run") -> Check:
    return Check("in [0, 1)", lambda x: 0 <= x < 1, f"it is {what}, try {{flag}} {example:g}")


def share(example: float = 1.0) -> Check:
    """example: 1 for none at all."""
    mend = f"it is a fraction of the run, try {{flag}} {example:g}"
    none = "use 1 for none, or leave {flag} out"
    return Check("in (0, 1]", lambda x: 0 < x <= 1, none if example == 1 else mend)


def one_of(*known: str, mend: str = "give {flag} one of these") -> Check:
    words = repr(known[0]) if len(known) == 1 else f"one of {', '.join(known)}"
    return Check(words, lambda x: x in known, mend, known)


SEEDS = Check("in [0, 2**32)", lambda x: 0 <= x < 2**32, "try {flag} 0")


@dataclass(frozen=True)
class Setting:
    """What is known of a setting besides its type and default."""

    metavar: str = ""
    """The value in help."""
    check: Check | None = None
    parse: Callable[[Any], Any] | None = None
    """In place of a check: the value of a text or a number, or an InputError."""
    most: int | None = None
    """Of what memory goes by: more is a slip of the finger, or somebody's joke."""
    unset: str = ""
    """What the default means, in words, where its value does not say it."""
    heading: str = ""
    """In help, of it and those of its class that follow; "" for that of the one before."""
    place: Literal["usual", "rare", "argument", "none"] = "usual"
    """In help: rare flags in `--help-all` alone; an argument has no flag, "none" is in files."""
    alias: str = ""

    rewriting: bool = False
    """Whether it means nothing where nothing is rewritten."""

    recorded: Literal["always", "if given", "by the runner", "never"] = "always"
    """In config.json. "if given": runs that began before it existed have none of it."""
    on_resume: str | None = None
    """What is said where a resumed run has another value: "" for nothing, None where it may not."""

    @property
    def hashed(self) -> bool:
        """Whether it enters the hash in a run's directory name."""
        return self.on_resume != "" and self.recorded != "never"


def setting(
    default: Any = MISSING, metavar: str = "", check: Check | None = None, **known: Any
) -> Any:
    """A field of a `Settings`. known: the other attributes of its `Setting`."""
    return field(default=default, metadata={"setting": Setting(metavar, check, **known)})


def like(owner: type[Settings], name: str, **changed: Any) -> Any:
    """The field of another `Settings`, changed. A text below it replaces the other's."""
    known = owner.known()[name]
    default = changed.pop("default", known.default)
    same = replace(known.setting, **{"heading": "", **changed})
    return field(default=default, metadata={"setting": same, "like": known})


class Known(NamedTuple):
    """A setting with its name, the type of its values, and whether they may be None."""

    name: str
    setting: Setting
    kind: type
    element: Any
    """The type of the parts of a tuple."""
    optional: bool
    default: Any
    heading: str
    owner: Any
    """The class that its sentences stand in."""
    like: Known | None
    """What has them where it has none of its own."""

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def text(self) -> str:
        """The text below it: its first sentence in `--help`, all of it in `--help-all`."""
        own = _sentences(self.owner).get(self.name, "")
        return own if own or self.like is None else self.like.text

    def checked(self, value: Any) -> Any:
        """The value as a Python value; an InputError says what it should be."""
        what = self.setting
        if value is None and self.optional:
            return None
        if what.parse is not None:
            return what.parse(value)
        if self.kind is int:
            value = whole_number(self.name, value)
        elif hasattr(value, "item"):
            value = value.item()
        if what.check is not None and not what.check.holds(value):
            got = repr(value) if isinstance(value, str) else shown(value)
            mend = what.check.mend.format(flag=self.flag)
            raise InputError(
                f"{self.name} must be {what.check.words}, got {got}; "
                f"{nearest(value, what.check.known)}{mend}"
            )
        if what.most is not None and value > what.most:
            raise InputError(f"{self.name} must be ≤ {what.most}, got {value}; lower {self.flag}")
        return value

    def typed(self, value: Any, source: str) -> Any:
        """A value of JSON or TOML in the field's type; an InputError names its source."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None and self.optional:
            return None
        if self.kind is float and number and abs(value) < 1e300:
            return float(value)
        if self.kind is int and number and isinstance(value, int):
            return value
        if self.kind in (bool, str) and isinstance(value, self.kind):
            return value
        if self.kind is Path and isinstance(value, str):
            return Path(value)
        if self.kind is tuple and isinstance(value, str):
            return (value,)
        names = isinstance(value, list) and all(isinstance(part, str) for part in value)
        if self.kind is tuple and names:
            return tuple(value)
        if self.setting.parse is not None and (number or isinstance(value, str)):
            return value
        raise InputError(
            f"{source}: {self.name} must be {_KINDS[self.kind]}, got {value!r}; mend it there"
        )


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path in quotes",
    tuple: "a list of names",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one owner. Fields without a `Setting` have no flag and no record."""

    heading: ClassVar[str] = ""
    """Of its flags in help."""

    @classmethod
    def known(cls) -> dict[str, Known]:
        owner: Any = cls
        return _known(owner)

    def checked(self) -> Self:
        """These settings as Python values, if valid; InputError otherwise."""
        known = self.known().items()
        return replace(self, **{name: each.checked(getattr(self, name)) for name, each in known})

    def to_record(self, *without: str) -> dict[str, Any]:
        """Flat JSON values, without trust, which is for one command only."""
        left_out = ("trust", *without)
        return {n: plain_value(getattr(self, n)) for n in self.known() if n not in left_out}

    def if_given(self) -> dict[str, Any]:
        """Those recorded only where they are not at their default, as JSON values."""
        return {
            name: plain_value(getattr(self, name))
            for name, each in self.known().items()
            if each.setting.recorded == "if given" and getattr(self, name) != each.default
        }

    @classmethod
    def from_record(cls, values: Mapping[str, Any], source: str) -> Self:
        """The inverse of `to_record`; InputError for an unknown name or a value of another type."""
        known = {name: each for name, each in cls.known().items() if name != "trust"}
        given: dict[str, Any] = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in known:
                raise InputError(
                    f"{source}: unknown setting {key!r}; {nearest(name, known)}"
                    "`rhc train --help` lists them"
                )
            given[name] = known[name].typed(value, source)
        return cls(**given)


@functools.cache
def _known(owner: Any) -> dict[str, Known]:
    hints = typing.get_type_hints(owner)
    found: dict[str, Known] = {}
    before, heading = None, ""
    for each in fields(owner):
        what = each.metadata.get("setting")
        if what is None:
            continue
        union = isinstance(hints[each.name], types.UnionType)
        options = typing.get_args(hints[each.name]) if union else (hints[each.name],)
        hint = next(option for option in options if option is not types.NoneType)
        declaring: Any = next(
            c for c in owner.__mro__ if each.name in vars(c).get("__annotations__", ())
        )
        if declaring is not before:
            before, heading = declaring, declaring.heading
        heading = what.heading or heading
        found[each.name] = Known(
            each.name,
            what,
            typing.get_origin(hint) or hint,
            next(iter(typing.get_args(hint)), None),
            types.NoneType in options,
            each.default,
            heading,
            declaring,
            each.metadata.get("like"),
        )
    return found


@functools.cache
def _sentences(owner: Any) -> dict[str, str]:
    """The text below each field of a class, on one line, by name."""
    tree: Any = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    return {
        node.target.id: " ".join(ast.literal_eval(below.value).split())
        for node, below in itertools.pairwise(tree.body[0].body)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and isinstance(below, ast.Expr)
    }


def shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def nearest(value: Any, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(value), list(known), n=1, cutoff=0.7)
    return f"did you mean {near[0]!r}? " if near else ""


def plain_value(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value

"""The schedule of an unfinished run: per control one value to the end, and a template of lr."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rhc.errors import InputError
from rhc.schedule.schedule import Schedule, reading
from rhc.schedule.templates import shaped, template_factors
from rhc.storage.jsonl import JsonLines, read_rows
from rhc.workload import TEMPLATES, Template

PLAN_VERSION = 2
"""Of a schedule.json with a plan; version 1 has a value for every step."""

MOST_VALUES = 2 * 10**8
"""Limit of a schedule expanded from a plan, since a small file can claim any number of steps."""


@dataclass(frozen=True)
class Shape:
    """A template over `steps` steps from the absolute step `start` on; see `template_factors`."""

    template: Template
    steps: int
    cooldown: float
    warmup: float = 0.0
    start: int = 0

    def factors(self, start: int, stop: int) -> Tensor:
        """(stop - start,) factors on lr for the absolute steps [start, stop)."""
        at = torch.arange(start - self.start, stop - self.start, dtype=torch.float64)
        return template_factors(self.template, self.steps, self.cooldown, self.warmup, at)

    @property
    def flat(self) -> bool:
        """Whether all factors are 1: any other template differs at its first or last step."""
        first, last = self.start, self.start + self.steps - 1
        return all(bool(self.factors(t, t + 1) == 1) for t in (first, last))


@dataclass(frozen=True, eq=False)
class Piece:
    """The plan from `start` to the next piece or the end: values of one step, or of all steps, and
    a shape of lr, whose value is then the maximum."""

    start: int
    values: Schedule
    shape: Shape | None = None

    def window(self, start: int, stop: int) -> dict[str, Tensor]:
        """Control -> values of the absolute steps [start, stop)."""
        if len(self.values) > 1:
            return dict(self.values.window(start, stop).values)
        held = self.values.values.items()
        values = {name: v.expand(stop - start, *v.shape[1:]).clone() for name, v in held}
        if self.shape is not None:
            values["lr"] = shaped(self.values["lr"][0], self.shape.factors(start, stop))
        return values


@dataclass(frozen=True, eq=False)
class PlannedSchedule:
    """The planned controls of the steps [start, stop); immutable."""

    pieces: tuple[Piece, ...]
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def start(self) -> int:
        return self.pieces[0].start

    @property
    def seed(self) -> int:
        """Of the gradient noise."""
        return self.pieces[0].values.seed

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.pieces[0].values.values)

    def window(self, start: int, stop: int) -> Schedule:
        """The absolute steps [start, stop), which must lie within the plan."""
        if not self.start <= start < stop <= self.stop:
            raise InputError(
                f"window [{start}, {stop}) must lie within the planned steps "
                f"[{self.start}, {self.stop})"
            )
        parts = [
            piece.window(max(start, piece.start), min(stop, end))
            for piece, end in self._ending()
            if piece.start < stop and start < end
        ]
        return Schedule.of_checked(_joined(parts), start, self.seed)

    def changed(self, start: int, change: Callable[[Schedule], Schedule]) -> PlannedSchedule:
        """The plan from `start` on; `change` must shift all steps equally in their coordinates."""
        pieces = []
        for piece, end in self._ending():
            if end <= start:
                continue
            values, first = piece.values, max(start, piece.start)
            if len(values) > 1:
                values = values.window(first, values.stop)
            pieces.append(replace(piece, start=first, values=change(values)))
        return PlannedSchedule(tuple(pieces), self.stop)

    def begun_anew(self, step: int, lr: Tensor, shape: Shape) -> PlannedSchedule:
        """The plan with another lr, () or (G,), and shape from `step` on."""
        last = self.pieces[-1].values
        values = {**last.window(last.stop - 1, last.stop).values, "lr": lr[None]}
        piece = Piece(step, Schedule(values, seed=self.seed), shape)
        before = tuple(piece for piece in self.pieces if piece.start < step)
        return PlannedSchedule((*before, piece), self.stop)

    def _ending(self) -> Iterator[tuple[Piece, int]]:
        ends = [*(piece.start for piece in self.pieces[1:]), self.stop]
        return zip(self.pieces, ends, strict=True)

    # Files ---------------------------------------------------------------------------------------

    def to_json(self, committed: int) -> dict[str, Any]:
        """The schedule.json of a run with at least `committed` steps on the tape."""
        return {
            "format": "rhc.schedule",
            "version": PLAN_VERSION,
            "steps": self.stop,
            "committed": committed,
            "plan": [
                {
                    "start": piece.start,
                    "template": None if piece.shape is None else asdict(piece.shape),
                    "values": piece.values.to_json(),
                }
                for piece in self.pieces
            ],
        }

    @classmethod
    def from_json(cls, document: Any, source: str) -> tuple[PlannedSchedule, int]:
        """(plan, committed steps), the inverse of `to_json`."""
        with reading(source):
            if document["version"] != PLAN_VERSION:
                raise InputError(
                    f"{source} has schedule version {document['version']}, this rhc reads a plan "
                    f"of version {PLAN_VERSION}; resume the run with this version"
                )
            stop, committed = int(document["steps"]), int(document["committed"])
            pieces = tuple(_piece(entry, source) for entry in document["plan"])
            starts = [piece.start for piece in pieces]
            if not 0 <= starts[0] <= committed <= stop or not starts[-1] < stop:
                raise ValueError(f"a plan from step {starts[0]}, of {committed} and {stop} steps")
            if any(late <= early for early, late in pairwise(starts)):
                raise ValueError("pieces that are not one after the other")
            shapes = [{n: v.shape[1:] for n, v in p.values.values.items()} for p in pieces]
            if any(shape != shapes[0] for shape in shapes):
                raise ValueError("pieces of other controls or parameter groups")
            return cls(pieces, stop), committed


def _piece(entry: Mapping[str, Any], source: str) -> Piece:
    """A piece from its entry in the document; any exception where it is invalid."""
    values = Schedule.from_json(entry["values"], source)
    if entry["template"] is None:
        return Piece(int(entry["start"]), values)
    shape = Shape(**entry["template"])
    whole = isinstance(shape.steps, int) and isinstance(shape.start, int)
    if shape.template not in TEMPLATES or not whole:
        raise ValueError(f"a template {shape.template!r} over {shape.steps!r} steps")
    if shape.steps < 1 or not (0 <= shape.cooldown < 1 and 0 <= shape.warmup < 1):
        raise ValueError(f"a template over {shape.steps} steps")
    if len(values) > 1 or "lr" not in values:
        raise ValueError("a template, and no single lr for it")
    return Piece(int(entry["start"]), values, shape)


def of_unfinished_run(document: Mapping[str, Any], path: Path) -> Schedule:
    """The committed steps on the tape, then those planned in schedule.json."""
    plan, least = PlannedSchedule.from_json(document, str(path))
    columns = sum(v[0].numel() for v in plan.pieces[0].values.values.values())
    if plan.stop * columns > MOST_VALUES:
        raise InputError(
            f"{path} has a plan of {plan.stop} steps, with {columns} values each; no more than "
            f"{MOST_VALUES} values are read"
        )
    tape = JsonLines(path.resolve().with_name("tape.jsonl"))
    found = tape.intact()
    if found.lines < least:
        raise InputError(
            f"{path} is of a run that has not ended, and its first {least} steps are on the tape "
            f"beside: {found.fault}; give the whole directory of the run, or resume it"
        )
    committed = min(found.lines, plan.stop)
    parts: list[Mapping[str, Tensor]] = []
    if committed:
        parts.append(of_tape(read_rows(tape.path, committed), plan.names, str(tape.path)))
    if committed < plan.stop:
        parts.append(plan.window(committed, plan.stop).values)
    return Schedule(_joined(parts), 0, plan.seed)


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def of_tape(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], source: str
) -> dict[str, Tensor]:
    """Control -> (T,) or (T, G) values of committed steps."""
    try:
        return {
            name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in names
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{source} has a line without the controls of its step ({type(error).__name__}: "
            f"{error}); restore it"
        ) from None

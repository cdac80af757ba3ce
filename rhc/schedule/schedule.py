"""Controls and schedules: what is steered, within which bounds, and its value at every step.

A schedule holds natural values (an lr of 0.01 is stored as 0.01) in float64 and gives the
unconstrained coordinates, log or logit, on demand. Storing the coordinates themselves would lose
two things that must be exact: a value of 0, whose coordinate is −∞, and the bits of an lr that
nobody rewrote, since exp(log(0.1)) ≠ 0.1.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rhc.errors import InputError, plain, whole_number
from rhc.schedule.controls import CONTROLS, control
from rhc.storage.files import altered, read_document

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

SCHEDULE_VERSION = 1


def total_variation(raw: Tensor) -> Tensor:
    """Sum of absolute steps of the raw schedule, Σ_t |u_{t+1} − u_t|, per control.

    Rudin, Osher, Fatemi 1992.

    Args:
        raw: (T, C), unconstrained: log for lr, noise and weight_decay, logit for momentum.

    Returns:
        (C,), ≥ 0; 0 exactly for a constant schedule.
    """
    return (raw[1:] - raw[:-1]).abs().sum(dim=0)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The controls of the steps [start, start + T): one natural value per control and step.

    Schedules are values: every change returns a new one.
    """

    values: Mapping[str, Tensor]
    """Control name -> (T,) float64, natural units; or (T, G), one value per parameter group too, in
    the optimizer's order of groups. noise has no groups."""
    start: int = 0
    seed: int = 0
    """Of the gradient noise."""

    def __post_init__(self) -> None:
        for name in ("start", "seed"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        values = {
            control(name).name: torch.as_tensor(v, dtype=torch.float64).detach().cpu().clone()
            for name, v in self.values.items()
        }
        _check_shapes({name: tuple(v.shape) for name, v in values.items()})
        for name, v in values.items():
            finite = v.float().isfinite()  # as a step takes it
            if not finite.all():
                at = (~finite).nonzero()[0].tolist()
                raise InputError(
                    f"schedule values must be finite, got {name}={float(v[tuple(at)])} at step "
                    f"{self.start + at[0]}"
                )
            if bool((v < 0).any()) or (name == "momentum" and bool((v >= 1).any())):
                raise InputError(
                    f"schedule values must be ≥ 0{', and < 1' if name == 'momentum' else ''}, got "
                    f"{name} from {float(v.min()):g} to {float(v.max()):g}"
                )
        object.__setattr__(self, "values", values)

    @classmethod
    def constant(
        cls, steps: int, seed: int = 0, /, **controls: float | Sequence[float]
    ) -> Schedule:
        """`steps` times the same controls: `Schedule.constant(100, lr=0.1, momentum=0.9)`.

        A sequence stands for one value per parameter group: `lr=(0.1, 0.01)`.
        """
        steps = whole_number("steps", steps)
        rows = {name: torch.as_tensor(v, dtype=torch.float64) for name, v in controls.items()}
        return cls({n: row.expand(steps, *row.shape) for n, row in rows.items()}, seed=seed)

    def __len__(self) -> int:
        return len(next(iter(self.values.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Schedule)
            and (self.start, self.seed) == (other.start, other.seed)
            and self.values.keys() == other.values.keys()
            and all(torch.equal(v, other.values[n]) for n, v in self.values.items())
        )

    __hash__ = None  # type: ignore[assignment]

    def __contains__(self, name: object) -> bool:
        return name in self.values

    @property
    def stop(self) -> int:
        """The first step after the last: steps are [start, stop)."""
        return self.start + len(self)

    @property
    def groups(self) -> int | None:
        """The number G of parameter groups that it has values for; None where it has none."""
        return next((v.shape[1] for v in self.values.values() if v.dim() == 2), None)

    def at(self, step: int) -> dict[str, Any]:
        """The controls of absolute step `step`; after the end the last ones are held.

        Returns:
            A number for every control, or a tuple of G where it has one per parameter group.

        Raises:
            InputError: `step` is before the schedule's start.
        """
        if step < self.start:
            raise InputError(f"step must be ≥ {self.start}, where this schedule starts, got {step}")
        index = min(step - self.start, len(self) - 1)
        return {name: column[index] for name, column in self._columns.items()}

    @functools.cached_property
    def _columns(self) -> dict[str, list[Any]]:
        """Every control as a list of numbers or tuples: a tensor takes 2 µs to give one of them."""
        return {
            name: v.tolist() if v.dim() == 1 else [tuple(row) for row in v.tolist()]
            for name, v in self.values.items()
        }

    def window(self, start: int, stop: int) -> Schedule:
        """The part of the absolute steps [start, stop), which must lie within the schedule."""
        start, stop = whole_number("start", start), whole_number("stop", stop)
        if not self.start <= start < stop <= self.stop:
            raise InputError(
                f"window [{start}, {stop}) must lie within the schedule's steps "
                f"[{self.start}, {self.stop})"
            )
        part = slice(start - self.start, stop - self.start)
        return self.of_checked(
            {n: v[part].clone() for n, v in self.values.items()}, start, self.seed
        )

    @classmethod
    def of_checked(cls, values: Mapping[str, Tensor], start: int, seed: int) -> Schedule:
        """A schedule of float64 values that come from one: they are not checked, nor copied.

        A schedule is made for every window, which checking would take ten times as long for.
        """
        schedule = object.__new__(cls)
        schedule.__dict__.update(values=values, start=start, seed=seed)
        return schedule

    def replaced(self, part: Schedule) -> Schedule:
        """This schedule with `part` in place of its steps and controls, which it must have."""
        self.window(part.start, part.stop)
        values = {name: v.clone() for name, v in self.values.items()}
        where = slice(part.start - self.start, part.stop - self.start)
        for name, v in part.values.items():
            if v.shape[1:] != values[name].shape[1:]:
                raise InputError(
                    f"{name} has shape {tuple(v.shape)} in the part, {tuple(values[name].shape)} "
                    "in the schedule; give both values per parameter group, or neither"
                )
            values[name][where] = v
        return Schedule(values, self.start, self.seed)

    def stretched(self, steps: int) -> Schedule:
        """The same shape over `steps` steps, by interpolation in the unconstrained coordinates.

        Step i of the new one lies where step (i + ½) T / steps − ½ of this one does; beyond the
        first and the last step those are held. Between a value and an exact 0, the nearer of them.
        """
        steps = whole_number("steps", steps)
        if steps < 1:
            raise InputError(f"steps must be ≥ 1, got {steps}")
        old = len(self)
        if steps == old:
            return self
        place = (torch.arange(steps, dtype=torch.float64) + 0.5) * old / steps - 0.5
        place = place.clamp(0, old - 1)
        low = place.floor().long()
        high = (low + 1).clamp(max=old - 1)
        values = {}
        for name, v in self.values.items():
            share = (place - low).reshape(-1, *[1] * (v.dim() - 1))
            before, after = v[low], v[high]
            if CONTROLS[name].coordinate == "log":
                between = before.log().lerp(after.log(), share).exp()
            else:
                between = before.logit().lerp(after.logit(), share).sigmoid()
            apart = (before != after) & (before > 0) & (after > 0)
            nearer = torch.where(share < 0.5, before, after)
            values[name] = torch.where(apart, between, nearer)
        return Schedule(values, self.start, self.seed)

    def rescaled(self, factor: float, name: str = "lr") -> Schedule:
        """This schedule with one control moved by log(factor) in its coordinate, within its bounds.

        Args:
            factor: on lr, noise and weight decay; on the odds μ/(1 − μ) of momentum. 0 stays 0.
            name: of the control.

        Raises:
            InputError: the schedule lacks the control, or factor is not > 0 and finite.
        """
        if name not in self.values:
            raise InputError(
                f"the schedule has no {name}; it has {', '.join(self.values)}, so rescale those"
            )
        if not 0 < factor < math.inf:
            raise InputError(f"factor must be > 0 and finite, got {factor:g}")
        if factor == 1:
            return self
        known, v = CONTROLS[name], self.values[name]
        moved = known.rescale(v, factor)
        assert isinstance(moved, Tensor)
        moved = torch.where(v > 0, moved.clamp(known.lower, known.upper), v)
        return Schedule({**self.values, name: moved}, self.start, self.seed)

    def digest(self) -> str:
        """Sixteen hexadecimal digits that tell schedules of other values apart."""
        content = hashlib.sha256()
        for name in sorted(self.values):
            v = self.values[name]
            content.update(f"{name} {tuple(v.shape)} ".encode() + v.contiguous().numpy().tobytes())
        return content.hexdigest()[:16]

    def means(self) -> dict[str, Any]:
        """The mean of every control over the steps: a number, or a list of one per group.

        Geometric where its coordinate is log and no value is 0.
        """

        def mean(name: str, v: Tensor) -> Any:
            if v.dim() == 2:
                return [mean(name, column) for column in v.T]
            geometric = CONTROLS[name].coordinate == "log" and bool((v > 0).all())
            return float(v.log().mean().exp() if geometric else v.mean())

        return {name: mean(name, v) for name, v in self.values.items()}

    def raw(self, names: Iterable[str] | None = None) -> Tensor:
        """(T, C) unconstrained coordinates of the controls in `names` (default: all, in order).

        A control with values per parameter group has G columns.
        """
        chosen = list(self.values) if names is None else list(names)
        columns = [CONTROLS[n].to_raw(self.values[n]) for n in chosen]
        return torch.cat([c.reshape(len(self), -1) for c in columns], dim=1)

    # Files ---------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """A JSON document; floats are written by repr, so that they come back bit for bit.

        `values` of a control are a list of T numbers, or of T lists of G numbers, one per
        parameter group.
        """
        return {
            "format": "rhc.schedule",
            "version": SCHEDULE_VERSION,
            "start": self.start,
            "steps": len(self),
            "seed": self.seed,
            "controls": {
                known.name: {
                    "coordinate": known.coordinate,
                    "lower": known.lower,
                    "upper": known.upper,
                    "values": self.values[known.name].tolist(),
                }
                for known in map(control, self.values)
            },
        }

    @classmethod
    def from_json(cls, document: Any, source: str = "schedule") -> Schedule:
        """The inverse of `to_json`; a document of another shape or version is an InputError."""
        with reading(source):
            if document["format"] != "rhc.schedule":
                raise KeyError("format")
            if document["version"] != SCHEDULE_VERSION:
                raise InputError(
                    f"{source} has schedule version {document['version']}, this rhc reads version "
                    f"{SCHEDULE_VERSION}; export it again with this version"
                )
            values = {n: _parsed(c["values"]) for n, c in document["controls"].items()}
            start, seed = int(document["start"]), int(document.get("seed", 0))
        try:
            return cls(values, start, seed)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Writes the schedule as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Reads what `save` wrote, or the schedule.json of a run.

        Where the run has not ended: what it has committed, by the tape beside, and what is planned.
        A file that was altered since it was written is taken, with a warning.

        Raises:
            InputError: the file cannot be read, or is no schedule.
        """
        try:
            document, changed = read_document(Path(path))
        except OSError as error:
            raise InputError(f"cannot read schedule {path}: {error.strerror}") from None
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON ({error})") from None
        if changed:
            warnings.warn(plain(altered(Path(path))), stacklevel=2)
        if isinstance(document, dict) and "plan" in document:
            from rhc.schedule.planned import of_unfinished_run

            return of_unfinished_run(document, Path(path))
        return cls.from_json(document, str(path))

    def to_lr_scheduler(
        self, optimizer: torch.optim.Optimizer, last_epoch: int = -1
    ) -> LRScheduler:
        """A torch.optim.lr_scheduler that replays this schedule in an ordinary loop.

        Call its `step()` after each `optimizer.step()`. It sets lr, momentum (β1) and weight
        decay of every parameter group, keeping the groups' ratios where the schedule has one value
        for all of them, and adds the gradient noise through a step hook, once per `step()`, until
        its `close()`. A group that is added to the optimizer later keeps the ratio that it then
        has.

        Raises:
            InputError: the schedule has values for another number of parameter groups.
        """
        from rhc.schedule.lr_scheduler import ScheduleReplay

        return ScheduleReplay(optimizer, self, last_epoch)


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Inside, whatever is wrong with a document is an InputError that names its source."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"{source} is not a schedule written by rhc ({type(error).__name__}: {error}); "
            "give the schedule.json of a run directory"
        ) from None


def _check_shapes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError unless all are (T,) or (T, G) with one T and one G, noise's (T,)."""
    if not shapes:
        raise InputError("a schedule needs at least one control; give it lr values")
    per_step = all(len(shape) in (1, 2) for shape in shapes.values())
    steps = {shape[:1] for shape in shapes.values()}
    groups = {shape[1:] for shape in shapes.values() if len(shape) == 2}
    if not per_step or len(steps) > 1 or len(groups) > 1:
        raise InputError(
            "a schedule needs one value per step for every control, or one per step and "
            f"parameter group, got shapes {shapes}"
        )
    if any(0 in shape for shape in shapes.values()):
        raise InputError("a schedule needs at least one step, got 0")
    if len(shapes.get("noise", ())) == 2:
        raise InputError(
            f"noise has no parameter groups, got values of shape {shapes['noise']}; give one "
            "per step"
        )


def _parsed(values: Any) -> Tensor:
    """(T,) or (T, G) from the JSON lists of `Schedule.to_json`; ValueError for ragged ones."""
    rows = [[float(x) for x in v] if isinstance(v, list) else float(v) for v in values]
    return torch.tensor(rows, dtype=torch.float64)

"""Schedules: the values of the controls at every step.

Natural values are stored in float64, not coordinates: 0 has the coordinate −∞, and an lr that is
not rewritten must keep its bits, but exp(log(0.1)) ≠ 0.1.
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

    Immutable: every change returns a new schedule.
    """

    values: Mapping[str, Tensor]
    """Control -> (T,) float64 in natural units, or (T, G) with a value per parameter group, in the
    optimizer's order. noise has no groups."""
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
            finite = v.float().isfinite()  # in the precision of a step
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
        """The same controls for `steps` steps: `Schedule.constant(100, lr=0.1, momentum=0.9)`.

        Args:
            steps: length of the schedule.
            seed: of the gradient noise.
            controls: a number, or one per parameter group: `lr=(0.1, 0.01)`.
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
        """The end of the steps [start, stop)."""
        return self.start + len(self)

    @property
    def groups(self) -> int | None:
        """The number G of parameter groups with values of their own; None without groups."""
        return next((v.shape[1] for v in self.values.values() if v.dim() == 2), None)

    def at(self, step: int) -> dict[str, Any]:
        """The controls at absolute step `step`; the last ones after the end.

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
        """Control -> numbers or tuples: reading one from a tensor takes 2 µs."""
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
        """A schedule of valid float64 values, unchecked and not copied: ten times faster."""
        schedule = object.__new__(cls)
        schedule.__dict__.update(values=values, start=start, seed=seed)
        return schedule

    def replaced(self, part: Schedule) -> Schedule:
        """This schedule with the steps and controls of `part`, which it must have, replaced."""
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
        """The same shape over `steps` steps, interpolated in the unconstrained coordinates.

        Step i lies at (i + ½) T / steps − ½ of this schedule, clipped to its ends. Between a value
        and an exact 0 it takes the nearer one.
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
        """Sixteen hexadecimal digits that identify the values."""
        content = hashlib.sha256()
        for name in sorted(self.values):
            v = self.values[name]
            content.update(f"{name} {tuple(v.shape)} ".encode() + v.contiguous().numpy().tobytes())
        return content.hexdigest()[:16]

    def means(self) -> dict[str, Any]:
        """The mean of every control over the steps, a number or one per group; geometric for a log
        coordinate without zeros."""

        def mean(name: str, v: Tensor) -> Any:
            if v.dim() == 2:
                return [mean(name, column) for column in v.T]
            geometric = CONTROLS[name].coordinate == "log" and bool((v > 0).all())
            return float(v.log().mean().exp() if geometric else v.mean())

        return {name: mean(name, v) for name, v in self.values.items()}

    def raw(self, names: Iterable[str] | None = None) -> Tensor:
        """(T, C) unconstrained coordinates of the controls in `names` (default: all, in order), G
        columns for a control with values per group."""
        chosen = list(self.values) if names is None else list(names)
        columns = [CONTROLS[n].to_raw(self.values[n]) for n in chosen]
        return torch.cat([c.reshape(len(self), -1) for c in columns], dim=1)

    # Files ---------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """A JSON document that keeps floats bit for bit; values are T numbers, or T lists of G."""
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
        """The inverse of `to_json`; InputError for another shape or version."""
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
        """Reads a file of `save`, or the schedule.json of a run, finished or not.

        An unfinished run gives its committed steps, from the tape beside it, and then its plan. An
        altered file is read with a warning.

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
        """A torch.optim.lr_scheduler of this schedule; call `step()` after `optimizer.step()`.

        It sets lr, momentum (β1) and weight decay. With one value for all parameter groups, groups
        keep their ratios, also those added later. Noise is added by a hook, once per `step()`,
        until `close()`.

        Args:
            optimizer: to be scheduled.
            last_epoch: as of torch's schedulers.

        Raises:
            InputError: the schedule has values for another number of parameter groups.
        """
        from rhc.schedule.lr_scheduler import ScheduleReplay

        return ScheduleReplay(optimizer, self, last_epoch)


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Turns errors of parsing into InputErrors that name `source`."""
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
    """Raises InputError unless all are (T,) or (T, G) with equal T and G; noise is (T,)."""
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
    """(T,) or (T, G) from JSON lists; ValueError for ragged ones."""
    rows = [[float(x) for x in v] if isinstance(v, list) else float(v) for v in values]
    return torch.tensor(rows, dtype=torch.float64)

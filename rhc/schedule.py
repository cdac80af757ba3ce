"""Controls and schedules: what is steered, within which bounds, and its value at every step.

A schedule holds natural values (an lr of 0.01 is stored as 0.01) in float64 and gives the
unconstrained coordinates, log or logit, on demand. Storing the coordinates themselves would lose
two things that must be exact: a value of 0, whose coordinate is −∞, and the bits of an lr that
nobody rewrote, since exp(log(0.1)) ≠ 0.1.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rhc.errors import InputError

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

SCHEDULE_VERSION = 1

Scalar = float | Tensor


@dataclass(frozen=True)
class Control:
    """One steered quantity: its unconstrained coordinate and its bounds in natural units.

    `zero` says whether exactly 0 is allowed beside [lower, upper]. 0 has no finite coordinate, so
    `to_raw(0)` is the coordinate of `lower`, and `from_raw` returns 0 at or below it: a law can
    leave 0 and can come back to it.
    """

    name: str
    coordinate: Literal["log", "logit"]
    lower: float
    upper: float
    zero: bool = False

    def to_raw(self, natural: Tensor) -> Tensor:
        """Unconstrained coordinate of `natural` (any shape), clipped to the bounds; float64."""
        clipped = natural.to(torch.float64).clamp(self.lower, self.upper)
        return clipped.log() if self.coordinate == "log" else clipped.logit()

    def from_raw(self, raw: Tensor) -> Tensor:
        """Natural value of `raw` (any shape), within the bounds (or exactly 0 if allowed)."""
        raw = raw.to(torch.float64)
        natural = raw.exp() if self.coordinate == "log" else raw.sigmoid()
        natural = natural.clamp(self.lower, self.upper)
        if self.zero:
            lowest = self.to_raw(torch.tensor(self.lower, dtype=torch.float64))
            natural = torch.where(raw <= lowest, torch.zeros_like(natural), natural)
        return natural

    def slope(self, natural: Tensor) -> Tensor:
        """d natural / d raw: the factor that turns dJ/d natural into dJ/d raw.

        α for a log coordinate, μ(1 − μ) for a logit; at 0 the slope of `lower`, see the class.
        """
        clipped = natural.to(torch.float64).clamp(self.lower, self.upper)
        return clipped if self.coordinate == "log" else clipped * (1 - clipped)

    def rescale(self, value: Scalar, ratio: float) -> Scalar:
        """`value` moved by log(ratio) in its unconstrained coordinate; ratio 1 returns it as it is.

        A factor for lr, noise and weight decay; a factor of the odds μ/(1 − μ) for momentum.
        """
        if ratio == 1.0:
            return value
        if self.coordinate == "log":
            return value * ratio
        return value * ratio / (1 - value + value * ratio)

    def ratio(self, value: float, reference: float) -> float:
        """The ratio for which `rescale(reference, ratio) == value`; 1 where both are equal."""
        if value == reference:
            return 1.0
        if self.coordinate == "log":
            return value / reference
        return value * (1 - reference) / (reference * (1 - value))

    def check(self, value: float, argument: str | None = None) -> None:
        """Raises InputError unless `value` is within the bounds (or 0 where that is allowed)."""
        if (self.zero and value == 0) or self.lower <= value <= self.upper:
            return
        zero = "0 or " if self.zero else ""
        raise InputError(
            f"{argument or self.name} must be {zero}in [{self.lower:g}, {self.upper:g}], "
            f"got {value:g}; choose a value within these bounds"
        )


CONTROLS: Mapping[str, Control] = {
    control.name: control
    for control in (
        Control("lr", "log", 1e-8, 10.0),
        Control("momentum", "logit", 0.01, 0.995, zero=True),
        Control("noise", "log", 1e-4, 1.0, zero=True),
        Control("weight_decay", "log", 1e-7, 1.0, zero=True),
    )
}


def control(name: str) -> Control:
    """The control called `name`; an unknown name is an InputError that says which exist."""
    if name in CONTROLS:
        return CONTROLS[name]
    near = difflib.get_close_matches(name, CONTROLS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"unknown control {name!r}: {hint}there are: {', '.join(CONTROLS)}")


def total_variation(raw: Tensor) -> Tensor:
    """Sum of absolute steps of the raw schedule, Σ_t |u_{t+1} − u_t|, per control.

    raw: (T, C), unconstrained: log for lr, noise and weight_decay, logit for momentum.
    Returns (C,), ≥ 0; 0 exactly for a constant schedule. Rudin, Osher, Fatemi 1992.
    """
    return (raw[1:] - raw[:-1]).abs().sum(dim=0)


@dataclass(frozen=True, eq=False)
class Schedule:
    """The controls of the steps [start, start + T): one natural value per control and step.

    values: control name -> (T,) float64, natural units. seed: of the noise, see `rhc.noise`.
    Schedules are values: every change returns a new one.
    """

    values: Mapping[str, Tensor]
    start: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        values = {
            control(name).name: torch.as_tensor(v, dtype=torch.float64).detach().cpu().clone()
            for name, v in self.values.items()
        }
        if not values:
            raise InputError("a schedule needs at least one control; give it lr values")
        lengths = {name: tuple(v.shape) for name, v in values.items()}
        if any(v.dim() != 1 for v in values.values()) or len(set(lengths.values())) != 1:
            raise InputError(
                f"a schedule needs one value per step for every control, got shapes {lengths}"
            )
        if (0,) in lengths.values():
            raise InputError("a schedule needs at least one step, got 0")
        for name, v in values.items():
            if not torch.isfinite(v).all():
                at = int((~torch.isfinite(v)).nonzero()[0])
                raise InputError(
                    f"schedule values must be finite, got {name}={float(v[at])} at step "
                    f"{self.start + at}"
                )
            if bool((v < 0).any()) or (name == "momentum" and bool((v >= 1).any())):
                raise InputError(
                    f"schedule values must be ≥ 0{', and < 1' if name == 'momentum' else ''}, got "
                    f"{name} from {float(v.min()):g} to {float(v.max()):g}"
                )
        object.__setattr__(self, "values", values)

    @classmethod
    def constant(cls, steps: int, seed: int = 0, /, **controls: float) -> Schedule:
        """`steps` times the same controls: `Schedule.constant(100, lr=0.1, momentum=0.9)`."""
        return cls(
            {name: torch.full((steps,), v, dtype=torch.float64) for name, v in controls.items()},
            seed=seed,
        )

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

    def at(self, step: int) -> dict[str, float]:
        """The controls of absolute step `step`; after the end the last ones are held."""
        if step < self.start:
            raise InputError(f"step must be ≥ {self.start}, where this schedule starts, got {step}")
        index = min(step, self.stop - 1) - self.start
        return {name: float(v[index]) for name, v in self.values.items()}

    def window(self, start: int, stop: int) -> Schedule:
        """The part of the absolute steps [start, stop), which must lie within the schedule."""
        if not self.start <= start < stop <= self.stop:
            raise InputError(
                f"window [{start}, {stop}) must lie within the schedule's steps "
                f"[{self.start}, {self.stop})"
            )
        part = slice(start - self.start, stop - self.start)
        return Schedule({n: v[part] for n, v in self.values.items()}, start, self.seed)

    def replaced(self, part: Schedule) -> Schedule:
        """This schedule with `part` in place of its steps and controls, which it must have."""
        self.window(part.start, part.stop)
        values = {name: v.clone() for name, v in self.values.items()}
        where = slice(part.start - self.start, part.stop - self.start)
        for name, v in part.values.items():
            values[name][where] = v
        return Schedule(values, self.start, self.seed)

    def means(self) -> dict[str, float]:
        """The mean of every control: geometric where its coordinate is log and no value is 0."""
        return {
            name: float(
                v.log().mean().exp()
                if CONTROLS[name].coordinate == "log" and bool((v > 0).all())
                else v.mean()
            )
            for name, v in self.values.items()
        }

    def raw(self, names: Iterable[str] | None = None) -> Tensor:
        """(T, C) unconstrained coordinates of the controls in `names` (default: all, in order)."""
        chosen = list(self.values) if names is None else list(names)
        return torch.stack([CONTROLS[n].to_raw(self.values[n]) for n in chosen], dim=1)

    # Files ---------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """A JSON document; floats are written by repr, so that they come back bit for bit."""
        return {
            "format": "rhc.schedule",
            "version": SCHEDULE_VERSION,
            "start": self.start,
            "steps": len(self),
            "seed": self.seed,
            "controls": {
                name: {
                    "coordinate": CONTROLS[name].coordinate,
                    "lower": CONTROLS[name].lower,
                    "upper": CONTROLS[name].upper,
                    "values": v.tolist(),
                }
                for name, v in self.values.items()
            },
        }

    @classmethod
    def from_json(cls, document: Any, source: str = "schedule") -> Schedule:
        """The inverse of `to_json`; a document of another shape or version is an InputError."""
        try:
            if document["format"] != "rhc.schedule":
                raise KeyError("format")
            version = document["version"]
            if version != SCHEDULE_VERSION:
                raise InputError(
                    f"{source} has schedule version {version}, this rhc reads version "
                    f"{SCHEDULE_VERSION}; export it again with this version"
                )
            controls = {n: [float(x) for x in c["values"]] for n, c in document["controls"].items()}
            start, seed = int(document["start"]), int(document.get("seed", 0))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{source} is not a schedule written by rhc ({type(error).__name__}: {error}); "
                "give the schedule.json of a run directory"
            ) from None
        values = {n: torch.tensor(v, dtype=torch.float64) for n, v in controls.items()}
        try:
            return cls(values, start, seed)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def save(self, path: str | Path) -> None:
        """Writes the schedule as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Schedule:
        """Reads what `save` wrote; errors name the file."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"cannot read schedule {path}: {error.strerror}") from None
        except ValueError as error:
            raise InputError(f"{path} is not valid JSON ({error})") from None
        return cls.from_json(document, str(path))

    def to_lr_scheduler(
        self, optimizer: torch.optim.Optimizer, last_epoch: int = -1
    ) -> LRScheduler:
        """A torch.optim.lr_scheduler that replays this schedule in an ordinary loop.

        Call its `step()` after each `optimizer.step()`. It sets lr, momentum (β1) and weight
        decay of every parameter group, keeping the groups' ratios, and adds the gradient noise
        through a step hook. It has `state_dict`, `load_state_dict` and `get_last_lr`.
        """
        from rhc._lr_scheduler import ScheduleReplay

        return ScheduleReplay(optimizer, self, last_epoch)


class OptimizerControls:
    """The controls of a torch.optim.Optimizer: reads them, writes them, keeps groups' ratios.

    A schedule has one value per control; it is the value of the *reference* group, the first
    whose value is not 0, and every other group follows at the ratio it had when this object was
    made (in the unconstrained coordinate: a factor for lr and weight decay, of the odds for
    momentum). A group at 0 stays at 0: biases without weight decay keep being without.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        groups = optimizer.param_groups
        self.available = tuple(
            name for name in CONTROLS if name == "noise" or _read(groups[0], name) is not None
        )
        self.adopt({n: [float(_read(g, n) or 0.0) for g in groups] for n in self.available})

    def adopt(self, own: Mapping[str, list[float]]) -> None:
        """Takes `own`, control -> the value of every group, as where the ratios come from."""
        self.own = dict(own)
        self.initial: dict[str, float] = {}
        self.ratios: dict[str, list[float]] = {}
        for name, values in own.items():
            reference = next((v for v in values if v != 0), 0.0)
            self.initial[name] = reference
            self.ratios[name] = [
                1.0 if reference == 0 else CONTROLS[name].ratio(v, reference) for v in values
            ]

    def group_value(self, name: str, group: int, value: Scalar) -> Scalar:
        """What parameter group number `group` gets when the schedule says `value`."""
        if not isinstance(value, Tensor) and value == self.initial[name]:
            return self.own[name][group]  # to the bit, which a ratio does not give back
        return CONTROLS[name].rescale(value, self.ratios[name][group])

    def write(self, values: Mapping[str, float]) -> None:
        """Sets every control but noise in every parameter group."""
        for index, group in enumerate(self.optimizer.param_groups):
            for name, value in values.items():
                if name != "noise":
                    _write(group, name, self.group_value(name, index, value))


def _read(group: Mapping[str, Any], name: str) -> float | None:
    if name == "momentum" and "betas" in group:
        return float(group["betas"][0])
    return None if name not in group else float(group[name])


def _write(group: dict[str, Any], name: str, value: Scalar) -> None:
    if name == "momentum" and "betas" in group:
        group["betas"] = (value, *group["betas"][1:])
    elif isinstance(group[name], Tensor):
        group[name].fill_(value)
    else:
        group[name] = value


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters of the optimizer in the order of its groups: the order of the noise."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def cooldown(steps: int, fraction: float) -> Tensor:
    """(steps,) factors: 1, then linear towards 0 over the last `fraction` of the steps.

    The last factor is 1/(n + 1) of n cooling steps, not 0, so that the last step still counts.
    """
    n = math.floor(steps * fraction)
    factors = torch.ones(steps, dtype=torch.float64)
    if n:
        factors[steps - n :] = torch.arange(n, 0, -1, dtype=torch.float64) / (n + 1)
    return factors

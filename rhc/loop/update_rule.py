"""The update rule: from a hypergradient to a proposed schedule, which a replay judges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rhc.errors import InputError, plain_numbers, whole_number
from rhc.schedule import CONTROLS, Schedule, Template, total_variation
from rhc.schedule.planned import PlannedSchedule
from rhc.training.objective import Objective

WARMUP = 0.1
"""Share of the run in which lr rises, for optimizers that divide by a second moment: without it a
small language model ends 0.14 nats higher. With plain SGD it gains nothing (docs/log.md)."""

LEAVES_ZERO = 0.5
"""A control at 0 stays there unless the rule wants this share of its largest move."""

Shift = float | tuple[float, ...]
"""Move of a control in raw coordinates; one number, or one per group."""


@dataclass(frozen=True)
class Proposal:
    """A rewritten window. carry: shift of later steps. predicted: first-order change of J."""

    schedule: Schedule
    carry: dict[str, Shift]
    predicted: float


@dataclass(frozen=True)
class Rewrite:
    """The update rule: a normalised step, per control and knot, in unconstrained coordinates.

    Δ_k = −step · g_k / (|g_k| + damping / n), g_k = Σ_t B_tk dJ/du_t / |J|, B the n hat functions
    of the knots: log J falls by about |g_k| per unit. One knot moves the whole window alike.
    Parameter groups move separately; a group at 0 stays there, and none reaches 0.

    Args:
        step: control -> largest move per rewrite (nats for log controls, logits for momentum).
        damping: relative gain below which a step shrinks.
        knots: number of hat functions.
        total_variation: weight of Σ|u_{t+1} − u_t| in the objective.
        retries: how often a rejected proposal is tried again, `shrink` times as far.
        shrink: factor on the step for each retry.
        accept: whether a proposal must lower the objective to be kept.
        cooldown: fraction of the run over which lr falls linearly to 0 at the end.
        until: fraction of the run after which windows are rewritten only after a shift of the data.
        iterations: rewrites of one window at most, one on top of the other.
        worth: relative fall of J below which a rewrite was not worth it.
        grow: how many times as far each further rewrite of a window may go.
        farthest: how many times as far any may go.
        carry: share of a correction that is left after each window; 1 to keep it for good.
        patience: windows in a row that were not worth rewriting before windows are skipped, twice
            as many each time; None to skip none.
        surprise: standard errors by which a window's losses must rise to be a shift of the data,
            after which windows are rewritten again; None for no such test.
        restart: factors of the template's highest lr at which it is tried from the step of a shift
            on, without corrections. The best is taken unless it is worse than the plan by the share
            `worth`: the window is short, and the lr is for what follows.
        most: nats by which a rewritten lr may exceed the template's highest lr; in warm-up, the
            template itself.
        budget: plain runs that the whole run may cost, with the lr search; beyond it windows are
            rolled plainly. Windows that diverge, and `validate_every`, come on top.
        lower_lr: factor on lr when a window diverges.
        rewinds: how often in a row lr is lowered, at most.

    Raises:
        InputError: for values that cannot be used.
    """

    step: Mapping[str, float] = field(
        default_factory=lambda: {"lr": 0.7, "momentum": 0.1, "noise": 0.3, "weight_decay": 0.3}
    )
    damping: float = 0.05
    knots: int = 1
    total_variation: float = 0.0
    retries: int = 1
    shrink: float = 0.3
    accept: bool = True
    cooldown: float = 0.2
    until: float = 1.0
    iterations: int = 1
    worth: float = 0.05
    grow: float = 2.0
    farthest: float = 8.0
    carry: float = 1.0
    patience: int | None = None
    surprise: float | None = None
    restart: tuple[float, ...] = ()
    most: float = math.inf
    budget: float = math.inf
    lower_lr: float = 0.3
    rewinds: int = 10

    def __post_init__(self) -> None:
        plain_numbers(self)
        for name in ("knots", "retries", "iterations", "patience", "rewinds"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, whole_number(name, value))
        if self.knots < 1:
            raise InputError(f"knots must be ≥ 1, got {self.knots}")
        if self.damping <= 0:
            raise InputError(f"damping must be > 0, got {self.damping:g}")
        if not 0 <= self.cooldown < 1:
            raise InputError(f"cooldown must be in [0, 1), got {self.cooldown:g}; use 0 for none")
        if not 0 < self.until <= 1:
            raise InputError(f"until must be in (0, 1], got {self.until:g}; use 1 for all windows")
        if self.iterations < 1:
            raise InputError(f"iterations must be ≥ 1, got {self.iterations}")
        if not 0 <= self.carry <= 1:
            raise InputError(f"carry must be in [0, 1], got {self.carry:g}")
        if any(factor <= 0 for factor in self.restart):
            raise InputError(f"restart must be of factors > 0, got {self.restart}; () for none")
        if self.most < 0:
            raise InputError(f"most must be ≥ 0, got {self.most:g}")
        if not self.budget >= 1:
            raise InputError(f"budget must be ≥ 1 plain run, got {self.budget:g}; use inf for none")
        if not 0 < self.lower_lr < 1:
            raise InputError(f"lower_lr must be in (0, 1), got {self.lower_lr:g}")

    def penalty(self, schedule: Schedule, controls: Sequence[str]) -> float:
        """The total-variation term of J for a window's schedule."""
        if not self.total_variation or not controls:
            return 0.0
        return self.total_variation * float(total_variation(schedule.raw(controls)).sum())

    def propose(
        self, schedule: Schedule, gradient: Mapping[str, Tensor], value: float, scale: float = 1.0
    ) -> Proposal:
        """A rewritten window.

        Args:
            schedule: the window as rolled, K steps.
            gradient: control -> dJ/du in natural units, (K,) or (K, G), without the penalty's.
            value: J.
            scale: factor on all steps.

        Returns:
            The proposal. Controls without a gradient do not move, nor do those at 0 for less than
            `LEAVES_ZERO`.
        """
        basis = hat_functions(len(schedule), self.knots)
        values: dict[str, Tensor] = {}
        carry: dict[str, Shift] = {}
        predicted = 0.0
        for name, natural in gradient.items():
            old, grouped = schedule[name], schedule[name].dim() == 2
            moved = [
                self._moved(name, before, slope, value, basis, scale, of_group=grouped)
                for before, slope in zip(_columns(old), _columns(natural), strict=True)
            ]
            news, shifts, changes = zip(*moved, strict=True)
            values[name] = torch.stack(news, dim=1) if grouped else news[0]
            carry[name] = shifts if grouped else shifts[0]
            predicted += sum(changes)
        new = Schedule({**schedule.values, **values}, schedule.start, schedule.seed)
        return Proposal(new, carry, predicted)

    def bounded(self, new: Schedule, old: Schedule, highest: Tensor) -> Schedule:
        """`new` with lr at most `most` nats above `highest`, unless it was higher in `old`."""
        if "lr" not in new or not math.isfinite(self.most):
            return new
        ceiling = (highest * math.exp(self.most)).expand(new["lr"].shape)
        lr = new["lr"].minimum(old["lr"].maximum(ceiling))
        return Schedule({**new.values, "lr": lr}, new.start, new.seed)

    def _moved(
        self,
        name: str,
        old: Tensor,
        natural: Tensor,
        value: float,
        basis: Tensor,
        scale: float,
        *,
        of_group: bool,
    ) -> tuple[Tensor, float, float]:
        """(new values (K,), shift to carry on, predicted change of J) of one control or group."""
        control = CONTROLS[name]
        raw = control.to_raw(old)
        slope = natural * control.slope(old) + self._penalty_gradient(raw)
        slope = slope.clamp(-1e100, 1e100)  # sums of them stay finite
        knots = basis.T @ slope / max(abs(value), 1e-12)
        direction = knots / (knots.abs() + self.damping / self.knots)
        move = -self.step.get(name, 0.0) * scale * direction
        shift = basis @ move
        new = control.from_raw(raw + shift)
        # What does not move keeps its bits, and 0 is left only by a large move.
        if of_group:
            held = (shift == 0) | (old == 0)
            new = new.clamp(min=control.lower)  # 0 could not be left again
        else:
            least = LEAVES_ZERO * scale * self.step.get(name, 0.0)
            held = (shift == 0) | ((old == 0) & (shift < least))
        if bool(held.all()):
            return old, 0.0, 0.0
        carry = float(move[-1]) if self.knots == 1 else float(shift.mean())
        return torch.where(held, old, new), carry, float(slope @ shift)

    def _penalty_gradient(self, raw: Tensor) -> Tensor:
        """A subgradient of total_variation · Σ|u_{t+1} − u_t|, 0 where the schedule is flat."""
        if not self.total_variation:
            return torch.zeros_like(raw)
        signs = (raw[1:] - raw[:-1]).sign() * self.total_variation
        zero = torch.zeros(1, dtype=raw.dtype)
        return torch.cat([zero, signs]) - torch.cat([signs, zero])


@dataclass(frozen=True)
class Twin(Rewrite):
    """Antithetic search: every window is replayed at lr e^δ and lr e^−δ, the better is kept.

    δ grows by half where the direction repeats and halves where it turns, within [0.02, 1.2].
    Nothing is differentiated; lr moves alike for all steps and groups.

    Args:
        first: δ of the first window.
    """

    first: float = 0.3

    def next_delta(self, delta: float, *, repeats: bool) -> float:
        return min(max(delta * (1.5 if repeats else 0.5), 0.02), 1.2)

    def twins(self, schedule: Schedule, delta: float) -> list[Proposal]:
        return [
            Proposal(carried(schedule, schedule.start, {"lr": d}), {"lr": d}, math.nan)
            for d in (delta, -delta)
        ]


USUAL = Rewrite(
    step={"lr": 0.3, "momentum": 0.1, "noise": 0.3, "weight_decay": 0.3},
    until=0.1,
    iterations=4,
    carry=0.5,
    patience=1,
    surprise=8.0,
    restart=(1.0, 0.5, 0.25),
    most=0.4,
    budget=5.0,
)
"""The default rule with an lr search: corrections are small and fade, and windows are rewritten
while that is worth it, at the beginning and after a shift (docs/outcome.md)."""


def usual_law(start: str) -> Rewrite:
    """The default rule: `USUAL`, or, with a given lr, far steps to the end."""
    return Rewrite() if start == "given" else USUAL


def usual_template(start: str, adaptive: bool, rewriting: bool) -> Template:
    """The default shape of lr."""
    if start != "given":
        return "linear" if adaptive else "cosine"
    return "wsd" if rewriting else "constant"


def usual_warmup(start: str, adaptive: bool) -> float:
    """The default share of the run in which lr rises."""
    return WARMUP if adaptive and start != "given" else 0.0


def usual_objective(start: str, window: int, *, weighed: bool = False) -> Objective:
    """The default objective: a held-out loss at the window's averaged end; after an lr search also
    its mean training loss, without which lr rises to what only the average bears. Weights of data
    are not judged by the rows that they weigh, of which they would choose the easy ones."""
    return Objective() if start == "given" or weighed else Objective(loss_weight=1 / window)


def _columns(values: Tensor) -> Sequence[Tensor]:
    return values.unbind(1) if values.dim() == 2 else [values]


def faded(
    correction: Mapping[str, Shift], shifts: Mapping[str, Shift], left: float
) -> tuple[dict[str, Shift], dict[str, Shift]]:
    """(correction after a window, shift of the plan), in raw coordinates; a share `left` stays."""
    after: dict[str, Shift] = {}
    change: dict[str, Shift] = {}
    for name in {**correction, **shifts}:
        old = torch.as_tensor(correction.get(name, 0.0), dtype=torch.float64)
        new = left * (old + torch.as_tensor(shifts.get(name, 0.0), dtype=torch.float64))
        after[name] = _plain(new)
        change[name] = shifts.get(name, 0.0) if left == 1 else _plain(new - old)
    return after, change


def added(first: Mapping[str, Shift], second: Mapping[str, Shift]) -> dict[str, Shift]:
    return faded(first, second, 1.0)[0]


def _plain(value: Tensor) -> Shift:
    return float(value) if value.dim() == 0 else tuple(value.tolist())


def hat_functions(steps: int, knots: int) -> Tensor:
    """(K, n) piecewise-linear basis on equally spaced knots; rows sum to 1. n ≤ K."""
    n = min(knots, steps)
    if n == 1:
        return torch.ones(steps, 1, dtype=torch.float64)
    place = torch.linspace(0, n - 1, steps, dtype=torch.float64)
    return (1 - (place[:, None] - torch.arange(n, dtype=torch.float64)).abs()).clamp(min=0)


def replanned(plan: PlannedSchedule, start: int, shifts: Mapping[str, Shift]) -> PlannedSchedule:
    """The plan with its steps from `start` on shifted in raw coordinates."""
    if not any(bool(torch.as_tensor(shift).any()) for shift in shifts.values()):
        return plan
    return plan.changed(start, lambda values: carried(values, values.start, shifts))


def carried(schedule: Schedule, start: int, shifts: Mapping[str, Shift]) -> Schedule:
    """The schedule shifted from `start` on, in raw coordinates; groups at 0 stay there."""
    values = {name: v.clone() for name, v in schedule.values.items()}
    where = slice(start - schedule.start, None)
    for name, shift in shifts.items():
        by = torch.as_tensor(shift, dtype=torch.float64)
        if bool((by == 0).all()):
            continue
        control, old = CONTROLS[name], values[name][where]
        new = control.from_raw(control.to_raw(old) + by)
        if old.dim() == 2:
            new = new.clamp(min=control.lower)
            new = torch.where((old == 0) | (by == 0), old, new)
        values[name][where] = new
    return Schedule(values, schedule.start, schedule.seed)

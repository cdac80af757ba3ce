"""From a hypergradient to a new schedule: how far to go, and along which shapes.

The law only proposes. Whether a proposal is kept is decided by replaying the window with it on the
same batches, noise and objective data (common random numbers): `rhc.loop.rewriting`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from rhc.errors import InputError, plain_numbers, whole_number
from rhc.loop.lr_search import WARMUP
from rhc.schedule import CONTROLS, Schedule, Template, total_variation
from rhc.schedule.planned import PlannedSchedule
from rhc.training.objective import Objective

LEAVES_ZERO = 0.5
"""A control at exactly 0 stays there unless the law wants this share of its largest move."""


Shift = float | tuple[float, ...]

RULES = ("normalised", "standard-error", "batch-error", "sign", "adam")

History = dict[str, list[list[float]]]
"""What windows asked for so far, oldest first: control, or "control/group", -> g of every knot."""

REMEMBERED = 8
"""Windows that a rule looks back on."""


@dataclass(frozen=True)
class Proposal:
    """schedule: the window's, rewritten. carry: control -> shift in raw coordinates for the steps
    after the window, one per parameter group where the control has values per group. predicted:
    first-order change of J. asked: g of every knot, for the history."""

    schedule: Schedule
    carry: dict[str, Shift]
    predicted: float
    asked: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rewrite:
    """A normalised step with shrinkage, per control and knot, in unconstrained coordinates.

    Δ_k = −step · g_k / (|g_k| + damping / n), g_k = Σ_t B_tk dJ/du_t / |J| with B the n hat
    functions of the knots: log J falls by about |g_k| per unit, so damping is the relative gain
    below which the step shrinks. One knot moves the whole window alike. A control with values per
    parameter group is as many controls, each moved by its own gradient; of those, one at 0 stays
    there, and none comes down to it.

    rule: what takes the place of g / (|g| + damping / n), from this window's g and those of the
    last `REMEMBERED` windows: "standard-error": g / (|g| + s), s the standard deviation of g from
    window to window; "batch-error": the same with s the standard error of g over the batches of the
    objective, each batch's part of it at H = 0, so that it takes no further adjoint (with a single
    batch s = |g|); "sign": the sign of g, 1.3 times as far each time it repeats and half as far
    each time it turns (Rprop, Riedmiller & Braun 1993); "adam": m̂ / (√v̂ + damping / n) over the
    windows, β = 0.9, 0.99 (Kingma & Ba 2015). "normalised" looks at no other window.
    step: control -> largest move per rewrite (nats for log controls, logits for momentum).
    total_variation: weight of Σ|u_{t+1} − u_t| in the objective (see `penalty`).
    retries: how often a rejected proposal is tried again, `shrink` times as far. accept: whether a
    proposal must lower the objective to be kept; False for the ablation that keeps every one.
    cooldown: fraction of the run over which lr falls linearly to 0 at the end.
    until: fraction of the run after which windows are looked back at only after a surprise.
    iterations: rewrites of one window, one on top of the other, while each lowers J by the share
    `worth`; every further one may go `grow` times as far, up to `farthest` times the step.
    carry: share of a correction that is left after each window; 1 to keep it for good.
    patience: looks in a row that are not worth it before windows are passed over, twice as many
    each time; None to look back at all of them.
    surprise: a window whose losses rise by this many standard errors above those of the window
    before is looked back at in any case, and ends the passing over; None for no such test.
    restart: after a surprise, the template is also tried begun anew at its step, at these factors
    of its highest lr, without corrections. The best of them is taken unless it is worse than the
    window as planned by the share `worth`: the window is short, and the lr is for what follows.
    most: how far above the highest lr of the template a rewritten one may be, in nats; while the
    template rises, above the template.
    budget: plain runs that the whole run may cost, the search for a start included: what would
    exceed it is not looked back at, replayed or begun anew, but rolled plainly. Windows that
    diverge, and what `validate_every` takes, come on top.
    lower_lr: factor on lr when a window diverges; `rewinds`: how often in a row at most.
    """

    step: Mapping[str, float] = field(
        default_factory=lambda: {"lr": 0.7, "momentum": 0.1, "noise": 0.3, "weight_decay": 0.3}
    )
    rule: str = "normalised"
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
        if self.rule not in RULES:
            raise InputError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
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
        self,
        schedule: Schedule,
        gradient: Mapping[str, Tensor],
        value: float,
        scale: float = 1.0,
        history: Mapping[str, Sequence[Sequence[float]]] | None = None,
        samples: Mapping[str, Tensor] | None = None,
    ) -> Proposal:
        """A rewritten window.

        schedule: the window as rolled, K steps. gradient: control -> dJ/du in natural units, of
        the shape of the schedule's values, (K,) or (K, G), without the penalty's. value: J. scale:
        of all steps, for a retry. history: what the windows before asked for. samples: the gradient
        by each batch of the objective, (n, K) or (n, K, G), for "batch-error". Controls whose
        gradient is 0 everywhere do not move by the usual rule, nor do those at exactly 0 for less
        than `LEAVES_ZERO`.
        """
        basis = hat_functions(len(schedule), self.knots)
        size = max(abs(value), 1e-12)
        values: dict[str, Tensor] = {}
        carry: dict[str, Shift] = {}
        asked: dict[str, list[float]] = {}
        predicted = 0.0

        def moved(
            name: str,
            key: str,
            old: Tensor,
            natural: Tensor,
            sampled: Sequence[Tensor] = (),
            *,
            of_group: bool = False,
        ) -> tuple[Tensor, float, float]:
            raw, of_raw = self._in_raw(name, old, natural)
            knots = basis.T @ of_raw / size
            asked[key] = knots.tolist()
            seen = [basis.T @ self._in_raw(name, old, s)[1] / size for s in sampled]
            direction = self._direction(knots, (history or {}).get(key, ()), seen)
            move = -self.step.get(name, 0.0) * scale * direction
            return self._moved(name, old, raw, of_raw, basis, move, scale, of_group=of_group)

        for name, natural in gradient.items():
            old = schedule[name]
            sampled = list((samples or {}).get(name, ()))
            if old.dim() == 1:
                values[name], carry[name], change = moved(name, name, old, natural, sampled)
                predicted += change
                continue
            groups = [
                moved(
                    name,
                    f"{name}/{g}",
                    old[:, g],
                    natural[:, g],
                    [s[:, g] for s in sampled],
                    of_group=True,
                )
                for g in range(old.shape[1])
            ]
            values[name] = torch.stack([new for new, _, _ in groups], dim=1)
            carry[name] = tuple(shift for _, shift, _ in groups)
            predicted += sum(change for _, _, change in groups)
        new = Schedule({**schedule.values, **values}, schedule.start, schedule.seed)
        return Proposal(new, carry, predicted, asked)

    def _direction(
        self, knots: Tensor, past: Sequence[Sequence[float]], sampled: Sequence[Tensor] = ()
    ) -> Tensor:
        """What a step of size 1 goes against, (n,).

        past: of earlier windows, (n,) each; of others nothing is known. sampled: of this window, by
        each batch of the objective, (n,).
        """
        least = self.damping / self.knots
        if self.rule == "normalised":
            return knots / (knots.abs() + least)
        if self.rule == "batch-error":
            error = knots.abs()
            if len(sampled) > 1:
                error = torch.stack(list(sampled)).std(0) / math.sqrt(len(sampled))
            return knots / (knots.abs() + error).clamp(min=1e-300)
        same = [torch.tensor(p, dtype=torch.float64) for p in past if len(p) == len(knots)]
        seen = torch.stack([*same[-REMEMBERED:], knots])
        if self.rule == "standard-error":
            # Two values say little of their spread; one alone is as uncertain as it is large.
            spread = seen.std(0) if len(seen) > 2 else knots.abs()
            return knots / (knots.abs() + spread).clamp(min=1e-300)
        if self.rule == "sign":
            reach = torch.ones_like(knots)
            for before, after in pairwise(seen.sign()):
                reach = torch.where(before * after < 0, 0.5 * reach, reach)
                reach = torch.where(before * after > 0, 1.3 * reach, reach).clamp(1 / 16, 4.0)
            return knots.sign() * reach
        first, second = torch.zeros_like(knots), torch.zeros_like(knots)
        for g in seen:
            first, second = 0.9 * first + 0.1 * g, 0.99 * second + 0.01 * g * g
        first, second = first / (1 - 0.9 ** len(seen)), second / (1 - 0.99 ** len(seen))
        return first / (second.sqrt() + least)

    def bounded(self, new: Schedule, old: Schedule, highest: Tensor) -> Schedule:
        """`new` with no lr above `most`, unless it was above it in `old`.

        highest: what `most` is counted from, of the shape of the lrs or one for all steps.
        """
        if "lr" not in new or not math.isfinite(self.most):
            return new
        ceiling = (highest * math.exp(self.most)).expand(new["lr"].shape)
        lr = new["lr"].minimum(old["lr"].maximum(ceiling))
        return Schedule({**new.values, "lr": lr}, new.start, new.seed)

    def _in_raw(self, name: str, old: Tensor, natural: Tensor) -> tuple[Tensor, Tensor]:
        """Values and gradient in unconstrained coordinates, (K,) each, with the penalty's."""
        control = CONTROLS[name]
        raw = control.to_raw(old)
        of_raw = natural * control.slope(old) + self._penalty_gradient(raw)
        return raw, of_raw.clamp(-1e100, 1e100)  # sums of them stay finite

    def _moved(
        self,
        name: str,
        old: Tensor,
        raw: Tensor,
        of_raw: Tensor,
        basis: Tensor,
        move: Tensor,
        scale: float,
        *,
        of_group: bool = False,
    ) -> tuple[Tensor, float, float]:
        """(new values (K,), shift to carry on, predicted change of J) of one control or group."""
        control = CONTROLS[name]
        shift = basis @ move
        new = control.from_raw(raw + shift)
        # What does not move keeps its bits, and 0 is left for a good reason only.
        if of_group:
            held = (shift == 0) | (old == 0)
            new = new.clamp(min=control.lower)  # 0 would be for ever
        else:
            least = LEAVES_ZERO * scale * self.step.get(name, 0.0)
            held = (shift == 0) | ((old == 0) & (shift < least))
        if bool(held.all()):
            return old, 0.0, 0.0
        carry = float(move[-1]) if self.knots == 1 else float(shift.mean())
        return torch.where(held, old, new), carry, float(of_raw @ shift)

    def _penalty_gradient(self, raw: Tensor) -> Tensor:
        """A subgradient of total_variation · Σ|u_{t+1} − u_t|, 0 where the schedule is flat."""
        if not self.total_variation:
            return torch.zeros_like(raw)
        signs = (raw[1:] - raw[:-1]).sign() * self.total_variation
        zero = torch.zeros(1, dtype=raw.dtype)
        return torch.cat([zero, signs]) - torch.cat([signs, zero])


@dataclass(frozen=True)
class Twin(Rewrite):
    """Without gradients: every window is replayed at lr e^δ and lr e^−δ, and the better is kept.

    δ begins at `first`, grows by half where the direction repeats and halves where it turns, within
    [0.02, 1.2]. Nothing is differentiated; one lr is steered, of all steps and groups alike.
    """

    first: float = 0.3

    def next_delta(self, delta: float, *, repeats: bool) -> float:
        """δ of the next window."""
        return min(max(delta * (1.5 if repeats else 0.5), 0.02), 1.2)

    def twins(self, schedule: Schedule, delta: float) -> list[Proposal]:
        """The window's schedule at a higher and at a lower lr."""
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
"""The law where the start was looked for. Corrections are small and fade; windows are looked back
at while that is worth it, at the beginning and after a surprise: docs/outcome.md."""


def usual_law(start: str) -> Rewrite:
    """The law where none is given: `USUAL`, or far steps to the end where lr was given."""
    return Rewrite() if start == "given" else USUAL


def usual_template(start: str, adaptive: bool, rewriting: bool) -> Template:
    """The shape of lr where none is given. adaptive: whether the optimizer is an Adam."""
    if start != "given":
        return "linear" if adaptive else "cosine"
    return "wsd" if rewriting else "constant"


def usual_warmup(start: str, adaptive: bool) -> float:
    """The fraction of the run over which lr rises, where none is given."""
    return WARMUP if adaptive and start != "given" else 0.0


def usual_objective(start: str, window: int) -> Objective:
    """What windows are judged by where nothing is said: a held-out loss at their averaged end.

    Where the start was looked for, also the mean of their training losses, without which lrs rise
    that only the average bears.
    """
    return Objective() if start == "given" else Objective(loss_weight=1 / window)


def faded(
    correction: Mapping[str, Shift], shifts: Mapping[str, Shift], left: float
) -> tuple[dict[str, Shift], dict[str, Shift]]:
    """(the correction after a window, by how much the plan moves for it).

    correction: control -> what the plan is moved by so far, in raw coordinates. shifts: what this
    window's rewrites add. left: the share of both that stays.
    """
    after: dict[str, Shift] = {}
    change: dict[str, Shift] = {}
    for name in {**correction, **shifts}:
        old = torch.as_tensor(correction.get(name, 0.0), dtype=torch.float64)
        new = left * (old + torch.as_tensor(shifts.get(name, 0.0), dtype=torch.float64))
        after[name] = _plain(new)
        change[name] = shifts.get(name, 0.0) if left == 1 else _plain(new - old)
    return after, change


def added(first: Mapping[str, Shift], second: Mapping[str, Shift]) -> dict[str, Shift]:
    """The sum of the shifts of every control."""
    return faded(first, second, 1.0)[0]


def remembered(history: History, asked: Mapping[str, Sequence[float]]) -> History:
    """The history with one more window, of which the last `REMEMBERED` are kept."""
    grown = {name: list(past) for name, past in history.items()}
    for name, knots in asked.items():
        grown[name] = [*grown.get(name, []), list(knots)][-REMEMBERED:]
    return grown


def _plain(value: Tensor) -> Shift:
    return float(value) if value.dim() == 0 else tuple(value.tolist())


FEWEST = 20


def surprised(before: Sequence[float], losses: Sequence[float], errors: float) -> int | None:
    """The first of `losses` at which they have risen above what they were before; None for none.

    They have where the mean of some block of a tenth of their number, five at least, lies `errors`
    of its standard errors and a tenth above the mean of `before`, and all but a fifth of the block
    a standard deviation: one outlier is no shift. The spread is that of `before`.
    Multiplying all losses by a number changes nothing. Fewer than `FEWEST` losses before say too
    little of their spread.
    """
    if len(before) < FEWEST or not losses:
        return None
    block = min(max(5, len(losses) // 10), len(losses))
    level = sum(before) / len(before)
    spread = math.sqrt(sum((x - level) ** 2 for x in before) / (len(before) - 1))
    bar = max(level + errors * spread / math.sqrt(block), level + 0.1 * abs(level))

    def risen(part: Sequence[float]) -> bool:
        return sum(part) / block > bar and sorted(part)[block // 5] > level + spread

    places = range(len(losses) - block + 1)
    high = next((i for i in places if risen(losses[i : i + block])), None)
    if high is None:
        return None
    # The block that is first above the bar may have begun before the rise.
    return next((i for i in range(high, high + block) if losses[i] > bar), high)


def hat_functions(steps: int, knots: int) -> Tensor:
    """(K, n) piecewise-linear basis on equally spaced knots; rows sum to 1. n is at most K."""
    n = min(knots, steps)
    if n == 1:
        return torch.ones(steps, 1, dtype=torch.float64)
    place = torch.linspace(0, n - 1, steps, dtype=torch.float64)
    return (1 - (place[:, None] - torch.arange(n, dtype=torch.float64)).abs()).clamp(min=0)


def replanned(plan: PlannedSchedule, start: int, shifts: Mapping[str, Shift]) -> PlannedSchedule:
    """The plan of the steps from `start` on shifted in raw coordinates; the same where nothing is.

    shifts: as of `carried`.
    """
    if not any(bool(torch.as_tensor(shift).any()) for shift in shifts.values()):
        return plan
    return plan.changed(start, lambda values: carried(values, values.start, shifts))


def carried(schedule: Schedule, start: int, shifts: Mapping[str, Shift]) -> Schedule:
    """The schedule with its steps from `start` on shifted in raw coordinates.

    shifts: control -> one number, or one per parameter group. Of a control with values per group,
    a group at 0 stays there.
    """
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

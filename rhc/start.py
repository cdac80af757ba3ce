"""Where a schedule starts: an lr for every parameter group, found before the first step.

`zero` needs no lr at all: the hypergradient at α = 0 says how fast the objective falls per unit of
every group's lr, and so in which ratio the groups want theirs. `probe` finds the common scale by
short rolls from the initial state, which the Runner takes and judges; of several groups with one lr
it takes the ratio from the hypergradient too. Numbers: docs/log.md.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from rhc.batches import StepBatches
from rhc.hypergradient import Lookback, Terminal
from rhc.objective import Average, Objective
from rhc.planned_schedule import PlannedSchedule
from rhc.plant import Plant
from rhc.schedule import CONTROLS, Schedule, cooldown, shaped, warming

Start = Literal["zero", "probe", "given"]
STARTS: tuple[Start, ...] = ("zero", "probe", "given")

ZERO_STEPS = 50
"""Steps with frozen weights behind the hypergradient at α = 0."""

DROP = 0.05
"""The share of the objective by which the lrs from zero lower it, to first order."""

PROBE_BATCHES = 16
"""Validation batches that probes are judged on, at most."""

GREED = 1.5
"""What the factor found is divided by: even a quarter of the run prefers an lr that is too high."""

ADAPTIVE_GREED = 1 / 1.5
"""The same for optimizers that divide by a second moment. Their probes are short beside the rise of
lr and err to the other side: a language model wants twice the lr that a quarter of its run does."""

COOLDOWN = 0.3
"""Every probe ends with a virtual cooldown: the share of its steps in which lr falls to 0."""

WARMUP = 0.1
"""The share of the run in which lr rises, for optimizers that divide by a second moment: without it
a small language model ends 0.14 nats higher. With plain SGD it gains nothing (docs/log.md)."""

PART = 1000
"""Steps of a probe that are rolled at once: a roll keeps a kilobyte a step."""

FEWEST = 10
"""Steps of a probe, at least: fewer say little, and cost little anyway."""


@dataclass(frozen=True)
class Stage:
    """Probes of `share` of the run's steps, at lrs a factor apart, `farthest` moves to one side at
    most."""

    share: float
    factor: float
    farthest: int


STAGES = (Stage(0.025, 10.0, 12), Stage(0.1, 3.0, 4), Stage(0.25, 2.0, 2))
"""Short probes find the decade, long ones the factor of two: short ones alone prefer an lr that is
too high, and what early greed costs cannot be undone."""


def zero_lrs(
    gradient: Tensor, value: float, sizes: Sequence[int], own: Sequence[float]
) -> list[float] | None:
    """Every group's lr from dJ/dα at α = 0; None where no group's lr lowers the objective.

    gradient: (K, G) dJ/dα_t of every step and group. value: J there. sizes: n_i, trainable
    parameters per group. own: the groups' lrs as the optimizer has them; a group at 0 stays there.

    α_i = DROP √n_i / (s_i Σ_j √n_j) with s_i = −Σ_t dJ/dα_ti / |J|: every group lowers J by a share
    that goes by its size, whatever units it is written in. A group whose own lr would raise the
    objective gets the lowest of the others.
    """
    slopes = (-gradient.sum(0) / max(abs(value), 1e-12)).tolist()
    active = [i for i, lr in enumerate(own) if lr != 0 and sizes[i]]
    falling = [i for i in active if slopes[i] > 0 and math.isfinite(slopes[i])]
    if not falling:
        return None
    total = sum(math.sqrt(sizes[i]) for i in falling)
    found = {i: _bounded(DROP * math.sqrt(sizes[i]) / (total * slopes[i])) for i in falling}
    lowest = min(found.values())
    return [found.get(i, lowest if i in active else 0.0) for i in range(len(own))]


def _bounded(lr: float) -> float:
    return min(max(lr, CONTROLS["lr"].lower), CONTROLS["lr"].upper)


def probe(
    judge: Callable[[int, float], float],
    steps: int,
    lowest: float,
    highest: float,
    stages: Sequence[Stage] = STAGES,
) -> float | None:
    """The common factor on all lrs; None where no probe is finite.

    judge(n, factor): the loss after n steps at `factor` times the lrs, inf where they diverge.
    steps: of the run. lowest, highest: between which the factor must stay.

    Every stage begins at the best factor so far, looks at both sides, and goes on to the better one
    until it is passed. Through the last three losses goes a parabola in log lr.
    """
    centre = 1.0
    for number, stage in enumerate(stages):
        n = min(steps, max(FEWEST, round(stage.share * steps)))
        seen: dict[int, float] = {}

        def at(
            k: int,
            n: int = n,
            stage: Stage = stage,
            centre: float = centre,
            seen: dict[int, float] = seen,
        ) -> float:
            if k not in seen:
                factor = centre * stage.factor**k
                inside = abs(k) <= stage.farthest and lowest <= factor <= highest
                found = judge(n, factor) if inside else math.inf
                seen[k] = found if math.isfinite(found) else math.inf
            return seen[k]

        best = _lowest(at, stage.farthest)
        if not math.isfinite(at(best)):
            return None if number == 0 else centre
        last = number == len(stages) - 1
        offset = _vertex(at(best - 1), at(best), at(best + 1)) if last else 0.0
        centre *= stage.factor ** (best + offset)
    return min(max(centre, lowest), highest)


def _lowest(at: Callable[[int], float], farthest: int) -> int:
    """Where `at` is lowest, downhill from 0; what is infinite lies above everything else."""
    k = 0
    while not math.isfinite(at(k)) and k > -farthest:
        k -= 1
    upwards = at(k + 1) < at(k)
    side = 1 if upwards else -1
    while abs(k) < farthest and at(k + side) < at(k):
        k += side
    return k


def _vertex(left: float, middle: float, right: float) -> float:
    """The place of the minimum of the parabola through three losses at -1, 0, 1; within ±1/2."""
    curvature = left - 2 * middle + right
    if not math.isfinite(curvature) or curvature <= 0:
        return 0.0
    return min(max(0.5 * (left - right) / curvature, -0.5), 0.5)


class StartSearch:
    """Finds a start on a live plant, which is put back after every roll.

    stream: of training batches, isolated, not used for anything else. held_out: n -> (the loss that
    judges a roll of the first n batches, its size in training batches). planned: the whole run's
    schedule as the optimizer has it. warmup: share of the run in which lr rises. greed: what the
    factor found is divided by. known: records of an earlier search that was cut short, which
    are not tried again; tell: given every new record.
    """

    def __init__(
        self,
        plant: Plant,
        objective: Objective,
        planned: PlannedSchedule,
        stream: StepBatches,
        held_out: Callable[[int], tuple[Terminal, float]],
        known: Sequence[dict[str, Any]],
        tell: Callable[[dict[str, Any]], None],
        warmup: float = 0.0,
        greed: float = GREED,
    ) -> None:
        # At lr 0 nothing moves: training losses say no more than the held-out one.
        judged = replace(objective, loss_weight=0.0) if objective.terminal_weight else objective
        self.plant, self.objective, self.planned = plant, judged, planned
        self.stream, self.held_out = stream, held_out
        self.known = {_key(record): record for record in known if _readable(record)}
        self.tell = tell
        self.warmup, self.greed = warmup, greed
        self.gradients = 0.0
        self._first = stream.position(0)
        self._before = plant.snapshot()

    def find(self, start: Start) -> Tensor | None:
        """The lr of step 0, (), or (G,) per parameter group; None where nothing is finite."""
        base = self.planned.window(0, 1)["lr"][0]
        if start == "zero":
            base = self._zero(base)
        elif self._unchosen():
            ratio = self._zero(base)
            base = base.max() * ratio / ratio.max()
            # The search begins where the least of them is within its bounds.
            base = base * max(1.0, CONTROLS["lr"].lower / float(base[base > 0].min()))
        highest, lowest = float(base.max()), float(base[base > 0].min())
        bounds = CONTROLS["lr"]

        def judge(n: int, factor: float) -> float:
            return self._probe(n, base * factor)

        factor = probe(judge, len(self.planned), bounds.lower / lowest, bounds.upper / highest)
        if factor is None:
            return None
        return torch.where(base == 0, base, (base * factor / self.greed).clamp(min=bounds.lower))

    def _unchosen(self) -> bool:
        """Whether parameter groups have one lr, so that nobody has chosen their ratio."""
        own = self.plant.controls.own["lr"]
        return len(own) > 1 and len(set(own)) == 1 and own[0] > 0

    def _zero(self, given: Tensor) -> Tensor:
        """The lrs at which the objective falls by DROP; as given where it does not fall at all."""
        own = self.plant.controls.own["lr"]
        steps = min(ZERO_STEPS, len(self.planned))
        record = self._tried(self._hypergradient_at_zero, "zero", steps, own)
        found = record["lr"]
        if found is None:
            return given
        return torch.tensor(found if len(found) > 1 else found[0], dtype=torch.float64)

    def _hypergradient_at_zero(
        self, own: Sequence[float], steps: int
    ) -> tuple[dict[str, Any], float]:
        frozen = torch.zeros(steps, len(own), dtype=torch.float64)
        schedule = self._schedule(0, steps, frozen)
        # At lr 0 no Hessian takes part.
        lookback = Lookback(self.plant, self.objective, ("lr",), product="none")
        mean = Average(self.objective.average)
        terminal, share = self.held_out(steps)
        recorder = lookback.roll(list(self._batches(steps)), schedule, average=mean)
        try:
            h = lookback.look_back(recorder, mean, terminal)
        finally:
            recorder.close()
        groups = self.plant.optimizer.param_groups
        sizes = [sum(p.numel() for p in g["params"] if p.requires_grad) for g in groups]
        lrs = zero_lrs(h.grad["lr"], h.value, sizes, own) if h.result.usable else None
        return {"lr": lrs, "objective": h.value}, steps + share

    def _probe(self, n: int, lr: Tensor) -> float:
        loss = self._tried(self._loss_after, "probe", n, lr.tolist())["loss"]
        return math.inf if loss is None else float(loss)

    def _loss_after(self, lr: Any, n: int) -> tuple[dict[str, Any], float]:
        # As long a rise as the run's, but in a short probe no more than its third.
        rise = min(self.warmup * len(self.planned) / n, 1 / 3)
        highest = torch.as_tensor(lr, dtype=torch.float64)
        losses = array("d")
        batches, diverged = self._batches(n), False

        def limit(first: float) -> float:
            first = losses[0] if losses else first
            return DIVERGED * first if first > 0 else math.inf

        for start in range(0, n, PART):
            stop = min(start + PART, n)
            at = torch.arange(start, stop, dtype=torch.float64)
            lrs = shaped(highest, warming(n, rise, at) * cooldown(n, COOLDOWN, at))
            part = islice(batches, stop - start)
            trajectory = self.plant.roll(part, self._schedule(start, stop, lrs), limit=limit)
            losses.extend(float(loss) for loss in trajectory.losses)
            diverged = trajectory.diverged is not None
            if diverged:
                break
        self.plant.optimizer.zero_grad()
        if diverged or not self.plant.is_finite():
            return {"loss": None, "course": _course(losses)}, len(losses)
        terminal, share = self.held_out(n)
        with torch.no_grad():
            found = self.plant.value(terminal(self.plant.model))
        return {"loss": found, "course": _course(losses)}, n + share / 3

    def _tried(
        self,
        attempt: Callable[[Any, int], tuple[dict[str, Any], float]],
        kind: str,
        n: int,
        lr: Any,
    ) -> dict[str, Any]:
        """What a roll from the initial state gave; from the records, if it is there."""
        asked = {"kind": kind, "steps": n, "from": lr}
        record = self.known.get(_key(asked))
        if record is None:
            try:
                found, cost = attempt(lr, n)
            finally:
                self.plant.restore(self._before)
            record = self.known[_key(asked)] = {**asked, **found, "gradients": cost}
            self.tell(record)
        self.gradients += record["gradients"]
        return record

    def _batches(self, n: int) -> Iterator[Any]:
        """The first n batches of the run, a few at a time."""
        self.stream.seek(self._first)
        for start in range(0, n, 32):
            stop = min(start + 32, n)
            yield from self.stream.take(start, stop)
            self.stream.release(stop)

    def _schedule(self, start: int, stop: int, lr: Tensor) -> Schedule:
        values = self.planned.window(start, stop).values
        return Schedule({**values, "lr": lr}, start, self.planned.seed)


DIVERGED = 2.0
"""A probe diverges where its loss exceeds this times the loss that it began with."""


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    lr = record["from"]
    return record["kind"], record["steps"], tuple(lr) if isinstance(lr, (list, tuple)) else lr


def _readable(record: Mapping[str, Any]) -> bool:
    """Whether a line of start.jsonl is one that `_tried` wrote; another is tried again."""
    found = record.get("lr" if record.get("kind") == "zero" else "loss", "nothing")
    sizes = {"zero": (list, type(None)), "probe": (int, float, type(None))}
    numbers = [record.get("gradients")]
    for value in (record.get("from"), 0.0 if found is None else found):
        numbers += value if isinstance(value, list) else [value]
    return (
        isinstance(record.get("kind"), str)
        and isinstance(found, sizes.get(record["kind"], ()))
        and found != []
        and isinstance(record.get("steps"), int)
        and all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers)
    )


def _course(losses: Sequence[float]) -> list[float]:
    """At most 50 means of the losses, in order."""
    size = max(1, -(-len(losses) // 50))
    parts = [losses[i : i + size] for i in range(0, len(losses), size)]
    return [sum(part) / len(part) for part in parts]

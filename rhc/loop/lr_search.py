"""Where a schedule starts: an lr for every parameter group, found before the first step.

`zero` needs no lr at all: the hypergradient at α = 0 says how fast the objective falls per unit of
every group's lr, and so in which ratio the groups want theirs. `probe` finds the common scale by
short rolls from the initial state, which the Runner takes and judges; of several groups with one lr
it takes the ratio from the hypergradient too. Where short rolls learn nothing, their losses say
nothing about lr: then longer ones are taken, and where these learn nothing either, the lr that the
optimizer has. Numbers: docs/log.md.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from rhc.hypergradient import ReversePass
from rhc.schedule import CONTROLS, Schedule, cooldown, shaped, warming
from rhc.schedule.planned import PlannedSchedule
from rhc.training.batches import StepBatches
from rhc.training.objective import Average, Objective
from rhc.training.plant import Plant

Start = Literal["zero", "probe", "given"]
STARTS: tuple[Start, ...] = ("zero", "probe", "given")

ZERO_STEPS = 50
"""Steps with frozen weights behind the hypergradient at α = 0."""

DROP = 0.05
"""The share of the objective by which the lrs from zero lower it, to first order."""

PROBE_BATCHES, FEWEST_BATCHES = 16, 4
"""Validation batches that probes are judged on, at most; in short runs down to the second."""

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

FEWEST, LEAST = 10, 5
"""Steps of a probe, at least: fewer say little, and cost little anyway. Where the budget does not
allow these, the second number; where it does not allow that either, there is no probe."""

FEWEST_OF_STAGE = 3
"""Probes that a stage must have room for: one at the best lr so far, and one on either side."""

LEARNED = 0.1
"""The share by which a loss must lie below that of shorter rolls to show that something is learned.
What is learned in the first steps may be no more than the mean of the targets."""

ERRORS = 2.0
"""And the number of standard errors of the difference, over the batches that both are judged on."""

LONGER_ROLLS, LONGER = 4, 1.5
"""Where nothing is learned: rolls as long as the budget has room for four of them, if these are
longer than any before by this factor."""

LONGER_STEP = 3.0
"""The factor between their lrs; less where the lr that was given and the highest that does no harm
are near each other: then one lies between them."""

PART = 1000
"""Steps of a probe that are rolled at once: a roll keeps a kilobyte a step."""


@dataclass(frozen=True)
class Stage:
    """Probes of `share` of the run's steps, at lrs a factor apart, `farthest` moves to one side at
    most."""

    share: float
    factor: float
    farthest: int


class NoRoom(Exception):
    """What the search may take is spent."""


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
    longest: Callable[[int], int] = lambda rolls: 2**63,
) -> float | None:
    """The common factor on all lrs; None where no probe is finite.

    judge(n, factor): the loss after n steps at `factor` times the lrs, inf where they diverge;
    raises NoRoom instead of a roll that costs too much. steps: of the run. lowest, highest: between
    which the factor must stay. longest(rolls): the steps of each of so many more rolls, at most.

    Every stage begins at the best factor so far, looks at both sides, and goes on to the better one
    until it is passed. Through the last three losses goes a parabola in log lr. A stage for which
    there is no room takes shorter rolls, and none where they would be shorter than those before.
    """
    centre, before = 1.0, min(LEAST, steps)
    for number, stage in enumerate(stages):
        n = min(steps, max(FEWEST, round(stage.share * steps)))
        n = min(n, longest(FEWEST_OF_STAGE))
        if n < before:
            break
        before = n
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

        try:
            best = _lowest(at, stage.farthest)
        except NoRoom:
            best = min(seen, key=lambda k: (seen[k], k), default=0)
            if seen and not math.isfinite(seen[best]):
                best -= 1  # below all that diverge
            centre *= stage.factor**best
            break
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


class HeldOut(Protocol):
    """What a roll is judged by. share: its size in training batches."""

    @property
    def share(self) -> float: ...
    def __call__(self, model: nn.Module) -> Tensor: ...
    def each(self) -> list[Tensor]:
        """The live model's loss on each batch, ()."""

    def mean(self, losses: Sequence[Tensor]) -> Tensor:
        """The loss that they make, ()."""


class StartSearch:
    """Finds a start on a live plant, which is put back after every roll.

    stream: of training batches, isolated, not used for anything else. held_out: n -> the loss that
    judges a roll of the first n batches. fixed: whether that is on the same batches for every n.
    share: its size in training batches, at most. planned: the whole run's schedule as the optimizer
    has it. room: gradient evaluations that the search may take. warmup: share of the run in which
    lr rises. greed: what the factor found is divided by. known: records of an earlier search that
    was cut short, which are not tried again; tell: given every new record; notice: told in words
    where the losses do not say which lr is best.
    """

    def __init__(
        self,
        plant: Plant,
        objective: Objective,
        planned: PlannedSchedule,
        stream: StepBatches,
        held_out: Callable[[int], HeldOut],
        known: Sequence[dict[str, Any]],
        tell: Callable[[dict[str, Any]], None],
        notice: Callable[[str], None],
        *,
        fixed: bool,
        share: float,
        room: float = math.inf,
        warmup: float = 0.0,
        greed: float = GREED,
    ) -> None:
        # At lr 0 nothing moves: training losses say no more than the held-out one.
        judged = replace(objective, loss_weight=0.0) if objective.terminal_weight else objective
        self.plant, self.objective, self.planned = plant, judged, planned
        self.stream, self.held_out, self.fixed, self.share = stream, held_out, fixed, share
        self.known = {_key(record): record for record in known if _readable(record)}
        self.tell, self.notice = tell, notice
        self.room = room - 2 * share / 3  # what the untrained loss takes, where it is needed
        self.warmup, self.greed = warmup, greed
        self.gradients = 0.0
        self.limit: float | None = DIVERGED
        self.rolls: list[dict[str, Any]] = []
        """The probes of this search so far, in order."""
        self._done: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._first = stream.position(0)
        self._before = plant.snapshot()

    def find(self, start: Start) -> Tensor | None:
        """The lr of step 0, (), or (G,) per parameter group; None where nothing is finite."""
        given = base = self.planned.window(0, 1)["lr"][0]
        if start == "zero":
            base = self._zero(base)
        elif self._unchosen():
            ratio = self._zero(base)
            base = base.max() * ratio / ratio.max()
            # The search begins where the least of them is within its bounds.
            base = base * max(1.0, CONTROLS["lr"].lower / float(base[base > 0].min()))
        factor = self._factor(base)
        if factor is None:
            # Where the first loss is by chance among the lowest, all others are above the limit.
            self.limit = None
            factor = self._factor(base)
        if factor is None:
            return None
        if not self.rolls:
            self.notice(
                f"the budget has no room to look for the lr: it stays {_words(given)}, as given"
            )
            return given
        found = torch.where(
            base == 0, base, (base * factor / self.greed).clamp(min=CONTROLS["lr"].lower)
        )
        return found if self._learned() else self._by_longer_rolls(given, found)

    def _factor(self, base: Tensor) -> float | None:
        """The factor on the lrs that short rolls find."""
        highest, lowest = float(base.max()), float(base[base > 0].min())
        bounds = CONTROLS["lr"]

        def judge(n: int, factor: float) -> float:
            return self._probe(n, base * factor)

        return probe(
            judge,
            len(self.planned),
            bounds.lower / lowest,
            bounds.upper / highest,
            longest=self._longest,
        )

    def _unchosen(self) -> bool:
        """Whether parameter groups have one lr, so that nobody has chosen their ratio."""
        own = self.plant.controls.own["lr"]
        return len(own) > 1 and len(set(own)) == 1 and own[0] > 0

    def _longest(self, rolls: int) -> int:
        """The steps of each of so many more rolls for which there is room, at most the run's."""
        room = (self.room - self.gradients) / rolls - self.share / 3
        return math.floor(min(room, len(self.planned)))

    # Where nothing is learned ---------------------------------------------------------------------

    def _learned(self) -> bool:
        """Whether longer rolls learned what shorter ones had not.

        The shortest ones say so only where there are no longer ones: a loss that falls at first and
        then no more has found the mean of the targets, and that at any lr.
        """
        lengths = sorted({record["steps"] for record in self._finite()})
        for n in lengths:
            shorter = [record for record in self._finite() if 2 * record["steps"] <= n]
            if shorter:
                before = min(shorter, key=_loss)
            elif 2 * n <= lengths[-1]:
                continue
            else:
                before = self._untrained(n)
            if self._below(self._best(n), before, LEARNED):
                return True
        return False

    def _below(self, a: Mapping[str, Any], b: Mapping[str, Any], least: float = 0.0) -> bool:
        """Whether the loss of a lies below that of b by more than noise, and by the share `least`.

        Of single batches the noise is not known; there the share is `LEARNED` at least.
        """
        x, y = a.get("batches", ()), b.get("batches", ())
        error = 0.0
        if min(len(x), len(y)) < 2:
            least = max(least, LEARNED)
        elif len(x) == len(y) and (self.fixed or a["steps"] == b["steps"]):
            error = statistics.stdev(q - p for p, q in zip(x, y, strict=True)) / math.sqrt(len(x))
        else:
            error = math.sqrt(sum(statistics.variance(z) / len(z) for z in (x, y)))
        return bool(_loss(b) - _loss(a) > max(least * abs(_loss(b)), ERRORS * error))

    def _finite(self) -> list[dict[str, Any]]:
        return [record for record in self.rolls if math.isfinite(_loss(record))]

    def _best(self, n: int) -> dict[str, Any]:
        """The roll of n steps that ended lowest."""
        return min((record for record in self.rolls if record["steps"] == n), key=_loss)

    def _by_longer_rolls(self, given: Tensor, found: Tensor) -> Tensor:
        """The lr by longer rolls where short ones learned nothing; else the one that was given.

        found: what the short ones say.
        """
        before = max(record["steps"] for record in self.rolls)
        highest = self._highest()
        n = self._longest(LONGER_ROLLS)
        longer = n >= LONGER * before
        if longer:
            self.limit = self.limit and LONGER_DIVERGED
        else:
            n = min(record["steps"] for record in self.rolls)
        with contextlib.suppress(NoRoom):
            self._probe(n, given)
            if longer:
                self._probe(n, highest)
        if longer and self._learned():
            with contextlib.suppress(NoRoom):
                centre = _lr(self._best(n))
                apart = math.sqrt(float(highest.max() / given.max()))
                step = max(apart, 1 / apart)
                if not 1.2 <= step <= LONGER_STEP:
                    step = LONGER_STEP
                _lowest(lambda k: self._probe(n, centre * step**k), 2)
            # A longer run wants no higher lr than a roll: the lowest of the good ones.
            best, untrained = self._best(n), self._untrained(n)
            good = [
                record
                for record in self._finite()
                if record["steps"] == n
                and not self._below(best, record)
                and self._below(record, untrained, LEARNED)
            ]
            lr = _lr(min(good or [best], key=_size))
            self.notice(
                f"rolls of up to {before} steps learn nothing that tells lrs apart; by rolls of "
                f"{n} steps lr is {_words(lr)}"
            )
            return lr
        # What was given stays unless it was seen to do worse than what was found.
        rolled = [record for record in self.rolls if record["from"] == given.tolist()]
        last = max(rolled, key=lambda record: record["steps"], default=None)
        worse = last is not None and (
            math.isinf(_loss(last)) or self._below(self._best(last["steps"]), last)
        )
        lr, why = (found, "as short rolls find it") if worse else (given, "as given")
        longest = max(record["steps"] for record in self.rolls)
        self.notice(
            f"no roll of up to {longest} steps learns anything that tells lrs apart: lr is "
            f"{_words(lr)}, {why}; if the run learns nothing, train for longer or give another lr"
        )
        return lr

    def _highest(self) -> Tensor:
        """The highest lr that does no harm in the first steps: where a loss is flat, the fastest
        way on."""
        n = min(record["steps"] for record in self.rolls)
        harmful = [_size(record) for record in self.rolls if self._harms(record)]
        edge = min(harmful, default=math.inf)
        lower = [record for record in self._finite() if _size(record) < edge]
        lr = _lr(max(lower or self._finite(), key=_size))
        highest = CONTROLS["lr"].upper / 10
        with contextlib.suppress(NoRoom):
            while not harmful and lr.max() <= highest and not self._harms(self._rolled(n, 10 * lr)):
                lr = 10 * lr
        return lr

    def _harms(self, record: Mapping[str, Any]) -> bool:
        """Whether a roll ended above the untrained loss."""
        return math.isinf(_loss(record)) or self._below(self._untrained(record["steps"]), record)

    # At lr 0, and probes --------------------------------------------------------------------------

    def _zero(self, given: Tensor) -> Tensor:
        """The lrs at which the objective falls by DROP; as given where it does not fall at all, or
        there is no room to see it."""
        own = self.plant.controls.own["lr"]
        steps = math.floor(min(ZERO_STEPS, len(self.planned), self.room / 4))
        # What it finds has to be looked at by probes.
        probes = FEWEST_OF_STAGE * (min(LEAST, len(self.planned)) + self.share / 3)
        if steps < 1 or steps + self.share + probes > self.room:
            return given
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
        reverse_pass = ReversePass(self.plant, self.objective, ("lr",), product="none")
        mean = Average(self.objective.average)
        terminal = self.held_out(steps)
        recorder = reverse_pass.roll(list(self._batches(steps)), schedule, average=mean)
        try:
            h = reverse_pass.differentiate(recorder, mean, terminal)
        finally:
            recorder.close()
        groups = self.plant.optimizer.param_groups
        sizes = [sum(p.numel() for p in g["params"] if p.requires_grad) for g in groups]
        lrs = zero_lrs(h.grad["lr"], h.value, sizes, own) if h.result.usable else None
        return {"lr": lrs, "objective": h.value}, steps + terminal.share

    def _probe(self, n: int, lr: Tensor) -> float:
        return _loss(self._rolled(n, lr))

    def _rolled(self, n: int, lr: Tensor) -> dict[str, Any]:
        record = self._tried(self._loss_after, "probe", n, lr.tolist(), self.share / 3)
        if record not in self.rolls:
            self.rolls.append(record)
        return record

    def _loss_after(self, lr: Any, n: int) -> tuple[dict[str, Any], float]:
        # As long a rise as the run's, but in a short probe no more than its third.
        rise = min(self.warmup * len(self.planned) / n, 1 / 3)
        highest = torch.as_tensor(lr, dtype=torch.float64)
        most = self.limit
        losses = array("d")
        batches, diverged = self._batches(n), False

        def limit(first: float) -> float:
            first = losses[0] if losses else first
            return most * first if most is not None and first > 0 else math.inf

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
        found, cost = self._judged(n)
        return {"course": _course(losses), **found}, n + cost

    def _untrained(self, n: int) -> dict[str, Any]:
        """The loss before the first step, on what a roll of n steps is judged by."""
        return self._tried(self._loss_before, "untrained", 0 if self.fixed else n, 0.0)

    def _loss_before(self, lr: Any, n: int) -> tuple[dict[str, Any], float]:
        return self._judged(n)

    def _judged(self, n: int) -> tuple[dict[str, Any], float]:
        """(the live model's loss, of all batches and of each, what it cost)."""
        held_out = self.held_out(n)
        with torch.no_grad():
            losses = held_out.each()
            found = self.plant.value(held_out.mean(losses))
            batches = [self.plant.value(loss) for loss in losses]
        if not all(map(math.isfinite, [found, *batches])):
            return {"loss": None}, held_out.share / 3
        return {"loss": found, "batches": batches}, held_out.share / 3

    def _tried(
        self,
        attempt: Callable[[Any, int], tuple[dict[str, Any], float]],
        kind: str,
        n: int,
        lr: Any,
        judging: float | None = None,
    ) -> dict[str, Any]:
        """What a roll from the initial state gave; from the records, if it is there.

        judging: what is needed beside n steps, in gradient evaluations, or None for what there is
        always room for. Raises NoRoom.
        """
        asked = {"kind": kind, "steps": n, "from": lr}
        if kind == "probe" and self.limit != DIVERGED:
            asked["limit"] = self.limit
        known = self.known.get(_key(asked))
        record = self._done.get(_key(asked))
        if record is not None:
            return record
        if judging is not None and self.gradients + n + judging > self.room:
            raise NoRoom
        record = known
        if record is None:
            try:
                found, cost = attempt(lr, n)
            finally:
                self.plant.restore(self._before)
            record = {**asked, **found, "gradients": cost}
            self.tell(record)
        self._done[_key(asked)] = record
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


DIVERGED, LONGER_DIVERGED = 2.0, 50.0
"""A probe diverges where its loss exceeds this times the loss that it began with; the second where
nothing else was learned and there are but a few rolls, since a first loss can be low by chance."""


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    lr = record["from"]
    limit = record.get("limit", DIVERGED)
    return (
        record["kind"],
        record["steps"],
        tuple(lr) if isinstance(lr, (list, tuple)) else lr,
        limit,
    )


def _loss(record: Mapping[str, Any]) -> float:
    return math.inf if record["loss"] is None else float(record["loss"])


def _list(lr: Any) -> list[float]:
    return lr if isinstance(lr, list) else [lr]


def _size(record: Mapping[str, Any]) -> float:
    """The highest lr of a roll's parameter groups."""
    return max(_list(record["from"]))


def _lr(record: Mapping[str, Any]) -> Tensor:
    return torch.tensor(record["from"], dtype=torch.float64)


def _words(lr: Tensor) -> str:
    return ", ".join(f"{value:.3g}" for value in _list(lr.tolist()))


def _readable(record: Mapping[str, Any]) -> bool:
    """Whether a line of start.jsonl is one that `_tried` wrote; another is tried again."""
    found = record.get("lr" if record.get("kind") == "zero" else "loss", "nothing")
    loss = (int, float, type(None))
    sizes = {"zero": (list, type(None)), "probe": loss, "untrained": loss}
    numbers = [record.get("gradients")]
    batches = record.get("batches", [])
    limit = record.get("limit")
    if not isinstance(batches, list) or not isinstance(limit, (int, float, type(None))):
        return False
    numbers += batches
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

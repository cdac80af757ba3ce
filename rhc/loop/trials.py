"""Trial rolls from a run's initial state, which is restored after each, and their records."""

from __future__ import annotations

import contextlib
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from rhc.events import StartTried
from rhc.hypergradient import Hypergradient, ReversePass
from rhc.loop.budget import search_budget
from rhc.loop.fit import Fit
from rhc.loop.window_objective import HeldOutLoss, at_most, held_out_loss
from rhc.schedule import Schedule, cooldown, shaped, warming
from rhc.storage.files import NUMBER, NUMBER_OR_NONE, misfit
from rhc.training.batches import StepBatches
from rhc.training.objective import Average

MOST_BATCHES, FEWEST_BATCHES = 16, 4
"""Validation batches that judge a roll, at most; in short runs as few as the second."""

COOLDOWN = 0.3
"""Share of a roll's steps, at its end, in which lr falls to 0."""

TRIAL_DIVERGED = 2.0
"""A roll diverges where its loss exceeds this times its first."""

PART = 1000
"""Steps rolled at once: a roll keeps a kilobyte per step."""


class NoRoom(Exception):
    """The budget of the search is spent."""


@dataclass(frozen=True)
class Trial:
    """The result of a roll. asked: its highest lr, () or per group. loss: inf if it diverged."""

    steps: int
    asked: float | list[float]
    loss: float
    batches: list[float]

    @property
    def lr(self) -> Tensor:
        return torch.tensor(self.asked, dtype=torch.float64)

    @property
    def highest(self) -> float:
        return float(self.lr.max())


class Trials:
    """Takes rolls within `room` and records them; those in start.jsonl are not repeated. fixed:
    whether all rolls are judged on the same batches of val_loader; else on those after the roll,
    `share` of a training batch each. limit: divergence as a multiple of the first loss."""

    def __init__(self, fit: Fit) -> None:
        self.fit, self.plant, self.steps = fit, fit.plant, fit.state.steps
        data, objective = fit.data, fit.objective
        self.planned = fit.base.unshaped(self.steps)
        # At lr 0 nothing moves: training losses add nothing to the held-out one.
        alone = bool(objective.terminal_weight)
        self.objective = replace(objective, loss_weight=0.0) if alone else objective
        self.stream = StepBatches(
            data.train_loader, isolated=True, device=data.train.device, accumulate=data.accumulate
        )
        self.stream.seek(data.train.position(0))  # the run's own first batches
        # Few, so that judging costs little beside rolling.
        self.count = min(MOST_BATCHES, max(FEWEST_BATCHES, self.steps // 5))
        self.validation = self._validation_batches()
        self.fixed = bool(self.validation)
        self.share = self._held_out(0).share if self.fixed else self.count * data.accumulate
        # Less the cost of the untrained loss, where it is needed.
        self.room = search_budget(fit) - 2 * self.share / 3
        self.gradients = 0.0
        self.limit: float | None = TRIAL_DIVERGED
        known = [] if fit.directory is None else fit.directory.starts.read()
        self._known = {_key(record): record for record in known if _readable(record)}
        self._taken: dict[tuple[Any, ...], dict[str, Any]] = {}
        fit.state.starts.clear()
        self._first = self.stream.position(0)
        self._before = self.plant.snapshot()

    def longest(self, rolls: int) -> int:
        """Affordable steps for each of `rolls` more rolls, at most the run's."""
        room = (self.room - self.gradients) / rolls - self.share / 3
        return math.floor(min(room, self.steps))

    def roll(self, n: int, lr: Tensor) -> Trial:
        asked = {"kind": "probe", "steps": n, "from": lr.tolist()}
        if self.limit != TRIAL_DIVERGED:
            asked["limit"] = self.limit
        return _trial(self._record(asked, lambda: self._loss_after(n, lr), self.share / 3))

    def untrained(self, n: int) -> Trial:
        """No steps, judged like a roll of n steps."""
        n = 0 if self.fixed else n
        asked = {"kind": "untrained", "steps": n, "from": 0.0}

        def judged() -> tuple[dict[str, Any], float]:
            for _ in () if self.validation else self._batches(n):
                pass  # a roll may have drawn further than the batches that judge this one
            return self._judged(n)

        return _trial(self._record(asked, judged))

    def from_zero(
        self, n: int, lrs: Callable[[Hypergradient], list[float] | None]
    ) -> list[float] | None:
        """`lrs` of the hypergradient of n steps at lr 0."""
        own = self.plant.controls.own["lr"]
        asked = {"kind": "zero", "steps": n, "from": own}

        def attempt() -> tuple[dict[str, Any], float]:
            h, cost = self._hypergradient_at_zero(n, len(own))
            return {"lr": lrs(h), "objective": h.value}, cost

        return cast("list[float] | None", self._record(asked, attempt)["lr"])

    def _record(
        self,
        asked: dict[str, Any],
        attempt: Callable[[], tuple[dict[str, Any], float]],
        judging: float | None = None,
    ) -> dict[str, Any]:
        """A line of start.jsonl, read if there, else made by `attempt` -> (result, its cost).
        judging: evaluations needed beside its steps; None to ignore the budget. Raises NoRoom."""
        key = _key(asked)
        if key in self._taken:
            return self._taken[key]
        if judging is not None and self.gradients + asked["steps"] + judging > self.room:
            raise NoRoom
        record = self._known.get(key)
        if record is None:
            try:
                found, cost = attempt()
            finally:
                self.plant.restore(self._before)
            record = {**asked, **found, "gradients": cost}
            if self.fit.directory is not None:
                self.fit.directory.record_now(self.fit.directory.starts, record)
            self.fit.events.emit(StartTried(record))
            self.fit.check_stop()
        self._taken[key] = record
        self.fit.state.starts.append(record)
        self.gradients += record["gradients"]
        return record

    def _hypergradient_at_zero(self, n: int, groups: int) -> tuple[Hypergradient, float]:
        schedule = self._schedule(0, n, torch.zeros(n, groups, dtype=torch.float64))
        # At lr 0 no Hessian takes part.
        reverse_pass = ReversePass(self.plant, self.objective, ("lr",), product="none")
        mean, terminal = Average(self.objective.average), self._held_out(n)
        recorder = reverse_pass.roll(list(self._batches(n)), schedule, average=mean)
        with contextlib.closing(recorder):
            return reverse_pass.differentiate(recorder, mean, terminal), n + terminal.share

    def _loss_after(self, n: int, highest: Tensor) -> tuple[dict[str, Any], float]:
        # Warm-up as long as the run's, but at most a third of a roll.
        rise = min(self.fit.base.warmup * self.steps / n, 1 / 3)
        most, losses, diverged = self.limit, array("d"), False
        batches = self._batches(n)

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

    def _judged(self, n: int) -> tuple[dict[str, Any], float]:
        """(loss of the live model after n steps, in total and per batch; its cost)."""
        held_out = self._held_out(n)
        with torch.no_grad():
            losses = held_out.each()
            found = self.plant.value(held_out.mean(losses))
            batches = [self.plant.value(loss) for loss in losses]
        if not all(map(math.isfinite, [found, *batches])):
            return {"loss": None}, held_out.share / 3
        return {"loss": found, "batches": batches}, held_out.share / 3

    # Data -----------------------------------------------------------------------------------------

    def _validation_batches(self) -> list[Any]:
        """The batches that judge all rolls: those of the run's first windows."""
        data = self.fit.data
        if data.val_loader is None or not isinstance(self.objective.batches, int):
            return []
        stream = StepBatches(
            data.val_loader,
            isolated=True,
            seed=self.planned.seed,
            device=data.train.device,
            name="val_loader",
        )
        if data.validation is not None:
            stream.seek(data.validation.position(0))
        judged = stream.take(0, at_most(data.val_loader, self.count))
        stream.close()
        return judged

    def _held_out(self, n: int) -> HeldOutLoss:
        return held_out_loss(self.plant, self.validation or self.stream.take(n, n + self.count))

    def _batches(self, n: int) -> Iterator[Any]:
        self.stream.seek(self._first)
        for start in range(0, n, 32):
            stop = min(start + 32, n)
            yield from self.stream.take(start, stop)
            self.stream.release(stop)

    def _schedule(self, start: int, stop: int, lr: Tensor) -> Schedule:
        values = self.planned.window(start, stop).values
        return Schedule({**values, "lr": lr}, start, self.planned.seed)


# Lines of start.jsonl -----------------------------------------------------------------------------

_LIST_OR_NONE = (list, type(None))
_MAY_LACK = {"batches", "limit"}
_KINDS = {"steps": (int,), "from": (*NUMBER, list), "gradients": NUMBER, "limit": NUMBER_OR_NONE}
_JUDGED = {**_KINDS, "loss": NUMBER_OR_NONE, "batches": _LIST_OR_NONE}
_KINDS_OF = {"zero": {**_KINDS, "lr": _LIST_OR_NONE}, "probe": _JUDGED, "untrained": _JUDGED}


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    lr = record["from"]
    asked = tuple(lr) if isinstance(lr, (list, tuple)) else lr
    return record["kind"], record["steps"], asked, record.get("limit", TRIAL_DIVERGED)


def _trial(record: Mapping[str, Any]) -> Trial:
    loss = math.inf if record["loss"] is None else float(record["loss"])
    return Trial(record["steps"], record["from"], loss, record.get("batches") or [])


def _readable(record: Mapping[str, Any]) -> bool:
    """Whether a line is complete; others are tried again."""
    kind = record.get("kind")
    known = _KINDS_OF.get(kind) if isinstance(kind, str) else None
    if known is None or misfit(record, known) or not known.keys() - _MAY_LACK <= record.keys():
        return False
    numbers = [record["gradients"]]
    for name in ("from", "lr", "loss", "batches"):
        value = record.get(name)
        numbers += value if isinstance(value, list) else [value or 0.0]
    return record.get("lr") != [] and all(
        isinstance(number, NUMBER) and math.isfinite(number) for number in numbers
    )


def _course(losses: Sequence[float]) -> list[float]:
    """At most 50 means of the losses, in order."""
    size = max(1, -(-len(losses) // 50))
    parts = [losses[i : i + size] for i in range(0, len(losses), size)]
    return [sum(part) / len(part) for part in parts]

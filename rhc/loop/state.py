"""What changes during a fit, in one record; windows, and attempts at them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from rhc.data_weights import Evidence, Observation
from rhc.hypergradient import Hypergradient, Outcome, ReversePass
from rhc.loop.best import Best
from rhc.loop.update_rule import Proposal, Shift, Twin
from rhc.schedule import Schedule
from rhc.schedule.planned import PlannedSchedule, of_tape
from rhc.training.objective import Average
from rhc.training.recovery import OomFallback
from rhc.training.snapshot import Snapshot
from rhc.training.trajectory import Trajectory

AVERAGE_EVERY = 5
"""The average behind the `average_…` results takes every fifth committed iterate, counted from the
last one: all of them would cost a small model 8 % of its time, for the same weights."""

AVERAGE_DECAY = 0.95
"""Decay between two such iterates: 0.99 per step."""


@dataclass
class Cost:
    """The ledger. One gradient evaluation is one loss and its gradient on a training batch."""

    gradient_evaluations: float = 0.0
    hessian_products: int = 0
    gradient_equivalents: float = 0.0
    windows: int = 0
    rejected_windows: int = 0
    rewound_windows: int = 0
    peak_memory_bytes: int = 0

    def plus(self, other: Cost) -> Cost:
        """Both costs; of memory the larger peak."""
        both = {name: value + getattr(other, name) for name, value in vars(self).items()}
        both["peak_memory_bytes"] = max(self.peak_memory_bytes, other.peak_memory_bytes)
        return Cost(**both)

    def gradients(self, count: float) -> None:
        self.gradient_evaluations += count
        self.gradient_equivalents += count

    def to_json(self, committed: int) -> dict[str, Any]:
        """The `cost` of result.json; plain_run_equivalents relative to the committed steps."""
        record = asdict(self)
        equivalents = record.pop("gradient_equivalents")
        record["plain_run_equivalents"] = equivalents / committed if committed else 0.0
        return record


@dataclass
class Patience:
    """Which windows are differentiated, by the gain of earlier rewrites. after_shift: since a
    shift, until a window is unhelpful, windows beyond the rule's `until` are differentiated too.
    data_since: the step of the last shift."""

    unhelpful_windows: int = 0
    windows_to_skip: int = 0
    after_shift: bool = False
    data_since: int = 0


@dataclass
class AntitheticSearch:
    """State of a `Twin`: its next step in log lr, and the direction of the last one."""

    delta: float = Twin.first
    upwards: bool | None = None


@dataclass(frozen=True)
class Replay:
    """Whether steps [start, stop) ended alike when they were replayed, to the bit. first_step: from
    where on `what` differs; largest: by which share of its size; inf if not finite. operators:
    those that torch reports as non-deterministic."""

    equal: bool
    start: int
    stop: int
    first_step: int | None = None
    what: str | None = None
    largest: float = 0.0
    operators: tuple[str, ...] = ()

    def sentence(self, *, rewrites: bool) -> str:
        """What a person is told where it is not equal. rewrites: whether windows are, even so."""
        if self.operators:
            blamed = f"by {', '.join(self.operators)}"
            mend = "ask for deterministic operators (--deterministic, Runner(deterministic=True))"
        else:
            blamed = "by no operator that torch names"
            mend = (
                "look for what the loss draws or counts outside of parameters, buffers, attributes "
                "of modules and the global random generators of torch, numpy and python"
            )
        then = "all the same" if rewrites else "no longer: --inexact-replay does so all the same"
        return (
            f"steps [{self.start}, {self.stop}) do not replay to the bit: {self.what} of step "
            f"{self.first_step} differs by {self.largest:.2g} of its size, {blamed}; windows are "
            f"rewritten {then}; {mend}"
        )


@dataclass
class State:
    """Everything that changes from window to window, except the plant.

    schedule: planned from `step` on. first_lr: () or (G,). reference: (mean loss of the last
    window, first loss of the run). correction: shift of the schedule ahead by rewrites, in raw
    coordinates. best: of the validated states. live: the attempt at whose end the plant stands.
    result: of a finished run.
    """

    steps: int
    schedule: PlannedSchedule
    first_lr: Tensor
    reverse_pass: ReversePass | None
    step: int = field(default=0, init=False)
    reference: tuple[float, float] | None = field(default=None, init=False)
    cost: Cost = field(default_factory=Cost, init=False)
    start_gradients: float = field(default=0.0, init=False)
    average: Average = field(default_factory=lambda: Average(AVERAGE_DECAY), init=False)
    correction: dict[str, Shift] = field(default_factory=dict, init=False)
    patience: Patience = field(default_factory=Patience, init=False)
    antithetic: AntitheticSearch = field(default_factory=AntitheticSearch, init=False)
    fallback: OomFallback = field(default_factory=OomFallback, init=False)
    replay: Replay | None = field(default=None, init=False)
    evidence: Evidence | None = field(default=None, init=False)
    budget_is_spent: bool = field(default=False, init=False)
    chosen_start: dict[str, Any] | None = field(default=None, init=False)
    """By which rule the lr search chose, from which roll; None without a search."""
    skipped: list[list[Any]] = field(default_factory=list, init=False)
    """[start, stop, why] of windows that were not looked at, neighbours of one reason together."""
    starts: list[dict[str, Any]] = field(default_factory=list, init=False)
    """What the lr search tried, as in start.jsonl."""
    best: Best | None = field(default=None, init=False)
    tape: list[dict[str, Any]] = field(default_factory=list, init=False)
    windows: list[dict[str, Any]] = field(default_factory=list, init=False)
    passes: list[dict[str, Any]] = field(default_factory=list, init=False)
    live: Attempt | None = field(default=None, init=False)
    result: dict[str, Any] | None = field(default=None, init=False)
    began: float = field(default_factory=time.monotonic, init=False)
    seconds_before: float = field(default=0.0, init=False)

    def skip(self, start: int, stop: int, why: str) -> None:
        if self.skipped and self.skipped[-1][1:] == [start, why]:
            self.skipped[-1][1] = stop
        else:
            self.skipped.append([start, stop, why])

    def seconds(self) -> float:
        """Seconds of the run, with those before it was resumed."""
        return self.seconds_before + time.monotonic() - self.began

    def committed(self) -> Schedule:
        """The controls of the steps so far, at least one, from the tape."""
        plan = self.schedule
        return Schedule(of_tape(self.tape, plan.names, "the tape"), 0, plan.seed)


@dataclass(frozen=True)
class Moment:
    """A state that can be restored: the plant's, and the average of the iterates."""

    snapshot: Snapshot
    average: Average


@dataclass
class Window:
    """Steps [start, stop), committed up to `commit`. before: the moment at its start; None without
    rewriting. shift: the step at which its data change; cut: whether it was ended there.
    observation: what its first reverse pass says of data weights. online: the metric "tracking" of
    its steps as they were rolled first, before anything was rewritten by what they brought."""

    start: int
    stop: int
    commit: int
    before: Moment | None
    differentiated: bool = False
    skipped: str | None = None
    shift: int | None = None
    cut: bool = False
    terminal: Any = None
    observation: Observation | None = None
    online: list[Tensor | None] = field(default_factory=list)


@dataclass
class Attempt:
    """One roll of a window: its schedule, its observations and how it was judged.

    first_outcome: of the hypergradient, before any remedy. value: J. rewrites: how many led from
    the roll to here; scale: of the next; last_gain, gain: relative fall of J by the last and by
    all. guarded: whether a far too high loss is a failure. plain: whether by the plain loop's
    kernels. weights: moves of log w of the observed cells, which `batches` have. inside, end: the
    moments at the commit and at the end, if kept.
    """

    number: int
    schedule: Schedule
    batches: Iterable[Any]
    guarded: bool = True
    proposal: Proposal | None = None
    rewrites: int = 0
    scale: float = 1.0
    gain: float = 0.0
    last_gain: float = 0.0
    plain: bool = True
    weights: Tensor | None = None
    trajectory: Trajectory | None = field(default=None, init=False)
    hypergradient: Hypergradient | None = field(default=None, init=False)
    first_outcome: Outcome | None = field(default=None, init=False)
    value: float = field(default=math.nan, init=False)
    failure: str | None = field(default=None, init=False)
    out_of_memory: bool = field(default=False, init=False)
    inside: Moment | None = field(default=None, init=False)
    end: Moment | None = field(default=None, init=False)

    def again(self, **changes: Any) -> Attempt:
        """An attempt at the same window that is still to be rolled, with these changes."""
        return replace(self, **changes)

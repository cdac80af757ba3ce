"""What changes during a fit, in one record, and what a window is gone through in."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from rhc.hypergradient import Hypergradient, Outcome, ReversePass
from rhc.loop.update_rule import Proposal, Shift, Twin
from rhc.schedule import Schedule
from rhc.schedule.planned import PlannedSchedule, of_tape
from rhc.training.objective import Average
from rhc.training.recovery import Deviation, OomFallback
from rhc.training.snapshot import Snapshot
from rhc.training.trajectory import Trajectory

AVERAGE_EVERY = 5
"""The average behind the `average_…` results is of every fifth committed iterate, counted from the
last one. Taking all in would cost a small model 8 % of its time, for the same weights."""

AVERAGE_DECAY = 0.95
"""Of that average, from one such iterate to the next: 0.99 a step."""


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

    def gradients(self, count: float) -> None:
        """Counts `count` gradient evaluations."""
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
    """Which windows are differentiated, by what that was worth before.

    after_shift: since the data changed, and until a window is unhelpful again, windows are
    differentiated also beyond the rule's `until`. data_since: the step from which the data are as
    they are.
    """

    unhelpful_windows: int = 0
    windows_to_skip: int = 0
    after_shift: bool = False
    data_since: int = 0


@dataclass
class AntitheticSearch:
    """Where the search of a `Twin` stands: its next step in log lr, and where the last one led."""

    delta: float = Twin.first
    upwards: bool | None = None


@dataclass
class ReplayCheck:
    """Whether a step that is taken again gives the same, which is looked at once.

    first: the window's start, and the loss and gradient norm of its first step. deviation: how the
    step differed.
    """

    done: bool = False
    first: tuple[int, Tensor] | None = None
    deviation: Deviation | None = None


@dataclass
class State:
    """Where a run stands: everything that changes from window to window, but for the plant.

    schedule: planned from `step` on. first_lr: () or (G,), what the base schedule begins with.
    reference: (mean loss of the last committed window, first loss of the run). correction: what
    rewriting has moved the schedule ahead by, in raw coordinates. live: the attempt at whose end
    the plant stands. validation_batches: of val_loader, once they are counted. result: of a run
    that is finished.
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
    replay: ReplayCheck = field(default_factory=ReplayCheck, init=False)
    budget_is_spent: bool = field(default=False, init=False)
    validation_batches: float | None = field(default=None, init=False)
    tape: list[dict[str, Any]] = field(default_factory=list, init=False)
    windows: list[dict[str, Any]] = field(default_factory=list, init=False)
    live: Attempt | None = field(default=None, init=False)
    result: dict[str, Any] | None = field(default=None, init=False)
    began: float = field(default_factory=time.monotonic, init=False)
    seconds_before: float = field(default=0.0, init=False)

    def seconds(self) -> float:
        """The run's time so far, with that of the processes before it was resumed."""
        return self.seconds_before + time.monotonic() - self.began

    def committed(self) -> Schedule:
        """The controls of the steps so far, at least one, as the tape has them."""
        plan = self.schedule
        return Schedule(of_tape(self.tape, plan.names, "the tape"), 0, plan.seed)


@dataclass(frozen=True)
class Moment:
    """A state that can be restored: the plant's, and the average of the iterates."""

    snapshot: Snapshot
    average: Average


@dataclass
class Window:
    """Steps [start, stop) that are gone through until they are good, and committed up to `commit`.

    before: the moment at its beginning; None where nothing is rewritten. differentiated: whether
    its roll has a hypergradient. shift: the step at which its data change; cut: whether it was made
    to end there. terminal: the terminal loss, once it is drawn (`rhc.loop.window_objective`).
    """

    start: int
    stop: int
    commit: int
    before: Moment | None
    differentiated: bool = False
    shift: int | None = None
    cut: bool = False
    terminal: Any = None


@dataclass
class Attempt:
    """One way through a window: its schedule, what it saw, and how it was judged.

    first_outcome: how the hypergradient ended, before any remedy. value: J. rewrites: how many led
    from the roll to here; scale: how far the next may go; last_gain, gain: the share by which J
    fell by the last of them, and by all. guarded: whether a finite loss that is far too high is a
    failure. plain: whether it went by the plain loop's own kernels. inside, end: the moments at the
    step that is committed to, and at its end, where they are kept.
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
    trajectory: Trajectory | None = field(default=None, init=False)
    hypergradient: Hypergradient | None = field(default=None, init=False)
    first_outcome: Outcome | None = field(default=None, init=False)
    value: float = field(default=math.nan, init=False)
    failure: str | None = field(default=None, init=False)
    out_of_memory: bool = field(default=False, init=False)
    inside: Moment | None = field(default=None, init=False)
    end: Moment | None = field(default=None, init=False)

    def again(self, **changes: Any) -> Attempt:
        """A way through the same window that is still to be gone, with these changes."""
        return replace(self, **changes)

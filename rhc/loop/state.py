"""Where the loop stands: the record of everything that changes from window to window.

A window is gone through in `Attempt`s, and between them the loop goes back to the `Moment` at its
beginning. Nothing here acts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rhc.hypergradient import Hypergradient, Outcome, ReversePass
from rhc.loop.update_rule import History, Proposal, Shift, Twin
from rhc.schedule import Schedule
from rhc.schedule.planned import PlannedSchedule, of_tape
from rhc.training.batches import StepBatches
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
class Loop:
    """Where the loop stands: everything that changes from window to window, but for the plant.

    schedule: what is planned from `step` on. reference: (mean loss of the last committed
    window, first loss of the run). average: of all committed iterates. correction: what the plan of
    the steps to come is moved by, in raw coordinates. history: what windows asked for, for the
    rewrite's rule. in_vain: looks back in a row that were not worth it; passed_over: windows still
    to be passed over; alert: after a surprise, until looking back is no longer worth it; regime:
    the step from which the data are as they are. delta, upwards: of `Twin`. finished: the result.
    relief: what memory did not suffice for; checked: whether a step was taken again, seen: its
    first loss and gradient; deviation: how it differed.
    first_lr: () or (G,), that the template begins with. live: the attempt whose end the plant
    stands at. reverse_pass: what looks back at windows, where they are rewritten.
    """

    steps: int
    schedule: PlannedSchedule
    train: StepBatches
    validation: StepBatches | None = None
    step: int = 0
    reference: tuple[float, float] | None = None
    cost: Cost = field(default_factory=Cost)
    start_gradients: float = 0.0
    average: Average = field(default_factory=lambda: Average(AVERAGE_DECAY))
    correction: dict[str, Shift] = field(default_factory=dict)
    history: History = field(default_factory=dict)
    in_vain: int = 0
    passed_over: int = 0
    alert: bool = False
    regime: int = 0
    delta: float = Twin.first
    upwards: bool | None = None
    tape: list[dict[str, Any]] = field(default_factory=list)
    windows: list[dict[str, Any]] = field(default_factory=list)
    finished: dict[str, Any] | None = None
    relief: OomFallback = field(default_factory=OomFallback)
    checked: bool = False
    seen: tuple[int, Tensor] | None = None
    deviation: Deviation | None = None
    first_lr: Tensor = field(default_factory=lambda: torch.tensor(0.0))
    live: Attempt | None = None
    reverse_pass: ReversePass | None = None
    began: float = field(default_factory=time.monotonic)
    seconds_before: float = 0.0

    def seconds(self) -> float:
        """That the run has taken so far, with those before it was resumed."""
        return self.seconds_before + time.monotonic() - self.began

    def committed(self) -> Schedule:
        """The controls of the steps so far, at least one, as the tape has them."""
        plan = self.schedule
        return Schedule(of_tape(self.tape, plan.names, "the tape"), 0, plan.seed)


@dataclass(frozen=True)
class Moment:
    """A state of the loop that can be gone back to: the plant's, and the average of iterates."""

    snapshot: Snapshot
    average: Average


@dataclass(frozen=True)
class Window:
    """Steps [start, stop) that are gone through until they are good, and committed up to `commit`.

    before: the moment at its beginning.
    """

    start: int
    stop: int
    commit: int
    before: Moment


@dataclass
class Attempt:
    """One way through a window: its schedule, what it saw, and how it was judged.

    first_look: how the hypergradient ended, before any remedy. gain: the share by which J fell from
    the roll to here. guarded: whether a loss that is finite but far too high is a failure.
    starved: whether memory did not suffice.
    plain: whether it went by the plain loop's own kernels. end: the moment at its end, if kept.
    """

    number: int
    schedule: Schedule
    batches: Iterable[Any]
    proposal: Proposal | None = None
    trajectory: Trajectory | None = None
    hypergradient: Hypergradient | None = None
    first_look: Outcome | None = None
    value: float = math.nan
    gain: float = 0.0
    guarded: bool = True
    plain: bool = True
    failure: str | None = None
    starved: bool = False
    inside: Moment | None = None
    end: Moment | None = None
    samples: Mapping[str, Tensor] = field(default_factory=dict)

    def emptied(self) -> Attempt:
        """The same way through the same window, not yet gone."""
        return replace(
            self,
            trajectory=None,
            hypergradient=None,
            first_look=None,
            value=math.nan,
            failure=None,
            starved=False,
            inside=None,
            end=None,
            samples={},
        )

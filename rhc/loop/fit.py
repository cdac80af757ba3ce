"""What the functions of the loop share during one fit."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from rhc.errors import RunWarning
from rhc.events import Event, Listener, Notice, Verb, VerbStarted
from rhc.hypergradient import Damping, Product, ReversePass
from rhc.loop.base_schedule import BaseSchedule
from rhc.loop.state import Moment, State
from rhc.loop.update_rule import Rewrite
from rhc.schedulers import EpochPlanner
from rhc.storage.run_directory import RunDirectory
from rhc.training import interrupts
from rhc.training.batches import StepBatches
from rhc.training.objective import Objective
from rhc.training.plant import Plant
from rhc.training.recovery import OomFallback


@dataclass(frozen=True)
class EventLog:
    """Sends events to the listeners. warns: whether `tell` warns without any (one rank does).
    told: what `tell` has said of the run, in order."""

    listeners: Sequence[Listener]
    warns: bool = True
    told: list[str] = field(default_factory=list)

    def emit(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)

    def notice(self, message: str) -> None:
        self.emit(Notice(message))

    def tell(self, message: str, *, mild: bool = False) -> None:
        """A notice, once a run, that the result repeats; a warning where there are no listeners,
        unless it is `mild`."""
        if message in self.told:
            return
        self.told.append(message)
        if self.warns and not mild and not self.listeners:
            warnings.warn(message, RunWarning, stacklevel=2)
        self.notice(message)

    def warn(self, message: str) -> None:
        """A notice and a warning, about what is given now."""
        self.notice(message)
        warnings.warn(message, RunWarning, stacklevel=2)


@dataclass(frozen=True)
class ReversePasses:
    """The settings of a run's reverse passes."""

    plant: Plant
    objective: Objective
    controls: tuple[str, ...]
    segment: int | Literal["auto"]
    product: Product | Literal["auto"]
    memory_budget: int | None
    spill: bool | str | Path
    damping: Damping
    events: EventLog

    def make(self, fallback: OomFallback, state: Mapping[str, Any] | None = None) -> ReversePass:
        """A reverse pass under the fallback's memory limits. state: of its predecessor."""
        made = ReversePass(
            self.plant,
            self.objective,
            self.controls,
            segment=self.segment if fallback.memory_budget is None else "auto",
            product=cast(Product | None, fallback.product) or self.product,
            memory_budget=fallback.memory_budget or self.memory_budget,
            spill=self.spill,
            damping=self.damping,
            verified=True,
            notice=self.events.tell,
        )
        if state is not None:
            made.load_state(state)
        return made


@dataclass(frozen=True)
class Data:
    """Loaders of a run, and their streams. validate_every: None for no validation before the end.
    keep_best: whether the run ends with the best state.
    validation: None where training batches judge windows."""

    train_loader: Iterable[Any]
    val_loader: Iterable[Any] | None
    test_loader: Iterable[Any] | None
    accumulate: int
    validate_every: int | None
    epoch_steps: int
    validation_asked: bool
    keep_best: bool
    train: StepBatches
    validation: StepBatches | None


@dataclass(frozen=True)
class Fit:
    """What stays constant during a fit, and its `state`, plant and streams, which change. passes:
    rewrites of the whole run, at most; whole_run: settings of their reverse passes."""

    plant: Plant
    state: State
    rule: Rewrite
    objective: Objective
    base: BaseSchedule
    window: int
    stride: int
    data: Data
    reverse_passes: ReversePasses | None
    planner: EpochPlanner | None
    directory: RunDirectory | None
    events: EventLog
    inexact_replay: bool
    passes: int
    whole_run: ReversePasses | None

    @property
    def controls(self) -> tuple[str, ...]:
        """Those that windows rewrite."""
        return () if self.reverse_passes is None else self.reverse_passes.controls

    @property
    def rewrites(self) -> bool:
        """Whether windows are rewritten, and so may be rolled again."""
        return self.reverse_passes is not None

    @property
    def may_rewrite(self) -> bool:
        """Whether they may be, as the first one was seen to replay, or need not."""
        replay = self.state.replay
        return self.rewrites and replay is not None and (replay.equal or self.inexact_replay)

    def announce(self, verb: Verb, start: int, stop: int, attempt: int) -> None:
        """Emits the next verb. Raises what a signal asked for, unless a window is to be saved."""
        if verb not in ("commit", "slide"):
            self.check_stop()
        self.events.emit(VerbStarted(verb, self.state.cost.windows, start, stop, attempt))

    def check_stop(self) -> None:
        """Raises what a signal asked for. Ranks stop together, after a window."""
        if self.plant.ranks is None:
            interrupts.check()

    def here(self) -> Moment:
        return Moment(self.plant.snapshot(), self.state.average.copy())

    def go_back(self, moment: Moment) -> None:
        self.state.live = None
        self.plant.restore(moment.snapshot)
        self.state.average.assign(moment.average)

"""Events of the loop, for displays and loggers; listeners never influence a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

Verb = Literal["roll", "rewrite", "restore", "replay", "commit", "slide"]
VERBS: tuple[Verb, ...] = get_args(Verb)


@dataclass(frozen=True)
class RunStarted:
    """A fit begins at step `start` of `steps`, or resumes if start > 0."""

    start: int
    steps: int
    window: int
    stride: int
    controls: tuple[str, ...]
    rewriting: bool
    directory: Path | None
    rule: Mapping[str, Any] = field(default_factory=dict)
    """The update rule, as in config.json."""


@dataclass(frozen=True)
class StartTried:
    """A probe of the lr search, or the hypergradient at lr 0; `record`: its line in start.jsonl."""

    record: Mapping[str, Any]


@dataclass(frozen=True)
class StartFound:
    """The first `lr`, a number or one per group, in place of `given`; cost in baseline runs.
    chosen: how it was found, as `chosen_start` in result.json."""

    start: str
    lr: Any
    given: Any
    cost: float
    chosen: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class VerbStarted:
    """One of the six verbs begins on the window [start, stop)."""

    verb: Verb
    window: int
    start: int
    stop: int
    attempt: int


@dataclass(frozen=True)
class StepTaken:
    """An uncommitted step of a roll or replay; controls are numbers, or tuples per group."""

    step: int
    loss: float | None
    controls: Mapping[str, Any]


@dataclass(frozen=True)
class WindowAttempted:
    """An attempt at a window ended; `record` is its line in windows.jsonl."""

    record: Mapping[str, Any]


@dataclass(frozen=True)
class Committed:
    """Steps [start, stop) are final; rows: lines of the tape; cost: projected for the whole run.
    skipped: why the window was not looked at, where it was not, as in result.json."""

    start: int
    stop: int
    rows: list[dict[str, Any]]
    plain_run_equivalents: float
    skipped: str | None = None


@dataclass(frozen=True)
class CheckpointSaved:
    step: int
    path: Path


@dataclass(frozen=True)
class Intervened:
    """A guard or a drift changed the plan. kind: "drift", "failsafe", "re-armed", "not finite" …"""

    step: int
    epoch: int
    kind: str
    reason: str


@dataclass(frozen=True)
class EpochPlanned:
    """Epoch `epoch` ended before step `step`: its statistics, and the next plan."""

    step: int
    epoch: int
    stats: Mapping[str, Any]
    plan: Mapping[str, Any]


@dataclass(frozen=True)
class Notice:
    """Something that the user should know."""

    message: str


@dataclass(frozen=True)
class RunEnded:
    """The fit is over; `result` is the content of result.json."""

    result: Mapping[str, Any]


Event = (
    RunStarted
    | StartTried
    | StartFound
    | VerbStarted
    | StepTaken
    | WindowAttempted
    | Committed
    | CheckpointSaved
    | Intervened
    | EpochPlanned
    | Notice
    | RunEnded
)
Listener = Callable[[Event], None]

"""What the loop tells its listeners: displays, loggers, tests. Listeners decide nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

Verb = Literal["roll", "rewrite", "restore", "replay", "commit", "slide"]
VERBS: tuple[Verb, ...] = get_args(Verb)


@dataclass(frozen=True)
class RunStarted:
    """A fit begins, at step `start` (not 0: resumed) of `steps`."""

    start: int
    steps: int
    window: int
    stride: int
    controls: tuple[str, ...]
    rewriting: bool
    directory: Path | None


@dataclass(frozen=True)
class StartTried:
    """A probe of where to start, or the hypergradient at lr 0; `record` is its line in
    start.jsonl."""

    record: Mapping[str, Any]


@dataclass(frozen=True)
class StartFound:
    """Where the schedule starts: `lr`, a number or one per parameter group, in place of `given`.

    cost: in plain runs.
    """

    start: str
    lr: Any
    given: Any
    cost: float


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
    """An optimizer step was taken while rolling or replaying; not yet committed.

    controls: a number each, or a tuple of one per parameter group.
    """

    step: int
    loss: float | None
    controls: Mapping[str, Any]


@dataclass(frozen=True)
class WindowAttempted:
    """An attempt at a window ended; `record` is its line in windows.jsonl."""

    record: Mapping[str, Any]


@dataclass(frozen=True)
class Committed:
    """Steps [start, stop) are final; `rows` are their lines in tape.jsonl.

    plain_run_equivalents: the cost of the whole run, if the rest is as dear as what was so far.
    """

    start: int
    stop: int
    rows: list[dict[str, Any]]
    plain_run_equivalents: float


@dataclass(frozen=True)
class CheckpointSaved:
    """A checkpoint was written."""

    step: int
    path: Path


@dataclass(frozen=True)
class Intervened:
    """A guard of the epoch planner, or a drift of the data, changed the plan beyond its laws.

    kind: "drift", "failsafe", "re-armed", "not finite", …; reason: a sentence.
    """

    step: int
    epoch: int
    kind: str
    reason: str


@dataclass(frozen=True)
class EpochPlanned:
    """Epoch `epoch` ended before step `step`: its statistics, and the plan of the next one."""

    step: int
    epoch: int
    stats: Mapping[str, Any]
    plan: Mapping[str, Any]


@dataclass(frozen=True)
class Notice:
    """Something a person should know."""

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

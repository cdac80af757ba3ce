"""Progress of a run, live on a terminal or as plain lines.

Steps take a few milliseconds: each only stores a reference, and drawing takes at most 2 % of time.
"""

from __future__ import annotations

import errno
import math
import re
import shlex
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from rhc.errors import plain
from rhc.events import (
    VERBS,
    CheckpointSaved,
    Committed,
    Event,
    Notice,
    RunEnded,
    RunStarted,
    StartFound,
    StartTried,
    StepTaken,
    VerbStarted,
    WindowAttempted,
)
from rhc.report import why
from rhc.report.records import CONTROLS, Tally, decisive, entry, one_number
from rhc.storage.jsonl import read_lines

DRAWING = 0.01
"""Mean share of time spent drawing, and half the maximum; a frame takes 3 to 5 ms."""
REFRESHES = 8.0
"""Maximum per second."""
ATTEMPTS_SHOWN = 4
PANEL = (56, 9)
"""Columns and rows below which the display has no frame."""
_OUTCOME_STYLE = {"accepted": "green", "rejected": "yellow", "rewound": "red"}
_JUDGED = ("accepted", "rejected")
"""Outcomes of replayed attempts."""


@dataclass
class Progress:
    """The state of a run according to its events."""

    name: str
    clock: Callable[[], float] = time.monotonic
    steps: int = 0
    start: int = 0
    window: int = 0
    controls: tuple[str, ...] = ()
    rewriting: bool = True
    directory: Path | None = None
    began: float = 0.0
    committed: int = 0
    saved: int = 0
    cost: float | None = None
    """In baseline runs; None if unknown."""
    verb: VerbStarted | None = None
    step: StepTaken | None = None
    losses: list[float] = field(default_factory=list)
    """Mean training loss of every committed window."""
    attempts: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=ATTEMPTS_SHOWN))
    tally: Tally = field(default_factory=Tally)
    why: str = ""
    """The sentence of the newest decision."""
    rule: Mapping[str, Any] = field(default_factory=dict)
    """The update rule, as in config.json."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The newest line of the tape."""
    started: bool = False
    tried: deque[Mapping[str, Any]] = field(default_factory=lambda: deque(maxlen=ATTEMPTS_SHOWN))
    """The newest rolls of the lr search; empty after it."""
    result: Mapping[str, Any] | None = None
    _skipped: str | None = None
    """Why the newest window was not looked at."""

    def observe(self, event: Event) -> None:
        match event:
            case StepTaken():
                self.step = event
            case StartTried(record):
                self.tried.append(record)
            case StartFound():
                self.tried.clear()
                self.began = self.clock()
            case VerbStarted():
                self.verb = event
                if event.verb in ("roll", "replay"):
                    self.step = None
            case WindowAttempted(record):
                self.attempts.append(record)
                self.tally.add(record)
                self.why = why.attempt(record)
            case Committed():
                self.tried.clear()
                self.committed = event.stop
                if math.isfinite(event.plain_run_equivalents):
                    self.cost = event.plain_run_equivalents
                self.row = event.rows[-1]
                self.losses.append(sum(row["loss"] for row in event.rows) / len(event.rows))
                if event.skipped is not None and self._skipped != event.skipped:
                    self.why = why.skipped(event.skipped, event.start, event.stop, self.rule)
                self._skipped = event.skipped
            case CheckpointSaved():
                self.saved = event.step
            case RunStarted():
                self.started = True
                self.start = self.committed = self.saved = event.start
                self.steps, self.window, self.controls = event.steps, event.window, event.controls
                self.rewriting, self.directory = event.rewriting, event.directory
                self.rule = event.rule
                self.began = self.clock()
                if event.start and event.directory is not None:
                    # The counts include windows before a resume.
                    for line in read_lines(event.directory / "windows.jsonl"):
                        if line.row is not None:
                            self.tally.add(line.row)
            case RunEnded(result):
                self.result = result
                self.cost = entry(result, "cost", "plain_run_equivalents") or self.cost

    def of_window(self, start: int) -> Mapping[str, Any] | None:
        """Its decisive attempt, with J before the first."""
        attempts = self.tally.of_newest
        if not attempts or attempts[-1]["start"] != start:
            return None
        found = decisive(attempts)
        if found["outcome"] != "accepted":
            return found
        first = next(record for record in attempts if record["outcome"] != "rewound")
        return {**found, "objective_before": first["objective_before"]}

    @property
    def seconds_left(self) -> float | None:
        """At the pace of this fit; None before its first commit."""
        done = self.committed - self.start
        if done <= 0:
            return None
        return (self.clock() - self.began) / done * (self.steps - self.committed)

    @property
    def values(self) -> Mapping[str, Any]:
        """The controls in use, or those of the newest committed step."""
        return self.row if self.step is None else self.step.controls


class Screen(Console):
    """A console without markup and emoji, since paths and messages contain brackets and colons. A
    closed pipe raises BrokenPipeError: rich would exit with 1, the status of a diverged run."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(markup=False, emoji=False, **settings)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """rich's segments, with control codes in the text escaped."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else plain(text), style, control)

    def out(self, *objects: Any, **options: Any) -> None:
        super().out(*(plain(str(each)) for each in objects), **options)

    def say(self, text: str) -> None:
        """Prints a line without colours, unwrapped in a pipe."""
        self.print(text, highlight=False, soft_wrap=True)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError(errno.EPIPE, "nobody reads the output")

    @property
    def animated(self) -> bool:
        """Whether the terminal can redraw."""
        return self.is_terminal and not self.is_dumb_terminal

    def waiting(self, what: str) -> AbstractContextManager[Any]:
        """Shows `what` until the context ends; nothing outside a terminal."""
        return self.status(Text(what, style="dim")) if self.animated else nullcontext()


class PlainLines(AbstractContextManager["PlainLines"]):
    """A listener that writes one line per committed window: for logs and pipes."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self.progress = progress
        self.console = console
        self.told = ""
        # On a small screen lines that fit matter more than columns.
        self.small = console.is_terminal and console.width < 100

    def __call__(self, event: Event) -> None:
        self.progress.observe(event)
        match event:
            case RunStarted():
                for line in heading(self.progress):
                    self.write(line)
            case StartTried(record):
                self.write(f"start  {tried(record)}")
            case StartFound():
                self.write(f"start  {found(event)}")
            case WindowAttempted(record) if record["outcome"] not in _JUDGED:
                what = f"{record['outcome']}: {record['reason']}"
                self.write(f"{self._place(record['stop'])}  {what}")
            case Committed():
                self.write(self._line(event))
                self._explain(event)
            case Notice(message):
                self.write(f"notice: {message}")

    def _explain(self, event: Committed) -> None:
        """Writes why the window was rewritten or left alone, once for each reason to skip."""
        record = self.progress.of_window(event.start)
        if record is not None and record["outcome"] in _JUDGED:
            self.write(f"why    {why.attempt(record)}")
        elif event.skipped is not None and self.told != self.progress.why:
            self.told = self.progress.why
            self.write(f"why    {self.told}")

    def write(self, text: str) -> None:
        self.console.out(re.sub(" {2,}", " ", text) if self.small else text, highlight=False)

    def draw(self) -> None:
        """Does nothing: lines are not redrawn."""

    def __exit__(self, *error: object) -> None:
        return None

    def _place(self, step: int) -> str:
        width = len(str(self.progress.steps))
        return f"step {step:>{width}}/{self.progress.steps}"

    def _line(self, event: Committed) -> str:
        progress = self.progress
        parts = [self._place(event.stop), f"loss {progress.losses[-1]:<9.4g}"]
        lr = one_number(event.rows[-1].get("lr"))
        if lr is not None:
            parts.append(f"lr {lr:<9.3g}")
        if "plan" in (planning := event.rows[-1].get("planning", {})):
            plan = planning["plan"].items()
            parts.append(f"planned {', '.join(f'{n} {v:.3g}' for n, v in plan if n != 'mode')}")
        record = progress.of_window(event.start)
        if record is not None:
            judged = record["outcome"] != "rewound"
            parts.append(
                f"J {change(record, '->'):<22} {record['outcome']}" if judged else "rewound"
            )
        if progress.rewriting and progress.cost is not None:
            parts.append(f"cost {progress.cost:.1f}x")
        return "  ".join([*parts, f"eta {duration(progress.seconds_left)}"])


class LiveDisplay(AbstractContextManager["LiveDisplay"]):
    """A listener that redraws a frame on a terminal."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self.progress = progress
        self.console = console
        self.live = self._fresh()
        self.drawn = -math.inf
        self.width = console.width
        self.pause = 1 / REFRESHES

    def __call__(self, event: Event) -> None:
        progress = self.progress
        progress.observe(event)
        match event:
            case StepTaken():
                # Draws the end of a roll, since the reverse pass may take long.
                end = progress.verb is not None and event.step + 1 == progress.verb.stop
                if progress.clock() - self.drawn > (self.pause / 2 if end else self.pause):
                    self.draw()
            case RunStarted():
                self._head()
                self.live.start()
            case StartFound():
                self.write(f"start: {found(event)}")
            case Notice(message):
                self.write(f"notice: {message}")
            case StartTried() | RunEnded():
                self.draw()

    def write(self, text: str) -> None:
        """Writes a line above the frame."""
        self.console.print(Text(text))

    def draw(self) -> None:
        if self.live.is_started:
            began = self.progress.clock()
            if self.console.width != self.width:
                # The terminal rewrapped the frame, so its position is unknown.
                self.width = self.console.width
                self.live.stop()
                self.console.clear()
                self._head()
                self.live = self._fresh()
                self.live.start()
            self.live.refresh()
            self.drawn = self.progress.clock()
            self.pause = max(1 / REFRESHES, (self.drawn - began) / DRAWING)

    def _fresh(self) -> Live:
        # A refreshing thread would compete with the training for the GIL.
        return Live(
            console=self.console,
            auto_refresh=False,
            get_renderable=lambda: frame(self.progress, self.console.width, self.console.height),
        )

    def _head(self) -> None:
        for line in heading(self.progress):
            self.console.print(Text(line, style="dim"))

    def __exit__(self, *error: object) -> None:
        if self.live.is_started:
            self.live.stop()


def display(progress: Progress, console: Console) -> PlainLines | LiveDisplay:
    """The listener for this console, as a context manager."""
    animated = console.is_terminal and not console.is_dumb_terminal
    return LiveDisplay(progress, console) if animated else PlainLines(progress, console)


def heading(progress: Progress) -> list[str]:
    """What begins or resumes, and how to stop it: one or two lines."""
    what = f"rewriting {', '.join(progress.controls)}" if progress.rewriting else "not rewriting"
    where = f", from step {progress.start}" if progress.start else ""
    lines = [f"{progress.name}: {progress.steps} steps{where}, window {progress.window}, {what}"]
    if progress.directory is not None:
        directory = shlex.quote(str(progress.directory))
        lines.append(f"Ctrl-C stops, rhc resume {directory} continues")
    return lines


# The frame ----------------------------------------------------------------------------------------


def frame(progress: Progress, width: int, height: int = 24) -> RenderableType:
    """The display for a screen of `width` columns and `height` rows."""
    if width < PANEL[0] or height < PANEL[1]:
        return _small(progress, height)
    parts: list[RenderableType] = [_bars(progress)]
    if progress.tried:
        parts.append(_line("\n  ".join(["looking for a start", *map(tried, progress.tried)])))
    else:
        if progress.result is None and progress.verb is not None:
            parts.append(_verbs(progress.verb.verb))
        parts += [_controls(progress), _loss(progress)]
        # Eight lines without attempts, and one for the prompt.
        shown = list(progress.attempts)[-max(height - 9, 0) :] if height > 9 else []
        if shown:
            parts.append(_attempts(shown))
        parts.append(_counters(progress))
        if progress.why and height > PANEL[1] + 7:
            parts.append(Text(progress.why, "dim"))
    return Panel(
        Group(*parts),
        title=Text(progress.name, style="bold"),
        title_align="left",
        border_style="dim",
        # Leaves space for the terminal's ^C, which would scroll the frame.
        width=min(width - 3, 92),
    )


def _small(progress: Progress, height: int) -> RenderableType:
    """The display for a small screen: the most important lines that fit."""
    head = _line(f"{progress.name} {progress.committed}/{progress.steps}", "bold")
    lines = [head]
    if progress.tried:
        lines += [_line("looking for a start"), _line(tried(progress.tried[-1]))]
    else:
        if left := _left(progress):
            head.append(f"  {left}", style="not bold")
        lines.append(_loss(progress))
        if progress.verb is not None and progress.result is None:
            verb = progress.verb
            lines.append(_line(f"{verb.verb} {verb.start}–{verb.stop}"))
        lines.append(_controls(progress))
        if progress.attempts:
            lines.append(_attempts(list(progress.attempts)[-1:]))
        lines.append(_counters(progress))
    return Group(*lines[: max(1, height - 1)])


def _line(text: str = "", style: str = "") -> Text:
    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _left(progress: Progress) -> str:
    if progress.result is not None:
        return "done"
    seconds = progress.seconds_left
    return "" if seconds is None else f"{duration(seconds)} left"


def _bars(progress: Progress) -> RenderableType:
    grid = Table.grid(expand=True, padding=(0, 2, 0, 0))
    grid.add_column(style="dim")
    grid.add_column(ratio=1)
    for _ in range(2):
        grid.add_column(no_wrap=True)
    done, steps = progress.committed, progress.steps
    grid.add_row("run", _bar(done, steps), f"{done}/{steps}", _left(progress))
    verb, step = progress.verb, progress.step
    if verb is None or progress.result is not None:
        return grid
    size = verb.stop - verb.start
    rolling = verb.verb in ("roll", "replay")
    taken = (0 if rolling else size) if step is None else step.step - verb.start + 1
    looking_back = verb.verb == "roll" and taken == size and progress.rewriting
    state = "reverse pass" if looking_back else f"{taken}/{size}"
    if verb.attempt:
        state += f", try {verb.attempt}"
    grid.add_row("window", _bar(taken, size), f"{verb.start}–{verb.stop}", state)
    return grid


def _bar(completed: float, total: float) -> RenderableType:
    return ProgressBar(total=max(total, 1), completed=completed, finished_style="green")


def _joined(parts: Iterable[Text], gap: str = "  ") -> Text:
    text = Text(gap).join(parts)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def _verbs(now: str) -> Text:
    return _joined(Text(verb, "bold reverse" if verb == now else "dim") for verb in VERBS)


def _controls(progress: Progress) -> Text:
    values = {name: one_number(progress.values.get(name)) for name in CONTROLS}
    shown = (
        Text.assemble((f"{name} ", "dim"), f"{value:.3g}")
        for name, value in values.items()
        if value is not None and (value or name in progress.controls)
    )
    return _joined(shown, "   ")


def _loss(progress: Progress) -> Text:
    text = _line("train loss ", "dim")
    if not progress.losses:
        if progress.step is not None and progress.step.loss is not None:
            text.append(f"{progress.step.loss:.4g}", style="not dim")
        return text
    newest = progress.losses[-1]
    text.append(f"{newest:.4g}", style="not dim")
    if len(progress.losses) > 1 and (before := progress.losses[-2]) > 0:
        ratio = newest / before - 1
        text.append(f"  {ratio:+.0%}", style="green" if ratio <= 0 else "yellow")
        text.append("  " + sparkline(progress.losses[-24:]), style="not dim cyan")
    return text


def _attempts(records: Sequence[Mapping[str, Any]]) -> Text:
    """One attempt a line; not a table, whose layout takes 2 ms."""
    text = _line()
    places = [f"{record['start']}–{record['stop']}" for record in records]
    changes = [
        "" if record["outcome"] == "rewound" else f"J {change(record, '→')}" for record in records
    ]
    for record, place, moved in zip(records, places, changes, strict=True):
        outcome = record["outcome"]
        text.append("\n" if text else "")
        text.append(f"{place:<{max(map(len, places))}}  ", style="dim")
        text.append(f"{moved:<{max(map(len, changes))}}  ")
        text.append(outcome, style=_OUTCOME_STYLE.get(outcome, ""))
    return text


def _counters(progress: Progress) -> Text:
    counts = progress.tally.counts.items() if progress.rewriting else ()
    parts = [
        Text.assemble((f"{outcome} ", "dim"), (f"{n}", _OUTCOME_STYLE[outcome] if n else "dim"))
        for outcome, n in counts
    ]
    if progress.cost is not None:
        parts.append(Text.assemble(("cost ", "dim"), f"{progress.cost:.2f}x plain"))
    return _joined(parts)


# Words and numbers --------------------------------------------------------------------------------


def change(record: Mapping[str, Any], arrow: str) -> str:
    """`0.2107 -> 0.1890`: J before and after an attempt."""
    before, after = record["objective_before"], record["objective_after"]
    return f"{_number(before)} {arrow} {_number(after)}"


def tried(record: Mapping[str, Any]) -> str:
    if record["kind"] == "zero":
        lr = "no lr lowers J" if record["lr"] is None else f"lr {one_number(record['lr']):.3g}"
        return f"{record['steps']} steps at lr 0, J {_number(record['objective'])}: {lr}"
    loss = "diverges" if record["loss"] is None else f"loss {record['loss']:.4g}"
    if record["kind"] == "untrained":
        return f"untrained: {loss}"
    return f"{record['steps']} steps at lr {one_number(record['from']):.3g}: {loss}"


def found(event: StartFound) -> str:
    """Where the run starts, why, and how to keep the given lr."""
    words = why.start(event.chosen) if event.chosen else f"lr {why.lr_words(event.lr)}"
    return f"{words}; found for {event.cost:.2f} plain runs"


def duration(seconds: float | None) -> str:
    """`12s`, `3m20s`, `1h05m`; `?` if unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def sparkline(values: list[float]) -> str:
    """Positive values on a logarithmic scale, one character each."""
    logs = [math.log(v) if v > 0 and math.isfinite(v) else None for v in values]
    known = [v for v in logs if v is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join(" " if v is None else "▁▂▃▄▅▆▇█"[round((v - low) * scale)] for v in logs)


def _number(value: float | None) -> str:
    return "?" if value is None or not math.isfinite(value) else f"{value:.4g}"

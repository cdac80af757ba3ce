"""Callbacks of a Runner, and its display in a terminal or a notebook: listeners of its events."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from rhc.errors import InputError
from rhc.events import Committed, Event, Listener, RunEnded, RunStarted, WindowAttempted
from rhc.report import why
from rhc.report.live import LiveDisplay, PlainLines, Progress, Screen, display, duration

HOOKS = ("on_start", "on_step", "on_window", "on_validate", "on_end")


class Callback:
    """What a Runner tells while it trains; override what is needed. An object of any class with
    some of these methods will do. What they are given is a copy of what is committed: nothing that
    they do to it changes the run, and steps that were rolled back are not told."""

    def on_start(self, run: RunStarted) -> None:
        """A fit begins, or resumes at step `run.start` of `run.steps`."""

    def on_step(self, row: Mapping[str, Any]) -> None:
        """A committed step, as on the tape: `step`, `loss`, `gradient_norm`, controls, metrics."""

    def on_window(self, window: Mapping[str, Any]) -> None:
        """A committed window: `start`, `stop`, `outcome`, `why` (a sentence), `attempts` (lines of
        windows.jsonl)."""

    def on_validate(self, row: Mapping[str, Any]) -> None:
        """A step with `val_loss` and validation metrics, every `validate_every` steps."""

    def on_end(self, result: Mapping[str, Any]) -> None:
        """The fit is over; the content of result.json."""


class Told:
    """The listener that calls a callback."""

    def __init__(self, callback: Any) -> None:
        self.hooks = {name: getattr(callback, name, None) for name in HOOKS}
        if not any(map(callable, self.hooks.values())):
            raise InputError(
                f"callbacks must have one of {', '.join(HOOKS)}, and {callback!r} has none"
            )
        self.progress = Progress("")

    def __call__(self, event: Event) -> None:
        self.progress.observe(event)
        match event:
            case RunStarted():
                self._call("on_start", event)
            case Committed():
                for row in event.rows:
                    self._call("on_step", dict(row))
                    if "val_loss" in row:
                        self._call("on_validate", dict(row))
                self._call("on_window", self._window(event))
            case RunEnded():
                self._call("on_end", dict(event.result))

    def _call(self, name: str, told: Any) -> None:
        hook = self.hooks[name]
        if callable(hook):
            hook(told)

    def _window(self, event: Committed) -> dict[str, Any]:
        record = self.progress.of_window(event.start)
        words = {"start": event.start, "stop": event.stop, "outcome": "not looked at", "why": ""}
        if record is not None:
            attempts = [dict(each) for each in self.progress.tally.of_newest]
            return words | {"outcome": record["outcome"], "why": why.attempt(record),
                            "attempts": attempts}  # fmt: skip
        if event.skipped is not None:
            rule = self.progress.rule
            words["why"] = why.skipped(event.skipped, event.start, event.stop, rule)
        return words | {"attempts": []}


class Shown:
    """A run's progress: a live display in a terminal, a bar in a notebook, lines elsewhere."""

    def __init__(self) -> None:
        self.shown: PlainLines | LiveDisplay | _Bar | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.close()
            name = "run" if event.directory is None else event.directory.name
            progress = Progress(name)
            self.shown = _Bar(progress) if in_notebook() else display(progress, Screen())
        if self.shown is not None:
            self.shown(event)
            if isinstance(event, RunEnded):
                self.close()

    def close(self) -> None:
        if isinstance(self.shown, LiveDisplay):
            self.shown.__exit__()
        self.shown = None


class _Bar:
    """A notebook's display, in the place of the last one."""

    def __init__(self, progress: Progress) -> None:
        from IPython.display import HTML, display

        self.progress, self.html = progress, HTML
        self.handle = display(HTML(""), display_id=True)

    def __call__(self, event: Event) -> None:
        self.progress.observe(event)
        if isinstance(event, (Committed, WindowAttempted, RunEnded)) and self.handle is not None:
            self.handle.update(self.html(self.markup()))

    def markup(self) -> str:
        progress = self.progress
        loss = f", loss {progress.losses[-1]:.4g}" if progress.losses else ""
        left = "" if progress.result else f", {duration(progress.seconds_left)} left"
        return (
            f"<progress max={progress.steps} value={progress.committed}></progress> "
            f"{progress.committed}/{progress.steps}{loss}{left}<br><small>{progress.why}</small>"
        )


def in_notebook() -> bool:
    with suppress(Exception):
        shell = sys.modules["IPython"].get_ipython()
        return type(shell).__name__ == "ZMQInteractiveShell"
    return False


def listening(
    listeners: Sequence[Listener], callbacks: Sequence[Any], progress: bool | None
) -> list[Listener]:
    """The listeners of a Runner. progress: None for a display where a person would see it: in a
    terminal or a notebook, unless listeners are given, which may be one."""
    if not isinstance(callbacks, (list, tuple)):
        raise InputError(f"callbacks must be a list, got {type(callbacks).__name__}; give [it]")
    seen = sys.stdout is not None and sys.stdout.isatty()
    shows = (seen or in_notebook()) and not listeners if progress is None else progress
    return [*listeners, *([Shown()] if shows else []), *map(Told, callbacks)]

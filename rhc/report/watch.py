"""Another process's run as events, from its files."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from rhc.events import Committed, Event, RunEnded, RunStarted, StartTried, WindowAttempted
from rhc.report.live import Progress, display, tried
from rhc.report.records import RunRecord
from rhc.report.text import print_result
from rhc.storage.jsonl import read_lines
from rhc.storage.run_files import read_record, read_result

MOST_EARLIER = 8
"""Earlier events that plain lines show."""


def follow(
    directory: Path, console: Console, wait: Callable[[], None] = lambda: time.sleep(1)
) -> None:
    """Displays another process's run until it has a result; writes nothing to its files."""
    files = Followed(directory)
    progress = Progress(files.name)
    console.print(Text(f"watching {directory}; Ctrl-C ends the watching alone", style="dim"))
    with display(progress, console) as shown:
        shown(files.begun)
        events = files.news()
        # The pace counts from now on.
        progress.start = max((e.stop for e in events if isinstance(e, Committed)), default=0)
        for event in events[:-MOST_EARLIER]:
            progress.observe(event)
        events = events[-MOST_EARLIER:]
        told = False
        while True:
            for event in events:
                shown(event)
            shown.draw()
            if progress.result is not None:
                break
            idle = not events and is_trained(directory) is False
            if idle and not told:
                shown.write(
                    "nothing on this machine trains it: it was stopped, killed, or diverged; "
                    f"waiting; to go on: rhc resume {shlex.quote(str(directory))}"
                )
            told = idle
            wait()
            events = files.news()
    console.print()
    print_result(console, progress.result, directory, inspect=True)


class Followed:
    def __init__(self, directory: Path) -> None:
        config = read_record(directory)
        self.directory = directory
        self.name = str(config.get("run") or directory.name).rpartition(":")[2]
        self.begun = RunStarted(
            start=0,
            steps=_whole(config.get("steps")),
            window=_whole(config.get("window")),
            stride=_whole(config.get("stride")),
            controls=RunRecord(directory, config).controls,
            rewriting=bool(config.get("rewrite")),
            directory=None,
        )
        self._read: dict[str, int] = {}

    def news(self) -> list[Event]:
        """Events since the last call, the result last; without verbs and uncommitted steps."""
        ended = (self.directory / "result.json").exists()
        events: list[Event] = []
        for row in self._rows("start.jsonl"):
            with contextlib.suppress(KeyError, TypeError, ValueError):  # a row of another version
                tried(row)
                events.append(StartTried(row))
        attempts = self._rows("windows.jsonl")
        rows = [row for row in self._rows("tape.jsonl") if row.get("loss") is not None]
        for attempt in attempts:
            before = [row for row in rows if row["step"] < attempt["start"]]
            events += self._committed(before)
            rows = rows[len(before) :]
            usual = {"attempt": 0, "reason": "", "objective_before": None, "objective_after": None}
            events.append(WindowAttempted(usual | attempt))
        events += self._committed(rows)
        if ended:
            events.append(RunEnded(read_result(self.directory)))
        return events

    def _rows(self, name: str) -> list[dict[str, Any]]:
        path = self.directory / name
        if path.exists() and path.stat().st_size < self._read.get(name, 0):
            self._read[name] = 0  # a resumed run cut it back
        lines = list(read_lines(path, self._read.get(name, 0)))
        if lines:
            self._read[name] = lines[-1].stop
        return [line.row for line in lines if line.row is not None]

    def _committed(self, rows: list[dict[str, Any]]) -> list[Event]:
        """The commits of these steps, of unknown cost."""
        stride = max(1, self.begun.stride)
        parts = (rows[at : at + stride] for at in range(0, len(rows), stride))
        return [Committed(p[0]["step"], p[-1]["step"] + 1, p, math.nan) for p in parts]


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def is_trained(directory: Path) -> bool | None:
    """Whether a local process holds the run's lock; None if unknown. The lock is not tried: a run
    that starts meanwhile would be refused."""
    try:
        file = (directory / ".lock").stat()
        locks = Path("/proc/locks").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    place = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    return any(place in line.split() for line in locks.splitlines())

"""`rhc watch` and `rhc init`: follow a run from another terminal, and begin one of your own."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.text import Text

from rhc.errors import InputError
from rhc.events import Committed, RunEnded, RunStarted, StartTried, WindowAttempted
from rhc.report.live import LiveDisplay, Progress, Screen, one_number, tried
from rhc.report.text import print_result
from rhc.storage.files import misfit, opened_regular, parsed_json
from rhc.storage.run_files import ROWS, read_record, read_result

LEAVE = "Ctrl-C ends the watching alone"
MOST_EARLIER = 8
"""Attempts that had been made when the watching began, of which a line is shown."""

TEMPLATE = '''\
"""A run of your own: `rhc train {file}:{name}` trains it."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import rhc


def {name}(*, seed=0, data=None):
    """One sentence about the run. seed: already set, for the weights; data: the path of --data."""
    # Your data: here, points of a sine with noise. Keep validation and test apart from training.
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1024, 1, generator=generator) * 6 - 3
    y = torch.sin(x) + 0.1 * torch.randn(1024, 1, generator=generator)
    parts = ((0, 768), (768, 896), (896, 1024))
    train, val, test = (TensorDataset(x[a:b], y[a:b]) for a, b in parts)
    return rhc.Workload(
        # Any nn.Module; its weights are those of step 0.
        model=nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)),
        loss_fn=loss,
        train_loader=DataLoader(train, batch_size=32, shuffle=True),
        val_loader=DataLoader(val, batch_size=128),  # windows are judged by it
        test_loader=DataLoader(test, batch_size=128),  # for the final figures alone
        steps=300,
        optimizer="adam",  # or sgd, adamw
        threads=1,  # small models are slower on several
    )


def loss(model, batch):
    """The loss to differentiate, and whatever else should be recorded."""
    x, y = batch
    prediction = model(x)
    return F.mse_loss(prediction, y), {{"error": (prediction - y).abs().mean()}}
'''


def write_template(path: Path) -> str:
    """Writes a runner that works as it stands, and returns the command that trains it."""
    name = path.stem
    if path.suffix != ".py" or not name.isidentifier():
        raise InputError(f"file must be a name of Python like my_run.py, got {path}; give another")
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(TEMPLATE.format(file=path.name, name=name))
    except FileExistsError:
        raise InputError(f"file {path} exists and is not overwritten; give another") from None
    except OSError as error:
        raise InputError(f"file {path} cannot be written ({error.strerror})") from None
    return f"rhc train {path}:{name}"


@dataclass(frozen=True)
class _News:
    """What a run has written since it was last looked at."""

    starts: list[dict[str, Any]]
    attempts: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    ended: bool
    idle: bool
    """Nothing is new, and no process of this machine trains it."""


def watch(
    directory: Path, write: Callable[[str], None], wait: Callable[[], None] | None = None
) -> None:
    """Writes a line per attempt and per commit until the run has a result; never to its files.

    A run that is stopped has none, and is waited for, as it may be resumed; that nobody trains it
    is said once.
    """
    config = read_record(directory, told=write)
    write(f"watching {directory}, {config.get('steps')} steps; {LEAVE}")
    quiet, first = False, True
    for news in _news(directory, wait or _second):
        for row in news.starts:
            with contextlib.suppress(KeyError, TypeError, ValueError):  # of another version
                write(f"start  {tried(row)}")
        attempts = news.attempts
        if first and len(attempts) > MOST_EARLIER:
            write(f"{len(attempts) - MOST_EARLIER} attempts at windows before these")
            attempts = attempts[-MOST_EARLIER:]
        first = False
        for row in attempts:
            before, after = row.get("objective_before"), row.get("objective_after")
            reason = f": {row['reason']}" if row.get("reason") else ""
            write(
                f"window {row.get('start')}-{row.get('stop')}  {row.get('outcome')}  J "
                f"{_text(before)} -> {_text(after)}{reason}"
            )
        if news.rows:
            row = news.rows[-1]
            losses = [r["loss"] for r in news.rows if isinstance(r.get("loss"), (int, float))]
            mean = _text(sum(losses) / len(losses) if losses else None)
            lr = row.get("lr")
            shown = _text(None if lr is None else one_number(lr))
            step = row.get("step")
            done = step + 1 if isinstance(step, int) else "?"
            write(f"step {done}/{config.get('steps')}  loss {mean}  lr {shown}")
        if news.ended:
            result = read_record(directory, "result.json", write)
            write(f"finished: test loss {_text(result.get('test_loss'))}")
        if news.idle and not quiet:
            write(_idle(directory))
        quiet = news.idle


def watch_live(directory: Path, screen: Screen, wait: Callable[[], None] | None = None) -> None:
    """Shows the display of `rhc train` of a run that trains elsewhere, until it has a result.

    Its events are made from its files: a window's verbs and its steps are not among them.
    """
    config = read_record(directory)
    steps, window = _whole(config.get("steps")), _whole(config.get("window"))
    controls = config.get("controls")
    steered = tuple(map(str, controls)) if isinstance(controls, list) else ()
    progress = Progress(str(config.get("run") or directory.name).rpartition(":")[2])
    screen.print(Text(f"watching {directory}; {LEAVE}", style="dim"))
    quiet, first = False, True
    with LiveDisplay(progress, screen) as display:
        begun = RunStarted(0, steps, window, _whole(config.get("stride")), steered, True, None)
        display(replace(begun, rewriting=bool(config.get("rewrite"))))
        for news in _news(directory, wait or _second):
            for row in news.starts:
                with contextlib.suppress(KeyError, TypeError, ValueError):
                    tried(row)
                    progress.observe(StartTried(row))
            _observe(progress, news, max(1, _whole(config.get("stride"))))
            if first:  # the pace is that since it has been watched
                progress.start, progress.began, first = progress.committed, progress.clock(), False
            if news.idle and not quiet:
                screen.print(Text(_idle(directory)))
            quiet = news.idle
            if news.ended:
                result = read_result(directory)
                progress.cost = result["cost"]["plain_run_equivalents"]
                display(RunEnded(result))
            display.draw()
    screen.print()
    print_result(screen, read_result(directory), directory, inspect=True)


def _observe(progress: Progress, news: _News, stride: int) -> None:
    """Tells the display of attempts and of committed steps, in the order in which they came."""
    rows = [
        row
        for row in news.rows
        if isinstance(row.get("step"), int) and isinstance(row.get("loss"), (int, float))
    ]
    attempts = [
        row
        for row in news.attempts
        if row.get("outcome") in progress.outcomes
        and all(isinstance(row.get(name), int) for name in ("start", "stop", "attempt"))
    ]
    if rows:
        progress.tried.clear()
    for row in [*attempts, None]:
        before = [r for r in rows if row is None or r["step"] < row["start"]]
        rows = rows[len(before) :]
        for at in range(0, len(before), stride):
            part = before[at : at + stride]
            start, stop = part[0]["step"], part[-1]["step"] + 1
            progress.observe(Committed(start, stop, part, math.nan))
        if row is not None:
            names = ("objective_before", "objective_after", "reason")
            progress.observe(WindowAttempted({**dict.fromkeys(names), **row}))


def _news(directory: Path, wait: Callable[[], None]) -> Iterator[_News]:
    """What the run has written, as it comes; the last is that which holds its end."""
    names = ("start.jsonl", "windows.jsonl", "tape.jsonl")
    starts, windows, tape = (_Tail(directory / name) for name in names)
    while True:
        ended = (directory / "result.json").exists()
        started, attempts, rows = list(starts.rows()), list(windows.rows()), list(tape.rows())
        still = not (ended or attempts or rows) and trained(directory) is False
        yield _News(started, attempts, rows, ended, still)
        if ended:
            return
        wait()


def _second() -> None:
    time.sleep(1)


def _idle(directory: Path) -> str:
    return (
        "nothing on this machine trains it: it was stopped, killed, or diverged; waiting; "
        f"to go on: rhc resume {shlex.quote(str(directory))}"
    )


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def trained(directory: Path) -> bool | None:
    """Whether a process of this machine holds the run's lock; None where that cannot be seen.

    The lock itself is left alone: taking it, for a moment only, could refuse the run that begins.
    """
    try:
        file = (directory / ".lock").stat()
        locks = Path("/proc/locks").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    place = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    return any(place in line.split() for line in locks.splitlines())


class _Tail:
    """The whole lines that were added to a file since it was last asked."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, 0

    def rows(self) -> Iterator[dict[str, Any]]:
        try:
            with opened_regular(self.path.resolve()) as file:
                if file.seek(0, 2) < self.at:
                    self.at = 0  # a resumed run cut it back
                file.seek(self.at)
                data = file.read()
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"{self.path} cannot be read ({reason}); give a directory that you may read"
            ) from None
        whole = data[: data.rfind(b"\n") + 1]
        self.at += len(whole)
        for line in whole.splitlines():
            try:
                row = parsed_json(line)
            except ValueError:
                continue
            if isinstance(row, dict) and not misfit(row, ROWS.get(self.path.name, {})):
                yield row


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "–"

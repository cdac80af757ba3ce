"""`rhc watch` and `rhc init`: follow a run from another terminal, and begin one of your own."""

from __future__ import annotations

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rhc.errors import InputError
from rhc.files import parsed_json
from rhc.progress import one_number, tried
from rhc.summary import read_record

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


def watch(
    directory: Path, write: Callable[[str], None], wait: Callable[[], None] | None = None
) -> None:
    """Writes a line per attempt and per commit until the run has a result; never to its files.

    A run that is stopped has none, and is waited for, as it may be resumed; that nobody trains it
    is said once.
    """
    config = read_record(directory, told=write)
    wait = wait or (lambda: time.sleep(1))
    write(f"watching {directory}, {config.get('steps')} steps; Ctrl-C ends the watching alone")
    names = ("start.jsonl", "windows.jsonl", "tape.jsonl")
    starts, windows, tape = (_Tail(directory / name) for name in names)
    quiet, first = False, True
    while True:
        ended = (directory / "result.json").exists()
        for row in starts.rows():
            with contextlib.suppress(KeyError, TypeError, ValueError):  # of another version
                write(f"start  {tried(row)}")
        attempts = list(windows.rows())
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
        rows = list(tape.rows())
        if rows:
            row = rows[-1]
            losses = [r["loss"] for r in rows if isinstance(r.get("loss"), (int, float))]
            mean = _text(sum(losses) / len(losses) if losses else None)
            lr = row.get("lr")
            shown = _text(None if lr is None else one_number(lr))
            step = row.get("step")
            done = step + 1 if isinstance(step, int) else "?"
            write(f"step {done}/{config.get('steps')}  loss {mean}  lr {shown}")
        if ended:
            result = read_record(directory, "result.json", write)
            write(f"finished: test loss {_text(result.get('test_loss'))}")
            return
        if trained(directory) is not False or rows or attempts:
            quiet = False
        elif not quiet:
            quiet = True
            write(
                "nothing on this machine trains it: it was stopped, killed, or diverged; waiting; "
                f"to go on: rhc resume {shlex.quote(str(directory))}"
            )
        wait()


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
            with open(self.path, "rb") as file:
                if file.seek(0, 2) < self.at:
                    self.at = 0  # a resumed run cut it back
                file.seek(self.at)
                data = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be read ({error.strerror}); give a directory that you may read"
            ) from None
        whole = data[: data.rfind(b"\n") + 1]
        self.at += len(whole)
        for line in whole.splitlines():
            try:
                row = parsed_json(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else "–"

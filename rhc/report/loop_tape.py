"""The tape of a training loop of one's own, and directories of runs that no Runner trained."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from rhc.errors import InputError, whole_number
from rhc.report.records import SIGNALS
from rhc.schedulers.shared import Scalar, momentum_of, numbers, scalar
from rhc.storage.files import (
    make_directory,
    plain_document,
    read_json,
    refuse_links,
    replace_durably,
    replace_summed,
    sealed,
)
from rhc.storage.jsonl import JsonLines, read_lines
from rhc.storage.run_files import FILES

READ_EVERY = 20
"""Steps between reads of losses from the device, and writes of the tape."""


class LoopTape:
    """Records the steps of a training loop of your own, as a Runner records its own.

        tape = rhc.LoopTape("runs/mine", optimizer, scheduler, steps=1000)
        for batch in loader:
            ...
            optimizer.step()
            scheduler.step(loss, reward)
            tape.step(loss, reward, {"accuracy": accuracy})
        tape.close(test_loss=0.18)

    `rhc report runs/mine` then shows losses, reward, controls, trends and plateaus over time, and
    several directories side by side. lr and momentum are read from the optimizer right before its
    steps, noise, trends and plateau score from the scheduler; where it records no trends, the
    report computes them. Losses are read every 20 steps, so no other step waits for an accelerator.

    Args:
        directory: Where config.json, tape.jsonl and result.json are written. The tape of an
            earlier loop there is replaced. None: the rows are kept in `rows`.
        optimizer: The optimizer of the loop.
        scheduler: `AdaptiveRL`, `DistilledScheduler`, `EpochPlanner`, or another one, or None.
        steps: Length of the run, if known.
        start: Steps taken before, of a resumed loop; later rows of the tape are removed.
        settings: Further entries of config.json, such as seed=0.

    Raises:
        InputError: The directory cannot be written, or holds a run that is no loop's.
    """

    def __init__(
        self,
        directory: str | Path | None,
        optimizer: Optimizer,
        scheduler: Any = None,
        *,
        steps: int | None = None,
        start: int = 0,
        **settings: Any,
    ) -> None:
        self.directory = None if directory is None else Path(directory)
        self.optimizer, self.scheduler = optimizer, scheduler
        self.steps = whole_number("start", start)
        self.rows: list[dict[str, Any]] = []
        """Rows that are not written yet."""
        self._pending: list[dict[str, Scalar]] = []
        self._loss: Scalar = None
        self._controls = self._present()
        self._hook = optimizer.register_step_pre_hook(self._before_step)
        self._began = time.perf_counter()
        if self.directory is not None:
            config = {
                "command": "loop",
                "optimizer": type(optimizer).__name__.lower(),
                "scheduler": None if scheduler is None else type(scheduler).__name__,
                "steps": steps,
            }
            self._lines = _opened(self.directory, config | settings, self.steps)

    def step(
        self,
        loss: Tensor | float,
        reward: Tensor | float | None = None,
        metrics: Mapping[str, Tensor | float] | None = None,
    ) -> None:
        """Records a step; call it after `scheduler.step`.

        Args:
            loss: Scalar.
            reward: Scalar, higher is better; may be given at some steps only.
            metrics: Scalars by name.
        """
        self._loss = scalar(loss, "loss")
        row: dict[str, Any] = {"loss": self._loss, **self._controls}
        if reward is not None:
            row["reward"] = scalar(reward, "reward")
        more = metrics or {}
        row |= {name: scalar(v, name) for name, v in more.items() if name not in row}
        seen = self._seen()
        row |= {name: seen[name] for name in SIGNALS if name in seen}
        self._pending.append({"step": self.steps, **row})
        self.steps += 1
        if len(self._pending) >= READ_EVERY:
            self.flush()

    def flush(self) -> None:
        """Reads what is on the device and writes it."""
        for row, values in zip(
            self._pending, numbers([list(row.values()) for row in self._pending]), strict=True
        ):
            self.rows.append(dict(zip(row, values, strict=True)))
        self._pending = []
        if self.directory is not None:
            self._lines.append(self.rows)
            self._lines.flush()
            self.rows = []

    def close(self, **result: Any) -> None:
        """Writes the rest of the tape, and result.json; the optimizer is left alone from then on.

        Args:
            result: Entries of result.json: val_loss, test_loss, test_accuracy and others.
        """
        self._hook.remove()
        self.flush()
        if self.directory is not None:
            self._lines.close()
            ((loss,),) = numbers([[self._loss]])
            known = {"train_loss": loss, "wall_seconds": time.perf_counter() - self._began}
            write_result(self.directory, self.steps, known | result)

    def __enter__(self) -> LoopTape:
        return self

    def __exit__(self, kind: Any, *error: object) -> None:
        if kind is None:
            self.close()
        else:
            self.flush()

    def _before_step(self, *_: Any) -> None:
        self._controls = self._present()

    def _present(self) -> dict[str, Any]:
        """The controls that the next step is taken with."""
        groups = self.optimizer.param_groups
        found: dict[str, Any] = {"lr": _joined([float(group["lr"]) for group in groups])}
        momenta = [m for group in groups if (m := momentum_of(group)) is not None]
        if momenta:
            found["momentum"] = _joined(momenta)
        noise = self._seen().get("noise")
        return found if noise is None else found | {"noise": noise}

    def _seen(self) -> Mapping[str, Any]:
        """What the scheduler says of itself: a planner by its plan."""
        values = getattr(getattr(self.scheduler, "plan", self.scheduler), "values", None)
        return values if isinstance(values, Mapping) else {}


def _joined(values: list[float]) -> float | list[float]:
    return values[0] if len(set(values)) == 1 else values


def write_run(
    directory: Path,
    config: Mapping[str, Any],
    tape: Iterable[Mapping[str, Any]],
    windows: Iterable[Mapping[str, Any]],
    result: Mapping[str, Any] | None,
) -> None:
    """Writes the directory of a run from memory; an earlier one of the same command is replaced."""
    for name, rows in (("tape", tape), ("windows", windows)):
        lines = _opened(directory, config, 0, name)
        lines.append(rows)
        lines.flush()
        lines.close()
    if result is not None:
        write_result(directory, int(config["steps"]), result)


def write_result(directory: Path, steps: int, known: Mapping[str, Any]) -> None:
    """Writes result.json, whose entries are null where nothing is known."""
    losses = [f"{of}{name}_loss" for of in ("", "average_") for name in ("train", "val", "test")]
    cost = dict.fromkeys(("windows", "rejected_windows", "rewound_windows"), 0)
    result = {
        "status": "finished",
        "steps": steps,
        **dict.fromkeys((*losses, "test_accuracy", "wall_seconds")),
        "average_metrics": {"test": {"accuracy": None}},
        "cost": {"plain_run_equivalents": 1.0, **cost},
    }
    replace_summed(directory / "result.json", plain_document(result | dict(known)))


def _opened(
    directory: Path, config: Mapping[str, Any], start: int, name: str = "tape"
) -> JsonLines:
    """The file of rows, cut to those before `start`, beside a new config.json."""
    config = {"format": "rhc.config", "version": 1, **config}
    path = directory / "config.json"
    try:
        make_directory(directory)
        refuse_links(directory)
        there = read_json(path).get("command") if path.exists() else config["command"]
        if there != config["command"] or (
            not path.exists() and any((directory / each).exists() for each in FILES)
        ):
            raise InputError(
                f"directory {directory} holds another run, which is not overwritten; choose "
                "another one"
            )
        replace_durably(path, sealed(config))
        (directory / "result.json").unlink(missing_ok=True)
        lines = JsonLines(directory / f"{name}.jsonl")
        lines.truncate(_length(lines.path, start))
        lines.flush()
    except OSError as error:
        raise InputError(
            f"directory {directory} cannot be written ({os.strerror(error.errno or 0)}); choose "
            "another one"
        ) from None
    return lines


def _length(path: Path, start: int) -> int:
    """Bytes of the rows before step `start`."""
    length = 0
    for line in read_lines(path) if start else ():
        if line.row is None or line.row["step"] >= start:
            break
        length = line.stop
    return length

"""The result of a fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rhc.schedule import Schedule


@dataclass(frozen=True)
class RunResult:
    """The result of a fit. record: the content of result.json."""

    schedule: Schedule
    record: dict[str, Any]
    tape: list[dict[str, Any]]
    windows: list[dict[str, Any]]
    directory: Path | None

    @property
    def train_loss(self) -> float | None:
        return self.record["train_loss"]

    @property
    def val_loss(self) -> float | None:
        return self.record["val_loss"]

    @property
    def test_loss(self) -> float | None:
        return self.record["test_loss"]

    @property
    def test_accuracy(self) -> float | None:
        return self.record["test_accuracy"]

    @property
    def replay(self) -> dict[str, Any] | None:
        """How the first window replayed: `equal`, and else `first_step`, `what` differs there, by
        which share (`largest`), and the `operators` to blame. None where nothing was replayed."""
        return self.record.get("replay")

    @property
    def notices(self) -> list[str]:
        """What a person was told of the run, once each."""
        return self.record.get("notices", [])

    @property
    def cost(self) -> dict[str, Any]:
        """The ledger: plain_run_equivalents, gradient_evaluations, hessian_products and others."""
        return self.record["cost"]

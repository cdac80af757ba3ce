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
    def cost(self) -> dict[str, Any]:
        """The ledger: plain_run_equivalents, gradient_evaluations, hessian_products and others."""
        return self.record["cost"]

"""The examples that need other packages run where those are installed."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *packages: str) -> Any:
    for package in packages:
        pytest.importorskip(package, reason=f"{package} is not installed")
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def test_a_hugging_face_model(capsys: pytest.CaptureFixture[str]) -> None:
    result = run("hugging_face_model", "transformers")
    assert result.val_loss < 2.5  # 3.5 at random
    assert "by exact products, successful" in capsys.readouterr().out


def test_a_lightning_module() -> None:
    result = run("lightning_module", "lightning")
    assert result.val_loss < 0.3 and len(result.schedule) == 100


def test_a_loop_of_accelerate() -> None:
    scheduler = run("accelerate_loop", "accelerate")
    assert scheduler.steps == 200 and scheduler.updates == 200 // scheduler.every
    assert scheduler.get_last_lr()[0] != 1e-3


def test_trials_of_optuna() -> None:
    study = run("optuna_search", "optuna")
    assert len(study.trials) == 5 and study.best_value < 0.3
    assert all(trial.user_attrs["plain_run_equivalents"] > 1 for trial in study.trials)

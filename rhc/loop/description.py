"""Parts of config.json: what a run's numbers depend on besides its settings."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from rhc.containers import length
from rhc.loop.update_rule import Rewrite
from rhc.storage.run_directory import module_text
from rhc.training.objective import HeldOutBatches, Objective

GONE_RULE, GONE_MEMORY = {"rule": "normalised"}, {"memory": False}
"""Entries of settings that no longer exist, so that older runs are found and resumed."""


def of_rule(rule: Rewrite) -> dict[str, Any]:
    return asdict(rule) | GONE_RULE


def of_objective(objective: Objective) -> dict[str, Any]:
    """The objective, with functions by name."""
    known = {name: _described(value) for name, value in vars(objective).items()}
    if objective.rows is None:
        del known["rows"]  # so that older runs can resume
    return known | GONE_MEMORY


def of_code(model: nn.Module, **loaders: Any) -> dict[str, Any]:
    """What identifies model and data: modules, shapes of buffers, numbers of batches."""
    return {
        "modules": {name or "model": module_text(m) for name, m in model.named_modules()},
        "buffers": {name: list(b.shape) for name, b in model.named_buffers()},
        "batches": {name: length(loader) for name, loader in loaders.items()},
    }


def _described(value: Any) -> Any:
    if isinstance(value, HeldOutBatches):
        return {"held_out": value.count}
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else value

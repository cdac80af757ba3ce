"""Parts of config.json: what a run's numbers depend on beside its settings."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import nn

from rhc.loop.update_rule import Rewrite
from rhc.storage.run_directory import length, module_text
from rhc.training.objective import HeldOutBatches, Objective

GONE_RULE, GONE_MEMORY = {"rule": "normalised"}, {"memory": False}
"""Entries of settings that are gone, so that older runs are found and continued."""


def of_rule(rule: Rewrite) -> dict[str, Any]:
    """The update rule."""
    return asdict(rule) | GONE_RULE


def of_objective(objective: Objective) -> dict[str, Any]:
    """What windows are judged by; functions by their names."""
    known = {name: _described(value) for name, value in vars(objective).items()}
    return known | GONE_MEMORY


def of_code(model: nn.Module, **loaders: Any) -> dict[str, Any]:
    """What shows of the model and the data: modules, shapes of buffers, numbers of batches."""
    return {
        "modules": {name or "model": module_text(m) for name, m in model.named_modules()},
        "buffers": {name: list(b.shape) for name, b in model.named_buffers()},
        "batches": {name: length(loader) for name, loader in loaders.items()},
    }


def _described(value: Any) -> Any:
    if isinstance(value, HeldOutBatches):
        return {"held_out": value.count}
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else value

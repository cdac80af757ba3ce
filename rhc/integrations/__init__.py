"""Trainers that keep their loop's parts and are trained with rewriting: a module each for Hugging
Face Transformers, Lightning and Accelerate. What is written here they share."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from rhc.errors import InputError, RunWarning
from rhc.rng import preserved
from rhc.runner import Runner


def refuse(trainer: str, reasons: Iterable[tuple[bool, str]]) -> None:
    """InputError with what of a trainer cannot be trained with rewriting, if anything."""
    found = [reason for applies, reason in reasons if applies]
    if found:
        raise InputError(f"{trainer} cannot be trained with rewriting: {'; '.join(found)}")


def tell(trainer: str, differences: Sequence[str]) -> None:
    """Names, before the run, what differs from the trainer's own loop."""
    if differences:
        warnings.warn(
            f"trained with rewriting, {trainer} differs from its own loop: "
            f"{'; '.join(differences)}",
            RunWarning,
            stacklevel=3,
        )


def unwrapped_optimizer(optimizer: Any) -> Any:
    """The torch optimizer within Accelerate's or Lightning's."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return getattr(inner, "_optimizer", inner)


@contextmanager
def aside(model: nn.Module) -> Iterator[None]:
    """What a trainer does between two windows leaves random state and modes as they were."""
    modes = [(module, module.training) for module in model.modules()]
    with preserved():
        yield
    for module, training in modes:
        module.training = training


def earlier_rows(runner: Runner, start: int) -> list[dict[str, Any]]:
    """The tape of a resumed run's steps so far."""
    return runner.state.tape[:start]


def epoch_steps(loader: Any, accumulate: int, what: str) -> int:
    """Optimizer steps of an epoch."""
    try:
        batches = len(loader)
    except TypeError:
        raise InputError(
            f"{what} has no length, so an epoch has no number of steps; give steps=…"
        ) from None
    return max(1, batches // accumulate)

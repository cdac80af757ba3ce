"""What loss_fn returns: checked, differentiated, and averaged over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rhc.errors import InputError

LossFn = Callable[[nn.Module, Any], Any]
"""loss_fn(model, batch) -> scalar tensor, or (scalar tensor, {"name": number or tensor})."""

Observed = tuple[Tensor, dict[str, Tensor]]
"""(loss, metrics)."""


def checked_loss(result: Any, source: str = "loss_fn") -> Observed:
    """(loss, metrics) returned by `source`; an InputError for anything else."""
    loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(loss, Tensor):
        raise InputError(
            f"{source} must return a scalar tensor or (scalar tensor, dict), got "
            f"{type(loss).__name__}; {_mend(result, loss)}"
        )
    if not isinstance(metrics, Mapping):
        raise InputError(
            f"{source} must return a scalar tensor or (scalar tensor, dict of metrics), got a "
            f"{type(metrics).__name__} for the dict; return (loss, {{'accuracy': …}})"
        )
    if loss.numel() != 1:
        raise InputError(
            f"{source} must return a scalar tensor, got shape {tuple(loss.shape)}; "
            "reduce it with .mean()"
        )
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise InputError(
            f"{source} returned a loss without a graph (requires_grad is False); compute it from "
            "the model's output without .detach(), .item() or torch.no_grad()"
        )
    return (
        loss.reshape(()) if loss.dim() else loss,
        {name: _metric(source, name, value) for name, value in metrics.items()},
    )


def _mend(result: Any, loss: Any) -> str:
    if result is None:
        return "it has no return"
    if isinstance(getattr(loss, "loss", None), Tensor):
        return "return its .loss"
    if isinstance(result, (tuple, list, dict)):
        return "return loss, or (loss, {'accuracy': …})"
    return "return the loss itself, not .item()"


def _metric(source: str, name: Any, value: Any) -> Tensor:
    if not isinstance(name, str):
        raise InputError(
            f"metrics of {source} must be named by strings, got {name!r}; give it a name such as "
            f"'metric_{name}'"
        )
    try:
        # Python numbers have 64 bits; the default dtype would keep 32.
        return torch.as_tensor(value, dtype=torch.float64 if type(value) is float else None)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"metric {name!r} of {source} must be a number or a tensor, got "
            f"{type(value).__name__}; leave it out"
        ) from None


def mean_metrics(metrics: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of every metric over those micro-batches that have it."""
    found: dict[str, list[Tensor]] = {}
    for own in metrics:
        for name, value in own.items():
            # The sum of two bools is a bool.
            is_flag = value.dtype == torch.bool
            found.setdefault(name, []).append(value.long() if is_flag else value)
    return {name: sum(v[1:], v[0]) / len(v) for name, v in found.items()}


def fill_gradients(loss: Tensor) -> None:
    """`loss.backward()`; an InputError where the graph was differentiated before."""
    try:
        loss.backward()
    except RuntimeError as error:
        if "graph a second time" not in str(error):
            raise
        raise InputError(
            "the graph of loss_fn's result was differentiated before: leave backward() to the "
            "Runner, and .detach() what the model or loss_fn keeps from one batch to the next"
        ) from error


def needs_grad(error: Exception) -> bool:
    """Whether an error under no_grad is due to code that differentiates by itself."""
    words = ("does not require grad", "doesn't require gradient")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in words)

"""Which second derivatives a model has, and which module lacks one. torch names the operator; the
module is found by trying every module on its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rhc.containers import tensors_of
from rhc.errors import InputError
from rhc.hypergradient.evaluation import (
    OnceDifferentiable,
    double_backward,
    graph_nodes,
    is_compiled,
    mean_loss,
    once_differentiable_function,
)
from rhc.hypergradient.hvp import Product
from rhc.training.plant import Plant

_NO_DERIVATIVE = (
    re.compile(r"derivative for (?:aten::)?(\S+) is not implemented"),
    re.compile(r"forward AD with (\S+) that does not support it"),
    re.compile(r"(once_differentiable)"),
    re.compile(r"torch\.compile with (aot_autograd) does not currently support double backward"),
    re.compile(r"torch\.utils\.(checkpoint) is incompatible with \.grad"),
    re.compile(r"backward through (\S+) but no autograd formula"),
    re.compile(r"function (\w+) has no backward|(\w+) is not differentiable twice"),
    re.compile(r"does not have a (jvp) formula|implement the (jvp)"),
    re.compile(r"(double backwards?) (?:is )?not (?:supported|implemented)"),
    re.compile(r"(ZeroTensors) are immutable"),
)

_NAMES = {
    "aot_autograd": "torch.compile (aot_autograd)",
    "checkpoint": "torch.utils.checkpoint with use_reentrant=True",
    "jvp": "a custom Function without jvp",
}

_MENDS = {
    "aot_autograd": "give the uncompiled module",
    "checkpoint": "use torch.utils.checkpoint with use_reentrant=False",
    "jvp": "give it a jvp",
    "mkldnn_rnn_layer": "set torch.backends.mkldnn.enabled = False",
}


@dataclass(frozen=True)
class Missing:
    """What prevents a product."""

    reason: str  # operator and place
    mend: str  # how to change the model


def missing_derivative(error: BaseException) -> str | None:
    """The operator that a RuntimeError of autograd cannot differentiate, or None."""
    if isinstance(error, OnceDifferentiable):
        return error.function
    if not isinstance(error, (RuntimeError, NotImplementedError)):
        return None
    for pattern in _NO_DERIVATIVE:
        found = pattern.search(str(error))
        if found:
            return next(g for g in found.groups() if g).strip("'")
    return None


def missing(error: BaseException, plant: Plant, batch: Any) -> Missing | None:
    """What `error` says is missing; None for errors of another kind."""
    operator = missing_derivative(error)
    if operator is None:
        return None
    where = failing_module(plant, batch) or "loss_fn, outside any module"
    if operator == "aot_autograd":
        compiled = [n or "the model" for n, m in plant.model.named_modules() if is_compiled(m)]
        where = compiled[0] if compiled else where
    mend = _MENDS.get(operator, "use another operator there")
    if isinstance(error, OnceDifferentiable):
        mend = "write its backward with differentiable operations, without once_differentiable"
    name = _NAMES.get(operator, operator)
    return Missing(f"no second derivative of operator {name} in {where}", mend)


def unsupported(
    error: BaseException, plant: Plant, batch: Any, product: Product
) -> InputError | None:
    """The InputError for a required `product`: module, operator, fix; None for other errors."""
    found = missing(error, plant, batch)
    if found is None:
        return None
    others = ", or use product 'forward-difference' or 'auto' with segment 1"
    instead = others if product == "exact" else ""
    return InputError(f"product {product!r}: {found.reason}; {found.mend}{instead}")


def failing_module(plant: Plant, batch: Any) -> str | None:
    """'name (Class)' of the innermost module without the derivative, by trying each on its own."""
    found: list[str] = []
    trying = False

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal trying
            if found or trying:  # a module that is tried runs its own modules
                return
            trying = True
            if not _twice(module, args, kwargs, output):
                found.append(f"module {name or 'model'!s} ({type(module).__name__})")
            trying = False

        return after

    handles = [
        m.register_forward_hook(hook(n), with_kwargs=True) for n, m in plant.model.named_modules()
    ]
    state = plant.snapshot()
    try:
        with torch.enable_grad(), double_backward(plant.model, light=False):
            mean_loss(plant.loss_fn, plant.model, batch)
    except Exception:  # this search must not hide the original error
        pass
    finally:
        for handle in handles:
            handle.remove()
        plant.restore(state)
    return found[0] if found else None


def _twice(module: nn.Module, args: Any, kwargs: Any, output: Any) -> bool:
    """Whether the module's output is twice differentiable by its inputs and parameters."""
    outputs = [t for t in tensors_of(output) if t.requires_grad]
    inputs = [t for t in tensors_of([args, kwargs]) if t.requires_grad]
    leaves = [*inputs, *(p for p in module.parameters() if p.requires_grad)]
    if not outputs or not leaves:
        return True
    if any(once_differentiable_function(node) for node in graph_nodes(outputs, inputs)):
        return False
    try:
        gradients = torch.autograd.grad(
            _square(outputs), leaves, create_graph=True, allow_unused=True
        )
        live = [g for g in gradients if g is not None and g.requires_grad]
        if live:
            torch.autograd.grad(_square(live), leaves, retain_graph=True, allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        return missing_derivative(error) is None
    return True


def _square(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.float().square().sum() for t in tensors]).sum()

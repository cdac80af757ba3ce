"""Which second derivatives a model has, and who lacks one.

torch says which operator failed, deep inside a backward pass; here the module is found by trying
every module on its own, and the mend is said.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rhc.errors import InputError
from rhc.hypergradient.evaluation import double_backward, mean_loss
from rhc.hypergradient.products import Product
from rhc.plant import Plant

_NO_DERIVATIVE = (
    re.compile(r"derivative for (?:aten::)?(\S+) is not implemented"),
    re.compile(r"forward AD with (\S+) that does not support it"),
    re.compile(r"(once_differentiable)"),
    re.compile(r"(aot_autograd) does not currently support double backward"),
    re.compile(r"(checkpoint)\S* is incompatible with \.grad"),
    re.compile(r"function (\w+) has no backward|(\w+) is not differentiable twice"),
    re.compile(r"does not have a (jvp) formula|implement the (jvp)"),
    re.compile(r"(double backwards?) (?:is )?not (?:supported|implemented)"),
)

_MENDS = {
    "aot_autograd": "give the uncompiled module, or use product 'forward-difference'",
    "checkpoint": "use torch.utils.checkpoint with use_reentrant=False, or a difference product",
    "once_differentiable": (
        "write its backward with differentiable operations and without once_differentiable, or use "
        "product 'forward-difference'"
    ),
}


def missing_derivative(error: BaseException) -> str | None:
    """The operator that a RuntimeError of autograd says cannot be differentiated, or None."""
    if not isinstance(error, (RuntimeError, NotImplementedError)):
        return None
    for pattern in _NO_DERIVATIVE:
        found = pattern.search(str(error))
        if found:
            return next(g for g in found.groups() if g)
    return None


def unsupported(
    error: BaseException, plant: Plant, batch: Any, product: Product
) -> InputError | None:
    """The error for a user who insisted on `product`: module, operator, mend; None for others."""
    operator = missing_derivative(error)
    if operator is None:
        return None
    module = failing_module(plant, batch, product)
    where = "loss_fn, outside any module" if module is None else module
    if operator == "aot_autograd":
        where = next(
            (n or "the model" for n, m in plant.model.named_modules() if _compiled(m)), where
        )
    mend = _MENDS.get(operator, "use product 'forward-difference' or 'auto', or another operator")
    kind = "forward-mode" if product == "forward-over-reverse" else "second"
    return InputError(
        f"product {product!r} needs a {kind} derivative that is missing: operator {operator} in "
        f"{where}; {mend}"
    )


def failing_module(plant: Plant, batch: Any, product: Product) -> str | None:
    """'name (Class)' of the innermost module without the derivative, by trying each on its own."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not _twice(module, output):
                found.append(f"module {name or 'model'!s} ({type(module).__name__})")

        return after

    handles = [m.register_forward_hook(hook(n)) for n, m in plant.model.named_modules()]
    state = plant.snapshot()
    try:
        with torch.enable_grad(), double_backward(plant.model, light=False):
            mean_loss(plant.loss_fn, plant.model, batch)
    except Exception:
        return None
    finally:
        for handle in handles:
            handle.remove()
        plant.restore(state)
    return found[0] if found else None


def _twice(module: nn.Module, output: Any) -> bool:
    """Whether the sum of what the module gave can be differentiated twice by its parameters."""
    outputs = [t for t in _tensors(output) if t.requires_grad]
    leaves: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
    if not outputs or not leaves:
        leaves = [leaf for t in outputs for leaf in _ancestors(t)]
    if not outputs or not leaves:
        return True
    try:
        total = torch.stack([t.float().square().sum() for t in outputs]).sum()
        gradients = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        live = [g.float().square().sum() for g in gradients if g is not None and g.requires_grad]
        if live:
            torch.autograd.grad(
                torch.stack(live).sum(), leaves, retain_graph=True, allow_unused=True
            )
    except (RuntimeError, NotImplementedError) as error:
        return missing_derivative(error) is None
    return True


def _ancestors(tensor: Tensor) -> list[Tensor]:
    """The leaves that a tensor's graph reaches."""
    leaves, stack, seen = [], [tensor.grad_fn], set[Any]()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack.extend(n for n, _ in node.next_functions)
    return leaves


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v)]
    return []


def _compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None

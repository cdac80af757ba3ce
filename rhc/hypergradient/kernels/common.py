"""What all kernels ask: what kind of sweep is under way, and whether they may take part at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

Grads = tuple[Tensor | None, ...]


class Sweep:
    """Whether a sweep is under way that pulls back through parameter gradients of no value."""

    valueless = False
    least = 0


@contextmanager
def valueless_gradients(on: bool = True) -> Iterator[None]:
    """Inside, the gradients that a create_graph sweep returns carry a graph but no value.

    The kernels of this package then skip the products that only make the value of a weight's
    gradient: it reads 0. A flag of the process, not of the thread, because autograd runs the
    sweeps of an accelerator on threads of its own.
    """
    before, Sweep.valueless = Sweep.valueless, on
    try:
        yield
    finally:
        Sweep.valueless = before


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary floating-point tensors, outside autocast, vmap and the like."""
    first = tensors[0]
    assert first is not None
    return (
        torch.is_grad_enabled()
        and functions_allowed()
        and not torch.is_autocast_enabled(first.device.type)
        and all(
            t is None or (type(t) in (Tensor, torch.nn.Parameter) and t.dtype == first.dtype)
            for t in tensors
        )
        and first.is_floating_point()
    )


def functions_allowed() -> bool:
    """Whether custom Functions without rules for these can take part: forward AD, vmap, compile."""
    return not (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
    )


def tracked() -> bool:
    """Whether a graph is being made: in a backward pass, of a backward pass with create_graph."""
    return torch.is_grad_enabled()


def which_leaves(weight: Tensor, bias: Tensor | None) -> tuple[bool, bool]:
    """Which are parameters themselves: a weight that is made of parameters (weight norm, a
    hypernetwork) passes its gradient's value on to them."""
    return weight.is_leaf, bias is not None and bias.is_leaf


def nothing(like: Tensor) -> Tensor:
    return like.new_zeros(()).expand(like.shape)


def total(*terms: Tensor | None) -> Tensor | None:
    found = [t for t in terms if t is not None]
    if not found:
        return None
    total = found[0]
    for t in found[1:]:
        total = total + t
    return total

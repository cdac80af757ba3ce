"""The form of a kernel with two derivatives written out, and the conditions for its use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd import Function

Grads = tuple[Tensor | None, ...]
Needed = Sequence[bool]
Saved = Sequence[Any]


class Sweep:
    """Whether a vjp through parameter gradients of no value is under way; whether attention was
    called since this was last set to False."""

    valueless = False
    least = 0
    attention = False


@contextmanager
def valueless_gradients(on: bool = True) -> Iterator[None]:
    """Inside, gradients returned with create_graph carry a graph but read 0, which saves their
    products. Per process, because autograd runs an accelerator's backward pass in its own threads.
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
    """Whether custom Functions can take part: no forward AD, vmap or compile."""
    return not (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
    )


def tracked() -> bool:
    """Whether a graph is being made: in a backward pass, one with create_graph."""
    return torch.is_grad_enabled()


def which_leaves(weight: Tensor, bias: Tensor | None) -> tuple[bool, bool]:
    """Whether each is a parameter itself: a weight made of parameters (weight norm, a hypernetwork)
    passes its gradient's value on."""
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


class Kernel(NamedTuple):
    """A function of torch whose first and second derivative are written out. needed: per input,
    whether its derivative is needed. settings: all other arguments."""

    reference: Callable[..., Tensor]
    """(settings, *inputs) -> y, torch's plain composition: the derivatives beyond the second."""
    value: Callable[..., tuple[Tensor, Sequence[Tensor | None]]]
    """(settings, needed, *inputs) -> y and what is saved: the inputs (None if no derivative reads
    them), and intermediate results."""
    gradient: Callable[..., Sequence[Tensor | None]]
    """(settings, needed, gy, saved) -> gradients of inputs; then what else the pullback reads."""
    pullback: Callable[..., Sequence[Tensor | None]]
    """(settings, needed, vs, gy, saved) -> gradients of gy and the inputs for the cotangents vs of
    the gradients; `needed` begins with gy here, and `saved` ends with what else the gradient
    returned."""

    def __call__(self, settings: Any, leaves: Sequence[bool], *inputs: Tensor | None) -> Tensor:
        """leaves: per input, whether its gradient's value is read only as a parameter's."""
        found: Tensor = _Value.apply(self, settings, leaves, *inputs)
        return found


class _Value(Function):
    @staticmethod
    def forward(ctx: Any, kernel: Kernel, settings: Any, leaves: Any, *inputs: Any) -> Tensor:
        y, saved = kernel.value(settings, ctx.needs_input_grad[3:], *inputs)
        ctx.save_for_backward(*saved)
        shapes = [None if t is None else t.shape for t in inputs]
        ctx.fixed = kernel, settings, leaves, shapes
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Grads:
        kernel, settings, *_ = ctx.fixed
        needed = ctx.needs_input_grad[3:]
        if tracked():
            found = _Gradient.apply(*ctx.fixed, needed, gy, *ctx.saved_tensors)
        else:
            found = kernel.gradient(settings, needed, gy, ctx.saved_tensors)[: len(needed)]
        return None, None, None, *found


class _Gradient(Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        settings: Any,
        leaves: Sequence[bool],
        shapes: Sequence[torch.Size],
        needed: Sequence[bool],
        gy: Tensor,
        *saved: Any,
    ) -> Grads:
        unread = [
            leaf and need and Sweep.valueless for leaf, need in zip(leaves, needed, strict=True)
        ]
        real = [need and not none for need, none in zip(needed, unread, strict=True)]
        found = kernel.gradient(settings, real, gy, saved)
        ctx.save_for_backward(gy, *saved, *found[len(needed) :])
        ctx.set_materialize_grads(False)
        ctx.fixed, ctx.besides = (kernel, settings, shapes), len(saved) - len(needed)
        return tuple(
            gy.new_zeros(()).expand(shape) if none else g
            for none, shape, g in zip(unread, shapes, found[: len(needed)], strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *vs: Tensor | None) -> Grads:
        kernel, settings, shapes = ctx.fixed
        gy, *saved = ctx.saved_tensors
        if tracked():
            found = _by_composition(kernel, settings, shapes, vs, gy, saved)
        else:
            needed = ctx.needs_input_grad[5 : 6 + len(shapes)]
            found = kernel.pullback(settings, needed, vs, gy, saved)
        return *[None] * 5, *found, *[None] * ctx.besides


def _by_composition(
    kernel: Kernel,
    settings: Any,
    shapes: Sequence[torch.Size | None],
    vs: Sequence[Tensor | None],
    gy: Tensor,
    saved: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """A differentiable pullback: autograd's, through the reference."""
    gy = gy.view_as(gy)  # views, because one tensor may be several inputs
    inputs: list[Tensor | None] = []
    for shape, t in zip(shapes, saved[: len(shapes)], strict=True):
        if shape is None:
            inputs.append(None)
        else:
            inputs.append(gy.new_zeros(shape).requires_grad_() if t is None else t.view_as(t))
    gradients = _graded([kernel.reference(settings, *inputs)], inputs, [gy])
    pairs = [
        (g, v)
        for g, v in zip(gradients, vs, strict=True)
        if g is not None and v is not None and g.requires_grad
    ]
    if not pairs:
        return [None] * (1 + len(inputs))
    return _graded([g for g, _ in pairs], [gy, *inputs], [v for _, v in pairs])


def _graded(
    outputs: list[Tensor], inputs: Sequence[Tensor | None], seeds: list[Tensor]
) -> list[Tensor | None]:
    """autograd.grad with a graph, and None for inputs that require no gradient."""
    wanted = [t for t in inputs if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, seeds, create_graph=True, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in inputs]

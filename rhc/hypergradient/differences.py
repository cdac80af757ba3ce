"""Differences of gradients in place of hvps, which need no second derivative. Right to rounding for
smooth losses; the jump of the gradient at a kink is divided by the distance."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rhc.containers import tensors_of
from rhc.data_weights import leaves_of, taken_slopes
from rhc.hypergradient.evaluation import Evaluation, mean_loss
from rhc.training.plant import Plant
from rhc.training.trajectory import Block

if TYPE_CHECKING:
    from rhc.hypergradient.hvp import StepPoint


def difference(
    evaluation: Evaluation,
    point: StepPoint,
    *,
    central: bool,
    again: bool,
    into: Sequence[Tensor | None] | None,
    in_place: bool,
) -> tuple[list[Tensor | None], list[Tensor]]:
    """(g(θ + εv) − g(θ)) / ε or (g(θ + εv) − g(θ − εv)) / 2ε, with v = λ_g and ε = c |θ| / |v|, per
    block, and the same of the gradient by ŵ, per weighed micro-batch.

    into: added to in place. again: as in `step_vjp`. in_place: θ may be overwritten by θ + εv.

    c is the square (cube) root of the machine epsilon of the type that loss_fn computes in, which
    balances rounding and truncation for the forward (central) difference of a smooth function.
    """
    plant, direction = evaluation.plant, point.of_gradients
    # A block with v = 0 has a row of H v all the same.
    active = [i for i, g in enumerate(point.gradients) if g is not None]
    moved = [i for i, v in enumerate(direction) if v is not None]
    result: list[Tensor | None] = [None] * len(direction) if into is None else list(into)
    if not moved or not active:
        return result, [torch.zeros_like(w) for w in leaves_of(point.batch)]
    size, length = _lengths(evaluation, point)

    def evaluate(scale: Tensor) -> None:
        _place_along(evaluation, point, scale, in_place)
        evaluation.clear_gradients()
        taken_slopes(point.batch)
        plant.backward(point.batch)

    def distance(precision: float) -> Tensor:
        c = precision ** (1 / 3) if central else precision**0.5
        # Stays on the device: reading a number would synchronise. v = 0 gives 0.
        epsilon = c * size.clamp_min(1e-3) / length.clamp_min(torch.finfo(length.dtype).tiny)
        if not again:
            return epsilon
        return epsilon / 2 if central else -epsilon

    own = torch.finfo(point.flats[active[0]].dtype).eps
    known = plant in _PRECISION
    in_place = in_place and known
    epsilon = distance(max(own, _PRECISION.get(plant, 0.0)))
    with nullcontext() if known else noting_precision(plant):
        evaluate(epsilon)
    if not known and _PRECISION[plant] > own:
        epsilon = distance(_PRECISION[plant])
        evaluate(epsilon)
    other, width = point.gradients, epsilon
    by_weight = point.by_weight
    if central:
        other, width = evaluation.gradients(), -2 * epsilon
        by_weight = taken_slopes(point.batch)
        evaluate(-epsilon)
    for i in active:
        own_other = other[i]
        assert own_other is not None
        result[i] = _add_difference(
            evaluation.blocks[i], evaluation.parameters[i], own_other, width, result[i]
        )
    evaluation.clear_gradients()
    pairs = zip(taken_slopes(point.batch), by_weight, strict=True)
    return result, [(b - a) / width.to(b.device, b.dtype) for b, a in pairs]


def slopes_of_rows(evaluation: Evaluation, point: StepPoint) -> list[Tensor]:
    """The derivative of dℓ/dŵ along λ_g by a forward difference of losses, per weighed
    micro-batch."""
    plant, weights = evaluation.plant, leaves_of(point.batch)
    if all(v is None for v in point.of_gradients):
        return [torch.zeros_like(w) for w in weights]
    size, length = _lengths(evaluation, point)
    own = torch.finfo(point.flats[0].dtype).eps
    c = max(own, _PRECISION.get(plant, 0.0)) ** 0.5
    epsilon = c * size.clamp_min(1e-3) / length.clamp_min(torch.finfo(length.dtype).tiny)
    _place_along(evaluation, point, epsilon)
    loss, _ = mean_loss(plant.loss_fn, evaluation.model, point.batch)
    found = torch.autograd.grad(loss, weights)
    pairs = zip(found, point.by_weight, strict=True)
    return [(b - a) / epsilon.to(b.device, b.dtype) for b, a in pairs]


def _lengths(evaluation: Evaluation, point: StepPoint) -> tuple[Tensor, Tensor]:
    """|θ| of the blocks that λ_g moves, and |λ_g|."""
    moved = [(f, v) for f, v in zip(point.flats, point.of_gradients, strict=True) if v is not None]
    norm = evaluation.plant.parallel.norm
    return norm([f for f, _ in moved]), norm([v for _, v in moved])


def _place_along(
    evaluation: Evaluation, point: StepPoint, scale: Tensor, in_place: bool = False
) -> None:
    """Puts θ + scale λ_g into the model."""
    flats = [
        f
        if v is None
        else torch.addcmul(f, v, scale.to(f.device, f.dtype), out=f if in_place else None)
        for f, v in zip(point.flats, point.of_gradients, strict=True)
    ]
    evaluation.place(flats, point.buffers)
    point.restore_rng()


@torch.no_grad()
def _add_difference(
    block: Block,
    parameters: Sequence[Tensor],
    other: Tensor,
    width: Tensor,
    target: Tensor | None,
) -> Tensor:
    """target + (the block's `.grad`s − other) / width, in place, parameter by parameter for the
    cache; consumes the `.grad`s."""
    result = torch.zeros_like(other) if target is None else target
    scale = width.reciprocal().to(other.device, other.dtype)
    for p, to, known in zip(parameters, block.views(result), block.views(other), strict=True):
        difference = -known if p.grad is None else p.grad.sub_(known)
        if scale.device.type == "cpu":
            to.add_(difference, alpha=float(scale))
        else:
            to.addcmul_(difference, scale)
    return result


_PRECISION: WeakKeyDictionary[Plant, float] = WeakKeyDictionary()


def precision_known(plant: Plant) -> bool:
    return plant in _PRECISION


def precision(plant: Plant) -> float:
    """Machine epsilon of the coarsest type that the modules of a plant's model compute in."""
    return _PRECISION[plant]


@contextmanager
def noting_precision(plant: Plant) -> Iterator[Callable[[], float]]:
    """Records the plant's precision while its loss is evaluated inside, where alone autocast is on;
    yields the value so far. Observes modules only."""
    coarsest = 0.0

    def note(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal coarsest
        dtypes = [t.dtype for t in tensors_of(output) if t.is_floating_point()]
        kind = plant.parameters[0].device.type
        if torch.is_autocast_enabled(kind):
            dtypes.append(torch.get_autocast_dtype(kind))
        coarsest = max([coarsest, *(torch.finfo(dtype).eps for dtype in dtypes)])

    handles = [module.register_forward_hook(note) for module in plant.model.modules()]
    before = _PRECISION.get(plant)
    try:
        yield lambda: coarsest
    finally:
        for handle in handles:
            handle.remove()
    _PRECISION[plant] = coarsest if before is None else before

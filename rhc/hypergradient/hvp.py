"""Products with the Hessian of one step's loss: the only expensive term of the adjoint.

A product pulls (λ_g, λ_b) of a step's gradient g_t and BatchNorm statistics back to (θ_t, b_t), and
adds the stage cost's own gradient. Costs in gradient evaluations: exact 3 (g again, and twice that
to pull it back; 2 where the roll kept the graph of g), forward over reverse 3, forward difference
1 (the roll's g_t is known), central difference 2. Where no exact product exists, a difference is
held against one in the again direction, which steps over other kinks: one gradient more.
"none" leaves the Hessian out: no more than a baseline, but exact where lr is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from rhc.containers import Kept, tensors_of
from rhc.distributed import shard
from rhc.hypergradient.evaluation import (
    Evaluated,
    Evaluation,
    Scratch,
    gradients_by_backward,
    mean_loss,
    parts,
    pulled_through,
)
from rhc.hypergradient.kernels import valueless_gradients
from rhc.rng import RandomState
from rhc.training.batches import batch_size
from rhc.training.module_state import Values
from rhc.training.plant import Plant
from rhc.training.trajectory import Block, HiddenState

Product = Literal[
    "exact", "forward-over-reverse", "forward-difference", "central-difference", "none"
]
PRODUCTS: tuple[Product, ...] = (
    "exact",
    "forward-over-reverse",
    "forward-difference",
    "central-difference",
    "none",
)
PRODUCT_COST: Mapping[str, int] = {
    "exact": 3,
    "forward-over-reverse": 3,
    "forward-difference": 1,
    "central-difference": 2,
    "none": 0,
}
KEPT_COST = 2
"""Of an exact product whose graph the roll kept."""


@dataclass(frozen=True)
class KeptGraph:
    """The graph of one step's gradient, as the roll left it.

    leaves: one per parameter of the blocks, of value θ_t where the graph reads it.
    statistics_leaves: b_t by name. gradients: where the graph of each leaf's gradient begins, None
    where there is no second derivative. evaluated: what the step gave.
    """

    leaves: list[Tensor]
    statistics_leaves: dict[str, Tensor]
    gradients: list[GradientEdge | None]
    evaluated: Evaluated


@dataclass(frozen=True)
class StepPoint:
    """Where a product is taken: θ_t per block, b_t, the batch, the random state, the roll's g_t.

    theta: gives θ_t, which a graph that was kept does without. rng: None where the step draws
    nothing. owned: θ_t is not needed after this product, which may change it. loss: the roll's ℓ_t.
    """

    theta: Callable[[], Sequence[Tensor]]
    buffers: Values
    batch: Any
    rng: RandomState | HiddenState | None
    gradients: Sequence[Tensor | None]
    graph: KeptGraph | None = None
    owned: bool = False
    loss: Tensor | None = None

    @cached_property
    def flats(self) -> Sequence[Tensor]:
        return self.theta()


class NotAMean(Exception):
    """The loss of a batch is not the mean of the losses of its rows."""


SAME_LOSS = 200
"""Largest relative difference between a batch's loss and its parts' mean, in machine epsilons."""


@dataclass(frozen=True)
class Pulled:
    """What came back: one tensor (or None) per block, and per statistic.

    discrepancy: |g − g_t| / |g_t| of the gradient that was computed again, where it was compared.
    """

    parameters: list[Tensor | None]
    statistics: dict[str, Tensor] = field(default_factory=dict)
    discrepancy: float = 0.0


def pull_back(
    product: Product,
    evaluation: Evaluation,
    scratch: Scratch,
    point: StepPoint,
    gradient_costates: Sequence[Tensor | None],
    statistics_costates: Mapping[str, Tensor],
    *,
    compare: bool = False,
    again: bool = False,
    into: Sequence[Tensor | None] | None = None,
    pieces: int = 1,
) -> Pulled:
    """H_t λ_g + ∂b′/∂θ ᵀ λ_b + ∇(stage cost), and the statistics' own costates.

    pieces: an exact product takes the batch's rows in so many parts, one graph after the other,
    where the step draws nothing and its loss is a mean over rows; NotAMean where it is not.

    into: per block, a vector that this is added to in place. compare: an exact product also says
    how far its own g_t is from the roll's. again: a forward difference is taken backwards,
    (g(θ) − g(θ − εv)) / ε, a central one at half the distance.
    """
    objective = evaluation.objective
    joint = bool(statistics_costates) or bool(objective.reward_weight)
    if product == "exact":
        if point.graph is not None:
            try:
                return _kept(evaluation, point, gradient_costates, statistics_costates, into)
            except RuntimeError as error:
                # A graph that saves other parameters than those that its maker copied.
                if "modified by an inplace operation" not in str(error):
                    raise
        return _exact(
            evaluation,
            scratch,
            point,
            gradient_costates,
            statistics_costates,
            compare,
            into,
            pieces,
        )
    if product == "forward-over-reverse":
        curvature = _forward_over_reverse(evaluation, scratch, point, gradient_costates)
    elif product == "none":
        curvature = [None] * len(gradient_costates)
    else:
        # Terms of first order are taken at θ after the product.
        in_place = point.owned and not joint and product == "forward-difference"
        curvature = _difference(
            product, evaluation, scratch, point, gradient_costates, again, into, in_place
        )
        into = None  # it is in there
    if into is not None:
        curvature = [_into(a, b) for a, b in zip(into, curvature, strict=True)]
    if not joint:
        return Pulled(_with_gradient(curvature, point.gradients, objective.loss_weight))
    first = _first_order(evaluation, scratch, point, statistics_costates)
    found = [_into(a, b) for a, b in zip(curvature, first.parameters, strict=True)]
    return Pulled(found, first.statistics)


# Exact -------------------------------------------------------------------------------------------


def _exact(
    evaluation: Evaluation,
    scratch: Scratch,
    point: StepPoint,
    gradient_costates: Sequence[Tensor | None],
    statistics_costates: Mapping[str, Tensor],
    compare: bool,
    into: Sequence[Tensor | None] | None,
    pieces: int,
) -> Pulled:
    """Reverse over reverse: Pearlmutter 1994."""
    statistics = _statistics_leaves(point, statistics_costates)
    scratch.place(point.flats, point.buffers, statistics)
    seeds = per_parameter(scratch.blocks, gradient_costates)
    wanted = [*scratch.leaves, *statistics.values()]
    total: list[Tensor | None] = [None] * len(wanted)
    found: list[Tensor | None] = [None] * len(scratch.leaves)
    joint = bool(statistics) or bool(evaluation.objective.reward_weight)
    _restore(point.rng)
    if joint or point.rng is not None:
        pieces = 1
    mean = 0.0
    for batch, share in _shares(point.batch, joint, pieces):
        evaluated = evaluation.of_model(
            scratch.model, batch, statistics=bool(statistics), twice=True, stage=joint
        )
        loss = evaluated.loss if share == 1 else evaluated.loss * share
        if pieces > 1:
            mean += float(loss.detach())
        gradients = _gradients(loss, scratch.leaves, seeds, valueless=not compare)
        if compare:
            found = [_sum(a, b) for a, b in zip(found, gradients, strict=True)]
        outputs, output_seeds = _outputs(gradients, seeds)
        if joint:
            _add_first_order(outputs, output_seeds, evaluated, statistics_costates)
        del evaluated, loss, gradients
        if outputs:
            pulled = pulled_through(outputs, wanted, output_seeds)
            total = [_sum(a, b) for a, b in zip(total, pulled, strict=True)]
    if pieces > 1 and point.loss is not None:
        expected, rounding = float(point.loss), torch.finfo(point.loss.dtype).eps
        if not abs(mean - expected) <= SAME_LOSS * rounding * abs(expected):
            raise NotAMean
    if evaluation.plant.ranks is not None:
        like = [*wanted, *(scratch.leaves if compare else ())]
        total = evaluation.plant.parallel.means([*total, *(found if compare else ())], like)
        total, found = total[: len(wanted)], total[len(wanted) :]
    discrepancy = 0.0
    if compare:
        discrepancy = relative_difference(
            _per_block(scratch.blocks, found, only=gradient_costates),
            [
                None if v is None else g
                for g, v in zip(point.gradients, gradient_costates, strict=True)
            ],
        )
    return _result(evaluation, point, scratch.blocks, total, statistics, joint, discrepancy, into)


def _kept(
    evaluation: Evaluation,
    point: StepPoint,
    gradient_costates: Sequence[Tensor | None],
    statistics_costates: Mapping[str, Tensor],
    into: Sequence[Tensor | None] | None,
) -> Pulled:
    """The second half of an exact product, through the graph that the roll kept."""
    graph = point.graph
    assert graph is not None
    blocks = evaluation.blocks
    seeds = per_parameter(blocks, gradient_costates)
    pairs = [
        (g, s)
        for g, s in zip(graph.gradients, seeds, strict=True)
        if g is not None and s is not None
    ]
    outputs: list[Any] = [g for g, _ in pairs]
    output_seeds: list[Tensor | None] = [s for _, s in pairs]
    joint = bool(statistics_costates) or bool(evaluation.objective.reward_weight)
    if joint:
        _add_first_order(outputs, output_seeds, graph.evaluated, statistics_costates)
    statistics = {n: graph.statistics_leaves[n] for n in statistics_costates}
    wanted = [*graph.leaves, *statistics.values()]
    total: list[Tensor | None] = [None] * len(wanted)
    if outputs:
        total = pulled_through(outputs, wanted, output_seeds)
    total = evaluation.plant.parallel.means(total, wanted)
    return _result(evaluation, point, blocks, total, statistics, joint, 0.0, into)


def _gradients(
    loss: Tensor, leaves: Sequence[Tensor], seeds: Sequence[Tensor | None], *, valueless: bool
) -> list[Tensor | None]:
    """∂loss/∂leaf with a graph, for the leaves that have a seed."""
    active = [i for i, seed in enumerate(seeds) if seed is not None]
    result: list[Tensor | None] = [None] * len(leaves)
    if active:
        with valueless_gradients(valueless):
            found = torch.autograd.grad(
                loss, [leaves[i] for i in active], create_graph=True, allow_unused=True
            )
        for i, g in zip(active, found, strict=True):
            result[i] = g
    return result


def _outputs(
    gradients: Sequence[Tensor | None], seeds: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """The gradients that can be pulled back: a loss linear in θ has no curvature."""
    pairs = [
        (g, s)
        for g, s in zip(gradients, seeds, strict=True)
        if g is not None and s is not None and g.requires_grad
    ]
    return [g for g, _ in pairs], [s for _, s in pairs]


def _result(
    evaluation: Evaluation,
    point: StepPoint,
    blocks: Sequence[Block],
    total: Sequence[Tensor | None],
    statistics: Mapping[str, Tensor],
    joint: bool,
    discrepancy: float,
    into: Sequence[Tensor | None] | None = None,
) -> Pulled:
    count = len(total) - len(statistics)
    if into is None:
        parameters = _per_block(blocks, total[:count])
    else:
        parameters = _added(blocks, into, total[:count])
    weight = evaluation.objective.loss_weight
    if weight and not joint:  # the stage cost is c_ℓ ℓ_t, whose gradient is known
        parameters = _with_gradient(parameters, point.gradients, weight)
    pulled = {n: p for n, p in zip(statistics, total[count:], strict=True) if p is not None}
    return Pulled(parameters, pulled, discrepancy)


# Without a second derivative in reverse ----------------------------------------------------------


def _forward_over_reverse(
    evaluation: Evaluation,
    scratch: Scratch,
    point: StepPoint,
    direction: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The derivative of g along v, in forward mode: no graph of a graph, so less memory."""
    blocks = scratch.blocks
    tangents = per_parameter(blocks, direction)
    if all(v is None for v in tangents):
        return [None] * len(direction)
    active = per_parameter(blocks, point.gradients)
    scratch.place(point.flats, point.buffers)
    total: list[Tensor | None] = [None] * len(scratch.leaves)
    _restore(point.rng)
    for batch, share in _shares(point.batch, False):
        with forward_ad.dual_level():
            duals = [
                p if v is None else forward_ad.make_dual(p, v.to(p.dtype))
                for p, v in zip(scratch.leaves, tangents, strict=True)
            ]

            def gradient(
                model: Any, batch: Any = batch, share: float = share, duals: Any = duals
            ) -> list[Tensor | None]:
                loss, _ = mean_loss(evaluation.plant.loss_fn, model, batch)
                inputs = [d for d, g in zip(duals, active, strict=True) if g is not None]
                found = iter(torch.autograd.grad(loss * share, inputs, allow_unused=True))
                return [None if g is None else next(found) for g in active]

            named = dict(zip(evaluation.names, duals, strict=True))
            found = evaluation.substitution.at(named, gradient)
            moved = [None if g is None else forward_ad.unpack_dual(g).tangent for g in found]
            total = [_sum(a, b) for a, b in zip(total, moved, strict=True)]
    total = evaluation.plant.parallel.means(total, scratch.leaves)
    return _per_block(blocks, total, only=point.gradients)


def _difference(
    product: Product,
    evaluation: Evaluation,
    scratch: Scratch,
    point: StepPoint,
    direction: Sequence[Tensor | None],
    again: bool,
    into: Sequence[Tensor | None] | None,
    in_place: bool,
) -> list[Tensor | None]:
    """(g(θ + εv) − g(θ)) / ε or (g(θ + εv) − g(θ − εv)) / 2ε, with ε = c |θ| / |v|.

    It is added to `into` in place, if there is one. in_place: θ may be changed to θ + εv.

    c is the square (cube) root of the machine's epsilon, which balances rounding and truncation
    for the forward (central) difference of a smooth function; at kinks nothing does. Where loss_fn
    computes in reduced precision (autocast), that precision's epsilon counts.
    """
    # A block that v leaves alone has a row of H v all the same.
    active = [i for i, g in enumerate(point.gradients) if g is not None]
    moved = [i for i, v in enumerate(direction) if v is not None]
    result: list[Tensor | None] = [None] * len(direction) if into is None else list(into)
    if not moved or not active:
        return result
    length = evaluation.plant.parallel.norm([v for v in direction if v is not None])
    size = evaluation.plant.parallel.norm([point.flats[i] for i in moved])

    def evaluate(scale: Tensor) -> None:
        """Fills the `.grad`s at θ + scale v."""
        flats = [
            f
            if v is None
            else torch.addcmul(f, v, scale.to(f.device, f.dtype), out=f if in_place else None)
            for f, v in zip(point.flats, direction, strict=True)
        ]
        scratch.place(flats, point.buffers)
        _restore(point.rng)
        for p in scratch.leaves:
            p.grad = None
        evaluation.plant.backward(point.batch)

    def distance(precision: float) -> Tensor:
        c = precision**0.5 if product == "forward-difference" else precision ** (1 / 3)
        # On the device all the way: asking for a number would make the host wait. v = 0 gives 0.
        epsilon = c * size.clamp_min(1e-3) / length.clamp_min(torch.finfo(length.dtype).tiny)
        if not again:
            return epsilon
        return -epsilon if product == "forward-difference" else epsilon / 2

    plant = evaluation.plant
    own = torch.finfo(point.flats[active[0]].dtype).eps
    known = plant in _PRECISION
    in_place = in_place and known
    epsilon = distance(max(own, _PRECISION.get(plant, 0.0)))
    with nullcontext() if known else noting_precision(plant):
        evaluate(epsilon)
    if not known and _PRECISION[plant] > own:
        epsilon = distance(_PRECISION[plant])
        evaluate(epsilon)
    other: Sequence[Tensor | None] = point.gradients
    width = epsilon
    if product == "central-difference":
        other, width = scratch.gradients(), -2 * epsilon
        evaluate(-epsilon)
    for i in active:
        own_other = other[i]
        assert own_other is not None
        result[i] = _add_difference(
            scratch.blocks[i], scratch.parameters[i], own_other, width, result[i]
        )
    for p in scratch.leaves:
        p.grad = None
    return result


@torch.no_grad()
def _add_difference(
    block: Block,
    parameters: Sequence[Tensor],
    other: Tensor,
    width: Tensor,
    target: Tensor | None,
) -> Tensor:
    """target + (the block's `.grad`s − other) / width, target changed; the `.grad`s are used up.

    Parameter by parameter, while its gradient is in the processor's cache: over whole vectors every
    one of these passes would fetch them from memory again.
    """
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
    """Whether `precision` has been noted."""
    return plant in _PRECISION


def precision(plant: Plant) -> float:
    """The machine epsilon of the coarsest type that the modules of a plant's model compute in."""
    return _PRECISION[plant]


@contextmanager
def noting_precision(plant: Plant) -> Iterator[Callable[[], float]]:
    """Notes the plant's precision while its loss is evaluated inside; gives what was seen so far.

    Autocast is on inside loss_fn only, so that it is the modules that must be asked. What loss_fn
    computes outside any module is not seen.
    """
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


def _first_order(
    evaluation: Evaluation,
    scratch: Scratch,
    point: StepPoint,
    statistics_costates: Mapping[str, Tensor],
) -> Pulled:
    """The part without the Hessian, where statistics or a reward take part."""
    statistics = _statistics_leaves(point, statistics_costates)
    scratch.place(point.flats, point.buffers, statistics)
    wanted = [*scratch.leaves, *statistics.values()]
    outputs: list[Tensor] = []
    seeds: list[Tensor | None] = []
    _restore(point.rng)
    evaluated = evaluation.of_model(scratch.model, point.batch, statistics=bool(statistics))
    _add_first_order(outputs, seeds, evaluated, statistics_costates)
    total = gradients_by_backward(outputs, wanted, seeds, scratch.model)
    total = evaluation.plant.parallel.means(total, wanted)
    return _result(evaluation, point, scratch.blocks, total, statistics, True, 0.0)


def _add_first_order(
    outputs: list[Tensor],
    seeds: list[Tensor | None],
    evaluated: Evaluated,
    costates: Mapping[str, Tensor],
) -> None:
    if evaluated.stage is not None:
        outputs.append(evaluated.stage)
        seeds.append(None)
    for name, costate in costates.items():
        after = evaluated.statistics[name]
        if after.requires_grad:
            outputs.append(after)
            seeds.append(costate)


# Helpers -----------------------------------------------------------------------------------------


def _shares(batch: Any, joint: bool, pieces: int = 1) -> list[tuple[Any, float]]:
    """(micro-batch, its share of the mean): one graph each, unless they must be seen together.

    pieces: into which the rows of every micro-batch are cut, in their order.
    """
    if joint:
        return [(batch, 1.0)]
    found = []
    micro = parts(batch)
    share = 1 / len(micro)
    for part in micro:
        count = min(pieces, rows := batch_size(part))
        if count < 2:
            found.append((part, share))
            continue
        whole = part.batch if isinstance(part, Kept) else part
        cut = (shard(whole, rows, number, count) for number in range(count))
        found += [(Kept(own.rows), share * own.weight / count) for own in cut]
    return found


def _restore(rng: RandomState | HiddenState | None) -> None:
    if rng is not None:
        rng.restore()


def _statistics_leaves(point: StepPoint, costates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: b.detach().clone().requires_grad_()
        for name in costates
        if (b := point.buffers[name]) is not None
    }


def per_parameter(blocks: Sequence[Block], vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A vector per block as a view per parameter."""
    return [
        view
        for block, vector in zip(blocks, vectors, strict=True)
        for view in ([None] * len(block.sizes) if vector is None else block.views(vector))
    ]


def _per_block(
    blocks: Sequence[Block],
    tensors: Sequence[Tensor | None],
    only: Sequence[Tensor | None] | None = None,
) -> list[Tensor | None]:
    """A tensor per parameter as a new vector per block; None where all of a block's are."""
    result: list[Tensor | None] = []
    place = 0
    for b, block in enumerate(blocks):
        own = tensors[place : place + len(block.sizes)]
        place += len(block.sizes)
        like = next((t for t in own if t is not None), None)
        if like is None or (only is not None and only[b] is None):
            result.append(None)
            continue
        result.append(
            torch.cat(
                [
                    like.new_zeros(size) if t is None else t.reshape(-1)
                    for t, size in zip(own, block.sizes, strict=True)
                ]
            )
        )
    return result


def _added(
    blocks: Sequence[Block], into: Sequence[Tensor | None], tensors: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """`into`, a vector per block, with a tensor per parameter added in place: one pass."""
    result: list[Tensor | None] = []
    place = 0
    for block, vector in zip(blocks, into, strict=True):
        own = tensors[place : place + len(block.sizes)]
        place += len(block.sizes)
        if vector is None:
            result += _per_block([block], own)
            continue
        pairs = [(v, t) for v, t in zip(block.views(vector), own, strict=True) if t is not None]
        if pairs:
            torch._foreach_add_([v for v, _ in pairs], [t for _, t in pairs])
        result.append(vector)
    return result


def _with_gradient(
    vectors: Sequence[Tensor | None], gradients: Sequence[Tensor | None], weight: float
) -> list[Tensor | None]:
    """`vectors` with the gradient of the stage cost c_ℓ ℓ_t added in place: g_t is known."""
    if weight == 0:
        return list(vectors)
    return [
        v if g is None else weight * g if v is None else v.add_(g, alpha=weight)
        for v, g in zip(vectors, gradients, strict=True)
    ]


def _into(vector: Tensor | None, term: Tensor | None) -> Tensor | None:
    """The sum, in place where both are there."""
    return term if vector is None else vector if term is None else vector.add_(term)


def relative_difference(
    found: Sequence[Tensor | None],
    expected: Sequence[Tensor | None],
    norm: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> float:
    """|found − expected| / |expected| over all blocks; 0 where both vanish."""
    norm = norm or _norm
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if e is not None]
    if not pairs:
        return 0.0
    difference = norm([e if f is None else f.detach() - e for f, e in pairs])
    return float(difference / norm([e for _, e in pairs]).clamp_min(1e-30))


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(t) for t in tensors]
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b

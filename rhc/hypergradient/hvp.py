"""Products with the Hessian of one step's loss: the only expensive term of the adjoint.

The vjp of a step's gradient g_t and BatchNorm statistics takes (λ_g, λ_b) to (θ_t, b_t), and adds
the stage cost's own gradient. Costs in gradient evaluations: exact 3 (2 with a kept graph),
forward difference 1, central difference 2, "none" 0. Where no exact product
exists, every difference is compared with one in the other direction: one gradient more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from rhc.containers import Kept
from rhc.data_weights import Weighed, leaves_of
from rhc.distributed import shard
from rhc.hypergradient.differences import difference, slopes_of_rows
from rhc.hypergradient.evaluation import (
    Evaluated,
    Evaluation,
    fresh_leaves,
    gradients_by_backward,
    parts,
)
from rhc.hypergradient.kernels import valueless_gradients
from rhc.optimizers.base import unchecked_grad
from rhc.rng import RandomState
from rhc.training.batches import batch_size
from rhc.training.module_state import Values
from rhc.training.trajectory import Block, HiddenState

Product = Literal["exact", "forward-difference", "central-difference", "none"]
PRODUCTS: tuple[Product, ...] = (
    "exact",
    "forward-difference",
    "central-difference",
    "none",
)
PRODUCT_COST: Mapping[str, int] = {
    "exact": 3,
    "forward-difference": 1,
    "central-difference": 2,
    "none": 0,
}
KEPT_COST = 2
"""An exact product whose graph the roll kept."""


@dataclass(frozen=True)
class KeptGraph:
    leaves: list[Tensor]  # one per parameter, of value θ_t where the graph reads it
    statistics_leaves: dict[str, Tensor]  # b_t by name
    gradients: list[GradientEdge | None]  # per leaf; None without a second derivative
    evaluated: Evaluated


@dataclass(frozen=True)
class StepPoint:
    """Where a vjp is taken."""

    theta: Callable[[], Sequence[Tensor]]  # θ_t per block; not called with a kept graph
    buffers: Values  # b_t
    batch: Any
    rng: RandomState | HiddenState | None  # None where the step draws nothing
    gradients: Sequence[Tensor | None]  # the roll's g_t
    of_gradients: Sequence[Tensor | None]  # λ_g per block
    of_statistics: Mapping[str, Tensor] = field(default_factory=dict)  # λ_b by name
    graph: KeptGraph | None = None
    retain: bool = False  # whether the kept graph serves further products
    owned: bool = False  # whether the product may overwrite θ_t
    loss: Tensor | None = None  # the roll's ℓ_t
    by_weight: Sequence[Tensor] = ()  # the roll's dℓ_t/dŵ per micro-batch, where rows are weighed

    @cached_property
    def flats(self) -> Sequence[Tensor]:
        return self.theta()

    def restore_rng(self) -> None:
        if self.rng is not None:
            self.rng.restore()


class NotAMean(Exception):
    """The loss of a batch is not the mean of the losses of its rows."""


SAME_LOSS = 200
"""Largest relative difference between a batch's loss and its parts' mean, in machine epsilons."""


@dataclass(frozen=True)
class StepVjp:
    """One tensor (or None) per block, and per statistic."""

    parameters: list[Tensor | None]
    statistics: dict[str, Tensor] = field(default_factory=dict)
    discrepancy: float = 0.0  # |g − g_t| / |g_t| of the recomputed gradient, if compared
    by_weight: list[Tensor] = field(default_factory=list)  # by ŵ, per micro-batch


def step_vjp(
    product: Product,
    evaluation: Evaluation,
    point: StepPoint,
    *,
    compare: bool = False,
    again: bool = False,
    into: Sequence[Tensor | None] | None = None,
    pieces: int = 1,
) -> StepVjp:
    """H_t λ_g + ∂b′/∂θ ᵀ λ_b + ∇(stage cost), and the statistics' own costates.

    pieces: parts of the batch's rows that an exact product takes one after the other; needs a step
    that draws nothing, and raises NotAMean if the loss is not a mean over rows. into: per block,
    added to in place. compare: fill in `discrepancy`. again: forward differences go backwards,
    (g(θ) − g(θ − εv)) / ε, central ones to half the distance.
    """
    joint = evaluation.joint(point.of_statistics)
    if product == "exact":
        if point.graph is not None:
            try:
                return _kept(evaluation, point, into)
            except RuntimeError as error:
                # A graph that saves other parameters than those that its maker copied.
                if "modified by an inplace operation" not in str(error):
                    raise
        return _exact(evaluation, point, compare, into, pieces)
    curvature: Sequence[Tensor | None] = [None] * len(point.of_gradients)
    by_weight: list[Tensor] = []
    if product in ("forward-difference", "central-difference"):
        # Terms of first order are taken at θ after the product.
        in_place = point.owned and not joint and product == "forward-difference"
        curvature, by_weight = difference(
            evaluation,
            point,
            central=product == "central-difference",
            again=again,
            into=into,
            in_place=in_place,
        )
        into = None  # added already
    elif leaves_of(point.batch):
        by_weight = slopes_of_rows(evaluation, point)
    if into is not None:
        curvature = [_into(a, b) for a, b in zip(into, curvature, strict=True)]
    if not joint:
        weight = evaluation.objective.loss_weight
        parameters = _with_gradient(curvature, point.gradients, weight)
        return StepVjp(parameters, by_weight=_staged(by_weight, point, weight))
    first = _first_order(evaluation, point)
    found = [_into(a, b) for a, b in zip(curvature, first.parameters, strict=True)]
    by_weight = [a + b for a, b in zip(by_weight, first.by_weight, strict=True)]
    return StepVjp(found, first.statistics, by_weight=by_weight)


def _exact(
    evaluation: Evaluation,
    point: StepPoint,
    compare: bool,
    into: Sequence[Tensor | None] | None,
    pieces: int,
) -> StepVjp:
    """Reverse over reverse: Pearlmutter 1994."""
    statistics = fresh_leaves(point.buffers, point.of_statistics)
    evaluation.place(point.flats, point.buffers, statistics)
    leaves, plant = evaluation.leaves, evaluation.plant
    seeds = per_parameter(evaluation.blocks, point.of_gradients)
    wanted = [*leaves, *statistics.values(), *leaves_of(point.batch)]
    total: list[Tensor | None] = [None] * len(wanted)
    found: list[Tensor | None] = [None] * len(leaves)
    joint = evaluation.joint(statistics)
    point.restore_rng()
    if joint or point.rng is not None:
        pieces = 1
    mean = 0.0
    for batch, share in _shares(point.batch, joint, pieces):
        evaluated = evaluation(batch, statistics=bool(statistics), twice=True, stage=joint)
        loss = evaluated.loss if share == 1 else evaluated.loss * share
        if pieces > 1:
            mean += float(loss.detach())
        gradients = _gradients(loss, leaves, seeds, valueless=not compare)
        if compare:
            found = [_sum(a, b) for a, b in zip(found, gradients, strict=True)]
        # A loss that is linear in θ has no curvature.
        outputs = [
            (g, seed)
            for g, seed in zip(gradients, seeds, strict=True)
            if g is not None and g.requires_grad
        ]
        if joint:
            outputs += _first_order_outputs(evaluated, point)
        del evaluated, loss, gradients
        if outputs:
            of_share = unchecked_grad([t for t, _ in outputs], wanted, [v for _, v in outputs])
            total = [_sum(a, b) for a, b in zip(total, of_share, strict=True)]
        del outputs
    if pieces > 1 and point.loss is not None:
        expected, rounding = float(point.loss), torch.finfo(point.loss.dtype).eps
        if not abs(mean - expected) <= SAME_LOSS * rounding * abs(expected):
            raise NotAMean
    if plant.ranks is not None:
        own = len(leaves) + len(statistics)
        like = [*wanted[:own], *(leaves if compare else ())]
        means = plant.parallel.means([*total[:own], *(found if compare else ())], like)
        total, found = [*means[:own], *total[own:]], means[own:]
    discrepancy = 0.0
    if compare:
        costates = point.of_gradients
        expected_gradients = [
            None if v is None else g for g, v in zip(point.gradients, costates, strict=True)
        ]
        discrepancy = relative_difference(
            per_block(evaluation.blocks, found, only=costates), expected_gradients
        )
    return _result(evaluation, point, total, statistics, into, discrepancy)


def _kept(
    evaluation: Evaluation, point: StepPoint, into: Sequence[Tensor | None] | None
) -> StepVjp:
    graph = point.graph
    assert graph is not None
    seeds = per_parameter(evaluation.blocks, point.of_gradients)
    outputs: list[tuple[Any, Tensor | None]] = [
        (g, seed)
        for g, seed in zip(graph.gradients, seeds, strict=True)
        if g is not None and seed is not None
    ]
    if evaluation.joint(point.of_statistics):
        outputs += _first_order_outputs(graph.evaluated, point)
    statistics = {n: graph.statistics_leaves[n] for n in point.of_statistics}
    wanted = [*graph.leaves, *statistics.values()]
    weights = leaves_of(point.batch)
    total: list[Tensor | None] = [None] * (len(wanted) + len(weights))
    if outputs:
        total = unchecked_grad(
            [t for t, _ in outputs],
            [*wanted, *weights],
            [v for _, v in outputs],
            retain=point.retain,
        )
    own = len(wanted)
    total = [*evaluation.plant.parallel.means(total[:own], wanted), *total[own:]]
    return _result(evaluation, point, total, statistics, into)


def _gradients(
    loss: Tensor, leaves: Sequence[Tensor], seeds: Sequence[Tensor | None], *, valueless: bool
) -> list[Tensor | None]:
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


def _first_order(evaluation: Evaluation, point: StepPoint) -> StepVjp:
    """The part without the Hessian, where statistics or a reward take part."""
    statistics = fresh_leaves(point.buffers, point.of_statistics)
    evaluation.place(point.flats, point.buffers, statistics)
    wanted = [*evaluation.leaves, *statistics.values()]
    point.restore_rng()
    outputs = _first_order_outputs(evaluation(point.batch, statistics=bool(statistics)), point)
    total = gradients_by_backward(
        [t for t, _ in outputs],
        [*wanted, *leaves_of(point.batch)],
        [v for _, v in outputs],
        evaluation.model,
    )
    own = len(wanted)
    total = [*evaluation.plant.parallel.means(total[:own], wanted), *total[own:]]
    return _result(evaluation, point, total, statistics)


def _first_order_outputs(
    evaluated: Evaluated, point: StepPoint
) -> list[tuple[Tensor, Tensor | None]]:
    """(stage cost or statistic after the step, its costate)."""
    outputs: list[tuple[Tensor, Tensor | None]] = []
    if evaluated.stage is not None:
        outputs.append((evaluated.stage, None))
    for name, costate in point.of_statistics.items():
        after = evaluated.statistics[name]
        if after.requires_grad:
            outputs.append((after, costate))
    return outputs


def _result(
    evaluation: Evaluation,
    point: StepPoint,
    total: Sequence[Tensor | None],
    statistics: Mapping[str, Tensor],
    into: Sequence[Tensor | None] | None = None,
    discrepancy: float = 0.0,
) -> StepVjp:
    """total: a tensor per parameter, then per statistic, then per weighed micro-batch."""
    weights = leaves_of(point.batch)
    of_rows = total[len(total) - len(weights) :]
    by_weight = [
        torch.zeros_like(w) if t is None else t for w, t in zip(weights, of_rows, strict=True)
    ]
    count = len(total) - len(statistics) - len(weights)
    if into is None:
        parameters = per_block(evaluation.blocks, total[:count])
    else:
        parameters = _added(evaluation.blocks, into, total[:count])
    weight = evaluation.objective.loss_weight
    if weight and not evaluation.joint(point.of_statistics):
        # The stage cost is c_ℓ ℓ_t, whose gradient is known.
        parameters = _with_gradient(parameters, point.gradients, weight)
        by_weight = _staged(by_weight, point, weight)
    of_statistics = {n: p for n, p in zip(statistics, total[count:], strict=False) if p is not None}
    return StepVjp(parameters, of_statistics, discrepancy, by_weight)


def _staged(by_weight: Sequence[Tensor], point: StepPoint, weight: float) -> list[Tensor]:
    """With the stage cost's own derivatives."""
    if not weight:
        return list(by_weight)
    return [r + weight * own for r, own in zip(by_weight, point.by_weight, strict=True)]


# Helpers -----------------------------------------------------------------------------------------


def _shares(batch: Any, joint: bool, pieces: int = 1) -> list[tuple[Any, float]]:
    """(micro-batch, its share of the mean): one graph each, unless they must be seen together.
    pieces: into which the rows of every micro-batch are cut, in their order."""
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
        whole = part.batch if isinstance(part, Weighed) else part
        whole = whole.batch if isinstance(whole, Kept) else whole
        for number in range(count):
            own = shard(whole, rows, number, count)
            piece: Any = Kept(own.rows)
            if isinstance(part, Weighed):
                of_piece = slice(rows * number // count, rows * (number + 1) // count)
                piece = replace(part, batch=piece, weights=part.weights[of_piece])
            found.append((piece, share * own.weight / count))
    return found


def per_parameter(blocks: Sequence[Block], vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """A vector per block as a view per parameter."""
    return [
        view
        for block, vector in zip(blocks, vectors, strict=True)
        for view in ([None] * len(block.sizes) if vector is None else block.views(vector))
    ]


def per_block(
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
    """`into`, a vector per block, with a tensor per parameter added in place."""
    result: list[Tensor | None] = []
    place = 0
    for block, vector in zip(blocks, into, strict=True):
        own = tensors[place : place + len(block.sizes)]
        place += len(block.sizes)
        if vector is None:
            result += per_block([block], own)
            continue
        pairs = [(v, t) for v, t in zip(block.views(vector), own, strict=True) if t is not None]
        if pairs:
            torch._foreach_add_([v for v, _ in pairs], [t for _, t in pairs])
        result.append(vector)
    return result


def _with_gradient(
    vectors: Sequence[Tensor | None], gradients: Sequence[Tensor | None], weight: float
) -> list[Tensor | None]:
    if weight == 0:
        return list(vectors)
    return [
        v if g is None else weight * g if v is None else v.add_(g, alpha=weight)
        for v, g in zip(vectors, gradients, strict=True)
    ]


def _into(vector: Tensor | None, term: Tensor | None) -> Tensor | None:
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

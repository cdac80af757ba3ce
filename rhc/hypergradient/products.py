"""Products with the Hessian of one step's loss: the only expensive term of the adjoint.

A product pulls (λ_g, λ_b) of a step's gradient g_t and BatchNorm statistics back to (θ_t, b_t), and
adds the stage cost's own gradient. Costs in gradient evaluations: exact 3 (g again, and twice
that to pull it back), forward difference 1 (the roll's g_t is known), central difference 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rhc.hypergradient.evaluation import Evaluated, Evaluation
from rhc.randomness import RandomState

Product = Literal["exact", "forward-difference", "central-difference"]
PRODUCTS: tuple[Product, ...] = ("exact", "forward-difference", "central-difference")
PRODUCT_COST: Mapping[str, int] = {"exact": 3, "forward-difference": 1, "central-difference": 2}


@dataclass(frozen=True)
class StepPoint:
    """Where a product is taken: θ_t per block, b_t, the batch, the random state, the roll's g_t."""

    flats: Sequence[Tensor]
    buffers: Mapping[str, Tensor]
    batch: Any
    rng: RandomState
    gradients: Sequence[Tensor | None]


@dataclass(frozen=True)
class Pulled:
    """What came back: one tensor (or None) per block, and per statistic.

    discrepancy: |g − g_t| / |g_t| of the gradient that was computed again, where it was compared.
    """

    parameters: list[Tensor | None]
    statistics: dict[str, Tensor]
    discrepancy: float = 0.0


def pull_back(
    product: Product,
    evaluation: Evaluation,
    point: StepPoint,
    gradient_costates: Sequence[Tensor | None],
    statistics_costates: Mapping[str, Tensor],
    *,
    compare: bool = False,
) -> Pulled:
    """H_t λ_g + ∂b′/∂θ ᵀ λ_b + ∇(stage cost), and the statistics' own costates.

    compare: an exact product also says how far its own g_t is from the roll's.
    """
    if product == "exact":
        return _exact(evaluation, point, gradient_costates, statistics_costates, compare)
    first = _first_order(evaluation, point, statistics_costates)
    curvature = _difference(product, evaluation, point, gradient_costates)
    return Pulled(
        [_sum(a, b) for a, b in zip(curvature, first.parameters, strict=True)], first.statistics
    )


def _exact(
    evaluation: Evaluation,
    point: StepPoint,
    gradient_costates: Sequence[Tensor | None],
    statistics_costates: Mapping[str, Tensor],
    compare: bool,
) -> Pulled:
    """Reverse over reverse: Pearlmutter 1994."""
    flats = [f.detach().requires_grad_() for f in point.flats]
    buffers, leaves = _statistics_leaves(point.buffers, statistics_costates)
    active = [i for i, v in enumerate(gradient_costates) if v is not None]

    def pull(evaluated: Evaluated) -> Pulled:
        outputs: list[Tensor] = []
        seeds: list[Tensor | None] = []
        discrepancy = 0.0
        if active:
            gradients = torch.autograd.grad(
                evaluated.loss, [flats[i] for i in active], create_graph=True, allow_unused=True
            )
            if compare:
                discrepancy = relative_difference(gradients, [point.gradients[i] for i in active])
            for i, g in zip(active, gradients, strict=True):
                if g is not None and g.requires_grad:  # a loss linear in θ has no curvature
                    outputs.append(g)
                    seeds.append(gradient_costates[i])
        _add_first_order(outputs, seeds, evaluated, statistics_costates)
        return replace(_pulled(outputs, seeds, flats, leaves), discrepancy=discrepancy)

    point.rng.restore()
    return evaluation.inside(flats, buffers, point.batch, pull, statistics=bool(leaves))


def _first_order(
    evaluation: Evaluation, point: StepPoint, statistics_costates: Mapping[str, Tensor]
) -> Pulled:
    """The part without the Hessian; free where the stage cost is c_ℓ ℓ_t, since g_t is known."""
    objective = evaluation.objective
    if not statistics_costates and not objective.reward_weight:
        weight = objective.loss_weight
        return Pulled(
            [weight * g if weight and g is not None else None for g in point.gradients], {}
        )
    flats = [f.detach().requires_grad_() for f in point.flats]
    buffers, leaves = _statistics_leaves(point.buffers, statistics_costates)

    def pull(evaluated: Evaluated) -> Pulled:
        outputs: list[Tensor] = []
        seeds: list[Tensor | None] = []
        _add_first_order(outputs, seeds, evaluated, statistics_costates)
        return _pulled(outputs, seeds, flats, leaves)

    point.rng.restore()
    return evaluation.inside(flats, buffers, point.batch, pull, statistics=bool(leaves))


def _difference(
    product: Product,
    evaluation: Evaluation,
    point: StepPoint,
    direction: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """(g(θ + εv) − g(θ)) / ε or (g(θ + εv) − g(θ − εv)) / 2ε, with ε = c |θ| / |v|.

    c is the square (cube) root of the machine's epsilon, which balances rounding and truncation
    for the forward (central) difference of a smooth function; at kinks nothing does.
    """
    # A block that v leaves alone has a row of H v all the same.
    active = [i for i, g in enumerate(point.gradients) if g is not None]
    moved = [i for i, v in enumerate(direction) if v is not None]
    if not moved:
        return [None] * len(direction)
    size = _norm([point.flats[i] for i in moved])
    length = _norm([v for v in direction if v is not None])
    if not float(length) > 0:
        return [None] * len(direction)
    precision = torch.finfo(point.flats[active[0]].dtype).eps
    c = precision**0.5 if product == "forward-difference" else precision ** (1 / 3)
    epsilon = float(c * size.clamp_min(1e-3) / length)

    def gradients(scale: float) -> list[Tensor]:
        flats = []
        for f, v in zip(point.flats, direction, strict=True):
            at = f.detach() if v is None else torch.add(f.detach(), v, alpha=scale)
            flats.append(at.requires_grad_())
        point.rng.restore()
        return evaluation.inside(
            flats,
            point.buffers,
            point.batch,
            lambda found: list(torch.autograd.grad(found.loss, [flats[i] for i in active])),
        )

    plus = gradients(epsilon)
    if product == "forward-difference":
        # An active block has a gradient.
        minus, width = [g for g in point.gradients if g is not None], epsilon
    else:
        minus, width = gradients(-epsilon), 2 * epsilon
    result: list[Tensor | None] = [None] * len(direction)
    for i, high, low in zip(active, plus, minus, strict=True):
        result[i] = (high - low) / width
    return result


def _statistics_leaves(
    buffers: Mapping[str, Tensor], costates: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    leaves = {name: buffers[name].detach().clone().requires_grad_() for name in costates}
    return {**buffers, **leaves}, leaves


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


def _pulled(
    outputs: list[Tensor],
    seeds: list[Tensor | None],
    flats: Sequence[Tensor],
    leaves: Mapping[str, Tensor],
) -> Pulled:
    if not outputs:
        return Pulled([None] * len(flats), {})
    pulled = torch.autograd.grad(
        outputs,
        [*flats, *leaves.values()],
        seeds,
        allow_unused=True,
    )
    statistics = {
        name: p for name, p in zip(leaves, pulled[len(flats) :], strict=True) if p is not None
    }
    return Pulled(list(pulled[: len(flats)]), statistics)


def relative_difference(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    """|found − expected| / |expected| over all blocks; 0 where both vanish."""
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if e is not None]
    if not pairs:
        return 0.0
    difference = _norm([e if f is None else f.detach() - e for f, e in pairs])
    return float(difference / _norm([e for _, e in pairs]).clamp_min(1e-30))


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors]))


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b

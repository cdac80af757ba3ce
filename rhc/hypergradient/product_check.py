"""The product with the Hessian, compared in float64 with differences of plain gradients.

Few steps in float32 do not show a wrong Hessian: its share of dJ/du grows with every step. So with
B its matrix, v the costate and w a direction, ⟨Bᵀv, w⟩ = ⟨v, g(θ + εw) − g(θ − εw)⟩ / 2ε is tested
in float64 on a few rows, where no kink lies within ε. In float32 ReLU and max-pooling would fail.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rhc.containers import Kept, mapped
from rhc.distributed import shard
from rhc.hypergradient.adjoint import kernels_for
from rhc.hypergradient.differences import noting_precision
from rhc.hypergradient.evaluation import Evaluation, parts
from rhc.hypergradient.hvp import PRODUCT_COST, Product, StepPoint, step_vjp
from rhc.hypergradient.optimizer_step import Costate
from rhc.rng import RandomState
from rhc.training.batches import MicroBatches, batch_size
from rhc.training.module_state import Buffers
from rhc.training.objective import Objective
from rhc.training.plant import Plant
from rhc.training.snapshot import Snapshot
from rhc.training.trajectory import Block

_ROWS = 4
"""Rows of a batch, at least, that the product is tried on; an eighth of a larger one."""


def try_product(
    plant: Plant,
    product: Product,
    blocks: Sequence[Block],
    batch: Any,
    costate: Costate | None = None,
    *,
    before: Snapshot | None = None,
) -> tuple[float, float]:
    """(Relative difference of ⟨Bᵀv, w⟩ and gradient differences in float64, gradient evaluations).

    costate: v. The difference is 0 if the model cannot compute in float64, or not smoothly. The
    live state is restored to `before`.
    """
    ours = parts(batch)[0]
    ours = ours.opened() if isinstance(ours, Kept) else ours
    rows = batch_size(ours)
    few = max(_ROWS, rows // 8)
    if few < rows:
        ours = shard(ours, rows, 0, rows // few).rows
    size = 2 * min(1.0, few / rows) / len(parts(batch))  # float64 takes twice as long
    before = before or plant.snapshot()
    try:
        with in_double(plant.model), noting_precision(plant) as coarsest:
            found, count = _projected(plant, product, blocks, doubled(ours), costate)
            return (found if coarsest() < 1e-10 else 0.0), count * size
    except Exception:  # code that is bound to float32; its errors are reported elsewhere
        return 0.0, 0.0
    finally:
        plant.restore(before)


def _projected(
    plant: Plant, product: Product, blocks: Sequence[Block], batch: Any, costate: Costate | None
) -> tuple[float, int]:
    """(The relative disagreement, gradient evaluations), of a plant that is in float64."""
    evaluation = Evaluation(plant, blocks, Objective(loss_weight=0.0, terminal_weight=1.0))
    buffers = Buffers(plant.model).copies()
    theta = [block.flatten(plant.parameters) for block in blocks]
    rng = RandomState.capture()
    with evaluation:

        def gradient(flats: Sequence[Tensor]) -> list[Tensor | None]:
            evaluation.place(flats, buffers)
            rng.restore()
            evaluation.clear_gradients()
            loss, _ = plant.backward(batch)
            if loss.dtype != torch.float64:
                raise TypeError
            there = [any(p.grad is not None for p in own) for own in evaluation.parameters]
            return [
                g if some else None for g, some in zip(evaluation.gradients(), there, strict=True)
            ]

        exact = product == "exact"
        # A difference starts from the gradient here; an exact product allows any direction.
        known = [t.double() for t in theta] if exact else gradient(theta)
        length = _norm(theta)
        w = [None if g is None else g / _norm(known) * length for g in known]
        v: list[Tensor | None] = [t if t is None else t.double() for t in along(costate, theta)]
        v = [None if g is None else t for g, t in zip(known, v, strict=True)]
        point = StepPoint(lambda: theta, buffers, batch, rng, known, v)
        sides = []
        with kernels_for(product, plant.model):
            for again in (False, True) if product == "forward-difference" else (False,):
                found = step_vjp(product, evaluation, point, again=again)
                sides.append(_inner(found.parameters, w))
        predicted = sum(sides) / len(sides)
        differences = []
        for distance in (1e-5, 1e-6):
            there, back = (
                gradient([t if d is None else t + s * d for t, d in zip(theta, w, strict=True)])
                for s in (distance, -distance)
            )
            differences.append((_inner(v, there) - _inner(v, back)) / (2 * distance))
            if abs(differences[-1] - predicted) <= 1e-5 * abs(predicted):
                return 0.0, PRODUCT_COST[product] + (not exact) + 2 * len(differences)
    first, second = differences
    apart = abs(second - predicted) / max(abs(second), abs(predicted), 1e-300)
    # Differences that have not settled say nothing.
    settled = abs(first - second) <= 0.02 * max(abs(first), abs(second))
    return apart if settled else 0.0, PRODUCT_COST[product] + 5


def along(costate: Costate | None, theta: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The costate of the parameters, or a random direction if it is absent or 0."""
    if costate is not None and any(t is not None and bool(t.any()) for t in costate.parameters):
        return costate.parameters
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(t.shape, generator=draw, dtype=torch.float64).to(t.device) for t in theta]


@contextmanager
def in_double(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers in float64 inside; the originals are restored afterwards."""
    kept = [(p, p.data, p.grad) for p in model.parameters() if p.is_floating_point()]
    held = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point()
    ]
    twins: dict[int, Tensor] = {}
    try:
        for p, values, _ in kept:
            p.grad, p.data = None, values.double()
        for module, name, buffer in held:
            module._buffers[name] = twins.setdefault(id(buffer), buffer.double())
        yield
    finally:
        for p, values, grad in kept:
            p.grad = None
            p.data, p.grad = values, grad
        for module, name, buffer in held:
            module._buffers[name] = buffer


def doubled(batch: Any) -> Any:
    if isinstance(batch, Kept):
        return doubled(batch.opened())
    if isinstance(batch, MicroBatches):
        return MicroBatches(map(doubled, batch))
    if hasattr(batch, "rows_between"):  # a reference to a batch: its loss_fn reads float32
        return batch
    return double(batch) if isinstance(batch, Tensor) else mapped(doubled, batch)


def double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def _inner(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> float:
    pairs = zip(a, b, strict=True)
    return sum(float(x @ y) for x, y in pairs if x is not None and y is not None)


def _norm(tensors: Sequence[Tensor | None]) -> float:
    return math.hypot(*(float(t.norm()) for t in tensors if t is not None))

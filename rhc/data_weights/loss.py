"""Weights on the losses of a step's rows, and derivatives by them.

A step's rows i have ŵ_i = w_i N / S, with N the number of rows of the step and S = Σ w_i, both over
its micro-batches and ranks: weights of mean 1. `Weighed.weights` holds ŵ, and is what a graph
differentiates by; with r = dX/dŵ the pullback is dX/dw_j = (N / S) (r_j − Σ_i ŵ_i r_i / N).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rhc.containers import Kept
from rhc.data_weights.cells import DataWeights
from rhc.data_weights.rows import RowLosses
from rhc.distributed import Shard
from rhc.errors import InputError
from rhc.workload import Workload

Sums = Callable[[Sequence[float]], list[float]]
"""Sums of numbers over ranks."""

Factors = Callable[[Tensor], Tensor]
"""cells (B,) -> what their weights are multiplied by."""


@dataclass(frozen=True, eq=False)
class Weighed:
    """A batch, or micro-batch, with the weights of its rows, or of the terms of its loss."""

    batch: Any
    cells: Tensor  # (B,) int64, on the CPU
    weights: Tensor  # ŵ (B,), a leaf
    scale: float  # N / S
    count: float  # N
    along: Tensor | None = None  # (B,) what a course multiplies the cells' weights by


@dataclass(frozen=True, eq=False)
class Judged:
    """A held-out batch, and what its rows' losses (B,) count."""

    batch: Any
    rows: Callable[[Tensor], Tensor]


def leaves_of(batch: Any) -> list[Tensor]:
    """ŵ of a step's batch, or of each of its micro-batches; [] where rows are not weighed."""
    parts = batch if isinstance(batch, tuple) else (batch,)
    return [p.weights for p in parts if isinstance(p, Weighed) and p.weights.is_leaf]


def taken_slopes(batch: Any) -> list[Tensor]:
    """dℓ/dŵ that a backward pass has left, per weighed micro-batch; cleared."""
    leaves = leaves_of(batch)
    found = [torch.zeros_like(w) if w.grad is None else w.grad for w in leaves]
    for w in leaves:
        w.grad = None
    return found


def weighed(
    weights: DataWeights,
    batches: Sequence[Any],
    like: Tensor,
    sums: Sums = list,
    factors: Factors | None = None,
    step: int | None = None,
) -> list[Weighed]:
    """The micro-batches of one step with their weights, of the dtype and device of `like`.
    step: for weights with a course."""
    found = []
    count = total = 0.0
    for batch in batches:
        inner = batch.batch if isinstance(batch, (Kept, Weighed)) else batch
        inner = inner.batch if isinstance(inner, Kept) else inner
        cells = _cells(weights, inner.rows if isinstance(inner, Shard) else inner)
        own = weights.at(cells, step)
        own = own if factors is None else own * factors(cells)
        if not (isinstance(inner, Shard) and inner.weight == 0):  # rows that only fill a rank
            count, total = count + len(own), total + float(own.sum())
        found.append((batch.batch if isinstance(batch, Weighed) else batch, cells, own))
    count, total = sums([count, total])
    scale = count / total
    return [
        Weighed(
            batch,
            cells,
            (own * scale).to(like).requires_grad_(),
            scale,
            count,
            weights.along(cells, step),
        )
        for batch, cells, own in found
    ]


def _cells(weights: DataWeights, batch: Any) -> Tensor:
    """A row each of the batch's; of a loss with terms, these."""
    return torch.arange(len(weights)) if weights.of_terms else weights.cells(batch)


def factors_of(cells: Tensor, factors: Tensor) -> Factors:
    """For `weighed`: the factors (m,) of these cells (m,), each once; 1 for others."""
    order = cells.argsort()
    places, sorted_factors = cells[order], factors[order]

    def factor(own: Tensor) -> Tensor:
        found = torch.searchsorted(places, own).clamp(max=len(places) - 1)
        return torch.where(places[found] == own, sorted_factors[found], 1.0)

    return factor


def weighing(
    loss_fn: Callable[[nn.Module, Any], Any], weights: DataWeights
) -> Callable[[nn.Module, Any], Any]:
    """loss_fn reduced to a scalar: the weighted mean of a `Weighed` batch's rows, the plain mean of
    another's; or the sum of its terms."""

    @functools.wraps(loss_fn, updated=())
    def reduced(model: nn.Module, batch: Any) -> Any:
        own, judged = isinstance(batch, Weighed), isinstance(batch, Judged)
        found = loss_fn(model, batch.batch if own or judged else batch)
        losses, *metrics = found if isinstance(found, tuple) and len(found) == 2 else (found,)
        if judged:
            losses = _counted(losses, batch)
        if isinstance(losses, RowLosses):
            loss = losses.mean
            if own:  # plus 0 at weights of 1, which leaves every bit of a recorded step
                _check_rows(losses.each, batch)
                loss = loss + ((batch.weights - 1) * losses.each).mean()
        elif isinstance(losses, Mapping):
            losses = _terms(losses, weights)
            loss = (batch.weights * losses).sum() if own else losses.sum()
        elif isinstance(losses, Tensor):
            if own:
                _check_rows(losses, batch)
            loss = (batch.weights * losses).mean() if own else losses.mean()
        else:
            return found  # refused by name where it is checked
        return (loss, *metrics) if metrics else loss

    return reduced


def unweighed(workload: Workload) -> Workload:
    """The workload without data weights, its loss the plain mean of rows or the sum of terms."""
    if workload.data_weights is None:
        return workload
    loss_fn = weighing(workload.loss_fn, workload.data_weights)
    return replace(workload, loss_fn=loss_fn, data_weights=None)


def _terms(losses: Mapping[str, Any], weights: DataWeights) -> Tensor:
    """(n,) the terms of a loss, in the order of the cells."""
    names = weights.names or ()
    if set(losses) != set(names):
        raise InputError(
            f"loss_fn returns the terms {', '.join(map(str, losses))}, and the cells are "
            f"{', '.join(names) or 'not named'}; give DataWeights(cells=[…]) the terms' names"
        )
    return torch.stack([losses[name].mean() for name in names])


def _counted(losses: Any, batch: Judged) -> Tensor:
    losses = losses.each if isinstance(losses, RowLosses) else losses
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        raise InputError(
            "an objective with rows=… needs one loss per held-out row, (B,), and loss_fn returns "
            f"{'terms' if isinstance(losses, Mapping) else 'a scalar'}; leave rows out"
        )
    return batch.rows(losses)


def _check_rows(losses: Tensor, batch: Weighed) -> None:
    if losses.shape == batch.weights.shape:
        return
    if losses.dim() == 0:
        raise InputError(
            "data weights need one loss per row, and loss_fn returns a scalar: return it as (B,), "
            "with reduction='none'"
        )
    raise InputError(
        f"loss_fn returns losses of shape {tuple(losses.shape)} for {len(batch.weights)} rows by "
        "cell_of; return one loss per row, (B,)"
    )


def per_row(
    step: Sequence[Weighed], by_weight: Sequence[Tensor], sums: Sums = list
) -> list[Tensor]:
    """dX/dw of every row of a step per micro-batch, (B,) float64, from r = dX/dŵ."""
    parts = [r.detach().double().cpu() for r in by_weight]
    pairs = zip(step, parts, strict=True)
    (inner,) = sums([float(sum((p.weights.detach().double().cpu() * r).sum() for p, r in pairs))])
    by_own = [p.scale * (r - inner / p.count) for p, r in zip(step, parts, strict=True)]
    return [r if p.along is None else r * p.along for p, r in zip(step, by_own, strict=True)]


def per_cell(total: Tensor, step: Sequence[Weighed], rows: Sequence[Tensor]) -> None:
    """Adds the derivatives by rows to those of their cells, in place."""
    for part, of_rows in zip(step, rows, strict=True):
        total.index_add_(0, part.cells, of_rows.to(total.dtype))

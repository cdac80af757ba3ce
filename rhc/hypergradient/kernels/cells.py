"""Operations that recurrent cells share. h, c: states (T + 1, B, H), the first of which precedes
the sequence. h': those before every position, h[:-1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rhc.hypergradient.kernels import matrices
from rhc.hypergradient.kernels.common import Sweep, nothing
from rhc.hypergradient.kernels.layers import affine

Weights = Sequence[Tensor]
"""(4H, input), (4H, H) and two biases (4H,) or none; 3H for a GRU, H for a plain cell."""

sigmoid_backward = torch.ops.aten.sigmoid_backward  # (v, σ) -> v σ (1 − σ)
tanh_backward = torch.ops.aten.tanh_backward  # (v, t) -> v (1 − t²)


def of_input(x: Tensor, w: Tensor, biases: Sequence[Tensor]) -> Tensor:
    """x wᵀ and both biases, where the cell has them, for all positions."""
    bias = biases[0] + biases[1] if biases else None
    return affine(x, w, bias, (w.is_leaf, all(b.is_leaf for b in biases)))


def positions(t: Tensor | None, count: int) -> Sequence[Tensor | None]:
    return [None] * count if t is None else t.unbind(0)


def along_weights(t: Tensor | None, h: Tensor, v_w: Tensor | None) -> Tensor | None:
    """t + h' v_wᵀ at every position: (T, B, n) or (n,), (T + 1, B, H), (n, H) -> (T, B, n)."""
    if v_w is None:
        return t
    if t is None:
        return matrices.product(h[:-1], v_w.t())
    rows = h[:-1].flatten(0, 1)
    flat = t if t.dim() == 1 else t.flatten(0, 1)
    return matrices.sum_of(flat, rows, v_w.t()).unflatten(0, (len(h) - 1, -1))


def weight_gradient(dz: Tensor, h: Tensor, w: Tensor, leaf: bool) -> Tensor:
    """Σ dz h'ᵀ over rows and positions: (T, B, n), (T + 1, B, H) -> (n, H). leaf: w is a parameter;
    then the value is skipped inside `valueless_gradients`."""
    return nothing(w) if leaf and Sweep.valueless else matrices.over_rows(dz, h[:-1])


def before(t: Tensor) -> Tensor:
    """(T, B, H) shifted to the position before each."""
    return F.pad(t, (0, 0, 0, 0, 0, 1))


def after(t: Tensor) -> Tensor:
    return F.pad(t, (0, 0, 0, 0, 1, 0))


def plus(t: Tensor | None, values: Tensor) -> Tensor:
    return values if t is None else t + values


def split(gates: Tensor, count: int) -> Tensor:
    """(T, B, count · H) -> (T, B, count, H)."""
    return gates.unflatten(-1, (count, -1))


def minus_twice(a: Tensor, b: Tensor) -> Tensor:
    return torch.addcmul(a, a, b, value=-2)

"""nn.RNN's recurrence (Elman 1990): h = φ(x + w h'), φ tanh or relu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from rhc.hypergradient.kernels import matrices
from rhc.hypergradient.kernels.cells import (
    Weights,
    after,
    along_weights,
    before,
    of_input,
    plus,
    positions,
    weight_gradient,
)
from rhc.hypergradient.kernels.common import Grads, tracked


def sequence(x: Tensor, states: list[Tensor], weights: Weights, *, relu: bool) -> list[Tensor]:
    w_input, w, *biases = weights
    return [_Rnn.apply(of_input(x, w_input, biases), w, *states, relu, w.is_leaf)]


class _Rnn(Function):
    """(x (T, B, H), w (H, H), h (B, H)) -> h (T + 1, B, H)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, h_first: Tensor, relu: bool, leaf: bool) -> Tensor:
        h = x.new_empty(len(x) + 1, *x.shape[1:])
        h[0] = h_first
        to_state = w.t()
        for x_t, h_t, h_next in zip(x, h[:-1], h[1:], strict=True):
            torch.addmm(x_t, h_t, to_state, out=h_next)
            if relu:
                h_next.relu_()
            else:
                h_next.tanh_()
        ctx.save_for_backward(h, w)
        ctx.relu, ctx.leaf = relu, leaf
        return h

    @staticmethod
    def backward(ctx: Any, g_h: Tensor) -> Grads:
        h, w = ctx.saved_tensors
        need_w = ctx.needs_input_grad[1]
        if tracked():
            dz, _, gw, gh_first = _RnnBackward.apply(g_h, h, w, need_w, ctx.relu, ctx.leaf)
            return dz, gw, gh_first, None, None
        dz, _, gh_first = _pullback(g_h, w, _slopes(h, ctx.relu))
        gw = weight_gradient(dz, h, w, False) if need_w else None
        return dz, gw, gh_first, None, None


def _slopes(h: Tensor, relu: bool) -> Tensor:
    """dz = dh · slope, (T, B, H)."""
    return (h[1:] > 0).to(h.dtype) if relu else 1 - h[1:] * h[1:]


def _pullback(g_h: Tensor, w: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dh (T, B, H) at every position, dh (B, H) of the first state)."""
    of_h, every = g_h.unbind(0), slopes.unbind(0)
    dh = of_h[-1]
    zs, hs = [], []
    for t in reversed(range(len(every))):
        dz = dh * every[t]
        zs.append(dz)
        hs.append(dh)
        dh = torch.addmm(of_h[t], dz, w)
    return torch.stack(zs[::-1]), torch.stack(hs[::-1]), dh


class _RnnBackward(Function):
    @staticmethod
    def forward(
        ctx: Any, g_h: Tensor, h: Tensor, w: Tensor, need_w: bool, relu: bool, leaf: bool
    ) -> Grads:
        dz, dh, gh_first = _pullback(g_h, w, _slopes(h, relu))
        ctx.save_for_backward(h, w, dz, dh)
        ctx.set_materialize_grads(False)
        ctx.relu = relu
        gw = weight_gradient(dz, h, w, leaf) if need_w else None
        return dz, dh, gw, gh_first

    @staticmethod
    def backward(
        ctx: Any, v_z: Tensor | None, v_dh: Tensor | None, v_w: Tensor | None, v_h: Tensor | None
    ) -> Grads:
        h, w, dz, dh = ctx.saved_tensors
        slopes = _slopes(h, ctx.relu)
        base = along_weights(v_z, h, v_w)
        base = torch.zeros_like(dz) if base is None else base
        # Adjoints of dz and dh, from the first position on.
        e = torch.zeros_like(h[0]) if v_h is None else v_h
        bases, every, straight = base.unbind(0), slopes.unbind(0), positions(v_dh, len(dz))
        to_state = w.t()
        every_a, every_e = [], [e]
        for t in range(len(every)):
            a = torch.addmm(bases[t], e, to_state)
            own = straight[t]
            e = a * every[t] if own is None else torch.addcmul(own, a, every[t])
            every_a.append(a)
            every_e.append(e)
        e = torch.stack(every_e)
        b_h = None if v_w is None else before(matrices.product(dz, v_w))
        if not ctx.relu:
            of_slopes = torch.stack(every_a).mul(dh) * h[1:] * -2
            b_h = plus(b_h, after(of_slopes))
        b_w = weight_gradient(dz, e, w, False) if ctx.needs_input_grad[2] else None
        return e if ctx.needs_input_grad[0] else None, b_h, b_w, None, None, None

"""nn.GRU's recurrence, as in cuDNN, and its derivatives of every order. Cho et al. 2014."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from rhc.hypergradient.kernels import matrices
from rhc.hypergradient.kernels.cells import (
    Weights,
    along_weights,
    before,
    minus_twice,
    plus,
    positions,
    sigmoid_backward,
    split,
    tanh_backward,
    weight_gradient,
)
from rhc.hypergradient.kernels.common import Grads, Sweep, nothing, tracked
from rhc.hypergradient.kernels.layers import affine


def sequence(x: Tensor, states: list[Tensor], weights: Weights) -> list[Tensor]:
    w_input, w, *biases = weights
    b_input, b = biases or (None, None)
    leaves = w_input.is_leaf, b_input is not None and b_input.is_leaf
    own = w.is_leaf, b is not None and b.is_leaf
    h, _, _ = _Gru.apply(affine(x, w_input, b_input, leaves), w, b, *states, own)
    return [h]


class _Gru(Function):
    """p = w h' + b, r = σ(x_r + p_r), u = σ(x_u + p_u), n = tanh(x_n + r p_n), h = n + u (h' − n).

    (x (T, B, 3H), w (3H, H), b (3H,), h (B, H)) -> h (T + 1, B, H), r, u, n (T, B, 3H), p_n (T, B,
    H).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        h_first: Tensor,
        leaves: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, rows, width = x.shape[0], x.shape[1], w.shape[1]
        h = x.new_empty(count + 1, rows, width)
        gates = torch.empty_like(x, memory_format=torch.contiguous_format)
        p_n = x.new_empty(count, rows, width)
        h[0] = h_first
        to_gates = w.t()
        for h_t, h_next, own, x_t, of_n in zip(h[:-1], h[1:], gates, x, p_n, strict=True):
            p = h_t @ to_gates if b is None else torch.addmm(b, h_t, to_gates)
            of_n.copy_(p[:, 2 * width :])
            r_u, n = own[:, : 2 * width], own[:, 2 * width :]
            torch.add(x_t[:, : 2 * width], p[:, : 2 * width], out=r_u).sigmoid_()
            r, u = r_u[:, :width], r_u[:, width:]
            torch.addcmul(x_t[:, 2 * width :], r, of_n, out=n).tanh_()
            torch.lerp(n, h_t, u, out=h_next)
        ctx.save_for_backward(h, gates, p_n, w)
        ctx.set_materialize_grads(False)
        ctx.leaves, ctx.slopes = leaves, None
        return h, gates, p_n

    @staticmethod
    def backward(ctx: Any, g_h: Tensor | None, g_gates: Tensor | None, g_p: Tensor | None) -> Grads:
        h, gates, p_n, w = ctx.saved_tensors
        _, need_w, need_b, *_ = ctx.needs_input_grad
        if tracked() and g_gates is None and g_p is None:
            if ctx.slopes is None:
                with torch.no_grad():
                    ctx.slopes = _slopes(h, gates, p_n)
            found = _GruBackward.apply(
                g_h, h, gates, p_n, w, *ctx.slopes, need_w, need_b, ctx.leaves
            )
            dx, _, gw, gb, gh_first = found
            return dx, gw, gb, gh_first, None
        slopes = ctx.slopes if ctx.slopes and not tracked() else _slopes(h, gates, p_n)
        straight, of_n = _straight(gates, p_n, g_gates, g_p)
        dp, dh, gh_first = _pullback(g_h, straight, gates, w, slopes[0])
        dx = _of_x(dp, dh, slopes[1], of_n)
        gw = weight_gradient(dp, h, w, False) if need_w else None
        return dx, gw, dp.sum((0, 1)) if need_b else None, gh_first, None


def _straight(
    gates: Tensor, p_n: Tensor, g_gates: Tensor | None, g_p: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of gates and p_n pulled back to p (T, B, 3H), and to n's argument (T, B, H)."""
    if g_gates is None and g_p is None:
        return None, None
    r, u, n = split(gates, 3).unbind(2)
    if g_gates is None:
        zero = torch.zeros_like(p_n)
        assert g_p is not None
        return torch.cat((zero, zero, g_p), -1), zero
    v_r, v_u, v_n = split(g_gates, 3).unbind(2)
    of_n = tanh_backward(v_n, n)
    of_p = of_n * r
    straight = torch.cat(
        (
            sigmoid_backward(torch.addcmul(v_r, of_n, p_n), r),
            sigmoid_backward(v_u, u),
            of_p if g_p is None else of_p + g_p,
        ),
        -1,
    )
    return straight, of_n


def _slopes(h: Tensor, gates: Tensor, p_n: Tensor) -> tuple[Tensor, Tensor]:
    """dp = (dh, dh, dh) · first (T, B, 3H), dx_n = dh · second (T, B, H)."""
    r, u, n = split(gates, 3).unbind(2)
    of_n = tanh_backward(1 - u, n)
    first = torch.cat(
        (sigmoid_backward(of_n * p_n, r), sigmoid_backward(h[:-1] - n, u), of_n * r), -1
    )
    return first, of_n


def _pullback(
    g_h: Tensor | None, straight: Tensor | None, gates: Tensor, w: Tensor, first: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dp (T, B, 3H), dh (T, B, H) at every position, dh (B, H) of the first state)."""
    count = len(gates)
    of_h, more = positions(g_h, count + 1), positions(straight, count)
    update, firsts = split(gates, 3)[:, :, 1].unbind(0), first.unbind(0)
    dh = torch.zeros_like(update[-1]) if of_h[-1] is None else of_h[-1]
    ps, hs = [], []
    for t in reversed(range(count)):
        of_gates, extra = _thrice(dh), more[t]
        dp = of_gates * firsts[t] if extra is None else torch.addcmul(extra, of_gates, firsts[t])
        ps.append(dp)
        hs.append(dh)
        own = of_h[t]
        carried = dh * update[t] if own is None else torch.addcmul(own, dh, update[t])
        dh = torch.addmm(carried, dp, w)
    return torch.stack(ps[::-1]), torch.stack(hs[::-1]), dh


def _of_x(dp: Tensor, dh: Tensor, second: Tensor, more: Tensor | None) -> Tensor:
    """dx (T, B, 3H), which differs from dp by r in the part of n."""
    of_n = dh * second if more is None else torch.addcmul(more, dh, second)
    return torch.cat((dp[..., : 2 * dh.shape[-1]], of_n), -1)


class _GruBackward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        g_h: Tensor | None,
        h: Tensor,
        gates: Tensor,
        p_n: Tensor,
        w: Tensor,
        first: Tensor,
        second: Tensor,
        need_w: bool,
        need_b: bool,
        leaves: tuple[bool, bool],
    ) -> Grads:
        dp, dh, gh_first = _pullback(g_h, None, gates, w, first)
        ctx.save_for_backward(h, gates, p_n, w, first, second, dh)
        ctx.set_materialize_grads(False)
        leaf_w, leaf_b = leaves
        gw = weight_gradient(dp, h, w, leaf_w) if need_w else None
        gb = None
        if need_b:
            gb = nothing(w[:, 0]) if leaf_b and Sweep.valueless else dp.sum((0, 1))
        return _of_x(dp, dh, second, None), dh, gw, gb, gh_first

    @staticmethod
    def backward(
        ctx: Any,
        v_x: Tensor | None,
        v_dh: Tensor | None,
        v_w: Tensor | None,
        v_b: Tensor | None,
        v_h: Tensor | None,
    ) -> Grads:
        h, gates, p_n, w, first, second, dh = ctx.saved_tensors
        if tracked():
            first, second = _slopes(h, gates, p_n)
        width = w.shape[1]
        r, u, n = split(gates, 3).unbind(2)
        # Adjoints of dp and dh, from the first position on; those of r and u with dx's share.
        base, straight = v_b, v_dh
        if v_x is not None:
            base = plus(v_b, F.pad(v_x[..., : 2 * width], (0, width)))
            straight = plus(v_dh, v_x[..., 2 * width :] * second)
        base = along_weights(base, h, v_w)
        base = torch.zeros_like(gates) if base is None else base.expand_as(gates)
        q, e = _adjoints(base, straight, v_h, w, u, first)
        q_r, q_u, q_n = (split(q, 3) * dh.unsqueeze(2)).unbind(2)
        # Adjoints of the slopes: second = (1 − u) (1 − n²), first = (second p_n r (1 − r), (h' − n)
        # u (1 − u), second r).
        of_r = sigmoid_backward(q_r, r)
        b_second = torch.addcmul(of_r * p_n, q_n, r)
        if v_x is not None:
            b_second = torch.addcmul(b_second, v_x[..., 2 * width :], dh)
        b_p = of_r * second
        b_r = second * (minus_twice(q_r * p_n, r) + q_n)
        of_u = sigmoid_backward(q_u, u)
        b_u = torch.addcmul(
            minus_twice(q_u * (h[:-1] - n), u) - tanh_backward(b_second, n), e[:-1], dh
        )
        b_n = -of_u - 2 * b_second * (1 - u) * n
        b_h = of_u
        dp = _thrice(dh) * first if v_w is not None or ctx.needs_input_grad[4] else None
        if v_w is not None:
            assert dp is not None
            b_h = b_h + matrices.product(dp, v_w)
        b_w = None
        if ctx.needs_input_grad[4]:
            assert dp is not None
            b_w = weight_gradient(dp, e, w, False)
        b_gates = torch.cat((b_r, b_u, b_n), -1)
        need_h = ctx.needs_input_grad[0]
        return e if need_h else None, before(b_h), b_gates, b_p, b_w, *[None] * 5


def _thrice(t: Tensor) -> Tensor:
    return torch.cat((t, t, t), -1)


def _adjoints(
    base: Tensor,
    straight: Tensor | None,
    v_h: Tensor | None,
    w: Tensor,
    update: Tensor,
    first: Tensor,
) -> tuple[Tensor, Tensor]:
    """Adjoints of dp (T, B, 3H) and of dh (T + 1, B, H). base: of dp, without the share from dh of
    the position before. straight: of dh."""
    count, rows, width = update.shape
    e = update.new_zeros(rows, width) if v_h is None else v_h
    more = positions(straight, count)
    bases, firsts, updates = base.unbind(0), first.unbind(0), update.unbind(0)
    to_gates = w.t()
    every_q, every_e = [], [e]
    for t in range(count):
        q = torch.addmm(bases[t], e, to_gates)
        by_p = (q * firsts[t]).unflatten(-1, (3, width)).sum(1)
        e = plus(more[t], torch.addcmul(by_p, e, updates[t]))
        every_q.append(q)
        every_e.append(e)
    return torch.stack(every_q), torch.stack(every_e)

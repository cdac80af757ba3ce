"""nn.LSTM's recurrence and its derivatives of every order. Hochreiter, Schmidhuber 1997."""

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
    minus_twice,
    of_input,
    plus,
    positions,
    sigmoid_backward,
    split,
    tanh_backward,
    weight_gradient,
)
from rhc.hypergradient.kernels.common import Grads, tracked


def sequence(x: Tensor, states: list[Tensor], weights: Weights) -> list[Tensor]:
    w_input, w, *biases = weights
    h, c, _ = _Lstm.apply(of_input(x, w_input, biases), w, *states, w.is_leaf)
    return [h, c]


class _Lstm(Function):
    """z = x + w h', (i, f, g, o) = (σ, σ, tanh, σ)(z), c = f c' + i g, h = o tanh c.

    (x (T, B, 4H), w (4H, H), h, c (B, H)) -> h, c (T + 1, B, H), gates (T, B, 4H).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, h_first: Tensor, c_first: Tensor, leaf: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        count, rows, width = x.shape[0], x.shape[1], w.shape[1]
        h, c = x.new_empty(2, count + 1, rows, width)
        gates = torch.empty_like(x, memory_format=torch.contiguous_format)
        h[0], c[0] = h_first, c_first
        to_gates, tanh_c = w.t(), torch.empty_like(h[0])
        split = gates.view(count, rows, 4, width)
        for t, (h_t, c_t, h_next, c_next, z, own) in enumerate(
            zip(h[:-1], c[:-1], h[1:], c[1:], gates, split, strict=True)
        ):
            torch.addmm(x[t], h_t, to_gates, out=z)
            i, f, g, o = own.unbind(1)
            own[:, :2].sigmoid_()
            g.tanh_()
            o.sigmoid_()
            torch.mul(f, c_t, out=c_next).addcmul_(i, g)
            torch.mul(o, torch.tanh(c_next, out=tanh_c), out=h_next)
        ctx.save_for_backward(h, c, gates, w)
        ctx.set_materialize_grads(False)
        ctx.leaf, ctx.slopes = leaf, None
        return h, c, gates

    @staticmethod
    def backward(ctx: Any, g_h: Tensor | None, g_c: Tensor | None, g_gates: Tensor | None) -> Grads:
        h, c, gates, w = ctx.saved_tensors
        if tracked() and g_gates is None:
            if ctx.slopes is None:
                with torch.no_grad():
                    ctx.slopes = _slopes(c, gates)
            found = _LstmBackward.apply(
                g_h, g_c, h, c, gates, w, *ctx.slopes, ctx.needs_input_grad[1], ctx.leaf
            )
            along, _, _, gw, gh_first, gc_first = found
            return along, gw, gh_first, gc_first, None
        slopes = ctx.slopes if ctx.slopes and not tracked() else _slopes(c, gates)
        straight = None
        if g_gates is not None:
            i_f, g, o = split(gates, 4).split((2, 1, 1), 2)
            v_if, v_g, v_o = split(g_gates, 4).split((2, 1, 1), 2)
            straight = torch.cat(
                (sigmoid_backward(v_if, i_f), tanh_backward(v_g, g), sigmoid_backward(v_o, o)), 2
            ).flatten(2)
        along, _, _, gh_first, gc_first = _pullback(g_h, g_c, straight, gates, w, *slopes)
        gw = weight_gradient(along, h, w, False) if ctx.needs_input_grad[1] else None
        return along, gw, gh_first, gc_first, None


def _slopes(c: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """dz = (dc, dc, dc, dh) · first (T, B, 4H), dc = dh · second + … (T, B, H)."""
    i, f, g, o = split(gates, 4).unbind(2)
    tanh_c = torch.tanh(c[1:])
    first = torch.stack(
        (
            sigmoid_backward(g, i),
            sigmoid_backward(c[:-1], f),
            tanh_backward(i, g),
            sigmoid_backward(tanh_c, o),
        ),
        2,
    )
    return first.flatten(2), tanh_backward(o, tanh_c)


def _pullback(
    g_h: Tensor | None,
    g_c: Tensor | None,
    straight: Tensor | None,
    gates: Tensor,
    w: Tensor,
    first: Tensor,
    second: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dz (T, B, 4H), dh, dc (T, B, H) at every position, dh, dc (B, H) of the first states).
    straight: the direct gradient of z."""
    count = len(gates)
    of_h, of_c = positions(g_h, count + 1), positions(g_c, count + 1)
    more, forget = positions(straight, count), split(gates, 4)[:, :, 1].unbind(0)
    firsts, seconds = first.unbind(0), second.unbind(0)
    dh = torch.zeros_like(seconds[-1]) if of_h[-1] is None else of_h[-1]
    carried = of_c[-1]
    zs, hs, cs = [], [], []
    for t in reversed(range(count)):
        dc = dh * seconds[t] if carried is None else torch.addcmul(carried, dh, seconds[t])
        of_gates = torch.cat((dc, dc, dc, dh), -1)
        extra = more[t]
        dz = of_gates * firsts[t] if extra is None else torch.addcmul(extra, of_gates, firsts[t])
        zs.append(dz)
        hs.append(dh)
        cs.append(dc)
        own_h, own_c = of_h[t], of_c[t]
        dh = dz @ w if own_h is None else torch.addmm(own_h, dz, w)
        carried = dc * forget[t] if own_c is None else torch.addcmul(own_c, dc, forget[t])
    assert carried is not None
    return torch.stack(zs[::-1]), torch.stack(hs[::-1]), torch.stack(cs[::-1]), dh, carried


class _LstmBackward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        g_h: Tensor | None,
        g_c: Tensor | None,
        h: Tensor,
        c: Tensor,
        gates: Tensor,
        w: Tensor,
        first: Tensor,
        second: Tensor,
        need_w: bool,
        leaf: bool,
    ) -> Grads:
        dz, dh, dc, gh_first, gc_first = _pullback(g_h, g_c, None, gates, w, first, second)
        ctx.save_for_backward(h, c, gates, w, first, second, dz, dh, dc)
        ctx.set_materialize_grads(False)
        gw = weight_gradient(dz, h, w, leaf) if need_w else None
        return dz, dh, dc, gw, gh_first, gc_first

    @staticmethod
    def backward(
        ctx: Any,
        v_z: Tensor | None,
        v_dh: Tensor | None,
        v_dc: Tensor | None,
        v_w: Tensor | None,
        v_h: Tensor | None,
        v_c: Tensor | None,
    ) -> Grads:
        h, c, gates, w, first, second, dz, dh, dc = ctx.saved_tensors
        if tracked():
            first, second = _slopes(c, gates)
        i, f, g, o = split(gates, 4).unbind(2)
        # Adjoints of dz, dh and dc, from the first position on.
        base = along_weights(v_z, h, v_w)
        base = torch.zeros_like(dz) if base is None else base
        a, e, k = _adjoints(base, v_dh, v_dc, v_h, v_c, w, f, first, second)
        a_i, a_f, a_g, a_o = split(a, 4).unbind(2)
        # Adjoints of the slopes.
        tanh_c = torch.tanh(c[1:])
        b_gates = torch.stack(
            (
                dc * (minus_twice(a_i * g, i) + tanh_backward(a_g, g)),
                dc * (minus_twice(a_f * c[:-1], f) + k[:-1]),
                dc * torch.addcmul(sigmoid_backward(a_i, i), a_g * i, g, value=-2),
                dh * (minus_twice(a_o * tanh_c, o) + tanh_backward(k[1:], tanh_c)),
            ),
            2,
        ).flatten(2)
        of_tanh = torch.addcmul(sigmoid_backward(a_o, o), k[1:] * o, tanh_c, value=-2)
        b_c = after(tanh_backward(dh * of_tanh, tanh_c)) + before(sigmoid_backward(dc * a_f, f))
        b_h = None if v_w is None else before(matrices.product(dz, v_w))
        b_w = weight_gradient(dz, e, w, False) if ctx.needs_input_grad[5] else None
        need_h, need_c = ctx.needs_input_grad[:2]
        found = e if need_h else None, k if need_c else None, b_h, b_c, b_gates, b_w
        return *found, *[None] * 4


def _adjoints(
    base: Tensor,
    v_dh: Tensor | None,
    v_dc: Tensor | None,
    v_h: Tensor | None,
    v_c: Tensor | None,
    w: Tensor,
    forget: Tensor,
    first: Tensor,
    second: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adjoints of dz (T, B, 4H), and of dh and dc (T + 1, B, H). base: of dz, without the share
    from dh of the position before."""
    count, rows, width = second.shape
    e = second.new_zeros(rows, width) if v_h is None else v_h
    k = second.new_zeros(rows, width) if v_c is None else v_c
    of_dh, of_dc = positions(v_dh, count), positions(v_dc, count)
    bases, firsts, seconds = base.unbind(0), first.unbind(0), second.unbind(0)
    forgets, to_gates = forget.unbind(0), w.t()
    every_a, every_e, every_k = [], [e], [k]
    for t in range(count):
        a = torch.addmm(bases[t], e, to_gates)
        by_c, by_h = (a * firsts[t]).split((3 * width, width), -1)
        k = torch.addcmul(by_c.unflatten(-1, (3, width)).sum(1), k, forgets[t])
        k = plus(of_dc[t], k)
        e = plus(of_dh[t], torch.addcmul(by_h, k, seconds[t]))
        every_a.append(a)
        every_e.append(e)
        every_k.append(k)
    return torch.stack(every_a), torch.stack(every_e), torch.stack(every_k)

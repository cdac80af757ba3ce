"""nn.LSTM, nn.GRU and nn.RNN over whole sequences: a node per layer, direction and order.

torch composes a recurrent layer of a dozen nodes a position, whose second derivative takes ten
times as many. Written out, the pullback of a sequence is itself a linear recurrence, from the last
position to the first, whose coefficients ("slopes") are functions of what the pass forwards has
found; pulling it back in turn is a recurrence from the first to the last, of the same matrix
products. All that does not recur is done for the whole sequence at once: the products with the
input's weights, the weights' gradients, the slopes, and their derivatives.

What the pass forwards has found (states and gates) is output of its node, so that the derivative of
the slopes reaches it as any other gradient does. So only one recurrence is differentiated by hand
for each cell, and derivatives of every order come out.

Packed sequences are taken apart and padded: what lies beyond a sequence's end comes after it, and
nothing of it is read.

States are h, c with a position more than the sequence has: the first is what it begins with. T: the
positions of the sequence, B: rows of the batch, H: width of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import _VF, Tensor
from torch.autograd import Function

from rhc.hypergradient.kernels import matrices
from rhc.hypergradient.kernels.common import Grads, Sweep, nothing, plain, tracked
from rhc.hypergradient.kernels.layers import affine

_lstm, _gru, _rnn_tanh, _rnn_relu = _VF.lstm, _VF.gru, _VF.rnn_tanh, _VF.rnn_relu
_sigmoid_backward = torch.ops.aten.sigmoid_backward  # (v, σ) -> v σ (1 − σ)
_tanh_backward = torch.ops.aten.tanh_backward  # (v, t) -> v (1 − t²)


def lstm(*arguments: Any) -> tuple[Tensor, ...]:
    """torch._VF.lstm: (output, h, c)."""
    return _called(_lstm, _lstm_sequence, arguments, hidden=2)


def gru(*arguments: Any) -> tuple[Tensor, ...]:
    """torch._VF.gru: (output, h)."""
    return _called(_gru, _gru_sequence, arguments)


def rnn_tanh(*arguments: Any) -> tuple[Tensor, ...]:
    """torch._VF.rnn_tanh: (output, h)."""
    return _called(_rnn_tanh, partial(_rnn_sequence, relu=False), arguments)


def rnn_relu(*arguments: Any) -> tuple[Tensor, ...]:
    """torch._VF.rnn_relu: (output, h)."""
    # Nothing bounds the states of positions that a packed sequence does not have.
    return _called(_rnn_relu, partial(_rnn_sequence, relu=True), arguments, packed=False)


# Layers and directions ---------------------------------------------------------------------------

Weights = Sequence[Tensor]
"""(4H, input), (4H, H) and two biases (4H,) or none; 3H for a GRU, H for a plain cell."""

OfSequence = Callable[[Tensor, list[Tensor], Weights], list[Tensor]]
"""(input (T, B, ·), first states (B, H), weights) -> states (T + 1, B, H) of one layer in one
direction, the output's first."""


def _called(
    native: Callable[..., tuple[Tensor, ...]],
    sequence: OfSequence,
    arguments: Sequence[Any],
    *,
    hidden: int = 1,
    packed: bool = True,
) -> tuple[Tensor, ...]:
    """(output, last states), by `native` where the kernels here cannot take the call.

    hidden: how many states a cell has. packed: whether they take packed sequences.
    """
    found = _ours(arguments, hidden, packed)
    return native(*arguments) if found is None else _layers(sequence, found)


class _Packing:
    """Where the rows of a packed sequence lie when it is padded: (T, B), forwards and backwards.

    batch_sizes: (T,), the rows that have so many positions, longest sequences first.
    """

    def __init__(self, batch_sizes: Tensor, device: torch.device) -> None:
        counts = batch_sizes.to(torch.long)
        places = torch.arange(len(counts)).unsqueeze(1)
        rows = torch.arange(int(counts[0])).unsqueeze(0)
        there = rows < counts.unsqueeze(1)
        lengths = there.sum(0)
        first = counts.cumsum(0) - counts
        row = torch.where(there, first.unsqueeze(1) + rows, 0)
        mirrored = (lengths - 1 - places).clamp_min(0)
        padded = places * there.shape[1] + rows
        self.rows = tuple(t.to(device) for t in (row, row.gather(0, mirrored)))
        """(T, B) for a direction: of the packed input, any where the sequence has ended."""
        self.back = tuple(t[there].to(device) for t in (padded, padded.gather(0, mirrored)))
        """(packed rows,) for a direction: of the padded output."""
        self.ends = lengths.to(device), torch.arange(there.shape[1], device=device)
        """Of states (T + 1, B, H): those at every sequence's end."""

    def padded(self, x: Tensor, direction: int) -> Tensor:
        return x[self.rows[direction]]

    def packed(self, y: Tensor, direction: int) -> Tensor:
        return y.flatten(0, 1)[self.back[direction]]


class _Call(NamedTuple):
    """x: (T, B, ·), or (packed rows, ·). cells: the weights per layer and direction."""

    x: Tensor
    states: list[Tensor]
    cells: list[Weights]
    layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    packing: _Packing | None


def _ours(arguments: Sequence[Any], hidden: int, packable: bool) -> _Call | None:
    """What the kernels here can take of a call: not projected states, autocast."""
    if len(arguments) != 9:
        return None
    packed = isinstance(arguments[1], Tensor) and arguments[1].dtype == torch.int64
    x, rest = arguments[0], list(arguments[1:])
    if packed:  # (data, batch sizes, …), without batch_first
        rest = [*rest[1:], False]
    states, weights, has_bias, layers, dropout, training, bidirectional, batch_first = rest
    states = [states] if isinstance(states, Tensor) else list(states)
    per_cell = 4 if has_bias else 2
    count = layers * (2 if bidirectional else 1)
    if (
        (packed and not packable)
        or len(states) != hidden
        or len(weights) != per_cell * count
        or x.dim() != (2 if packed else 3)
        or not x.numel()
    ):
        return None
    tensors = [x, *states, *weights]
    if not plain(*tensors) or not any(t.requires_grad for t in tensors):
        return None
    cells = [weights[n * per_cell : (n + 1) * per_cell] for n in range(count)]
    packing = _Packing(arguments[1], x.device) if packed else None
    return _Call(x, states, cells, layers, dropout, training, bidirectional, batch_first, packing)


def _layers(sequence: OfSequence, call: _Call) -> tuple[Tensor, ...]:
    """(output, last states)."""
    x = call.x.transpose(0, 1) if call.batch_first else call.x
    packing = call.packing
    directions = 2 if call.bidirectional else 1
    last = []
    for layer in range(call.layers):
        outputs = []
        for direction in range(directions):
            n = layer * directions + direction
            if packing is not None:
                given = packing.padded(x, direction)
            else:
                given = x.flip(0) if direction else x.contiguous()
            states = sequence(given, [s[n] for s in call.states], call.cells[n])
            y = states[0][1:]
            if packing is not None:
                outputs.append(packing.packed(y, direction))
                last.append([s[packing.ends] for s in states])
            else:
                outputs.append(y.flip(0) if direction else y)
                last.append([s[-1] for s in states])
        x = torch.cat(outputs, -1) if call.bidirectional else outputs[0]
        if call.dropout and call.training and layer < call.layers - 1:
            x = F.dropout(x, call.dropout)
    return (
        x.transpose(0, 1) if call.batch_first else x,
        *(torch.stack(ends) for ends in zip(*last, strict=True)),
    )


def _of_input(x: Tensor, w: Tensor, biases: Sequence[Tensor]) -> Tensor:
    """x wᵀ and both biases, where the cell has them, for all positions."""
    bias = biases[0] + biases[1] if biases else None
    return affine(x, w, bias, (w.is_leaf, all(b.is_leaf for b in biases)))


def _positions(t: Tensor | None, count: int) -> Sequence[Tensor | None]:
    return [None] * count if t is None else t.unbind(0)


def _along_weights(t: Tensor | None, h: Tensor, v_w: Tensor | None) -> Tensor | None:
    """t + h' v_wᵀ at every position: (T, B, n) or (n,), (T + 1, B, H), (n, H) -> (T, B, n)."""
    if v_w is None:
        return t
    if t is None:
        return matrices.product(h[:-1], v_w.t())
    rows = h[:-1].flatten(0, 1)
    flat = t if t.dim() == 1 else t.flatten(0, 1)
    return matrices.sum_of(flat, rows, v_w.t()).unflatten(0, (len(h) - 1, -1))


def _weight_gradient(along: Tensor, h: Tensor) -> Tensor:
    """Σ along hᵀ over rows and positions: (T, B, n), (T, B, H) -> (n, H)."""
    return matrices.over_rows(along, h)


def _before(t: Tensor) -> Tensor:
    """(T, B, H) at the position before each, of all positions and the first."""
    return F.pad(t, (0, 0, 0, 0, 0, 1))


def _after(t: Tensor) -> Tensor:
    return F.pad(t, (0, 0, 0, 0, 1, 0))


def _at(t: Tensor | None, values: Tensor) -> Tensor:
    return values if t is None else t + values


# LSTM --------------------------------------------------------------------------------------------


def _lstm_sequence(x: Tensor, states: list[Tensor], weights: Weights) -> list[Tensor]:
    w_input, w, *biases = weights
    h, c, _ = _Lstm.apply(_of_input(x, w_input, biases), w, *states, w.is_leaf)
    return [h, c]


class _Lstm(Function):
    """z = x + w h', (i, f, g, o) = (σ, σ, tanh, σ)(z), c = f c' + i g, h = o tanh c; h', c' before.

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
                    ctx.slopes = _lstm_slopes(c, gates)
            found = _LstmBackward.apply(
                g_h, g_c, h, c, gates, w, *ctx.slopes, ctx.needs_input_grad[1], ctx.leaf
            )
            along, _, _, gw, gh_first, gc_first = found
            return along, gw, gh_first, gc_first, None
        slopes = ctx.slopes if ctx.slopes and not tracked() else _lstm_slopes(c, gates)
        straight = None
        if g_gates is not None:
            i_f, g, o = _split(gates, 4).split((2, 1, 1), 2)
            v_if, v_g, v_o = _split(g_gates, 4).split((2, 1, 1), 2)
            straight = torch.cat(
                (_sigmoid_backward(v_if, i_f), _tanh_backward(v_g, g), _sigmoid_backward(v_o, o)), 2
            ).flatten(2)
        along, _, _, gh_first, gc_first = _lstm_pullback(g_h, g_c, straight, gates, w, *slopes)
        gw = _weight_gradient(along, h[:-1]) if ctx.needs_input_grad[1] else None
        return along, gw, gh_first, gc_first, None


def _split(gates: Tensor, count: int) -> Tensor:
    """(T, B, count · H) -> (T, B, count, H)."""
    return gates.unflatten(-1, (count, -1))


def _lstm_slopes(c: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    """The pullback's coefficients: dz = (dc, dc, dc, dh) · first, dc = dh · second + ….

    (T, B, 4H) and (T, B, H).
    """
    i, f, g, o = _split(gates, 4).unbind(2)
    tanh_c = torch.tanh(c[1:])
    first = torch.stack(
        (
            _sigmoid_backward(g, i),
            _sigmoid_backward(c[:-1], f),
            _tanh_backward(i, g),
            _sigmoid_backward(tanh_c, o),
        ),
        2,
    )
    return first.flatten(2), _tanh_backward(o, tanh_c)


def _lstm_pullback(
    g_h: Tensor | None,
    g_c: Tensor | None,
    straight: Tensor | None,
    gates: Tensor,
    w: Tensor,
    first: Tensor,
    second: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dz (T, B, 4H), dh, dc (T, B, H) at every position, dh, dc (B, H) of the first states).

    straight: what dz has besides (T, B, 4H).
    """
    count = len(gates)
    of_h, of_c = _positions(g_h, count + 1), _positions(g_c, count + 1)
    more, forget = _positions(straight, count), _split(gates, 4)[:, :, 1].unbind(0)
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
    """The pullback. dh and dc are outputs as well, so that derivatives can go on from there."""

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
        dz, dh, dc, gh_first, gc_first = _lstm_pullback(g_h, g_c, None, gates, w, first, second)
        ctx.save_for_backward(h, c, gates, w, first, second, dz, dh, dc)
        ctx.set_materialize_grads(False)
        gw = None
        if need_w:
            gw = nothing(w) if leaf and Sweep.valueless else _weight_gradient(dz, h[:-1])
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
            first, second = _lstm_slopes(c, gates)
        i, f, g, o = _split(gates, 4).unbind(2)
        # Adjoints of dz, dh and dc, from the first position on.
        base = _along_weights(v_z, h, v_w)
        base = torch.zeros_like(dz) if base is None else base
        a, e, k = _lstm_adjoints(base, v_dh, v_dc, v_h, v_c, w, f, first, second)
        a_i, a_f, a_g, a_o = _split(a, 4).unbind(2)
        # And of what the slopes are made of.
        tanh_c = torch.tanh(c[1:])
        b_gates = torch.stack(
            (
                dc * (_minus_twice(a_i * g, i) + _tanh_backward(a_g, g)),
                dc * (_minus_twice(a_f * c[:-1], f) + k[:-1]),
                dc * torch.addcmul(_sigmoid_backward(a_i, i), a_g * i, g, value=-2),
                dh * (_minus_twice(a_o * tanh_c, o) + _tanh_backward(k[1:], tanh_c)),
            ),
            2,
        ).flatten(2)
        of_tanh = torch.addcmul(_sigmoid_backward(a_o, o), k[1:] * o, tanh_c, value=-2)
        b_c = _after(_tanh_backward(dh * of_tanh, tanh_c)) + _before(_sigmoid_backward(dc * a_f, f))
        b_h = None if v_w is None else _before(matrices.product(dz, v_w))
        b_w = _weight_gradient(dz, e[:-1]) if ctx.needs_input_grad[5] else None
        need_h, need_c = ctx.needs_input_grad[:2]
        return (
            e if need_h else None,
            k if need_c else None,
            b_h,
            b_c,
            b_gates,
            b_w,
            None,
            None,
            None,
            None,
        )


def _minus_twice(a: Tensor, b: Tensor) -> Tensor:
    """a (1 − 2 b)."""
    return torch.addcmul(a, a, b, value=-2)


def _lstm_adjoints(
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
    """Of dz (T, B, 4H), and of dh and dc (T + 1, B, H), the first states' first.

    base: of dz, without what comes by dh of the position before.
    """
    count, rows, width = second.shape
    e = second.new_zeros(rows, width) if v_h is None else v_h
    k = second.new_zeros(rows, width) if v_c is None else v_c
    of_dh, of_dc = _positions(v_dh, count), _positions(v_dc, count)
    bases, firsts, seconds = base.unbind(0), first.unbind(0), second.unbind(0)
    forgets, to_gates = forget.unbind(0), w.t()
    every_a, every_e, every_k = [], [e], [k]
    for t in range(count):
        a = torch.addmm(bases[t], e, to_gates)
        by_c, by_h = (a * firsts[t]).split((3 * width, width), -1)
        k = torch.addcmul(by_c.unflatten(-1, (3, width)).sum(1), k, forgets[t])
        k = _at(of_dc[t], k)
        e = _at(of_dh[t], torch.addcmul(by_h, k, seconds[t]))
        every_a.append(a)
        every_e.append(e)
        every_k.append(k)
    return torch.stack(every_a), torch.stack(every_e), torch.stack(every_k)


# GRU ---------------------------------------------------------------------------------------------


def _gru_sequence(x: Tensor, states: list[Tensor], weights: Weights) -> list[Tensor]:
    w_input, w, *biases = weights
    b_input, b = biases or (None, None)
    leaves = w_input.is_leaf, b_input is not None and b_input.is_leaf
    own = w.is_leaf, b is not None and b.is_leaf
    h, _, _ = _Gru.apply(affine(x, w_input, b_input, leaves), w, b, *states, own)
    return [h]


class _Gru(Function):
    """p = w h' + b, r = σ(x_r + p_r), u = σ(x_u + p_u), n = tanh(x_n + r p_n), h = n + u (h' − n).

    (x (T, B, 3H), w (3H, H), b (3H,) or None, h (B, H)) -> h (T + 1, B, H), gates r, u, n
    (T, B, 3H), p_n (T, B, H).
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
                    ctx.slopes = _gru_slopes(h, gates, p_n)
            found = _GruBackward.apply(
                g_h, h, gates, p_n, w, *ctx.slopes, need_w, need_b, ctx.leaves
            )
            dx, _, gw, gb, gh_first = found
            return dx, gw, gb, gh_first, None
        slopes = ctx.slopes if ctx.slopes and not tracked() else _gru_slopes(h, gates, p_n)
        straight, of_n = _gru_straight(gates, p_n, g_gates, g_p)
        dp, dh, gh_first = _gru_pullback(g_h, straight, gates, w, slopes[0])
        dx = _gru_input(dp, dh, slopes[1], of_n)
        gw = _weight_gradient(dp, h[:-1]) if need_w else None
        return dx, gw, dp.sum((0, 1)) if need_b else None, gh_first, None


def _gru_straight(
    gates: Tensor, p_n: Tensor, g_gates: Tensor | None, g_p: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of gates and p_n pulled back to p (T, B, 3H), and to n's argument (T, B, H)."""
    if g_gates is None and g_p is None:
        return None, None
    r, u, n = _split(gates, 3).unbind(2)
    if g_gates is None:
        zero = torch.zeros_like(p_n)
        assert g_p is not None
        return torch.cat((zero, zero, g_p), -1), zero
    v_r, v_u, v_n = _split(g_gates, 3).unbind(2)
    of_n = _tanh_backward(v_n, n)
    of_p = of_n * r
    straight = torch.cat(
        (
            _sigmoid_backward(torch.addcmul(v_r, of_n, p_n), r),
            _sigmoid_backward(v_u, u),
            of_p if g_p is None else of_p + g_p,
        ),
        -1,
    )
    return straight, of_n


def _gru_slopes(h: Tensor, gates: Tensor, p_n: Tensor) -> tuple[Tensor, Tensor]:
    """The pullback's coefficients: dp = (dh, dh, dh) · first, dx_n = dh · second.

    (T, B, 3H) and (T, B, H).
    """
    r, u, n = _split(gates, 3).unbind(2)
    of_n = _tanh_backward(1 - u, n)
    first = torch.cat(
        (_sigmoid_backward(of_n * p_n, r), _sigmoid_backward(h[:-1] - n, u), of_n * r), -1
    )
    return first, of_n


def _gru_pullback(
    g_h: Tensor | None, straight: Tensor | None, gates: Tensor, w: Tensor, first: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dp (T, B, 3H), dh (T, B, H) at every position, dh (B, H) of the first state)."""
    count = len(gates)
    of_h, more = _positions(g_h, count + 1), _positions(straight, count)
    update, firsts = _split(gates, 3)[:, :, 1].unbind(0), first.unbind(0)
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


def _gru_input(dp: Tensor, dh: Tensor, second: Tensor, more: Tensor | None) -> Tensor:
    """dx (T, B, 3H), which differs from dp by r in the part of n."""
    of_n = dh * second if more is None else torch.addcmul(more, dh, second)
    return torch.cat((dp[..., : 2 * dh.shape[-1]], of_n), -1)


class _GruBackward(Function):
    """The pullback. dh is an output as well, so that derivatives can go on from there."""

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
        dp, dh, gh_first = _gru_pullback(g_h, None, gates, w, first)
        ctx.save_for_backward(h, gates, p_n, w, first, second, dh)
        ctx.set_materialize_grads(False)
        leaf_w, leaf_b = (leaf and Sweep.valueless for leaf in leaves)
        gw = gb = None
        if need_w:
            gw = nothing(w) if leaf_w else _weight_gradient(dp, h[:-1])
        if need_b:
            gb = nothing(w[:, 0]) if leaf_b else dp.sum((0, 1))
        return _gru_input(dp, dh, second, None), dh, gw, gb, gh_first

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
            first, second = _gru_slopes(h, gates, p_n)
        width = w.shape[1]
        r, u, n = _split(gates, 3).unbind(2)
        # Adjoints of dp and dh, from the first position on; those of r and u with dx's share.
        base, straight = v_b, v_dh
        if v_x is not None:
            base = _at(v_b, F.pad(v_x[..., : 2 * width], (0, width)))
            straight = _at(v_dh, v_x[..., 2 * width :] * second)
        base = _along_weights(base, h, v_w)
        base = torch.zeros_like(gates) if base is None else base.expand_as(gates)
        q, e = _gru_adjoints(base, straight, v_h, w, u, first)
        q_r, q_u, q_n = (_split(q, 3) * dh.unsqueeze(2)).unbind(2)
        # And of what the slopes are made of: second = (1 − u) (1 − n²), first = (second p_n r (1 −
        # r), (h' − n) u (1 − u), second r).
        of_r = _sigmoid_backward(q_r, r)
        b_second = torch.addcmul(of_r * p_n, q_n, r)
        if v_x is not None:
            b_second = torch.addcmul(b_second, v_x[..., 2 * width :], dh)
        b_p = of_r * second
        b_r = second * (_minus_twice(q_r * p_n, r) + q_n)
        of_u = _sigmoid_backward(q_u, u)
        b_u = torch.addcmul(
            _minus_twice(q_u * (h[:-1] - n), u) - _tanh_backward(b_second, n), e[:-1], dh
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
            b_w = _weight_gradient(dp, e[:-1])
        b_gates = torch.cat((b_r, b_u, b_n), -1)
        need_h = ctx.needs_input_grad[0]
        return (
            e if need_h else None,
            _before(b_h),
            b_gates,
            b_p,
            b_w,
            None,
            None,
            None,
            None,
            None,
        )


def _thrice(t: Tensor) -> Tensor:
    return torch.cat((t, t, t), -1)


def _gru_adjoints(
    base: Tensor,
    straight: Tensor | None,
    v_h: Tensor | None,
    w: Tensor,
    update: Tensor,
    first: Tensor,
) -> tuple[Tensor, Tensor]:
    """Of dp (T, B, 3H), and of dh (T + 1, B, H), the first state's first.

    base: of dp, without what comes by dh of the position before. straight: of dh.
    """
    count, rows, width = update.shape
    e = update.new_zeros(rows, width) if v_h is None else v_h
    more = _positions(straight, count)
    bases, firsts, updates = base.unbind(0), first.unbind(0), update.unbind(0)
    to_gates = w.t()
    every_q, every_e = [], [e]
    for t in range(count):
        q = torch.addmm(bases[t], e, to_gates)
        by_p = (q * firsts[t]).unflatten(-1, (3, width)).sum(1)
        e = _at(more[t], torch.addcmul(by_p, e, updates[t]))
        every_q.append(q)
        every_e.append(e)
    return torch.stack(every_q), torch.stack(every_e)


# A plain cell ------------------------------------------------------------------------------------


def _rnn_sequence(x: Tensor, states: list[Tensor], weights: Weights, *, relu: bool) -> list[Tensor]:
    w_input, w, *biases = weights
    return [_Rnn.apply(_of_input(x, w_input, biases), w, *states, relu, w.is_leaf)]


class _Rnn(Function):
    """h = φ(x + w h'), φ tanh or relu; (x (T, B, H), w (H, H), h (B, H)) -> h (T + 1, B, H)."""

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
        dz, _, gh_first = _rnn_pullback(g_h, w, _rnn_slopes(h, ctx.relu))
        gw = _weight_gradient(dz, h[:-1]) if need_w else None
        return dz, gw, gh_first, None, None


def _rnn_slopes(h: Tensor, relu: bool) -> Tensor:
    """The pullback's coefficients: dz = dh · slope, (T, B, H)."""
    return (h[1:] > 0).to(h.dtype) if relu else 1 - h[1:] * h[1:]


def _rnn_pullback(g_h: Tensor, w: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
    """The pullback. dh is an output as well, so that derivatives can go on from there."""

    @staticmethod
    def forward(
        ctx: Any, g_h: Tensor, h: Tensor, w: Tensor, need_w: bool, relu: bool, leaf: bool
    ) -> Grads:
        dz, dh, gh_first = _rnn_pullback(g_h, w, _rnn_slopes(h, relu))
        ctx.save_for_backward(h, w, dz, dh)
        ctx.set_materialize_grads(False)
        ctx.relu = relu
        gw = None
        if need_w:
            gw = nothing(w) if leaf and Sweep.valueless else _weight_gradient(dz, h[:-1])
        return dz, dh, gw, gh_first

    @staticmethod
    def backward(
        ctx: Any, v_z: Tensor | None, v_dh: Tensor | None, v_w: Tensor | None, v_h: Tensor | None
    ) -> Grads:
        h, w, dz, dh = ctx.saved_tensors
        slopes = _rnn_slopes(h, ctx.relu)
        base = _along_weights(v_z, h, v_w)
        base = torch.zeros_like(dz) if base is None else base
        # Adjoints of dz and dh, from the first position on.
        e = torch.zeros_like(h[0]) if v_h is None else v_h
        bases, every, straight = base.unbind(0), slopes.unbind(0), _positions(v_dh, len(dz))
        to_state = w.t()
        every_a, every_e = [], [e]
        for t in range(len(every)):
            a = torch.addmm(bases[t], e, to_state)
            own = straight[t]
            e = a * every[t] if own is None else torch.addcmul(own, a, every[t])
            every_a.append(a)
            every_e.append(e)
        e = torch.stack(every_e)
        b_h = None if v_w is None else _before(matrices.product(dz, v_w))
        if not ctx.relu:
            of_slopes = torch.stack(every_a).mul(dh) * h[1:] * -2
            b_h = _at(b_h, _after(of_slopes))
        b_w = _weight_gradient(dz, e[:-1]) if ctx.needs_input_grad[2] else None
        return e if ctx.needs_input_grad[0] else None, b_h, b_w, None, None, None

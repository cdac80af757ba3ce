"""Layer and batch normalisation, and the running statistics of the latter."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from rhc.hypergradient.kernels.common import Grads, plain, total, tracked

_layer_norm, _batch_norm = F.layer_norm, F.batch_norm


# Layer normalisation -----------------------------------------------------------------------------


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.layer_norm."""
    if len(normalized_shape) != 1 or not plain(input, weight, bias):
        return _layer_norm(input, normalized_shape, weight, bias, eps)
    return _LayerNorm.apply(input, weight, bias, eps)


class _LayerNorm(Function):
    """y = w x̂ + b, x̂ = (x − mean) r, r = 1 / √(var + eps), over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor | None, b: Tensor | None, eps: float) -> Tensor:
        y, mean, r = torch.native_layer_norm(x, [x.shape[-1]], w, b, eps)
        ctx.save_for_backward(x, w, mean, r)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Grads:
        x, w, mean, r = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        if tracked():
            return *_LayerNormBackward.apply(gy, x, w, mean, r, ctx.eps, need), None
        return *_layer_norm_backward(gy, x, w, mean, r, need), None


def _layer_norm_backward(
    gy: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, r: Tensor, need: tuple[bool, ...]
) -> Grads:
    if w is None:
        gx, _, _ = torch.ops.aten.native_layer_norm_backward(
            gy, x, [x.shape[-1]], mean, r, None, None, [need[0], False, False]
        )
        return gx, None, gy.reshape(-1, gy.shape[-1]).sum(0) if need[2] else None
    found = torch.ops.aten.native_layer_norm_backward(
        gy, x, [x.shape[-1]], mean, r, w, w, list(need)
    )
    return tuple(g if n else None for g, n in zip(found, need, strict=True))


class _LayerNormBackward(Function):
    """gx = r (u − ⟨u⟩ − x̂ ⟨u x̂⟩) with u = w gy and ⟨·⟩ the mean over the last dimension."""

    @staticmethod
    def forward(
        ctx: Any,
        gy: Tensor,
        x: Tensor,
        w: Tensor | None,
        mean: Tensor,
        r: Tensor,
        eps: float,
        need: tuple[bool, ...],
    ) -> Grads:
        ctx.save_for_backward(gy, x, w, mean, r)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return _layer_norm_backward(gy, x, w, mean, r, need)

    @staticmethod
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> Grads:
        gy, x, w, mean, r = ctx.saved_tensors
        if tracked():  # a third derivative: r and the mean must be seen as functions
            mean = x.mean(-1, keepdim=True)
            r = ((x - mean).square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        n = x.shape[-1]
        normal = (x - mean) * r
        ggy = gx = gw = None
        if vx is not None:
            # gx = P u is symmetric in u, P the projection off 1 and x̂, times r.
            u = gy if w is None else gy * w
            v_normal, u_normal = _mean_product(vx, normal), _mean_product(u, normal)
            projected = _project(vx, None, x, normal, mean, r)
            u_projected = _project(gy, w, x, normal, mean, r)
            slope = _mean_product(u_projected, vx)
            if w is None:
                ggy = projected
            else:
                ggy = projected * w
                gw = (projected * gy).reshape(-1, n).sum(0)
            # The x in P: −r (P v ⟨u x̂⟩ + P u ⟨v x̂⟩ + x̂ ⟨v P u⟩)
            if tracked():
                gx = -r * (projected * u_normal + u_projected * v_normal + normal * slope)
            else:
                gx = torch.mul(projected, u_normal).addcmul_(u_projected, v_normal)
                gx.addcmul_(normal, slope).mul_(-r)
        if vw is not None:
            # gw = Σ gy x̂
            along = _project(gy, vw, x, normal, mean, r)
            if tracked():
                ggy, gx = total(ggy, normal * vw), total(gx, along)
            else:
                ggy = normal * vw if ggy is None else torch.addcmul(ggy, normal, vw)
                gx = along if gx is None else gx.add_(along)
        if vb is not None:
            ggy = vb.expand_as(gy) if ggy is None else ggy + vb
        return ggy, gx, gw, None, None, None, None


def _project(
    g: Tensor, w: Tensor | None, x: Tensor, normal: Tensor, mean: Tensor, r: Tensor
) -> Tensor:
    """r (u − ⟨u⟩ − x̂ ⟨u x̂⟩) of u = g w: the backward pass of a layer normalisation."""
    if tracked():
        u = g if w is None else g * w
        return r * (u - u.mean(-1, keepdim=True) - normal * _mean_product(u, normal))
    return torch.ops.aten.native_layer_norm_backward(
        g.contiguous(), x, [x.shape[-1]], mean, r, w, None, [True, False, False]
    )[0]


def _mean_product(a: Tensor, b: Tensor) -> Tensor:
    """⟨a b⟩ over the last dimension, kept: (…, n), (…, n) -> (…, 1)."""
    return torch.linalg.vecdot(a, b).unsqueeze(-1) / a.shape[-1]


# Batch normalisation -----------------------------------------------------------------------------


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.batch_norm."""
    if (
        not training
        or input.dim() < 2
        or input.numel() <= input.shape[1]
        or not plain(input, running_mean, running_var, weight, bias)
        or not any(t is not None and t.requires_grad for t in (input, weight, bias))
    ):
        return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps)


class _BatchNorm(Function):
    """y = w x̂ + b, x̂ = (x − mean) r, r = 1 / √(var + eps), per channel, the second dimension."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, r = torch.native_batch_norm(
            x, w, b, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, w, mean, r)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Grads:
        x, w, mean, r = ctx.saved_tensors
        if tracked():
            found = _BatchNormBackward.apply(gy, x, w, mean, r, ctx.eps)
        else:
            found = _batch_norm_backward(gy, x, w, mean, r)
        need = ctx.needs_input_grad[:3]
        return *(g if n else None for g, n in zip(found, need, strict=True)), *[None] * 4


def _batch_norm_backward(
    gy: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(w r (gy − ⟨gy⟩ − x̂ ⟨gy x̂⟩), Σ gy x̂, Σ gy), with means ⟨·⟩ and sums per channel."""
    w = torch.ones_like(mean) if w is None else w
    return torch.ops.aten.native_batch_norm_backward(
        gy, x, w, None, None, mean, r, True, 0.0, [True, True, True]
    )


class _BatchNormBackward(Function):
    """gx = w r (gy − ⟨gy⟩ − x̂ ⟨gy x̂⟩), gw = Σ gy x̂, gb = Σ gy.

    Pulled back, all is a sum of gy, x̂, and of the v that comes for gx, with factors per channel
    that are made of a few means. With P u = r (u − ⟨u⟩ − x̂ ⟨u x̂⟩): w P v + x̂ v_w + v_b for gy,
    (v_w − w r ⟨v x̂⟩) P gy − w r ⟨gy x̂⟩ P v − w r x̂ ⟨v P gy⟩ for x, Σ v P gy for w.
    """

    @staticmethod
    def forward(
        ctx: Any, gy: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, r: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        gx, gw, gb = _batch_norm_backward(gy, x, w, mean, r)
        ctx.save_for_backward(gy, x, w, mean, r, gw.clone(), gb.clone())
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return gx, gw, gb

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> Grads:
        gy, x, w, mean, r, along, g_sum = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        if tracked():  # a third derivative: r, the mean and the sums must be seen as functions
            mean = _channel_sum(x) / n
            r = (_channel_sum(_affine(x, None, -mean).square()) / n + ctx.eps).rsqrt()
            normal = _affine(x, r, -mean * r)
            along, g_sum = _channel_sum(gy * normal), _channel_sum(gy)
        scale = r if w is None else w * r
        along, g_mean = along / n, g_sum / n  # ⟨gy x̂⟩, ⟨gy⟩
        vw = torch.zeros_like(mean) if vw is None else vw
        # By the sums gw and gb.
        ggy = _affine(x, vw * r, -vw * r * mean if vb is None else vb - vw * r * mean)
        by_g = vw * r
        by_normal, constant = -by_g * along, -by_g * g_mean
        if v is None:
            by_x = by_normal * r
            gx = _add(_affine(x, by_x, constant - by_x * mean), gy, by_g)
            return ggy, gx, None, None, None, None
        # And by gx.
        if tracked():
            v_along, v_mean = _channel_sum(v * normal) / n, _channel_sum(v) / n
            projected = _affine(v - _affine(normal, v_along, v_mean), scale, None)
        else:
            projected, v_along, v_mean = _batch_norm_backward(v, x, w, mean, r)
            v_along, v_mean = v_along / n, v_mean / n
        slope = r * (_channel_dot(v, gy) / n - g_mean * v_mean - along * v_along)  # ⟨v P gy⟩
        more_g, by_v = -scale * r * v_along, -scale * r * along
        by_normal = by_normal - more_g * along - by_v * v_along - scale * slope
        constant = constant - more_g * g_mean - by_v * v_mean
        by_x = by_normal * r
        gx = _affine(x, by_x, constant - by_x * mean)
        gx = _add(_add(gx, gy, by_g + more_g), v, by_v)
        gw = None if w is None else n * slope
        return projected + ggy if tracked() else ggy.add_(projected), gx, gw, None, None, None


def _per_channel(t: Tensor, like: Tensor) -> Tensor:
    return t.view(1, -1, *[1] * (like.dim() - 2))


def _channel_sum(t: Tensor) -> Tensor:
    return t.sum([d for d in range(t.dim()) if d != 1])


def _channel_dot(a: Tensor, b: Tensor) -> Tensor:
    """Σ a b per channel."""
    if a.dim() == 2 or tracked():
        return _channel_sum(a * b)
    return torch.linalg.vecdot(a.flatten(2), b.flatten(2)).sum(0)


def _affine(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """x · scale + shift per channel."""
    if not tracked() and scale is not None and shift is not None:  # one pass in place of two
        zero, one = torch.zeros_like(scale), torch.ones_like(scale)
        return torch.native_batch_norm(x, scale, shift, zero, one, False, 0.0, 0.0)[0]
    y = x if scale is None else x * _per_channel(scale, x)
    return y if shift is None else y + _per_channel(shift, x)


def _add(to: Tensor, t: Tensor, factor: Tensor) -> Tensor:
    """to + t · factor per channel; `to` is used up."""
    if tracked():
        return to + t * _per_channel(factor, t)
    return to.addcmul_(t, _per_channel(factor, t))


# Running statistics ------------------------------------------------------------------------------


def moved_statistics(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    moved: tuple[Tensor, Tensor],
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """BatchNorm's running (mean, var) after a pass over x, of known value `moved`, with a graph.

    torch's own layer has found the values on its way: to find them again would take two passes over
    x, a seventh of a small CNN's step. x: (N, C, …). mean, var: (C,), from before the pass.
    """
    return _MovedStatistics.apply(x, mean, var, *moved, momentum)


class _MovedStatistics(Function):
    """(1 − m) mean + m ⟨x⟩, and (1 − m) var + m times the unbiased variance of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        var: Tensor,
        moved_mean: Tensor,
        moved_var: Tensor,
        momentum: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        ctx.momentum = momentum
        return moved_mean.clone(), moved_var.clone()

    @staticmethod
    def backward(ctx: Any, g_mean: Tensor, g_var: Tensor) -> Grads:
        (x,) = ctx.saved_tensors
        m = ctx.momentum
        count = x.numel() // x.shape[1]
        gx = None
        if ctx.needs_input_grad[0]:
            shape = [1, -1] + [1] * (x.dim() - 2)
            values = x.to(g_mean.dtype)
            centred = values - values.mean([0, *range(2, x.dim())], keepdim=True)
            of_var = (g_var * (2 * m / max(1, count - 1))).view(shape)
            gx = (centred * of_var + (g_mean * (m / count)).view(shape)).to(x.dtype)
        return gx, g_mean * (1 - m), g_var * (1 - m), None, None, None

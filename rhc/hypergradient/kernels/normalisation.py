"""Layer and batch normalisation, and the running statistics of the latter."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from rhc.hypergradient.kernels.common import Grads, Kernel, Needed, Saved, plain

_layer_norm, _batch_norm = F.layer_norm, F.batch_norm

NO_LEAVES = (False, False, False)
"""The values of all gradients are read."""


# Layer normalisation -----------------------------------------------------------------------------


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if len(normalized_shape) != 1 or not plain(input, weight, bias):
        return _layer_norm(input, normalized_shape, weight, bias, eps)
    return _LAYER_NORM(eps, NO_LEAVES, input, weight, bias)


def _layer_norm_reference(eps: float, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    """y = w x̂ + b, x̂ = (x − mean) r, r = 1 / √(var + eps), over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if w is None else y * w
    return y if b is None else y + b


def _layer_norm_value(
    eps: float, needed: Needed, x: Tensor, w: Tensor | None, b: Tensor | None
) -> Any:
    y, mean, r = torch.native_layer_norm(x, [x.shape[-1]], w, b, eps)
    return y, (x, w, None, mean, r)


def _layer_norm_gradient(eps: float, needed: Needed, gy: Tensor, saved: Saved) -> Grads:
    """gx = r (u − ⟨u⟩ − x̂ ⟨u x̂⟩) with u = w gy and ⟨·⟩ the mean over the last dimension."""
    x, w, _, mean, r = saved
    mask = list(needed) if w is not None else [needed[0], False, False]
    gx, gw, gb = torch.ops.aten.native_layer_norm_backward(
        gy, x, [x.shape[-1]], mean, r, w, w, mask
    )
    if w is None and needed[2]:
        gb = gy.reshape(-1, gy.shape[-1]).sum(0)
    return tuple(g if need else None for g, need in zip((gx, gw, gb), needed, strict=True))


def _layer_norm_pullback(eps: float, needed: Needed, vs: Grads, gy: Tensor, saved: Saved) -> Grads:
    x, w, _, mean, r = saved
    vx, vw, vb = vs
    normal = (x - mean) * r
    ggy = gx = gw = None
    if vx is not None:
        # gx = P u is symmetric in u, P the projection off 1 and x̂, times r.
        u = gy if w is None else gy * w
        v_normal, u_normal = _mean_product(vx, normal), _mean_product(u, normal)
        projected = _project(vx, None, x, mean, r)
        u_projected = _project(gy, w, x, mean, r)
        slope = _mean_product(u_projected, vx)
        ggy = projected if w is None else projected * w
        if w is not None:
            gw = (projected * gy).reshape(-1, x.shape[-1]).sum(0)
        # The x in P: −r (P v ⟨u x̂⟩ + P u ⟨v x̂⟩ + x̂ ⟨v P u⟩)
        gx = torch.mul(projected, u_normal).addcmul_(u_projected, v_normal)
        gx.addcmul_(normal, slope).mul_(-r)
    if vw is not None:
        # gw = Σ gy x̂
        along = _project(gy, vw, x, mean, r)
        ggy = normal * vw if ggy is None else torch.addcmul(ggy, normal, vw)
        gx = along if gx is None else gx.add_(along)
    if vb is not None:
        ggy = vb.expand_as(gy) if ggy is None else ggy + vb
    return ggy, gx, gw, None


def _project(g: Tensor, w: Tensor | None, x: Tensor, mean: Tensor, r: Tensor) -> Tensor:
    """r (u − ⟨u⟩ − x̂ ⟨u x̂⟩) of u = g w: the backward pass of a layer normalisation."""
    return torch.ops.aten.native_layer_norm_backward(
        g.contiguous(), x, [x.shape[-1]], mean, r, w, None, [True, False, False]
    )[0]


def _mean_product(a: Tensor, b: Tensor) -> Tensor:
    """⟨a b⟩ over the last dimension, kept: (…, n), (…, n) -> (…, 1)."""
    return torch.linalg.vecdot(a, b).unsqueeze(-1) / a.shape[-1]


_LAYER_NORM = Kernel(
    _layer_norm_reference, _layer_norm_value, _layer_norm_gradient, _layer_norm_pullback
)


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
    if (
        not training
        or input.dim() < 2
        or input.numel() <= input.shape[1]
        or not plain(input, running_mean, running_var, weight, bias)
        or not any(t is not None and t.requires_grad for t in (input, weight, bias))
    ):
        return _batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    settings = running_mean, running_var, momentum, eps
    return _BATCH_NORM(settings, NO_LEAVES, input, weight, bias)


def _batch_norm_reference(settings: Any, x: Tensor, w: Tensor | None, b: Tensor | None) -> Tensor:
    """y = w x̂ + b, x̂ = (x − mean) r, r = 1 / √(var + eps), per channel, the second dimension."""
    channels = [d for d in range(x.dim()) if d != 1]
    centred = x - x.mean(channels, keepdim=True)
    y = centred * (centred.square().mean(channels, keepdim=True) + settings[-1]).rsqrt()
    y = y if w is None else y * _per_channel(w, x)
    return y if b is None else y + _per_channel(b, x)


def _batch_norm_value(
    settings: Any, needed: Needed, x: Tensor, w: Tensor | None, b: Tensor | None
) -> Any:
    running_mean, running_var, momentum, eps = settings
    y, mean, r = torch.native_batch_norm(x, w, b, running_mean, running_var, True, momentum, eps)
    return y, (x, w, None, mean, r)


def _batch_norm_gradient(settings: Any, needed: Needed, gy: Tensor, saved: Saved) -> Grads:
    """w r (gy − ⟨gy⟩ − x̂ ⟨gy x̂⟩), Σ gy x̂, Σ gy per channel, and the two sums once more."""
    x, w, _, mean, r = saved
    gx, gw, gb = _projected(gy, x, w, mean, r)
    asked = [g if need else None for g, need in zip((gx, gw, gb), needed, strict=True)]
    return *asked, gw.clone(), gb.clone()


def _batch_norm_pullback(
    settings: Any, needed: Needed, vs: Grads, gy: Tensor, saved: Saved
) -> Grads:
    """With P u = r (u − ⟨u⟩ − x̂ ⟨u x̂⟩): w P v + x̂ v_w + v_b for gy, Σ v P gy for w, and (v_w − w
    r ⟨v x̂⟩) P gy − w r ⟨gy x̂⟩ P v − w r x̂ ⟨v P gy⟩ for x."""
    x, w, _, mean, r, along, g_sum = saved
    v, vw, vb = vs
    n = x.numel() // x.shape[1]
    scale = r if w is None else w * r
    along, g_mean = along / n, g_sum / n  # ⟨gy x̂⟩, ⟨gy⟩
    vw = torch.zeros_like(mean) if vw is None else vw
    # From the sums gw and gb.
    ggy = _affine(x, vw * r, -vw * r * mean if vb is None else vb - vw * r * mean)
    by_g = vw * r
    by_normal, constant = -by_g * along, -by_g * g_mean
    if v is None:
        by_x = by_normal * r
        gx = _add(_affine(x, by_x, constant - by_x * mean), gy, by_g)
        return ggy, gx, None, None
    # From gx.
    projected, v_along, v_mean = _projected(v, x, w, mean, r)
    v_along, v_mean = v_along / n, v_mean / n
    slope = r * (_channel_dot(v, gy) / n - g_mean * v_mean - along * v_along)  # ⟨v P gy⟩
    more_g, by_v = -scale * r * v_along, -scale * r * along
    by_normal = by_normal - more_g * along - by_v * v_along - scale * slope
    constant = constant - more_g * g_mean - by_v * v_mean
    by_x = by_normal * r
    gx = _affine(x, by_x, constant - by_x * mean)
    gx = _add(_add(gx, gy, by_g + more_g), v, by_v)
    return ggy.add_(projected), gx, None if w is None else n * slope, None


def _projected(
    g: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    w = torch.ones_like(mean) if w is None else w
    return torch.ops.aten.native_batch_norm_backward(
        g, x, w, None, None, mean, r, True, 0.0, [True, True, True]
    )


def _per_channel(t: Tensor, like: Tensor) -> Tensor:
    return t.view(1, -1, *[1] * (like.dim() - 2))


def _channel_dot(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() == 2:
        return (a * b).sum(0)
    return torch.linalg.vecdot(a.flatten(2), b.flatten(2)).sum(0)


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """x · scale + shift per channel, in one pass in place of two."""
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.native_batch_norm(x, scale, shift, zero, one, False, 0.0, 0.0)[0]


def _add(to: Tensor, t: Tensor, factor: Tensor) -> Tensor:
    """to + t · factor per channel; overwrites `to`."""
    return to.addcmul_(t, _per_channel(factor, t))


_BATCH_NORM = Kernel(
    _batch_norm_reference, _batch_norm_value, _batch_norm_gradient, _batch_norm_pullback
)


# Running statistics ------------------------------------------------------------------------------


def moved_statistics(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    moved: tuple[Tensor, Tensor],
    momentum: float,
) -> tuple[Tensor, Tensor]:
    """BatchNorm's running (mean, var) (C,) after a pass over x (N, C, …), of known value `moved`,
    with a graph. Recomputing the value would take a seventh of a small CNN's step."""
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

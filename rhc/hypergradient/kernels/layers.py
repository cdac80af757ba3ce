"""Linear layers, convolution, GELU, layer normalisation, running statistics, attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from rhc.hypergradient.kernels.common import (
    Grads,
    Sweep,
    nothing,
    plain,
    total,
    tracked,
    which_leaves,
)

_linear, _gelu = F.linear, F.gelu
_layer_norm, _attention = F.layer_norm, F.scaled_dot_product_attention


# Linear ------------------------------------------------------------------------------------------


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear."""
    if (
        weight.dim() != 2
        or input.numel() * weight.shape[0] < Sweep.least
        or not plain(input, weight, bias)
    ):
        return _linear(input, weight, bias)
    return affine(input, weight, bias, which_leaves(weight, bias))


def affine(input: Tensor, weight: Tensor, bias: Tensor | None, leaves: tuple[bool, bool]) -> Tensor:
    """`linear` of ordinary tensors. leaves: whether nothing reads the value of the gradient of the
    weight, and of the bias, but as a parameter's."""
    return _Linear.apply(input, weight, bias, leaves)


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, leaves: tuple[bool, bool]
    ) -> Tensor:
        # Of a first layer, whose input is data, nobody asks for the weight again.
        ctx.save_for_backward(x, w if ctx.needs_input_grad[0] else None)
        ctx.leaves = leaves
        return _linear(x, w, b)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Grads:
        x, w = ctx.saved_tensors
        need = ctx.needs_input_grad[:3]
        if tracked():
            return *_LinearBackward.apply(gy, x, w, *need, ctx.leaves), None
        return *_linear_backward(gy, x, w, *need), None


def _linear_backward(
    gy: Tensor, x: Tensor, w: Tensor | None, need_x: bool, need_w: bool, need_b: bool
) -> Grads:
    rows = gy.reshape(-1, gy.shape[-1])
    return (
        gy @ w if need_x and w is not None else None,
        rows.t() @ x.reshape(-1, x.shape[-1]) if need_w else None,
        rows.sum(0) if need_b else None,
    )


class _LinearBackward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        gy: Tensor,
        x: Tensor,
        w: Tensor | None,
        need_x: bool,
        need_w: bool,
        need_b: bool,
        leaves: tuple[bool, bool],
    ) -> Grads:
        ctx.save_for_backward(gy, x, w)
        ctx.set_materialize_grads(False)
        leaf_w, leaf_b = (leaf and Sweep.valueless for leaf in leaves)
        gx, gw, gb = _linear_backward(
            gy, x, w, need_x, need_w and not leaf_w, need_b and not leaf_b
        )
        if need_w and leaf_w:
            gw = x.new_zeros(()).expand(gy.shape[-1], x.shape[-1])
        if need_b and leaf_b:
            gb = gy.new_zeros(()).expand(gy.shape[-1])
        return gx, gw, gb

    @staticmethod
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> Grads:
        gy, x, w = ctx.saved_tensors
        need_gy, need_x, need_w = ctx.needs_input_grad[:3]
        ggy = None
        if need_gy:
            if vw is not None:
                ggy = _linear(x, vw, vb)
            elif vb is not None:
                ggy = vb.expand_as(gy)
            if vx is not None and ggy is not None and vw is not None and not tracked():
                # In place, which saves a pass over the largest tensor of the layer.
                ggy.view(-1, ggy.shape[-1]).addmm_(vx.reshape(-1, vx.shape[-1]), w.t())
            elif vx is not None:
                ggy = total(ggy, vx @ w.t())
        gx = gy @ vw if need_x and vw is not None else None
        gw = None
        if need_w and vx is not None:
            gw = gy.reshape(-1, gy.shape[-1]).t() @ vx.reshape(-1, vx.shape[-1])
        return ggy, gx, gw, None, None, None, None


# Convolution -------------------------------------------------------------------------------------


def convolution(dims: int, native: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if (
            isinstance(padding, str)
            or input.dim() != dims + 2
            or not plain(input, weight, bias)
            or not (input.requires_grad or weight.requires_grad)
        ):
            return native(input, weight, bias, stride, padding, dilation, groups)
        settings = (*(_each(v, dims) for v in (stride, padding, dilation)), groups)
        return _Convolution.apply(input, weight, bias, settings, which_leaves(weight, bias))

    return conv


def _each(value: Any, dims: int) -> list[int]:
    return [int(value)] * dims if not isinstance(value, (tuple, list)) else [int(v) for v in value]


def _convolve(x: Tensor, w: Tensor, b: Tensor | None, settings: Any) -> Tensor:
    stride, padding, dilation, groups = settings
    return torch.convolution(x, w, b, stride, padding, dilation, False, [0] * len(stride), groups)


def _convolve_backward(
    gy: Tensor, x: Tensor, w: Tensor, settings: Any, mask: list[bool]
) -> tuple[Tensor | None, ...]:
    if not any(mask):
        return None, None, None
    stride, padding, dilation, groups = settings
    return torch.ops.aten.convolution_backward(
        gy, x, w, [w.shape[0]], stride, padding, dilation, False, [0] * len(stride), groups, mask
    )


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        settings: Any,
        leaves: tuple[bool, bool],
    ) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.settings, ctx.leaves = settings, leaves
        return _convolve(x, w, b, settings)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Grads:
        x, w = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:3])
        if tracked():
            return *_ConvolutionBackward.apply(gy, x, w, ctx.settings, need, ctx.leaves), None, None
        return *_convolve_backward(gy, x, w, ctx.settings, need), None, None


class _ConvolutionBackward(Function):
    @staticmethod
    def forward(
        ctx: Any,
        gy: Tensor,
        x: Tensor,
        w: Tensor,
        settings: Any,
        need: list[bool],
        leaves: tuple[bool, bool],
    ) -> Grads:
        ctx.save_for_backward(gy, x, w)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        leaf_w, leaf_b = (leaf and Sweep.valueless for leaf in leaves)
        real = [need[0], need[1] and not leaf_w, need[2] and not leaf_b]
        gx, gw, gb = _convolve_backward(gy, x, w, settings, real)
        if need[1] and leaf_w:
            gw = nothing(w)
        if need[2] and leaf_b:
            gb = gy.new_zeros(()).expand(w.shape[0])
        return gx, gw, gb

    @staticmethod
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> Grads:
        gy, x, w = ctx.saved_tensors
        need_gy, need_x, need_w = ctx.needs_input_grad[:3]
        ggy = gx = gw = None
        if need_gy:
            ggy = total(
                None if vw is None else _convolve(x, vw, vb, ctx.settings),
                None if vx is None else _convolve(vx, w, None, ctx.settings),
            )
            if vw is None and vb is not None:
                ggy = total(ggy, vb.view(1, -1, *[1] * (gy.dim() - 2)).expand_as(gy))
        if need_x and vw is not None:
            gx = _convolve_backward(gy, x, vw, ctx.settings, [True, False, False])[0]
        if need_w and vx is not None:
            gw = _convolve_backward(gy, vx, w, ctx.settings, [False, True, False])[1]
        return ggy, gx, gw, None, None, None


# GELU --------------------------------------------------------------------------------------------


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """torch.nn.functional.gelu."""
    if approximate != "none" or not plain(input) or not input.requires_grad:
        return _gelu(input, approximate=approximate)
    return _Gelu.apply(input)


class _Gelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = None
        return _gelu(x)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if tracked():
            # f' serves three times: here, in the pullback of this, and in the sweep after that.
            with torch.no_grad():
                ctx.slope = torch.ops.aten.gelu_backward(torch.ones_like(x), x)
            return _GeluBackward.apply(gy, x, ctx.slope)
        return torch.ops.aten.gelu_backward(gy, x) if ctx.slope is None else gy * ctx.slope


class _GeluBackward(Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(gy, x, slope)
        return gy * slope

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Grads:
        gy, x, slope = ctx.saved_tensors
        if tracked():  # a third derivative: let autograd see every step
            curvature = (2 - x * x) * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
            return torch.ops.aten.gelu_backward(v, x), v * gy * curvature, None
        # f'' = (2 − x²) φ(x)
        square = x * x
        gx = torch.mul(square, -0.5).exp_()
        gx.mul_(square.sub_(2)).mul_(gy).mul_(v).mul_(-1 / math.sqrt(2 * math.pi))
        return v * slope, gx, None


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


# Attention ---------------------------------------------------------------------------------------


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention: softmax(q kᵀ scale + mask) v."""
    masked = attn_mask is not None
    if masked or dropout_p or enable_gqa or query.dim() < 3 or not plain(query, key, value):
        return _attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        return _attention(query, key, value, is_causal=is_causal, scale=scale)
    # One kernel for mask, scale and product; the mask is a constant and costs nothing backwards.
    rows = (query.shape[-2], key.shape[-2])
    mask = query.new_zeros(rows)
    if is_causal:
        mask = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(1), -math.inf)
    q, k, v = (t.reshape(-1, *t.shape[-2:]) for t in (query, key, value))
    scores = torch.baddbmm(mask.expand(q.shape[0], *rows), q, k.transpose(1, 2), alpha=factor)
    return (scores.softmax(-1) @ v).view(*query.shape[:-1], value.shape[-1])

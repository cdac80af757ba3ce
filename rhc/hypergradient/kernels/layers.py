"""Linear layers, convolution, GELU, attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from rhc.hypergradient.kernels import matrices
from rhc.hypergradient.kernels.common import (
    Grads,
    Sweep,
    nothing,
    plain,
    total,
    tracked,
    which_leaves,
)

_linear, _gelu, _attention = F.linear, F.gelu, F.scaled_dot_product_attention


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
        return matrices.linear(x, w, b)

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
        matrices.product(gy, w) if need_x and w is not None else None,
        matrices.over_rows(gy, x) if need_w else None,
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
                ggy = matrices.linear(x, vw, vb)
            elif vb is not None:
                ggy = vb.expand_as(gy)
            if vx is not None and ggy is not None and vw is not None and not tracked():
                # In place, which saves a pass over the largest tensor of the layer.
                rows = ggy.view(-1, ggy.shape[-1])
                matrices.add_product(rows, vx.reshape(-1, vx.shape[-1]), w.t())
            elif vx is not None:
                ggy = total(ggy, matrices.product(vx, w.t()))
        gx = matrices.product(gy, vw) if need_x and vw is not None else None
        gw = None
        if need_w and vx is not None:
            gw = matrices.over_rows(gy, vx)
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

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
    Kernel,
    Needed,
    Saved,
    Sweep,
    plain,
    total,
    tracked,
    which_leaves,
)

_linear, _gelu, _attention = F.linear, F.gelu, F.scaled_dot_product_attention


# Linear ------------------------------------------------------------------------------------------


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if (
        weight.dim() != 2
        or input.numel() * weight.shape[0] < Sweep.least
        or not plain(input, weight, bias)
    ):
        return _linear(input, weight, bias)
    return affine(input, weight, bias, which_leaves(weight, bias))


def affine(input: Tensor, weight: Tensor, bias: Tensor | None, leaves: tuple[bool, bool]) -> Tensor:
    """`linear` of ordinary tensors. leaves: of weight and bias, as in `Kernel.__call__`."""
    return _LINEAR(None, (False, *leaves), input, weight, bias)


def _linear_value(_: None, needed: Needed, x: Tensor, w: Tensor, b: Tensor | None) -> Any:
    # A first layer's input is data: the weight is not read again.
    return matrices.linear(x, w, b), (x, w if needed[0] else None, None)


def _linear_gradient(_: None, needed: Needed, gy: Tensor, saved: Saved) -> Grads:
    x, w, _b = saved
    need_x, need_w, need_b = needed
    return (
        matrices.product(gy, w) if need_x and w is not None else None,
        matrices.over_rows(gy, x) if need_w else None,
        gy.reshape(-1, gy.shape[-1]).sum(0) if need_b else None,
    )


def _linear_pullback(_: None, needed: Needed, vs: Grads, gy: Tensor, saved: Saved) -> Grads:
    """Of gx = gy w, gw = gyᵀ x, gb = Σ gy."""
    x, w, _b = saved
    vx, vw, vb = vs
    need_gy, need_x, need_w, _b = needed
    ggy = None
    if need_gy:
        if vw is not None:
            ggy = matrices.linear(x, vw, vb)
        elif vb is not None:
            ggy = vb.expand_as(gy)
        if vx is not None and vw is not None and ggy is not None:
            # In place, which saves a pass over the largest tensor of the layer.
            rows = ggy.view(-1, ggy.shape[-1])
            matrices.add_product(rows, vx.reshape(-1, vx.shape[-1]), w.t())
        elif vx is not None:
            ggy = total(ggy, matrices.product(vx, w.t()))
    gx = matrices.product(gy, vw) if need_x and vw is not None else None
    gw = matrices.over_rows(gy, vx) if need_w and vx is not None else None
    return ggy, gx, gw, None


_LINEAR = Kernel(
    lambda _, *inputs: _linear(*inputs), _linear_value, _linear_gradient, _linear_pullback
)


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
        return _CONVOLUTION(settings, (False, *which_leaves(weight, bias)), input, weight, bias)

    return conv


def _each(value: Any, dims: int) -> list[int]:
    return [int(value)] * dims if not isinstance(value, (tuple, list)) else [int(v) for v in value]


def _convolve(settings: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    stride, padding, dilation, groups = settings
    return torch.convolution(x, w, b, stride, padding, dilation, False, [0] * len(stride), groups)


def _convolution_gradient(settings: Any, needed: Needed, gy: Tensor, saved: Saved) -> Grads:
    x, w, *_ = saved
    if not any(needed):
        return None, None, None
    stride, padding, dilation, groups = settings
    fixed = [w.shape[0]], stride, padding, dilation, False, [0] * len(stride), groups, list(needed)
    return torch.ops.aten.convolution_backward(gy, x, w, *fixed)


def _convolution_pullback(
    settings: Any, needed: Needed, vs: Grads, gy: Tensor, saved: Saved
) -> Grads:
    """A gradient of a convolution is linear in gy, and in the other of x and w."""
    x, w, _b = saved
    vx, vw, vb = vs
    need_gy, need_x, need_w, _ = needed
    ggy = gx = gw = None
    if need_gy:
        ggy = total(
            None if vw is None else _convolve(settings, x, vw, vb),
            None if vx is None else _convolve(settings, vx, w, None),
        )
        if vw is None and vb is not None:
            ggy = total(ggy, vb.view(1, -1, *[1] * (gy.dim() - 2)).expand_as(gy))
    if need_x and vw is not None:
        gx = _convolution_gradient(settings, (True, False, False), gy, (x, vw))[0]
    if need_w and vx is not None:
        gw = _convolution_gradient(settings, (False, True, False), gy, (vx, w))[1]
    return ggy, gx, gw, None


_CONVOLUTION = Kernel(
    _convolve,
    lambda settings, needed, x, w, b: (_convolve(settings, x, w, b), (x, w, None)),
    _convolution_gradient,
    _convolution_pullback,
)


# GELU --------------------------------------------------------------------------------------------


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
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
        if tracked():  # a third derivative: autograd must see every operation
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
    """softmax(q kᵀ scale + mask) v."""
    Sweep.attention = True
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

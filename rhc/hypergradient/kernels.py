"""Kernels whose second derivative is cheap, in place of torch's while a Hessian product is taken.

Reverse over reverse pulls a vector v back through a step's gradient g = ∇ℓ(θ). torch's own second
derivatives take detours: convolution and layer normalisation are decomposed into many passes over
memory, fused attention has none at all. And they form the value of g, which nobody reads, since
only its pullback is wanted: of the 9 matrix products of a linear layer, one. `light_second_order`
puts the functions below in place of those of `torch.nn.functional`; each is correct at any order
and anywhere, so that it does no harm where other code meets it.

Measured on the GPT of benchmarks/models.py: docs/log.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

Grads = tuple[Tensor | None, ...]


class _Sweep:
    """Whether a sweep is under way that pulls back through parameter gradients of no value."""

    valueless = False


@contextmanager
def valueless_gradients(on: bool = True) -> Iterator[None]:
    """Inside, the gradients that a create_graph sweep returns carry a graph but no value.

    The kernels of this module then skip the products that only make the value of a weight's
    gradient: it reads 0. A flag of the process, not of the thread, because autograd runs the
    sweeps of an accelerator on threads of its own.
    """
    before, _Sweep.valueless = _Sweep.valueless, on
    try:
        yield
    finally:
        _Sweep.valueless = before


@contextmanager
def light_second_order() -> Iterator[None]:
    """The functions of this module in place of those of torch.nn.functional."""
    names = list(_REPLACED)
    before = [getattr(F, name) for name in names]
    for name in names:
        setattr(F, name, _REPLACED[name])
    try:
        yield
    finally:
        for name, function in zip(names, before, strict=True):
            setattr(F, name, function)


def _plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary floating-point tensors, outside autocast, vmap and the like."""
    first = tensors[0]
    assert first is not None
    return (
        torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled(first.device.type)
        and all(
            t is None or (type(t) in (Tensor, torch.nn.Parameter) and t.dtype == first.dtype)
            for t in tensors
        )
        and first.is_floating_point()
        and not torch.compiler.is_compiling()
    )


def _nothing(like: Tensor) -> Tensor:
    return like.new_zeros(()).expand(like.shape)


def _total(*terms: Tensor | None) -> Tensor | None:
    found = [t for t in terms if t is not None]
    if not found:
        return None
    total = found[0]
    for t in found[1:]:
        total = total + t
    return total


# Linear ------------------------------------------------------------------------------------------


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear."""
    if weight.dim() != 2 or not _plain(input, weight, bias):
        return _linear(input, weight, bias)
    return _Linear.apply(input, weight, bias)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, w)
        return _linear(x, w, b)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Grads:
        x, w = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _LinearBackward.apply(gy, x, w, need_x, need_w, need_b)
        return _linear_backward(gy, x, w, need_x, need_w, need_b)


def _linear_backward(
    gy: Tensor, x: Tensor, w: Tensor, need_x: bool, need_w: bool, need_b: bool
) -> Grads:
    rows = gy.reshape(-1, gy.shape[-1])
    return (
        gy @ w if need_x else None,
        rows.t() @ x.reshape(-1, x.shape[-1]) if need_w else None,
        rows.sum(0) if need_b else None,
    )


class _LinearBackward(Function):
    @staticmethod
    def forward(
        ctx: Any, gy: Tensor, x: Tensor, w: Tensor, need_x: bool, need_w: bool, need_b: bool
    ) -> Grads:
        ctx.save_for_backward(gy, x, w)
        ctx.set_materialize_grads(False)
        if not _Sweep.valueless:
            return _linear_backward(gy, x, w, need_x, need_w, need_b)
        bias = gy.new_zeros(()).expand(gy.shape[-1]) if need_b else None
        return gy @ w if need_x else None, _nothing(w) if need_w else None, bias

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
            if vx is not None:
                through = vx @ w.t()
                ggy = through if ggy is None else ggy + through
        gx = gy @ vw if need_x and vw is not None else None
        gw = None
        if need_w and vx is not None:
            gw = gy.reshape(-1, gy.shape[-1]).t() @ vx.reshape(-1, vx.shape[-1])
        return ggy, gx, gw, None, None, None


# Convolution -------------------------------------------------------------------------------------


def _convolution(dims: int, native: Callable[..., Tensor]) -> Callable[..., Tensor]:
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
            or not _plain(input, weight, bias)
            or not (input.requires_grad or weight.requires_grad)
        ):
            return native(input, weight, bias, stride, padding, dilation, groups)
        settings = (*(_each(v, dims) for v in (stride, padding, dilation)), groups)
        return _Convolution.apply(input, weight, bias, settings)

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
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, settings: Any) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.settings = settings
        return _convolve(x, w, b, settings)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Grads:
        x, w = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:3])
        if torch.is_grad_enabled():
            return *_ConvolutionBackward.apply(gy, x, w, ctx.settings, need), None
        return *_convolve_backward(gy, x, w, ctx.settings, need), None


class _ConvolutionBackward(Function):
    @staticmethod
    def forward(
        ctx: Any, gy: Tensor, x: Tensor, w: Tensor, settings: Any, need: list[bool]
    ) -> Grads:
        ctx.save_for_backward(gy, x, w)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        if not _Sweep.valueless:
            return _convolve_backward(gy, x, w, settings, need)
        dx = _convolve_backward(gy, x, w, settings, [need[0], False, False])[0]
        bias = gy.new_zeros(()).expand(w.shape[0]) if need[2] else None
        return dx, _nothing(w) if need[1] else None, bias

    @staticmethod
    def backward(ctx: Any, vx: Tensor | None, vw: Tensor | None, vb: Tensor | None) -> Grads:
        gy, x, w = ctx.saved_tensors
        need_gy, need_x, need_w = ctx.needs_input_grad[:3]
        ggy = gx = gw = None
        if need_gy:
            ggy = _total(
                None if vw is None else _convolve(x, vw, vb, ctx.settings),
                None if vx is None else _convolve(vx, w, None, ctx.settings),
            )
            if vw is None and vb is not None:
                ggy = _total(ggy, vb.view(1, -1, *[1] * (gy.dim() - 2)).expand_as(gy))
        if need_x and vw is not None:
            gx = _convolve_backward(gy, x, vw, ctx.settings, [True, False, False])[0]
        if need_w and vx is not None:
            gw = _convolve_backward(gy, vx, w, ctx.settings, [False, True, False])[1]
        return ggy, gx, gw, None, None


# GELU --------------------------------------------------------------------------------------------


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """torch.nn.functional.gelu."""
    if approximate != "none" or not _plain(input) or not input.requires_grad:
        return _gelu(input, approximate=approximate)
    return _Gelu.apply(input)


class _Gelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gelu(x)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _GeluBackward.apply(gy, x)
        return torch.ops.aten.gelu_backward(gy, x)


class _GeluBackward(Function):
    @staticmethod
    def forward(ctx: Any, gy: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(gy, x)
        return torch.ops.aten.gelu_backward(gy, x)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Grads:
        gy, x = ctx.saved_tensors
        if torch.is_grad_enabled():  # a third derivative: let autograd see every step
            curvature = (2 - x * x) * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
            return torch.ops.aten.gelu_backward(v, x), v * gy * curvature
        # f'' = (2 − x²) φ(x)
        square = x * x
        gx = torch.mul(square, -0.5).exp_()
        gx.mul_(square.sub_(2).mul_(-1 / math.sqrt(2 * math.pi))).mul_(gy).mul_(v)
        del square
        return torch.ops.aten.gelu_backward(v, x), gx


# Layer normalisation -----------------------------------------------------------------------------


def layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.layer_norm."""
    if len(normalized_shape) != 1 or not _plain(input, weight, bias):
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
        if torch.is_grad_enabled():
            return *_LayerNormBackward.apply(gy, x, w, mean, r, ctx.eps, need), None
        return *_layer_norm_backward(gy, x, w, mean, r, need), None


def _layer_norm_backward(
    gy: Tensor, x: Tensor, w: Tensor | None, mean: Tensor, r: Tensor, need: tuple[bool, ...]
) -> Grads:
    if w is None:
        gx, _, _ = torch.ops.aten.native_layer_norm_backward(
            gy, x, [x.shape[-1]], mean, r, None, None, [need[0], False, False]
        )
        return gx, None, None
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
        if torch.is_grad_enabled():  # a third derivative: r and the mean must be seen as functions
            mean = x.mean(-1, keepdim=True)
            r = ((x - mean).square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        n = x.shape[-1]
        normal = (x - mean) * r
        u = gy if w is None else gy * w
        ggy = gx = gw = None
        if vx is not None:
            # gx is bilinear in u and the projection off 1 and x̂, which is its own adjoint.
            v_normal = _mean_product(vx, normal)
            projected = r * (vx - vx.mean(-1, keepdim=True) - normal * v_normal)
            u_normal = _mean_product(u, normal)
            u_projected = r * (u - u.mean(-1, keepdim=True) - normal * u_normal)
            ggy = projected if w is None else projected * w
            if w is not None:
                gw = (projected * gy).reshape(-1, n).sum(0)
            # ∂x̂ᵀ of −r (v x̂)⟨u x̂⟩ and −r (u x̂)⟨v x̂⟩, then ∂r: −gx·v r x̂ / r
            slope = _mean_product(u_projected, vx)
            gx = -r * (projected * u_normal + u_projected * v_normal + normal * slope)
        if vw is not None:
            # gw = Σ gy x̂
            ggy = _total(ggy, normal * vw)
            a = gy * vw
            gx = _total(gx, r * (a - a.mean(-1, keepdim=True) - normal * _mean_product(a, normal)))
        if vb is not None:
            ggy = vb.expand_as(gy) if ggy is None else ggy + vb
        return ggy, gx, gw, None, None, None, None


def _mean_product(a: Tensor, b: Tensor) -> Tensor:
    """⟨a b⟩ over the last dimension, kept: (…, n), (…, n) -> (…, 1)."""
    return torch.linalg.vecdot(a, b).unsqueeze(-1) / a.shape[-1]


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
    if masked or dropout_p or enable_gqa or query.dim() < 3 or not _plain(query, key, value):
        return _attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if is_causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores.softmax(-1) @ value


_linear, _gelu = F.linear, F.gelu
_layer_norm, _attention = F.layer_norm, F.scaled_dot_product_attention

_REPLACED: dict[str, Callable[..., Tensor]] = {
    "linear": linear,
    "gelu": gelu,
    "layer_norm": layer_norm,
    "scaled_dot_product_attention": scaled_dot_product_attention,
    "conv1d": _convolution(1, F.conv1d),
    "conv2d": _convolution(2, F.conv2d),
    "conv3d": _convolution(3, F.conv3d),
}

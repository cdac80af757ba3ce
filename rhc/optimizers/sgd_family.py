"""SGD, Lion and Muon."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchopt.base import GradientTransformation
from torchopt.pytree import tree_map

from rhc.optimizers.base import (
    Fold,
    Group,
    Scalar,
    Vjp,
    cast_like,
    dot,
    is_zero,
    known,
    plus,
    step_of,
)

NEWTON_SCHULZ_DTYPE = torch.bfloat16
"""Precision of torch.optim.Muon's orthogonalization, for parameters of any dtype."""


# SGD ---------------------------------------------------------------------------------------------


class SGDState(NamedTuple):
    """momentum_buffer: None before the first step."""

    momentum_buffer: Any


def sgd(
    lr: Scalar,
    momentum: Scalar = 0.0,
    dampening: float = 0.0,
    weight_decay: Scalar = 0.0,
    *,
    nesterov: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """torch.optim.SGD's step: b ← μ b + (1 − dampening) d; update −α b. Sutskever et al. 2013.
    The first step sets b = d. Nesterov: −α (d + μ b). With momentum 0 (a number) there is no b."""
    without_momentum = is_zero(momentum)

    def move(d: Tensor, state: SGDState) -> tuple[Tensor, SGDState]:
        before = state.momentum_buffer
        if without_momentum:
            return d * -lr, state
        buffer = d.clone() if before is None else (momentum * before).add_(d, alpha=1 - dampening)
        ahead = plus(d, buffer, momentum) if nesterov else buffer
        return ahead * -lr, SGDState(buffer)

    closed = None
    if (
        (without_momentum or not (dampening or nesterov))
        and not isinstance(lr, Tensor)
        and not isinstance(momentum, Tensor)
    ):
        closed = partial(_sgd_vjp, lr, momentum)
    return step_of(
        lambda params: SGDState(None), move, lr, weight_decay, maximize=maximize, closed=closed
    )


def _sgd_vjp(
    lr: float,
    momentum: float,
    d: Tensor,
    state: SGDState,
    of_u: Tensor | None,
    of_slots: Sequence[Tensor | None],
    wanted: Collection[str],
) -> Vjp:
    """Of u = −α b', b' = μ b + d. λ' is the costate after the step, λ before.
    B = λ_b' − α λ_u is the total costate of b', and that of d; λ_b = μ B, dJ/dα = −⟨λ_u, b'⟩,
    dJ/dμ = ⟨B, b⟩. The first step, and steps without momentum, have b' = d; without momentum an
    existing buffer is unchanged.

    By autograd roll and reverse pass of an MLP of 0.11 M parameters take 14 % longer: 2.80 in place
    of 2.46 ms a step (K = 20, medians of 14 interleaved rounds, one core of a Xeon)."""
    buffer = state.momentum_buffer
    of_buffer = of_slots[0] if of_slots else None
    found: dict[str, Scalar] = {}
    if of_u is not None and "lr" in wanted:
        along = dot(of_u, d)  # without forming b'
        if momentum and buffer is not None:
            along = along + momentum * dot(of_u, buffer)
        found["lr"] = -along
    if not momentum:
        of_d = None if of_u is None else of_u * -lr
        return Vjp(None, [] if buffer is None else [of_buffer], of_d, found)
    if of_u is None:
        of_d = known(of_buffer).clone()
    else:
        of_d = of_u * -lr if of_buffer is None else plus(of_buffer, of_u, -lr)
    if buffer is None:
        return Vjp(None, [], of_d, found)
    if "momentum" in wanted:
        found["momentum"] = dot(of_d, buffer)
    return Vjp(None, [of_d * momentum], of_d, found)


def sgd_fold(group: Group, controls: Mapping[str, float]) -> Fold | None:
    momentum = controls.get("momentum", group["momentum"])
    if not momentum or group["dampening"] or group["nesterov"]:
        return None
    maximize = group["maximize"]

    def onto(gradient: Tensor, before: SGDState) -> SGDState:
        if maximize:
            gradient.neg_()
        if before.momentum_buffer is not None:
            gradient.add_(before.momentum_buffer, alpha=momentum)
        return SGDState(gradient)

    def off(after: SGDState, before: SGDState) -> None:
        gradient = after.momentum_buffer
        if before.momentum_buffer is not None:
            gradient.sub_(before.momentum_buffer, alpha=momentum)
        if maximize:
            gradient.neg_()

    return Fold(onto, off)


# Lion --------------------------------------------------------------------------------------------


class LionState(NamedTuple):
    exp_avg: Any


def lion(
    lr: Scalar,
    beta1: Scalar = 0.9,
    beta2: float = 0.99,
    weight_decay: Scalar = 0.0,
) -> GradientTransformation:
    """Lion's step: −α (sign(β1 m + (1 − β1) g) + λ θ); then m ← β2 m + (1 − β2) g. Chen et al.
    2023.
    The derivative of the sign is 0, so dJ/dα = −⟨λ_θ, sign(·) + λ θ⟩, dJ/dβ1 = dJ/dσ = 0 and no
    Hessian enters. This true derivative ignores signs that a larger change would flip."""

    def move(g: Tensor, state: LionState) -> tuple[Tensor, LionState]:
        m = state.exp_avg
        after = LionState(beta2 * m + (1 - beta2) * g)
        return torch.sign(beta1 * m + (1 - beta1) * g) * -lr, after

    def init(params: Any) -> LionState:
        return LionState(tree_map(torch.zeros_like, params))

    return step_of(init, move, lr, weight_decay, decoupled=True)


# Muon --------------------------------------------------------------------------------------------


def muon(
    lr: Scalar,
    momentum: Scalar = 0.95,
    weight_decay: Scalar = 0.1,
    *,
    nesterov: bool = True,
    ns_coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    ns_steps: int = 5,
    adjust_lr_fn: str | None = None,
    shape: Sequence[int] | None = None,
) -> GradientTransformation:
    """torch.optim.Muon's step on matrices: b ← μ b + (1 − μ) g; −α c O(b) − α λ θ. Jordan 2024.
    Nesterov: O at (1 − μ) g + μ b. O: `orthogonalized`. c: √max(1, rows/columns), or 0.2 √max(rows,
    columns) for "match_rms_adamw". shape: of the matrix, if vectors are given."""

    def move(g: Tensor, state: SGDState) -> tuple[Tensor, SGDState]:
        buffer = _lerp(state.momentum_buffer, g, 1 - momentum)
        ahead = _lerp(g, buffer, momentum) if nesterov else buffer
        matrix = ahead if shape is None else ahead.view(*shape)
        direction = orthogonalized(matrix, ns_coefficients, ns_steps, eps).reshape(g.shape)
        return direction * (-lr * muon_factor(adjust_lr_fn, matrix.shape)), SGDState(buffer)

    def init(params: Any) -> SGDState:
        return SGDState(tree_map(torch.zeros_like, params))

    return step_of(init, move, lr, weight_decay, decoupled=True)


def muon_factor(adjust_lr_fn: str | None, shape: Sequence[int]) -> float:
    """torch.optim.Muon's factor on the lr of a matrix of this shape."""
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def orthogonalized(matrix: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Newton–Schulz's approximation of U Vᵀ for matrix = U S Vᵀ: torch.optim.Muon's, to the bit.
    The value is from bfloat16. The derivative is that of the same iteration in the matrix's dtype:
    rounding to 8 bits is a staircase of slope 0 or ∞, whose mean slope is the smooth iteration's.
    autograd through bfloat16 gives the same slope, rounded at every product."""
    with torch.no_grad():
        value = newton_schulz(matrix.to(NEWTON_SCHULZ_DTYPE), coefficients, steps, eps).to(
            matrix.dtype
        )
    if not (torch.is_grad_enabled() and matrix.requires_grad):
        return value
    return _WithSlopeOf.apply(newton_schulz(matrix, coefficients, steps, eps), value)


def newton_schulz(matrix: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """X ← a X + (b X Xᵀ + c (X Xᵀ)²) X, `steps` times from X = matrix / |matrix|, in its dtype."""
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class _WithSlopeOf(torch.autograd.Function):
    """The second tensor's value with the first one's derivative."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *costates: Any) -> Any:
        return costates[0], None


def _lerp(start: Tensor, end: Tensor, weight: Scalar) -> Tensor:
    """torch.lerp for weights of any dtype, with torch's roundings."""
    return torch.lerp(start, end, cast_like(weight, start))

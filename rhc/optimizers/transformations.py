"""Optimizer steps as pure functions of tensor-valued controls.

Each function builds a torchopt GradientTransformation whose lr, momentum (or β1) and weight decay
may be 0-dimensional tensors, so that a step can be differentiated with respect to them, and whose
whole state lives in the state (torchopt's own `trace` keeps its first call in a closure, and its
betas and weight decay must be floats). Each equals the torch.optim optimizer of the same name step
by step; `lion` has none there. Parameters, gradients and slots are trees of tensors of any shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchopt.base import GradientTransformation
from torchopt.pytree import tree_map

Scalar = float | Tensor

ROOT_EPSILON = 1e-30
"""Added under the root of a second moment, by every optimizer that divides by one. The slope of √v
is infinite at v = 0 (an embedding row that was never used), which would turn hypergradients into
NaN. 1e-30 = (1e-15)² is far below the optimizers' own eps beside the root, so that neither the step
nor its derivative changes at float32 or float64 precision where v is large enough to matter. At any
v the update moves by less than ROOT_EPSILON lr / 2 eps²: 5e-15 lr at an eps of 1e-8, 5e-11 lr at
Adagrad's of 1e-10."""

NEWTON_SCHULZ_DTYPE = torch.bfloat16
"""The precision in which torch.optim.Muon orthogonalizes, whatever the parameters' is."""


class SGDState(NamedTuple):
    """momentum_buffer: a tree like the parameters, or None before the first step."""

    momentum_buffer: Any


class AdamState(NamedTuple):
    """step: steps taken so far; the rest are trees like the parameters (the last: AMSGrad's)."""

    step: int
    exp_avg: Any
    exp_avg_sq: Any
    max_exp_avg_sq: Any = None


class NAdamState(NamedTuple):
    """As Adam's. mu_product: Π μ_i over the steps so far, of all parameters alike.

    A tensor without dimensions; its dtype is torch's choice, float32 unless the default is float64.
    """

    step: int
    exp_avg: Any
    exp_avg_sq: Any
    mu_product: Tensor


class RAdamState(NamedTuple):
    """As Adam's, without AMSGrad."""

    step: int
    exp_avg: Any
    exp_avg_sq: Any


class AdamaxState(NamedTuple):
    """exp_inf: the exponentially weighted infinity norm, a tree like the parameters."""

    step: int
    exp_avg: Any
    exp_inf: Any


class RMSpropState(NamedTuple):
    """Trees like the parameters; None where the options do without them."""

    square_avg: Any
    grad_avg: Any = None
    momentum_buffer: Any = None


class AdagradState(NamedTuple):
    """step: steps taken so far. sum: of squared gradients, a tree like the parameters."""

    step: int
    sum: Any


class MuonState(NamedTuple):
    """momentum_buffer: a tree like the parameters."""

    momentum_buffer: Any


class LionState(NamedTuple):
    """exp_avg: a tree like the parameters."""

    exp_avg: Any


def sgd(
    lr: Scalar,
    momentum: Scalar = 0.0,
    dampening: float = 0.0,
    weight_decay: Scalar = 0.0,
    *,
    nesterov: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """torch.optim.SGD's step: b ← μ b + (1 − dampening)(g + λ θ); update −α b.

    The first step sets b = g + λ θ. With Nesterov the update is −α (g + λ θ + μ b); with
    momentum 0 (the float) there is no b. Sutskever et al. 2013.
    """
    has_momentum = not _is_zero(momentum)

    def init(params: Any) -> SGDState:
        return SGDState(None)

    def update(
        updates: Any, state: SGDState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, SGDState]:
        g = _gradient(updates, params, weight_decay, maximize)
        if not has_momentum:
            return tree_map(lambda g: -lr * g, g), state
        if state.momentum_buffer is None:
            buffer = g
        else:
            buffer = tree_map(
                lambda b, g: momentum * b + (1 - dampening) * g, state.momentum_buffer, g
            )
        direction = tree_map(lambda g, b: g + momentum * b, g, buffer) if nesterov else buffer
        return tree_map(lambda d: -lr * d, direction), SGDState(buffer)

    return GradientTransformation(init, update)


def adam(
    lr: Scalar,
    beta1: Scalar = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    decoupled: bool = False,
    amsgrad: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """torch.optim.Adam's step, or AdamW's with `decoupled` weight decay.

    m ← β1 m + (1 − β1) g; v ← β2 v + (1 − β2) g²; update −α m̂ / (√v̂ + eps) with
    m̂ = m / (1 − β1ᵗ), v̂ = v / (1 − β2ᵗ). As in torch, a β1 that changes over time enters the bias
    correction as its current value. Kingma, Ba 2015; Loshchilov, Hutter 2019.
    """

    def init(params: Any) -> AdamState:
        zeros = tree_map(torch.zeros_like, params)
        return AdamState(0, zeros, zeros, zeros if amsgrad else None)

    def update(
        updates: Any, state: AdamState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, AdamState]:
        step = state.step + 1
        g = _gradient(updates, params, 0.0 if decoupled else weight_decay, maximize)
        m, v = _moments(state.exp_avg, state.exp_avg_sq, g, beta1, beta2)
        largest: Any = tree_map(torch.maximum, state.max_exp_avg_sq, v) if amsgrad else None
        step_size = lr / (1 - beta1**step)
        root_correction = (1 - beta2**step) ** 0.5

        def direction(m: Tensor, v: Tensor) -> Tensor:
            return -step_size * m / ((v + ROOT_EPSILON).sqrt() / root_correction + eps)

        new = tree_map(direction, m, largest if amsgrad else v)
        return _decayed(new, params, lr, weight_decay, decoupled), AdamState(step, m, v, largest)

    return GradientTransformation(init, update)


def adamw(
    lr: Scalar,
    beta1: Scalar = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Scalar = 0.01,
    *,
    amsgrad: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """torch.optim.AdamW's step: Adam's, with θ ← θ − α λ θ beside it."""
    return adam(
        lr, beta1, beta2, eps, weight_decay, decoupled=True, amsgrad=amsgrad, maximize=maximize
    )


def nadam(
    lr: Scalar,
    beta1: Scalar = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    momentum_decay: float = 4e-3,
    decoupled: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """torch.optim.NAdam's step: Adam's moments with Nesterov's look ahead.

    μ_t = β1 (1 − ½ 0.96^{tψ}), P_t = Π_{i ≤ t} μ_i; update
    −α [(1 − μ_t) g / (1 − P_t) + μ_{t+1} m / (1 − P_t μ_{t+1})] / (√v̂ + eps). Every μ_i of P_t is
    of the β1 that step i had, so P_t is state, with a costate of its own. Dozat 2016.
    """

    def init(params: Any) -> NAdamState:
        zeros = tree_map(torch.zeros_like, params)
        wide = torch.get_default_dtype() == torch.float64
        return NAdamState(
            0, zeros, zeros, torch.ones((), dtype=torch.float64 if wide else torch.float32)
        )

    def update(
        updates: Any, state: NAdamState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, NAdamState]:
        step = state.step + 1
        g = _gradient(updates, params, 0.0 if decoupled else weight_decay, maximize)
        m, v = _moments(state.exp_avg, state.exp_avg_sq, g, beta1, beta2)
        mu, mu_next = (beta1 * (1.0 - 0.5 * 0.96 ** (t * momentum_decay)) for t in (step, step + 1))
        product = state.mu_product * _cast(mu, state.mu_product)
        root_correction = (1 - beta2**step) ** 0.5

        def direction(g: Tensor, m: Tensor, v: Tensor) -> Tensor:
            p = product.to(g.device, g.dtype)
            ahead = (1.0 - mu) / (1.0 - p) * g + mu_next / (1.0 - p * mu_next) * m
            return -lr * ahead / ((v + ROOT_EPSILON).sqrt() / root_correction + eps)

        new = tree_map(direction, g, m, v)
        return _decayed(new, params, lr, weight_decay, decoupled), NAdamState(step, m, v, product)

    return GradientTransformation(init, update)


def radam(
    lr: Scalar,
    beta1: Scalar = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    decoupled: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """torch.optim.RAdam's step: Adam's times r_t, or −α m̂ alone while the variance is unknown.

    r_t rectifies the variance of 1/√v̂ and depends on β2 and t only; it needs ρ_t > 5, which at
    β2 = 0.999 is the sixth step. Liu et al. 2020.
    """

    def init(params: Any) -> RAdamState:
        zeros = tree_map(torch.zeros_like, params)
        return RAdamState(0, zeros, zeros)

    def update(
        updates: Any, state: RAdamState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, RAdamState]:
        step = state.step + 1
        g = _gradient(updates, params, 0.0 if decoupled else weight_decay, maximize)
        m, v = _moments(state.exp_avg, state.exp_avg_sq, g, beta1, beta2)
        step_size = lr / (1 - beta1**step)
        correction = 1 - beta2**step
        limit = 2 / (1 - beta2) - 1
        length = limit - 2 * step * beta2**step / correction
        if length > 5.0:
            rectified = (length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)
            scale = (rectified * correction) ** 0.5

            def direction(m: Tensor, v: Tensor) -> Tensor:
                return -step_size * m * (scale / ((v + ROOT_EPSILON).sqrt() + eps))

            new = tree_map(direction, m, v)
        else:
            new = tree_map(lambda m: -step_size * m, m)
        return _decayed(new, params, lr, weight_decay, decoupled), RAdamState(step, m, v)

    return GradientTransformation(init, update)


def adamax(
    lr: Scalar,
    beta1: Scalar = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    maximize: bool = False,
) -> GradientTransformation:
    """torch.optim.Adamax's step: m ← β1 m + (1 − β1) g; u ← max(β2 u, |g| + eps); −α m̂ / u.

    Kingma, Ba 2015, section 7.1.
    """

    def init(params: Any) -> AdamaxState:
        zeros = tree_map(torch.zeros_like, params)
        return AdamaxState(0, zeros, zeros)

    def update(
        updates: Any, state: AdamaxState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, AdamaxState]:
        step = state.step + 1
        g = _gradient(updates, params, weight_decay, maximize)
        m = tree_map(lambda m, g: beta1 * m + (1 - beta1) * g, state.exp_avg, g)
        u = tree_map(lambda u, g: torch.maximum(beta2 * u, g.abs() + eps), state.exp_inf, g)
        step_size = lr / (1 - beta1**step)
        return tree_map(lambda m, u: -step_size * m / u, m, u), AdamaxState(step, m, u)

    return GradientTransformation(init, update)


def rmsprop(
    lr: Scalar,
    momentum: Scalar = 0.0,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: Scalar = 0.0,
    *,
    centered: bool = False,
    maximize: bool = False,
) -> GradientTransformation:
    """torch.optim.RMSprop's step: v ← a v + (1 − a) g²; b ← μ b + g / (√v + eps); update −α b.

    Centered, v − (average of g)² stands under the root. With momentum 0 (the float) there is no b.
    Hinton 2012; Graves 2013.
    """
    has_momentum = not _is_zero(momentum)

    def init(params: Any) -> RMSpropState:
        zeros = tree_map(torch.zeros_like, params)
        return RMSpropState(zeros, zeros if centered else None, zeros if has_momentum else None)

    def update(
        updates: Any, state: RMSpropState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, RMSpropState]:
        g = _gradient(updates, params, weight_decay, maximize)
        v = tree_map(lambda v, g: alpha * v + (1 - alpha) * g * g, state.square_avg, g)
        mean, variance = None, v
        if centered:
            mean = tree_map(lambda a, g: a + (1 - alpha) * (g - a), state.grad_avg, g)
            variance = tree_map(lambda v, a: v - a * a, v, mean)
        scaled = tree_map(lambda g, v: g / ((v + ROOT_EPSILON).sqrt() + eps), g, variance)
        if not has_momentum:
            after = RMSpropState(v, mean, state.momentum_buffer)
            return tree_map(lambda s: -lr * s, scaled), after
        before = state.momentum_buffer
        # Momentum that is switched on later starts from nothing.
        buffer = (
            scaled if before is None else tree_map(lambda b, s: momentum * b + s, before, scaled)
        )
        return tree_map(lambda b: -lr * b, buffer), RMSpropState(v, mean, buffer)

    return GradientTransformation(init, update)


def adagrad(
    lr: Scalar,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    weight_decay: Scalar = 0.0,
    *,
    initial_accumulator_value: float = 0.0,
    maximize: bool = False,
) -> GradientTransformation:
    """torch.optim.Adagrad's step: S ← S + g²; update −α / (1 + (t − 1) lr_decay) g / (√S + eps).

    It has no momentum. Duchi et al. 2011.
    """

    def init(params: Any) -> AdagradState:
        return AdagradState(
            0, tree_map(lambda p: torch.full_like(p, initial_accumulator_value), params)
        )

    def update(
        updates: Any, state: AdagradState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, AdagradState]:
        g = _gradient(updates, params, weight_decay, maximize)
        total = tree_map(lambda s, g: s + g * g, state.sum, g)
        step_size = lr / (1 + state.step * lr_decay)
        new = tree_map(lambda g, s: -step_size * g / ((s + ROOT_EPSILON).sqrt() + eps), g, total)
        return new, AdagradState(state.step + 1, total)

    return GradientTransformation(init, update)


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
) -> GradientTransformation:
    """torch.optim.Muon's step on matrices: b ← μ b + (1 − μ) g; update −α c O(b) − α λ θ.

    With Nesterov O is taken at (1 − μ) g + μ b. O is `orthogonalized`; c is √max(1, rows/columns),
    or 0.2 √max(rows, columns) with adjust_lr_fn "match_rms_adamw". Jordan et al. 2024.
    """

    def init(params: Any) -> MuonState:
        return MuonState(tree_map(torch.zeros_like, params))

    def direction(d: Tensor) -> Tensor:
        found = orthogonalized(d, ns_coefficients, ns_steps, eps)
        return -lr * muon_factor(adjust_lr_fn, d.shape) * found

    def update(
        updates: Any, state: MuonState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, MuonState]:
        buffer = tree_map(lambda b, g: _lerp(b, g, 1 - momentum), state.momentum_buffer, updates)
        ahead = (
            tree_map(lambda g, b: _lerp(g, b, momentum), updates, buffer) if nesterov else buffer
        )
        new = tree_map(direction, ahead)
        return _decayed(new, params, lr, weight_decay, True), MuonState(buffer)

    return GradientTransformation(init, update)


def muon_factor(adjust_lr_fn: str | None, shape: torch.Size) -> float:
    """What torch.optim.Muon multiplies the lr of a matrix of this shape with."""
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def orthogonalized(matrix: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Newton–Schulz's approximation of U Vᵀ for matrix = U S Vᵀ: torch.optim.Muon's, to the bit.

    The value is that of the iteration in bfloat16, as torch takes it. The derivative is that of the
    same iteration, at the same matrix, in the matrix's own precision: rounding to 8 bits makes the
    value a staircase whose derivative is 0 or infinite, and the mean slope of the stairs, which a
    schedule can follow, is the smooth iteration's. autograd through the bfloat16 operations means
    the same slope, and rounds it at every product.
    """
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


def lion(
    lr: Scalar,
    beta1: Scalar = 0.9,
    beta2: float = 0.99,
    weight_decay: Scalar = 0.0,
) -> GradientTransformation:
    """Lion's step: update −α (sign(β1 m + (1 − β1) g) + λ θ); then m ← β2 m + (1 − β2) g.

    The sign is constant almost everywhere, so its derivative is 0: a costate sees lr and weight
    decay, dJ/dα = −⟨λ_θ, sign(·) + λ θ⟩, and nothing goes through the momentum or the gradient.
    dJ/dβ1 and dJ/dσ are exactly 0, and no Hessian enters. That is the true derivative of Lion, but
    it does not know of the signs that a larger change would flip. Chen et al. 2023.
    """

    def init(params: Any) -> LionState:
        return LionState(tree_map(torch.zeros_like, params))

    def update(
        updates: Any, state: LionState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, LionState]:
        new = tree_map(
            lambda m, g: -lr * torch.sign(beta1 * m + (1 - beta1) * g), state.exp_avg, updates
        )
        m = tree_map(lambda m, g: beta2 * m + (1 - beta2) * g, state.exp_avg, updates)
        return _decayed(new, params, lr, weight_decay, True), LionState(m)

    return GradientTransformation(init, update)


def _gradient(updates: Any, params: Any, weight_decay: Scalar, maximize: bool) -> Any:
    """±g + λ θ: the gradient with coupled weight decay."""
    g = tree_map(torch.neg, updates) if maximize else updates
    if _is_zero(weight_decay):
        return g
    return tree_map(lambda g, p: g + weight_decay * p, g, params)


def _moments(m: Any, v: Any, g: Any, beta1: Scalar, beta2: float) -> tuple[Any, Any]:
    """Adam's exponential averages of the gradient and of its square."""
    return (
        tree_map(lambda m, g: beta1 * m + (1 - beta1) * g, m, g),
        tree_map(lambda v, g: beta2 * v + (1 - beta2) * g * g, v, g),
    )


def _decayed(updates: Any, params: Any, lr: Scalar, weight_decay: Scalar, decoupled: bool) -> Any:
    """The updates with decoupled weight decay, −α λ θ, beside them.

    torch decays first; the rest of the step does not look at θ, so the order is free.
    """
    if not decoupled or _is_zero(weight_decay):
        return updates
    return tree_map(lambda u, p: u - lr * weight_decay * p, updates, params)


def _lerp(start: Tensor, end: Tensor, weight: Scalar) -> Tensor:
    """torch.lerp for a weight of any dtype: the same roundings as in torch's own step."""
    if isinstance(weight, Tensor):
        weight = weight.to(start.device, start.dtype)
    return torch.lerp(start, end, weight)


def _cast(value: Scalar, like: Tensor) -> Scalar:
    return value.to(like.device, like.dtype) if isinstance(value, Tensor) else value


def _is_zero(value: Scalar) -> bool:
    return not isinstance(value, Tensor) and value == 0

"""Optimizer steps as pure functions of tensor-valued controls.

Each of `sgd`, `adam`, `adamw` builds a torchopt GradientTransformation whose lr, momentum (or β1)
and weight decay may be 0-dimensional tensors, so that a step can be differentiated with respect
to them, and whose whole state lives in the state (torchopt's own `trace` keeps its first call in
a closure, and its betas and weight decay must be floats). Each equals the torch.optim optimizer of
the same name step by step; the live steps of a run are taken by that optimizer, and these
functions are only used to look back at them.

`DYNAMICS` maps an optimizer class to what the adjoint needs to know of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchopt.base import GradientTransformation
from torchopt.pytree import tree_map

from rhc.errors import InputError

Scalar = float | Tensor

ROOT_EPSILON = 1e-30
"""Added under Adam's root. The slope of √v is infinite at v = 0 (an embedding row that was never
used), which would turn hypergradients into NaN. 1e-30 = (1e-15)² is far below Adam's own eps of
1e-8 beside the root, so that neither the step nor its derivative changes at float32 or float64
precision where v is large enough to matter."""


class SGDState(NamedTuple):
    """momentum_buffer: a tree like the parameters, or None before the first step."""

    momentum_buffer: Any


class AdamState(NamedTuple):
    """step: steps taken so far; the rest are trees like the parameters (the last: AMSGrad's)."""

    step: int
    exp_avg: Any
    exp_avg_sq: Any
    max_exp_avg_sq: Any = None


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
    has_momentum = isinstance(momentum, Tensor) or momentum != 0

    def init(params: Any) -> SGDState:
        return SGDState(None)

    def update(
        updates: Any, state: SGDState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, SGDState]:
        g = tree_map(torch.neg, updates) if maximize else updates
        if not _is_zero(weight_decay):
            g = tree_map(lambda g, p: g + weight_decay * p, g, params)
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
        g = tree_map(torch.neg, updates) if maximize else updates
        step = state.step + 1
        if not _is_zero(weight_decay) and not decoupled:
            g = tree_map(lambda g, p: g + weight_decay * p, g, params)
        m = tree_map(lambda m, g: beta1 * m + (1 - beta1) * g, state.exp_avg, g)
        v = tree_map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.exp_avg_sq, g)
        largest: Any = tree_map(torch.maximum, state.max_exp_avg_sq, v) if amsgrad else None
        step_size = lr / (1 - beta1**step)
        root_correction = (1 - beta2**step) ** 0.5

        def direction(m: Tensor, v: Tensor) -> Tensor:
            return -step_size * m / ((v + ROOT_EPSILON).sqrt() / root_correction + eps)

        new = tree_map(direction, m, largest if amsgrad else v)
        if not _is_zero(weight_decay) and decoupled:
            # torch decays first; the rest of the step does not look at θ, so the order is free.
            new = tree_map(lambda u, p: u - lr * weight_decay * p, new, params)
        return new, AdamState(step, m, v, largest)

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


@dataclass(frozen=True)
class Dynamics:
    """What the adjoint needs to know of a torch.optim optimizer.

    transformation: (param group, controls of the step, shapes of the parameters whose elements the
    vectors hold) -> GradientTransformation.
    state: (list of per-parameter optimizer states, their shapes' placeholders, param group) ->
    the transformation's state with every slot flattened into one vector.
    """

    name: str
    transformation: Callable[
        [Mapping[str, Any], Mapping[str, Scalar], Sequence[torch.Size]], GradientTransformation
    ]
    state: Callable[[Sequence[Mapping[str, Any]], Sequence[Tensor], Mapping[str, Any]], Any]


def _sgd_transformation(
    group: Mapping[str, Any], controls: Mapping[str, Scalar], shapes: Sequence[torch.Size]
) -> GradientTransformation:
    return sgd(
        controls.get("lr", group["lr"]),
        controls.get("momentum", group["momentum"]),
        group["dampening"],
        controls.get("weight_decay", group["weight_decay"]),
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )


def _sgd_state(
    states: Sequence[Mapping[str, Any]], params: Sequence[Tensor], group: Mapping[str, Any]
) -> SGDState:
    return SGDState(_flat_slot(states, "momentum_buffer"))


def _adam_transformation(
    group: Mapping[str, Any], controls: Mapping[str, Scalar], shapes: Sequence[torch.Size]
) -> GradientTransformation:
    return adam(
        controls.get("lr", group["lr"]),
        controls.get("momentum", group["betas"][0]),
        float(group["betas"][1]),
        group["eps"],
        controls.get("weight_decay", group["weight_decay"]),
        decoupled=group.get("decoupled_weight_decay", False),
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
    )


def _adamw_transformation(
    group: Mapping[str, Any], controls: Mapping[str, Scalar], shapes: Sequence[torch.Size]
) -> GradientTransformation:
    return _adam_transformation({**group, "decoupled_weight_decay": True}, controls, shapes)


def _adam_state(
    states: Sequence[Mapping[str, Any]], params: Sequence[Tensor], group: Mapping[str, Any]
) -> AdamState:
    first = _flat_slot(states, "exp_avg")
    if first is None:
        zeros = torch.cat([torch.zeros_like(p).reshape(-1) for p in params])
        return AdamState(0, zeros, zeros, zeros if group["amsgrad"] else None)
    return AdamState(
        int(states[0]["step"]),
        first,
        _flat_slot(states, "exp_avg_sq"),
        _flat_slot(states, "max_exp_avg_sq"),
    )


DYNAMICS: dict[type[torch.optim.Optimizer], Dynamics] = {
    torch.optim.SGD: Dynamics("SGD", _sgd_transformation, _sgd_state),
    torch.optim.Adam: Dynamics("Adam", _adam_transformation, _adam_state),
    torch.optim.AdamW: Dynamics("AdamW", _adamw_transformation, _adam_state),
}


def dynamics_of(optimizer: torch.optim.Optimizer) -> Dynamics:
    """The dynamics of `optimizer`, by its exact class: a subclass may step differently."""
    if type(optimizer) in DYNAMICS:
        return DYNAMICS[type(optimizer)]
    names = ", ".join(dynamics.name for dynamics in DYNAMICS.values())
    raise InputError(
        f"optimizer {type(optimizer).__name__} has no differentiable dynamics; use one of {names} "
        "of torch.optim, or turn rewriting off (rewrite=False, --no-rewrite)"
    )


def _flat_slot(states: Sequence[Mapping[str, Any]], slot: str) -> Tensor | None:
    tensors = [state.get(slot) for state in states]
    if any(t is None for t in tensors):
        return None
    return torch.cat([t.detach().reshape(-1) for t in tensors if t is not None])


def _is_zero(value: Scalar) -> bool:
    return not isinstance(value, Tensor) and value == 0

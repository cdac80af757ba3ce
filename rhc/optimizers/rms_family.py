"""RMSprop (Hinton 2012; centered: Graves 2013) and Adagrad (Duchi et al. 2011)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchopt.base import GradientTransformation
from torchopt.pytree import tree_map

from rhc.optimizers.base import ROOT_EPSILON, Scalar, is_zero, step_of


class RMSpropState(NamedTuple):
    square_avg: Any
    grad_avg: Any = None
    momentum_buffer: Any = None


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
    """torch.optim.RMSprop's step: v ← a v + (1 − a) d²; b ← μ b + d / (√v + eps); update −α b.
    Centered: v − (average of d)² under the root. With momentum 0 (the float) there is no b."""
    has_momentum = not is_zero(momentum)

    def init(params: Any) -> RMSpropState:
        zeros = tree_map(torch.zeros_like, params)
        return RMSpropState(zeros, zeros if centered else None, zeros if has_momentum else None)

    def move(d: Tensor, state: RMSpropState) -> tuple[Tensor, RMSpropState]:
        v = alpha * state.square_avg + (1 - alpha) * d * d
        mean, variance, buffer = state.grad_avg, v, state.momentum_buffer
        if centered:
            mean = mean + (1 - alpha) * (d - mean)
            variance = v - mean * mean
        direction = d / ((variance + ROOT_EPSILON).sqrt() + eps)
        if has_momentum:  # momentum switched on later starts from 0
            buffer = direction if buffer is None else momentum * buffer + direction
            direction = buffer
        return direction * -lr, RMSpropState(v, mean, buffer)

    return step_of(init, move, lr, weight_decay, maximize=maximize)


class AdagradState(NamedTuple):
    step: int
    sum: Any


def adagrad(
    lr: Scalar,
    lr_decay: float = 0.0,
    eps: float = 1e-10,
    weight_decay: Scalar = 0.0,
    *,
    initial_accumulator_value: float = 0.0,
    maximize: bool = False,
) -> GradientTransformation:
    """torch.optim.Adagrad's step: S ← S + d²; update −α / (1 + (t − 1) lr_decay) d / (√S + eps)."""

    def init(params: Any) -> AdagradState:
        return AdagradState(
            0, tree_map(lambda p: torch.full_like(p, initial_accumulator_value), params)
        )

    def move(d: Tensor, state: AdagradState) -> tuple[Tensor, AdagradState]:
        total = state.sum + d * d
        step_size = lr / (1 + state.step * lr_decay)
        increment = -step_size * d / ((total + ROOT_EPSILON).sqrt() + eps)
        return increment, AdagradState(state.step + 1, total)

    return step_of(init, move, lr, weight_decay, maximize=maximize)

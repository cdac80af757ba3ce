"""Templates of lr: its shape over a run, as factors on its maximum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rhc.schedule.controls import CONTROLS
from rhc.workload import Template

ONE_CYCLE_UP, ONE_CYCLE_FIRST = 0.3, 0.04
"""Fraction of the run in which 1cycle rises, and its first factor, as in torch."""


def template_factors(
    template: Template, steps: int, fraction: float, warmup: float = 0.0, at: Tensor | None = None
) -> Tensor:
    """Factors on lr, 1 at the maximum and never 0, at steps `at`, (n,) float64, or all. wsd cools
    down in the last `fraction`; lr rises in the first `warmup`, but for 1cycle. A factor's bits are
    the same whichever other steps are requested."""
    done = _steps(steps) if at is None else at
    if template == "1cycle":
        return _one_cycle(steps, done)
    if template == "wsd":
        factors = cooldown(steps, fraction, done)
    elif template == "cosine":
        factors = _half_cosine(done / steps)
    elif template == "linear":
        factors = 1 - done / steps
    else:
        factors = torch.ones_like(done)
    return factors * warming(steps, warmup, done)


def warming(steps: int, fraction: float, at: Tensor | None = None) -> Tensor:
    """Factors: linear upwards over the first `fraction` of the steps, then 1."""
    done = _steps(steps) if at is None else at
    n = math.floor(steps * fraction)
    return torch.where(done < n, (done + 1) / (n + 1), 1.0)


def _steps(steps: int) -> Tensor:
    return torch.arange(steps, dtype=torch.float64)


def _one_cycle(steps: int, done: Tensor) -> Tensor:
    up = math.floor(steps * ONE_CYCLE_UP)
    rise = 1 - _half_cosine(done / max(up, 1))
    fall = _half_cosine((done - up) / (steps - up))
    return torch.where(done < up, ONE_CYCLE_FIRST + (1 - ONE_CYCLE_FIRST) * rise, fall)


def _half_cosine(done: Tensor) -> Tensor:
    return 0.5 * (1 + (math.pi * done).cos())


def shaped(lr: Tensor, factors: Tensor) -> Tensor:
    """(T,) or (T, G): lr, () or (G,), times factors (T,), within its bounds; 0 stays 0."""
    values = factors * lr if lr.dim() == 0 else factors[:, None] * lr
    return torch.where(values == 0, values, values.clamp(min=CONTROLS["lr"].lower))


def cooldown(steps: int, fraction: float, at: Tensor | None = None) -> Tensor:
    """Factors: 1, then linear to 1/(n + 1) over the n steps of the last `fraction`; never 0."""
    done = _steps(steps) if at is None else at
    n = math.floor(steps * fraction)
    return torch.where(done < steps - n, 1.0, (steps - done) / (n + 1))

"""Shapes of lr over a run, as factors on its largest value."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from rhc.schedule.controls import CONTROLS

Template = Literal["constant", "cosine", "linear", "wsd", "1cycle"]
TEMPLATES: tuple[Template, ...] = get_args(Template)
"""Shapes of lr over a run: none; half a cosine; a line; constant, then linear at the end (warm-up,
stable, decay); up and down along half cosines (Smith, Topin 2019), of which only lr is taken."""

ONE_CYCLE_UP, ONE_CYCLE_FIRST = 0.3, 0.04
"""Fraction of the run in which 1cycle rises, and the factor that it rises from: torch's."""


def template_factors(
    template: Template, steps: int, fraction: float, warmup: float = 0.0, at: Tensor | None = None
) -> Tensor:
    """Factors on lr, 1 at the highest; none of them is 0, so that every step counts.

    fraction: of the run, in which wsd cools down. warmup: of the run, in which lr rises linearly
    to what the template says; 1cycle has a rise of its own. at: (n,) float64, the steps, of the
    run's `steps`, to give factors for; None for all of them. A step's factor has the same bits
    whichever others are asked for with it.
    """
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
    """Factors: linear upwards over the first `fraction` of the steps, then 1.

    at: as of `template_factors`.
    """
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
    """From 1 to 0 as `done` goes from 0 to 1."""
    return 0.5 * (1 + (math.pi * done).cos())


def shaped(lr: Tensor, factors: Tensor) -> Tensor:
    """(T,) or (T, G): lr, () or (G,), times factors (T,), within the bounds of lr.

    A group that is at 0 stays there.
    """
    values = factors * lr if lr.dim() == 0 else factors[:, None] * lr
    return torch.where(values == 0, values, values.clamp(min=CONTROLS["lr"].lower))


def cooldown(steps: int, fraction: float, at: Tensor | None = None) -> Tensor:
    """Factors: 1, then linear towards 0 over the last `fraction` of the steps.

    The last factor is 1/(n + 1) of n cooling steps, not 0, so that the last step still counts.
    at: as of `template_factors`.
    """
    done = _steps(steps) if at is None else at
    n = math.floor(steps * fraction)
    return torch.where(done < steps - n, 1.0, (steps - done) / (n + 1))

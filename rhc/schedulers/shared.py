"""Shared by the schedulers: deferred reads, momentum, noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from rhc.errors import InputError
from rhc.rng import root_mean_square, standard_noise

NoiseOn = Literal["gradients", "gradients-by-weights", "parameters"]
NOISE_ON: tuple[NoiseOn, ...] = ("gradients", "gradients-by-weights", "parameters")

Scalar = Tensor | float | None


def scalar(value: Any, name: str) -> Scalar:
    """A scalar to read later; tensors are copied, since a compiled step may reuse their memory."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise InputError(
                f"{name} must be a scalar, got shape {tuple(value.shape)}: pass its mean"
            )
        return value.detach().reshape(()).clone()
    return None if value is None else float(value)


def numbers(rows: Sequence[Sequence[Scalar]]) -> list[list[float | None]]:
    """Rows of scalars as floats, with one transfer per device."""
    tensors = [x for row in rows for x in row if isinstance(x, Tensor)]
    found: Iterator[float] = iter(())
    if tensors:
        device = tensors[0].device
        wide = torch.float64 if device.type == "cpu" else torch.float32
        found = iter(torch.stack([t.to(device, wide) for t in tensors]).tolist())
    return [[next(found) if isinstance(x, Tensor) else x for x in row] for row in rows]


def momentum_of(group: Mapping[str, Any]) -> float | None:
    """SGD's momentum or Adam's β1, if in (0, 1)."""
    value = group["betas"][0] if "betas" in group else group.get("momentum")
    return float(value) if value and 0 < float(value) < 1 else None


def set_momentum(group: dict[str, Any], value: float) -> None:
    if "betas" in group:
        group["betas"] = (value, *group["betas"][1:])
    else:
        group["momentum"] = value


@torch.no_grad()
def add_noise(
    groups: Sequence[Mapping[str, Any]],
    sigma: float,
    seed: int,
    step: int,
    on: NoiseOn = "gradients",
) -> None:
    """Adds σ·RMS(g)·ξ or σ·RMS(θ)·ξ to gradients, or σ·RMS(θ)·ξ to parameters, RMS per tensor. ξ is
    a function of (seed + index of the group, step)."""
    if sigma == 0:
        return
    for number, group in enumerate(groups):
        parameters = [p for p in group["params"] if p.requires_grad]
        noise = standard_noise(parameters, seed + number, step)
        for p, xi in zip(parameters, noise, strict=True):
            if p.grad is None or p.grad.is_sparse:
                continue
            if on == "gradients":
                p.grad.addcmul_(xi, root_mean_square(p.grad), value=sigma)
            elif on == "gradients-by-weights":
                p.grad.addcmul_(xi, root_mean_square(p), value=sigma)
            else:
                p.addcmul_(xi, root_mean_square(p), value=sigma)

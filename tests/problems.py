"""One table of small problems and one of optimizers, crossed with every method under test.

A problem is small enough for a step to take a millisecond, and has what breaks an adjoint: dropout,
running statistics, kinks, embedding rows that no batch touches, fused attention.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, AdamW, Optimizer

from rhc.rng import standard_noise


class Problem(NamedTuple):
    """model, its loss, batches(K) -> a list of K batches, and a loss on data of its own.

    terminal works in whatever mode the model is in; `in_mode` fixes one.
    """

    model: nn.Module
    loss_fn: Callable[[nn.Module, Any], Tensor]
    batches: Callable[[int], list[Any]]
    terminal: Callable[[nn.Module], Tensor]


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of the last axis: (…, classes) against (…) labels."""
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def mlp(dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """6-12-8-3 with tanh and dropout: smooth, and random in train mode."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    return _classification(model.to(dtype), (6,), 3, dtype, seed)


def cnn(dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """Two convolutions with BatchNorm, ReLU and max-pooling on 8×8 images.

    No bias before BatchNorm: its gradient would be rounding noise, which Adam makes a full step of.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip
    return _classification(model.to(dtype), (1, 8, 8), 3, dtype, seed)


def transformer(dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """One causal pre-LayerNorm block over 13 tokens, of which the batches use 9."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed + 1)

    def batch(size: int = 4) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, 9, (size, 6), generator=draw)
        return tokens[:, :-1], tokens[:, 1:]

    held_out = batch(8)
    return Problem(
        Transformer(tokens=13, context=5, width=8, heads=2).to(dtype),
        classify,
        lambda steps: [batch() for _ in range(steps)],
        lambda model: classify(model, held_out),
    )


def quadratic(dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """ℓ(θ; b) = ½ Σ h (θ − b)², with known curvature h: every derivative has a closed form."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed + 1)
    held_out = torch.randn(5, generator=draw, dtype=torch.float64).to(dtype)
    return Problem(
        Quadratic(5).to(dtype),
        lambda model, b: model(b),
        lambda steps: [
            0.3 * torch.randn(5, generator=draw, dtype=torch.float64).to(dtype)
            for _ in range(steps)
        ],
        lambda model: model(held_out),
    )


PROBLEMS: Mapping[str, Callable[..., Problem]] = {
    "mlp": mlp,
    "cnn": cnn,
    "transformer": transformer,
    "quadratic": quadratic,
}


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1, weight_decay=0.02)


def momentum(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.8, dampening=0.1, weight_decay=0.02)


def nesterov(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.02)


def adam(parameters: Any) -> Optimizer:
    return Adam(parameters, lr=0.01, betas=(0.8, 0.95), weight_decay=0.02)


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)


OPTIMIZERS: Mapping[str, Callable[[Any], Optimizer]] = {
    "sgd": sgd,
    "momentum": momentum,
    "nesterov": nesterov,
    "adam": adam,
    "adamw": adamw,
}


def two_groups(make: Callable[[Any], Optimizer], model: nn.Module) -> Optimizer:
    """Every second parameter at a tenth of the lr, half the momentum's odds and no weight decay."""
    parameters = list(model.parameters())
    optimizer = make([{"params": parameters[::2]}, {"params": parameters[1::2]}])
    first, second = optimizer.param_groups
    second["lr"] = first["lr"] / 10
    second["weight_decay"] = 0.0
    if "betas" in first:
        second["betas"] = (odds_scaled(first["betas"][0], 0.5), first["betas"][1])
    elif first["momentum"]:
        second["momentum"] = odds_scaled(first["momentum"], 0.5)
    return optimizer


def odds_scaled(value: float, ratio: float) -> float:
    """The value whose odds v/(1 − v) are `ratio` times those of `value`."""
    odds = ratio * value / (1 - value)
    return odds / (1 + odds)


def in_mode(
    terminal: Callable[[nn.Module], Tensor], *, training: bool
) -> Callable[[nn.Module], Tensor]:
    """`terminal` taken in train or in eval mode; it leaves the model in that mode."""
    return lambda model: terminal(model.train(training))


def steered(optimizer: Optimizer, steps: int, seed: int = 0) -> dict[str, Tensor]:
    """A value per step of every control that can be steered, within ±20 % of the optimizer's own.

    Without momentum there is no buffer, and nothing to steer.
    """
    group = optimizer.param_groups[0]
    beta = group["betas"][0] if "betas" in group else group["momentum"]
    centre = {"lr": group["lr"], "momentum": beta, "noise": 0.1}
    centre["weight_decay"] = group["weight_decay"]
    draw = torch.Generator().manual_seed(seed)
    return {
        name: value * (0.8 + 0.4 * torch.rand(steps, generator=draw, dtype=torch.float64))
        for name, value in centre.items()
        if value
    }


def plain_loop(
    problem: Problem,
    optimizer: Optimizer,
    batches: list[Any],
    controls: Mapping[str, Tensor],
    *,
    average: float | None = None,
    clip_norm: float | None = None,
    seed: int = 0,
    stage_weight: float = 1.0,
    terminal: Callable[[nn.Module], Tensor] | None = None,
) -> float:
    """J by an ordinary training loop that shares only the noise's draws with rhc; trains in place.

    The definition that hypergradients are differenced against: J = c Σ_t ℓ_t + terminal(θ̄).
    """
    model, loss_fn = problem.model, problem.loss_fn
    initial = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    total, mean, weight_sum = 0.0, [torch.zeros_like(p) for p in parameters], 0.0
    for t, batch in enumerate(batches):
        _set_controls(optimizer, initial, {name: float(v[t]) for name, v in controls.items()})
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        if "noise" in controls:
            for p, xi in zip(parameters, standard_noise(parameters, seed, t), strict=True):
                if p.grad is not None:
                    p.grad += float(controls["noise"][t]) * p.grad.square().mean().sqrt() * xi
        optimizer.step()
        total += stage_weight * loss.item()
        weight = 1.0 if average is None else average ** (len(batches) - 1 - t)
        weight_sum = weight if average is None else weight_sum + weight
        for m, p in zip(mean, parameters, strict=True):
            m.mul_(average is not None).add_(p.detach(), alpha=weight)
    if terminal is not None:
        with torch.no_grad():
            for m, p in zip(mean, parameters, strict=True):
                p.copy_(m / weight_sum)
            total += float(terminal(model))
    return total


def everything(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    """A copy of all that a step can move: parameters, buffers, gradients, slots, modes, RNG."""
    return copy.deepcopy(
        [
            dict(model.state_dict()),
            optimizer.state_dict(),
            [p.grad for p in model.parameters()],
            [(name, m.training, "forward" in vars(m)) for name, m in model.named_modules()],
            (torch.get_rng_state(), np.random.get_state(), random.getstate()),
        ]
    )


def assert_identical(a: Any, b: Any) -> None:
    """Equal to the last bit, in nested lists, tuples and dicts of tensors and arrays."""
    if isinstance(a, Tensor):
        assert isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_identical(x, y)
    else:
        assert a == b


def seed_everything(seed: int) -> None:
    """Every global generator of the process."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found − expected| / |expected|, in Euclidean norms."""
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))


def _set_controls(
    optimizer: Optimizer, initial: list[dict[str, Any]], values: Mapping[str, float]
) -> None:
    for group, own in zip(optimizer.param_groups, initial, strict=True):
        reference = initial[0]
        for name in ("lr", "weight_decay"):
            if name in values:
                ratio = own[name] / reference[name] if reference[name] else 1.0
                group[name] = values[name] * ratio
        if "momentum" in values:
            key = "betas" if "betas" in group else "momentum"
            mine, first = (x[key][0] if key == "betas" else x[key] for x in (own, reference))
            ratio = mine / (1 - mine) / (first / (1 - first)) if first else 1.0
            value = odds_scaled(values["momentum"], ratio)
            group[key] = (value, own[key][1]) if key == "betas" else value


def _classification(
    model: nn.Module, shape: tuple[int, ...], classes: int, dtype: torch.dtype, seed: int
) -> Problem:
    draw = torch.Generator().manual_seed(seed + 1)

    def batch(size: int = 8) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, *shape, generator=draw, dtype=torch.float64).to(dtype)
        return x, torch.randint(0, classes, (size,), generator=draw)

    held_out = batch(16)
    return Problem(
        model,
        classify,
        lambda steps: [batch() for _ in range(steps)],
        lambda model: classify(model, held_out),
    )


class Quadratic(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(size))
        self.register_buffer("curvature", torch.linspace(0.2, 3.0, size))

    def forward(self, b: Tensor) -> Tensor:
        return 0.5 * (self.curvature * (self.theta - b) ** 2).sum()


class Transformer(nn.Module):
    def __init__(self, tokens: int, context: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.token = nn.Embedding(tokens, width)
        self.position = nn.Parameter(torch.randn(context, width) / math.sqrt(width))
        self.before_attention = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.before_perceptron = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.head = nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.attention(self.before_attention(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mixed(attended.transpose(1, 2).flatten(-2))
        return self.head(x + self.perceptron(self.before_perceptron(x)))

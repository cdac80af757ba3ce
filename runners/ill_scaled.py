"""MNIST with layers written in other units, so that no single learning rate suits them all."""

from __future__ import annotations

from pathlib import Path

import torch
from rhc.runners.mnist import mnist
from torch import Tensor, nn
from torch.nn import functional as F

from rhc.workload import Workload

SCALES = (0.1, 1.0, 10.0)


class ScaledLinear(nn.Module):
    """A linear layer that stores weight and bias divided by `scale`, and multiplies them back.

    With plain SGD a stored parameter wants 1/scale² of the lr that an ordinary one wants.
    """

    def __init__(self, ordinary: nn.Linear, scale: float) -> None:
        super().__init__()
        self.scale = scale
        with torch.no_grad():
            self.weight = nn.Parameter(ordinary.weight / scale)
            self.bias = nn.Parameter(ordinary.bias / scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.scale * self.weight, self.scale * self.bias)


def ill_scaled(*, seed: int = 0, data: Path | None = None) -> Workload:
    """MNIST's MLP whose three layers want learning rates in the ratio 100 : 1 : 0.01.

    One parameter group per layer, each with its "ratio", which nothing but a comparison looks at.
    seed and data are those of `mnist`, and so are the weights that
    the layers stand for.
    """
    workload = mnist(seed=seed, data=data)
    ordinary = [layer for layer in workload.model.modules() if isinstance(layer, nn.Linear)]
    layers = [ScaledLinear(layer, c) for layer, c in zip(ordinary, SCALES, strict=True)]
    workload.model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    workload.parameter_groups = [
        {"params": list(layer.parameters()), "ratio": 1 / c**2}
        for layer, c in zip(layers, SCALES, strict=True)
    ]
    workload.lr = {"sgd": 1e-3, "adam": 1e-3, "adamw": 1e-3}
    return workload

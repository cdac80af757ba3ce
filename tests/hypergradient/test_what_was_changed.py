"""What a reverse pass computes otherwise than plain training is told, once."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rhc


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def why(model: nn.Module, x: Tensor, **options: Any) -> str:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    terminal = lambda m: loss_fn(m.eval(), x)  # noqa: E731
    given: dict[str, Any] = {"controls": {"lr": 0.1}, "terminal": terminal, **options}
    return rhc.hypergradient(model, optimizer, loss_fn, [x] * 3, **given).why


def test_attention_by_another_kernel_is_told() -> None:
    x = torch.randn(2, 1, 5, 4, dtype=torch.float64)
    says = "attention was computed as softmax(q kᵀ) v, because its fused kernels have no second"
    assert says in why(Attention(), x)
    assert says not in why(Attention(), x, product="central-difference")
    assert says not in why(nn.Linear(4, 4).double(), x)


def test_running_statistics_are_told() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    says = "running statistics 1.running_mean, 1.running_var are differentiated where the terminal"
    assert says in why(model, x)
    assert says not in why(model, x, terminal=None)


def test_a_run_tells_it_once(tmp_path: Any) -> None:
    x = torch.randn(2, 1, 5, 4, dtype=torch.float64)
    model = Attention()
    runner = rhc.Runner(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        loss_fn,
        [x] * 4,
        [x],
        window=3,
        start="given",
        directory=tmp_path,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = runner.fit(steps=9)
    told = [notice for notice in result.notices if "its fused kernels" in notice]
    assert len(told) == 1
    assert sum("its fused kernels" in str(warning.message) for warning in caught) == 1

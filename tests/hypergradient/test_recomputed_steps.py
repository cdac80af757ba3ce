"""A step that is computed again is the step that was rolled, or the result says that it is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rhc

K = 6


class Checkpointed(nn.Module):
    """Runs its first layers again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 16), nn.Linear(16, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda y: torch.tanh(self.first(y)), x, use_reentrant=False)
        return self.second(hidden)


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def look_back(loss_fn, **options):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = Checkpointed()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    batches = [torch.randn(8, 5, dtype=torch.float64) for _ in range(K)]
    lr = options.pop("lr", torch.full((K,), 0.1, dtype=torch.float64))
    return rhc.hypergradient(model, optimizer, loss_fn, batches, controls={"lr": lr}, **options)


def value(lr: Tensor) -> float:
    return look_back(loss_fn, lr=lr, product="none", verify=False).value


@pytest.mark.parametrize(
    ("product", "tolerance"),
    [("exact", 1e-8), ("central-difference", 1e-7), ("forward-difference", 1e-5)],
)
def test_activation_checkpointing(product: str, tolerance: float) -> None:
    found = look_back(loss_fn, product=product)
    differences = []
    for direction in torch.eye(K, dtype=torch.float64):
        up, down = (value(0.1 + e * direction) for e in (1e-5, -1e-5))
        differences.append((up - down) / 2e-5)
    expected = torch.tensor(differences, dtype=torch.float64)
    assert found.result.successful
    assert (found.grad["lr"] - expected).norm() <= tolerance * expected.norm()


def test_activation_checkpointing_where_graphs_are_asked_for() -> None:
    """Its graphs do not outlive their steps, and are made again."""
    found, expected = look_back(loss_fn, segment=K), look_back(loss_fn)
    assert found.result.successful
    torch.testing.assert_close(found.grad["lr"], expected.grad["lr"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("segment", [1, 2, K])
def test_a_loss_with_hidden_state_is_reported(segment: int) -> None:
    calls = []

    def hidden(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(x)
        return loss_fn(model, x + len(calls))

    result = look_back(hidden, segment=segment).result
    assert result.name == "inconsistent" and result.step is not None


def test_gradients_may_be_off_where_it_is_called() -> None:
    with torch.no_grad():
        assert look_back(loss_fn).result.successful

"""Hypergradients held against the plain loop: what is right passes, what is wrong does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rhc
from rhc.hypergradient import adjoint as engine
from rhc.hypergradient import hvp as products
from rhc.hypergradient import verification

K = 12


def relu_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)
    )


def smooth_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3))


def pooled_net() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        nn.Conv1d(1, 4, 3),
        nn.BatchNorm1d(4),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def dropout_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.LeakyReLU(), nn.Dropout(0.2), nn.Linear(24, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "relu": relu_net,
    "smooth": smooth_net,
    "pooled": pooled_net,
    "dropout": dropout_net,
}
OPTIMIZERS: dict[str, Callable[[Any, float], torch.optim.Optimizer]] = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr),
    "rmsprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr),
}
LRS = {"sgd": (0.003, 0.03, 0.2), "adamw": (1e-3, 2e-2), "rmsprop": (1e-3, 1e-2)}


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def focal(model: nn.Module, batch: Any) -> Tensor:
    """Its weights are detached: exact products leave out how they move with the parameters."""
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return ((1 - torch.exp(-losses)).detach() * losses).mean()


def found(
    make: Callable[[], nn.Module] = smooth_net,
    optimizer: str = "sgd",
    lr: float = 0.05,
    loss: Callable[..., Tensor] = cross_entropy,
    dtype: torch.dtype = torch.float32,
    after: Callable[[nn.Module, torch.optim.Optimizer], None] = lambda m, o: None,
    steps: int = K,
    **settings: Any,
) -> rhc.Hypergradient:
    torch.manual_seed(0)
    model = make().to(dtype)
    made = OPTIMIZERS[optimizer](model.parameters(), lr)
    batches = [(torch.randn(16, 6).to(dtype), torch.randint(0, 3, (16,))) for _ in range(steps)]
    held = torch.randn(16, 6).to(dtype), torch.randint(0, 3, (16,))
    for batch in batches[:4]:
        made.zero_grad()
        loss(model, batch).backward()
        made.step()
    after(model, made)
    settings = {"controls": {"lr": lr}, **settings}
    return rhc.hypergradient(
        model,
        made,
        loss,
        batches,
        terminal=lambda m: cross_entropy(m, held),
        average=0.9,
        **settings,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_no_false_alarm(name: str, optimizer: str, dtype: torch.dtype) -> None:
    for lr in LRS[optimizer]:
        for product in ("exact", "none"):
            h = found(MODELS[name], optimizer, lr, dtype=dtype, product=product)
            assert h.result.name in ("successful", "vanishing"), (lr, product, h.result)
            assert set(h.check) == {"lr"}
            assert h.check["lr"] <= (0.05 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("segment", [1, 3, 5, K])
def test_every_control_and_segment(segment: int, dtype: torch.dtype) -> None:
    controls = {"lr": 0.05, "momentum": 0.9, "noise": 0.0, "weight_decay": 1e-3}
    h = found(dtype=dtype, segment=segment, controls=controls, clip_norm=1.0)
    assert h.result.successful
    assert set(h.check) == set(controls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("segment", [1, 5])
@pytest.mark.parametrize("control", ["lr", "momentum", "noise", "weight_decay"])
def test_a_derivative_that_is_off_is_found(
    control: str, segment: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    adjoint = engine._Recursion.run

    def off(self: Any) -> Any:
        result = adjoint(self)
        result.gradient[control] = 1.2 * result.gradient[control]
        return result

    monkeypatch.setattr(engine._Recursion, "run", off)
    controls = {"lr": 0.05, "momentum": 0.9, "noise": 0.1, "weight_decay": 1e-3}
    h = found(dtype=dtype, segment=segment, controls=controls)
    assert h.result.name == "inconsistent"
    assert control in h.result.message and control in h.why
    others = [apart for name, apart in h.check.items() if name != control]
    assert h.check[control] > 0.1 > max(others)


def test_a_product_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, at an lr at which it hardly shows over the first steps."""
    exact = products._exact

    def off(*arguments: Any) -> Any:
        result = exact(*arguments[:-2], None, arguments[-1])
        into = arguments[-2]
        moved = [None if t is None else 1.3 * t for t in result.parameters]
        if into is not None:
            moved = [products._into(a, b) for a, b in zip(into, moved, strict=True)]
        return products.StepVjp(moved, result.statistics, result.discrepancy)

    monkeypatch.setattr(products, "_exact", off)
    h = found(lr=1e-3, product="exact", memory_budget=None, stage_weight=0.0, segment=1)
    right = found(lr=1e-3, product="exact", stage_weight=0.0, verify=False)
    assert right.result.successful
    assert "Hessian product" in h.result.message or h.plan.graphs  # kept graphs take another way


def test_detached_weights_in_float32() -> None:
    """Exact products are off by a third over the window, and hardly over its first steps."""
    exact = found(loss=focal, product="exact", stage_weight=0.0)
    assert exact.result.name == "inconsistent"
    assert "detached" in exact.result.message
    auto = found(loss=focal, stage_weight=0.0)
    assert auto.result.successful
    assert auto.product == "forward-difference"
    assert "exact products did not hold" in auto.why
    double = found(loss=focal, stage_weight=0.0, dtype=torch.float64)
    assert double.result.successful
    right = double.grad["lr"]
    assert float((auto.grad["lr"] - right).norm() / right.norm()) < 1e-3
    assert float((exact.grad["lr"] - right).norm() / right.norm()) > 0.05


def test_a_terminal_loss_with_another_gradient() -> None:
    torch.manual_seed(0)
    model = smooth_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    batches = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(6)]

    def terminal(model: nn.Module) -> Tensor:
        loss = cross_entropy(model, batches[0])
        return loss * loss.detach()

    h = rhc.hypergradient(
        model, optimizer, cross_entropy, batches, controls={"lr": 0.05}, terminal=terminal
    )
    assert h.result.name == "inconsistent"
    assert "terminal loss" in h.result.message


def test_it_costs_at_most_twenty_steps_and_once() -> None:
    torch.manual_seed(0)
    model = relu_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batches = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(K)]

    def look(verify: Any) -> rhc.Hypergradient:
        return rhc.hypergradient(
            model, optimizer, cross_entropy, batches, controls={"lr": 0.01}, verify=verify
        )

    without, first, second = look(False), look("auto"), look("auto")
    assert without.check == {}
    assert 0 < first.gradient_equivalents - without.gradient_equivalents <= 20
    assert second.gradient_equivalents == without.gradient_equivalents
    assert second.check == first.check
    assert torch.equal(first.grad["lr"], second.grad["lr"])
    handle = model[0].register_forward_hook(lambda module, args, output: None)
    assert look("auto").gradient_equivalents > without.gradient_equivalents  # another model now
    handle.remove()


def test_everything_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = pooled_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batches = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(6)]
    cross_entropy(model, batches[0]).backward()
    optimizer.step()
    tensors = [*model.parameters(), *model.buffers()]
    slots = [t for s in optimizer.state.values() for t in s.values()]
    grads = [p.grad for p in model.parameters()]
    kept = [t.detach().clone() for t in (*tensors, *slots)]
    torch.manual_seed(5)
    rhc.hypergradient(model, optimizer, cross_entropy, batches, controls={"lr": 0.01})
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    again = [*model.parameters(), *model.buffers()]
    assert all(a is b for a, b in zip(tensors, again, strict=True))
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    slots = [t for s in optimizer.state.values() for t in s.values()]
    assert all(torch.equal(a, b) for a, b in zip(kept, [*again, *slots], strict=True))


def test_differences_that_were_asked_for_are_held_against_others() -> None:
    h = found(relu_net, "sgd", 0.2, product="forward-difference")
    right = found(relu_net, "sgd", 0.2, product="exact")
    off = float((h.grad["lr"] - right.grad["lr"]).norm() / right.grad["lr"].norm())
    assert off < 0.05 or h.result.name == "inconsistent"
    assert found(relu_net, "sgd", 0.2, product="forward-difference", verify=False).check == {}


def test_verify_is_auto_or_false() -> None:
    with pytest.raises(rhc.errors.InputError, match="verify must be 'auto' or False, got 'yes'"):
        found(verify="yes")


def test_a_run_whose_hypergradients_are_wrong_rewrites_nothing() -> None:
    torch.manual_seed(0)
    rows = torch.utils.data.TensorDataset(torch.randn(256, 6), torch.randint(0, 3, (256,)))
    loader = torch.utils.data.DataLoader(rows, 16)
    model = smooth_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    told: list[str] = []

    def listener(event: Any) -> None:
        if type(event).__name__ == "Notice":
            told.append(event.message)

    runner = rhc.Runner(
        model,
        optimizer,
        focal,
        loader,
        loader,
        window=10,
        start="given",
        product="exact",
        listeners=[listener],
    )
    result = runner.fit(100)
    assert [w["outcome"] for w in result.windows] == ["rejected"]
    assert "inconsistent" in result.windows[0]["reason"]
    assert sum("hypergradients are inconsistent" in message for message in told) == 1
    steps = result.schedule["lr"]
    assert bool((steps[:50] == 0.05).all())


def test_what_was_found_is_kept_by_a_state() -> None:
    checked = verification.Disagreements({"lr": 0.5}, tolerance=0.05)
    assert not checked.holds and checked.finite
    assert verification.Disagreements({"lr": float("nan")}).finite is False

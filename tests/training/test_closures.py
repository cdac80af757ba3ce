"""Optimizers whose step evaluates the loss by itself, or that keep weights for evaluation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rhc
from rhc import InputError
from rhc.events import StepTaken


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))


def batches() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(6, 16, 4, generator=draw)
    return [(b, b.sin().sum(1, keepdim=True)) for b in x]


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation (Foret et al. 2021): closure is optional by its signature."""

    def __init__(self, params: Any, lr: float, rho: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})

    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        assert closure is not None, "sharpness-aware minimisation needs a closure"
        for group in self.param_groups:
            own = [p for p in group["params"] if p.grad is not None]
            moves = [group["rho"] * p.grad / (p.grad.norm() + 1e-12) for p in own]
            with torch.no_grad():
                torch._foreach_add_(own, moves)
            closure()
            with torch.no_grad():
                torch._foreach_sub_(own, moves)
                torch._foreach_add_(own, [p.grad for p in own], alpha=-group["lr"])


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
    "LBFGS with line search": lambda p: torch.optim.LBFGS(p, line_search_fn="strong_wolfe"),
    "SAM": lambda p: Sam(p, lr=0.1),
}


def plainly(name: str, steps: int, clip: float | None) -> tuple[nn.Module, list[float]]:
    model = net()
    optimizer: Any = OPTIMIZERS[name](model.parameters())
    data, losses = batches(), []
    for step in range(steps):
        found: list[float] = []
        batch = data[step % len(data)]

        def closure(batch: Any = batch, found: list[float] = found) -> Tensor:
            optimizer.zero_grad()
            loss = loss_fn(model, batch)
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            found.append(float(loss.detach()))
            return loss

        if name == "SAM":
            closure()
        optimizer.step(closure)
        losses.append(found[0])
    return model, losses


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_trained_as_by_a_plain_loop(name: str, clip: float | None, tmp_path: Path) -> None:
    expected, losses = plainly(name, 8, clip)
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    result = rhc.Runner(
        model, optimizer, loss_fn, batches(), batches(), window=3, rewrite=False, clip_norm=clip,
        directory=tmp_path / "run",
    ).fit(8)  # fmt: skip
    for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert [row["loss"] for row in result.tape] == losses


def test_batches_that_are_accumulated_are_evaluated_again() -> None:
    model = net()
    optimizer = OPTIMIZERS["LBFGS"](model.parameters())
    runner = rhc.Runner(model, optimizer, loss_fn, batches(), rewrite=False, accumulate=2, window=3)
    tape = runner.fit(6).tape
    assert tape[-1]["loss"] < tape[0]["loss"]
    model = net()
    with pytest.raises(
        InputError, match=r"Sam evaluates the loss of a step again, .* accumulate=1"
    ):
        rhc.Runner(
            model, Sam(model.parameters(), 0.1), loss_fn, batches(), rewrite=False, accumulate=2
        ).fit(3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_not_rewritten(name: str, tmp_path: Path) -> None:
    model = net()
    with pytest.raises(InputError, match="rewrit"):
        rhc.Runner(
            model, OPTIMIZERS[name](model.parameters()), loss_fn, batches(),
            directory=tmp_path / "run",
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_an_error_of_a_step_passes_through() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            raise RuntimeError("a fault of its own")

    model = net()
    with pytest.raises(RuntimeError, match="a fault of its own"):
        rhc.Runner(
            model, Broken(model.parameters(), lr=0.1), loss_fn, batches(), rewrite=False
        ).fit(1)


# Weights for evaluation ---------------------------------------------------------------------------


class Averaging(torch.optim.SGD):
    """SGD that keeps the mean of its iterates, and shows it in its evaluation mode."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["train_mode"] = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.param_groups[0]["train_mode"], "not in train mode"
        super().step()
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["count"] = state.get("count", 0) + 1
            mean = state.setdefault("mean", torch.zeros_like(p))
            mean.lerp_(p.detach(), 1 / state["count"])

    @torch.no_grad()
    def _swap(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                for p in group["params"]:
                    if "mean" in self.state[p]:
                        # As schedule-free optimizers do: there and back, up to rounding.
                        other = self.state[p]["mean"]
                        p.copy_(p * 3 - 2 * other if train else (p + 2 * other) / 3)
            group["train_mode"] = train

    def train(self) -> None:
        self._swap(True)

    def eval(self) -> None:
        self._swap(False)


def averaging(model: nn.Module) -> Any:
    return Averaging(model.parameters(), lr=0.1)


def schedule_free(model: nn.Module) -> Any:
    package = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    return package.AdamWScheduleFree(model.parameters(), lr=0.05)


@pytest.mark.parametrize("make", [averaging, schedule_free])
def test_it_is_evaluated_at_its_evaluation_weights(make: Any, tmp_path: Path) -> None:
    model = net()
    optimizer = make(model)
    optimizer.train()
    for batch in (b for _ in range(2) for b in batches()):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    live = copy.deepcopy(model.state_dict())
    optimizer.eval()
    model.eval()
    with torch.no_grad():
        expected = sum(float(loss_fn(model, b)) for b in batches()) / 6

    again = net()
    own = make(again)
    own.train()
    every = {"validate_every": 3, "window": 3}
    runner = rhc.Runner(again, own, loss_fn, batches(), batches(), rewrite=False, **every)
    result = runner.fit(12)
    # What trains on is untouched by evaluations in between, to the bit.
    for a, b in zip(again.state_dict().values(), live.values(), strict=True):
        assert torch.equal(a, b)
    assert own.param_groups[0]["train_mode"]
    assert result.val_loss == pytest.approx(expected, rel=1e-5)
    assert result.tape[-1]["val_loss"] == result.val_loss
    assert result.val_loss != pytest.approx(result.tape[-1]["loss"], rel=1e-3)


@pytest.mark.parametrize("make", [averaging, schedule_free])
def test_it_is_resumed_to_the_bit(make: Any, tmp_path: Path) -> None:
    def begun(directory: Path, *listeners: Any) -> tuple[nn.Module, Any, rhc.Runner]:
        model = net()
        optimizer = make(model)  # in evaluation mode, as they are made
        runner = rhc.Runner(
            model, optimizer, loss_fn, batches(), batches(), rewrite=False, window=3,
            directory=directory, listeners=listeners,
        )  # fmt: skip
        return model, optimizer, runner

    def stop(event: object) -> None:
        if isinstance(event, StepTaken) and event.step == 7:
            raise KeyError("stopped")

    model, optimizer, runner = begun(tmp_path / "straight")
    straight = runner.fit(12)
    with pytest.raises(KeyError):
        begun(tmp_path / "stopped", stop)[2].fit(12)
    other, again, runner = begun(tmp_path / "stopped")
    resumed = runner.fit(12)
    assert (resumed.val_loss, resumed.train_loss) == (straight.val_loss, straight.train_loss)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    # As it was found: a model that is used next is at the weights for that.
    assert not optimizer.param_groups[0]["train_mode"] and not again.param_groups[0]["train_mode"]

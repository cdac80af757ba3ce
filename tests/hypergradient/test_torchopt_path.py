"""What a default window's reverse pass runs through: torchopt transformations, step by step, each
computed again from the states that the roll kept (gradient checkpointing). Their vjp is autograd's,
or, for steps that autograd slows down by more than 5 % of the pass, one that they bring."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from problems import mlp, relative_error
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torchopt.base import GradientTransformation

import rhc
from rhc.optimizers import DIFFERENTIABLE
from rhc.optimizers.base import ClosedTransformation, DifferentiableOptimizer
from rhc.training.plant import Plant

K = 7

MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, 0.1, momentum=0.8, weight_decay=0.01),
    "adam": lambda p: Adam(p, 0.01),
    "adamw": lambda p: AdamW(p, 0.01),
    "nesterov": lambda p: SGD(p, 0.1, momentum=0.8, nesterov=True),
    "rmsprop": lambda p: RMSprop(p, 0.01),
}

VJPS = {name: "closed" if name in ("sgd", "adam", "adamw") else "autograd" for name in MAKERS}


class Call(NamedTuple):
    """A call of a transformation."""

    what: str  # "update" without a graph; "autograd": with one; "closed": its own vjp
    pulled: list[Tensor | None]  # costates that autograd brought, or λ_g of its own vjp
    rolling: bool  # whether the live plant was rolling


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    calls: list[Call] = []
    rolling: list[bool] = []
    step, roll = DifferentiableOptimizer.step, Plant.roll

    def rolled(*args: Any, **options: Any) -> Any:
        rolling.append(True)
        try:
            return roll(*args, **options)
        finally:
            rolling.pop()

    def traced(self: Any, *args: Any) -> GradientTransformation:
        made = step(self, *args)
        assert type(made) in (GradientTransformation, ClosedTransformation)

        def update(updates: Any, state: Any, **options: Any) -> Any:
            increment, after = made.update(updates, state, **options)
            what = "autograd" if increment.requires_grad else "update"
            calls.append(Call(what, [], bool(rolling)))
            if increment.requires_grad:
                increment.register_hook(calls[-1].pulled.append)
            return increment, after

        def vjp(*args: Any) -> Any:
            found = made.vjp(*args)
            calls.append(Call("closed", [found.gradient], bool(rolling)))
            return found

        copied = made._replace(update=update)
        if isinstance(made, ClosedTransformation):
            copied.vjp = vjp
        return copied

    monkeypatch.setattr(DifferentiableOptimizer, "step", traced)
    monkeypatch.setattr(Plant, "roll", rolled)
    return calls


def assert_one_path(calls: list[Call], vjp: str, steps: int) -> None:
    assert not any(call.rolling for call in calls)  # torch.optim takes the live steps
    assert {call.what for call in calls} == {"update", vjp}
    differentiated = [call for call in calls if call.what == vjp]
    assert len(differentiated) % steps == 0  # one block
    assert all(
        len(call.pulled) == 1 and call.pulled[0] is not None and call.pulled[0].any()
        for call in differentiated
    )
    # No graph outlives its step: a later step's is made and pulled through before an earlier one's,
    # and the states between those that the roll kept are computed again by the same updates.
    assert 0 < len(calls) - len(differentiated) <= len(differentiated)


@pytest.mark.parametrize("name", MAKERS)
def test_hypergradient_runs_through_torchopt_under_recomputation(
    name: str, trace: list[Call]
) -> None:
    problem = mlp()
    optimizer = MAKERS[name](problem.model.parameters())
    found = rhc.hypergradient(
        problem.model,
        optimizer,
        problem.loss_fn,
        problem.batches(K),
        controls={"lr": 0.01, "weight_decay": 0.02},
        terminal=problem.terminal,
        verify=False,
    )
    assert found.result.successful
    assert len(trace) <= 2 * K  # one pass
    assert_one_path(trace, VJPS[name], K)


@pytest.mark.parametrize("name", ["sgd", "adamw", "nesterov"])
def test_a_run_s_default_window_runs_through_torchopt(
    name: str, trace: list[Call], tmp_path: Any
) -> None:
    problem = mlp()
    optimizer = MAKERS[name](problem.model.parameters())
    before = copy.deepcopy(problem.model.state_dict())
    batches = problem.batches(4)
    runner = rhc.Runner(
        problem.model,
        optimizer,
        problem.loss_fn,
        batches,
        batches,
        window=K,
        start="given",
        directory=tmp_path,
    )
    runner.fit(steps=2 * K)
    assert any(relative_error(v, before[n]) > 0 for n, v in problem.model.state_dict().items())
    assert_one_path(trace, VJPS[name], K)


@pytest.mark.parametrize("name", MAKERS)
def test_what_the_transformation_gives_is_what_the_gradient_has(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the increments are twice the lr: dJ/dlr doubles with one step to go. A vjp that belongs
    to another update is not taken."""
    found = []
    for factor in (1.0, 2.0):
        problem = mlp()
        optimizer = MAKERS[name](problem.model.parameters())
        kind = DIFFERENTIABLE[type(optimizer)]

        def scaled(*args: Any, kind: Any = kind, factor: float = factor) -> GradientTransformation:
            made = kind.transformation(*args)

            def update(updates: Any, state: Any, **options: Any) -> Any:
                increment, after = made.update(updates, state, **options)
                return factor * increment, after

            return made._replace(update=update)

        monkeypatch.setitem(DIFFERENTIABLE, type(optimizer), copy.copy(kind))
        object.__setattr__(DIFFERENTIABLE[type(optimizer)], "transformation", scaled)
        h = rhc.hypergradient(
            problem.model,
            optimizer,
            problem.loss_fn,
            problem.batches(1),
            controls={"lr": 0.01},
            stage_weight=0.0,
            terminal=problem.terminal,
            verify=False,
        )
        found.append(float(h.grad["lr"]))
        monkeypatch.undo()
    assert found[1] == pytest.approx(2 * found[0], rel=1e-12)

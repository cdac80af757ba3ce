"""Graphs that the roll keeps copy what they read again of θ, and no more; or they say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

import rhc
from rhc.hypergradient.evaluation import Evaluation
from rhc.hypergradient.lookback import Lookback
from rhc.hypergradient.record import GraphMaker
from rhc.objective import Average, Objective
from rhc.plant import Plant
from rhc.schedule import Schedule

STEPS = 4


class KeepsOnItself(Function):
    """x Wᵀ, with W where no hook and no count of changes sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.x, ctx.w = x, w
        return x @ w.t()

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, Tensor]:
        return gy @ ctx.w, gy.t() @ ctx.x


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batches(late: bool) -> list[tuple[Tensor, bool]]:
    torch.manual_seed(1)
    return [(torch.randn(6, 5, dtype=torch.float64), late and i >= 2) for i in range(STEPS)]


def plain(model: nn.Module, batch: tuple[Tensor, bool]) -> Tensor:
    x, late = batch
    loss = model(x).square().mean()
    # The first layer's weight is otherwise read by nobody in a backward pass.
    return loss + (model[0].weight ** 3).sum() if late else loss  # type: ignore[index]


def through_a_function(model: nn.Module, batch: tuple[Tensor, bool]) -> Tensor:
    first, tanh, last = model  # type: ignore[misc]
    return last(tanh(KeepsOnItself.apply(batch[0], first.weight))).square().mean()


def by_steps(loss_fn: Any, late: bool, segment: int) -> Tensor:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.8)
    found = rhc.hypergradient(
        model,
        optimizer,
        loss_fn,
        batches(late),
        controls={"lr": 0.3, "momentum": 0.8},
        terminal=lambda m: m(torch.ones(1, 5, dtype=torch.float64)).square().sum(),
        product="exact",
        segment=segment,
    )
    assert found.plan is not None and (segment > 1 or found.plan.graphs == STEPS)
    return torch.cat([found.grad["lr"], found.grad["momentum"]])


@pytest.mark.parametrize(
    ("loss_fn", "late"), [(plain, False), (plain, True), (through_a_function, False)]
)
def test_kept_graphs_give_what_one_graph_of_the_window_gives(loss_fn: Any, late: bool) -> None:
    torch.testing.assert_close(
        by_steps(loss_fn, late, 1), by_steps(loss_fn, late, STEPS), rtol=1e-10, atol=1e-12
    )


def made(loss_fn: Any) -> tuple[nn.Sequential, GraphMaker, list[Tensor]]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    plant = Plant(model, optimizer, loss_fn)
    objective = Objective(loss_weight=1.0, terminal_weight=0.0)
    make_graph = GraphMaker(Evaluation(plant, plant.blocks(), objective))
    return model, make_graph, make_graph(batches(False)[0])[0].leaves


def test_only_what_a_graph_reads_is_copied() -> None:
    model, make_graph, leaves = made(plain)
    assert make_graph.survey(batches(False)[0]).read == {"2.weight"}
    shared = [
        leaf.data_ptr() == p.data_ptr() for leaf, p in zip(leaves, model.parameters(), strict=True)
    ]
    assert shared == [True, True, False, True]


def test_all_is_copied_where_a_function_of_the_user_may_keep_it() -> None:
    _, make_graph, _ = made(through_a_function)
    assert make_graph.survey(batches(False)[0]).read == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_of_a_state_only_the_optimizers_is_kept_where_nothing_reads_more(
    kind: Any, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a graph, θ is read by weight decay alone; the hypergradient is the same to the bit."""
    kept = []

    def back() -> Tensor:
        model = network()
        options = {"momentum": 0.8} if kind is torch.optim.SGD else {}
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=decay, **options)
        plant = Plant(model, optimizer, plain)
        lookback = Lookback(plant, Objective(loss_weight=1.0), ("lr", "momentum"), product="exact")
        schedule = Schedule({"lr": [0.1] * 9, "momentum": [0.8] * 9})
        recorder = lookback.roll(batches(False)[:1] * 9, schedule)
        kept.append(len(recorder.trajectory.slots))
        return torch.cat(list(lookback.look_back(recorder, Average(None), None).grad.values()))

    found = back()
    monkeypatch.setattr(Plant, "slots_alone", lambda self, scheduled, controls: False)
    assert torch.equal(back(), found)
    assert kept[1] == 0 and (kept[0] > 0) == (decay == 0)

"""Graphs that the roll keeps copy what they read again of θ, and no more; or they say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

import rhc
from rhc.hypergradient import adjoint
from rhc.hypergradient.evaluation import Evaluation
from rhc.hypergradient.graphs import GraphMaker
from rhc.hypergradient.record import WindowRecorder
from rhc.hypergradient.reverse_pass import ReversePass
from rhc.schedule import Schedule
from rhc.training.objective import Average, Objective
from rhc.training.plant import Plant

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


def by_steps(loss_fn: Any, late: bool, *, kept: bool) -> Tensor:
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
        memory_budget=None if kept else 1,
    )
    assert found.plan is not None and found.plan.graphs == (STEPS if kept else 0)
    return torch.cat([found.grad["lr"], found.grad["momentum"]])


@pytest.mark.parametrize(
    ("loss_fn", "late"), [(plain, False), (plain, True), (through_a_function, False)]
)
def test_kept_graphs_give_what_graphs_give_that_are_made_again(loss_fn: Any, late: bool) -> None:
    kept, again = (by_steps(loss_fn, late, kept=kept) for kept in (True, False))
    torch.testing.assert_close(kept, again, rtol=1e-10, atol=1e-12)


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
        # Without Nesterov's, SGD's state takes the place of the gradient, to rounding.
        options = {"momentum": 0.8, "nesterov": True} if kind is torch.optim.SGD else {}
        optimizer = kind(model.parameters(), lr=0.1, weight_decay=decay, **options)
        plant = Plant(model, optimizer, plain)
        reverse_pass = ReversePass(
            plant, Objective(loss_weight=1.0), ("lr", "momentum"), product="exact"
        )
        schedule = Schedule({"lr": [0.1] * 9, "momentum": [0.8] * 9})
        recorder = reverse_pass.roll(batches(False)[:1] * 9, schedule)
        kept.append(sum(s[0].parameters is None for s in recorder.trajectory.states.values()))
        return torch.cat(
            list(reverse_pass.differentiate(recorder, Average(None), None).grad.values())
        )

    found = back()
    monkeypatch.setattr(Plant, "slots_alone", lambda self, scheduled, controls: False)
    assert torch.equal(back(), found)
    assert kept[1] == 0 and (kept[0] > 0) == (decay == 0)


# States in the place of gradients ----------------------------------------------------------------


def rolled(
    noise: float = 0.0, momentum: float = 0.8, **options: Any
) -> tuple[ReversePass, WindowRecorder]:
    model = network()
    clip = {k: options.pop(k) for k in ("clip_norm", "clip_value") if k in options}
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.3, "momentum": 0.8} | options)
    optimizer.zero_grad()
    plain(model, batches(False)[0]).backward()
    optimizer.step()  # so that the first state has a buffer
    plant = Plant(model, optimizer, plain, **clip)
    reverse_pass = ReversePass(
        plant, Objective(loss_weight=1.0), ("lr", "momentum"), product="exact"
    )
    values = {"lr": [0.3] * STEPS, "momentum": [0.8, 0.8, momentum, 0.8], "noise": [noise] * STEPS}
    return reverse_pass, reverse_pass.roll(batches(False), Schedule(values))


def looked_back(reverse_pass: ReversePass, recorder: WindowRecorder) -> Tensor:
    return torch.cat(list(reverse_pass.differentiate(recorder, Average(None), None).grad.values()))


def unfolded(*arguments: Any, **options: Any) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plant, "folds", lambda *_: False)
        return looked_back(*rolled(*arguments, **options))


@pytest.mark.parametrize("maximize", [False, True])
def test_momentum_takes_the_place_of_gradients_and_they_come_back(maximize: bool) -> None:
    reverse_pass, recorder = rolled(maximize=maximize)
    assert list(recorder.trajectory.states) == [0]
    before = [g.clone() for (g,) in recorder.trajectory.gradients]
    found = looked_back(reverse_pass, recorder)
    torch.testing.assert_close(found, unfolded(maximize=maximize), rtol=1e-12, atol=1e-14)
    for (g,), expected in zip(recorder.trajectory.gradients, before, strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-14)
    again = looked_back(reverse_pass, recorder)  # without graphs: they are used up
    torch.testing.assert_close(again, found, rtol=1e-12, atol=1e-14)


def test_gradients_come_back_where_looking_back_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    reverse_pass, recorder = rolled()
    before = [g.clone() for (g,) in recorder.trajectory.gradients]
    through = adjoint._Recursion._through_gradient

    def fails(self: Any, i: int, *rest: Any) -> Any:
        if i == 1:
            raise KeyboardInterrupt
        return through(self, i, *rest)

    monkeypatch.setattr(adjoint._Recursion, "_through_gradient", fails)
    with pytest.raises(KeyboardInterrupt):
        looked_back(reverse_pass, recorder)
    for (g,), expected in zip(recorder.trajectory.gradients, before, strict=True):
        torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": True},
        {"dampening": 0.3},
        {"weight_decay": 0.1},
        {"clip_norm": 0.5},
        {"clip_value": 0.1},
        {"noise": 0.1},
        {"momentum": 0.0},
    ],
    ids=str,
)
def test_gradients_stay_where_they_are_read(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is planned to lie in their place, and what is found at the window's end, agree."""

    def never(*_: Any) -> None:
        raise AssertionError

    reverse_pass, recorder = rolled(**options)
    assert recorder.plan.graphs == STEPS and recorder.plan.states_every > 0
    monkeypatch.setattr(adjoint, "Folded", never)
    assert torch.equal(looked_back(reverse_pass, recorder), unfolded(**options))


def test_noise_is_added_once_where_two_parameters_have_one_gradient() -> None:
    """The biases of a recurrent layer: a roll with kept graphs is the plain loop's."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    def value(product: Any) -> float:
        torch.manual_seed(0)
        model = Recurrent().double()
        return rhc.hypergradient(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            lambda m, x: m(x).square().mean(),
            [torch.randn(4, 5, 4, dtype=torch.float64) for _ in range(3)],
            controls={"lr": 0.1, "noise": 0.5},
            product=product,
            verify=False,
        ).value

    assert value("exact") == pytest.approx(value("none"), rel=1e-12)

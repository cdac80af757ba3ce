"""Parameter groups that are added later, and groups that share one tensor for their lr."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rhc
from rhc import InputError, Schedule
from rhc.events import StepTaken

LR = torch.linspace(0.1, 0.01, 60)
BOUNDS = rhc.Bounds(lr=(1e-5, 0.5))
STEERED: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "replay": Schedule({"lr": LR, "momentum": torch.full((60,), 0.8)}).to_lr_scheduler,
    "adaptive": lambda o: rhc.AdaptiveRL(o, steps=60, every=5, bounds=BOUNDS),
    "adaptive with noise": lambda o: rhc.AdaptiveRL(o, every=5, noise=0.01, bounds=BOUNDS),
    "planner": lambda o: rhc.EpochPlanner(
        o, epoch_steps=5, steer=("lr", "momentum"), reward=rhc.schedulers.TrainingTape()
    ),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8),
    "adam": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), betas=(0.8, 0.99)),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.ones(3, 2)).square().mean()
        loss.backward()
        optimizer.step()
        if isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
            scheduler.step()
        else:
            scheduler.step(loss)


def values(optimizer: torch.optim.Optimizer) -> list[tuple[float, float]]:
    return [
        (float(g["lr"]), float(g["betas"][0] if "betas" in g else g["momentum"]))
        for g in optimizer.param_groups
    ]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", STEERED)
def test_a_group_added_later_keeps_its_ratio(name: str, optimizer: str) -> None:
    model = net()
    o = OPTIMIZERS[optimizer](model[2].parameters())
    s = STEERED[name](o)
    train(model, o, s, 23)
    tenth = o.param_groups[0]["lr"] / 10
    o.add_param_group({"params": model[0].parameters(), "lr": tenth})
    usual = 0.8 / 0.2
    momentum = values(o)[0][1]
    ratio = usual / (momentum / (1 - momentum))  # of the default, which the group has
    train(model, o, s, 23)
    (lr, momentum), (own, own_momentum) = values(o)
    assert lr != 0.1 and own == pytest.approx(lr / 10, rel=1e-4)
    odds = [m / (1 - m) for m in (momentum, own_momentum)]
    assert odds[1] / odds[0] == pytest.approx(ratio, rel=1e-4)


def test_a_larger_group_is_within_the_bounds() -> None:
    model = net()
    o = torch.optim.SGD(model[2].parameters(), lr=0.01)
    s = rhc.AdaptiveRL(o, every=1, bounds=rhc.Bounds(lr=(1e-5, 0.05)))
    o.add_param_group({"params": model[0].parameters(), "lr": 0.04})
    train(model, o, s, 30)
    (small, _), (large, _) = [(float(g["lr"]), 0) for g in o.param_groups]
    assert large == pytest.approx(4 * small) and large <= 0.05 + 1e-9


@pytest.mark.parametrize("name", ["replay", "adaptive", "adaptive with noise"])
def test_a_group_added_later_is_in_the_state(name: str) -> None:
    def begin() -> tuple[nn.Sequential, torch.optim.Optimizer, Any]:
        model = net()
        o = OPTIMIZERS["sgd"](model[2].parameters())
        return model, o, STEERED[name](o)

    model, o, s = begin()
    train(model, o, s, 12)
    o.add_param_group({"params": model[0].parameters(), "lr": 0.003})
    saved = copy.deepcopy([model.state_dict(), o.state_dict(), s.state_dict()])
    train(model, o, s, 12)

    again, p, t = begin()
    p.add_param_group({"params": again[0].parameters()})
    for part, state in zip((again, p, t), saved, strict=True):
        part.load_state_dict(state)
    train(again, p, t, 12)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=0)


def test_a_state_from_before_a_group_was_added() -> None:
    model = net()
    schedule = Schedule({"lr": torch.linspace(0.0, 0.1, 11)})
    begun = schedule.to_lr_scheduler(torch.optim.SGD(model[2].parameters(), lr=0.1))
    groups = [{"params": model[2].parameters()}, {"params": model[0].parameters(), "lr": 0.02}]
    o = torch.optim.SGD(groups, lr=0.1)
    s = schedule.to_lr_scheduler(o)
    s.load_state_dict(begun.state_dict())
    train(model, o, s, 5)
    assert [g["lr"] for g in o.param_groups] == pytest.approx([0.05, 0.01])


def test_values_per_group_do_not_fit_a_group_more() -> None:
    model = net()
    groups = [{"params": [model[2].weight]}, {"params": [model[2].bias]}]
    o = torch.optim.SGD(groups, lr=0.1)
    s = Schedule({"lr": torch.tensor([[0.1, 0.2]] * 9)}).to_lr_scheduler(o)
    o.add_param_group({"params": model[0].parameters()})
    with pytest.raises(InputError, match="values for 2 parameter groups, the optimizer has 3; use"):
        train(model, o, s, 1)


# In a Runner --------------------------------------------------------------------------------------

BATCHES = [(torch.ones(3, 2) * i, torch.ones(3, 1)) for i in range(4)]


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("rewrite", [False, True])
def test_a_group_added_between_two_fits(rewrite: bool) -> None:
    settings: dict[str, Any] = {"window": 4, "rewrite": rewrite, "start": "given"}
    model = net()
    o = torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    runner = rhc.Runner(model, o, loss_fn, BATCHES, clip_norm=0.05, **settings)
    runner.fit(8)
    frozen, lr = model[0].weight.detach().clone(), o.param_groups[0]["lr"]
    twin = copy.deepcopy(model)
    states = [copy.deepcopy(dict(o.state[p])) for p in model[2].parameters()]
    o.add_param_group({"params": model[0].parameters(), "lr": lr / 10})
    twins = torch.optim.SGD([{**g, "params": []} for g in o.param_groups], lr=0.1)
    runner.fit(8)
    assert not torch.equal(model[0].weight, frozen)
    assert o.param_groups[1]["lr"] == pytest.approx(o.param_groups[0]["lr"] / 10)
    if rewrite:
        return
    # As a plain loop goes on, the norm that is clipped included.
    for group, part in zip(twins.param_groups, (twin[2], twin[0]), strict=True):
        group["params"] = list(part.parameters())
    for parameter, slots in zip(twin[2].parameters(), states, strict=True):
        twins.state[parameter] = slots
    for batch in BATCHES * 2:
        twins.zero_grad()
        loss_fn(twin, batch).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
        twins.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rewrite", [False, True])
def test_a_group_added_during_a_fit_is_refused(rewrite: bool, tmp_path: Path) -> None:
    model = net()
    o = torch.optim.SGD(model[2].parameters(), lr=0.1)

    def unfreeze(event: object) -> None:
        if isinstance(event, StepTaken) and event.step == 1 and len(o.param_groups) == 1:
            o.add_param_group({"params": model[0].parameters(), "lr": 0.01})

    runner = rhc.Runner(
        model, o, loss_fn, BATCHES, window=4, rewrite=rewrite, start="given", directory=tmp_path,
        listeners=[unfreeze],
    )  # fmt: skip
    with pytest.raises(InputError, match=r"groups were 1 when the fit began, and are 2 at step 2"):
        runner.fit(8)


# One tensor for the lr of several groups ----------------------------------------------------------

PER_GROUP = torch.tensor([[0.05, 0.3]] * 4, dtype=torch.float64)


def grouped(shared: bool, kind: Any = torch.optim.Adam) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    groups: list[dict[str, Any]] = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters()},
    ]
    if not shared:
        for group in groups:
            group["lr"] = torch.tensor(0.1)
    return model, kind(groups, lr=torch.tensor(0.1))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_a_hypergradient_of_groups_that_share_their_tensor(kind: Any) -> None:
    found = []
    for shared in (True, False):
        model, o = grouped(shared, kind)
        before = [g["lr"] for g in o.param_groups]
        found.append(rhc.hypergradient(model, o, loss_fn, BATCHES, controls={"lr": PER_GROUP}))
        assert all(g["lr"] is lr for g, lr in zip(o.param_groups, before, strict=True))
        assert [float(lr) for lr in before] == pytest.approx([0.1, 0.1])
    assert found[0].value == found[1].value
    assert torch.equal(found[0].grad["lr"], found[1].grad["lr"])


def test_a_replay_for_groups_that_share_their_tensor() -> None:
    _, o = grouped(True)
    Schedule({"lr": PER_GROUP}).to_lr_scheduler(o)
    assert [float(g["lr"]) for g in o.param_groups] == pytest.approx([0.05, 0.3])


def test_a_run_for_groups_that_share_their_tensor() -> None:
    ends = []
    for shared in (True, False):
        model, o = grouped(shared)
        schedule = Schedule({"lr": PER_GROUP})
        runner = rhc.Runner(model, o, loss_fn, BATCHES, window=2, rewrite=False, schedule=schedule)
        ends.append(runner.fit(4).train_loss)
        assert [float(g["lr"]) for g in o.param_groups] == pytest.approx([0.05, 0.3])
    assert ends[0] == ends[1]


def test_a_planner_scales_a_tensor_that_groups_share_once() -> None:
    _, o = grouped(True)
    planner = rhc.EpochPlanner(o, steer=("lr",), reward=rhc.schedulers.TrainingTape())
    for _ in range(4):
        planner.step(1.0)
        plan = planner.on_epoch_end()
        assert float(o.param_groups[0]["lr"]) == pytest.approx(plan.lr, rel=1e-5)
    assert plan.lr != 0.1


# Noise lives as long as what makes it -------------------------------------------------------------


def stepped(p: torch.Tensor, o: torch.optim.Optimizer) -> torch.Tensor:
    """What one step on a gradient of 1 takes off."""
    with torch.no_grad():
        p.zero_()
    p.grad = torch.ones_like(p)
    o.step()
    return -p.detach()


def one() -> tuple[nn.Parameter, torch.optim.Optimizer]:
    p = nn.Parameter(torch.zeros(4))
    return p, torch.optim.SGD([p], lr=1.0)


NOISY = Schedule({"lr": torch.ones(3), "noise": torch.full((3,), 0.5)})
ONES = torch.ones(4)


@pytest.mark.parametrize("end", ["dropped", "closed", "replaced", "another in its place"])
@pytest.mark.parametrize("name", ["replay", "adaptive", "planner"])
def test_noise_ends_with_its_scheduler(name: str, end: str) -> None:
    p, o = one()
    bounds = rhc.Bounds(lr=(1e-5, 2.0), noise=(0.1, 0.2))
    s: Any = NOISY.to_lr_scheduler(o) if name == "replay" else rhc.AdaptiveRL(
        o, bounds=bounds, noise=0.2
    )  # fmt: skip
    if name == "planner":
        s = rhc.EpochPlanner(o)
        s.plan = s.begin(1.0, None, 0.2)
    assert not torch.equal(stepped(p, o), ONES)
    if end == "dropped":
        del s
    elif end == "closed":
        s.close()
    elif end == "replaced":
        kept = rhc.AdaptiveRL(o, bounds=rhc.Bounds(lr=(0.5, 1.0), noise=(0, 0)))
        if name == "planner":  # beside a scheduler
            s.close()
        assert kept.controls.noise == 0
    else:
        if name != "replay":  # who steps nothing of it must drop or close it
            s = None
        torch.optim.lr_scheduler.ConstantLR(o, factor=1.0)
    for _ in range(2):
        assert torch.equal(stepped(p, o), ONES)


def test_noise_of_one_replay_after_the_other() -> None:
    p, o = one()
    quiet = Schedule({"lr": torch.ones(3), "noise": torch.zeros(3)})
    parts = [s.to_lr_scheduler(o) for s in (quiet, NOISY)]
    constant = torch.optim.lr_scheduler.ConstantLR(o, 1.0)
    both = torch.optim.lr_scheduler.SequentialLR(o, [*parts, constant], [2, 4])
    moved = []
    for _ in range(6):
        moved.append(bool((stepped(p, o) != 1).any()))
        both.step()
    assert moved == [False, False, True, True, False, False]


def copied(scheduler: Any) -> Any:
    return pickle.loads(pickle.dumps(scheduler))


@pytest.mark.parametrize("way", [copy.deepcopy, copied])
@pytest.mark.parametrize("name", ["replay", "adaptive", "planner"])
def test_a_copy_makes_the_same_noise(name: str, way: Callable[[Any], Any]) -> None:
    p, o = one()
    s: Any = NOISY.to_lr_scheduler(o)
    if name == "adaptive":
        s = rhc.AdaptiveRL(o, bounds=rhc.Bounds(lr=(1e-5, 2.0)), noise=0.1)
    elif name == "planner":
        s = rhc.EpochPlanner(o)
        s.begin(1.0, None, 0.2)
    stepped(p, o)
    if name == "replay":
        s.step()
    t = way(s)
    q = t.optimizer.param_groups[0]["params"][0]
    for _ in range(2):
        moved = stepped(p, o)
        assert torch.equal(moved, stepped(q, t.optimizer)) and not torch.equal(moved, ONES)
        if name == "replay":
            s.step()
            t.step()
    s.close()
    assert torch.equal(stepped(p, o), ONES)
    if name != "planner":  # which lets go of its optimizer
        u = way(s).optimizer
        assert torch.equal(stepped(u.param_groups[0]["params"][0], u), ONES)

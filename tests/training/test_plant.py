"""The plant steps as an ordinary loop does, bit for bit, and a restored snapshot replays so too."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    OPTIMIZERS,
    PROBLEMS,
    Problem,
    adam,
    assert_identical,
    everything,
    momentum,
    nesterov,
    plain_loop,
    quadratic,
    seed_everything,
    sgd,
    steered,
    two_groups,
)
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer

from rhc import InputError, Plant, Schedule
from rhc.rng import (
    RandomState,
    add_gradient_noise,
    mixed_seed,
    preserved,
    root_mean_square,
    standard_noise,
)
from rhc.training.evaluate import at_average
from rhc.training.objective import Average, average_weights

STEPS = 30


def noisy_network() -> Problem:
    """BatchNorm and dropout, and inputs jittered from numpy and python: all that can differ."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
    )
    base = PROBLEMS["mlp"](torch.float32)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return base.loss_fn(model, (x + 0.1 * np.random.rand() + 0.1 * random.random(), y))

    return base._replace(model=model, loss_fn=loss_fn)


def make_plant(make: Callable[[Any], Optimizer] = adam, **options: Any) -> tuple[Plant, list[Any]]:
    problem = noisy_network()
    optimizer = two_groups(make, problem.model)
    seed_everything(1)
    plant = Plant(problem.model, optimizer, problem.loss_fn, **options)
    return plant, problem.batches(STEPS)


def state(plant: Plant) -> list[Any]:
    return everything(plant.model, plant.optimizer)


# Steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_without_controls_is_the_plain_loop_s(name: str, grouped: bool) -> None:
    runs = []
    for by_plant in (True, False):
        problem = noisy_network()
        model, make = problem.model, OPTIMIZERS[name]
        optimizer = two_groups(make, model) if grouped else make(model.parameters())
        batches = problem.batches(STEPS)
        seed_everything(1)
        if by_plant:
            plant = Plant(model, optimizer, problem.loss_fn)
            losses = [plant.step(b, plant.controls.initial, t).loss for t, b in enumerate(batches)]
        else:
            losses = []
            for batch in batches:
                optimizer.zero_grad()
                loss = problem.loss_fn(model, batch)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
        runs.append([everything(model, optimizer), losses])
    assert_identical(*runs)


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("make", [nesterov, adam])
def test_a_roll_under_a_schedule_is_the_plain_loop_s(
    make: Callable[[Any], Optimizer], clip_norm: float | None
) -> None:
    """To 1e-12: the plain loop of the tests computes its noise and ratios in its own order."""
    ends = []
    for by_plant in (True, False):
        problem = PROBLEMS["cnn"]()
        optimizer = two_groups(make, problem.model)
        batches, schedule = problem.batches(STEPS), Schedule(steered(optimizer, STEPS), seed=4)
        if by_plant:
            plant = Plant(problem.model, optimizer, problem.loss_fn, seed=4, clip_norm=clip_norm)
            plant.roll(batches, schedule)
        else:
            plain_loop(problem, optimizer, batches, schedule.values, clip_norm=clip_norm, seed=4)
        ends.append(torch.cat([p.detach().flatten() for p in problem.model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


def test_what_a_step_observes() -> None:
    problem = quadratic()
    plant = Plant(problem.model, sgd(problem.model.parameters()), lambda m, b: (m(b), {"x": 3}))
    batch = problem.batches(1)[0]
    theta = problem.model.theta.detach().clone()
    gradient = problem.model.curvature * (theta - batch)
    observed = plant.step(batch, {"lr": 0.5, "weight_decay": 0.1}, 0)
    assert observed.loss == 0.5 * (gradient * (theta - batch)).sum()
    assert float(observed.gradient_norm) == pytest.approx(float(gradient.norm()), rel=1e-6)
    assert observed.metrics == {"x": torch.tensor(3)}
    torch.testing.assert_close(problem.model.theta.detach(), theta - 0.5 * (gradient + 0.1 * theta))


def test_an_optimizer_s_own_zero_grad_is_called() -> None:
    called = []

    class Counted(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            called.append(set_to_none)
            super().zero_grad(set_to_none)

    problem = quadratic()
    plant = Plant(problem.model, Counted(problem.model.parameters(), lr=0.1), problem.loss_fn)
    plant.roll(problem.batches(3), Schedule({"lr": torch.full((3,), 0.1)}))
    assert called == [True] * 3


def test_a_step_fills_gradients_of_a_loss_that_is_no_plain_tensor() -> None:
    class Own(Tensor):
        pass

    ends = []
    for kind in (Tensor, Own):
        problem = quadratic()
        batch = problem.batches(1)[0]
        plant = Plant(
            problem.model,
            momentum(problem.model.parameters()),
            lambda m, b, kind=kind: m(b).as_subclass(kind),
        )
        plant.step(batch, {}, 0)
        ends.append(problem.model.theta.detach().clone())
    assert torch.equal(*ends)


# Snapshots ------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [0, 7])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_restore_and_replay_is_the_straight_run(
    make: Callable[[Any], Optimizer], warm: int
) -> None:
    plant, batches = make_plant(make, seed=2)
    schedule = Schedule(steered(plant.optimizer, STEPS))
    if warm:
        plant.roll(batches[:warm], schedule)
    addresses = [t.data_ptr() for t in plant.model.state_dict().values()]
    snapshot, found = plant.snapshot(), state(plant)[:2]
    ends = []
    for _ in range(3):  # twice from the same snapshot: it is not used up
        plant.roll(batches[warm:], schedule.window(warm, STEPS), average=Average(0.9))
        ends.append(state(plant))
        plant.restore(snapshot)
        assert_identical(found, state(plant)[:2])
        assert bool(plant.optimizer.state) == (warm > 0 and make is not sgd)
    assert_identical(ends[0], ends[1])
    assert_identical(ends[0], ends[2])
    assert [t.data_ptr() for t in plant.model.state_dict().values()] == addresses


def test_a_snapshot_shares_no_memory_with_the_live_state() -> None:
    plant, batches = make_plant()
    plant.step(batches[0], {}, 0)
    snapshot = plant.snapshot()
    copies = {n: p.clone() for n, p in snapshot.parameters.items()}
    slots = [{k: v.clone() for k, v in s.items()} for s in snapshot.slots]
    buffers = {n: b.clone() for n, b in snapshot.buffers.items()}
    groups = [dict(g) for g in snapshot.groups]

    def spoil() -> None:
        with torch.no_grad():
            for t in (*plant.model.parameters(), *plant.model.buffers()):
                t.fill_(7)
            for slot in (v for s in plant.optimizer.state.values() for v in s.values()):
                slot.fill_(7)
        plant.optimizer.param_groups[0]["lr"] = 7.0

    spoil()
    plant.restore(snapshot)
    spoil()
    assert_identical(
        [snapshot.parameters, snapshot.slots, snapshot.buffers, snapshot.groups],
        [copies, slots, buffers, groups],
    )


def test_a_tensor_lr_is_restored_in_place() -> None:
    plant, batches = make_plant(lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1)))
    lr = plant.optimizer.param_groups[0]["lr"]
    snapshot = plant.snapshot()
    plant.step(batches[0], {"lr": 0.5}, 0)
    assert lr == 0.5
    plant.restore(snapshot)
    assert plant.optimizer.param_groups[0]["lr"] is lr
    assert float(lr) == pytest.approx(0.1)


def test_evaluating_leaves_modes_buffers_and_randomness() -> None:
    plant, batches = make_plant()
    plant.model[1].eval()
    before = state(plant)
    with pytest.raises(ZeroDivisionError), plant.evaluating() as model, torch.no_grad():
        assert not any(m.training for m in model.modules())
        plant.loss(batches[0])
        raise ZeroDivisionError
    assert_identical(before, state(plant))


def test_averaged_weights_are_evaluated_with_statistics_of_their_own() -> None:
    plant, batches = make_plant()
    mean = Average(0.5)
    plant.roll(batches[:5], Schedule.constant(5, lr=0.1), average=mean)
    norm, before = plant.model[1], state(plant)
    live = norm.running_mean.clone()
    plant.model[3].p = 0.0
    seen: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda module, x: seen.append(x[0].mean(0)))
    with at_average(plant, mean, batches[:3]):
        assert len(seen) == 3
        torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(0))
        assert not torch.equal(norm.running_mean, live)
    handle.remove()
    assert_identical(before, state(plant))


# Rolls ------------------------------------------------------------------------------------


def test_what_a_recorded_roll_keeps() -> None:
    plant, batches = make_plant(momentum)
    schedule = Schedule(steered(plant.optimizer, 5), start=10)
    seen: list[int] = []
    mean = Average(0.8)
    iterates = []

    def on_step(step: int, observed: Any) -> None:
        seen.append(step)
        iterates.append([p.detach().clone() for p in plant.parameters])

    trajectory = plant.roll(
        batches[:5], schedule, record=lambda i: i % 2 == 0, average=mean, on_step=on_step
    )
    assert seen == [10, 11, 12, 13, 14]
    assert sorted(trajectory.states) == [0, 2, 4]
    kept = (trajectory.gradients, trajectory.buffers, trajectory.rng, trajectory.losses)
    assert [len(k) for k in kept] == [5] * 4 and len(trajectory) == 5
    weights = average_weights(0.8, 5)
    assert sum(weights) == pytest.approx(1)
    for index, m in enumerate(mean.values or []):
        expected = sum(w * values[index] for w, values in zip(weights, iterates, strict=True))
        torch.testing.assert_close(m, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 100])
def test_gradients_are_kept_alike_in_slabs_of_any_size(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    for slab in (2**24, None):
        plant, batches = make_plant()
        size = sum(p.numel() * p.element_size() for p in plant.parameters)
        monkeypatch.setattr("rhc.training.recorder.SLAB", rows * size if slab is None else slab)
        schedule = Schedule(steered(plant.optimizer, STEPS)).window(0, 7)
        trajectory = plant.roll(batches[:7], schedule, record=lambda i: i == 0)
        kept.append([g for step in trajectory.gradients for g in step if g is not None])
    assert_identical(*kept)


def test_recording_a_roll_does_not_change_it() -> None:
    ends = []
    for record in (None, lambda i: True):
        plant, batches = make_plant(adam, seed=3)
        plant.roll(batches, Schedule(steered(plant.optimizer, STEPS)), record=record)
        ends.append(state(plant))
    assert_identical(*ends)


def test_blocks_are_split_where_a_parameter_takes_no_part() -> None:
    """The roll begins again, with every parameter its own block, as if for the first time."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(3, 2) for name in "ab"})
    batches = [(torch.randn(4, 3), key) for key in "aab"]

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return (model[batch[1]](batch[0]) + torch.rand(1)).square().mean()

    plant = Plant(model, adam(model.parameters()), loss_fn)
    assert len(plant.blocks()) == 1
    mean = Average(0.5)
    schedule = Schedule.constant(3, lr=0.1)
    torch.manual_seed(1)
    trajectory = plant.roll(batches, schedule, record=lambda i: True, average=mean)
    assert len(trajectory.blocks) == 4 and len(trajectory) == 3 and mean.count == 3
    assert [[g is None for g in step] for step in trajectory.gradients] == [
        [False, False, True, True],
        [False, False, True, True],
        [True, True, False, False],
    ]
    found = state(plant)
    again = nn.ModuleDict({name: nn.Linear(3, 2) for name in "ab"})
    again.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    for name in "ab":
        again[name].reset_parameters()
    straight = Plant(again, adam(again.parameters()), loss_fn)
    torch.manual_seed(1)
    straight.roll(batches, schedule)
    assert_identical(found[:2], state(straight)[:2])


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("record", [None, lambda i: True])
def test_a_roll_stops_where_the_loss_is_not_finite(record: Any, worst: float) -> None:
    problem = quadratic()
    batches = problem.batches(6)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return model(batch) + (worst if batch is batches[2] else 0.0)

    plant = Plant(problem.model, sgd(problem.model.parameters()), loss_fn)
    trajectory = plant.roll(batches, Schedule.constant(6, lr=0.1), record=record)
    assert trajectory.diverged == 2
    assert len(trajectory) == 3


# Finite ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["parameter", "buffer", "slot"])
def test_a_single_bad_element_is_found(where: str, bad: float) -> None:
    plant, batches = make_plant()
    assert plant.is_finite()
    plant.step(batches[0], {}, 0)
    assert plant.is_finite()
    target = {
        "parameter": plant.model[4].weight,
        "buffer": plant.model[1].running_var,
        "slot": plant.optimizer.state[plant.model[4].weight]["exp_avg"],
    }[where]
    with torch.no_grad():
        target.flatten()[2] = bad
    assert not plant.is_finite()


# Noise ------------------------------------------------------------------------------------


@given(seed=st.integers(-(2**70), 2**70), step=st.integers(0, 2**40))
def test_noise_is_a_function_of_seed_and_step(seed: int, step: int) -> None:
    like = [torch.empty(3, 2), torch.empty(4, dtype=torch.float64)]
    before = torch.get_rng_state()
    first = standard_noise(like, seed, step)
    assert_identical(first, standard_noise(like, seed, step))
    assert [x.dtype for x in first] == [torch.float32, torch.float64]
    for other in ((seed + 1, step), (seed, step + 1), (seed + 1, step - 1)):
        assert not torch.equal(first[0], standard_noise(like, *other)[0])
    assert torch.equal(before, torch.get_rng_state())


def test_neighbouring_seeds_differ_in_their_low_bits() -> None:
    """torch's CPU generator reads no others."""
    seeds = [mixed_seed(s, t) & 0xFFFFFFFF for s in range(50) for t in range(200)]
    # 1e4 draws of 2^32: 0.01 collisions expected.
    assert len(set(seeds)) >= len(seeds) - 1


def test_noise_has_the_scale_of_the_gradient() -> None:
    """σ RMS(g), to 5 standard errors of 1/√(2n), uncorrelated with g and between steps."""
    n, sigma = 100_000, 0.3
    draw = torch.Generator().manual_seed(0)
    p = torch.zeros(n, requires_grad=True)
    g = 7 * torch.randn(n, generator=draw) + 2
    added = []
    for step in (4, 5):
        p.grad = g.clone()
        add_gradient_noise([p], sigma, 0, step)
        added.append((p.grad - g) / (sigma * g.square().mean().sqrt()))
    for xi in added:
        assert abs(float(xi.std()) - 1) < 5 / (2 * n) ** 0.5
        assert abs(float(xi.mean())) < 5 / n**0.5
        assert abs(float((xi * g).mean() / g.norm() * n**0.5)) < 5 / n**0.5
    assert abs(float((added[0] * added[1]).mean())) < 5 / n**0.5


def test_noise_of_a_tensor_does_not_depend_on_which_others_take_part() -> None:
    parameters = [torch.zeros(3, requires_grad=True), torch.zeros(4, requires_grad=True)]
    found = []
    for first in (torch.ones(3), None):
        parameters[0].grad, parameters[1].grad = first, torch.ones(4)
        add_gradient_noise(parameters, 0.5, 1, 2)
        found.append(parameters[1].grad.clone())
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.ones(4))


def test_noise_of_zero_draws_nothing_and_rms_of_zeros_has_a_slope() -> None:
    p = torch.zeros(2, requires_grad=True)
    p.grad = torch.tensor([0.0, -0.0])
    add_gradient_noise([p], 0.0, 0, 0)
    assert torch.equal(torch.signbit(p.grad), torch.tensor([False, True]))
    root_mean_square(p).backward()
    assert torch.isfinite(p.grad).all()
    assert root_mean_square(torch.zeros(0)) == 0


# Randomness ------------------------------------------------------------------------------------


def draws() -> list[Any]:
    """Of every generator, the cached second normal of numpy and python included."""
    return [torch.randn(3), np.random.randn(3), [random.gauss(0, 1) for _ in range(3)]]


@pytest.mark.parametrize("drawn", [0, 1, 700])
def test_random_state_round_trips_through_a_file(drawn: int) -> None:
    seed_everything(3)
    for _ in range(drawn):
        np.random.randn()
        random.gauss(0, 1)
        torch.randn(1)
    captured = RandomState.capture()
    stored = load(save(captured.to_tensors()))
    expected = draws()
    for _ in range(700):  # past the generators' period of refreshing
        draws()
    captured.restore()
    assert_identical(expected, draws())
    seed_everything(9)
    RandomState.from_tensors(stored).restore()
    assert_identical(expected, draws())


def test_preserved_leaves_the_random_state_even_after_an_error() -> None:
    seed_everything(3)
    expected = draws()
    seed_everything(3)
    with pytest.raises(ZeroDivisionError), preserved():
        draws()
        raise ZeroDivisionError
    assert_identical(expected, draws())


# Errors ------------------------------------------------------------------------------------


def test_errors_of_a_plant() -> None:
    problem = quadratic()
    parameters = list(problem.model.parameters())
    with pytest.raises(InputError, match="clip_norm must be > 0, got -1; use None"):
        Plant(problem.model, sgd(parameters), problem.loss_fn, clip_norm=-1)
    with pytest.raises(InputError, match=r"parameter 1 .* \(2,\), is not a parameter of the model"):
        Plant(problem.model, sgd([*parameters, nn.Parameter(torch.ones(2))]), problem.loss_fn)
    elsewhere = nn.Parameter(torch.ones(()))
    plant = Plant(problem.model, sgd(parameters), lambda model, batch: 2 * elsewhere)
    with pytest.raises(InputError, match="does not depend on any parameter of the optimizer"):
        plant.step(problem.batches(1)[0], {}, 0)

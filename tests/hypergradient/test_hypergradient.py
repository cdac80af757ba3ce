"""Hypergradients are exact: differences, closed forms, `higher` and all that is kept agree."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from problems import (
    OPTIMIZERS,
    PROBLEMS,
    Problem,
    adam,
    adamw,
    assert_identical,
    classify,
    everything,
    in_mode,
    momentum,
    nesterov,
    plain_loop,
    quadratic,
    relative_error,
    seed_everything,
    sgd,
    steered,
    two_groups,
)
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, Rprop

import rhc
from rhc import InputError, Objective, Plant, Schedule
from rhc.hypergradient import Hypergradient, ReversePass, adjoint
from rhc.hypergradient import hvp as products
from rhc.hypergradient.hvp import PRODUCTS
from rhc.hypergradient.states import Rebuilt
from rhc.optimizers.sgd_family import SGDState
from rhc.training.objective import Average
from rhc.training.trajectory import BlockState

STEPS = 5
SEGMENTS = (1, 3)
"""The plan's own choice, which is every graph; and the last three, others being made again."""

DIFFERENCE = {"lr": 1e-5, "momentum": 1e-5, "noise": 3e-5, "weight_decay": 1e-3}
"""Relative steps of central differences: larger where J depends less on the control, so that
rounding (1e-16 |J| / step) and truncation both stay far below the 1e-6 that is asked for."""

SMALL_DIFFERENCE = dict.fromkeys(DIFFERENCE, 1e-5)
"""For Adam's first step, which is nearly the sign of the gradient: truncation dominates."""


class Setting(NamedTuple):
    """A problem, an optimizer on it, and what is steered over which batches."""

    problem: Problem
    optimizer: Optimizer
    batches: list[Any]
    controls: dict[str, Tensor]

    def copy(self) -> Setting:
        model, optimizer = copy.deepcopy((self.problem.model, self.optimizer))
        return self._replace(problem=self.problem._replace(model=model), optimizer=optimizer)


def make_setting(
    problem: Problem, optimizer: Optimizer, *, warm: bool = True, steps: int = STEPS
) -> Setting:
    """warm: after five plain steps, so that momentum and moments are not at their start."""
    if warm:
        plain_loop(problem, optimizer, problem.batches(5), {})
    return Setting(problem, optimizer, problem.batches(steps), steered(optimizer, steps))


def named(problem: str, optimizer: str, **options: Any) -> Setting:
    chosen = PROBLEMS[problem]()
    return make_setting(chosen, OPTIMIZERS[optimizer](chosen.model.parameters()), **options)


def look_back(setting: Setting, **options: Any) -> Hypergradient:
    torch.manual_seed(5)
    return rhc.hypergradient(
        setting.problem.model,
        setting.optimizer,
        setting.problem.loss_fn,
        setting.batches,
        **{"controls": setting.controls, **options},
    )


def value(setting: Setting, controls: Mapping[str, Tensor], **options: Any) -> float:
    torch.manual_seed(5)
    fresh = setting.copy()
    return plain_loop(fresh.problem, fresh.optimizer, fresh.batches, controls, **options)


def differences(
    value: Callable[[dict[str, Tensor]], float],
    controls: Mapping[str, Tensor],
    relative_steps: Mapping[str, float] = DIFFERENCE,
) -> dict[str, Tensor]:
    """Central differences of `value` with respect to every control of every step."""

    def slope(name: str, t: int) -> float:
        step = relative_steps[name] * float(controls[name][t])
        ends = []
        for sign in (1, -1):
            moved = {n: v.clone() for n, v in controls.items()}
            moved[name][t] += sign * step
            ends.append(value(moved))
        return (ends[0] - ends[1]) / (2 * step)

    return {
        name: torch.tensor([slope(name, t) for t in range(len(v))], dtype=torch.float64)
        for name, v in controls.items()
    }


def assert_exact(
    setting: Setting, relative_steps: Mapping[str, float] = DIFFERENCE, **options: Any
) -> None:
    """J is the plain loop's, and its gradient that J's central differences, whatever is kept."""
    expected = differences(lambda c: value(setting, c, **options), setting.controls, relative_steps)
    plain = value(setting, setting.controls, **options)
    norms = None
    for segment in SEGMENTS:
        h = look_back(setting, segment=segment, **options)
        assert h.result.successful
        assert h.value == pytest.approx(plain, rel=1e-13)
        for name, e in expected.items():
            assert relative_error(h.grad[name], e) < 1e-6, (segment, name, h.grad[name], e)
        norms = h.costate_norms if norms is None else norms
        assert relative_error(h.costate_norms, norms) < 1e-10, (segment, norms)
        assert torch.all(h.costate_norms > 0)


# Central differences ------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_equals_central_differences_of_the_plain_loop(problem: str, optimizer: str) -> None:
    setting = named(problem, optimizer)
    terminal = in_mode(setting.problem.terminal, training=False)
    assert_exact(setting, average=0.9, terminal=terminal, stage_weight=0.3)


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw"])
@pytest.mark.parametrize("problem", ["cnn", "transformer"])
def test_equals_central_differences_from_the_very_first_step(problem: str, optimizer: str) -> None:
    setting = named(problem, optimizer, warm=False)
    assert_exact(
        setting, SMALL_DIFFERENCE, terminal=in_mode(setting.problem.terminal, training=True)
    )


@pytest.mark.parametrize("average", [None, 0.9])
@pytest.mark.parametrize("training", [True, False])
def test_terminal_sees_running_statistics_in_eval_mode(
    training: bool, average: float | None
) -> None:
    setting = named("cnn", "nesterov")
    terminal = in_mode(setting.problem.terminal, training=training)
    assert_exact(setting, average=average, terminal=terminal, stage_weight=0.0)


@pytest.mark.parametrize("statistics_momentum", [None, 1.0])
def test_running_statistics_with_cumulative_average_and_without_memory(
    statistics_momentum: float | None,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5, bias=False),
        nn.BatchNorm1d(5, momentum=statistics_momentum, affine=False),
        nn.Tanh(),
        nn.Linear(5, 2),
    ).double()
    setting = custom(model, lambda m, x: (m(x) - x[:, :2]).square().mean(), nesterov)
    assert_exact(setting, terminal=in_mode(setting.problem.terminal, training=False), average=0.7)


@pytest.mark.parametrize("optimizer", [momentum, adam, adamw])
def test_two_groups_keep_their_ratios(optimizer: Callable[[Any], Optimizer]) -> None:
    problem = PROBLEMS["mlp"]()
    setting = make_setting(problem, two_groups(optimizer, problem.model))
    assert_exact(setting, terminal=problem.terminal)


@pytest.mark.parametrize("optimizer", [nesterov, adam])
@pytest.mark.parametrize("problem", ["mlp", "transformer"])
def test_clipping_to_the_global_norm(problem: str, optimizer: Callable[[Any], Optimizer]) -> None:
    chosen = PROBLEMS[problem]()
    setting = make_setting(chosen, two_groups(optimizer, chosen.model))
    options = {"terminal": chosen.terminal, "seed": 3}
    assert_exact(setting, clip_norm=0.2, **options)
    clipped, unclipped = (look_back(setting, clip_norm=c, **options) for c in (0.2, None))
    assert clipped.value != unclipped.value


@pytest.mark.parametrize("name", ["amsgrad", "maximize", "fused", "decoupled", "tensor lr"])
def test_settings_of_the_optimizer(name: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "amsgrad": {"amsgrad": True},
        "maximize": {"maximize": True},
        "fused": {"fused": True},
        "decoupled": {"decoupled_weight_decay": True},
        "tensor lr": {"lr": torch.tensor(0.01, dtype=torch.float64), "foreach": False},
    }
    problem = quadratic()
    parameters = problem.model.parameters()
    kind = Adam(
        parameters, **{"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, **options[name]}
    )
    assert_exact(make_setting(problem, kind), terminal=problem.terminal)


def custom(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    optimizer: Callable[[Any], Optimizer],
    *,
    batches: list[Any] | None = None,
) -> Setting:
    """A setting of the given model on 6×4 normal inputs, from the first step."""
    draw = torch.Generator().manual_seed(1)
    inputs = list(torch.randn(STEPS + 1, 6, 4, generator=draw, dtype=torch.float64))
    chosen = batches or inputs[:STEPS]
    problem = Problem(
        model, loss_fn, lambda steps: chosen[:steps], lambda m: loss_fn(m, batches or inputs[STEPS])
    )
    return make_setting(problem, optimizer(model.parameters()), warm=False)


class Heads(nn.Module):
    """A body with a frozen factor, a scalar parameter, and heads of which some stay unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 5)
        self.frozen = nn.Parameter(torch.rand(5), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.heads = nn.ModuleDict({name: nn.Linear(5, 2) for name in ("a", "b", "late", "never")})
        self.double()

    def forward(self, x: Tensor, head: str) -> Tensor:
        return self.heads[head](torch.tanh(self.body(x)) * self.frozen * self.scale)


@pytest.mark.parametrize("optimizer", [sgd, momentum, adam, adamw])
def test_parameters_that_are_frozen_unused_in_some_steps_or_used_by_the_terminal_alone(
    optimizer: Callable[[Any], Optimizer],
) -> None:
    draw = torch.Generator().manual_seed(1)
    inputs = list(torch.randn(STEPS + 1, 6, 4, generator=draw, dtype=torch.float64))
    model = Heads()
    problem = Problem(
        model,
        lambda m, batch: m(*batch).square().mean(),
        lambda steps: [(inputs[t], "ab"[t % 3 == 1]) for t in range(steps)],
        lambda m: m(inputs[STEPS], "late").square().mean() + m(inputs[STEPS], "b").mean(),
    )
    assert_exact(
        make_setting(problem, optimizer(model.parameters()), warm=False),
        average=0.9,
        terminal=problem.terminal,
    )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


@pytest.mark.parametrize("optimizer", [nesterov, adamw])
def test_tied_weights(optimizer: Callable[[Any], Optimizer]) -> None:
    model = Tied()
    draw = torch.Generator().manual_seed(1)
    tokens = [torch.randint(0, 5, (3, 5), generator=draw) for _ in range(STEPS + 1)]
    problem = Problem(
        model,
        lambda m, x: classify(m, (x, (x + 1) % 7)),
        lambda steps: tokens[:steps],
        lambda m: classify(m, (tokens[-1], tokens[0])),
    )
    assert_exact(
        make_setting(problem, optimizer(model.parameters()), warm=False), terminal=problem.terminal
    )


def test_randomness_of_numpy_and_python_inside_the_loss_is_replayed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()

    def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
        return ((np.random.rand() + random.random()) * m(x)).square().mean()

    setting = custom(model, loss_fn, nesterov)
    found = []
    for segment in SEGMENTS:
        seed_everything(5)
        found.append(look_back(setting, segment=segment))

    def seeded(controls: dict[str, Tensor]) -> float:
        seed_everything(5)
        return value(setting, controls)

    expected = differences(seeded, setting.controls)
    for h in found:
        assert all(relative_error(h.grad[n], e) < 1e-6 for n, e in expected.items())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("zero", ["lr", "noise", "weight_decay"])
def test_controls_at_zero_have_their_one_sided_derivative(zero: str, optimizer: str) -> None:
    setting = named("mlp", optimizer)
    setting.controls[zero] = torch.zeros(STEPS, dtype=torch.float64)
    options = {"terminal": setting.problem.terminal}

    def one_sided(t: int, step: float = 1e-5) -> float:
        ends = []
        for multiple in (0, 1, 2):
            moved = {n: v.clone() for n, v in setting.controls.items()}
            moved[zero][t] = multiple * step
            ends.append(value(setting, moved, **options))
        return (-3 * ends[0] + 4 * ends[1] - ends[2]) / (2 * step)

    expected = torch.tensor([one_sided(t) for t in range(STEPS)], dtype=torch.float64)
    for segment in SEGMENTS:
        found = look_back(setting, segment=segment, **options).grad[zero]
        assert relative_error(found, expected) < 1e-5, segment


@pytest.mark.parametrize("product", ["exact", "central-difference"])
def test_reward_of_the_metrics_counts_in_the_stage_cost(product: Any) -> None:
    setting = named("mlp", "nesterov")
    objective = Objective(loss_weight=0.5, reward_weight=2.0, terminal_weight=0.0, average=None)

    def rewarded(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss = setting.problem.loss_fn(model, batch)
        return loss, {"reward": -(loss**2)}

    def found(controls: Mapping[str, Tensor], segment: int = 1) -> Hypergradient:
        torch.manual_seed(5)
        fresh = setting.copy()
        plant = Plant(fresh.problem.model, fresh.optimizer, rewarded)
        back = ReversePass(plant, objective, tuple(controls), segment=segment, product=product)
        schedule = Schedule(controls, start=10)  # of which the noise is a function
        return back.differentiate(back.roll(fresh.batches, schedule), Average(None), None)

    expected = differences(lambda c: found(c).value, setting.controls)
    for segment in SEGMENTS if product == "exact" else (1,):
        gradient = found(setting.controls, segment).grad
        assert all(relative_error(gradient[n], e) < 1e-6 for n, e in expected.items())


@pytest.mark.parametrize("named_reward", [True, False])
def test_rewards_by_hand_count_as_in_a_run(named_reward: bool) -> None:
    """J = Σ (0.5 ℓ − 2 r) + terminal, by central differences and by both engines."""
    setting = named("mlp", "nesterov")
    plain_loss = setting.problem.loss_fn

    def rewarded(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss = plain_loss(model, batch)
        return loss, {"reward": loss.sqrt()} if named_reward else {"root": loss.sqrt()}

    problem = setting.problem._replace(loss_fn=rewarded)
    setting = setting._replace(problem=problem)
    options: dict[str, Any] = {"terminal": problem.terminal, "stage_weight": 0.5}
    options |= {"reward_weight": 2.0}
    if not named_reward:
        options["reward"] = lambda loss, metrics: metrics["root"]
    expected = differences(
        lambda c: look_back(setting._replace(controls=dict(c)), verify=False, **options).value,
        setting.controls,
    )
    for engine in ("adjoint", "higher"):
        h = look_back(setting, engine=engine, **options)
        assert h.result.successful
        assert all(relative_error(h.grad[n], e) < 1e-6 for n, e in expected.items()), engine
    without = look_back(setting, **options | {"reward_weight": 0.0})
    rewards = sum(float(loss) ** 0.5 for loss in without.losses)
    assert h.value == pytest.approx(without.value - 2.0 * rewards, rel=1e-12)


def test_a_reward_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(InputError, match="reward_weight is not 0 but loss_fn's metrics have no"):
        look_back(named("mlp", "sgd"), reward_weight=1.0)


def test_costates_are_clipped_to_a_multiple_of_the_ends_norm() -> None:
    """Gradient descent on h θ² / 2 with α h = 3: λ_t = −2 λ_{t+1}, at most 3 times the end's."""
    h, alpha, theta = 2.0, 1.5, 0.7
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(theta)
    found = rhc.hypergradient(
        model,
        SGD(model.parameters(), alpha),
        lambda m, _: 0.5 * h * m.weight.square().sum(),
        [torch.zeros(1)] * 5,
        controls={"lr": alpha},
        terminal=lambda m: m.weight.sum(),
        stage_weight=0.0,
        costate_clip=3.0,
        verify=False,
    )
    states = [theta * (1 - alpha * h) ** t for t in range(5)]
    costate, costates, expected = 1.0, [], []
    for state in reversed(states):
        expected.append(-costate * h * state)
        costate *= 1 - alpha * h
        costate *= min(1.0, 3.0 / abs(costate))
        costates.append(abs(costate))
    assert max(costates) == 3.0
    assert torch.allclose(
        found.grad["lr"], torch.tensor(expected[::-1], dtype=torch.float64), rtol=1e-12
    )
    assert torch.allclose(
        found.costate_norms, torch.tensor(costates[::-1], dtype=torch.float64), rtol=1e-12
    )


@pytest.mark.parametrize("affordable", [0, 2, 1000])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50, 100])
def test_states_are_rebuilt_in_reverse_from_few(
    steps: int, affordable: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A toy roll, whose state of step i is i: every state comes, at a bounded price."""
    state = BlockState(torch.zeros(1), SGDState(None))
    monkeypatch.setattr(adjoint, "SMALL_STATES", 4 * affordable)
    passes, most = 0, 0

    def after(i: int, states: list[BlockState]) -> list[BlockState]:
        nonlocal passes
        passes += 1
        assert float(states[0].parameters) == i
        return [BlockState(states[0].parameters + 1, SGDState(None))]

    rebuilt = Rebuilt({0: [state]}, after)
    for i in reversed(range(steps)):
        assert float(rebuilt.take(i)[0].parameters) == i
        most = max(most, len(rebuilt.states))
    assert most <= max(affordable, 1) + math.log2(steps) + 1
    assert passes <= steps * (1 + math.log2(steps))


def test_few_kept_states_give_the_same_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = named("transformer", "adamw", steps=20)
    expected = look_back(setting)
    monkeypatch.setattr(adjoint, "SMALL_STATES", 0)
    found = look_back(setting)
    assert all(torch.equal(found.grad[n], g) for n, g in expected.grad.items())


# Closed forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", SEGMENTS)
def test_gradient_descent_on_a_quadratic(segment: int) -> None:
    """θ_K = Π (1 − α_t h) θ_0, so dθ_K/dα_t = −h Π_{s≠t} (1 − α_s h) θ_0."""
    problem = quadratic()
    start = problem.model.theta.detach().clone()
    h = problem.model.curvature
    w = torch.linspace(-1, 2, len(h), dtype=torch.float64)
    lr = torch.linspace(0.05, 0.4, STEPS, dtype=torch.float64)
    found = rhc.hypergradient(
        problem.model,
        SGD(problem.model.parameters(), lr=1.0),
        problem.loss_fn,
        [torch.zeros_like(h)] * STEPS,
        controls={"lr": lr},
        terminal=lambda model: w @ model.theta,
        stage_weight=0.0,
        segment=segment,
    )
    factors = 1 - lr[:, None] * h
    others = torch.stack([factors[torch.arange(STEPS) != t].prod(0) for t in range(STEPS)])
    expected = -(others * h * start) @ w
    assert found.value == pytest.approx(float((factors.prod(0) * start) @ w), rel=1e-12)
    assert relative_error(found.grad["lr"], expected) < 1e-10


@pytest.mark.parametrize("segment", SEGMENTS)
def test_heavy_ball_on_a_quadratic(segment: int) -> None:
    """(θ, b) ↦ M_t (θ, b) for every curvature h, so derivatives are products of 2×2 matrices."""
    problem = quadratic()
    start, h = problem.model.theta.detach().clone(), problem.model.curvature.double()
    w = torch.linspace(-1, 2, len(h), dtype=torch.float64)
    lr = torch.linspace(0.05, 0.3, STEPS, dtype=torch.float64)
    mu = torch.linspace(0.5, 0.9, STEPS, dtype=torch.float64)
    found = rhc.hypergradient(
        problem.model,
        SGD(problem.model.parameters(), lr=1.0, momentum=0.9),
        problem.loss_fn,
        [torch.zeros_like(h)] * STEPS,
        controls={"lr": lr, "momentum": mu},
        terminal=lambda model: w @ model.theta,
        stage_weight=0.0,
        segment=segment,
    )

    def matrices(rows: list[list[Any]]) -> Tensor:
        return torch.stack(
            [torch.stack([torch.as_tensor(x).expand(len(h)) for x in row], -1) for row in rows], -2
        ).double()

    steps = [matrices([[1 - a * h, -a * m], [h, m]]) for a, m in zip(lr, mu, strict=True)]
    by_lr = [matrices([[-h, -m], [0.0, 0.0]]) for m in mu]
    by_momentum = [matrices([[0.0, -a], [0.0, 1.0]]) for a in lr]
    z = torch.stack([start, torch.zeros_like(start)], -1)[..., None]

    def final(replaced: Tensor, t: int) -> Tensor:
        state = z
        for s, step in enumerate(steps):
            state = (replaced if s == t else step) @ state
        return state[:, 0, 0] @ w

    for name, derivative in (("lr", by_lr), ("momentum", by_momentum)):
        expected = torch.stack([final(derivative[t], t) for t in range(STEPS)])
        assert relative_error(found.grad[name], expected) < 1e-10


# Other engines, products and precisions -----------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov", "adam"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_higher_agrees(problem: str, optimizer: str, warm: bool) -> None:
    chosen = PROBLEMS[problem]()
    grouped = problem != "quadratic"
    make = OPTIMIZERS[optimizer]
    kind = two_groups(make, chosen.model) if grouped else make(chosen.model.parameters())
    setting = make_setting(chosen, kind, warm=warm)
    options = {"terminal": in_mode(chosen.terminal, training=True), "average": 0.9}
    ours, theirs = (look_back(setting, engine=e, **options) for e in ("adjoint", "higher"))
    assert theirs.engine == "higher"
    assert ours.value == pytest.approx(theirs.value, rel=1e-12)
    for name in setting.controls:
        assert relative_error(ours.grad[name], theirs.grad[name]) < 1e-10, name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", ["mlp", "transformer", "quadratic"])
def test_difference_products_agree_where_the_loss_is_smooth(problem: str, optimizer: str) -> None:
    """Truncation and rounding balance at √ε ≈ 1e-8 and ε^⅔ ≈ 4e-11 per product in float64."""
    setting = named(problem, optimizer)
    options = {"terminal": setting.problem.terminal, "average": 0.9}
    exact = look_back(setting, **options)
    for product, tolerance in (("forward-difference", 1e-6), ("central-difference", 1e-8)):
        h = look_back(setting, product=product, **options)
        assert h.product == product
        assert h.value == pytest.approx(exact.value, rel=1e-12)
        for name in setting.controls:
            assert relative_error(h.grad[name], exact.grad[name]) < tolerance, (product, name)


def test_a_product_costs_what_its_kind_does() -> None:
    setting = named("quadratic", "sgd")
    found = {p: look_back(setting, product=p, verify=False) for p in PRODUCTS}
    assert {p: h.hessian_products for p, h in found.items()} == {
        p: 0 if p == "none" else STEPS for p in PRODUCTS
    }
    exact = found.pop("exact")
    assert exact.plan is not None and exact.plan.graphs == STEPS  # small, so the roll keeps all
    assert exact.gradient_equivalents == 2 * STEPS
    assert [h.gradient_equivalents for h in found.values()] == [STEPS, 2 * STEPS, 0]


def test_difference_products_follow_running_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh()).double()
    setting = custom(model, lambda m, x: (m(x)[:, :4] - x).square().mean(), nesterov)
    options = {"terminal": in_mode(setting.problem.terminal, training=False)}
    found = {p: look_back(setting, product=p, **options).grad["lr"] for p in PRODUCTS}
    exact = found["exact"]
    assert relative_error(found["forward-difference"], exact) < 1e-6
    assert relative_error(found["central-difference"], exact) < 1e-8


def test_running_statistics_are_pulled_back_at_the_step_s_own_parameters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the state was spilled, whose θ the difference may change."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.Tanh()).double()
    setting = custom(model, lambda m, x: (m(x)[:, :4] - x).square().mean(), nesterov)
    options = {"terminal": in_mode(setting.problem.terminal, training=False)}
    seen: list[list[Tensor]] = []
    first_order = products._first_order

    def noted(evaluation: Any, point: Any) -> Any:
        seen.append([flat.clone() for flat in point.flats])
        return first_order(evaluation, point)

    monkeypatch.setattr(products, "_first_order", noted)
    kept = look_back(setting, product="forward-difference", **options)
    spilled = look_back(setting, product="forward-difference", memory_budget=1, **options)
    assert kept.plan is not None and not kept.plan.spilled
    assert spilled.plan is not None and spilled.plan.spilled
    assert len(seen) == 2 * STEPS
    for before, after in zip(seen[:STEPS], seen[STEPS:], strict=True):
        for a, b in zip(before, after, strict=True):
            assert torch.allclose(a, b, rtol=1e-13, atol=1e-14)  # a difference moves θ by 1e-8


@pytest.mark.parametrize("product", ["forward-difference", "central-difference"])
def test_difference_products_reach_blocks_that_have_no_costate_yet(product: str) -> None:
    """The terminal reads the first group alone; the Hessian couples it to the second."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    setting = custom(model, lambda m, x: m(x).square().mean(), lambda _: momentum(groups))
    options = {"terminal": lambda m: m[0].weight.square().sum(), "stage_weight": 0.0}
    exact, found = (look_back(setting, product=p, **options) for p in ("exact", product))
    assert relative_error(found.grad["lr"], exact.grad["lr"]) < 1e-6


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_float32_agrees_with_float64(problem: str, optimizer: str) -> None:
    """1e-5: about a hundred roundings of 6e-8 in seven steps. Without noise, whose draws differ
    between the precisions."""
    found = []
    for dtype in (torch.float64, torch.float32):
        chosen = PROBLEMS[problem](dtype)
        setting = make_setting(chosen, OPTIMIZERS[optimizer](chosen.model.parameters()))
        del setting.controls["noise"]
        found.append(look_back(setting, terminal=chosen.terminal, average=0.9))
    double, single = found
    assert single.value == pytest.approx(double.value, rel=1e-5)
    for name, g in double.grad.items():
        assert single.grad[name].dtype == torch.float64
        assert relative_error(single.grad[name], g) < 1e-5, name


# What is left behind ------------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("options", [{}, {"segment": 3}, {"engine": "higher"}, {"raises": True}])
def test_everything_is_left_as_it_was_found(options: dict[str, Any], warm: bool) -> None:
    problem = PROBLEMS["cnn"]()
    problem.model[1].eval()
    body = nn.ModuleList(problem.model[:-1])
    setting = make_setting(problem, adam(body.parameters()), warm=warm)
    for p in problem.model.parameters():  # the last layer's are not the optimizer's
        p.grad = torch.randn_like(p)
    gradients = [p.grad for p in problem.model.parameters()]
    seed_everything(5)
    before = everything(problem.model, setting.optimizer)
    raises = options.get("raises")
    calls = 0

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        np.random.rand(), random.random(), torch.rand(1)
        model.train()
        if raises and calls == STEPS + 3:
            raise RuntimeError("while looking back")
        return problem.loss_fn(model, batch)

    watched = setting._replace(problem=problem._replace(loss_fn=loss_fn))
    chosen = {k: v for k, v in options.items() if k != "raises"}
    chosen["terminal"] = in_mode(problem.terminal, training=False)
    if raises:
        chosen["product"] = "central-difference"  # which evaluates the loss while looking back
        with pytest.raises(RuntimeError, match="while looking back"):
            look_back(watched, **chosen)
    else:
        assert look_back(watched, **chosen).result.successful
    assert_identical(before, everything(problem.model, setting.optimizer))
    assert all(p.grad is g for p, g in zip(problem.model.parameters(), gradients, strict=True))


# Outcomes and errors ------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", SEGMENTS)
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize("additive", [False, True])
def test_a_non_finite_window_is_an_outcome_with_its_step(
    additive: bool, factor: float, segment: int
) -> None:
    """additive: a loss that is not finite although its gradient is."""
    setting = named("mlp", "nesterov")
    worst = setting.batches[3]

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        loss = setting.problem.loss_fn(model, batch)
        if not torch.equal(batch[0], worst[0]):  # every use has a copy
            return loss
        return loss + factor if additive else loss * factor

    broken = setting._replace(problem=setting.problem._replace(loss_fn=loss_fn))
    h = look_back(broken, segment=segment, terminal=setting.problem.terminal, stage_weight=0.0)
    assert h.result.name == "non-finite"
    assert h.result.step == 3
    assert "lower lr" in h.result.message
    assert all(g.shape == (STEPS,) for g in (*h.grad.values(), h.costate_norms, h.losses))


def test_an_exploding_window_names_where_the_costate_overflows() -> None:
    setting = named("quadratic", "sgd")
    lr = torch.full((STEPS,), 1e38, dtype=torch.float64)
    h = look_back(setting, controls={"lr": lr}, stage_weight=1.0)
    assert h.result.name == "non-finite"
    assert h.result.step is not None and 0 <= h.result.step < STEPS


def loss_of_each(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).sum(-1)


def detached(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).mean().detach()


def of_something_else(model: nn.Module, batch: Any) -> Tensor:
    return torch.ones((), requires_grad=True) * 2


ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"controls": {"lrr": 0.1}}, "unknown control 'lrr': did you mean 'lr'"),
    ({"controls": {"x": 0.1}}, "unknown control 'x': there are: lr, momentum, noise, weight_decay"),
    ({"controls": {}}, "controls is empty; name at least one of lr, momentum"),
    ({"controls": {"lr": [0.1, 0.1]}}, rf"controls\['lr'\].*shape \({STEPS},\), got \(2,\)"),
    ({"controls": {"noise": -1.0}}, r"controls\['noise'\] must be ≥ 0, got -1"),
    ({"controls": {"momentum": 1.0}}, r"controls\['momentum'\] must be ≥ 0 and < 1, got 1"),
    ({"controls": {"momentum": 0.0}}, "momentum cannot be steered from 0"),
    ({"controls": {"lr": float("nan")}}, "must be finite, got lr=nan at step 0"),
    ({"batches": []}, "batches is empty; give one batch per step"),
    ({"segment": 0}, rf"segment must be in \[1, {STEPS}\] .* got 0"),
    ({"segment": 8}, rf"segment must be in \[1, {STEPS}\] .* got 8"),
    ({"segment": "sqrt"}, r"segment must be a whole number, got .sqrt."),
    ({"product": "exactly"}, "unknown product 'exactly': did you mean 'exact'"),
    ({"engine": "adjoin"}, "unknown engine 'adjoin': did you mean 'adjoint'"),
    ({"product": "forward-difference", "segment": 3}, "needs .* segment 1, got .* segment 3"),
    (
        {"product": "central-difference", "engine": "higher"},
        "needs .* 'adjoint' .* got .* 'higher'",
    ),
    ({"engine": "higher", "segment": 3}, "unrolls the whole window, got segment 3"),
    ({"engine": "higher", "clip_norm": 1.0}, "does not clip"),
    ({"average": 1.0}, r"average must be in \(0, 1\), got 1.0; use None"),
    ({"clip_norm": 0.0}, "clip_norm must be > 0, got 0"),
    ({"stage_weight": 0.0}, "the objective is empty"),
    ({"loss_fn": loss_of_each}, r"scalar tensor, got shape \(8,\); .*\.mean\(\)"),
    ({"loss_fn": lambda model, batch: 1.0}, r"got float; .* not \.item\(\)"),
    ({"loss_fn": lambda model, batch: None}, "got NoneType"),
    ({"loss_fn": detached}, "a loss without a graph"),
    ({"loss_fn": of_something_else}, "does not depend on any parameter of the optimizer"),
]


@pytest.mark.parametrize(("options", "says"), ERRORS)
def test_what_cannot_be_used_is_said_with_the_mend(options: dict[str, Any], says: str) -> None:
    problem = PROBLEMS["mlp"]()
    arguments: dict[str, Any] = {
        "loss_fn": problem.loss_fn, "batches": problem.batches(STEPS), "controls": {"lr": 0.1}
    }  # fmt: skip
    before = torch.get_rng_state()
    with pytest.raises(InputError, match=says):
        rhc.hypergradient(
            problem.model, momentum(problem.model.parameters()), **{**arguments, **options}
        )
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("optimizer", "options", "says"),
    [
        (
            lambda p: Rprop(p),
            {},
            "Rprop has no differentiable dynamics; use one of SGD, Adam, AdamW",
        ),
        (adamw, {"engine": "higher"}, "'higher' refuses AdamW"),
        (lambda p: Adam(p, maximize=True), {"engine": "higher"}, "'higher' does not maximize"),
        (lambda p: SGD([nn.Parameter(torch.ones(3)), *p]), {}, r"parameter 0 .* \(3,\), is not a"),
    ],
)
def test_optimizers_that_cannot_be_looked_back_at(
    optimizer: Callable[[Any], Optimizer], options: dict[str, Any], says: str
) -> None:
    problem = PROBLEMS["mlp"]()
    with pytest.raises(InputError, match=says):
        rhc.hypergradient(
            problem.model,
            optimizer(problem.model.parameters()),
            problem.loss_fn,
            problem.batches(2),
            controls={"lr": 0.1},
            **options,
        )

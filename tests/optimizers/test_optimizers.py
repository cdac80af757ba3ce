"""Every optimizer with dynamics, torch's and anyone's, has exact hypergradients."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torchopt
from problems import Problem, classify, odds_scaled, plain_loop, relative_error
from torch import Tensor, nn
from torch.optim import (
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)
from torch.optim import _muon as torch_muon

import rhc
from rhc import InputError
from rhc.optimizers import DIFFERENTIABLE, differentiable, from_torchopt, sgd_family
from rhc.optimizers.sgd_family import newton_schulz
from rhc.workload import OPTIMIZERS as NAMED
from rhc.workload import optimizer_of

STEPS = 4
SEGMENTS = (1, 4)

DIFFERENCE = {"lr": 1e-4, "momentum": 1e-4, "noise": 1e-4, "weight_decay": 1e-3}
"""Relative steps of central differences, extrapolated from two of them: truncation is of the fourth
order, so that rounding (1e-16 |J| / step) stays as far below the 1e-6 that is asked for."""


# Optimizers of one's own --------------------------------------------------------------------------


class Lion(Optimizer):
    """Chen et al. 2023."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                m = state["exp_avg"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.sign(beta1 * m + (1 - beta1) * p.grad))
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def lion_transformation(group: Any, controls: Any, shapes: Any) -> Any:
    return rhc.optimizers.lion(
        controls.get("lr", group["lr"]),
        controls.get("momentum", group["betas"][0]),
        group["betas"][1],
        controls.get("weight_decay", group["weight_decay"]),
    )


def lion_state(states: Any, parameters: Any, group: Any) -> Any:
    return rhc.optimizers.LionState(rhc.optimizers.flat_slot(states, "exp_avg", parameters))


class SmoothedRMSprop(Optimizer):
    """torchopt's scale_by_rms, then its trace with Nesterov's look ahead; weight decay coupled."""

    def __init__(
        self,
        params: Any,
        lr: float,
        alpha: float = 0.9,
        eps: float = 1e-3,
        momentum: float = 0.8,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "alpha": alpha, "eps": eps, "momentum": momentum}
            | {"weight_decay": weight_decay},
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["square_avg"] = torch.zeros_like(p)
                    state["momentum_buffer"] = torch.zeros_like(p)
                g = p.grad + group["weight_decay"] * p
                v, b = state["square_avg"], state["momentum_buffer"]
                v.mul_(group["alpha"]).addcmul_(g, g, value=1 - group["alpha"])
                g = g / (v.sqrt() + group["eps"])
                b.mul_(group["momentum"]).add_(g)
                p.sub_(group["lr"] * (g + group["momentum"] * b))


def smoothed_rmsprop(group: dict[str, Any]) -> Any:
    return torchopt.chain(
        torchopt.transform.add_decayed_weights(group["weight_decay"]),
        torchopt.transform.scale_by_rms(group["alpha"], group["eps"]),
        torchopt.transform.trace(group["momentum"], nesterov=True),
    )


class HeavyBall(Optimizer):
    """torch.optim.SGD by another name: dampened, so that torchopt's first call matters."""

    def __init__(self, params: Any, lr: float, momentum: float = 0.8) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "b" not in self.state[p]:
                    self.state[p]["b"] = p.grad.clone()
                else:
                    self.state[p]["b"].mul_(group["momentum"]).add_(p.grad, alpha=0.7)
                p.sub_(group["lr"] * self.state[p]["b"])


def heavy_ball(group: dict[str, Any]) -> Any:
    return torchopt.transform.trace(group["momentum"], dampening=0.3)


class RowNormalized(Optimizer):
    """g / |g| for every row of a matrix: a step that is not elementwise."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    g = p.grad + group["weight_decay"] * p
                    p.sub_(group["lr"] * g / g.norm(dim=-1, keepdim=True))


class NoState(NamedTuple):
    """Nothing is remembered."""


def rows_transformation(group: Any, controls: Any, shapes: Any) -> Any:
    lr = controls.get("lr", group["lr"])
    weight_decay = controls.get("weight_decay", group["weight_decay"])

    def update(updates: Any, state: Any, *, params: Any = None, inplace: bool = False) -> Any:
        g = (updates + weight_decay * params).view(shapes[0])
        return (-lr * g / g.norm(dim=-1, keepdim=True)).reshape(-1), state

    return torchopt.base.GradientTransformation(lambda params: NoState(), update)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(DIFFERENTIABLE)
    rhc.register_dynamics(Lion, lion_transformation, lion_state)
    rhc.register_dynamics(
        SmoothedRMSprop,
        from_torchopt(smoothed_rmsprop, {"nu": "square_avg", "trace": "momentum_buffer"}),
    )
    rhc.register_dynamics(HeavyBall, from_torchopt(heavy_ball, {"trace": "b"}))
    rhc.register_dynamics(
        RowNormalized, rows_transformation, lambda *_: NoState(), elementwise=False
    )
    yield
    DIFFERENTIABLE.clear()
    DIFFERENTIABLE.update(before)


# The table ----------------------------------------------------------------------------------------

OPTIMIZERS: Mapping[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1, weight_decay=0.05),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.05),
    "adam": lambda p: Adam(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, alpha=0.9, momentum=0.7, weight_decay=0.1),
    "centered rmsprop": lambda p: RMSprop(
        p, lr=0.01, alpha=0.8, momentum=0.7, weight_decay=0.1, centered=True
    ),
    "rmsprop without momentum": lambda p: RMSprop(p, lr=0.01, weight_decay=0.1, maximize=True),
    "nadam": lambda p: NAdam(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, momentum_decay=0.1),
    "decoupled nadam": lambda p: NAdam(
        p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, decoupled_weight_decay=True
    ),
    "radam": lambda p: RAdam(p, lr=0.02, betas=(0.8, 0.95), weight_decay=0.1),
    "adamax": lambda p: Adamax(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    "adagrad": lambda p: Adagrad(
        p, lr=0.05, lr_decay=0.05, weight_decay=0.1, initial_accumulator_value=0.01
    ),
    "muon": lambda p: Muon(p, lr=0.02, momentum=0.8, weight_decay=0.1),
    "lion": lambda p: Lion(p, lr=0.01, betas=(0.8, 0.9), weight_decay=0.1),
    "stock": lambda p: SmoothedRMSprop(p, lr=0.01),
    "stock trace": lambda p: HeavyBall(p, lr=0.05),
    "rows": lambda p: RowNormalized(p, lr=0.05, weight_decay=0.1),
}

FROM_THE_START = ("rmsprop", "nadam", "radam", "adamax", "adagrad", "muon", "stock", "stock trace")


class Setting(NamedTuple):
    problem: Problem
    optimizer: Optimizer
    batches: list[Any]
    controls: dict[str, Tensor]


def matrices(seed: int = 0) -> Problem:
    """5-7-3 with tanh and without biases, since Muon takes matrices only."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 3, bias=False))
    draw = torch.Generator().manual_seed(seed + 1)

    def batch(size: int = 12) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 5, generator=draw, dtype=torch.float64)
        return x, torch.randint(0, 3, (size,), generator=draw)

    held_out = batch(20)
    return Problem(
        model.double(),
        classify,
        lambda n: [batch() for _ in range(n)],
        lambda m: classify(m, held_out),
    )


def two_groups(make: Callable[[Any], Optimizer], model: nn.Module) -> Optimizer:
    """The second parameter at half the lr and half the momentum's odds."""
    optimizer = make([{"params": [p]} for p in model.parameters()])
    first, second = optimizer.param_groups
    second["lr"] = first["lr"] / 2
    if "betas" in first:
        second["betas"] = (odds_scaled(first["betas"][0], 0.5), first["betas"][1])
    elif first.get("momentum"):
        second["momentum"] = odds_scaled(first["momentum"], 0.5)
    return optimizer


def make_setting(name: str, *, groups: int, warm: int) -> Setting:
    """warm: plain steps before the window; RAdam's variance is rectified after five."""
    problem = matrices()
    make = OPTIMIZERS[name]
    optimizer = make(problem.model.parameters()) if groups == 1 else two_groups(make, problem.model)
    plain_loop(problem, optimizer, problem.batches(warm), {})
    group = optimizer.param_groups[0]
    momentum = group["betas"][0] if "betas" in group else group.get("momentum", 0.0)
    centre = {"lr": group["lr"], "momentum": momentum, "noise": 0.1}
    centre["weight_decay"] = group.get("weight_decay", 0.0)
    allowed = differentiable(optimizer).controls
    draw = torch.Generator().manual_seed(0)
    controls = {
        n: v * (0.8 + 0.4 * torch.rand(STEPS, generator=draw, dtype=torch.float64))
        for n, v in centre.items()
        if v and (allowed is None or n == "noise" or n in allowed)
    }
    return Setting(problem, optimizer, problem.batches(STEPS), controls)


def look_back(setting: Setting, **options: Any) -> rhc.Hypergradient:
    return rhc.hypergradient(
        setting.problem.model,
        setting.optimizer,
        setting.problem.loss_fn,
        setting.batches,
        **{"controls": setting.controls, "terminal": setting.problem.terminal, **options},
    )


def differences(setting: Setting) -> dict[str, Tensor]:
    """Central differences of the plain loop's J, Richardson's extrapolation of two step sizes."""

    def value(name: str, t: int, change: float) -> float:
        model, optimizer = copy.deepcopy((setting.problem.model, setting.optimizer))
        moved = {n: v.clone() for n, v in setting.controls.items()}
        moved[name][t] += change
        return plain_loop(
            setting.problem._replace(model=model),
            optimizer,
            setting.batches,
            moved,
            terminal=setting.problem.terminal,
        )

    def slope(name: str, t: int) -> float:
        h = DIFFERENCE[name] * float(setting.controls[name][t])
        d = [(value(name, t, s * h) - value(name, t, -s * h)) / (2 * s * h) for s in (1, 2)]
        return (4 * d[0] - d[1]) / 3

    return {
        n: torch.tensor([slope(n, t) for t in range(STEPS)], dtype=torch.float64)
        for n in setting.controls
    }


def smooth_muon(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float64) -> None:
    """Newton–Schulz in `dtype`, in torch and in rhc: bfloat16's stairs have no differences."""

    def iteration(grad: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
        return newton_schulz(grad.to(dtype), coefficients, steps, eps)

    monkeypatch.setattr(torch_muon, "_zeropower_via_newtonschulz", iteration)
    monkeypatch.setattr(sgd_family, "NEWTON_SCHULZ_DTYPE", dtype)


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """torch keeps NAdam's product of momenta in the default precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def assert_exact(setting: Setting) -> None:
    expected = differences(setting)
    norms = None
    for segment in SEGMENTS:
        h = look_back(setting, segment=segment)
        assert h.result.successful
        for name, e in expected.items():
            if type(setting.optimizer) is Lion and name in ("momentum", "noise"):
                assert torch.equal(h.grad[name], e) and not e.any()  # a sign has no slope
            else:
                assert relative_error(h.grad[name], e) < 1e-6, (segment, name, h.grad[name], e)
        norms = h.costate_norms if norms is None else norms
        assert relative_error(h.costate_norms, norms) < 1e-10


# Exactness ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_central_differences_of_the_plain_loop(
    name: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth_muon(monkeypatch)
    assert_exact(make_setting(name, groups=groups, warm=5))


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("name", FROM_THE_START)
def test_equals_central_differences_from_the_very_first_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth_muon(monkeypatch)
    assert_exact(make_setting(name, groups=1, warm=0))


class Heads(nn.Module):
    """A body and two heads, of which a batch uses one: blocks are split while they roll."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(5, 7, bias=False)
        self.heads = nn.ModuleList(nn.Linear(7, 3, bias=False) for _ in range(2))
        self.double()

    def forward(self, x: Tensor, head: int) -> Tensor:
        return self.heads[head](torch.tanh(self.body(x)))


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("name", ["rmsprop", "nadam", "adagrad", "muon", "stock"])
def test_parameters_that_some_steps_leave_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    smooth_muon(monkeypatch)
    inner = matrices()
    problem = Problem(
        Heads(),
        lambda m, b: nn.functional.cross_entropy(m(b[0][0], b[1]), b[0][1]),
        lambda n: [(x, t % 2) for t, x in enumerate(inner.batches(n))],
        lambda m: m(inner.batches(1)[0][0] * 0 + 0.3, 1).square().sum(),
    )
    setting = make_setting(name, groups=1, warm=0)
    optimizer = OPTIMIZERS[name](problem.model.parameters())
    assert_exact(Setting(problem, optimizer, problem.batches(STEPS), setting.controls))


def test_muon_in_bfloat16_has_the_value_of_torch_and_the_slope_of_smooth_matrices() -> None:
    """dJ/du is that of a smooth window near by: within 0.02 for lr, whose derivative is the update
    itself, and 0.006 for the others, when measured; 0.05 leaves room for another processor.

    Differences say nothing here: between two of bfloat16's stairs J is constant in what is upstream
    of Newton–Schulz.
    """
    setting = make_setting("muon", groups=1, warm=5)
    found = [look_back(setting, segment=s) for s in SEGMENTS]
    fresh = copy.deepcopy((setting.problem.model, setting.optimizer))
    plain = plain_loop(
        setting.problem._replace(model=fresh[0]), fresh[1], setting.batches, setting.controls,
        terminal=setting.problem.terminal,
    )  # fmt: skip
    for h in found:
        assert h.result.successful
        assert h.value == pytest.approx(plain, rel=1e-13)
    with pytest.MonkeyPatch.context() as patch:
        smooth_muon(patch)
        smooth = look_back(setting)
    for name, g in smooth.grad.items():
        assert relative_error(found[0].grad[name], found[1].grad[name]) < 1e-9, name
        assert relative_error(found[0].grad[name], g) < 0.05, name


@pytest.mark.parametrize("name", ["nadam", "radam", "rmsprop", "adagrad", "adamax", "muon"])
def test_float32_agrees_with_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1e-4: a hundred roundings of 6e-8, times the condition of a few steps."""
    smooth_muon(monkeypatch, torch.float32)
    found = []
    for dtype in (torch.float64, torch.float32):
        setting = make_setting(name, groups=1, warm=0)
        del setting.controls["noise"]
        setting.problem.model.to(dtype)
        batches = [(x.to(dtype), y) for x, y in setting.batches]
        terminal = lambda m, d=dtype: m(torch.full((1, 5), 0.3, dtype=d)).square().sum()  # noqa: E731
        found.append(
            look_back(setting._replace(batches=batches), terminal=terminal, product="exact")
        )
    double, single = found
    assert single.result.successful
    for control, g in double.grad.items():
        assert relative_error(single.grad[control], g) < 1e-4, control


# Registration -------------------------------------------------------------------------------------


def test_registered_optimizers_run_in_the_runner_s_plant_step_by_step() -> None:
    """The transformation is the optimizer's own step, which registration leaves to its author."""
    for name in ("lion", "stock", "stock trace", "rows"):
        problem = matrices()
        optimizer = two_groups(OPTIMIZERS[name], problem.model)
        plant = rhc.Plant(problem.model, optimizer, problem.loss_fn)
        for t, batch in enumerate(problem.batches(6)):
            blocks = plant.blocks()
            before = plant.block_states(blocks)
            plant.step(batch, {}, t)
            for block, state, after in zip(blocks, before, plant.block_states(blocks), strict=True):
                group = optimizer.param_groups[block.group]
                step = plant.differentiable.transformation(group, {}, block.shapes)
                g = block.flatten([p.grad for p in plant.parameters])
                update, moved = step.update(g, state.optimizer, params=state.parameters)
                torch.testing.assert_close(
                    (state.parameters + update, *moved), (after.parameters, *after.optimizer)
                )


def test_a_stock_transformation_is_made_with_the_values_of_the_step() -> None:
    """They are a schedule's that steers lr alone, not those that the group has by now."""
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    p.grad = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    optimizer = SmoothedRMSprop([p], lr=0.1)
    optimizer.step()
    group = optimizer.param_groups[0]
    kind = differentiable(optimizer)
    state, theta = kind.state([optimizer.state[p]], [p], group), p.detach().clone()
    own = {"lr": 0.3, "momentum": 0.2, "weight_decay": 0.4}
    step = kind.transformation(group, own, [p.shape])
    update, _ = step.update(p.grad.clone(), state, params=theta, inplace=False)
    group.update(own)
    optimizer.step()
    torch.testing.assert_close(theta + update, p.detach())


def test_stock_adam_with_a_step_count() -> None:
    """torchopt's bias correction is in the default precision: 1e-6."""

    class Own(Adam):
        """Not torch's own class."""

    def stock(group: dict[str, Any]) -> Any:
        return torchopt.transform.scale_by_adam(*group["betas"], eps=group["eps"], eps_root=1e-30)

    slots = {"mu": "exp_avg", "nu": "exp_avg_sq", "count": "step"}
    rhc.register_dynamics(Own, from_torchopt(stock, slots))
    for warm in (0, 3):
        found = []
        for kind in (Own, Adam):
            problem = matrices()
            optimizer = kind(problem.model.parameters(), lr=0.01)
            plain_loop(problem, optimizer, problem.batches(warm), {})
            setting = Setting(
                problem, optimizer, problem.batches(STEPS), {"lr": torch.full((STEPS,), 0.01)}
            )
            found.append(look_back(setting).grad["lr"])
        assert relative_error(*found) < 1e-5


def test_counts_that_differ_within_a_block_are_said() -> None:
    """Under another name than step, a count does not keep parameters apart."""

    slots = {"mu": "exp_avg", "nu": "exp_avg_sq", "count": "taken"}
    stock = from_torchopt(lambda group: torchopt.transform.scale_by_adam(), slots)
    params = [torch.zeros(2), torch.zeros(3)]
    states = [
        {"exp_avg": p, "exp_avg_sq": p, "taken": taken} for taken, p in enumerate(params, start=1)
    ]
    with pytest.raises(InputError, match=r"have different counts, \[1.0, 2.0\]; keep the count in"):
        stock.state(states, params, {})


def test_the_dynamics_are_found_on_the_package_without_importing_torch_first() -> None:
    code = "import sys, rhc; assert 'torch' not in sys.modules; rhc.optimizers.lion"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_registered_optimizer_does_not_steer_is_said() -> None:
    rhc.register_dynamics(
        Lion, lion_transformation, lion_state, controls=("lr", "weight_decay"), name="my Lion"
    )
    kind = differentiable(Lion([torch.zeros(2, requires_grad=True)]))
    kind.check_steerable("lr")
    kind.check_steerable("noise")
    says = "'momentum' of my Lion cannot be steered: .*; choose of lr, weight_decay, noise"
    with pytest.raises(InputError, match=says):
        kind.check_steerable("momentum")
    with pytest.raises(InputError, match="'weight_decay' of SmoothedRMSprop cannot be steered"):
        differentiable(OPTIMIZERS["stock"]([torch.zeros(2, requires_grad=True)])).check_steerable(
            "weight_decay"
        )
    differentiable(SGD([torch.zeros(2, requires_grad=True)])).check_steerable("momentum")


class Unregistered(SGD):
    """Has no dynamics of its own."""


REGISTRATIONS: list[tuple[Callable[[], None], str]] = [
    (
        lambda: rhc.register_dynamics(
            SGD([torch.zeros(1)], lr=1.0), lion_transformation, lion_state
        ),
        "optimizer must be a subclass of torch.optim.Optimizer, got (?s:SGD.*); give the class",
    ),
    (
        lambda: rhc.register_dynamics(dict, lion_transformation, lion_state),
        "optimizer must be a subclass of torch.optim.Optimizer, got <class 'dict'>",
    ),
    (
        lambda: rhc.register_dynamics(SGD, lion_transformation, lion_state),
        "SGD of torch.optim has its dynamics already; register a subclass",
    ),
    (
        lambda: rhc.register_dynamics(Unregistered, lion_transformation),
        "state must be a function, got NoneType",
    ),
    (
        lambda: rhc.register_dynamics(Unregistered, "lion", lion_state),
        "transformation must be a function, got str",
    ),
    (
        lambda: rhc.register_dynamics(
            Unregistered, lion_transformation, lion_state, controls=("lr", "noise")
        ),
        r"controls must be a tuple of some of lr, momentum, weight_decay, got \('lr', 'noise'\)",
    ),
    (
        lambda: rhc.register_dynamics(Unregistered, lion_transformation, lion_state, controls="lr"),
        "controls must be a tuple .*, got 'lr'",
    ),
    (
        lambda: rhc.register_dynamics(
            Unregistered, from_torchopt(heavy_ball, {"trace": "b"}), lion_state
        ),
        "a finished DifferentiableOptimizer has its own state",
    ),
    (
        lambda: from_torchopt(torchopt.sgd(0.1), {}),
        "transformation must be a function of the param group, got .*; write lambda group",
    ),
]


@pytest.mark.parametrize(("register", "says"), REGISTRATIONS)
def test_registrations_that_cannot_be_used_say_the_mend(
    register: Callable[[], None], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        register()
    assert Unregistered not in DIFFERENTIABLE


class Wrong(NamedTuple):
    slot: Any


def stock_two_traces(group: Any) -> Any:
    return torchopt.chain(torchopt.transform.trace(0.9), torchopt.transform.trace(0.5))


def stock_many(group: Any) -> Any:
    return torchopt.chain(*[torchopt.transform.scale_by_adam() for _ in range(4)])


USES: list[tuple[tuple[Any, ...], str]] = [
    (
        (lambda *_: None, lion_state),
        "transformation registered for Unregistered must return .*, got NoneType",
    ),
    (
        (lion_transformation, lambda *_: [1]),
        "state registered for Unregistered must return a NamedTuple, got list",
    ),
    (
        (lion_transformation, lambda *_: Wrong([1])),
        "slot in the state registered for Unregistered must be a vector of 56 elements.*got list",
    ),
    (
        (lion_transformation, lambda *_: Wrong(torch.zeros(3, 2))),
        r"must be a vector of 56 elements, .*got a tensor of shape \(3, 2\); .*flat_slot",
    ),
    ((from_torchopt(heavy_ball, {}),), "slots does not say where .* keeps 'trace' .*: trace"),
    (
        (from_torchopt(heavy_ball, {"trace": "b", "mu": "m"}),),
        "slots names 'mu', which the transformation's state does not have; its fields are: trace",
    ),
    ((from_torchopt(stock_many, {"mu": "m", "nu": "v", "count": "t"}),), "'.*' occurs 4 times"),
    ((from_torchopt(stock_two_traces, {"trace": "b"}),), "'trace' occurs 2 times"),
    (
        (from_torchopt(lambda group: torchopt.Adam, {}),),
        "transformation must return a torchopt GradientTransformation, got type",
    ),
]


@pytest.mark.parametrize(("given", "says"), USES)
def test_wrong_dynamics_are_said_at_their_first_use(given: tuple[Any, ...], says: str) -> None:
    rhc.register_dynamics(Unregistered, *given)
    problem = matrices()
    optimizer = Unregistered(problem.model.parameters(), lr=0.1, momentum=0.5)
    setting = Setting(problem, optimizer, problem.batches(2), {"lr": torch.full((2,), 0.1)})
    for group in optimizer.param_groups:
        group["betas"] = (0.9, 0.99)
    with pytest.raises(InputError, match=says):
        look_back(setting)


def test_an_optimizer_without_dynamics_is_still_refused() -> None:
    problem = matrices()
    optimizer = Adadelta(problem.model.parameters())
    setting = Setting(problem, optimizer, problem.batches(2), {"lr": torch.full((2,), 0.1)})
    with pytest.raises(InputError, match="Adadelta has no differentiable dynamics; use one of SGD"):
        look_back(setting)


@pytest.mark.parametrize("name", NAMED)
def test_every_optimizer_of_the_command_line_can_be_looked_back_at(name: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    ).double()
    batches = [torch.randn(5, 3, dtype=torch.float64) for _ in range(4)]
    start = {n: t.clone() for n, t in model.state_dict().items()}

    def at(lr: float) -> tuple[float, float]:
        model.load_state_dict(start)
        found = rhc.hypergradient(
            model,
            optimizer_of(name, model.parameters(), lr),
            lambda m, x: (m(x) - x.sum(1, keepdim=True)).square().mean(),
            batches,
            controls={"lr": lr},
            product="exact",
        )
        assert found.result.usable, found.result.message
        return found.value, float(found.grad["lr"].sum())

    h = 1e-6
    slope = (at(0.01 + h)[0] - at(0.01 - h)[0]) / (2 * h)
    assert at(0.01)[1] == pytest.approx(slope, rel=1e-5)

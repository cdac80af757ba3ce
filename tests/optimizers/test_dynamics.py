"""The pure optimizer steps are torch.optim's, step by step, and their pullback is its adjoint."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from problems import OPTIMIZERS, PROBLEMS, relative_error, steered, two_groups
from torch import Tensor
from torch.optim import (
    SGD,
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
from torchopt.base import GradientTransformation

import rhc
from rhc import InputError
from rhc.optimizers import (
    DIFFERENTIABLE,
    adagrad,
    adam,
    adamax,
    adamw,
    base,
    differentiable,
    muon,
    nadam,
    radam,
    rmsprop,
    sgd,
)
from rhc.optimizers.sgd_family import newton_schulz

STEPS = 25

Controls = Mapping[str, Any]
Pair = tuple[Callable[[Any], Optimizer], Callable[[Controls], GradientTransformation]]


def sgd_pair(**options: Any) -> Pair:
    return (
        lambda parameters: SGD(parameters, lr=1.0, momentum=0.5, **options),
        lambda c: sgd(c["lr"], c["momentum"], weight_decay=c["weight_decay"], **options),
    )


def adam_pair(
    kind: type[Optimizer], transformation: Callable[..., GradientTransformation], **options: Any
) -> Pair:
    return (
        lambda parameters: kind(parameters, betas=(0.5, 0.99), **options),
        lambda c: transformation(
            c["lr"], c["momentum"], 0.99, weight_decay=c["weight_decay"], **options
        ),
    )


def rmsprop_pair(**options: Any) -> Pair:
    return (
        lambda parameters: RMSprop(parameters, momentum=0.5, **options),
        lambda c: rmsprop(c["lr"], c["momentum"], weight_decay=c["weight_decay"], **options),
    )


def adagrad_pair(**options: Any) -> Pair:
    return (
        lambda parameters: Adagrad(parameters, **options),
        lambda c: adagrad(c["lr"], weight_decay=c["weight_decay"], **options),
    )


def decoupled_pair(
    kind: type[Optimizer], transformation: Callable[..., GradientTransformation], **options: Any
) -> Pair:
    return (
        lambda parameters: kind(
            parameters, betas=(0.5, 0.99), decoupled_weight_decay=True, **options
        ),
        lambda c: transformation(
            c["lr"],
            c["momentum"],
            0.99,
            weight_decay=c["weight_decay"],
            decoupled=True,
            **options,
        ),
    )


PAIRS: Mapping[str, Pair] = {
    "sgd": sgd_pair(),
    "dampening": sgd_pair(dampening=0.3),
    "nesterov": sgd_pair(nesterov=True),
    "maximized sgd": sgd_pair(maximize=True),
    "adam": adam_pair(Adam, adam),
    "large eps": adam_pair(Adam, adam, eps=0.1),
    "amsgrad": adam_pair(Adam, adam, amsgrad=True),
    "maximized adam": adam_pair(Adam, adam, maximize=True),
    "adamw": adam_pair(AdamW, adamw),
    "amsgrad adamw": adam_pair(AdamW, adamw, amsgrad=True),
    "maximized adamw": adam_pair(AdamW, adamw, maximize=True),
    "rmsprop": rmsprop_pair(),
    "centered rmsprop": rmsprop_pair(centered=True, alpha=0.9),
    "maximized rmsprop": rmsprop_pair(maximize=True, eps=0.1),
    "nadam": adam_pair(NAdam, nadam),
    "maximized nadam": adam_pair(NAdam, nadam, maximize=True, momentum_decay=0.1),
    "decoupled nadam": decoupled_pair(NAdam, nadam),
    "radam": adam_pair(RAdam, radam),
    "decoupled radam": decoupled_pair(RAdam, radam, maximize=True),
    "adamax": adam_pair(Adamax, adamax),
    "maximized adamax": adam_pair(Adamax, adamax, maximize=True),
    "adagrad": adagrad_pair(lr_decay=0.1),
    "accumulated adagrad": adagrad_pair(initial_accumulator_value=0.3, maximize=True),
}


def schedule(steps: int, *, weight_decay: float = 0.1, seed: int = 0) -> list[dict[str, float]]:
    """Controls that differ at every step."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.rand(steps, 3, generator=draw, dtype=torch.float64).tolist()
    return [
        {"lr": 0.2 * a + 1e-3, "momentum": 0.3 + 0.6 * m, "weight_decay": weight_decay * w}
        for a, m, w in rows
    ]


def write(optimizer: Optimizer, controls: Mapping[str, float]) -> None:
    group = optimizer.param_groups[0]
    group["lr"], group["weight_decay"] = controls["lr"], controls["weight_decay"]
    if "betas" in group:
        group["betas"] = (controls["momentum"], group["betas"][1])
    elif "momentum" in group:
        group["momentum"] = controls["momentum"]


def tensors(controls: Mapping[str, float]) -> dict[str, Tensor]:
    return {n: torch.tensor(v, dtype=torch.float64) for n, v in controls.items()}


def parameters(seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((3, 4), (5,), (), (0, 2))
    return [torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes]


def gradients(at: Sequence[Tensor], t: int) -> list[Tensor]:
    """A nonlinear field, so that a wrong step is carried on; exactly 0 at times."""
    return [torch.sin(3 * p + t) * (p + t % 3 > 0.5) for p in at]


@pytest.mark.parametrize("as_tensors", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_equals_torch_optim_step_by_step(name: str, as_tensors: bool) -> None:
    make, transformation = PAIRS[name]
    live = [p.requires_grad_() for p in parameters()]
    pure = parameters()
    optimizer = make(live)
    state = transformation({"lr": 0.1, "momentum": 0.5, "weight_decay": 0.1}).init(pure)
    for t, controls in enumerate(schedule(STEPS)):
        write(optimizer, controls)
        for p, g in zip(live, gradients([p.detach() for p in live], t), strict=True):
            p.grad = g
        optimizer.step()
        step = transformation(tensors(controls) if as_tensors else controls)
        updates, state = step.update(gradients(pure, t), state, params=pure, inplace=False)
        pure = list(torchopt.apply_updates(pure, updates, inplace=False))
        for a, b in zip(pure, live, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["sgd", "amsgrad"])
def test_a_step_is_pure(name: str) -> None:
    """Nothing given is changed, and taking the step twice gives the same twice."""
    _, transformation = PAIRS[name]
    step = transformation(tensors(schedule(1)[0]))
    at = parameters()
    g = gradients(at, 1)
    _, state = step.update(g, step.init(at), params=at, inplace=False)
    before = copy.deepcopy((g, state, at))
    first = step.update(g, state, params=at, inplace=False)
    second = step.update(g, state, params=at, inplace=False)
    torch.testing.assert_close((g, state, at), before, rtol=0, atol=0)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["nesterov", "adamw"])
def test_composes_with_a_stock_transformation_of_torchopt(name: str) -> None:
    make, transformation = PAIRS[name]
    live = [p.requires_grad_() for p in parameters()]
    pure = parameters()
    optimizer = make(live)
    clip = torchopt.clip_grad_norm(max_norm=0.5)
    state = torchopt.chain(clip, transformation(schedule(1)[0])).init(tuple(pure))
    for t, controls in enumerate(schedule(STEPS)):
        write(optimizer, controls)
        for p, g in zip(live, gradients([p.detach() for p in live], t), strict=True):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(live, 0.5)
        optimizer.step()
        chained = torchopt.chain(clip, transformation(tensors(controls)))
        updates, state = chained.update(
            tuple(gradients(pure, t)), state, params=tuple(pure), inplace=False
        )
        pure = list(torchopt.apply_updates(tuple(pure), updates, inplace=False))
    for a, b in zip(pure, live, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-12)


finite = partial(st.floats, allow_nan=False, allow_infinity=False)


@settings(max_examples=60)
@given(
    data=st.data(),
    shape=array_shapes(min_dims=0, max_dims=3, max_side=4),
    name=st.sampled_from(sorted(PAIRS)),
    seed=st.integers(0, 1000),
)
def test_equals_torch_optim_for_any_shape_and_value(
    data: st.DataObject, shape: tuple[int, ...], name: str, seed: int
) -> None:
    """Each step from the live state: Adam's slope of lr / eps near 0 would magnify roundings.

    atol: the epsilon under the root moves the update of a tiny gradient, Adagrad's the most, by
    less than 5e-11 lr.
    """
    values = arrays("float64", shape, elements=finite(min_value=-1e6, max_value=1e6))
    make, transformation = PAIRS[name]
    live = torch.as_tensor(data.draw(values)).clone().requires_grad_()
    optimizer = make([live])
    kind = DIFFERENTIABLE[type(optimizer)]
    for controls in schedule(3, seed=seed):
        g = torch.as_tensor(data.draw(values))
        state = kind.state([optimizer.state[live]], [live], optimizer.param_groups[0])
        at = live.detach().flatten().clone()
        step = transformation(tensors(controls))
        update, after = step.update(g.flatten(), state, params=at, inplace=False)
        write(optimizer, controls)
        live.grad = g.clone()
        optimizer.step()
        expected = kind.state([optimizer.state[live]], [live], optimizer.param_groups[0])
        torch.testing.assert_close(at + update, live.detach().flatten(), rtol=1e-12, atol=2e-11)
        torch.testing.assert_close(tuple(after), tuple(expected), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("kind", [two_groups, lambda make, model: make(model.parameters())])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_read_from_a_live_optimizer_continues_as_it_does(
    name: str, kind: Callable[..., Optimizer]
) -> None:
    problem = PROBLEMS["mlp"]()
    optimizer = kind(OPTIMIZERS[name], problem.model)
    plant = rhc.Plant(problem.model, optimizer, problem.loss_fn)
    for warm in (0, 4):
        for t, batch in enumerate(problem.batches(warm)):
            plant.step(batch, {}, t)
        blocks = plant.blocks()
        before = plant.block_states(blocks)
        controls = {n: float(v[0]) for n, v in steered(optimizer, 1).items() if n != "noise"}
        plant.step(problem.batches(1)[0], controls, warm)
        for block, state, after in zip(blocks, before, plant.block_states(blocks), strict=True):
            own = {n: plant.controls.group_value(n, block.group, v) for n, v in controls.items()}
            step = plant.differentiable.transformation(
                optimizer.param_groups[block.group], own, block.shapes
            )
            g = block.flatten([p.grad for p in plant.parameters])
            update, moved = step.update(g, state.optimizer, params=state.parameters)
            torch.testing.assert_close(
                (state.parameters + update, *moved), (after.parameters, *after.optimizer)
            )


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    """torch keeps NAdam's product of momenta in the default precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("warm", [0, 5])
@pytest.mark.parametrize("name", PAIRS)
def test_the_pullback_is_the_adjoint_of_the_live_step(name: str, warm: int) -> None:
    """⟨λ, J v⟩ = ⟨Jᵀλ, v⟩: J v by differences of torch.optim's step, Jᵀλ by autograd of ours.

    The step maps (θ, slots, g, lr, momentum, weight decay) to (θ, slots).
    """
    make, transformation = PAIRS[name]
    draw = torch.Generator().manual_seed(1)
    theta = torch.randn(6, generator=draw, dtype=torch.float64).requires_grad_()
    optimizer = make([theta])
    for t, controls in enumerate(schedule(warm)):
        write(optimizer, controls)
        theta.grad = gradients([theta.detach()], t)[0] + 0.1
        optimizer.step()
    controls = tensors(schedule(warm + 1)[-1])
    # Away from AMSGrad's kink, where the new second moment equals the largest one.
    g = torch.randn(6, generator=draw, dtype=torch.float64) + 2
    kind = DIFFERENTIABLE[type(optimizer)]
    state = kind.state([optimizer.state[theta]], [theta], optimizer.param_groups[0])
    slots = {n: v for n, v in state._asdict().items() if isinstance(v, Tensor)}
    inputs = {"theta": theta.detach(), **slots, "g": g, **controls}
    live_slots = [n for n in slots if n in optimizer.state[theta]]

    def live(at: Mapping[str, Tensor]) -> Tensor:
        p, twin = copy.deepcopy((theta, optimizer))
        p.data.copy_(at["theta"])
        for n in live_slots:
            twin.state[p][n].copy_(at[n])
        write(twin, {n: float(at[n]) for n in controls})
        p.grad = at["g"].clone()
        twin.step()
        after = kind.state([twin.state[p]], [p], twin.param_groups[0])
        return flattened(p.detach(), after)

    def pure(at: Mapping[str, Tensor]) -> Tensor:
        step = transformation({n: at[n] for n in controls})
        begin = state._replace(**{n: at[n] for n in slots})
        update, after = step.update(at["g"], begin, params=at["theta"], inplace=False)
        return flattened(at["theta"] + update, after)

    leaves = {n: v.clone().requires_grad_() for n, v in inputs.items()}
    out = pure(leaves)
    costate = torch.randn(out.shape, generator=draw, dtype=torch.float64)
    pulled = torch.autograd.grad(out, list(leaves.values()), costate, allow_unused=True)
    # A fresh live optimizer has no slots yet to be moved.
    v = {
        n: torch.randn(x.shape, generator=draw, dtype=torch.float64) * (n not in slots or warm > 0)
        for n, x in inputs.items()
    }
    step = 1e-6
    moved = [live({n: x + s * step * v[n] for n, x in inputs.items()}) for s in (1, -1)]
    forward = float(costate @ (moved[0] - moved[1])) / (2 * step)
    backward = sum(
        float((p * v[n]).sum()) for n, p in zip(leaves, pulled, strict=True) if p is not None
    )
    assert backward == pytest.approx(forward, rel=1e-6)


def flattened(theta: Tensor, state: Any) -> Tensor:
    return torch.cat([theta, *(v.reshape(-1) for v in state if isinstance(v, Tensor))])


@pytest.mark.parametrize(
    "transformation",
    [
        adam,
        adamw,
        partial(adam, amsgrad=True),
        partial(adamw, amsgrad=True),
        nadam,
        # Its variance is rectified from the sixth step on, with β2 = 0.9 from the seventh.
        partial(radam, beta2=0.9),
        adamax,
        rmsprop,
        partial(rmsprop, centered=True),
        lambda lr, momentum: adagrad(lr, weight_decay=momentum * 0),
    ],
)
def test_the_root_of_a_zero_second_moment_has_a_finite_slope(
    transformation: Callable[..., GradientTransformation],
) -> None:
    """An embedding row that was never used: its gradient, and so its moments, are exactly 0."""
    theta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    g = torch.tensor([0.0, 0.5, -1e-9], dtype=torch.float64, requires_grad=True)
    controls = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.1, 0.9)]
    step = transformation(controls[0], controls[1])
    state, at = step.init(theta), theta
    for _ in range(8):
        update, state = step.update(g, state, params=at, inplace=False)
        at = at + update
    leaves = [theta, g, *controls]
    slots = [v for v in state if isinstance(v, Tensor)]
    for found in torch.autograd.grad((at**2).sum() + sum(v.sum() for v in slots), leaves):
        assert torch.isfinite(found).all()


def test_an_optimizer_without_dynamics_is_named_with_those_that_have() -> None:
    class Subclass(SGD):
        """May step differently."""

    optimizer = Subclass([torch.zeros(2, requires_grad=True)])
    says = r"Subclass .* use one of SGD, Adam, AdamW, .*Muon of torch.optim, .*register_dynamics"
    with pytest.raises(InputError, match=says):
        differentiable(optimizer)


# Muon ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False},
        {"adjust_lr_fn": "match_rms_adamw"},
        {"ns_steps": 2, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 0.1},
    ],
)
@pytest.mark.parametrize("as_tensors", [True, False])
def test_muon_equals_torch_optim_step_by_step(options: dict[str, Any], as_tensors: bool) -> None:
    """Through the dynamics, so that the matrices are vectors on the way; bfloat16 is torch's."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((6, 4), (3, 8), (5, 5), (1, 4))
    live = [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]
    optimizer = Muon(live, **options)
    kind = differentiable(optimizer)
    assert not kind.elementwise
    pure = [p.detach().clone() for p in live]
    group = optimizer.param_groups[0]
    states = [kind.state([optimizer.state[p]], [p], group) for p in live]
    for t, controls in enumerate(schedule(STEPS)):
        write(optimizer, controls)
        for p, g in zip(live, gradients([p.detach() for p in live], t), strict=True):
            p.grad = g
        optimizer.step()
        given = tensors(controls) if as_tensors else controls
        for i, (p, g) in enumerate(zip(pure, gradients(pure, t), strict=True)):
            step = kind.transformation(group, given, [p.shape])
            flat = p.reshape(-1)
            update, states[i] = step.update(g.reshape(-1), states[i], params=flat, inplace=False)
            pure[i] = (flat + update).view(p.shape)
        for a, b in zip(pure, live, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-13)


def test_a_step_of_muon_has_the_slope_of_the_smooth_iteration() -> None:
    """The stairs of bfloat16 are followed by it on average, over steps larger than theirs."""
    draw = torch.Generator().manual_seed(0)
    at, weights = (torch.randn(16, 12, generator=draw, dtype=torch.float64) for _ in range(2))
    coefficients = (3.4445, -4.7750, 2.0315)

    def orthogonal(x: Tensor) -> Tensor:
        step = muon(-1.0, 0.0, 0.0, adjust_lr_fn=None)
        factor = (16 / 12) ** 0.5
        return step.update(x, step.init(x), params=x)[0] / factor

    x = at.clone().requires_grad_()
    value = orthogonal(x)
    (slope,) = torch.autograd.grad((weights * value).sum(), x)
    stairs = newton_schulz(at.bfloat16(), coefficients, 5, 1e-7).double()
    torch.testing.assert_close(value.detach(), stairs, rtol=1e-12, atol=1e-14)
    smooth = newton_schulz(x, coefficients, 5, 1e-7)
    (expected,) = torch.autograd.grad((weights * smooth).sum(), x)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-13)
    assert 0 < relative_error(stairs, smooth.detach()) < 0.05
    directions = torch.randn(60, 16, 12, generator=draw, dtype=torch.float64)
    h = 0.03
    found = torch.stack(
        [(weights * (orthogonal(at + h * v) - orthogonal(at - h * v))).sum() for v in directions]
    ) / (2 * h)
    along = torch.stack([(slope * v).sum() for v in directions])
    # Rounding to 8 bits leaves 0.3 of noise on each difference.
    assert float(torch.cosine_similarity(found, along, dim=0)) > 0.8
    assert float(found @ along / (along @ along)) == pytest.approx(1.0, abs=0.2)


def test_muon_has_a_finite_slope_at_a_zero_gradient() -> None:
    g = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    step = muon(0.1, 0.9)
    update, _ = step.update(g, step.init(g), params=torch.ones(4, 3, dtype=torch.float64))
    (slope,) = torch.autograd.grad(update.sum(), g)
    assert torch.isfinite(slope).all()


# NAdam's product of momenta -----------------------------------------------------------------------


def test_parameters_with_as_many_steps_but_other_momenta_keep_their_own_products() -> None:
    live = [torch.ones(n, dtype=torch.float64).requires_grad_() for n in (2, 3)]
    optimizer = NAdam(live, lr=0.1)
    group = optimizer.param_groups[0]
    kind = differentiable(optimizer)
    for moved, beta in ((0, 0.9), (1, 0.5), (0, 0.7), (1, 0.7)):
        group["betas"] = (beta, 0.999)
        live[moved].grad = torch.ones_like(live[moved])
        live[1 - moved].grad = None
        optimizer.step()
    state = kind.state([optimizer.state[p] for p in live], live, group)
    assert state.step == 2 and state.mu_product.shape == (5,)
    flat = torch.cat([p.detach() for p in live])
    step = kind.transformation(group, {}, [p.shape for p in live])
    update, after = step.update(torch.full_like(flat, 0.5), state, params=flat, inplace=False)
    for p in live:
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    expected = kind.state([optimizer.state[p] for p in live], live, group)
    torch.testing.assert_close(flat + update, torch.cat([p.detach() for p in live]))
    torch.testing.assert_close(after.mu_product, expected.mu_product)


# Closed forms -------------------------------------------------------------------------------------

CLOSED: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (SGD, {"momentum": 0.0}),
    (SGD, {"momentum": 0.8}),
    (SGD, {"momentum": 0.8, "dampening": 0.3}),
    (SGD, {"momentum": 0.8, "nesterov": True}),
    (Adam, {}),
    (Adam, {"eps": 0.1}),
    (Adam, {"decoupled_weight_decay": True}),
    (AdamW, {}),
]


class Point(NamedTuple):
    """Everything a pullback is given."""

    group: dict[str, Any]
    controls: dict[str, float]
    gradient: Tensor
    parameters: Tensor
    state: Any
    of_parameters: Tensor | None
    of_state: list[Tensor | None]


def point(
    kind: type[Optimizer],
    options: Mapping[str, Any],
    *,
    warm: int = 3,
    size: int = 7,
    missing: Collection[int] = (),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Point:
    """After `warm` live steps; missing: which costates are None, θ's first."""
    draw = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(size, generator=draw, dtype=torch.float64).to(dtype)

    p = normal().requires_grad_()
    optimizer = kind([p], lr=0.1, **options)
    for _ in range(warm):
        p.grad = normal()
        optimizer.step()
    group = optimizer.param_groups[0]
    state = DIFFERENTIABLE[kind].state([optimizer.state[p]], [p], group)
    controls = {"lr": 0.07, "weight_decay": group["weight_decay"]}
    controls["momentum"] = 0.85 * group["momentum"] if "momentum" in group else 0.8
    slots = (controls["momentum"] > 0) if kind is SGD else 2
    costates: list[Tensor | None] = [normal() for _ in range(1 + slots)]
    for i in missing:
        if i < len(costates):
            costates[i] = None
    theta = p.detach().clone()
    return Point(group, controls, normal(), theta, state, costates[0], costates[1:])


def by_autograd(at: Point, kind: type[Optimizer]) -> tuple[Tensor, list[Tensor], Tensor, Any]:
    """What the closed form must return, zeros where nothing depends."""
    theta, g = (t.clone().requires_grad_() for t in (at.parameters, at.gradient))
    state = type(at.state)(
        *(v.clone().requires_grad_() if isinstance(v, Tensor) else v for v in at.state)
    )
    controls: dict[str, Any] = {
        n: torch.tensor(v, dtype=torch.float64, requires_grad=True)
        for n, v in at.controls.items()
        if v or n != "momentum"  # without momentum there is none to differentiate by
    }
    steered = list(controls.values())
    step = DIFFERENTIABLE[kind].transformation(at.group, at.controls | controls, [theta.shape])
    update, after = step.update(g, state, params=theta, inplace=False)
    outputs = [theta + update, *(v for v in after if isinstance(v, Tensor))]
    seeds = [at.of_parameters, *(at.of_state or [None] * (len(outputs) - 1))]
    pairs = [
        (o, s) for o, s in zip(outputs, seeds, strict=True) if s is not None and o.requires_grad
    ]
    slots = [v for v in state if isinstance(v, Tensor)]
    inputs = [theta, *slots, g, *steered]
    pulled: Sequence[Tensor | None] = [None] * len(inputs)
    if pairs:
        outs, of_outs = zip(*pairs, strict=True)
        pulled = torch.autograd.grad(outs, inputs, of_outs, allow_unused=True)
    filled = [torch.zeros_like(x) if p is None else p for x, p in zip(inputs, pulled, strict=True)]
    n = len(slots)
    names = dict(zip(controls, filled[n + 2 :], strict=True))
    return filled[0], filled[1 : n + 1], filled[n + 1], names


def has_closed_form(at: Point, kind: type[Optimizer]) -> bool:
    """Whether a vjp is written out; it then calls no update."""
    made = DIFFERENTIABLE[kind].step(at.group, at.controls)
    return isinstance(made, base.ClosedTransformation) and made.vjp is not None


def assert_pulls_back(at: Point, kind: type[Optimizer], tolerance: float) -> None:
    """What `vjp` gives is autograd's, also where it has a closed form."""
    before = copy.deepcopy(at)
    found = DIFFERENTIABLE[kind].vjp(*at)
    torch.testing.assert_close(tuple(at[2:]), tuple(before[2:]), rtol=0, atol=0)
    theta, slots, g, controls = by_autograd(at, kind)
    assert len(found.state) in (0, len(slots))
    of_slots = found.state or [None] * len(slots)
    pairs = [(found.parameters, theta), (found.gradient, g), *zip(of_slots, slots, strict=True)]
    for a, b in pairs:
        a = torch.zeros_like(b) if a is None else a
        assert float((a - b).norm()) <= tolerance * max(1.0, float(b.norm()))
    assert found.controls.keys() <= {"lr", "momentum", "weight_decay"}
    for name in ("lr", "momentum", "weight_decay"):
        value, expected = (float(given.get(name, 0.0)) for given in (found.controls, controls))
        assert abs(value - expected) <= tolerance * max(1.0, abs(expected)), name
    some = DIFFERENTIABLE[kind].vjp(*at, wanted=("lr",))
    assert some.controls.keys() == found.controls.keys() & {"lr"}
    assert float(some.controls.get("lr", 0.0)) == pytest.approx(
        float(found.controls.get("lr", 0.0)), rel=10 * tolerance, abs=10 * tolerance
    )


@settings(max_examples=150)
@given(
    chosen=st.sampled_from(CLOSED),
    maximize=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.3]),
    warm=st.sampled_from([0, 1, 4]),
    size=st.integers(0, 9),
    missing=st.sets(st.integers(0, 2)),
    seed=st.integers(0, 1000),
)
def test_the_closed_form_of_a_pullback_is_autograd(
    chosen: tuple[type[Optimizer], dict[str, Any]],
    maximize: bool,
    weight_decay: float,
    warm: int,
    size: int,
    missing: set[int],
    seed: int,
) -> None:
    kind, options = chosen
    every = {**options, "maximize": maximize, "weight_decay": weight_decay}
    at = point(kind, every, warm=warm, size=size, missing=missing, seed=seed)
    assert_pulls_back(at, kind, 1e-12)


@pytest.mark.parametrize(("kind", "options"), CLOSED)
def test_a_costate_without_slots_is_one_of_zeros(
    kind: type[Optimizer], options: dict[str, Any]
) -> None:
    for warm in (0, 3):
        at = point(kind, options, warm=warm)
        assert_pulls_back(at._replace(of_state=[]), kind, 1e-12)


def test_momentum_switched_off_leaves_the_buffer_and_its_costate() -> None:
    at = point(SGD, {"momentum": 0.8, "weight_decay": 0.1})
    off = at._replace(controls={**at.controls, "momentum": 0.0})
    assert_pulls_back(off, SGD, 1e-12)
    assert_pulls_back(off._replace(of_parameters=None), SGD, 1e-12)


@pytest.mark.parametrize("kind", [Adam, AdamW])
def test_the_closed_form_is_finite_at_a_zero_second_moment(kind: type[Optimizer]) -> None:
    """Its derivative by the gradient is lr / eps there, so the tolerance is relative to that."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        at = point(kind, {"weight_decay": 0.0}, warm=0, dtype=dtype)
        at.gradient[:3] = 0
        assert_pulls_back(at, kind, tolerance)


@pytest.mark.parametrize(("kind", "options"), CLOSED)
def test_closed_forms_in_float32(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """1e-5: a few hundred roundings of 6e-8."""
    at = point(kind, {**options, "weight_decay": 0.1}, size=500, dtype=torch.float32)
    assert_pulls_back(at, kind, 1e-5)


@settings(max_examples=50)
@given(
    maximize=st.booleans(),
    warm=st.sampled_from([0, 1, 4]),
    size=st.integers(0, 9),
    missing=st.sets(st.integers(0, 1)),
    seed=st.integers(0, 1000),
)
def test_a_state_in_the_place_of_the_gradient(
    maximize: bool, warm: int, size: int, missing: set[int], seed: int
) -> None:
    """It is the state after the step, and goes again."""
    every = {"momentum": 0.8, "maximize": maximize, "weight_decay": 0.0}
    at = point(SGD, every, warm=warm, size=size, missing=missing, seed=seed)
    fold = DIFFERENTIABLE[SGD].fold(at.group, at.controls)
    assert fold is not None
    room = at.gradient.clone()
    after = fold.onto(room, at.state)
    (buffer,) = after
    assert buffer.data_ptr() == room.data_ptr()
    _, expected = DIFFERENTIABLE[SGD].advance(at.group, at.controls, at.gradient, None, at.state)
    torch.testing.assert_close(tuple(after), tuple(expected), rtol=1e-14, atol=1e-14)

    fold.off(after, at.state)
    torch.testing.assert_close(room, at.gradient, rtol=1e-12, atol=1e-13)


def test_what_does_not_fold() -> None:
    sgd_fold = DIFFERENTIABLE[SGD].fold
    for options in ({}, {"nesterov": True}, {"dampening": 0.1}):
        at = point(SGD, {"momentum": 0.8, **options})
        assert (sgd_fold(at.group, at.controls) is not None) == (not options)
        assert sgd_fold(at.group, {**at.controls, "momentum": 0.0}) is None


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Adam, {"amsgrad": True}),
        (SGD, {"momentum": 0.8, "dampening": 0.3}),
        (SGD, {"momentum": 0.8, "nesterov": True}),
    ],
)
def test_what_has_no_closed_form(kind: type[Optimizer], options: dict[str, Any]) -> None:
    at = point(kind, options)
    at = at._replace(of_state=[*at.of_state, None] if kind is Adam else at.of_state)
    assert not has_closed_form(at, kind)
    assert_pulls_back(at, kind, 1e-12)


@pytest.mark.parametrize(
    ("kind", "options"), [(SGD, {}), (SGD, {"momentum": 0.8}), (Adam, {}), (AdamW, {})]
)
def test_what_has_a_closed_form(kind: type[Optimizer], options: dict[str, Any]) -> None:
    """Otherwise the tests above would compare autograd with itself."""
    assert has_closed_form(point(kind, options), kind)


def test_a_closed_form_is_not_taken_for_another_update() -> None:
    at = point(SGD, {"momentum": 0.8})
    kind = DIFFERENTIABLE[SGD]

    def doubled(*args: Any) -> GradientTransformation:
        made = kind.transformation(*args)

        def update(updates: Any, state: Any, **options: Any) -> Any:
            increment, after = made.update(updates, state, **options)
            return 2 * increment, after

        return made._replace(update=update)

    of_twice = dataclasses.replace(kind, transformation=doubled).vjp(*at)
    of_double = kind.vjp(*at._replace(of_parameters=2 * at.of_parameters))
    torch.testing.assert_close(of_twice.gradient, of_double.gradient, rtol=1e-12, atol=1e-12)


@settings(max_examples=100)
@given(
    chosen=st.sampled_from([*CLOSED, (Adam, {"amsgrad": True})]),
    maximize=st.booleans(),
    weight_decay=st.sampled_from([0.0, 0.3]),
    warm=st.sampled_from([0, 1, 4]),
    seed=st.integers(0, 1000),
)
def test_an_advance_is_the_transformation(
    chosen: tuple[type[Optimizer], dict[str, Any]],
    maximize: bool,
    weight_decay: float,
    warm: int,
    seed: int,
) -> None:
    kind, options = chosen
    every = {**options, "maximize": maximize, "weight_decay": weight_decay}
    at = point(kind, every, warm=warm, seed=seed)
    before = copy.deepcopy(at)
    theta, after = DIFFERENTIABLE[kind].advance(*at[:5])
    torch.testing.assert_close(tuple(at[2:]), tuple(before[2:]), rtol=0, atol=0)
    step = DIFFERENTIABLE[kind].transformation(at.group, at.controls, [at.parameters.shape])
    update, expected = step.update(at.gradient, at.state, params=at.parameters, inplace=False)
    torch.testing.assert_close(theta, at.parameters + update, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(tuple(after), tuple(expected), rtol=1e-12, atol=1e-13)
    given = [t for t in (at.gradient, at.parameters, *at.state) if isinstance(t, Tensor)]
    made = [t for t in (theta, *after) if isinstance(t, Tensor)]
    kept = at.state if after is at.state else ()
    assert not {t.data_ptr() for t in made if not any(t is k for k in kept)} & {
        t.data_ptr() for t in given
    }

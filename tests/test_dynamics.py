"""The pure optimizer steps are torch.optim's, step by step, and their pullback is its adjoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from problems import OPTIMIZERS, PROBLEMS, steered, two_groups
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer
from torchopt.base import GradientTransformation

import rhc
from rhc import InputError
from rhc.dynamics import DYNAMICS, adam, adamw, dynamics_of, sgd

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
    else:
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

    atol: the epsilon under Adam's root moves the update of a tiny gradient by less than 1e-11 lr.
    """
    values = arrays("float64", shape, elements=finite(min_value=-1e6, max_value=1e6))
    make, transformation = PAIRS[name]
    live = torch.as_tensor(data.draw(values)).clone().requires_grad_()
    optimizer = make([live])
    kind = DYNAMICS[type(optimizer)]
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
        torch.testing.assert_close(at + update, live.detach().flatten(), rtol=1e-12, atol=1e-11)
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
            step = plant.dynamics.transformation(optimizer.param_groups[block.group], own, block.shapes)
            g = block.flatten([p.grad for p in plant.parameters])
            update, moved = step.update(g, state.optimizer, params=state.parameters)
            torch.testing.assert_close(
                (state.parameters + update, *moved), (after.parameters, *after.optimizer)
            )


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
    kind = DYNAMICS[type(optimizer)]
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
        return torch.cat([p.detach(), *(v for v in after if isinstance(v, Tensor))])

    def pure(at: Mapping[str, Tensor]) -> Tensor:
        step = transformation({n: at[n] for n in controls})
        begin = state._replace(**{n: at[n] for n in slots})
        update, after = step.update(at["g"], begin, params=at["theta"], inplace=False)
        return torch.cat([at["theta"] + update, *(v for v in after if isinstance(v, Tensor))])

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


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("transformation", [adam, adamw])
def test_the_root_of_a_zero_second_moment_has_a_finite_slope(
    transformation: Callable[..., GradientTransformation], amsgrad: bool
) -> None:
    """An embedding row that was never used: its gradient, and so its moments, are exactly 0."""
    theta = torch.randn(3, dtype=torch.float64, requires_grad=True)
    g = torch.tensor([0.0, 0.5, -1e-9], dtype=torch.float64, requires_grad=True)
    controls = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.1, 0.9)]
    step = transformation(controls[0], controls[1], amsgrad=amsgrad)
    state, at = step.init(theta), theta
    for _ in range(3):
        update, state = step.update(g, state, params=at, inplace=False)
        at = at + update
    leaves = [theta, g, *controls]
    for found in torch.autograd.grad((at**2).sum() + state.exp_avg_sq.sum(), leaves):
        assert torch.isfinite(found).all()


def test_an_optimizer_without_dynamics_is_named_with_those_that_have() -> None:
    class Subclass(SGD):
        """May step differently."""

    optimizer = Subclass([torch.zeros(2, requires_grad=True)])
    with pytest.raises(InputError, match=r"Subclass .* use one of SGD, Adam, AdamW of torch"):
        dynamics_of(optimizer)

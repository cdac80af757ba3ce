"""Hostile code gets the right value, or one clear sentence, and is left as it was found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hostile import CASES, OPTIMIZERS, WAYS, Hostile, central, made, plain, rates
from torch import nn

import rhc
from rhc.errors import Unseen

REFUSED = {
    "parameter hooks: decay of a copy": "hook of parameter '0.weight' changes its gradient where",
    "parameter hooks: without grad": "hook of parameter '0.weight' changes its gradient where",
    "parameter hooks: on data": "hook of parameter '0.weight' changes its gradient where",
    "parameter hooks: halved afterwards": "hook _halve .*post_accumulate.* changes the step",
    "parameter hooks: anew afterwards": "hook _anew .*post_accumulate.* changes the step",
    "parameter hooks: forgotten afterwards": "hook _forget .*post_accumulate.* changes the step",
    "step hooks: scaled before": "step pre-hook .* changes the step",
    "step hooks: clipped before": "step pre-hook .* changes the step",
    "step hooks: a box afterwards": "step post-hook .* changes the step",
    "step hooks: a box of data afterwards": "step post-hook .* changes the step",
    "module hooks: backwards": "backward hook of module '2' .* changes gradients",
    "module hooks: backwards, before": "backward hook of module '2' .* changes gradients",
    "module hooks: of a tensor inside": "Tensor.register_hook inside the model .* changes grad",
    "twice: a storage": "parameters '0.weight' and '2.weight' share memory",
    "moved: a box": "loss_fn changes parameter '0.weight' in place",
    "moved: a box of data": "loss_fn changes parameter '.*.weight' in place",
    "moved: a largest norm": "loss_fn changes parameter '0.weight' in place",
    "moved: a box by a hook": "loss_fn changes parameter '2.weight' in place",
}
"""Name -> what is said; all others are right."""


def check(case: Hostile, optimizer: str, way: Mapping[str, Any]) -> None:
    values, own = rates(optimizer), made(case, optimizer)
    before = _state(own.model, own.optimizer)
    found: Any = None
    try:
        found = rhc.hypergradient(
            own.model,
            own.optimizer,
            own.loss,
            own.batches,
            controls=values,
            terminal=own.terminal,
            **way,
        )
    finally:
        assert _same(before, _state(own.model, own.optimizer))
    assert abs(found.value - plain(case, values, optimizer)) < 1e-9
    if case.constants:
        assert "count as constants" in found.why
    elif found.result.name != "inconsistent":
        right = central(case, values, optimizer)
        torch.testing.assert_close(found.grad["lr"], right, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", CASES)
def test_hostile_code_gets_the_right_value_or_a_sentence(name: str, optimizer: str) -> None:
    if name in REFUSED:
        with pytest.raises(Unseen, match=REFUSED[name]):
            check(CASES[name], optimizer, {})
    else:
        check(CASES[name], optimizer, {})


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[1:], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_whatever_the_settings(name: str, way: Mapping[str, Any]) -> None:
    try:
        check(CASES[name], "sgd", way)
    except rhc.InputError:
        assert name in REFUSED


def test_hooks_that_change_gradients_with_kept_graphs() -> None:
    check(CASES["parameter hooks: a mask"], "sgd", {"segment": 2, "product": "exact"})


def test_hooks_that_change_the_gradients_of_micro_batches_are_refused() -> None:
    own = made(CASES["parameter hooks: a mask"], steps=4)
    with pytest.raises(Unseen, match="at every micro-batch or rank"):
        rhc.hypergradient(
            own.model, own.optimizer, own.loss, own.batches, controls={"lr": 0.1}, accumulate=2
        )


def test_engine_higher_refuses_hooks() -> None:
    with pytest.raises(rhc.InputError, match="engine 'higher' runs no hooks"):
        check(CASES["parameter hooks: a mask"], "sgd", {"engine": "higher"})


def test_all_is_put_back_where_the_loss_fails() -> None:
    """Buffers that came, counters, hooks, gradients, flags, modes and generators."""
    own = made(CASES["buffers: registered in forward"])
    hook = next(own.model.parameters()).register_hook(lambda g: g)
    own.model.counter = 3
    for p in own.model.parameters():
        p.grad = torch.ones_like(p)
    before, calls = _state(own.model, own.optimizer), []

    def failing(model: Any, batch: Any) -> Any:
        calls.append(1)
        model.counter += 1
        model.train(not model.training)
        if len(calls) == 4:
            raise ValueError("no more")
        return own.loss(model, batch) + torch.rand(())

    with pytest.raises(ValueError, match="no more"):
        rhc.hypergradient(own.model, own.optimizer, failing, own.batches, controls={"lr": 0.1})
    assert _same(before, _state(own.model, own.optimizer))
    assert own.model.training and not hasattr(own.model, "ramp")
    assert hook.id in next(own.model.parameters())._backward_hooks


def test_the_tensors_of_buffers_stay_the_same_objects() -> None:
    for name in ("buffers: filled", "buffers: grows", "buffers: expanded", "buffers: replaced"):
        own = made(CASES[name])
        before = dict(own.model._buffers)
        rhc.hypergradient(own.model, own.optimizer, own.loss, own.batches, controls={"lr": 0.1})
        assert all(own.model._buffers[n] is b for n, b in before.items())


def fitted(hang: Any, **options: Any) -> tuple[Any, list[str]]:
    torch.manual_seed(0)
    x = torch.randn(128, 4)
    data = torch.utils.data.TensorDataset(x, (x[:, 0] + x[:, 1] > 0).long())
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    hang(model, optimizer)
    told: list[str] = []

    def listener(event: Any) -> None:
        told.append(str(getattr(event, "message", "")))

    result = rhc.Runner(
        model,
        optimizer,
        lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        torch.utils.data.DataLoader(data, 32),
        torch.utils.data.DataLoader(data, 64),
        window=10,
        start="given",
        listeners=[listener],
        **options,
    ).fit(30)
    return result, told


def test_a_run_is_rewritten_with_hooks_of_its_parameters() -> None:
    result, _ = fitted(lambda m, o: m[0].weight.register_hook(lambda g: g * 0), product="exact")
    assert "accepted" in [w["outcome"] for w in result.windows]


def test_a_run_goes_on_without_rewriting_where_a_step_cannot_be_seen_through() -> None:
    def hang(model: nn.Module, optimizer: Any) -> None:
        def box(*_: Any) -> None:
            for p in model.parameters():
                p.data.clamp_(-0.3, 0.3)

        optimizer.register_step_post_hook(box)

    result, told = fitted(hang)
    assert all(w["outcome"] != "accepted" for w in result.windows)
    assert any("windows are not rewritten from now on: step post-hook" in t for t in told)


def test_checkpoints_hold_buffers_that_come_and_grow() -> None:
    from rhc.training.plant import Plant
    from rhc.training.snapshot import snapshot_from_tensors, snapshot_to_tensors

    for name in ("buffers: filled", "buffers: grows", "buffers: registered in forward"):
        own, fresh = made(CASES[name]), made(CASES[name])
        for batch in own.batches:
            own.loss(own.model, batch).backward()
        trained = Plant(own.model, own.optimizer, own.loss)
        stored = snapshot_to_tensors(trained, trained.snapshot())
        plant = Plant(fresh.model, fresh.optimizer, fresh.loss)
        plant.restore(snapshot_from_tensors(plant, *stored))
        for n, b in own.model.named_buffers():
            assert torch.equal(fresh.model.get_buffer(n), b)


def _state(model: nn.Module, optimizer: Any) -> list[Any]:
    parameters = list(model.parameters())
    hooks = [list((p._backward_hooks or {}).values()) for p in parameters]
    return [
        [(id(p), p.detach().clone(), p.requires_grad) for p in parameters],
        [None if p.grad is None else p.grad.clone() for p in parameters],
        [hooks, list(optimizer._optimizer_step_pre_hooks.values())],
        {n: b.clone() for n, b in model.named_buffers()},
        [m.training for m in model.modules()],
        [dict(g, params=None) for g in optimizer.param_groups],
        len(optimizer.state),
        torch.get_rng_state(),
        torch.is_grad_enabled(),
        repr({n: v for n, v in vars(model).items() if n in ("own", "made", "counter")}),
    ]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(v, b[k]) for k, v in a.items())
    return bool(a == b)

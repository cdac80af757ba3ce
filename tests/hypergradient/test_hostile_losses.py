"""Losses that keep something from autograd: the right value, or a result that says that it is not.

And runs of hostile code: whatever is rewritten, what is committed is the plain loop's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hostile import CASES, OPTIMIZERS, WAYS, Hostile, central, made, plain, rates
from hostile_losses import LOSSES
from torch import Tensor, nn

import rhc

ALL_WAYS = (*WAYS, {"product": "forward-difference"})


def hostile(name: str) -> Hostile:
    own = LOSSES[name]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = own.loss(model, batch)
        return found[0] if isinstance(found, tuple) else found

    return Hostile(own.model, own.batch, loss)


def is_right_or_says_so(name: str, optimizer: str, way: Mapping[str, Any]) -> None:
    case, values = hostile(name), rates(optimizer)
    own = made(case, optimizer)
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
    except rhc.InputError:
        return
    if not found.result.usable:
        assert found.result.message
        return
    assert found.value == pytest.approx(plain(case, values, optimizer), rel=1e-9)
    right = central(case, values, optimizer)
    assert float((found.grad["lr"] - right).abs().max() / right.abs().max()) < 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_hostile_losses(name: str) -> None:
    is_right_or_says_so(name, "sgd", {})


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", ALL_WAYS, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_whatever_the_settings(name: str, way: Mapping[str, Any], optimizer: str) -> None:
    is_right_or_says_so(name, optimizer, way)


FEW = ("focal", "td", "simsiam", "gradient_reversal", "vq")


def test_the_table_has_them() -> None:
    assert set(FEW) <= set(LOSSES)


@pytest.mark.parametrize("name", FEW)
def test_values_where_a_difference_is_the_whole_truth(name: str) -> None:
    """What differences of gradients give is verified too: asymmetric ones are told."""
    is_right_or_says_so(name, "adamw", {"product": "central-difference"})


RUN = [f"losses: {name}" for name in LOSSES] + list(CASES)
QUICK = ("losses: focal", "parameter hooks: a mask", "step hooks: a box afterwards")


def in_a_run(name: str) -> None:
    """The losses of the tape are those of a plain loop with the run's schedule."""
    kind, _, own_name = name.partition(": ")
    case = hostile(own_name) if kind == "losses" else CASES[name]
    own = made(case, steps=24)
    held = [case.batch(torch.Generator().manual_seed(3)) for _ in range(2)]
    try:
        result = rhc.Runner(
            own.model,
            own.optimizer,
            own.loss,
            own.batches,
            held,
            window=8,
            start="given",
            product="auto",
        ).fit(24)
    except rhc.InputError:
        return
    lrs = result.schedule["lr"].tolist()
    again = made(case, steps=24)
    for batch, lr, row in zip(again.batches, lrs, result.tape, strict=True):
        again.optimizer.param_groups[0]["lr"] = lr
        again.optimizer.zero_grad()
        loss = again.loss(again.model, batch)
        loss.backward()
        again.optimizer.step()
        assert row["loss"] == pytest.approx(float(loss.detach()), rel=1e-9), row["step"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUICK)
def test_runs_commit_the_plain_loops_steps(name: str) -> None:
    in_a_run(name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUN)
def test_all_runs_commit_the_plain_loops_steps(name: str) -> None:
    in_a_run(name)

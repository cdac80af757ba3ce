"""Settings that are numbers of numpy or torch, and parameters that are complex."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import make_run, state_of, unequal
from torch import nn

import rhc
from rhc import InputError, Objective, Rewrite, Schedule
from rhc.schedulers import Failsafe, LossSampler
from rhc.schedulers.rewards import HeldOut
from rhc.training.objective import HeldOutBatches

KINDS: dict[str, Callable[[int], Any]] = {
    "numpy": np.int64,
    "torch": torch.tensor,
}


def trained(kind: Callable[[int], Any], real: Callable[[float], Any], directory: Path) -> Any:
    """A run all of whose numbers are of these kinds: (result, state)."""
    run = make_run("sgd")
    runner = rhc.Runner(
        run.model,
        run.optimizer,
        run.loss_fn,
        run.train,
        run.val,
        window=kind(4),
        stride=kind(2),
        start="given",
        rewrite=Rewrite(knots=kind(1), retries=kind(1), patience=kind(1), damping=real(0.25)),
        objective=Objective(loss_weight=real(0.5), batches=kind(2), average=real(0.5)),
        segment=kind(1),
        accumulate=kind(1),
        clip_norm=real(64.0),
        discount=real(0.75),
        costate_clip=real(8.0),
        validate_every=kind(4),
        keep_checkpoints=kind(2),
        seed=kind(3),
        deterministic=np.bool_(False),
        directory=directory,
    )
    return runner.fit(kind(8)), state_of(run)


@pytest.mark.parametrize("name", KINDS)
def test_a_run_takes_them_for_its_own(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    real: Callable[[float], Any] = torch.tensor if name == "torch" else np.float32
    result, state = trained(kind, real, tmp_path / "a")
    plain, expected = trained(int, float, tmp_path / "b")
    assert unequal(state, expected) == []
    assert result.schedule == plain.schedule
    configs = [json.loads((tmp_path / d / "config.json").read_text()) for d in "ab"]
    for config in configs:
        config.pop("sha256", None)
    assert configs[0] == configs[1]
    trained(kind, real, tmp_path / "b")  # the same run: finished


def test_a_flag_of_numpy_is_a_flag() -> None:
    run = make_run("sgd")
    runner = rhc.Runner(run.model, run.optimizer, run.loss_fn, run.train, rewrite=np.bool_(False))  # type: ignore[arg-type]
    assert not runner.rewriting


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD(net().parameters(), lr=0.1, momentum=0.9)


def noised(seed: Any) -> list[Any]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = Schedule({"lr": torch.ones(3), "noise": torch.ones(3)}, seed=seed)
    schedule.to_lr_scheduler(optimizer)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model.weight.flatten().tolist()  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("name", KINDS)
def test_parts_take_them(name: str) -> None:
    kind = KINDS[name]
    assert Schedule.constant(kind(3), kind(7), lr=np.float32(0.5)) == Schedule.constant(
        3, 7, lr=0.5
    )
    assert len(Schedule.constant(3, lr=0.1).stretched(kind(6))) == 6
    window = Schedule.constant(8, lr=0.1).window(kind(2), kind(4))
    assert (window.start, len(window), type(window.start)) == (2, 2, int)
    assert noised(kind(200)) == noised(200)
    assert HeldOutBatches(kind(2)) == HeldOutBatches(2)
    a = rhc.AdaptiveRL(sgd(), steps=kind(100), every=kind(5), seed=kind(200))
    b = rhc.AdaptiveRL(sgd(), steps=100, every=5, seed=200)
    assert json.dumps(a.state_dict()) == json.dumps(b.state_dict())
    assert (a.every, a.seed) == (b.every, b.seed)
    assert rhc.EpochPlanner(epoch_steps=kind(5), seed=kind(1)).describe()["epoch_steps"] == 5
    assert len(LossSampler(kind(10))) == 10


REFUSED: dict[str, Callable[[Any], Any]] = {
    "seed": lambda v: rhc.Plant(m := net(), torch.optim.SGD(m.parameters()), sum, seed=v),
    "start": lambda v: Schedule({"lr": torch.ones(2)}, start=v),
    "every": lambda v: rhc.AdaptiveRL(sgd(), every=v),
    "steps": lambda v: Schedule.constant(v, lr=0.1),
    "epoch_steps": lambda v: rhc.EpochPlanner(epoch_steps=v),
    "batches": lambda v: HeldOut(sum, [], batches=v),
    "objective batches": lambda v: Objective(batches=v),
    "held-out batches": HeldOutBatches,
    "retries": lambda v: Rewrite(retries=v),
    "patience": lambda v: Failsafe(lambda stats, plan: plan, patience=v),
    "examples": LossSampler,
    **{
        name: lambda v, name=name: rhc.Runner(  # type: ignore[misc]
            (r := make_run("sgd")).model, r.optimizer, r.loss_fn, r.train, r.val, **{name: v}
        )
        for name in ("window", "stride", "accumulate", "validate_every", "segment")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_number_is_refused(name: str) -> None:
    texts = () if name == "segment" else ("4",)  # --segment takes a word as well
    for value in (True, 2.5, 2.0, *texts, np.bool_(True), torch.tensor(True)):
        with pytest.raises(InputError) as refused:
            REFUSED[name](value)
        said, _, got = str(refused.value).partition(", got ")
        assert said == f"{name} must be a whole number" and got.endswith("; give an int")


# Complex parameters -------------------------------------------------------------------------------


class Wave(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.complex64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(4, 3, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.to(self.w.dtype) @ self.w).abs()


class Parts(nn.Module):
    """The same in double precision with its real and imaginary parts, and a complex constant."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.view_as_real(Wave(torch.complex128).w.detach()).clone())
        self.register_buffer("phase", torch.ones(3, dtype=torch.complex128) * (1 + 1j))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = torch.view_as_complex(self.w)
        return (x.to(w.dtype) @ w * self.phase).abs()


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def wave_loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - 1).square().mean()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_complex_parameters_are_trained_as_by_a_plain_loop(kind: Any, tmp_path: Path) -> None:
    plain, model, again = Wave(), Wave(), Wave()
    optimizer = kind(plain.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        wave_loss(plain, X).backward()
        optimizer.step()
    settings: dict[str, Any] = {"rewrite": False, "window": 3, "directory": tmp_path / "run"}
    own = kind(model.parameters(), lr=0.1)
    rhc.Runner(model, own, wave_loss, [X], [X], **settings).fit(3)
    own = kind(again.parameters(), lr=0.1)
    rhc.Runner(again, own, wave_loss, [X], [X], **settings).fit(6)
    assert torch.equal(plain.w, again.w)


@pytest.mark.parametrize(
    ("dtype", "settings", "told"),
    [
        (torch.complex64, {}, r"parameter 'w' is complex \(torch.complex64\), and hypergradients"),
        (torch.complex64, {"rewrite": False, "start": "zero"}, "parameter 'w' is complex"),
        (torch.complex64, {"rewrite": False, "clip_value": 1.0}, "'w' is complex; use clip_norm"),
        (torch.complex128, {"rewrite": False, "directory": "run"}, "'w' is of torch.complex128"),
    ],
)
def test_what_complex_parameters_cannot_have_is_said(
    dtype: torch.dtype, settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    model = Wave(dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    if "directory" in settings:
        settings = {**settings, "directory": tmp_path / "run"}
    with pytest.raises(InputError, match=told):
        rhc.Runner(model, optimizer, wave_loss, [X], [X], **settings)
    assert not (tmp_path / "run").exists()


def test_a_hypergradient_of_complex_parameters_is_refused_and_of_their_parts_is_right() -> None:
    model: nn.Module = Wave()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="view_as_complex"):
        rhc.hypergradient(model, optimizer, wave_loss, [X] * 3, controls={"lr": 0.1})

    def looked(lrs: list[float]) -> rhc.Hypergradient:
        model = Parts()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        controls = {"lr": torch.tensor(lrs, dtype=torch.float64)}
        return rhc.hypergradient(model, optimizer, wave_loss, [X.double()] * 3, controls=controls)

    h = looked([0.1, 0.1, 0.1])
    for t in range(2):
        up, down = ([0.1 + e * (i == t) for i in range(3)] for e in (1e-5, -1e-5))
        slope = (float(looked(up).value) - float(looked(down).value)) / 2e-5
        assert float(h.grad["lr"][t]) == pytest.approx(slope, rel=1e-5)

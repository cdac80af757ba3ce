"""The first window is replayed and compared to the bit: what differs is told, and not rewritten."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Run, Stop, classify, make_run, state_of, stop_at_step, unequal
from torch import nn

from rhc import Rewrite, Runner, RunResult, Twin
from rhc.errors import RunWarning
from rhc.events import Notice
from rhc.loop.state import Replay

STEPS = 10
ONE = Rewrite(accept=False)
"""One rewrite a window, which is kept whatever it gains."""


def fit(run: Run, **options: Any) -> RunResult:
    options = {"window": 4, "rewrite": ONE, "start": "given"} | options
    resume = options.pop("resume", "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)
        return Runner(*run, **options).fit(STEPS, resume=resume)


def accepted(result: RunResult) -> int:
    return sum(window["outcome"] == "accepted" for window in result.windows)


# Equal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("sgd", {}),
        ("adamw", {"product": "none", "stride": 3}),
        ("adamw", {"rewrite": Twin()}),
        ("adam", {"segment": 4, "product": "exact"}),
        ("sgd", {"segment": 2, "accumulate": 2, "controls": ["noise"]}),
        ("sgd", {"memory_budget": 20_000, "product": "exact"}),
    ],
    ids=["kept graphs", "sliding", "antithetic", "unrolled", "half of the graphs", "a budget"],
)
def test_an_ordinary_window_is_equal(optimizer: str, options: dict[str, Any]) -> None:
    """With dropout, BatchNorm and random batches, whatever the roll keeps."""
    result = fit(make_run(optimizer), **options)
    assert result.replay is not None and result.replay["equal"], result.replay
    assert (result.replay["start"], result.replay["stop"]) == (0, 4)
    assert not any("replay" in notice for notice in result.notices)
    assert accepted(result)


def test_it_costs_the_steps_of_one_window_and_moves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = make_run("adamw")
    checked, state = fit(run), state_of(run)

    def believed(fit: Any, window: Any, attempt: Any) -> Any:
        fit.state.replay = Replay(True, 0, 4)
        return attempt

    monkeypatch.setattr("rhc.loop.train.assert_replay", believed)
    run = make_run("adamw")
    other = fit(run)
    evaluations = checked.cost["gradient_evaluations"] - other.cost["gradient_evaluations"]
    assert evaluations == 4
    assert checked.tape == other.tape and checked.windows == other.windows
    assert unequal(state, state_of(run)) == []


def test_nothing_is_replayed_where_nothing_is_rewritten() -> None:
    result = fit(make_run("sgd"), rewrite=False)
    assert result.replay is None and result.cost["gradient_evaluations"] == STEPS


def test_the_first_window_that_is_finite_is_replayed() -> None:
    """Its roll diverges at first: what is replayed is the roll at the lower lr."""
    events: list[Any] = []
    run = make_run("adam", lr=10.0, norm=False, dropout=0.0)
    rule = Rewrite(cooldown=0.0)
    result = fit(run, window=8, rewrite=rule, listeners=[events.append])
    assert result.cost["rewound_windows"] >= 1
    assert result.replay is not None and result.replay["equal"]
    assert next(e.attempt for e in events if getattr(e, "verb", "") == "replay") >= 1


# Not equal ----------------------------------------------------------------------------------------


def counting() -> Any:
    """A counter of loss_fn's own."""
    count = [0]

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        loss, metrics = classify(model, batch)
        count[0] += 1
        return loss * (1 + 1e-3 * (count[0] % 7)), metrics

    return loss_fn


def from_the_system() -> Any:
    def loss_fn(model: nn.Module, batch: Any) -> Any:
        loss, metrics = classify(model, batch)
        return loss * (1 + 1e-3 * int.from_bytes(os.urandom(4)) / 2**32), metrics

    return loss_fn


def from_its_own_generator() -> Any:
    generator = torch.Generator()
    generator.seed()

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        loss, metrics = classify(model, batch)
        return loss + 1e-3 * torch.rand((), generator=generator) * loss.detach(), metrics

    return loss_fn


def by_the_clock() -> Any:
    def loss_fn(model: nn.Module, batch: Any) -> Any:
        loss, metrics = classify(model, batch)
        return loss * (1 + 1e-3 * (time.perf_counter_ns() % 1009) / 1009), metrics

    return loss_fn


def by_a_cache() -> Any:
    """What was seen of a batch is remembered by its content, outside of the model."""
    seen = set[float]()

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        key = float(batch[0].sum())
        loss, metrics = classify(model, batch)
        known = key in seen
        seen.add(key)
        return (loss if known else 1.01 * loss), metrics

    return loss_fn


HIDDEN: list[Callable[[], Any]] = [
    counting, from_the_system, from_its_own_generator, by_the_clock, by_a_cache,
]  # fmt: skip


@pytest.mark.parametrize("rewrite", [ONE, Twin()], ids=["a rewrite", "antithetic"])
@pytest.mark.parametrize("make", HIDDEN, ids=lambda make: make.__name__)
def test_what_the_loss_hides_is_told_and_nothing_is_rewritten(
    make: Callable[[], Any], rewrite: Rewrite
) -> None:
    events: list[Any] = []
    run = make_run("sgd", dropout=0.0)._replace(loss_fn=make())
    result = fit(run, listeners=[events.append], rewrite=rewrite)
    assert result.replay is not None and not result.replay["equal"]
    # The proof of the first hypergradient takes some steps again, which a cache has seen then.
    assert result.replay["first_step"] == 0 or make is by_a_cache
    assert result.replay["what"] == "the loss"
    assert 1e-9 < result.replay["largest"] < 0.1 and result.replay["operators"] == []
    assert result.windows == [] and len({row["lr"] for row in result.tape[:8]}) == 1
    (notice,) = [e.message for e in events if isinstance(e, Notice) and "replay" in e.message]
    assert notice in result.notices and "by no operator that torch names" in notice
    assert "--inexact-replay" in notice


@pytest.mark.parametrize("rewrite", [ONE, Twin()], ids=["a rewrite", "antithetic"])
@pytest.mark.parametrize("period", [2, 3, 4, 5, 7, 10])
def test_a_counter_in_step_with_the_window_is_seen(period: int, rewrite: Rewrite) -> None:
    """Every second call, every fifth: the window has ten steps."""
    count = [0]

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        loss, metrics = classify(model, batch)
        count[0] += 1
        return loss * (1 + 1e-3 * (count[0] % period == 0)), metrics

    run = make_run("sgd", dropout=0.0)._replace(loss_fn=loss_fn)
    result = fit(run, window=10, product="none", rewrite=rewrite)
    assert result.replay is not None and not result.replay["equal"]


def test_a_script_is_warned() -> None:
    run = make_run("sgd", dropout=0.0)._replace(loss_fn=counting())
    with pytest.warns(RunWarning, match=r"steps \[0, 4\) do not replay to the bit: the loss of"):
        Runner(*run, window=4, start="given", rewrite=Twin()).fit(4)


def test_rewritten_all_the_same_where_that_is_asked_for() -> None:
    run = make_run("sgd", dropout=0.0)._replace(loss_fn=counting())
    result = fit(run, rewrite=Twin(), inexact_replay=True)
    assert result.replay is not None and not result.replay["equal"]
    assert accepted(result) and "rewritten all the same" in " ".join(result.notices)


def test_a_difference_in_the_last_step_alone() -> None:
    """A prefix of the window would not have shown it."""
    count = [0]

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        loss, metrics = classify(model, batch)
        count[0] += model.training
        return loss * (1.1 if count[0] == 4 else 1.0), metrics

    run = make_run("sgd", dropout=0.0)._replace(loss_fn=loss_fn)
    result = fit(run, product="none", rewrite=Twin())
    assert result.replay is not None
    assert (result.replay["first_step"], result.replay["what"]) == (3, "the loss")


class Drifting(nn.Module):
    """Its buffer takes what no other part reads from a counter outside of the model."""

    def __init__(self, inner: nn.Module, count: list[int]) -> None:
        super().__init__()
        self.inner, self.count = inner, lambda: count
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.count()[0] += 1
            self.seen.fill_(float(self.count()[0]))
        return self.inner(x)


def drifting(run: Run) -> Run:
    return run._replace(model=Drifting(run.model, [0]))


def stepping_oddly(run: Run) -> Run:
    """A hook of the optimizer's that leaves its own count in the momentum of the last step."""
    count = [0]

    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        count[0] += 1
        if count[0] in (4, 8):
            last = optimizer.param_groups[0]["params"][-1]
            optimizer.state[last]["momentum_buffer"].add_(1e-3 * count[0])

    run.optimizer.register_step_post_hook(hook)
    return run


@pytest.mark.parametrize(
    ("alter", "what"),
    [
        (drifting, "buffer 'seen'"),
        (stepping_oddly, "the optimizer's ['momentum_buffer'] of '4.bias'"),
    ],
    ids=["a buffer", "the optimizer's state"],
)
def test_a_state_that_differs_where_no_loss_does(alter: Callable[[Run], Run], what: str) -> None:
    result = fit(alter(make_run("sgd", dropout=0.0)), rewrite=Twin())
    assert result.replay is not None
    assert (result.replay["what"], result.replay["first_step"]) == (what, 3)
    assert result.windows == []


def test_an_operator_is_named() -> None:
    """torch calls `put_` non-deterministic on every device."""
    count = [0]

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        loss, metrics = classify(model, batch)
        count[0] += 1
        odd = torch.zeros(2).put_(torch.tensor([0]), torch.tensor([count[0] % 7 * 1e-3]))
        return loss * (1 + odd.sum()), metrics

    result = fit(make_run("sgd", dropout=0.0)._replace(loss_fn=loss_fn), rewrite=Twin())
    assert result.replay is not None and result.replay["operators"] == ["put_"]
    (notice,) = [notice for notice in result.notices if "to the bit" in notice]
    assert "by put_" in notice and "--deterministic" in notice


# Resumed, and shown -------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [False, True], ids=["equal", "not equal"])
def test_a_resumed_run_knows_it_and_says_it_once(hidden: bool, tmp_path: Path) -> None:
    def run() -> Run:
        made = make_run("sgd", dropout=0.0)
        return made._replace(loss_fn=counting()) if hidden else made

    events: list[Any] = []
    with pytest.raises(Stop):
        fit(run(), directory=tmp_path, rewrite=Twin(), listeners=[stop_at_step(6)])
    result = fit(run(), directory=tmp_path, rewrite=Twin(), listeners=[events.append])
    assert result.replay is not None and result.replay["equal"] == (not hidden)
    assert not [
        e for e in events if getattr(e, "verb", "") == "replay" and e.attempt == 0 and hidden
    ]
    said = [e.message for e in events if isinstance(e, Notice) and "to the bit" in e.message]
    assert said == []
    assert len([n for n in result.notices if "to the bit" in n]) == hidden
    assert result.replay["stop"] == 4


class Averaging(nn.Module):
    """Follows a mean of its inputs by itself, in a buffer that the output is taken from."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("centre", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.centre.lerp_(x.detach().mean(0), 0.1)
        return self.inner(x - self.centre)


def test_what_rhc_leaves_out_is_said_once_also_after_resume(tmp_path: Path) -> None:
    def run() -> Run:
        made = make_run("sgd", dropout=0.0)
        model = Averaging(made.model)
        return made._replace(model=model)

    events: list[Any] = []
    listeners = [events.append, stop_at_step(6)]
    with pytest.raises(Stop):
        fit(run(), directory=tmp_path, listeners=listeners)
    resumed = fit(run(), directory=tmp_path, listeners=[events.append])
    whole = fit(run())
    said = [e.message for e in events if isinstance(e, Notice)]
    left_out, followed = said
    assert "centre" in left_out and followed.startswith("running statistics inner.1.running_mean")
    assert resumed.notices == whole.notices == said


def test_what_an_older_checkpoint_knows(tmp_path: Path) -> None:
    """It kept how far a first step differed: such a run is not rewritten any more."""
    from rhc.loop.checkpointing import _replay

    assert _replay({"deviation": None}, 8) is None
    found = _replay({"deviation": {"largest": 0.1, "operators": ["index_add_cuda_"]}}, 8)
    assert found is not None and not found.equal and found.operators == ("index_add_cuda_",)


RUNNER = '''
import dataclasses
import os
import torch
from torch.nn import functional as F
import rhc
from runners.sine import sine

def odd(*, seed, data):
    """The sine with a loss that draws from the system."""
    made = sine(seed=seed, data=data)
    def loss_fn(model, batch):
        found = made.loss_fn(model, batch)
        loss, metrics = found if isinstance(found, tuple) else (found, {})
        drawn = int.from_bytes(os.urandom(4)) / 2**32  # a byte comes twice too often
        return loss * (1 + 1e-3 * drawn), metrics
    return dataclasses.replace(made, loss_fn=loss_fn)
'''


def test_the_command_line_shows_it(call: Any, tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(RUNNER)
    given = ("train", tmp_path / "odd.py:odd", "--steps", 8, "--window", 4, "--start", "given")
    status, out, err = call(*given, "--directory", tmp_path / "run")
    assert status == 0, err
    assert "notice: steps [0, 4) do not replay to the bit: the loss of step 0 differs by" in out
    assert "replay    not to the bit: the loss of step 0 differs" in out
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["replay"]["equal"] is False and len(result["notices"]) >= 1
    assert result["cost"]["rejected_windows"] == 0
    _, out, _ = call("inspect", tmp_path / "run")
    assert "replay    not to the bit: the loss of step 0 differs" in out
    assert "notice    steps [0, 4) do not replay to the bit" in out
    call(*given, "--inexact-replay", "--directory", tmp_path / "asked")
    config = json.loads((tmp_path / "asked/config.json").read_text())
    assert config["inexact_replay"] is True
    _, _, err = call(*given, "--no-rewrite", "--inexact-replay")
    assert "inexact_replay is about rewriting, which --no-rewrite turns off" in err


def test_inspect_shows_it_of_a_run_that_was_stopped(call: Any, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        fit(make_run("sgd"), directory=tmp_path, listeners=[stop_at_step(6)])
    assert "replay    steps [0, 4) to the bit" in call("inspect", tmp_path)[1]

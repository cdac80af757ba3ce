"""The whole run as one window: its derivatives, its memory, its rewrites, and the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Run, make_run
from torch import nn

from rhc import Runner, Schedule
from rhc.cli.main import main
from rhc.errors import InputError
from rhc.hindsight.whole_run import DiskBatches, Episode, from_disk, improved
from rhc.loop.update_rule import Rewrite
from rhc.rng import RandomState
from rhc.training.batches import StepBatches

OWN = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from rhc import Workload


def own(*, seed=0, data=None):
    '''Dropout, BatchNorm and dictionaries.'''
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(96, 4, generator=draw)
    y = x.sin().sum(1, keepdim=True)
    train, val = TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:])
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(),
                          nn.Dropout(0.3), nn.Linear(8, 1))
    loss_fn = lambda model, batch: F.mse_loss(model(batch["x"]), batch["y"])
    collate = lambda rows: {"x": torch.stack([r[0] for r in rows]), "n": len(rows),
                            "y": torch.stack([r[1] for r in rows])}
    return Workload(model, loss_fn, DataLoader(train, 8, shuffle=True, collate_fn=collate),
                    DataLoader(val, 16, collate_fn=collate), None, steps=20, optimizer="adamw")


def endless(*, seed=0, data=None):
    workload = own(seed=seed)
    workload.val_loader = None
    return workload
"""


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[int, str, str]]:
    """Runs a command line in a folder that has own.py: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)

    def run(line: str) -> tuple[int, str, str]:
        status = main(line.split())
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def doubled(run: Run) -> Run:
    """The run in float64."""
    run.model.double()

    def cast(loader: Any) -> list[Any]:
        return [(x.double(), labels) for x, labels in loader]

    return run._replace(train=cast(run.train), val=cast(run.val))


# Derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_whole_run_is_the_windowed_engine_with_one_window(optimizer: str) -> None:
    steps, settings = 24, {"dropout": 0.0}
    run = doubled(make_run(optimizer, "list", **settings))
    runner = Runner(
        *run,
        window=steps,
        controls=("lr", "momentum"),
        start="given",
        template="constant",
        rewrite=Rewrite(cooldown=0.0),
        product="exact",
    )
    windowed = runner.fit(steps).windows[0]
    run = doubled(make_run(optimizer, "list", **settings))
    assert run.val is not None
    stream = StepBatches(run.train, isolated=True)
    episode = Episode(
        run.model,
        run.optimizer,
        run.loss_fn,
        stream.take(0, steps),
        list(run.val)[: runner.objective.count],
        average=runner.objective.average,
    )
    group = run.optimizer.param_groups[0]
    momentum = group["momentum"] if "momentum" in group else group["betas"][0]
    h = episode.differentiate(Schedule.constant(steps, lr=group["lr"], momentum=momentum))
    assert h.value == pytest.approx(windowed["objective_before"], rel=1e-12)
    for name in ("lr", "momentum"):
        expected = torch.tensor(windowed["hypergradient"][name], dtype=torch.float64)
        torch.testing.assert_close(h.grad[name], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("average", [None, 0.9])
def test_central_differences_at_sampled_steps(average: float | None) -> None:
    run = doubled(make_run("sgd", "list", dropout=0.0))
    assert run.val is not None
    steps = 30
    batches = StepBatches(run.train, isolated=True).take(0, steps)
    episode = Episode(
        run.model, run.optimizer, run.loss_fn, batches, list(run.val), 0.01, average, clip_norm=1.0
    )
    lr = torch.linspace(-2, -4, steps, dtype=torch.float64).exp()
    schedule = Schedule({"lr": lr, "momentum": torch.full((steps,), 0.8, dtype=torch.float64)})
    h = episode.differentiate(schedule)
    assert episode.value(schedule) == pytest.approx(h.value, rel=1e-12)
    for name, eps in (("lr", 1e-6), ("momentum", 1e-6)):
        for step in (0, 13, steps - 1):
            values = []
            for sign in (1, -1):
                moved = schedule[name].clone()
                moved[step] += sign * eps
                values.append(episode.value(Schedule({**schedule.values, name: moved})))
            difference = (values[0] - values[1]) / (2 * eps)
            assert float(h.grad[name][step]) == pytest.approx(difference, rel=1e-5, abs=1e-9)


def test_model_and_optimizer_are_left_at_step_0() -> None:
    run = make_run("adamw", "list")
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    assert run.val is not None
    episode = Episode(run.model, run.optimizer, run.loss_fn, list(run.train), list(run.val))
    episode.differentiate(Schedule.constant(episode.steps, lr=0.01))
    episode.value(Schedule.constant(episode.steps, lr=0.01))
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not run.optimizer.state


def test_the_disk_gives_batches_back_and_is_gone_afterwards(tmp_path: Path) -> None:
    batch = {"x": torch.arange(6.0).reshape(3, 2), "more": (torch.tensor([1, 2, 3]), "text", None)}
    with DiskBatches(tmp_path) as disk:
        handle = disk.put(0, batch, RandomState.capture())
        again = handle.batch(torch.device("cpu"))
        assert torch.equal(again["x"], batch["x"])
        assert again["more"][1:] == ("text", None)
        assert handle.batch_size == 3
        first = torch.rand(2)
        seen: list[Any] = []
        loss_fn = from_disk(lambda model, b: seen.append((b, torch.rand(2))), torch.device("cpu"))
        loss_fn(nn.Identity(), handle)
        assert torch.equal(seen[0][1], first)  # in the random state that it was put there with
        loss_fn(nn.Identity(), batch)
        assert seen[1][0] is batch
    assert not any(tmp_path.iterdir())


# Outer passes -------------------------------------------------------------------------------------


def quadratic(lr: float, steps: int) -> tuple[Episode, Schedule]:
    """θ²/2 from θ = 1, judged by itself at the end."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss_fn = lambda model, batch: 0.5 * model.weight.square().sum()  # noqa: E731
    batches = [torch.zeros(1)] * steps
    episode = Episode(model, optimizer, loss_fn, batches, [torch.zeros(1)])
    return episode, Schedule.constant(steps, lr=lr)


def test_passes_lower_j_and_are_counted() -> None:
    episode, schedule = quadratic(0.01, 12)
    told: list[int] = []
    better, done = improved(
        episode, schedule, passes=3, knots=3, tell=lambda number, outer: told.append(number)
    )
    assert told == [0, 1, 2]
    assert all(outer.accepted for outer in done)
    assert done[-1].value < done[0].before
    assert [a.value for a in done[:-1]] == [b.before for b in done[1:]]
    assert episode.value(better) == pytest.approx(done[-1].value)
    # A roll, and a product and a half or so, per pass, and a replay each.
    assert 12 * 3 * 3 <= episode.spent <= 12 * 3 * 6
    # Piecewise log-linear between three knots.
    raw = better["lr"].log()
    bends = (raw[2:] - 2 * raw[1:-1] + raw[:-2]).abs() > 1e-9
    assert int(bends.sum()) <= 2


def test_as_many_knots_as_steps_move_every_step_by_itself() -> None:
    episode, schedule = quadratic(0.3, 6)
    h = episode.differentiate(schedule)
    assert float(h.grad["lr"].abs().min()) > 0
    better, done = improved(episode, schedule, passes=1, knots=6)
    assert done[0].accepted
    assert len(better) == 6


def test_exploding_costates_are_clipped_and_still_of_use() -> None:
    episode, schedule = quadratic(5.0, 10)
    assert episode.differentiate(schedule).result.name == "exploding"
    better, done = improved(episode, schedule, passes=1, knots=1)
    assert done[0].clipped
    assert done[0].accepted
    assert done[0].value < done[0].before
    assert float(better["lr"][0]) < 5.0


def test_what_is_not_finite_ends_the_passes() -> None:
    episode, schedule = quadratic(10.0, 60)
    schedule = Schedule({"lr": torch.full((60,), 1e9, dtype=torch.float64)})
    better, done = improved(episode, schedule, passes=4, knots=1)
    assert [outer.outcome for outer in done] == ["non-finite"]
    assert better == schedule


def test_settings_that_make_no_sense() -> None:
    episode, schedule = quadratic(0.1, 6)
    with pytest.raises(InputError, match=r"knots must be in \[1, 6\]"):
        improved(episode, schedule, passes=1, knots=7)
    with pytest.raises(InputError, match="passes must be ≥ 1"):
        improved(episode, schedule, passes=0, knots=1)
    with pytest.raises(InputError, match="the objective is empty"):
        Episode(episode.model, episode.optimizer, episode.loss_fn, [torch.zeros(1)])


# The command --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how", ["--no-rewrite", "--no-rewrite --accumulate 2", "--start given --controls lr"]
)
def test_what_is_looked_back_at_is_the_run_that_was_recorded(
    call: Callable[[str], tuple[int, str, str]], how: str
) -> None:
    assert call(f"train own.py:own --steps 12 --window 6 --lr 0.01 {how} --directory a")[0] == 0
    status, out, _ = call("hypergradient a")
    assert status == 0, out
    found = json.loads(Path("a/hypergradient.json").read_text())
    assert found["format"] == "rhc.hypergradient"
    assert found["furthest_from_tape"] <= 1e-6  # kept graphs round otherwise than the plain loop
    assert "momentum" in found["grad"]
    assert len(found["grad"]["lr"]) == len(found["costate_norms"]) == found["steps"] == 12
    assert found["result"]["name"] == "successful"
    assert found["value"] == pytest.approx(
        json.loads(Path("a/result.json").read_text())["val_loss"], rel=1e-5
    )
    slope = Schedule.load("a/schedule.json")["lr"][3]
    assert found["raw_grad"]["lr"][3] == pytest.approx(found["grad"]["lr"][3] * float(slope))


def test_replays_and_smoothings_are_runs_too(
    call: Callable[[str], tuple[int, str, str]],
) -> None:
    assert call("train digits --no-rewrite --steps 20 --directory a")[0] == 0
    assert call("replay a --width 2 --batch-size 32 --seed 4 --directory b")[0] == 0
    assert call("hypergradient b --steps 10 --controls lr")[0] == 0
    found = json.loads(Path("b/hypergradient.json").read_text())
    assert found["furthest_from_tape"] <= 1e-6
    assert list(found["grad"]) == ["lr"]


def test_without_validation_data_j_is_the_mean_training_loss(
    call: Callable[[str], tuple[int, str, str]],
) -> None:
    assert call("train own.py:endless --steps 8 --no-rewrite --directory a")[0] == 0
    assert call("hypergradient a --average 0.9")[0] == 0
    found = json.loads(Path("a/hypergradient.json").read_text())
    assert found["value"] == pytest.approx(sum(found["losses"]) / 8)
    assert found["objective"]["batches"] == 0


def test_passes_end_with_a_run_by_the_better_schedule(
    call: Callable[[str], tuple[int, str, str]],
) -> None:
    assert call("train digits --no-rewrite --lr 0.01 --steps 30 --directory a")[0] == 0
    line = "hypergradient a --passes 2 --knots 3 --controls lr --output b --memory-budget 50MB"
    status, out, _ = call(line)
    assert status == 0
    assert "pass 2" in out
    result, before = (json.loads(Path(x, "result.json").read_text()) for x in "ba")
    assert result["val_loss"] < before["val_loss"]
    assert result["cost"]["plain_run_equivalents"] > 1 + 2 * 3
    assert call("hypergradient b --steps 5")[0] == 0
    status, out, _ = call("resume b")
    assert (status, "finished" in out) == (0, True)


REFUSED = (
    ("--steps 999", "has 20 committed steps, got steps 999; give --steps 20 or fewer"),
    ("--controls noise", "'noise' is 0 in this run"),
    ("--controls lrr", "unknown control 'lrr'"),
    ("--memory-budget soon", "memory_budget must be a number of bytes"),
    ("--average 1", "average must be in [0, 1)"),
    ("--passes 1 --knots 21", "knots must be in [1, 20]"),
    ("--output b", "give --passes N too"),
    ("--product nice", "product must be one of"),
)


def test_what_is_refused(call: Callable[[str], tuple[int, str, str]]) -> None:
    assert call("train sine --no-rewrite --steps 20 --directory a")[0] == 0
    for arguments, message in REFUSED:
        status, _, err = call(f"hypergradient a {arguments}")
        assert status == 2, arguments
        assert message in err
        assert len(err.strip().splitlines()) == 1


def test_directories_that_are_no_run(call: Callable[[str], tuple[int, str, str]]) -> None:
    assert "is no run: it has no config.json" in call("hypergradient nowhere")[2]
    run = make_run("sgd", "list")
    Runner(*run, rewrite=False, directory="script").fit(5)
    assert "was written by rhc.Runner in a script" in call("hypergradient script")[2]


MEASURE = """
import json, sys
from rhc.cli.main import main
assert main("train mnist --no-rewrite --template cosine --lr 0.03 --steps 2000 --directory a "
            f"--data {sys.argv[1]}".split()) == 0
assert main("hypergradient a --memory-budget 256MB --controls lr".split()) == 0
"""


@pytest.mark.slow
def test_two_thousand_steps_of_mnist_within_256_mb(tmp_path: Path) -> None:
    data = Path(os.environ.get("RHC_DATA", Path(__file__).parents[3] / "shared" / "data")) / "mnist"
    if not data.exists():
        pytest.skip(f"no MNIST in {data}")
    subprocess.run(
        [sys.executable, "-c", MEASURE, str(data)], cwd=tmp_path, check=True, timeout=900
    )
    found = json.loads((tmp_path / "a" / "hypergradient.json").read_text())
    assert found["steps"] == len(found["grad"]["lr"]) == 2000
    assert 0 < found["peak_memory_bytes"] <= 256e6
    assert found["furthest_from_tape"] <= 1e-5
    assert found["result"]["name"] in ("successful", "vanishing")

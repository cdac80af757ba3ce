"""What training rows did: derivatives against retraining, and the command that writes them."""

from __future__ import annotations

import copy
import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import PROBLEMS, relative_error
from safetensors.torch import load_file
from test_horizon import call  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer

import rhc
from rhc.hindsight.attribution import WholeRun
from rhc.hypergradient import schedule_of, steps_of
from rhc.hypergradient.halfway import Halfway, Keeper
from rhc.training.plant import Plant

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: SGD(p, 0.02, momentum=0.9),
    "adam": lambda p: Adam(p, 0.01),
}


class Regression:
    """1,000 rows, full batches, a tanh network in float64; two held-out losses."""

    def __init__(self, rows: int = 1000, steps: int = 12) -> None:
        torch.manual_seed(0)
        double = {"dtype": torch.float64}
        self.x = torch.randn(rows, 4, **double)
        self.y = self.x.sin().sum(1, keepdim=True) + 0.1 * torch.randn(rows, 1, **double)
        held_out = torch.randn(40, 4, **double)
        self.held_out = held_out, held_out.sin().sum(1, keepdim=True)
        self.batches = [torch.arange(rows)] * steps
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        ones = torch.ones(rows, **double)
        self.weights = rhc.DataWeights(rows, lambda batch: batch, values=ones)

    def loss_fn(self, model: nn.Module, rows: Tensor) -> Tensor:
        return (model(self.x[rows]) - self.y[rows]).square().mean(1)

    def targets(self) -> list[Callable[[nn.Module], Tensor]]:
        x, y = self.held_out
        return [lambda m: F.mse_loss(m(x), y), lambda m: F.mse_loss(m(x[:1]), y[:1])]

    def retrained(self, name: str, weights: Tensor) -> Tensor:
        """Both losses after a plain loop on rows of these weights."""
        model = copy.deepcopy(self.model)
        optimizer = OPTIMIZERS[name](model.parameters())
        for rows in self.batches:
            optimizer.zero_grad()
            w = weights[rows]
            ((w * self.loss_fn(model, rows)).sum() / w.sum()).backward()
            optimizer.step()
        return torch.stack([target(model).detach() for target in self.targets()])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_row_s_attribution_is_what_leaving_it_out_does(name: str) -> None:
    """Within 5 % for the 50 rows that do most: what is left is of second order, as 1/N."""
    task = Regression()
    before = copy.deepcopy(task.model.state_dict())
    optimizer = OPTIMIZERS[name](task.model.parameters())
    found = rhc.attribute(
        task.model,
        optimizer,
        task.loss_fn,
        task.batches,
        task.targets(),
        data_weights=task.weights,
    )
    assert [name for name, _ in found.results] == ["successful"] * 2
    assert found.check["data_weights"] < 1e-6
    assert all(torch.equal(v, before[n]) for n, v in task.model.state_dict().items())
    ones = torch.ones(len(task.x), dtype=torch.float64)
    middle = task.retrained(name, ones)
    torch.testing.assert_close(found.values, middle, rtol=1e-12, atol=0)
    for row in found.derivatives[0].abs().argsort(descending=True)[:50].tolist():
        without = ones.clone()
        without[row] = 0
        expected = float((task.retrained(name, without) - middle)[0])
        assert -float(found.derivatives[0, row]) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("average", [None, 0.8])
def test_several_losses_from_one_roll_are_differences_of_each(average: float | None) -> None:
    task = Regression(rows=30, steps=6)
    course = course_of(task, "adam", average)
    passes = list(course.passes(task.targets()))
    assert course.rolls == 1
    draw = torch.Generator().manual_seed(3)
    direction = torch.randn(30, generator=draw, dtype=torch.float64)

    def values(model: nn.Module) -> Tensor:
        return torch.stack([target(model).detach() for target in task.targets()])

    up, down = (course.at_end(values, 1 + sign * 1e-5 * direction) for sign in (1, -1))
    for h, expected in zip(passes, ((up - down) / 2e-5).tolist(), strict=True):
        assert float(h.grad["data_weights"] @ direction) == pytest.approx(expected, rel=1e-6)


def test_a_memory_budget_changes_nothing() -> None:
    task = Regression(rows=30, steps=200)
    expected = [h.grad["data_weights"] for h in course_of(task, "adam").passes(task.targets())]
    course = course_of(task, "adam", memory_budget=20_000)
    plans = []
    for h, own in zip(course.passes(task.targets()), expected, strict=True):
        assert relative_error(h.grad["data_weights"], own) < 1e-12
        plans.append(h.plan)
    assert all(plan.spilled or plan.chunk for plan in plans)


def course_of(
    task: Regression,
    name: str,
    average: float | None = None,
    memory_budget: int | None = None,
) -> WholeRun:
    optimizer = OPTIMIZERS[name](task.model.parameters())
    plant = Plant(task.model, optimizer, task.loss_fn, data_weights=task.weights)
    steps = steps_of(task.batches, 1)
    schedule = schedule_of(plant, {}, len(steps), 0)
    return WholeRun(plant, steps, schedule, average, "exact", memory_budget)


@pytest.mark.parametrize("stop", [1, 17])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_pass_goes_on_where_it_was_interrupted(name: str, stop: int, tmp_path: Path) -> None:
    task = Regression(rows=30, steps=20)
    (whole,) = course_of(task, name, 0.9).passes(task.targets()[:1])

    class Interrupted(Keeper):
        saved = 0

        def save(self, halfway: Halfway) -> None:
            super().save(halfway)
            self.saved += 1
            if self.saved == stop:
                raise KeyboardInterrupt

    path = tmp_path / "halfway"
    interrupted = Interrupted(path, seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        list(course_of(task, name, 0.9).passes(task.targets()[:1], [interrupted]))
    again = Interrupted(path, seconds=0.0)
    again.saved = stop  # and is not stopped again
    (found,) = course_of(task, name, 0.9).passes(task.targets()[:1], [again])
    assert again.saved == 20
    assert torch.equal(found.grad["data_weights"], whole.grad["data_weights"])
    assert torch.equal(found.costate_norms, whole.costate_norms)


def test_metasmoothness_is_1_for_a_linear_loss_and_falls_with_curvature() -> None:
    """Moving the weights of a mean moves a linear model's end point linearly in one step."""
    task = Regression(rows=40, steps=1)
    course = course_of(task, "sgd")
    parameter = next(task.model.parameters())

    def linear(model: nn.Module) -> Tensor:
        return next(model.parameters()).detach().flatten()

    smooth = course.smoothness(linear, 2)
    assert smooth.metasmoothness == pytest.approx(1.0) and math.isnan(smooth.agreement)
    start = parameter.detach().clone()
    middle = course.at_end(linear)

    def bent(model: nn.Module) -> Tensor:
        """Its lowest point is where the weights are 1: forwards it rises as backwards it falls."""
        return (linear(model) - middle).square()

    assert course.smoothness(bent, 2).metasmoothness == pytest.approx(-1.0)
    assert torch.equal(parameter, start)


# The command --------------------------------------------------------------------------------------


def attribution(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = load_file(directory / "attribution.safetensors")
    return tensors, json.loads((directory / "attribution.json").read_text())


TRAIN = "train digits --steps 24 --window 8 --lr 0.1 --seed 3 --directory run"


def test_the_command_writes_what_every_row_did(call: Any) -> None:  # noqa: F811
    assert call(TRAIN)[0] == 0
    status, out, err = call("attribute run --per-row 2 --probes 1")
    assert status == 0, err
    tensors, document = attribution(Path("run"))
    derivatives = tensors["derivatives"]
    assert derivatives.shape == (3, 1100) and document["furthest_from_tape"] == 0
    assert int(tensors["seen"].sum()) == 24 * 64
    assert not derivatives[:, tensors["seen"] == 0].any()
    # The mean over a step's rows is scaled away, so that weights may be scaled at will.
    assert float(derivatives[0].sum().abs()) < 1e-5 * float(derivatives[0].abs().sum())
    rows = list(csv.DictReader(Path("run/attribution.csv").read_text().splitlines()))
    first = [float(row["validation loss"]) for row in rows]
    assert first == sorted(first) and len(rows) == 1100
    (lowest,) = (t for t in document["targets"] if t["row"] == 1)
    best = lowest["helpful"][0]
    c = int(derivatives[2].argmin())
    assert best["cell"] == c and best["label"] == int(tensors["labels"][c])
    assert best["derivative"] == float(derivatives[2, c])
    assert f"helpful  {best['cell']:>8}" in out and "metasmoothness" in out
    assert document["smoothness"] == {
        "metasmoothness": pytest.approx(0.0, abs=1.0),
        "agreement": None,  # of three changes
        "probes": 1,
        "step": 0.5,
    }
    assert tensors["values"].tolist() == [t["value"] for t in document["targets"]]
    result = json.loads(Path("run/result.json").read_text())
    assert float(tensors["values"][0]) == pytest.approx(result["val_loss"], rel=1e-5)
    assert not list(Path("run").glob("*unfinished"))

    assert call("attribute run --cells classes --probes 0")[0] == 0
    by_class = attribution(Path("run"))[0]["derivatives"]
    expected = torch.zeros(1, 10, dtype=torch.float64)
    expected.index_add_(1, tensors["labels"].clamp(min=0), derivatives[:1])
    assert relative_error(by_class, expected) < 1e-6

    pytest.importorskip("jinja2")
    assert call("attribute run --per-row 1 --probes 0")[0] == 0 and call("report run")[0] == 0
    page = Path("run/report.html").read_text()
    assert "What training rows did" in page and "validation row 0, label" in page


def test_the_command_goes_on_where_it_was_interrupted(
    call: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert call(TRAIN)[0] == 0
    line = "attribute run --per-row 1 --probes 0"
    assert call(line)[0] == 0
    whole = Path("run/attribution.safetensors").read_bytes()
    Path("run/attribution.safetensors").unlink()
    save, saved = Keeper.save, []

    def interrupted(self: Keeper, halfway: Halfway) -> None:
        save(self, halfway)
        saved.append(halfway.k)
        if len(saved) == 30:  # in the second pass
            raise KeyboardInterrupt

    monkeypatch.setattr(Keeper, "due", lambda self: True)
    monkeypatch.setattr(Keeper, "save", interrupted)
    assert call(line)[0] == 130
    assert not Path("run/attribution.safetensors").exists()
    assert call(line)[0] == 0
    assert len(saved) == 2 * 24  # no step was taken twice
    assert Path("run/attribution.safetensors").read_bytes() == whole
    # Other settings begin anew.
    assert call(f"{line} --bounded")[0] == 0
    assert Path("run/attribution.safetensors").read_bytes() != whole


def test_batch_norm_and_dropout_and_losses_that_are_no_mean_over_rows(call: Any) -> None:  # noqa: F811
    own = Path("own.py").read_text()
    assert call("train own.py --steps 6 --window 3 --lr 0.01 --directory run")[0] == 0
    assert call("attribute run --probes 0")[0] == 0  # BatchNorm and dropout under F.mse_loss
    assert attribution(Path("run"))[0]["derivatives"].shape == (1, 64)
    assert call("attribute run --probes 1 --average 0.9 --per-row 6")[0] == 0
    tensors, document = attribution(Path("run"))
    assert tensors["derivatives"].shape == (7, 64)
    assert {t["result"] for t in document["targets"]} == {"successful"}
    assert document["smoothness"]["agreement"] > 0.9
    changed = own.replace(
        'F.mse_loss(model(batch["x"]), batch["y"])', '(model(batch["x"]) - batch["y"]).var()'
    )
    assert changed != own
    Path("own.py").write_text(changed)
    status, _, err = call("attribute run --probes 0")
    assert status == 2 and "is not the mean of its rows' losses" in err
    status, _, err = call("attribute run --cells columns")
    assert status == 2 and "cells must be rows, classes, own or FILE.py:NAME" in err


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_graphs_that_several_passes_share_are_those_of_each(name: str, optimizer: str) -> None:
    problem = PROBLEMS[name]()
    plant = Plant(
        problem.model,
        OPTIMIZERS[optimizer](problem.model.parameters()),
        lambda model, batch: torch.stack([problem.loss_fn(model, batch)]),
        data_weights=rhc.DataWeights(1, lambda batch: torch.zeros(1, dtype=torch.long)),
    )
    steps = steps_of(problem.batches(5), 1)
    schedule = schedule_of(plant, {}, len(steps), 0)
    run = WholeRun(plant, steps, schedule)

    def half(model: nn.Module) -> Tensor:
        return problem.terminal(model.eval()) / 2  # without dropout, which draws anew

    targets = [half, lambda model: 2 * half(model)] * 2
    passes = list(run.passes(targets))
    assert run.rolls == 1 and passes[0].plan.graphs == len(steps)
    for h, target in zip(passes, targets, strict=True):
        (alone,) = run.passes([target])
        assert relative_error(h.costate_norms, alone.costate_norms) < 1e-10

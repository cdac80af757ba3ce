"""Runs that weigh their data: wrong rows are found, clean ones left alone, killed runs go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rhc
from rhc.cli.main import main
from rhc.data_weights import Evidence
from rhc.events import Committed, Event

ROWS, STEPS = 400, 300


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, dict):
        batch = batch["sample"]
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def problem(noise: float, seed: int = 0) -> tuple[dict[str, Any], Tensor]:
    """A Runner's arguments, and which training labels are wrong."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(3, (ROWS + 2500,), generator=generator)
    x = torch.randn(len(y), 12, generator=generator)
    x += 3.0 * F.one_hot(y, 12)
    wrong = torch.rand(ROWS, generator=generator) < noise
    given = y.clone()
    given[:ROWS][wrong] = (y[:ROWS][wrong] + 1) % 3
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 3))
    train = rhc.indexed(TensorDataset(x[:ROWS], given[:ROWS]))
    return {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        "loss_fn": loss_fn,
        "train_loader": DataLoader(train, 40, shuffle=True),
        "val_loader": DataLoader(TensorDataset(x[ROWS:2400], y[ROWS:2400]), 50),
        "test_loader": DataLoader(TensorDataset(x[2400:], y[2400:]), 100),
        "window": 10,
        "start": "given",
    }, wrong


def test_wrong_labels_are_found_and_the_test_loss_falls() -> None:
    arguments, wrong = problem(0.4)
    with_weights = rhc.Runner(**arguments, data_weights=rhc.DataWeights(ROWS), controls=())
    result = with_weights.fit(STEPS)
    plain = rhc.Runner(**problem(0.4)[0], data_weights=rhc.DataWeights(ROWS), rewrite=False).fit(
        STEPS
    )
    assert result.data_weights is not None
    weights = result.data_weights.values
    right = weights[~wrong][:, None] > weights[wrong]
    assert float(right.float().mean()) > 0.9  # the area under the curve
    assert result.test_loss < 0.3 * plain.test_loss
    assert result.record["data_weights"]["observed"] == ROWS


def test_clean_rows_are_not_harmed() -> None:
    found = rhc.Runner(**problem(0.0)[0], data_weights=rhc.DataWeights(ROWS), controls=()).fit(
        STEPS
    )
    plain = rhc.Runner(**problem(0.0)[0], data_weights=rhc.DataWeights(ROWS), rewrite=False).fit(
        STEPS
    )
    assert found.test_loss < 1.02 * plain.test_loss


def test_what_was_committed_is_the_plain_loop_with_the_weights_of_each_window() -> None:
    runner = rhc.Runner(**problem(0.4)[0], data_weights=rhc.DataWeights(ROWS), controls=())
    seen: list[Tensor] = []
    weights = runner.plant.data_weights
    assert weights is not None

    def note(event: Event) -> None:
        if isinstance(event, Committed):
            seen.append(weights.values.clone())

    runner.listeners.append(note)
    runner.fit(60)
    moved = [not torch.equal(a, b) for a, b in zip(seen[1:], seen, strict=False)]
    assert any(moved)


class Stop(Exception):
    pass


@pytest.mark.parametrize("controls", [(), ("lr",)])
def test_a_run_that_was_stopped_ends_the_same(tmp_path: Path, controls: tuple[str, ...]) -> None:
    def made(directory: Path) -> rhc.Runner:
        arguments = problem(0.4)[0]
        weights = rhc.DataWeights(ROWS)
        return rhc.Runner(**arguments, data_weights=weights, controls=controls, directory=directory)

    whole = made(tmp_path / "whole").fit(100)
    runner = made(tmp_path / "stopped")

    def stop(event: Event) -> None:
        if isinstance(event, Committed) and event.stop == 70:
            raise Stop

    runner.listeners.append(stop)
    with pytest.raises(Stop):
        runner.fit(100)
    again = made(tmp_path / "stopped").fit(100)
    assert whole.data_weights is not None and again.data_weights is not None
    assert torch.equal(whole.data_weights.values, again.data_weights.values)
    assert float(whole.data_weights.values.std()) > 0.05
    assert whole.tape == again.tape
    saved = rhc.DataWeights.load(tmp_path / "stopped" / "weights.safetensors")
    assert torch.allclose(saved.values, whole.data_weights.values, rtol=1e-6)


def test_another_number_of_cells_is_another_run(tmp_path: Path) -> None:
    arguments = problem(0.4)[0]
    rhc.Runner(**arguments, data_weights=rhc.DataWeights(ROWS), directory=tmp_path).fit(20)
    other = rhc.Runner(
        **problem(0.4)[0], data_weights=rhc.DataWeights(ROWS + 1), directory=tmp_path
    )
    with pytest.raises(rhc.InputError, match="weighed"):
        other.fit(40)


def test_a_scalar_loss_is_refused_before_anything_is_trained() -> None:
    arguments = problem(0.4)[0]
    arguments["loss_fn"] = lambda model, batch: loss_fn(model, batch).mean()
    runner = rhc.Runner(**arguments, data_weights=rhc.DataWeights(ROWS))
    before = [p.detach().clone() for p in arguments["model"].parameters()]
    with pytest.raises(rhc.InputError, match="one loss per row"):
        runner.fit(20)
    after = arguments["model"].parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_weights_move_by_what_repeats_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    signal, noise = Evidence(200), Evidence(200)
    sign = torch.randn(200, generator=generator)
    for _ in range(10):
        drawn = torch.randn(200, generator=generator)
        for evidence, slopes in ((signal, sign + 0.3 * drawn), (noise, drawn)):
            seen = evidence.observe(slopes, torch.ones(200))
            assert seen is not None
            evidence.take(seen)
    assert signal.share > 0.8
    assert noise.share < 0.1
    assert Evidence(3).observe(torch.zeros(3), torch.ones(3)) is None


def test_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(
        """
import torch
import rhc
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

def loss_fn(model, batch):
    x, y = batch["sample"] if isinstance(batch, dict) else batch
    return F.cross_entropy(model(x), y, reduction="none")

def own(*, seed=0, data=None):
    x, y = torch.randn(60, 4), torch.randint(3, (60,))
    train = DataLoader(rhc.indexed(TensorDataset(x, y)), 20, shuffle=True)
    held_out = DataLoader(TensorDataset(x, y), 20)
    weights = None if seed else rhc.DataWeights(60)
    return rhc.Workload(torch.nn.Linear(4, 3), loss_fn, train, held_out, data_weights=weights)
"""
    )
    own, run = str(tmp_path / "own.py"), str(tmp_path / "run")
    common = ["train", own, "--steps", "30", "--window", "6", "--start", "given"]
    assert main([*common, "--data-weights", "--directory", run]) == 0
    assert main(["weights", run, "--lowest", "3", "-o", str(tmp_path / "all.csv")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert any(line.startswith("60 cells: weights ") for line in shown)
    rows = [line.split(",") for line in (tmp_path / "all.csv").read_text().splitlines()]
    assert rows[0] == ["cell", "weight", "windows", "slope"] and len(rows) == 61
    values = [float(row[1]) for row in rows[1:]]
    assert values == sorted(values) and values[0] < 1 < values[-1]
    assert shown[-3].split()[:2] == [rows[1][0], f"{values[0]:.4g}"]
    # Without the flag rows are averaged alike; and what has none is told.
    assert main([*common, "--directory", str(tmp_path / "plain")]) == 0
    assert not (tmp_path / "plain" / "weights.safetensors").exists()
    assert main(["hypergradient", str(tmp_path / "plain"), "--trust"]) == 0
    rows = str(tmp_path / "rows")
    compared = ["--methods", "constant", "--lrs", "0.1", "--steps", "10", "--seeds", "0-0"]
    assert main(["compare", own, *compared, "-o", rows]) == 0
    assert main([*common, "--seed", "1", "--data-weights"]) == 2
    assert "has no data weights" in capsys.readouterr().err


def noisy_held_out(**options: Any) -> rhc.RunResult:
    """A run whose held-out labels are as wrong as the training ones."""
    arguments, _ = problem(0.4)
    x, y = arguments["val_loader"].dataset.tensors
    generator = torch.Generator().manual_seed(5)
    wrong = torch.rand(len(y), generator=generator) < 0.4
    given = torch.where(wrong, (y + 1) % 3, y)
    arguments["val_loader"] = DataLoader(TensorDataset(x, given), 50)
    weights = rhc.DataWeights(ROWS)
    return rhc.Runner(**arguments, data_weights=weights, controls=(), **options).fit(STEPS)


def test_without_a_clean_row_a_bounded_objective_finds_what_is_wrong() -> None:
    assert torch.allclose(rhc.bounded(-torch.tensor([0.25, 1.0]).log()), torch.tensor([0.75, 0.0]))
    _, wrong = problem(0.4)
    found = noisy_held_out(objective=rhc.Objective(rows=rhc.bounded))
    assert found.data_weights is not None
    weights = found.data_weights.values
    right = weights[~wrong][:, None] > weights[wrong]
    assert float(right.float().mean()) > 0.85  # the area under the curve
    assert any("judged by bounded losses" in told for told in found.notices)
    plain = noisy_held_out(rewrite=False)
    assert found.test_loss is not None and plain.test_loss is not None
    assert found.test_loss < 0.7 * plain.test_loss


def test_weights_are_not_judged_by_what_they_weigh() -> None:
    arguments = problem(0.4)[0]
    found = rhc.Runner(**{**arguments, "start": "probe"}, data_weights=rhc.DataWeights(ROWS))
    assert found.objective.loss_weight == 0
    told = rhc.Runner(**arguments, data_weights=rhc.DataWeights(ROWS)).fit(20).notices
    assert any("judged by the losses of held-out rows as they are" in each for each in told)
    for options in ({"val_loader": None}, {"objective": rhc.Objective(1.0, terminal_weight=0.0)}):
        runner = rhc.Runner(**{**arguments, **options}, data_weights=rhc.DataWeights(ROWS))
        with pytest.raises(rhc.InputError, match="give a val_loader"):
            runner.fit(20)
    terms = rhc.Runner(
        **{**arguments, "loss_fn": lambda model, batch: {"a": loss_fn(model, batch)}},
        objective=rhc.Objective(rows=rhc.bounded),
        data_weights=rhc.DataWeights(["a"]),
    )
    with pytest.raises(rhc.InputError, match="one loss per held-out row"):
        terms.fit(20)

"""The course of few cells' weights over a run: found, kept in files, followed, stretched."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rhc
from rhc.cli.main import main
from rhc.data_weights import Course, Evidence
from rhc.data_weights.update_rule import agreed
from rhc.events import Committed, Event

NAMES = ["clean", "half", "wrong"]


def source_of(batch: Any) -> Tensor:
    return batch["index"] // 200


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch["sample"] if isinstance(batch, dict) else batch
    return F.cross_entropy(model(x), y, reduction="none")


def problem(wrong: tuple[float, ...] = (0.0, 0.5, 1.0), **more: Any) -> rhc.Runner:
    """A Runner on three sources of 200 rows, these shares of whose labels are wrong."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(3, (2600,), generator=generator)
    x = torch.randn(2600, 12, generator=generator) + 3.0 * F.one_hot(y, 12)
    given = y[:600].clone()
    share = torch.tensor(wrong).repeat_interleave(200)
    bad = torch.rand(600, generator=generator) < share
    given[bad] = (given[bad] + 1) % 3
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 3))
    weights = more.pop("data_weights", None) or rhc.DataWeights(NAMES, source_of)
    return rhc.Runner(
        model,
        torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        loss_fn,
        DataLoader(rhc.indexed(TensorDataset(x[:600], given)), 40, shuffle=True),
        DataLoader(TensorDataset(x[600:1600], y[600:1600]), 50),
        test_loader=DataLoader(TensorDataset(x[1600:], y[1600:]), 100),
        window=20,
        start="given",
        data_weights=weights,
        **{"controls": (), **more},
    )


def test_a_course_is_held_from_change_to_change_and_stretched() -> None:
    course = Course(100, (0, 40, 60), torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 4.0]]))
    assert [float(course.at(t)[1]) for t in (0, 39, 40, 60, 99)] == [1, 1, 2, 4, 4]
    longer = course.stretched(200)
    assert (len(longer), longer.since) == (200, (0, 80, 120))
    shorter = course.stretched(4)
    assert shorter.since == (0, 1, 2) and torch.equal(shorter.last, course.last)
    assert course.changes(30, 50) == [30, 40]
    assert course.csv(["a", "b"]).splitlines() == ["step,a,b", "0,1,1", "40,1,2", "60,1,4"]


@pytest.mark.parametrize(
    ("since", "values", "says"),
    [
        ((0, 5), torch.ones(2, 3) * -1, "must be positive"),
        ((0, 5), torch.ones(3, 3), r"must be positive, \(2, cells\)"),
        ((1, 5), torch.ones(2, 3), "must rise from 0"),
        ((0, 10), torch.ones(2, 3), "to below 10"),
    ],
)
def test_what_is_no_course_is_refused(since: Any, values: Tensor, says: str) -> None:
    with pytest.raises(rhc.InputError, match=says):
        Course(10, since, values)


def test_weights_follow_the_course_by_step_and_move_as_a_whole() -> None:
    course = Course(9, (0, 5), torch.tensor([[1.0, 2.0], [3.0, 1.0]]))
    weights = rhc.DataWeights(2, lambda batch: batch, course=course)
    cells = torch.tensor([0, 1])
    assert weights.at(cells, 0).tolist() == [1, 2] and weights.at(cells, 8).tolist() == [3, 1]
    assert weights.values.tolist() == pytest.approx([1.5, 0.5])
    weights.move(cells, torch.tensor([0.0, 1.0]))
    assert weights.at(cells, 0).tolist() == pytest.approx([1, 2 * torch.e], rel=1e-6)
    losses = torch.tensor([1.0, 4.0])
    weights = rhc.DataWeights(2, lambda batch: batch, course=course)
    assert float(weights.weigh(losses, cells, step=0)) == pytest.approx((1 + 2 * 4) / 3)
    assert float(weights.weigh(losses, cells)) == pytest.approx((3 + 4) / 4)
    with pytest.raises(rhc.InputError, match="the course has 2 cells, and there are 3"):
        rhc.DataWeights(3, course=course)


def test_the_derivative_by_cell_follows_the_course() -> None:
    """dJ/dw of the last weights, at which the whole course hangs, and its parts by step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    batches = [
        (torch.randn(6, 4).double(), torch.randint(2, (6,)), torch.tensor([0, 0, 1, 1, 2, 2]))
        for _ in range(4)
    ]
    rows = torch.rand(2, 3).double() + 0.5
    course = Course(4, (0, 2), rows)

    def rows_of_loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def found(course: Course) -> Any:
        return rhc.hypergradient(
            model,
            torch.optim.SGD(model.parameters(), 0.3, momentum=0.9),
            rows_of_loss,
            batches,
            controls={},
            data_weights=rhc.DataWeights(3, lambda b: b[2], course=course, values=rows[-1]),
            terminal=lambda m: m(batches[0][0]).square().mean(),
        )

    h, eps = found(course), 1e-6
    assert h.cells_by_step.shape == (4, 3)
    assert torch.allclose(h.cells_by_step.sum(0), h.grad["data_weights"])
    for cell in range(3):
        ahead, behind = rows.clone(), rows.clone()
        ahead[:, cell] *= 1 + eps
        behind[:, cell] *= 1 - eps
        up, down = found(Course(4, (0, 2), ahead)), found(Course(4, (0, 2), behind))
        by_log = (up.value - down.value) / (2 * eps)
        assert float(h.grad["data_weights"][cell] * rows[-1, cell]) == pytest.approx(
            by_log, rel=1e-5, abs=1e-9
        )


def test_what_the_steps_of_a_window_agree_on() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50, 3, generator=generator).double()
    slopes = noise - noise.mean(0) + torch.tensor([5.0, -5.0, 0.1])
    first, second, third = agreed(slopes).tolist()
    assert 0.9 < first < 1 and -1 < second < -0.9 and third == 0
    assert agreed(torch.zeros(5, 2).double()).tolist() == [0, 0]


def test_wrong_sources_fade_and_clean_ones_stay() -> None:
    steered, plain = problem().fit(300), problem(rewrite=False).fit(300)
    assert steered.data_weights is not None
    clean, half, wrong = steered.data_weights.values.tolist()
    assert clean > 4 * half > 8 * wrong
    assert steered.test_loss is not None and plain.test_loss is not None
    assert steered.test_loss < 0.5 * plain.test_loss
    found = problem((0.0, 0.0, 0.0)).fit(300).data_weights
    assert found is not None
    assert float(found.values.min()) > 0.6


def test_the_course_is_in_the_result_in_files_and_followed(tmp_path: Path) -> None:
    committed: dict[int, Tensor] = {}
    runner = problem(directory=tmp_path / "found")

    def note(event: Event) -> None:
        if isinstance(event, Committed):
            assert runner.plant.data_weights is not None
            committed[event.start] = runner.plant.data_weights.raw.clone()

    runner.listeners.append(note)
    weights = runner.fit(100).data_weights
    assert weights is not None and weights.course is not None
    assert len(weights.course) == 100 and len(weights.course.since) > 3
    for start, raw in committed.items():
        assert torch.equal(weights.course.at(start + 3), raw)
    path = tmp_path / "found" / "weights.safetensors"
    again = rhc.DataWeights.load(path, source_of)
    assert again.course is not None and again.course.digest() == weights.course.digest()

    seen: list[Tensor] = []
    following = problem(data_weights=again, rewrite=False, directory=tmp_path / "followed")
    loss = following.plant.loss_fn

    def watched(model: nn.Module, batch: Any) -> Any:
        seen.append(getattr(batch, "along", torch.zeros(0)))
        return loss(model, batch)

    following.plant.loss_fn = watched
    result = following.fit(100)
    assert result.data_weights is again  # not moved
    steps = [along for along in seen if along is not None and len(along)]
    assert len(steps) == 100 and float(steps[0].std()) > 0.1 and float(steps[-1].std()) == 0
    with pytest.raises(rhc.InputError, match=r"has 100 steps, fewer than the run's 120"):
        problem(data_weights=again, rewrite=False).fit(120)
    problem(data_weights=again.stretched(120), rewrite=False).fit(120)
    # A run that was ended and goes on does so without a warning of other data.
    more = problem(data_weights=again.stretched(140), rewrite=False, directory=tmp_path / "two")
    more.fit(60)
    on = problem(data_weights=again.stretched(140), rewrite=False, directory=tmp_path / "two")
    assert not any("other code or data" in told for told in on.fit(140).notices)

    course = path.with_suffix(".course.safetensors")
    course.write_bytes(course.read_bytes()[:-1] + b"x")
    with pytest.raises(rhc.InputError, match=r"weights\.course\.safetensors is not the file"):
        rhc.DataWeights.load(path)


def test_a_run_begins_from_anothers_course_and_moves_it() -> None:
    course = Course(100, (0, 50), torch.tensor([[1.0, 1.0, 1.0], [8.0, 1.0, 0.1]]))
    weights = rhc.DataWeights(NAMES, source_of, course=course)
    found = problem(data_weights=weights).fit(100).data_weights
    assert found is not None and found.course is not None
    assert {0, 20, 40, 60} & set(found.course.since) and 50 in found.course.since
    assert float(found.course.at(0)[2]) < 1 and float(found.course.last[2]) < 0.1


class Stop(Exception):
    pass


def test_a_stopped_run_ends_with_the_same_course(tmp_path: Path) -> None:
    whole = problem(directory=tmp_path / "whole").fit(100).data_weights
    runner = problem(directory=tmp_path / "stopped")

    def stop(event: Event) -> None:
        if isinstance(event, Committed) and event.stop == 60:
            raise Stop

    runner.listeners.append(stop)
    with pytest.raises(Stop):
        runner.fit(100)
    again = problem(directory=tmp_path / "stopped").fit(100).data_weights
    assert whole is not None and again is not None
    assert whole.course is not None and again.course is not None
    assert whole.course.digest() == again.course.digest()


def test_many_cells_have_no_course() -> None:
    evidence = Evidence(300)
    evidence.note({0: torch.ones(300)})
    assert evidence.course(10) is None


def test_a_frozen_cell_is_trained_on_as_it_is() -> None:
    """Also in the replays that moved weights are judged by."""
    weights = rhc.DataWeights(NAMES, source_of, frozen=[0])
    runner = problem(data_weights=weights)
    loss, seen = runner.plant.loss_fn, list[Tensor]()

    def watched(model: nn.Module, batch: Any) -> Any:
        verified = runner.state.step > 0  # the first window's hypergradient is, by moving all cells
        if verified and hasattr(batch, "cells") and len(set(batch.cells.tolist())) == 3:
            one = [float(batch.weights[batch.cells == c][0].detach()) for c in range(3)]
            seen.append((torch.tensor(one) / batch.scale).detach())
        return loss(model, batch)

    runner.plant.loss_fn = watched
    runner.fit(60)
    found = torch.stack(seen)
    assert torch.allclose(found[:, 0], torch.ones(len(found)), rtol=1e-5)
    assert float(found[:, 2].min()) < 0.9


OWN = """
import torch
import rhc
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

def loss_fn(model, batch):
    x, y = batch["sample"] if isinstance(batch, dict) else batch
    return F.cross_entropy(model(x), y, reduction="none")

def own(*, seed=0, data=None, wrong: float = 0.0):
    g = torch.Generator().manual_seed(3)
    y = torch.randint(3, (600,), generator=g)
    x = torch.randn(600, 6, generator=g) + 2 * F.one_hot(y, 3).repeat(1, 2)
    given = y.clone()
    bad = (torch.rand(600, generator=g) < wrong) & (torch.arange(600) < 100)
    given[bad] = (y[bad] + 1) % 3
    train = DataLoader(rhc.indexed(TensorDataset(x[:200], given[:200])), 20, shuffle=True)
    held_out = DataLoader(TensorDataset(x[200:], y[200:]), 50)
    weights = rhc.DataWeights(["wrong", "clean"], lambda batch: batch["index"] // 100)
    model = torch.nn.Linear(6, 3)
    return rhc.Workload(model, loss_fn, train, held_out, steps=60, data_weights=weights)
"""


def test_a_course_at_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    common = ["--window", "10", "--start", "given", "--lr", "0.1", "--wrong", "0.9"]
    assert main(["train", "own.py", *common, "--data-weights", "--directory", "run"]) == 0
    assert json.loads(Path("run/config.json").read_text())["options"] == ["wrong=0.9"]
    assert main(["weights", "run", "--course", "course.csv"]) == 0
    lines = [line.split(",") for line in Path("course.csv").read_text().splitlines()]
    assert lines[0] == ["step", "wrong", "clean"] and len(lines) > 3
    last = dict(zip(lines[0], map(float, lines[-1]), strict=True))
    assert last["wrong"] < 0.5 * last["clean"]

    found = json.loads(Path("run/result.json").read_text())["data_weights"]
    assert found["names"] == ["wrong", "clean"] and len(found["course"]) == len(found["since"])
    assert main(["report", "run"]) == 0
    page = Path("run/report.html").read_text()
    assert "Data weights" in page and "The course of the data weights" in page

    # A replay follows the course, stretched with the schedule, and goes on without its source.
    capsys.readouterr()
    assert main(["replay", "run", "--seed", "3", "--directory", "again"]) == 0
    assert "by their course over the steps" in capsys.readouterr().out
    found = [rhc.DataWeights.load(f"{name}/weights.safetensors") for name in ("run", "again")]
    assert found[0].course is not None and found[1].course is not None
    assert found[0].course.digest() == found[1].course.digest()
    stretched = ["--steps", "30", "--stretch", "--directory", "half"]
    assert main(["replay", "run", *stretched]) == 0
    half = rhc.DataWeights.load("half/weights.safetensors").course
    assert half is not None and len(half) == 30
    assert half.since == found[0].course.stretched(30).since

    # The whole run is differentiated as it was, by its weights too.
    assert main(["hypergradient", "run"]) == 0
    document = json.loads(Path("run/hypergradient.json").read_text())
    assert document["furthest_from_tape"] < 1e-6  # other kernels
    weighed = document["data_weights"]
    assert len(weighed["log_grad"]) == 2 and len(weighed["log_grad_by_step"]) == 60
    assert sum(row[0] for row in weighed["log_grad_by_step"]) == pytest.approx(
        weighed["log_grad"][0]
    )

    # Another run begins with them, and moves them on.
    assert main(["train", "own.py", *common, "--data-weights", "run", "--directory", "on"]) == 0
    on = rhc.DataWeights.load("on/weights.safetensors")
    assert float(on.values[0]) < float(found[0].values[0])
    Path("run/weights.safetensors").unlink()
    assert main(["resume", "again"]) == 0
    capsys.readouterr()
    for words, says in (
        (["train", "own.py", "--foo", "3"], "unknown flag --foo"),
        (["train", "own.py", "--wrong", "much"], "option wrong of run .* must be like 0.0"),
        (["train", "own.py", "--options", "wrung=1"], "has no option 'wrung'; it has: wrong"),
        (["train", "--data-weights", "own.py"], "weights.safetensors, or such a file"),
        (["train", "own.py", "--no-rewrite", "--data-weights"], "learned by rewriting"),
        (["replay", "again", "--steps", "90"], "has 60 steps"),
    ):
        assert main(words) == 2
        assert re.search(says, capsys.readouterr().err)

"""Comparisons: what is run, how it is counted, and the statistics."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from rhc.cli.main import main
from rhc.compare import pool as comparison
from rhc.compare import runs as comparing
from rhc.compare.methods import ABLATIONS, METHODS, Driver, cells, method_of
from rhc.compare.pool import WorkerPool, parsed_seeds
from rhc.compare.runs import Row, Task, run, running_means
from rhc.compare.statistics import interval, share_of_gain, summarise, tuned
from rhc.errors import InputError
from rhc.hindsight.distill import Example, form_of, lesson
from rhc.hindsight.policy import fitted
from rhc.report.records import read_run, runs_in
from rhc.schedule import Schedule
from rhc.workload import Goal, optimizer_of

PACKAGES = {"schedule-free": "schedulefree", "prodigy": "prodigyopt"}

RUNNER = """
import torch
from torch import nn
from rhc.workload import Workload


def make(*, seed=0, data=None):
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(seed))
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]])
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)]
    first, last = nn.Linear(3, 8), nn.Linear(8, 1)
    return Workload(
        nn.Sequential(first, nn.Tanh(), last),
        lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        batches,
        batches[:2],
        batches[2:4],
        steps=30,
        lr={"sgd": 0.05},
        parameter_groups=[
            {"params": list(first.parameters()), "ratio": 1.0},
            {"params": list(last.parameters()), "ratio": 0.1},
        ],
        threads=1,
    )
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    monkeypatch.chdir(tmp_path)  # the default directory lies below the current folder
    path = tmp_path / "small.py"
    path.write_text(RUNNER)
    return Task(f"{path}:make")


TABLES = Path(__file__).parents[2] / "benchmarks" / "methods.py"

USUAL = tuple(METHODS)
"""As they are before a test imports a file that adds its own."""

OF_TABLES = [f"{TABLES}:{n}" for n in ("template-race", "lars-cosine", "no-average", "planner-all")]
"""Methods of a file."""


@pytest.mark.parametrize("name", [*USUAL, *OF_TABLES], ids=lambda name: Path(name).name)
def test_every_method_runs_and_says_what_it_cost(task: Task, name: str, tmp_path: Path) -> None:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    method = method_of(name)
    lr = 0.05 if method.needs_lr else None
    if method.replays or method.distilled:
        task = replace(task, schedule=tmp_path / "s.json", policy=tmp_path / "p")
        decays = Schedule({"lr": torch.linspace(0.1, 0.001, 40)})
        decays.save(tmp_path / "s.json")
        example = Example("a run", [{"loss": 1 / (1 + t)} for t in range(40)], decays)
        form = form_of([example], None, gradient_norm=False)
        fitted("laws", form, 10, [lesson(example, form, 10, known=True)]).save(tmp_path / "p")
    row = run(task, name, lr, 0)
    assert (row.method, row.lr, row.seed) == (name, lr, 0)
    assert math.isfinite(row.score) and row.score == row.test_loss
    settings = method.settings
    plain = settings.get("rewrite") is False and settings["start"] == "given"
    assert row.curve[-1][0] == 30 and math.isfinite(row.curve[-1][1] or math.nan)
    driven = method.drives is not None or method.distilled
    assert set(row.course) >= {"lr"} or driven
    if len(method.trials) > 1 and plain:
        assert row.cost == pytest.approx(len(method.trials))
    elif len(method.trials) > 1:
        assert row.cost > len(method.trials)
    elif method.smooths:
        assert row.cost == method.smooths + 1
    elif method.plans is not None:
        assert 1 <= row.cost < 1.1  # epochs are judged on held-out data
    elif plain or driven:
        assert row.cost == 1
    else:
        assert row.cost > 1


def gains(**scores: list[float]) -> list[Row]:
    """Rows of methods on seeds from 100 on."""
    return [
        Row(name, 0.1, 100 + i, score=x, test_loss=x, test_accuracy=None, average_test_loss=None,
            validation=x, cost=1.0)
        for name, column in scores.items()
        for i, x in enumerate(column)
    ]  # fmt: skip


def test_the_share_of_a_gain_that_is_kept() -> None:
    rows = gains(constant=[1.0, 1.2, 1.1], smooth=[0.5, 0.7, 0.6], replay=[0.6, 0.8, 0.7])
    assert share_of_gain(rows, "constant", "smooth", "replay") == (
        "replay keeps 80 % [80, 80] of what smooth gains over constant (0.5000), 3 seeds"
    )
    rows = gains(constant=[1.0, 1.0], smooth=[1.1, 1.0], replay=[0.6, 0.8])
    assert "gains nothing" in share_of_gain(rows, "constant", "smooth", "replay")
    rows = gains(constant=[1.0, math.inf], smooth=[0.5, 0.5], replay=[0.6, 0.8])
    assert "no seed has finite" in share_of_gain(rows, "constant", "smooth", "replay")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--methods replay", "method replay follows a schedule; give --schedule"),
        ("--methods distilled", "method distilled needs a policy; give --policy"),
        ("--methods cosine --schedule x", "--schedule is for the method replay"),
        ("--methods cosine --policy x", "--policy is for the method distilled"),
        ("--methods replay --schedule nowhere", "cannot read schedule nowhere"),
        ("--methods cosine --width 0", "width must be ≥ 1, got 0"),
        ("--methods smooth constant --oracle constant", "oracle and versus are both constant"),
        ("--methods cosine --oracle wise", "unknown method 'wise'"),
    ],
)
def test_files_and_sizes_that_a_comparison_refuses(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert main(["compare", "sine", *arguments.split(), "--steps", "5"]) == 2
    assert message in capsys.readouterr().err


def test_a_race_pays_for_its_start_once(task: Task) -> None:
    alone = run(task, "zero-probe-cosine", None, 0)
    race = run(task, f"{TABLES}:template-race", None, 0)
    assert race.cost == pytest.approx(alone.cost + 2, abs=0.02)  # validations
    assert race.validation <= alone.validation


def test_the_same_seed_gives_the_same_row_and_another_one_another(task: Task) -> None:
    one, same, other = (run(task, "cosine", 0.05, seed) for seed in (0, 0, 1))
    assert one == same and one.score != other.score


def test_a_run_that_diverges_is_a_row(task: Task) -> None:
    row = run(task, "constant", 10.0, 0)
    assert row.score == math.inf and row.cost >= 1
    assert summarise([row])[0].interval == (-math.inf, math.inf)


def test_lars_and_the_oracle_set_the_ratio_of_the_groups(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[float]] = []
    usual = comparing.optimizer_of

    def optimizer_of(name: str, groups: Any, lr: float) -> torch.optim.Optimizer:
        optimizer = usual(name, groups, lr)
        made.append([g["lr"] for g in optimizer.param_groups])
        return optimizer

    monkeypatch.setattr(comparing, "optimizer_of", optimizer_of)
    run(task, f"{TABLES}:oracle-cosine", 0.05, 0)
    assert made[-1] == pytest.approx([0.05, 0.005])
    run(task, f"{TABLES}:lars-cosine", None, 0)
    workload = task.workload(0)
    workload.loss_fn(workload.model, next(iter(workload.train_loader))).backward()
    ratios = []
    for layer in (m for m in workload.model.modules() if isinstance(m, nn.Linear)):
        weights, slopes = (
            torch.cat([t.flatten() for t in tensors])
            for tensors in (
                [p.detach() for p in layer.parameters()],
                [p.grad for p in layer.parameters() if p.grad is not None],
            )
        )
        ratios.append(float(weights.norm() / slopes.norm()))
    expected = [0.05 * ratio / max(ratios) for ratio in ratios]
    assert made[-1] == pytest.approx(expected, rel=1e-5)


def test_tracking_is_what_methods_are_compared_by_where_there_is_one(tmp_path: Path) -> None:
    row = run(Task("drifting_sine", steps=30), "constant", 0.01, 0)
    assert row.test_loss is not None and row.score != row.test_loss and row.score < 2


def test_methods_without_an_lr_run_once_per_seed() -> None:
    assert list(cells(["zero-probe-cosine", "cosine"], [0.01, 0.1], [3, 4])) == [
        ("zero-probe-cosine", None, 3),
        ("zero-probe-cosine", None, 4),
        *(("cosine", lr, seed) for lr in (0.01, 0.1) for seed in (3, 4)),
    ]
    with pytest.raises(InputError, match="unknown method 'cosin'"):
        list(cells(["cosin"], [], [0]))


def test_differences_are_paired_with_the_reference_at_its_best_lr() -> None:
    row = Row("a", None, 0, 0.0, None, None, None, 0.0, 1.0)
    noise = [0.0, 10.0, -5.0, 3.0]
    rows = [
        *(replace(row, seed=s, score=n + 1 + 0.01 * s) for s, n in enumerate(noise)),
        *(replace(row, method="b", lr=0.1, seed=s, score=n) for s, n in enumerate(noise)),
        *(replace(row, method="b", lr=1.0, seed=s, score=n + 7) for s, n in enumerate(noise)),
    ]
    a, best, worse = summarise(rows, "b")
    assert best.apart is None and best.score == 2 and best.cost == 1
    assert a.apart is not None and a.apart[0] == pytest.approx(1.015)
    # Seeds differ by 15, the methods by 1: only pairing shows it.
    assert 1 < a.apart[1] < a.apart[2] < 1.03 and a.interval[0] < 0
    assert worse.apart == pytest.approx((7, 7, 7))


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(1).normal(2.0, 1.0, (200, 10))
    inside = sum(low <= 2.0 <= high for low, high in map(interval, draws.tolist()))
    assert 0.85 <= inside / 200 <= 0.97  # the percentile bootstrap of 10 values is a little narrow


@pytest.mark.parametrize(("text", "seeds"), [("3", [100, 101, 102]), ("0-1", [0, 1]), ("7-7", [7])])
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parsed_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "x", "3-", "-3", "0", "5-4"])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="seeds must be"):
        parsed_seeds(text)


def test_the_command(task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.json"
    words = f"compare {task.run} --methods zero-probe-cosine cosine --lrs 0.05 --seeds 2"
    assert main([*words.split(), "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "zero-probe-cosine seed 100:" in shown and "cosine lr 0.05 seed 101:" in shown
    assert "bootstrap over 2 seeds" in " ".join(shown.split())
    assert max(map(len, shown.splitlines())) <= 80
    (line,) = [x for x in shown.splitlines() if x.startswith("zero-probe-cosine ") and "…" in x]
    assert len(line.split()) == 6 and line.count("…") == 2  # nothing is cut off
    document = json.loads(output.read_text())
    assert document["versus"] == "cosine" and len(document["rows"]) == 4
    assert [line["method"] for line in document["lines"]] == ["zero-probe-cosine", "cosine"]
    reference = document["lines"][1]
    assert 1 <= reference["reached"] <= reference["seeds"] == 2 and reference["steps"] <= 30
    assert reference["gradient_evaluations"] == 30
    assert json.loads((tmp_path / "runs/compare-make/comparison.json").read_text()) == document


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--methods cosin", "unknown method 'cosin'"),
        ("--versus cosin", "unknown method 'cosin'"),
        ("--seeds many", "seeds must be"),
        ("--steps 0", "steps must be"),
        ("--output no/folder.json", "make no first"),
        ("--data nowhere", "data nowhere does not exist"),
        ("--lrs 100", "lr must be"),
        ("--jobs 0", "jobs must be"),
        ("--tune 100-101", "seeds in common"),
        ("--target nan", "target must be"),
        ("--directory small.py", "small.py is a file"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_sentence(
    task: Task, capsys: pytest.CaptureFixture[str], flags: str, part: str
) -> None:
    assert main(["compare", task.run, "--methods", "cosine", *flags.split()]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and part in said.err


def test_a_scheduler_in_a_plain_loop_trains_as_that_loop_does(task: Task) -> None:
    """A law that never moves is the constant lr, on the same batches in the same order."""
    still = replace(
        METHODS["adaptive"],
        drives=lambda workload, name, parameters, lr, steps: Driver(
            optimizer_of(name, parameters, lr)
        ),
    )
    row = comparing._driven(task, still, 0.05, 3).fields
    constant = run(task, "constant", 0.05, 3)
    assert row["test_loss"] == pytest.approx(constant.test_loss, rel=1e-5)
    assert run(task, "adaptive", 0.05, 3).score != constant.score


def test_rows_that_are_there_are_not_run_again(
    task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"compare {task.run} --methods constant cosine --lrs 0.05 10 --directory kept --seeds"
    assert main([*words.split(), "2"]) == 0
    file = Path("kept/rows.jsonl")
    lines = file.read_text().splitlines()
    assert len(lines) == 8 and "diverged" in capsys.readouterr().out
    with file.open("a") as torn:
        torn.write('{"task": {"run"')  # the process was killed while it wrote

    ran: list[tuple[str, float | None, int]] = []
    usual = comparison.run

    def counted(task: Task, *cell: Any) -> Row:
        ran.append(cell)
        return usual(task, *cell)

    monkeypatch.setattr(comparison, "run", counted)
    assert main([*words.split(), "2"]) == 0
    assert ran == [] and "8 of 8 rows are already in" in capsys.readouterr().out
    assert file.read_text().splitlines() == lines
    assert main([*words.split(), "3"]) == 0
    assert [seed for _, _, seed in ran] == [102] * 4
    # What is trained has changed: no row of before is taken.
    path = Path(task.run.rpartition(":")[0])
    path.write_text(path.read_text().replace("steps=30", "steps=20"))
    ran.clear()
    assert main([*words.split(), "2"]) == 0 and len(ran) == 8


def test_every_run_leaves_a_directory(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    """Of each kind of method, also of one that diverges."""
    words = f"compare {task.run} --methods adaptive constant smooth step rhc --lrs 0.05 --seeds 1"
    assert main(words.split()) == 0
    assert "rhc report runs/compare-make shows the runs" in capsys.readouterr().out
    runs = {path.name: read_run(path) for path in runs_in(Path("runs/compare-make"))}
    assert set(runs) == {
        *(f"{name}-0.05-100" for name in ("adaptive", "constant", "smooth", "step")),
        "rhc-100",
    }
    document = json.loads(Path("runs/compare-make/comparison.json").read_text())
    scores = {row["method"]: row["score"] for row in document["rows"]}
    for one in runs.values():
        assert len(one.tape) == one.steps == 30 and not one.faults
        assert one.result["test_loss"] == scores[one.config["method"]]
    assert {"loss_trend", "reward_trend", "plateau", "noise"} <= runs["adaptive-0.05-100"].tape[
        9
    ].keys()
    assert runs["step-0.05-100"].series("lr")[1][9:11] == [0.05, pytest.approx(0.005)]
    run(replace(task, steps=400, directory=Path("longer")), "rhc", None, 0)
    assert read_run(Path("longer/rhc-0")).windows and not runs["constant-0.05-100"].windows
    main(f"compare {task.run} --methods constant --lrs 10 --seeds 1 -o lost".split())
    lost = read_run(Path("lost/constant-10-100"))
    assert not lost.result and lost.config["lr"] == 10


def test_rows_do_not_depend_on_the_number_of_processes(task: Task) -> None:
    words = f"compare {task.run} --methods adaptive cosine constant --lrs 0.05 10 --seeds 2"
    found = []
    for jobs in ("1", "2"):
        assert main([*words.split(), "--jobs", jobs, "-o", f"jobs{jobs}"]) == 0
        document = json.loads(Path(f"jobs{jobs}/comparison.json").read_text())
        found.append((document["rows"], document["lines"]))
    assert found[0] == found[1] and len(found[0][0]) == 12
    tapes = [{p.parent.name: p.read_bytes() for p in Path(folder).glob("*/tape.jsonl")}
             for folder in ("jobs1", "jobs2")]  # fmt: skip
    assert tapes[0] == tapes[1] and len(tapes[0]) == 12


def test_a_method_that_cannot_run_says_why_and_the_others_go_on(
    task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    words = f"compare {task.run} --methods prodigy constant --lrs 0.05 --seeds 2"
    assert main(words.split()) == 0
    shown = capsys.readouterr().out
    assert shown.count("prodigy is left out: method prodigy needs prodigyopt: pip install") == 1
    assert "constant lr 0.05 seed 101" in shown
    document = json.loads(Path("runs/compare-make/comparison.json").read_text())
    assert [failure["seed"] for failure in document["failures"]] == [100, 101]
    assert main(f"compare {task.run} --methods prodigy --seeds 1".split()) == 1
    assert "nothing could be run" in capsys.readouterr().out


def test_a_process_that_dies_costs_one_cell(task: Task, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(task.run.rpartition(":")[0])
    deadly = "def make(*, seed=0, data=None):\n    import os\n    seed == 101 and os._exit(7)"
    path.write_text(path.read_text().replace("def make(*, seed=0, data=None):", deadly))
    words = f"compare {task.run} --methods constant cosine --lrs 0.05 --seeds 3 --jobs 2"
    assert main(words.split()) == 0
    shown = capsys.readouterr().out
    assert shown.count("is left out: its process ended with status 7") == 2
    assert all(f"{name} lr 0.05 seed 102" in shown for name in ("constant", "cosine"))


def test_tuning_is_done_on_seeds_of_its_own_and_its_cost_is_said(
    task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"compare {task.run} --methods constant zero-probe-cosine --lrs 1e-5 0.05 --seeds 1"
    assert main([*words.split(), "--tune", "0-1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "constant: lr 0.05, the best of 1e-05, 0.05 on seeds 0-1, for 4 plain runs" in shown
    document = json.loads(Path("runs/compare-make/comparison.json").read_text())
    assert [(r["method"], r["lr"], r["seed"]) for r in document["rows"]] == [
        ("constant", 0.05, 100),
        ("zero-probe-cosine", None, 100),
    ]
    assert [line["tuning"] for line in document["lines"]] == [4.0, 0.0]


def test_the_best_lr_is_the_highest_where_higher_is_better() -> None:
    row = Row("a", 0.1, 0, 5.0, None, None, None, 0.0, 1.0, higher=True)
    other = replace(row, lr=1.0, score=7.0)
    lost = replace(row, method="b", score=-math.inf)
    assert tuned([row, other, lost]) == ({"a": 1.0}, {"a": 2.0, "b": 1.0})
    assert tuned([replace(r, higher=False) for r in (row, other)])[0] == {"a": 0.1}
    lines = summarise([row, other], "a")
    assert lines[0].apart == (-2, -2, -2) and lines[1].apart is None


def test_steps_to_a_target() -> None:
    row = Row("a", 0.1, 0, 5.0, None, None, None, 0.0, 1.0, curve=[(10, 3.0), (20, 1.0), (30, 2.0)])
    assert row.steps_to(1.5) == 20 and row.steps_to(0.5) is None
    higher = replace(row, higher=True, curve=[(10, None), (20, 1.0), (30, 2.0)])
    assert higher.steps_to(1.5) == 30
    never = replace(row, seed=1, curve=[(10, 3.0)])
    (line,) = summarise([row, never], target=1.5)
    assert (line.steps, line.reached, line.seeds) == (20, 1, 2)
    # Without a target: what the reference ends with, give or take 5 %.
    assert summarise([row], "a")[0].target == pytest.approx(2.1)
    assert summarise([higher], "a")[0].target == pytest.approx(1.9)


def test_running_means() -> None:
    assert running_means([1.0, 2.0, 3.0, 4.0], 2) == [(2, 1.5), (3, 2.5), (4, 3.5)]
    assert running_means([1.0], 5) == [(1, 1.0)]
    assert running_means([1.0, math.inf], 1) == [(1, 1.0), (2, None)]
    assert [step for step, _ in running_means([0.0] * 205, 100)] == [*range(100, 201, 10), 205]


def test_a_goal_is_what_runs_are_compared_by(task: Task) -> None:
    path = Path(task.run.rpartition(":")[0])
    metric = (
        "lambda model, batch: ((model(batch[0]) - batch[1]).square().mean(), {'r': batch[0].max()})"
    )
    text = path.read_text().replace(
        "lambda model, batch: (model(batch[0]) - batch[1]).square().mean()", metric
    )
    path.write_text(
        text.replace(
            "threads=1", "threads=1, goal=Goal('r', over=8, higher=True, target=0.5)"
        ).replace("import Workload", "import Goal, Workload")
    )
    seen = [float(batch[0].max()) for batch in task.workload(0).train_loader]
    for name in ("constant", "adaptive", "zero-probe"):
        row = run(task, name, 0.05 if METHODS[name].needs_lr else None, 0)
        assert row.higher and row.score == pytest.approx(sum(seen) / 8)
    assert isinstance(task.workload(0).goal, Goal)


def test_the_ablations_differ_from_what_they_ablate() -> None:
    task = Task("drifting_sine", steps=540)  # with a jump, before which the loss never rises
    rows = {name: run(task, name, 0.01, 0).course for name in ABLATIONS}
    assert set(rows["adaptive-no-noise"]["noise"]) == {0.0}
    assert set(rows["adaptive-fixed-noise"]["noise"]) == {0.02}
    assert rows["adaptive"]["lr"] != rows["adaptive-reward-only"]["lr"]
    assert rows["adaptive"] == rows["adaptive-loss-only"]  # there is no reward


def test_help_names_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--help-all"]) == 0
    shown = capsys.readouterr().out
    families = ("adaptive-", "planner-")
    wanted = {name for name in USUAL if not name.startswith(families)}
    assert {name for name in wanted if name not in shown} == set()


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_a_worker_ends_with_the_process_that_asks_it(tmp_path: Path) -> None:
    """Whatever it trains: its parent was killed, and nobody waits for the row."""
    (tmp_path / "slow.py").write_text(
        "from pathlib import Path\nimport os, time\n"
        "def slow(*, seed, data): Path('begun').write_text(str(os.getpid())); time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c",
         "from rhc.compare.launchers import _Worker; from rhc.compare.pool import asked, answered;"
         "from rhc.compare.runs import Task;"
         " _Worker(answered).ask(asked(Task('slow.py:slow'), ('cosine', 0.1, 0)))"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (tmp_path / "begun").exists() or not (tmp_path / "begun").read_text():
        assert time.monotonic() < end and parent.poll() is None
        time.sleep(0.05)
    worker = Path("/proc", (tmp_path / "begun").read_text())
    parent.kill()
    parent.wait()
    while worker.exists() and "Z" not in (worker / "stat").read_text().split()[2]:
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["rows.jsonl", "comparison.json"])
def test_a_link_among_the_rows_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / name).symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match=f"{name} is a link"):
        WorkerPool(Console(file=io.StringIO()), Task("digits"), tmp_path / "rows", 1)
    assert (tmp_path / "precious").read_text() == "precious"

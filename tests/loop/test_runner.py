"""The loop with rewriting on: what it commits is an ordinary run, and it says what it did."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import OPTIMIZERS, PROBLEMS, two_groups
from runs import (
    Run,
    classify,
    clouds,
    files,
    make_run,
    plain_loop,
    seed_everything,
    state_of,
    unequal,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from rhc import CONTROLS, InputError, Objective, Rewrite, Runner, RunResult, Schedule, Twin
from rhc.events import (
    CheckpointSaved,
    Committed,
    Notice,
    RunEnded,
    RunStarted,
    StepTaken,
    VerbStarted,
    WindowAttempted,
)
from rhc.hypergradient import Damping, Outcome, ReversePass
from rhc.loop.records import smoothness
from rhc.loop.steps import EXPLODING_CLIP
from rhc.loop.update_rule import Proposal
from rhc.runner import DivergedError
from rhc.schedule import total_variation

NOISY = Rewrite(step={"lr": 0.7, "momentum": 0.5, "noise": 4.0, "weight_decay": 1.0}, damping=1e-9)
"""A law that goes as far as it may, and leaves noise 0 behind with the first step downhill."""


@dataclass(frozen=True)
class Uphill(Rewrite):
    """Proposes the opposite of what the gradient says: every window is rejected."""

    def propose(
        self,
        schedule: Schedule,
        gradient: Mapping[str, Tensor],
        value: float,
        scale: float = 1.0,
    ) -> Proposal:
        return super().propose(schedule, {n: -g for n, g in gradient.items()}, value, scale)


@pytest.fixture(autouse=True)
def three_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are with every optimizer: more can go wrong than with lr alone."""
    monkeypatch.setattr("rhc.runner.DEFAULT_CONTROLS", ("lr", "momentum", "noise"))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def runner(run: Run, **options: Any) -> Runner:
    options = {"window": 8} | options
    options = {"start": "given", "rewrite": Rewrite(), **options}
    return Runner(run.model, run.optimizer, run.loss_fn, run.train, run.val, **options)


def fit(run: Run, steps: int, **options: Any) -> RunResult:
    return runner(run, **options).fit(steps)


def problem_run(problem: str, optimizer: str, *, groups: bool = False, val: bool = True) -> Run:
    """One of the shared problems, in float64, on a list of batches."""
    p = PROBLEMS[problem]()
    make = OPTIMIZERS[optimizer]
    opt = two_groups(make, p.model) if groups else make(p.model.parameters())
    train, held_out = p.batches(60), p.batches(6)
    seed_everything(5)
    return Run(p.model, opt, p.loss_fn, train, held_out if val else None)


def in_order(optimizer: str = "sgd", **options: Any) -> Run:
    """Batches of equal size in a fixed order, so that an ordinary loop sees the same ones."""
    run = make_run(optimizer, "list", **options)
    return run._replace(train=list(run.train)[:-1])


ORDINARY = ("clip_norm", "clip_value", "accumulate")
"""Options that an ordinary loop has too."""


def check_ordinary(make: Callable[[], Run], steps: int, **options: Any) -> RunResult:
    """Fits, and holds the result against an ordinary loop with the schedule that came out.

    Parameters, buffers, optimizer state and the global random state must be equal to the bit. The
    batches come in a fixed order, since the order of a shuffling loader is the runner's own.
    """
    run = make()
    result = fit(run, steps, **options)
    found = state_of(run)
    again = make()
    torch.randint(2**31, ())  # the runner seeds its streams of batches
    shared = {name: value for name, value in options.items() if name in ORDINARY}
    plain_loop(again, steps, result.schedule, **shared)
    assert unequal(state_of(again), found) == []
    assert result.record["steps"] == steps == len(result.tape) == len(result.schedule)
    return result


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def outcomes(result: RunResult) -> list[str]:
    return [w["outcome"] for w in result.windows]


# The committed run is an ordinary run with the schedule that was written -------------------------


@pytest.mark.parametrize("stride", [8, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_problem_and_optimizer(problem: str, optimizer: str, stride: int) -> None:
    steps = 19 if stride == 8 else 13
    result = check_ordinary(lambda: problem_run(problem, optimizer), steps, stride=stride)
    assert "accepted" in outcomes(result)


@pytest.mark.parametrize(
    ("window", "stride", "steps"),
    [
        (8, 8, 24),
        (8, 8, 19),
        (8, 3, 20),
        (8, 1, 5),
        (8, 7, 20),
        (50, 50, 12),
        (50, 4, 11),
        (1, 1, 4),
    ],
)
@pytest.mark.parametrize("law", [Rewrite(), Uphill(), NOISY], ids=["law", "uphill", "noisy"])
def test_every_window_and_stride(window: int, stride: int, steps: int, law: Rewrite) -> None:
    result = check_ordinary(in_order, steps, window=window, stride=stride, rewrite=law)
    if isinstance(law, Uphill):
        assert set(outcomes(result)) == {"rejected"}
        initial = Schedule.constant(steps, 0, momentum=0.9, noise=0.0, weight_decay=0.01)
        for name in initial.values:
            assert torch.equal(result.schedule[name], initial[name])
    else:
        assert "accepted" in outcomes(result)


@pytest.mark.parametrize("val", [True, False])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_parameter_groups(optimizer: str, val: bool) -> None:
    check_ordinary(lambda: problem_run("mlp", optimizer, groups=True, val=val), 20, window=6)


@pytest.mark.parametrize("stride", [6, 4])
@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_values_per_parameter_group(optimizer: str, stride: int) -> None:
    """Every group goes its own way, from its own value; the group without decay stays without."""
    names = ["lr", "momentum", "weight_decay"]
    result = check_ordinary(
        lambda: problem_run("mlp", optimizer, groups=True),
        20,
        window=6,
        stride=stride,
        controls=[*names, "noise"],
        per_group=names,
        rewrite=NOISY,
    )
    assert "accepted" in outcomes(result)
    own = problem_run("mlp", optimizer, groups=True).optimizer.param_groups
    before = result.windows[0]["before"]
    assert before["lr"] == pytest.approx([g["lr"] for g in own], rel=1e-12)
    assert before["weight_decay"] == pytest.approx([own[0]["weight_decay"], 0.0], rel=1e-12)
    lr, decay = result.schedule["lr"], result.schedule["weight_decay"]
    assert lr.shape == (20, 2) and result.schedule["noise"].shape == (20,)
    ratio = lr[:, 1] / lr[:, 0]
    assert float((ratio / ratio[0]).log().abs().max()) > 0.05, "the groups' ratio is free"
    assert (decay[:, 1] == 0).all() and (decay[:, 0] > 0).all()
    assert result.tape[3]["lr"] == lr[3].tolist()
    gradient = result.windows[0]["hypergradient"]
    assert all(len(row) == 2 for row in gradient["lr"]) and isinstance(gradient["noise"][0], float)


def test_one_group_alone_is_a_control_as_ever() -> None:
    """With a single group a value per group is the same run."""
    one = fit(in_order(), 24, per_group=["lr", "momentum"], controls=["lr", "momentum"])
    same = fit(in_order(), 24, controls=["lr", "momentum"])
    for name, values in same.schedule.values.items():
        assert torch.equal(one.schedule[name].reshape(-1), values)
    assert outcomes(one) == outcomes(same)


def frozen_group() -> Run:
    """The second group's lr is 0: its parameters stay."""
    run = in_order()
    first, *rest = run.model.parameters()
    groups = [{"params": rest}, {"params": [first], "lr": 0.0}]
    return run._replace(optimizer=torch.optim.SGD(groups, lr=0.05, momentum=0.9))


def test_a_group_without_lr_stays_without() -> None:
    """Also through the cooldown, whose factors are clamped to the bounds of an lr."""
    result = check_ordinary(frozen_group, 24, controls=["lr"], per_group=["lr"])
    assert (result.schedule["lr"][:, 1] == 0).all() and "accepted" in outcomes(result)
    assert result.schedule["lr"][-1, 0] < 0.5 * result.schedule["lr"][0, 0]


def test_accumulated_batches_are_one_step_of_their_mean() -> None:
    """Two halves of a batch, accumulated, are the run on the whole batch, but for rounding."""
    whole = problem_run("quadratic", "momentum")
    halves = [half for b in whole.train for half in (b - 0.3, b + 0.3)]
    # ½ Σ h (θ − b ± 0.3)² is on average ½ Σ h (θ − b)² and this.
    shift = 0.5 * 0.3**2 * float(whole.model.curvature.sum())
    expected = fit(whole, 18, controls=["lr", "momentum"])
    split = problem_run("quadratic", "momentum")._replace(train=halves)
    found = fit(split, 18, accumulate=2, controls=["lr", "momentum"])
    assert outcomes(found) == outcomes(expected)
    for a, b in zip(expected.tape, found.tape, strict=True):
        assert b["loss"] == pytest.approx(a["loss"] + shift, rel=1e-9)
        assert b["lr"] == pytest.approx(a["lr"], rel=1e-9)
    # A step is one gradient evaluation; four batches to judge a window are two steps' worth.
    cost, other = found.record["cost"], expected.record["cost"]
    assert cost["hessian_products"] == other["hessian_products"] == 18
    assert cost["gradient_evaluations"] == other["gradient_evaluations"] - 2 * 3


def test_noise_is_part_of_the_run() -> None:
    """With the same draws in every roll, replay and ordinary loop; another seed, another run."""
    result = check_ordinary(in_order, 24, rewrite=NOISY, seed=3)
    assert (result.schedule["noise"] > 0).any()
    assert result.schedule.seed == 3
    other = Schedule(result.schedule.values, 0, seed=4)
    run, again = in_order(), in_order()
    plain_loop(run, 24, result.schedule)
    plain_loop(again, 24, other)
    assert unequal(state_of(run)["model"], state_of(again)["model"]) != []


@pytest.mark.parametrize(
    "options",
    [
        {"clip_norm": 0.3},
        {"clip_value": 0.05},
        {"accumulate": 3},
        {"accumulate": 2, "clip_norm": 0.3, "stride": 3},
        {"accumulate": 2, "segment": 3, "per_group": ["lr"]},
        {"product": "forward-difference"},
        {"segment": 3},
        {"objective": Objective(average=None, batches=1)},
        {"objective": Objective(loss_weight=1.0, terminal_weight=0.0)},
        {"controls": ["weight_decay"]},
        {
            "controls": ["lr"],
            "rewrite": Rewrite(cooldown=0.0, knots=4, total_variation=0.01),
        },
    ],
    ids=str,
)
def test_every_option(options: dict[str, Any]) -> None:
    result = check_ordinary(in_order, 20, **options)
    assert "accepted" in outcomes(result)
    for name in result.schedule.values:
        moved = not bool((result.schedule[name] == result.schedule[name][0]).all())
        assert not moved or name in options.get("controls", CONTROLS)


def test_a_run_that_was_rewound_is_ordinary_too() -> None:
    result = check_ordinary(lambda: in_order(lr=10.0, norm=False), 24, controls=["lr"])
    assert outcomes(result)[0] == "rewound"


class Branching(nn.Module):
    """A layer that only some batches use: half of a block has no gradient, now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.extra, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.extra(h)) if x[0, 0] > 1.0 else h)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_layers_that_only_some_steps_use(optimizer: str) -> None:
    def make() -> Run:
        run = in_order(optimizer)
        seed_everything(1)
        model = Branching()
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
        return run._replace(model=model, optimizer=kind(model.parameters(), lr=0.05))

    assert sum(bool(x[0, 0] > 1.0) for x, _ in make().train) in range(1, 9)
    check_ordinary(make, 22, window=5)


@pytest.mark.parametrize("stride", [8, 3])
@pytest.mark.parametrize(
    ("law", "lr"),
    [(Rewrite(), 0.05), (Uphill(), 0.05), (Rewrite(), 10.0)],
    ids=str,
)
def test_the_average_is_of_committed_iterates(law: Rewrite, lr: float, stride: int) -> None:
    """θ̄ = Σ 0.95^k θ_{T−5k} / Σ 0.95^k: what was rolled and given up leaves no trace in it."""

    def make() -> Run:
        return in_order(lr=lr, norm=False, dropout=0.0)

    result = fit(make(), 20, rewrite=law, controls=["lr"], stride=stride)
    assert lr < 1 or "rewound" in outcomes(result)
    run = make()
    total = [torch.zeros_like(p) for p in run.model.parameters()]
    for t, batch in enumerate([*run.train, *run.train, *run.train][:20]):
        for group in run.optimizer.param_groups:
            group["lr"] = float(result.schedule["lr"][t])
        run.optimizer.zero_grad()
        classify(run.model, batch)[0].backward()
        run.optimizer.step()
        for s, p in zip(total, run.model.parameters(), strict=True):
            if t in (4, 9, 14, 19):
                s.mul_(0.95).add_(p.detach())
    with torch.no_grad():
        for s, p in zip(total, run.model.parameters(), strict=True):
            p.copy_(s * (1 - 0.95) / (1 - 0.95**4))
    loss = float(classify(run.model.eval(), clouds(32, seed=1).tensors)[0].detach())
    # float32 sums in another order.
    assert result.record["average_val_loss"] == pytest.approx(loss, rel=1e-4)
    assert result.val_loss != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("stride", [8, 3])
@pytest.mark.parametrize("law", [Rewrite, Uphill])
def test_the_next_window_begins_where_the_last_one_ended(law: type[Rewrite], stride: int) -> None:
    """What was learned is carried on, from the first uncommitted step; nothing, if rejected."""
    result = fit(in_order(), 30, rewrite=law(cooldown=0.0), controls=["lr"], stride=stride)
    first = {w["start"]: w for w in reversed(result.windows)}
    for start, window in first.items():
        before = result.schedule["lr"][start - 1] if start else 0.05
        assert window["before"]["lr"] == pytest.approx(float(before), rel=1e-12)
    assert ("accepted" in outcomes(result)) == (law is Rewrite)


# What it leaves behind ---------------------------------------------------------------------------


def test_the_directory(tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "demo"
    run = make_run("adamw")
    test_loader = DataLoader(clouds(24, seed=2), 8)
    result = fit(run, 20, directory=directory, test_loader=test_loader, seed=7)
    assert sorted(p.name for p in directory.iterdir()) == [
        ".lock", ".result.json.crc32", ".tape.jsonl.crc32", ".windows.jsonl.crc32", "checkpoints",
        "config.json", "result.json", "schedule.json", "tape.jsonl", "windows.jsonl",
    ]  # fmt: skip
    newest = [f"window-{step:08d}" for step in (8, 16, 20)]
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == newest
    for name in newest:
        kinds = {p.suffix for p in (directory / "checkpoints" / name).iterdir()}
        assert kinds == {".safetensors", ".json"}
        names = {p.stem for p in (directory / "checkpoints" / name).iterdir()}
        assert {"model", "optimizer", "rng", "manifest"} <= names
    assert result.directory == directory

    config = json.loads((directory / "config.json").read_text())
    assert (config["steps"], config["window"], config["stride"], config["seed"]) == (20, 8, 8, 7)
    assert config["controls"] == ["lr", "momentum", "noise"] and config["optimizer"] == "adamw"
    assert config["versions"]["torch"] == torch.__version__ and "threads" in config["hardware"]

    assert Schedule.load(directory / "schedule.json") == result.schedule
    record = json.loads((directory / "result.json").read_text())
    assert record == result.record
    for name in ("train", "val", "test"):
        for average in ("", "average_"):
            assert math.isfinite(record[f"{average}{name}_loss"])
    assert 0 <= record["test_accuracy"] <= 1
    assert record["test_accuracy"] == result.test_accuracy == record["metrics"]["test"]["accuracy"]
    assert record["steps"] == 20 and record["wall_seconds"] > 0
    assert record["cost"].keys() >= {
        "gradient_evaluations", "hessian_products", "plain_run_equivalents", "peak_memory_bytes",
        "windows", "rejected_windows", "rewound_windows",
    }  # fmt: skip


def test_the_results_are_the_losses(tmp_path: Path) -> None:
    run = make_run(dropout=0.5)
    result = fit(run, 20)
    modes = [m.training for m in run.model.modules()]
    run.model.eval()
    x, labels = clouds(32, seed=1).tensors
    loss, metrics = classify(run.model, (x, labels))
    assert result.val_loss == pytest.approx(float(loss.detach()), rel=1e-6)
    assert result.record["metrics"]["val"]["accuracy"] == pytest.approx(float(metrics["accuracy"]))
    assert result.test_loss is None and result.test_accuracy is None
    assert all(modes)


@pytest.mark.parametrize("stride", [8, 3])
def test_tape_and_windows(stride: int, tmp_path: Path) -> None:
    steps = 20
    result = fit(make_run("adam"), steps, stride=stride, directory=tmp_path, rewrite=NOISY)
    tape = lines(tmp_path / "tape.jsonl")
    assert tape == result.tape
    assert [row["step"] for row in tape] == list(range(steps))
    for row in tape:
        assert {n: row[n] for n in result.schedule.values} == result.schedule.at(row["step"])
        assert row["gradient_norm"] > 0 and math.isfinite(row["loss"])
        assert 0 <= row["accuracy"] <= 1

    windows = lines(tmp_path / "windows.jsonl")
    assert windows == result.windows
    starts = range(0, steps, stride)
    assert {(w["window"], w["start"], w["stop"]) for w in windows} == {
        (i, start, min(start + 8, steps)) for i, start in enumerate(starts)
    }
    for w in windows:
        assert w["outcome"] in ("accepted", "rejected")
        accepted = w["outcome"] == "accepted"
        assert accepted == (w["objective_after"] < w["objective_before"])
        assert (w["reason"] is None) == accepted
        assert w["reason"] is None or w["reason"].startswith("the objective did not fall")
        assert w["before"].keys() == w["after"].keys() == result.schedule.values.keys()
        assert w["predicted_change"] < 0
        length = w["stop"] - w["start"]
        assert w["hypergradient"].keys() == {"lr", "momentum", "noise"}
        assert all(len(g) == length for g in [*w["hypergradient"].values(), w["costate_norms"]])
        assert (w["product"], w["segment"]) == ("exact", 1)


@pytest.mark.parametrize("law", [Rewrite(step={"lr": 1e-4}, cooldown=0.0), NOISY, Uphill()])
def test_smoothness_is_the_measured_over_the_predicted_change(law: Rewrite) -> None:
    """About 1 where the step is small; the summary is of all attempts, rejected ones too."""
    options = {"rewrite": law, "controls": ["lr"], "objective": Objective(average=None)}
    result = fit(problem_run("quadratic", "momentum"), 24, **options)
    found = []
    for w in result.windows:
        change = w["objective_after"] - w["objective_before"]
        assert w["measured_change"] == pytest.approx(change, rel=1e-12)
        assert w["smoothness"] == pytest.approx(change / w["predicted_change"], rel=1e-12)
        assert (w["outcome_of_hypergradient"], w["outcome_step"]) == ("successful", None)
        found.append(w["smoothness"])
    summary = result.record["smoothness"]
    assert summary["median"] == statistics.median(found)
    assert summary["share_positive"] == sum(v > 0 for v in found) / len(found)
    if law.step == {"lr": 1e-4}:
        assert found == pytest.approx([1.0] * len(found), abs=1e-3)
    if isinstance(law, Uphill):  # whose prediction is of the opposite direction
        assert summary["share_positive"] < 0.5


def test_smoothness_where_there_is_none() -> None:
    nowhere = [(None, 1.0), (1.0, None), (1.0, 0.0), (math.nan, 1.0), (1.0, math.inf)]
    assert [smoothness(*pair) for pair in nowhere] == [None] * 5
    assert smoothness(0.0, -1.0) == 0 and smoothness(-2.0, -1.0) == 2
    assert fit(in_order(), 8, rewrite=False).record["smoothness"] == {
        "median": None,
        "share_positive": None,
    }


class Looks:
    """In place of `ReversePass.differentiate`: the real one, whose outcome goes by a list of names.

    asked: the damping that each look was asked for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
        self.asked: list[Damping] = []
        real = ReversePass.differentiate

        def look_back(
            reverse_pass: ReversePass, recorder: Any, average: Any, terminal: Any, damping: Damping
        ) -> Any:
            self.asked.append(damping)
            h = real(reverse_pass, recorder, average, terminal, Damping())
            name = names.pop(0) if names else "successful"
            step = recorder.trajectory.start + 3
            return h if name == "successful" else replace(h, result=Outcome(name, "so", step))

        monkeypatch.setattr(ReversePass, "differentiate", look_back)


def test_vanishing_costates_are_rewritten_from(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fit(in_order(), 16)
    looks = Looks(monkeypatch, ["vanishing"])
    result = fit(in_order(), 16)
    assert result.schedule == plain.schedule and looks.asked == [Damping(), Damping()]
    told = [(w["outcome_of_hypergradient"], w["outcome_step"]) for w in result.windows]
    assert told[0] == ("vanishing", 3) and told[-1] == ("successful", None)


def test_exploding_costates_are_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped, at the price of another look; what was seen first is recorded."""
    looks = Looks(monkeypatch, ["successful", "exploding"])
    result = fit(in_order(), 24)
    assert looks.asked == [Damping(), Damping(), Damping(1.0, EXPLODING_CLIP), Damping()]
    by_window = {w["window"]: w for w in result.windows}
    assert by_window[1]["outcome_of_hypergradient"] == "exploding"
    assert by_window[1]["outcome_step"] == 8 + 3 and by_window[1]["predicted_change"] < 0
    assert [by_window[i]["outcome_of_hypergradient"] for i in (0, 2)] == ["successful"] * 2
    assert result.record["cost"]["hessian_products"] == 4 * 8


@pytest.mark.parametrize("clip", [None, 3.0])
def test_costates_that_explode_all_the_same(
    clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clip of the user's own there is no second look; without one, no third."""
    given = {} if clip is None else {"costate_clip": clip, "discount": 0.9}
    looks = Looks(monkeypatch, ["exploding"] * 2 if clip is None else ["exploding"])
    result = fit(in_order(), 16, **given)
    again = Damping(1.0, EXPLODING_CLIP)
    own = Damping(0.9, clip)
    assert looks.asked == ([Damping(), again, Damping()] if clip is None else [own, own])
    first = result.windows[0]
    assert (first["outcome"], first["reason"]) == (
        "rejected",
        "hypergradient exploding: so",
    )
    assert (first["outcome_of_hypergradient"], first["outcome_step"]) == ("exploding", 3)
    assert first["predicted_change"] is first["measured_change"] is first["smoothness"] is None


def test_accepted_windows_say_what_was_committed() -> None:
    """With M = K an accepted attempt's means are the committed schedule's, a rejected one's not."""
    result = fit(in_order(), 24, rewrite=Rewrite(step={"lr": 2.0}, cooldown=0.0))
    assert "accepted" in outcomes(result)
    for w in result.windows:
        committed = result.schedule.window(w["start"], w["stop"]).means()
        assert (committed == w["after"]) == (w["outcome"] == "accepted")


def test_metrics_do_not_take_the_place_of_the_loops_own_values() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Any:
        loss, _ = classify(model, batch)
        return loss, {"loss": loss * 0 + 7, "lr": torch.tensor(3.0), "step": 1, "mine": 2.0}

    result = fit(in_order()._replace(loss_fn=loss_fn), 8)
    assert [row["step"] for row in result.tape] == list(range(8))
    assert all(row["loss"] != 7 and row["lr"] < 3 and row["mine"] == 2 for row in result.tape)


def test_a_retry_goes_less_far() -> None:
    result = fit(in_order(), 8, rewrite=Uphill(retries=2))
    lrs = [w["after"]["lr"] for w in result.windows]
    assert outcomes(result) == ["rejected"] * 3
    assert [w["attempt"] for w in result.windows] == [1, 2, 3]
    moves = [abs(math.log(lr / result.windows[0]["before"]["lr"])) for lr in lrs]
    assert moves[0] > moves[1] > moves[2] > 0
    assert result.record["cost"]["rejected_windows"] == 1


# Objectives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stride", [8, 3])
def test_without_validation_data_held_out_batches_judge(stride: int, accumulate: int) -> None:
    """Each window by the batches of the three steps that follow, on which it did not train."""
    run = problem_run("mlp", "momentum", val=False)
    number = {float(batch[0].sum()): t for t, batch in enumerate(run.train)}
    judged_by: dict[int, set[int]] = {}
    start = 0

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        if not model.training and start < 16:
            judged_by.setdefault(start, set()).add(number[float(batch[0].sum())])
        return run.loss_fn(model, batch)

    def listener(event: Any) -> None:
        nonlocal start
        if isinstance(event, Committed):
            start = event.stop

    result = fit(
        run._replace(loss_fn=loss_fn),
        16,
        stride=stride,
        objective=Objective(batches=3),
        listeners=[listener],
        accumulate=accumulate,
    )
    assert "accepted" in outcomes(result) and result.val_loss is None
    stops = {start: min(start + 8, 16) for start in range(0, 16, stride)}
    assert judged_by == {
        start: {*range(accumulate * stop, accumulate * (stop + 3))} for start, stop in stops.items()
    }


def test_a_single_validation_batch(tmp_path: Path) -> None:
    run = in_order()
    result = fit(run._replace(val=[clouds(16, seed=1).tensors]), 24, directory=tmp_path)
    assert "accepted" in outcomes(result) and result.val_loss is not None


def test_a_validation_loader_without_a_length() -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(clouds(24, seed=1))

    assert "accepted" in outcomes(fit(in_order()._replace(val=DataLoader(Endless(), 8)), 16))


def test_rewards() -> None:
    """−Σ r_t with r = −ℓ is Σ ℓ_t, whether the metrics name it or a function gives it."""

    def rewarded(model: nn.Module, batch: Any) -> Any:
        loss, metrics = classify(model, batch)
        return loss, metrics | {"reward": -loss}

    by_loss = fit(in_order(), 16, objective=Objective(loss_weight=1.0, terminal_weight=0.0))
    by_metric = fit(
        in_order()._replace(loss_fn=rewarded),
        16,
        objective=Objective(reward_weight=1.0, terminal_weight=0.0),
    )
    by_function = fit(
        in_order(),
        16,
        objective=Objective(reward_weight=1.0, terminal_weight=0.0, reward=lambda loss, m: -loss),
    )
    assert "accepted" in outcomes(by_loss)
    for other in (by_metric, by_function):
        # Not to the bit: -1 times the stage cost goes through another sum.
        for name, values in by_loss.schedule.values.items():
            torch.testing.assert_close(other.schedule[name], values, rtol=1e-4, atol=1e-7)


def test_a_reward_without_a_name_can_be_described(tmp_path: Path) -> None:
    class Reward:
        def __call__(self, loss: Tensor, metrics: Any) -> Tensor:
            return -loss

    objective = Objective(reward_weight=1.0, reward=Reward())
    fit(in_order(), 8, objective=objective, directory=tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["objective"]["reward"] == (
        Reward.__qualname__
    )


@pytest.mark.parametrize("law", [Rewrite(iterations=3, worth=0.0), Twin()])
def test_a_budget_is_kept(law: Rewrite) -> None:
    free = fit(in_order(lr=0.02), 80, rewrite=law, product="none")
    notices: list[str] = []
    bound = fit(
        in_order(lr=0.02),
        80,
        rewrite=replace(law, budget=2.0),
        product="none",
        listeners=[lambda e: notices.append(e.message) if isinstance(e, Notice) else None],
    )
    assert free.record["cost"]["plain_run_equivalents"] > 2.5
    assert 1.5 < bound.record["cost"]["plain_run_equivalents"] <= 2.0
    about_cost = [n for n in notices if not n.startswith("running statistics ")]
    assert about_cost == ["the budget of 2 plain runs is spent: the rest is followed as planned"]
    assert 0 < len(bound.windows) < len(free.windows)
    assert bound.record["cost"]["hessian_products"] == 0


def test_total_variation_smooths() -> None:
    def variation(weight: float) -> float:
        law = Rewrite(knots=4, cooldown=0.0, total_variation=weight)
        result = fit(in_order(), 24, rewrite=law, controls=["lr"])
        assert "accepted" in outcomes(result)
        return float(total_variation(result.schedule.raw(["lr"])))

    assert variation(0.1) < 0.8 * variation(0.0)


def test_knots_bend_the_schedule_within_a_window() -> None:
    one, four = (
        fit(in_order(), 8, rewrite=Rewrite(knots=knots, cooldown=0.0), controls=["lr"]).schedule
        for knots in (1, 4)
    )
    assert len(set(one["lr"].tolist())) == 1
    assert len(set(four["lr"].tolist())) > 3


# Parameter groups, modes, randomness -------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
def test_groups_keep_their_ratios_at_every_step(optimizer: str) -> None:
    """A tenth of the lr, half the momentum's odds, no weight decay: also while rolling."""
    run = problem_run("mlp", optimizer, groups=True)
    seen = []

    def odds(group: Mapping[str, Any]) -> float:
        value = group["betas"][0] if "betas" in group else group["momentum"]
        return value / (1 - value)

    def listener(event: Any) -> None:
        if isinstance(event, StepTaken):
            first, second = run.optimizer.param_groups
            assert second["lr"] == pytest.approx(first["lr"] / 10, rel=1e-12)
            assert odds(second) == pytest.approx(odds(first) / 2, rel=1e-9)
            assert second["weight_decay"] == 0.0 < first["weight_decay"]
            assert first["lr"] == event.controls["lr"]
            seen.append((first["lr"], first["weight_decay"]))

    fit(run, 20, listeners=[listener], controls=list(CONTROLS))
    assert len(set(seen)) > 4


def test_the_modes_of_modules_stay() -> None:
    """A BatchNorm that the user froze keeps its statistics, in the run and afterwards."""
    run = in_order()
    run.model[1].eval()
    before = run.model[1].running_mean.clone()
    modes: list[list[bool]] = []
    result = fit(run, 16, listeners=[lambda e: modes.append([m.training for m in run.model])])
    assert set(map(tuple, modes)) == {(True, False, True, True, True)}
    assert torch.equal(run.model[1].running_mean, before)
    assert "accepted" in outcomes(result)

    model = in_order().model.eval()
    fit(Run(model, torch.optim.SGD(model.parameters(), lr=0.1), classify, run.train, None), 8)
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("stride", [8, 3])
def test_the_same_seed_twice(stride: int, tmp_path: Path) -> None:
    """Bit-equal files, states and random states; the seeds of the loaders matter."""
    found = []
    for i, seed in enumerate((0, 0, 1)):
        run = make_run("adam", "augmented")
        seed_everything(seed)
        fit(run, 20, stride=stride, directory=tmp_path / str(i), rewrite=NOISY)
        found.append((files(tmp_path / str(i)), state_of(run)))
    assert unequal(found[0], found[1]) == []
    assert found[0][0]["tape.jsonl"] != found[2][0]["tape.jsonl"]


def test_how_batches_are_drawn_does_not_reach_the_model() -> None:
    """Dropout sees the same masks whether a loader shuffles with the global generator or not."""
    states = []
    for loader in ("list", "in_order"):
        run = make_run(loader=loader)
        seed_everything(1)
        fit(run, 20)
        states.append(state_of(run))
    assert unequal(states[0], states[1]) == []


def test_a_private_generator_is_left_alone() -> None:
    run = make_run(loader="generator")
    before = run.train.generator.get_state()  # type: ignore[attr-defined]
    fit(run, 20)
    assert torch.equal(run.train.generator.get_state(), before)  # type: ignore[attr-defined]


# Divergence --------------------------------------------------------------------------------------


def check_finite(result_files: Path | None, run: Run, tape: list[dict[str, Any]]) -> None:
    for value in run.model.state_dict().values():
        assert value.isfinite().all()
    for row in tape:
        assert all(math.isfinite(v) for v in row.values())
    if result_files is not None:
        for name in ("tape.jsonl", "schedule.json"):
            if tape or name != "tape.jsonl":
                assert not re.search(r"null|NaN|Infinity", (result_files / name).read_text())


def test_an_lr_far_too_high_is_lowered(tmp_path: Path) -> None:
    run = in_order(norm=False, lr=10.0)
    result = fit(run, 40, directory=tmp_path, controls=["lr"], rewrite=Rewrite(cooldown=0.0))
    check_finite(tmp_path, run, result.tape)
    rewound = [w for w in result.windows if w["outcome"] == "rewound"]
    assert rewound[0]["start"] == 0 and result.windows[0] is rewound[0]
    assert all(re.match(r"the loss is .* at step \d+$", w["reason"]) for w in rewound)
    for start in {w["start"] for w in rewound}:
        attempts = [w["attempt"] for w in rewound if w["start"] == start]
        assert attempts == list(range(len(attempts)))
    lrs = [w["before"]["lr"] for w in result.windows if w["start"] == 0]
    assert lrs == sorted(lrs, reverse=True) and lrs[0] == pytest.approx(10)
    assert lrs[1] == pytest.approx(3)
    assert (result.schedule["lr"] < 5).all()
    cost = result.record["cost"]
    assert cost["rewound_windows"] == len({w["start"] for w in rewound}) >= 1
    assert math.isfinite(result.record["train_loss"])


def poisoned(run: Run, at: int) -> Run:
    train = [(x.clone(), y) for x, y in run.train]
    train[at][0][0, 0] = math.nan
    return run._replace(train=train)


@pytest.mark.parametrize(
    ("at", "committed", "ladders"), [(0, 0, 1), (3, 0, 1), (8, 8, 2), (10, 16, 2)]
)
def test_a_loss_that_is_not_finite_at_any_lr(
    at: int, committed: int, ladders: int, tmp_path: Path
) -> None:
    """Step 10 of the epoch of 9 is its second batch again: at = 10 means steps 1, 10, …

    Once momentum has been rewritten, the one of the beginning is tried too.
    """
    run = in_order(lr=0.02)
    if at == 10:  # first seen at step 18
        clean = list(run.train)
        run = run._replace(train=[*clean, *clean, *poisoned(run, 1).train])
        at = 19
    else:
        run = poisoned(run, at)
    with pytest.raises(DivergedError) as error:
        fit(run, 40, directory=tmp_path)
    assert str(error.value) == (
        f"the loss is nan at step {at}, also at lr x6e-06; look at the data and the loss of these "
        "steps"
    )
    tape = lines(tmp_path / "tape.jsonl")
    assert [row["step"] for row in tape] == list(range(committed))
    check_finite(tmp_path, run, tape)
    windows = lines(tmp_path / "windows.jsonl")
    last = [w for w in windows if w["start"] == committed]
    assert len(last) == 11 * ladders and {w["outcome"] for w in last} == {"rewound"}
    assert {w["reason"] for w in last} == {f"the loss is nan at step {at}"}
    assert (tmp_path / "checkpoints" / f"window-{committed:08d}").is_dir()


def test_where_no_lr_helps_all_controls_go_back_to_those_of_the_beginning() -> None:
    """A rewritten momentum is what makes the second window non-finite, at whatever lr."""

    class Wild(Rewrite):
        def propose(self, schedule: Schedule, *rest: Any, **more: Any) -> Proposal:
            return Proposal(schedule, {"momentum": 5.0}, -1.0)

    run = in_order(lr=0.02)

    def fragile(model: nn.Module, batch: Any) -> Any:
        loss, metrics = classify(model, batch)
        wild = run.optimizer.param_groups[0]["momentum"] > 0.99
        return loss * (math.nan if wild else 1.0), metrics

    notices: list[str] = []
    result = fit(
        run._replace(loss_fn=fragile),
        24,
        rewrite=Wild(accept=False),
        listeners=[lambda e: notices.append(e.message) if isinstance(e, Notice) else None],
    )
    assert [n for n in notices if n.startswith("no lr keeps the steps from 8 on finite")]
    assert result.schedule["momentum"][8:16].tolist() == [0.9] * 8
    second = [w for w in result.windows if w["start"] == 8 and w["outcome"] == "rewound"]
    assert len(second) == 11


def test_without_rewriting_divergence_is_an_error_too(tmp_path: Path) -> None:
    run = poisoned(in_order(), 5)
    with pytest.raises(DivergedError, match=r"^the loss is nan at step 5; lower the lr, or turn "):
        fit(run, 40, rewrite=False, directory=tmp_path)
    assert lines(tmp_path / "tape.jsonl") == []


def test_a_state_that_overflows_without_a_loss_that_does() -> None:
    """The last step of a window makes the weights infinite: no later loss is there to tell."""

    class Trap(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, trapped: bool) -> Tensor:
            ctx.trapped = trapped
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            return g * (math.inf if ctx.trapped else 1.0), None

    inner = nn.Sequential(nn.Linear(6, 3))
    train = [(x, y, i == 7) for i, (x, y) in enumerate(in_order().train)]

    def trapped(model: nn.Module, batch: Any) -> Tensor:
        x, labels, trap = batch
        return nn.functional.cross_entropy(Trap.apply(model[0](x), trap), labels)

    run = Run(inner, torch.optim.SGD(inner.parameters(), lr=0.1), trapped, train, None)
    with pytest.raises(DivergedError, match="the state is not finite after step 7"):
        fit(run, 16, objective=Objective(loss_weight=1.0, terminal_weight=0.0))
    assert all(p.isfinite().all() for p in inner.parameters())


def test_validation_that_is_not_finite_is_never_committed() -> None:
    """At whatever lr, in the second window: the first one's proposals are judged as ever."""
    run = in_order()
    val = [*run.val] * 2  # type: ignore[misc]
    val[4] = (val[4][0] * math.nan, val[4][1])
    rows: list[dict[str, Any]] = []

    def listener(event: Any) -> None:
        if isinstance(event, Committed):
            rows.extend(event.rows)

    records = []
    try:
        records = fit(run._replace(val=val), 24, listeners=[listener]).windows
    except DivergedError as error:
        assert str(error).startswith("the objective is not finite at steps [8, 16)")
    assert len(rows) >= 8
    assert not [w for w in records if w["start"] == 8 and w["outcome"] == "accepted"]
    check_finite(None, run, rows)


def test_a_replay_whose_validation_is_not_finite_is_rejected() -> None:
    """Finite where the roll is judged, with a graph; NaN where the replay is, without one."""

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        loss, metrics = classify(model, batch)
        return loss if torch.is_grad_enabled() else loss * math.nan, metrics

    run = in_order()._replace(loss_fn=loss_fn)
    result = fit(run, 16)
    assert set(outcomes(result)) == {"rejected"}
    assert all(w["objective_after"] is None for w in result.windows)
    assert len(result.tape) == 16
    check_finite(None, run, result.tape)


class Edge(nn.Module):
    """|w|^1.5 at w = 0: value and gradient are 0, the second derivative is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 3)
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.w.abs().pow(1.5).sum()


def test_a_hypergradient_that_is_not_finite_is_rejected() -> None:
    def make() -> Run:
        run = in_order()
        seed_everything(3)
        model = Edge()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)

        def loss_fn(model: nn.Module, batch: Any) -> Any:
            loss, metrics = classify(model, batch)
            return loss + model.w.abs().pow(1.5).sum() + 1e-3 * model.w.sum() * 0, metrics

        return run._replace(model=model, optimizer=optimizer, loss_fn=loss_fn)

    result = check_ordinary(make, 20)
    assert set(outcomes(result)) == {"rejected"} and len(result.windows) == 3
    for w in result.windows:
        assert w["reason"].startswith("hypergradient non-finite: the costate is not finite from")
        assert w["objective_after"] is None
    assert result.record["cost"]["rejected_windows"] == 3
    check_finite(None, make(), result.tape)


# Causality ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stride", "val", "seen"),
    [(8, True, 16), (8, False, 16 + 4), (4, True, 4 + 12), (4, False, 16 + 4)],
)
def test_what_is_observed_later_changes_nothing_earlier(stride: int, val: bool, seen: int) -> None:
    """Windows that begin before step 16 - 8 + stride see batches up to `seen`, and no others.

    Their committed controls, and their lines on the tape, stay bit-equal when later batches change.
    """
    settled = 16 if stride == 8 else 12

    def result(changed_from: int) -> RunResult:
        run = problem_run("mlp", "adamw", val=val)
        train = [(x if t < changed_from else -2 * x, y) for t, (x, y) in enumerate(run.train)]
        return fit(run._replace(train=train), 28, stride=stride, rewrite=NOISY)

    plain, later, earlier = result(1000), result(seen), result(seen - 1)
    assert plain.tape[:settled] == later.tape[:settled]
    before = plain.schedule.window(0, settled)
    assert before == later.schedule.window(0, settled)
    assert plain.tape[settled:] != later.tape[settled:]
    assert plain.schedule != later.schedule
    # The last batch that they may see does matter, so that the bound is tight.
    assert before != earlier.schedule.window(0, settled)


# Events and the ledger ---------------------------------------------------------------------------

LETTER = {"roll": "r", "rewrite": "w", "restore": "b", "replay": "p", "commit": "c", "slide": "s"}


@pytest.mark.parametrize("stride", [8, 3])
@pytest.mark.parametrize("law", [Rewrite(), Uphill(), NOISY], ids=["law", "uphill", "noisy"])
def test_the_six_verbs(stride: int, law: Rewrite) -> None:
    events: list[Any] = []
    result = fit(in_order(), 20, stride=stride, rewrite=law, listeners=[events.append])
    verbs = "".join(LETTER[e.verb] for e in events if isinstance(e, VerbStarted))
    windows = len(range(0, 20, stride))
    assert re.fullmatch(
        r"r(br)*bpw(bp){1,2}(br)?cs(r(br)*w(bp){1,2}(br)?cs)*r(br)*w(bp){1,2}(br)?c", verbs
    )
    assert verbs.count("c") == windows and verbs.count("s") == windows - 1
    if isinstance(law, Uphill):
        assert verbs == "cs".join(["rbpwbpbpbr"] + ["rwbpbpbr"] * (windows - 1)) + "c"
    assert [e.record for e in events if isinstance(e, WindowAttempted)] == result.windows
    assert [row for e in events if isinstance(e, Committed) for row in e.rows] == result.tape
    assert isinstance(events[0], RunStarted) and isinstance(events[-1], RunEnded)
    assert events[0].start == 0 and events[0].steps == 20 and events[0].rewriting
    assert events[-1].result == result.record
    for e in events:
        if isinstance(e, VerbStarted):
            assert (e.start, e.stop) == (e.window * stride, min(e.window * stride + 8, 20))


def test_verbs_without_rewriting(tmp_path: Path) -> None:
    events: list[Any] = []
    fit(in_order(), 20, rewrite=False, directory=tmp_path, listeners=[events.append])
    assert [e.verb for e in events if isinstance(e, VerbStarted)] == [
        "roll", "commit", "slide", "roll", "commit", "slide", "roll", "commit",
    ]  # fmt: skip
    assert [e.step for e in events if isinstance(e, StepTaken)] == list(range(20))
    assert [e.step for e in events if isinstance(e, CheckpointSaved)] == [0, 8, 16, 20]


@pytest.mark.parametrize("product", ["exact", "forward-difference", "central-difference"])
@pytest.mark.parametrize("lr", [0.05, 10.0])
@pytest.mark.parametrize("stride", [8, 5])
def test_the_ledger(product: str, lr: float, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step that was taken, the objective's batches per look back, and the products.

    Without the proof of the first hypergradient, whose steps depend on what it finds.
    """
    monkeypatch.setattr(
        "rhc.loop.fit.ReversePass",
        lambda *parts, **own: ReversePass(*parts, **{**own, "verified": False}),
    )
    monkeypatch.setattr("rhc.loop.replay_check.TIMES", 3)  # of no gradient: one's cost
    taken: list[int] = []
    result = fit(
        in_order(lr=lr, norm=False),
        20,
        stride=stride,
        product=product,
        controls=["lr"],
        rewrite=Uphill() if lr < 1 else Rewrite(cooldown=0.0),
        listeners=[lambda e: taken.append(e.step) if isinstance(e, StepTaken) else None],
    )
    cost = result.record["cost"]
    windows = [(start, min(start + 8, 20)) for start in range(0, 20, stride)]
    judged = len([w for w in result.windows if w["objective_after"] is not None])
    share = 4  # validation batches as large as the training batches
    evaluations = len(taken) + share * len(windows)
    products = sum(stop - start for start, stop in windows)
    assert cost["windows"] == len(windows)
    assert cost["gradient_evaluations"] == evaluations
    assert cost["hessian_products"] == products
    # Exact products would take 3, but the rolls of a model this small keep their graphs.
    price = {"exact": 2, "forward-difference": 1, "central-difference": 2}[product]
    total = evaluations + price * products + judged * share / 3 + 1
    assert cost["plain_run_equivalents"] == pytest.approx(total / 20, rel=1e-12)
    assert cost["plain_run_equivalents"] >= 2
    if lr > 1:
        assert cost["rewound_windows"] >= 1
    else:
        assert cost["rejected_windows"] == len(windows) and cost["rewound_windows"] == 0
    assert cost["peak_memory_bytes"] > 10**6


# Settings that cannot be used --------------------------------------------------------------------


def unsteerable(run: Run) -> Run:
    return run._replace(optimizer=torch.optim.Adadelta(run.model.parameters(), lr=0.1))


def without_momentum(run: Run) -> Run:
    return run._replace(optimizer=torch.optim.SGD(run.model.parameters(), lr=0.1))


BAD: dict[str, tuple[dict[str, Any], Callable[[Run], Run], str]] = {
    "window": ({"window": 0}, lambda r: r, "window must be ≥ 1, got 0; try --window 50"),
    "stride": (
        {"stride": 80},
        lambda r: r,
        "stride must be in [1, 8] for window=8, got 80; lower --stride or raise --window",
    ),
    "no stride": ({"stride": 0}, lambda r: r, "stride must be in [1, 8] for window=8, got 0"),
    "start": ({"start": "nil"}, lambda r: r, "start must be one of zero, probe, given, got 'nil'"),
    "template": ({"template": "nil"}, lambda r: r, "template must be one of constant, cosine"),
    "engine": (
        {"engine": "higher"},
        lambda r: r,
        "engine must be 'adjoint', got 'higher'; 'higher' is for rhc.hypergradient alone",
    ),
    "control": (
        {"controls": ["momentun"]},
        lambda r: r,
        "unknown control 'momentun': did you mean 'momentum'? there are: lr, momentum, noise, weig",
    ),
    "no controls": ({"controls": []}, lambda r: r, "controls is empty; name some of lr, momentum"),
    "momentum 0": (
        {"controls": ["momentum"]},
        without_momentum,
        "momentum cannot be steered from 0, where the optimizer keeps no momentum buffer",
    ),
    "optimizer": ({}, unsteerable, "Adadelta"),
    "segment": ({"segment": 9}, lambda r: r, "segment must be in [1, 8] for a window of 8 steps"),
    "product": (
        {"product": "exakt"},
        lambda r: r,
        "got 'exakt'; did you mean 'exact'?",
    ),
    "clip": ({"clip_norm": 0.0}, lambda r: r, "clip_norm must be > 0, got 0; use None not to"),
    "clip value": ({"clip_value": -1.0}, lambda r: r, "clip_value must be > 0, got -1; use None"),
    "two clips": (
        {"clip_value": 1.0, "clip_norm": 2.0},
        lambda r: r,
        "clip_norm and clip_value cannot go together, got 2 and 1; give one of them",
    ),
    "accumulate": ({"accumulate": 0}, lambda r: r, "accumulate must be ≥ 1, got 0; use 1 not to"),
    "budget": (
        {"memory_budget": 0},
        lambda r: r,
        "memory_budget must be a number of bytes, such as",
    ),
    "discount": ({"discount": 1.1}, lambda r: r, "discount must be in (0, 1], got 1.1; use 1 for"),
    "costate clip": ({"costate_clip": 0.0}, lambda r: r, "costate_clip must be > 0, got 0; use No"),
    "groups of noise": (
        {"per_group": ["noise"]},
        lambda r: r,
        "noise has no parameter groups; leave it out of per_group",
    ),
    "groups of nothing": (
        {"per_group": ["weight_decay"]},
        lambda r: r,
        "per_group names 'weight_decay', which is not rewritten; add it to controls, of which "
        "there are now lr, momentum, noise",
    ),
    "groups without rewriting": (
        {"per_group": ["lr"], "rewrite": False},
        lambda r: r,
        "per_group names 'lr', which is not rewritten",
    ),
    "groups of an unknown control": (
        {"per_group": ["rl"]},
        lambda r: r,
        "unknown control 'rl'",
    ),
    "a group out of bounds": (
        {"per_group": ["lr"]},
        lambda r: r._replace(
            optimizer=torch.optim.SGD(
                [{"params": [p], "lr": 20.0 * i + 0.1} for i, p in enumerate(r.model.parameters())]
            )
        ),
        "lr must be in [1e-08, 10], got 20.1",
    ),
    "keep": (
        {"keep_checkpoints": 0, "directory": "unused"},
        lambda r: r,
        "keep_checkpoints must be ≥ 1, got 0",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_settings_that_cannot_be(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    options, change, message = BAD[name]
    run = in_order()
    before = state_of(run)
    with pytest.raises(InputError, match=re.escape(message)):
        runner(change(run), **options)
    assert unequal(before, state_of(run)) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lr", [0.0, 1e-9, 20.0])
@pytest.mark.parametrize("controls", [None, ["lr"]])
def test_an_lr_outside_its_bounds(lr: float, controls: list[str] | None) -> None:
    message = re.escape(
        f"lr must be in [1e-08, 10], got {lr:g}; choose a value within these bounds"
    )
    with pytest.raises(InputError, match=message):
        runner(in_order(lr=lr), controls=controls)


def test_a_parameter_that_is_not_the_models() -> None:
    run = in_order()
    optimizer = torch.optim.SGD([*run.model.parameters(), nn.Parameter(torch.zeros(3))], lr=0.1)
    for rewrite in (True, False):
        with pytest.raises(
            InputError, match=r"of shape \(3,\), is not a parameter of the model; re"
        ):
            runner(run._replace(optimizer=optimizer), rewrite=rewrite)


LOSSES: dict[str, tuple[Callable[[nn.Module, Any], Any], str]] = {
    "a vector": (
        lambda model, batch: model(batch[0]).mean(1),
        "loss_fn must return a scalar tensor, got shape (8,); reduce it with .mean()",
    ),
    "a number": (
        lambda model, batch: float(model(batch[0]).detach().mean()),
        "loss_fn must return a scalar tensor or (scalar tensor, dict), got float",
    ),
    "no graph": (
        lambda model, batch: model(batch[0]).mean().detach(),
        "loss_fn returned a loss without a graph (requires_grad is False)",
    ),
}


@pytest.mark.parametrize("directory", [True, False])
@pytest.mark.parametrize("rewrite", [True, False])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_cannot_be_used(
    name: str, rewrite: bool, directory: bool, tmp_path: Path
) -> None:
    loss_fn, message = LOSSES[name]
    path = tmp_path / "run" if directory else None
    with pytest.raises(InputError, match=re.escape(message)):
        fit(in_order()._replace(loss_fn=loss_fn), 8, rewrite=rewrite, directory=path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("which", ["train", "val"])
def test_an_empty_loader_leaves_nothing_behind(which: str, tmp_path: Path) -> None:
    run = in_order()._replace(**{which: []})
    message = f"{which}_loader yields no batches; check the dataset's length, batch_size"
    with pytest.raises(InputError, match=message):
        fit(run, 8, directory=tmp_path / "run")
    with pytest.raises(InputError, match=message):
        fit(run, 8)
    assert list(tmp_path.iterdir()) == []


def test_steps_and_resume_are_checked() -> None:
    with pytest.raises(InputError, match=r"steps must be ≥ 1, got 0"):
        runner(in_order()).fit(0)
    with pytest.raises(InputError, match=r"resume must be one of auto, never, got 'yes'"):
        runner(in_order()).fit(8, resume="yes")  # type: ignore[arg-type]


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(
            InputError, match=r"cannot be written \(.*\); choose another --directory"
        ):
            fit(in_order(), 8, directory=path)
    assert (tmp_path / "file").read_text() == "mine"

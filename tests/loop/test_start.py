"""Where a schedule starts: the search, the hypergradient at lr 0, and what a run makes of them."""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import FILES, Run, Stop, files, make_run, plain_loop, state_of, stop_at_event, unequal
from torch import nn
from torch.nn import functional as F

import rhc
from rhc.errors import InputError
from rhc.events import Notice, StartFound, StartTried
from rhc.loop.lr_search import DROP, FEWEST, Stage, probe, zero_lrs
from rhc.loop.trials import NoRoom
from rhc.loop.update_rule import Rewrite, usual_law
from rhc.runner import DivergedError, RunResult
from rhc.schedule import TEMPLATES, Schedule, template_factors
from rhc.training.objective import average_weights

# The search --------------------------------------------------------------------------------------


def valley(place: float, cliff: float = math.inf) -> Any:
    """A loss with its minimum at a factor, infinite from `cliff` on; it counts its calls."""

    def judge(n: int, factor: float) -> float:
        judge.calls.append((n, factor))  # type: ignore[attr-defined]
        return math.inf if factor >= cliff else math.log(factor / place) ** 2

    judge.calls = []  # type: ignore[attr-defined]
    return judge


@pytest.mark.parametrize("place", [1e-4, 0.03, 1.0, 7.0, 2e5])
def test_the_search_ends_where_the_loss_is_lowest(place: float) -> None:
    """A parabola in log lr is found exactly, from five decades away on either side."""
    judge = valley(place)
    found = probe(judge, 1000, 1e-8, 1e8)
    assert found == pytest.approx(place, rel=1e-6)
    lengths = [n for n, _ in judge.calls]
    assert lengths == sorted(lengths) and set(lengths) == {25, 100, 250}
    assert len(set(judge.calls)) == len(judge.calls), "nothing is rolled twice"
    assert sum(lengths) < 1700


def test_the_search_stays_below_what_diverges() -> None:
    judge = valley(1.0, cliff=0.5)
    found = probe(judge, 1000, 1e-8, 1e8)
    assert found is not None and 0.2 < found < 0.5


def test_the_search_comes_down_from_where_everything_diverges() -> None:
    found = probe(valley(1e-3, cliff=1e-2), 1000, 1e-8, 1e8)
    assert found == pytest.approx(1e-3, rel=1e-6)


def test_the_search_keeps_within_its_bounds() -> None:
    assert probe(valley(1e6), 1000, 1e-2, 50.0) == pytest.approx(50.0, rel=0.7)
    judge = valley(1e6)
    probe(judge, 1000, 1e-2, 50.0)
    assert all(1e-2 <= factor <= 50.0 for _, factor in judge.calls)


def test_nothing_finite_is_nothing_found() -> None:
    assert probe(lambda n, factor: math.nan, 1000, 1e-8, 1e8) is None


def test_a_flat_loss_keeps_the_first_guess() -> None:
    assert probe(lambda n, factor: 1.0, 1000, 1e-8, 1e8) == 1.0


def test_short_runs_are_probed_in_full() -> None:
    judge = valley(2.0)
    probe(judge, 20, 1e-8, 1e8)
    assert {n for n, _ in judge.calls} == {FEWEST}
    judge = valley(2.0)
    probe(judge, 5, 1e-8, 1e8, [Stage(1.0, 2.0, 12)])
    assert {n for n, _ in judge.calls} == {5}


# At lr 0 -----------------------------------------------------------------------------------------


def test_lrs_from_slopes() -> None:
    """The objective falls by DROP to first order; groups share in that by √n."""
    gradient = torch.tensor([[-1.0, -4.0, 2.0, -1.0], [-1.0, -4.0, 2.0, -1.0]])
    found = zero_lrs(gradient, 2.0, [100, 25, 9, 4], [0.1, 0.1, 0.1, 0.0])
    assert found is not None
    slopes = [1.0, 4.0]
    assert sum(s * lr for s, lr in zip(slopes, found, strict=False)) == pytest.approx(DROP)
    assert found[0] / found[1] == pytest.approx(2.0 * 4.0)
    assert found[2] == min(found[:2]), "a group that would raise the objective goes slowly"
    assert found[3] == 0, "a frozen group stays so"


def test_no_lr_where_nothing_falls() -> None:
    assert zero_lrs(torch.ones(3, 2), 1.0, [1, 1], [0.1, 0.1]) is None
    assert zero_lrs(torch.full((3, 1), math.nan), 1.0, [1], [0.1]) is None


def linear_run(scale: float = 1.0) -> Run:
    """Two layers without bias, a group each; the first stores its weights divided by `scale`."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(4, 3).double() / scale)
            self.b = nn.Parameter(torch.randn(2, 4).double())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(x @ (scale * self.a).T) @ self.b.T

    model = Model()
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(64, 3, generator=draw).double()
    y = torch.randn(64, 2, generator=draw).double()
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 64, 8)]
    groups = [{"params": [model.a]}, {"params": [model.b]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    return Run(model, optimizer, lambda m, b: F.mse_loss(m(b[0]), b[1]), batches, batches)


def tried(run: Run, **options: Any) -> tuple[list[dict[str, Any]], StartFound, RunResult]:
    records: list[dict[str, Any]] = []
    found: list[StartFound] = []

    def listener(event: Any) -> None:
        if isinstance(event, StartTried):
            records.append(dict(event.record))
        if isinstance(event, StartFound):
            found.append(event)

    runner = rhc.Runner(*run, listeners=[listener], **{"window": 8, **options})
    result = runner.fit(steps=40)
    return records, found[0], result


def test_the_hypergradient_at_lr_0_is_the_change_per_lr() -> None:
    """Against a roll at a tiny lr of each group: momentum, averaging and all."""
    run = linear_run()
    records, _, _ = tried(run, start="zero", rewrite=False)
    (record,) = [r for r in records if r["kind"] == "zero"]
    steps, decay = record["steps"], 0.99
    base, slopes = {}, []
    for group in (None, 0, 1):
        again = linear_run()
        lrs = [0.0, 0.0]
        if group is not None:
            lrs[group] = 1e-7
        for own, lr in zip(again.optimizer.param_groups, lrs, strict=True):
            own["lr"] = lr
        iterates = []
        batches = list(again.train)
        frozen = [p.detach().clone() for p in again.model.parameters()]
        buffers = [torch.zeros_like(p) for p in frozen]
        theta = [p.clone() for p in frozen]
        for t in range(steps):
            again.optimizer.zero_grad()
            again.loss_fn(again.model, batches[t % len(batches)]).backward()
            for i, p in enumerate(again.model.parameters()):
                assert p.grad is not None
                buffers[i] = 0.9 * buffers[i] + p.grad
                theta[i] = theta[i] - lrs[i] * buffers[i]
            iterates.append([v.clone() for v in theta])
        weights = average_weights(decay, steps)
        mean = [sum(w * it[i] for w, it in zip(weights, iterates, strict=True)) for i in (0, 1)]
        with torch.no_grad():
            for p, m in zip(again.model.parameters(), mean, strict=True):
                p.copy_(torch.as_tensor(m))
            value = torch.stack([again.loss_fn(again.model, b) for b in list(again.val)[:8]]).mean()
        if group is None:
            base["J"] = float(value)
        else:
            slopes.append((base["J"] - float(value)) / 1e-7 / base["J"])
    expected = zero_lrs(-torch.tensor([slopes]), 1.0, [12, 8], [0.1, 0.1])
    assert record["objective"] == pytest.approx(base["J"], rel=1e-9)
    assert record["lr"] == pytest.approx(expected, rel=1e-4)


def test_layers_in_other_units_want_other_lrs() -> None:
    """A layer stored divided by 100 gets 1e-4 of the lr, and trains all the same."""
    _, plain, straight = tried(linear_run(), start="zero", rewrite=False)
    _, scaled, crooked = tried(linear_run(100.0), start="zero", rewrite=False)
    assert scaled.lr[0] / plain.lr[0] == pytest.approx(1e-4, rel=1e-3)
    assert scaled.lr[1] == pytest.approx(plain.lr[1], rel=1e-3)
    assert crooked.val_loss == pytest.approx(straight.val_loss, rel=1e-3)


# In a run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("start", ["zero", "probe"])
@pytest.mark.parametrize("rewrite", [True, False])
def test_from_any_lr_to_the_same_place(optimizer: str, start: str, rewrite: bool) -> None:
    """Lrs seven decades apart end within a factor of two of each other, and train well."""
    lrs, losses = [], []
    for lr in (1e-6, 1e-3, 10.0):
        run = make_run(optimizer, lr=lr)
        _, found, result = tried(run, start=start, rewrite=rewrite)
        lrs.append(found.lr)
        losses.append(result.val_loss)
        assert found.given == pytest.approx(lr)
        assert found.cost * 40 <= result.record["cost"]["gradient_evaluations"]
    assert max(lrs) < 2 * min(lrs)
    assert max(losses) < 1.0 < math.log(3)


@pytest.mark.parametrize("template", TEMPLATES)
def test_without_rewriting_the_run_is_the_plain_loop_of_its_schedule(template: str) -> None:
    run = make_run("sgd", "list", lr=1e-5)
    result = rhc.Runner(*run, rewrite=False, start="probe", template=template).fit(steps=25)
    lr = result.schedule["lr"]
    factors = template_factors(template, 25, 0.2)
    assert torch.allclose(lr / lr.max(), factors / factors.max(), rtol=1e-12)
    again = make_run("sgd", "list", lr=1e-5)
    plain_loop(again, 25, result.schedule)
    assert not unequal(state_of(run)["model"], state_of(again)["model"])


def test_looking_for_a_start_leaves_no_trace() -> None:
    """Weights, buffers, optimizer, loaders and random states are those of a run given that lr."""
    run = make_run("adamw", "generator", lr=1e-5)
    result = rhc.Runner(*run, rewrite=False, start="probe").fit(steps=30)
    again = make_run("adamw", "generator", lr=1e-5)
    plain_loop(again, 30, result.schedule)
    assert not unequal(state_of(run), state_of(again))


def test_group_ratios_stay_with_a_probe_and_go_with_zero() -> None:
    run = linear_run()
    run.optimizer.param_groups[1]["lr"] = 0.01
    _, found, result = tried(run, start="probe", rewrite=False)
    assert isinstance(found.lr, float) and result.schedule["lr"].dim() == 1
    groups = run.optimizer.param_groups
    assert groups[0]["lr"] == pytest.approx(10 * groups[1]["lr"])
    _, found, result = tried(linear_run(), start="zero")
    assert len(found.lr) == 2 and result.schedule["lr"].shape == (40, 2)


def test_without_validation_data_the_batches_that_follow_judge() -> None:
    run = make_run("sgd", lr=1e-5)._replace(val=None)
    records, found, _ = tried(run, start="zero")
    assert found.lr > 1e-3 and all(r["loss"] is None or r["loss"] > 0 for r in records[1:])


def test_a_start_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    """Nothing that was tried is tried again, and the run ends as if it had not been stopped."""
    straight = make_run("sgd", lr=1e-4)
    rhc.Runner(*straight, window=8, directory=tmp_path / "straight").fit(steps=24)
    lines = (tmp_path / "straight/start.jsonl").read_text().splitlines()
    for stop in (2, 5, len(lines) + 1):
        directory = tmp_path / f"stopped-{stop}"
        with pytest.raises(Stop):
            rhc.Runner(
                *make_run("sgd", lr=1e-4),
                window=8,
                directory=directory,
                listeners=[stop_at_event(stop)],
            ).fit(steps=24)
        path = directory / "start.jsonl"
        whole = path.read_text()
        assert whole.splitlines() == lines[: whole.count("\n")] and whole
        path.write_text(whole + lines[-1][:7])  # the line at which the power went
        told: list[Any] = []
        run = make_run("sgd", lr=1e-4)
        rhc.Runner(*run, window=8, directory=directory, listeners=[told.append]).fit(steps=24)
        assert path.read_text().splitlines() == lines
        assert sum(isinstance(e, StartTried) for e in told) == len(lines) - whole.count("\n")
        assert files(directory) == files(tmp_path / "straight") and set(FILES)
        assert not unequal(state_of(run), state_of(straight))
        costs = [
            json.loads((d / "result.json").read_text())["cost"]["gradient_evaluations"]
            for d in (directory, tmp_path / "straight")
        ]
        assert costs[0] == costs[1]


def test_a_loss_that_is_never_finite_is_an_error(tmp_path: Path) -> None:
    run = make_run("sgd")
    bad = run._replace(loss_fn=lambda model, batch: model(batch[0]).sum() * math.nan)
    with pytest.raises(DivergedError, match="no lr within its bounds"):
        rhc.Runner(*bad, start="probe").fit(steps=20)


def test_steering_ends_where_the_law_says() -> None:
    run = make_run("sgd", "list", dropout=0.0)
    law = Rewrite(until=0.5)
    result = rhc.Runner(*run, window=5, start="given", rewrite=law).fit(steps=40)
    assert {w["start"] for w in result.windows} == {0, 5, 10, 15}
    again = make_run("sgd", "list", dropout=0.0)
    plain_loop(again, 40, result.schedule)
    assert not unequal(state_of(run)["model"], state_of(again)["model"])


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates(template: str) -> None:
    factors = template_factors(template, 50, 0.2)
    assert factors.max() == 1 and bool((factors > 0).all())
    assert template == "1cycle" or bool((factors.diff() <= 0).all())
    warmed = template_factors(template, 50, 0.2, 0.1)
    if template != "1cycle":
        rise = torch.tensor([1, 2, 3, 4, 5], dtype=torch.float64) / 6
        assert torch.equal(warmed[:5], factors[:5] * rise)
        assert torch.equal(warmed[5:], factors[5:])
    Schedule({"lr": 0.1 * factors})


def test_a_probe_finds_the_ratio_of_groups_that_have_one_lr() -> None:
    """And keeps one that was chosen; the lr that is given is still where it looks first."""
    _, zero, _ = tried(linear_run(), start="zero", rewrite=False)
    records, probed, _ = tried(linear_run(), start="probe", rewrite=False)
    assert probed.lr[0] / probed.lr[1] == pytest.approx(zero.lr[0] / zero.lr[1], rel=1e-6)
    first = next(r for r in records if r["kind"] == "probe")
    assert max(first["from"]) == pytest.approx(0.1)
    chosen = linear_run()
    chosen.optimizer.param_groups[1]["lr"] = 0.05
    records, _, result = tried(chosen, start="probe", rewrite=False)
    assert all(r["kind"] != "zero" for r in records) and result.schedule["lr"].dim() == 1


def test_a_probe_from_so_low_an_lr_that_a_group_has_none() -> None:
    """At 1e-8 for the one, the other's share would lie below what an lr may be."""
    low = linear_run(scale=100.0)
    for group in low.optimizer.param_groups:
        group["lr"] = 1e-8
    _, found, result = tried(low, start="probe", rewrite=False)
    _, zero, _ = tried(linear_run(scale=100.0), start="zero", rewrite=False)
    assert found.lr[0] / found.lr[1] == pytest.approx(zero.lr[0] / zero.lr[1], rel=1e-6)
    assert found.lr[1] == pytest.approx(zero.lr[1], rel=1.0)
    assert math.isfinite(result.val_loss or math.nan)


# Where nothing is learned, and what the search may cost -------------------------------------------


def product_run(seed: int, lr: float = 0.05, targets: str = "product", steps: int = 1024) -> Run:
    """y = x0 x1 of 20 inputs: no short roll gets beyond the mean of the targets."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 1))
    x = torch.randn(steps + 256, 20)
    y = x[:, :1] * x[:, 1:2] if targets == "product" else torch.randn(steps + 256, 1)
    batches = [(x[i : i + 64], y[i : i + 64]) for i in range(0, steps + 256, 64)]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    n = steps // 64
    return Run(model, optimizer, lambda m, b: F.mse_loss(m(b[0]), b[1]), batches[:n], batches[n:])


def notices_of(told: list[Any]) -> list[str]:
    return [event.message for event in told if isinstance(event, Notice)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{}, {"start": "zero"}, {"start": "zero", "rewrite": False}])
def test_a_flat_beginning_is_searched_by_longer_rolls(seed: int, options: dict[str, Any]) -> None:
    told: list[Any] = []
    result = rhc.Runner(*product_run(seed), listeners=[told.append], **options).fit(300)
    assert result.val_loss is not None and result.val_loss < 0.35
    assert result.cost["plain_run_equivalents"] <= 5
    assert any(
        "steps learn nothing that tells lrs apart; by rolls of" in n for n in notices_of(told)
    )


@pytest.mark.parametrize("start", ["zero", "probe"])
def test_where_nothing_can_be_learned_the_lr_stays_as_given(start: str) -> None:
    told: list[Any] = []
    run = product_run(0, lr=0.02, targets="noise", steps=256)
    options: dict[str, Any] = {"start": start, "rewrite": False}
    result = rhc.Runner(*run, listeners=[told.append], **options).fit(80)
    (found,) = [event for event in told if isinstance(event, StartFound)]
    assert found.lr == 0.02 == float(result.schedule["lr"].max())
    (notice,) = notices_of(told)
    assert re.search(
        r"no roll of up to \d+ steps learns anything that tells lrs apart: lr is 0\.02, as given",
        notice,
    )
    again = product_run(0, lr=0.02, targets="noise", steps=256)
    with pytest.warns(UserWarning, match="as given"):  # said also where nobody listens
        assert rhc.Runner(*again, **options).fit(80).val_loss == result.val_loss


def test_a_search_that_learns_nothing_goes_on_where_it_was_cut_short(tmp_path: Path) -> None:
    def fitted(name: str, *listeners: Any) -> RunResult:
        run = product_run(0, lr=0.02, targets="noise", steps=256)
        return rhc.Runner(*run, directory=tmp_path / name, listeners=listeners).fit(60)

    straight = fitted("straight", lambda event: None)
    lines = (tmp_path / "straight/start.jsonl").read_text().splitlines()
    assert {json.loads(line)["kind"] for line in lines} == {"probe", "untrained"}
    for stop in (len(lines) // 2, len(lines) - 1):
        with pytest.raises(Stop):
            fitted(f"cut-{stop}", stop_at_event(stop + 1))
        told: list[Any] = []
        result = fitted(f"cut-{stop}", told.append)
        assert (tmp_path / f"cut-{stop}/start.jsonl").read_text().splitlines() == lines
        assert 0 < sum(isinstance(e, StartTried) for e in told) < len(lines)
        assert result.val_loss == straight.val_loss
        assert result.cost["plain_run_equivalents"] == straight.cost["plain_run_equivalents"]


def test_a_first_loss_that_is_low_by_chance_is_no_divergence() -> None:
    """Every later loss is above twice the first, whatever the lr."""
    run = make_run("sgd", "list", lr=0.01, dropout=0.0)
    calm = [(x * 0, y) for x, y in run.train[:1]]

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1])
        return loss if batch[0].any() else 0.01 * loss

    run = run._replace(train=calm + list(run.train[1:]), loss_fn=loss_fn)
    _, found, result = tried(run, start="probe", rewrite=False)
    assert found.lr > 0 and math.isfinite(result.val_loss or math.nan)


@pytest.mark.parametrize("start", ["zero", "probe", "given"])
@pytest.mark.parametrize("budget", [5.0, 3.0, 2.0, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 30, 100])
def test_the_budget_holds_for_every_length_of_run(start: str, budget: float, steps: int) -> None:
    told: list[Any] = []
    run = make_run("sgd", "list", lr=0.01, dropout=0.0)
    law = replace(usual_law(start), budget=budget)
    options: dict[str, Any] = {"start": start, "rewrite": law, "window": 20}
    result = rhc.Runner(*run, listeners=[told.append], **options).fit(steps)
    assert result.cost["plain_run_equivalents"] <= budget
    if budget == 1 and start != "given":
        assert "the budget has no room to look for the lr: it stays 0.01, as given" in notices_of(
            told
        )


@pytest.mark.parametrize(("room", "near"), [(10_000, 0.01), (700, 1.2), (100, 3.0)])
def test_a_search_without_room_for_longer_rolls_takes_shorter_ones(room: int, near: float) -> None:
    spent = 0

    def judge(n: int, factor: float) -> float:
        nonlocal spent
        if spent + n > room:
            raise NoRoom
        spent += n
        return math.log(factor / 20) ** 2

    found = probe(judge, 1000, 1e-8, 1e8, longest=lambda rolls: (room - spent) // rolls)
    assert found is not None and abs(math.log(found / 20)) < near and spent <= room


def test_an_optimizer_that_a_fit_left_at_a_low_lr_is_said() -> None:
    run = make_run("sgd", "list", lr=0.1)
    rhc.Runner(*run, rewrite=False, template="cosine").fit(20)
    with pytest.warns(UserWarning, match=r"lr is 0\.00\d+, where an earlier fit left .* at 0\.1; "):
        rhc.Runner(*run, rewrite=False).fit(5)
    run.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.warns(UserWarning, match=r"lr is 0 in every parameter group .* nothing is learned"):
        rhc.Runner(*run, rewrite=False).fit(5)
    with pytest.raises(InputError, match=r"lr is 0 in every parameter group .*start='probe'"):
        rhc.Runner(*run)
    run.optimizer.param_groups[0]["lr"] = 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rhc.Runner(*run, rewrite=False).fit(5)

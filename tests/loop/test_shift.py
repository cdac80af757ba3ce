"""Data that change under the model; rewrites of one window on top of each other; twins."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import FILES, Run, plain_loop, state_of, unequal
from torch import Tensor, nn

from rhc import HeldOutBatches, InputError, Objective, Rewrite, Runner, RunResult, Schedule, Twin
from rhc.events import Committed, Event
from rhc.loop.shift import rise
from rhc.loop.update_rule import USUAL, Proposal, added, faded
from rhc.report.live import Progress
from rhc.schedule import warming

SHIFT, STEPS = 46, 100


class Turning:
    """Batches of a linear problem whose solution turns round at step `SHIFT`."""

    def __init__(self, shift: int | None = SHIFT) -> None:
        self.shift = shift

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(3)
        for step in range(10 * STEPS):
            x = torch.randn(16, 4, generator=generator)
            sign = -1.0 if self.shift is not None and step >= self.shift else 1.0
            y = sign * x.sum(1, keepdim=True) + 0.1 * torch.randn(16, 1, generator=generator)
            yield x, y


def run(shift: int | None = SHIFT, lr: float = 0.02) -> Run:
    torch.manual_seed(0)
    first, last = nn.Linear(4, 8), nn.Linear(8, 1)
    model = nn.Sequential(first, nn.Tanh(), last)
    groups = [{"params": list(first.parameters())}, {"params": list(last.parameters())}]
    return Run(
        model,
        torch.optim.SGD(groups, lr=lr, momentum=0.9),
        lambda m, b: (m(b[0]) - b[1]).square().mean(),
        Turning(shift),
        None,
    )


def fit(given: Run | None = None, steps: int = STEPS, **options: Any) -> RunResult:
    settings: dict[str, Any] = {"start": "given", "template": "cosine", "rewrite": USUAL}
    return Runner(*(given or run()), **{"window": 10, **settings, **options}).fit(steps)


# The test for a surprise --------------------------------------------------------------------------


def noisy(n: int, level: float, seed: int = 0) -> list[float]:
    draw = random.Random(seed)
    return [level * (1 + 0.2 * draw.gauss(0, 1)) for _ in range(n)]


@pytest.mark.parametrize("place", [0, 1, 17, 44])
def test_the_first_step_of_a_rise_is_found(place: int) -> None:
    losses = [*noisy(place, 1.0, 1), *noisy(50 - place, 4.0, 2)]
    assert rise(noisy(50, 1.0), losses, 8.0) == place


@given(st.integers(0, 1000), st.floats(1e-6, 1e6))
def test_units_do_not_matter_and_noise_is_no_surprise(seed: int, unit: float) -> None:
    before, after = noisy(50, unit, seed), noisy(50, unit, seed + 1)
    assert rise(before, after, 8.0) is None
    assert rise(before, [5 * x for x in after], 8.0) == 0


def test_what_is_no_surprise() -> None:
    flat = [1.0] * 20
    assert rise(flat, [1.05] * 20, 8.0) is None  # without noise, a tenth is needed
    assert rise(flat, [1.2] * 20, 8.0) == 0
    assert rise([1.0] * 19, [9.0] * 20, 8.0) is None
    assert rise(flat, [], 8.0) is None
    assert rise(noisy(50, 1.0), [1.0] * 20 + [3.0] + [1.0] * 20, 8.0) is None  # one outlier


# Corrections --------------------------------------------------------------------------------------


def test_a_correction_fades() -> None:
    after, change = faded({"lr": 1.0}, {"lr": 0.5}, 0.5)
    assert after == {"lr": 0.75} and change == {"lr": -0.25}
    after, change = faded(after, {}, 0.5)
    assert after == {"lr": 0.375} and change == {"lr": -0.375}
    after, change = faded({"lr": (1.0, 0.0)}, {"lr": (0.0, 2.0), "noise": 1.0}, 1.0)
    assert after == {"lr": (1.0, 2.0), "noise": 1.0}
    assert change == {"lr": (0.0, 2.0), "noise": 1.0}
    assert added({"lr": 1.0}, {"lr": 2.0}) == {"lr": 3.0}


def test_lr_stays_below_a_ceiling_unless_it_was_above_it() -> None:
    law = Rewrite(most=math.log(2))
    old = Schedule({"lr": torch.tensor([[0.1, 0.1], [0.1, 5.0]])})
    new = Schedule({"lr": torch.tensor([[0.9, 0.15], [0.01, 9.0]])})
    bounded = law.bounded(new, old, torch.tensor([0.1, 1.0], dtype=torch.float64))
    assert torch.allclose(
        bounded["lr"], torch.tensor([[0.2, 0.15], [0.01, 5.0]], dtype=torch.float64)
    )
    assert Rewrite().bounded(new, old, torch.tensor(0.1)) is new


def test_in_the_warm_up_the_ceiling_is_counted_from_the_template() -> None:
    class Upwards(Rewrite):
        def propose(self, schedule: Schedule, *rest: Any, **more: Any) -> Proposal:
            higher = Schedule({"lr": schedule["lr"] * 9}, schedule.start)
            return Proposal(schedule.replaced(higher), {}, -1.0)

    law = Upwards(most=math.log(2), accept=False)
    result = fit(run(lr=1e-3), 40, rewrite=law, template="constant", warmup=0.5)
    assert torch.allclose(result.schedule["lr"], 2e-3 * warming(40, 0.5))


@pytest.mark.parametrize("carry", [0.0, 0.5, 1.0])
def test_after_a_window_the_plan_goes_back_towards_the_template(carry: float) -> None:
    law = Rewrite(until=0.05, carry=carry, retries=4)
    result = fit(run(None), rewrite=law, template="constant")
    (accepted,) = [w for w in result.windows if w["outcome"] == "accepted"]
    moved = math.log(accepted["after"]["lr"] / 0.02)
    assert moved != 0 and accepted["start"] == 0
    for window in range(1, 4):
        left = math.log(float(result.schedule["lr"][10 * window]) / 0.02)
        assert left == pytest.approx(moved * carry**window, abs=1e-9)


# Rewrites on top of each other --------------------------------------------------------------------


def test_rewrites_of_one_window_go_on_while_they_are_worth_it() -> None:
    law = Rewrite(step={"lr": 0.3}, iterations=5, worth=0.0, until=0.05, retries=2)
    result = fit(run(None, lr=5e-3), rewrite=law)
    accepted = [w for w in result.windows if w["outcome"] == "accepted"]
    assert len(accepted) > 2 and {w["start"] for w in accepted} == {0}
    for before, after in pairwise(accepted):
        assert after["objective_before"] == pytest.approx(before["objective_after"], rel=1e-5)
        assert after["objective_after"] < after["objective_before"]
    # Every further one may go twice as far.
    moves = [math.log(w["after"]["lr"] / w["before"]["lr"]) for w in accepted]
    assert moves[1] > 1.5 * moves[0] > 0
    last = accepted[-1]["after"]["lr"]
    assert float(result.schedule["lr"][:10].log().mean().exp()) == pytest.approx(last)


def test_windows_are_passed_over_where_looking_back_is_not_worth_it() -> None:
    result = fit(run(None), 300, rewrite=Rewrite(patience=1, worth=10.0))
    looked = sorted({w["start"] // 10 for w in result.windows})
    assert looked == [0, 2, 5, 10, 19]  # 1, 2, 4, 8 windows are passed over
    assert result.record["cost"]["hessian_products"] <= 5 * 10


def test_every_rewrite_is_kept_without_the_test() -> None:
    class Uphill(Rewrite):
        def propose(self, schedule: Any, gradient: Any, value: float, scale: float = 1.0) -> Any:
            turned = {name: -g for name, g in gradient.items()}
            return super().propose(schedule, turned, value, scale)

    windows = fit(run(None), 30, rewrite=Uphill(accept=False)).windows
    assert [w["outcome"] for w in windows] == ["accepted"] * 3
    assert any(w["objective_after"] > w["objective_before"] for w in windows)
    windows = fit(run(None), 30, rewrite=Uphill()).windows
    assert all(w["objective_after"] >= w["objective_before"] for w in windows)


# A shift ------------------------------------------------------------------------------------------


def test_a_window_ends_where_the_data_change_and_the_template_begins_anew() -> None:
    committed: list[Committed] = []

    def listener(event: Event) -> None:
        if isinstance(event, Committed):
            committed.append(event)

    result = fit(listeners=[listener])
    borders = [event.start for event in committed]
    assert SHIFT in borders and borders == sorted(borders)
    assert [row["step"] for row in result.tape] == list(range(STEPS))
    tried = [w for w in result.windows if w["reason"] == f"the template begun anew at step {SHIFT}"]
    assert len(tried) == 3 and sum(w["outcome"] == "accepted" for w in tried) == 1
    # The cosine had come down to about a half.
    lr = result.schedule["lr"]
    assert lr[SHIFT - 1] < 0.0125 and lr[-1] < 1e-4


def test_what_was_committed_is_the_plain_loop_of_the_schedule() -> None:
    own = run()
    result = fit(own)
    again = run()
    plain_loop(again, STEPS, result.schedule)
    assert not unequal(state_of(own)["model"], state_of(again)["model"])


def test_beginning_anew_pays_after_a_shift() -> None:
    def late(law: Rewrite) -> float:
        losses = [row["loss"] for row in fit(run(80), rewrite=law).tape]
        return sum(losses[80:]) / 20

    assert late(USUAL) < 0.7 * late(replace(USUAL, restart=(), step={}))


def test_without_a_shift_nothing_begins_anew() -> None:
    result = fit(run(None), 300)
    assert not [w for w in result.windows if "anew" in (w["reason"] or "")]
    assert all(event % 10 == 0 for event in {w["start"] for w in result.windows})


def test_a_loss_that_no_lr_lowers_is_let_through_after_two_rolls() -> None:
    result = fit(run(35), rewrite=replace(USUAL, surprise=None))
    assert sum(w["outcome"] == "rewound" for w in result.windows) <= 2
    assert result.record["steps"] == STEPS


# Twins --------------------------------------------------------------------------------------------


def test_the_better_twin_is_kept() -> None:
    own = run(None, lr=1e-3)
    result = fit(own, rewrite=Twin(), template="constant", start="given")
    by_window: dict[int, list[dict[str, Any]]] = {}
    for w in result.windows:
        by_window.setdefault(w["start"], []).append(w)
    assert list(by_window) == list(range(0, STEPS, 10))
    for up, down in by_window.values():
        values = {up["outcome"]: up["objective_after"], down["outcome"]: down["objective_after"]}
        assert values["accepted"] <= values["rejected"]
        assert up["after"]["lr"] > down["after"]["lr"]
    cost = result.record["cost"]
    assert cost["hessian_products"] == 0 and 3 <= cost["plain_run_equivalents"] < 5
    assert result.schedule["lr"][-1] > 2e-3  # it was far too low
    again = run(None, lr=1e-3)
    plain_loop(again, STEPS, result.schedule)
    assert not unequal(state_of(own)["model"], state_of(again)["model"])


def test_the_distance_of_twins() -> None:
    assert Twin().next_delta(0.2, repeats=True) == pytest.approx(0.3)
    assert Twin().next_delta(0.2, repeats=False) == pytest.approx(0.1)
    assert Twin().next_delta(0.02, repeats=False) == 0.02
    assert Twin().next_delta(1.2, repeats=True) == 1.2


# Resuming -----------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


@pytest.mark.parametrize("law", [USUAL, Twin()], ids=["usual", "twin"])
@pytest.mark.parametrize(
    "windows", [2, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (6, 7))]
)
def test_a_run_that_is_resumed_around_a_shift_ends_the_same(
    tmp_path: Path, windows: int, law: Rewrite
) -> None:
    seen = 0

    def stop(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, Committed)
        if seen > windows:
            raise Stopped

    straight, halted = tmp_path / "straight", tmp_path / "halted"
    whole = run()
    fit(whole, directory=straight, rewrite=law)
    with pytest.raises(Stopped):
        fit(directory=halted, rewrite=law, listeners=[stop])
    resumed = run()
    fit(resumed, directory=halted, rewrite=law)
    for name in FILES:
        assert (straight / name).read_bytes() == (halted / name).read_bytes(), name
    assert not unequal(state_of(whole)["model"], state_of(resumed)["model"])
    costs = [json.loads((d / "result.json").read_text())["cost"] for d in (straight, halted)]
    for cost in costs:
        del cost["peak_memory_bytes"]
    assert costs[0] == costs[1]


@pytest.mark.parametrize(
    "wrong", [{"iterations": 0}, {"carry": 1.5}, {"restart": (0.0,)}, {"most": -1.0}]
)
def test_settings_that_cannot_be_used(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Rewrite(**wrong)


def test_the_objective_where_the_start_is_looked_for() -> None:
    """Also the mean training loss; where lr is given, the held-out loss alone."""
    assert Runner(*run(), window=20).objective == Objective(loss_weight=1 / 20)
    assert Runner(*run(), window=20, start="given").objective == Objective()


def test_held_out_batches_are_the_training_batches_after_the_window() -> None:
    """Not a single validation batch is drawn, and J is the mean loss on what comes next."""

    class Untouched:
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("validation data were used")

    model, optimizer, loss_fn, stream, _ = run(None)
    law = Rewrite(until=0.1, retries=0)
    objective = Objective(batches=HeldOutBatches(3), average=None)
    runner = Runner(
        model,
        optimizer,
        loss_fn,
        stream,
        Untouched(),
        window=10,
        start="given",
        rewrite=law,
        objective=objective,
    )
    with pytest.raises(AssertionError, match="validation"):  # but for the figures at the end
        runner.fit(20)
    (window,) = runner.state.windows
    again = run(None)
    plain_loop(again, 10, Schedule({"lr": torch.full((10,), 0.02)}))
    batches = [b for _, b in zip(range(13), Turning(None), strict=False)][10:]
    with torch.no_grad():
        expected = sum(float(loss_fn(again[0], b)) for b in batches) / 3
    assert window["objective_before"] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(InputError, match="held-out batches"):
        HeldOutBatches(0)


def test_what_became_of_a_window_that_was_rewritten_several_times() -> None:
    """The display counts windows, not attempts: accepted where any rewrite was kept."""
    progress = Progress("own")
    law = Rewrite(step={"lr": 0.3}, iterations=5, worth=0.0, until=0.05, retries=2)
    seen: list[Any] = []

    def listener(event: Event) -> None:
        progress.observe(event)
        if isinstance(event, Committed) and event.start == 0:
            seen.append(progress.of_window(0))

    result = fit(run(None, lr=5e-3), rewrite=law, listeners=[listener])
    first = [w for w in result.windows if w["start"] == 0]
    accepted = [w for w in first if w["outcome"] == "accepted"]
    (shown,) = seen
    assert shown["outcome"] == "accepted"
    assert shown["objective_before"] == first[0]["objective_before"]
    assert shown["objective_after"] == accepted[-1]["objective_after"]
    assert progress.tally.counts == {"accepted": 1, "rejected": 0, "rewound": 0}
    assert progress.cost == pytest.approx(result.record["cost"]["plain_run_equivalents"])


def test_the_cost_that_is_projected_knows_which_windows_are_passed_over() -> None:
    costs: list[float] = []

    def listener(event: Event) -> None:
        if isinstance(event, Committed):
            costs.append(event.plain_run_equivalents)

    fit(run(None), rewrite=Rewrite(until=0.1), listeners=[listener])
    assert len(set(costs)) == 1 and 1 < costs[0] < 2  # the first window says it all

"""The law that turns a hypergradient into a schedule; the objective; the average of iterates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rhc import CONTROLS, InputError, Objective, Rewrite, Schedule
from rhc.loop.update_rule import carried, hat_functions
from rhc.schedule import cooldown, total_variation
from rhc.training.objective import Average, average_weights

NAMES = tuple(CONTROLS)

finite = st.floats(allow_nan=False, allow_infinity=False, width=64)


def natural(name: str) -> st.SearchStrategy[float]:
    control = CONTROLS[name]
    inside = st.floats(control.lower, control.upper)
    return st.one_of(inside, st.just(0.0)) if control.zero else inside


@st.composite
def windows(draw: st.DrawFn) -> tuple[Schedule, dict[str, Tensor], float]:
    """A window's schedule anywhere within the bounds, any finite gradient, any J."""
    steps = draw(st.integers(1, 9))
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    values = {n: draw(st.lists(natural(n), min_size=steps, max_size=steps)) for n in names}
    gradient = {
        n: torch.tensor(draw(st.lists(finite, min_size=steps, max_size=steps)), dtype=torch.float64)
        for n in names
    }
    schedule = Schedule(
        {n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()},
        start=draw(st.integers(0, 1000)),
        seed=draw(st.integers(0, 9)),
    )
    return schedule, gradient, draw(finite)


@st.composite
def laws(draw: st.DrawFn) -> Rewrite:
    return Rewrite(
        step={n: draw(st.floats(0, 5)) for n in NAMES},
        damping=draw(st.floats(1e-3, 10)),
        knots=draw(st.integers(1, 12)),
        total_variation=draw(st.sampled_from([0.0, 0.5])),
    )


# The law -----------------------------------------------------------------------------------------


@given(windows(), laws(), st.floats(0.01, 1))
def test_a_proposal_stays_within_bounds_and_trust_region(
    window: tuple[Schedule, dict[str, Tensor], float], law: Rewrite, scale: float
) -> None:
    schedule, gradient, value = window
    proposal = law.propose(schedule, gradient, value, scale)
    new = proposal.schedule
    assert (new.start, new.seed, len(new)) == (schedule.start, schedule.seed, len(schedule))
    assert list(new.values) == list(schedule.values)
    for name, v in new.values.items():
        control = CONTROLS[name]
        assert ((v >= control.lower) & (v <= control.upper) | (control.zero & (v == 0))).all()
        moved = (control.to_raw(v) - control.to_raw(schedule[name])).abs()
        # Hat functions sum to 1, so no step moves further than a knot may; rounding of log and exp.
        assert (moved <= law.step[name] * scale + 1e-6).all()
        assert math.isfinite(proposal.carry[name])
        assert abs(proposal.carry[name]) <= law.step[name] * scale + 1e-12


@given(windows(), laws())
def test_no_gradient_no_move_to_the_bit(
    window: tuple[Schedule, dict[str, Tensor], float], law: Rewrite
) -> None:
    schedule, gradient, value = window
    law = Rewrite(step=law.step, damping=law.damping, knots=law.knots)  # without a penalty
    proposal = law.propose(schedule, {n: torch.zeros_like(g) for n, g in gradient.items()}, value)
    assert proposal.schedule == schedule
    assert set(proposal.carry.values()) == {0.0}
    assert proposal.predicted == 0.0


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("knots", [1, 3])
def test_downhill(name: str, sign: int, knots: int) -> None:
    """A negative gradient raises the control, a positive one lowers it; J is predicted to fall."""
    schedule = Schedule.constant(6, 0, lr=0.1, momentum=0.5, noise=0.01, weight_decay=0.01)
    gradient = {name: torch.full((6,), sign * 0.3, dtype=torch.float64)}
    proposal = Rewrite(knots=knots).propose(schedule, gradient, 2.0)
    assert (sign * (proposal.schedule[name] - schedule[name]) < 0).all()
    assert sign * proposal.carry[name] < 0
    assert proposal.predicted < 0
    for other in NAMES:
        if other != name:
            assert torch.equal(proposal.schedule[other], schedule[other])


def test_the_closed_form_of_one_knot() -> None:
    """Δ = −step · g / (|g| + damping), g = Σ_t α dJ/dα_t / J."""
    schedule = Schedule.constant(4, 0, lr=0.1)
    gradient = torch.tensor([0.5, -0.1, 0.2, 0.6], dtype=torch.float64)
    proposal = Rewrite(damping=0.05).propose(schedule, {"lr": gradient}, 3.0)
    g = 0.1 * 1.2 / 3.0
    move = -0.7 * g / (g + 0.05)
    expected = torch.full((4,), 0.1 * math.exp(move), dtype=torch.float64)
    torch.testing.assert_close(proposal.schedule["lr"], expected, rtol=1e-12, atol=0)
    assert proposal.carry["lr"] == pytest.approx(move, rel=1e-12)
    assert proposal.predicted == pytest.approx(0.12 * move, rel=1e-12)


def test_a_retry_goes_a_part_of_the_way() -> None:
    schedule, gradient = Schedule.constant(4, 0, lr=0.1), {"lr": torch.ones(4).double()}
    whole = Rewrite().propose(schedule, gradient, 1.0).carry["lr"]
    part = Rewrite().propose(schedule, gradient, 1.0, 0.3).carry["lr"]
    assert part == pytest.approx(0.3 * whole, rel=1e-12)


def test_a_control_at_zero_leaves_it_only_downhill() -> None:
    schedule = Schedule.constant(3, 0, noise=0.0, weight_decay=0.0)
    up, down = (torch.full((3,), s, dtype=torch.float64) for s in (-1e4, 1e4))
    new = Rewrite().propose(schedule, {"noise": up, "weight_decay": down}, 1.0).schedule
    assert (new["noise"] > 0).all()
    assert torch.equal(new["weight_decay"], schedule["weight_decay"])


def test_a_law_without_a_step_for_a_control_leaves_it() -> None:
    schedule = Schedule.constant(3, 0, lr=0.1, momentum=0.9)
    gradient = {n: torch.ones(3).double() for n in ("lr", "momentum")}
    new = Rewrite(step={"lr": 0.5}).propose(schedule, gradient, 1.0).schedule
    assert torch.equal(new["momentum"], schedule["momentum"]) and (new["lr"] < 0.1).all()


def test_knots_bend_the_window() -> None:
    """Gradients of opposite signs at both ends raise one and lower the other; the carry is mean."""
    schedule = Schedule.constant(9, 0, lr=0.1)
    gradient = torch.linspace(-1, 1, 9, dtype=torch.float64)
    proposal = Rewrite(knots=3).propose(schedule, {"lr": gradient}, 1.0)
    lr = proposal.schedule["lr"]
    assert lr[0] > 0.1 > lr[-1] and bool((lr.diff() < 0).all())
    shifts = (lr / 0.1).log()
    assert proposal.carry["lr"] == pytest.approx(float(shifts.mean()), abs=1e-12)


@given(st.integers(1, 60), st.integers(1, 60))
def test_hat_functions_are_a_partition_of_one(steps: int, knots: int) -> None:
    basis = hat_functions(steps, knots)
    assert basis.shape == (steps, min(steps, knots))
    assert (basis >= 0).all()
    torch.testing.assert_close(
        basis.sum(dim=1), torch.ones(steps, dtype=torch.float64), rtol=0, atol=1e-12
    )
    if steps >= 2 and knots >= 2:
        assert basis[0, 0] == 1 and basis[-1, -1] == pytest.approx(1, abs=1e-12)


# Parameter groups --------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [Rewrite(), Rewrite(knots=3, total_variation=0.1)])
def test_every_group_is_a_control_of_its_own(law: Rewrite) -> None:
    """Each column moves as it would alone, to the bit; what is predicted is their sum."""
    draw = torch.Generator().manual_seed(0)
    lr = 0.01 + 0.1 * torch.rand(6, 3, generator=draw, dtype=torch.float64)
    gradient = torch.randn(6, 3, generator=draw, dtype=torch.float64)
    flat = {"momentum": torch.full((6,), 0.5, dtype=torch.float64)}
    both = {"lr": gradient, "momentum": gradient[:, 0]}
    found = law.propose(Schedule({"lr": lr, **flat}, 5), both, 2.0)
    alone = [
        law.propose(Schedule({"lr": lr[:, g]}, 5), {"lr": gradient[:, g]}, 2.0) for g in range(3)
    ]
    rest = law.propose(Schedule(flat, 5), {"momentum": gradient[:, 0]}, 2.0)
    for g, one in enumerate(alone):
        assert torch.equal(found.schedule["lr"][:, g], one.schedule["lr"])
        assert found.carry["lr"][g] == one.carry["lr"] != 0
    assert torch.equal(found.schedule["momentum"], rest.schedule["momentum"])
    predicted = rest.predicted + sum(one.predicted for one in alone)
    assert found.predicted == pytest.approx(predicted, rel=1e-12)
    assert law.penalty(Schedule({"lr": lr}), ["lr"]) == pytest.approx(
        sum(law.penalty(Schedule({"lr": lr[:, g]}), ["lr"]) for g in range(3)), rel=1e-12
    )


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
@pytest.mark.parametrize("sign", [-1e6, 1e6])
def test_a_group_at_zero_stays_and_no_other_comes_to_it(name: str, sign: float) -> None:
    """Whatever the gradient says, also when the move is carried on, and when lr is lowered."""
    lower = CONTROLS[name].lower
    schedule = Schedule.constant(4, **{name: (0.0, 1.01 * lower, 0.5)})
    gradient = torch.full((4, 3), sign, dtype=torch.float64)
    proposal = Rewrite().propose(schedule, {name: gradient}, 1.0)
    moved = carried(proposal.schedule, 2, proposal.carry)
    for new in (proposal.schedule[name], moved[name]):
        assert (new[:, 0] == 0).all()
        assert (new[:, 1] >= lower).all() and (new[:, 2] >= lower).all()
        assert bool((new[:, 2] < 0.5).all()) == (sign > 0)
    assert proposal.carry[name][0] == 0.0
    lowered = carried(schedule, 1, {name: -50.0})[name]
    assert lowered[1:].tolist() == [[0.0, lower, lower]] * 3
    assert torch.equal(lowered[0], schedule[name][0])


# Total variation ---------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 0), min_size=2, max_size=8, unique_by=lambda x: round(x, 3)))
def test_penalty_gradient_is_the_slope_of_the_penalty(raw: list[float]) -> None:
    """Central differences, in a schedule without equal neighbours, where it is differentiable."""
    law = Rewrite(total_variation=0.7)
    values = torch.tensor(raw, dtype=torch.float64)

    def penalty(at: Tensor) -> float:
        return law.penalty(Schedule({"lr": at.exp()}), ["lr"])

    step = 1e-5
    slopes = [
        (penalty(values + step * e) - penalty(values - step * e)) / (2 * step)
        for e in torch.eye(len(raw), dtype=torch.float64)
    ]
    found = law._penalty_gradient(values)
    torch.testing.assert_close(found, torch.tensor(slopes, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_flat_schedule_is_not_penalised() -> None:
    law = Rewrite(total_variation=0.7)
    flat = Schedule.constant(5, 0, lr=0.1, noise=0.0)
    assert law.penalty(flat, ["lr", "noise"]) == 0.0
    assert law.penalty(flat, []) == 0.0
    assert torch.equal(law._penalty_gradient(flat.raw(["lr"])[:, 0]), torch.zeros(5).double())


def test_the_penalty_flattens() -> None:
    """Without any other gradient, knots move towards each other."""
    schedule = Schedule({"lr": torch.tensor([0.1, 0.2, 0.05, 0.1]).double()})
    law = Rewrite(total_variation=1.0, knots=4, step={"lr": 0.05})
    new = law.propose(schedule, {"lr": torch.zeros(4).double()}, 1.0).schedule
    assert law.penalty(new, ["lr"]) < law.penalty(schedule, ["lr"])
    assert law.penalty(schedule, ["lr"]) == pytest.approx(
        float(total_variation(schedule.raw(["lr"])).sum())
    )


# Carry and cooldown ------------------------------------------------------------------------------


@given(st.integers(0, 9), st.floats(-3, 3))
def test_carry_moves_the_steps_from_start_on(start: int, shift: float) -> None:
    schedule = Schedule.constant(10, 3, lr=0.01, momentum=0.9)
    moved = carried(schedule, start, {"lr": shift})
    assert torch.equal(moved["lr"][:start], schedule["lr"][:start])
    assert torch.equal(moved["momentum"], schedule["momentum"])
    ratio = (moved["lr"][start:] / 0.01).log()
    torch.testing.assert_close(ratio, torch.full_like(ratio, shift), rtol=0, atol=1e-12)
    assert moved.seed == 3
    if shift == 0:
        assert moved == schedule


def test_carry_counts_absolute_steps_and_keeps_bounds() -> None:
    schedule = Schedule({"lr": torch.full((4,), 5.0)}, start=100)
    moved = carried(schedule, 102, {"lr": 3.0})
    assert moved["lr"].tolist() == [5.0, 5.0, CONTROLS["lr"].upper, CONTROLS["lr"].upper]


@pytest.mark.parametrize(
    ("steps", "fraction", "expected"),
    [
        (5, 0.0, [1, 1, 1, 1, 1]),
        (5, 0.4, [1, 1, 1, 2 / 3, 1 / 3]),
        (4, 0.99, [1, 3 / 4, 2 / 4, 1 / 4]),
        (3, 0.2, [1, 1, 1]),
    ],
)
def test_cooldown_factors(steps: int, fraction: float, expected: list[float]) -> None:
    factors = cooldown(steps, fraction)
    torch.testing.assert_close(factors, torch.tensor(expected, dtype=torch.float64))
    assert (factors > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"knots": 0}, "knots must be ≥ 1, got 0"),
        ({"damping": 0.0}, "damping must be > 0, got 0"),
        ({"cooldown": 1.0}, r"cooldown must be in \[0, 1\), got 1; use 0 for none"),
        ({"cooldown": -0.1}, r"cooldown must be in \[0, 1\), got -0.1"),
        ({"lower_lr": 1.0}, r"lower_lr must be in \(0, 1\), got 1"),
    ],
)
def test_laws_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Rewrite(**options)


# Objective ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(average=0.0), r"average must be in \(0, 1\), got 0.0; use None for"),
        (lambda: Objective(average=1.0), r"average must be in \(0, 1\), got 1.0"),
        (lambda: Objective(average=math.nan), r"average must be in \(0, 1\), got nan"),
        (lambda: Objective(batches=0), "objective batches must be ≥ 1, got 0"),
        (
            lambda: Objective(terminal_weight=0.0),
            "the objective is empty; give a weight to the loss, reward or terminal",
        ),
    ],
)
def test_objectives_that_cannot_be(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_stage_costs() -> None:
    loss, metrics = torch.tensor(2.0), {"reward": torch.tensor(5.0), "x": torch.tensor(7.0)}
    assert Objective().stage(loss, metrics) is None
    assert float(_stage(Objective(loss_weight=3.0), loss, metrics)) == 6
    assert float(_stage(Objective(reward_weight=0.5), loss, metrics)) == -2.5
    both = Objective(loss_weight=1.0, reward_weight=1.0, reward=lambda loss, m: loss * m["x"])
    assert float(_stage(both, loss, metrics)) == 2 - 14
    with pytest.raises(InputError, match="metrics have no 'reward'; return it, or give the"):
        Objective(reward_weight=1.0).stage(loss, {})


def _stage(objective: Objective, loss: Tensor, metrics: dict[str, Tensor]) -> Tensor:
    cost = objective.stage(loss, metrics)
    assert cost is not None
    return cost


# Average -----------------------------------------------------------------------------------------


@given(
    st.one_of(st.none(), st.floats(0.01, 0.999)),
    st.lists(st.floats(-10, 10), min_size=1, max_size=30),
)
def test_the_average_is_the_weighted_sum(decay: float | None, iterates: list[float]) -> None:
    """θ̄_n = Σ_j w_j θ_j with the closed-form weights, which sum to 1."""
    average = Average(decay)
    for value in iterates:
        average.update([torch.tensor([value], dtype=torch.float64)])
    weights = average_weights(decay, len(iterates))
    assert sum(weights) == pytest.approx(1, abs=1e-12)
    expected = sum(w * v for w, v in zip(weights, iterates, strict=True))
    assert average.count == len(iterates)
    assert average.values is not None
    assert float(average.values[0]) == pytest.approx(expected, abs=1e-10)


def test_averages_are_values_once_copied() -> None:
    average = Average(0.9)
    assert average.values is None and average.copy().values is None
    live = torch.ones(2)
    average.update([live])
    live.zero_()
    copied, other = average.copy(), Average(0.9)
    other.assign(average)
    average.update([live])
    for kept in (copied, other):
        assert kept.count == 1
        assert kept.values is not None and torch.equal(kept.values[0], torch.ones(2))
    average.assign(Average(0.9))
    assert average.values is None and average.count == 0

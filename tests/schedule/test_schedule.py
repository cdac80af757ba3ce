"""Coordinates round-trip, bounds hold for any update, files come back bit for bit, and a replayed
schedule steps as the plant does."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    OPTIMIZERS,
    PROBLEMS,
    adamw,
    assert_identical,
    momentum,
    odds_scaled,
    sgd,
    steered,
    two_groups,
)
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rhc import CONTROLS, Control, InputError, Plant, Schedule, total_variation
from rhc.schedule import OptimizerControls, control, cooldown

controls = st.sampled_from(sorted(CONTROLS.values(), key=lambda c: c.name))
any_float = st.floats(allow_nan=False, allow_infinity=True)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# Controls -----------------------------------------------------------------------------------------


@given(c=controls, position=st.floats(0, 1))
def test_coordinates_round_trip(c: Control, position: float) -> None:
    natural = scalar(c.lower * (c.upper / c.lower) ** position).clamp(c.lower, c.upper)
    raw = c.to_raw(natural)
    back = c.from_raw(raw)
    if c.zero and raw <= c.to_raw(scalar(c.lower)):
        # The lowest coordinate is that of 0 too; a value a rounding above the bound can have it.
        assert back == 0 and natural <= c.lower * (1 + 1e-15)
    else:
        torch.testing.assert_close(back, natural, rtol=1e-13, atol=0)
        torch.testing.assert_close(c.to_raw(back), raw, rtol=1e-12, atol=1e-12)


@given(c=controls, raw=any_float)
def test_bounds_hold_for_any_coordinate(c: Control, raw: float) -> None:
    natural = float(c.from_raw(scalar(raw)))
    assert c.lower <= natural <= c.upper or (c.zero and natural == 0)
    c.check(natural)
    assert math.isfinite(float(c.to_raw(scalar(natural))))


@given(c=controls, a=any_float, b=any_float)
def test_coordinates_keep_the_order(c: Control, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert c.from_raw(scalar(low)) <= c.from_raw(scalar(high))


@given(c=controls, position=st.floats(0.01, 0.99))
def test_slope_is_the_derivative_of_the_coordinate(c: Control, position: float) -> None:
    raw = c.to_raw(scalar(c.lower)).lerp(c.to_raw(scalar(c.upper)), position)
    step = 1e-6
    expected = (c.from_raw(raw + step) - c.from_raw(raw - step)) / (2 * step)
    torch.testing.assert_close(c.slope(c.from_raw(raw)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("c", [c for c in CONTROLS.values() if c.zero], ids=lambda c: c.name)
def test_a_law_can_leave_zero_and_come_back(c: Control) -> None:
    raw = c.to_raw(scalar(0.0))
    assert raw == c.to_raw(scalar(c.lower))
    assert c.slope(scalar(0.0)) > 0
    assert c.from_raw(raw + 0.1) > c.lower
    assert c.from_raw(raw) == 0 == c.from_raw(raw - 5)


def test_lr_has_no_zero() -> None:
    assert CONTROLS["lr"].from_raw(scalar(-math.inf)) == CONTROLS["lr"].lower


@given(c=controls, a=st.floats(1e-6, 0.99), b=st.floats(1e-6, 0.99))
def test_ratio_is_the_inverse_of_rescale(c: Control, a: float, b: float) -> None:
    assert c.rescale(b, c.ratio(a, b)) == pytest.approx(a, rel=1e-9)
    assert c.rescale(a, c.ratio(a, a)) == a
    if c.coordinate == "logit":
        assert 0 < c.rescale(a, 1e3) < 1
        assert c.rescale(a, 0.5) == pytest.approx(odds_scaled(a, 0.5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": [0.1, -0.1]}, "must be ≥ 0, got lr from -0.1 to 0.1"),
        ({"momentum": [0.9, 1.0]}, "must be ≥ 0, and < 1, got momentum from 0.9 to 1"),
        ({"lr": [math.nan]}, "must be finite, got lr=nan at step 0"),
    ],
)
def test_values_that_no_optimizer_can_take(values: dict[str, list[float]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Schedule({n: torch.tensor(v, dtype=torch.float64) for n, v in values.items()})


def test_errors_of_a_control() -> None:
    with pytest.raises(InputError, match="unknown control 'momentun': did you mean 'momentum'"):
        control("momentun")
    with pytest.raises(InputError, match=r"--lr must be in \[1e-08, 10\], got 11; choose"):
        CONTROLS["lr"].check(11.0, "--lr")
    with pytest.raises(InputError, match=r"noise must be 0 or in \[0.0001, 1\], got -1"):
        CONTROLS["noise"].check(-1.0)
    with pytest.raises(InputError, match="got nan"):
        CONTROLS["lr"].check(math.nan)


# Schedules ----------------------------------------------------------------------------------------

natural_values = st.floats(0, 1e3, allow_nan=False)
schedules = st.integers(1, 6).flatmap(
    lambda steps: st.builds(
        lambda values, start, seed: Schedule(
            {
                # x / (1 + x) is below 1, as momentum must be
                n: torch.tensor(
                    [x / (1 + x) if n == "momentum" else x for x in v], dtype=torch.float64
                )
                for n, v in values.items()
            },
            start,
            seed,
        ),
        st.dictionaries(
            st.sampled_from(sorted(CONTROLS)),
            st.lists(natural_values, min_size=steps, max_size=steps),
            min_size=1,
        ),
        st.integers(0, 10**9),
        st.integers(-(2**63), 2**63 - 1),
    )
)


@given(schedule=schedules)
def test_json_gives_every_bit_back(schedule: Schedule) -> None:
    text = json.dumps(schedule.to_json(), allow_nan=False)
    assert Schedule.from_json(json.loads(text)) == schedule


@given(schedule=schedules, data=st.data())
def test_windows_are_parts_of_absolute_steps(schedule: Schedule, data: st.DataObject) -> None:
    start = data.draw(st.integers(schedule.start, schedule.stop - 1))
    stop = data.draw(st.integers(start + 1, schedule.stop))
    part = schedule.window(start, stop)
    assert (part.start, part.stop, part.seed) == (start, stop, schedule.seed)
    assert all(part.at(t) == schedule.at(t) for t in range(start, stop))
    assert schedule.replaced(part) == schedule
    changed = Schedule({n: v / 2 + 0.1 for n, v in part.values.items()}, part.start, part.seed)
    replaced = schedule.replaced(changed)
    for t in range(schedule.start, schedule.stop):
        assert replaced.at(t) == (changed if start <= t < stop else schedule).at(t)
    assert schedule.at(schedule.stop + 10) == schedule.at(schedule.stop - 1)


def test_a_schedule_is_a_value() -> None:
    given_values = torch.full((3,), 0.1, dtype=torch.float64)
    schedule = Schedule({"lr": given_values})
    given_values.zero_()
    schedule.replaced(Schedule({"lr": torch.ones(1)}, 1))
    assert schedule == Schedule.constant(3, lr=0.1)
    assert schedule != Schedule(schedule.values, seed=1)
    assert schedule != Schedule(schedule.values, start=1)
    assert schedule != Schedule.constant(4, lr=0.1)
    assert schedule != Schedule.constant(3, momentum=0.1)
    assert "lr" in schedule and "noise" not in schedule and len(schedule) == 3


# Values per parameter group -----------------------------------------------------------------------

GROUPED = Schedule(
    {
        "lr": torch.tensor([[0.1, 0.01], [0.4, 0.01], [0.2, 0.0]], dtype=torch.float64),
        "noise": torch.tensor([0.0, 0.1, 0.2], dtype=torch.float64),
    },
    start=4,
    seed=2,
)
"""lr of two parameter groups, steps 4 to 6; the second ends at 0."""


@st.composite
def grouped_schedules(draw: st.DrawFn) -> Schedule:
    steps, groups = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    values = st.lists(
        st.lists(st.floats(0, 0.999), min_size=groups, max_size=groups),
        min_size=steps,
        max_size=steps,
    )
    single = st.lists(st.floats(0, 0.999), min_size=steps, max_size=steps)
    found = draw(st.dictionaries(st.sampled_from(sorted({*CONTROLS} - {"noise"})), values))
    found["noise"] = draw(single)
    tensors = {n: torch.tensor(v, dtype=torch.float64) for n, v in found.items()}
    return Schedule(tensors, draw(st.integers(0, 10**9)), draw(st.integers(0, 9)))


@given(schedule=grouped_schedules())
def test_json_of_groups_gives_every_bit_back(schedule: Schedule) -> None:
    document = json.loads(json.dumps(schedule.to_json(), allow_nan=False))
    assert Schedule.from_json(document) == schedule
    assert document["version"] == 1
    for name, v in schedule.values.items():
        assert document["controls"][name]["values"] == v.tolist()


@given(schedule=grouped_schedules(), data=st.data())
def test_windows_of_groups(schedule: Schedule, data: st.DataObject) -> None:
    start = data.draw(st.integers(schedule.start, schedule.stop - 1))
    part = schedule.window(start, schedule.stop)
    assert all(part.at(t) == schedule.at(t) for t in range(start, schedule.stop))
    assert schedule.replaced(part) == schedule
    changed = Schedule({n: v / 2 + 0.1 for n, v in part.values.items()}, part.start, part.seed)
    for t in range(schedule.start, schedule.stop):
        assert schedule.replaced(changed).at(t) == (changed if t >= start else schedule).at(t)
    assert schedule.at(schedule.stop + 3) == schedule.at(schedule.stop - 1)


def test_a_schedule_of_groups() -> None:
    assert GROUPED.groups == 2 and Schedule.constant(3, lr=0.1).groups is None
    assert GROUPED.at(5) == {"lr": (0.4, 0.01), "noise": 0.1}
    assert GROUPED.at(9) == {"lr": (0.2, 0.0), "noise": 0.2}
    assert Schedule.constant(2, lr=(0.1, 0.3)).at(1) == {"lr": (0.1, 0.3)}
    means = GROUPED.means()
    assert means["lr"][0] == pytest.approx((0.1 * 0.4 * 0.2) ** (1 / 3))
    assert means["lr"][1] == pytest.approx(0.02 / 3) and means["noise"] == pytest.approx(0.1)
    raw = GROUPED.raw(["noise", "lr"])
    assert raw.shape == (3, 3)
    torch.testing.assert_close(raw[:, 1].exp(), GROUPED["lr"][:, 0])
    variation = total_variation(GROUPED.raw(["lr"]))
    expected = [math.log(4) + math.log(2), math.log(0.01 / CONTROLS["lr"].lower)]
    assert variation.tolist() == pytest.approx(expected)
    assert Schedule.constant(3, lr=(0.1, 0.1)) != Schedule.constant(3, lr=0.1)


def two(weight_decay: float = 0.1) -> SGD:
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    groups = [{"params": [parameters[0]]}, {"params": [parameters[1]], "weight_decay": 0.0}]
    return SGD(groups, lr=0.1, momentum=0.5, weight_decay=weight_decay)


def test_values_per_group_are_written_as_they_are() -> None:
    """No ratios, and no rounding; one value for all keeps the ratios beside them."""
    optimizer = two()
    found = OptimizerControls(optimizer)
    found.write({"lr": (0.3, 1e-7), "momentum": (0.0, 0.25), "weight_decay": 0.7, "noise": 0.1})
    first, second = optimizer.param_groups
    assert [first[n] for n in ("lr", "momentum", "weight_decay")] == [0.3, 0.0, 0.7]
    assert [second[n] for n in ("lr", "momentum", "weight_decay")] == [1e-7, 0.25, 0.0]


def test_a_leaf_per_group_reaches_its_group_alone() -> None:
    """What the adjoint differentiates; a group at 0 is a number, so that it is not steered."""
    found = OptimizerControls(two())
    leaf = torch.tensor([0.5, 0.25, 0.0], dtype=torch.float64, requires_grad=True)
    value = found.group_value("momentum", 1, leaf)
    assert isinstance(value, Tensor) and value.dim() == 0
    (gradient,) = torch.autograd.grad(value, leaf)
    assert gradient.tolist() == [0, 1, 0]
    assert found.group_value("momentum", 2, leaf) == 0.0
    assert not isinstance(found.group_value("momentum", 2, leaf), Tensor)


@pytest.mark.parametrize("carried", [copy.deepcopy, lambda state: through_json(state)])
def test_a_replay_of_groups(carried: Callable[[Any], Any]) -> None:
    """As the plant steps, also resumed in the middle; a value per group from its own column."""
    draw = torch.Generator().manual_seed(4)
    values = {
        "lr": 0.01 + 0.1 * torch.rand(REPLAYED, 2, generator=draw, dtype=torch.float64),
        "momentum": 0.1 + 0.8 * torch.rand(REPLAYED, 2, generator=draw, dtype=torch.float64),
        "weight_decay": 0.1 * torch.rand(REPLAYED, generator=draw, dtype=torch.float64),
        "noise": 0.1 * torch.rand(REPLAYED, generator=draw, dtype=torch.float64),
    }
    schedule = Schedule(values, 5, seed=3)
    runs = []
    for way in ("plant", "loop", "resumed"):
        problem = PROBLEMS["mlp"]()
        optimizer = two_groups(momentum, problem.model)
        batches = problem.batches(REPLAYED)
        torch.manual_seed(1)
        if way == "plant":
            plant = Plant(problem.model, optimizer, problem.loss_fn, seed=schedule.seed)
            for t, batch in enumerate(batches, schedule.start):
                plant.step(batch, schedule.at(t), t)
                seen = [(g["lr"], g["momentum"]) for g in optimizer.param_groups]
                i = t - schedule.start
                assert seen == [
                    (float(values["lr"][i, g]), float(values["momentum"][i, g])) for g in (0, 1)
                ]
        elif way == "loop":
            train(problem, optimizer, schedule.to_lr_scheduler(optimizer), batches)
        else:
            scheduler = schedule.to_lr_scheduler(optimizer)
            train(problem, optimizer, scheduler, batches[:5])
            state, position = copy.deepcopy(optimizer.state_dict()), carried(scheduler.state_dict())
            other = two_groups(momentum, problem.model)
            scheduler = schedule.to_lr_scheduler(other)
            other.load_state_dict(state)
            scheduler.load_state_dict(position)
            assert scheduler.get_last_lr() == values["lr"][5].tolist()
            train(problem, other, scheduler, batches[5:])
            optimizer = other
        runs.append(trained(problem, optimizer))
    assert_identical(runs[0], runs[1])
    assert_identical(runs[0], runs[2])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (
            lambda: Schedule({"noise": torch.zeros(2, 2)}),
            r"noise has no parameter groups, .*\(2, 2\)",
        ),
        (
            lambda: Schedule({"lr": torch.ones(2, 2), "momentum": torch.zeros(2, 3)}),
            r"or one per step and parameter group, got shapes .*\(2, 2\).*\(2, 3\)",
        ),
        (lambda: Schedule({"lr": torch.ones(2, 2), "noise": torch.zeros(3)}), r"'noise': \(3,\)"),
        (lambda: Schedule({"lr": torch.zeros(2, 0)}), "at least one step"),
        (
            lambda: Schedule({"lr": torch.tensor([[1, 1], [1, math.nan]])}, 7),
            "lr=nan at step 8",
        ),
        (
            lambda: GROUPED.replaced(Schedule({"lr": torch.ones(2)}, 4)),
            r"lr has shape \(2,\) in the part, \(3, 2\) in the schedule; give both",
        ),
        (
            lambda: Schedule.constant(2, lr=(0.1, 0.2, 0.3)).to_lr_scheduler(two()),
            "values for 3 parameter groups, the optimizer has 2; use it with the groups",
        ),
        (
            lambda: Schedule.from_json({**GOOD, "controls": {"lr": {"values": [[1, 2], [3]]}}}),
            "is not a schedule written by rhc",
        ),
        (
            lambda: Schedule.from_json({**GOOD, "controls": {"lr": {"values": [[1], 2]}}}),
            "is not a schedule written by rhc",
        ),
    ],
)
def test_errors_of_groups(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


def test_raw_has_a_column_per_control() -> None:
    raw = Schedule({"lr": torch.tensor([0.1, 1.0]), "momentum": torch.tensor([0.5, 0.9])}).raw()
    expected = torch.tensor([[math.log(0.1), 0.0], [0.0, math.log(9)]], dtype=torch.float64)
    torch.testing.assert_close(raw, expected, rtol=1e-6, atol=1e-12)


def test_total_variation() -> None:
    raw = torch.tensor([[0.0, 1.0, 5.0], [2.0, 1.0, 4.0], [-1.0, 1.0, 3.0]])
    assert total_variation(raw).tolist() == [5.0, 0.0, 2.0]
    assert total_variation(raw[:1]).tolist() == [0.0, 0.0, 0.0]


def test_cooldown_is_linear_and_never_zero() -> None:
    expected = [1.0] * 6 + [0.8, 0.6, 0.4, 0.2]
    assert cooldown(10, 0.4).tolist() == pytest.approx(expected)
    assert cooldown(10, 0.0).tolist() == [1.0] * 10


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Schedule({}), "at least one control"),
        (lambda: Schedule({"lr": torch.zeros(0)}), "at least one step, got 0"),
        (
            lambda: Schedule({"lr": torch.zeros(2, 1, 1)}),
            r"one value per step .* \{'lr': \(2, 1, 1\)\}",
        ),
        (lambda: Schedule({"lr": torch.ones(2), "noise": torch.ones(3)}), r"'noise': \(3,\)"),
        (lambda: Schedule({"rl": torch.ones(2)}), "unknown control 'rl'"),
        (lambda: Schedule({"lr": torch.tensor([1, math.inf])}, 7), "lr=inf at step 8"),
        (
            lambda: Schedule.constant(3, lr=0.1).window(0, 4),
            r"\[0, 4\) must lie within .* \[0, 3\)",
        ),
        (lambda: Schedule.constant(3, lr=0.1).window(2, 2), r"window \[2, 2\)"),
        (
            lambda: Schedule({"lr": torch.ones(9)}, 9).replaced(Schedule({"lr": torch.ones(2)}, 5)),
            r"\[5, 7\) must lie within .* \[9, 18\)",
        ),
        (lambda: Schedule({"lr": torch.ones(3)}, 5).at(4), "step must be ≥ 5, .* got 4"),
    ],
)
def test_errors_of_a_schedule(make: Callable[[], Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


# Files --------------------------------------------------------------------------------------------


def test_a_file_gives_every_bit_back(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    values = {n: torch.rand(50, generator=draw, dtype=torch.float64) for n in CONTROLS}
    schedule = Schedule(values, 3, 4)
    schedule.save(tmp_path / "schedule.json")
    assert Schedule.load(tmp_path / "schedule.json") == schedule


GOOD = Schedule.constant(2, lr=0.1).to_json()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        ("[1]", "is not a schedule written by rhc .* give the schedule.json of a run directory"),
        ("{}", "is not a schedule written by rhc .*format"),
        ({**GOOD, "format": "other"}, "is not a schedule written by rhc"),
        (
            {**GOOD, "version": 2},
            "has schedule version 2, this rhc reads version 1; export it again",
        ),
        ({**GOOD, "controls": {"lr": {}}}, "is not a schedule written by rhc .*values"),
        ({**GOOD, "controls": {"lr": {"values": [1, None]}}}, "is not a schedule written by rhc"),
        ({**GOOD, "start": math.inf}, "is not valid JSON .*Infinity"),
        (
            {**GOOD, "controls": {"lr": {"values": [math.nan]}}},
            "is not valid JSON .*NaN",
        ),
        ({**GOOD, "controls": {"lr": {"values": []}}}, "at least one step"),
        ({**GOOD, "controls": {}}, "at least one control"),
        ({**GOOD, "controls": {"rl": {"values": [1]}}}, "unknown control 'rl'"),
    ],
)
def test_a_file_that_is_no_schedule_is_named(tmp_path: Path, content: Any, says: str) -> None:
    path = tmp_path / "bad.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=rf"bad\.json.*{says}"):
        Schedule.load(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read schedule .*nowhere\.json: No such file"):
        Schedule.load(tmp_path / "nowhere.json")
    with pytest.raises(InputError, match=r"cannot read schedule .*: Is a directory"):
        Schedule.load(tmp_path)


# The controls of an optimizer ---------------------------------------------------------------------

lrs = st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=4)


@given(values=lrs, betas=st.lists(st.floats(0.01, 0.99), min_size=4, max_size=4))
def test_writing_the_initial_values_changes_no_bit(values: list[float], betas: list[float]) -> None:
    """What a schedule that nobody rewrote must not do: move a group's lr by a rounding."""
    groups = [
        {"params": [torch.zeros(1, requires_grad=True)], "lr": lr, "betas": (beta, 0.999)}
        for lr, beta in zip(values, betas, strict=False)
    ]
    optimizer = Adam(groups, weight_decay=0.1)
    optimizer.param_groups[-1]["weight_decay"] = 0.0
    before = copy.deepcopy(optimizer.state_dict())
    found = OptimizerControls(optimizer)
    found.write({n: v for n, v in found.initial.items() if n != "noise"})
    assert optimizer.state_dict() == before


def test_groups_keep_their_ratios() -> None:
    optimizer = two_groups(momentum, PROBLEMS["mlp"]().model)
    found = OptimizerControls(optimizer)
    assert found.available == ("lr", "momentum", "noise", "weight_decay")
    found.write({"lr": 0.4, "momentum": 0.6, "weight_decay": 0.5})
    first, second = optimizer.param_groups
    assert (first["lr"], first["momentum"], first["weight_decay"]) == (0.4, 0.6, 0.5)
    assert second["lr"] == pytest.approx(0.04)
    assert second["momentum"] == pytest.approx(odds_scaled(0.6, 0.5))
    assert second["weight_decay"] == 0.0


def test_the_reference_group_is_the_first_that_is_not_zero() -> None:
    optimizer = two_groups(momentum, PROBLEMS["mlp"]().model)
    optimizer.param_groups.reverse()
    found = OptimizerControls(optimizer)
    assert found.initial["weight_decay"] == optimizer.param_groups[1]["weight_decay"]
    found.write({"weight_decay": 0.5})
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.0, 0.5]


# Replay by a torch.optim.lr_scheduler -------------------------------------------------------------

REPLAYED = 12


def make_schedule(optimizer: Optimizer, start: int = 0) -> Schedule:
    return Schedule(steered(optimizer, REPLAYED), start, seed=3)


def train(problem: Any, optimizer: Optimizer, scheduler: LRScheduler, batches: list[Any]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        problem.loss_fn(problem.model, batch).backward()
        optimizer.step()
        scheduler.step()


def trained(problem: Any, optimizer: Optimizer) -> list[Any]:
    return [dict(problem.model.state_dict()), optimizer.state_dict()["state"]]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replay_is_bit_equal_to_the_plant(name: str, grouped: bool) -> None:
    runs = []
    for by_plant in (True, False):
        problem = PROBLEMS["mlp"]()
        optimizer = (
            two_groups(OPTIMIZERS[name], problem.model)
            if grouped
            else OPTIMIZERS[name](problem.model.parameters())
        )
        schedule = make_schedule(optimizer, start=5)
        batches = problem.batches(REPLAYED + 3)
        torch.manual_seed(1)
        if by_plant:
            plant = Plant(problem.model, optimizer, problem.loss_fn, seed=schedule.seed)
            for t, batch in enumerate(batches, schedule.start):
                plant.step(batch, schedule.at(t), t)
        else:
            scheduler = schedule.to_lr_scheduler(optimizer)
            assert isinstance(scheduler, LRScheduler)
            train(problem, optimizer, scheduler, batches)
            last = schedule.at(schedule.stop - 1)["lr"]  # held after the end
            assert scheduler.get_last_lr()[0] == last == optimizer.param_groups[0]["lr"]
        runs.append(trained(problem, optimizer))
    assert_identical(*runs)


def through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("carried", [copy.deepcopy, through_json])
@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize("make", [momentum, adamw])
def test_a_replay_resumes_bit_equal(
    make: Callable[[Any], Optimizer], scheduler_first: bool, carried: Callable[[Any], Any]
) -> None:
    """Saved after 5 steps, loaded into new objects, in either order that users write."""

    def begin() -> tuple[Any, Optimizer, Schedule]:
        problem = PROBLEMS["mlp"]()
        optimizer = two_groups(make, problem.model)
        schedule = make_schedule(optimizer)
        # At the value that the optimizer began with, a group's own value counts, not its ratio.
        values = {n: v.clone() for n, v in schedule.values.items()}
        values["lr"][8] = optimizer.param_groups[0]["lr"]
        return problem, optimizer, Schedule(values, seed=schedule.seed)

    problem, optimizer, schedule = begin()
    batches = problem.batches(REPLAYED)
    torch.manual_seed(1)
    scheduler = schedule.to_lr_scheduler(optimizer)
    train(problem, optimizer, scheduler, batches[:5])
    saved = copy.deepcopy((problem.model.state_dict(), optimizer.state_dict()))
    position, rng = carried(scheduler.state_dict()), torch.get_rng_state()
    assert "schedule" not in position
    train(problem, optimizer, scheduler, batches[5:])

    again, resumed, schedule = begin()
    again.model.load_state_dict(saved[0])
    if scheduler_first:
        continued = schedule.to_lr_scheduler(resumed)
        resumed.load_state_dict(saved[1])
    else:
        resumed.load_state_dict(saved[1])
        continued = schedule.to_lr_scheduler(resumed)
    continued.load_state_dict(position)
    torch.set_rng_state(rng)
    train(again, resumed, continued, batches[5:])
    assert_identical(trained(problem, optimizer), trained(again, resumed))
    assert continued.get_last_lr() == scheduler.get_last_lr()


def test_a_schedule_of_momentum_alone_leaves_the_lr() -> None:
    optimizer = adamw(PROBLEMS["mlp"]().model.parameters())
    scheduler = Schedule({"momentum": torch.tensor([0.5, 0.6])}).to_lr_scheduler(optimizer)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"]) == (0.01, (0.5, 0.95))
    optimizer.step()
    scheduler.step()
    assert (group["lr"], group["betas"][1]) == (0.01, 0.95)
    assert group["betas"][0] == pytest.approx(0.6)


def test_an_lr_that_is_a_tensor_stays_one() -> None:
    lr = torch.tensor(0.5)
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    Schedule.constant(2, lr=0.25).to_lr_scheduler(optimizer)
    assert optimizer.param_groups[0]["lr"] is lr and lr == 0.25


def test_without_noise_there_is_no_hook() -> None:
    optimizer = sgd(PROBLEMS["mlp"]().model.parameters())
    Schedule.constant(2, lr=0.1, noise=0.0).to_lr_scheduler(optimizer)
    assert not optimizer._optimizer_step_pre_hooks
    Schedule.constant(2, lr=0.1, noise=0.1).to_lr_scheduler(optimizer)
    assert len(optimizer._optimizer_step_pre_hooks) == 1

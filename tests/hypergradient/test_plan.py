"""Plans: Revolve is optimal, budgets are kept to, and what is remembered how changes no number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    OPTIMIZERS,
    PROBLEMS,
    Problem,
    adam,
    adamw,
    assert_identical,
    everything,
    in_mode,
    momentum,
    plain_loop,
    relative_error,
    steered,
    two_groups,
)
from runs import Stop, files, make_run, state_of, stop_at_event, unequal
from torch import Tensor, nn
from torch.optim import Optimizer

import rhc
from rhc import InputError, Runner
from rhc.hypergradient import Hypergradient, Plan, ReversePass
from rhc.hypergradient.memory_plan import Sizes, make_plan
from rhc.hypergradient.record import WindowRecorder
from rhc.hypergradient.revolve import chunk_bounds, chunk_evaluations, recomputed_steps, split
from rhc.hypergradient.sizes import Measured, _Measuring, measure_pieces
from rhc.schedule import Schedule
from rhc.training import memory
from rhc.training.objective import Average, Objective
from rhc.training.plant import Plant
from rhc.training.trajectory import Trajectory

SAME = 1e-12
"""Plans differ in the order of float64 roundings (1e-16 each), over up to 30 steps."""

# Revolve ------------------------------------------------------------------------------------------


@cache
def fewest_evaluations(chunks: int, free: int) -> int:
    """By dynamic programming over where the next snapshot is taken."""
    if chunks == 1:
        return 1
    if not free:  # each chunk is reached from the first
        return chunks * (chunks + 1) // 2
    return min(
        m + fewest_evaluations(chunks - m, free - 1) + fewest_evaluations(m, free)
        for m in range(1, chunks)
    )


def test_the_closed_form_is_the_dynamic_programme() -> None:
    assert chunk_evaluations(0, 3) == 0
    for chunks in range(1, 60):
        for free in range(8):
            assert chunk_evaluations(chunks, free) == fewest_evaluations(chunks, free)


@pytest.mark.parametrize("snapshots", range(1, 9))
def test_as_many_evaluations_as_checkpoint_schedules(snapshots: int) -> None:
    """Its Forward actions count the recording of every step as well, and so do we."""
    library = pytest.importorskip("checkpoint_schedules")
    for chunks in range(1, 40):
        forward = 0
        for action in library.Revolve(chunks, snapshots):
            if isinstance(action, library.Forward):
                forward += action.n1 - action.n0
            if isinstance(action, library.EndReverse):
                break
        assert chunk_evaluations(chunks, snapshots - 1) == forward


@given(st.integers(1, 300), st.integers(1, 400))
def test_chunks_cover_the_window_and_only_the_first_is_shorter(steps: int, chunk: int) -> None:
    bounds = chunk_bounds(steps, chunk)
    lengths = [b - a for a, b in pairwise(bounds)]
    assert bounds[0] == 0 and bounds[-1] == steps
    assert lengths[1:] == [chunk] * (len(lengths) - 1)
    assert 0 < lengths[0] <= chunk


@given(st.integers(2, 60), st.integers(0, 60))
def test_a_split_leaves_chunks_on_both_sides(chunks: int, free: int) -> None:
    assert 1 <= split(chunks, free) < chunks


class Counter:
    """A plant whose state is the number of steps taken."""

    def __init__(self) -> None:
        self.at = self.taken = 0
        self.optimizer = SimpleNamespace(zero_grad=lambda: None)
        self.model = nn.Module()
        self.hooks = SimpleNamespace(of_tensors={})
        self.counted, self.moved, self.untrained = list[Any](), dict[str, Any](), dict[str, Any]()

    def snapshot(self) -> int:
        return self.at

    def restore(self, snapshot: int) -> None:
        self.at = snapshot

    def roll(self, batches: list[int], schedule: range, *, record: Any) -> None:
        assert batches == list(schedule) and batches[0] == self.at
        if record is not None:
            record.trajectory = SimpleNamespace(states={0: self.at}, gradients=batches)
        self.at += len(batches)
        self.taken += len(batches)


def executed(steps: int, chunk: int, snapshots: int) -> int:
    """Steps that the recorder rolls again, having checked that every chunk comes, in order."""
    plant = Counter()
    plan = Plan(steps, "exact", kept=min(chunk, steps), chunk=chunk, snapshots=snapshots)
    recorder = WindowRecorder(plant, Objective(), plan)  # type: ignore[arg-type]
    batches: Any = list(range(steps))
    windows: Any = SimpleNamespace(window=range)
    recorder.trajectory = Trajectory(
        0, windows, (), batches=batches, gradients=batches.copy(), losses=batches
    )
    bounds = chunk_bounds(steps, chunk)
    left: Any = {bounds[k]: bounds[k] for k in recorder._marks}
    recorder.snapshots = left
    plant.at = end = steps
    for found in recorder.backwards():
        assert len(recorder.snapshots) <= snapshots
        assert found.stop == end and list(found.gradients) == list(range(found.start, end))
        end = found.start
    assert end == 0 and plant.at == steps
    assert recorder.recomputed == plant.taken
    return plant.taken


@given(st.integers(1, 120), st.integers(1, 120), st.integers(1, 12))
def test_the_executor_rolls_again_what_was_predicted(
    steps: int, chunk: int, snapshots: int
) -> None:
    assert executed(steps, min(chunk, steps), snapshots) == recomputed_steps(
        steps, min(chunk, steps), snapshots
    )


@pytest.mark.parametrize("chunks", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("chunk", [1, 7])
def test_equal_chunks_take_the_fewest_evaluations(chunk: int, chunks: int) -> None:
    """Beyond the first roll, which passes every step and records the last chunk."""
    for snapshots in range(1, 10):
        expected = chunk * (fewest_evaluations(chunks, snapshots - 1) - chunks)
        assert recomputed_steps(chunk * chunks, chunk, snapshots) == expected


# Budgets ------------------------------------------------------------------------------------------

PRODUCT = st.sampled_from(["exact", "forward-difference", "central-difference"])


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    """A state is at least the parameters, and a graph holds a copy of them and the gradients."""
    parameters = draw(st.integers(1, 10**6))
    return Sizes(
        parameters,
        state=parameters * draw(st.integers(1, 4)) + draw(st.integers(0, 10**5)),
        graph=2 * parameters + draw(st.integers(0, 10**7)),
        product=draw(st.integers(0, 10**7)),
    )


BUDGET = st.floats(3, 10).map(lambda x: int(10**x))


@given(st.integers(1, 400), PRODUCT, sizes(), BUDGET, st.booleans())
def test_a_plan_accounts_for_the_window_and_for_what_it_keeps(
    steps: int, product: Any, sizes: Sizes, budget: int, spill: bool
) -> None:
    plan = make_plan(steps, product, sizes, budget, spill=spill)
    assert plan == make_plan(steps, product, sizes, budget, spill=spill)
    assert plan.steps == steps and plan.product == product and plan.budget == budget
    assert plan.predicted_bytes is not None
    assert plan.fits == (plan.predicted_bytes <= budget)
    assert 0 <= plan.graphs <= plan.kept <= steps
    assert not plan.graphs or product == "exact"
    if plan.chunk:
        assert not spill and not plan.spilled and not plan.graphs
        assert plan.kept == plan.chunk <= steps and plan.snapshots >= 1
        assert plan.recomputed == recomputed_steps(steps, plan.chunk, plan.snapshots)
    else:
        assert plan.kept + plan.spilled == steps
        assert plan.recomputed == plan.snapshots == 0
    # Every term once more, without the work space of rebuilding and of the costates.
    held = plan.kept * sizes.parameters + plan.snapshots * sizes.state
    held += max(sizes.product, plan.graphs * sizes.graph)
    assert held <= plan.predicted_bytes


@given(st.integers(1, 300), PRODUCT, sizes(), BUDGET, st.floats(1, 30), st.booleans())
def test_more_memory_never_costs_more_gradients(
    steps: int, product: Any, sizes: Sizes, budget: int, factor: float, spill: bool
) -> None:
    less, more = (
        make_plan(steps, product, sizes, b, spill=spill) for b in (budget, int(factor * budget))
    )
    assert more.gradient_equivalents <= less.gradient_equivalents
    assert more.fits or not less.fits


@pytest.mark.parametrize("spill", [True, False])
def test_states_are_rebuilt_before_anything_is_spilled(spill: bool) -> None:
    """Those of √K steps do not fit beside the gradients, but log3 K of them do."""
    found = make_plan(25, "exact", Sizes(1000, 3000, 5000, 2000), 50_000, spill=spill)
    assert found.fits and found.kept == 25 and not found.spilled and not found.chunk
    assert found.states_every == 0
    roomy = make_plan(25, "exact", Sizes(1000, 3000, 5000, 2000), 500_000, spill=spill)
    assert roomy.states_every > 0


def test_where_every_graph_fits_less_of_a_state_is_counted() -> None:
    """50 gradients, the first state, costates, a product, 50 graphs, and six of the optimizer's
    states alone: of whole states there would be room for half of the graphs."""
    sizes = Sizes(1000, 2000, 250, 2000, slots=1000)
    enough = 50_000 + 2000 + 3000 + 2000 + 50 * 250 + 6 * 1000
    plan = make_plan(50, "exact", sizes, enough, spill=True)
    assert plan.graphs == 50 and plan.predicted_bytes == enough
    assert make_plan(50, "exact", sizes, enough - 1, spill=True).graphs < 50
    assert make_plan(50, "exact", sizes, enough, spill=True, graph_bytes=12_499).graphs < 50


def test_states_in_the_place_of_gradients_take_nothing() -> None:
    """But for the first."""
    sizes = Sizes(1000, 2000, 250, 2000, slots=1000, folded=True)
    enough = 50_000 + 2000 + 3000 + 2000 + 50 * 250 + 1000
    plan = make_plan(50, "exact", sizes, enough, spill=True)
    assert plan.graphs == 50 and plan.predicted_bytes == enough and not plan.states_every
    assert make_plan(50, "exact", sizes, enough - 1, spill=True).graphs < 50


@given(st.integers(2, 40), sizes(), st.floats(0.02, 1.5))
def test_no_other_chunk_is_cheaper_within_the_budget(
    steps: int, sizes: Sizes, share: float
) -> None:
    budget = sizes.product + int(share * steps * sizes.state)
    plan = make_plan(steps, "exact", sizes, budget, spill=False)
    if not plan.chunk or not plan.fits:
        return
    best = min(
        recomputed_steps(steps, chunk, snapshots)
        for chunk, snapshots in affordable(steps, sizes, budget)
    )
    assert plan.recomputed == best


def affordable(steps: int, sizes: Sizes, budget: int) -> Iterator[tuple[int, int]]:
    """Every (chunk, snapshots) within the budget: two costates, a gradient, the window's end, one
    product, the chunk's gradients and its log3 rebuilt states with two of work; one step has its
    state, two have one made."""
    for chunk in range(1, steps + 1):
        rebuilt = chunk if chunk <= 2 else math.ceil(math.log(chunk, 3)) + 2
        fixed = sizes.product + 3 * sizes.state + sizes.parameters
        fixed += chunk * sizes.parameters + rebuilt * sizes.state
        room = (budget - fixed) // sizes.state
        if room >= 1:
            yield chunk, min(room, math.ceil(steps / chunk))


@pytest.mark.parametrize("spill", [True, False])
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_horizons_of_thousands_can_be_planned(ratio: int, spill: bool) -> None:
    """No recursion as deep as the window, and no search over all of it: 72 plans in a second."""
    for share in (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9):
        for parameters in (10, 1000):
            sizes = Sizes(parameters, ratio * parameters, 10 * parameters, 5 * parameters)
            budget = int(share * 5000 * parameters)
            plan = make_plan(5000, "exact", sizes, budget, spill=spill)
            assert plan.steps == 5000
            if plan.chunk and plan.recomputed < 50_000:
                assert executed(5000, plan.chunk, plan.snapshots) == plan.recomputed


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(50, "exact", kept=50), ["window of 50 steps", "product exact", "4.00 gradient"]),
        (Plan(50, "forward-difference", kept=50), ["forward-difference", "2.00 gradient"]),
        (Plan(50, "exact", kept=50, graphs=25), ["graphs kept by the roll: the last 25", "3.50"]),
        (Plan(50, "exact", kept=20, spilled=30), ["in memory: 20 steps", "on disk: 30 steps"]),
        (
            Plan(50, "exact", kept=10, chunk=10, snapshots=3, recomputed=60),
            ["rolled again: 60 steps in chunks of 10, from 3 snapshots (Revolve)", "5.20 gradient"],
        ),
        (
            Plan(50, "exact", kept=50, budget=2_000_000_000, predicted_bytes=12_300_000),
            ["12.3 MB of a budget of 2.00 GB"],
        ),
        (Plan(50, "exact", kept=50, budget=10, predicted_bytes=11), ["the budget is too small"]),
        (Plan(50, "exact", segment=7, kept=50), ["segment 7"]),
    ],
)
def test_a_plan_can_be_read(plan: Plan, says: list[str]) -> None:
    text = "\n".join(plan.lines())
    assert all(part in text for part in says), text
    assert "None" not in text
    assert ("too small" in text) == (not plan.fits)
    for part, shown in {"graphs": plan.graphs, "disk": plan.spilled, "Revolve": plan.chunk}.items():
        assert (part in text) == bool(shown)
    assert all(len(line) <= 100 for line in plan.lines())


@pytest.mark.parametrize("budget", [0, -1])
def test_a_budget_must_be_positive(budget: int) -> None:
    problem = PROBLEMS["quadratic"]()
    with pytest.raises(InputError, match=f"memory_budget must be > 0 bytes, got {budget}"):
        rhc.hypergradient(
            problem.model,
            momentum(problem.model.parameters()),
            problem.loss_fn,
            problem.batches(2),
            controls={"lr": 0.1},
            memory_budget=budget,
        )


# The same numbers under every plan ----------------------------------------------------------------


class Setting(NamedTuple):
    """A problem and an optimizer that has taken a few steps, and options of a hypergradient."""

    problem: Problem
    optimizer: Optimizer
    options: dict[str, Any]


def setting(problem: str, make: Callable[[Any], Optimizer], **options: Any) -> Setting:
    chosen = PROBLEMS[problem]()
    optimizer = two_groups(make, chosen.model)
    plain_loop(chosen, optimizer, chosen.batches(3), {})
    if "training" in options:
        options["terminal"] = in_mode(chosen.terminal, training=options.pop("training"))
    return Setting(chosen, optimizer, options)


SETTINGS: dict[str, Callable[[], Setting]] = {
    "dropout, momentum": lambda: setting("mlp", momentum, training=True, average=0.9),
    "clipped AdamW": lambda: setting("mlp", adamw, training=True, clip_norm=0.3),
    "BatchNorm, Adam": lambda: setting("cnn", adam, training=False, average=0.8),
    "BatchNorm, clipped by value": lambda: setting("cnn", momentum, clip_value=0.02),
    "transformer": lambda: setting("transformer", adamw, training=False, stage_weight=0.5),
}


def look_back(setting: Setting, steps: int, **options: Any) -> Hypergradient:
    problem, optimizer, own = setting
    torch.manual_seed(5)
    return rhc.hypergradient(
        problem.model,
        optimizer,
        options.pop("loss_fn", problem.loss_fn),
        options.pop("batches", None) or fixed_batches(problem, steps),
        **{
            "controls": steered(optimizer, steps),
            "product": "exact",
            "verify": False,
            **own,
            **options,
        },
    )


def all_of(setting: Setting) -> list[Any]:
    """What no look back may change, with the random state that every one of them begins with."""
    torch.manual_seed(5)
    return everything(setting.problem.model, setting.optimizer)


def fixed_batches(problem: Problem, steps: int) -> list[Any]:
    """The same ones at every call; a problem draws from a stream."""
    found = BATCHES.setdefault(id(problem.batches), (problem.batches, []))[1]
    found += problem.batches(max(0, steps - len(found)))
    return found[:steps]


BATCHES: dict[int, tuple[Any, list[Any]]] = {}


def plans(steps: int) -> Iterator[Plan]:
    """Plans of every kind, with boundaries at either end and in the middle."""
    for graphs in {0, 1, steps // 2, steps}:
        yield Plan(steps, "exact", kept=steps, graphs=graphs)
    for pieces in (2, 3):
        yield Plan(steps, "exact", kept=steps, pieces=pieces)
    for spilled in {1, steps // 2, steps}:
        yield Plan(steps, "exact", kept=steps - spilled, spilled=spilled)
    for chunk in {1, 2, 3, steps // 2, steps - 1, steps} & set(range(1, steps + 1)):
        for snapshots in {1, 2, min(4, math.ceil(steps / chunk))}:
            recomputed = recomputed_steps(steps, chunk, snapshots)
            yield Plan(
                steps, "exact", kept=chunk, chunk=chunk, snapshots=snapshots, recomputed=recomputed
            )


def assert_same(found: Hypergradient, expected: Hypergradient, plan: Any) -> None:
    assert found.value == pytest.approx(expected.value, rel=SAME), plan
    for name, e in expected.grad.items():
        assert relative_error(found.grad[name], e) < SAME, (plan, name)
    assert relative_error(found.costate_norms, expected.costate_norms) < SAME, plan
    assert relative_error(found.losses, expected.losses) < SAME, plan
    assert found.result == expected.result


@pytest.mark.parametrize(
    ("name", "steps"), [(n, 7) for n in SETTINGS] + [("dropout, momentum", k) for k in (1, 2, 30)]
)
def test_every_plan_gives_the_same_hypergradient(
    name: str, steps: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = SETTINGS[name]()
    expected = look_back(chosen, steps, segment=steps)  # the unrolled graph remembers nothing else
    before = all_of(chosen)
    for plan in plans(steps):
        monkeypatch.setattr(ReversePass, "plan", lambda *given, plan=plan: plan)
        monkeypatch.setattr(ReversePass, "_divide_no_more", lambda *given: None)
        found = look_back(chosen, steps, spill=tmp_path)
        assert found.plan == plan
        assert_same(found, expected, plan)
        terminal = "terminal" in chosen.options
        assert found.gradient_equivalents == plan.gradient_equivalents + terminal, plan
        assert found.hessian_products == steps
        assert_identical(before, everything(chosen.problem.model, chosen.optimizer))


@pytest.mark.parametrize("spill", [True, False, "folder"])
@pytest.mark.parametrize("name", ["clipped AdamW", "BatchNorm, Adam", "transformer"])
def test_every_budget_gives_the_same_hypergradient(
    name: str, spill: bool | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And keeps to the cost that its plan predicts."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "system"))
    for folder in ("own", "system"):
        (tmp_path / folder).mkdir()
    where = tmp_path / "own" if spill == "folder" else spill
    chosen = SETTINGS[name]()
    expected = look_back(chosen, 9)
    assert expected.plan is not None and expected.plan.predicted_bytes is not None
    before = all_of(chosen)
    for factor in (1 / 40, 1 / 8, 1 / 3, 2, 40):
        budget = int(factor * expected.plan.predicted_bytes)
        found = look_back(chosen, 9, memory_budget=budget, spill=where)
        assert found.plan is not None and found.plan.budget == budget
        assert not (found.plan.spilled and spill is False), found.plan
        assert not (found.plan.chunk and spill), found.plan
        assert_same(found, expected, found.plan)
        terminal = "terminal" in chosen.options
        assert found.gradient_equivalents == found.plan.gradient_equivalents + terminal
        assert_identical(before, everything(chosen.problem.model, chosen.optimizer))
    assert [f for folder in ("own", "system") for f in (tmp_path / folder).iterdir()] == []


def test_a_tight_budget_takes_batches_in_parts() -> None:
    """As few as will do; where nothing helps, the plan says so."""
    sizes = Sizes(1000, 3000, 50_000, 90_000, pieces=((2, 50_000), (4, 30_000), (8, 31_000)))
    budgets = (10**6, 110_000, 65_000, 9000)
    found = {b: make_plan(50, "exact", sizes, b, spill=True) for b in budgets}
    assert [plan.pieces for plan in found.values()] == [1, 1, 2, 4]
    assert [plan.fits for plan in found.values()] == [True, True, True, False]
    assert "in 2 parts" in "\n".join(found[65_000].lines())
    # Rather smaller matrix products than all steps rolled again and again.
    without_disk = make_plan(50, "exact", sizes, 65_000, spill=False)
    assert without_disk.fits and without_disk.pieces == 4


def squares(model: nn.Module, batch: Any) -> Tensor:
    return ((model(batch[0]) - batch[1]) ** 2).mean()


def squares_in_bfloat16(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return squares(model, batch)


def of_the_marked(model: nn.Module, batch: Any) -> Tensor:
    """A mean over the rows that are not padding, whose targets are 0."""
    errors = ((model(batch[0]) - batch[1]) ** 2).mean(1)
    marked = batch[1].ne(0).any(1)
    return (errors * marked).sum() / marked.sum()


def dense(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), *layers, nn.Tanh(), nn.Linear(16, 3))


def rows(count: int = 8, marked: int = 8) -> tuple[Tensor, Tensor]:
    targets = torch.randn(count, 3)
    targets[marked:] = 0
    return torch.randn(count, 6), targets


@pytest.mark.parametrize(
    ("make", "loss_fn", "mean"),
    [
        (dense, squares, True),
        (lambda: dense().double(), lambda m, b: squares(m, [t.double() for t in b]), True),
        (dense, of_the_marked, True),
        (dense, lambda m, b: ((m(b[0]) - b[1]) ** 2).sum(), False),
        (lambda: dense(nn.BatchNorm1d(16)), squares, False),
        (lambda: dense(nn.Dropout(0.3)), squares, False),
        (dense, lambda m, b: squares(m, (b[0] + torch.randn_like(b[0]), b[1])), False),
        (dense, lambda m, b: (m(b[0]) @ m(b[0]).t()).logsumexp(1).mean(), False),
        (dense, lambda m, b: squares(m, (b[0].reshape(8, 6), b[1])), False),
        (dense, squares_in_bfloat16, False),
    ],
    ids=[
        "mean",
        "float64",
        "marked",
        "sum",
        "BatchNorm",
        "dropout",
        "noise",
        "contrast",
        "whole",
        "autocast",
    ],
)
def test_only_means_over_rows_are_taken_in_parts(make: Any, loss_fn: Any, mean: bool) -> None:
    torch.manual_seed(0)
    model = make()
    plant = Plant(model, momentum(model.parameters()), loss_fn)
    found = measure_pieces(plant, rows(), Objective())
    assert [pieces for pieces, _ in found] == ([2, 4, 8] if mean else [])


def test_a_loss_that_is_no_mean_later_on_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batches have no padding; then they have."""
    torch.manual_seed(0)
    model = dense().double()
    batches = [tuple(t.double() for t in rows(8, n)) for n in (8, 8, 3, 8)]
    plant = Plant(model, momentum(model.parameters()), of_the_marked)
    steady = {n: torch.full((4,), v, dtype=torch.float64) for n, v in START.items()}
    notices: list[str] = []
    found = []
    for tight in (False, True):
        before = plant.snapshot()
        reverse_pass = ReversePass(
            plant, Objective(loss_weight=1.0, terminal_weight=0.0), list(START),
            product="exact", memory_budget=10**9, notice=notices.append,
        )  # fmt: skip
        reverse_pass.planner.measured(batches[0], "exact")
        assert reverse_pass.planner._measured_in_pieces(batches[0], "exact").pieces
        if tight:
            plan = Plan(4, "exact", kept=4, pieces=2)
            monkeypatch.setattr(reverse_pass, "plan", lambda *given, plan=plan: plan)
        recorder = reverse_pass.roll(batches, Schedule(steady, seed=0))
        found.append(reverse_pass.differentiate(recorder, Average(None), None))
        plant.restore(before)
    assert len(notices) == 1 and "step 2 is not the mean of its rows' losses" in notices[0]
    assert reverse_pass.planner.measured(batches[0], "exact").pieces == ()
    assert measure_pieces(plant, batches[0], reverse_pass.objective) == ()
    assert "not the mean of its rows' losses" in found[1].why
    for control, expected in found[0].grad.items():
        assert relative_error(found[1].grad[control], expected) < SAME


@pytest.mark.parametrize("most", [1, 3])
def test_a_product_for_which_there_is_no_memory_is_too_large(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring it is what runs out; in so many parts it does not. There is a plan all the same."""

    def step_vjp(*arguments: Any, pieces: int = 1, **options: Any) -> Any:
        if pieces <= most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return own(*arguments, pieces=pieces, **options)

    own = rhc.hypergradient.sizes.step_vjp
    monkeypatch.setattr("rhc.hypergradient.sizes.step_vjp", step_vjp)
    torch.manual_seed(0)
    model = dense().double()
    batches = [tuple(t.double() for t in rows()) for _ in range(4)]
    expected, found = (
        rhc.hypergradient(
            model, momentum(model.parameters()), squares, batches, controls=START,
            product="exact", memory_budget=budget,
        )
        for budget in (None, 10**6)
    )  # fmt: skip
    assert found.plan is not None and found.plan.fits and not found.plan.graphs
    assert found.plan.pieces == most + 1
    for control, g in expected.grad.items():
        assert relative_error(found.grad[control], g) < SAME


START = {"lr": 0.05, "momentum": 0.9}


def test_a_quarter_of_the_states_is_enough_without_a_disk() -> None:
    """Batches of one row, so that a product is small beside 60 states of 0.4 MB."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)).double()
    rows = [torch.randn(1, 128, dtype=torch.float64) for _ in range(61)]

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()

    problem = Problem(model, loss_fn, lambda steps: rows[:steps], lambda m: loss_fn(m, rows[60]))
    optimizer = adamw(model.parameters())
    plain_loop(problem, optimizer, rows[:2], {})
    chosen = Setting(problem, optimizer, {"terminal": problem.terminal})
    states = 60 * 3 * 8 * sum(p.numel() for p in model.parameters())
    expected = look_back(chosen, 60)
    found = look_back(chosen, 60, memory_budget=states // 4, spill=False)
    assert found.plan is not None and found.plan.fits and found.plan.chunk, found.plan
    assert found.gradient_equivalents == found.plan.gradient_equivalents + 1
    assert 3 * 60 < found.plan.gradient_equivalents < 6 * 60
    assert_same(found, expected, found.plan)


# What gets in the way -----------------------------------------------------------------------------


class Branching(nn.Module):
    """A layer that some batches do not use: blocks are split there, in the middle of a window."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.extra, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()

    def forward(self, x: Tensor, used: bool) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(h + torch.tanh(self.extra(h)) if used else h)


@pytest.mark.parametrize("optimizer", ["momentum", "adamw"])
@pytest.mark.parametrize("unused", [{0}, {3}, {6}, {2, 3, 4}, set(range(7))])
def test_blocks_that_split_under_way(
    unused: set[int], optimizer: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    draw = torch.Generator().manual_seed(1)
    rows = torch.randn(7, 4, 6, generator=draw, dtype=torch.float64)
    batches = [(rows[t], t not in unused) for t in range(7)]

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return model(*batch).square().mean()

    model = Branching()
    problem = Problem(model, loss_fn, lambda k: batches[:k], lambda m: loss_fn(m, batches[0]))
    kind = OPTIMIZERS[optimizer](model.parameters())
    plain_loop(problem, kind, [(rows[0], True)], {})
    chosen = Setting(problem, kind, {"terminal": problem.terminal, "average": 0.9})
    expected = look_back(chosen, 7, segment=7)
    before = all_of(chosen)
    for plan in plans(7):
        monkeypatch.setattr(ReversePass, "plan", lambda *given, plan=plan: plan)
        found = look_back(chosen, 7, spill=tmp_path)
        assert_same(found, expected, plan)
        assert_identical(before, everything(chosen.problem.model, chosen.optimizer))


KINDS = {
    "kept": Plan(8, "exact", kept=8),
    "graphs": Plan(8, "exact", kept=8, graphs=3),
    "spilled": Plan(8, "exact", kept=3, spilled=5),
    "chunks": Plan(8, "exact", kept=2, chunk=2, snapshots=2, recomputed=8),
    "one snapshot": Plan(8, "exact", kept=3, chunk=3, snapshots=1, recomputed=7),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_on_disk(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ReversePass, "plan", lambda *given: KINDS[kind])
    look_back(SETTINGS["clipped AdamW"](), 8, spill=tmp_path / "made")
    assert [f for f in tmp_path.rglob("*") if f.name != "made"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_leaves_no_file_and_puts_everything_back(
    kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Wherever the loss is evaluated: in the roll, in a product, when steps are rolled again."""
    monkeypatch.setattr(ReversePass, "plan", lambda *given: KINDS[kind])
    chosen = SETTINGS["clipped AdamW"]()
    before = all_of(chosen)
    last = 8 + 8 - KINDS[kind].graphs + KINDS[kind].recomputed
    for number in range(1, last + 1, 2):
        calls = 0

        def loss_fn(model: nn.Module, batch: Any, number: int = number) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == number:
                raise ValueError("on purpose")
            return chosen.problem.loss_fn(model, batch)

        with pytest.raises(ValueError, match="on purpose"):
            look_back(chosen, 8, loss_fn=loss_fn, spill=tmp_path)
        assert_identical(before, everything(chosen.problem.model, chosen.optimizer))
        assert [f for f in tmp_path.rglob("*") if f.is_file()] == [], number


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [0, 1, 4, 5, 7])
def test_a_window_that_diverges_is_an_outcome_under_every_plan(
    step: int, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ReversePass, "plan", lambda *given: KINDS[kind])
    chosen = SETTINGS["clipped AdamW"]()
    worst = fixed_batches(chosen.problem, 8)[step]

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return chosen.problem.loss_fn(model, batch) * (
            math.nan if torch.equal(batch[0], worst[0]) else 1.0
        )

    before = all_of(chosen)
    found = look_back(chosen, 8, loss_fn=loss_fn, spill=tmp_path)
    assert (found.result.name, found.result.step) == ("non-finite", step)
    assert all(g.shape == (8,) for g in found.grad.values())
    assert_identical(before, everything(chosen.problem.model, chosen.optimizer))


# Through a Runner ---------------------------------------------------------------------------------


def fitted(directory: Path, seed: int, *, stop: int | None = None, **options: Any) -> Any:
    """The state and files of a run that ended, None of one that was interrupted."""
    run = make_run("adamw", seed=seed)
    listeners = [] if stop is None else [stop_at_event(stop)]
    runner = Runner(
        *run, window=6, start="given", directory=directory, listeners=listeners, **options
    )
    try:
        result = runner.fit(16)
    except Stop:
        return None
    return state_of(run), files(directory), result


@pytest.fixture
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.mark.usefixtures("no_waiting_for_the_disk")
@pytest.mark.parametrize("product", ["exact", "auto"])
@pytest.mark.parametrize("kind", ["tiny", "spilled", "roomy"])
def test_a_run_within_a_budget_can_be_interrupted(
    kind: str, product: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes are measured, and differ from process to process: a run keeps to those it began with.

    So that they must, each of these runs would measure others."""
    measured = 0

    def other_sizes(*args: Any, **kwargs: Any) -> Sizes:
        nonlocal measured
        measured += 1
        return Sizes(1000, 3000, 5000 * measured, 2000 * measured)

    monkeypatch.setattr("rhc.hypergradient.planning.measure_sizes", other_sizes)
    options: dict[str, Any] = {
        "tiny": {"memory_budget": 20_000, "spill": False},
        "spilled": {"memory_budget": 20_000, "spill": tmp_path / "spill"},
        "roomy": {"memory_budget": 50_000, "spill": False},
    }[kind] | {"product": product}
    expected = fitted(tmp_path / "whole", 0, **options)
    for number in (9, 17, 24, 33):
        measured = 0
        directory = tmp_path / f"stopped-{number}"
        assert fitted(directory, 0, stop=number, **options) is None
        if len(list((directory / "checkpoints").glob("window-*"))) == 1:
            measured = 0  # the only checkpoint is older than the measurement
        saved = any((directory / "checkpoints").glob("window-*/*"))
        found = fitted(directory, 99 if saved else 0, **options)
        assert unequal(expected[:2], found[:2]) == [], number
    spill = tmp_path / "spill"
    assert not spill.exists() or [f for f in spill.rglob("*") if f.is_file()] == []


def test_the_heap_is_looked_at_while_most_of_the_graphs_are_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = 0

    def check_growth(self: memory.Ceiling) -> None:
        nonlocal looked
        looked += 1

    monkeypatch.setattr(memory.Ceiling, "check_growth", check_growth)
    found = look_back(setting("mlp", momentum), 8, memory_budget=10**9, product="exact")
    assert found.plan is not None and found.plan.graphs == 8
    assert looked == 3


def test_a_model_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called again with the same model and loss, a hypergradient finds its sizes known."""
    measured = 0

    sizes = _Measuring.sizes

    def counted(*args: Any, **kwargs: Any) -> Measured:
        nonlocal measured
        measured += 1
        return sizes(*args, **kwargs)

    monkeypatch.setattr(_Measuring, "sizes", counted)
    chosen = setting("mlp", momentum)
    batches = fixed_batches(chosen.problem, 3)
    fewer = [tuple(t[:2] for t in batch) for batch in batches]
    for own, expected in ((batches, 1), (batches, 1), (fewer, 2), (batches, 2)):
        look_back(chosen, 3, batches=own, memory_budget=10**6)
        assert measured == expected


@pytest.mark.usefixtures("no_waiting_for_the_disk")
def test_a_budget_does_not_change_the_run(tmp_path: Path) -> None:
    """float32: the schedules agree to a thousand roundings."""
    free = fitted(tmp_path / "free", 0, product="exact")
    for spill in (True, False):
        bound = fitted(
            tmp_path / f"bound-{spill}", 0, product="exact", memory_budget=2000, spill=spill
        )
        for name in free[2].schedule.values:
            found, expected = (run[2].schedule[name] for run in (bound, free))
            assert torch.allclose(found, expected, rtol=1e-4, atol=0.0), name

"""One method on one seed: its result, and its cost with lr search, replays and discarded runs.

Seeds 0 to 9 are for development, 100 and more for reports.
"""

from __future__ import annotations

import inspect
import math
import random
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rhc.compare.methods import Method, distilled, method_of
from rhc.errors import InputError
from rhc.events import Committed, Event
from rhc.hindsight import Pass, Policy, Smoother, held_out, reward_of, smooth
from rhc.rng import preserved, seed_everything
from rhc.runner import DivergedError, Runner, RunResult
from rhc.schedule import Schedule
from rhc.training.evaluate import evaluate
from rhc.training.plant import Plant
from rhc.workload import Goal, Workload, load_runner, optimizer_of

TRACKING = Goal("tracking", over=50, last=False)
"""Default goal of workloads whose steps all have this metric."""

EVERY = 50
"""Steps between points of a curve (at most a twentieth of the run) without rewriting; the window of
a Runner that rewrites."""

JUDGED_BATCHES = 8
"""Maximum of held-out batches per point of the curve."""

POINTS = 100
"""Maximum of points in a run's course."""


@dataclass(frozen=True)
class Row:
    """The result of one method on one seed; losses are infinite if the run diverged."""

    method: str
    lr: float | None
    seed: int
    score: float
    """The goal's metric if the workload has a goal, else the mean of "tracking" over all steps if
    there is such a metric, else the test loss of the final weights."""
    test_loss: float | None
    test_accuracy: float | None
    average_test_loss: float | None
    validation: float
    """Chooses the best of several trials."""
    cost: float
    """In baseline runs."""
    higher: bool = False
    """Whether a higher score is better."""
    gradient_evaluations: float | None = None
    curve: Sequence[Sequence[float | None]] = ()
    """(steps taken, running mean of the goal's metric, or held-out loss)."""
    course: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    """Columns over the run, for plots: "step" and the controls."""

    def steps_to(self, target: float) -> int | None:
        """Steps until the curve reaches the target; None if it never does."""
        for step, value in self.curve:
            if value is not None and (value >= target if self.higher else value <= target):
                return int(step or 0)
        return None


@dataclass(frozen=True)
class Task:
    """A runner, its data, and settings of every run; schedule and policy are files of methods that
    need one, width and batch_size None for the runner's own."""

    run: str
    data: Path | None = None
    steps: int | None = None
    schedule: Path | None = None
    policy: Path | None = None
    width: int | None = None
    batch_size: int | None = None

    def workload(self, seed: int) -> Workload:
        seed_everything(seed)
        sizes = {"width": self.width, "batch_size": self.batch_size}
        given = {name: size for name, size in sizes.items() if size is not None}
        workload = load_runner(self.run)(seed=seed, data=self.data, **given)
        if workload.threads is not None:
            torch.set_num_threads(workload.threads)
        return workload


def run(task: Task, name: str, lr: float | None, seed: int) -> Row:
    method = method_of(name)
    if method.smooths:
        best = _smoothed(task, method, lr, seed)
    elif method.distilled:
        best = _driven(task, replace(method, drives=distilled(_policy(task))), lr, seed)
    elif method.drives is not None:
        best = _driven(task, method, lr, seed)
    else:
        draws = random.Random(seed)
        more = {"schedule": _schedule(task, seed)} if method.replays else {}
        tried = [_one(task, method, lr, seed, draws, **more, **trial) for trial in method.trials]
        best = min(tried, key=lambda found: found["validation"])
        # The lr search is the same every time: its cost counts once.
        start = tried[0]["start"]
        best["cost"] = start + sum(found["cost"] - start for found in tried)
    del best["start"]
    return Row(name, lr, seed, **best)


def _one(
    task: Task,
    method: Method,
    lr: float | None,
    seed: int,
    draws: random.Random,
    **more: Any,
) -> dict[str, Any]:
    runner, workload, steps = prepared(task, method, lr, seed, draws, **more)
    try:
        return _fitted(runner, workload, steps)[0]
    except DivergedError:
        cost = runner.state.cost
        return _diverged(
            workload.goal,
            max(cost.gradient_equivalents / steps, 1.0),
            cost.gradient_evaluations,
            runner.state.start_gradients / steps,
        )


def _fitted(runner: Runner, workload: Workload, steps: int) -> tuple[dict[str, Any], RunResult]:
    """Trains to the end; returns the fields of a row. Raises DivergedError."""
    points: list[tuple[int, float | None]] = []

    def judge(event: Event) -> None:
        if isinstance(event, Committed) and workload.goal is None:
            points.append((event.stop, _judged(runner.plant, workload.val_loader)))

    runner.listeners.append(judge)
    result = runner.fit(steps)
    record = result.record
    found = _found(
        workload.goal,
        [row["loss"] for row in result.tape],
        lambda name: [row.get(name) for row in result.tape],
        points,
        validation=record["val_loss"],
        test=record["test_loss"],
        train=record["train_loss"],
    )
    return found | {
        "test_accuracy": record["test_accuracy"],
        "average_test_loss": record["average_test_loss"],
        "cost": record["cost"]["plain_run_equivalents"],
        "gradient_evaluations": record["cost"]["gradient_evaluations"],
        "course": _course(result.tape),
        "start": runner.state.start_gradients / steps,
    }, result


def _smoothed(task: Task, method: Method, lr: float | None, seed: int) -> dict[str, Any]:
    """The run that the smoother keeps, with the cost of all its runs."""
    goal = task.workload(seed).goal

    def train(number: int, schedule: Schedule | None) -> Pass:
        found, result = _fitted(*prepared(task, method, lr, seed, schedule=schedule))
        judged = held_out(result.record, result.tape, goal)
        return Pass(result.schedule, result.tape, judged, found)

    try:
        runs, best = smooth(train, Smoother(), method.smooths, reward_of(goal))
    except DivergedError:
        return _diverged(goal, 1.0, None, 0.0)
    spent = {
        name: sum(run.result[name] for run in runs) for name in ("cost", "gradient_evaluations")
    }
    return {**runs[best].result, **spent}


def check_files(task: Task, names: Sequence[str]) -> None:
    """Raises InputError unless the task has exactly the files that the methods need."""
    methods = [method_of(name) for name in names]
    if any(method.replays for method in methods):
        _schedule(task, 0)
    elif task.schedule is not None:
        raise InputError("--schedule is for the method replay; name it too, or leave it out")
    if any(method.distilled for method in methods):
        _policy(task)
    elif task.policy is not None:
        raise InputError("--policy is for the method distilled; name it too, or leave it out")
    known_sizes = inspect.signature(load_runner(task.run)).parameters
    for name in ("width", "batch_size"):
        size = getattr(task, name)
        if size is not None and name not in known_sizes:
            raise InputError(
                f"run {task.run!r} cannot have {name} {size}; leave --{name.replace('_', '-')} out"
            )


def _schedule(task: Task, seed: int) -> Schedule:
    if task.schedule is None:
        raise InputError("method replay follows a schedule; give --schedule DIR or FILE")
    given = task.schedule
    schedule = Schedule.load(given / "schedule.json" if given.is_dir() else given)
    return schedule.stretched(task.steps or task.workload(seed).steps)


def _policy(task: Task) -> Policy:
    if task.policy is None:
        raise InputError("method distilled needs a policy; give --policy FOLDER of rhc distill")
    return Policy.load(task.policy)


def _driven(task: Task, method: Method, lr: float | None, seed: int) -> dict[str, Any]:
    """A plain loop with a causal scheduler; nothing is rewound."""
    workload = task.workload(seed)
    model, steps = workload.model, task.steps or workload.steps
    name = method.optimizer or workload.optimizer
    first = _first_lr(workload, name, lr)
    parameters: Any = workload.parameter_groups
    if parameters is None:
        parameters = [p for p in model.parameters() if p.requires_grad]
    goal, every = workload.goal, _every(steps)
    assert method.drives is not None
    losses: list[float] = []
    metrics: dict[str, list[float]] = {}
    points: list[tuple[int, float | None]] = []
    course: list[dict[str, float | None]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an lr outside the bounds is part of the comparison
        driver = method.drives(workload, name, parameters, first, steps)
        plant = Plant(model, driver.optimizer, workload.loss_fn, seed=seed)
        reward = workload.reward if driver.rewarded else None
        for step, batch in enumerate(
            islice(chain.from_iterable(repeat(workload.train_loader)), steps), 1
        ):
            driver.mode(True)
            outcome = workload.loss_fn(model, batch)
            loss, seen = outcome if isinstance(outcome, tuple) else (outcome, {})
            driver.optimizer.zero_grad()
            loss.backward()
            driver.optimizer.step()
            driver.step(loss, None if reward is None else reward(model, step, seen))
            losses.append(float(loss))
            for key, value in seen.items():
                metrics.setdefault(key, []).append(float(value))
            if step % every == 0 or step == steps:
                driver.mode(False)
                points.append((step, None if goal else _judged(plant, workload.val_loader)))
            if driver.course is not None:
                course.append({"step": step - 1, "loss": losses[-1], **driver.course()})
    driver.mode(False)
    test = evaluate(plant, workload.test_loader)
    judged = evaluate(plant, workload.val_loader)
    forward = getattr(reward, "forward_passes", 0.0)
    found = _found(
        goal,
        losses,
        lambda name: metrics.get(name, []),
        points,
        validation=None if judged is None else judged.loss,
        test=None if test is None else test.loss,
        train=losses[-1],
    )
    return found | {
        "test_accuracy": None if test is None else test.metrics.get("accuracy"),
        "average_test_loss": None,
        "cost": 1.0 + forward / 3 / steps,
        "gradient_evaluations": float(steps),
        "course": _course(course),
        "start": 0.0,
    }


def _found(
    goal: Goal | None,
    losses: Sequence[float | None],
    metric: Callable[[str], Sequence[float | None]],
    points: Sequence[tuple[int, float | None]],
    *,
    validation: float | None,
    test: float | None,
    train: float | None,
) -> dict[str, Any]:
    """Score, curve and validation of a completed run."""
    tracked = [value for value in metric(TRACKING.metric) if value is not None]
    if goal is None and len(tracked) == len(losses):
        goal = TRACKING
    higher = goal is not None and goal.higher
    if validation is None:
        validation = statistics.fmean(_finite(loss) for loss in losses)
    curve = points
    score = train if test is None else test
    if goal is not None:
        values = [_finite(value, higher) for value in metric(goal.metric)]
        curve = running_means(values, goal.over)
        score = statistics.fmean(values[-goal.over :] if goal.last else values)
    elif all(value is None for _, value in points):
        curve = running_means([_finite(loss) for loss in losses], _every(len(losses)))
    return {
        "score": _finite(score, higher),
        "test_loss": test,
        "validation": _finite(validation),
        "higher": higher,
        "curve": [(step, value) for step, value in curve],
    }


def running_means(values: Sequence[float], over: int) -> list[tuple[int, float | None]]:
    """(steps taken, mean of the last `over` values or of all if fewer), at every tenth step from
    `over` on and at the last."""
    over = max(1, min(over, len(values)))
    sums = np.cumsum([0.0, *values])
    every = 10 if len(values) - over >= 100 else 1
    steps = sorted({*range(over, len(values) + 1, every), len(values)})
    with np.errstate(invalid="ignore"):
        means = [float((sums[step] - sums[step - over]) / over) for step in steps]
    return [(s, m if math.isfinite(m) else None) for s, m in zip(steps, means, strict=True)]


def _judged(plant: Plant, loader: Any) -> float | None:
    """The held-out loss, or None if not finite; preserves the random state."""
    with preserved():
        losses = evaluate(plant, loader, most=JUDGED_BATCHES)
    return None if losses is None or not math.isfinite(losses.loss) else losses.loss


def _course(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Numeric columns of at most POINTS rows; the largest of values per parameter group."""
    kept = rows[:: math.ceil(len(rows) / POINTS)] if rows else []
    names = dict.fromkeys(chain.from_iterable(kept))
    columns = {name: [_largest(row.get(name)) for row in kept] for name in names}
    return {
        name: [None if x is None else float(f"{x:.6g}") for x in column]
        for name, column in columns.items()
        if all(isinstance(x, int | float | None) for x in column)
    }


def _largest(value: Any) -> Any:
    return max(value) if isinstance(value, list | tuple) and value else value


def prepared(
    task: Task,
    method: Method,
    lr: float | None,
    seed: int,
    draws: random.Random | None = None,
    **more: Any,
) -> tuple[Runner, Workload, int]:
    """(Runner, workload, steps) for a task and method. more: settings of the Runner."""
    workload = task.workload(seed)
    if method.plans is not None:
        workload, more["planner"] = method.plans(workload)
    name = method.optimizer or workload.optimizer
    first = _first_lr(workload, name, lr)
    groups: list[dict[str, Any]] = workload.parameter_groups or [
        {"params": [p for p in workload.model.parameters() if p.requires_grad]}
    ]
    if method.groups is not None:
        groups = method.groups(workload, groups, first, draws or random.Random(seed))
    steps = task.steps or workload.steps
    plain = {} if method.settings.get("rewrite", True) else {"window": _every(steps)}
    runner = Runner(
        workload.model,
        optimizer_of(name, groups, first),
        workload.loss_fn,
        workload.train_loader,
        workload.val_loader,
        test_loader=workload.test_loader,
        seed=seed,
        **{**plain, **method.settings, **more},
    )
    return runner, workload, steps


def _every(steps: int) -> int:
    return max(1, min(EVERY, steps // 20))


def _first_lr(workload: Workload, optimizer: str, lr: float | None) -> float:
    """The given lr, else the workload's for that optimizer, else 1e-3."""
    return workload.lr.get(optimizer, 1e-3) if lr is None else lr


def _diverged(
    goal: Goal | None, cost: float, gradients: float | None, start: float
) -> dict[str, Any]:
    higher = goal is not None and goal.higher
    return {
        **dict.fromkeys(("test_loss", "test_accuracy", "average_test_loss")),
        "score": -math.inf if higher else math.inf,
        "validation": math.inf,
        "higher": higher,
        "cost": cost,
        "gradient_evaluations": gradients,
        "start": start,
    }


def _finite(value: float | None, higher: bool = False) -> float:
    worst = -math.inf if higher else math.inf
    return worst if value is None or not math.isfinite(value) else value

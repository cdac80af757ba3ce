"""One method on one seed: its result, and its cost with lr search, replays and discarded runs.

Seeds 0 to 9 are for development, 100 and more for reports.
"""

from __future__ import annotations

import inspect
import math
import random
import re
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rhc.compare.methods import Method, distilled, method_of
from rhc.data_weights import unweighed
from rhc.errors import InputError
from rhc.events import Committed, Event
from rhc.hindsight import Pass, Policy, Smoother, held_out, reward_of, smooth
from rhc.report.loop_tape import LoopTape, write_run
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
    directory: Path | None = None
    """Folder of the runs' own directories, which `rhc report` shows; None for none."""

    def workload(self, seed: int) -> Workload:
        seed_everything(seed)
        sizes = {"width": self.width, "batch_size": self.batch_size}
        given = {name: size for name, size in sizes.items() if size is not None}
        workload = unweighed(load_runner(self.run)(seed=seed, data=self.data, **given))
        if workload.threads is not None:
            torch.set_num_threads(workload.threads)
        return workload


@dataclass
class Trained:
    """A run that has ended. fields: of its Row. start: cost of its lr search, in baseline runs.
    record: the content of result.json; None if the run diverged."""

    goal: Goal | None
    fields: dict[str, Any]
    start: float = 0.0
    tape: Sequence[Mapping[str, Any]] = ()
    windows: Sequence[Mapping[str, Any]] = ()
    record: Mapping[str, Any] | None = None


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
        best = min(tried, key=lambda trained: trained.fields["validation"])
        # The lr search is the same every time: its cost counts once.
        start = tried[0].start
        best.fields["cost"] = start + sum(each.fields["cost"] - start for each in tried)
    row = Row(name, lr, seed, **best.fields)
    if task.directory is not None:
        _write(task, row, best)
    return row


def _write(task: Task, row: Row, trained: Trained) -> None:
    """A directory of the run, beside those of the other cells."""
    own = re.sub(r"[^\w.-]+", "-", row.method).strip("-")
    name = "-".join([own, *([] if row.lr is None else [f"{row.lr:g}"]), f"{row.seed}"])
    goal = trained.goal
    config = {
        "command": "compare",
        "run": task.run,
        "data": None if task.data is None else str(task.data),
        "method": row.method,
        "lr": row.lr,
        "seed": row.seed,
        "steps": len(trained.tape),
        "reward": goal.metric if goal is not None and goal.higher else None,
    }
    assert task.directory is not None
    write_run(task.directory / name, config, trained.tape, trained.windows, trained.record)


def _one(
    task: Task,
    method: Method,
    lr: float | None,
    seed: int,
    draws: random.Random,
    **more: Any,
) -> Trained:
    runner, workload, steps = prepared(task, method, lr, seed, draws, **more)
    try:
        return _fitted(runner, workload, steps)[0]
    except DivergedError:
        state = runner.state
        cost = max(state.cost.gradient_equivalents / steps, 1.0)
        fields = _diverged(workload.goal, cost, state.cost.gradient_evaluations)
        start = state.start_gradients / steps
        return Trained(workload.goal, fields, start, state.tape, state.windows)


def _fitted(runner: Runner, workload: Workload, steps: int) -> tuple[Trained, RunResult]:
    """Trains to the end. Raises DivergedError."""
    points: list[tuple[int, float | None]] = []

    def judge(event: Event) -> None:
        if isinstance(event, Committed) and workload.goal is None:
            points.append((event.stop, _judged(runner.plant, workload.val_loader)))

    runner.listeners.append(judge)
    result = runner.fit(steps)
    fields = _fields(workload.goal, result.tape, points, result.record)
    start = runner.state.start_gradients / steps
    tape, windows, record = result.tape, result.windows, result.record
    return Trained(workload.goal, fields, start, tape, windows, record), result


def _smoothed(task: Task, method: Method, lr: float | None, seed: int) -> Trained:
    """The run that the smoother keeps, with the cost of all its runs."""
    goal = task.workload(seed).goal

    def train(number: int, schedule: Schedule | None) -> Pass:
        trained, result = _fitted(*prepared(task, method, lr, seed, schedule=schedule))
        judged = held_out(result.record, result.tape, goal)
        return Pass(result.schedule, result.tape, judged, trained)

    try:
        runs, best = smooth(train, Smoother(), method.smooths, reward_of(goal))
    except DivergedError:
        return Trained(goal, _diverged(goal, 1.0, None))
    kept: Trained = runs[best].result
    for name in ("cost", "gradient_evaluations"):
        kept.fields[name] = sum(run.result.fields[name] for run in runs)
    return kept


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


def _driven(task: Task, method: Method, lr: float | None, seed: int) -> Trained:
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
    points: list[tuple[int, float | None]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an lr outside the bounds is part of the comparison
        driver = method.drives(workload, name, parameters, first, steps)
        tape = LoopTape(None, driver.optimizer, driver.scheduler)
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
            rewarded = None if reward is None else reward(model, step, seen)
            driver.step(loss, rewarded)
            tape.step(loss, rewarded, seen)
            if step % every == 0 or step == steps:
                driver.mode(False)
                points.append((step, None if goal else _judged(plant, workload.val_loader)))
    driver.mode(False)
    tape.close()
    test = evaluate(plant, workload.test_loader)
    validation = evaluate(plant, workload.val_loader)
    forward = getattr(reward, "forward_passes", 0.0)
    record = {
        "val_loss": validation and validation.loss,
        "test_loss": test and test.loss,
        "train_loss": tape.rows[-1]["loss"],
        "test_accuracy": None if test is None else test.metrics.get("accuracy"),
        "average_test_loss": None,
        "cost": {
            "plain_run_equivalents": 1.0 + forward / 3 / steps,
            "gradient_evaluations": float(steps),
            **dict.fromkeys(("windows", "rejected_windows", "rewound_windows"), 0),
        },
    }
    fields = _fields(goal, tape.rows, points, record)
    return Trained(goal, fields, tape=tape.rows, record=record)


def _fields(
    goal: Goal | None,
    tape: Sequence[Mapping[str, Any]],
    points: Sequence[tuple[int, float | None]],
    record: Mapping[str, Any],
) -> dict[str, Any]:
    """The fields of the Row of a completed run."""

    def column(name: str) -> list[float | None]:
        return [row.get(name) for row in tape]

    losses = column("loss")
    if goal is None and None not in column(TRACKING.metric):
        goal = TRACKING
    higher = goal is not None and goal.higher
    validation = record["val_loss"]
    if validation is None:
        validation = statistics.fmean(map(_finite, losses))
    curve = points
    score = record["train_loss"] if record["test_loss"] is None else record["test_loss"]
    if goal is not None:
        values = [_finite(value, higher) for value in column(goal.metric)]
        curve = running_means(values, goal.over)
        score = statistics.fmean(values[-goal.over :] if goal.last else values)
    elif all(value is None for _, value in points):
        curve = running_means(list(map(_finite, losses)), _every(len(losses)))
    return {
        **{name: record[name] for name in ("test_loss", "test_accuracy", "average_test_loss")},
        "score": _finite(score, higher),
        "validation": _finite(validation),
        "higher": higher,
        "curve": [(step, value) for step, value in curve],
        "cost": record["cost"]["plain_run_equivalents"],
        "gradient_evaluations": record["cost"]["gradient_evaluations"],
        "course": _course(tape),
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
        progress=False,
        **{**plain, **method.settings, **more},
    )
    return runner, workload, steps


def _every(steps: int) -> int:
    return max(1, min(EVERY, steps // 20))


def _first_lr(workload: Workload, optimizer: str, lr: float | None) -> float:
    """The given lr, else the workload's for that optimizer, else 1e-3."""
    return workload.lr.get(optimizer, 1e-3) if lr is None else lr


def _diverged(goal: Goal | None, cost: float, gradients: float | None) -> dict[str, Any]:
    higher = goal is not None and goal.higher
    return {
        **dict.fromkeys(("test_loss", "test_accuracy", "average_test_loss")),
        "score": -math.inf if higher else math.inf,
        "validation": math.inf,
        "higher": higher,
        "cost": cost,
        "gradient_evaluations": gradients,
    }


def _finite(value: float | None, higher: bool = False) -> float:
    worst = -math.inf if higher else math.inf
    return worst if value is None or not math.isfinite(value) else value

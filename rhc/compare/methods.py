"""Methods × seeds on one workload at equal committed steps: what each ends with, what it cost.

`METHODS` says what there is, `run` runs one of them on one seed and returns a Row, `summarise`
makes lines of rows. `rhc.compare.pool` runs many of them in parallel and prints the table.

Every number comes from a run of its own; the cost counts everything that was spent on the way to
it: looking for a start, looking back, replays, objectives, and the runs that a race or a search
throws away. Intervals are bootstrap 95 % intervals of the mean over seeds (Efron 1979); differences
are paired, seed by seed. Seeds 0 to 9 are for choosing, 100 and more for reporting.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import random
import re
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from rhc.containers import spare
from rhc.errors import InputError
from rhc.events import Committed, Event
from rhc.hindsight import DistilledScheduler, Pass, Policy, Smoother, held_out, reward_of, smooth
from rhc.loop.update_rule import USUAL, Twin, usual_objective
from rhc.rng import preserved, seed_everything
from rhc.runner import DivergedError, Runner, RunResult
from rhc.schedule import CONTROLS, Schedule
from rhc.schedulers import VALUES, AdaptiveRL, Always, Bounds, EpochPlanner, FreshSeeds, Gains
from rhc.schedulers.planner import STEERED
from rhc.settings import check_most
from rhc.settings.commands import check_seed
from rhc.training.evaluate import evaluate
from rhc.training.objective import Objective
from rhc.training.plant import Plant
from rhc.workload import Goal, Plannable, Workload, load_runner, optimizer_of, usual_weight_decay

RACED = ("cosine", "linear", "wsd")
"""Templates that race each other."""

SEARCHED = 5
"""Runs of a random search: about as many plain runs as the whole of rhc may cost."""


SPAN = (0.1, 30.0)
"""Of a random search over cosines: two and a half decades around the lr that is given."""


@dataclass(frozen=True)
class Method:
    """One way to train a workload. settings: of the Runner. needs_lr: run once per first lr.
    optimizer: in place of the workload's own.

    ratio: "lars" for lrs of the groups as |θ|/|∇J| at step 0; "oracle" for what the workload itself
    says is right, its groups' "ratio". races: templates of which the best by
    validation is taken. searches: runs with random lrs of which the best by validation is taken.
    smooths: passes of the two-pass smoother, whose kept run is taken. replays: whether it follows
    the task's schedule. distilled: whether the task's policy steers it. span: factors within which
    `searches` draws one lr of all groups around the one that is given, in place of any lrs.
    drives: what makes the optimizer of a plain loop and is told the loss and reward of every step.
    plans: what plans the epochs of a Runner.
    """

    summary: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs_lr: bool = False
    optimizer: str | None = None
    ratio: str | None = None
    races: tuple[str, ...] = ()
    searches: int = 0
    smooths: int = 0
    replays: bool = False
    distilled: bool = False
    span: tuple[float, float] | None = None
    drives: Drives | None = None
    plans: Plans | None = None


@dataclass
class Driver:
    """What steers a plain loop. step: told (loss, reward) after every step of the optimizer, reward
    None where there is none. rewarded: whether it looks at rewards, which cost something. course:
    the numbers of now, for pictures. mode: told True before training and False before a model is
    judged."""

    optimizer: Optimizer
    step: Callable[[Tensor, Any], None] = lambda loss, reward: None
    rewarded: bool = False
    course: Callable[[], Mapping[str, float | None]] | None = None
    mode: Callable[[bool], None] = lambda training: None


Drives = Callable[[Workload, str, Any, float, int], Driver]
"""(workload, name of the optimizer, parameters, first lr, steps) -> Driver."""


Plans = Callable[[Workload], tuple[Workload, EpochPlanner]]
"""(the workload) -> the workload with the knobs that are planned, and the planner."""


def _planned(*names: str, fixed: bool = False, **settings: Any) -> Plans:
    """An EpochPlanner that steers those of the names that there are in the run, and nothing else.

    fixed: the knobs are there, and stay as they begin. Without a name for a guard ("drift",
    "failsafe") there is none.
    """

    def plans(workload: Workload) -> tuple[Workload, EpochPlanner]:
        nothing = Gains(**dict.fromkeys(vars(Gains()), 0.0))
        offered = workload.plannable or Plannable((), lambda workload, names: (workload, []))
        workload, knobs = offered.build(workload, [n for n in names if n in offered.names])
        gains = nothing if fixed else None
        steer = tuple(n for n in STEERED if n in names)
        if not steer and not knobs:
            steer, gains = STEERED, nothing
        planner = EpochPlanner(
            steer=steer,
            knobs=knobs,
            gains=gains,
            drift="drift" in names,
            failsafe="failsafe" in names,
            reward=None if offered.returns is None else FreshSeeds(offered.returns),
            epoch_steps=offered.epoch_steps,
            **settings,
        )
        return workload, planner

    return plans


def _adaptive(*, rewarded: bool = True, paced: bool = True, **settings: Any) -> Drives:
    """AdaptiveRL, told the length of the run unless not `paced`."""

    def drives(workload: Workload, name: str, parameters: Any, lr: float, steps: int) -> Driver:
        optimizer = optimizer_of(name, parameters, lr)
        own = {"steps": steps if paced else None, "noise": workload.noise}
        bounds: Bounds = settings.get("bounds", Bounds())
        own["noise"] = min(max(workload.noise, bounds.noise[0]), bounds.noise[1])
        scheduler = AdaptiveRL(optimizer, **own | settings)
        return Driver(optimizer, scheduler.step, rewarded, lambda: scheduler.values)

    return drives


def _step_lr(workload: Workload, name: str, parameters: Any, lr: float, steps: int) -> Driver:
    optimizer = optimizer_of(name, parameters, lr)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, max(1, steps // 3), 0.1)
    return Driver(optimizer, lambda loss, reward: scheduler.step())


def _on_plateau(workload: Workload, name: str, parameters: Any, lr: float, steps: int) -> Driver:
    """ReduceLROnPlateau on the mean training loss of every fiftieth of the run."""
    optimizer = optimizer_of(name, parameters, lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=3)
    seen: list[Tensor] = []

    def step(loss: Tensor, reward: Any) -> None:
        seen.append(loss.detach())
        if len(seen) >= max(1, steps // 50):
            scheduler.step(float(torch.stack(seen).mean()))
            seen.clear()

    return Driver(optimizer, step)


def _schedule_free(workload: Workload, name: str, parameters: Any, lr: float, steps: int) -> Driver:
    """Schedule-Free SGD or AdamW (Defazio et al. 2024), with a warm-up of a twentieth."""
    free = _optional("schedulefree", "schedule-free")
    warmup = steps // 20
    if name == "sgd":
        optimizer = free.SGDScheduleFree(parameters, lr=lr, momentum=0.9, warmup_steps=warmup)
    else:
        decay = usual_weight_decay(name)
        optimizer = free.AdamWScheduleFree(
            parameters, lr=lr, warmup_steps=warmup, weight_decay=decay
        )
    return Driver(optimizer, mode=lambda on: optimizer.train() if on else optimizer.eval())


def _prodigy(workload: Workload, name: str, parameters: Any, lr: float, steps: int) -> Driver:
    """Prodigy (Mishchenko & Defazio 2024), its lr of 1 falling along a cosine."""
    optimizer = _optional("prodigyopt", "prodigy").Prodigy(parameters, lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return Driver(optimizer, lambda loss, reward: scheduler.step())


def _optional(module: str, method: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"method {method} needs {module}: pip install 'rhc[baselines]' or {module}"
        ) from None


def _plainly(template: str, warmup: float = 0.0) -> Method:
    how = f"{template}{' with warm-up' if warmup else ''}"
    settings = {"rewrite": False, "start": "given", "template": template, "warmup": warmup}
    return Method(f"{how} from the lr that is given, no rewriting", settings, needs_lr=True)


def _without(what: str, **settings: Any) -> Method:
    return Method(f"rhc {what}", {"start": "zero", **settings})


_CONSTANT = {"rewrite": False, "start": "given", "template": "constant"}
_COSINE = _CONSTANT | {"template": "cosine"}
FIXED_NOISE = Bounds(noise=(0.02, 0.02))

PLANNED = ("lr", "failsafe")
"""What `planner` plans; docs/planning.md says why no more."""

EVERYTHING = (*VALUES, "drift", "failsafe")

METHODS: Mapping[str, Method] = {
    "constant": _plainly("constant"),
    "cosine": _plainly("cosine"),
    "linear": _plainly("linear", warmup=0.1),
    "1cycle": _plainly("1cycle"),
    "wsd": _plainly("wsd"),
    "step": Method("StepLR: lr falls to a tenth after each third", needs_lr=True, drives=_step_lr),
    "on-plateau": Method(
        "ReduceLROnPlateau on the training loss", needs_lr=True, drives=_on_plateau
    ),
    "adaptive": Method(
        "AdaptiveRL from the lr that is given, in a plain loop", needs_lr=True, drives=_adaptive()
    ),
    "adaptive-unpaced": Method(
        "the same with an update every 20 steps, whatever the length of the run",
        needs_lr=True,
        drives=_adaptive(paced=False),
    ),
    "adaptive-no-noise": Method(
        "AdaptiveRL without gradient noise",
        needs_lr=True,
        drives=_adaptive(bounds=Bounds(noise=(0.0, 0.0))),
    ),
    "smooth": Method(
        "the two-pass smoother, from a run at the constant lr that is given",
        {"rewrite": False, "start": "given"},
        needs_lr=True,
        smooths=1,
    ),
    "smooth-3": Method(
        "the same in three passes, four runs",
        {"rewrite": False, "start": "given"},
        needs_lr=True,
        smooths=3,
    ),
    "replay": Method(
        "the schedule of --schedule as it is, stretched to the run's length",
        {"rewrite": False, "start": "given"},
        replays=True,
    ),
    "distilled": Method(
        "the policy of --policy, from the lr that is given", needs_lr=True, distilled=True
    ),
    **{
        f"search-cosine-{count}": Method(
            f"{count} cosines, lrs at random, 0.1 to 30 times that given, the best by validation",
            {"rewrite": False, "start": "given", "template": "cosine"},
            needs_lr=True,
            searches=count,
            span=SPAN,
        )
        for count in (2, 4)
    },
    **{
        f"adaptive-{name}": Method(
            f"AdaptiveRL {what}", needs_lr=True, drives=_adaptive(**settings)
        )
        for name, what, settings in (
            ("loss-only", "that looks at no reward", {"source": "loss", "rewarded": False}),
            ("reward-only", "without the terms of the loss", {"source": "reward"}),
            ("no-anneal", "whose lr is not annealed", {"anneal": False}),
            ("fixed-noise", "with noise fixed at 0.02", {"noise": 0.02, "bounds": FIXED_NOISE}),
            ("parameter-noise", "with noise on the parameters", {"noise_on": "parameters"}),
        )
    },
    "planner": Method(
        "epochs planned from the tape of the one before, from the lr that is given",
        _CONSTANT,
        needs_lr=True,
        plans=_planned(*PLANNED),
    ),
    "planner-cosine": Method(
        "the same on top of a cosine", _COSINE, needs_lr=True, plans=_planned(*PLANNED)
    ),
    "planner-all": Method(
        "epochs planned with everything that can be",
        _CONSTANT,
        needs_lr=True,
        plans=_planned(*EVERYTHING),
    ),
    "planner-preset": Method(
        "the failsafe's preset from the second epoch on",
        _CONSTANT,
        needs_lr=True,
        plans=_planned(law=Always()),
    ),
    **{
        f"planner-{name}-fixed": Method(
            f"{name} at the strength that planning begins with, nothing planned",
            _CONSTANT,
            needs_lr=True,
            plans=_planned(name, fixed=True),
        )
        for name in ("sampling", "augmentation")
    },
    **{
        f"planner-{name.replace('_', '-')}": Method(
            f"epochs planned in nothing but {name.replace('_', ' ')}",
            _CONSTANT,
            needs_lr=True,
            plans=_planned(name),
        )
        for name in EVERYTHING
    },
    "adamw": Method("AdamW at its own lr, constant", _CONSTANT, optimizer="adamw"),
    "adamw-cosine": Method(
        "AdamW with a cosine from the lr that is given", _COSINE, needs_lr=True, optimizer="adamw"
    ),
    "schedule-free": Method(
        "Schedule-Free, of the package schedulefree", needs_lr=True, drives=_schedule_free
    ),
    "prodigy": Method("Prodigy with a cosine, of the package prodigyopt", drives=_prodigy),
    "zero-probe": Method(
        "start from the hypergradient at lr 0, the usual template, no rewriting",
        {"rewrite": False, "start": "zero"},
    ),
    "zero-probe-cosine": Method(
        "the same with a cosine", {"rewrite": False, "start": "zero", "template": "cosine"}
    ),
    "probe-cosine": Method(
        "start from probes around the lr that is given, cosine, no rewriting",
        {"rewrite": False, "start": "probe", "template": "cosine"},
        needs_lr=True,
    ),
    "lars-cosine": Method(
        "groups in the ratio of |θ|/|∇J|, probes, cosine, no rewriting",
        {"rewrite": False, "start": "probe", "template": "cosine"},
        ratio="lars",
    ),
    "oracle-cosine": Method(
        "the workload's own ratio of the groups, cosine from the lr that is given",
        {"rewrite": False, "start": "given", "template": "cosine"},
        needs_lr=True,
        ratio="oracle",
    ),
    "template-race": Method(
        f"start from zero, whole runs of {', '.join(RACED)}, the best by validation",
        {"rewrite": False, "start": "zero"},
        races=RACED,
    ),
    "random-search": Method(
        f"{SEARCHED} constant lrs per group at random in [1e-5, 1], the best by validation",
        {"rewrite": False, "start": "given", "template": "constant"},
        searches=SEARCHED,
    ),
    "rhc": Method("the default, with no lr given", {"start": "zero"}),
    "rhc-probe": Method(
        "the default, from the lr that is given", {"start": "probe"}, needs_lr=True
    ),
    "twin": _without("without gradients: each window at a higher and a lower lr", rewrite=Twin()),
    "no-rewrite": _without("that only begins the template anew", rewrite=replace(USUAL, step={})),
    "no-anew": _without("that never does so", rewrite=replace(USUAL, restart=())),
    "no-hessian": _without("with H = 0: the default, named", product="none"),
    "exact-hessian": _without("with exact Hessian products", product="exact"),
    "no-average": _without(
        "judging windows at the last iterate",
        objective=replace(usual_objective("zero", 50), average=None),
    ),
    "memory": _without(
        "judging windows at an average that goes on over their borders",
        objective=replace(usual_objective("zero", 50), memory=True),
    ),
    "greedy": _without(
        "judging windows by their training losses alone",
        objective=Objective(loss_weight=1.0, terminal_weight=0.0),
    ),
    "no-accept": _without("that keeps every rewrite", rewrite=replace(USUAL, accept=False)),
    "step-standard-error": _without(
        "with steps normalised by their spread over windows",
        rewrite=replace(USUAL, rule="standard-error"),
    ),
    "step-batch-error": _without(
        "with steps normalised by their standard error over the objective's batches",
        rewrite=replace(USUAL, rule="batch-error"),
    ),
    "step-sign": _without(
        "with steps by the sign, longer where it repeats", rewrite=replace(USUAL, rule="sign")
    ),
    "step-adam": _without("with Adam's steps over windows", rewrite=replace(USUAL, rule="adam")),
    "every-window": _without(
        "that looks back at all windows", rewrite=replace(USUAL, patience=None, until=1.0)
    ),
    "all-controls": _without(
        "that rewrites momentum and noise too", controls=("lr", "momentum", "noise")
    ),
}


ABLATIONS = (
    "adaptive",
    "adaptive-loss-only",
    "adaptive-reward-only",
    "adaptive-no-noise",
    "adaptive-no-anneal",
    "adaptive-fixed-noise",
    "adaptive-parameter-noise",
)
"""What `--ablations` runs: AdaptiveRL, and AdaptiveRL with one part changed."""

TRACKING = Goal("tracking", over=50, last=False)
"""Of workloads without a goal whose steps all have this metric."""

EVERY = 50
"""Steps between two points of a run's curve, at most a twentieth of the run where nothing is
rewritten; the window of a Runner that rewrites, which commits that often."""

JUDGED_BATCHES = 8
"""Batches of held-out data behind a point of the curve, at most."""

POINTS = 100
"""Points of a run's course that are kept, at most."""


@dataclass(frozen=True)
class Row:
    """What one method ended with on one seed; a run that diverges for good has infinite losses.

    score: what methods are compared by, that of the workload's goal where it has one, else the
    mean over all steps of the metric "tracking" where there is one, else the test loss of the final
    weights. higher: whether a higher score is better. validation: what races and searches choose
    by. cost: in plain runs.
    curve: (steps taken, value), of what the score is about: the metric's running mean, or else the
    loss on held-out data. course: columns of numbers over the run, for pictures: "step" and
    whatever the method steers.
    """

    method: str
    lr: float | None
    seed: int
    score: float
    test_loss: float | None
    test_accuracy: float | None
    average_test_loss: float | None
    validation: float
    cost: float
    higher: bool = False
    gradient_evaluations: float | None = None
    curve: Sequence[Sequence[float | None]] = ()
    course: Mapping[str, Sequence[float | None]] = field(default_factory=dict)

    def steps_to(self, target: float) -> int | None:
        """Steps after which the curve first reaches the target; None where it never does."""
        for step, value in self.curve:
            if value is not None and (value >= target if self.higher else value <= target):
                return int(step or 0)
        return None


@dataclass(frozen=True)
class Task:
    """What is trained: a runner's name, its data, and the steps of every run.

    schedule, policy: files of the methods that use one. width, batch_size: for runs that have other
    ones; None for the run's own.
    """

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


def compare(
    task: Task,
    methods: Sequence[str],
    lrs: Sequence[float | None],
    seeds: Sequence[int],
    tell: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """All methods on all seeds; those that need an lr from each of `lrs`, or the workload's own."""
    for name in methods:
        known(name)
    rows = []
    for name, lr, seed in cells(methods, lrs, seeds):
        rows.append(run(task, name, lr, seed))
        tell(rows[-1])
    return rows


def cells(
    methods: Sequence[str], lrs: Sequence[float | None], seeds: Sequence[int]
) -> Iterator[tuple[str, float | None, int]]:
    """(method, lr, seed) of every run, in order; lr None where a method needs none."""
    for name in methods:
        for lr in (lrs or [None]) if METHODS[name].needs_lr else [None]:
            for seed in seeds:
                yield name, lr, seed


def known(name: str) -> None:
    """Raises InputError for a method that there is not."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown method {name!r}: {hint}there are: {', '.join(METHODS)}")


def run(task: Task, name: str, lr: float | None, seed: int) -> Row:
    """One method on one seed."""
    method = METHODS[name]
    if method.races:
        tried = [_one(task, method, lr, seed, template=t) for t in method.races]
        # The same start was looked for every time, and is paid for once.
        start = tried[0]["start"]
        best = min(tried, key=lambda found: found["validation"])
        best["cost"] = start + sum(found["cost"] - start for found in tried)
    elif method.searches:
        draws = random.Random(seed)
        tried = [_one(task, method, lr, seed, draw=draws) for _ in range(method.searches)]
        best = min(tried, key=lambda found: found["validation"])
        best["cost"] = sum(found["cost"] for found in tried)
    elif method.smooths:
        best = _smoothed(task, method, lr, seed)
    elif method.replays:
        best = _one(task, method, lr, seed, schedule=_schedule(task, seed))
    elif method.distilled:
        best = _driven(task, replace(method, drives=_distilled(task)), lr, seed)
    elif method.drives is not None:
        best = _driven(task, method, lr, seed)
    else:
        best = _one(task, method, lr, seed)
    del best["start"]
    return Row(name, lr, seed, **best)


def _one(
    task: Task,
    method: Method,
    lr: float | None,
    seed: int,
    *,
    draw: random.Random | None = None,
    **more: Any,
) -> dict[str, Any]:
    runner, workload, steps = _prepared(task, method, lr, seed, draw=draw, **more)
    try:
        return _fitted(runner, workload, steps)[0]
    except DivergedError:
        cost = runner.loop.cost
        return _diverged(
            workload.goal,
            max(cost.gradient_equivalents / steps, 1.0),
            cost.gradient_evaluations,
            runner.loop.start_gradients / steps,
        )


def _fitted(runner: Runner, workload: Workload, steps: int) -> tuple[dict[str, Any], RunResult]:
    """A Runner's run to its end, as the fields of a row. Raises DivergedError."""
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
        "start": runner.loop.start_gradients / steps,
    }, result


def _smoothed(task: Task, method: Method, lr: float | None, seed: int) -> dict[str, Any]:
    """The run that the smoother keeps, and what all of its runs cost."""
    goal = task.workload(seed).goal

    def train(number: int, schedule: Schedule | None) -> Pass:
        found, result = _fitted(*_prepared(task, method, lr, seed, schedule=schedule))
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
    """Raises InputError unless the task has what the methods need, and nothing that none needs."""
    if any(METHODS[name].replays for name in names):
        _schedule(task, 0)
    elif task.schedule is not None:
        raise InputError("--schedule is for the method replay; name it too, or leave it out")
    if any(METHODS[name].distilled for name in names):
        _distilled(task)
    elif task.policy is not None:
        raise InputError("--policy is for the method distilled; name it too, or leave it out")
    known_sizes = inspect.signature(load_runner(task.run)).parameters
    for name in ("width", "batch_size"):
        size = getattr(task, name)
        if size is not None and (name not in known_sizes or size < 1):
            raise InputError(
                f"run {task.run!r} cannot have {name} {size}; leave --{name.replace('_', '-')} out"
            )


def _schedule(task: Task, seed: int) -> Schedule:
    """The task's schedule, of the run's length."""
    if task.schedule is None:
        raise InputError("method replay follows a schedule; give --schedule DIR or FILE")
    given = task.schedule
    schedule = Schedule.load(given / "schedule.json" if given.is_dir() else given)
    return schedule.stretched(task.steps or task.workload(seed).steps)


def _distilled(task: Task) -> Drives:
    """The task's policy."""
    if task.policy is None:
        raise InputError("method distilled needs a policy; give --policy FOLDER of rhc distill")
    policy = Policy.load(task.policy)

    def drives(workload: Workload, name: str, parameters: Any, lr: float, steps: int) -> Driver:
        optimizer = optimizer_of(name, parameters, lr)
        scheduler = DistilledScheduler(optimizer, policy, steps=steps)
        return Driver(
            optimizer, scheduler.step, policy.form.reward, course=lambda: scheduler.values
        )

    return drives


def _driven(task: Task, method: Method, lr: float | None, seed: int) -> dict[str, Any]:
    """A plain loop whose scheduler is told every loss; nothing is rewound."""
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
    """Score, curve and what a search chooses by, of a run that went to its end."""
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
    """(steps taken, mean of the last `over` values) at every tenth step from `over` on, and at the
    last; over all values where there are fewer."""
    over = max(1, min(over, len(values)))
    sums = np.cumsum([0.0, *values])
    every = 10 if len(values) - over >= 100 else 1
    steps = sorted({*range(over, len(values) + 1, every), len(values)})
    with np.errstate(invalid="ignore"):
        means = [float((sums[step] - sums[step - over]) / over) for step in steps]
    return [(s, m if math.isfinite(m) else None) for s, m in zip(steps, means, strict=True)]


def _judged(plant: Plant, loader: Any) -> float | None:
    """The loss on held-out data; the run that goes on afterwards is the same."""
    with preserved():
        losses = evaluate(plant, loader, most=JUDGED_BATCHES)
    return None if losses is None or not math.isfinite(losses.loss) else losses.loss


def _course(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Columns of what is a number, or absent, in all rows, at no more than POINTS steps; of a
    control that differs by parameter group, the largest."""
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


def runner_of(
    task: Task,
    method: Method,
    lr: float | None,
    seed: int,
    *,
    draw: random.Random | None = None,
    **more: Any,
) -> tuple[Runner, int]:
    """A Runner that is about to train the task by `method`, and its steps.

    draw: where random lrs of the groups come from. more: further settings of the Runner.
    """
    runner, _, steps = _prepared(task, method, lr, seed, draw=draw, **more)
    return runner, steps


def _prepared(
    task: Task,
    method: Method,
    lr: float | None,
    seed: int,
    *,
    draw: random.Random | None = None,
    **more: Any,
) -> tuple[Runner, Workload, int]:
    workload = task.workload(seed)
    if method.plans is not None:
        workload, more["planner"] = method.plans(workload)
    name = method.optimizer or workload.optimizer
    first = _first_lr(workload, name, lr)
    groups: list[dict[str, Any]] = workload.parameter_groups or [
        {"params": [p for p in workload.model.parameters() if p.requires_grad]}
    ]
    if method.ratio == "lars":
        groups = _lars(workload, groups, first)
    elif method.ratio == "oracle":
        groups = [g | {"lr": first * g["ratio"]} for g in groups]
    if draw is not None and method.span is not None:
        factor = math.exp(draw.uniform(*map(math.log, method.span)))
        groups = [g | {"lr": g.get("lr", first) * factor} for g in groups]
    elif draw is not None:
        groups = [g | {"lr": 10 ** draw.uniform(-5, 0)} for g in groups]
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
    """The lr that is given, or the workload's own for that optimizer, or torch's."""
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


def _lars(
    workload: Workload, groups: Sequence[dict[str, Any]], first: float
) -> list[dict[str, Any]]:
    """The groups with lrs in the ratio |θ|/|∇J| at the first batch; the largest is `first`."""
    with torch.enable_grad():
        outcome = workload.loss_fn(workload.model, spare(next(iter(workload.train_loader))))
        (outcome[0] if isinstance(outcome, tuple) else outcome).backward()

    def norm(tensors: Iterator[Tensor | None]) -> float:
        return math.sqrt(sum(float(t.square().sum()) for t in tensors if t is not None))

    ratios = [
        norm(p.detach() for p in g["params"]) / max(norm(p.grad for p in g["params"]), 1e-12)
        for g in groups
    ]
    _forget(workload.model)
    bounds = CONTROLS["lr"]
    lrs = [first * ratio / max(ratios) for ratio in ratios]
    return [
        g | {"lr": min(max(lr, bounds.lower), bounds.upper)}
        for g, lr in zip(groups, lrs, strict=True)
    ]


def _forget(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


# Statistics ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A method at one lr over all seeds: mean score, its interval, mean cost.

    apart: mean paired difference to the reference and its interval; None for the reference itself.
    steps: mean over the `reached` of `seeds` runs that reach the target. tuning: what choosing the
    lr took in plain runs.
    """

    method: str
    lr: float | None
    score: float
    interval: tuple[float, float]
    cost: float
    apart: tuple[float, float, float] | None = None
    target: float | None = None
    steps: float | None = None
    reached: int = 0
    seeds: int = 0
    gradient_evaluations: float | None = None
    tuning: float = 0.0


def summarise(
    rows: Sequence[Row],
    versus: str | None = None,
    *,
    target: float | None = None,
    tuning: Mapping[str, float] | None = None,
) -> list[Line]:
    """A line per method and lr, in their order.

    versus: compared with, at its best lr. target: None for what the reference's curves end with,
    give or take 5 %. tuning: plain runs by method.
    """
    found: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        found.setdefault((row.method, row.lr), []).append(row)
    scores = {key: {row.seed: row.score for row in rs} for key, rs in found.items()}
    higher = any(row.higher for row in rows)
    of_reference = [key for key in found if key[0] == versus]
    best = min(
        of_reference,
        key=lambda key: statistics.mean(scores[key].values()) * (-1 if higher else 1),
        default=None,
    )
    if target is None:
        target = _usual_target(found[best] if best is not None else rows, higher)
    lines = []
    for key, rs in found.items():
        apart = None
        if best is not None and key != best:
            # A seed that one of the two has not (it failed, or is not done yet) makes no pair.
            both = scores[key].keys() & scores[best].keys()
            differences = [scores[key][s] - scores[best][s] for s in sorted(both)]
            lost = math.inf if not higher else -math.inf
            sound = bool(differences) and bool(np.isfinite(differences).all())
            apart = (statistics.mean(differences) if sound else lost, *interval(differences))
        steps = [s for row in rs if target is not None and (s := row.steps_to(target)) is not None]
        gradients = [row.gradient_evaluations for row in rs if row.gradient_evaluations is not None]
        lines.append(
            Line(
                *key,
                statistics.mean(scores[key].values()),
                interval(list(scores[key].values())),
                statistics.mean(row.cost for row in rs),
                apart,
                target,
                statistics.mean(steps) if steps else None,
                len(steps),
                len(rs),
                statistics.mean(gradients) if gradients else None,
                (tuning or {}).get(key[0], 0.0),
            )
        )
    return lines


def _usual_target(rows: Sequence[Row], higher: bool) -> float | None:
    ends = [row.curve[-1][1] for row in rows if row.curve and row.curve[-1][1] is not None]
    if not ends:
        return None
    mean = statistics.mean(end for end in ends if end is not None)
    return mean - 0.05 * abs(mean) if higher else mean + 0.05 * abs(mean)


def share_of_gain(rows: Sequence[Row], reference: str, oracle: str, name: str) -> str:
    """What a method keeps of the oracle's gain over the reference, in a sentence.

    Of the means over the seeds that all three have, each at its best lr; the interval resamples
    seeds.
    """
    by_seed: dict[str, dict[int, float]] = {}
    for method in (reference, oracle, name):
        mine = [row for row in rows if row.method == method]
        lrs = {row.lr for row in mine}
        sign = -1 if mine and mine[0].higher else 1
        means = {lr: statistics.mean(sign * r.score for r in mine if r.lr == lr) for lr in lrs}
        best = min(means, key=lambda lr: means[lr], default=None)
        by_seed[method] = {row.seed: sign * row.score for row in mine if row.lr == best}
    seeds = sorted(set.intersection(*(set(found) for found in by_seed.values())))
    base, best_, mine_ = (
        np.array([by_seed[m][s] for s in seeds]) for m in (reference, oracle, name)
    )
    if not len(seeds) or not np.isfinite([base, best_, mine_]).all():
        return f"{name}: no seed has finite losses of {reference}, {oracle} and {name}"
    gain, kept = base - best_, base - mine_
    if gain.mean() <= 0:
        return f"{name}: {oracle} gains nothing over {reference} of which a share could be kept"
    draws = np.random.default_rng(0).integers(0, len(seeds), (10_000, len(seeds)))
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = kept[draws].mean(1) / gain[draws].mean(1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return (
        f"{name} keeps {100 * kept.mean() / gain.mean():.0f} % [{100 * low:.0f}, {100 * high:.0f}] "
        f"of what {oracle} gains over {reference} ({gain.mean():.4f}), {len(seeds)} seeds"
    )


def tuned(rows: Sequence[Row]) -> tuple[dict[str, float], dict[str, float]]:
    """The lr with the best mean score of every method, and what all its rows cost together.

    A method that diverges at every lr is left out.
    """
    best: dict[str, float] = {}
    spent: dict[str, float] = {}
    for name in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == name]
        spent[name] = sum(row.cost for row in mine)
        means = {
            lr: statistics.mean(row.score for row in mine if row.lr == lr)
            for lr in dict.fromkeys(row.lr for row in mine)
        }
        sign = -1 if mine[0].higher else 1
        lr = min(means, key=lambda lr: sign * means[lr])
        if lr is not None and math.isfinite(means[lr]):
            best[name] = lr
    return best, spent


def table(lines: Sequence[Line]) -> Table:
    """Scores, their intervals and paired differences, for a terminal of 80 columns."""
    shown = _empty("method", "lr", "score", "95 %", "cost", "apart", "95 %")
    for line in lines:
        low, high = line.interval
        apart, within = "", ""
        if line.apart is not None:
            apart = _signed(line.apart[0])
            within = f"{_signed(line.apart[1])}…{_signed(line.apart[2])}"
        shown.add_row(
            line.method,
            "" if line.lr is None else f"{line.lr:g}",
            _number(line.score) if math.isfinite(line.score) else "diverges",
            f"{_number(low)}…{_number(high)}" if math.isfinite(high) else "",
            f"{line.cost:.2f}",
            apart if line.apart is not None and math.isfinite(line.apart[0]) else "",
            within if line.apart is not None and math.isfinite(line.apart[2]) else "",
        )
    return shown


def costs(lines: Sequence[Line]) -> Table:
    """Steps to the target, and what a run and the choice of its lr took."""
    target = lines[0].target
    heading = "to target" if target is None else f"steps to {_number(target)}"
    shown = _empty("method", "lr", heading, "reached", "gradients", "cost", "tuning")
    for line in lines:
        shown.add_row(
            line.method,
            "" if line.lr is None else f"{line.lr:g}",
            "–" if line.steps is None else f"{line.steps:.0f}",
            f"{line.reached} of {line.seeds}",
            "" if line.gradient_evaluations is None else f"{line.gradient_evaluations:.0f}",
            f"{line.cost:.2f}",
            f"{line.tuning:.0f}" if line.tuning else "",
        )
    return shown


def _empty(*headings: str) -> Table:
    shown = Table(box=None, padding=(0, 1, 0, 0))
    for heading in headings:
        left = heading in ("method", "lr", "95 %")
        shown.add_column(heading, justify="left" if left else "right", no_wrap=True)
    return shown


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


def _signed(value: float) -> str:
    return f"{value:+.4f}" if abs(value) < 10 else f"{value:+.1f}"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The bootstrap 95 % interval of the mean, 10,000 resamples with seed 0."""
    if not len(values) or not np.isfinite(values).all():
        return -math.inf, math.inf
    draws = np.random.default_rng(0).choice(np.array(values), (10_000, len(values))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def parsed_seeds(text: str) -> list[int]:
    """`100-109` is ten seeds; a number N is N of them, from 100 on."""
    match = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", text.strip())
    seeds = range(0)
    if match is not None and match[2] is None:
        seeds = range(100, 100 + int(match[1]))
    elif match is not None:
        seeds = range(int(match[1]), int(match[2]) + 1)
    if not seeds:
        raise InputError(f"seeds must be N or FIRST-LAST, got {text!r}; try 100-109")
    check_most("seeds", len(seeds))
    check_seed(seeds[-1])
    return list(seeds)

"""Methods × seeds on one workload at equal committed steps: what each ends with, what it cost.

Every number comes from a run of its own; the cost counts everything that was spent on the way to
it: looking for a start, looking back, replays, objectives, and the runs that a race or a search
throws away. Intervals are bootstrap 95 % intervals of the mean over seeds (Efron 1979); differences
are paired, seed by seed. Seeds 0 to 9 are for choosing, 100 and more for reporting.
"""

from __future__ import annotations

import json
import math
import random
import re
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer

from rhc.causal import AdaptiveRL, Bounds
from rhc.errors import InputError
from rhc.evaluate import evaluate
from rhc.hindsight import Pass, Smoother, held_out, smooth
from rhc.objective import Objective
from rhc.plant import Plant
from rhc.randomness import seed_everything
from rhc.rewrite import USUAL, Twin, usual_objective
from rhc.runner import DivergedError, Runner, RunResult
from rhc.schedule import CONTROLS, Schedule
from rhc.tape import finite
from rhc.workload import Workload, load_runner, optimizer_of

RACED = ("cosine", "linear", "wsd")
"""Templates that race each other."""

SEARCHED = 5
"""Runs of a random search: about as many plain runs as the whole of rhc may cost."""


@dataclass(frozen=True)
class Method:
    """One way to train a workload. settings: of the Runner. needs_lr: run once per first lr.

    ratio: "lars" for lrs of the groups as |θ|/|∇J| at step 0; "oracle" for what the workload itself
    says is right, its groups' "ratio". races: templates of which the best by
    validation is taken. searches: runs with random lrs of which the best by validation is taken.
    smooths: passes of the two-pass smoother, whose kept run is taken.
    drives: (optimizer, steps) -> what is told the loss of every step of a plain loop, after it.
    """

    summary: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    needs_lr: bool = False
    ratio: str | None = None
    races: tuple[str, ...] = ()
    searches: int = 0
    smooths: int = 0
    drives: Callable[[Optimizer, int], Callable[[Tensor], None]] | None = None


def _adaptive(**settings: Any) -> Callable[[Optimizer, int], Callable[[Tensor], None]]:
    return lambda optimizer, _: AdaptiveRL(optimizer, **settings).step


def _step_lr(optimizer: Optimizer, steps: int) -> Callable[[Tensor], None]:
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, max(1, steps // 3), 0.1)
    return lambda loss: scheduler.step()


def _on_plateau(optimizer: Optimizer, steps: int) -> Callable[[Tensor], None]:
    """ReduceLROnPlateau on the mean training loss of every fiftieth of the run."""
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=3)
    seen: list[Tensor] = []

    def step(loss: Tensor) -> None:
        seen.append(loss.detach())
        if len(seen) >= max(1, steps // 50):
            scheduler.step(float(torch.stack(seen).mean()))
            seen.clear()

    return step


def _plainly(template: str, warmup: float = 0.0) -> Method:
    how = f"{template}{' with warm-up' if warmup else ''}"
    settings = {"rewrite": False, "start": "given", "template": template, "warmup": warmup}
    return Method(f"{how} from the lr that is given, no rewriting", settings, needs_lr=True)


def _without(what: str, **settings: Any) -> Method:
    return Method(f"rhc {what}", {"start": "zero", **settings})


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
    "adaptive-no-noise": Method(
        "the same without gradient noise",
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
    "greedy": _without(
        "judging windows by their training losses alone",
        objective=Objective(loss_weight=1.0, terminal_weight=0.0),
    ),
    "no-accept": _without("that keeps every rewrite", rewrite=replace(USUAL, accept=False)),
    "step-standard-error": _without(
        "with steps normalised by their spread over windows",
        rewrite=replace(USUAL, rule="standard-error"),
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


@dataclass(frozen=True)
class Row:
    """What one method ended with on one seed; a run that diverges for good has infinite losses.

    score: what methods are compared by, the mean over all steps of the metric "tracking" where the
    workload has one, else the test loss of the final weights. validation: what races and searches
    choose by. cost: in plain runs.
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


@dataclass(frozen=True)
class Task:
    """What is trained: a runner's name, its data, and the steps of every run."""

    run: str
    data: Path | None = None
    steps: int | None = None

    def workload(self, seed: int) -> Workload:
        seed_everything(seed)
        workload = load_runner(self.run)(seed=seed, data=self.data)
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
        _known(name)
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


def _known(name: str) -> None:
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}: there are: {', '.join(METHODS)}")


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
    runner, steps = runner_of(task, method, lr, seed, draw=draw, **more)
    try:
        result = runner.fit(steps)
    except DivergedError:
        spent = runner.loop.cost.gradient_equivalents / steps
        return _diverged(max(spent, 1.0), runner.loop.start_gradients / steps)
    return _ended(result, runner.loop.start_gradients / steps)


def _ended(result: RunResult, start: float) -> dict[str, Any]:
    """The row of a run that has ended. start: what looking for one cost, in plain runs."""
    record = result.record
    tracking = [row["tracking"] for row in result.tape if row.get("tracking") is not None]
    test = record["test_loss"]
    score = statistics.fmean(tracking) if len(tracking) == len(result.tape) else test
    judged = record["val_loss"]
    if judged is None:
        judged = statistics.fmean(_finite(row["loss"]) for row in result.tape)
    return {
        "score": _finite(record["train_loss"] if score is None else score),
        "test_loss": test,
        "test_accuracy": record["test_accuracy"],
        "average_test_loss": record["average_test_loss"],
        "validation": _finite(judged),
        "cost": record["cost"]["plain_run_equivalents"],
        "start": start,
    }


def _smoothed(task: Task, method: Method, lr: float | None, seed: int) -> dict[str, Any]:
    """The run that the smoother keeps, and what all of its runs cost."""

    def train(number: int, schedule: Schedule | None) -> Pass:
        runner, steps = runner_of(task, method, lr, seed, schedule=schedule)
        result = runner.fit(steps)
        judged = held_out(result.record, result.tape)
        return Pass(result.schedule, result.tape, judged, _ended(result, 0.0))

    try:
        runs, best = smooth(train, Smoother(), method.smooths)
    except DivergedError:
        return _diverged(1.0, 0.0)
    return {**runs[best].result, "cost": sum(run.result["cost"] for run in runs)}


def _driven(task: Task, method: Method, lr: float | None, seed: int) -> dict[str, Any]:
    """A plain loop whose scheduler is told every loss; nothing is rewound."""
    workload = task.workload(seed)
    model, steps = workload.model, task.steps or workload.steps
    first = workload.lr[workload.optimizer] if lr is None else lr
    parameters: Any = workload.parameter_groups
    if parameters is None:
        parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer_of(workload.optimizer, parameters, first)
    plant = Plant(model, optimizer, workload.loss_fn, seed=seed)
    assert method.drives is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an lr outside the bounds is part of the comparison
        step = method.drives(optimizer, steps)
        tracking, losses = [], []
        for batch in islice(chain.from_iterable(repeat(workload.train_loader)), steps):
            outcome = workload.loss_fn(model, batch)
            loss, metrics = outcome if isinstance(outcome, tuple) else (outcome, {})
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step(loss)
            losses.append(float(loss))
            if "tracking" in metrics:
                tracking.append(float(metrics["tracking"]))
    test = evaluate(plant, workload.test_loader)
    held_out = evaluate(plant, workload.val_loader)
    score = math.nan if test is None else test.loss
    return {
        "score": _finite(statistics.fmean(tracking) if len(tracking) == steps else score),
        "test_loss": None if test is None else _finite(test.loss),
        "test_accuracy": None if test is None else test.metrics.get("accuracy"),
        "average_test_loss": None,
        "validation": _finite(statistics.fmean(losses) if held_out is None else held_out.loss),
        "cost": 1.0,
        "start": 0.0,
    }


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
    workload = task.workload(seed)
    first = workload.lr[workload.optimizer] if lr is None else lr
    groups: list[dict[str, Any]] = workload.parameter_groups or [
        {"params": [p for p in workload.model.parameters() if p.requires_grad]}
    ]
    if method.ratio == "lars":
        groups = _lars(workload, groups, first)
    elif method.ratio == "oracle":
        groups = [g | {"lr": first * g["ratio"]} for g in groups]
    if draw is not None:
        groups = [g | {"lr": 10 ** draw.uniform(-5, 0)} for g in groups]
    runner = Runner(
        workload.model,
        optimizer_of(workload.optimizer, groups, first),
        workload.loss_fn,
        workload.train_loader,
        workload.val_loader,
        test_loader=workload.test_loader,
        seed=seed,
        **{**method.settings, **more},
    )
    return runner, task.steps or workload.steps


def _diverged(cost: float, start: float) -> dict[str, Any]:
    names = ("test_loss", "test_accuracy", "average_test_loss")
    lost = {"score": math.inf, "validation": math.inf, **dict.fromkeys(names)}
    return {**lost, "cost": cost, "start": start}


def _finite(value: float | None) -> float:
    return math.inf if value is None or not math.isfinite(value) else value


def _lars(
    workload: Workload, groups: Sequence[dict[str, Any]], first: float
) -> list[dict[str, Any]]:
    """The groups with lrs in the ratio |θ|/|∇J| at the first batch; the largest is `first`."""
    with torch.enable_grad():
        outcome = workload.loss_fn(workload.model, next(iter(workload.train_loader)))
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


def print_comparison(
    console: Console,
    run: str,
    *,
    methods: Sequence[str],
    lrs: Sequence[float],
    seeds: str,
    versus: str | None,
    steps: int | None,
    data: Path | None,
    output: Path | None,
) -> None:
    """`rhc compare`: runs everything, says how it goes, and prints a table."""
    chosen = parsed_seeds(seeds)
    reference = versus or methods[-1]
    names = list(dict.fromkeys([*methods, reference]))
    for name in names:
        _known(name)
    for lr in lrs:
        CONTROLS["lr"].check(lr)
    if data is not None and not data.exists():
        raise InputError(f"data {data} does not exist; give --data an existing folder")
    if steps is not None and steps < 1:
        raise InputError(f"steps must be ≥ 1, got {steps}; try --steps 1000")
    if output is not None and not output.parent.is_dir():
        raise InputError(f"output {output} is in no folder; make {output.parent} first")

    def tell(row: Row) -> None:
        lr = "" if row.lr is None else f" lr {row.lr:g}"
        console.print(
            f"{row.method}{lr} seed {row.seed}: {row.score:.4g}, cost {row.cost:.2f}",
            highlight=False,
        )

    rows = compare(Task(run, data, steps), names, lrs, chosen, tell)
    lines = summarise(rows, reference)
    console.print()
    console.print(table(lines))
    console.print(
        f"\nscore: test loss of the final weights, or the mean of the metric tracking where there "
        f"is one; 95 %: bootstrap over {len(chosen)} seeds; cost in plain runs; apart: paired "
        f"difference to {reference}",
        highlight=False,
        style="dim",
    )
    if output is not None:
        document = {
            "format": "rhc.comparison",
            "version": 1,
            "run": run,
            "versus": reference,
            "rows": [asdict(row) for row in rows],
            "lines": [asdict(line) for line in lines],
        }
        output.write_text(json.dumps(finite(document), indent=1) + "\n", encoding="utf-8")


# Statistics ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A method at one lr over all seeds: mean score, its interval, mean cost.

    apart: mean paired difference to the reference and its interval; None for the reference itself.
    """

    method: str
    lr: float | None
    score: float
    interval: tuple[float, float]
    cost: float
    apart: tuple[float, float, float] | None = None


def summarise(rows: Sequence[Row], versus: str | None = None) -> list[Line]:
    """A line per method and lr, in their order. versus: compared with, at its best lr."""
    found: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        found.setdefault((row.method, row.lr), []).append(row)
    scores = {key: [row.score for row in rs] for key, rs in found.items()}
    of_reference = [key for key in found if key[0] == versus]
    best = min(of_reference, key=lambda key: statistics.mean(scores[key]), default=None)
    lines = []
    for key, rs in found.items():
        apart = None
        if best is not None and key != best:
            differences = [a - b for a, b in zip(scores[key], scores[best], strict=True)]
            mean = statistics.mean(differences) if np.isfinite(differences).all() else math.inf
            apart = (mean, *interval(differences))
        lines.append(
            Line(
                *key,
                statistics.mean(scores[key]),
                interval(scores[key]),
                statistics.mean(row.cost for row in rs),
                apart,
            )
        )
    return lines


def table(lines: Sequence[Line]) -> Table:
    """For a terminal of 80 columns."""
    shown = Table(box=None, padding=(0, 1, 0, 0))
    for heading in ("method", "lr", "score", "95 %", "cost", "apart", "95 %"):
        left = heading in ("method", "lr", "95 %")
        shown.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for line in lines:
        low, high = line.interval
        apart, within = "", ""
        if line.apart is not None:
            apart = f"{line.apart[0]:+.4f}"
            within = f"{line.apart[1]:+.4f}…{line.apart[2]:+.4f}"
        shown.add_row(
            line.method,
            "" if line.lr is None else f"{line.lr:g}",
            f"{line.score:.4f}",
            f"{low:.4f}…{high:.4f}" if math.isfinite(high) else "",
            f"{line.cost:.2f}",
            apart,
            within if line.apart is not None and math.isfinite(line.apart[2]) else "",
        )
    return shown


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The bootstrap 95 % interval of the mean, 10,000 resamples with seed 0."""
    if not np.isfinite(values).all():
        return -math.inf, math.inf
    draws = np.random.default_rng(0).choice(np.array(values), (10_000, len(values))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def parsed_seeds(text: str) -> list[int]:
    """`100-109` is ten seeds; a number N is N of them, from 100 on."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    seeds: list[int] = []
    if match is not None and match[2] is None:
        seeds = list(range(100, 100 + int(match[1])))
    elif match is not None:
        seeds = list(range(int(match[1]), int(match[2]) + 1))
    if not seeds:
        raise InputError(f"seeds must be N or FIRST-LAST, got {text!r}; try 100-109")
    return seeds

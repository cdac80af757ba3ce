"""Methods that wrote a table of docs/outcome.md or docs/planning.md, beside those of rhc.

rhc compare mnist --data mnist/ --methods rhc benchmarks/methods.py:no-hessian --seeds 100-109
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rhc.compare import methods
from rhc.compare.methods import PLANNED, Groups, Method, adaptive, plainly, planned
from rhc.containers import spare
from rhc.loop.update_rule import USUAL, usual_objective
from rhc.schedule import CONTROLS
from rhc.schedulers import CONSERVATIVE, STEERED, VALUES, EpochPlan, EpochStats
from rhc.training.objective import Objective
from rhc.workload import Workload

RACED = ("cosine", "linear", "wsd")
"""Templates that race each other."""


def _preset_alone(stats: EpochStats, previous: EpochPlan) -> EpochPlan:
    """The failsafe's preset, whatever happens."""
    return CONSERVATIVE.applied(replace(previous, epoch=stats.epoch + 1, interventions=()))


EVERYTHING = (*VALUES, "drift", "failsafe")


def lars(workload: Workload, groups: Groups, first: float, draws: random.Random) -> Groups:
    """lrs in the ratio |θ|/|∇J| at the first batch; the largest is `first`."""
    with torch.enable_grad():
        outcome = workload.loss_fn(workload.model, spare(next(iter(workload.train_loader))))
        (outcome[0] if isinstance(outcome, tuple) else outcome).backward()

    def norm(tensors: Iterator[Tensor | None]) -> float:
        return math.sqrt(sum(float(t.square().sum()) for t in tensors if t is not None))

    ratios = [
        norm(p.detach() for p in g["params"]) / max(norm(p.grad for p in g["params"]), 1e-12)
        for g in groups
    ]
    workload.model.zero_grad()
    bounds = CONTROLS["lr"]
    lrs = [first * ratio / max(ratios) for ratio in ratios]
    return [
        g | {"lr": min(max(lr, bounds.lower), bounds.upper)}
        for g, lr in zip(groups, lrs, strict=True)
    ]


def oracle(workload: Workload, groups: Groups, first: float, draws: random.Random) -> Groups:
    """What the workload itself says is right: the "ratio" of its groups."""
    return [g | {"lr": first * g["ratio"]} for g in groups]


def _planned(summary: str, *names: str, template: str = "constant", **settings: Any) -> Method:
    return plainly(summary, template, plans=planned(*names, **settings))


def _rhc(what: str, **settings: Any) -> Method:
    return Method(f"rhc {what}", {"start": "zero", **settings})


METHODS: dict[str, Method] = {
    "adaptive-unpaced": Method(
        "AdaptiveRL with an update every 20 steps, whatever the length of the run",
        needs_lr=True,
        drives=adaptive(paced=False),
    ),
    "planner-cosine": _planned("`planner` on top of a cosine", *PLANNED, template="cosine"),
    "planner-specified": _planned(
        "lr, momentum and noise planned as specified, with the guards",
        *STEERED,
        "drift",
        "failsafe",
    ),
    "planner-all": _planned("epochs planned with everything that can be", *EVERYTHING),
    "planner-preset": _planned("the failsafe's preset from the second epoch on", law=_preset_alone),
    **{
        f"planner-{name}-fixed": _planned(
            f"{name} at the strength that planning begins with, nothing planned", name, fixed=True
        )
        for name in ("sampling", "augmentation")
    },
    **{
        f"planner-{name.replace('_', '-')}": _planned(
            f"epochs planned in nothing but {name.replace('_', ' ')}", name
        )
        for name in EVERYTHING
    },
    "lars-cosine": plainly(
        "groups in the ratio of |θ|/|∇J|, probes, cosine, no rewriting",
        "cosine",
        settings={"start": "probe"},
        needs_lr=False,
        groups=lars,
    ),
    "oracle-cosine": plainly(
        "the workload's own ratio of the groups, cosine from the lr that is given",
        "cosine",
        groups=oracle,
    ),
    "template-race": Method(
        f"start from zero, whole runs of {', '.join(RACED)}, the best by validation",
        {"rewrite": False, "start": "zero"},
        trials=tuple({"template": template} for template in RACED),
    ),
    "no-rewrite": _rhc("that only begins the template anew", rewrite=replace(USUAL, step={})),
    "no-anew": _rhc("that never does so", rewrite=replace(USUAL, restart=())),
    "no-hessian": _rhc("with H = 0", product="none"),
    "pass": _rhc("and one pass over the whole run", passes=1),
    "pass-no-hessian": _rhc(
        "and one pass over the whole run, all with H = 0", passes=1, product="none"
    ),
    "no-average": _rhc(
        "judging windows at the last iterate",
        objective=replace(usual_objective("zero", 50), average=None),
    ),
    "greedy": _rhc(
        "judging windows by their training losses alone",
        objective=Objective(loss_weight=1.0, terminal_weight=0.0),
    ),
    "no-accept": _rhc("that keeps every rewrite", rewrite=replace(USUAL, accept=False)),
    "every-window": _rhc(
        "that looks back at all windows", rewrite=replace(USUAL, patience=None, until=1.0)
    ),
    "all-controls": _rhc(
        "that rewrites momentum and noise too", controls=("lr", "momentum", "noise")
    ),
}

methods.METHODS.update(METHODS)
ALL = methods.METHODS
"""With those of rhc: scripts of this folder name all alike."""

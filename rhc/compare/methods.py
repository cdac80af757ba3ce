"""Methods of a comparison: `METHODS`, and those of a file, as file.py:NAME."""

from __future__ import annotations

import difflib
import importlib
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rhc.errors import InputError
from rhc.hindsight import DistilledScheduler, Policy
from rhc.loop.update_rule import Twin
from rhc.schedulers import STEERED, AdaptiveRL, Bounds, EpochPlanner, Gains, planner
from rhc.workload import (
    Workload,
    module_of_file,
    optimizer_of,
    usual_weight_decay,
)

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Method:
    summary: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of the Runner."""
    needs_lr: bool = False
    """Run once per given lr."""
    optimizer: str | None = None
    """Replaces the workload's."""
    groups: Callable[[Workload, Groups, float, random.Random], Groups] | None = None
    """(workload, parameter groups, given lr, seeded generator) -> groups with lrs."""
    trials: tuple[Mapping[str, Any], ...] = ({},)
    """Settings of further runs; the best by validation counts."""
    smooths: int = 0
    """Passes of the two-pass smoother."""
    replays: bool = False
    """Uses the task's schedule."""
    distilled: bool = False
    """Uses the task's policy."""
    drives: Drives | None = None
    """Makes the optimizer and scheduler of a plain loop."""
    plans: Plans | None = None
    """Plans the epochs of a Runner."""


@dataclass
class Driver:
    """The optimizer and scheduler of a plain loop."""

    optimizer: Optimizer
    step: Callable[[Tensor, Any], None] = lambda loss, reward: None
    """Called with loss and reward (or None) after every step."""
    rewarded: bool = False
    """Whether rewards are used; they have a cost."""
    scheduler: Any = None
    """Whose noise and trends are recorded."""
    mode: Callable[[bool], None] = lambda training: None
    """Called with True before training, False before evaluation."""


Drives = Callable[[Workload, str, Any, float, int], Driver]
"""(workload, optimizer's name, parameters, given lr, steps) -> Driver."""


Plans = Callable[[Workload], tuple[Workload, EpochPlanner]]
"""workload -> (the workload with the planned knobs, the planner)."""


def planned(*names: str, fixed: bool = False, **settings: Any) -> Plans:
    """An EpochPlanner of these names where the run has them, with guards only if named ("drift",
    "failsafe"). fixed: the knobs keep their first values."""

    def plans(workload: Workload) -> tuple[Workload, EpochPlanner]:
        offered = () if workload.plannable is None else workload.plannable.names
        values = [name for name in names if name in (*STEERED, *offered)]
        known: dict[str, Any] = {guard: guard in names for guard in ("drift", "failsafe")}
        if fixed or not values:
            known["gains"] = Gains(**dict.fromkeys(vars(Gains()), 0.0))
        return planner.planned(workload, values or STEERED, **known, **settings)

    return plans


def adaptive(
    made: Callable[..., AdaptiveRL] = AdaptiveRL,
    *,
    rewarded: bool = True,
    paced: bool = True,
    **settings: Any,
) -> Drives:
    """AdaptiveRL, which knows the number of steps if `paced`."""

    def drives(workload: Workload, name: str, parameters: Any, lr: float, steps: int) -> Driver:
        optimizer = optimizer_of(name, parameters, lr)
        own = {"steps": steps if paced else None, "noise": workload.noise}
        bounds: Bounds = settings.get("bounds", Bounds())
        own["noise"] = min(max(workload.noise, bounds.noise[0]), bounds.noise[1])
        scheduler = made(optimizer, **own | settings)
        return Driver(optimizer, scheduler.step, rewarded, scheduler)

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
    """Schedule-Free SGD or AdamW (Defazio et al. 2024), warm-up over a twentieth of the run."""
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
    """Prodigy (Mishchenko & Defazio 2024) with a cosine from lr 1."""
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


def distilled(policy: Policy) -> Drives:
    def drives(workload: Workload, name: str, parameters: Any, lr: float, steps: int) -> Driver:
        optimizer = optimizer_of(name, parameters, lr)
        scheduler = DistilledScheduler(optimizer, policy, steps=steps)
        return Driver(optimizer, scheduler.step, policy.form.reward, scheduler)

    return drives


def _lrs_at_random(
    workload: Workload, groups: Groups, first: float, draws: random.Random
) -> Groups:
    """One lr per group, log-uniform in [1e-5, 1]."""
    return [g | {"lr": 10 ** draws.uniform(-5, 0)} for g in groups]


def _lr_around(workload: Workload, groups: Groups, first: float, draws: random.Random) -> Groups:
    """The lrs of all groups times one factor, log-uniform in [0.1, 30]."""
    factor = math.exp(draws.uniform(math.log(0.1), math.log(30.0)))
    return [g | {"lr": g.get("lr", first) * factor} for g in groups]


def plainly(summary: str, template: str | None = None, **more: Any) -> Method:
    """A method without rewriting, from the given lr."""
    settings = {"rewrite": False, "start": "given"}
    if template is not None:
        settings["template"] = template
    return Method(summary, settings | more.pop("settings", {}), **{"needs_lr": True, **more})


def _template(template: str, warmup: float = 0.0) -> Method:
    how = f"{template}{' with warm-up' if warmup else ''}"
    summary = f"{how} from the lr that is given, no rewriting"
    return plainly(summary, template, settings={"warmup": warmup})


def _driven(summary: str, drives: Drives) -> Method:
    return Method(summary, needs_lr=True, drives=drives)


FIXED_NOISE = Bounds(noise=(0.02, 0.02))

PLANNED = ("lr", "failsafe")
"""What `planner` plans; docs/planning.md gives the reasons."""

SEARCHED = 5
"""Runs of a random search: about the budget of rhc in baseline runs."""

METHODS: dict[str, Method] = {
    "constant": _template("constant"),
    "cosine": _template("cosine"),
    "linear": _template("linear", warmup=0.1),
    "1cycle": _template("1cycle"),
    "wsd": _template("wsd"),
    "step": _driven("StepLR: lr falls to a tenth after each third", _step_lr),
    "on-plateau": _driven("ReduceLROnPlateau on the training loss", _on_plateau),
    "adaptive": _driven("AdaptiveRL from the lr that is given, in a plain loop", adaptive()),
    "adaptive-no-noise": _driven(
        "AdaptiveRL without gradient noise", adaptive(bounds=Bounds(noise=(0.0, 0.0)))
    ),
    **{
        f"adaptive-{name}": _driven(f"AdaptiveRL {what}", adaptive(**settings))
        for name, what, settings in (
            ("loss-only", "that looks at no reward", {"source": "loss", "rewarded": False}),
            ("reward-only", "without the terms of the loss", {"source": "reward"}),
            ("no-anneal", "whose lr is not annealed", {"anneal": False}),
            ("fixed-noise", "with noise fixed at 0.02", {"noise": 0.02, "bounds": FIXED_NOISE}),
            ("parameter-noise", "with noise on the parameters", {"noise_on": "parameters"}),
            (
                "weight-noise",
                "with noise on gradients, as large as the weights",
                {"noise_on": "gradients-by-weights"},
            ),
            (
                "as-specified",
                "with the specified laws and constants",
                {"made": AdaptiveRL.as_specified, "paced": False},
            ),
        )
    },
    "smooth": plainly(
        "the two-pass smoother, from a run at the constant lr that is given", smooths=1
    ),
    "smooth-3": plainly("the same in three passes, four runs", smooths=3),
    "replay": plainly(
        "the schedule of --schedule as it is, stretched to the run's length",
        needs_lr=False,
        replays=True,
    ),
    "distilled": Method(
        "the policy of --policy, from the lr that is given", needs_lr=True, distilled=True
    ),
    "planner": plainly(
        "epochs planned from the tape of the one before, from the lr that is given",
        "constant",
        plans=planned(*PLANNED),
    ),
    "adamw": plainly(
        "AdamW at its own lr, constant", "constant", needs_lr=False, optimizer="adamw"
    ),
    "adamw-cosine": plainly(
        "AdamW with a cosine from the lr that is given", "cosine", optimizer="adamw"
    ),
    "schedule-free": _driven("Schedule-Free, of the package schedulefree", _schedule_free),
    "prodigy": Method("Prodigy with a cosine, of the package prodigyopt", drives=_prodigy),
    **{
        f"search-cosine-{count}": plainly(
            f"{count} cosines, lrs at random, 0.1 to 30 times that given, the best by validation",
            "cosine",
            groups=_lr_around,
            trials=({},) * count,
        )
        for count in (2, 4)
    },
    "random-search": plainly(
        f"{SEARCHED} constant lrs per group at random in [1e-5, 1], the best by validation",
        "constant",
        needs_lr=False,
        groups=_lrs_at_random,
        trials=({},) * SEARCHED,
    ),
    "zero-probe": Method(
        "start from the hypergradient at lr 0, the usual template, no rewriting",
        {"rewrite": False, "start": "zero"},
    ),
    "zero-probe-cosine": Method(
        "the same with a cosine", {"rewrite": False, "start": "zero", "template": "cosine"}
    ),
    "probe-cosine": plainly(
        "start from probes around the lr that is given, cosine, no rewriting",
        "cosine",
        settings={"start": "probe"},
    ),
    "rhc": Method("the default, with no lr given", {"start": "zero"}),
    "rhc-probe": Method(
        "the default, from the lr that is given", {"start": "probe"}, needs_lr=True
    ),
    "twin": Method(
        "rhc without gradients: each window at a higher and a lower lr",
        {"start": "zero", "rewrite": Twin()},
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
    "adaptive-weight-noise",
    "adaptive-as-specified",
)
"""Methods of `--ablations`: AdaptiveRL, and variants with one part changed."""


def method_of(name: str) -> Method:
    """The method `name` of METHODS, or NAME in file.py for file.py:NAME; InputError if unknown."""
    path, _, own = name.rpartition(":")
    known = METHODS
    if path.endswith(".py"):
        if not Path(path).is_file():
            raise InputError(f"method {name!r}: there is no file {path} in {Path.cwd()}")
        known, name = getattr(module_of_file(Path(path).resolve()), "METHODS", {}), own
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown method {name!r}: {hint}there are: {', '.join(known)}")
    return known[name]


def cells(
    methods: Sequence[str], lrs: Sequence[float | None], seeds: Sequence[int]
) -> Iterator[tuple[str, float | None, int]]:
    """(method, lr, seed) of every run; lr None for methods that need none."""
    for name in methods:
        for lr in (lrs or [None]) if method_of(name).needs_lr else [None]:
            for seed in seeds:
                yield name, lr, seed

"""What runs end with: methods × first lrs × seeds on a workload, at equal committed steps.

    python benchmarks/outcome.py mnist --data DIR --methods rhc zero-probe-cosine cosine \
        --lrs 1e-5 1e-2 1 --seeds 100-109 -o mnist.json

Methods:

    constant, cosine, linear, wsd    no rewriting, from the lr that is given
    probe-cosine, zero-probe-cosine  a start that is looked for, no rewriting
    rhc, rhc-zero                    the default: the start (probe, zero), and rewriting
    no-hessian                       rhc-zero with product none
    all-controls                     rhc-zero that rewrites momentum and noise too
    whole-run                        rhc-zero that rewrites to the end of the run
    far-steps                        rhc-zero with moves of up to 0.7 nats
    last-iterate                     rhc-zero that judges windows at their last iterate
    greedy                           rhc-zero that judges windows by the sum of their train losses

One line per method and lr: mean test loss with a bootstrap 95 % interval over seeds, and the cost
in plain runs. Methods that need no lr are run once per seed. With --versus METHOD the paired
difference to it, seed by seed (to its best lr), and its interval. Seeds 0 to 9 are for choosing,
100 and more for reporting.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rhc
from rhc.rewrite import CORRECTION
from rhc.schedule import TEMPLATES
from rhc.workload import load_runner

METHODS: Mapping[str, Mapping[str, Any]] = {
    **{name: {"rewrite": False, "start": "given", "template": name} for name in TEMPLATES},
    "probe-cosine": {"rewrite": False, "start": "probe"},
    "zero-probe-cosine": {"rewrite": False, "start": "zero"},
    "rhc": {"start": "probe"},
    "rhc-zero": {"start": "zero"},
    "no-hessian": {"start": "zero", "product": "none"},
    "all-controls": {"start": "zero", "controls": ("lr", "momentum", "noise")},
    "whole-run": {"start": "zero", "rewrite": replace(CORRECTION, until=1.0)},
    "far-steps": {"start": "zero", "rewrite": rhc.Rewrite(until=0.5)},
    "last-iterate": {"start": "zero", "objective": rhc.Objective(average=None)},
    "greedy": {
        "start": "zero",
        "objective": rhc.Objective(loss_weight=1.0, terminal_weight=0.0),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a name that `rhc runs` lists, or path/to/file.py:function")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=["rhc"])
    parser.add_argument("--lrs", type=float, nargs="+", default=[1e-5, 3e-4, 1e-2, 0.3, 1.0])
    parser.add_argument("--seeds", type=seeds, default=list(range(100, 110)), help="as in 100-109")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--versus", choices=tuple(METHODS))
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for method in arguments.methods:
        needs_lr = METHODS[method].get("start") != "zero"
        for lr in arguments.lrs if needs_lr else [None]:
            rows = [one(arguments, method, lr, seed) for seed in arguments.seeds]
            found[method, lr] = rows
            print(line(method, lr, rows), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps([r for v in found.values() for r in v]))
    if arguments.versus:
        print(f"\nagainst {arguments.versus} at its best lr:")
        of_method = {lr: losses(rows) for (m, lr), rows in found.items() if m == arguments.versus}
        reference = min(of_method.values(), key=statistics.mean)
        for (method, lr), rows in found.items():
            apart = [a - b for a, b in zip(losses(rows), reference, strict=True)]
            low, high = interval(apart)
            mean = statistics.mean(apart)
            print(f"{method:<18} {text(lr):>8}  {mean:+.4f}  [{low:+.4f}, {high:+.4f}]")


def one(arguments: argparse.Namespace, method: str, lr: float | None, seed: int) -> dict[str, Any]:
    """What one run ended with; a run that diverges for good has an infinite loss."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    workload = load_runner(arguments.run)(seed=seed, data=arguments.data)
    groups: Any = workload.parameter_groups or workload.model.parameters()
    first = workload.lr[workload.optimizer] if lr is None else lr
    if workload.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(groups, lr=first, momentum=0.9)
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[workload.optimizer]
        optimizer = kind(groups, lr=first)
    runner = rhc.Runner(
        workload.model,
        optimizer,
        workload.loss_fn,
        workload.train_loader,
        workload.val_loader,
        test_loader=workload.test_loader,
        seed=seed,
        **METHODS[method],
    )
    row: dict[str, Any] = {"method": method, "lr": lr, "seed": seed, "test_loss": float("inf")}
    try:
        result = runner.fit(arguments.steps or workload.steps)
    except rhc.runner.DivergedError:
        return row | {"cost": float("nan")}
    track = statistics.fmean(
        step.get("tracking", step["loss"]) or float("inf") for step in result.tape
    )
    cost = result.record["cost"]["plain_run_equivalents"]
    test = result.test_loss if result.test_loss is not None else track
    average = result.record["average_test_loss"]
    return row | {"test_loss": test, "average": average, "tracking": track, "cost": cost}


def losses(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [row["test_loss"] for row in rows]


def line(method: str, lr: float | None, rows: Sequence[Mapping[str, Any]]) -> str:
    low, high = interval(losses(rows))
    means = [statistics.mean(r.get(n) or float("nan") for r in rows) for n in ("tracking", "cost")]
    return (
        f"{method:<18} {text(lr):>8}  test {statistics.mean(losses(rows)):.4f} "
        f"[{low:.4f}, {high:.4f}]  train {means[0]:.4f}  cost {means[1]:.2f}"
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The bootstrap 95 % interval of the mean (Efron 1979), 10,000 resamples with seed 0."""
    if not np.isfinite(values).all():
        return float("-inf"), float("inf")
    draws = np.random.default_rng(0).choice(np.array(values), (10_000, len(values))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def text(lr: float | None) -> str:
    return "" if lr is None else f"{lr:g}"


def seeds(given: str) -> list[int]:
    first, _, last = given.partition("-")
    return list(range(int(first), int(last or first) + 1))


if __name__ == "__main__":
    main()

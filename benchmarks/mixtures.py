"""Weights of few cells (sources, classes, loss terms) against fixed ones: test loss and cost.

    python benchmarks/mixtures.py auxiliary --seeds 100-102 -o rows.jsonl
    python benchmarks/mixtures.py long_tail_mnist --data MNIST --seeds 100-102
    python benchmarks/mixtures.py mixed_text --data TEXT --seeds 100-101

Methods, each from the same initial weights: *equal* (a cell's rows as they come), *uniform* (cells
alike), *best of a grid* of five (every cell's weight to the power of --powers of its size, or for
loss terms every term's share against the first), *best of random* (as many mixtures as a steered
run costs), by validation loss; *steered* (windows, H = 0 or exact), and *replay*: the course of the
steered run, fixed, from the next seed's initial weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rhc
from rhc.compare.pool import parsed_seeds
from rhc.workload import load_runner, optimizer_of

POWERS = (0.0, -0.25, -0.5, -0.75, -1.0)
"""Of a cell's number of rows, its weight in the grid: 0 as they come, −1 cells alike."""

TERMS = (1.0, 0.5, 0.2, 0.1, 0.0001)
"""Of loss terms, the weight of all but the first in the grid."""


def sizes_of(workload: rhc.Workload) -> Tensor | None:
    """(n,) rows of each cell; None of loss terms."""
    weights: Any = workload.data_weights
    if weights.of_terms:
        return None
    counted: Counter[int] = Counter()
    for batch in workload.train_loader:
        counted.update(weights.cells(batch).tolist())
    return torch.tensor([max(1, counted[c]) for c in range(len(weights))], dtype=torch.float32)


def fit(arguments: argparse.Namespace, seed: int, values: Any, **options: Any) -> rhc.RunResult:
    """values: weights of the cells, or DataWeights with a course."""
    torch.manual_seed(seed)
    workload = load_runner(arguments.run)(seed=seed, data=arguments.data)
    own: Any = workload.data_weights
    cells, cell_of = own.names or len(own), None if own.of_terms else own.cell_of
    weights = (
        values
        if isinstance(values, rhc.DataWeights)
        else rhc.DataWeights(cells, cell_of, values=values)
    )
    lr = arguments.lr or workload.lr[workload.optimizer]
    return rhc.Runner(
        workload.model,
        optimizer_of(workload.optimizer, workload.model.parameters(), lr),
        workload.loss_fn,
        workload.train_loader,
        workload.val_loader,
        test_loader=workload.test_loader,
        start="given",
        template="cosine",
        data_weights=weights,
        window=arguments.window,
        **options,
    ).fit(arguments.steps or workload.steps)


def measured(arguments: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    sizes = sizes_of(load_runner(arguments.run)(seed=seed, data=arguments.data))
    cells = len(load_runner(arguments.run)(seed=seed, data=arguments.data).data_weights)
    rows = []

    def add(method: str, results: list[rhc.RunResult]) -> None:
        best = min(results, key=lambda r: r.val_loss or 0.0)
        cost = sum(r.cost["plain_run_equivalents"] for r in results)
        rows.append({"method": method, "seed": seed, "test": best.test_loss, "cost": cost})

    def plain(values: Tensor) -> rhc.RunResult:
        return fit(arguments, seed, values, rewrite=False)

    if sizes is None:
        grid = [torch.tensor([1.0] + [share] * (cells - 1)) for share in TERMS]
    else:
        grid = [sizes**power for power in POWERS]
    found = [plain(values) for values in grid]
    add("equal", found[:1])
    add("uniform" if sizes is not None else "the first term alone", found[-1:])
    add("best of a grid of five", found)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(cells, generator=generator).log().neg() + 1e-3 for _ in range(3)]
    scale = torch.ones(cells) if sizes is None else sizes
    add("best of three random mixtures", [plain(values / scale) for values in drawn])
    for product in arguments.products:
        result = fit(arguments, seed, torch.ones(cells), controls=(), product=product)
        add(f"steered, {product}", [result])
        rows[-1]["weights"] = result.data_weights and result.data_weights.values.tolist()
        again = fit(arguments, seed + 1, result.data_weights, rewrite=False)
        add(f"course replayed, {product}", [again])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", default="100-102")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--window", type=int, default=50)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--products", nargs="+", default=["none"])
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in parsed_seeds(arguments.seeds):
        rows += measured(arguments, seed)
        if arguments.output is not None:
            arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("| method | test loss | each seed | cost |\n|---|---|---|---|")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        losses = [row["test"] for row in own]
        each = " ".join(f"{loss:.3f}" for loss in losses)
        cost = statistics.mean(row["cost"] for row in own)
        print(f"| {method} | {statistics.mean(losses):.3f} | {each} | {cost:.2f} |")


if __name__ == "__main__":
    main()

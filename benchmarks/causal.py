"""AdaptiveRL: what a step of it costs, and how fast it re-converges.

    python benchmarks/causal.py overhead --model mlp --steps 100 --rounds 15
    python benchmarks/causal.py reconvergence --methods adaptive constant --lrs 0.03 -o rows.jsonl

Overhead: blocks of steps with and without the scheduler take turns on one model in one process, one
thread; the ratio is that of neighbouring blocks' CPU times, so that a machine's moods cancel out.
Re-convergence: the mean tracking error in the 100 steps after each jump of drifting_sine, and the
paired difference to the last method, with bootstrap 95 % intervals over seeds. `rhc report` draws
what single runs of `rhc compare` saw and did.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from models import CASES

import rhc
from rhc.compare.pool import parsed_seeds
from rhc.compare.runs import Task, run
from rhc.compare.statistics import interval
from runners.drifting_sine import Waves


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    timed = commands.add_parser("overhead")
    timed.add_argument("--model", default="mlp", choices=sorted(CASES))
    timed.add_argument("--steps", type=int, default=100, help="of a block")
    timed.add_argument("--rounds", type=int, default=15)
    timed.add_argument("--noise", type=float, default=0.0)
    jumps = commands.add_parser("reconvergence")
    jumps.add_argument("--methods", nargs="+", default=["adaptive", "constant"])
    jumps.add_argument("--lrs", nargs="+", type=float, default=[0.03])
    jumps.add_argument("--seeds", type=parsed_seeds, default=parsed_seeds("100-109"))
    jumps.add_argument("-o", "--output", type=Path, default=Path("reconvergence.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "overhead":
        print(overhead(arguments.model, arguments.steps, arguments.rounds, arguments.noise))
    else:
        print(reconvergence(arguments.methods, arguments.lrs, arguments.seeds, arguments.output))


@dataclass(frozen=True)
class Tracked(Task):
    """drifting_sine, whose tracking error of every step is kept in `errors`."""

    errors: list[float] = field(default_factory=list)

    def workload(self, seed: int) -> Any:
        made = super().workload(seed)

        def loss_fn(model: torch.nn.Module, batch: Any) -> Any:
            found = made.loss_fn(model, batch)
            if isinstance(found, tuple):  # a step's batch has its curve, held-out data have none
                self.errors.append(float(found[1]["tracking"]))
            return found

        return replace(made, loss_fn=loss_fn)


def reconvergence(
    methods: Sequence[str], lrs: Sequence[float], seeds: Sequence[int], output: Path
) -> str:
    """A markdown table; rows go to `output` as they come, and are not computed again."""
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    found = {(row["method"], row["lr"], row["seed"]): row["error"] for row in rows}
    for method in methods:
        for lr in lrs:
            for seed in seeds:
                if (method, lr, seed) in found:
                    continue
                task = Tracked("drifting_sine")
                run(task, method, lr, seed)
                after = [e for j in Waves(seed).jumps for e in task.errors[j : j + 100]]
                row = {"method": method, "lr": lr, "seed": seed, "error": statistics.mean(after)}
                found[method, lr, seed] = row["error"]
                with output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    last = methods[-1]
    best = min(lrs, key=lambda lr: statistics.mean(found[last, lr, seed] for seed in seeds))
    lines = ["| method | first lr | error after a jump | apart |", "|---|---|---|---|"]
    for method in methods:
        for lr in lrs:
            errors = [found[method, lr, seed] for seed in seeds]
            best = min(
                lrs, key=lambda lr: statistics.mean(found[methods[-1], lr, s] for s in seeds)
            )
            apart = [e - found[last, best, s] for e, s in zip(errors, seeds, strict=True)]
            cells = [f"{statistics.mean(v):.3f} [{a:.3f}, {b:.3f}]" for v in (errors, apart)
                     for a, b in (interval(v),)]  # fmt: skip
            lines.append(f"| {method} | {lr:g} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def overhead(model_name: str, steps: int, rounds: int, noise: float) -> str:
    """Median ratio of CPU time with AdaptiveRL to without, and its quartiles, as a line."""
    case = CASES[model_name]
    torch.manual_seed(0)
    model = case.model()
    batches = [case.make_batch() for _ in range(8)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found: list[tuple[float, float]] = []
    for number in range(-1, rounds):
        seconds = {}
        for steered in (False, True) if number % 2 else (True, False):
            # lr is pinned: both blocks train alike, and none diverges.
            bounds = rhc.Bounds(lr=(0.01, 0.01), noise=(noise, noise))
            scheduler = rhc.AdaptiveRL(optimizer, noise=noise, bounds=bounds) if steered else None
            began = time.process_time()
            for step in range(steps):
                optimizer.zero_grad()
                loss = case.loss_fn(model, batches[step % len(batches)])
                loss.backward()
                optimizer.step()
                if scheduler is not None:
                    scheduler.step(loss)
            seconds[steered] = (time.process_time() - began) / steps
            if scheduler is not None:
                scheduler.close()
        if number >= 0:  # the first round warms up
            found.append((seconds[False], seconds[True]))
    ratios = [steered / plain for plain, steered in found]
    low, high = statistics.quantiles(ratios, n=4)[::2]
    plain = statistics.median(plain for plain, _ in found)
    more = statistics.median(steered - plain for plain, steered in found)
    return (
        f"{model_name}, noise {noise:g}: a step {1e3 * plain:.3f} ms, with AdaptiveRL "
        f"{1e6 * more:+.0f} µs, ratio {statistics.median(ratios):.3f} (quartiles {low:.3f} to "
        f"{high:.3f}), of the fastest blocks "
        f"{min(s for _, s in found) / min(p for p, _ in found):.3f}"
    )


if __name__ == "__main__":
    main()

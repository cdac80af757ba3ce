"""What Runner.fit with rewriting off costs above the plain loop: rounds interleaved in one process.

    python benchmarks/runner.py --model mlp --steps 300 --rounds 15

Both loops train the same model on the same batches in memory, SGD with momentum, one thread, no
directory, no listeners. The clock runs from the first step's loss to the last one's, so that
neither the beginning nor the evaluation at the end is in it. Prints the medians of the rounds'
times per step, and of their ratios, in wall time and in CPU time; `best` is the ratio of the
fastest rounds, for machines that are busy. Writes JSON with -o.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from models import CASES
from torch import Tensor, nn

import rhc

BATCHES = 64
"""In the loader, over and over."""


class Seconds(NamedTuple):
    """Per step. cpu: user and system time of the process."""

    wall: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mlp", choices=sorted(CASES))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--window", type=int, default=50)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Seconds]] = {"plain": [], "runner": []}
    for number in range(-1, arguments.rounds):
        modes = [("plain", plain), ("runner", fit)]
        for name, loop in modes if number % 2 else reversed(modes):
            seconds = measure(loop, arguments)
            if number >= 0:  # the first round warms up
                found[name].append(seconds)
    record: dict[str, Any] = {
        "model": arguments.model,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    for clock in ("wall", "cpu"):
        times = {name: [getattr(s, clock) for s in rounds] for name, rounds in found.items()}
        ratios = [b / a for a, b in zip(times["plain"], times["runner"], strict=True)]
        median = {name: statistics.median(values) for name, values in times.items()}
        record[clock] = {
            "plain_ms": 1e3 * median["plain"],
            "runner_ms": 1e3 * median["runner"],
            "ratio": statistics.median(ratios),
            "best": min(times["runner"]) / min(times["plain"]),
            "quartiles": statistics.quantiles(ratios, n=4)[::2],
        }
        low, high = record[clock]["quartiles"]
        print(
            f"{arguments.model:>4} {clock:>4}: plain {1e3 * median['plain']:.3f} ms a step, runner "
            f"{1e3 * median['runner']:.3f} ms, ratio {record[clock]['ratio']:.3f} "
            f"(quartiles {low:.3f} to {high:.3f}), best {record[clock]['best']:.3f}"
        )
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


Loop = Callable[..., None]


def measure(loop: Loop, arguments: argparse.Namespace) -> Seconds:
    """Seconds per step of one loop on a fresh model, without its first step."""
    torch.manual_seed(0)
    case = CASES[arguments.model]
    model = case.model()
    batches = [case.make_batch() for _ in range(BATCHES)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    began: list[Seconds] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            began.append(Seconds(time.perf_counter(), time.process_time()))
        return case.loss_fn(model, batch)

    loop(model, optimizer, loss_fn, batches, arguments)
    if len(began) != arguments.steps:
        raise RuntimeError(f"{len(began)} steps were taken in place of {arguments.steps}")
    first, last = began[0], began[-1]
    count = arguments.steps - 1
    return Seconds((last.wall - first.wall) / count, (last.cpu - first.cpu) / count)


def plain(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: list[Any],
    arguments: argparse.Namespace,
) -> None:
    """The loop that everybody writes."""
    step = 0
    while True:
        for batch in batches:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
            step += 1
            if step == arguments.steps:
                return


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: list[Any],
    arguments: argparse.Namespace,
) -> None:
    """The same by the Runner."""
    runner = rhc.Runner(model, optimizer, loss_fn, batches, window=arguments.window, rewrite=False)
    runner.fit(arguments.steps)


if __name__ == "__main__":
    main()

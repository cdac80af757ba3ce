"""AdaptiveRL: what a step of it costs, and a page of pictures from the rows of `rhc compare`.

    python benchmarks/causal.py overhead --model mlp --steps 100 --rounds 15
    python benchmarks/causal.py picture runs/compare-sine/comparison.json -o sine.svg

Overhead: blocks of steps with and without the scheduler take turns on one model in one process, one
thread; the ratio is that of neighbouring blocks' CPU times, so that a machine's moods cancel out.
Pictures need matplotlib, the extra `figures`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from models import CASES

import rhc

PLATEAU = 0.5
"""The score above which a stretch counts as a plateau."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    timed = commands.add_parser("overhead")
    timed.add_argument("--model", default="mlp", choices=sorted(CASES))
    timed.add_argument("--steps", type=int, default=100, help="of a block")
    timed.add_argument("--rounds", type=int, default=15)
    timed.add_argument("--noise", type=float, default=0.0)
    drawn = commands.add_parser("picture")
    drawn.add_argument("comparison", type=Path)
    drawn.add_argument("-o", "--output", type=Path, default=Path("comparison.svg"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "overhead":
        print(overhead(arguments.model, arguments.steps, arguments.rounds, arguments.noise))
    else:
        document = json.loads(arguments.comparison.read_text(encoding="utf-8"))
        picture(document["rows"], document["run"]).savefig(arguments.output)


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


def picture(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    """A matplotlib figure of rows: what runs are judged by, loss, α, μ, σ over the steps, plateaus
    as bars, and the trend of the reward against that of the loss.

    A line per method and lr, of its first seed: means over seeds would show what no run did. Rows
    are those of comparison.json; methods that record no trends are left out of the last two.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), layout="constrained")
    axes = figure.subplots(4, 2)
    names = ("judged by", "loss", "lr", "momentum", "noise", "plateaus (P > 0.5)", "trends")
    panels = dict(zip(names, axes.flat, strict=False))
    axes.flat[-1].axis("off")
    for name, panel in panels.items():
        panel.set_title(name, fontsize=9)
        panel.tick_params(labelsize=7)
    first: dict[tuple[str, float | None], Mapping[str, Any]] = {}
    for row in rows:
        first.setdefault((row["method"], row["lr"]), row)
    for place, ((method, lr), row) in enumerate(first.items()):
        label, color = f"{method}{'' if lr is None else f' {lr:g}'}", f"C{place % 10}"
        course = row["course"]
        if row["curve"]:
            panels["judged by"].plot(*zip(*row["curve"], strict=True), color=color, label=label)
        steps = course.get("step", [])
        for name in ("loss", "lr", "momentum", "noise"):
            if len(course.get(name, [])) == len(steps) > 0:
                panels[name].plot(steps, course[name], color=color, lw=1)
        if "plateau" in course:
            flat = [
                (s, steps[i + 1] - s)
                for i, (s, p) in enumerate(zip(steps[:-1], course["plateau"], strict=False))
                if (p or 0) > PLATEAU
            ]
            panels["plateaus (P > 0.5)"].broken_barh(flat, (place - 0.4, 0.8), color=color)
            panels["trends"].scatter(
                course["loss_trend"], course["reward_trend"], s=6, color=color, alpha=0.6
            )
    panels["lr"].set_yscale("log")
    panels["loss"].set_yscale("symlog", linthresh=0.01)
    panels["trends"].set_xlabel("Δ̃ℓ", fontsize=8)
    panels["trends"].set_ylabel("Δ̃r", fontsize=8)
    axes.flat[-1].legend(*panels["judged by"].get_legend_handles_labels(), loc="center", fontsize=8)
    figure.suptitle(title)
    return figure


if __name__ == "__main__":
    main()

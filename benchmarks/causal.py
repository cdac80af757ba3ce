"""AdaptiveRL: how it moves, how fast it re-converges, and what a step of it costs.

    python benchmarks/causal.py overhead --model mlp --steps 100 --rounds 15
    python benchmarks/causal.py expectations --data mnist/ --seeds 100-109 -o rows.jsonl
    python benchmarks/causal.py reconvergence --methods adaptive constant --lrs 0.03 -o rows.jsonl

Overhead: blocks of steps with and without the scheduler take turns on one model in one process, one
thread; the ratio is that of neighbouring blocks' CPU times, so that a machine's moods cancel out.
Expectations: how lr, momentum and noise are to move, a row each, for the default and as specified:
where it holds, of all seeds (of all jumps on drifting_sine), and the median of a figure. By the
loss alone, but for CartPole, whose return is the reward. Re-convergence: the mean tracking error in
the 100 steps after each jump of drifting_sine, and the paired difference to the last method, with
bootstrap 95 % intervals over seeds. `rhc report` draws what single runs saw and did.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

import torch
from models import CASES

import rhc
from rhc.compare import runs
from rhc.compare.methods import Method, adaptive
from rhc.compare.pool import parsed_seeds
from rhc.compare.runs import Task, run
from rhc.compare.statistics import interval
from runners.drifting_sine import Waves

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
    moves = commands.add_parser("expectations")
    moves.add_argument("--data", type=Path, required=True, help="folder of MNIST's IDX files")
    moves.add_argument("--seeds", type=parsed_seeds, default=parsed_seeds("100-109"))
    moves.add_argument("-o", "--output", type=Path, default=Path("expectations.jsonl"))
    jumps = commands.add_parser("reconvergence")
    jumps.add_argument("--methods", nargs="+", default=["adaptive", "constant"])
    jumps.add_argument("--lrs", nargs="+", type=float, default=[0.03])
    jumps.add_argument("--seeds", type=parsed_seeds, default=parsed_seeds("100-109"))
    jumps.add_argument("-o", "--output", type=Path, default=Path("reconvergence.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "overhead":
        print(overhead(arguments.model, arguments.steps, arguments.rounds, arguments.noise))
    elif arguments.command == "expectations":
        print(expectations(arguments.data, arguments.seeds, arguments.output))
    else:
        print(reconvergence(arguments.methods, arguments.lrs, arguments.seeds, arguments.output))


LAWS = {
    "default": adaptive,
    "as specified": partial(adaptive, rhc.AdaptiveRL.as_specified, paced=False),
}
FIRST = {"sine": 0.01, "mnist": 0.01, "drifting_sine": 0.03, "cartpole": 0.01}
TUNED = {"sine": 0.1, "mnist": 0.03, "drifting_sine": 0.03}
"""The lr that cosine, step and the constant have in the tables of docs/causal.md."""

Finding = dict[str, tuple[list[bool], float]]
"""What is expected -> where it holds (once, or once a jump), and a figure."""


def expectations(data: Path, seeds: Sequence[int], output: Path) -> str:
    """A markdown table; findings go to `output` as they come, and are not computed again."""
    lines = output.read_text().splitlines() if output.exists() else []
    rows = [json.loads(line) for line in lines]
    known = {(row["task"], row["law"], row["seed"]) for row in rows}
    runs.EVERY = 10  # steps between points of the curves that are raced
    for task, seed in product(FIRST, seeds):
        if all((task, law, seed) in known for law in LAWS):
            continue
        workload = Task(task, data if task == "mnist" else None)
        rivals = _rivals(workload, seed)
        for law in LAWS:
            loss_alone = {"source": "loss", "rewarded": False}
            drives = LAWS[law](**{} if task == "cartpole" else loss_alone)
            method = Method("", drives=drives)
            trained = runs._driven(workload, method, FIRST[task], seed)
            found = MEASURED[task](trained, seed) | _races(trained, rivals, seed)
            rows.append({"task": task, "law": law, "seed": seed, "found": found})
            with output.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    return _expected(rows)


def _expected(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [f"| | expected | {' | '.join(LAWS)} |", "|---" * (2 + len(LAWS)) + "|"]
    names = dict.fromkeys((row["task"], name) for row in rows for name in row["found"])
    for task, name in names:
        cells = []
        for law in LAWS:
            found = [row["found"][name] for row in rows if (row["task"], row["law"]) == (task, law)]
            held = list(chain.from_iterable(holds for holds, _ in found))
            median = statistics.median(figure for _, figure in found)
            cells.append(f"{sum(held)} of {len(held)}; {median:.3g}")
        lines.append(f"| {task} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _rivals(task: Task, seed: int) -> dict[str, Any]:
    """Rows of fixed schedules by name: from the same first lr, and from the tuned one."""
    first, tuned = FIRST[task.run], TUNED.get(task.run)
    if tuned is None:
        return {}
    if task.run == "drifting_sine":
        found = {}
        for name in ("constant", "cosine", "step"):
            tracked = Tracked(task.run)
            run(tracked, name, tuned, seed)
            found[f"{name} {tuned:g}"] = _after_jumps(tracked.errors, seed)
        return found
    lrs = dict.fromkeys((first, tuned))
    return {f"{n} {lr:g}": run(task, n, lr, seed) for lr in lrs for n in ("cosine", "step")}


def _races(trained: Any, rivals: Mapping[str, Any], seed: int) -> Finding:
    """Whether it is sooner at the final validation loss + 5 % of the cosine from the same or the
    tuned lr; or its tracking error after the jumps is below that of a fixed schedule."""
    found: Finding = {}
    for name, rival in rivals.items():
        if isinstance(rival, float):
            own = _after_jumps([row["tracking"] for row in trained.tape], seed)
            found[f"error after a jump below that of {name}"] = ([own < rival], own / rival)
            continue
        target = 1.05 * rivals[f"cosine {name.split()[1]}"].validation
        own, steps = (
            next((step for step, x in curve if x is not None and x <= target), math.inf)
            for curve in (trained.fields["curve"], rival.curve)
        )
        title = f"sooner than {name} at the validation loss of cosine {name.split()[1]} + 5 %"
        found[title] = ([own < steps], own - steps if own < math.inf else math.inf)
    return found


def _settles(trained: Any, seed: int) -> Finding:
    """How a stationary run is expected to move."""
    lr, momentum, noise = ([row[n] for row in trained.tape] for n in ("lr", "momentum", "noise"))
    late = momentum[-len(lr) // 4 :]
    settled = min(late) >= 0.95 and max(late) <= 0.99 and max(late) - min(late) < 0.02
    highest = max(lr[: len(lr) // 2])
    return {
        "lr rises by a quarter or more in the first half": (
            [highest >= 1.25 * lr[0]], highest / lr[0],
        ),
        "and decays to half of its peak or less": ([lr[-1] <= highest / 2], lr[-1] / highest),
        "momentum rises and settles at 0.95 to 0.99": ([settled], statistics.median(late)),
        "noise is 0 in the end": ([noise[-1] == 0], max(noise)),
        "test loss": ([], trained.fields["score"]),
    }  # fmt: skip


def _follows_jumps(trained: Any, seed: int) -> Finding:
    """How a run is expected to answer jumps of its data."""
    jumps = Waves(seed).jumps
    course = {n: [row[n] for row in trained.tape] for n in ("lr", "momentum", "noise")}
    dips, falls, spikes = [], [], []
    for jump in jumps:
        before = {n: statistics.mean(values[jump - 20 : jump]) for n, values in course.items()}
        lr, momentum, noise = (values[jump : jump + 280] for values in course.values())
        at = min(range(50), key=lr.__getitem__)
        dips.append(lr[at] < 0.95 * before["lr"] and max(lr[at:200]) > 0.98 * before["lr"])
        low = min(momentum[:50])
        half = (low + before["momentum"]) / 2
        falls.append(low < before["momentum"] - 0.05 and momentum[-1] >= half)
        high = max(noise[:60])
        back = before["noise"] + 0.1 * (high - before["noise"])
        spikes.append(high > before["noise"] + 0.004 and min(noise[60:]) <= back)
    return {
        "lr dips at a jump and is back within 200 steps": (dips, _highest(course["lr"], jumps)),
        "momentum dips and is half the way back after 280": (falls, min(course["momentum"])),
        "noise spikes and is down to a tenth of that within 280": (spikes, max(course["noise"])),
        "tracking error": ([], statistics.mean(row["tracking"] for row in trained.tape)),
    }


def _highest(lr: Sequence[float], jumps: Sequence[int]) -> float:
    """Median over jumps of the highest lr in 200 steps after one, over that before."""
    return statistics.median(max(lr[jump : jump + 200]) / lr[jump - 1] for jump in jumps)


def _follows_returns(trained: Any, seed: int) -> Finding:
    """How a reinforcement learner is expected to move."""
    tape = trained.tape
    stalled = [
        i for i in range(1, len(tape)) if tape[i]["plateau"] > PLATEAU >= tape[i - 1]["plateau"]
    ]
    rises = [max(row["noise"] for row in tape[i : i + 30]) - tape[i - 1]["noise"] for i in stalled]
    pairs = [(a, b) for a, b in pairwise(tape[: len(tape) // 2]) if b["reward_trend"] > 0.3]
    moved = [(a, b) for a, b in pairs if a["lr"] != b["lr"]]
    lr = statistics.mean(math.log(b["lr"] / a["lr"]) for a, b in moved) if moved else 0.0
    noise = statistics.mean(b["noise"] - a["noise"] for a, b in moved) if moved else 0.0
    return {
        "noise rises within 30 steps of a stall": (
            [statistics.mean(rises) > 0] if rises else [], statistics.mean(rises or [0.0]),
        ),
        "noise falls while returns rise": ([noise < 0], noise),
        "lr rises while returns rise": ([lr > 0], lr),
        "mean return of the last 100 episodes": ([], trained.fields["score"]),
    }  # fmt: skip


MEASURED = {
    "sine": _settles,
    "mnist": _settles,
    "drifting_sine": _follows_jumps,
    "cartpole": _follows_returns,
}


def _after_jumps(errors: Sequence[float], seed: int) -> float:
    """Mean error in the 100 steps after each jump."""
    return statistics.mean(e for j in Waves(seed).jumps for e in errors[j : j + 100])


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
                error = _after_jumps(task.errors, seed)
                row = {"method": method, "lr": lr, "seed": seed, "error": error}
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

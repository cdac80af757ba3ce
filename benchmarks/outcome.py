"""What runs end with, on all workloads: the tables of docs/outcome.md.

    python benchmarks/outcome.py --mnist DIR --text FILE [--workloads NAME …] [-o FOLDER]

First the sweep: five templates × five lrs on seeds 0 and 1, of which the best is chosen; then that
one, and all other methods, on seeds 100 to 109. Rows go to FOLDER/WORKLOAD.jsonl as they come, and
what is there already is not run again; the folder is docs/outcome, so give another one to repeat
the figures. `--tables` prints what the folder holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from methods import ALL as METHODS
from rich.console import Console

from rhc.compare.methods import cells
from rhc.compare.runs import Row, Task, run
from rhc.compare.statistics import summarise, table

SWEPT = ("constant", "cosine", "linear", "1cycle", "wsd")
LRS = {"sgd": (0.003, 0.01, 0.03, 0.1, 0.3), "adam": (0.0003, 0.001, 0.003, 0.01, 0.03)}
WORKLOADS = {
    "digits": "sgd",
    "mnist": "sgd",
    "mnist_cnn": "adam",
    "char_lm": "adam",
    "ill_scaled": "sgd",
    "drifting_sine": "sgd",
    "shifting_mnist": "sgd",
}
FIRST_LRS = (1e-5, 3e-4, 1e-2, 0.3, 1.0)
TUNING, REPORTING = (0, 1), tuple(range(100, 110))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's IDX files")
    parser.add_argument("--text", type=Path, help="a .txt file")
    parser.add_argument("--workloads", nargs="+", choices=tuple(WORKLOADS), default=None)
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=None)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/outcome"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(exist_ok=True)
    for name in arguments.workloads or WORKLOADS:
        data = {"char_lm": arguments.text, "digits": None, "drifting_sine": None}.get(
            name, arguments.mnist
        )
        results = Results(Task(name, data), arguments.output / f"{name}.jsonl")
        if not arguments.tables:
            lrs = LRS[WORKLOADS[name]]
            if arguments.methods is None:
                results.run(SWEPT, lrs, TUNING)
            best = results.best()
            if best is not None:
                results.run([best[0]], [best[1]], REPORTING)
            others = [m for m in METHODS if m not in SWEPT and m != "oracle-cosine"]
            if name == "ill_scaled":
                results.run(["oracle-cosine"], [0.01, 0.03, 0.05], TUNING)
                oracle = results.best(("oracle-cosine",))
                assert oracle is not None
                results.run([oracle[0]], [oracle[1]], REPORTING)
            results.run(arguments.methods or others, FIRST_LRS, REPORTING)
        results.show()


class Results:
    """The rows of one workload, kept in a file."""

    def __init__(self, task: Task, path: Path) -> None:
        self.task, self.path = task, path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows = [Row(**json.loads(line)) for line in lines]

    def run(self, methods: Sequence[str], lrs: Sequence[float], seeds: Sequence[int]) -> None:
        known = {(row.method, row.lr, row.seed) for row in self.rows}
        for cell in cells(methods, lrs, seeds):
            if cell not in known:
                row = run(self.task, *cell)
                self.rows.append(row)
                with self.path.open("a") as file:
                    file.write(json.dumps(asdict(row)) + "\n")

    def best(self, methods: Sequence[str] = SWEPT) -> tuple[str, float] | None:
        """The best method and lr on the tuning seeds."""
        found: dict[tuple[str, float], list[float]] = {}
        for row in self.rows:
            if row.method in methods and row.seed in TUNING and row.lr is not None:
                found.setdefault((row.method, row.lr), []).append(row.score)
        return min(found, key=lambda key: statistics.mean(found[key]), default=None)

    def show(self, seeds: Sequence[int] = REPORTING) -> None:
        console = Console(width=120)
        rows = [row for row in self.rows if row.seed in seeds]
        console.print(f"\n{self.task.run}", style="bold")
        if rows:
            console.print(table(summarise(rows, "zero-probe-cosine")))


if __name__ == "__main__":
    main()

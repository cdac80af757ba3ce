"""What hindsight is worth when it is used again: the tables of docs/hindsight.md.

    python benchmarks/hindsight.py --mnist DIR --text FILE [--workloads NAME …] [-o FOLDER]

Per workload: the two-pass smoother on seeds 0 to 7, from which a policy is distilled; then on seeds
100 to 109 the constant lr that it starts from, the smoother (the oracle), the schedule of each seed
replayed on the next one, the distilled scheduler, a cosine whose lr was tuned on seeds 0 and 1, and
a random search over cosines that costs what the smoother does. The same policy on tasks that it was
not distilled from. Rows go to FOLDER/WORKLOAD.jsonl as they come, and what is there already is not
run again; runs go to RUNS. `--tables` prints what the folder holds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rhc.cli.main import main as rhc
from rhc.compare.runs import Row, Task, run
from rhc.compare.statistics import interval, share_of_gain

TUNING, LESSONS, REPORTING = (0, 1), tuple(range(8)), tuple(range(100, 110))
REFERENCE, ORACLE = "constant", "smooth"


@dataclass(frozen=True)
class Workload:
    """lr: that everything starts from. lrs: among which the cosine's is tuned. passes: of the
    smoother. others: tasks that the policy is tried on, and the lrs that their cosines are tuned
    among."""

    lr: float
    lrs: tuple[float, ...]
    passes: int
    others: tuple[tuple[str, dict[str, Any]], ...] = ()


WORKLOADS = {
    "mnist": Workload(
        0.01,
        (0.01, 0.03, 0.1),
        1,
        (
            ("4 times as wide", {"width": 4}),
            ("batches of 256", {"batch_size": 256}),
            ("digits", {"run": "digits", "data": None}),
            ("sine", {"run": "sine", "data": None}),
        ),
    ),
    "mnist_cnn": Workload(
        0.001,
        (0.003, 0.01, 0.03),
        2,
        (("twice as wide", {"width": 2}), ("batches of 128", {"batch_size": 128})),
    ),
    "char_lm": Workload(0.003, (0.003, 0.01, 0.03), 2, (("batches of 8", {"batch_size": 8}),)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's IDX files")
    parser.add_argument("--text", type=Path, help="a .txt file")
    parser.add_argument("--workloads", nargs="+", choices=tuple(WORKLOADS), default=["mnist"])
    parser.add_argument("--runs", type=Path, default=Path("runs/hindsight"))
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/hindsight"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.workloads:
        data = arguments.text if name == "char_lm" else arguments.mnist
        study = Study(name, Task(name, data), arguments.output, arguments.runs)
        if not arguments.tables:
            study.run()
        study.show()


class Study:
    """The rows of one workload, kept in a file."""

    def __init__(self, name: str, task: Task, folder: Path, runs: Path) -> None:
        self.name, self.task, self.folder, self.runs = name, task, folder, runs
        self.workload = WORKLOADS[name]
        self.path = folder / f"{name}.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.records = [json.loads(line) for line in lines]

    def run(self) -> None:
        lr = self.workload.lr
        for seed in REPORTING:
            self.oracle(seed)
        for seed in REPORTING:
            self.cell("", self.task, REFERENCE, lr, seed)
            other = REPORTING[(REPORTING.index(seed) + 1) % len(REPORTING)]
            source = self.runs / f"{self.name}-{seed}"
            self.cell("", replace(self.task, schedule=source), "replay", None, other)
        for seed in REPORTING:
            task = replace(self.task, policy=self.policy("gru"))
            self.cell("", task, "distilled", lr, seed, label="distilled-gru")
        best = self.tuned(self.task, "", self.workload.lrs)
        for seed in REPORTING:
            self.cell("", self.task, "cosine", best, seed)
        for seed in REPORTING:
            self.cell("", self.task, f"search-cosine-{self.searches}", lr, seed)
        for seed in REPORTING:
            task = replace(self.task, policy=self.policy("laws"))
            self.cell("", task, "distilled", lr, seed, label="distilled-laws")
        for title, changes in self.workload.others:
            task = replace(self.task, **changes)
            lr = self.workload.lr if "run" not in changes else 0.01
            grid = self.workload.lrs if "run" not in changes else (0.03, 0.1, 0.3)
            best = self.tuned(task, title, grid)
            for seed in REPORTING:
                self.cell(title, task, REFERENCE, lr, seed)
                self.cell(title, task, "cosine", best, seed)
                for kind in ("gru", "laws"):
                    policy = replace(task, policy=self.policy(kind))
                    self.cell(title, policy, "distilled", lr, seed, label=f"distilled-{kind}")

    @property
    def searches(self) -> int:
        """Runs of the random search: as many as the smoother's, or the next even number."""
        return 2 if self.workload.passes == 1 else 4

    def oracle(self, seed: int) -> Path:
        """The smoother's run of a seed, in a directory; its row where it is reported."""
        directory = self.runs / f"{self.name}-{seed}"
        if not (directory / "result.json").exists():
            arguments = ["smooth", self.task.run, "--passes", str(self.workload.passes)]
            arguments += ["--lr", str(self.workload.lr), "--seed", str(seed)]
            arguments += ["--data", str(self.task.data), "--directory", str(directory)]
            if rhc(arguments):
                raise SystemExit(f"{directory}: the smoother failed")
        if seed in REPORTING and not self.known("", ORACLE, seed):
            result = json.loads((directory / "result.json").read_text())
            self.keep("", ORACLE, self.workload.lr, seed, {
                "score": result["test_loss"],
                "validation": result["val_loss"],
                "cost": result["cost"]["plain_run_equivalents"],
            })  # fmt: skip
        return directory

    def policy(self, kind: str) -> Path:
        """The policy of the lessons' seeds."""
        folder = self.folder / "policies" / f"{self.name}-{kind}"
        if not (folder / "policy.json").exists():
            lessons = [str(self.oracle(seed)) for seed in LESSONS]
            arguments = ["distill", *lessons, "-o", str(folder), "--kind", kind, "--rounds", "0"]
            if rhc([*arguments, "--per-round", "4"]):
                raise SystemExit(f"{folder}: distilling failed")
        return folder

    def tuned(self, task: Task, title: str, lrs: Sequence[float]) -> float:
        """The cosine's best lr on the tuning seeds."""
        for lr in lrs:
            for seed in TUNING:
                self.cell(title, task, "cosine", lr, seed)
        means = {
            lr: statistics.mean(
                _infinite(r["score"])
                for r in self.records
                if (r["task"], r["method"], r["lr"]) == (title, "cosine", lr)
                and r["seed"] in TUNING
            )
            for lr in lrs
        }
        return min(means, key=lambda lr: means[lr])

    def cell(
        self,
        title: str,
        task: Task,
        method: str,
        lr: float | None,
        seed: int,
        label: str | None = None,
    ) -> None:
        """One run, unless it is there already."""
        if self.known(title, label or method, seed, lr):
            return
        row = run(task, method, lr, seed)
        found = {"score": row.score, "validation": row.validation, "cost": row.cost}
        self.keep(title, label or method, lr, seed, found)

    def known(self, title: str, method: str, seed: int, lr: float | None = None) -> bool:
        return any(
            (r["task"], r["method"], r["seed"]) == (title, method, seed)
            and (lr is None or r["lr"] == lr)
            for r in self.records
        )

    def keep(
        self, title: str, method: str, lr: float | None, seed: int, found: dict[str, float]
    ) -> None:
        finite = {k: v if math.isfinite(v) else None for k, v in found.items()}
        record = {"task": title, "method": method, "lr": lr, "seed": seed, **finite}
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    # Tables --------------------------------------------------------------------------------------

    def show(self) -> None:
        """Markdown, for docs/hindsight.md."""
        print(f"\n### {self.name}, from lr {self.workload.lr:g}\n")
        print("| method | lr | seeds | test loss | cost | against the tuned cosine | kept |")
        print("|---|---|---|---|---|---|---|")
        self._table("", lambda row, rows: self._kept(row, rows))
        for title, _ in self.workload.others:
            if any(r["task"] == title for r in self.records):
                print(f"\nThe same policies, {title}:\n")
                print("| method | lr | seeds | test loss | cost | against its tuned cosine |  |")
                print("|---|---|---|---|---|---|---|")
                self._table(title, lambda row, rows: "")

    def _table(self, title: str, last: Callable[[str, list[Row]], str]) -> None:
        rows = [
            Row(
                r["method"],
                r["lr"],
                r["seed"],
                score=_infinite(r["score"]),
                test_loss=r["score"],
                test_accuracy=None,
                average_test_loss=None,
                validation=_infinite(r["validation"]),
                cost=r["cost"],
            )
            for r in self.records
            if r["task"] == title and r["seed"] in REPORTING
        ]
        cosine = {r.seed: r.score for r in rows if r.method == "cosine"}
        for method in dict.fromkeys(row.method for row in rows):
            mine = [row for row in rows if row.method == method]
            scores = [row.score for row in mine]
            low, high = interval(scores)
            apart = [row.score / cosine[row.seed] - 1 for row in mine if row.seed in cosine]
            below, above = interval(apart)
            lr = "" if mine[0].lr is None else f"{mine[0].lr:g}"
            against = (
                f"{100 * statistics.mean(apart):+.1f} % [{100 * below:+.1f}, {100 * above:+.1f}]"
                if apart and method != "cosine"
                else ""
            )
            print(
                f"| {method} | {lr} | {len(mine)} | {statistics.mean(scores):.4f} "
                f"[{low:.4f}, {high:.4f}] | {statistics.mean(r.cost for r in mine):.2f} | "
                f"{against} | {last(method, rows)} |"
            )

    def _kept(self, method: str, rows: list[Row]) -> str:
        if method in (REFERENCE, ORACLE):
            return ""
        told = share_of_gain(rows, REFERENCE, ORACLE, method)
        return told.partition("keeps ")[2].partition(" of what")[0]


def _infinite(value: float | None) -> float:
    return math.inf if value is None else value


if __name__ == "__main__":
    main()

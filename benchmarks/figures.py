"""The figures of docs/outcome.md, from the rows in docs/outcome/ and one run each.

pip install -c constraints.txt -e '.[figures,runners]'
python benchmarks/figures.py [--mnist DIR]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from methods import ALL as METHODS
from outcome import REPORTING, SWEPT, WORKLOADS

from rhc.compare.runs import Row, Task, prepared
from rhc.compare.statistics import interval

matplotlib.use("Agg")
DOCS = Path(__file__).parents[1] / "docs"
SHOWN = ("rhc", "zero-probe", "zero-probe-cosine", "no-rewrite", "no-hessian", "twin")
COLOURS = dict(zip(("swept", *SHOWN), plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", type=Path, help="for the figure of shifting_mnist")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = DOCS / "figures"
    folder.mkdir(exist_ok=True)
    scores(folder / "scores.png")
    courses(Task("drifting_sine"), folder / "drifting_sine.png", group=None)
    if arguments.mnist:
        courses(Task("shifting_mnist", arguments.mnist), folder / "shifting_mnist.png", group=0)


def scores(path: Path) -> None:
    """Every method's score over that of the best of the sweep, with its interval."""
    figure, axes = plt.subplots(figsize=(9, 4.5))
    names = [n for n in WORKLOADS if (DOCS / "outcome" / f"{n}.jsonl").exists()]
    for place, name in enumerate(names):
        lines = (DOCS / "outcome" / f"{name}.jsonl").read_text().splitlines()
        rows = [row for row in (Row(**json.loads(x)) for x in lines) if row.seed in REPORTING]
        best = statistics.mean(row.score for row in rows if row.method in SWEPT)
        for number, method in enumerate(SHOWN):
            found = [row.score / best for row in rows if row.method == method]
            if not found:
                continue
            mean, (low, high) = statistics.mean(found), interval(found)
            axes.errorbar(
                place + 0.11 * (number - 2.5),
                mean,
                [[mean - low], [high - mean]],
                fmt="o",
                color=COLOURS[method],
                label=method,
                capsize=2,
                markersize=4,
            )
    axes.axhline(1, color="grey", linewidth=1)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel("loss / loss of the best of 25 runs")
    axes.set_yscale("log")
    ticks = [0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), fontsize=8, ncols=3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def courses(task: Task, path: Path, *, group: int | None, seed: int = 100) -> None:
    """Tracking error and lr of every step. group: whose lr, where there are several."""
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(9, 5), sharex=True)
    for method, lr in (("wsd", 0.03), ("zero-probe-cosine", None), ("rhc", None)):
        runner, _, steps = prepared(task, METHODS[method], lr, seed)
        result = runner.fit(steps)
        tracking = [row["tracking"] for row in result.tape]
        smooth = [statistics.fmean(tracking[i : i + 10]) for i in range(0, len(tracking), 10)]
        label = method if lr is None else f"{method} {lr:g}, the best of 25"
        colour = COLOURS["swept" if lr else method]
        upper.plot(range(0, len(tracking), 10), smooth, label=label, color=colour)
        values = result.schedule["lr"]
        if values.dim() == 2:
            values = values[:, group or 0]
        lower.plot(values.tolist(), color=colour)
    upper.set_yscale("log")
    upper.set_ylabel("tracking error")
    upper.legend(fontsize=8)
    lower.set_yscale("log")
    lower.set_ylim(1e-4, None)
    lower.set_ylabel("lr" if group is None else "lr of the first layer")
    lower.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()

"""The tables of docs/outcome.md, written from the rows in docs/outcome/.

    python benchmarks/tables.py

Only what stands between "## Tables" and the next line that begins with "Methods:" is replaced.
Ablations that were run on the default as it was before, with exact Hessian products, are taken from
docs/outcome/exact/, compared with `rhc` and marked with a dagger.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from pathlib import Path

from methods import ALL as METHODS
from outcome import REPORTING, SWEPT, Results

from rhc.compare.runs import Row, Task
from rhc.compare.statistics import interval

DOCS = Path(__file__).parents[1] / "docs"
TITLES = {
    "digits": "Digits: MLP, SGD, 600 steps",
    "mnist": "MNIST-10k: MLP 784-128-64-10, SGD, 1000 steps",
    "mnist_cnn": "MNIST-10k: CNN with BatchNorm, AdamW, 600 steps",
    "char_lm": "Characters of tiny-shakespeare: GPT of 2 layers, AdamW, 600 steps",
    "ill_scaled": "Ill-scaled: the MNIST MLP with layers in other units, a group each, SGD",
    "drifting_sine": "Drifting sine: three jumps, SGD, 1500 steps; mean tracking error",
    "shifting_mnist": "Shifting MNIST: pixels, then labels permuted, a group per layer, SGD, "
    "1200 steps; mean tracking loss",
}
HEAD = (
    "| method | first lr | seeds | score | cost, highest | against the best of the sweep | paired: "
    "against zero-probe-cosine | against rhc |\n|---|---|---|---|---|---|---|---|"
)
Key = tuple[str, float | None]


def main() -> None:
    page = DOCS / "outcome.md"
    before, _, rest = page.read_text().partition("## Tables\n")
    after = rest[rest.index("\nMethods:") :]
    tables = "\n\n".join(f"### {title}\n\n{table(name)}" for name, title in TITLES.items())
    page.write_text(f"{before}## Tables\n\n{tables}\n{after}")


def table(name: str) -> str:
    """One workload's rows, in the order of METHODS."""
    now = of_reporting(DOCS / "outcome" / f"{name}.jsonl")
    earlier = of_reporting(DOCS / "outcome" / "exact" / f"{name}.jsonl")
    sweep = Results(Task(name), DOCS / "outcome" / f"{name}.jsonl").best()
    assert sweep is not None
    best = statistics.fmean(row.score for row in now[sweep].values())
    lines = [HEAD]
    for method in METHODS:
        keys = [key for key in now if key[0] == method and (method not in SWEPT or key == sweep)]
        for key in sorted(keys, key=lambda k: k[1] or 0.0):
            lines.append(line(key, now[key], now, best, ("rhc", None), ""))
        if not keys and method != "rhc" and (method, None) in earlier:
            lines.append(
                line((method, None), earlier[method, None], now, best, ("rhc", None), " †")
            )
    return "\n".join(lines)


def of_reporting(path: Path) -> dict[Key, dict[int, Row]]:
    """(method, lr) -> seed -> row, of the reporting seeds."""
    found: dict[Key, dict[int, Row]] = defaultdict(dict)
    for text in path.read_text().splitlines() if path.exists() else []:
        row = Row(**json.loads(text))
        if row.seed in REPORTING:
            found[row.method, row.lr][row.seed] = row
    return found


def line(
    key: Key,
    rows: dict[int, Row],
    now: dict[Key, dict[int, Row]],
    best: float,
    base: Key,
    mark: str,
) -> str:
    method, lr = key
    scores = [row.score for row in rows.values()]
    mean, (low, high) = statistics.fmean(scores), interval(scores)
    costs = [row.cost for row in rows.values()]
    apart = "" if method in SWEPT else f"{100 * (mean / best - 1):+.1f}%"
    name = f"**{method}**" if method == "rhc" else method + mark
    cells = [
        name,
        "" if lr is None else f"{lr:g}",
        str(len(scores)),
        f"{mean:.4f} [{low:.4f}, {high:.4f}]",
        f"{statistics.fmean(costs):.2f}, {max(costs):.2f}",
        apart,
        paired(key, rows, now, ("zero-probe-cosine", None)),
        paired(key, rows, now, base) + (mark if method != "rhc" else ""),
    ]
    return "| " + " | ".join(cells) + " |"


def paired(key: Key, rows: dict[int, Row], now: dict[Key, dict[int, Row]], base: Key) -> str:
    """The mean difference over the seeds that both have; bold where the interval excludes 0."""
    seeds = [seed for seed in rows if seed in now.get(base, {})]
    if key == base or not seeds:
        return ""
    differences = [rows[seed].score - now[base][seed].score for seed in seeds]
    low, high = interval(differences)
    text = f"{statistics.fmean(differences):+.4f} [{low:+.4f}, {high:+.4f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


if __name__ == "__main__":
    main()

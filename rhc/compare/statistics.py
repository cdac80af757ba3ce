"""Of rows: means over seeds, their intervals, paired differences, and the tables that show them.

Intervals are bootstrap 95 % intervals of the mean over seeds (Efron 1979); differences are paired,
seed by seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from rhc.compare.runs import Row


@dataclass(frozen=True)
class Line:
    """A method at one lr over all seeds: mean score, its interval, mean cost.

    apart: mean paired difference to the reference and its interval; None for the reference itself.
    steps: mean over the `reached` of `seeds` runs that reach the target. tuning: what choosing the
    lr took in plain runs.
    """

    method: str
    lr: float | None
    score: float
    interval: tuple[float, float]
    cost: float
    apart: tuple[float, float, float] | None = None
    target: float | None = None
    steps: float | None = None
    reached: int = 0
    seeds: int = 0
    gradient_evaluations: float | None = None
    tuning: float = 0.0


def summarise(
    rows: Sequence[Row],
    versus: str | None = None,
    *,
    target: float | None = None,
    tuning: Mapping[str, float] | None = None,
) -> list[Line]:
    """A line per method and lr, in their order.

    versus: compared with, at its best lr. target: None for what the reference's curves end with,
    give or take 5 %. tuning: plain runs by method.
    """
    found: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        found.setdefault((row.method, row.lr), []).append(row)
    scores = {key: {row.seed: row.score for row in rs} for key, rs in found.items()}
    higher = any(row.higher for row in rows)
    of_reference = [key for key in found if key[0] == versus]
    best = min(
        of_reference,
        key=lambda key: statistics.mean(scores[key].values()) * (-1 if higher else 1),
        default=None,
    )
    if target is None:
        target = _usual_target(found[best] if best is not None else rows, higher)
    lines = []
    for key, rs in found.items():
        apart = None
        if best is not None and key != best:
            # A seed that one of the two has not (it failed, or is not done yet) makes no pair.
            both = scores[key].keys() & scores[best].keys()
            differences = [scores[key][s] - scores[best][s] for s in sorted(both)]
            lost = math.inf if not higher else -math.inf
            sound = bool(differences) and bool(np.isfinite(differences).all())
            apart = (statistics.mean(differences) if sound else lost, *interval(differences))
        steps = [s for row in rs if target is not None and (s := row.steps_to(target)) is not None]
        gradients = [row.gradient_evaluations for row in rs if row.gradient_evaluations is not None]
        lines.append(
            Line(
                *key,
                statistics.mean(scores[key].values()),
                interval(list(scores[key].values())),
                statistics.mean(row.cost for row in rs),
                apart,
                target,
                statistics.mean(steps) if steps else None,
                len(steps),
                len(rs),
                statistics.mean(gradients) if gradients else None,
                (tuning or {}).get(key[0], 0.0),
            )
        )
    return lines


def _usual_target(rows: Sequence[Row], higher: bool) -> float | None:
    ends = [row.curve[-1][1] for row in rows if row.curve and row.curve[-1][1] is not None]
    if not ends:
        return None
    mean = statistics.mean(end for end in ends if end is not None)
    return mean - 0.05 * abs(mean) if higher else mean + 0.05 * abs(mean)


def share_of_gain(rows: Sequence[Row], reference: str, oracle: str, name: str) -> str:
    """What a method keeps of the oracle's gain over the reference, in a sentence.

    Of the means over the seeds that all three have, each at its best lr; the interval resamples
    seeds.
    """
    by_seed: dict[str, dict[int, float]] = {}
    for method in (reference, oracle, name):
        mine = [row for row in rows if row.method == method]
        lrs = {row.lr for row in mine}
        sign = -1 if mine and mine[0].higher else 1
        means = {lr: statistics.mean(sign * r.score for r in mine if r.lr == lr) for lr in lrs}
        best = min(means, key=lambda lr: means[lr], default=None)
        by_seed[method] = {row.seed: sign * row.score for row in mine if row.lr == best}
    seeds = sorted(set.intersection(*(set(found) for found in by_seed.values())))
    base, best_, mine_ = (
        np.array([by_seed[m][s] for s in seeds]) for m in (reference, oracle, name)
    )
    if not len(seeds) or not np.isfinite([base, best_, mine_]).all():
        return f"{name}: no seed has finite losses of {reference}, {oracle} and {name}"
    gain, kept = base - best_, base - mine_
    if gain.mean() <= 0:
        return f"{name}: {oracle} gains nothing over {reference} of which a share could be kept"
    draws = np.random.default_rng(0).integers(0, len(seeds), (10_000, len(seeds)))
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = kept[draws].mean(1) / gain[draws].mean(1)
    low, high = np.quantile(shares, [0.025, 0.975])
    return (
        f"{name} keeps {100 * kept.mean() / gain.mean():.0f} % [{100 * low:.0f}, {100 * high:.0f}] "
        f"of what {oracle} gains over {reference} ({gain.mean():.4f}), {len(seeds)} seeds"
    )


def tuned(rows: Sequence[Row]) -> tuple[dict[str, float], dict[str, float]]:
    """The lr with the best mean score of every method, and what all its rows cost together.

    A method that diverges at every lr is left out.
    """
    best: dict[str, float] = {}
    spent: dict[str, float] = {}
    for name in dict.fromkeys(row.method for row in rows):
        mine = [row for row in rows if row.method == name]
        spent[name] = sum(row.cost for row in mine)
        means = {
            lr: statistics.mean(row.score for row in mine if row.lr == lr)
            for lr in dict.fromkeys(row.lr for row in mine)
        }
        sign = -1 if mine[0].higher else 1
        lr = min(means, key=lambda lr: sign * means[lr])
        if lr is not None and math.isfinite(means[lr]):
            best[name] = lr
    return best, spent


def table(lines: Sequence[Line]) -> Table:
    """Scores, their intervals and paired differences, for a terminal of 80 columns."""
    shown = _empty("method", "lr", "score", "95 %", "cost", "apart", "95 %")
    for line in lines:
        low, high = line.interval
        apart, within = "", ""
        if line.apart is not None:
            apart = _signed(line.apart[0])
            within = f"{_signed(line.apart[1])}…{_signed(line.apart[2])}"
        shown.add_row(
            line.method,
            "" if line.lr is None else f"{line.lr:g}",
            _number(line.score) if math.isfinite(line.score) else "diverges",
            f"{_number(low)}…{_number(high)}" if math.isfinite(high) else "",
            f"{line.cost:.2f}",
            apart if line.apart is not None and math.isfinite(line.apart[0]) else "",
            within if line.apart is not None and math.isfinite(line.apart[2]) else "",
        )
    return shown


def costs(lines: Sequence[Line]) -> Table:
    """Steps to the target, and what a run and the choice of its lr took."""
    target = lines[0].target
    heading = "to target" if target is None else f"steps to {_number(target)}"
    shown = _empty("method", "lr", heading, "reached", "gradients", "cost", "tuning")
    for line in lines:
        shown.add_row(
            line.method,
            "" if line.lr is None else f"{line.lr:g}",
            "–" if line.steps is None else f"{line.steps:.0f}",
            f"{line.reached} of {line.seeds}",
            "" if line.gradient_evaluations is None else f"{line.gradient_evaluations:.0f}",
            f"{line.cost:.2f}",
            f"{line.tuning:.0f}" if line.tuning else "",
        )
    return shown


def _empty(*headings: str) -> Table:
    shown = Table(box=None, padding=(0, 1, 0, 0))
    for heading in headings:
        left = heading in ("method", "lr", "95 %")
        shown.add_column(heading, justify="left" if left else "right", no_wrap=True)
    return shown


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


def _signed(value: float) -> str:
    return f"{value:+.4f}" if abs(value) < 10 else f"{value:+.1f}"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The bootstrap 95 % interval of the mean, 10,000 resamples with seed 0."""
    if not len(values) or not np.isfinite(values).all():
        return -math.inf, math.inf
    draws = np.random.default_rng(0).choice(np.array(values), (10_000, len(values))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)

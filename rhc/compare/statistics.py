"""Means over seeds, bootstrap 95 % intervals (Efron 1979), paired differences, and tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
from rich.table import Table

from rhc.compare.runs import Row


@dataclass(frozen=True)
class Line:
    """A method at one lr, over all seeds."""

    method: str
    lr: float | None
    score: float
    """Mean over seeds, as below."""
    interval: tuple[float, float]
    cost: float
    """In baseline runs."""
    apart: tuple[float, float, float] | None = None
    """Paired difference to the reference, with its interval; None for the reference."""
    target: float | None = None
    steps: float | None = None
    """Mean over the `reached` of `seeds` runs that reach the target."""
    reached: int = 0
    seeds: int = 0
    gradient_evaluations: float | None = None
    tuning: float = 0.0
    """Cost of choosing the lr, in baseline runs."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The bootstrap 95 % interval of the mean, 10,000 resamples with seed 0."""
    if not len(values) or not np.isfinite(values).all():
        return -math.inf, math.inf
    draws = np.random.default_rng(0).choice(np.array(values), (10_000, len(values))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def _by_seed(rows: Sequence[Row], method: str | None) -> dict[float | None, dict[int, float]]:
    """lr -> seed -> score of a method."""
    found: dict[float | None, dict[int, float]] = {}
    for row in rows:
        if row.method == method:
            found.setdefault(row.lr, {})[row.seed] = row.score
    return found


def _best_lr(rows: Sequence[Row], method: str) -> float | None:
    sign = -1 if any(row.higher for row in rows) else 1
    scores = _by_seed(rows, method)
    return min(scores, key=lambda lr: sign * mean(scores[lr].values()))


def summarise(
    rows: Sequence[Row],
    versus: str | None = None,
    *,
    target: float | None = None,
    tuning: Mapping[str, float] | None = None,
) -> list[Line]:
    """A line per method and lr. versus: the reference, at its best lr. target: None for the final
    values of its curves ± 5 %. tuning: baseline runs by method."""
    found: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        found.setdefault((row.method, row.lr), []).append(row)
    scores = {key: {row.seed: row.score for row in rs} for key, rs in found.items()}
    higher = any(row.higher for row in rows)
    best = None
    if versus is not None and any(row.method == versus for row in rows):
        best = versus, _best_lr(rows, versus)
    if target is None:
        target = _usual_target(found[best] if best is not None else rows, higher)
    lines = []
    for key, rs in found.items():
        apart = None
        if best is not None and key != best:
            # Pairs need a seed that both have: one may have failed or be missing yet.
            both = scores[key].keys() & scores[best].keys()
            differences = [scores[key][s] - scores[best][s] for s in sorted(both)]
            sound = bool(differences) and bool(np.isfinite(differences).all())
            lost = -math.inf if higher else math.inf
            apart = (mean(differences) if sound else lost, *interval(differences))
        steps = [s for row in rs if target is not None and (s := row.steps_to(target)) is not None]
        gradients = [row.gradient_evaluations for row in rs if row.gradient_evaluations is not None]
        lines.append(
            Line(
                *key,
                mean(scores[key].values()),
                interval(list(scores[key].values())),
                mean(row.cost for row in rs),
                apart,
                target,
                mean(steps) if steps else None,
                len(steps),
                len(rs),
                mean(gradients) if gradients else None,
                (tuning or {}).get(key[0], 0.0),
            )
        )
    return lines


def _usual_target(rows: Sequence[Row], higher: bool) -> float | None:
    ends = [end for row in rows if row.curve and (end := row.curve[-1][1]) is not None]
    return mean(ends) + (-0.05 if higher else 0.05) * abs(mean(ends)) if ends else None


def share_of_gain(rows: Sequence[Row], reference: str, oracle: str, name: str) -> str:
    """The share of the oracle's gain over the reference that a method has, as a sentence: of means
    over the seeds that all three have, each at its best lr; the interval resamples seeds."""
    sign = -1 if any(row.higher for row in rows) else 1
    names = (reference, oracle, name)
    known = {row.method for row in rows}
    scores = [_by_seed(rows, n)[_best_lr(rows, n)] if n in known else {} for n in names]
    seeds = sorted(set.intersection(*map(set, scores)))
    base, best, mine = (np.array([sign * found[s] for s in seeds]) for found in scores)
    if not len(seeds) or not np.isfinite([base, best, mine]).all():
        return f"{name}: no seed has finite losses of {reference}, {oracle} and {name}"
    gain, kept = base - best, base - mine
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
    """Per method, the lr with the best mean score, if it is finite, and the cost of all rows."""
    names = dict.fromkeys(row.method for row in rows)
    spent = {name: sum(row.cost for row in rows if row.method == name) for name in names}
    best = {name: _best_lr(rows, name) for name in names}
    ends = {name: mean(_by_seed(rows, name)[lr].values()) for name, lr in best.items()}
    found = {n: lr for n, lr in best.items() if lr is not None and math.isfinite(ends[n])}
    return found, spent


def table(lines: Sequence[Line]) -> Table:
    """Scores, intervals and paired differences, in 80 columns."""
    shown = _empty("method", "lr", "score", "95 %", "cost", "apart", "95 %")
    for line in lines:
        low, high = line.interval
        difference, *within = line.apart or (math.inf, -math.inf, math.inf)
        shown.add_row(
            line.method,
            "" if line.lr is None else f"{line.lr:g}",
            _number(line.score) if math.isfinite(line.score) else "diverges",
            f"{_number(low)}…{_number(high)}" if math.isfinite(high) else "",
            f"{line.cost:.2f}",
            _number(difference, "+") if math.isfinite(difference) else "",
            "…".join(_number(end, "+") for end in within) if math.isfinite(within[1]) else "",
        )
    return shown


def costs(lines: Sequence[Line]) -> Table:
    """Steps to the target, and costs of the run and of choosing its lr."""
    target = lines[0].target
    heading = "to target" if target is None else f"steps to {_number(target)}"
    shown = _empty("method", "lr", heading, "reached", "gradients", "cost", "tuning")
    for line in lines:
        gradients = line.gradient_evaluations
        shown.add_row(
            line.method,
            "" if line.lr is None else f"{line.lr:g}",
            "–" if line.steps is None else f"{line.steps:.0f}",
            f"{line.reached} of {line.seeds}",
            "" if gradients is None else f"{gradients:.0f}",
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


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if abs(value) < 10 else f"{value:{sign}.1f}"

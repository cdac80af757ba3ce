"""The charts of the report, as figures of plotly.js: plain data, thinned before it is embedded."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from rhc.report.records import CONTROLS, RunRecord, entry, means, number, stretches, thinned

INK = ("#0b5fa5", "#b45309", "#117733", "#9b2d77", "#5b5b00", "#374151", "#a61c1c", "#0f6674")
"""At least 4.5 to 1 on white, each."""
NIGHT = {
    **dict(zip(INK, ("#7cc0f5", "#f0a35c", "#5fd38d", "#e58bc5", "#d0cf62", "#cbd5e1", "#f28b82",
                     "#5cc8d8"), strict=True)),
    "#9db4c8": "#52708c", "#e5e7eb": "#374151", "#6b7280": "#9ca3af", "#1f2937": "#e5e7eb",
    "#ffffff": "#111827",
}  # fmt: skip
"""What stands for each colour of a chart on a dark page: the inks at least 4.5 to 1 on it."""
OUTCOMES = {
    "accepted": ("#117733", "circle"),
    "rejected": ("#b45309", "x"),
    "rewound": ("#a61c1c", "triangle-down"),
}
MOST_RUNS = 12
"""Runs whose own curves are drawn; more are in the means and the table."""
MOST_ATTEMPTS = 250
"""Of each outcome, in the chart of the windows: more are a wall, and take a second to draw."""
SWEEP = 25
"""Runs of the usual sweep, five learning rates by five momenta, that one run replaces."""


@dataclass(frozen=True)
class Chart:
    """A figure, its title, a sentence on what is to be seen, and the text that stands for it."""

    key: str
    title: str
    caption: str
    alternative: str
    figure: dict[str, Any]


def charts_of(runs: Sequence[RunRecord]) -> list[Chart]:
    """All charts that there are data for."""
    makers: list[Callable[[Sequence[RunRecord]], list[Chart]]] = [_losses]
    if len(runs) > 1:
        makers += [_over_seeds]
    makers += [_metrics, _controls, _objectives]
    if len(runs) == 1:
        makers += [_starts, _changes, _heat, _costates, _whole, _events]
    makers += [_cost]
    return [chart for make in makers for chart in make(runs)]


def groups_of(runs: Sequence[RunRecord]) -> list[tuple[str, list[RunRecord]]]:
    """Runs that differ in nothing but the seed, under a name each."""
    apart = ("seed", "directory", "versions", "hardware", "resume", "config", "data", "device")
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        key = repr(sorted((k, repr(v)) for k, v in run.config.items() if k not in apart))
        groups.setdefault(key, []).append(run)
    return [(f"{members[0].name}", members) for members in groups.values()]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The bootstrap 95 % interval of the mean; None for a single value."""
    if len(values) < 2:
        return None
    draws = np.random.default_rng(0).choice(np.asarray(values), (2000, len(values))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


# Charts -------------------------------------------------------------------------------------------


def _losses(runs: Sequence[RunRecord]) -> list[Chart]:
    traces, texts = [], []
    several = len(runs) > 1
    for i, run in enumerate(runs[:MOST_RUNS]):
        steps, losses = run.series("loss")
        prefix, ink = (f"{run.name} " if several else ""), _ink(i if several else 0)
        if losses:
            if not several:
                x, y = thinned(steps, losses)
                traces.append(_line(x, y, "train, each step", "#9db4c8", width=1))
            x, y = means(steps, losses, 200)
            traces.append(_line(x, y, f"{prefix}train" if several else "train, mean", ink))
            texts.append(f"{prefix}training loss from {y[0]:.4g} to {y[-1]:.4g}")
        x, y = thinned(*run.validation)
        if y:
            mine = _line(x, y, f"{prefix}validation", ink if several else _ink(2))
            traces.append({**mine, "line": {**mine["line"], "dash": "dash"}})
            texts.append(f"{prefix}validation loss from {y[0]:.4g} to {y[-1]:.4g}")
        judged = [
            (number(row["start"]), number(row.get("objective_after")))
            for row in run.kept
            if row["outcome"] == "accepted"
        ]
        points = [(a, b) for a, b in judged if a is not None and b is not None]
        if points and not several:
            x, y = thinned([p[0] for p in points], [p[1] for p in points])
            traces.append(_marks(x, y, "objective of a window", _ink(1), "circle-open"))
        for at, (name, label) in enumerate(
            (
                ("val_loss", "validation, end"),
                ("average_val_loss", "validation, averaged weights"),
                ("test_loss", "test, end"),
                ("average_test_loss", "test, averaged weights"),
            )
        ):
            value = number(run.result.get(name))
            if value is not None and not several:
                symbol = ("diamond", "diamond-open", "square", "square-open")[at]
                traces.append(_marks([run.steps], [value], label, _ink(2 + at // 2), symbol))
                texts.append(f"{label} {value:.4g}")
    positive = all(v > 0 for t in traces for v in t["y"])
    return _chart(
        "losses",
        "Losses",
        "Training loss of the committed steps; what the windows were judged by; and the loss of "
        "validation and test data at the end, of the last and of the averaged weights.",
        texts,
        traces,
        y="loss",
        log=positive,
    )


def _over_seeds(runs: Sequence[RunRecord]) -> list[Chart]:
    traces, texts = [], []
    for i, (name, members) in enumerate(groups_of(runs)):
        courses = [run.series("loss") for run in members]
        courses = [(steps, losses) for steps, losses in courses if len(steps) > 1]
        if len(courses) < 2:
            continue
        grid = np.linspace(0, min(steps[-1] for steps, _ in courses), 150)
        stacked = np.stack([np.interp(grid, *means(s, losses, 150)) for s, losses in courses])
        middle = stacked.mean(axis=0)
        draws = np.random.default_rng(0).integers(0, len(stacked), (400, len(stacked)))
        low, high = np.quantile(stacked[draws].mean(axis=1), [0.025, 0.975], axis=0)
        x = grid.tolist()
        traces += _band(x, low.tolist(), high.tolist(), f"{name}, 95 %", _ink(i))
        traces.append(_line(x, middle.tolist(), f"{name}, {len(courses)} seeds", _ink(i)))
        texts.append(f"{name}: mean training loss of {len(courses)} seeds ends at {middle[-1]:.4g}")
    return _chart(
        "seeds",
        "Mean over seeds",
        "Mean training loss of runs that differ in the seed alone, with the bootstrap 95 % "
        "interval of that mean.",
        texts,
        traces,
        y="loss",
        log=all(v > 0 for t in traces for v in t["y"]),
    )


def _metrics(runs: Sequence[RunRecord]) -> list[Chart]:
    charts = []
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    for at, name in enumerate(list(names)[:6]):
        traces, texts = [], []
        for i, run in enumerate(runs[:MOST_RUNS]):
            x, y = means(*run.series(name), 200)
            if y:
                traces.append(_line(x, y, run.name if len(runs) > 1 else name, _ink(i)))
                texts.append(f"{run.name}: {name} from {y[0]:.4g} to {y[-1]:.4g}")
        data = "validation data" if name.startswith("val_") else "the training batches"
        caption = f"On {data}, as means over stretches of the run."
        charts += _chart(f"metric-{at}", f"Metric: {name}", caption, texts, traces, y=name)
    return charts


def _controls(runs: Sequence[RunRecord]) -> list[Chart]:
    charts = []
    for name in CONTROLS:
        traces, texts = [], []
        for i, run in enumerate(runs[:MOST_RUNS]):
            steps, values = run.series(name)
            rewritten = name in (run.config.get("controls") or ())
            if not values or not (rewritten or min(values) != max(values)):
                continue
            if len(runs) == 1:
                traces += _rolled(run, name)
            groups = run.groups(name)
            if groups > 1 and len(runs) == 1:
                for group in range(min(groups, 8)):
                    own = [
                        (s, number(row[name][group]))
                        for s, row in zip(steps, run.tape, strict=False)
                        if isinstance(row.get(name), list) and len(row[name]) > group
                    ]
                    x, y = thinned(
                        [s for s, v in own if v is not None], [v for _, v in own if v is not None]
                    )
                    traces.append(_line(x, y, f"group {group}", _ink(group)))
            else:
                x, y = thinned(steps, values)
                traces.append(_line(x, y, run.name if len(runs) > 1 else "committed", _ink(i)))
            texts.append(
                f"{run.name}: {name} begins at {values[0]:.4g}, is at most {max(values):.4g} and "
                f"ends at {values[-1]:.4g}"
            )
        letter = {"lr": "α", "momentum": "μ", "noise": "σ", "weight_decay": "w"}[name]
        charts += _chart(
            f"control-{name}",
            f"Control: {name} ({letter})",
            "The values that the steps were taken with. The band of a window lies between its mean "
            "as it was rolled first and as it was rewritten: what hindsight changed."
            if len(runs) == 1
            else "The values that the steps were taken with.",
            texts,
            traces,
            y=name,
        )
    return charts


def _rolled(run: RunRecord, name: str) -> list[dict[str, Any]]:
    """A band per window from the mean that was rolled first to the mean that was committed."""
    first: dict[Any, float] = {}
    for row in run.windows:
        value = number(entry(row, "before", name))
        if value is not None:
            first.setdefault(row["start"], value)
    kept = [row for row in run.kept if row["outcome"] == "accepted" and row["start"] in first][
        -400:
    ]
    x: list[float | None] = []
    rolled: list[float | None] = []
    band: list[float | None] = []
    for row in kept:
        after = number(entry(row, "after", name))
        start, stop = number(row["start"]), number(row.get("stop"))
        if after is None or start is None or stop is None:
            continue
        before = first[row["start"]]
        x += [start, stop, stop, start, start, None]
        band += [before, before, after, after, before, None]
        rolled += [before, before, None, None, None, None]
    if not x:
        return []
    return [
        {
            **_line(x, band, "changed by hindsight", "#b45309", width=0),
            "fill": "toself",
            "fillcolor": "rgba(180,83,9,0.28)",
        },
        {
            **_line(x, rolled, "as rolled first", "#b45309"),
            "line": {"color": "#b45309", "width": 2, "dash": "dot"},
        },
    ]


def _telling(
    rows: Sequence[tuple[float | None, float | None, float | None, dict[str, Any]]],
) -> list[tuple[float | None, float | None, float | None, dict[str, Any]]]:
    """At most MOST_ATTEMPTS attempts: of every stretch the one that moved J furthest."""
    return [
        max(rows[start:stop], key=lambda row: abs((row[1] or 0.0) - (row[2] or 0.0)))
        for start, stop in stretches(len(rows), MOST_ATTEMPTS)
    ]


def _objectives(runs: Sequence[RunRecord]) -> list[Chart]:
    traces, counts, left_out = [], [], False
    for i, run in enumerate(runs[:MOST_RUNS]):
        rows = [
            (number(row["start"]), number(row.get("objective_before")),
             number(row.get("objective_after")), row)
            for row in run.windows
        ]  # fmt: skip
        for outcome, (ink, symbol) in OUTCOMES.items():
            all_of_it = [row for row in rows if row[3]["outcome"] == outcome]
            of_it = _telling(all_of_it)
            left_out |= len(of_it) < len(all_of_it)
            x, y, arrows_x, arrows_y, hover = [], [], [], [], []
            for start, before, after, row in of_it:
                end = before if after is None else after
                if start is None or end is None:
                    continue
                # Attempts at one window stand side by side.
                place = start + 2 * (number(row.get("attempt")) or 0)
                x.append(place)
                y.append(end)
                hover.append(html.escape(str(row.get("reason") or outcome)))
                arrows_x += [place, place, None]
                arrows_y += [before, end, None]
            if not of_it:
                continue
            counts.append(f"{run.name}: {len(all_of_it)} {outcome}")
            if not x:
                continue
            ink = ink if len(runs) == 1 else _ink(i)
            prefix = f"{run.name} " if len(runs) > 1 else ""
            traces.append(
                {**_line(arrows_x, arrows_y, "", ink), "showlegend": False, "hoverinfo": "skip"}
            )
            traces.append({**_marks(x, y, f"{prefix}{outcome}", ink, symbol), "text": hover})
    return _chart(
        "objectives",
        "Windows: J before and after",
        "One line per attempt at a window, from the objective as rolled to the objective as "
        "replayed with the rewritten schedule, which the mark shows."
        + (
            f" Of each outcome {MOST_ATTEMPTS} are drawn, those that moved J furthest."
            if left_out
            else ""
        ),
        counts,
        traces,
        y="objective J",
    )


def _starts(runs: Sequence[RunRecord]) -> list[Chart]:
    run = runs[0]
    traces: list[dict[str, Any]] = []
    texts, points = [], []
    for row in run.starts:
        lr = number(row.get("from"))
        course = row.get("course")
        value = number(row.get("loss"))
        if row.get("kind") != "probe" or lr is None:
            continue
        if value is not None:
            points.append((lr, value, number(row.get("steps")) or 0))
        if isinstance(course, list):
            found = [(i, number(v)) for i, v in enumerate(course)]
            xs, ys = [i for i, v in found if v is not None], [v for _, v in found if v is not None]
            x, y = thinned(xs, ys, 300)
            if y:
                traces.append(_line(x, y, f"lr {lr:.3g}", _ink(len(traces))))
    best = min(points, key=lambda p: (-p[2], p[1]), default=None)
    if best is not None:
        texts.append(f"{len(points)} rolls, the best of the longest at lr {best[0]:.3g}")
    ending = [_marks([p[0] for p in points], [p[1] for p in points], "a roll", _ink(0), "circle")]
    if points:
        ending[0]["text"] = [f"{p[2]:g} steps" for p in points]
        ending[0]["marker"]["size"] = [8 + 10 * p[2] / max(q[2] for q in points) for p in points]
    charts = _chart(
        "starts",
        "The start: what was tried",
        "Loss that short rolls end with by their lr; longer rolls have larger marks.",
        texts,
        ending if points else [],
        x="lr",
        y="loss",
        log=all(p[1] > 0 for p in points),
        log_x=all(p[0] > 0 for p in points),
    )
    return charts + _chart(
        "courses", "The start: courses of the rolls", "Training loss of every roll.", texts,
        traces, y="loss", log=all(v > 0 for t in traces for v in t["y"]),
    )  # fmt: skip


def _changes(runs: Sequence[RunRecord]) -> list[Chart]:
    run = runs[0]
    name = next((n for n in ("reward", *run.metrics) if run.series(n)[0]), None)
    rows = [(number(r.get("loss")), number(r.get(name)), number(r.get("step"))) for r in run.tape
            if name is not None]  # fmt: skip
    whole = [(a, b, c) for a, b, c in rows if a is not None and b is not None and c is not None]
    size = max(1, len(whole) // 60)
    parts = [whole[i : i + size] for i in range(0, len(whole), size)]
    at = [tuple(sum(p[k] for p in part) / len(part) for k in range(3)) for part in parts]
    pairs = [(b[0] - a[0], b[1] - a[1], b[2]) for a, b in pairwise(at)]
    if not pairs:
        return []
    agree = sum(dl * dr < 0 for dl, dr, _ in pairs)
    trace = _marks([p[0] for p in pairs], [p[1] for p in pairs], "stretch", _ink(0), "circle")
    trace["marker"] |= {"color": [p[2] for p in pairs], "colorscale": "Viridis", "showscale": True,
                        "colorbar": {"title": {"text": "step"}, "thickness": 10},
                        "line": {"color": "#6b7280", "width": 1}}  # fmt: skip
    return _chart(
        "changes",
        f"Δr against Δℓ: {name} against loss",
        f"Change of the mean {name} and of the mean loss from one stretch of {size} steps to the "
        "next. Where the loss stands for what is wanted, the marks lie up left or down right.",
        [f"{agree} of {len(pairs)} changes have opposite signs"],
        [trace],
        x="Δℓ, change of the loss",
        y=f"Δr, change of {name}",
    )


def _heat(runs: Sequence[RunRecord]) -> list[Chart]:
    run = runs[0]
    kept = [row for row in run.kept if isinstance(row.get("hypergradient"), dict)]
    names = list(dict.fromkeys(n for row in kept for n in row["hypergradient"]))[:16]
    if not names:
        return []
    columns: dict[str, list[float | None]] = {name: [] for name in names}
    steps: list[float] = []
    pieces = max(1, min(50, 1000 // len(kept)))
    every = max(1, len(kept) // 1000)
    for row in kept[::every]:
        length = max(len(v) for v in row["hypergradient"].values() if isinstance(v, list))
        count = min(pieces, length)
        start = number(row["start"]) or 0.0
        for i in range(count):
            steps.append(start + length * i // count)
            for name in names:
                values = row["hypergradient"].get(name)
                part = values[length * i // count : length * (i + 1) // count] if isinstance(
                    values, list) else []  # fmt: skip
                found = [v for v in map(number, part) if v is not None]
                columns[name].append(sum(found) / len(found) if found else None)
    scaled: list[list[float | None]] = []
    for name in names:
        largest = max((abs(v) for v in columns[name] if v is not None), default=0.0) or 1.0
        scaled.append([None if v is None else round(v / largest, 4) for v in columns[name]])
    trace = {
        "type": "heatmap", "x": steps, "y": [_safe(n) for n in names], "z": scaled, "zmid": 0,
        "zmin": -1, "zmax": 1, "colorscale": "RdBu",
        "colorbar": {"thickness": 10, "title": {"text": "dJ/du"}},
    }  # fmt: skip
    pushed = ", ".join(
        f"{name} by {sum((v or 0) < 0 for v in columns[name])} of {len(columns[name])} places up"
        for name in names
    )
    return _chart(
        "heat",
        "Hypergradient",
        "dJ by each control at each step of the windows that were looked back on, relative to the "
        "largest of its control: negative (blue) means that more of it would have lowered J.",
        [pushed],
        [trace],
        y="",
    )


def _costates(runs: Sequence[RunRecord]) -> list[Chart]:
    run = runs[0]
    steps, norms = [], []
    for row in run.kept:
        values, start = row.get("costate_norms"), number(row["start"])
        for i, value in enumerate(values if isinstance(values, list) else []):
            norm = number(value)
            if norm is not None and start is not None:
                steps.append(start + i)
                norms.append(norm)
    if not norms:
        return []
    x, y = thinned(steps, norms)
    return _chart(
        "costates",
        "Costate norms",
        "‖λ‖ along the windows that were looked back on: how much J at the window's end still "
        "depends on the weights of a step. Growth backwards means that a small change explodes.",
        [f"between {min(norms):.3g} and {max(norms):.3g}"],
        [_marks(x, y, "‖λ‖", _ink(0), "circle")],
        y="‖λ‖",
        log=min(norms) > 0,
    )


def _whole(runs: Sequence[RunRecord]) -> list[Chart]:
    """What `rhc hypergradient` found: the run as one window."""
    found = runs[0].whole
    start = number(found.get("start")) or 0.0
    traces, texts = [], []
    values: dict[str, Any] = {"‖λ‖": found.get("costate_norms")}
    grad = found.get("raw_grad")
    for name, row in grad.items() if isinstance(grad, dict) else ():
        values[f"|dJ/d{name}|, in its coordinate"] = row
    for at, (name, row) in enumerate(values.items()):
        points = [
            (start + i, abs(v))
            for i, value in enumerate(row if isinstance(row, list) else [])
            if (v := number(value)) is not None and v != 0
        ]
        if points:
            x, y = thinned([p[0] for p in points], [p[1] for p in points])
            traces.append(_line(x, y, name, _ink(at), width=2 if at == 0 else 1))
            texts.append(f"{name} between {min(y):.3g} and {max(y):.3g}")
    return _chart(
        "whole",
        "The whole run looked back at",
        "dJ/ds and dJ/du of every step, from rhc hypergradient, J the loss at the end of the run: "
        "where the schedule still had something to gain.",
        texts,
        traces,
        y="norm, absolute value",
        log=True,
    )


def _events(runs: Sequence[RunRecord]) -> list[Chart]:
    events = runs[0].events[:500]
    kinds = list(dict.fromkeys(kind for _, kind, _ in events))
    traces = []
    for i, kind in enumerate(kinds):
        of_it = [e for e in events if e[1] == kind]
        trace = _marks([e[0] for e in of_it], [_safe(kind)] * len(of_it), kind, _ink(i), "diamond")
        traces.append({**trace, "text": [html.escape(e[2]) for e in of_it]})
    return _chart(
        "events", "Events", "Where a guard, a drift or a plateau changed the plan, and why.",
        [f"step {s}: {k}" for s, k, _ in events[:10]], traces, y="",
    )  # fmt: skip


def _cost(runs: Sequence[RunRecord]) -> list[Chart]:
    names, start, rest, texts = [], [], [], []
    for run in runs:
        cost = number(entry(run.result, "cost", "plain_run_equivalents"))
        if cost is None or not run.steps:
            continue
        tried = sum(number(row.get("gradients")) or 0.0 for row in run.starts) / run.steps
        tried = min(tried, cost)
        names.append(run.name if len(runs) > 1 else "this run")
        start.append(tried)
        rest.append(cost - tried)
        texts.append(f"{run.name} cost {cost:.2f} plain runs")
    if not names:
        return []
    names += ["plain training", f"a sweep of {SWEEP} runs"]
    bars = [
        ("training and windows", [*rest, 1, SWEEP], _ink(0), ""),
        ("search for the start", [*start, 0, 0], _ink(1), "/"),
    ]
    traces = [
        {"type": "bar", "orientation": "h", "name": name, "y": [_safe(n) for n in names],
         "x": values, "marker": {"color": ink, "pattern": {"shape": shape}}}
        for name, values, ink, shape in bars
    ]  # fmt: skip
    charts = _chart(
        "cost",
        "Cost",
        f"In plain training runs: all gradients that were computed over those of plain training, "
        f"beside the sweep of {SWEEP} that it replaces.",
        [*texts, f"plain training 1, a sweep {SWEEP}"],
        traces,
        x="plain runs",
        y="",
    )
    charts[0].figure["layout"]["barmode"] = "stack"
    charts[0].figure["layout"]["yaxis"]["autorange"] = "reversed"
    return charts


# Figures ------------------------------------------------------------------------------------------


def _chart(
    key: str,
    title: str,
    caption: str,
    texts: Sequence[str],
    traces: list[dict[str, Any]],
    *,
    x: str = "step",
    y: str,
    log: bool = False,
    log_x: bool = False,
) -> list[Chart]:
    """The chart, or none where there is nothing to draw."""
    if not traces:
        return []
    axis = {"automargin": True, "gridcolor": "#e5e7eb", "linecolor": "#6b7280", "zeroline": False}
    layout = {
        "margin": {"l": 48, "r": 12, "t": 12, "b": 44},
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1f2937"},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        "showlegend": 1 < len(traces) <= 2 * MOST_RUNS,
        "hovermode": "closest",
        "xaxis": {**axis, "title": {"text": _safe(x)}, "type": "log" if log_x else "-"},
        "yaxis": {**axis, "title": {"text": _safe(y)}, "type": "log" if log else "-"},
    }
    alternative = f"{title}. {'; '.join(texts[:12])}."
    return [Chart(key, title, caption, alternative, {"data": traces, "layout": layout})]


def _line(
    x: Sequence[float | None], y: Sequence[float | None], name: str, ink: str, width: int = 2
) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines", "x": _short(x), "y": _short(y),
            "name": _safe(name), "line": {"color": ink, "width": width}}  # fmt: skip


def _marks(
    x: Sequence[float], y: Sequence[Any], name: str, ink: str, symbol: str
) -> dict[str, Any]:
    return {"type": "scatter", "mode": "markers", "x": _short(x), "y": _short(y),
            "name": _safe(name), "marker": {"color": ink, "symbol": symbol, "size": 8}}  # fmt: skip


def _band(
    x: list[float], low: list[float], high: list[float], name: str, ink: str
) -> list[dict[str, Any]]:
    red, green, blue = (int(ink[i : i + 2], 16) for i in (1, 3, 5))
    return [
        {**_line(x + x[::-1], high + low[::-1], name, ink, width=0), "fill": "toself",
         "fillcolor": f"rgba({red},{green},{blue},0.2)", "hoverinfo": "skip"}
    ]  # fmt: skip


def _short(values: Sequence[Any]) -> list[Any]:
    return [float(f"{v:.6g}") if isinstance(v, float) else v for v in values]


def _safe(text: str) -> str:
    """Text for plotly.js, which takes some HTML in names and titles for markup."""
    return html.escape(text)


def _ink(i: int) -> str:
    return INK[i % len(INK)]

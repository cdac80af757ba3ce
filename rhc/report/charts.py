"""The charts of the report, as plotly.js figures of thinned data.

To add one, write a function under `@chart`, `@chart_of_each` or `@chart_of_one`; traces without
points, and charts without traces, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rhc.report import why
from rhc.report.figure import GREY, INK, PALE, RIGHT, Chart, Trace, area, line, marks
from rhc.report.gallery import (
    PARTS,
    chart,
    chart_of_each,
    chart_of_one,
    charts_of,
    colour,
    drawn,
    groups_of,
    parts_of,
)
from rhc.report.records import (
    CONTROLS,
    RunRecord,
    entry,
    finite_pairs,
    means,
    number,
    stretches,
    thinned,
)
from rhc.report.signals import signals_of

OUTCOMES = {
    "accepted": ("#117733", "circle"),
    "rejected": ("#b45309", "x"),
    "rewound": ("#a61c1c", "triangle-down"),
}
MEANS = 100
"""Stretches whose means are drawn where the course matters, not the noise."""
MOST_ATTEMPTS = 250
"""Attempts drawn per outcome: more are illegible, and slow."""

__all__ = ["OUTCOMES", "PARTS", "charts_of", "groups_of", "parts_of"]

# All runs -----------------------------------------------------------------------------------------


@chart
def _losses(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    one = len(runs) == 1
    traces = []
    for i, run in enumerate(drawn(runs)):
        prefix, ink = "" if one else f"{run.name} ", colour(i)
        steps, losses = run.series("loss")
        validation = thinned(*run.series("val_loss"))
        if one:
            traces.append(line(thinned(steps, losses), "train, each step", PALE, width=1))
        traces += [
            line(means(steps, losses, 200), "train, mean" if one else f"{prefix}train", ink),
            line(validation, f"{prefix}validation", INK[2] if one else ink, dash="dash"),
        ]
    yield Chart(
        "losses",
        "Losses",
        "Training loss of the committed steps, the objective that windows were judged by, and the "
        "losses of the final, the averaged and the best validated weights on held-out data.",
        traces + (_final_losses(runs[0]) if one else []),
        y="loss",
        log="y",
    )


def _final_losses(run: RunRecord) -> list[Trace]:
    accepted = [row for row in run.kept if row["outcome"] == "accepted"]
    judged = finite_pairs((float(r["start"]), number(r["objective_after"])) for r in accepted)
    traces = [marks(thinned(*judged), "objective of a window", INK[1], "circle-open")]
    best = number(run.result.get("best_step"))
    for name, label, ink, symbol in (
        ("val_loss", "validation, end", INK[2], "diamond"),
        ("average_val_loss", "validation, averaged weights", INK[2], "diamond-open"),
        ("best_val_loss", "validation, best state", INK[2], "star"),
        ("test_loss", "test, end", INK[3], "square"),
        ("average_test_loss", "test, averaged weights", INK[3], "square-open"),
        ("best_test_loss", "test, best state", INK[3], "star"),
    ):
        at = best if name.startswith("best_") and best is not None else run.steps
        point = finite_pairs([(at, number(run.result.get(name)))])
        traces.append(marks(point, label, ink, symbol))
    return traces


@chart_of_each
def _overlay(run: RunRecord) -> Iterator[Chart]:
    traces = [line(means(*run.series("loss"), MEANS), "loss", INK[0])]
    hidden = {"overlaying": "y", "visible": False}
    layout: dict[str, Any] = {}
    # What a workload is judged by, rather than the score that a scheduler is given for it.
    reward = next((n for n in (str(run.config.get("reward")), run.reward) if run.series(n)[0]), "")
    if reward:
        rewards = means(*run.series(reward), MEANS)
        traces.append(line(rewards, reward, INK[2]) | {"yaxis": "y2"})
        layout["yaxis2"] = RIGHT | {"title": {"text": reward}}
    for at, (name, ink, dash) in enumerate(
        (("lr", INK[1], "solid"), ("momentum", INK[3], "dash"), ("noise", INK[7], "dot")), 3
    ):
        steps, values = thinned(*run.series(name), 600)
        if not any(values):
            continue
        low, high = min(values), max(values)
        ends = dict.fromkeys((f"{low:.3g}", f"{high:.3g}"))
        label = f"{name} {' to '.join(ends)}"
        traces.append(line((steps, values), label, ink, width=1, dash=dash) | {"yaxis": f"y{at}"})
        layout[f"yaxis{at}"] = hidden | {"type": "log" if name == "lr" and low > 0 else "linear"}
    yield Chart(
        "overlay",
        "Loss, reward and controls over time",
        "Means of the loss (left axis) and of the reward (right axis, where there is one). lr, "
        "momentum and noise lie over them, each scaled to the range that the legend names.",
        traces,
        y="loss",
        log="y",
        layout=layout,
    )


@chart_of_each
def _changes(run: RunRecord) -> Iterator[Chart]:
    signals = signals_of(run)
    bar = {"title": {"text": "step"}, "thickness": 10}
    outline = {"color": GREY, "width": 1}
    style = {"colorscale": "Viridis", "showscale": True, "colorbar": bar, "line": outline}
    points = (signals.loss, signals.reward)
    agree = sum(a * b < 0 for a, b in zip(*points, strict=True))
    axis = {"range": [-1.08, 1.08], "zeroline": True, "zerolinecolor": GREY}
    yield Chart(
        "changes",
        "Reward trend against loss trend: Δr against Δℓ",
        f"One mark per update, coloured by time, {signals.origin}. Both trends lie in [−1, 1] and "
        f"are positive when rising; {signals.of_reward}. Top left: both improve.",
        [marks(points, "an update", INK[0]) | {"marker": style | {"color": signals.steps}}],
        x="Δℓ, trend of the loss",
        y="Δr, trend of the reward",
        says=f"{agree} of {len(signals.loss)} updates have opposite signs",
        layout={"xaxis": axis, "yaxis": axis},
    )


@chart_of_each
def _plateaus(run: RunRecord) -> Iterator[Chart]:
    signals = signals_of(run)
    x: list[float | None] = []
    y: list[float | None] = []
    for start, stop in signals.plateaus:
        x += [start, start, stop, stop, start, None]
        y += [0.0, 1.0, 1.0, 0.0, 0.0, None]
    share = sum(stop - start for start, stop in signals.plateaus) / max(1, len(run.tape))
    yield Chart(
        "plateaus",
        "Plateaus over time",
        f"The plateau score P (right axis), {signals.origin}, over the mean of the loss (left "
        "axis). Bands mark the steps at which P > ½.",
        [
            area((x, y), "P > ½", INK[1]) | {"yaxis": "y2"},
            line(means(*run.series("loss"), MEANS), "loss", INK[0]),
            line((signals.steps, signals.plateau), "P", INK[1], width=1) | {"yaxis": "y2"},
        ],
        y="loss",
        log="y",
        says=f"P exceeds ½ for {share:.0%} of the steps, in {len(signals.plateaus)} stretches",
        layout={"yaxis2": RIGHT | {"title": {"text": "P"}, "range": [0, 1]}},
    )


@chart
def _over_seeds(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    traces = []
    for i, (name, members) in enumerate(groups_of(runs)):
        curves = [curve for run in members if len((curve := run.series("loss"))[0]) > 1]
        if len(curves) < 2:
            continue
        grid = np.linspace(0, min(steps[-1] for steps, _ in curves), 150)
        stacked = np.stack([np.interp(grid, *means(s, losses, 150)) for s, losses in curves])
        draws = np.random.default_rng(0).integers(0, len(stacked), (400, len(stacked)))
        low, high = np.quantile(stacked[draws].mean(axis=1), [0.025, 0.975], axis=0).tolist()
        x = grid.tolist()
        around = (x + x[::-1], high + low[::-1])
        middle = (x, stacked.mean(axis=0).tolist())
        traces += [
            area(around, f"{name}, 95 %", colour(i), 0.2),
            line(middle, f"{name}, {len(curves)} seeds", colour(i)),
        ]
    yield Chart(
        "seeds",
        "Mean over seeds",
        "Mean training loss of runs that differ in the seed alone, with the bootstrap 95 % "
        "interval of that mean.",
        traces,
        y="loss",
        log="y",
    )


@chart
def _metrics(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    for at, name in enumerate(list(names)[:6]):
        data = "validation data" if name.startswith("val_") else "the training batches"
        curves = [
            line(means(*run.series(name), 200), run.name if len(runs) > 1 else name, colour(i))
            for i, run in enumerate(drawn(runs))
        ]
        caption = f"On {data}, as means over stretches of the run."
        yield Chart(f"metric-{at}", f"Metric: {name}", caption, curves, y=name)


@chart
def _controls(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    one = len(runs) == 1
    caption = "The values that steps were taken with."
    if one:
        caption += (
            " A window's band lies between its mean in the first roll and its mean after "
            "rewriting: what hindsight changed."
        )
    for name, letter in zip(CONTROLS, "αμσw", strict=True):
        traces: list[Trace] = []
        moves = False
        for i, run in enumerate(drawn(runs)):
            steps, values = run.series(name)
            if not values:
                continue
            moves |= name in run.controls or max(values) - min(values) > 1e-6 * max(values)
            traces += _rewritten(run, name) if one else []
            groups = run.groups(name) if one else 1
            if groups == 1:
                traces.append(
                    line(thinned(steps, values), "committed" if one else run.name, colour(i))
                )
                continue
            own = [(float(r["step"]), r[name]) for r in run.tape if isinstance(r.get(name), list)]
            for group in range(min(groups, 8)):
                of_it = ((step, number(v[group])) for step, v in own if len(v) > group)
                traces.append(line(thinned(*finite_pairs(of_it)), f"group {group}", colour(group)))
        if moves:
            yield Chart(f"control-{name}", f"Control: {name} ({letter})", caption, traces, y=name)


def _rewritten(run: RunRecord, name: str) -> list[Trace]:
    """A band per window between its first and its committed mean."""
    first: dict[int, float] = {}
    for row in run.windows:
        value = number(entry(row, "before", name))
        if value is not None:
            first.setdefault(row["start"], value)
    kept = [row for row in run.kept if row["outcome"] == "accepted" and row["start"] in first]
    x: list[float | None] = []
    band: list[float | None] = []
    rolled: list[float | None] = []
    for row in kept[-400:]:
        before, after = first[row["start"]], number(entry(row, "after", name))
        if after is None:
            continue
        start, stop = float(row["start"]), float(row["stop"])
        x += [start, stop, stop, start, start, None]
        band += [before, before, after, after, before, None]
        rolled += [before, before, None, None, None, None]
    return [
        area((x, band), "changed by hindsight", INK[1], 0.28),
        line((x, rolled), "in the first roll", INK[1], dash="dot"),
    ]


@chart
def _objectives(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    one = len(runs) == 1
    traces, counts, thin = [], [], False
    for i, run in enumerate(drawn(runs)):
        for outcome, (ink, symbol) in OUTCOMES.items():
            rows = [row for row in run.windows if row["outcome"] == outcome]
            if rows:
                counts.append(f"{run.name}: {len(rows)} {outcome}")
            thin |= len(rows) > MOST_ATTEMPTS
            parts = (rows[a:b] for a, b in stretches(len(rows), MOST_ATTEMPTS))
            shown = [found for part in parts if (found := _attempt(max(part, key=_moved)))]
            x = [step for place, *_ in shown for step in (place, place, None)]
            y = [value for _, before, after, _ in shown for value in (before, after, None)]
            ends = ([place for place, *_ in shown], [after for _, _, after, _ in shown])
            ink, name = (ink, outcome) if one else (colour(i), f"{run.name} {outcome}")
            reasons = [reason for *_, reason in shown]
            traces += [
                line((x, y), "", ink) | {"showlegend": False, "hoverinfo": "skip"},
                marks(ends, name, ink, symbol) | {"text": reasons},
            ]
    few = f" Of each outcome {MOST_ATTEMPTS} are drawn, those that moved J furthest."
    yield Chart(
        "objectives",
        "Windows: J before and after",
        "One line per attempt at a window: from the objective of the roll to that of the replay "
        f"with the rewritten schedule, where the mark is.{few if thin else ''}",
        traces,
        y="objective J",
        says="; ".join(counts[:12]),
    )


def _attempt(row: Mapping[str, Any]) -> tuple[float, float | None, float, str | None] | None:
    """(place, J before, J after or before, what happened, in words); None without J."""
    before, after = number(row.get("objective_before")), number(row.get("objective_after"))
    end = before if after is None else after
    # Attempts at one window stand side by side.
    place = float(row["start"]) + 2 * (number(row.get("attempt")) or 0)
    return None if end is None else (place, before, end, why.attempt(row))


def _moved(row: Mapping[str, Any]) -> float:
    return abs((row.get("objective_before") or 0.0) - (row.get("objective_after") or 0.0))


# One run ------------------------------------------------------------------------------------------


@chart_of_one
def _starts(run: RunRecord) -> Iterator[Chart]:
    points: list[tuple[float, float, float]] = []
    curves: list[Trace] = []
    for row in run.starts:
        lr, loss, course = number(row.get("from")), number(row.get("loss")), row.get("course")
        if row.get("kind") != "probe" or lr is None:
            continue
        if loss is not None:
            points.append((lr, loss, number(row.get("steps")) or 0))
        if isinstance(course, list):
            curve = thinned(*finite_pairs((i, number(v)) for i, v in enumerate(course)), 300)
            curves.append(line(curve, f"lr {lr:.3g}", colour(len(curves))))
    if not points:
        return
    lrs, losses, steps = (list(column) for column in zip(*points, strict=True))
    best = min(points, key=lambda point: (-point[2], point[1]))
    says = f"{len(points)} rolls, the best of the longest at lr {best[0]:.3g}"
    sizes = [8 + 10 * count / max(steps) for count in steps]
    rolls = marks((lrs, losses), "a roll", INK[0], size=sizes)
    yield Chart(
        "starts",
        "Search for lr: final losses",
        "Loss at the end of short rolls by their lr; longer rolls have larger marks.",
        [rolls | {"text": [f"{count:g} steps" for count in steps]}],
        x="lr",
        y="loss",
        log="xy",
        says=says,
    )
    title, caption = "Search for lr: losses of the rolls", "Training loss of every roll."
    yield Chart("courses", title, caption, curves, y="loss", log="y", says=says)


@chart_of_one
def _heat(run: RunRecord) -> Iterator[Chart]:
    kept = [row for row in run.kept if isinstance(row.get("hypergradient"), dict)]
    names = list(dict.fromkeys(n for row in kept for n in row["hypergradient"]))[:16]
    if not names:
        return
    columns: dict[str, list[float | None]] = {name: [] for name in names}
    steps: list[float] = []
    pieces = max(1, min(50, 1000 // len(kept)))
    for row in kept[:: max(1, len(kept) // 1000)]:
        lists = {n: v for n, v in row["hypergradient"].items() if isinstance(v, list)}
        length = max(map(len, lists.values()), default=0)
        for start, stop in stretches(length, pieces):
            steps.append(float(row["start"] + start))
            for name in names:
                columns[name].append(number(lists.get(name, [])[start:stop]))
    scaled, pushed = [], []
    for name, values in columns.items():
        largest = max((abs(v) for v in values if v is not None), default=0.0) or 1.0
        scaled.append([None if v is None else v / largest for v in values])
        up = sum((v or 0) < 0 for v in values)
        pushed.append(f"{name} by {up} of {len(values)} places up")
    heat = {"type": "heatmap", "x": steps, "y": names, "z": scaled, "zmid": 0, "zmin": -1,
            "zmax": 1, "colorscale": "RdBu",
            "colorbar": {"thickness": 10, "title": {"text": "dJ/du"}}}  # fmt: skip
    yield Chart(
        "heat",
        "Hypergradient",
        "dJ/du of each control at each step of the windows that were differentiated, relative to "
        "the control's largest. Negative (blue): a higher value would have lowered J.",
        [heat],
        says=", ".join(pushed),
    )


@chart_of_one
def _costates(run: RunRecord) -> Iterator[Chart]:
    steps, norms = finite_pairs(
        (float(row["start"] + i), number(value))
        for row in run.kept
        if isinstance(row.get("costate_norms"), list)
        for i, value in enumerate(row["costate_norms"])
    )
    says = f"‖λ‖ between {min(norms):.3g} and {max(norms):.3g}" if norms else ""
    yield Chart(
        "costates",
        "Costate norms",
        "‖λ‖ along the windows that were differentiated: how strongly J at the window's end "
        "depends on the weights at a step. Growth backwards in time means that small changes "
        "explode.",
        [marks(thinned(steps, norms), "‖λ‖", INK[0])],
        y="‖λ‖",
        log="y",
        says=says,
    )


@chart_of_one
def _passes(run: RunRecord) -> Iterator[Chart]:
    traces = []
    for at, row in enumerate(run.passes):
        kept = row.get("kept") is True
        curves = [("before", "before any pass", PALE)] if at == 0 else []
        name = f"pass {row.get('pass')}, {'kept' if kept else 'not kept'}"
        for key, label, ink in [*curves, ("after", name, colour(at))]:
            course = entry(row, key, "lr")
            points = course if isinstance(course, list) else []
            pairs = ((number(p[0]), number(p[1])) for p in points if isinstance(p, list))
            style = {"line": {"color": ink, "width": 2, "dash": "solid" if kept else "dot"}}
            traces.append(line(finite_pairs(pairs), label, ink) | (style if key == "after" else {}))
    yield Chart(
        "passes",
        "Passes over the whole run",
        "lr of every replay of the whole run: kept where the loss on held-out rows fell that the "
        "hypergradient had not seen.",
        traces,
        y="lr",
        log="y",
        says="; ".join(
            f"pass {row.get('pass')}: held-out loss {row.get('held_out_before'):.4g} to "
            f"{row.get('held_out_after'):.4g}"
            for row in run.passes
            if number(row.get("held_out_before")) is not None
            and number(row.get("held_out_after")) is not None
        ),
    )


@chart_of_one
def _weights(run: RunRecord) -> Iterator[Chart]:
    found = run.result.get("data_weights") or {}
    quantiles = found.get("quantiles") or []
    pairs = ((i / (len(quantiles) - 1), number(w)) for i, w in enumerate(quantiles))
    says = "Weights at the end, from the lowest cell to the highest; their mean is 1."
    curve = [line(finite_pairs(pairs), "weight", INK[0])]
    yield Chart("weights", "Data weights", says, curve, "weight", "share of the cells", "y")
    since, rows = found.get("since") or [], found.get("course") or [[]]
    yield Chart(
        "weights-course",
        "The course of the data weights",
        "What was learned from, step by step; a replay follows it.",
        [
            line(finite_pairs(zip(since, map(number, values), strict=False)), str(name), colour(c))
            for c, (name, *values) in enumerate(
                zip(found.get("names") or range(len(rows[0])), *rows, strict=False)
            )
        ],
        y="weight",
        log="y",
    )


@chart_of_one
def _whole(run: RunRecord) -> Iterator[Chart]:
    """The result of `rhc hypergradient`: the run as one window."""
    start = number(run.whole.get("start")) or 0.0
    rows: dict[str, Any] = {"‖λ‖": run.whole.get("costate_norms")}
    grad = run.whole.get("raw_grad")
    for name, row in grad.items() if isinstance(grad, dict) else ():
        rows[f"|dJ/d{name}|, in its coordinate"] = row
    traces = []
    for at, (name, row) in enumerate(rows.items()):
        values = map(number, row if isinstance(row, list) else [])
        sizes = ((start + i, abs(v) if v else None) for i, v in enumerate(values))
        traces.append(line(thinned(*finite_pairs(sizes)), name, colour(at), width=1 if at else 2))
    yield Chart(
        "whole",
        "The whole run differentiated",
        "dJ/ds and dJ/du of every step, from rhc hypergradient, with J the loss at the end of the "
        "run: where the schedule could still be improved.",
        traces,
        y="norm, absolute value",
        log="y",
    )


@chart_of_one
def _events(run: RunRecord) -> Iterator[Chart]:
    events = run.events[:500]
    traces = []
    for i, kind in enumerate(dict.fromkeys(kind for _, kind, _ in events)):
        of_it = [(step, reason) for step, each, reason in events if each == kind]
        place = [step for step, _ in of_it], [kind] * len(of_it)
        reasons = {"text": [reason for _, reason in of_it]}
        traces.append(marks(place, kind, colour(i), "diamond") | reasons)
    caption = "Where a guard, a drift or a plateau changed the plan, and why."
    says = "; ".join(f"step {step}: {kind}" for step, kind, _ in events[:10])
    yield Chart("events", "Events", caption, traces, says=says)


@chart
def _cost(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    costs, says = [], []
    for run in runs:
        cost = number(entry(run.result, "cost", "plain_run_equivalents"))
        if cost is not None and run.steps:
            tried = sum(number(row.get("gradients")) or 0.0 for row in run.starts) / run.steps
            tried = min(tried, cost)
            costs.append((run.name if len(runs) > 1 else "this run", cost - tried, tried))
            says.append(f"{run.name} cost {cost:.2f} plain runs")
    if not costs:
        return
    costs += [("plain training", 1, 0), (f"a sweep of {why.SWEEP} runs", why.SWEEP, 0)]
    names, rest, start = zip(*costs, strict=True)
    bars = [
        {"type": "bar", "orientation": "h", "name": name, "y": names, "x": values,
         "marker": {"color": ink, "pattern": {"shape": shape}}}
        for name, values, ink, shape in (
            ("training and windows", rest, INK[0], ""),
            ("search for lr", start, INK[1], "/"),
        )
    ]  # fmt: skip
    yield Chart(
        "cost",
        "Cost",
        "Gradients that were computed, over those of one plain training run; beside it the sweep "
        f"of {why.SWEEP} runs that it replaces.",
        bars,
        x="plain runs",
        says="; ".join([*says[:12], f"plain training 1, a sweep {why.SWEEP}"]),
        layout={"yaxis": {"autorange": "reversed"}},
    )

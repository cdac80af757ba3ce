"""The charts of the report, as plotly.js figures of thinned data.

To add one, write a function under `@chart` or `@chart_of_one`; `says` is the text alternative.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

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

INK = ("#0b5fa5", "#b45309", "#117733", "#9b2d77", "#5b5b00", "#374151", "#a61c1c", "#0f6674")
"""Contrast with white: at least 4.5 to 1."""
NIGHT = {
    **dict(zip(INK, ("#7cc0f5", "#f0a35c", "#5fd38d", "#e58bc5", "#d0cf62", "#cbd5e1", "#f28b82",
                     "#5cc8d8"), strict=True)),
    "#9db4c8": "#52708c", "#e5e7eb": "#374151", "#6b7280": "#9ca3af", "#1f2937": "#e5e7eb",
    "#ffffff": "#111827",
}  # fmt: skip
"""Ink -> its colour on a dark page, with a contrast of at least 4.5 to 1."""
OUTCOMES = {
    "accepted": ("#117733", "circle"),
    "rejected": ("#b45309", "x"),
    "rewound": ("#a61c1c", "triangle-down"),
}
MOST_RUNS = 12
"""Runs with curves of their own; means and table include the others."""
MOST_ATTEMPTS = 250
"""Attempts drawn per outcome: more are illegible, and slow."""
SWEEP = 25
"""Runs of a usual grid search that one run replaces: five lrs by five momenta."""

Trace = dict[str, Any]


@dataclass
class Chart:
    key: str
    title: str
    caption: str
    y: str
    """Axis title, as x."""
    x: str = "step"
    log: bool = False
    """Logarithmic y axis if all values are positive; log_x likewise."""
    log_x: bool = False
    traces: list[Trace] = field(default_factory=list)
    says: list[str] = field(default_factory=list)
    """What it shows, in words."""
    layout: dict[str, Any] = field(default_factory=dict)
    """Further settings of the y axis."""

    def line(
        self,
        points: tuple[Sequence[float | None], Sequence[float | None]],
        name: str,
        ink: str,
        *,
        width: int = 2,
        **settings: Any,
    ) -> Trace:
        """Adds a curve; None interrupts it. settings: of plotly's line."""
        return self._scatter("lines", points, name, line={"color": ink, "width": width, **settings})

    def marks(
        self,
        points: tuple[Sequence[float], Sequence[Any]],
        name: str,
        ink: str,
        symbol: str = "circle",
        **settings: Any,
    ) -> Trace:
        """Adds a mark per point. settings: of plotly's marker."""
        marker = {"color": ink, "symbol": symbol, "size": 8, **settings}
        return self._scatter("markers", points, name, marker=marker)

    def _scatter(self, mode: str, points: Any, name: str, **style: Any) -> Trace:
        x, y = ([_short(value) for value in values] for values in points)
        trace = {"type": "scatter", "mode": mode, "x": x, "y": y, "name": html.escape(name)}
        self.traces.append(trace | style)
        return self.traces[-1]

    def follow(self, name: str, values: Sequence[float]) -> None:
        """Adds the ends of a curve to the text alternative."""
        self.says.append(f"{name} from {values[0]:.4g} to {values[-1]:.4g}")

    @property
    def alternative(self) -> str:
        return f"{self.title}. {'; '.join(self.says[:12])}."

    @property
    def figure(self) -> dict[str, Any]:
        axis = {
            "automargin": True,
            "gridcolor": "#e5e7eb",
            "linecolor": "#6b7280",
            "zeroline": False,
        }
        layout = {
            "margin": {"l": 48, "r": 12, "t": 12, "b": 44},
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#1f2937"},
            "paper_bgcolor": "#ffffff",
            "plot_bgcolor": "#ffffff",
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
            "showlegend": 1 < len(self.traces) <= 2 * MOST_RUNS,
            "hovermode": "closest",
            "xaxis": {**axis, **self._axis("x", self.x, self.log_x)},
            "yaxis": {**axis, **self._axis("y", self.y, self.log), **self.layout},
        }
        if any(trace["type"] == "bar" for trace in self.traces):
            layout["barmode"] = "stack"
        return {"data": self.traces, "layout": layout}

    def _axis(self, name: str, title: str, log: bool) -> dict[str, Any]:
        log = log and all(v > 0 for trace in self.traces for v in trace[name])
        return {"title": {"text": html.escape(title)}, "type": "log" if log else "-"}


Maker = Callable[[Sequence[RunRecord]], Iterable[Chart]]
_MAKERS: list[Maker] = []


def chart(maker: Maker) -> Maker:
    """Registers a chart of all runs."""
    _MAKERS.append(maker)
    return maker


def chart_of_one(maker: Callable[[RunRecord], Iterable[Chart]]) -> Maker:
    """Registers a chart for pages about a single run."""
    return chart(lambda runs: maker(runs[0]) if len(runs) == 1 else ())


def charts_of(runs: Sequence[RunRecord]) -> list[Chart]:
    return [each for maker in _MAKERS for each in maker(runs) if each.traces]


def groups_of(runs: Sequence[RunRecord]) -> list[tuple[str, list[RunRecord]]]:
    """(name, runs) per group of runs that differ in the seed alone."""
    apart = ("seed", "directory", "versions", "hardware", "resume", "config", "data", "device")
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        key = repr(sorted((k, repr(v)) for k, v in run.config.items() if k not in apart))
        groups.setdefault(key, []).append(run)
    return [(members[0].name, members) for members in groups.values()]


def _ink(i: int) -> str:
    return INK[i % len(INK)]


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


# Charts -------------------------------------------------------------------------------------------


@chart
def _losses(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    drawn = Chart(
        "losses",
        "Losses",
        "Training loss of the committed steps; what the windows were judged by; and the loss of "
        "validation and test data at the end, of the last and of the averaged weights.",
        y="loss",
        log=True,
    )
    several = len(runs) > 1
    for i, run in enumerate(runs[:MOST_RUNS]):
        steps, losses = run.series("loss")
        prefix, ink = (f"{run.name} " if several else ""), _ink(i if several else 0)
        if losses:
            if not several:
                drawn.line(thinned(steps, losses), "train, each step", "#9db4c8", width=1)
            smooth = means(steps, losses, 200)
            drawn.line(smooth, f"{prefix}train" if several else "train, mean", ink)
            drawn.follow(f"{prefix}training loss", smooth[1])
        validation = thinned(*run.series("val_loss"))
        if validation[0]:
            ink = ink if several else _ink(2)
            drawn.line(validation, f"{prefix}validation", ink, dash="dash")
            drawn.follow(f"{prefix}validation loss", validation[1])
        if several:
            continue
        accepted = [row for row in run.kept if row["outcome"] == "accepted"]
        judged = finite_pairs((float(r["start"]), number(r["objective_after"])) for r in accepted)
        if judged[0]:
            drawn.marks(thinned(*judged), "objective of a window", _ink(1), "circle-open")
        for name, label, ink, symbol in (
            ("val_loss", "validation, end", _ink(2), "diamond"),
            ("average_val_loss", "validation, averaged weights", _ink(2), "diamond-open"),
            ("test_loss", "test, end", _ink(3), "square"),
            ("average_test_loss", "test, averaged weights", _ink(3), "square-open"),
        ):
            value = number(run.result.get(name))
            if value is not None:
                drawn.marks(([run.steps], [value]), label, ink, symbol)
                drawn.says.append(f"{label} {value:.4g}")
    yield drawn


@chart
def _over_seeds(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    drawn = Chart(
        "seeds",
        "Mean over seeds",
        "Mean training loss of runs that differ in the seed alone, with the bootstrap 95 % "
        "interval of that mean.",
        y="loss",
        log=True,
    )
    for i, (name, members) in enumerate(groups_of(runs)):
        curves = [curve for run in members if len((curve := run.series("loss"))[0]) > 1]
        if len(curves) < 2:
            continue
        grid = np.linspace(0, min(steps[-1] for steps, _ in curves), 150)
        stacked = np.stack([np.interp(grid, *means(s, losses, 150)) for s, losses in curves])
        middle = stacked.mean(axis=0).tolist()
        draws = np.random.default_rng(0).integers(0, len(stacked), (400, len(stacked)))
        low, high = np.quantile(stacked[draws].mean(axis=1), [0.025, 0.975], axis=0).tolist()
        x, ink = grid.tolist(), _ink(i)
        red, green, blue = (int(ink[at : at + 2], 16) for at in (1, 3, 5))
        band = drawn.line((x + x[::-1], high + low[::-1]), f"{name}, 95 %", ink, width=0)
        band["fill"], band["fillcolor"] = "toself", f"rgba({red},{green},{blue},0.2)"
        band["hoverinfo"] = "skip"
        drawn.line((x, middle), f"{name}, {len(curves)} seeds", ink)
        drawn.says.append(
            f"{name}: mean training loss of {len(curves)} seeds ends at {middle[-1]:.4g}"
        )
    yield drawn


@chart
def _metrics(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    names = dict.fromkeys(name for run in runs for name in run.metrics)
    for at, name in enumerate(list(names)[:6]):
        data = "validation data" if name.startswith("val_") else "the training batches"
        caption = f"On {data}, as means over stretches of the run."
        drawn = Chart(f"metric-{at}", f"Metric: {name}", caption, y=name)
        for i, run in enumerate(runs[:MOST_RUNS]):
            points = means(*run.series(name), 200)
            if points[0]:
                drawn.line(points, run.name if len(runs) > 1 else name, _ink(i))
                drawn.follow(f"{run.name}: {name}", points[1])
        yield drawn


@chart
def _controls(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    single = len(runs) == 1
    caption = "The values that the steps were taken with."
    if single:
        caption += (
            " The band of a window lies between its mean as it was rolled first and as it was "
            "rewritten: what hindsight changed."
        )
    for name, letter in zip(CONTROLS, "αμσw", strict=True):
        drawn = Chart(f"control-{name}", f"Control: {name} ({letter})", caption, y=name)
        for i, run in enumerate(runs[:MOST_RUNS]):
            steps, values = run.series(name)
            if not values or (name not in run.controls and min(values) == max(values)):
                continue
            if single:
                _draw_changes(drawn, run, name)
            groups = run.groups(name) if single else 1
            for group in range(min(groups, 8)) if groups > 1 else ():
                own = [(r["step"], r[name]) for r in run.tape if isinstance(r.get(name), list)]
                of_it = ((float(s), number(v[group])) for s, v in own if len(v) > group)
                drawn.line(thinned(*finite_pairs(of_it)), f"group {group}", _ink(group))
            if groups == 1:
                drawn.line(thinned(steps, values), "committed" if single else run.name, _ink(i))
            drawn.says.append(
                f"{run.name}: {name} begins at {values[0]:.4g}, is at most {max(values):.4g} and "
                f"ends at {values[-1]:.4g}"
            )
        yield drawn


def _draw_changes(drawn: Chart, run: RunRecord, name: str) -> None:
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
    if x:
        filled = drawn.line((x, band), "changed by hindsight", "#b45309", width=0)
        filled["fill"], filled["fillcolor"] = "toself", "rgba(180,83,9,0.28)"
        drawn.line((x, rolled), "as rolled first", "#b45309", dash="dot")


@chart
def _objectives(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    drawn = Chart(
        "objectives",
        "Windows: J before and after",
        "One line per attempt at a window, from the objective as rolled to the objective as "
        "replayed with the rewritten schedule, which the mark shows.",
        y="objective J",
    )
    thin = False
    for i, run in enumerate(runs[:MOST_RUNS]):
        prefix = f"{run.name} " if len(runs) > 1 else ""
        for outcome, (ink, symbol) in OUTCOMES.items():
            rows = [row for row in run.windows if row["outcome"] == outcome]
            if not rows:
                continue
            drawn.says.append(f"{run.name}: {len(rows)} {outcome}")
            thin |= len(rows) > MOST_ATTEMPTS
            x, y, reasons = [], [], []
            arrows_x: list[float | None] = []
            arrows_y: list[float | None] = []
            for start, stop in stretches(len(rows), MOST_ATTEMPTS):
                row = max(rows[start:stop], key=_moved)
                before, after = row.get("objective_before"), row.get("objective_after")
                end = before if after is None else after
                if end is None:
                    continue
                # Attempts at one window stand side by side.
                place = float(row["start"]) + 2 * (number(row.get("attempt")) or 0)
                x.append(place)
                y.append(float(end))
                reasons.append(html.escape(row.get("reason") or outcome))
                arrows_x += [place, place, None]
                arrows_y += [None if before is None else float(before), float(end), None]
            if x:
                ink = ink if len(runs) == 1 else _ink(i)
                arrows = drawn.line((arrows_x, arrows_y), "", ink)
                arrows["showlegend"], arrows["hoverinfo"] = False, "skip"
                drawn.marks((x, y), f"{prefix}{outcome}", ink, symbol)["text"] = reasons
    if thin:
        drawn.caption += f" Of each outcome {MOST_ATTEMPTS} are drawn, those that moved J furthest."
    yield drawn


def _moved(row: dict[str, Any]) -> float:
    return abs((row.get("objective_before") or 0.0) - (row.get("objective_after") or 0.0))


@chart_of_one
def _starts(run: RunRecord) -> Iterator[Chart]:
    ends = Chart(
        "starts",
        "The start: what was tried",
        "Loss that short rolls end with by their lr; longer rolls have larger marks.",
        x="lr",
        y="loss",
        log=True,
        log_x=True,
    )
    courses = Chart(
        "courses",
        "The start: courses of the rolls",
        "Training loss of every roll.",
        y="loss",
        log=True,
    )
    points = []
    for row in run.starts:
        lr, loss = number(row.get("from")), number(row.get("loss"))
        if row.get("kind") != "probe" or lr is None:
            continue
        if loss is not None:
            points.append((lr, loss, number(row.get("steps")) or 0))
        course = row.get("course")
        if isinstance(course, list):
            curve = thinned(*finite_pairs((i, number(v)) for i, v in enumerate(course)), 300)
            if curve[0]:
                courses.line(curve, f"lr {lr:.3g}", _ink(len(courses.traces)))
    if points:
        longest = max(steps for *_, steps in points)
        best = min(points, key=lambda point: (-point[2], point[1]))
        ends.says.append(f"{len(points)} rolls, the best of the longest at lr {best[0]:.3g}")
        sizes = [8 + 10 * steps / longest for *_, steps in points]
        place = [lr for lr, *_ in points], [loss for _, loss, _ in points]
        trace = ends.marks(place, "a roll", _ink(0), size=sizes)
        trace["text"] = [f"{steps:g} steps" for *_, steps in points]
    courses.says = ends.says
    yield ends
    yield courses


@chart_of_one
def _changes(run: RunRecord) -> Iterator[Chart]:
    name = next((n for n in ("reward", *run.metrics) if run.series(n)[0]), None)
    if name is None:
        return
    rows = [(number(r.get("loss")), number(r.get(name)), float(r["step"])) for r in run.tape]
    known = [[loss, r, step] for loss, r, step in rows if loss is not None and r is not None]
    size = max(1, len(known) // 60)
    parts = [known[i : i + size] for i in range(0, len(known), size)]
    at = [[sum(column) / len(part) for column in zip(*part, strict=True)] for part in parts]
    pairs = [(b[0] - a[0], b[1] - a[1], b[2]) for a, b in pairwise(at)]
    if not pairs:
        return
    drawn = Chart(
        "changes",
        f"Δr against Δℓ: {name} against loss",
        f"Change of the mean {name} and of the mean loss from one stretch of {size} steps to the "
        "next. Where the loss stands for what is wanted, the marks lie up left or down right.",
        x="Δℓ, change of the loss",
        y=f"Δr, change of {name}",
    )
    agree = sum(dl * dr < 0 for dl, dr, _ in pairs)
    drawn.says.append(f"{agree} of {len(pairs)} changes have opposite signs")
    losses, rewards, steps = (list(column) for column in zip(*pairs, strict=True))
    trace = drawn.marks((losses, rewards), "stretch", _ink(0))
    trace["marker"] |= {"color": steps, "colorscale": "Viridis", "showscale": True,
                        "colorbar": {"title": {"text": "step"}, "thickness": 10},
                        "line": {"color": "#6b7280", "width": 1}}  # fmt: skip
    yield drawn


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
                part = map(number, lists.get(name, [])[start:stop])
                known = [v for v in part if v is not None]
                columns[name].append(sum(known) / len(known) if known else None)
    scaled: list[list[float | None]] = []
    for values in columns.values():
        largest = max((abs(v) for v in values if v is not None), default=0.0) or 1.0
        scaled.append([None if v is None else round(v / largest, 4) for v in values])
    drawn = Chart(
        "heat",
        "Hypergradient",
        "dJ by each control at each step of the windows that were differentiated, relative to the "
        "largest of its control: negative (blue) means that more of it would have lowered J.",
        y="",
    )
    drawn.traces.append({
        "type": "heatmap", "x": steps, "y": [html.escape(n) for n in names], "z": scaled,
        "zmid": 0, "zmin": -1, "zmax": 1, "colorscale": "RdBu",
        "colorbar": {"thickness": 10, "title": {"text": "dJ/du"}},
    })  # fmt: skip
    pushed = (
        f"{name} by {sum((v or 0) < 0 for v in values)} of {len(values)} places up"
        for name, values in columns.items()
    )
    drawn.says.append(", ".join(pushed))
    yield drawn


@chart_of_one
def _costates(run: RunRecord) -> Iterator[Chart]:
    drawn = Chart(
        "costates",
        "Costate norms",
        "‖λ‖ along the windows that were differentiated: how much J at the window's end still "
        "depends on the weights of a step. Growth backwards means that a small change explodes.",
        y="‖λ‖",
        log=True,
    )
    steps, norms = finite_pairs(
        (float(row["start"] + i), number(value))
        for row in run.kept
        if isinstance(row.get("costate_norms"), list)
        for i, value in enumerate(row["costate_norms"])
    )
    if norms:
        drawn.marks(thinned(steps, norms), "‖λ‖", _ink(0))
        drawn.says.append(f"between {min(norms):.3g} and {max(norms):.3g}")
    yield drawn


@chart_of_one
def _whole(run: RunRecord) -> Iterator[Chart]:
    """The result of `rhc hypergradient`: the run as one window."""
    drawn = Chart(
        "whole",
        "The whole run differentiated",
        "dJ/ds and dJ/du of every step, from rhc hypergradient, J the loss at the end of the run: "
        "where the schedule still had something to gain.",
        y="norm, absolute value",
        log=True,
    )
    start = number(run.whole.get("start")) or 0.0
    rows: dict[str, Any] = {"‖λ‖": run.whole.get("costate_norms")}
    grad = run.whole.get("raw_grad")
    for name, row in grad.items() if isinstance(grad, dict) else ():
        rows[f"|dJ/d{name}|, in its coordinate"] = row
    for at, (name, row) in enumerate(rows.items()):
        values = map(number, row if isinstance(row, list) else [])
        sizes = ((start + i, abs(v) if v else None) for i, v in enumerate(values))
        points = thinned(*finite_pairs(sizes))
        if points[0]:
            drawn.line(points, name, _ink(at), width=2 if at == 0 else 1)
            drawn.says.append(f"{name} between {min(points[1]):.3g} and {max(points[1]):.3g}")
    yield drawn


@chart_of_one
def _events(run: RunRecord) -> Iterator[Chart]:
    caption = "Where a guard, a drift or a plateau changed the plan, and why."
    drawn = Chart("events", "Events", caption, y="")
    events = run.events[:500]
    for i, kind in enumerate(dict.fromkeys(kind for _, kind, _ in events)):
        of_it = [(step, reason) for step, each, reason in events if each == kind]
        place = [step for step, _ in of_it], [html.escape(kind)] * len(of_it)
        trace = drawn.marks(place, kind, _ink(i), "diamond")
        trace["text"] = [html.escape(reason) for _, reason in of_it]
    drawn.says = [f"step {step}: {kind}" for step, kind, _ in events[:10]]
    yield drawn


@chart
def _cost(runs: Sequence[RunRecord]) -> Iterator[Chart]:
    drawn = Chart(
        "cost",
        "Cost",
        "In plain training runs: all gradients that were computed over those of plain training, "
        f"beside the sweep of {SWEEP} that it replaces.",
        x="plain runs",
        y="",
        layout={"autorange": "reversed"},
    )
    costs = []
    for run in runs:
        cost = number(entry(run.result, "cost", "plain_run_equivalents"))
        if cost is not None and run.steps:
            tried = sum(number(row.get("gradients")) or 0.0 for row in run.starts) / run.steps
            tried = min(tried, cost)
            costs.append((run.name if len(runs) > 1 else "this run", cost - tried, tried))
            drawn.says.append(f"{run.name} cost {cost:.2f} plain runs")
    if not costs:
        return
    drawn.says.append(f"plain training 1, a sweep {SWEEP}")
    costs += [("plain training", 1, 0), (f"a sweep of {SWEEP} runs", SWEEP, 0)]
    names, rest, start = zip(*costs, strict=True)
    for name, values, ink, shape in (
        ("training and windows", rest, _ink(0), ""),
        ("search for the start", start, _ink(1), "/"),
    ):
        drawn.traces.append({
            "type": "bar", "orientation": "h", "name": name, "y": [html.escape(n) for n in names],
            "x": values, "marker": {"color": ink, "pattern": {"shape": shape}},
        })  # fmt: skip
    yield drawn

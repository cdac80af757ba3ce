"""Which charts there are, under which headings, and whose curves they draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

import numpy as np

from rhc.report.figure import INK, Chart
from rhc.report.records import RunRecord

MOST_RUNS = 12
"""Runs with curves of their own; means and table include the others."""
MOST_PANELS = 6
"""Runs with charts of their own on a page about several."""

Maker = Callable[[Sequence[RunRecord]], Iterable[Chart]]
_MAKERS: list[Maker] = []


def chart(maker: Maker) -> Maker:
    """Registers a chart of all runs."""
    _MAKERS.append(maker)
    return maker


def chart_of_one(maker: Callable[[RunRecord], Iterable[Chart]]) -> Maker:
    """Registers a chart for pages about a single run."""
    return chart(lambda runs: maker(runs[0]) if len(runs) == 1 else ())


def chart_of_each(maker: Callable[[RunRecord], Iterable[Chart]]) -> Maker:
    """Registers a chart of one run that pages about several have of each, side by side."""

    def of_each(runs: Sequence[RunRecord]) -> Iterator[Chart]:
        if len(runs) == 1:
            yield from maker(runs[0])
            return
        # Of runs that differ in the seed alone the first one.
        for i, (name, members) in enumerate(groups_of(runs)[:MOST_PANELS]):
            for made in maker(members[0]):
                made.key, made.title = f"{made.key}-{i}", f"{made.title}: {name}"
                made.place = i + 1
                yield made

    return chart(of_each)


def charts_of(runs: Sequence[RunRecord]) -> list[Chart]:
    made = [each for maker in _MAKERS for each in maker(runs) if each.traces]
    _share_axes([each for each in made if each.place > 0])
    return sorted(made, key=lambda each: each.place > 0)  # what all runs share comes first


def _share_axes(beside: Sequence[Chart]) -> None:
    """Gives charts that stand side by side the same range of y, so that like compares with like."""
    kinds: dict[str, list[Chart]] = {}
    for each in beside:
        kinds.setdefault(each.key.rpartition("-")[0], []).append(each)
    for charts in kinds.values():
        traces = [t for each in charts for t in each.traces if t.get("yaxis", "y") == "y"]
        values = [v for trace in traces for v in trace["y"] if v is not None]
        if len(charts) < 2 or not values or "range" in charts[0].layout.get("yaxis", {}):
            continue
        low, high = min(values), max(values)
        if "y" in charts[0].log and low > 0:
            low, high = float(np.log10(low)), float(np.log10(high))
        margin = 0.05 * (high - low)
        for each in charts:
            own = each.layout.get("yaxis", {})
            each.layout["yaxis"] = own | {"range": [low - margin, high + margin]}


PARTS = (
    ("What was found", ("losses", "control", "seeds", "metric")),
    ("How the schedule came to be", ("starts", "courses", "passes", "objectives", "events")),
    ("What it cost", ("cost",)),
    ("A closer look", ()),
)
"""Headings of the page, and the kinds of charts under each; the last has all others."""


def parts_of(charts: Sequence[Chart]) -> list[tuple[str, list[Chart]]]:
    """The charts under their headings, in the order of the page."""
    parts: list[tuple[str, list[Chart]]] = [(heading, []) for heading, _ in PARTS]
    for each in charts:
        found = [at for at, (_, keys) in enumerate(PARTS) if each.key.partition("-")[0] in keys]
        parts[found[0] if found else -1][1].append(each)
    for (_, keys), (_, held) in zip(PARTS[:-1], parts, strict=False):
        held.sort(key=lambda each: (each.place > 0, keys.index(each.key.partition("-")[0])))
    return [(heading, held) for heading, held in parts if held]


def groups_of(runs: Sequence[RunRecord]) -> list[tuple[str, list[RunRecord]]]:
    """(name, runs) per group of runs that differ in the seed alone; of a seed that was run twice
    the first."""
    apart = ("seed", "directory", "versions", "hardware", "resume", "config", "data", "device")
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        key = repr(sorted((k, repr(v)) for k, v in run.config.items() if k not in apart))
        known = groups.setdefault(key, [])
        if "seed" not in run.config or all(
            run.config["seed"] != each.config.get("seed") for each in known
        ):
            known.append(run)
    return [(members[0].name, members) for members in groups.values()]


def drawn(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs with curves of their own: of every group the first, then the second, and so on."""
    if len(runs) <= MOST_RUNS:
        return list(runs)
    turns = zip_longest(*(members for _, members in groups_of(runs)))
    return [run for turn in turns for run in turn if run is not None][:MOST_RUNS]


def colour(i: int) -> str:
    return INK[i % len(INK)]

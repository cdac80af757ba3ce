"""`rhc weights`: the weights that a run gave its data."""

from __future__ import annotations

from rhc.data_weights import FEW, Course, DataWeights
from rhc.data_weights.cells import write_csv
from rhc.errors import InputError
from rhc.report.live import Screen, sparkline
from rhc.settings.commands import WeightsConfig
from rhc.storage.files import replace_durably
from rhc.storage.run_files import WEIGHTS

SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)

SHOWN = 30
"""Points of a course on the screen."""


def run(config: WeightsConfig, screen: Screen) -> int:
    weights = DataWeights.load(config.directory / WEIGHTS)
    if config.output is not None:
        write_csv(weights, config.output)
    if config.course is not None:
        if weights.course is None:
            raise InputError(
                f"{config.directory} has {len(weights)} cells and no course of them: only up to "
                f"{FEW} that a run has moved have one; leave --course out"
            )
        names = weights.names or [str(c) for c in range(len(weights))]
        replace_durably(config.course, weights.course.csv(names).encode())
    values, order = weights.values, weights.values.argsort(stable=True)
    spread = (values[order[round(share * (len(order) - 1))]] for share in SHARES)
    least, tenth, median, ninth, most = (f"{float(value):.3g}" for value in spread)
    screen.out(
        f"{len(values)} cells: weights {least} to {most}, median {median}, eight in ten from "
        f"{tenth} to {ninth}",
        highlight=False,
    )
    for c in order[: config.lowest].tolist():
        name = str(c) if weights.names is None else weights.names[c]
        seen, mean = weights.seen(c)
        told = f"in {seen} windows, mean slope {mean:+.2f} ± {seen**-0.5:.2f}" if seen else ""
        if weights.course is not None:
            told += f"   {_over_steps(weights.course, c)}"
        screen.out(f"{name:>10}  {float(values[c]):<8.4g} {told}".rstrip(), highlight=False)
    return 0


def _over_steps(course: Course, cell: int) -> str:
    """The course of a cell's weight, of mean 1 over the cells, on a log scale."""
    rows = [course.at(len(course) * i // SHOWN) for i in range(SHOWN)]
    return sparkline([float(row[cell] / row.mean()) for row in rows])

"""`rhc weights`: the weights that a run gave its data."""

from __future__ import annotations

from rhc.data_weights import DataWeights
from rhc.data_weights.cells import write_csv
from rhc.report.live import Screen
from rhc.settings.commands import WeightsConfig
from rhc.storage.run_files import WEIGHTS

SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)


def run(config: WeightsConfig, screen: Screen) -> int:
    weights = DataWeights.load(config.directory / WEIGHTS)
    if config.output is not None:
        write_csv(weights, config.output)
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
        told = f"in {seen} windows, mean slope {mean:+.2f}" if seen else ""
        screen.out(f"{name:>10}  {float(values[c]):<8.4g} {told}".rstrip(), highlight=False)
    return 0

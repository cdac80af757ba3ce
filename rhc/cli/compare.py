"""`rhc compare`."""

from __future__ import annotations

from pathlib import Path

from rhc.compare.pool import print_comparison
from rhc.report.live import Screen
from rhc.settings.commands import CompareConfig


def run(config: CompareConfig, screen: Screen) -> int:
    short = config.run.rpartition(":")[2]
    settings = {name: getattr(config, name) for name in config.known()}
    settings["directory"] = config.directory or Path("runs") / f"compare-{short}"
    return print_comparison(screen, **settings)

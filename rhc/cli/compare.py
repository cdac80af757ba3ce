"""`rhc compare`."""

from __future__ import annotations

from rhc.compare.pool import print_comparison
from rhc.report.live import Screen
from rhc.settings.commands import CompareConfig


def run(config: CompareConfig, screen: Screen) -> int:
    return print_comparison(screen, config)

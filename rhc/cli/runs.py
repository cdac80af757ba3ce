"""`rhc runs`."""

from __future__ import annotations

from rhc.report.live import Screen
from rhc.report.text import print_runs
from rhc.settings.commands import RunsConfig


def run(config: RunsConfig, screen: Screen) -> int:
    print_runs(screen)
    return 0

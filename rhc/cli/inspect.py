"""`rhc inspect`."""

from __future__ import annotations

from rhc.report.live import Screen
from rhc.report.text import print_run
from rhc.settings.commands import InspectConfig


def run(config: InspectConfig, screen: Screen) -> int:
    print_run(screen, config.directory)
    return 0

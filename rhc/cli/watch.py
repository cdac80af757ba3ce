"""`rhc watch`."""

from __future__ import annotations

from rhc.report.live import Screen
from rhc.report.watch import watch
from rhc.settings.commands import WatchConfig


def run(config: WatchConfig, screen: Screen) -> int:
    watch(config.directory, screen)
    return 0

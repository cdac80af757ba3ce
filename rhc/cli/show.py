"""`rhc report`, `watch`, `runs` and `inspect`: they show runs, and train none."""

from __future__ import annotations

from rhc.errors import plain
from rhc.report import write_report
from rhc.report.live import Screen
from rhc.report.text import print_run, print_runs
from rhc.report.watch import follow
from rhc.settings.commands import (
    InspectConfig,
    ReportConfig,
    RunsConfig,
    WatchConfig,
)


def report(config: ReportConfig, screen: Screen) -> int:
    print(plain(str(write_report(config.directories, config.output))))
    return 0


def watch(config: WatchConfig, screen: Screen) -> int:
    follow(config.directory, screen)
    return 0


def runs(config: RunsConfig, screen: Screen) -> int:
    print_runs(screen)
    return 0


def inspect(config: InspectConfig, screen: Screen) -> int:
    print_run(screen, config.directory)
    return 0

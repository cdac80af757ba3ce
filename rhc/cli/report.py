"""`rhc report`."""

from __future__ import annotations

from rhc.errors import plain
from rhc.report import write_report
from rhc.report.live import Screen
from rhc.settings.commands import ReportConfig


def run(config: ReportConfig, screen: Screen) -> int:
    print(plain(str(write_report(config.directories, config.output))))
    return 0

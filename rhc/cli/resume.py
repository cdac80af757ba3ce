"""`rhc resume`: the directory's content decides which command continues."""

from __future__ import annotations

from dataclasses import replace

from rhc.errors import InputError
from rhc.report.live import Screen
from rhc.report.records import WITHOUT_RUNNER
from rhc.settings.commands import ResumeConfig
from rhc.storage.run_files import read_record


def run(config: ResumeConfig, screen: Screen) -> int:
    directory = config.directory
    record = read_record(directory)  # fails before torch is imported if it is no run
    if (command := record.get("command")) in WITHOUT_RUNNER:
        again = "rhc compare" if command == "compare" else "the script"
        raise InputError(
            f"directory {directory} is the record of one run of {again}, without a checkpoint; run "
            f"{again} again"
        )
    if config.steps is not None and "command" in record:
        raise InputError(
            f"steps belongs to the schedule that is used again, got {config.steps}; leave --steps "
            "out"
        )
    if "pass" in record:
        raise InputError(f"directory {directory} is one run of {directory.parent}; resume that")
    with screen.waiting("loading torch"):
        from rhc.cli import replay, smooth, train
        from rhc.cli.building import config_of
    if record.get("command") == "smooth":
        return smooth.resume(record, directory, screen, trust=config.trust)
    settings = config_of(directory, trust=config.trust, data=config.data, device=config.device)
    if config.steps is not None:
        settings = replace(settings, steps=config.steps)
    if record.get("command") == "replay":
        return replay.resume(settings, directory, record, screen)
    moved = None if config.data is None else config_of(directory, trust=config.trust).data
    return train.run(settings.checked(), screen, recorded_data=moved)

"""Settings, once: dataclasses from which flags, files, records, hashes and checks derive."""

from rhc.settings.owners import (
    Engine,
    Law,
    Planning,
    Run,
    Shape,
    Step,
    Storage,
    Window,
    parsed_bytes,
)
from rhc.settings.train import RECORD_VERSION, TrainConfig

__all__ = [
    "RECORD_VERSION",
    "Engine",
    "Law",
    "Planning",
    "Run",
    "Shape",
    "Step",
    "Storage",
    "TrainConfig",
    "Window",
    "parsed_bytes",
]

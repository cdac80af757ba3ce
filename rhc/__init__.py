"""rhc: a PyTorch training runner that writes its own schedule with hindsight.

Names are imported when they are first used, so that `import rhc` and `rhc --help` do not wait for
torch.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

try:
    __version__ = metadata.version("rhc")
except metadata.PackageNotFoundError:  # run from its sources
    __version__ = "0.1.0"

_MODULES = {
    "AdaptiveRL": "rhc.schedulers",
    "Bounds": "rhc.schedulers",
    "Gains": "rhc.schedulers",
    "InputError": "rhc.errors",
    "Control": "rhc.schedule",
    "CONTROLS": "rhc.schedule",
    "Schedule": "rhc.schedule",
    "total_variation": "rhc.schedule",
    "HeldOutBatches": "rhc.training.objective",
    "Objective": "rhc.training.objective",
    "bounded": "rhc.training.objective",
    "LoopTape": "rhc.report.loop_tape",
    "Plant": "rhc.training.plant",
    "register_dynamics": "rhc.optimizers",
    "DataWeights": "rhc.data_weights",
    "Attribution": "rhc.hindsight.attribution",
    "attribute": "rhc.hindsight.attribution",
    "DistilledScheduler": "rhc.hindsight",
    "indexed": "rhc.data_weights",
    "Hypergradient": "rhc.hypergradient",
    "hypergradient": "rhc.hypergradient",
    "Rewrite": "rhc.loop.update_rule",
    "Twin": "rhc.loop.update_rule",
    "EpochPlanner": "rhc.schedulers",
    "LossSampler": "rhc.schedulers",
    "plan_next_epoch": "rhc.schedulers",
    "Runner": "rhc.runner",
    "RunResult": "rhc.runner",
    "Callback": "rhc.report.callbacks",
    "Workload": "rhc.workload",
}

_FOLDERS = {
    "optimizers": "rhc.optimizers",
    "loggers": "rhc.report.loggers",
    "schedulers": "rhc.schedulers",
}

__all__ = [
    "CONTROLS",
    "AdaptiveRL",
    "Attribution",
    "Bounds",
    "Callback",
    "Control",
    "DataWeights",
    "DistilledScheduler",
    "EpochPlanner",
    "Gains",
    "HeldOutBatches",
    "Hypergradient",
    "InputError",
    "LoopTape",
    "LossSampler",
    "Objective",
    "Plant",
    "Rewrite",
    "RunResult",
    "Runner",
    "Schedule",
    "Twin",
    "Workload",
    "__version__",
    "attribute",
    "bounded",
    "hypergradient",
    "indexed",
    "plan_next_epoch",
    "register_dynamics",
    "total_variation",
]

if TYPE_CHECKING:
    from rhc.data_weights import DataWeights, indexed
    from rhc.errors import InputError
    from rhc.hindsight import DistilledScheduler
    from rhc.hindsight.attribution import Attribution, attribute
    from rhc.hypergradient import Hypergradient, hypergradient
    from rhc.loop.update_rule import Rewrite, Twin
    from rhc.optimizers import register_dynamics
    from rhc.report.callbacks import Callback
    from rhc.report.loop_tape import LoopTape
    from rhc.runner import Runner, RunResult
    from rhc.schedule import CONTROLS, Control, Schedule, total_variation
    from rhc.schedulers import AdaptiveRL, Bounds, EpochPlanner, Gains, LossSampler, plan_next_epoch
    from rhc.training.objective import HeldOutBatches, Objective, bounded
    from rhc.training.plant import Plant
    from rhc.workload import Workload


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:  # of names of their own: rhc.optimizers.lion
        return importlib.import_module(_FOLDERS[name])
    if name not in _MODULES:
        raise AttributeError(f"module 'rhc' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

"""rhc: a PyTorch training runner that writes its own schedule with hindsight.

Names are imported when they are first used, so that `import rhc` and `rhc --help` do not wait for
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "AdaptiveRL": "rhc.causal",
    "Bounds": "rhc.causal",
    "Gains": "rhc.causal",
    "InputError": "rhc.errors",
    "Control": "rhc.schedule",
    "CONTROLS": "rhc.schedule",
    "Schedule": "rhc.schedule",
    "total_variation": "rhc.schedule",
    "HeldOutBatches": "rhc.objective",
    "Objective": "rhc.objective",
    "Plant": "rhc.plant",
    "register_dynamics": "rhc.dynamics",
    "DistilledScheduler": "rhc.hindsight",
    "Hypergradient": "rhc.hypergradient",
    "hypergradient": "rhc.hypergradient",
    "Rewrite": "rhc.rewrite",
    "Twin": "rhc.rewrite",
    "EpochPlanner": "rhc.planning",
    "LossSampler": "rhc.planning",
    "plan_next_epoch": "rhc.planning",
    "Runner": "rhc.runner",
    "RunResult": "rhc.runner",
    "Workload": "rhc.workload",
}

__all__ = [
    "CONTROLS",
    "AdaptiveRL",
    "Bounds",
    "Control",
    "DistilledScheduler",
    "EpochPlanner",
    "Gains",
    "HeldOutBatches",
    "Hypergradient",
    "InputError",
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
    "hypergradient",
    "plan_next_epoch",
    "register_dynamics",
    "total_variation",
]

if TYPE_CHECKING:
    from rhc.causal import AdaptiveRL, Bounds, Gains
    from rhc.dynamics import register_dynamics
    from rhc.errors import InputError
    from rhc.hindsight import DistilledScheduler
    from rhc.hypergradient import Hypergradient, hypergradient
    from rhc.objective import HeldOutBatches, Objective
    from rhc.planning import EpochPlanner, LossSampler, plan_next_epoch
    from rhc.plant import Plant
    from rhc.rewrite import Rewrite, Twin
    from rhc.runner import Runner, RunResult
    from rhc.schedule import CONTROLS, Control, Schedule, total_variation
    from rhc.workload import Workload


def __getattr__(name: str) -> Any:
    if name in (
        "dynamics",
        "loggers",
        "planning",
    ):  # modules of names of their own: rhc.dynamics.lion
        return importlib.import_module(f"rhc.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'rhc' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

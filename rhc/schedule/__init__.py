"""Controls, schedules of their values, and templates of lr."""

from rhc.schedule.controls import (
    CONTROLS,
    Control,
    Scalar,
    control,
)
from rhc.schedule.of_optimizer import OptimizerControls, parameters_of
from rhc.schedule.schedule import SCHEDULE_VERSION, Schedule, total_variation
from rhc.schedule.templates import (
    ONE_CYCLE_FIRST,
    ONE_CYCLE_UP,
    cooldown,
    shaped,
    template_factors,
    warming,
)
from rhc.workload import TEMPLATES, Template

__all__ = [
    "CONTROLS",
    "ONE_CYCLE_FIRST",
    "ONE_CYCLE_UP",
    "SCHEDULE_VERSION",
    "TEMPLATES",
    "Control",
    "OptimizerControls",
    "Scalar",
    "Schedule",
    "Template",
    "control",
    "cooldown",
    "parameters_of",
    "shaped",
    "template_factors",
    "total_variation",
    "warming",
]

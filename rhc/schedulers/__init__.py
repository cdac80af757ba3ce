"""What steers a run without a replay: causal schedulers, and a planner of epochs.

`AdaptiveRL` sees the past steps alone; `EpochPlanner` plans an epoch by the tape of the one before.
"""

from rhc.schedulers.adaptive import AdaptiveRL
from rhc.schedulers.callbacks import hf_callback, lightning_callback
from rhc.schedulers.guards import (
    CONSERVATIVE,
    Always,
    Failsafe,
    FreshSeeds,
    Law,
    Planned,
    Preset,
    RewardSource,
    Smoothed,
    TrainingTape,
    Validation,
    usual_law,
)
from rhc.schedulers.knobs import (
    Augmentation,
    Beta1,
    ClipRange,
    Entropy,
    GaeLambda,
    Knob,
    Value,
    shifted,
)
from rhc.schedulers.laws import Bounds, Controls, Gains
from rhc.schedulers.plan import (
    CAP,
    VALUES,
    Intervention,
    Plan,
    PlanBounds,
    PlanGains,
    after_drift,
    next_value,
    plan_next_epoch,
)
from rhc.schedulers.planner import EpochPlanner, joined, parted
from rhc.schedulers.rewards import HeldOut, ZScored
from rhc.schedulers.sampler import ExampleStatistics, LossSampler
from rhc.schedulers.statistics import EpochState, EpochStats, Watch, closed, epochs_of, seen

__all__ = [
    "CAP",
    "CONSERVATIVE",
    "VALUES",
    "AdaptiveRL",
    "Always",
    "Augmentation",
    "Beta1",
    "Bounds",
    "ClipRange",
    "Controls",
    "Entropy",
    "EpochPlanner",
    "EpochState",
    "EpochStats",
    "ExampleStatistics",
    "Failsafe",
    "FreshSeeds",
    "GaeLambda",
    "Gains",
    "HeldOut",
    "Intervention",
    "Knob",
    "Law",
    "LossSampler",
    "Plan",
    "PlanBounds",
    "PlanGains",
    "Planned",
    "Preset",
    "RewardSource",
    "Smoothed",
    "TrainingTape",
    "Validation",
    "Value",
    "Watch",
    "ZScored",
    "after_drift",
    "closed",
    "epochs_of",
    "hf_callback",
    "joined",
    "lightning_callback",
    "next_value",
    "parted",
    "plan_next_epoch",
    "seen",
    "shifted",
    "usual_law",
]

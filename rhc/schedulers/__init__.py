"""What steers a run without a replay: causal schedulers, and a planner of epochs.

`AdaptiveRL` sees the past steps alone; `EpochPlanner` plans an epoch by the tape of the one before.
"""

from rhc.schedulers.adaptive import AdaptiveRL
from rhc.schedulers.callbacks import hf_callback, lightning_callback
from rhc.schedulers.guards import CONSERVATIVE, Always, Failsafe, Planned, Preset, Smoothed
from rhc.schedulers.knobs import Augmentation, ClipRange, Entropy, GaeLambda, Knob, shifted
from rhc.schedulers.laws import Bounds, Gains
from rhc.schedulers.plan import (
    KNOBS,
    PLAN_BOUNDS,
    PLAN_GAINS,
    STEERED,
    VALUES,
    EpochPlan,
    after_drift,
    next_value,
    plan_next_epoch,
)
from rhc.schedulers.planner import EpochPlanner, joined, parted
from rhc.schedulers.rewards import FreshSeeds, HeldOut, TrainingTape, ValidationLoss, ZScored
from rhc.schedulers.sampler import ExampleStatistics, LossSampler
from rhc.schedulers.statistics import EpochState, EpochStats, Watch, after_epoch, after_step

__all__ = [
    "CONSERVATIVE",
    "KNOBS",
    "PLAN_BOUNDS",
    "PLAN_GAINS",
    "STEERED",
    "VALUES",
    "AdaptiveRL",
    "Always",
    "Augmentation",
    "Bounds",
    "ClipRange",
    "Entropy",
    "EpochPlan",
    "EpochPlanner",
    "EpochState",
    "EpochStats",
    "ExampleStatistics",
    "Failsafe",
    "FreshSeeds",
    "GaeLambda",
    "Gains",
    "HeldOut",
    "Knob",
    "LossSampler",
    "Planned",
    "Preset",
    "Smoothed",
    "TrainingTape",
    "ValidationLoss",
    "Watch",
    "ZScored",
    "after_drift",
    "after_epoch",
    "after_step",
    "hf_callback",
    "joined",
    "lightning_callback",
    "next_value",
    "parted",
    "plan_next_epoch",
    "shifted",
]

"""Schedulers without replay: `AdaptiveRL` per step, `EpochPlanner` per epoch."""

from rhc.schedulers.adaptive import AdaptiveRL
from rhc.schedulers.callbacks import hf_callback, lightning_callback
from rhc.schedulers.guards import CONSERVATIVE, Failsafe, Planned, Preset, Smoothed
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
    plan_next_epoch,
)
from rhc.schedulers.planner import EpochPlanner, joined, parted
from rhc.schedulers.rewards import FreshSeeds, HeldOut, TrainingTape, ValidationLoss, ZScored
from rhc.schedulers.sampler import LossSampler
from rhc.schedulers.statistics import EpochState, EpochStats, after_epoch, after_step

__all__ = [
    "CONSERVATIVE",
    "KNOBS",
    "PLAN_BOUNDS",
    "PLAN_GAINS",
    "STEERED",
    "VALUES",
    "AdaptiveRL",
    "Augmentation",
    "Bounds",
    "ClipRange",
    "Entropy",
    "EpochPlan",
    "EpochPlanner",
    "EpochState",
    "EpochStats",
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
    "ZScored",
    "after_drift",
    "after_epoch",
    "after_step",
    "hf_callback",
    "joined",
    "lightning_callback",
    "parted",
    "plan_next_epoch",
    "shifted",
]

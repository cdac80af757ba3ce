"""Schedulers that know the past only: they cost nothing per step, and ask for no derivatives."""

from rhc.causal.laws import Bounds, Controls, Gains
from rhc.causal.rewards import HeldOut, ZScored
from rhc.causal.scheduler import AdaptiveRL

__all__ = ["AdaptiveRL", "Bounds", "Controls", "Gains", "HeldOut", "ZScored"]

"""Uses of a finished run: smoothing its tape, whole-run schedules, distilled causal schedulers."""

from rhc.hindsight.distill import DistilledScheduler
from rhc.hindsight.policy import Policy
from rhc.hindsight.smoother import USUAL_GAINS, Pass, Smoother, Tape, held_out, reward_of, smooth

__all__ = [
    "USUAL_GAINS",
    "DistilledScheduler",
    "Pass",
    "Policy",
    "Smoother",
    "Tape",
    "held_out",
    "reward_of",
    "smooth",
]

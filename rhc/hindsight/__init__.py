"""What a run that has ended is good for: a smoother of its tape, schedules over the whole horizon,
and causal schedulers distilled from many."""

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

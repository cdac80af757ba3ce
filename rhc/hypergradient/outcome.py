"""Whether a hypergradient can be trusted, and what to do where it cannot."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, isfinite

from rhc.hypergradient.adjoint import Adjoint, Damping
from rhc.training.trajectory import Trajectory

SAME_GRADIENT = 0.01
"""Largest relative difference between a step's gradient and the recomputed one. Other kernels and
reduced precision stay below it; hidden state and randomness do not."""

EXPLODING = 1e4
"""A costate that has grown by this factor reflects rounding and chaos more than the schedule (Metz
et al. 2021)."""

VANISHING = 1e-6
"""A costate that has shrunk by this factor: earlier steps do not affect the objective."""

AGREES = 0.05
"""Largest sum over a window of the disagreement of differences to either side, as shares of the
costate: about the error of dJ/du. Smooth models stay below 1e-3 in float32; one crossed kink is off
by a third of a product and more."""


@dataclass(frozen=True)
class Outcome:
    """How a hypergradient ended.

    Attributes:
        name: "successful"; "vanishing" or "exploding" costates; "non-finite"; or "inconsistent":
            the numbers contradict rolls of the plain loop, recomputed steps or differences to
            either side.
        message: what happened, and how to fix it.
        step: the absolute step at which it began, going backwards; None if successful.
    """

    name: str
    message: str
    step: int | None = None

    @property
    def successful(self) -> bool:
        return self.name == "successful"

    @property
    def usable(self) -> bool:
        """Whether a schedule may be rewritten from it as it is."""
        return self.name in ("successful", "vanishing")


def outcome_of(
    found: Adjoint, trajectory: Trajectory, end: Tensor | None, damping: Damping
) -> Outcome:
    return (
        _non_finite(found, trajectory, end)
        or _disagreeing(found, trajectory)
        or _another_step(found, trajectory)
        or _exploding(found, trajectory, damping)
        or _vanishing(found, trajectory)
        or Outcome("successful", "every hypergradient is finite")
    )


def _non_finite(found: Adjoint, trajectory: Trajectory, end: Tensor | None) -> Outcome | None:
    norms = found.costate_norms
    bad = ~isfinite(norms)
    for g in found.gradient.values():
        bad |= ~isfinite(g).reshape(len(norms), -1).all(1)
    if bool(bad.any()):
        step = trajectory.start + int(bad.nonzero().max())
        return Outcome(
            "non-finite",
            f"the costate is not finite from step {step} backwards; use a shorter window, a lower "
            "lr, discount < 1 or costate_clip",
            step,
        )
    losses = [*trajectory.losses[-1:], *([] if end is None else [end])]
    if trajectory.diverged is None and all(math.isfinite(float(x)) for x in losses):
        return None
    last = trajectory.start + len(trajectory) - 1
    message = f"the loss is not finite at step {last}; use a shorter window or a lower lr"
    return Outcome("non-finite", message, last)


def _disagreeing(found: Adjoint, trajectory: Trajectory) -> Outcome | None:
    taken = max(1, len(found.disagreements))
    share = sum(found.disagreements.values()) * len(trajectory) / taken
    if share <= AGREES:
        return None
    worst = max(found.disagreements, key=lambda i: found.disagreements[i])
    return Outcome(
        "inconsistent",
        f"differences of gradients disagree by {share:.2g} over the window, "
        f"most at step {trajectory.start + worst}, as they do at kinks (ReLU, max-pooling) and "
        "in reduced precision; make exact products possible (`why` says what stands against "
        "them), or use float64",
        trajectory.start + worst,
    )


def _another_step(found: Adjoint, trajectory: Trajectory) -> Outcome | None:
    worst = max(found.discrepancies, key=lambda i: found.discrepancies[i], default=0)
    share = found.discrepancies.get(worst, 0.0)
    if not share > SAME_GRADIENT:
        return None
    step = trajectory.start + worst
    return Outcome(
        "inconsistent",
        f"the gradient of step {step}, computed again, differs by {share:.2g} of its norm; "
        "look for randomness or state that loss_fn keeps outside the model, and operators that "
        "are not deterministic",
        step,
    )


def _exploding(found: Adjoint, trajectory: Trajectory, damping: Damping) -> Outcome | None:
    """By λ of θ alone: other slots have units of their own."""
    norms, last = found.parameter_norms[:-1], float(found.parameter_norms[-1])
    grown = norms > EXPLODING * last
    if not last > 0 or damping.clip is not None or not bool(grown.any()):
        return None
    step = trajectory.start + int(grown.nonzero().max())
    return Outcome(
        "exploding",
        f"the costate has grown {float(norms.max()) / last:.1g}-fold, beyond "
        f"{EXPLODING:g} from step {step} backwards; use costate_clip, discount < 1, a shorter "
        "window, a lower lr",
        step,
    )


def _vanishing(found: Adjoint, trajectory: Trajectory) -> Outcome | None:
    norms, largest = found.parameter_norms[:-1], float(found.parameter_norms.max())
    faint = norms < VANISHING * largest
    if not largest > 0 or not bool(faint[0]):
        return None
    alive = (~faint).nonzero()
    step = trajectory.start + (int(alive.min()) - 1 if len(alive) else len(norms) - 1)
    return Outcome(
        "vanishing",
        f"the costate has shrunk below {VANISHING:g} of its largest from step {step} "
        "backwards, so that earlier steps have no say; use a shorter window",
        step,
    )

"""The objective of a window: stage costs, a terminal loss, and the average of its iterates. J = Σ_t
(c_ℓ ℓ_t − c_r r_t) + terminal(θ̄), θ̄ an exponential average of the window's iterates, which hides
the noise that a lower lr would remove at once (numbers: docs/log.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rhc.errors import InputError, plain_numbers, whole_number

Reward = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""(loss, metrics) of a step -> r_t."""


@dataclass(frozen=True)
class HeldOutBatches:
    """Takes the terminal loss on the training batches that follow the window. They are other
    batches for every window, and `val_loader` stays unseen. In an endless stream the model has not
    been trained on them."""

    count: int = 4
    """Number of batches."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", whole_number("held-out batches", self.count))
        if self.count < 1:
            raise InputError(f"held-out batches must be ≥ 1, got {self.count}")


def bounded(losses: Tensor) -> Tensor:
    """1 − e^−ℓ of every loss ℓ ≥ 0: of a cross-entropy 1 − p(label). Held-out rows with wrong
    labels, whose cross-entropy outweighs all others, then count no more than a row each, and
    random ones cancel (Ghosh, Kumar, Sastry 2017)."""
    return 1 - (-losses).exp()


@dataclass(frozen=True)
class Objective:
    """What a window is judged by: J = Σ_t (c_ℓ ℓ_t − c_r r_t) + terminal(θ̄).

    Raises:
        InputError: for values out of range, and where all weights are 0.
    """

    loss_weight: float = 0.0
    """c_ℓ, of the steps' losses."""
    reward_weight: float = 0.0
    """c_r, of the steps' rewards."""
    reward: Reward | None = None
    """Gives r_t; None for metrics["reward"]."""
    terminal_weight: float = 1.0
    """Weight of the terminal loss."""
    average: float | None = 0.99
    """Decay of the iterates' exponential average, in (0, 1); None for the last iterate."""
    batches: int | HeldOutBatches = 4
    """Batches of the terminal loss: this many of val_loader, others for each window."""
    rows: Callable[[Tensor], Tensor] | None = None
    """Of the held-out rows' losses (B,), where data are weighted: what each counts, such as
    `rhc.bounded`. None for the losses as they are."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.average is not None and not 0 < self.average < 1:
            raise InputError(
                f"average must be in (0, 1), got {self.average}; use None for the last iterate"
            )
        if not isinstance(self.batches, HeldOutBatches):
            object.__setattr__(self, "batches", whole_number("objective batches", self.batches))
            if self.count < 1:
                raise InputError(f"objective batches must be ≥ 1, got {self.batches}")
        if self.loss_weight == self.reward_weight == self.terminal_weight == 0:
            raise InputError(
                "the objective is empty; give a weight to the loss, reward or terminal"
            )

    @property
    def count(self) -> int:
        """Number of batches of the terminal loss."""
        return self.batches if isinstance(self.batches, int) else self.batches.count

    def stage(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> Tensor | None:
        """c_ℓ ℓ_t − c_r r_t, or None where both weights are 0."""
        cost = self.loss_weight * loss if self.loss_weight else None
        if self.reward_weight:
            if self.reward is None and "reward" not in metrics:
                raise InputError(
                    "reward_weight is not 0 but loss_fn's metrics have no 'reward'; return it, or "
                    "give the objective a reward function"
                )
            reward = metrics["reward"] if self.reward is None else self.reward(loss, metrics)
            cost = -self.reward_weight * reward + (0 if cost is None else cost)
        return cost


class Average:
    """Bias-corrected exponential average of iterates: θ̄_n = Σ_j d^{n−j} θ_j / Σ_j d^{n−j}. Updated
    in place. decay None keeps the last iterate only."""

    def __init__(self, decay: float | None, values: Sequence[Tensor] | None = None, count: int = 0):
        self.decay = decay
        self.count = count
        self.values = None if values is None else [v.detach().clone() for v in values]

    def weight(self, n: int) -> float:
        """The share of the n-th iterate (from 1) in θ̄_n: (1 − d) / (1 − dⁿ)."""
        return 1.0 if self.decay is None else (1 - self.decay) / (1 - self.decay**n)

    def update(self, parameters: Sequence[Tensor]) -> None:
        """Adds the next iterate."""
        self.count += 1
        if self.decay is None:
            self.values = [p.detach() for p in parameters]  # live: the last iterate, no copy
        elif self.values is None:
            self.values = [p.detach().clone() for p in parameters]
        else:
            with torch.no_grad():
                torch._foreach_lerp_(self.values, list(parameters), self.weight(self.count))

    def copy(self) -> Average:
        return Average(self.decay, self.values, self.count)

    def assign(self, other: Average) -> None:
        self.count = other.count
        self.values = None if other.values is None else [v.clone() for v in other.values]


def average_weights(decay: float | None, steps: int) -> list[float]:
    """w_1 … w_K with θ̄ = Σ_j w_j θ_j, summing to 1; (0, …, 0, 1) without averaging."""
    if decay is None:
        return [0.0] * (steps - 1) + [1.0]
    total = (1 - decay**steps) / (1 - decay)
    return [decay ** (steps - j) / total for j in range(1, steps + 1)]

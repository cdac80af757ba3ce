"""CartPole-v1 by REINFORCE: reinforcement learning whose steps can be rolled again to the bit.

A batch is the numbers of its episodes and nothing else. The loss function plays them: first states
and actions come from generators that the numbers seed, so that the same weights play the same
episodes, whenever and how often they are asked. A window can therefore be rewound and replayed as
in supervised training, a run resumed, and two methods compared on the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rhc.errors import InputError
from rhc.schedulers import ZScored
from rhc.workload import Goal, Workload

STEPS, EPISODES = 300, 4
LONGEST = 500
"""Steps after which CartPole-v1 ends an episode; its return is the number of steps."""
DISCOUNT = 0.99
PASS, HELD_OUT, TEST = 25, 5, 25
"""Batches of a pass over the training episodes, of those for choices, and of the final figures."""
APART = 10**8
"""Episodes of different seeds, and of training, validation and test, have different numbers."""


def cartpole(*, seed: int = 0, data: Path | None = None) -> Workload:
    """CartPole-v1 of gymnasium, REINFORCE with normalised returns and a learned baseline.

    The loss is 1 − mean return / 500 plus the error of the baseline; its gradient is that of
    REINFORCE. The metric "return" of every step is the mean over its EPISODES episodes.
    seed: decides the episodes; the weights are drawn from the global generator, which the caller
    has seeded with it.
    data: must be None.
    """
    if data is not None:
        raise InputError(f"runner cartpole takes no data, got --data {data}: leave it out")
    first = 3 * APART * seed
    return Workload(
        model=Actor(),
        loss_fn=reinforce(),
        train_loader=Episodes(first, PASS, fresh=True),
        val_loader=Episodes(first + APART, HELD_OUT),
        test_loader=Episodes(first + 2 * APART, TEST),
        steps=STEPS,
        optimizer="adam",
        lr={"sgd": 0.1, "adam": 0.01, "adamw": 0.01},
        threads=1,
        goal=Goal("return", over=100 // EPISODES, higher=True, target=475.0),
        noise=0.02,
        reward=ZScored("return", over=100 // EPISODES),
    )


class Actor(nn.Module):
    """(…, 4) observations -> (…, 2): the logit of pushing to the right, and the baseline; (…, 1),
    the logit alone, to act."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
        self.baseline = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, observations: Tensor, *, act: bool = False) -> Tensor:
        if act:
            return self.policy(observations)
        return torch.cat([self.policy(observations), self.baseline(observations)], -1)


class Episodes:
    """A number of batches of EPISODES episode numbers, of the APART from `first` on.

    fresh: other ones at every pass, drawn from the global generator as the order of a shuffling
    DataLoader is, so that a pass is found again by the random state in which it began.
    """

    def __init__(self, first: int, batches: int, *, fresh: bool = False) -> None:
        self.first, self.batches, self.fresh = first, batches, fresh

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Tensor]:
        count = self.batches * EPISODES
        numbers = torch.randint(APART, (count,)) if self.fresh else torch.arange(count)
        yield from (numbers + self.first).split(EPISODES)


def reinforce() -> Callable[[nn.Module, Tensor], tuple[Tensor, dict[str, Tensor]]]:
    """A loss function that plays the episodes of a batch, see `cartpole`.

    With G_t the discounted return from step t on, scaled to [0, 1], V the baseline and
    Â = (G − V) / sd(G − V): −mean Â log π(a) + mean (G − V)², whose value is shifted so that it
    says something (Foerster et al. 2018): the mean of Â log π is about 0 whatever the returns are.
    """
    environment = _environment()

    def loss_fn(model: nn.Module, batch: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        observations, actions, playing = _play(environment, model, batch)
        logits, baseline = model(observations).unbind(-1)
        returns = _returns(playing) * (1 - DISCOUNT)
        there = playing.sum()
        error = torch.where(playing, returns - baseline, 0.0)
        with torch.no_grad():
            mean = error.sum() / there
            spread = torch.where(playing, error - mean, 0.0).square().sum() / there
            advantage = torch.where(playing, error - mean, 0.0) / (spread.sqrt() + 1e-6)
        log_likelihood = nn.functional.logsigmoid(torch.where(actions, logits, -logits))
        surrogate = -(advantage * log_likelihood).sum() / there
        mean_return = playing.sum(0).to(logits.dtype).mean()
        value = 1 - mean_return / LONGEST
        loss = value + (surrogate - surrogate.detach()) + error.square().sum() / there
        return loss, {"return": mean_return}

    return loss_fn


@torch.no_grad()
def _play(environment: Any, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Observations (T, n, 4), actions (T, n) true for right, and (T, n) whether an episode was
    still going on; T the longest episode's steps."""
    first = int(batch[0])
    weight = next(model.parameters())
    chances = torch.rand(LONGEST, len(batch), generator=torch.Generator().manual_seed(first))
    # Right where sigmoid(logit) exceeds the chance.
    bars = torch.logit(chances).to(weight)
    state, _ = environment.reset(seed=first)
    going = np.ones(len(batch), dtype=bool)
    seen, done, alive = [], [], []
    for bar in bars:
        observed = torch.from_numpy(state).to(weight)
        right = (model(observed, act=True)[:, 0] > bar).cpu()
        seen.append(observed)
        done.append(right)
        alive.append(going)
        state, _, fell, ended, _ = environment.step(right.numpy().astype(np.int64))
        going = going & ~(fell | ended)
        if not going.any():
            break
    playing = torch.from_numpy(np.stack(alive)).to(weight.device)
    return torch.stack(seen), torch.stack(done).to(weight.device), playing


def _returns(playing: Tensor) -> Tensor:
    """Σ_k γ^k over the steps that are left of an episode, (T, n): 1 at its last."""
    left = playing.flip(0).cumsum(0).flip(0)
    return (1 - DISCOUNT**left) / (1 - DISCOUNT)


def _environment() -> Any:
    try:
        import gymnasium
    except ImportError:
        raise InputError(
            "runner cartpole needs gymnasium: pip install 'rhc[runners]' or pip install gymnasium"
        ) from None
    return gymnasium.make_vec(
        "CartPole-v1", num_envs=EPISODES, vectorization_mode="vector_entry_point"
    )

"""CartPole-v1 by PPO with generalised advantages: three knobs of reinforcement learning act here.

A training batch is three numbers: which rollout, which pass over it, which part. The loss function
plays the rollout when its first batch comes, from generators that its number seeds, with the
weights of that moment; these are kept in a buffer of the model, so that a run that is rewound or
resumed in the middle of a rollout finds the same transitions again. Rollouts are never played twice
for training: their returns are returns on fresh seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rhc.errors import InputError
from rhc.schedulers import ClipRange, Entropy, GaeLambda
from rhc.workload import Goal, Plannable, Workload

ENVIRONMENTS, LENGTH = 8, 200
PASSES, PARTS = 4, 5
"""Over a rollout of ENVIRONMENTS × LENGTH transitions; each part is a step of the optimizer."""

ROLLOUTS = 40
PER_EPOCH = 2
"""Rollouts of an epoch, as a planner counts."""

DISCOUNT, LONGEST = 0.99, 500
HELD_OUT, TEST = 2, 4
"""Batches of 16 episodes for choices, and for the final figures."""

EPISODES = 16
APART = 10**8
"""Episodes of different seeds, and of training, validation and test, have different numbers."""


def cartpole_ppo(*, seed: int = 0, data: Path | None = None) -> Workload:
    """CartPole-v1 of gymnasium, PPO with clipping, generalised advantages and an entropy bonus.

    The loss of a training step is 1 − the rollout's mean return / 200, with the gradient of PPO's;
    that of evaluation 1 − mean return / 500. The metric "return" is the mean over the rollout's
    first episodes, cut off at 200 steps; "fresh_return" the same, with the rollout's first step
    only. Runs are compared by the mean return over all steps: most end at the most that there is.
    seed: decides the episodes; the weights are drawn from the global generator, which the caller
    has seeded with it.
    data: must be None.
    """
    if data is not None:
        raise InputError(f"runner cartpole_ppo takes no data, got --data {data}: leave it out")
    first = 3 * APART * seed
    return Workload(
        model=ActorCritic(),
        loss_fn=PPO(),
        train_loader=Rollouts(first),
        val_loader=Episodes(first + APART, HELD_OUT),
        test_loader=Episodes(first + 2 * APART, TEST),
        steps=ROLLOUTS * PASSES * PARTS,
        optimizer="adam",
        lr={"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3},
        threads=1,
        goal=Goal("return", over=PASSES * PARTS, last=False, higher=True),
        plannable=Plannable(
            ("entropy", "clip_range", "gae_lambda"),
            with_knobs,
            epoch_steps=PER_EPOCH * PASSES * PARTS,
            returns="fresh_return",
        ),
    )


def with_knobs(workload: Workload, names: Sequence[str]) -> tuple[Workload, list[Any]]:
    """The same run with those of the three knobs that are named, to be driven."""
    made: Mapping[str, Any] = {
        "entropy": Entropy(ENTROPY), "clip_range": ClipRange(CLIP), "gae_lambda": GaeLambda(LAMBDA)
    }  # fmt: skip
    knobs = {name: made[name] for name in names}
    return replace(workload, loss_fn=PPO(**knobs)), list(knobs.values())


ENTROPY, CLIP, LAMBDA = 0.01, 0.2, 0.95
"""Schulman et al. 2017, and the usual bonus."""


class ActorCritic(nn.Module):
    """(…, 4) observations -> (…, 2): the logit of pushing to the right, and the value.

    behaviour: the weights that the rollout in hand was played with; rollout: its number.
    """

    behaviour: Tensor
    rollout: Tensor

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.policy = _network(width)
        self.value = _network(width)
        self.register_buffer("behaviour", torch.zeros(sum(p.numel() for p in self.parameters())))
        self.register_buffer("rollout", torch.tensor(-1))

    def forward(self, observations: Tensor) -> Tensor:
        return torch.cat([self.policy(observations), self.value(observations)], -1)


class Rollouts:
    """Batches {"rollout": (number, pass, part)} without end, the same at every pass."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number in count():
            for epoch in range(PASSES):
                for part in range(PARTS):
                    yield {"rollout": torch.tensor([self.first + number, epoch, part])}


class Episodes:
    """Batches {"episodes": (EPISODES,)} of numbers from `first` on, to be judged by."""

    def __init__(self, first: int, batches: int) -> None:
        self.first, self.batches = first, batches

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for i in range(self.batches):
            yield {"episodes": torch.arange(EPISODES) + self.first + EPISODES * i}


class Rollout(NamedTuple):
    """(N,) transitions, and the mean return of the first episodes."""

    observations: Tensor
    actions: Tensor
    log_likelihoods: Tensor
    advantages: Tensor
    returns: Tensor
    mean_return: Tensor


class PPO:
    """The loss function, see `cartpole_ppo`.

    −mean min(r Â, clip(r, 1 ± ε) Â) + ½ mean (V − R)² − η mean entropy, r the ratio of the
    likelihoods now and when the rollout was played (Schulman et al. 2017), Â generalised advantages
    (2016), normalised over the part.
    """

    def __init__(
        self,
        entropy: Entropy | None = None,
        clip_range: ClipRange | None = None,
        gae_lambda: GaeLambda | None = None,
    ) -> None:
        self.entropy = entropy or Entropy(ENTROPY)
        self.clip_range = clip_range or ClipRange(CLIP)
        self.gae_lambda = gae_lambda or GaeLambda(LAMBDA)
        self.environments = {n: _environments(n) for n in (ENVIRONMENTS, EPISODES)}
        self._key: tuple[int, float, Tensor] | None = None
        self._kept: Rollout | None = None

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        assert isinstance(model, ActorCritic)
        if "episodes" in batch:
            mean_return = self._judged(model, batch["episodes"])
            return 1 - mean_return / LONGEST, {"return": mean_return}
        number, epoch, part = batch["rollout"].tolist()
        played = self._rollout(model, number)
        generator = torch.Generator().manual_seed(number * PASSES + epoch)
        order = torch.randperm(len(played.actions), generator=generator)
        rows = order.tensor_split(PARTS)[part].to(played.actions.device)
        logits, values = model(played.observations[rows]).unbind(-1)
        actions, advantages = played.actions[rows], played.advantages[rows]
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-6)
        ratio = (_log_likelihood(logits, actions) - played.log_likelihoods[rows]).exp()
        epsilon = self.clip_range.value
        clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
        surrogate = -torch.minimum(ratio * advantages, clipped * advantages).mean()
        error = (values - played.returns[rows]).square().mean()
        p = torch.sigmoid(logits)
        entropy = -(p * F.logsigmoid(logits) + (1 - p) * F.logsigmoid(-logits)).mean()
        total = surrogate + 0.5 * error - self.entropy.value * entropy
        loss = 1 - played.mean_return / LENGTH + (total - total.detach())
        metrics = {"return": played.mean_return}
        if epoch == part == 0:
            metrics["fresh_return"] = played.mean_return
        return loss, metrics

    @torch.no_grad()
    def _rollout(self, model: ActorCritic, number: int) -> Rollout:
        """The rollout of that number, with the weights of when its first batch came."""
        if int(model.rollout) == number:
            weights = model.behaviour
        else:
            weights = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            if model.training:  # a model that is only judged is left as it is
                model.behaviour.copy_(weights)
                model.rollout.fill_(number)
        known = self._key
        if (
            known is None
            or known[:2] != (number, self.gae_lambda.value)
            or not torch.equal(known[2], weights)
        ):
            self._key = (number, self.gae_lambda.value, weights.clone())
            self._kept = self._play(model, weights, number)
        assert self._kept is not None
        return self._kept

    def _play(self, model: ActorCritic, weights: Tensor, number: int) -> Rollout:
        policy, value = _networks(model, weights)
        environment = self.environments[ENVIRONMENTS]
        chances = torch.rand(LENGTH, ENVIRONMENTS, generator=torch.Generator().manual_seed(number))
        state, _ = environment.reset(seed=number)
        seen, acted, fallen, valid = [], [], [], []
        begins = np.zeros(ENVIRONMENTS, bool)
        for chance in chances:
            observed = torch.from_numpy(state).to(weights)
            right = chance < torch.sigmoid(policy(observed)).cpu()
            seen.append(observed)
            acted.append(right)
            state, _, fell, ended, _ = environment.step(right.long().numpy())
            valid.append(torch.from_numpy(~begins))  # a step from a fallen pole sets it up again
            fallen.append(torch.from_numpy(fell | ended))
            begins = fell | ended
        observations = torch.stack([*seen, torch.from_numpy(state).to(weights)])
        actions, done, there = (torch.stack(t).to(weights.device) for t in (acted, fallen, valid))
        values = value(observations)
        advantages = torch.zeros_like(values[:-1])
        carried = torch.zeros_like(values[0])
        for t in range(LENGTH - 1, -1, -1):
            goes_on = (~done[t]).to(values)
            # Rewards of 1 are scaled, so that values lie in [0, 1].
            delta = (1 - DISCOUNT) + DISCOUNT * goes_on * values[t + 1] - values[t]
            carried = delta + DISCOUNT * self.gae_lambda.value * goes_on * carried
            advantages[t] = carried
        first = (done.cumsum(0) == 0).sum(0).clamp(max=LENGTH - 1) + 1
        logits = policy(observations[:-1])
        return Rollout(
            observations[:-1][there],
            actions[there],
            _log_likelihood(logits, actions)[there],
            advantages[there],
            (advantages + values[:-1])[there],
            first.to(values.dtype).mean(),
        )

    @torch.no_grad()
    def _judged(self, model: ActorCritic, episodes: Tensor) -> Tensor:
        """The mean return of these episodes, up to 500, with the weights as they are."""
        environment, first = self.environments[EPISODES], int(episodes[0])
        generator = torch.Generator().manual_seed(first)
        chances = torch.rand(LONGEST, len(episodes), generator=generator)
        state, _ = environment.reset(seed=first)
        weight = next(model.parameters())
        going, steps = np.ones(len(episodes), bool), np.zeros(len(episodes))
        for chance in chances:
            right = (
                chance < torch.sigmoid(model.policy(torch.from_numpy(state).to(weight)))[:, 0].cpu()
            )
            steps += going
            state, _, fell, ended, _ = environment.step(right.long().numpy())
            going &= ~(fell | ended)
            if not going.any():
                break
        return torch.tensor(steps.mean(), dtype=weight.dtype, device=weight.device)


def _network(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    )


def _networks(model: ActorCritic, weights: Tensor) -> tuple[Any, Any]:
    """Policy and value, (…, 4) -> (…,), of flat weights."""
    sizes = [p.numel() for p in model.parameters()]
    parts = [w.view_as(p) for w, p in zip(weights.split(sizes), model.parameters(), strict=True)]

    def network(w: Sequence[Tensor]) -> Any:
        def forward(x: Tensor) -> Tensor:
            hidden = torch.tanh(F.linear(x, w[0], w[1]))
            return F.linear(torch.tanh(F.linear(hidden, w[2], w[3])), w[4], w[5])[..., 0]

        return forward

    return network(parts[:6]), network(parts[6:])


def _log_likelihood(logits: Tensor, actions: Tensor) -> Tensor:
    return F.logsigmoid(torch.where(actions, logits, -logits))


def _environments(number: int) -> Any:
    try:
        import gymnasium
    except ImportError:
        raise InputError(
            "runner cartpole_ppo needs gymnasium: pip install 'rhc[runners]' or pip install "
            "gymnasium"
        ) from None
    return gymnasium.make_vec(
        "CartPole-v1", num_envs=number, vectorization_mode="vector_entry_point"
    )

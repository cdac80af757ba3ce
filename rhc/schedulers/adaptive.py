"""AdaptiveRL sets lr, momentum and noise from the trends of loss and reward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from rhc.errors import InputError, whole_number
from rhc.schedule.steering import BeforeSteps
from rhc.schedulers.laws import (
    IGNITION,
    Bounds,
    Cap,
    Controls,
    Gains,
    adapted,
    annealed,
    check_source,
    lowered,
    paced,
    rebound,
    shocked,
    updated,
)
from rhc.schedulers.shared import (
    NOISE_ON,
    NoiseOn,
    Scalar,
    add_noise,
    momentum_of,
    numbers,
    scalar,
    set_momentum,
)
from rhc.schedulers.signals import (
    Signals,
    Smoothing,
    Trends,
    begun_anew,
    clip,
    is_usable,
    logit,
    observed,
    restored,
    sigmoid,
    surprise,
    trends,
)

VERSION = 2


class AdaptiveRL(BeforeSteps):
    """A causal scheduler: call `scheduler.step(loss)` after every `optimizer.step()`.

    Every `every` steps, lr, momentum and noise follow the trends since the last update. Losses may
    be tensors; they are read only at updates, so no step waits for an accelerator. A loss that is
    not finite is excluded from the trends, counted in `ignored` and halves lr once per update.

    Args:
        optimizer: From the SGD or Adam families. Groups keep the ratios of their lrs; the bounds
            apply to the largest. Groups without "momentum" > 0 or "betas" get lr and noise only.
        steps: Length of the run, if known; below 10,000, updates are more frequent and larger.
        every: Steps between updates, for runs of 10,000 steps or more.
        gains: Sizes of the updates.
        bounds: Ranges of the controls; initial values outside are clipped with a warning.
            Bounds(noise=(0, 0)) disables noise.
        cap: Smallest and largest factor per update; None for no cap.
        smoothing: β of the running means.
        noise: Initial σ; 0.02 suits reinforcement learning.
        noise_on: "gradients" adds σ·RMS(g)·ξ to gradients, "gradients-by-weights" σ·RMS(θ)·ξ to
            gradients, "parameters" σ·RMS(θ)·ξ to parameters; RMS is per tensor.
        source: "both", "loss" (ignore the reward) or "reward" (ignore the loss).
        surprise: When losses jump by 3 standard deviations, reset the trends, let lr and momentum
            dip (0.9 to 0.7) and recover, and noise spike; `surprises` counts the jumps.
        anneal: Multiply lr by the square of half a cosine over `steps`, if given, and noise by half
            a cosine, until the first surprise; `controls` excludes these factors.
        settle: Pull momentum to 0.97 where nothing stands out from the noise, at the same effective
            step, and let noise respond to new plateaus and leak away. Without, the laws are those
            of the specification, see `as_specified`.
        couple_beta2: Lengthen the average of Adam's β2 in proportion to the variance of the loss,
            by ×½ to ×2.
        seed: Of the noise, which is a function of (seed, step).

    Raises:
        InputError: An argument is out of range.
    """

    optimizer: Optimizer

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        steps: int | None = None,
        every: int = 20,
        gains: Gains | None = None,
        bounds: Bounds | None = None,
        cap: Cap | None = (0.8, 1.25),
        smoothing: Smoothing | None = None,
        noise: float = 0.0,
        noise_on: NoiseOn = "gradients",
        source: str = "both",
        surprise: bool = True,
        anneal: bool = True,
        settle: bool = True,
        couple_beta2: bool = False,
        seed: int = 0,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise InputError(
                f"AdaptiveRL steers a torch.optim.Optimizer, got {type(optimizer).__name__}: "
                "pass the optimizer itself"
            )
        every, seed = whole_number("every", every), whole_number("seed", seed)
        steps = None if steps is None else whole_number("steps", steps)
        if every < 1:
            raise InputError(f"every must be ≥ 1 steps, got {every}")
        if steps is not None and steps < 1:
            raise InputError(f"steps must be ≥ 1 or None, got {steps}")
        if cap is not None and not 0 < cap[0] <= 1 <= cap[1]:
            raise InputError(f"cap must be (≤ 1, ≥ 1) and positive, got {cap}; None for no cap")
        if not 0 <= noise < math.inf:
            raise InputError(f"noise must be ≥ 0 and finite, got {noise:g}")
        if noise_on not in NOISE_ON:
            raise InputError(f"noise_on must be one of {', '.join(NOISE_ON)}, got {noise_on!r}")
        check_source(source)
        self.optimizer = optimizer
        self.cap, self.seed, self.bounds = cap, seed, bounds or Bounds()
        gains, self.every, faster = paced(gains or Gains(), every, steps)
        self.gains = gains.for_source(source)
        usual = Smoothing()
        self.smoothing = smoothing or replace(
            usual.faster(faster), plateau=min(usual.plateau * self.every / 20, 1.0)
        )
        self.noise_on, self.source, self.couple_beta2 = noise_on, source, couple_beta2
        self.surprise, self.settle = surprise, settle
        self.signals, self.trends = Signals(), Trends()
        self.steps = self.updates = self.ignored = self.noise_steps = self.surprises = 0
        self._annealed_steps = steps if anneal else None
        self._pending: list[tuple[Scalar, Scalar]] = []
        self._rebound = 1.0
        self._warned = False
        groups = optimizer.param_groups
        largest = max(float(group["lr"]) for group in groups)
        momentum = next((m for m in map(momentum_of, groups) if m is not None), None)
        self._groups = [_Group.of(group, largest, momentum) for group in groups]
        asked = Controls(largest, momentum, noise)
        self.controls = self.bounds.clipped(asked)
        self._warn_of_bounds(asked)
        self._write()
        self.hook("_add_noise")

    @classmethod
    def as_specified(cls, optimizer: Optimizer, **settings: Any) -> AdaptiveRL:
        """The specified laws and constants, with nothing that was added to them.

        Gains 0.02, 0.02 (lr), 0.01, 0.02 (momentum), 0.05, 0.04 (noise); β 0.02 for loss, reward
        and their usual changes, 0.01 for the variance; an update every 20 steps, by ×0.8 to ×1.25;
        lr in [1e-5, 0.1], momentum in [0.6, 0.995], noise in [0, 0.2]. Without a reward Δ̃r = −Δ̃ℓ.
        Not annealed, no surprises, whatever the length of the run. Noise is switched on by a
        plateau, since log σ cannot leave 0.

        Args:
            optimizer: As in the constructor, like the settings.
        """
        bare = {"surprise": False, "anneal": False, "settle": False}
        return cls(optimizer, **{**bare, "smoothing": Smoothing(scale=0.02), **settings})

    def step(
        self, loss: Tensor | float | None = None, reward: Tensor | float | None = None
    ) -> None:
        """Records one step of the optimizer; call it after `optimizer.step()`.

        Args:
            loss: Scalar; the mean over accumulated micro-batches. If a framework calls `step()`
                without arguments, call `observe` first.
            reward: Scalar, higher is better; may be given at some steps only.
        """
        if loss is not None or reward is not None:
            self.observe(loss, reward)
        self.steps += 1
        if self.steps % self.every == 0:
            self._update()

    def observe(
        self, loss: Tensor | float | None = None, reward: Tensor | float | None = None
    ) -> None:
        """Adds a loss, a reward or both to the data of the next update."""
        self._pending.append((scalar(loss, "loss"), scalar(reward, "reward")))

    def get_last_lr(self) -> list[float]:
        """The lr of every parameter group, as in torch's schedulers."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    @property
    def values(self) -> dict[str, float | None]:
        """Controls, trends and plateau score of the last update, for logging."""
        return {
            "lr": self._lr(),
            "momentum": self.controls.momentum,
            "noise": self._noise(),
            "loss_trend": self.trends.loss,
            "reward_trend": self.trends.reward,
            "plateau": self.trends.plateau,
        }

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists and strings, from which a scheduler continues bit for bit."""
        self._add_groups()
        self._pending = [(loss, reward) for loss, reward in numbers(self._pending)]
        return {
            "version": VERSION,
            "controls": asdict(self.controls),
            "signals": asdict(self.signals),
            "trends": asdict(self.trends),
            "steps": self.steps,
            "updates": self.updates,
            "ignored": self.ignored,
            "noise_steps": self.noise_steps,
            "surprises": self.surprises,
            "rebound": self._rebound,
            "pending": [list(pair) for pair in self._pending],
            "shares": [group.share for group in self._groups],
            "logits": [group.offset or 0.0 for group in self._groups],
            "beta2": [group.beta2 for group in self._groups],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`; also sets the optimizer's lr and momentum.

        Raises:
            InputError: The version or the number of parameter groups differs.
        """
        if state.get("version") != VERSION:
            raise InputError(
                f"the state is of AdaptiveRL version {state.get('version')}, this is version "
                f"{VERSION}: load it with the rhc that wrote it"
            )
        self._add_groups()
        if len(state["shares"]) != len(self._groups):
            raise InputError(
                f"the state is of {len(state['shares'])} parameter groups, the optimizer has "
                f"{len(self._groups)}: build the optimizer as it was when the state was saved"
            )
        self.controls = restored(Controls, state["controls"])
        self.signals = restored(Signals, state["signals"])
        self.trends = restored(Trends, state["trends"])
        self.steps, self.updates = state["steps"], state["updates"]
        self.ignored, self.noise_steps = state["ignored"], state["noise_steps"]
        self.surprises = state["surprises"]
        self._rebound = state.get("rebound", 1.0)
        self._pending = [(loss, reward) for loss, reward in state["pending"]]
        saved = zip(state["shares"], state["logits"], state["beta2"], strict=True)
        self._groups = [
            _Group(share, None if group.offset is None else offset, beta2)
            for group, (share, offset, beta2) in zip(self._groups, saved, strict=True)
        ]
        self._write()

    def _update(self) -> None:
        pending = [(loss, reward) for loss, reward in numbers(self._pending)]
        self._pending = []
        ignored = sum(x is not None and not is_usable(x) for pair in pending for x in pair)
        if not self._take_in(pending):
            self.controls = self._next_controls()
        if ignored:
            self.ignored += ignored
            self.controls = lowered(self.controls, self.bounds)
            self._warn_once()
        self.updates += 1
        self._write()

    def _take_in(self, pending: list[tuple[float | None, float | None]]) -> bool:
        """Whether the losses surprised; the controls have answered then."""
        losses = [math.nan if loss is None else loss for loss, _ in pending]
        anew = surprise(self.signals, losses) if self.surprise else None
        if self.surprise and anew is None and surprise(self.signals, 2 * losses[-1:]) is not None:
            # One loss is no jump yet, but must not move the trends that it is held against.
            self._pending = [pending[-1]]
            pending, losses = pending[:-1], losses[:-1]
        if anew is not None:
            self.controls = replace(self.controls, lr=self._lr())  # from here on not annealed
            self.surprises += 1
            self.signals = begun_anew(self.signals)
            after = shocked(self.controls, self.bounds, self.cap)
            self._rebound = rebound(self.controls, after) if self._is_coupled else 1.0
            self.controls = after
            losses[:anew] = [math.nan] * anew
        for loss, (_, reward) in zip(losses, pending, strict=True):
            wanted = None if self.source == "loss" else reward
            self.signals = observed(self.signals, loss, wanted, self.smoothing)
        self.trends, self.signals = trends(self.signals, self.smoothing)
        if anew is not None:
            # The reset trends have not seen the rise that caused the reset.
            reward = -1.0 if self.signals.reward_mark is None else self.trends.reward
            self.trends = replace(self.trends, loss=1.0, reward=reward)
        elif not self.settle and self.signals.reward_mark is None:
            self.trends = replace(self.trends, reward=-self.trends.loss)
        return anew is not None

    def _next_controls(self) -> Controls:
        if not self.settle:
            return updated(self.controls, self.trends, self.gains, self.bounds, self.cap)
        started = replace(self.controls, lr=self.controls.lr * self._rebound)
        self._rebound = 1.0
        return adapted(
            started,
            self.trends,
            self.gains,
            self.bounds,
            self.cap,
            every=self.every,
            age=self.signals.steps / self.every,
            coupled=self._is_coupled,
        )

    @property
    def _is_coupled(self) -> bool:
        return all("betas" not in group for group in self.optimizer.param_groups)

    def _write(self) -> None:
        self.steers()
        self._add_groups()
        longer, largest, momentum = self._beta2_factor(), self._lr(), self.controls.momentum
        for group, own in zip(self.optimizer.param_groups, self._groups, strict=True):
            lr = largest * own.share
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            if own.offset is None or momentum is None:
                continue
            moved = momentum
            if own.offset:
                moved = clip(sigmoid(logit(momentum) + own.offset), self.bounds.momentum)
            set_momentum(group, moved)
            if own.beta2 is not None:
                beta2 = 1 - (1 - own.beta2) / longer if self.couple_beta2 else own.beta2
                group["betas"] = (moved, beta2)

    def _add_groups(self) -> None:
        """Registers groups added since, at their present lr ratio to the others."""
        groups, known = self.optimizer.param_groups, len(self._groups)
        if len(groups) == known:
            return
        # From the lrs last written: the controls may have moved since.
        shares = [group.share for group in self._groups]
        lead = shares.index(max(shares))
        largest = float(groups[lead]["lr"]) / (shares[lead] or 1.0)
        steered = next((i for i, g in enumerate(self._groups) if g.offset is not None), None)
        momentum = None if steered is None else momentum_of(groups[steered])
        self._groups += [_Group.of(group, largest, momentum) for group in groups[known:]]
        most = max(group.share for group in self._groups)
        if most > 1:  # the bounds apply to the largest
            self._groups = [replace(group, share=group.share / most) for group in self._groups]
            self.controls = replace(self.controls, lr=self.controls.lr * most)

    def _anneal(self) -> float:
        if self._annealed_steps is None or self.surprises:
            return 1.0
        return annealed(self.steps, self._annealed_steps)

    def _lr(self) -> float:
        lr = self.controls.lr
        return max(lr * self._anneal(), min(lr, self.bounds.lr[0]))

    def _noise(self) -> float:
        lowest = self.bounds.noise[0]
        noise = max(self.controls.noise * math.sqrt(self._anneal()), lowest)
        return noise if noise >= IGNITION or lowest > 0 else 0.0

    def _beta2_factor(self) -> float:
        """Factor on the averaging time of β2: variance of the loss over its usual value."""
        usual = self.signals.usual_variance.value
        return clip(self.signals.variance.value / usual, (0.5, 2.0)) if usual > 0 else 1.0

    def _add_noise(self, *_: Any) -> None:
        step, self.noise_steps = self.noise_steps, self.noise_steps + 1
        if self.is_steering:
            groups = self.optimizer.param_groups
            add_noise(groups, self._noise(), self.seed, step, self.noise_on)

    def _warn_of_bounds(self, asked: Controls) -> None:
        for name, wanted in asdict(asked).items():
            begins = getattr(self.controls, name)
            if wanted != begins:
                low, high = getattr(self.bounds, name)
                warnings.warn(
                    f"{name} {wanted:g} lies outside AdaptiveRL's bounds [{low:g}, {high:g}] and "
                    f"begins at {begins:g}: give bounds=Bounds({name}=(…, …)) for others",
                    stacklevel=3,
                )

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a loss or reward before step {self.steps} is not finite: it is left out of the "
                f"trends and lr is halved to {self.controls.lr:g}; `ignored` counts them",
                stacklevel=4,
            )


@dataclass(frozen=True)
class _Group:
    """A parameter group. share: of the largest lr. offset: logits of its momentum above the first
    group's that has one; None if it has none. beta2: initial value."""

    share: float
    offset: float | None
    beta2: float | None

    @classmethod
    def of(cls, group: Mapping[str, Any], largest: float, momentum: float | None) -> _Group:
        share = float(group["lr"]) / largest if largest > 0 else 1.0
        own, offset = momentum_of(group), None
        if own is not None:
            offset = 0.0 if momentum is None else logit(own) - logit(momentum)
        beta2 = float(group["betas"][1]) if "betas" in group else None
        return cls(share, offset, beta2)

"""AdaptiveRL: learning rate, momentum and noise from the trends of loss and reward."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from rhc.errors import InputError, whole_number
from rhc.rng import root_mean_square, standard_noise
from rhc.schedule.steering import BeforeSteps
from rhc.schedulers.laws import (
    Bounds,
    Cap,
    Controls,
    Gains,
    annealed,
    dipped,
    lowered,
    paced,
    updated,
)
from rhc.schedulers.signals import (
    Average,
    Signals,
    Smoothing,
    Trends,
    begun_anew,
    is_usable,
    observed,
    surprise,
    trends,
)

VERSION = 2

NoiseOn = Literal["gradients", "gradients-by-weights", "parameters"]
NOISE_ON: tuple[NoiseOn, ...] = ("gradients", "gradients-by-weights", "parameters")

SOURCES = ("both", "loss", "reward")


class AdaptiveRL(BeforeSteps):
    """A scheduler that is driven by what the run does: `scheduler.step(loss)` after every
    `optimizer.step()`.

    Every `every` steps the laws of `rhc.schedulers.laws` move lr, momentum and noise by the trends
    of all steps since the last time. Losses may be tensors on any device; they are read when an
    update is due and not before, so that no step waits for an accelerator. One that is NaN or
    infinite is left out of the trends, lowers lr by half once per update, is counted in `ignored`,
    and warned of once.

    optimizer: SGD and Adam families: groups with "momentum" > 0 or "betas" are steered in μ (β2
    stays, see `couple_beta2`), others in lr and noise alone. The lrs of groups keep their ratios,
    those of groups that are added later the ratio that they then have, and the bounds hold for the
    largest; one that begins outside them begins at the bound, and a warning says so.
    steps: how long the run will be, where that is known: one shorter than 10,000 steps is updated
    more often and further at a time, see `rhc.schedulers.laws.paced`.
    anneal: where `steps` is known, lr is what the laws make of it times half a cosine, and ends at
    the lower bound; `controls` has it without that factor. A run whose losses have surprised may do
    so again, and is not annealed from there on.
    surprise: where the losses since the last update lie 3 standard deviations above those before,
    the data or the task have changed: the trends begin anew there, and momentum falls (0.9 to 0.7).
    `surprises` counts it.
    noise: σ at the beginning; 0.02 suits reinforcement learning. noise_on: σ·RMS(g)·ξ on every
    gradient ("gradients"), σ·RMS(θ)·ξ on every gradient ("gradients-by-weights"), or α·σ·RMS(θ)·ξ
    on the parameters themselves ("parameters"); before each step of the optimizer, from a private
    generator of (seed, step). To switch noise off, bound it: Bounds(noise=(0, 0)).
    source: which trends count: "both"; "loss": a reward is not looked at; "reward": the terms of
    the loss are left out.
    cap: factors that no update goes beyond. couple_beta2: Adam's β2 averages twice as long where
    the variance of the loss is twice its usual one, and half as long where it is half.

    Raises InputError for settings that cannot be.
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
        if source not in SOURCES:
            raise InputError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
        self.optimizer = optimizer
        self.cap, self.seed, self.bounds = cap, seed, bounds or Bounds()
        self.gains, self.every, faster = paced(gains or Gains(), every, steps)
        usual = Smoothing()
        self.smoothing = smoothing or replace(
            usual, loss=min(usual.loss * faster, 0.05), reward=min(usual.reward * faster, 0.05)
        )
        self.noise_on, self.source, self.couple_beta2 = noise_on, source, couple_beta2
        self.surprise = surprise
        self._horizon = steps if anneal else None
        self.signals, self.trends = Signals(), Trends()
        self.steps = self.updates = self.ignored = self.noise_steps = self.surprises = 0
        self._pending: list[tuple[Any, Any]] = []
        self._warned = False
        self._groups = [_Group(group) for group in optimizer.param_groups]
        top = max(group.lr for group in self._groups)
        self._shares = [group.lr / top if top > 0 else 1.0 for group in self._groups]
        lead = next((g.momentum for g in self._groups if g.momentum is not None), None)
        self._logits = [
            0.0 if g.momentum is None or lead is None else _logit(g.momentum) - _logit(lead)
            for g in self._groups
        ]
        asked = Controls(top, lead, noise)
        self.controls = self.bounds.clipped(asked)
        self._tell_clipped(asked)
        self._write()
        self.hook("_add_noise")

    def step(
        self, loss: Tensor | float | None = None, reward: Tensor | float | None = None
    ) -> None:
        """Once per step of the optimizer, after it.

        loss: of that step, a scalar (a mean over accumulated micro-batches). reward: higher is
        better, whenever there is one. Where a framework calls `step()` by itself, `observe` gives
        both beforehand.
        """
        if loss is not None or reward is not None:
            self.observe(loss, reward)
        self.steps += 1
        if self.steps % self.every == 0:
            self._update()

    def observe(
        self, loss: Tensor | float | None = None, reward: Tensor | float | None = None
    ) -> None:
        """Adds a loss, a reward or both to what the next update looks at."""
        self._pending.append((_kept(loss, "loss"), _kept(reward, "reward")))

    def get_last_lr(self) -> list[float]:
        """The lr of every parameter group, as torch's schedulers give it."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    @property
    def values(self) -> dict[str, float | None]:
        """Controls, trends and plateau score of the last update, for logs and pictures."""
        return {
            "lr": self._lr(),
            "momentum": self.controls.momentum,
            "noise": self.controls.noise,
            "loss_trend": self.trends.loss,
            "reward_trend": self.trends.reward,
            "plateau": self.trends.plateau,
        }

    def state_dict(self) -> dict[str, Any]:
        """Numbers, lists and strings only; a scheduler that loads it goes on bit for bit."""
        self._take_up()
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
            "pending": [list(pair) for pair in self._read_pending()],
            "shares": list(self._shares),
            "logits": list(self._logits),
            "beta2": [group.beta2 for group in self._groups],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The state of another AdaptiveRL; also sets the optimizer's lr and momentum.

        Raises InputError where it is of another version or another number of parameter groups.
        """
        if state.get("version") != VERSION:
            raise InputError(
                f"the state is of AdaptiveRL version {state.get('version')}, this is version "
                f"{VERSION}: load it with the rhc that wrote it"
            )
        self._take_up()
        if len(state["shares"]) != len(self._groups):
            raise InputError(
                f"the state is of {len(state['shares'])} parameter groups, the optimizer has "
                f"{len(self._groups)}: build the optimizer as it was when the state was saved"
            )
        self.controls = Controls(**state["controls"])
        restored: dict[str, Any] = {
            name: Average(**value) if isinstance(value, Mapping) else value
            for name, value in state["signals"].items()
        }
        self.signals = Signals(**restored)
        self.trends = Trends(**state["trends"])
        self.steps, self.updates = state["steps"], state["updates"]
        self.ignored, self.noise_steps = state["ignored"], state["noise_steps"]
        self.surprises = state["surprises"]
        self._pending = [(loss, reward) for loss, reward in state["pending"]]
        self._shares, self._logits = list(state["shares"]), list(state["logits"])
        for group, beta2 in zip(self._groups, state["beta2"], strict=True):
            group.beta2 = beta2
        self._write()

    def _update(self) -> None:
        lost = 0
        pending = self._read_pending()
        seen = [math.nan if loss is None else loss for loss, _ in pending]
        anew = surprise(self.signals, seen) if self.surprise else None
        if anew is not None:
            self.surprises += 1
            self.signals = begun_anew(self.signals)
            self.controls = dipped(self.controls, self.bounds)
        for i, (loss, reward) in enumerate(pending):
            lost += sum(x is not None and not is_usable(x) for x in (loss, reward))
            wanted = None if self.source == "loss" else reward
            told = seen[i] if anew is None or i >= anew else math.nan
            self.signals = observed(self.signals, told, wanted, self.smoothing)
        self._pending = []
        self.trends, self.signals = trends(self.signals, self.smoothing)
        if anew is not None:
            # What begins anew has not seen the rise that it begins with.
            own = -1.0 if self.signals.reward_mark is None else self.trends.reward
            self.trends = replace(self.trends, loss=1.0, reward=own)
        gains = self.gains
        if self.source == "reward":
            gains = Gains(**{**asdict(gains), "lr_loss": 0.0, "momentum_loss": 0.0})
        if lost:
            self.ignored += lost
            self.controls = lowered(self.controls, self.bounds)
            self._warn_once()
        else:
            self.controls = updated(self.controls, self.trends, gains, self.bounds, self.cap)
        self.updates += 1
        self._write()

    def _read_pending(self) -> list[tuple[float | None, float | None]]:
        """As numbers; tensors of a device are read in one transfer."""
        tensors = [x for pair in self._pending for x in pair if isinstance(x, Tensor)]
        numbers: list[float] = []
        if tensors:
            same = len({t.device for t in tensors}) == 1
            numbers = (
                torch.stack(
                    [t.double() if t.device.type == "cpu" else t.float() for t in tensors]
                ).tolist()
                if same
                else [float(t) for t in tensors]
            )
        found = iter(numbers)
        read = [
            tuple(next(found) if isinstance(x, Tensor) else x for x in pair)
            for pair in self._pending
        ]
        self._pending = [(pair[0], pair[1]) for pair in read]
        return self._pending

    def _write(self) -> None:
        """The controls into the optimizer's groups. A tensor lr, of a compiled step, stays one."""
        self.steers()
        self._take_up()
        quotient, top = self._variance_quotient(), self._lr()
        for group, own, share, logit in zip(
            self.optimizer.param_groups, self._groups, self._shares, self._logits, strict=True
        ):
            lr = top * share
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            if own.momentum is None or self.controls.momentum is None:
                continue
            low, high = self.bounds.momentum
            moved = self.controls.momentum
            if logit:
                moved = min(max(_sigmoid(_logit(moved) + logit), low), high)
            if own.beta2 is None:
                group["momentum"] = moved
            else:
                beta2 = 1 - (1 - own.beta2) / quotient if self.couple_beta2 else own.beta2
                group["betas"] = (moved, beta2)

    def _take_up(self) -> None:
        """Groups that were added since: in the ratio to the others that they have now."""
        groups, known = self.optimizer.param_groups, len(self._groups)
        if len(groups) == known:
            return
        # As they were written last: what is to be written may have moved already.
        lead = self._shares.index(max(self._shares))
        now = float(groups[lead]["lr"]) / (self._shares[lead] or 1.0)
        steered = next((i for i, g in enumerate(self._groups) if g.momentum is not None), None)
        written = None if steered is None else _Group(groups[steered]).momentum
        for group in groups[known:]:
            own, logit = _Group(group), 0.0
            if own.momentum is not None and written is not None and steered is not None:
                logit = _logit(own.momentum) - _logit(written) + self._logits[steered]
            self._groups.append(own)
            self._shares.append(own.lr / now if now > 0 else 1.0)
            self._logits.append(logit)
        most = max(self._shares)
        if most > 1:  # the bounds hold for the largest
            self._shares = [share / most for share in self._shares]
            self.controls = replace(self.controls, lr=self.controls.lr * most)

    def _lr(self) -> float:
        """The largest lr of the groups."""
        lr = self.controls.lr
        if self._horizon is None or self.surprises:
            return lr
        return max(lr * annealed(self.steps, self._horizon), min(lr, self.bounds.lr[0]))

    def _variance_quotient(self) -> float:
        usual = self.signals.usual_variance.value
        return min(max(self.signals.variance.value / usual, 0.5), 2.0) if usual > 0 else 1.0

    @torch.no_grad()
    def _add_noise(self, *_: Any) -> None:
        step, self.noise_steps = self.noise_steps, self.noise_steps + 1
        sigma = self.controls.noise
        if sigma == 0 or not self.is_steering:
            return
        for number, group in enumerate(self.optimizer.param_groups):
            parameters = [p for p in group["params"] if p.requires_grad]
            lr = float(group["lr"]) if self.noise_on == "parameters" else 0.0
            noise = standard_noise(parameters, self.seed + number, step)
            for p, xi in zip(parameters, noise, strict=True):
                if p.grad is None or p.grad.is_sparse:
                    continue
                if self.noise_on == "gradients":
                    p.grad.addcmul_(xi, root_mean_square(p.grad), value=sigma)
                elif self.noise_on == "gradients-by-weights":
                    p.grad.addcmul_(xi, root_mean_square(p), value=sigma)
                else:
                    p.addcmul_(xi, root_mean_square(p), value=lr * sigma)

    def _tell_clipped(self, asked: Controls) -> None:
        for name in ("lr", "momentum", "noise"):
            wanted, given = getattr(asked, name), getattr(self.controls, name)
            if wanted != given:
                low, high = getattr(self.bounds, name)
                warnings.warn(
                    f"{name} {wanted:g} lies outside AdaptiveRL's bounds [{low:g}, {high:g}] and "
                    f"begins at {given:g}: give bounds=Bounds({name}=(…, …)) for others",
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


class _Group:
    """What a parameter group began with: lr; μ and β2, None where it has none."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        self.lr = float(group["lr"])
        self.beta2: float | None = None
        self.momentum: float | None = None
        if "betas" in group:
            self.momentum, self.beta2 = (float(beta) for beta in group["betas"])
        elif group.get("momentum"):
            self.momentum = float(group["momentum"])
        if self.momentum is not None and not 0 < self.momentum < 1:
            self.momentum = None  # nothing to steer on a logit scale


def _kept(value: Any, name: str) -> Any:
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise InputError(
                f"{name} must be a scalar, got shape {tuple(value.shape)}: pass its mean"
            )
        # A graph's memory may be used again for the next step.
        return value.detach().reshape(()).clone()
    return float(value)


def _logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

"""Distills hindsight schedules into a causal scheduler.

A policy imitates the schedules' moves from causal features of tapes, then also on the states that
it reaches itself (DAgger: Ross, Gordon, Bagnell 2011).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rhc.errors import InputError, whole_number
from rhc.hindsight.features import STEERED, Form, Observer, raw, stepped
from rhc.hindsight.policy import LIMIT, Lesson, Policy
from rhc.schedule import Schedule
from rhc.schedulers import AdaptiveRL
from rhc.schedulers.laws import Bounds, Cap, Controls
from rhc.schedulers.shared import NoiseOn
from rhc.schedulers.signals import clip

VARIES = 1e-6
"""A control that varies by less in its coordinate is not steered."""


class Example:
    """A run to distill. start_lr: the lr a user would start from; None for the schedule's first."""

    def __init__(
        self,
        name: str,
        rows: Sequence[Mapping[str, Any]],
        schedule: Schedule,
        start_lr: float | None = None,
    ) -> None:
        if len(rows) != len(schedule):
            raise InputError(
                f"run {name} has a tape of {len(rows)} steps and a schedule of {len(schedule)}; "
                "distil runs that have ended"
            )
        if "lr" not in schedule:
            raise InputError(f"run {name} has a schedule without lr; distil runs that have one")
        self.name, self.rows, self.schedule = name, rows, schedule
        self.columns = {
            name: schedule[name].reshape(len(rows), -1).amax(1)
            for name in STEERED
            if name in schedule
        }
        self.start_lr = float(self.columns["lr"][0]) if start_lr is None else start_lr

    @property
    def steered(self) -> tuple[str, ...]:
        found = []
        for name, column in self.columns.items():
            if raw(name, float(column.max())) - raw(name, float(column.min())) > VARIES:
                found.append(name)
        return tuple(found)

    def has(self, column: str) -> bool:
        return any(row.get(column) is not None for row in self.rows)

    def block(self, number: int, every: int) -> Controls:
        part = slice(number * every, min((number + 1) * every, len(self.rows)))
        means = {
            name: float(column[part].log().mean().exp())
            if name == "lr" and bool((column[part] > 0).all())
            else float(column[part].mean())
            for name, column in self.columns.items()
        }
        momentum = means.get("momentum") or None
        return Controls(means["lr"], momentum, means.get("noise", 0.0))

    def start(self) -> Controls:
        first = self.block(0, 1)
        return Controls(self.start_lr, first.momentum, first.noise)


def form_of(
    examples: Sequence[Example], controls: Sequence[str] | None, *, gradient_norm: bool
) -> Form:
    """The features that all examples have; InputError if runs are incompatible."""
    if not examples:
        raise InputError("there is nothing to distil; give at least one run")
    # A constant schedule, such as a smoother's probe, is compatible with any other.
    first = next((e for e in examples if e.steered), examples[0])
    for other in examples:
        pairs = [(tuple(first.columns), tuple(other.columns))]
        if controls is None and other.steered:
            pairs.insert(0, (first.steered, other.steered))
        for ours, theirs in pairs:
            if set(ours) != set(theirs):
                raise InputError(
                    f"runs {first.name} and {other.name} have different controls, "
                    f"{', '.join(ours) or 'none'} and {', '.join(theirs) or 'none'}; distil runs "
                    "of one kind, or name those to learn with --controls"
                )
        if other.has("reward") != first.has("reward"):
            with_one, without = (first, other) if first.has("reward") else (other, first)
            raise InputError(
                f"run {without.name} has no reward in its tape and run {with_one.name} has; "
                "distil them apart"
            )
        if gradient_norm and not other.has("gradient_norm"):
            raise InputError(
                f"run {other.name} has no gradient_norm in its tape; leave --gradient-norms out"
            )
    steered = first.steered if controls is None else tuple(controls)
    for name in steered:
        if name not in first.columns:
            raise InputError(
                f"control {name!r} is not in these runs' schedules or cannot be distilled; choose "
                f"of {', '.join(first.columns)}"
            )
    if not steered:
        raise InputError(
            f"nothing moves in run {first.name}: its schedule is constant; distil runs whose "
            "schedule was rewritten, or smoothed"
        )
    return Form(tuple(n for n in STEERED if n in steered), first.has("reward"), gradient_norm)


def lesson(example: Example, form: Form, every: int, *, known: bool) -> Lesson:
    """Features and target moves at each update. known: whether the length is a feature."""
    observer = Observer(form, example.start())
    steps = len(example.rows)
    features, targets = [], []
    for t, row in enumerate(example.rows):
        observer.observe(row.get("loss"), row.get("reward"))
        done = t + 1
        if done % every or done == steps:
            continue
        observer.observe_norm(row.get("gradient_norm"))
        now = example.block(done // every - 1, every)
        features.append(observer.features(now, done / steps if known else None))
        targets.append(target(example, form, done, every, now))
    if not features:
        raise InputError(
            f"run {example.name} has {steps} steps, too few for updates every {every}; lower "
            "--every or distil longer runs"
        )
    return Lesson(example.name, torch.tensor(features), torch.tensor(targets))


def target(example: Example, form: Form, done: int, every: int, now: Controls) -> list[float]:
    """The example's next move after `done` steps, for a run at `now`."""
    then = example.block(min(done, len(example.rows) - 1) // every, every)
    moves = []
    for name in form.steered:
        was, will = getattr(now, name), getattr(then, name)
        move = 0.0 if was is None or will is None else raw(name, will) - raw(name, was)
        moves.append(clip(move, (-LIMIT, LIMIT)))
    return moves


class DistilledScheduler(AdaptiveRL):
    """AdaptiveRL with a learned policy: call `scheduler.step(loss)` after every `optimizer.step()`.

    When a feature is outside the policy's training range, AdaptiveRL's laws make that update;
    `fallbacks` counts these, with one warning. Gradient norms, if used, are computed here.

    Args:
        optimizer: As in AdaptiveRL, like the arguments not listed here.
        policy: Written by `rhc distill`, see `load`.
        steps: Length of the run, if known; an input of policies.

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        policy: Policy,
        *,
        steps: int | None = None,
        bounds: Bounds | None = None,
        cap: Cap | None = (0.8, 1.25),
        noise: float = 0.0,
        noise_on: NoiseOn = "gradients",
        seed: int = 0,
    ) -> None:
        steps = None if steps is None else whole_number("steps", steps)
        if steps is not None and steps < 1:
            raise InputError(f"steps must be ≥ 1, got {steps}; leave it out where nobody knows")
        super().__init__(
            optimizer,
            every=policy.every,
            bounds=bounds,
            cap=cap,
            noise=noise,
            noise_on=noise_on,
            surprise=False,
            anneal=False,
            seed=seed,
        )
        self.policy, self.length = policy, steps
        self.fallbacks = 0
        self.observer = Observer(policy.form, self.controls)
        self.memory = policy.network.memory(1)
        self.seen: list[float] = []
        """The features of the last update."""
        self._moves: dict[str, float] = {}
        self._told = False
        self._norm: Tensor | None = None
        if policy.form.gradient_norm:
            self.hook("_take_norm")

    @classmethod
    def load(cls, policy: str | Path, optimizer: Optimizer, **settings: Any) -> DistilledScheduler:
        """A scheduler with the policy saved by `rhc distill`; settings as in the constructor."""
        return cls(optimizer, Policy.load(policy), **settings)

    def state_dict(self) -> dict[str, Any]:
        """AdaptiveRL's state and the policy's memory, without the policy itself."""
        return {
            **super().state_dict(),
            "distilled": {
                "memory": self.memory.flatten().tolist(),
                "observer": self.observer.state(),
                "fallbacks": self.fallbacks,
                "length": self.length,
                "features": list(self.policy.form.names),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`.

        Raises:
            InputError: The state belongs to another policy.
        """
        own = state.get("distilled")
        if (
            own is None
            or own["features"] != list(self.policy.form.names)
            or len(own["memory"]) != self.memory.numel()
        ):
            raise InputError(
                "the state is not of a DistilledScheduler with this policy; load the policy that "
                "it was saved with"
            )
        super().load_state_dict(state)
        self.memory = torch.tensor(own["memory"]).reshape(1, 1, -1)
        self.observer.load_state(own["observer"])
        self.fallbacks, self.length = own["fallbacks"], own["length"]

    def _take_in(self, pending: list[tuple[float | None, float | None]]) -> bool:
        surprised = super()._take_in(pending)
        for loss, reward in pending:
            self.observer.observe(loss, reward)
        if self._norm is not None:
            self.observer.observe_norm(float(self._norm))
        progress = None if self.length is None else min(self.steps / self.length, 1.0)
        self.seen = self.observer.features(self.controls, progress)
        self._moves, self.memory = self.policy.moves(self.seen, self.memory)
        return surprised

    def _next_controls(self) -> Controls:
        outside = self.policy.outside(self.seen)
        if self.policy.form.reward and self.signals.reward_mark is None:
            outside = "reward, which the policy goes by and nobody gave"
        if outside is None:
            return self.bounds.clipped(stepped(self.controls, self._moves))
        self.fallbacks += 1
        self._tell_outside(outside)
        return super()._next_controls()

    def _tell_outside(self, name: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                f"at step {self.steps} a feature is outside what the policy was distilled from "
                f"({name}): such updates are AdaptiveRL's; `fallbacks` counts them",
                stacklevel=5,
            )

    @torch.no_grad()
    def _take_norm(self, *_: Any) -> None:
        if (self.steps + 1) % self.every == 0:
            groups = self.optimizer.param_groups
            grads = [p.grad for g in groups for p in g["params"] if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(grads) if grads else None

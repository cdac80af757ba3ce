"""EpochPlanner plans each epoch from the one before, without replay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from rhc.containers import length
from rhc.errors import InputError, whole_number
from rhc.events import EpochPlanned, Event, Intervened
from rhc.schedule.steering import BeforeSteps
from rhc.schedulers.guards import Failsafe, Law, Planned, Smoothed
from rhc.schedulers.knobs import Knob, made
from rhc.schedulers.laws import Bounds, Gains
from rhc.schedulers.plan import (
    KNOBS,
    PLAN_BOUNDS,
    PLAN_GAINS,
    STEERED,
    EpochPlan,
    Intervention,
    after_drift,
    capped,
    checked_names,
    gains_of,
)
from rhc.schedulers.rewards import FreshSeeds, RewardSource, TrainingTape, ValidationLoss
from rhc.schedulers.sampler import LossSampler
from rhc.schedulers.shared import (
    Scalar,
    add_noise,
    momentum_of,
    numbers,
    scalar,
    set_momentum,
)
from rhc.schedulers.signals import logit, sigmoid
from rhc.schedulers.statistics import EpochState, EpochStats, after_epoch, after_step
from rhc.workload import Plannable, Workload

VERSION = 1

READ_EVERY = 10
"""Steps between reads of losses from the device, and so between drift tests."""


class EpochPlanner(BeforeSteps):
    """Plans each epoch from the statistics of the one before.

        planner = rhc.EpochPlanner(optimizer)
        for epoch in range(epochs):
            for batch in loader:
                ...
                optimizer.step()
                planner.step(loss)
            planner.on_epoch_end(validation_loss)

    or `rhc.Runner(…, planner=rhc.EpochPlanner())`; for Lightning and the Hugging Face Trainer
    `rhc.schedulers.lightning_callback` and `hf_callback`.

    Args:
        optimizer: The optimizer to steer; None in a Runner. Groups keep the ratios of their lrs.
        steer: Which of lr, momentum and noise to plan; None: only the guards act on them (planned
            lr and momentum gained nothing: docs/planning.md).
        knobs: Other values to plan, see `rhc.schedulers.Knob`, or names of those that need no
            arguments.
        gains: Sizes of changes per epoch, for the default law.
        bounds: Lowest and highest values, for the default law and after a drift.
        law: (stats, previous plan) -> plan; None for the bounded laws, smoothed, with a failsafe.
        failsafe: False removes the failsafe from the default law.
        reward: Source of the reward; None for the validation loss.
        drift: Whether a drift changes the plan at once (lower α and μ, higher σ) or is only
            recorded.
        epoch_steps: Steps per epoch for endless streams; `step` then ends the epoch, unless a
            validation loss is needed.
        schedulers: torch schedulers of this optimizer, whose base lrs are scaled too.
        listeners: Called with every `EpochPlanned` and `Intervened` event.
        seed: Of the noise.

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer | None = None,
        *,
        steer: Sequence[str] | None = None,
        knobs: Sequence[Knob | str] = (),
        gains: Gains | None = None,
        bounds: Bounds | None = None,
        law: Law | None = None,
        failsafe: bool = True,
        reward: RewardSource | None = None,
        drift: bool = True,
        epoch_steps: int | None = None,
        schedulers: Sequence[Any] = (),
        listeners: Sequence[Callable[[Event], None]] = (),
        seed: int = 0,
    ) -> None:
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise InputError(
                f"EpochPlanner steers a torch.optim.Optimizer, got {type(optimizer).__name__}: "
                "pass the optimizer itself, or none in a Runner"
            )
        self.seed = whole_number("seed", seed)
        self.epoch_steps = None if epoch_steps is None else whole_number("epoch_steps", epoch_steps)
        if self.epoch_steps is not None and self.epoch_steps < 1:
            raise InputError(f"epoch_steps must be ≥ 1, got {epoch_steps}")
        self.knobs = [made(knob) if isinstance(knob, str) else knob for knob in knobs]
        planned = () if steer is None else tuple(dict.fromkeys(steer))
        for name in planned:
            if name not in STEERED:
                raise InputError(
                    f"steer must be some of {', '.join(STEERED)}, got {name!r}; other values of a "
                    "plan are knobs"
                )
        names = checked_names(knob.name for knob in self.knobs)
        if len(names) != len(self.knobs):
            drive = ", ".join(knob.name for knob in self.knobs)
            raise InputError(f"two knobs drive the same value: {drive}")
        for name in names:
            if name not in KNOBS:
                raise InputError(f"{name} is no knob; give steer=({name!r},) instead")
        self.steer = STEERED if steer is None else planned
        self.gains = gains_of((*planned, *names), gains or PLAN_GAINS)
        self.bounds = bounds or PLAN_BOUNDS
        usual = Smoothed(Planned(self.gains, self.bounds))
        self.law: Law = law or (Failsafe(usual) if failsafe else usual)
        self.reward: RewardSource = reward or ValidationLoss()
        self.drift, self.schedulers = drift, list(schedulers)
        self.listeners = list(listeners)
        self.state = EpochState()
        self.plan: EpochPlan | None = None
        self.history: list[EpochStats] = []
        self.steps = self.noise_steps = self.played = 0
        self._begun: EpochPlan | None = None
        self._pending: list[tuple[Scalar, Scalar, Scalar]] = []
        self.optimizer: Optimizer | None = None
        if optimizer is not None:
            self.attach(optimizer)

    @classmethod
    def as_specified(
        cls,
        optimizer: Optimizer | None = None,
        *,
        steer: Sequence[str] = STEERED,
        knobs: Sequence[Knob | str] = (),
        **settings: Any,
    ) -> EpochPlanner:
        """A planner of lr, momentum (β1) and noise, by the laws of AdaptiveRL and `PLAN_GAINS`.

        Args:
            optimizer: As in the constructor, like the arguments that are not listed here.
            steer: Those of the three to plan.
            knobs: Also by name: entropy, clip_range, gae_lambda and augmentation are made, see
                `planner.knobs`.
        """
        return cls(optimizer, steer=steer, knobs=knobs, **settings)

    # In a loop -----------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer, schedulers: Sequence[Any] = ()) -> None:
        """Sets the optimizer and its schedulers, if they were created after the planner."""
        self.close()
        self.optimizer = optimizer
        self.schedulers = [*self.schedulers, *(s for s in schedulers if s not in self.schedulers)]
        groups = optimizer.param_groups
        # With a warm-up the present lr is low: the level is initial_lr.
        lr = max(float(g.get("initial_lr", g["lr"])) for g in groups)
        self.begin(lr, next((m for m in map(momentum_of, groups) if m is not None), None))
        self.hook("_add_noise")

    def begin(self, lr: float, momentum: float | None, noise: float = 0.0) -> EpochPlan:
        own = EpochPlan(lr, momentum, noise, first_lr=lr)
        self.plan = self._begun = own.changed({knob.name: knob.value for knob in self.knobs})
        return self.plan

    def step(
        self,
        loss: Tensor | float | None = None,
        reward: Tensor | float | None = None,
        *,
        gradient_norm: Tensor | float | None = None,
        indices: Any = None,
        losses: Any = None,
    ) -> None:
        """Records one step of the optimizer; call it after `optimizer.step()`.

        Args:
            loss: Scalar.
            reward: Scalar, if the reward is a metric of the steps.
            gradient_norm: Scalar.
            indices: (B,), of the step's examples, for a `LossSampler` knob.
            losses: (B,), of these examples.
        """
        self.observe(loss, reward, gradient_norm, indices, losses)
        if len(self._pending) >= READ_EVERY:
            self.read()
        if self.epoch_steps and self.steps % self.epoch_steps == 0 and not self.needs_validation:
            self.on_epoch_end()

    def on_epoch_end(self, validation: Tensor | float | None = None) -> EpochPlan:
        """Ends the epoch and applies the next plan, which it returns.

        Args:
            validation: Held-out loss; required unless the reward has another source.
        """
        self.read()
        before = self._plan
        validation = None if validation is None else float(validation)
        reward = self._epoch_reward(validation)
        stats, self.state = after_epoch(self.state, validation, reward, self.reward.source)
        plan = self.law(stats, before)
        if plan.mode == before.mode and self._begun is not None:
            # A drift has already used a part of this epoch's cap.
            plan = capped(plan, self._begun, self.bounds)
        self.history.append(stats)
        self.plan = self._begun = plan
        for knob in self.knobs:
            knob.value = getattr(plan, knob.name)
        if self._sampler is not None:
            self._sampler.next_epoch()
        for what in plan.interventions:
            self._emit(Intervened(self.steps - 1, stats.epoch, what.kind, what.reason))
        self._emit(EpochPlanned(self.steps, stats.epoch, asdict(stats), asdict(plan)))
        self._write(before, plan)
        return plan

    def observe(
        self,
        loss: Any,
        reward: Any = None,
        gradient_norm: Any = None,
        indices: Any = None,
        losses: Any = None,
    ) -> None:
        """Adds one committed step to the epoch's statistics."""
        self.steps += 1
        norm = scalar(gradient_norm, "gradient_norm")
        self._pending.append((scalar(loss, "loss"), scalar(reward, "reward"), norm))
        if self._sampler is not None and indices is not None and losses is not None:
            self._sampler.observe(indices, losses)

    def read(self) -> list[tuple[int, Intervention]]:
        before = self._plan
        found: list[tuple[int, Intervention]] = []
        first = self.steps - len(self._pending)
        for step, (loss, reward, norm) in enumerate(numbers(self._pending), first):
            self.state, drifted = after_step(self.state, loss, reward, norm)
            if not drifted:
                continue
            what = Intervention("drift", f"the level of the losses has risen by step {step}")
            found.append((step, what))
            self._emit(Intervened(step, self.state.epoch, what.kind, what.reason))
            if self.drift:
                self.plan = self._after_drift(what)
        self._pending = []
        self._write(before, self._plan)
        return found

    @property
    def needs_validation(self) -> bool:
        return isinstance(self.reward, ValidationLoss)

    @property
    def reward_metric(self) -> str | None:
        if isinstance(self.reward, FreshSeeds):
            return self.reward.play if isinstance(self.reward.play, str) else None
        return self.reward.metric if isinstance(self.reward, TrainingTape) else None

    @property
    def samples(self) -> bool:
        return self._sampler is not None

    def close(self) -> None:
        super().close()
        self.optimizer = None

    # State ---------------------------------------------------------------------------------------

    def state_dict(self, *, taken: int | None = None) -> dict[str, Any]:
        """The state from which a planner continues bit for bit, without the optimizer's.

        Args:
            taken: See `LossSampler.state_dict`.
        """
        pending = numbers(self._pending)
        self._pending = [(loss, reward, norm) for loss, reward, norm in pending]
        return {
            "version": VERSION,
            "state": asdict(self.state),
            "plan": asdict(self._plan),
            "begun": None if self._begun is None else asdict(self._begun),
            "pending": pending,
            "steps": self.steps,
            "noise_steps": self.noise_steps,
            "played": self.played,
            "knobs": {
                knob.name: knob.state_dict(taken)
                if isinstance(knob, LossSampler)
                else {"value": float(knob.value)}
                for knob in self.knobs
            },
        }

    def load_state_dict(self, state: Mapping[str, Any], *, place: bool = True) -> None:
        """Restores `state_dict`.

        Args:
            state: From `state_dict`.
            place: False if the loop restores the position in the epoch, as Runner does.

        Raises:
            InputError: The version or the knobs differ.
        """
        if state.get("version") != VERSION:
            raise InputError(
                f"the state is of EpochPlanner version {state.get('version')}, this is version "
                f"{VERSION}: load it with the rhc that wrote it"
            )
        names = {knob.name for knob in self.knobs}
        if state["knobs"].keys() != names:
            raise InputError(
                f"the state is of knobs {', '.join(sorted(state['knobs'])) or 'none'}, this "
                f"planner has {', '.join(sorted(names)) or 'none'}: build it with the same knobs"
            )
        self.state = EpochState.from_json(state["state"])
        self.plan = EpochPlan.from_json(state["plan"])
        self._begun = None if state["begun"] is None else EpochPlan.from_json(state["begun"])
        self._pending = [(loss, reward, norm) for loss, reward, norm in state["pending"]]
        self.steps, self.noise_steps = state["steps"], state["noise_steps"]
        self.played = state["played"]
        for knob in self.knobs:
            own = state["knobs"][knob.name]
            if isinstance(knob, LossSampler):
                knob.load_state_dict(own, place=place)
            else:
                knob.value = float(own["value"])

    def describe(self) -> dict[str, Any]:
        return {
            "steer": list(self.steer),
            "knobs": [knob.name for knob in self.knobs],
            "law": repr(self.law),
            "reward": self.reward.source,
            "drift": self.drift,
            "epoch_steps": self.epoch_steps,
        }

    # Inside --------------------------------------------------------------------------------------

    @property
    def _plan(self) -> EpochPlan:
        if self.plan is None:
            raise InputError(
                "EpochPlanner has no plan yet: build it with the optimizer, or give it to a Runner"
            )
        return self.plan

    @property
    def _sampler(self) -> LossSampler | None:
        return next((knob for knob in self.knobs if isinstance(knob, LossSampler)), None)

    def _after_drift(self, what: Intervention) -> EpochPlan:
        before = self._plan
        after = after_drift(before, what.reason, self.bounds)
        after = capped(after, self._begun or before, self.bounds)
        values = after.values
        return before.changed({name: values[name] for name in self.steer if name in values})

    def _epoch_reward(self, validation: float | None) -> float | None:
        source = self.reward
        if isinstance(source, ValidationLoss) and validation is None:
            raise InputError(
                "an epoch ended without a validation loss, which the reward is taken from: give "
                "on_epoch_end(validation) one, or EpochPlanner(reward=FreshSeeds(…)), or "
                "reward=TrainingTape() where the training tape shall do"
            )
        if isinstance(source, FreshSeeds) and not isinstance(source.play, str):
            reward = float(source.play(source.first + self.played))
            self.played += 1
            return reward
        if isinstance(source, TrainingTape) and source.metric is None and self.state.losses.count:
            return -self.state.losses.mean
        return None

    def _write(self, before: EpochPlan, after: EpochPlan) -> None:
        """Scales lr, momentum and schedulers from one plan to the next; a no-op in a Runner."""
        if self.optimizer is None:
            return
        ratio = after.lr / before.lr if before.lr > 0 else 1.0
        shift = 0.0
        if before.momentum and after.momentum and before.momentum < 1:
            shift = logit(after.momentum) - logit(before.momentum)
        scaled: set[int] = set()
        for group in self.optimizer.param_groups:
            if ratio != 1.0:
                _scale_lr(group, ratio, scaled)
            momentum = momentum_of(group)
            if shift and momentum is not None:
                set_momentum(group, sigmoid(logit(momentum) + shift))
        if ratio != 1.0:
            for scheduler in _all_schedulers(self.schedulers):
                scheduler.base_lrs = [float(lr) * ratio for lr in scheduler.base_lrs]

    def _add_noise(self, *_: Any) -> None:
        step, self.noise_steps = self.noise_steps, self.noise_steps + 1
        assert self.optimizer is not None
        add_noise(self.optimizer.param_groups, self._plan.noise, self.seed, step)

    def _emit(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)


def planned(
    workload: Workload,
    names: Sequence[str],
    optimizer: Optimizer | None = None,
    **settings: Any,
) -> tuple[Workload, EpochPlanner]:
    """(the workload with the knobs that are named, the planner as specified of what is named).

    The reward is the run's return on fresh seeds, else its validation loss, else its training tape.
    An endless stream has epochs of a twentieth of the run.

    Args:
        workload: What the run trains.
        names: Values of a plan; "beta1" for the momentum of Adam-like optimizers.
        optimizer: The run's, to check that it has a momentum.
        settings: Of the EpochPlanner.

    Raises:
        InputError: The run has no such value.
    """
    offered = workload.plannable or Plannable((), lambda workload, names: (workload, []))
    there = [*STEERED, *offered.names]
    if optimizer is not None and all(momentum_of(g) is None for g in optimizer.param_groups):
        there.remove("momentum")
    if optimizer is None or "betas" in optimizer.param_groups[0]:
        names = ["momentum" if name == "beta1" else name for name in names]
    for name in names:
        if name not in there:
            raise InputError(
                f"planner cannot steer {name!r} in this run, which has {', '.join(there)}; name "
                "some of these"
            )
    workload, knobs = offered.build(workload, [name for name in names if name in offered.names])
    goal, epoch = workload.goal, offered.epoch_steps
    returns = goal.metric if offered.returns is None and goal and goal.higher else offered.returns
    reward: RewardSource = ValidationLoss() if workload.val_loader is not None else TrainingTape()
    if epoch is None and length(workload.train_loader) is None:
        epoch = max(1, workload.steps // 20)
    planner = EpochPlanner.as_specified(
        steer=[name for name in STEERED if name in names],
        knobs=knobs,
        reward=reward if returns is None else FreshSeeds(returns),
        epoch_steps=epoch,
        **settings,
    )
    return workload, planner


def parted(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A `state_dict` as (tensors by path, JSON), for a checkpoint."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping):
            inner, rest[name] = parted(value)
            tensors |= {f"{name}.{path}": tensor for path, tensor in inner.items()}
        else:
            rest[name] = value
    return tensors, rest


def joined(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = copy.deepcopy(dict(rest))
    for path, tensor in tensors.items():
        *folders, name = path.split(".")
        part = state
        for folder in folders:
            part = part[folder]
        part[name] = tensor
    return state


def _scale_lr(group: dict[str, Any], ratio: float, scaled: set[int]) -> None:
    """Scales lr and the copies that torch's schedulers keep; tensors in `scaled` are done."""
    for name in ("lr", "initial_lr", "max_lr", "min_lr"):
        value = group.get(name)
        if isinstance(value, Tensor):
            if value.data_ptr() not in scaled:
                value.mul_(ratio)
            scaled.add(value.data_ptr())
        elif value is not None:
            group[name] = value * ratio


def _all_schedulers(schedulers: Iterable[Any]) -> list[Any]:
    found = []
    for scheduler in schedulers:
        inner = getattr(scheduler, "_schedulers", None)
        found += _all_schedulers(inner) if inner else [scheduler]
    return [s for s in found if hasattr(s, "base_lrs")]

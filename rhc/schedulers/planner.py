"""EpochPlanner: what one epoch has taught, applied to the next, without any replay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from rhc.errors import InputError, whole_number
from rhc.events import EpochPlanned, Event, Intervened
from rhc.schedule.steering import BeforeSteps
from rhc.schedulers.guards import Failsafe, Law, Planned, Smoothed
from rhc.schedulers.knobs import Knob
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

VERSION = 1

READ_EVERY = 10
"""Steps after which losses are read from the device, and a drift can be seen."""


class EpochPlanner(BeforeSteps):
    """Makes every epoch's plan from the tape of the one before.

        planner = rhc.EpochPlanner(optimizer)
        for epoch in range(epochs):
            for batch in loader:
                ...
                optimizer.step()
                planner.step(loss)
            planner.on_epoch_end(validation_loss)

    or `rhc.Runner(…, planner=rhc.EpochPlanner())`; `rhc.schedulers.lightning_callback` and
    `hf_callback` for Lightning and the Hugging Face Trainer.

    Args:
        optimizer: Whose lr and momentum are steered, and whose gradients get the noise; None in a
            Runner, which steers by itself. lrs are multiplied, so that groups keep their ratios.
        steer: Which of lr, momentum and noise the plan may change; None: nothing is planned, and
            the guards alone act on all three (planned lr and momentum gained nothing:
            docs/planning.md).
        knobs: What else it drives, see `rhc.schedulers.Knob`.
        gains: How far an epoch may go, of the usual law.
        bounds: Lowest and highest values, of the usual law and at a drift.
        law: (stats, previous plan) -> plan, see `rhc.schedulers.guards`; None for the usual one:
            the bounded laws, smoothed, with the failsafe around them.
        failsafe: False for the usual law without it.
        reward: Where the reward comes from, by default the validation loss; `TrainingTape()` has to
            be asked for.
        drift: Whether a drift changes the plan at once (lower α and μ, higher σ, of those that are
            steered), or is recorded only.
        epoch_steps: Steps of an epoch where there are none, as in an endless stream; `step` then
            ends it by itself, unless a validation loss is needed.
        schedulers: torch's, of this optimizer: their base lrs are multiplied too.
        listeners: Are told `EpochPlanned` and `Intervened`.
        seed: Of the noise.

    Raises:
        InputError: For settings that cannot be.
    """

    def __init__(
        self,
        optimizer: Optimizer | None = None,
        *,
        steer: Sequence[str] | None = None,
        knobs: Sequence[Knob] = (),
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
        planned = () if steer is None else tuple(dict.fromkeys(steer))
        for name in planned:
            if name not in STEERED:
                raise InputError(
                    f"steer must be some of {', '.join(STEERED)}, got {name!r}; other values of a "
                    "plan are knobs"
                )
        names = checked_names(knob.name for knob in knobs)
        if len(names) != len(knobs):
            raise InputError(f"two knobs drive the same value: {', '.join(k.name for k in knobs)}")
        for name in names:
            if name not in KNOBS:
                raise InputError(f"{name} is no knob; give steer=({name!r},) instead")
        self.steer = STEERED if steer is None else planned
        self.knobs = list(knobs)
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

    # In a loop -----------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer, schedulers: Sequence[Any] = ()) -> None:
        """Takes up an optimizer that was made after the planner, and its schedulers."""
        self.close()
        self.optimizer = optimizer
        self.schedulers = [*self.schedulers, *(s for s in schedulers if s not in self.schedulers)]
        groups = optimizer.param_groups
        # A scheduler that warms up begins low: the level is where it comes from.
        lr = max(float(g.get("initial_lr", g["lr"])) for g in groups)
        self.begin(lr, next((m for m in map(momentum_of, groups) if m is not None), None))
        self.hook("_add_noise")

    def begin(self, lr: float, momentum: float | None, noise: float = 0.0) -> EpochPlan:
        """The plan of the first epoch: what the run has by itself."""
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
        """Once per step of the optimizer, after it.

        Losses are read, and a drift is seen, every `READ_EVERY` steps.

        Args:
            loss: Of the step, a scalar.
            reward: A return, where `reward` is a metric of the steps.
            gradient_norm: Of the step.
            indices: (B,) of the step's examples, for a `LossSampler` among the knobs.
            losses: (B,) of these examples.
        """
        self.observe(loss, reward, gradient_norm, indices, losses)
        if len(self._pending) >= READ_EVERY:
            self.read()
        if self.epoch_steps and self.steps % self.epoch_steps == 0 and not self.needs_validation:
            self.on_epoch_end()

    def on_epoch_end(self, validation: Tensor | float | None = None) -> EpochPlan:
        """Ends the epoch.

        Args:
            validation: The loss on data that was not trained on; needed unless the reward comes
                from elsewhere. A return on fresh seeds is no loss: see `FreshSeeds`.

        Returns:
            The plan of the next epoch, which is in force from here.
        """
        self.read()
        before = self._plan
        validation = None if validation is None else float(validation)
        reward = self._epoch_reward(validation)
        stats, self.state = after_epoch(self.state, validation, reward, self.reward.source)
        plan = self.law(stats, before)
        if plan.mode == before.mode and self._begun is not None:
            # A drift has used up a part of what this epoch may change.
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
        """Adds one committed step to what the next plan is made from."""
        self.steps += 1
        norm = scalar(gradient_norm, "gradient_norm")
        self._pending.append((scalar(loss, "loss"), scalar(reward, "reward"), norm))
        if self._sampler is not None and indices is not None and losses is not None:
            self._sampler.observe(indices, losses)

    def read(self) -> list[tuple[int, Intervention]]:
        """Takes in the pending steps; (step, what was done there) for each drift that was seen.

        A drift changes the plan of the rest of the epoch.
        """
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
        """Whether an epoch cannot end without a validation loss."""
        return isinstance(self.reward, ValidationLoss)

    @property
    def reward_metric(self) -> str | None:
        """The metric of every step that is the reward."""
        if isinstance(self.reward, FreshSeeds):
            return self.reward.play if isinstance(self.reward.play, str) else None
        return self.reward.metric if isinstance(self.reward, TrainingTape) else None

    @property
    def samples(self) -> bool:
        """Whether the order of the examples is among what is planned."""
        return self._sampler is not None

    def close(self) -> None:
        """Takes the noise off the optimizer; all else stays as it is."""
        super().close()
        self.optimizer = None

    # State ---------------------------------------------------------------------------------------

    def state_dict(self, *, taken: int | None = None) -> dict[str, Any]:
        """All that the next plans depend on; a planner that loads it goes on bit for bit.

        The optimizer's lr and momentum are in its own state.

        Args:
            taken: See `LossSampler.state_dict`.

        Returns:
            Numbers, strings, lists, and tensors of the sampler.
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
        """Takes over the state of another planner.

        Args:
            state: What `state_dict` gave.
            place: False where the place within the epoch is found by the loop, as the Runner does.

        Raises:
            InputError: Where the state is of another version, or of other knobs.
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
        """For config.json: what the plans depend on."""
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
        """The plan of the rest of this epoch."""
        before = self._plan
        after = after_drift(before, what.reason, self.bounds)
        after = capped(after, self._begun or before, self.bounds)
        values = after.values
        return before.changed({name: values[name] for name in self.steer if name in values})

    def _epoch_reward(self, validation: float | None) -> float | None:
        """The reward of the epoch as a whole, where its steps have none."""
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
        """Moves the optimizer's lr and momentum, and its schedulers, from one plan to the other;
        a Runner has an optimizer of its own."""
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


def parted(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A `state_dict` as (tensors by path, the JSON-able rest), for a checkpoint."""
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
    """The inverse of `parted`."""
    state: dict[str, Any] = copy.deepcopy(dict(rest))
    for path, tensor in tensors.items():
        *folders, name = path.split(".")
        part = state
        for folder in folders:
            part = part[folder]
        part[name] = tensor
    return state


def _scale_lr(group: dict[str, Any], ratio: float, scaled: set[int]) -> None:
    """lr, and what torch's schedulers keep of it in the group.

    scaled: addresses of tensors that are done: several groups can have one for their lr.
    """
    for name in ("lr", "initial_lr", "max_lr", "min_lr"):
        value = group.get(name)
        if isinstance(value, Tensor):
            if value.data_ptr() not in scaled:
                value.mul_(ratio)
            scaled.add(value.data_ptr())
        elif value is not None:
            group[name] = value * ratio


def _all_schedulers(schedulers: Iterable[Any]) -> list[Any]:
    """Those inside of SequentialLR and ChainedScheduler too."""
    found = []
    for scheduler in schedulers:
        inner = getattr(scheduler, "_schedulers", None)
        found += _all_schedulers(inner) if inner else [scheduler]
    return [s for s in found if hasattr(s, "base_lrs")]

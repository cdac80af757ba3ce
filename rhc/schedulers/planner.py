"""EpochPlanner: what one epoch has taught, applied to the next, without any replay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rhc.errors import InputError, whole_number
from rhc.events import EpochPlanned, Event, Intervened
from rhc.rng import root_mean_square, standard_noise
from rhc.schedule.steering import BeforeSteps
from rhc.schedulers import laws
from rhc.schedulers.guards import (
    Failsafe,
    FreshSeeds,
    Law,
    Planned,
    RewardSource,
    Smoothed,
    TrainingTape,
    Validation,
)
from rhc.schedulers.knobs import Knob
from rhc.schedulers.plan import (
    CAP,
    Intervention,
    Plan,
    PlanBounds,
    PlanGains,
    after_drift,
    capped,
    names_of,
)
from rhc.schedulers.sampler import LossSampler
from rhc.schedulers.statistics import EpochState, EpochStats, Watch, closed, seen

VERSION = 1

STEERED = ("lr", "momentum", "noise")
"""Values of a plan that belong to the optimizer; all others are knobs'."""

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

    optimizer: whose lr and momentum are steered, and whose gradients get the noise; None in a
    Runner, which steers by itself. lrs are multiplied, so that groups keep their ratios and a
    scheduler its shape; list it in `schedulers`, whose base lrs are multiplied too.
    steer: which of lr, momentum and noise the plan may change; None: nothing is planned, and the
    guards alone act on all three (planned lr and momentum gained nothing: docs/planning.md).
    knobs: what else it drives, see `rhc.schedulers.Knob`.
    law: (stats, previous plan) -> plan, see `rhc.schedulers.guards`; None for the usual one with
    these gains and bounds. failsafe False: the usual law without it. reward: where the reward comes
    from, `Validation()` by default; `TrainingTape()` has to be asked for.
    watch: how losses are smoothed, and the test for drift. drift: whether a drift changes the plan
    at once (lower α and μ, higher σ, of those that are steered), or is recorded only.
    epoch_steps: steps of an epoch where there are none, as in an endless stream; `step` then ends
    it by itself, unless a validation loss is needed.
    listeners: are told `EpochPlanned` and `Intervened`. seed: of the noise.
    """

    def __init__(
        self,
        optimizer: Optimizer | None = None,
        *,
        steer: Sequence[str] | None = None,
        knobs: Sequence[Knob] = (),
        gains: laws.Gains | None = None,
        bounds: laws.Bounds | None = None,
        law: Law | None = None,
        failsafe: bool = True,
        reward: RewardSource | None = None,
        watch: Watch | None = None,
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
        seed = whole_number("seed", seed)
        epoch_steps = None if epoch_steps is None else whole_number("epoch_steps", epoch_steps)
        if epoch_steps is not None and epoch_steps < 1:
            raise InputError(f"epoch_steps must be ≥ 1, got {epoch_steps}")
        planned = () if steer is None else tuple(dict.fromkeys(steer))
        for name in planned:
            if name not in STEERED:
                raise InputError(
                    f"steer must be some of {', '.join(STEERED)}, got {name!r}; other values of a "
                    "plan are knobs"
                )
        names = names_of(knob.name for knob in knobs)
        if len(names) != len(knobs):
            raise InputError(f"two knobs drive the same value: {', '.join(k.name for k in knobs)}")
        clash = next((n for n in names if n in planned), None)
        if clash is not None:
            raise InputError(f"{clash} is both steered and a knob; leave it out of one of them")
        # What is a knob is the knob's alone.
        self.steer = tuple(n for n in STEERED if n not in names) if steer is None else planned
        self.knobs = list(knobs)
        own = (
            gains
            if isinstance(gains, PlanGains)
            else PlanGains(**({} if gains is None else vars(gains)))
        )
        self.gains = own.only(*planned, *names)
        self.bounds = bounds or PlanBounds()
        inner: Law = Smoothed(Planned(self.gains, self.bounds))
        self.law = law or (Failsafe(inner) if failsafe else inner)
        self.reward = reward or Validation()
        self.watch, self.drift = watch or Watch(), drift
        self.epoch_steps = epoch_steps
        self.schedulers, self.listeners, self.seed = list(schedulers), list(listeners), seed
        self.state = EpochState()
        self.plan: Plan | None = None
        self.history: list[EpochStats] = []
        self.steps = self.noise_steps = self.played = 0
        self._begun: Plan | None = None
        self._pending: list[tuple[Any, Any, Any]] = []
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
        self.begin(lr, next((m for m in map(_momentum, groups) if m is not None), None))
        self.hook("_add_noise")

    def begin(self, lr: float, momentum: float | None, noise: float = 0.0) -> Plan:
        """The plan of the first epoch: what the run has by itself."""
        values: dict[str, Any] = {knob.name: knob.value for knob in self.knobs}
        momentum = values.pop("momentum", momentum)
        self.plan = Plan(
            lr, momentum, values.pop("noise", noise), first_lr=lr, epoch=0, **values
        )  # fmt: skip
        self._begun = self.plan
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
        """Once per step of the optimizer, after it: what was observed there.

        loss: of the step. reward: a return, where `reward` is a metric of the steps. indices,
        losses: (B,) of the step's examples, for a `LossSampler` among the knobs.
        Losses are read, and a drift is seen, every `READ_EVERY` steps.
        """
        self.observe(loss, reward, gradient_norm, indices, losses)
        if len(self._pending) >= READ_EVERY:
            self._read()
        if self.epoch_steps and self.steps % self.epoch_steps == 0 and not self.needs_validation:
            self.on_epoch_end()

    def on_epoch_end(self, validation: Tensor | float | None = None) -> Plan:
        """Ends the epoch, and returns the plan of the next one, which is in force from here.

        validation: the loss on data that was not trained on; needed unless the reward comes from
        elsewhere. A return on fresh seeds is no loss: see `FreshSeeds`.
        """
        before = self._plan
        self._read()
        plan = self.end_epoch(None if validation is None else float(validation))
        if self.optimizer is not None:
            self._write(before, plan)
        return plan

    # The parts that a Runner uses ----------------------------------------------------------------

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
        self._pending.append((_kept(loss), _kept(reward), _kept(gradient_norm)))
        if indices is not None and losses is not None:
            for knob in self.knobs:
                if isinstance(knob, LossSampler):
                    knob.observe(indices, losses)

    def read(self) -> list[tuple[int, Intervention]]:
        """Takes in the pending steps; (step, what was done there) for each drift that was seen.

        The plan is changed by it, and nothing else is.
        """
        found: list[tuple[int, Intervention]] = []
        first = self.steps - len(self._pending)
        for number, (loss, reward, norm) in enumerate(self._read_pending()):
            self.state, drifted = seen(self.state, loss, reward, norm, self.watch)
            if not drifted:
                continue
            step = first + number
            what = Intervention("drift", f"the level of the losses has risen by step {step}")
            found.append((step, what))
            self._emit(Intervened(step, self.state.epoch, what.kind, what.reason))
            if self.drift:
                self._forewarn(what)
        self._pending = []
        return found

    def end_epoch(self, validation: float | None = None) -> Plan:
        """The plan of the next epoch; knobs are set to it, the optimizer is not."""
        before = self._plan
        reward: float | None = None
        source: RewardSource = self.reward
        if isinstance(source, Validation) and validation is None:
            raise InputError(
                "an epoch ended without a validation loss, which the reward is taken from: give "
                "on_epoch_end(validation) one, or EpochPlanner(reward=FreshSeeds(…)), or "
                "reward=TrainingTape() where the training tape shall do"
            )
        if isinstance(source, FreshSeeds) and not isinstance(source.play, str):
            reward = float(source.play(source.first + self.played))
            self.played += 1
        if isinstance(source, TrainingTape) and source.metric is None:
            losses = self.state.losses
            reward = -losses.mean if losses.count else None
        stats, self.state = closed(self.state, validation, reward, source.source)
        plan = self.law(stats, before)
        if plan.mode == before.mode and self._begun is not None:
            # A drift has used up a part of what this epoch may change.
            plan = capped(plan, self._begun, self.bounds, CAP)
        self.history.append(stats)
        self.plan = self._begun = plan
        self._set_knobs(plan)
        for knob in self.knobs:
            if isinstance(knob, LossSampler):
                knob.next_epoch()
        for what in plan.interventions:
            self._emit(Intervened(self.steps - 1, stats.epoch, what.kind, what.reason))
        self._emit(EpochPlanned(self.steps, stats.epoch, stats.to_json(), plan.to_json()))
        return plan

    @property
    def needs_validation(self) -> bool:
        """Whether an epoch cannot end without a validation loss."""
        return isinstance(self.reward, Validation)

    @property
    def reward_metric(self) -> str | None:
        """The metric of every step that is the reward."""
        if isinstance(self.reward, FreshSeeds):
            return self.reward.play if isinstance(self.reward.play, str) else None
        return self.reward.metric if isinstance(self.reward, TrainingTape) else None

    @property
    def samples(self) -> bool:
        """Whether the order of the examples is among what is planned."""
        return any(isinstance(knob, LossSampler) for knob in self.knobs)

    def close(self) -> None:
        """Takes the noise off the optimizer; all else stays as it is."""
        super().close()
        self.optimizer = None

    # State ---------------------------------------------------------------------------------------

    def state_dict(self, *, taken: int | None = None) -> dict[str, Any]:
        """Numbers, strings, lists, and tensors of the sampler; who loads it goes on bit for bit.

        The optimizer's lr and momentum are in its own state. taken: see `LossSampler.state_dict`.
        """
        self._pending = list(self._read_pending())
        return {
            "version": VERSION,
            "state": asdict(self.state),
            "plan": self._plan.to_json(),
            "begun": None if self._begun is None else self._begun.to_json(),
            "pending": [list(p) for p in self._pending],
            "steps": self.steps,
            "noise_steps": self.noise_steps,
            "played": self.played,
            "knobs": {knob.name: self._knob_state(knob, taken) for knob in self.knobs},
        }

    def load_state_dict(self, state: Mapping[str, Any], *, place: bool = True) -> None:
        """place False: the place within the epoch is found by the loop, as the Runner does."""
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
        self.plan = Plan.from_json(state["plan"])
        self._begun = None if state["begun"] is None else Plan.from_json(state["begun"])
        self._pending = [(p[0], p[1], p[2]) for p in state["pending"]]
        self.steps, self.noise_steps = state["steps"], state["noise_steps"]
        self.played = state["played"]
        for knob in self.knobs:
            if isinstance(knob, LossSampler):
                knob.load_state_dict(state["knobs"][knob.name], place=place)
            else:
                knob.value = float(state["knobs"][knob.name]["value"])

    @staticmethod
    def _knob_state(knob: Knob, taken: int | None) -> dict[str, Any]:
        if isinstance(knob, LossSampler):
            return knob.state_dict(taken)
        return {"value": float(knob.value)}

    def describe(self) -> dict[str, Any]:
        """For config.json: what the plans depend on."""
        return {
            "steer": list(self.steer),
            "knobs": [knob.name for knob in self.knobs],
            # As runs have recorded it: the class names were Bounds and Gains.
            "law": repr(self.law).replace("PlanBounds(", "Bounds(").replace("PlanGains(", "Gains("),
            "reward": self.reward.source,
            "drift": self.drift,
            "epoch_steps": self.epoch_steps,
        }

    # Inside --------------------------------------------------------------------------------------

    @property
    def _plan(self) -> Plan:
        if self.plan is None:
            raise InputError(
                "EpochPlanner has no plan yet: build it with the optimizer, or give it to a Runner"
            )
        return self.plan

    def _read(self) -> None:
        before = self._plan
        if self.read() and self.optimizer is not None and self._plan is not before:
            self._write(before, self._plan)

    def _forewarn(self, what: Intervention) -> None:
        """The plan of the rest of this epoch."""
        before, begun = self._plan, self._begun or self._plan
        after = capped(after_drift(before, what.reason, self.bounds, CAP), begun, self.bounds, CAP)
        moved = {n: getattr(after, n) for n in self.steer if getattr(before, n) is not None}
        self.plan = replace(before, **moved)

    def _set_knobs(self, plan: Plan) -> None:
        for knob in self.knobs:
            value = getattr(plan, knob.name)
            if value is not None:
                knob.value = value

    def _write(self, before: Plan, after: Plan) -> None:
        assert self.optimizer is not None
        ratio = after.lr / before.lr if before.lr > 0 else 1.0
        shift = 0.0
        if before.momentum and after.momentum and before.momentum < 1:
            shift = _logit(after.momentum) - _logit(before.momentum)
        scaled: set[int] = set()
        for group in self.optimizer.param_groups:
            if ratio != 1.0:
                _scale_lr(group, ratio, scaled)
            momentum = _momentum(group)
            if shift and momentum is not None:
                _set_momentum(group, 1 / (1 + math.exp(-(_logit(momentum) + shift))))
        if ratio != 1.0:
            for scheduler in _all_schedulers(self.schedulers):
                scheduler.base_lrs = [float(lr) * ratio for lr in scheduler.base_lrs]

    @torch.no_grad()
    def _add_noise(self, *_: Any) -> None:
        step, self.noise_steps = self.noise_steps, self.noise_steps + 1
        assert self.optimizer is not None
        sigma = self._plan.noise
        if sigma == 0:
            return
        for number, group in enumerate(self.optimizer.param_groups):
            parameters = [p for p in group["params"] if p.requires_grad]
            noise = standard_noise(parameters, self.seed + number, step)
            for p, xi in zip(parameters, noise, strict=True):
                if p.grad is not None and not p.grad.is_sparse:
                    p.grad.addcmul_(xi, root_mean_square(p.grad), value=sigma)

    def _read_pending(self) -> list[tuple[float | None, float | None, float | None]]:
        """As numbers; tensors of one device are read in one transfer."""
        tensors = [x for row in self._pending for x in row if isinstance(x, Tensor)]
        numbers: list[float] = []
        if tensors and len({t.device for t in tensors}) == 1:
            wide = torch.float64 if tensors[0].device.type == "cpu" else torch.float32
            numbers = torch.stack([t.to(wide) for t in tensors]).tolist()
        else:
            numbers = [float(t) for t in tensors]
        found = iter(numbers)
        return [
            (_next(a, found), _next(b, found), _next(c, found)) for a, b, c in self._pending
        ]  # fmt: skip

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
    state: dict[str, Any] = {}
    for name, value in rest.items():
        inner = {p.removeprefix(f"{name}."): t for p, t in tensors.items()
                 if p.startswith(f"{name}.")}  # fmt: skip
        state[name] = joined(inner, value) if isinstance(value, Mapping) else value
    return state | {path: t for path, t in tensors.items() if "." not in path}


def _next(value: Any, found: Iterable[float]) -> float | None:
    return next(iter(found)) if isinstance(value, Tensor) else value


def _kept(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise InputError(
                f"what a planner is told must be scalars, got shape {tuple(value.shape)}: pass its "
                "mean"
            )
        return value.detach().reshape(()).clone()
    return float(value)


def _momentum(group: Mapping[str, Any]) -> float | None:
    """μ or β1 of a parameter group, where it can be steered."""
    value = group["betas"][0] if "betas" in group else group.get("momentum")
    return float(value) if value and 0 < float(value) < 1 else None


def _set_momentum(group: dict[str, Any], value: float) -> None:
    if "betas" in group:
        group["betas"] = (value, *group["betas"][1:])
    else:
        group["momentum"] = value


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


def _logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)

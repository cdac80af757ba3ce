"""The plant: model, optimizer and loss as a controlled dynamical system, s_{t+1} = F_t(s_t, u_t,
ξ_t). s: parameters, buffers, optimizer slots, random state; u: lr, momentum, noise, weight decay.
It steps, takes and restores snapshots, and rolls windows; it decides nothing."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rhc.containers import opening
from rhc.data_weights import DataWeights, Factors, Weighed, weighed, weighing
from rhc.distributed import Ranks, parallel_of
from rhc.distributed.parallel import dense
from rhc.errors import InputError, Unseen, whole_number
from rhc.optimizers import DifferentiableOptimizer, differentiable
from rhc.rng import RandomState
from rhc.schedule import OptimizerControls, Schedule, parameters_of
from rhc.settings import Step
from rhc.training.batches import DrawnAsNeeded, MicroBatches
from rhc.training.diagnostics import check_parts, explained, mend_of
from rhc.training.hooks import Hooks
from rhc.training.losses import (
    LossFn,
    Observed,
    checked_loss,
    fill_gradients,
    mean_metrics,
    needs_grad,
)
from rhc.training.module_state import Attributes, Buffers, Captured, Place, overlaps
from rhc.training.objective import Average
from rhc.training.recorder import Recorder
from rhc.training.snapshot import Snapshot
from rhc.training.trajectory import Block, BlockState, StepRecord, Trajectory

PATIENCE = 5
"""Losses in a row that must be high on average to count: a single batch may have any loss."""


class Plant:
    """A live model, optimizer and loss that can step, be restored and rolled.

    Args:
        model: trained in place.
        optimizer: of the model's parameters.
        loss_fn: (model, batch) -> scalar tensor, or (scalar tensor, {"name": tensor, …}). A batch
            that is `MicroBatches` is one step on the mean of their losses.
        seed: of the gradient noise.
        clip_norm: global norm that gradients are clipped to.
        clip_value: largest absolute value of a gradient's element; one of the two at most.
        ranks: the processes that train together; gradients, losses and metrics are means over them.
        data_weights: on the losses of rows, of which loss_fn then returns one each, (B,).

    Raises:
        InputError: for parts that do not fit together.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        *,
        seed: int = 0,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        ranks: Ranks | None = None,
        data_weights: DataWeights | None = None,
    ) -> None:
        Step(clip_norm=clip_norm, clip_value=clip_value).checked()
        check_parts(model, optimizer, loss_fn)
        self.model = model
        self.optimizer = optimizer
        self.ranks = ranks
        self.seed = whole_number("seed", seed)
        self.clip_norm = clip_norm
        self.clip_value = clip_value
        self.controls = OptimizerControls(optimizer)
        self._hold()
        self.data_weights = data_weights
        self.loss_fn = opening(self.parallel.weighing(loss_fn))
        if data_weights is not None:
            self.loss_fn = weighing(self.loss_fn, data_weights)
        self.singletons = False
        """Whether every parameter is a block of its own."""
        self._holds_gradients = False
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        needed = closure is not None and closure.default is inspect.Parameter.empty
        self._closure: Literal["none", "only", "second"] = "only" if needed else "none"
        """Who evaluates the loss: the plant, the optimizer (LBFGS), or both (SAM)."""
        self.has_evaluation_weights = all(
            callable(getattr(optimizer, name, None)) for name in ("train", "eval")
        )
        """Whether the optimizer has separate weights for evaluation, as schedule-free ones do."""

    def take_up(self) -> None:
        """Re-reads the optimizer, whose groups may have changed since the last fit."""
        if len(self.optimizer.param_groups) != self._count:
            self.controls.take_up()
            self._hold()

    def _hold(self) -> None:
        self._count = len(self.optimizer.param_groups)
        self.owned = parameters_of(self.optimizer)
        """The optimizer's parameters; `parameters` are this rank's parts of them."""
        if not self.owned:
            raise InputError("the optimizer holds no parameters; give it model.parameters()")
        names = {id(p): n for n, p in self.model.named_parameters()}
        for index, p in enumerate(self.owned):
            if id(p) not in names:
                raise InputError(
                    f"parameter {index} of the optimizer, of shape {tuple(p.shape)}, is not a "
                    "parameter of the model; register it on the model"
                )
            if self.clip_value is not None and p.is_complex():
                raise InputError(
                    f"clip_value clips real gradients, and parameter {names[id(p)]!r} is "
                    "complex; use clip_norm"
                )
        self._names = [names[id(p)] for p in self.owned]
        self.parallel = parallel_of(self.model, self.owned, self.ranks)
        self.parameters = self.parallel.parameters
        self.watched = self.parallel.watched
        # An attention mask may be -inf without divergence.
        buffers = self.model.named_buffers()
        self._infinite = {n for n, b in buffers if not bool(b.isfinite().all())}
        self.counted: list[Place] | None = None
        """Attributes of modules that a step changes; None before a recorded step."""
        self.moved: dict[str, Tensor] | None = None
        """Parameters that loss_fn changes but the optimizer does not train; None likewise."""

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups at the last `take_up`."""
        return self.optimizer.param_groups[: self._count]

    @property
    def names(self) -> list[list[str]]:
        """Names of the optimizer's parameters, by group."""
        names = iter(self._names)
        return [[next(names) for _ in group["params"]] for group in self.groups]

    @property
    def untrained(self) -> dict[str, Tensor]:
        """The model's parameters that the optimizer does not train."""
        trained = {id(p) for p in self.owned if p.requires_grad}
        return {n: p for n, p in self.model.named_parameters() if id(p) not in trained}

    # One step ------------------------------------------------------------------------------------

    def loss(self, batch: Any) -> Observed:
        """(loss, metrics) of the live model on a batch, checked; with grad if loss_fn needs it."""
        if self._holds_gradients and not torch.is_grad_enabled():
            with torch.enable_grad():
                loss, metrics = self.loss(batch)
            return loss.detach(), {name: value.detach() for name, value in metrics.items()}
        try:
            result = self.loss_fn(self.model, batch)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            if not torch.is_grad_enabled() and needs_grad(error):
                self._holds_gradients = True
                return self.loss(batch)
            if not isinstance(error, InputError) and mend_of(error):
                raise InputError(explained(error, "", self.model, batch)) from error
            raise
        return checked_loss(result)

    def weighed(self, batch: Any, step: int) -> Any:
        """A step's batch with the weights of its rows, if data are weighted."""
        if self.data_weights is None or isinstance(batch, Weighed):
            return batch
        if isinstance(batch, MicroBatches) and isinstance(batch[0], Weighed):
            return batch
        return self.weighed_by(batch, step)

    def weighed_by(self, batch: Any, step: int, factors: Factors | None = None) -> Any:
        """As `weighed`, anew."""
        assert self.data_weights is not None
        several = isinstance(batch, (MicroBatches, DrawnAsNeeded))
        parts = list(batch) if several else [batch]
        like, sums = self.parameters[0], self.parallel.sums
        found = weighed(self.data_weights, parts, like, sums, factors, step)
        return MicroBatches(found) if several else found[0]

    def value(self, loss: Tensor) -> float:
        """A loss of this rank's rows as a number: the mean over ranks."""
        return float(self.parallel.value(loss))

    def step(
        self,
        batch: Any,
        controls: Mapping[str, float],
        step: int,
        recorder: Recorder | None = None,
    ) -> StepRecord:
        """One optimizer step in place, exactly the plain loop's, with these controls. controls:
        natural values; absent ones stay as the optimizer has them. recorder: sees raw gradients,
        before hooks, clipping and noise."""
        if len(self.optimizer.param_groups) != self._count:
            raise InputError(
                f"the optimizer's parameter groups were {self._count} when the fit began, and are "
                f"{len(self.optimizer.param_groups)} at step {step}: add groups between two fits, "
                "not during one"
            )
        batch = self.weighed(batch, step)
        self.controls.write(controls)
        if self._closure != "none":
            return self._step_by_closure(batch, controls, step)
        observed = self._differentiate(batch, controls, step, recorder)
        try:
            (self.optimizer if recorder is None else recorder.hooks).step()
        except Exception as error:
            if "closure" not in str(error).lower():
                raise
            # Like SAM, whose closure is optional by signature only; nothing has changed yet.
            self._closure = "second"
            return self._step_by_closure(batch, controls, step, observed)
        return observed

    def _step_by_closure(
        self, batch: Any, controls: Mapping[str, float], step: int, first: StepRecord | None = None
    ) -> StepRecord:
        """A step of an optimizer that evaluates the loss; returns its first evaluation."""
        if isinstance(batch, DrawnAsNeeded):
            if first is not None:
                raise InputError(
                    f"{type(self.optimizer).__name__} evaluates the loss of a step again, and "
                    f"{len(batch)} batches were drawn for it and used; give accumulate=1"
                )
            batch = MicroBatches(list(batch))
        observed = [] if first is None else [first]

        def closure() -> Tensor:
            with torch.enable_grad():
                observed.append(self._differentiate(batch, controls, step))
            return observed[-1].loss

        if self._closure == "second" and first is None:
            observed.append(self._differentiate(batch, controls, step))
        self.optimizer.step(closure)  # type: ignore[arg-type]
        return observed[0]

    def _differentiate(
        self,
        batch: Any,
        controls: Mapping[str, float],
        step: int,
        recorder: Recorder | None = None,
    ) -> StepRecord:
        """Fills every `.grad` with what the optimizer steps by."""
        self.optimizer.zero_grad()
        with nullcontext() if recorder is None else recorder.watching():
            loss, metrics = (recorder or self).backward(batch)
        self.parallel.average_statistics()
        if recorder is not None:
            recorder.keep_gradients()
        norm = self._transform_gradients(controls.get("noise", 0.0), step)
        # A copy: the model may change it later, such as a counter.
        return StepRecord(loss.detach(), {k: v.detach().clone() for k, v in metrics.items()}, norm)

    def backward(self, batch: Any) -> Observed:
        """Adds the gradient of a step's batch to every `.grad`; (loss, metrics) of all ranks."""
        if isinstance(batch, (MicroBatches, DrawnAsNeeded)):
            return self.parallel.backward(lambda: self._accumulate(batch), len(batch))
        return self.parallel.backward(lambda: self._backward(batch))

    def _backward(self, batch: Any) -> Observed:
        loss, metrics = self.loss(batch)
        fill_gradients(loss)
        return loss, metrics

    def _accumulate(self, batches: MicroBatches | DrawnAsNeeded) -> Observed:
        """Adds the gradient of the micro-batches' mean loss; (mean loss, mean metrics)."""
        count = len(batches)
        losses: list[Tensor] = []
        metrics: list[dict[str, Tensor]] = []
        for batch in batches:
            loss, observed = self.loss(batch)
            fill_gradients(loss / count)
            losses.append(loss.detach())
            metrics.append({name: value.detach().clone() for name, value in observed.items()})
        return torch.stack(losses).mean(), mean_metrics(metrics)

    def _transform_gradients(self, sigma: float, step: int) -> float | Tensor:
        """Clips gradients and adds noise σ·RMS(g)·ξ_t; returns their norm before."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if not grads:
            raise InputError(
                "loss_fn's result does not depend on any parameter of the optimizer; "
                "give the optimizer the parameters of the model that loss_fn uses"
            )
        norm = self.parallel.gradient_norm(grads, clipping=self.clip_norm is not None)
        if self.clip_norm is not None:
            total = torch.as_tensor(norm)
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, total)
        if self.clip_value is not None:
            torch.nn.utils.clip_grad_value_(self.parameters, self.clip_value)
        if sigma != 0:
            with torch.no_grad():
                rms = self.parallel.root_mean_squares([p.grad for p in self.parameters])
                noise = self.parallel.noise(self.seed, step)
                for p, xi, scale in zip(self.parameters, noise, rms, strict=True):
                    if p.grad is not None:
                        p.grad.addcmul_(xi, scale.to(p.grad.dtype), value=sigma)
        return norm

    # State ---------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """A deep copy of the state."""
        self.parallel.settle()
        return Snapshot.of(self)

    def restore(self, snapshot: Snapshot) -> None:
        """Restores the state in place; the snapshot stays usable."""
        self.parallel.settle()
        snapshot.put(self)

    def attributes(self) -> Captured:
        """Attributes of modules besides parameters and buffers: counters, generators, lists."""
        return Attributes(self.model).capture()

    def is_finite(self) -> bool:
        """Whether parameters, buffers and slots are finite, by one host synchronisation."""
        slots = [v for p in self.owned for v in self.optimizer.state.get(p, {}).values()]
        buffers = [b for n, b in self.model.named_buffers() if n not in self._infinite]
        found = [
            self.parallel.local(t.detach())
            for t in (*self.model.parameters(), *buffers, *slots)
            if isinstance(t, Tensor)
        ]
        floating = [t for t in found if (t.is_floating_point() or t.is_complex()) and t.numel()]
        # The maximum takes five times as long, and is needed only where squares overflow.
        finite = not floating or any(_finite_norms(floating, order) for order in (2.0, math.inf))
        return self.parallel.all(finite)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Restores at the end what loss_fn changes besides trained parameters."""
        buffers = Buffers(self.model, self.untrained)
        before, attributes = buffers.copies(), self.attributes()
        counts = _versions(buffers.live())
        try:
            yield
        finally:
            if _versions(buffers.live()) != counts:  # else they may be leaves of a graph
                buffers.put(before)
            attributes.restore()

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Inside, the model is in eval mode; its state and the random state are restored."""
        modes = [(m, m.training) for m in self.model.modules()]
        rng = RandomState.capture()
        self.model.eval()
        # Buffers in a live graph must stay; evaluation uses others.
        alone = nullcontext() if torch.is_grad_enabled() else self.untouched()
        try:
            with alone, self._evaluation_weights():
                yield self.model
        finally:
            for module, training in modes:
                module.training = training
            self.parallel.settle()
            rng.restore()

    @contextmanager
    def _evaluation_weights(self) -> Iterator[None]:
        """Inside, the optimizer's evaluation weights, if any; afterwards the others, to the bit."""
        if not self.has_evaluation_weights:
            yield
            return
        optimizer: Any = self.optimizer
        live = [p.detach().clone() for p in self.owned]
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
            with torch.no_grad():
                for p, value in zip(self.owned, live, strict=True):
                    p.copy_(value)

    @contextmanager
    def optimizing(self) -> Iterator[None]:
        """Inside, the optimizer is in training mode, if it has modes."""
        if not self.has_evaluation_weights:
            yield
            return
        optimizer: Any = self.optimizer
        trained = bool(optimizer.param_groups[0].get("train_mode", True))
        optimizer.train()
        try:
            yield
        finally:
            if not trained:
                optimizer.eval()

    # Roll ----------------------------------------------------------------------------------------

    def roll(
        self,
        batches: Iterable[Any],
        schedule: Schedule,
        *,
        record: Recorder | Callable[[int], bool] | None = None,
        average: Average | None = None,
        on_step: Callable[[int, StepRecord], None] | None = None,
        limit: Callable[[float], float] = lambda first: math.inf,
    ) -> Trajectory:
        """Takes one live step per batch from `schedule.start` on, and records it.

        Args:
            batches: one per step.
            schedule: the controls of these steps, in natural units.
            record: a `Recorder` for the reverse pass, or record(i): whether to keep the whole state
                before the i-th step (and at the end, i = K); None records losses only.
            average: is updated with the parameters after every step.
            on_step: is called after every step.
            limit: maps the roll's first loss to the level that a mean of PATIENCE losses in a row
                may not exceed. Rolling stops there, and where a loss is not finite (on an
                accelerator both are noticed at the end).
        """
        recorder = Recorder(self, len(schedule), record) if callable(record) else record
        trajectory = Trajectory(schedule.start, schedule, ())
        if recorder is not None:
            recorder.begin(trajectory)
        losses: list[float] = []
        for i, batch in enumerate(batches):
            batch = self.weighed(batch, schedule.start + i)
            if recorder is not None:
                recorder.before(i, batch)
            step = schedule.start + i
            observed = self.step(batch, schedule.at(step), step, recorder)
            kept = observed if recorder is None else recorder.keep_observed(observed)
            trajectory.losses.append(kept.loss)
            trajectory.metrics.append(kept.metrics)
            trajectory.gradient_norms.append(kept.gradient_norm)
            if average is not None:
                average.update(self.parameters)
            if on_step is not None:
                on_step(step, observed)
            # On an accelerator reading the loss would block the host at every step.
            if observed.loss.device.type == "cpu":
                losses.append(float(observed.loss))
                if _diverged(losses, limit):
                    trajectory.diverged = i
                    break
        if trajectory.losses and not losses:
            losses = torch.stack(trajectory.losses).tolist()
            diverged = (i for i in range(len(losses)) if _diverged(losses[: i + 1], limit))
            trajectory.diverged = next(diverged, None)
        if recorder is not None:
            recorder.end()
        return trajectory

    # What the reverse pass sees ------------------------------------------------------------------

    @property
    def differentiable(self) -> DifferentiableOptimizer:
        """The differentiable form of the optimizer; an InputError where there is none."""
        return differentiable(self.optimizer)

    @property
    def hooks(self) -> Hooks:
        return Hooks(self.optimizer, self.watched, self._names[: len(self.watched)])

    def refuse_complex(self) -> None:
        """Raises InputError where a parameter is complex: a reverse pass needs real gradients."""
        for name, p in zip(self._names, self.owned, strict=True):
            if p.is_complex():
                raise InputError(
                    f"parameter {name!r} is complex ({p.dtype}), and hypergradients "
                    "need real ones; keep a real one with a last dimension of 2 and take "
                    "torch.view_as_complex of it in forward, or turn rewriting off"
                )

    def refuse_sparse(self, *, slots: bool = True) -> None:
        """Raises InputError where a gradient, or a slot made from one, is sparse."""
        for name, p in zip(self._names, self.watched, strict=False):
            tensors = [p.grad, *(self.optimizer.state.get(p, {}).values() if slots else ())]
            if any(isinstance(t, Tensor) and t.layout != torch.strided for t in tensors):
                raise InputError(
                    f"the gradient of parameter {name!r} is sparse, and the reverse "
                    "pass needs dense ones; use sparse=False in the embedding that makes it"
                )

    def refuse_overlaps(self) -> None:
        """Raises Unseen where parameters share memory: a step of one moves the other too."""
        own = {n: p.detach() for n, p in self.model.named_parameters()}
        found = None if self.parallel.sharded else overlaps(own)
        if found is not None:
            first, second = found
            raise Unseen(
                f"parameters {first!r} and {second!r} share memory, so that a step of one moves "
                "the other, which hypergradients cannot see through; give both modules the same "
                "Parameter, or do without them (rewrite=False)"
            )

    def blocks(self) -> tuple[Block, ...]:
        """The trainable parameters in blocks of equal group, dtype, device and step count; one
        parameter each where some of a block had no gradient, or the optimizer uses whole
        matrices."""
        alone = self.singletons or not self.differentiable.elementwise
        members: dict[Any, list[int]] = {}
        groups = [g for g, group in enumerate(self.optimizer.param_groups) for _ in group["params"]]
        for index, (p, group) in enumerate(zip(self.parameters, groups, strict=True)):
            if p.requires_grad:
                state = self.optimizer.state.get(self.owned[index], {})
                taken = float(state["step"]) if "step" in state else float(bool(state))
                key = group, p.dtype, p.device, taken, index if alone else -1
                members.setdefault(key, []).append(index)
        return tuple(
            Block(
                key[0],
                tuple(indices),
                tuple(self._names[i] for i in indices),
                tuple(self.parameters[i].shape for i in indices),
                tuple(self.parameters[i].numel() for i in indices),
            )
            for key, indices in members.items()
        )

    def block_states(self, blocks: Sequence[Block], *, theta: bool = True) -> list[BlockState]:
        """A flattened copy of optimizer state and, if `theta`, parameters, one per block."""
        slots = self.block_slots(blocks)
        return [
            BlockState(block.flatten(self.parameters) if theta else None, own)
            for block, own in zip(blocks, slots, strict=True)
        ]

    def block_slots(self, blocks: Sequence[Block]) -> list[Any]:
        """A flattened copy of the optimizer's state, one per block."""
        self.refuse_sparse()
        state, local = self.optimizer.state, self.parallel.local
        return [
            self.differentiable.state(
                [
                    {k: local(v) for k, v in state.get(self.owned[i], {}).items()}
                    for i in block.indices
                ],
                [self.parameters[i] for i in block.indices],
                self.optimizer.param_groups[block.group],
            )
            for block in blocks
        ]

    def slots_alone(self, scheduled: Container[str], controls: Collection[str]) -> bool:
        """Whether the optimizer's state advances and is differentiated without θ. scheduled: the
        controls set at every step; controls: those differentiated by."""
        decays = "weight_decay" in scheduled or "weight_decay" in controls
        return (
            not self.differentiable.reads_parameters
            and not decays
            and not self.hooks.of_tensors  # which may read it
            and not any(group.get("weight_decay") for group in self.optimizer.param_groups)
        )

    def folds(self, scheduled: Container[str], controls: Collection[str]) -> bool:
        """Whether the optimizer's states of a window fit into the memory of its gradients. As
        `slots_alone`; values come from a Schedule, else from the groups."""
        noisy, least = "noise" in controls, {}
        if isinstance(scheduled, Schedule):
            noisy = noisy or ("noise" in scheduled and bool(scheduled["noise"].any()))
            if "momentum" in scheduled:
                least = {"momentum": float(scheduled["momentum"].min())}
        return (
            self.slots_alone(scheduled, controls)
            and not noisy
            and self.clip_norm is None
            and self.clip_value is None
            and all(self.differentiable.fold(group, least) for group in self.optimizer.param_groups)
        )


def _versions(tensors: Mapping[str, Tensor | None]) -> dict[str, tuple[int, int]]:
    return {
        name: (id(t), 0 if t is None or t.is_inference() else t._version)
        for name, t in tensors.items()
    }


def _finite_norms(tensors: list[Tensor], order: float) -> bool:
    norms = torch._foreach_norm(dense(tensors), order)
    device = norms[0].device
    return bool(torch.stack([n.to(device, torch.float64) for n in norms]).isfinite().all())


def _diverged(losses: Sequence[float], limit: Callable[[float], float]) -> bool:
    """Whether the newest loss is not finite, or the newest PATIENCE of them are high on average."""
    if not math.isfinite(losses[-1]):
        return True
    recent = losses[-PATIENCE:]
    return len(recent) == PATIENCE and sum(recent) / PATIENCE > limit(losses[0])

"""The plant: a live model, its optimizer and its loss, seen as a controlled dynamical system.

s_{t+1} = F_t(s_t, u_t, ξ_t): the state s holds parameters, buffers, optimizer slots and the random
state; the controls u are lr, momentum, noise and weight decay; the data of step t is part of F_t.
The plant steps, takes and restores snapshots, and rolls a window forward while it records what the
adjoint needs to look back. It decides nothing.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.nn.modules.batchnorm import _NormBase

from rhc.containers import opening
from rhc.distributed import (
    Ranks,
    SyncBatchNorm,
    cut_as,
    is_shared_out,
    norm_over,
    norms_of_wholes,
    part_of,
    parts_of,
    settle,
    weighing,
)
from rhc.errors import InputError, Unseen, whole_number
from rhc.optimizers import Dynamics, dynamics_of
from rhc.rng import (
    RandomState,
    RandomWatch,
    add_gradient_noise,
    drawn_noise,
    root_mean_square,
    standard_noise,
)
from rhc.schedule import OptimizerControls, Schedule, parameters_of
from rhc.training.batches import DrawnAsNeeded, MicroBatches
from rhc.training.diagnostics import check_parts, explained, has_mend
from rhc.training.hooks import Hooks, watched_inside
from rhc.training.module_state import Attributes, Buffers, Captured, Place, overlaps
from rhc.training.objective import Average

PATIENCE = 5
"""One batch may have any loss; this many in a row that are high on average are no accident."""

SLAB = 2**24
"""Bytes of room that is taken at a time on a CPU: half of what glibc maps in any case."""

LossFn = Callable[[nn.Module, Any], Any]

Backward = Callable[[], tuple[Tensor, dict[str, Tensor]]]
"""Fills every `.grad` and returns (loss, metrics)."""


@dataclass(frozen=True)
class Snapshot:
    """A copy in memory of everything a step can change.

    parameters, buffers: name -> tensor, None for a buffer that is not there yet. slots: one dict
    per parameter of the optimizer. groups: the optimizer's hyperparameters. rng: the global random
    state. attributes: what modules hold beside these; None where it was not looked at.
    others: what the optimizer's state has under keys that are no parameters.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor | None]
    slots: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    rng: RandomState
    attributes: Captured | None = None
    others: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Block:
    """Parameters that step together: one vector stands for all of them while looking back.

    group: index of the parameter group. indices: positions in the optimizer's parameter order.
    """

    group: int
    indices: tuple[int, ...]
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    sizes: tuple[int, ...]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The parameters' shapes seen in a vector of their concatenated elements."""
        if len(self.sizes) == 1:
            return [flat.view(self.shapes[0])]
        return list(_unflatten_dense_tensors(flat, _templates(self.shapes)))

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """The concatenated elements of one tensor per parameter of the optimizer: always a copy."""
        return torch.cat([tensors[i].detach().reshape(-1) for i in self.indices])


@functools.cache
def _templates(shapes: tuple[torch.Size, ...]) -> list[Tensor]:
    """Tensors of these shapes without any memory."""
    return [torch.empty(shape, device="meta") for shape in shapes]


@dataclass
class BlockState:
    """θ and the optimizer's state of one block, flattened: everything that Φ maps."""

    parameters: Tensor
    optimizer: Any


@dataclass(frozen=True)
class Found:
    """What a step draws from, and counts by: the global random state, attributes of modules."""

    rng: RandomState | None
    attributes: Captured

    def restore(self) -> None:
        if self.rng is not None:
            self.rng.restore()
        self.attributes.restore()


@dataclass
class Trajectory:
    """What a roll leaves behind, for K steps from absolute step `start`.

    For a recorded roll, states: roll index -> one BlockState per block, at the indices asked for;
    slots: roll index -> the optimizer's state alone, per block, where no more was asked for;
    gradients: per step, one flat vector per block (None where the block took no part), before what
    hooks make of it; batches, buffers and rng: as each step found them, rng None where the step
    draws nothing. hooks: of the parameters. losses, metrics, gradient_norms: as observed.
    diverged: the roll index of the first step whose loss was not finite, or above the limit.
    """

    start: int
    schedule: Schedule
    blocks: tuple[Block, ...]
    batches: list[Any] = field(default_factory=list)
    states: dict[int, list[BlockState]] = field(default_factory=dict)
    slots: dict[int, list[Any]] = field(default_factory=dict)
    gradients: list[list[Tensor | None]] = field(default_factory=list)
    buffers: list[dict[str, Tensor | None]] = field(default_factory=list)
    rng: list[RandomState | Found | None] = field(default_factory=list)
    hooks: Hooks | None = None
    losses: list[Tensor] = field(default_factory=list)
    metrics: list[dict[str, Tensor]] = field(default_factory=list)
    gradient_norms: list[float | Tensor] = field(default_factory=list)
    diverged: int | None = None

    def __len__(self) -> int:
        return len(self.losses)


class Plant:
    """The live model, optimizer and loss, with the verbs of the loop that act on them.

    loss_fn(model, batch) returns a scalar tensor, or (scalar tensor, {"name": tensor, …}).
    seed: of the gradient noise. clip_norm: global gradient norm to clip at; clip_value: largest
    absolute value of a gradient's element; None for no clipping, and one of the two at most.
    A batch that is `MicroBatches` is one step on the mean of their losses.
    ranks: the processes that train together. Here, and nowhere else, gradients, losses and metrics
    become those of all of them; `averaged` does it for what others derive.
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
    ) -> None:
        for name, level in (("clip_norm", clip_norm), ("clip_value", clip_value)):
            if level is not None and not level > 0:
                raise InputError(f"{name} must be > 0, got {level}; use None not to clip")
        if clip_norm is not None and clip_value is not None:
            raise InputError(
                f"clip_norm and clip_value cannot go together, got {clip_norm:g} and "
                f"{clip_value:g}; give one of them"
            )
        check_parts(model, optimizer, loss_fn)
        seed = whole_number("seed", seed)
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = opening(loss_fn if ranks is None else weighing(loss_fn, ranks))
        self.ranks = ranks
        self.seed = seed
        self.clip_norm = clip_norm
        self.clip_value = clip_value
        self.controls = OptimizerControls(optimizer)
        self._hold()
        self.singletons = False
        self._holds_gradients = False
        self._statistics: list[Tensor] = []
        self.find_statistics()
        self._plain_zero_grad = type(
            optimizer
        ).zero_grad is torch.optim.Optimizer.zero_grad and "zero_grad" not in vars(optimizer)
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        needed = closure is not None and closure.default is inspect.Parameter.empty
        self._closure: Literal["none", "only", "second"] = "only" if needed else "none"
        """Who evaluates a step's loss: the plant; the optimizer, as LBFGS; it too, as SAM."""
        self.has_evaluation_weights = all(
            callable(getattr(optimizer, name, None)) for name in ("train", "eval")
        )
        """Whether the optimizer keeps other weights for evaluation, as schedule-free ones do."""

    def take_up(self) -> None:
        """Looks again at what the optimizer holds, where groups were added since the last fit."""
        if len(self.optimizer.param_groups) != self._count:
            self.controls.take_up()
            self._hold()

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups that are known here."""
        return self.optimizer.param_groups[: self._count]

    def _hold(self) -> None:
        model, optimizer, ranks = self.model, self.optimizer, self.ranks
        self._count = len(optimizer.param_groups)
        self.owned = self.parameters = parameters_of(optimizer)
        """What the optimizer holds, and what is seen of it: this rank's parts, if shared out."""
        if not self.parameters:
            raise InputError("the optimizer holds no parameters; give it model.parameters()")
        self._names = {id(p): n for n, p in model.named_parameters()}
        for index, p in enumerate(self.parameters):
            if id(p) not in self._names:
                raise InputError(
                    f"parameter {index} of the optimizer, of shape {tuple(p.shape)}, is not a "
                    "parameter of the model; register it on the model"
                )
            if self.clip_value is not None and p.is_complex():
                raise InputError(
                    f"clip_value clips real gradients, and parameter {self._names[id(p)]!r} is "
                    "complex; use clip_norm"
                )
        self.shared_out = is_shared_out(self.owned)
        if self.shared_out:
            self.parameters = parts_of(model, self.owned, ranks)
            for whole, part in zip(self.owned, self.parameters, strict=True):
                self._names[id(part)] = self._names[id(whole)]
        # An attention mask of -inf is no sign of divergence.
        buffers = model.named_buffers()
        self._infinite = {n for n, b in buffers if not bool(b.isfinite().all())}
        self.counted: list[Place] | None = None
        """Attributes of modules that a step changes, and (moved) parameters that the optimizer does
        not train and loss_fn does; None before a step was recorded."""
        self.moved: dict[str, Tensor] | None = None
        self._on_cpu = all(p.device.type == "cpu" for p in self.parameters)

    @property
    def names(self) -> list[list[str]]:
        """The names of the optimizer's parameters, by parameter group."""
        groups = self.optimizer.param_groups
        return [[self._names[id(p)] for p in group["params"]] for group in groups]

    def find_statistics(self) -> None:
        """Looks for layers whose statistics are of this rank's rows: their means are taken."""
        if self.ranks is not None:
            self._statistics = _own_statistics(self.model)

    # One step ------------------------------------------------------------------------------------

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of the live model on a batch; a loss that cannot be used is an error.

        One that holds gradients is evaluated with grad also where that is off.
        """
        if self._holds_gradients and not torch.is_grad_enabled():
            with torch.enable_grad():
                loss, metrics = self.loss(batch)
            return loss.detach(), {name: value.detach() for name, value in metrics.items()}
        try:
            result = self.loss_fn(self.model, batch)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            if not torch.is_grad_enabled() and _wants_grad(error):
                self._holds_gradients = True
                return self.loss(batch)
            if not isinstance(error, InputError) and has_mend(error):
                raise InputError(explained(error, "", self.model, batch)) from error
            raise  # for whoever debugs it; memory is for the Runner
        return checked_loss(result)

    def step(self, batch: Any, controls: Mapping[str, float], step: int) -> StepRecord:
        """One optimizer step in place: exactly the plain loop's, with the controls of the step.

        controls: natural values; what is absent stays as the optimizer has it.
        """
        return self._advance(batch, controls, step, None)

    def _advance(
        self,
        batch: Any,
        controls: Mapping[str, float],
        step: int,
        recorder: Recorder | None,
        backward: Backward | None = None,
    ) -> StepRecord:
        """`step`, where the recorder sees the raw gradients, before hooks, clipping and noise.

        backward: fills the gradients in place of loss and backward.
        """
        if len(self.optimizer.param_groups) != self._count:
            raise InputError(
                f"the optimizer's parameter groups were {self._count} when the fit began, and are "
                f"{len(self.optimizer.param_groups)} at step {step}: add groups between two fits, "
                "not during one"
            )
        self.controls.write(controls)
        if self._closure != "none":
            return self._step_by_closure(batch, controls, step)
        observed = self._differentiate(batch, controls, step, recorder, backward)
        try:
            (self.optimizer if recorder is None else recorder.hooks).step()
        except Exception as error:
            if "closure" not in str(error).lower():
                raise
            # As of SAM, whose closure is optional by its signature alone; nothing is changed yet.
            self._closure = "second"
            return self._step_by_closure(batch, controls, step, observed)
        return observed

    def _step_by_closure(
        self, batch: Any, controls: Mapping[str, float], step: int, first: StepRecord | None = None
    ) -> StepRecord:
        """A step of an optimizer that evaluates the loss by itself; what was observed at first."""
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
        backward: Backward | None = None,
    ) -> StepRecord:
        """Fills every `.grad` with what the optimizer is to step by."""
        self.forget_gradients()
        with contextlib.nullcontext() if recorder is None else recorder.watching():
            if backward is None:
                loss, metrics = self.backward(batch)
            else:
                loss, metrics = self._with_means(*backward())
        if self._statistics and self.ranks is not None:
            self.ranks.mean_(self._statistics)
        if recorder is not None:
            recorder.keep_gradients()
        norm = self._transform_gradients(controls.get("noise", 0.0), step)
        # A copy: the model may go on changing what it gave, such as a counter.
        return StepRecord(loss.detach(), {k: v.detach().clone() for k, v in metrics.items()}, norm)

    def forget_gradients(self) -> None:
        """`optimizer.zero_grad()`, by hand where that is torch's: it takes 8 µs beside 750."""
        if not self._plain_zero_grad:
            self.optimizer.zero_grad()
            return
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                p.grad = None

    def backward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the gradient of a step's batch to every `.grad`; (loss, metrics), of all ranks."""
        if self.ranks is None:
            return self._backward(batch)
        if self.shared_out:
            return self._backward_of_parts(batch)
        times = len(batch) if isinstance(batch, (MicroBatches, DrawnAsNeeded)) else 1
        with self.ranks.gradients(self.parameters, times) as gradients:
            loss, metrics = self._backward(batch)
        return gradients.end(loss, metrics)

    def _backward_of_parts(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """FSDP leaves means over ranks, cut to the parts; the loss is still this rank's own."""
        assert self.ranks is not None
        for p in self.owned:
            p.grad = None
        loss, metrics = self._backward(batch)
        self.take_parts()
        with self.ranks.gradients([]) as gradients:
            return gradients.end(loss, metrics)

    def take_parts(self) -> None:
        """Gives every part its gradient, where parameters are shared out."""
        for whole, part in zip(self.owned, self.parameters, strict=True):
            part.grad = part_of(whole.grad)

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The Euclidean norm of all of these together, as all ranks hold them."""
        norms = [torch.linalg.vector_norm(t) for t in tensors]
        device = self.parameters[0].device
        own = torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
        return norm_over(self.ranks, own) if self.shared_out and self.ranks is not None else own

    def _with_means(
        self, loss: Tensor, metrics: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What `backward` returns, where gradients were filled in by others."""
        if self.ranks is None:
            return loss, metrics
        with self.ranks.gradients(self.parameters) as gradients:
            return gradients.end(loss, metrics)

    def averaged(
        self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Means over ranks of what each derived from its own rows, shaped as `like`."""
        return list(tensors) if self.ranks is None else self.ranks.averaged(tensors, like)

    def value(self, loss: Tensor) -> float:
        """A loss that each rank took on its own rows, as a number: of all ranks."""
        return float(loss if self.ranks is None else self.ranks.value(loss))

    def _backward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if isinstance(batch, (MicroBatches, DrawnAsNeeded)):
            return self._accumulate(batch)
        loss, metrics = self.loss(batch)
        _fill_gradients(loss)
        return loss, metrics

    def refuse_complex(self) -> None:
        """An InputError where a parameter is complex: a reverse pass goes by real gradients."""
        for p in self.owned:
            if p.is_complex():
                raise InputError(
                    f"parameter {self._names[id(p)]!r} is complex ({p.dtype}), and hypergradients "
                    "need real ones; keep a real one with a last dimension of 2 and take "
                    "torch.view_as_complex of it in forward, or turn rewriting off"
                )

    def refuse_sparse(self, *, slots: bool = True) -> None:
        """An InputError where a gradient, or a slot that was made of one, is sparse."""
        for p in self.owned:
            if self.shared_out:
                return
            tensors = [p.grad, *(self.optimizer.state.get(p, {}).values() if slots else ())]
            if any(isinstance(t, Tensor) and t.layout != torch.strided for t in tensors):
                raise InputError(
                    f"the gradient of parameter {self._names[id(p)]!r} is sparse, and looking back "
                    "needs dense ones; use sparse=False in the embedding that makes it"
                )

    def _accumulate(
        self, batches: MicroBatches | DrawnAsNeeded
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Adds the gradient of the mean loss of the micro-batches; (mean loss, mean metrics)."""
        count = len(batches)
        losses: list[Tensor] = []
        metrics: list[dict[str, Tensor]] = []
        for batch in batches:
            loss, observed = self.loss(batch)
            _fill_gradients(loss / count)
            losses.append(loss.detach())
            metrics.append({name: value.detach().clone() for name, value in observed.items()})
        return torch.stack(losses).mean(), mean_metrics(metrics)

    def _transform_gradients(self, sigma: float, step: int) -> float | Tensor:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if not grads:
            raise InputError(
                "loss_fn's result does not depend on any parameter of the optimizer; "
                "give the optimizer the parameters of the model that loss_fn uses"
            )
        norm: float | Tensor
        if self.clip_norm is not None:
            norm = self.norm(grads) if self.shared_out else torch.nn.utils.get_total_norm(grads)
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        else:
            norm = _total_norm(grads) if self._on_cpu else torch.nn.utils.get_total_norm(grads)
            norm = float(self.norm(grads)) if self.shared_out else norm
        if self.clip_value is not None:
            torch.nn.utils.clip_grad_value_(self.parameters, self.clip_value)
        if sigma != 0 and self.shared_out:
            with torch.no_grad():
                rms = self.root_mean_squares([p.grad for p in self.parameters])
                for p, xi, scale in zip(self.parameters, self.noise(step), rms, strict=True):
                    if p.grad is not None:
                        p.grad.addcmul_(xi, scale.to(p.grad.dtype), value=sigma)
        elif sigma != 0:
            add_gradient_noise(self.parameters, sigma, self.seed, step)
        return norm

    def noise(self, step: int) -> list[Tensor]:
        """ξ_t for every parameter: of what is shared out this rank's part of one process's."""
        if not self.shared_out:
            return standard_noise(self.parameters, self.seed, step)
        draws = drawn_noise(self.owned, self.seed, step)
        return [cut_as(xi, p) for xi, p in zip(draws, self.owned, strict=True)]

    def root_mean_squares(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """RMS of every parameter's gradient, as all ranks hold it; 0 where it has none."""
        known = [
            p.new_zeros(1) if g is None else g
            for p, g in zip(self.parameters, gradients, strict=True)
        ]
        if not self.shared_out or self.ranks is None:
            return [root_mean_square(g) for g in known]
        norms = norms_of_wholes(self.ranks, known)
        return [n / max(p.numel(), 1) ** 0.5 for n, p in zip(norms, self.owned, strict=True)]

    # Snapshot and restore ------------------------------------------------------------------------

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        """A deep copy of the state; `optimizer.state_dict()` would alias the live tensors."""
        self._settle()
        return Snapshot(
            {n: p.detach().clone() for n, p in self.model.named_parameters()},
            Buffers(self.model).copies(),
            [_copied(dict(self.optimizer.state.get(p, {}))) for p in self.owned],
            [_copied(_hyperparameters(g)) for g in self.groups],
            RandomState.capture(),
            self.attributes(),
            _copied({k: v for k, v in self.optimizer.state.items() if not isinstance(k, Tensor)}),
        )

    def attributes(self) -> Captured:
        """What modules hold beside parameters and buffers: counters, generators, lists."""
        return Attributes(self.model).capture()

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Puts the state back, in place; the snapshot stays usable."""
        self._settle()
        for name, parameter in self.model.named_parameters():
            parameter.copy_(snapshot.parameters[name])
        Buffers(self.model).put(snapshot.buffers)
        if snapshot.attributes is not None:
            snapshot.attributes.restore()
        for p, slots in zip(self.owned, snapshot.slots, strict=True):
            _restore_slots(self.optimizer.state, p, slots)
        for group, values in zip(self.groups, snapshot.groups, strict=True):
            for key, value in values.items():
                if isinstance(group.get(key), Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = _copied(value)
        state = self.optimizer.state
        for other in [k for k in state if not isinstance(k, Tensor)]:
            del state[other]
        state.update(_copied(snapshot.others))
        snapshot.rng.restore()

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Leaves what loss_fn moves beside trained parameters as it was found."""
        buffers = Buffers(self.model, self.untrained)
        before, attributes = buffers.copies(), self.attributes()
        counts = _counts(buffers.live())
        try:
            yield
        finally:
            if _counts(buffers.live()) != counts:  # else they may be leaves of a graph
                buffers.put(before)
            attributes.restore()

    def _settle(self) -> None:
        if self.shared_out:
            settle(self.model)

    def is_finite(self) -> bool:
        """Whether parameters, buffers and optimizer slots are finite: one host synchronisation."""
        slots = [
            v
            for p in self.owned
            for v in self.optimizer.state.get(p, {}).values()
            if isinstance(v, Tensor)
        ]
        buffers = [b for n, b in self.model.named_buffers() if n not in self._infinite]
        tensors = [*self.model.parameters(), *buffers, *slots]
        found = [part_of(t.detach()) for t in tensors] if self.shared_out else tensors
        floating = [
            t.detach() for t in found if (t.is_floating_point() or t.is_complex()) and t.numel()
        ]
        # The maximum takes five times as long, and is needed only where squares overflow.
        finite = not floating or any(_finite_norms(floating, order) for order in (2.0, math.inf))
        if self.shared_out and self.ranks is not None:
            return self.ranks.sums([float(finite)])[0] == self.ranks.size
        return finite

    def norms(self) -> list[float]:
        """The Euclidean norm of every parameter, in the model's order: a word for comparing."""
        if self.shared_out:
            return [float(self.norm([p.detach()])) for p in self.parameters]
        found = torch._foreach_norm([p.detach() for p in self.model.parameters()])
        return [float(x) for x in torch.stack([n.double() for n in found]).tolist()]

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The model in eval mode; leaves all that it holds and the random state as they were."""
        modes = [(m, m.training) for m in self.model.modules()]
        rng = RandomState.capture()
        self.model.eval()
        # What a graph was made of must stay; its evaluation has buffers of its own.
        alone = contextlib.nullcontext() if torch.is_grad_enabled() else self.untouched()
        try:
            with alone, self._evaluation_weights():
                yield self.model
        finally:
            for module, training in modes:
                module.training = training
            self._settle()
            rng.restore()

    @contextlib.contextmanager
    def _evaluation_weights(self) -> Iterator[None]:
        """Those of the optimizer, where it has them; the others are then back to the bit."""
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

    @contextlib.contextmanager
    def optimizing(self) -> Iterator[None]:
        """The optimizer in its training mode, where it has modes; then in that which it had."""
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
        """Takes one live step per batch from `schedule.start` on, and records what happened.

        record: a `Recorder` of what looking back needs, or just record(i): whether the whole state
        is kept before the i-th step (and at the end, with i = K); None records losses only, which
        is what a replay needs. average: an `Average` that is updated with the parameters after
        every step. on_step is called after every step. limit maps the roll's first loss to the
        level that a mean of PATIENCE losses in a row may not exceed; rolling stops there, and where
        a loss is not finite (on an accelerator both are noticed at the end).
        """
        recorder = Recorder(self, len(schedule), record) if callable(record) else record
        trajectory = Trajectory(schedule.start, schedule, ())
        if recorder is not None:
            trajectory.blocks = self.blocks() if recorder.blocks is None else recorder.blocks
            recorder.trajectory = trajectory
        losses: list[float] = []
        scalars = _Scalars(len(schedule))
        for i, batch in enumerate(batches):
            backward = None if recorder is None else recorder.before(i, batch)
            step = schedule.start + i
            observed = self._advance(batch, schedule.at(step), step, recorder, backward)
            if recorder is None:
                trajectory.losses.append(observed.loss)
                trajectory.metrics.append(observed.metrics)
            else:
                trajectory.losses.append(scalars.keep(None, observed.loss))
                trajectory.metrics.append(
                    {name: scalars.keep(name, v) for name, v in observed.metrics.items()}
                )
            trajectory.gradient_norms.append(observed.gradient_norm)
            if average is not None:
                average.update(self.parameters)
            if on_step is not None:
                on_step(step, observed)
            # On an accelerator asking for the loss would make the host wait at every step.
            if observed.loss.device.type == "cpu":
                losses.append(float(observed.loss))
                if _diverged(losses, limit):
                    trajectory.diverged = i
                    break
        if trajectory.losses and trajectory.losses[0].device.type != "cpu":
            on_host = torch.stack(trajectory.losses).tolist()
            for i in range(len(on_host)):
                if _diverged(on_host[: i + 1], limit):
                    trajectory.diverged = i
                    break
        if recorder is not None:
            recorder.end()
        return trajectory

    # What the adjoint sees -----------------------------------------------------------------------

    @property
    def dynamics(self) -> Dynamics:
        """The differentiable form of the optimizer; an InputError where there is none."""
        return dynamics_of(self.optimizer)

    @property
    def hooks(self) -> Hooks:
        """Those of optimizer and parameters, in their order."""
        owned = [] if self.shared_out else self.owned
        return Hooks(self.optimizer, owned, [self._names[id(p)] for p in owned])

    @property
    def untrained(self) -> dict[str, Tensor]:
        """The model's parameters that the optimizer leaves as they are."""
        trained = {id(p) for p in self.owned if p.requires_grad}
        return {n: p for n, p in self.model.named_parameters() if id(p) not in trained}

    def refuse_overlaps(self) -> None:
        """Unseen where two parameters share memory: a step of one moves the other too."""
        if self.shared_out:
            return
        own = {n: p.detach() for n, p in self.model.named_parameters()}
        found = overlaps(own)
        if found is not None:
            first, second = found
            raise Unseen(
                f"parameters {first!r} and {second!r} share memory, so that a step of one moves "
                "the other, which hypergradients cannot see through; give both modules the same "
                "Parameter, or do without them (rewrite=False)"
            )

    def blocks(self) -> tuple[Block, ...]:
        """The optimizer's trainable parameters, grouped by what steps them alike.

        Same parameter group, dtype, device and number of steps taken: one block. Where some
        parameters of a block turned out to have no gradient at a step, or where the optimizer looks
        at whole matrices, every one is its own.
        """
        members: dict[Any, list[int]] = {}
        groups = [g for g, group in enumerate(self.optimizer.param_groups) for _ in group["params"]]
        for index, p in enumerate(self.parameters):
            if not p.requires_grad:
                continue
            state = self.optimizer.state.get(self.owned[index], {})
            taken = float(state["step"]) if "step" in state else float(bool(state))
            alone = index if self.singletons or not self.dynamics.elementwise else -1
            members.setdefault((groups[index], p.dtype, p.device, taken, alone), []).append(index)
        return tuple(
            Block(
                key[0],
                tuple(indices),
                tuple(self._names[id(self.parameters[i])] for i in indices),
                tuple(self.parameters[i].shape for i in indices),
                tuple(self.parameters[i].numel() for i in indices),
            )
            for key, indices in members.items()
        )

    def _slots(self, i: int) -> Mapping[str, Any]:
        """The optimizer's state of a parameter, as this rank has it."""
        slots: Mapping[str, Any] = self.optimizer.state.get(self.owned[i], {})
        return {k: part_of(v) for k, v in slots.items()} if self.shared_out else slots

    def block_states(self, blocks: Sequence[Block]) -> list[BlockState]:
        """A flattened copy of parameters and optimizer state, one per block."""
        slots = self.block_slots(blocks)
        return [
            BlockState(block.flatten(self.parameters), own)
            for block, own in zip(blocks, slots, strict=True)
        ]

    def slots_alone(self, scheduled: Container[str], controls: Collection[str]) -> bool:
        """Whether the optimizer's state moves on, and is differentiated, without a look at θ.

        scheduled: the controls that are set at every step; controls: those differentiated by.
        """
        decays = "weight_decay" in scheduled or "weight_decay" in controls
        return (
            self.dynamics.blind
            and not decays
            and not self.hooks.of_tensors  # which may read it
            and not any(
                group.get("weight_decay") or group.get("amsgrad")
                for group in self.optimizer.param_groups
            )
        )

    def folds(self, scheduled: Container[str], controls: Collection[str]) -> bool:
        """Whether the optimizer's states of a window can lie where its gradients lay.

        As `slots_alone`; a Schedule says with which values, else those of the groups count.
        """
        fold, noisy, least = self.dynamics.fold, "noise" in controls, {}
        if isinstance(scheduled, Schedule):
            noisy = noisy or ("noise" in scheduled and bool(scheduled["noise"].any()))
            if "momentum" in scheduled:
                least = {"momentum": float(scheduled["momentum"].min())}
        return (
            fold is not None
            and self.slots_alone(scheduled, controls)
            and not noisy
            and self.clip_norm is None
            and self.clip_value is None
            and all(fold.covers(group, least) for group in self.optimizer.param_groups)
        )

    def block_slots(self, blocks: Sequence[Block]) -> list[Any]:
        """A flattened copy of the optimizer's state, one per block."""
        self.refuse_sparse()
        return [
            self.dynamics.state(
                [self._slots(i) for i in block.indices],
                [self.parameters[i] for i in block.indices],
                self.optimizer.param_groups[block.group],
            )
            for block in blocks
        ]


class Recorder:
    """Keeps what looking back at a roll needs, on its trajectory; a subclass may keep it elsewhere.

    states(i): whether the state is kept before the i-th of `steps` steps, and at the end;
    whole(i): whether that is all of it, or the optimizer's alone.
    blocks: which parameters make a vector; as the plant has it now where None.
    """

    trajectory: Trajectory

    def __init__(
        self,
        plant: Plant,
        steps: int,
        states: Callable[[int], bool],
        blocks: tuple[Block, ...] | None = None,
        whole: Callable[[int], bool] = lambda i: True,
    ) -> None:
        self.plant = plant
        self.states, self.whole = states, whole
        self.blocks = blocks
        self.store = _Store(steps)
        self._watch: RandomWatch | None = None
        # Modules stay, buffers may not. Finding them takes 50 µs a step of a small model.
        self._buffers = Buffers(plant.model, plant.moved)
        self._attributes = Attributes(plant.model)
        self._counted: list[Captured] = []
        self._untrained = plant.untrained
        self._versions: list[int] = []
        self._norms: list[Tensor] = []
        self.hooks = plant.hooks

    def before(self, i: int, batch: Any) -> Backward | None:
        """Called before every step; may return what is to take the place of loss and backward."""
        trajectory = self.trajectory
        if self.states(i) and self.whole(i):
            trajectory.states[i] = self.plant.block_states(trajectory.blocks)
        elif self.states(i):
            trajectory.slots[i] = self.plant.block_slots(trajectory.blocks)
        trajectory.batches.append(batch)
        trajectory.hooks = self.hooks
        if i == 1:
            self._find_moved()
        self._note_randomness()
        self._counted.append(self._attributes.capture(self.plant.counted))
        trajectory.buffers.append(self._buffers.copies())
        if i == 0 and self.plant.moved is None:
            trajectory.buffers[0] |= {n: p.detach().clone() for n, p in self._untrained.items()}
        self._versions = [p._version for p in self.plant.parameters]
        self._norms = self._take_norms() if self.looks_closely(i) else []
        return None

    def watching(self) -> contextlib.AbstractContextManager[Any]:
        """Around a step's loss and its backward pass."""
        if len(self.trajectory.batches) > 1:
            return self.hooks.taken()
        stack = contextlib.ExitStack()
        stack.enter_context(self.hooks.taken())
        stack.enter_context(watched_inside(self.plant.model))
        return stack

    def _find_moved(self) -> None:
        """What the first step that was recorded has changed, and the next ones will."""
        plant, first = self.plant, self.trajectory.buffers[0]
        if plant.counted is None:
            plant.counted = self._counted[0].moved(self._attributes.capture())
        if plant.moved is None:
            for name, p in self._untrained.items():
                if torch.equal(p, first[name]):  # type: ignore[arg-type]
                    del first[name]
            plant.moved = {n: p for n, p in self._untrained.items() if n in first}
            self._buffers.moved = plant.moved

    def looks_closely(self, i: int) -> bool:
        """Whether step i is compared by values: the first and the last one of the window."""
        return i in (0, len(self.trajectory.schedule) - 1)

    def _take_norms(self) -> list[Tensor]:
        if self.plant.shared_out:
            return []
        return list(torch._foreach_norm([p.detach() for p in self.plant.parameters]))

    def _refuse_moved(self) -> None:
        """Unseen where loss_fn itself has moved parameters that the optimizer trains.

        Not of parts that are shared out, which FSDP itself writes.
        """
        if self.plant.shared_out:
            return
        versions = [p._version for p in self.plant.parameters]
        moved = [a != b for a, b in zip(self._versions, versions, strict=True)]
        if self._norms:  # what changes .data counts no versions
            pairs = zip(self._norms, self._take_norms(), strict=True)
            moved = [bool(b.isfinite()) and a.item() != b.item() for a, b in pairs]
        names = [n for n, m in zip(self.hooks.names, moved, strict=True) if m]
        if names:
            raise moved_by_loss(names[0])

    def keep_gradients(self) -> None:
        """Called with the raw gradients, before hooks, clipping and noise."""
        trajectory = self.trajectory
        self._refuse_moved()
        gradients = [p.grad for p in self.plant.parameters]
        self.plant.refuse_sparse(slots=False)
        if any(_is_split(block, gradients) for block in trajectory.blocks):
            # Seldom more than once per plant: from now on every parameter is its own block.
            self.plant.singletons = True
            _split_blocks(trajectory)
        trajectory.gradients.append(self.keep(len(trajectory.gradients), gradients))
        self.hooks.run()
        several = isinstance(trajectory.batches[-1], (MicroBatches, DrawnAsNeeded))
        if self.hooks.acting and (several or self.plant.ranks is not None):
            raise Unseen(
                f"hooks of parameter {self.hooks.acting!r} change its gradient at every "
                "micro-batch or rank, and hypergradients see their mean; use accumulate=1 and one "
                "process, or do without them (rewrite=False)"
            )

    def keep(self, i: int, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of step i as they are remembered, a vector per block; [] for not."""
        return self.store.keep(self.trajectory.blocks, gradients)

    def end(self) -> None:
        """Called after the last step."""
        trajectory = self.trajectory
        n = len(trajectory)
        self._note_randomness()
        trajectory.rng.pop()
        self._find_moved()
        for i, counted in enumerate(self._counted[: len(trajectory.rng)]):
            if self.plant.counted:
                only = counted.only(self.plant.counted)
                rng = trajectory.rng[i]
                assert not isinstance(rng, Found)
                trajectory.rng[i] = Found(rng, only)
        if trajectory.diverged is None and self.states(n):
            trajectory.states[n] = self.plant.block_states(trajectory.blocks)

    def _note_randomness(self) -> None:
        """Remembers the random state, and drops the one before if nothing was drawn since."""
        if self._watch is None:
            self._watch = RandomWatch()
        before, now = self._watch.state, self._watch.now()
        rng = self.trajectory.rng
        if rng and now is before:
            rng[-1] = None
        rng.append(now)


class _Store:
    """Room for the gradients of a whole roll, one matrix per block.

    Taken at once, since many long-lived tensors between the short-lived ones of every step would
    leave the heap in pieces: +60 MB on a GPT of 0.6 M parameters with K = 25. On a CPU in slabs
    that glibc takes from its heap: what is larger it maps anew for every window, and each of its
    pages is faulted in again, which took 1.4 ms of a step of that GPT, of 125.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.kept = 0
        self.rooms: dict[tuple[int, ...], list[Tensor]] = {}

    def keep(
        self, blocks: Sequence[Block], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradient of every block as one vector, None where it took no part."""
        kept: list[Tensor | None] = []
        for block in blocks:
            parts = [g.reshape(-1) for i in block.indices if (g := gradients[i]) is not None]
            if not parts:
                kept.append(None)
                continue
            if block.indices not in self.rooms:
                self.rooms[block.indices] = self._room(parts[0], sum(block.sizes))
            room = self.rooms[block.indices][self.kept]
            kept.append(torch.cat(parts, out=room))
        self.kept += 1
        return kept

    def _room(self, like: Tensor, size: int) -> list[Tensor]:
        """A vector of `size` elements for every step."""
        rows = self.steps
        if like.device.type == "cpu":
            rows = max(1, SLAB // max(1, size * like.element_size()))
        slabs = [
            like.new_empty(min(rows, self.steps - first), size)
            for first in range(0, self.steps, rows)
        ]
        return [row for slab in slabs for row in slab.unbind()]


class _Scalars:
    """Room for what every step observes, by name: small tensors that stay would pin the heap."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.rooms: dict[Any, tuple[Tensor, list[Tensor]]] = {}

    def keep(self, name: str | None, value: Tensor) -> Tensor:
        """The value, moved to the room of its name and type if it is a number."""
        if value.dim():
            return value
        key = name, value.dtype, value.device
        if key not in self.rooms:
            room = value.new_empty(self.steps)
            self.rooms[key] = room, list(room.unbind()[::-1])
        own = self.rooms[key][1].pop()
        return own.copy_(value)


def moved_by_loss(name: str) -> Unseen:
    """What is said where loss_fn changes a parameter that the optimizer trains."""
    return Unseen(
        f"loss_fn changes parameter {name!r} in place (clamp_, .data, Embedding(max_norm=…)), "
        "which hypergradients cannot see through; compute what it is to be inside the model "
        "(torch.nn.utils.parametrize), or do without them (rewrite=False)"
    )


def _is_split(block: Block, gradients: Sequence[Tensor | None]) -> bool:
    """Whether some, but not all, parameters of a block have a gradient."""
    missing = sum(gradients[i] is None for i in block.indices)
    return 0 < missing < len(block.indices)


def _split_blocks(trajectory: Trajectory) -> None:
    """Makes every parameter its own block, in what a roll has recorded so far too."""
    blocks = trajectory.blocks
    for i, states in trajectory.states.items():
        trajectory.states[i] = split_states(blocks, states)
    trajectory.slots.clear()  # they can be made of the states again
    trajectory.gradients = [split_gradients(blocks, g) for g in trajectory.gradients]
    trajectory.blocks = tuple(
        Block(b.group, (index,), (name,), (shape,), (size,))
        for b in blocks
        for index, name, shape, size in zip(b.indices, b.names, b.shapes, b.sizes, strict=True)
    )


def split_gradients(
    blocks: Sequence[Block], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients recorded for `blocks`, one for every parameter of them."""
    return [
        part
        for block, g in zip(blocks, gradients, strict=False)  # [] where they were not kept
        for part in ([None] * len(block.sizes) if g is None else g.split(block.sizes))
    ]


def split_states(blocks: Sequence[Block], states: Sequence[BlockState]) -> list[BlockState]:
    """States recorded for `blocks`, one for every parameter of them."""
    result = []
    for block, state in zip(blocks, states, strict=True):
        total = sum(block.sizes)
        slots = [
            v.split(block.sizes)
            if isinstance(v, Tensor) and v.shape == (total,)
            else [v] * len(block.sizes)
            for v in state.optimizer
        ]
        kind = type(state.optimizer)
        result += [
            BlockState(part, kind(*(slot[i] for slot in slots)))
            for i, part in enumerate(state.parameters.split(block.sizes))
        ]
    return result


@dataclass(frozen=True)
class StepRecord:
    """What one step observed: loss and metrics before the update, and the raw gradient's norm.

    gradient_norm: a tensor on an accelerator, where a number would make the host wait.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    gradient_norm: float | Tensor


def _own_statistics(model: nn.Module) -> list[Tensor]:
    """Running statistics of layers that see the rows of one rank."""
    return [
        buffer
        for module in model.modules()
        if isinstance(module, _NormBase)
        and not isinstance(module, (SyncBatchNorm, nn.SyncBatchNorm))
        for buffer in (module.running_mean, module.running_var)
        if buffer is not None
    ]


def _total_norm(grads: list[Tensor]) -> float:
    """The Euclidean norm of gradients on a CPU, all together.

    torch.nn.utils.get_total_norm takes three times as long for a small model: 100 µs beside a step
    of 1.1 ms.
    """
    return math.hypot(*[norm.item() for norm in torch._foreach_norm(_dense(grads))])


def _dense(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors, of those that are sparse the values."""
    if not any(t.is_sparse for t in tensors):
        return tensors
    return [t.coalesce().values() if t.is_sparse else t for t in tensors]


_run_backward: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)


def _fill_gradients(loss: Tensor) -> None:
    """`loss.backward()`, without its checks; an InputError where the graph was gone through before.

    They take 10 µs beside a step of 750 of a small model.
    """
    plain = type(loss) is Tensor and loss.is_floating_point() and loss.dim() == 0
    try:
        if _run_backward is None or not plain:
            loss.backward()
            return
        seed = torch.ones_like(loss)
        _run_backward(
            (loss,), (seed,), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    except RuntimeError as error:
        if "graph a second time" not in str(error):
            raise
        raise InputError(
            "the graph of loss_fn's result was gone through before: leave backward() to the "
            "Runner, and .detach() what the model or loss_fn keeps from one batch to the next"
        ) from error


def _wants_grad(error: Exception) -> bool:
    """Whether it is of code that needs gradients of what has none under no_grad."""
    words = ("does not require grad", "doesn't require gradient")
    return isinstance(error, RuntimeError) and any(each in str(error) for each in words)


def _counts(tensors: Mapping[str, Tensor | None]) -> dict[str, tuple[int, int]]:
    """Name -> (which tensor it is, how often it was changed)."""
    return {
        name: (id(t), 0 if t is None or t.is_inference() else t._version)
        for name, t in tensors.items()
    }


def _finite_norms(tensors: list[Tensor], order: float) -> bool:
    norms = torch._foreach_norm(_dense(tensors), order)
    device = norms[0].device
    return bool(torch.stack([n.to(device, torch.float64) for n in norms]).isfinite().all())


def checked_loss(result: Any, source: str = "loss_fn") -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) from what `source` returned; an InputError for anything else."""
    loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(loss, Tensor):
        mend = "return the loss itself, not .item()"
        if result is None:
            mend = "it has no return"
        elif isinstance(getattr(loss, "loss", None), Tensor):
            mend = "return its .loss"
        elif isinstance(result, (tuple, list, dict)):
            mend = "return loss, or (loss, {'accuracy': …})"
        raise InputError(
            f"{source} must return a scalar tensor or (scalar tensor, dict), got "
            f"{type(loss).__name__}; {mend}"
        )
    if not isinstance(metrics, Mapping):
        raise InputError(
            f"{source} must return a scalar tensor or (scalar tensor, dict of metrics), got a "
            f"{type(metrics).__name__} for the dict; return (loss, {{'accuracy': …}})"
        )
    if loss.dim() != 0:
        if loss.numel() != 1:
            raise InputError(
                f"{source} must return a scalar tensor, got shape {tuple(loss.shape)}; "
                "reduce it with .mean()"
            )
        loss = loss.reshape(())
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise InputError(
            f"{source} returned a loss without a graph (requires_grad is False); compute it from "
            "the model's output without .detach(), .item() or torch.no_grad()"
        )
    return loss, {k: _metric(source, k, v) for k, v in metrics.items()}


def mean_metrics(metrics: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of every metric over those of the micro-batches that have it."""
    found: dict[str, list[Tensor]] = {}
    for own in metrics:
        for name, value in own.items():
            # The sum of two flags is a flag.
            whole = value.dtype == torch.bool
            found.setdefault(name, []).append(value.long() if whole else value)
    return {name: sum(v[1:], v[0]) / len(v) for name, v in found.items()}


def _metric(source: str, name: Any, value: Any) -> Tensor:
    if not isinstance(name, str):
        raise InputError(
            f"metrics of {source} must be named by strings, got {name!r}; give it a name such as "
            f"'metric_{name}'"
        )
    try:
        # A Python number has 64 bits, of which the default type would leave 32.
        return torch.as_tensor(value, dtype=torch.float64 if type(value) is float else None)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"metric {name!r} of {source} must be a number or a tensor, got "
            f"{type(value).__name__}; leave it out"
        ) from None


def _diverged(losses: Sequence[float], limit: Callable[[float], float]) -> bool:
    """Whether the newest loss is not finite, or the newest PATIENCE of them are high on average."""
    if not math.isfinite(losses[-1]):
        return True
    recent = losses[-PATIENCE:]
    return len(recent) == PATIENCE and sum(recent) / PATIENCE > limit(losses[0])


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k != "params"}


def _copied(value: Any) -> Any:
    """A copy of a tree of dicts, lists and tuples that shares no tensor with it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(_copied(v) for v in value)
    if isinstance(value, dict):
        found = copy.copy(value)
        found.update({k: _copied(v) for k, v in value.items()})
        return found
    return value


def _restore_slots(state: Any, parameter: Tensor, slots: Mapping[str, Any]) -> None:
    if not slots:
        state.pop(parameter, None)
        return
    live = state[parameter]
    for key in [k for k in live if k not in slots]:
        del live[key]
    for key, value in slots.items():
        current = live.get(key)
        if isinstance(value, Tensor) and isinstance(current, Tensor):
            current.copy_(value)
        else:
            live[key] = _copied(value)

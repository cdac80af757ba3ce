"""The differentiable map θ, b ↦ (loss, stage cost, b′): user code run at any θ_t.

`Evaluation` puts values into the live model, so that compiled models and activation checkpointing
work too. Buffers are constants of a step, except the running statistics of BatchNorm and
InstanceNorm, which PyTorch updates in a kernel that autograd does not see (`visible_statistics`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import _SingleLevelFunction
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from rhc.distributed import SyncBatchNorm
from rhc.hypergradient.kernels import (
    LEAST_VALUED,
    LEAST_VALUELESS,
    functions_allowed,
    light_first_order,
    light_second_order,
    moved_statistics,
)
from rhc.training.batches import MicroBatches
from rhc.training.losses import checked_loss, mean_metrics
from rhc.training.module_state import Buffers, Values
from rhc.training.objective import Objective
from rhc.training.plant import Plant
from rhc.training.trajectory import Block


class Evaluated(NamedTuple):
    """One evaluation at θ_t."""

    loss: Tensor
    stage: Tensor | None  # c_ℓ ℓ − c_r r
    statistics: dict[str, Tensor]  # running ones, after the step
    metrics: Mapping[str, Tensor]


class Evaluation:
    """Evaluates a plant's loss at any θ and b, inside `with`, and restores the live model
    afterwards. `parameters`, per block, are the model's own and the leaves of every graph."""

    def __init__(self, plant: Plant, blocks: Sequence[Block], objective: Objective) -> None:
        self.plant, self.blocks, self.objective = plant, blocks, objective
        self.model = plant.model
        self.parameters = [[plant.parameters[i] for i in block.indices] for block in blocks]
        self.leaves = [p for of_block in self.parameters for p in of_block]
        self.in_place = plant.parallel.sharded
        self.statistics_names = [
            f"{prefix}.{name}" if prefix else name
            for prefix, module in plant.model.named_modules()
            if _has_statistics(module)
            for name in ("running_mean", "running_var")
        ]
        self._without = ExitStack()

    def __enter__(self) -> Evaluation:
        self._without.enter_context(self.plant.hooks.taken())
        self.buffers = Buffers(self.model, self.plant.moved)
        self.kept = self.buffers.copies()
        self._data = [p.data.clone() if self.in_place else p.data for p in self.leaves]
        self.plant.parallel.settle()
        self._all = [p for p in self.model.parameters() if p.requires_grad]
        self._grads = [p.grad for p in self._all]
        for p in self._all:
            p.grad = None
        return self

    def __exit__(self, *exception: object) -> None:
        self.plant.parallel.settle()
        for p, data in zip(self.leaves, self._data, strict=True):
            self._set(p, data)
        for p, grad in zip(self._all, self._grads, strict=True):
            p.grad = grad
        self.buffers.put(self.kept)
        self._without.close()

    def place(
        self,
        flats: Sequence[Tensor],
        buffers: Values,
        leaves: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Sets θ (a vector per block) and b; `leaves` replace buffers that begin a graph."""
        self.plant.parallel.settle()
        for block, flat, own in zip(self.blocks, flats, self.parameters, strict=True):
            for p, values in zip(own, block.views(flat), strict=True):
                self._set(p, values)
        self.buffers.put(buffers)
        for name, leaf in (leaves or {}).items():
            prefix, _, local = name.rpartition(".")
            self.model.get_submodule(prefix)._buffers[local] = leaf

    def __call__(
        self,
        batch: Any,
        *,
        statistics: bool = False,
        twice: bool = False,
        stage: bool = True,
    ) -> Evaluated:
        """Loss and, if `stage`, stage cost of one step's batch, in one graph; the random state is
        the caller's. twice: raises OnceDifferentiable if the loss cannot be differentiated twice.
        """
        with functions_noted(self.plant, batch) if twice else nullcontext():
            loss, metrics = mean_loss(self.plant.loss_fn, self.model, batch)
        names = self.statistics_names if statistics else ()
        after = {name: self.model.get_buffer(name) for name in names}
        cost = self.objective.stage(loss, metrics) if stage else None
        return Evaluated(loss, cost, after, metrics)

    def joint(self, statistics: Collection[str]) -> bool:
        """Whether these running statistics, or a reward, are differentiated beside the loss."""
        return bool(statistics) or bool(self.objective.reward_weight)

    def clear_gradients(self) -> None:
        for p in self.leaves:
            p.grad = None

    def gradients(self) -> list[Tensor]:
        return [
            torch.cat(
                [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in own]
            )
            for own in self.parameters
        ]

    def _set(self, p: Tensor, values: Tensor) -> None:
        """Copies under FSDP, which reads a shard at a fixed address; else replaces `.data`."""
        if self.in_place:
            p.data.copy_(values)
        else:
            p.data = values


class Places:
    """Where parameters lie in a model's modules: other tensors can take their places. torch.func's
    functional_call loses parameters where a module occurs twice (torch 2.13.0)."""

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        index = {id(p): n for n, p in enumerate(parameters)}
        self._places = [
            (module._parameters, name, index[id(p)])
            for _, module in model.named_modules()
            for name, p in module._parameters.items()
            if id(p) in index
        ]

    def put(self, tensors: Sequence[Any]) -> None:
        for own, name, n in self._places:
            own[name] = tensors[n]


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def fresh_leaves(values: Values, names: Iterable[str]) -> dict[str, Tensor]:
    return {n: b.detach().clone().requires_grad_() for n in names if (b := values[n]) is not None}


def parts(batch: Any) -> Sequence[Any]:
    """The micro-batches of a step's batch; the batch itself if there is one."""
    return batch if isinstance(batch, MicroBatches) else (batch,)


def mean_loss(
    loss_fn: Callable[[nn.Module, Any], Any], model: nn.Module, batch: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of a step's batch, the mean over its micro-batches, in one graph."""
    found = [checked_loss(loss_fn(model, part)) for part in parts(batch)]
    if len(found) == 1:
        return found[0]
    return torch.stack([loss for loss, _ in found]).mean(), mean_metrics([m for _, m in found])


# Second derivatives ------------------------------------------------------------------------------


class OnceDifferentiable(RuntimeError):
    """The backward of a custom Function must not be differentiated. torch raises this in
    `backward()` only; `autograd.grad` with inputs gives a wrong result silently."""

    def __init__(self, function: str) -> None:
        super().__init__(f"{function}.backward is once_differentiable")
        self.function = function


_FUNCTIONS: WeakKeyDictionary[Plant, dict[type, Any]] = WeakKeyDictionary()
_apply: Any = torch._C._FunctionBase.__dict__["apply"]


def functions_of(plant: Plant) -> dict[type, Any]:
    """Custom Functions that a plant's losses called -> the batch where each was first seen."""
    return _FUNCTIONS.setdefault(plant, {})


@contextmanager
def functions_noted(plant: Plant, batch: Any) -> Iterator[None]:
    """Records custom Functions called inside; raises OnceDifferentiable at the end for such a one.
    Costs 2 µs a step; walking every loss's graph would cost a small model 2 % of its time."""
    known = functions_of(plant)
    before = len(known)

    def noted(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls not in known and cls.__module__.partition(".")[0] not in ("torch", "rhc"):
            known[cls] = batch
        return _apply.__get__(None, cls)(*args, **kwargs)

    owner: Any = _SingleLevelFunction  # all custom Functions call its `apply`
    owner.apply = classmethod(noted)
    try:
        yield
    finally:
        del owner.apply
    for cls in list(known)[before:]:
        if is_once_differentiable(cls):
            del known[cls]
            raise OnceDifferentiable(cls.__name__)


def check_twice(loss: Tensor) -> None:
    for node in graph_nodes([loss]):
        function = once_differentiable_function(node)
        if function is not None:
            raise OnceDifferentiable(function)


def graph_nodes(outputs: Sequence[Tensor], inputs: Collection[Tensor] = ()) -> Iterator[Any]:
    """The nodes of the outputs' graph, down to those that made the inputs, exclusive."""
    seen = {t.grad_fn for t in inputs} | {None}
    stack = [t.grad_fn for t in outputs]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(n for n, _ in node.next_functions)  # type: ignore[union-attr]


def once_differentiable_function(node: Any) -> str | None:
    """Class name of a node whose backward is decorated by once_differentiable, or None."""
    function = getattr(type(node), "_forward_cls", None)
    return getattr(function, "__name__", None) if is_once_differentiable(function) else None


def is_once_differentiable(function: Any) -> bool:
    backward = getattr(function, "backward", None)
    code = getattr(backward, "__code__", None)
    return (
        hasattr(backward, "__wrapped__")
        and code is not None
        and code.co_filename == torch.autograd.function.__file__
    )


def gradients_by_backward(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    model: nn.Module,
) -> list[Tensor | None]:
    """torch.autograd.grad of leaves by `backward()`, all that reentrant activation checkpointing
    allows; None for unused leaves. The model's `.grad`s are restored."""
    if not outputs:
        return [None] * len(inputs)
    leaves = [p for p in [*model.parameters(), *inputs] if p.is_leaf]
    kept = [(p, p.grad) for p in leaves]
    for p, _ in kept:
        p.grad = None
    try:
        torch.autograd.backward(outputs, seeds)
        return [t.grad for t in inputs]
    finally:
        for p, grad in kept:
            p.grad = grad


@contextmanager
def double_backward(
    model: nn.Module, *, light: bool = True, valued: bool = False, recurrent: bool | None = None
) -> Iterator[None]:
    """Kernels that can be differentiated twice, unlike fused attention and cuDNN's RNNs. light:
    also those of `kernels`. valued: the gradients' values are read too."""
    if recurrent is None:
        recurrent = is_recurrent(model)
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_composed_weight_norm())
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        if light:
            least = LEAST_VALUED if valued else LEAST_VALUELESS
            stack.enter_context(light_second_order(least))
        yield


@contextmanager
def fast_gradients(model: nn.Module) -> Iterator[None]:
    """Kernels for gradients outside the roll that are faster than torch's. Compiled models keep
    theirs: dynamo would recompile."""
    if any(is_compiled(m) for m in model.modules()):
        yield
        return
    with light_first_order():
        yield


def is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def is_recurrent(model: nn.Module) -> bool:
    return any(isinstance(m, nn.RNNBase) for m in model.modules())


@contextmanager
def _composed_weight_norm() -> Iterator[None]:
    """torch._weight_norm of elementary operations: the fused one's second derivative is wrong, by
    3e-4 of a hypergradient in float64 (torch 2.13.0)."""
    modules: list[Any] = [torch, sys.modules["torch.nn.utils.weight_norm"]]
    before = [m._weight_norm for m in modules]

    def composed(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
        return v * (g / torch.norm_except_dim(v, 2, dim))

    for m in modules:
        m._weight_norm = composed
    try:
        yield
    finally:
        for m, fused in zip(modules, before, strict=True):
            m._weight_norm = fused


# Running statistics ------------------------------------------------------------------------------


@contextmanager
def visible_statistics(model: nn.Module, *, update: bool) -> Iterator[None]:
    """Layers whose running statistics, as eval mode reads them, are differentiable; if `update`,
    train mode also updates them differentiably, else not at all."""
    patched = [m for m in model.modules() if _has_statistics(m)]
    for module in patched:
        of_kind = _batch_norm if isinstance(module, _BatchNorm) else _instance_norm
        of_kind = _sync_batch_norm if isinstance(module, SyncBatchNorm) else of_kind
        module.forward = lambda x, module=module, forward=of_kind: forward(module, x, update)
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def has_statistics(model: nn.Module) -> bool:
    return any(_has_statistics(m) for m in model.modules())


def _has_statistics(module: nn.Module) -> bool:
    """Whether a module is one of torch's layers with running statistics, and no more than that."""
    return (
        isinstance(module, (_BatchNorm, _InstanceNorm))
        # torch's SyncBatchNorm, and third-party classes that add an activation.
        and type(module).forward
        in (_BatchNorm.forward, _InstanceNorm.forward, SyncBatchNorm.forward)
        and "forward" not in vars(module)
        and module.running_mean is not None
    )


def _batch_norm(module: Any, x: Tensor, update: bool) -> Tensor:
    if not module.training:
        return _by_statistics(module, x)
    if update:
        module.num_batches_tracked.add_(1)
        momentum = module.momentum
        if momentum is None:
            momentum = 1.0 / float(module.num_batches_tracked)
        if functions_allowed():
            mean, var = module.running_mean, module.running_var
            moved = mean.detach().clone(), var.detach().clone()
            y = F.batch_norm(x, *moved, module.weight, module.bias, True, momentum, module.eps)
            module.running_mean, module.running_var = moved_statistics(
                x, mean, var, moved, momentum
            )
            return y
        dims = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x, dims, correction=1)
        _move_statistics(module, mean, var, momentum)
    return F.batch_norm(x, None, None, module.weight, module.bias, True, 0.0, module.eps)


def _sync_batch_norm(module: SyncBatchNorm, x: Tensor, update: bool) -> Tensor:
    return module.passed(x, update=update, visible=True)


def _instance_norm(module: Any, x: Tensor, update: bool) -> Tensor:
    """nn.InstanceNorm's: its statistics are batch means of every instance's."""
    if x.dim() == module._get_no_batch_dim():
        return _instance_norm(module, x.unsqueeze(0), update).squeeze(0)
    if not module.training:
        return _by_statistics(module, x)
    if update:
        var, mean = torch.var_mean(x, list(range(2, x.dim())), correction=1)
        _move_statistics(module, mean.mean(0), var.mean(0), module.momentum or 0.0)
    return F.instance_norm(x, None, None, module.weight, module.bias, True, 0.0, module.eps)


def _by_statistics(module: Any, x: Tensor) -> Tensor:
    shape = [1, -1] + [1] * (x.dim() - 2)
    scale = (module.running_var + module.eps).rsqrt()
    if module.affine:
        scale = scale * module.weight
    y = (x - module.running_mean.view(shape)) * scale.view(shape)
    return y + module.bias.view(shape) if module.affine else y


def _move_statistics(module: Any, mean: Tensor, var: Tensor, momentum: float) -> None:
    for name, new in (("running_var", var), ("running_mean", mean)):
        old = getattr(module, name)
        setattr(module, name, torch.lerp(old, new.to(old.dtype), momentum))

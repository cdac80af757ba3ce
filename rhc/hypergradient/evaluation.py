"""The differentiable map θ, b ↦ (loss, stage cost, b′): user code run on substituted tensors.

`loss_fn(model, batch)` is called on the live model while its parameters and buffers are replaced
(torch.func.functional_call), so that it runs at any θ_t without touching the model.

Buffers are treated as constants of a step, with one exception: the running statistics of
BatchNorm. PyTorch updates them in a kernel that autograd does not see, although a loss in eval
mode reads them and they depend on every θ_t. `visible_statistics` makes both ends differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from rhc.objective import Objective
from rhc.plant import Block, Plant, checked_loss

Result = TypeVar("Result")


class Evaluated(NamedTuple):
    """loss: scalar. stage: c_ℓ ℓ − c_r r, or None. statistics: BatchNorm's, after the step."""

    loss: Tensor
    stage: Tensor | None
    statistics: dict[str, Tensor]


class Evaluation:
    """Evaluates a plant's loss at given flat parameters and buffers."""

    def __init__(self, plant: Plant, blocks: Sequence[Block], objective: Objective) -> None:
        self.plant = plant
        self.blocks = blocks
        self.objective = objective
        self.statistics_names = [
            f"{prefix}.{name}" if prefix else name
            for prefix, module in plant.model.named_modules()
            if _has_statistics(module)
            for name in ("running_mean", "running_var")
        ]
        self._substitution = _Substitution(plant.model)

    def substituted(
        self, flats: Sequence[Tensor], buffers: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """name -> tensor for every parameter of the blocks and every buffer."""
        tensors = {
            name: view
            for block, flat in zip(self.blocks, flats, strict=True)
            for name, view in zip(block.names, block.views(flat), strict=True)
        }
        return tensors | {
            # A clone, since forward passes update buffers in place; graph tensors are kept.
            name: b if b.requires_grad else b.clone()
            for name, b in buffers.items()
        }

    def __call__(
        self,
        flats: Sequence[Tensor],
        buffers: Mapping[str, Tensor],
        batch: Any,
        *,
        statistics: bool = False,
    ) -> Evaluated:
        """Loss and stage cost of one step's batch; the caller sets the random state before."""
        return self.inside(flats, buffers, batch, lambda found: found, statistics=statistics)

    def inside(
        self,
        flats: Sequence[Tensor],
        buffers: Mapping[str, Tensor],
        batch: Any,
        then: Callable[[Evaluated], Result],
        *,
        statistics: bool = False,
    ) -> Result:
        """then(evaluated), called while the tensors are still substituted.

        A model that uses activation checkpointing runs parts of itself again in the backward pass,
        with the parameters that it then finds.
        """

        def evaluate(model: nn.Module) -> Result:
            loss, metrics = checked_loss(self.plant.loss_fn(model, batch))
            names = self.statistics_names if statistics else ()
            after = {name: model.get_buffer(name) for name in names}
            return then(Evaluated(loss, self.objective.stage(loss, metrics), after))

        return self._substitution.at(self.substituted(flats, buffers), evaluate)

    def terminal(
        self,
        terminal: Callable[[nn.Module], Tensor],
        flats: Sequence[Tensor],
        buffers: Mapping[str, Tensor],
        then: Callable[[Tensor], Result],
    ) -> Result:
        """then(terminal(model)) at the given parameters; the modules' modes are left alone."""
        modes = [(m, m.training) for m in self.plant.model.modules()]
        try:
            return self._substitution.at(
                self.substituted(flats, buffers),
                lambda model: then(checked_loss(terminal(model), "terminal")[0]),
            )
        finally:
            for module, training in modes:
                module.training = training


class _Substitution(nn.Module):
    """The model held in a module of its own, so that functional_call can substitute its tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module], Result]) -> Result:
        return function(self.model)

    def at(self, tensors: Mapping[str, Tensor], function: Callable[[nn.Module], Result]) -> Result:
        """function(model) with these tensors in place of the model's own."""
        prefixed = {f"model.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(self, prefixed, (function,))


@contextmanager
def double_backward(model: nn.Module) -> Iterator[None]:
    """Kernels that can be differentiated twice: fused attention and cuDNN's RNNs cannot."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@contextmanager
def visible_statistics(model: nn.Module, *, update: bool) -> Iterator[None]:
    """BatchNorm layers whose running statistics autograd can see where eval mode reads them.

    update: whether passes in train mode also update them, visibly; else they are left alone.
    """
    patched = [m for m in model.modules() if _has_statistics(m)]
    for module in patched:
        module.forward = lambda x, module=module: _batch_norm(module, x, update)
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def _has_statistics(module: nn.Module) -> bool:
    return (
        isinstance(module, _BatchNorm)
        and not isinstance(module, nn.SyncBatchNorm)
        and "forward" not in vars(module)
        and module.running_mean is not None
    )


def _batch_norm(module: Any, x: Tensor, update: bool) -> Tensor:
    """nn.BatchNorm's forward pass, with running statistics as ordinary tensors."""
    if not module.training:
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = (module.running_var + module.eps).rsqrt()
        if module.affine:
            scale = scale * module.weight
        y = (x - module.running_mean.view(shape)) * scale.view(shape)
        return y + module.bias.view(shape) if module.affine else y
    if update:
        module.num_batches_tracked.add_(1)
        momentum = module.momentum
        if momentum is None:
            momentum = 1.0 / float(module.num_batches_tracked)
        dims = [d for d in range(x.dim()) if d != 1]
        for name, new in zip(
            ("running_var", "running_mean"), torch.var_mean(x, dims, correction=1), strict=True
        ):
            old = getattr(module, name)
            setattr(module, name, torch.lerp(old, new.to(old.dtype), momentum))
    return F.batch_norm(x, None, None, module.weight, module.bias, True, 0.0, module.eps)

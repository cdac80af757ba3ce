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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from rhc.objective import Objective
from rhc.plant import Block, Plant, checked_loss


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
        self._loss = _Call(plant.model, lambda model, batch: plant.loss_fn(model, batch))

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
        result, after = self._loss.at(
            self.substituted(flats, buffers), self.statistics_names if statistics else (), batch
        )
        loss, metrics = checked_loss(result)
        return Evaluated(loss, self.objective.stage(loss, metrics), after)

    def terminal(
        self,
        terminal: Callable[[nn.Module], Tensor],
        flats: Sequence[Tensor],
        buffers: Mapping[str, Tensor],
    ) -> Tensor:
        """terminal(model) at the given parameters; the modules' modes are left as they were."""
        modes = [(m, m.training) for m in self.plant.model.modules()]
        try:
            call = _Call(self.plant.model, lambda model, _: terminal(model))
            value, _ = call.at(self.substituted(flats, buffers), (), None)
        finally:
            for module, training in modes:
                module.training = training
        return checked_loss(value)[0] if torch.is_grad_enabled() else torch.as_tensor(value)


class _Call(nn.Module):
    """A function of a model as a module, so that functional_call can substitute its tensors."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, read: Sequence[str], batch: Any) -> tuple[Any, dict[str, Tensor]]:
        result = self.function(self.model, batch)
        # Read here: on leaving functional_call the live buffers are back in place.
        return result, {name: self.model.get_buffer(name) for name in read}

    def at(
        self, tensors: Mapping[str, Tensor], read: Sequence[str], batch: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """(the function's result, the buffers named in `read` afterwards) at these tensors."""
        prefixed = {f"model.{name}": tensor for name, tensor in tensors.items()}
        return functional_call(self, prefixed, (read, batch))


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

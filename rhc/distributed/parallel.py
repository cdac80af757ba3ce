"""How a model is placed on ranks: one process, replicated or sharded.

A plant calls its `parallel` for every collective operation; `OneProcess` is the base without any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from rhc.distributed.batch_norm import SyncBatchNorm
from rhc.distributed.dtensors import is_dtensor, local_part, part_like
from rhc.distributed.gradients import Gradients, Observed
from rhc.distributed.ranks import Ranks, SumOverRanks
from rhc.distributed.shards import weighing
from rhc.errors import InputError
from rhc.rng import drawn_noise, standard_noise

LossFn = Callable[[nn.Module, Any], Any]


def parallel_of(model: nn.Module, parameters: list[Tensor], ranks: Ranks | None) -> OneProcess:
    if any(is_dtensor(p) for p in parameters):
        return Sharded(model, parameters, ranks)
    return OneProcess(model, parameters) if ranks is None else Replicated(model, parameters, ranks)


class OneProcess:
    """A model on one process.
    owned: the optimizer's parameters. parameters: this rank's parts, trained leaves. watched: those
    of them that loss_fn and hooks see directly."""

    ranks: Ranks | None = None
    sharded = False

    def __init__(self, model: nn.Module, parameters: list[Tensor]) -> None:
        self.model = model
        self.owned = self.parameters = self.watched = parameters

    def weighing(self, loss_fn: LossFn) -> LossFn:
        """loss_fn weighted for this rank's rows of a batch."""
        return loss_fn

    # Gradients -----------------------------------------------------------------------------------

    def backward(self, run: Callable[[], Observed], times: int = 1) -> Observed:
        """Runs a backward pass; averages `.grad`, loss, metrics. times: additions per gradient."""
        return run()

    def average(self, loss: Tensor, metrics: dict[str, Tensor]) -> Observed:
        return loss, metrics

    def find_statistics(self) -> None:
        """Finds layers with running statistics of local rows."""

    def average_statistics(self) -> None:
        """Averages these statistics over ranks."""

    def take_gradients(self) -> None:
        """Sets `.grad` of this rank's parts."""

    def gradient_norm(self, gradients: list[Tensor], *, clipping: bool) -> Tensor | float:
        """Global gradient norm. clipping: computed as torch's clip_grad_norm_ does."""
        if clipping or any(g.device.type != "cpu" for g in gradients):
            return torch.nn.utils.get_total_norm(gradients)
        # For a small model a third of the time: 50 µs of a step of 1.1 ms.
        return math.hypot(*[norm.item() for norm in torch._foreach_norm(dense(gradients))])

    # Means and sums of what ranks derive from their own rows -------------------------------------

    def means(
        self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Means over ranks; None counts as zeros shaped as in `like`."""
        return list(tensors)

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Averages tensors over ranks in place."""

    def value(self, loss: Tensor) -> Tensor:
        return loss.detach()

    def sums(self, numbers: Sequence[float]) -> list[float]:
        return list(numbers)

    def all(self, holds: bool) -> bool:
        return holds

    def union(self, names: Iterable[str]) -> list[str]:
        """The names on any rank, in the same order on all."""
        return list(names)

    def share_random_state(self) -> None:
        """Broadcasts the first rank's random state, so that all draw the same batches."""

    # Parts of parameters and of what is computed for them ----------------------------------------

    def settle(self) -> None:
        """Drops parameters gathered in an earlier forward pass."""

    def local(self, value: Any) -> Any:
        return value

    def sum_of_parts(self, value: Tensor) -> Tensor:
        return value

    def norm_of_parts(self, norm: Tensor) -> Tensor:
        return norm

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The global norm of all these tensors together."""
        norms = [torch.linalg.vector_norm(t) for t in tensors]
        device = self.parameters[0].device
        return self.norm_of_parts(
            torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
        )

    def norms(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The global norm of each; differentiable."""
        return [torch.linalg.vector_norm(part) for part in parts]

    def parameter_norms(self) -> list[float]:
        found = torch._foreach_norm([p.detach() for p in self.model.parameters()])
        return [float(x) for x in torch.stack([n.double() for n in found]).tolist()]

    def root_mean_squares(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """Global RMS of every gradient; 0 for None."""
        known = [
            p.new_zeros(1) if g is None else g
            for p, g in zip(self.parameters, gradients, strict=True)
        ]
        norms = self.norms(known)
        return [n / max(p.numel(), 1) ** 0.5 for n, p in zip(norms, self.owned, strict=True)]

    def noise(self, seed: int, step: int) -> list[Tensor]:
        """ξ_t for every parameter."""
        return standard_noise(self.parameters, seed, step)


class Replicated(OneProcess):
    """Data parallel: every rank has the whole model and its rows of every batch."""

    ranks: Ranks

    def __init__(self, model: nn.Module, parameters: list[Tensor], ranks: Ranks) -> None:
        super().__init__(model, parameters)
        self.ranks = ranks
        self.find_statistics()

    def weighing(self, loss_fn: LossFn) -> LossFn:
        return weighing(loss_fn, self.ranks)

    def backward(self, run: Callable[[], Observed], times: int = 1) -> Observed:
        with Gradients(self.ranks, self.parameters, times) as gradients:
            observed = run()
        return gradients.end(*observed)

    def average(self, loss: Tensor, metrics: dict[str, Tensor]) -> Observed:
        return Gradients(self.ranks, self.parameters).end(loss, metrics)

    def find_statistics(self) -> None:
        self._statistics = [
            buffer
            for module in self.model.modules()
            if isinstance(module, _NormBase)
            and not isinstance(module, (SyncBatchNorm, nn.SyncBatchNorm))
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]

    def average_statistics(self) -> None:
        self.mean_(self._statistics)

    def means(
        self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        pairs = zip(tensors, like, strict=True)
        return list(self.ranks.means([torch.zeros_like(b) if a is None else a for a, b in pairs]))

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        if tensors:
            with torch.no_grad():
                torch._foreach_copy_(list(tensors), self.ranks.means(tensors))

    def value(self, loss: Tensor) -> Tensor:
        return self.ranks.value(loss)

    def sums(self, numbers: Sequence[float]) -> list[float]:
        return self.ranks.sums(numbers)

    def all(self, holds: bool) -> bool:
        return self.ranks.sums([float(holds)])[0] == self.ranks.size

    def union(self, names: Iterable[str]) -> list[str]:
        return sorted({name for own in self.ranks.gather_json(list(names)) for name in own})

    def share_random_state(self) -> None:
        self.ranks.share_random_state()


class Sharded(Replicated):
    """FSDP2: every rank has a part of each parameter.
    Parts are leaves that share memory with the DTensors' local tensors. FSDP gathers parameters per
    layer and averages gradients. It has no second derivatives."""

    sharded = True

    def __init__(self, model: nn.Module, parameters: list[Tensor], ranks: Ranks | None) -> None:
        self._layers: list[Any] = [
            m for m in model.modules() if hasattr(m, "unshard") and hasattr(m, "reshard")
        ]
        for layer in self._layers:
            layer.unshard()  # FSDP shards lazily, at first use
            layer.reshard()
        for p in parameters:
            mesh: Any = getattr(p, "device_mesh", None)
            if mesh is None or mesh.ndim != 1 or ranks is None or mesh.size() != ranks.size:
                raise InputError(
                    f"a parameter of shape {tuple(p.shape)} is not shared out over all ranks as "
                    "the others are; apply fully_shard to the whole model, with a mesh of one "
                    "dimension over the process group"
                )
        assert ranks is not None
        super().__init__(model, parameters, ranks)
        self.parameters = [local_part(p).requires_grad_(p.requires_grad) for p in parameters]
        self.watched = []

    def backward(self, run: Callable[[], Observed], times: int = 1) -> Observed:
        for p in self.owned:
            p.grad = None
        observed = run()
        self.take_gradients()
        return self.average(*observed)

    def average(self, loss: Tensor, metrics: dict[str, Tensor]) -> Observed:
        return Gradients(self.ranks, []).end(loss, metrics)  # FSDP has averaged the gradients

    def take_gradients(self) -> None:
        for whole, part in zip(self.owned, self.parameters, strict=True):
            part.grad = local_part(whole.grad)

    def gradient_norm(self, gradients: list[Tensor], *, clipping: bool) -> Tensor:
        return self.norm(gradients)

    def settle(self) -> None:
        # The root module stays gathered until the backward pass, which an evaluation lacks.
        for layer in self._layers:
            layer.reshard()

    def local(self, value: Any) -> Any:
        return local_part(value)

    def sum_of_parts(self, value: Tensor) -> Tensor:
        return self.ranks.sum(value.to(self.ranks.device)).to(value.device)

    def norm_of_parts(self, norm: Tensor) -> Tensor:
        return torch.sqrt(self.ranks.sum(norm.detach().double() ** 2)).to(norm.dtype)

    def norms(self, parts: Sequence[Tensor]) -> list[Tensor]:
        squares = torch.stack([part.double().square().sum() for part in parts])
        # The clamp makes the derivative 0 at 0.
        return list(SumOverRanks.apply(squares, self.ranks).clamp_min(1e-300).sqrt())

    def parameter_norms(self) -> list[float]:
        return [float(self.norm([p.detach()])) for p in self.parameters]

    def noise(self, seed: int, step: int) -> list[Tensor]:
        draws = drawn_noise(self.owned, seed, step)
        return [part_like(xi, p) for xi, p in zip(draws, self.owned, strict=True)]


def dense(tensors: list[Tensor]) -> list[Tensor]:
    if not any(t.is_sparse for t in tensors):
        return tensors
    return [t.coalesce().values() if t.is_sparse else t for t in tensors]

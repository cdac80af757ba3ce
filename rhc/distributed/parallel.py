"""How a model lies on the ranks that train it: in one process, copied to each, or sharded.

A plant asks its `parallel` for everything that other ranks take part in: gradients, means, norms,
noise. With one process each method is what it says without other ranks.
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
    """How a model lies on `ranks`; parameters: the optimizer's."""
    if any(is_dtensor(p) for p in parameters):
        return Sharded(model, parameters, ranks)
    return OneProcess(model, parameters) if ranks is None else Replicated(model, parameters, ranks)


class OneProcess:
    """A model that one process trains.

    owned: what the optimizer holds. parameters: what this rank has of it, leaves that are trained.
    watched: those among them that loss_fn and hooks see as they are.
    """

    ranks: Ranks | None = None
    sharded = False

    def __init__(self, model: nn.Module, parameters: list[Tensor]) -> None:
        self.model = model
        self.owned = self.parameters = self.watched = parameters

    def weighing(self, loss_fn: LossFn) -> LossFn:
        """loss_fn for batches of which each rank has its rows."""
        return loss_fn

    # Gradients -----------------------------------------------------------------------------------

    def backward(self, run: Callable[[], Observed], times: int = 1) -> Observed:
        """Runs what fills every `.grad`; gradients, loss and metrics become means over ranks.

        times: how often it adds to each gradient.
        """
        return run()

    def average(self, loss: Tensor, metrics: dict[str, Tensor]) -> Observed:
        """The same, where every `.grad` of this rank is filled already."""
        return loss, metrics

    def find_statistics(self) -> None:
        """Looks for layers with running statistics of this rank's rows alone."""

    def average_statistics(self) -> None:
        """Such statistics become means over ranks."""

    def take_gradients(self) -> None:
        """Gives every parameter of this rank its part of the gradient."""

    def gradient_norm(self, gradients: list[Tensor], *, clipping: bool) -> Tensor | float:
        """The norm of all gradients together. clipping: as torch has it that clips by it."""
        if clipping or any(g.device.type != "cpu" for g in gradients):
            return torch.nn.utils.get_total_norm(gradients)
        # For a small model a third of the time: 50 µs of a step of 1.1 ms.
        return math.hypot(*[norm.item() for norm in torch._foreach_norm(dense(gradients))])

    # Means and sums of what ranks derive from their own rows -------------------------------------

    def means(
        self, tensors: Sequence[Tensor | None], like: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Means over ranks, where one may have None for zero; of tensors shaped as `like`."""
        return list(tensors)

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Every tensor becomes its mean over ranks, in place."""

    def value(self, loss: Tensor) -> Tensor:
        """The mean over ranks of a scalar, detached."""
        return loss.detach()

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """The sum over ranks of each number."""
        return list(numbers)

    def all(self, holds: bool) -> bool:
        """Whether it holds on all ranks."""
        return holds

    def union(self, names: Iterable[str]) -> list[str]:
        """The names that any rank has, in the same order on all."""
        return list(names)

    def share_random_state(self) -> None:
        """Gives every rank the first one's random state, so that all draw the same batches."""

    # Parts of parameters and of what is computed for them ----------------------------------------

    def settle(self) -> None:
        """Has the model read anew what lies in its parameters."""

    def local(self, value: Any) -> Any:
        """This rank's part of a parameter, a slot or a buffer."""
        return value

    def sum_of_parts(self, value: Tensor) -> Tensor:
        """The sum over what each rank computed for its parts."""
        return value

    def norm_of_parts(self, norm: Tensor) -> Tensor:
        """The norm of the whole, from that of this rank's part."""
        return norm

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """The norm of all these together, as all ranks hold them."""
        norms = [torch.linalg.vector_norm(t) for t in tensors]
        device = self.parameters[0].device
        return self.norm_of_parts(
            torch.linalg.vector_norm(torch.stack([n.to(device) for n in norms]))
        )

    def norms(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The norm of each, as all ranks hold it; can be differentiated."""
        return [torch.linalg.vector_norm(part) for part in parts]

    def parameter_norms(self) -> list[float]:
        """The norm of every parameter of the model: what ranks and runs are compared by."""
        found = torch._foreach_norm([p.detach() for p in self.model.parameters()])
        return [float(x) for x in torch.stack([n.double() for n in found]).tolist()]

    def root_mean_squares(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """RMS of every parameter's gradient, as all ranks hold it; 0 where it has none."""
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
    """Data parallel: every rank holds the whole model, and sees its own rows of every batch."""

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
    """Every rank holds a part of each parameter, as FSDP2's fully_shard has it.

    A part is seen as a parameter of its own: a leaf in the same memory as the DTensor's local
    tensor, whose `.grad` is taken from the DTensor's. FSDP gathers the whole before a layer runs,
    and leaves gradients as means over ranks, cut to the parts. It has no second derivatives.
    """

    sharded = True

    def __init__(self, model: nn.Module, parameters: list[Tensor], ranks: Ranks | None) -> None:
        self._layers: list[Any] = [
            m for m in model.modules() if hasattr(m, "unshard") and hasattr(m, "reshard")
        ]
        for layer in self._layers:
            layer.unshard()  # FSDP places its parts when it is first used
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
        # The outermost module keeps what it gathered from a forward pass to the backward pass,
        # which an evaluation never has.
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
        # At zero the derivative is zero.
        return list(SumOverRanks.apply(squares, self.ranks).clamp_min(1e-300).sqrt())

    def parameter_norms(self) -> list[float]:
        return [float(self.norm([p.detach()])) for p in self.parameters]

    def noise(self, seed: int, step: int) -> list[Tensor]:
        draws = drawn_noise(self.owned, seed, step)
        return [part_like(xi, p) for xi, p in zip(draws, self.owned, strict=True)]


def dense(tensors: list[Tensor]) -> list[Tensor]:
    """The same tensors, of those that are sparse the values."""
    if not any(t.is_sparse for t in tensors):
        return tensors
    return [t.coalesce().values() if t.is_sparse else t for t in tensors]

"""Twice-differentiable BatchNorm over the rows of all ranks, on any device.

torch.nn.SyncBatchNorm needs CUDA and its backward has no derivative. Here moments are all-reduced
in a way that autograd sees; with losses as means over ranks, the sum is its own adjoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rhc.distributed.ranks import Ranks, SumOverRanks

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class SyncBatchNorm(_BatchNorm):
    ranks: Ranks

    def forward(self, x: Tensor) -> Tensor:
        return self.passed(x, update=True, visible=False)

    def passed(self, x: Tensor, *, update: bool, visible: bool) -> Tensor:
        """The output. update: of running statistics in train mode; visible: to autograd."""
        if not self.training and self.running_mean is not None:
            if not visible:
                return F.batch_norm(
                    x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
                )
            assert self.running_var is not None
            return self._scaled(x, self.running_mean, self.running_var)
        mean, var, count = self._moments(x)
        if update and self.training and self.running_mean is not None:
            self._move(mean, var * (count / (count - 1).clamp_min(1)), visible)
        return self._scaled(x, mean, var)

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, biased variance, count) per channel: N var = Σ_r n_r (var_r + (mean_r − mean)²),
        which avoids cancellation."""
        dims = [d for d in range(x.dim()) if d != 1]
        var, mean = torch.var_mean(x, dims, correction=0)
        own = x.numel() // x.shape[1] if self.ranks.counted else 0
        row = torch.cat([mean, var, mean.new_tensor([float(own)])])
        rows = [
            row if rank == self.ranks.rank else torch.zeros_like(row)
            for rank in range(self.ranks.size)
        ]
        found = SumOverRanks.apply(torch.stack(rows), self.ranks)
        counts = found[:, -1:].detach()
        means, variances = found[:, :-1].chunk(2, dim=1)
        total = counts.sum()
        joint = (counts * means).sum(0) / total
        spread = (counts * (variances + (means - joint) ** 2)).sum(0) / total
        return joint, spread, total

    def _move(self, mean: Tensor, var: Tensor, visible: bool) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1.0 / float(self.num_batches_tracked)
        for name, new in (("running_mean", mean), ("running_var", var)):
            old = getattr(self, name)
            if visible:
                setattr(self, name, torch.lerp(old, new.to(old.dtype), momentum))
            else:
                with torch.no_grad():
                    old.lerp_(new.detach().to(old.dtype), momentum)

    def _scaled(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = (var + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        y = (x - mean.view(shape)) * scale.view(shape)
        return y if self.bias is None else y + self.bias.view(shape)


@contextmanager
def synchronised(model: nn.Module, ranks: Ranks | None, *, every: bool = False) -> Iterator[None]:
    """Context in which SyncBatchNorm layers, or all BatchNorm layers with `every`, change their
    class to this module's."""
    kinds: tuple[type[nn.Module], ...] = (nn.SyncBatchNorm, *(PLAIN if every else ()))
    changed = [] if ranks is None else [m for m in model.modules() if type(m) in kinds]
    before = [type(m) for m in changed]
    for module in changed:
        module.__class__ = SyncBatchNorm
        module.ranks = ranks  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, kind in zip(changed, before, strict=True):
            module.__class__ = kind
            del module.ranks

"""All-reduce of gradients, overlapping the backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rhc.distributed.ranks import Ranks, buckets

Observed = tuple[Tensor, dict[str, Tensor]]
"""(loss, metrics)."""


class Gradients:
    """Averages gradients inside the context, each bucket once it is complete; call `end`
    afterwards.
    Buckets follow the reverse order of parameters, the same on every rank. A gradient that is None
    on all ranks stays None; None on some counts as 0. times: additions to each gradient."""

    def __init__(self, ranks: Ranks, parameters: Sequence[Tensor], times: int = 1) -> None:
        self.ranks = ranks
        self.parameters = [p for p in reversed(parameters) if p.requires_grad]
        self._buckets = [[self.parameters[i] for i in b] for b in buckets(self.parameters)]
        self._missing = [times * len(bucket) for bucket in self._buckets]
        self._bucket_of = {id(p): b for b, bucket in enumerate(self._buckets) for p in bucket}
        self._sent: list[tuple[Tensor, Any]] = []

    def __enter__(self) -> Gradients:
        self._handles = [
            p.register_post_accumulate_grad_hook(self._note) for p in self.parameters if p.is_leaf
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, parameter: Tensor) -> None:
        self._missing[self._bucket_of[id(parameter)]] -= 1
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        with torch.no_grad():
            flat = torch.cat(
                [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket]
            )
        self._sent.append((flat, self.ranks.begin(flat)))

    def end(self, loss: Tensor, metrics: Mapping[str, Tensor]) -> Observed:
        """Writes means into every `.grad`; returns mean loss and mean scalar metrics."""
        names = [name for name, value in metrics.items() if value.numel() == 1]
        numbers = [loss, *(metrics[name] for name in names)]
        device = loss.device
        present = [p.grad is not None for p in self.parameters]
        few = torch.cat(
            [
                torch.stack([x.detach().to(device, torch.float64).reshape(()) for x in numbers]),
                torch.tensor(present, dtype=torch.float64, device=device),
            ]
        )
        work = self.ranks.begin(few)
        while len(self._sent) < len(self._buckets):
            self._send()
        self.ranks.finish(work, few)
        # Reading from an accelerator is a sync, needless if every gradient is present.
        if not all(present):
            present = [x > 0 for x in few[len(numbers) :].tolist()]
        absent = {id(p) for p, there in zip(self.parameters, present, strict=True) if not there}
        for bucket, (flat, sent) in zip(self._buckets, self._sent, strict=True):
            self.ranks.finish(sent, flat)
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                # Not in place: for one row, a bias's gradient aliases a tensor saved by the graph.
                p.grad = None if id(p) in absent else part.view(p.shape)
        means = dict(metrics)
        for name, mean in zip(names, few[1:], strict=False):
            value = metrics[name]
            dtype = value.dtype if value.is_floating_point() else torch.float64
            means[name] = mean.to(dtype).reshape(value.shape)
        return few[0].to(loss.dtype), means

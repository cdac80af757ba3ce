"""A rank's rows [N r / R, N (r + 1) / R) of a batch of N that every rank draws alike.

So R ranks see what one process would. Loaders with a DistributedSampler are left alone: then the
ranks see R batches per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data.distributed import DistributedSampler

from rhc.containers import PLAIN, mapped, may_be_examples, tensors_of
from rhc.distributed.ranks import Ranks
from rhc.errors import InputError


@dataclass(frozen=True)
class Shard:
    """A rank's rows. weight: ranks × their share of the batch of `size`; a rank without rows has
    other rows at weight 0."""

    rows: Any
    weight: float
    size: int


def shard(batch: Any, size: int, rank: int, ranks: int) -> Shard:
    """Rank `rank`'s rows: slices of every tensor, array or list of plain values whose length is
    `size`; the rest is replicated."""
    first, stop = size * rank // ranks, size * (rank + 1) // ranks
    if first == stop:
        return Shard(batch, 0.0, size)
    return Shard(rows_between(batch, size, first, stop), ranks * (stop - first) / size, size)


def halves(batch: Any, size: int, ranks: Ranks | None) -> list[Any]:
    """A batch of `size` rows, or this rank's shard of it, as two: its first and its second half."""
    middle, parts = size // 2, []
    for first, stop in ((0, middle), (middle, size)):
        if not isinstance(batch, Shard):
            parts.append(rows_between(batch, size, first, stop))
            continue
        assert ranks is not None
        begin, end = size * ranks.rank // ranks.size, size * (ranks.rank + 1) // ranks.size
        low, high = max(begin, first), min(end, stop)
        if low < high:
            own = rows_between(batch.rows, end - begin, low - begin, high - begin)
            weight = ranks.size * (high - low) / (stop - first)
            parts.append(Shard(own, weight, stop - first))
        else:
            parts.append(Shard(batch.rows, 0.0, stop - first))
    return parts


def rows_between(value: Any, size: int, first: int, stop: int) -> Any:
    if hasattr(value, "rows_between"):  # a reference to a batch
        return value.rows_between(first, stop)
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        shape = value.shape
        return value[first:stop] if len(shape) and shape[0] == size else value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields") and len(value) == size:
        if type(value) is list and may_be_examples(value):
            return value[first:stop]
        if all(isinstance(v, PLAIN) for v in value):
            return value[first:stop]
    packed = isinstance(value, PackedSequence)
    cut = value if packed else mapped(lambda part: rows_between(part, size, first, stop), value)
    if packed or (cut is value and tensors_of(value)):
        raise InputError(
            f"a {type(value).__name__} in a batch cannot be cut into the rows of each rank: give "
            "them as tensors in a dict, tuple or dataclass, or every rank batches of its own by a "
            "DistributedSampler"
        )
    return cut


def weighing(
    loss_fn: Callable[[nn.Module, Any], Any], ranks: Ranks
) -> Callable[[nn.Module, Any], Any]:
    """loss_fn with loss and numeric metrics multiplied by the shard's weight."""

    def weighed(model: nn.Module, batch: Any) -> Any:
        if not isinstance(batch, Shard):
            return loss_fn(model, batch)
        ranks.counted = batch.weight > 0
        try:
            found = loss_fn(model, batch.rows)
        finally:
            ranks.counted = True
        if batch.weight == 1:
            return found
        if not (isinstance(found, tuple) and len(found) == 2):
            return _scaled(found, batch.weight)
        metrics = {name: _times(value, batch.weight) for name, value in dict(found[1]).items()}
        return _scaled(found[0], batch.weight), metrics

    return weighed


def _scaled(loss: Any, weight: float) -> Any:
    """The loss of a batch, or of its rows or terms; what is none is rejected by the plant."""
    if isinstance(loss, Mapping):
        return {name: _scaled(term, weight) for name, term in loss.items()}
    return loss * weight if isinstance(loss, Tensor) else loss


def _times(value: Any, weight: float) -> Any:
    number = value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, Real)
    return value * weight if number else value


class RankLoader:
    """A loader as seen by one rank. size_of: examples in a batch."""

    def __init__(
        self, loader: Iterable[Any], ranks: Ranks, size_of: Callable[[Any], int], name: str
    ) -> None:
        self.loader = loader
        self.ranks = ranks
        self.size_of = size_of
        self.sampler_of_ranks = _distributed_sampler(loader)
        sampler = self.sampler_of_ranks
        if sampler is not None and (
            (sampler.num_replicas, sampler.rank) != (ranks.size, ranks.rank)
        ):
            raise InputError(
                f"{name}'s DistributedSampler is of rank {sampler.rank} of {sampler.num_replicas}, "
                f"this process is rank {ranks.rank} of {ranks.size}; build it with num_replicas="
                f"{ranks.size}, rank={ranks.rank}"
            )

    def __iter__(self) -> Iterator[Any]:
        if self.sampler_of_ranks is not None:
            yield from self.loader
            return
        for batch in self.loader:
            yield shard(batch, self.size_of(batch), self.ranks.rank, self.ranks.size)

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        if name in ("sampler", "batch_sampler", "generator", "dataset"):
            return getattr(self.loader, name)
        raise AttributeError(name)

    def begin_epoch(self, epoch: int) -> None:
        if self.sampler_of_ranks is not None:
            self.sampler_of_ranks.set_epoch(epoch)


def _distributed_sampler(loader: Any) -> DistributedSampler[Any] | None:
    for holder in (loader, getattr(loader, "batch_sampler", None)):
        sampler = getattr(holder, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            return sampler
    return None

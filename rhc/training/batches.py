"""Batches by step number, from a loader whose position can be found again: its epoch's random state
and the batches to skip. Batches are kept until released, since a window is trained on twice. A kept
batch is a copy (`Kept`), as the loader may reuse its memory, and so is every use of it, as a loss
may change it: 8 µs for 64 x 784 floats beside a step of 420 µs, 1.4 ms for 32 x 3 x 224²."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rhc.containers import Kept, copied, rows_of, to_device
from rhc.data_weights import Weighed
from rhc.distributed import RankLoader, Shard
from rhc.errors import InputError
from rhc.rng import RandomState, preserved, seed_everything
from rhc.storage.trees import joined, parted, spelled, unspelled
from rhc.training.loaders import (
    LoaderOrder,
    Pass,
    alike,
    apart,
    loader_preserved,
    sample,
    stateful_parts,
)


@dataclass(frozen=True)
class EpochStart:
    """What decides an epoch's order. first: a sample of its first batch, to recognise the data."""

    rng: RandomState
    generators: tuple[Tensor, ...]
    states: Mapping[str, Any] = field(default_factory=dict)
    first: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Position:
    """The next batch: `index` batches into epoch `epoch`. start: None before the first."""

    step: int
    epoch: int
    index: int
    start: EpochStart | None
    rng: RandomState
    generators: tuple[Tensor, ...]

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {"place": torch.tensor([self.step, self.epoch, self.index])}
        tensors |= {f"rng.{k}": v for k, v in self.rng.to_tensors().items()}
        tensors |= {f"own.{i}": g for i, g in enumerate(self.generators)}
        if self.start is None:
            return tensors
        tensors |= {f"start.{k}": v for k, v in self.start.rng.to_tensors().items()}
        tensors |= {f"generator.{i}": g for i, g in enumerate(self.start.generators)}
        tensors |= {f"first.{i}": t for i, t in enumerate(self.start.first)}
        if self.start.states:
            found: dict[str, Tensor] = {}
            states = spelled(parted(self.start.states, "state", found))
            tensors["states"] = torch.tensor(list(json.dumps(states).encode()), dtype=torch.uint8)
            tensors |= {name: t.clone() for name, t in found.items()}
        return tensors

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Position:
        """The inverse of `to_tensors`."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        def several(prefix: str) -> tuple[Tensor, ...]:
            found = part(prefix)
            return tuple(found[str(i)] for i in range(len(found)))

        start = None
        if part("start."):
            states = {}
            if "states" in tensors:
                text = bytes(tensors["states"].tolist()).decode()
                states = joined(unspelled(json.loads(text)), tensors)
            rng = RandomState.from_tensors(part("start."))
            start = EpochStart(rng, several("generator."), states, several("first."))
        step, epoch, index = tensors["place"].tolist()
        rng = RandomState.from_tensors(part("rng."))
        return cls(step, epoch, index, start, rng, several("own."))


class MicroBatches(tuple[Any, ...]):
    """The batches of one optimizer step that accumulates gradients, in the order of the loader."""


class DrawnAsNeeded:
    """The micro-batches of one step, each drawn on demand, once: like the plain loop, after the
    gradient of the one before, since loader and dropout may share a random state."""

    def __init__(self, count: int, batches: Iterator[Any]) -> None:
        self.count = count
        self.batches = batches

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return self.batches


def micro_batches(batch: Any) -> Sequence[Any] | DrawnAsNeeded:
    """The batches whose mean loss a step is taken on: those that it accumulates, or it alone."""
    return batch if isinstance(batch, (MicroBatches, DrawnAsNeeded)) else (batch,)


def batch_size(batch: Any) -> int:
    """The examples in a batch: the sum over `MicroBatches`, and of a `Shard` the whole batch."""
    if isinstance(batch, MicroBatches):
        return sum(batch_size(micro) for micro in batch)
    if isinstance(batch, (Kept, Weighed)):
        return batch_size(batch.batch)
    return batch.size if isinstance(batch, Shard) else rows_of(batch)


class StepBatches:
    """The batches of a loader by step number, from 0, over as many epochs as needed.

    loader: can be iterated repeatedly. isolated: draws from a random stream of its own; otherwise
    from the global one, when batches are taken, as a plain loop does. accumulate n: step t has
    batches [n t, n (t + 1)), as `MicroBatches` where n > 1. resumable: positions keep the state of
    loaders, samplers and datasets with a `state_dict`, except `besides`, and a sample of the data.
    differs: set once such data came back different.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        isolated: bool,
        seed: int | None = 0,
        device: torch.device | None = None,
        name: str = "train_loader",
        accumulate: int = 1,
        resumable: bool = False,
        besides: Iterable[Any] = (),
    ) -> None:
        # Without isolation it is iterated as by a plain loop, with persistent workers.
        self.loader: Any = apart(loader) if isolated else loader
        self.isolated, self.resumable, self.accumulate = isolated, resumable, accumulate
        self.device, self.name = device, name
        self.next_step = 0
        """The step whose batch is drawn next."""
        self.differs: str | None = None
        self._order = LoaderOrder(self.loader)
        self._stateful = stateful_parts(loader, besides) if resumable else {}
        self._kept: dict[int, tuple[Any, int, int, EpochStart | None]] = {}
        self._pass: Pass | None = None
        self._epoch, self._index = -1, 0
        self._start: EpochStart | None = None
        self._expected: tuple[Tensor, ...] = ()
        with preserved():
            if seed is not None:
                seed_everything(seed)
            self._rng, self._generators = RandomState.capture(), self._order.states()

    def take(self, start: int, stop: int) -> list[Any]:
        """The batches of steps [start, stop), `Kept`; none may have been released."""
        self._draw_until(stop, again=True)
        return [self._kept[step][0] for step in range(start, stop)]

    def lazily(self, start: int, stop: int) -> Iterator[Any]:
        """The loader's own batches, each drawn on demand and not kept."""
        for step in range(start, stop):
            if self.isolated or self.next_step != step:
                self._draw_until(step + 1, again=False)
                batch = self._kept[step][0]
                self.release(step + 1)
                yield batch
            elif self.accumulate > 1:
                yield DrawnAsNeeded(self.accumulate, self._one_by_one())
            else:
                batch = self._draw()
                self.next_step += 1
                yield batch

    def release(self, before: int) -> None:
        for step in [s for s in self._kept if s < before]:
            del self._kept[step]

    def close(self) -> None:
        """Drops the iterator, which ends a DataLoader's worker processes."""
        self._pass = None
        if self.isolated:
            self.loader = apart(self.loader)  # without this one's persistent workers

    def epoch_of(self, step: int) -> int:
        return self._kept[step][1]

    def position(self, step: int) -> Position:
        """The position of step `step`, which is kept or the next to be drawn."""
        own = self._generators if self.isolated else self._order.states()
        epoch, index, start = self._epoch, self._index, self._start
        if step in self._kept:
            _, epoch, index, start = self._kept[step]
        return Position(step, epoch, index, start, self._rng, own)

    def seek(self, position: Position) -> None:
        """Continues at `position`, dropping earlier batches; the global random state stays."""
        generators, counters = len(self._order.generators), len(self._order.counters)
        # Older checkpoints have no counters.
        if len(position.generators) not in (generators, generators + counters):
            raise InputError(
                f"{self.name} has {generators} generators of its own, the run "
                f"that is resumed had {len(position.generators)}; give it the same loader"
            )
        further = self._is_further(position)
        drawn = self._index if further else 0
        self._kept.clear()
        self.next_step = position.step
        self._epoch, self._index, self._start = position.epoch, position.index, position.start
        if not (further and self.isolated):
            self._rng, self._generators = position.rng, position.generators
        if position.start is None:
            self._pass = None
            if not self.isolated:
                self._order.restore(position.generators)
            return
        with preserved(), self._own_random_state():
            if not further:
                self._begin_again(position.start)
            self._skip(drawn, position.index)
        if position.index == 0 and self.isolated and self.resumable:
            self.take(position.step, position.step + 1)  # compared before it is trained on

    def _is_further(self, position: Position) -> bool:
        if self._pass is None or self._start is None or position.start is None:
            return False
        same = self._epoch == position.epoch and position.start.rng.same(self._start.rng)
        return same and self._index <= position.index

    def _begin_again(self, start: EpochStart) -> None:
        """Restarts the epoch that began in `start`, before its first batch."""
        self._expected = start.first
        start.rng.restore()
        self._order.restore(start.generators)
        for name, state in start.states.items():
            if name not in self._stateful:
                raise InputError(
                    f"{self.name} has no load_state_dict of its {name}, and the run that is "
                    "resumed had; give it the same loader"
                )
            self._stateful[name].load_state_dict(copy.deepcopy(state))
        self._begin_pass()

    def _skip(self, drawn: int, index: int) -> None:
        """Draws and drops an epoch's batches from `drawn` up to `index`."""
        again = bool(self._start and self._start.states)
        while drawn < index:
            assert self._pass is not None
            try:
                batch = next(self._pass)
            except StopIteration:
                if drawn == 0 and again:  # a state between epochs may be the end of the first
                    again = False
                    self._begin_pass()
                    continue
                self._pass = None
                raise InputError(
                    f"{self.name} ended after {drawn} batches, but the run that is resumed was "
                    f"at batch {index} of its epoch; give it the same data"
                ) from None
            if drawn == 0:
                self._compare(sample(batch))
            drawn += 1

    def _compare(self, first: tuple[Tensor, ...]) -> None:
        """Notes in `differs` if the first batch of a repeated epoch is another."""
        if self._expected and not alike(self._expected, first):
            self.differs = f"the first batch of epoch {self._epoch} of {self.name} is another"
        self._expected = ()

    # Drawing -------------------------------------------------------------------------------------

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        if not self.isolated:
            yield
            return
        # Two loaders may share a generator: each stream continues from its own state of it.
        with preserved(), loader_preserved(self.loader):
            self._rng.restore()
            self._order.restore(self._generators)
            yield
            self._rng, self._generators = RandomState.capture(), self._order.states()

    def _draw_until(self, stop: int, *, again: bool) -> None:
        """Keeps the batches up to step `stop`. again: whether they may be used several times."""
        if self.next_step >= stop:
            return
        with self._own_random_state():
            while self.next_step < stop:
                batch = self._draw(again)
                # A step's position is that of its first batch; others may be of the next epoch.
                place = self._epoch, self._index - 1, self._start
                if self.accumulate > 1:
                    others = [self._draw(again) for _ in range(self.accumulate - 1)]
                    batch = MicroBatches((batch, *others))
                self._kept[self.next_step] = (batch, *place)
                self.next_step += 1

    def _one_by_one(self) -> Iterator[Any]:
        for _ in range(self.accumulate):
            yield self._draw()
        self.next_step += 1

    def _draw(self, again: bool = False) -> Any:
        """The loader's next batch; a copy if it may be used `again`."""
        end = object()
        batch = end if self._pass is None else next(self._pass, end)
        if batch is end:
            self._epoch, self._index = self._epoch + 1, 0
            states = {name: copy.deepcopy(p.state_dict()) for name, p in self._stateful.items()}
            self._start = EpochStart(RandomState.capture(), self._order.states(), states)
            batch = next(self._begin_pass(), end)
        if batch is end:
            raise InputError(
                f"{self.name} yields no batches; check the dataset's length, batch_size and "
                "drop_last"
                + (", and that it can be iterated more than once" if self.next_step else "")
            )
        if self.resumable and self._index == 0:
            assert self._start is not None
            # Before the loss, which may change it in place.
            self._start = replace(self._start, first=sample(batch))
            self._compare(self._start.first)
        self._index += 1
        if again:
            return Kept(copied(to_device(batch, self.device, wait=True), self.name))
        return to_device(batch, self.device)

    def _begin_pass(self) -> Pass:
        self._pass = None  # nor is the last one in the way of this
        if isinstance(self.loader, RankLoader):
            self.loader.begin_epoch(self._epoch)
        self._pass = Pass(self.loader, self.name)
        return self._pass

"""Batches addressed by step: a loader whose place can be found again.

The loop looks ahead K batches, trains on them twice, and must continue in the middle of an epoch
after a crash. So batches are kept until they are released, and the place of each one is known as
(epoch, index), together with the random state in which its epoch began: iterating again from that
state and skipping `index` batches yields the same batches.

A batch that is kept is a copy (`Kept`), since its loader may fill the same memory with the next
one, and every use has another, since a loss may change what it is given. A copy takes 8 µs of a
batch of 64 x 784 floats, beside a step of 420 µs of a small network, and 1.4 ms of 32 x 3 x 224².
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rhc.containers import Kept, copied, rows_of, to_device
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
    """What decides an epoch's order: the random state, the loader's own generators, and the state
    of whatever has a `state_dict`, by name.

    first: a sample of the epoch's first batch, by which other data are known.
    """

    rng: RandomState
    generators: tuple[Tensor, ...]
    states: Mapping[str, Any] = field(default_factory=dict)
    first: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Position:
    """Where the next batch is: `index` batches into epoch `epoch`, which began in `start`.

    start is None before the first batch was drawn: then rng and generators are what the first epoch
    begins in.
    """

    step: int
    epoch: int
    index: int
    start: EpochStart | None
    rng: RandomState
    generators: tuple[Tensor, ...]

    def to_tensors(self) -> dict[str, Tensor]:
        """The position as named tensors, for safetensors."""
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
    """The micro-batches of one step, each drawn when it is asked for; they can be taken once.

    A plain loop that accumulates draws a batch, takes its gradient, and only then draws the next:
    where a loader and dropout share the global random state, the order matters to the bit.
    """

    def __init__(self, count: int, batches: Iterator[Any]) -> None:
        self.count = count
        self.batches = batches

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return self.batches


def batch_size(batch: Any) -> int:
    """The examples in a batch: `rhc.containers.rows_of`.

    Of `MicroBatches`, the sum over all of them; of a `Shard`, the size of the whole batch.
    """
    if isinstance(batch, MicroBatches):
        return sum(batch_size(micro) for micro in batch)
    if isinstance(batch, Kept):
        return batch_size(batch.batch)
    return batch.size if isinstance(batch, Shard) else rows_of(batch)


class StepBatches:
    """The batches of a loader by step number, from 0, over as many epochs as it takes.

    loader: anything that can be iterated again and again. isolated: draw in a random stream of its
    own, so that looking ahead disturbs nothing; otherwise batches are drawn from the global random
    state exactly when they are taken, as a plain loop does. device: where tensors are moved to.
    accumulate n: step t has the loader's batches [n t, n (t + 1)), as `MicroBatches` where n > 1.
    resumable: positions will be gone back to, maybe by another process: they keep the state of
    loaders, samplers and datasets that have a `state_dict`, but for those in `besides`, and a
    sample of the data. differs: once such data came back as others.
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
        # Without isolation it is iterated as by a plain loop, workers that persist included.
        self.loader: Any = apart(loader) if isolated else loader
        self.isolated, self.resumable, self.accumulate = isolated, resumable, accumulate
        self.device, self.name = device, name
        self.next_step = 0
        """The step whose batch will be drawn next."""
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
        """The batches of steps [start, stop), `Kept`; none of them may have been released."""
        self._draw_until(stop, again=True)
        return [self._kept[step][0] for step in range(start, stop)]

    def lazily(self, start: int, stop: int) -> Iterator[Any]:
        """The loader's own batches, each drawn when it is asked for and forgotten afterwards.

        Not isolated, micro-batches too are drawn one by one: `DrawnAsNeeded`.
        """
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
        """Forgets the batches of steps before `before`."""
        for step in [s for s in self._kept if s < before]:
            del self._kept[step]

    def close(self) -> None:
        """Lets go of the iterator and, by that, of a DataLoader's worker processes."""
        self._pass = None
        if self.isolated:
            self.loader = apart(self.loader)  # without the workers that persist in this one

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) that a kept batch belongs to."""
        return self._kept[step][1]

    def position(self, step: int) -> Position:
        """The place of step `step`, which is kept or the next to be drawn."""
        own = self._generators if self.isolated else self._order.states()
        epoch, index, start = self._epoch, self._index, self._start
        if step in self._kept:
            _, epoch, index, start = self._kept[step]
        return Position(step, epoch, index, start, self._rng, own)

    def seek(self, position: Position) -> None:
        """Continues at `position`, which was taken from a loader like this one.

        Batches before it in its epoch are drawn and dropped. The global random state is left alone.
        """
        generators, counters = len(self._order.generators), len(self._order.counters)
        # Checkpoints of before have no counters.
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
        """Whether the pass that lasts comes to `position` without beginning anew."""
        if self._pass is None or self._start is None or position.start is None:
            return False
        same = self._epoch == position.epoch and position.start.rng.same(self._start.rng)
        return same and self._index <= position.index

    def _begin_again(self, start: EpochStart) -> None:
        """The epoch that began in `start`, before its first batch."""
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
        """Draws an epoch's batches from number `drawn` on and drops them, up to number `index`."""
        again = bool(self._start and self._start.states)
        while drawn < index:
            assert self._pass is not None
            try:
                batch = next(self._pass)
            except StopIteration:
                if drawn == 0 and again:  # a state between two epochs may be the end of the first
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
        """Notes in `differs` where the first batch of an epoch that is gone back to is another."""
        if self._expected and not alike(self._expected, first):
            self.differs = f"the first batch of epoch {self._epoch} of {self.name} is another"
        self._expected = ()

    # Drawing -------------------------------------------------------------------------------------

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Inside, an isolated stream goes on from its own random state."""
        if not self.isolated:
            yield
            return
        # Two loaders may share a generator: each stream goes on from its own state of it.
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
                # A step's place is that of its first batch; the others may be of the next epoch.
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
        """The loader's next batch; a copy of it, where it may be used `again`."""
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
            # Before the loss has it, which may change it in place.
            self._start = replace(self._start, first=sample(batch))
            self._compare(self._start.first)
        self._index += 1
        if again:
            return Kept(copied(to_device(batch, self.device, wait=True), self.name))
        return to_device(batch, self.device)

    def _begin_pass(self) -> Pass:
        """A pass over the loader, as epoch `_epoch`."""
        self._pass = None  # nor is the last one in the way of this
        if isinstance(self.loader, RankLoader):
            self.loader.begin_epoch(self._epoch)
        self._pass = Pass(self.loader, self.name)
        return self._pass

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
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from rhc.containers import Kept, copied, rows_of, to_device
from rhc.distributed import RankLoader, Shard
from rhc.errors import InputError
from rhc.rng import RandomState, preserved, seed_everything
from rhc.storage.trees import joined, parted, spelled, unspelled


@dataclass(frozen=True)
class _EpochStart:
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

    start is None before the first batch was drawn. rng, generators: the stream's own random state
    and that of the loader's generators, before the first batch of all.
    """

    step: int
    epoch: int
    index: int
    start: _EpochStart | None
    rng: RandomState
    generators: tuple[Tensor, ...]

    def to_tensors(self) -> dict[str, Tensor]:
        """The position as named tensors, for safetensors."""
        tensors = {"place": torch.tensor([self.step, self.epoch, self.index])}
        tensors |= {f"rng.{k}": v for k, v in self.rng.to_tensors().items()}
        tensors |= {f"own.{i}": g for i, g in enumerate(self.generators)}
        if self.start is not None:
            tensors |= {f"start.{k}": v for k, v in self.start.rng.to_tensors().items()}
            tensors |= {f"generator.{i}": g for i, g in enumerate(self.start.generators)}
            tensors |= {f"first.{i}": _numbers(t) for i, t in enumerate(self.start.first)}
        if self.start is not None and self.start.states:
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

        def states(prefix: str) -> tuple[Tensor, ...]:
            found = part(prefix)
            return tuple(found[str(i)] for i in range(len(found)))

        step, epoch, index = tensors["place"].tolist()
        start = None
        if part("start."):
            known = {}
            if "states" in tensors:
                text = bytes(tensors["states"].tolist()).decode()
                known = joined(unspelled(json.loads(text)), tensors)
            rng = RandomState.from_tensors(part("start."))
            start = _EpochStart(rng, states("generator."), known, states("first."))
        rng = RandomState.from_tensors(part("rng."))
        return cls(step, epoch, index, start, rng, states("own."))


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
        self.loader = apart(loader) if isolated else loader
        self._order = _Order(self.loader)
        self.resumable = resumable
        self._parts = _with_state(loader, besides) if resumable else {}
        self.differs: str | None = None
        self._expected: tuple[Tensor, ...] = ()
        self._unsampled = SPACED
        self.accumulate = accumulate
        self.isolated = isolated
        self.device = device
        self.name = name
        self._iterator: Iterator[Any] | None = None
        self.found: list[Any] = []
        """What the loader held when the pass was begun, of a class that is not torch's."""
        self._kept: dict[int, tuple[Any, int, int, _EpochStart]] = {}
        self._next = 0
        self._epoch = -1
        self._index = 0
        self._start: _EpochStart | None = None
        with preserved():
            if seed is not None:
                seed_everything(seed)
            self._rng, self._generators = RandomState.capture(), self._order.states()
        _STREAMS.add(self)

    def take(self, start: int, stop: int) -> list[Any]:
        """The batches of steps [start, stop), `Kept`; none of them may have been released."""
        return self._take(start, stop, again=True)

    def _take(self, start: int, stop: int, *, again: bool) -> list[Any]:
        """again: whether they may be used several times."""
        if self._next < stop:
            if self.isolated:
                # Two loaders may share a generator: each stream goes on from its own state of it.
                with preserved(), loader_preserved(self.loader):
                    self._rng.restore()
                    self._order.restore(self._generators)
                    self._draw_until(stop, again)
                    self._rng, self._generators = RandomState.capture(), self._order.states()
            else:
                self._draw_until(stop, again)
        return [self._kept[step][0] for step in range(start, stop)]

    def lazily(self, start: int, stop: int) -> Iterator[Any]:
        """The loader's own batches, each drawn when it is asked for and forgotten afterwards.

        Not isolated, micro-batches too are drawn one by one: `DrawnAsNeeded`.
        """
        for step in range(start, stop):
            if self.isolated or self._next != step:
                yield self._take(step, step + 1, again=False)[0]
                self.release(step + 1)
            elif self.accumulate > 1:
                yield DrawnAsNeeded(self.accumulate, self._one_by_one())
            else:
                batch = self._draw()
                self._index += 1
                self._next += 1
                yield batch

    def close(self) -> None:
        """Lets go of the iterator and, by that, of a DataLoader's worker processes."""
        self._iterator = None
        if self.isolated:
            self.loader = apart(self.loader)  # without the workers that persist in this one

    def release(self, before: int) -> None:
        """Forgets the batches of steps before `before`."""
        for step in [s for s in self._kept if s < before]:
            del self._kept[step]

    @property
    def next_step(self) -> int:
        """The step whose batch will be drawn next."""
        return self._next

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) that a kept batch belongs to."""
        return self._kept[step][1]

    def position(self, step: int) -> Position:
        """The place of step `step`, which is kept or the next to be drawn."""
        own = self._generators if self.isolated else self._order.states()
        if step in self._kept:
            _, epoch, index, start = self._kept[step]
            return Position(step, epoch, index, start, self._rng, own)
        return Position(step, self._epoch, self._index, self._start, self._rng, own)

    def seek(self, position: Position) -> None:
        """Continues at `position`, which was taken from a loader like this one.

        Batches before it in its epoch are drawn and dropped. The global random state is left alone.
        """
        known, drawn = self._start, self._index
        further = (
            self._iterator is not None
            and known is not None
            and position.start is not None
            and (self._epoch, position.start.rng.same(known.rng)) == (position.epoch, True)
            and drawn <= position.index
        )
        here = self._rng, self._generators
        self._kept.clear()
        self._next = position.step
        self._epoch, self._index, self._start = position.epoch, position.index, position.start
        self._rng, self._generators = position.rng, position.generators
        generators, counters = len(self._order.generators), len(self._order.counters)
        # Checkpoints of before have no counters.
        if len(position.generators) not in (generators, generators + counters):
            raise InputError(
                f"{self.name} has {generators} generators of its own, the run "
                f"that is resumed had {len(position.generators)}; give it the same loader"
            )
        if position.start is None:
            self._iterator = None
            if not self.isolated:
                self._order.restore(position.generators)
            return
        with preserved(), loader_preserved(self.loader) if self.isolated else nullcontext():
            if further and self.isolated:
                here[0].restore()
                self._order.restore(here[1])
            elif not further:
                drawn = 0
                self._begin_again(position.start)
            self._skip(drawn, position.index)
            if self.isolated:
                self._rng, self._generators = RandomState.capture(), self._order.states()
        if position.index == 0 and self.isolated and self.resumable:
            self.take(position.step, position.step + 1)  # compared before it is trained on

    def _begin_again(self, start: _EpochStart) -> None:
        """The epoch that began in `start`, before its first batch."""
        self._expected = start.first
        start.rng.restore()
        self._order.restore(start.generators)
        for name, state in start.states.items():
            if name not in self._parts:
                raise InputError(
                    f"{self.name} has no load_state_dict of its {name}, and the run that is "
                    "resumed had; give it the same loader"
                )
            self._parts[name].load_state_dict(copy.deepcopy(state))
        _begin_epoch(self.loader, self._epoch)
        self._iterator = begun(self.loader, self)

    def _skip(self, drawn: int, index: int) -> None:
        """Draws an epoch's batches from number `drawn` on and drops them, up to number `index`."""
        again = bool(self._start and self._start.states)
        while drawn < index:
            assert self._iterator is not None
            try:
                batch = next(self._iterator)
            except StopIteration:
                if drawn == 0 and again:  # a state between two epochs may be the end of the first
                    again, self._iterator = False, begun(self.loader, self)
                    continue
                self._iterator = None
                raise InputError(
                    f"{self.name} ended after {drawn} batches, but the run that is resumed was "
                    f"at batch {index} of its epoch; give it the same data"
                ) from None
            if drawn == 0:
                self._compare(_sample(batch))
            drawn += 1

    def _compare(self, first: tuple[Tensor, ...]) -> None:
        """Notes in `differs` where the first batch of an epoch that is gone back to is another."""
        expected, self._expected = self._expected, ()
        found = [_numbers(t) for t in first]
        if expected and not (len(expected) == len(found) and all(map(_alike, expected, found))):
            self.differs = f"the first batch of epoch {self._epoch} of {self.name} is another"

    def _draw_until(self, stop: int, again: bool) -> None:
        while self._next < stop:
            batch = self._draw(again)
            assert self._start is not None
            # The place of a step is that of its first batch; the others may lie in the next epoch.
            place = (self._epoch, self._index, self._start)
            self._index += 1
            if self.accumulate > 1:
                batch = MicroBatches((batch, *self._more(self.accumulate - 1, again)))
            self._kept[self._next] = (batch, *place)
            self._next += 1

    def _more(self, count: int, again: bool = False) -> Iterator[Any]:
        for _ in range(count):
            batch = self._draw(again)
            self._index += 1
            yield batch

    def _one_by_one(self) -> Iterator[Any]:
        yield from self._more(self.accumulate)
        self._next += 1

    def _draw(self, again: bool = False) -> Any:
        """The loader's next batch; a copy of it, where it may be used `again`."""
        for fresh in (False, True):
            if fresh or self._iterator is None:
                self._start = _EpochStart(
                    RandomState.capture(), self._order.states(), self._state_dicts()
                )
                _begin_epoch(self.loader, self._epoch + 1)
                self._iterator = begun(self.loader, self)
                self._epoch += 1
                self._index = 0
            try:
                batch = next(self._iterator)
            except StopIteration:
                continue
            self._unsampled += 1
            due = self._unsampled > SPACED or self._expected
            if self.resumable and self._index == 0 and due:
                self._unsampled = 0
                assert self._start is not None
                # Before the loss has it, which may change it in place.
                self._start = replace(self._start, first=_sample(batch))
                self._compare(self._start.first)
            if again:
                return Kept(copied(to_device(batch, self.device, wait=True), self.name))
            return to_device(batch, self.device)
        raise InputError(
            f"{self.name} yields no batches; check the dataset's length, batch_size and drop_last"
            + (", and that it can be iterated more than once" if self._next else "")
        )

    def _state_dicts(self) -> dict[str, Any]:
        return {name: copy.deepcopy(part.state_dict()) for name, part in self._parts.items()}


def _with_state(loader: Any, besides: Iterable[Any] = ()) -> dict[str, Any]:
    """Name -> what has `state_dict` and `load_state_dict`: the loader, or parts of a DataLoader.

    A StatefulDataLoader is taken for its parts, of which its state consists: iterating it begins an
    epoch anew like any DataLoader, and what its workers draw at random is in no state of it.
    """
    found: dict[str, Any] = {}
    seen = {id(part) for part in besides}

    def look(name: str, part: Any) -> None:
        if part is None or id(part) in seen:
            return
        seen.add(id(part))
        if _has_state(part) and not _is_stateful_dataloader(part):
            found[name] = part
            return
        below = "" if name == "loader" else f"{name}."
        for attribute in ("batch_sampler", "sampler", "dataset"):
            look(f"{below}{attribute}", getattr(part, attribute, None))
        several = getattr(part, "datasets", None)
        for i, inner in enumerate(several if isinstance(several, (list, tuple)) else ()):
            look(f"{below}datasets.{i}", inner)

    look("loader", loader.loader if isinstance(loader, RankLoader) else loader)
    return found


def _has_state(part: Any) -> bool:
    functions = [getattr(part, name, None) for name in ("state_dict", "load_state_dict")]
    if not all(map(callable, functions)):
        return False
    try:
        inspect.signature(functions[0]).bind()  # type: ignore[arg-type]
        functions[0]()  # type: ignore[misc]
    except (TypeError, ValueError):  # another protocol of that name
        return False
    except (AttributeError, NotImplementedError):  # accelerate's loaders have one only at times
        return False
    return True


def _is_stateful_dataloader(part: Any) -> bool:
    return any(
        kind.__module__.startswith("torchdata.stateful_dataloader") for kind in type(part).__mro__
    )


@contextmanager
def pristine(loader: Any) -> Iterator[None]:
    """Whatever of a loader has a state has it as before, when batches were drawn for a trial."""
    states = [(part, copy.deepcopy(part.state_dict())) for part in _with_state(loader).values()]
    try:
        yield
    finally:
        for part, state in states:
            part.load_state_dict(state)


SAMPLED = 64
"""Elements of each tensor of a batch by which it is known: a copy takes 3 µs, a checksum of all of
a batch of images a millisecond."""


SPACED = 3
"""Batches at least between two that are known so: of epochs of one batch not every step pays."""


def _sample(batch: Any) -> tuple[Tensor, ...]:
    """Some elements of everything in a batch that a tensor can be made of.

    None of a rank's rows, which are others with another number of ranks.
    """
    leaves = [] if isinstance(batch, Shard) else tree_leaves(batch)
    found = []
    for leaf in leaves:
        if hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor):
            found += [v for v in vars(leaf).values() if isinstance(v, Tensor)]
        elif isinstance(leaf, str):
            found.append(torch.tensor(list(leaf.encode()[:SAMPLED]), dtype=torch.uint8))
        else:
            found.append(leaf)
    return tuple(t for leaf in found if (t := _elements(leaf)) is not None)


def _elements(leaf: Any) -> Tensor | None:
    if not isinstance(leaf, Tensor):
        try:
            leaf = torch.as_tensor(leaf)
        except (TypeError, ValueError, RuntimeError):
            return None
    if leaf.layout != torch.strided or leaf.is_quantized:
        return None
    flat = leaf.detach().reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLED)][: SAMPLED + 1].clone()


def _numbers(sample: Tensor) -> Tensor:
    """A sample on the CPU, in a type that safetensors has and that can be compared."""
    if sample.is_complex():
        sample = torch.view_as_real(sample)
    return sample.cpu().to(torch.float64 if sample.is_floating_point() else torch.int64)


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether they are the same, but for what other hardware rounds otherwise."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(
        a, b, rtol=1e-3, atol=1e-4 * float(a.abs().nan_to_num().mean()), equal_nan=True
    )


def _begin_epoch(loader: Any, epoch: int) -> None:
    """Tells a `RankLoader` which epoch comes."""
    begin = getattr(loader, "begin_epoch", None)
    if begin is not None:
        begin(epoch)


def batch_size(batch: Any) -> int:
    """The examples in a batch: `rhc.containers.rows_of`.

    Of `MicroBatches`, the sum over all of them; of a `Shard`, the size of the whole batch.
    """
    if isinstance(batch, MicroBatches):
        return sum(batch_size(micro) for micro in batch)
    if isinstance(batch, Kept):
        return batch_size(batch.batch)
    return batch.size if isinstance(batch, Shard) else rows_of(batch)


_STREAMS: WeakSet[StepBatches] = WeakSet()


def begun(loader: Iterable[Any], by: StepBatches | None = None) -> Iterator[Any]:
    """A new pass over a loader; by: the stream that it is for.

    Raises InputError where a stream would lose its place by it: iterated twice, an object that is
    its own iterator has one place.
    """
    others = [s for s in _STREAMS if s is not by and s._iterator is not None]
    held = _held(loader)
    moved = [s for s in others if s.loader is loader and s.found != held]
    if any(s.loader is loader for s in others):
        loader = apart(loader)
    iterator = iter(loader)
    place = _place(loader, iterator)
    for other in others:
        if other in moved or _place(other.loader, other._iterator) is place:
            raise InputError(
                f"{other.name} is iterated a second time before a pass over it has ended, and its "
                f"{type(place).__name__ if other not in moved else type(loader).__name__} keeps "
                "its place in itself: let each __iter__ return an iterator with a place of its "
                "own, or give train_loader and val_loader objects of their own, and leave "
                "validate_every out"
            )
    if by is not None:
        by.found = held
    return iterator


def _held(loader: Any) -> list[Any]:
    """What an object of one's own holds, for comparison; a pass that changes it has no other beside
    it. Of torch's loaders nothing, whose passes know their place."""
    if isinstance(loader, (DataLoader, RankLoader)):
        return []
    held: list[Any] = []
    for name, value in getattr(loader, "__dict__", {}).items():
        held.append((name, id(value), getattr(value, "_version", None)))
        if isinstance(value, list):
            held += map(id, value)
        elif isinstance(value, np.ndarray) and value.ndim == 1:
            held.append(hash(value.tobytes()))
    return held


def _place(loader: Any, iterator: Any) -> Any:
    """What knows how far a pass has come: the iterator, or a dataset that is its own."""
    dataset = getattr(loader, "dataset", None)
    own = hasattr(dataset, "__next__") and not getattr(loader, "num_workers", 0)
    return dataset if own else iterator


def apart(loader: Any) -> Any:
    """The loader with workers of its own, where a DataLoader in it has some that persist.

    These have one place for all that iterate it. Datasets and samplers are the same objects.
    """
    inside = getattr(loader, "__dict__", {})
    within = {k: v for k, v in inside.items() if isinstance(v, (DataLoader, RankLoader))}
    changed = {k: own for k, v in within.items() if (own := apart(v)) is not v}
    if isinstance(loader, DataLoader) and inside.get("persistent_workers"):
        changed["_iterator"] = None
    if not changed:
        return loader
    own = object.__new__(type(loader))  # accelerate's loaders cannot be copied by `copy`
    own.__dict__.update(inside, **changed)
    return own


@contextmanager
def loader_preserved(loader: Any) -> Iterator[None]:
    """Iterating inside leaves the loader's private generators and counters as they were found."""
    order = _Order(loader)
    states = order.states()
    try:
        yield
    finally:
        order.restore(states)


class _Order:
    """What decides a loader's order beside the global random state: private generators, and the
    counters of what has a `set_epoch`. Both as they are now: accelerate's sampler makes a generator
    when it is first iterated, and seeds it anew by its counter."""

    def __init__(self, loader: Any) -> None:
        self.generators = _generators(loader)
        self.counters = [
            (holder, name)
            for holder in {id(h): h for h in _holders(loader)}.values()
            if callable(getattr(holder, "set_epoch", None))
            for name in ("epoch", "iteration")
            if isinstance(getattr(holder, "__dict__", {}).get(name), int)
        ]

    def states(self) -> tuple[Tensor, ...]:
        """All of them, generators first."""
        counted = [torch.tensor(getattr(holder, name)) for holder, name in self.counters]
        return (*(g.get_state() for g in self.generators), *counted)

    def restore(self, states: tuple[Tensor, ...]) -> None:
        """Puts back what `states` gave; counters stay where there are none."""
        for generator, state in zip(self.generators, states, strict=False):
            generator.set_state(state)
        counted = states[len(self.generators) :]
        for (holder, name), count in zip(self.counters, counted, strict=False):
            setattr(holder, name, int(count))


def _generators(loader: Any) -> list[torch.Generator]:
    """The private generators that decide a DataLoader's order, each once."""
    found: dict[int, torch.Generator] = {}
    for holder in _holders(loader):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
    return list(found.values())


def _holders(loader: Any) -> list[Any]:
    """A loader and its samplers."""
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    return [
        loader,
        sampler,
        getattr(sampler, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
    ]

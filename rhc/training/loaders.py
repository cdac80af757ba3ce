"""What identifies a loader's state: its order, its position in a pass, samples of its data."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from rhc.distributed import RankLoader, Shard
from rhc.errors import InputError

# Order -------------------------------------------------------------------------------------------


class LoaderOrder:
    """A loader's order besides the global random state: private generators, and counters of
    `set_epoch`, by which accelerate's samplers seed theirs."""

    def __init__(self, loader: Any) -> None:
        sampler = getattr(loader, "sampler", None)
        batch_sampler = getattr(loader, "batch_sampler", None)
        inner = [getattr(part, "sampler", None) for part in (sampler, batch_sampler)]
        holders = (loader, sampler, inner[0], batch_sampler, inner[1])
        holder: Any
        for holder in holders:  # accelerate's make theirs at the first pass, from this seed
            if hasattr(holder, "initial_seed") and getattr(holder, "generator", 0) is None:
                holder.generator = torch.Generator().manual_seed(holder.initial_seed)
        generators = [getattr(holder, "generator", None) for holder in holders]
        self.generators = list({g: g for g in generators if isinstance(g, torch.Generator)})
        self.counters = [
            (holder, name)
            for holder in {id(h): h for h in holders}.values()
            if callable(getattr(holder, "set_epoch", None))
            for name in ("epoch", "iteration")
            if isinstance(getattr(holder, "__dict__", {}).get(name), int)
        ]

    def states(self) -> tuple[Tensor, ...]:
        counted = [torch.tensor(getattr(holder, name)) for holder, name in self.counters]
        return (*(g.get_state() for g in self.generators), *counted)

    def restore(self, states: tuple[Tensor, ...]) -> None:
        """Restores `states`; counters are missing in old runs and then stay."""
        for generator, state in zip(self.generators, states, strict=False):
            generator.set_state(state)
        counted = states[len(self.generators) :]
        for (holder, name), count in zip(self.counters, counted, strict=False):
            setattr(holder, name, int(count))


@contextmanager
def loader_preserved(loader: Any) -> Iterator[None]:
    """Iterating inside leaves the loader's private generators and counters unchanged."""
    order = LoaderOrder(loader)
    states = order.states()
    try:
        yield
    finally:
        order.restore(states)


def stateful_parts(loader: Any, besides: Iterable[Any] = ()) -> dict[str, Any]:
    """Name -> part of a loader with a `state_dict`. A StatefulDataLoader counts as its parts, as
    its own state omits what its workers draw at random."""
    found: dict[str, Any] = {}
    seen = {id(None), *map(id, besides)}

    def look(part: Any, name: str, prefix: str) -> None:
        if id(part) in seen:
            return
        seen.add(id(part))
        if _has_state(part):
            found[name] = part
            return
        for attribute in ("batch_sampler", "sampler", "dataset"):
            below = prefix + attribute
            look(getattr(part, attribute, None), below, f"{below}.")
        several = getattr(part, "datasets", None)
        for i, inner in enumerate(several if isinstance(several, (list, tuple)) else ()):
            look(inner, f"{prefix}datasets.{i}", f"{prefix}datasets.{i}.")

    look(loader.loader if isinstance(loader, RankLoader) else loader, "loader", "")
    return found


def _has_state(part: Any) -> bool:
    functions = [getattr(part, name, None) for name in ("state_dict", "load_state_dict")]
    modules = [kind.__module__ for kind in type(part).__mro__]
    if not all(map(callable, functions)) or any("stateful_dataloader" in m for m in modules):
        return False
    try:
        inspect.signature(part.state_dict).bind()
        part.state_dict()
    except (TypeError, ValueError):  # another protocol of the same name
        return False
    except (AttributeError, NotImplementedError):  # accelerate's loaders have one only sometimes
        return False
    return True


@contextmanager
def pristine(loader: Any) -> Iterator[None]:
    """Restores the state of a loader's stateful parts, after batches were drawn for a trial."""
    states = [(part, copy.deepcopy(part.state_dict())) for part in stateful_parts(loader).values()]
    try:
        yield
    finally:
        for part, state in states:
            part.load_state_dict(state)


# Passes ------------------------------------------------------------------------------------------


class Pass:
    """A pass over a loader that others may iterate meanwhile."""

    lasting: ClassVar[WeakSet[Pass]] = WeakSet()

    def __init__(self, loader: Any, name: str) -> None:
        self.loader, self.name = loader, name
        self.held = _held(loader)
        self.iterator = begun(loader)
        Pass.lasting.add(self)

    def __next__(self) -> Any:
        return next(self.iterator)


def begun(loader: Any) -> Iterator[Any]:
    """A new iterator of a loader; InputError where a current pass would lose its position."""
    # By name, since an error's frames would keep a pass alive.
    moved = [p.name for p in Pass.lasting if p.loader is loader and p.held != _held(loader)]
    own = apart(loader) if any(p.loader is loader for p in Pass.lasting) else loader
    iterator = iter(own)
    place = _place(own, iterator)
    lost = moved or [p.name for p in Pass.lasting if _place(p.loader, p.iterator) is place]
    if lost:
        raise InputError(
            f"{lost[0]} is iterated a second time before a pass over it has ended, and its "
            f"{type(loader if moved else place).__name__} keeps its place in itself: let each "
            "__iter__ return an iterator with a place of its own, or give train_loader and "
            "val_loader objects of their own, and leave validate_every out"
        )
    return iterator


def _held(loader: Any) -> list[Any]:
    """The content of a user's object, to detect passes that change it; none of torch's loaders."""
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
    """What holds a pass's position: the iterator, or a dataset that is its own iterator."""
    dataset = getattr(loader, "dataset", None)
    own = hasattr(dataset, "__next__") and not getattr(loader, "num_workers", 0)
    return dataset if own else iterator


def apart(loader: Any) -> Any:
    """The loader with workers of its own; persistent ones have one position for all iterators."""
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


# Data --------------------------------------------------------------------------------------------

SAMPLED = 64
"""Elements sampled per tensor of a batch: copying takes 3 µs, a checksum of all images 1 ms."""


def sample(batch: Any) -> tuple[Tensor, ...]:
    """Some elements of all tensors in a batch; none of a rank's rows, which depend on the ranks."""
    leaves = [] if isinstance(batch, Shard) else tree_leaves(batch)
    found: list[Any] = []
    for leaf in leaves:
        if hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor):
            found += [v for v in vars(leaf).values() if isinstance(v, Tensor)]
        elif isinstance(leaf, str):
            found.append(torch.tensor(list(leaf.encode()[:SAMPLED]), dtype=torch.uint8))
        else:
            found.append(leaf)
    return tuple(t for leaf in found if (t := _elements(leaf)) is not None)


def _elements(leaf: Any) -> Tensor | None:
    try:
        t = torch.as_tensor(leaf).detach()
    except (TypeError, ValueError, RuntimeError):
        return None
    if t.layout != torch.strided or t.is_quantized:
        return None
    flat = t.reshape(-1)
    few = flat[:: max(1, len(flat) // SAMPLED)][: SAMPLED + 1]
    few = torch.view_as_real(few) if few.is_complex() else few
    return few.cpu().to(torch.float64 if few.is_floating_point() else torch.int64, copy=True)


def alike(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    """Whether two samples are equal up to the rounding of other hardware."""
    return len(first) == len(second) and all(map(_close, first, second))


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    least = 1e-4 * float(a.abs().nan_to_num().mean())
    return torch.allclose(a, b, rtol=1e-3, atol=least, equal_nan=True)

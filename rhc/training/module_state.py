"""Buffers, and attributes of modules that change: found, copied and restored."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rhc.containers import same

Values = Mapping[str, Tensor | None]
"""Name -> buffer; None where one is registered without a value."""


class Buffers:
    """The buffers of a model, which may appear, be None, grow, be replaced or be read-only views.
    moved: further tensors to treat like buffers."""

    def __init__(self, model: nn.Module, moved: Mapping[str, Tensor] | None = None) -> None:
        self.moved = dict(moved or {})
        self._places = [
            (f"{prefix}." if prefix else "", module._buffers, dict(module._buffers))
            for prefix, module in model.named_modules()
        ]

    def live(self) -> dict[str, Tensor | None]:
        """The current buffers, each tensor by the first of its names."""
        found: dict[str, Tensor | None] = {}
        seen: set[int] = set()
        for prefix, own, _ in self._places:
            for name, buffer in own.items():
                if buffer is None or id(buffer) not in seen:
                    found[prefix + name] = buffer
                    seen.add(id(buffer))
        return found | self.moved

    def copies(self) -> dict[str, Tensor | None]:
        return {n: None if b is None else b.detach().clone() for n, b in self.live().items()}

    @torch.no_grad()
    def put(self, values: Values) -> None:
        """Restores buffers, where possible in the tensors that were there first; removes others."""
        named: dict[str, dict[str, Tensor | None]] = {}
        for full, value in values.items():
            if full in self.moved:
                assert value is not None
                self.moved[full].copy_(value)
            else:
                prefix, dot, name = full.rpartition(".")
                named.setdefault(prefix + dot, {})[name] = value
        done: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # shared ones, held so that their ids are not reused
        for prefix, own, first in self._places:
            wanted = named.get(prefix, {})
            for name in {**first, **own, **wanted}:
                live = own.get(name) if first.get(name) is None else first[name]
                if live is not None and id(live) in done:
                    own[name] = done[id(live)][1]
                elif name not in wanted:
                    del own[name]
                elif (value := wanted[name]) is None:
                    own[name] = None
                elif live is None:
                    own[name] = value.clone()
                else:
                    own[name] = new = filled(live, value)
                    done[id(live)] = live, new


def filled(live: Tensor, value: Tensor) -> Tensor:
    """`live` with the content of `value`, or a copy of it where `live` cannot hold it."""
    if live.shape == value.shape and live.dtype == value.dtype and live.device == value.device:
        if not any(s == 0 and n > 1 for s, n in zip(live.stride(), live.shape, strict=True)):
            return live.copy_(value)
        if torch.equal(live, value):  # expanded: one element of memory stands for several
            return live
    return value.clone()


def _memory(t: Tensor) -> int:
    """The storage's address, or a unique number where there is none (FSDP)."""
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return id(t)


@torch.no_grad()
def overlaps(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    ends: dict[int, list[tuple[int, int, str]]] = {}
    for name, t in tensors.items():
        if t.layout == torch.strided and t.numel() and not t.is_meta:
            first, size = int(t.storage_offset()), t.element_size()
            last = first + sum(s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True))
            ends.setdefault(_memory(t), []).append((first * size, int(last + 1) * size, name))
    for own in ends.values():
        for (_, stop, name), (start, _, other) in pairwise(sorted(own)):
            if start < stop:
                return name, other
    return None


# Attributes --------------------------------------------------------------------------------------

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

_NUMBERS = (bool, int, float, complex, str, bytes, np.generic, type(None))

FEW = 64
"""Items of lists and dicts are inspected up to this many."""


class Held(NamedTuple):
    """An attribute: the object, a copy of its content, and the same of its items."""

    value: Any
    content: Any = None
    put: Callable[[Any, Any], Any] | None = None
    items: tuple[Held, ...] = ()

    def restore(self) -> None:
        if self.put is not None:
            self.put(self.value, self.content)
        for item in self.items:
            item.restore()

    def same(self, other: Held) -> bool:
        if self.value is not other.value and not (
            isinstance(self.value, _NUMBERS) and bool(self.value == other.value)
        ):
            return False
        pairs = zip(self.items, other.items, strict=False)
        return _equal(self.content, other.content) and all(a.same(b) for a, b in pairs)


Place = tuple[int, str]
"""The number of a module, and the name of its attribute."""


class Attributes:
    """Counters, generators, tensors, lists and dicts among the attributes of a model's modules."""

    def __init__(self, model: nn.Module) -> None:
        self.holders = [vars(module) for module in model.modules()]
        self._memory = {_memory(t) for t in (*model.parameters(), *model.buffers())}
        # A tensor larger than all parameters is taken for data.
        self._largest = max(2**20, sum(p.nbytes for p in model.parameters()))

    def capture(self, places: Sequence[Place] | None = None) -> Captured:
        """The current attributes at `places`; all where None."""
        found: dict[Place, Held] = {}
        for place in self.all() if places is None else places:
            index, name = place
            if name in self.holders[index] and (held := self.held(self.holders[index][name])):
                found[place] = held
        return Captured(self, found, None if places is None else tuple(places))

    def all(self) -> Iterator[Place]:
        for index, holder in enumerate(self.holders):
            for name in list(holder):
                if name not in _OF_EVERY_MODULE:
                    yield index, name

    def held(self, value: Any, deep: bool = True) -> Held | None:
        """A value with its content; None for other kinds of objects. deep: with its items."""
        if isinstance(value, _NUMBERS):
            return Held(value)
        if isinstance(value, Tensor):
            return Held(value, value.detach().clone(), _fill) if self._is_own(value) else None
        if type(value) is np.ndarray and value.nbytes <= self._largest and value.dtype != object:
            return Held(value, value.copy(), np.copyto)
        if isinstance(value, (list, deque, set, dict)):
            content: Any = dict(value) if isinstance(value, dict) else list(value)
            return Held(value, content, _refill, self._items(value) if deep else ())
        if type(value) is tuple and deep and len(value) <= FEW:
            return Held(value, items=self._items(value))
        for kind, read, put in _GENERATORS:
            if isinstance(value, kind):
                return Held(value, read(value), put)
        return None

    def _is_own(self, value: Tensor) -> bool:
        return not (
            isinstance(value, nn.Parameter)
            or value.grad_fn is not None  # made anew in every forward pass
            or value.layout != torch.strided
            or value.nbytes > self._largest
            or _memory(value) in self._memory
        )

    def _items(self, values: Any) -> tuple[Held, ...]:
        if len(values) > FEW:
            return ()
        inside: Iterable[Any] = values.values() if isinstance(values, dict) else values
        found = (self.held(v, deep=False) for v in inside if not isinstance(v, _NUMBERS))
        return tuple(held for held in found if held is not None)


class Captured(NamedTuple):
    """Captured attributes. places: that were inspected; all where None."""

    attributes: Attributes
    found: dict[Place, Held]
    places: tuple[Place, ...] | None

    def restore(self) -> None:
        """Restores them, and deletes new ones."""
        holders = self.attributes.holders
        for place in list(self.attributes.all()) if self.places is None else self.places:
            index, name = place
            if place not in self.found and self.attributes.held(holders[index].get(name)):
                holders[index].pop(name, None)
        for (index, name), held in self.found.items():
            holders[index][name] = held.value
            held.restore()

    def only(self, places: Sequence[Place]) -> Captured:
        found = {place: self.found[place] for place in places if place in self.found}
        return Captured(self.attributes, found, tuple(places))

    def moved(self, now: Captured) -> list[Place]:
        """The places of captured attributes that have changed."""
        return [
            place
            for place, held in self.found.items()
            if place not in now.found or not held.same(now.found[place])
        ] + [place for place in now.found if place not in self.found]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and same(a, b)
    if isinstance(a, (list, tuple)):
        pairs = zip(a, b, strict=False)
        return len(a) == len(b) and all(x is y or _same_number(x, y) for x, y in pairs)
    try:
        return bool(np.all(a == b))
    except (TypeError, ValueError, RuntimeError):
        return False


def _same_number(a: Any, b: Any) -> bool:
    kinds = (*_NUMBERS, tuple)
    return isinstance(a, kinds) and isinstance(b, kinds) and bool(np.all(a == b))


def _bits(generator: np.random.Generator) -> Any:
    return generator.bit_generator.state


def _set_bits(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state


_GENERATORS: tuple[tuple[type, Callable[[Any], Any], Callable[[Any, Any], Any]], ...] = (
    (torch.Generator, torch.Generator.get_state, torch.Generator.set_state),
    (random.Random, random.Random.getstate, random.Random.setstate),
    (np.random.Generator, _bits, _set_bits),
    (np.random.RandomState, np.random.RandomState.get_state, np.random.RandomState.set_state),
)
"""Random generators: (class, how to read the state, how to restore it)."""


@torch.no_grad()
def _fill(live: Tensor, content: Tensor) -> None:
    if filled(live, content) is not live:
        live.data = content.clone()


def _refill(live: Any, content: Any) -> None:
    live.clear()
    (live.extend if hasattr(live, "extend") else live.update)(content)

"""What the modules of a model hold beside parameters: buffers, and plain attributes that move.

Buffers may be None until a forward pass fills them, grow, be replaced by others, be registered in a
forward pass, or be views that cannot be written into. Attributes may be counters, generators,
lists. Both are found, copied and put back here.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Values = Mapping[str, Tensor | None]
"""Name -> buffer; None where one is registered but not there yet."""


class Buffers:
    """The buffers of a model, and what lay in their places when this was made.

    moved: further tensors, by name, that are read and put back like buffers.
    """

    def __init__(self, model: nn.Module, moved: Mapping[str, Tensor] | None = None) -> None:
        self.moved = dict(moved or {})
        self._places = [
            (f"{prefix}." if prefix else "", module._buffers, dict(module._buffers))
            for prefix, module in model.named_modules()
        ]

    def live(self) -> dict[str, Tensor | None]:
        """As they are now, each tensor by the first of its names."""
        found: dict[str, Tensor | None] = {}
        seen: set[int] = set()
        for prefix, own, _ in self._places:
            for name, buffer in own.items():
                if buffer is None:
                    found[prefix + name] = None
                elif id(buffer) not in seen:
                    seen.add(id(buffer))
                    found[prefix + name] = buffer
        return found | self.moved

    def copies(self) -> dict[str, Tensor | None]:
        """Copies of what is live."""
        return {n: None if b is None else b.detach().clone() for n, b in self.live().items()}

    @torch.no_grad()
    def put(self, values: Values) -> None:
        """Makes the buffers these, in the tensors that lay there first wherever these can be used.

        A buffer that `values` does not name is no longer registered.
        """
        done: dict[int, tuple[Tensor, Tensor]] = {}
        known: set[str] = set()
        for prefix, own, first in self._places:
            if not own and not first:
                continue
            for name in {**first, **own}:
                live = first.get(name)
                live = own.get(name) if live is None else live
                full = prefix + name
                known.add(full)
                if live is not None and id(live) in done:
                    own[name] = done[id(live)][1]
                elif full not in values:
                    del own[name]
                elif (value := values[full]) is None:
                    own[name] = None
                else:
                    own[name] = new = value.clone() if live is None else filled(live, value)
                    if live is not None:
                        done[id(live)] = live, new
        for full in values.keys() - known:
            value = values[full]
            if full in self.moved:
                assert value is not None
                self.moved[full].copy_(value)
                continue
            prefix, dot, name = full.rpartition(".")
            own = next((own for known, own, _ in self._places if known == prefix + dot), None)
            if own is not None:
                own[name] = None if value is None else value.clone()


def filled(live: Tensor, value: Tensor) -> Tensor:
    """`live` with the content of `value`, or a copy of it where that cannot be written there."""
    if live.shape == value.shape and live.dtype == value.dtype and live.device == value.device:
        if not any(s == 0 and n > 1 for s, n in zip(live.stride(), live.shape, strict=True)):
            return live.copy_(value)
        if torch.equal(live, value):  # expanded: one element of memory stands for several
            return live
    return value.clone()


def _memory(t: Tensor) -> int:
    """Where its memory begins; a number of its own where it has none to be asked for (FSDP's)."""
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return id(t)


@torch.no_grad()
def overlaps(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """The names of two tensors that share memory, if any do."""
    ends: dict[int, list[tuple[int, int, str]]] = {}
    for name, t in tensors.items():
        if t.layout != torch.strided or not t.numel() or t.is_meta:
            continue
        size = t.element_size()
        last = sum(s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True))
        first = int(t.storage_offset()) * size
        key = _memory(t)
        ends.setdefault(key, []).append((first, first + (int(last) + 1) * size, name))
    for own in ends.values():
        own.sort()
        for (_, stop, name), (start, _, other) in pairwise(own):
            if start < stop:
                return name, other
    return None


# Attributes --------------------------------------------------------------------------------------

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))

_NUMBERS = (bool, int, float, complex, str, bytes, np.generic, type(None))

FEW = 64
"""Of lists and dicts with more items than these, the items themselves are not looked into."""


class Held(NamedTuple):
    """One attribute: the object, a copy of its content, and the same of the objects in it."""

    value: Any
    content: Any
    put: Callable[[Any, Any], Any] | None
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


class Attributes:
    """Counters, generators, tensors, lists and dicts that are attributes of a model's modules.

    What else modules hold (functions, datasets, other objects) is left alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._holders = [vars(module) for module in model.modules()]
        held = [*model.parameters(), *model.buffers()]
        self._memory = {_memory(t) for t in held}
        # A tensor larger than all parameters is data.
        self._largest = max(2**20, sum(p.nbytes for p in model.parameters()))

    def capture(self, places: Sequence[Place] | None = None) -> Captured:
        """places: those to look at; all where None."""
        found: dict[Place, Held] = {}
        for place in self._all() if places is None else places:
            holder, name = self._holders[place[0]], place[1]
            held = self._held(holder[name]) if name in holder else None
            if held is not None:
                found[place] = held
        return Captured(self, found, None if places is None else tuple(places))

    def _all(self) -> Iterator[Place]:
        for index, holder in enumerate(self._holders):
            for name in list(holder):
                if name not in _OF_EVERY_MODULE:
                    yield index, name

    def put(self, found: Mapping[Place, Held], places: Iterable[Place] | None) -> None:
        """places: those that were looked at, all where None; what was not there goes."""
        for index, name in list(self._all()) if places is None else places:
            holder = self._holders[index]
            if (index, name) not in found and self._held(holder.get(name)) is not None:
                holder.pop(name, None)
        for (index, name), held in found.items():
            self._holders[index][name] = held.value
            held.restore()

    def _held(self, value: Any, deep: bool = True) -> Held | None:
        """None for objects of other kinds."""
        if isinstance(value, _NUMBERS):
            return Held(value, None, None)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, torch.Generator):
            return Held(value, value.get_state(), torch.Generator.set_state)
        if isinstance(value, random.Random):
            return Held(value, value.getstate(), random.Random.setstate)
        if isinstance(value, np.random.Generator):
            return Held(value, value.bit_generator.state, _set_bits)
        if isinstance(value, np.random.RandomState):
            return Held(value, value.get_state(), np.random.RandomState.set_state)
        if type(value) is np.ndarray and value.nbytes <= self._largest and value.dtype != object:
            return Held(value, value.copy(), np.copyto)
        if isinstance(value, (list, deque, set, dict)):
            return self._container(value, deep)
        if type(value) is tuple and deep and len(value) <= FEW:
            return Held(value, None, None, self._items(value))
        return None

    def _tensor(self, value: Tensor) -> Held | None:
        if (
            isinstance(value, nn.Parameter)
            or value.grad_fn is not None  # made anew in every forward pass
            or value.layout != torch.strided
            or value.nbytes > self._largest
            or _memory(value) in self._memory
        ):
            return None
        return Held(value, value.detach().clone(), _fill)

    def _container(self, value: Any, deep: bool) -> Held:
        put: Any = _refill_dict if isinstance(value, dict) else _refill
        items: tuple[Held, ...] = ()
        if deep and len(value) <= FEW:
            items = self._items(value.values() if isinstance(value, dict) else value)
        return Held(value, dict(value) if isinstance(value, dict) else list(value), put, items)

    def _items(self, values: Iterable[Any]) -> tuple[Held, ...]:
        found = (self._held(v, deep=False) for v in values if not isinstance(v, _NUMBERS))
        return tuple(held for held in found if held is not None)


class Captured(NamedTuple):
    """Attributes as they were."""

    attributes: Attributes
    found: dict[Place, Held]
    places: tuple[Place, ...] | None

    def restore(self) -> None:
        self.attributes.put(self.found, self.places)

    def only(self, places: Sequence[Place]) -> Captured:
        found = {place: self.found[place] for place in places if place in self.found}
        return Captured(self.attributes, found, tuple(places))

    def moved(self, now: Captured) -> list[Place]:
        """The places that have changed since, of those that were there."""
        return [
            place
            for place, held in self.found.items()
            if place not in now.found or not held.same(now.found[place])
        ] + [place for place in now.found if place not in self.found]


def _equal(a: Any, b: Any) -> bool:
    """Whether two contents are the same; two that cannot be compared are not."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
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


def _set_bits(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state


@torch.no_grad()
def _fill(live: Tensor, content: Tensor) -> None:
    if filled(live, content) is not live:
        live.data = content.clone()


def _refill(live: Any, content: Sequence[Any]) -> None:
    live.clear()
    (live.update if isinstance(live, set) else live.extend)(content)


def _refill_dict(live: dict[Any, Any], content: Mapping[Any, Any]) -> None:
    live.clear()
    live.update(content)

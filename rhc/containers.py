"""What batches are made of: moved, copied and counted, whatever containers people put them in.

The conventions are those of the loops that people come from: what has a method `.to` moves by it,
as in accelerate's `send_to_device`; mappings, sequences and named tuples are rebuilt as torch's own
`pin_memory` rebuilds them, dataclasses field by field as Lightning does. For `torch.utils._pytree`
dataclasses, PackedSequence and BatchEncoding would be leaves.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset

from rhc.errors import InputError

PLAIN = (str, bytes, int, float, bool, complex, type(None))

NO_DATA = (nn.Module, nn.Parameter, Dataset, DataLoader)
"""What a batch may refer to without owning it; it stays the same object in a copy."""


@dataclass(frozen=True, eq=False)
class Kept:
    """A batch that is used several times: every use has a copy of its own, and `batch` stays.

    A loss may pop, scale or fill what it is given, as a plain loop allows.
    """

    batch: Any

    def opened(self) -> Any:
        """The batch for one use."""
        return copied(self.batch)


def kept(batch: Any) -> Kept:
    """The batch, for several uses."""
    return batch if isinstance(batch, Kept) else Kept(batch)


def opening(loss_fn: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
    """loss_fn for batches that are `Kept`; others it gets as they are."""

    @functools.wraps(loss_fn, updated=())
    def loss(model: nn.Module, batch: Any) -> Any:
        return loss_fn(model, batch.opened() if isinstance(batch, Kept) else batch)

    return loss


# Moving -------------------------------------------------------------------------------------------


def to_device(batch: Any, device: torch.device | None, *, wait: bool = False) -> Any:
    """The batch with all that can be moved on `device`; None moves nothing.

    wait: until it is there, so that pinned memory may be filled anew at once.
    """
    if device is None:
        return batch
    move = getattr(batch, "to", None)
    if callable(move) and not isinstance(batch, type):
        try:
            return move(device, non_blocking=not wait)
        except TypeError:  # a method that takes the device alone
            return move(device)
    return mapped(lambda part: to_device(part, device, wait=wait), batch)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The same container with function(part) in the place of every part; a leaf as it is."""
    if isinstance(value, PLAIN):
        return value
    made: Any
    if isinstance(value, MutableMapping):
        made = copy.copy(value)  # a defaultdict, or with attributes of its own
        made.update({k: function(v) for k, v in value.items()})
        return made
    if isinstance(value, Mapping):
        return type(value)({k: function(v) for k, v in value.items()})  # type: ignore[call-arg]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(function(v) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(function(v) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in fields(value):
            if hasattr(value, field.name):
                # Also where it is frozen.
                object.__setattr__(made, field.name, function(getattr(value, field.name)))
        return made
    return value


# Copying ------------------------------------------------------------------------------------------


def copied(batch: Any, name: str = "batches") -> Any:
    """A batch that shares no memory with this one: what is done to either leaves the other alone.

    What occurs twice in it, or overlaps, does so in the copy. Modules, parameters and datasets are
    not its own, and stay the same objects. name: of where it comes from, for the InputError where
    it cannot be copied.

    By `copy.deepcopy` but for tensors, of which that would copy the whole storage: of a slice of a
    dataset, all of it.
    """
    parts = {id(part): part for part in _parts(batch)}  # held, so that no id is given out again
    tensors = [p for p in parts.values() if not isinstance(p, NO_DATA)]
    copies = {id(t): own for t, own in zip(tensors, _clones(tensors, name), strict=True)}
    try:
        return copy.deepcopy(batch, {**parts, **copies})
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"a {type(batch).__name__} of {name} cannot be copied ({type(error).__name__}: "
            f"{error}), and looking back uses every batch several times: yield tensors, give its "
            "class a __deepcopy__, or turn rewriting off"
        ) from error


def spare(batch: Any) -> Any:
    """A copy for a use after which the loader may yield it again; itself where it has none."""
    try:
        return copied(batch)
    except InputError:
        return batch


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a batch, or in what a module takes or gives."""
    return [part for part in _parts(value) if isinstance(part, Tensor)]


def _parts(value: Any) -> Iterator[Any]:
    """The tensors in it and what is NO_DATA, in order, each as often as it is met."""
    stack, seen = [value], set[int]()
    while stack:
        part = stack.pop()
        if isinstance(part, PLAIN):
            continue
        if isinstance(part, (Tensor, *NO_DATA)):
            yield part
            continue
        if id(part) in seen:
            continue
        seen.add(id(part))
        stack.extend(reversed(_inside(part)))


def _inside(value: Any) -> Sequence[Any]:
    """What a container or an object holds; nothing of one that says itself how it is copied."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, (set, frozenset)):
        return list(value)
    if isinstance(value, (type, ModuleType)) or hasattr(value, "__deepcopy__"):
        return ()
    slots = [n for c in type(value).__mro__ for n in _named(c.__dict__.get("__slots__", ()))]
    held = [getattr(value, name, None) for name in slots if name != "__dict__"]
    return [*held, *getattr(value, "__dict__", {}).values()]


def _named(slots: Any) -> Sequence[str]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _clones(tensors: Sequence[Tensor], name: str) -> list[Tensor]:
    """A copy of every tensor; those that overlap are views of one copy."""
    for tensor in tensors:
        if tensor.grad_fn is not None:
            raise InputError(
                f"a tensor of shape {tuple(tensor.shape)} in a batch of {name} hangs on a graph "
                f"({tensor.grad_fn.name()}), which can be gone through once only; .detach() it, or "
                "compute it in loss_fn"
            )
    alone = len({_storage(t) for t in tensors}) == len(tensors)
    clones = [t.detach().clone() for t in tensors] if alone else _apart(tensors)
    for tensor, clone in zip(tensors, clones, strict=True):
        if tensor.requires_grad:
            clone.requires_grad_()
    return clones


def _storage(t: Tensor) -> int:
    """Where its memory is; a number of its own where it has none that can be shared."""
    plain = type(t) is Tensor and t.layout is torch.strided
    return (plain and t.untyped_storage().data_ptr()) or id(t)


def _apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of several tensors, as views of one copy where they overlap."""
    clones: dict[int, Tensor] = {}
    for group in _overlapping(tensors):
        extents = [_extent(tensors[i]) for i in group]
        first, stop = min(e[0] for e in extents), max(e[1] for e in extents)
        # Columns of one wide matrix reach over all of it.
        if len(group) > 1 and stop - first <= 2 * sum(tensors[i].numel() for i in group):
            room = tensors[group[0]].detach().as_strided((stop - first,), (1,), first).clone()
            for i in group:
                t = tensors[i]
                clones[i] = room.as_strided(t.shape, t.stride(), t.storage_offset() - first)
    return [clones[i] if i in clones else t.detach().clone() for i, t in enumerate(tensors)]


def _overlapping(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Groups of tensors that reach into each other's part of one storage."""
    of_storage: dict[Any, list[int]] = {}
    for i, t in enumerate(tensors):
        of_storage.setdefault((_storage(t), t.dtype), []).append(i)
    groups: list[list[int]] = []
    for members in of_storage.values():
        stop = 0
        extents = {i: _extent(tensors[i]) for i in members if len(members) > 1}
        for i in sorted(extents, key=lambda i: extents[i]):
            first, end = extents[i]
            if first >= stop:
                groups.append([])
            groups[-1].append(i)
            stop = max(stop, end)
    return groups


def _extent(t: Tensor) -> tuple[int, int]:
    """(first, last + 1) element of its storage that it reaches."""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return int(t.storage_offset()), int(t.storage_offset() + last + 1)


# Counting -----------------------------------------------------------------------------------------


def rows_of(batch: Any) -> int:
    """The examples in a batch, by which means over batches are weighted.

    What its `batch_size` says, where it has one; else the first dimension that most of its tensors
    and arrays have, or the length of a list of plain values or of single examples. 1 where there is
    nothing to count (None, a number, a text). A warning where it cannot be told.
    """
    found = list(_lengths(batch))
    if not found and _is_single(batch):
        return 1
    count = Counter(found).most_common(1)
    if not count or 2 * count[0][1] <= len(found):
        taken = found[0] if found else 1
        seen = f" among {', '.join(map(str, dict.fromkeys(found)))}" if found else ""
        warnings.warn(
            f"the rows of a batch (a {type(batch).__name__}) cannot be counted for sure{seen}: it "
            f"weighs as {taken} in means over batches; give it an attribute batch_size",
            stacklevel=2,
        )
        return taken
    return count[0][0]


def _lengths(value: Any) -> Iterator[int]:
    """What may be the number of rows, from every part that says something about it."""
    told = getattr(value, "batch_size", None)
    if isinstance(told, torch.Size):  # of a TensorDict
        told = next(iter(told), None)
    if isinstance(told, int):
        yield told
    elif isinstance(value, PackedSequence):
        yield int(value.batch_sizes[0])
    elif isinstance(value, Tensor) or hasattr(value, "__array__"):
        shape: Any = getattr(value, "shape", ())
        if len(shape):
            yield int(shape[0])
    elif type(value) is list and value and may_be_examples(value):
        inside = [n for part in value for n in _lengths(part)]
        sure = all(any(_is_single(part) for part in _inside(v)) for v in value)
        yield from [len(value)] * (1 if sure else max(1, len(inside)))
        yield from () if sure else inside
    elif isinstance(value, (list, tuple)) and value and all(isinstance(v, PLAIN) for v in value):
        yield len(value)
    else:
        for part in _inside(value):
            yield from _lengths(part)


def may_be_examples(values: list[Any]) -> bool:
    """Whether a list may be one of examples that nobody put together; sure where each has a number
    or a text. torch's own collate makes lists of tensors, and of lists."""
    alike = len({type(v) for v in values}) == 1
    return alike and not isinstance(values[0], (*PLAIN, Tensor, list)) and bool(_inside(values[0]))


def _is_single(value: Any) -> bool:
    if isinstance(value, (Tensor, *PLAIN)) or hasattr(value, "__array__"):
        return not getattr(value, "shape", ())
    return isinstance(value, (list, tuple, Mapping)) and not len(value)

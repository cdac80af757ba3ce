"""Batches in any container: moved, copied and counted.

As accelerate moves by `.to`, torch's `pin_memory` rebuilds containers and Lightning dataclasses;
`torch.utils._pytree` takes dataclasses, PackedSequence and BatchEncoding for leaves.
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
"""Not owned by a batch that refers to it: the same object in a copy."""


@dataclass(frozen=True, eq=False)
class Kept:
    """A batch for several uses: a loss may modify its own copy."""

    batch: Any

    def opened(self) -> Any:
        return copied(self.batch)


def kept(batch: Any) -> Kept:
    return batch if isinstance(batch, Kept) else Kept(batch)


def opening(loss_fn: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
    """loss_fn that also takes `Kept` batches."""

    @functools.wraps(loss_fn, updated=())
    def loss(model: nn.Module, batch: Any) -> Any:
        return loss_fn(model, batch.opened() if isinstance(batch, Kept) else batch)

    return loss


# Moving -------------------------------------------------------------------------------------------


def to_device(batch: Any, device: torch.device | None, *, wait: bool = False) -> Any:
    """The batch on `device`, if any. wait: until pinned memory can be reused."""
    if device is None:
        return batch
    move = getattr(batch, "to", None)
    if callable(move) and not isinstance(batch, type):
        try:
            return move(device, non_blocking=not wait)
        except TypeError:  # no argument non_blocking
            return move(device)
    return mapped(lambda part: to_device(part, device, wait=wait), batch)


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """The same container with function(part) for every part; a leaf unchanged."""
    kind: Any = type(value)
    made: Any
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, MutableMapping):
        made = copy.copy(value)  # a defaultdict, or with attributes of its own
        made.update({k: function(v) for k, v in value.items()})
        return made
    if isinstance(value, Mapping):
        return kind({k: function(v) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        parts = [function(v) for v in value]
        return kind(*parts) if hasattr(value, "_fields") else kind(parts)
    if is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for name in (field.name for field in fields(value) if hasattr(value, field.name)):
            object.__setattr__(made, name, function(getattr(value, name)))  # also a frozen one
        return made
    return value


# Copying ------------------------------------------------------------------------------------------


def copied(batch: Any, name: str = "batches") -> Any:
    """A deep copy, but of a tensor only its view, not its storage; modules, parameters and datasets
    are shared. InputError, which calls the batch `name`, where it cannot be copied."""
    memo: dict[int, Any] = {}
    tensors: dict[int, Tensor] = {}  # kept alive, so that ids stay unique
    for part in _parts(batch):
        (memo if isinstance(part, NO_DATA) else tensors)[id(part)] = part
    try:
        return copy.deepcopy(batch, memo | _clones(tensors, name))
    except (MemoryError, torch.OutOfMemoryError, InputError):
        raise
    except Exception as error:
        raise InputError(
            f"a {type(batch).__name__} of {name} cannot be copied ({type(error).__name__}: "
            f"{error}), and a reverse pass uses every batch several times: yield tensors, give its "
            "class a __deepcopy__, or turn rewriting off"
        ) from error


def spare(batch: Any) -> Any:
    """A copy in case the loader reuses the batch; the batch itself if it cannot be copied."""
    try:
        return copied(batch)
    except InputError:
        return batch


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in a batch, or in the inputs or outputs of a module."""
    return [part for part in _parts(value) if isinstance(part, Tensor)]


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are None, or equal with NaNs in the same places; only shapes if not strided."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.layout != torch.strided:
        return a.shape == b.shape
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _parts(value: Any) -> Iterator[Any]:
    """Tensors and NO_DATA, in order, with repetitions."""
    stack, seen = [value], set[int]()
    while stack:
        part = stack.pop()
        if isinstance(part, (Tensor, *NO_DATA)):
            yield part
        elif not isinstance(part, PLAIN) and id(part) not in seen:
            seen.add(id(part))
            stack.extend(reversed(_inside(part)))


def _inside(value: Any) -> Sequence[Any]:
    """The contents of a container or object; none where it defines its own copying."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return value
    if isinstance(value, (set, frozenset)):
        return list(value)
    if isinstance(value, (type, ModuleType)) or hasattr(value, "__deepcopy__"):
        return ()
    held = list(getattr(value, "__dict__", {}).values())
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        held += [getattr(value, name, None) for name in names if name != "__dict__"]
    return held


def _clones(tensors: Mapping[int, Tensor], name: str) -> dict[int, Tensor]:
    """By id, copies of tensors that share little of a storage; deepcopy keeps others' overlap."""
    of_storage: dict[int, list[Tensor]] = {}
    for tensor in tensors.values():
        if tensor.grad_fn is not None:
            raise InputError(
                f"a tensor of shape {tuple(tensor.shape)} in a batch of {name} hangs on a graph "
                f"({tensor.grad_fn.name()}), which can be gone through once only; .detach() it, or "
                "compute it in loss_fn"
            )
        plain = type(tensor) is Tensor and tensor.layout is torch.strided
        key = (plain and tensor.untyped_storage().data_ptr()) or id(tensor)
        of_storage.setdefault(key, []).append(tensor)
    clones = {}
    for group in of_storage.values():
        shared = len(group) > 1 and group[0].untyped_storage().nbytes()
        if not shared or shared > 2 * sum(t.nbytes for t in group):
            for t in group:
                clones[id(t)] = t.detach().clone().requires_grad_(t.requires_grad)
    return clones


# Counting -----------------------------------------------------------------------------------------


def rows_of(batch: Any) -> int:
    """Examples in a batch, as weights of means: its `batch_size`, else the most frequent first
    dimension or the length of a list of examples; 1, perhaps with a warning, if they cannot be
    counted."""
    found = list(_lengths(batch))
    if not found and _is_single(batch):
        return 1
    if found:
        rows, votes = Counter(found).most_common(1)[0]
        if 2 * votes > len(found):
            return rows
    taken = found[0] if found else 1
    seen = f" among {', '.join(map(str, dict.fromkeys(found)))}" if found else ""
    warnings.warn(
        f"the rows of a batch (a {type(batch).__name__}) cannot be counted for sure{seen}: it "
        f"weighs as {taken} in means over batches; give it an attribute batch_size",
        stacklevel=2,
    )
    return taken


def length(loader: Any) -> int | None:
    """len(loader), or None where it has none, as a DataLoader over an IterableDataset."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _lengths(value: Any) -> Iterator[int]:
    """Candidates for the number of rows, one per part."""
    told = getattr(value, "batch_size", None)
    if isinstance(told, torch.Size):  # of a TensorDict
        told = next(iter(told), None)
    if isinstance(told, int):
        yield told
    elif isinstance(value, PackedSequence):
        yield int(value.batch_sizes[0])
    elif isinstance(value, Tensor) or hasattr(value, "__array__"):
        yield from getattr(value, "shape", ())[:1]
    elif type(value) is list and value and may_be_examples(value):
        if all(any(map(_is_single, _inside(v))) for v in value):
            yield len(value)
        else:  # or a list of parts: neither has most of the votes
            inside = [n for part in value for n in _lengths(part)]
            yield from [len(value)] * max(1, len(inside))
            yield from inside
    elif isinstance(value, (list, tuple)) and value and all(isinstance(v, PLAIN) for v in value):
        yield len(value)
    else:
        for part in _inside(value):
            yield from _lengths(part)


def may_be_examples(values: list[Any]) -> bool:
    """Whether a list may hold uncollated examples, certain if each has a number or text; torch's
    collate itself makes lists of tensors and of lists."""
    alike = len({type(v) for v in values}) == 1
    return alike and not isinstance(values[0], (*PLAIN, Tensor, list)) and bool(_inside(values[0]))


def _is_single(value: Any) -> bool:
    if isinstance(value, (Tensor, *PLAIN)) or hasattr(value, "__array__"):
        return not getattr(value, "shape", ())
    return isinstance(value, (list, tuple, Mapping)) and not len(value)

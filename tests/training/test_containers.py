"""What batches are made of: moved, copied and counted as what they are."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import TensorDataset

from rhc import InputError
from rhc.containers import (
    Kept,
    copied,
    kept,
    opening,
    rows_of,
    spare,
    tensors_of,
    to_device,
)

META = torch.device("meta")


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Frozen:
    x: Any
    y: Any = None
    late: Any = field(default=None, init=False)


@dataclass(slots=True)
class Slotted:
    x: Any
    y: Any = None


class Encoding(UserDict[str, Any]):
    """As transformers' BatchEncoding: a mapping with attributes, that moves itself."""

    def __init__(self, data: Any, kind: str) -> None:
        super().__init__(data)
        self.kind = kind


class Movable:
    """An object of one's own, whose `.to` takes the device alone."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def to(self, device: torch.device) -> Movable:
        return Movable(self.x.to(device))


# Moving ------------------------------------------------------------------------------------------


def test_every_container_is_moved_as_what_it_is() -> None:
    x = torch.zeros(4, 2)
    default: dict[str, Any] = defaultdict(list, a=x)
    batch = {
        "frozen": Frozen(x, [x, "text", None, 3]),
        "slotted": Slotted(Pair(x, x)),
        "encoding": Encoding({"a": x}, "fast"),
        "movable": Movable(x),
        "default": default,
        "ordered": OrderedDict(b=(x, 3), d=None),
        "packed": pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)]),
        "array": np.zeros(3),
    }
    moved = to_device(batch, META)
    assert all(t.is_meta for t in tensors_of({k: moved[k] for k in moved if k != "packed"}))
    assert moved["packed"].data.is_meta and not moved["packed"].batch_sizes.is_meta
    assert isinstance(moved["frozen"], Frozen) and moved["frozen"].y[1:] == ["text", None, 3]
    assert isinstance(moved["slotted"].x, Pair)
    assert isinstance(moved["encoding"], Encoding) and moved["encoding"].kind == "fast"
    assert moved["default"].default_factory is list
    assert moved["array"] is batch["array"]
    assert not any(t.is_meta for t in tensors_of(batch))
    assert to_device(batch, None) is batch


# Copying -----------------------------------------------------------------------------------------


MAKERS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "list": lambda x: [x, "text", None],
    "dict": lambda x: {"x": x, "n": {"m": (x, 1)}},
    "named": lambda x: Pair(x, [x]),
    "frozen": lambda x: Frozen(x, {"x": x}),
    "slotted": lambda x: Slotted(x, [x]),
    "encoding": lambda x: Encoding({"x": x}, "fast"),
    "object": lambda x: Movable([x]),
    "packed": lambda x: pack_sequence([x, x[:1]]),
    "sparse": lambda x: [x.to_sparse()],
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_copy_shares_no_memory(name: str) -> None:
    x = torch.arange(6.0).reshape(3, 2)
    batch = MAKERS[name](x)
    found = copied(batch)
    assert type(found) is type(batch)
    before = [t.clone() for t in tensors_of(batch)]
    for t in tensors_of(found):
        t.mul_(0)
    after = tensors_of(batch)
    assert before and all(
        torch.equal(a.to_dense(), b.to_dense()) for a, b in zip(before, after, strict=True)
    )


def test_arrays_are_copied_too() -> None:
    batch = Frozen(np.arange(3.0))
    copied(batch).x[:] = 7
    assert batch.x.tolist() == [0, 1, 2]


def test_what_occurs_twice_or_overlaps_does_so_in_the_copy() -> None:
    rows = torch.arange(20.0).reshape(4, 5)
    found = copied({"x": rows[:, :-1], "y": rows[:, 1:], "again": [rows[:, :-1]]})
    assert found["x"].stride() == (5, 1)
    found["x"].mul_(0)
    assert found["y"][0].tolist() == [0, 0, 0, 4]
    assert float(rows.sum()) == 190
    same = copied([rows, rows])
    assert same[0] is same[1]


def test_a_slice_is_copied_without_the_dataset() -> None:
    """Nor are two columns of it, or two slices that lie far apart."""
    data = torch.zeros(1000, 100)
    for batch in ([data[3:5]], [data[:, 3], data[:, 7]], [data[:2], data[1:3], data[900:902]]):
        for t in copied(batch):
            assert t.untyped_storage().nbytes() <= 1000 * 4


def test_flags_of_gradients_are_kept_and_graphs_refused() -> None:
    x = torch.zeros(3, requires_grad=True)
    assert copied([x])[0].requires_grad and copied([x])[0].is_leaf
    with pytest.raises(InputError) as error:
        copied([2 * x], "train_loader")
    assert str(error.value) == (
        "a tensor of shape (3,) in a batch of train_loader hangs on a graph (MulBackward0), which "
        "can be gone through once only; .detach() it, or compute it in loss_fn"
    )


def test_modules_and_datasets_are_referred_to() -> None:
    layer, data = nn.Linear(2, 2), TensorDataset(torch.zeros(3))
    found = copied({"of": layer, "weight": layer.weight, "from": data, "x": torch.zeros(1)})
    assert found["of"] is layer and found["weight"] is layer.weight and found["from"] is data


def test_what_cannot_be_copied_is_named() -> None:
    batch = {"x": torch.zeros(2), "lock": threading.Lock()}
    with pytest.raises(InputError) as error:
        copied(batch, "val_loader")
    assert str(error.value) == (
        "a dict of val_loader cannot be copied (TypeError: cannot pickle '_thread.lock' object), "
        "and a reverse pass uses every batch several times: yield tensors, give its class a "
        "__deepcopy__, or turn rewriting off"
    )
    assert spare(batch) is batch


def test_every_use_of_a_kept_batch_has_its_own() -> None:
    batch = {"x": torch.ones(2), "y": 3}

    def loss(model: Any, given: Any) -> float:
        return float(given["x"].mul_(0.5).sum()) + given.pop("y")

    opened = opening(loss)
    assert [opened(None, Kept(batch)) for _ in range(3)] == [4.0] * 3
    assert set(batch) == {"x", "y"} and kept(kept(batch)).batch is batch
    assert opened(None, batch) == 4.0 and set(batch) == {"x"}  # what is not kept is given itself


# Counting ----------------------------------------------------------------------------------------


class Told(dict[str, Any]):
    batch_size = 5


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        ({"ids": ["a", "b", "c"], "x": torch.zeros(3, 8), "y": torch.zeros(3)}, 3),
        ({"ids": ["a", "b", "c"]}, 3),
        ((torch.tensor(0.5), torch.zeros(4, 2)), 4),
        ({"x": np.zeros((6, 2)), "scale": np.float32(2)}, 6),
        (Frozen(torch.zeros(7, 2), torch.zeros(7)), 7),
        (Slotted(torch.zeros(7, 2)), 7),
        (Movable(torch.zeros(4)), 4),
        (pack_sequence([torch.zeros(5, 2), torch.zeros(3, 2)]), 2),
        ((pack_sequence([torch.zeros(5, 2), torch.zeros(3, 2)]), torch.zeros(2)), 2),
        ((torch.zeros(4, 9), torch.zeros(4), torch.zeros(10)), 4),  # weights of the classes
        ([(torch.zeros(8), 1)] * 5, 5),  # examples that nobody put together
        ([{"x": torch.zeros(8), "text": "a"}], 1),
        ([[torch.zeros(4), torch.zeros(4)], [torch.zeros(4), torch.zeros(4)]], 4),
        (Told(x=torch.zeros(2, 3)), 5),
        (torch.tensor(3.0), 1),
        (None, 1),
        (17, 1),
        ({}, 1),
    ],
)
def test_rows_are_counted(batch: Any, rows: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rows_of(batch) == rows


@pytest.mark.parametrize(
    ("batch", "seen", "rows"),
    [
        ((torch.zeros(9, 4), torch.zeros(2, 30), torch.zeros(3)), " among 9, 2, 3", 9),
        ([{"x": torch.zeros(8)}, {"x": torch.zeros(8)}], " among 2, 8", 2),
        (object(), "", 1),
    ],
)
def test_rows_that_cannot_be_told_are_asked_for(batch: Any, seen: str, rows: int) -> None:
    with pytest.warns(UserWarning) as told:
        assert rows_of(batch) == rows
    assert str(told[0].message) == (
        f"the rows of a batch (a {type(batch).__name__}) cannot be counted for sure{seen}: it "
        f"weighs as {rows} in means over batches; give it an attribute batch_size"
    )

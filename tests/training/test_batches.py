"""Batches addressed by step: what a plain loop would draw, ahead of time, and found again."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import LOADERS, ROWS, clouds, seed_everything, unequal
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from rhc import InputError
from rhc.rng import RandomState
from rhc.training.batches import DrawnAsNeeded, MicroBatches, Position, StepBatches, batch_size

EPOCH = 10
"""Batches of one epoch of ROWS rows by eight, the last one smaller."""


def states() -> list[Any]:
    return [torch.get_rng_state(), list(np.random.get_state()), random.getstate()]


class Stream(IterableDataset[Any]):
    """An epoch of 40 rows without a length, drawn as they are read."""

    def __iter__(self) -> Iterator[Any]:
        rows = clouds(ROWS)
        for _ in range(40):
            yield rows[random.randrange(ROWS)]


def weighted(data: Any, seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(data, 8, sampler=WeightedRandomSampler([1.0] * ROWS, 60, generator=generator))


MAKERS: dict[str, Callable[[Any, int], Iterable[Any]]] = {
    **LOADERS,
    "weighted": weighted,
    "stream": lambda data, seed: DataLoader(Stream(), 8),
}


def made(name: str, seed: int = 0) -> Iterable[Any]:
    return MAKERS[name](clouds(ROWS), seed)


def iterated(loader: Iterable[Any], count: int) -> list[Any]:
    found: list[Any] = []
    while True:
        for batch in loader:
            found.append(batch)
            if len(found) == count:
                return found


@pytest.mark.parametrize("name", MAKERS)
def test_not_isolated_is_plain_iteration(name: str) -> None:
    seed_everything(3)
    plain = iterated(made(name), 25)
    after = states()
    seed_everything(3)
    batches = StepBatches(made(name), isolated=False)
    assert unequal(plain, [batches.take(t, t + 1)[0] for t in range(25)]) == []
    assert unequal(after, states()) == []


@pytest.mark.parametrize("name", MAKERS)
def test_isolated_leaves_every_generator_alone(name: str) -> None:
    """The global ones while drawing, and the loader's own; the stream follows its seed alone."""
    seed_everything(3)
    loader = made(name)
    generator = getattr(loader, "generator", None) or torch.Generator()
    before = [*states(), generator.get_state()]
    batches = StepBatches(loader, isolated=True, seed=11)
    drawn = [batches.take(t, t + 3)[0] for t in range(25)]
    assert unequal(before, [*states(), generator.get_state()]) == []

    seed_everything(4)
    again = StepBatches(made(name), isolated=True, seed=11)
    assert unequal(drawn, again.take(0, 25)) == []
    if name not in ("in_order", "list", "generator", "weighted"):  # these have no global seed
        other = StepBatches(made(name), isolated=True, seed=12)
        assert unequal(drawn, other.take(0, 25)) != []


def test_two_streams_may_share_a_generator() -> None:
    """What the second stream draws depends neither on the first nor on who comes first."""
    generator = torch.Generator().manual_seed(1)
    loader = DataLoader(clouds(ROWS), 8, shuffle=True, generator=generator)
    alone = StepBatches(loader, isolated=True).take(0, 25)
    first, second = (StepBatches(loader, isolated=True) for _ in range(2))
    mixed = []
    for t in range(25):
        mixed.append(first.take(t, t + 1)[0])
        second.take(3 * t, 3 * t + 3)
    assert unequal(alone, mixed) == []


def test_epochs_are_shuffled_anew() -> None:
    batches = StepBatches(made("shuffled"), isolated=True).take(0, 2 * EPOCH)
    first, second = batches[:EPOCH], batches[EPOCH:]
    assert unequal(first, second) != []
    for epoch in (first, second):
        rows = torch.cat([kept.opened()[0] for kept in epoch])
        assert sorted(rows.tolist()) == sorted(clouds(ROWS).tensors[0].tolist())


def test_taken_again_until_released() -> None:
    batches = StepBatches(made("shuffled"), isolated=True)
    ahead = batches.take(2, 13)
    assert batches.next_step == 13
    assert all(a is b for a, b in zip(ahead, batches.take(2, 13), strict=True))
    assert [batches.epoch_of(t) for t in (2, 9, 10, 12)] == [0, 0, 1, 1]
    batches.release(7)
    assert all(a is b for a, b in zip(ahead[5:], batches.take(7, 13), strict=True))
    with pytest.raises(KeyError):
        batches.take(6, 13)


def test_lazily_draws_one_at_a_time() -> None:
    drawn = []

    class Noted(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            for batch in super().__iter__():
                drawn.append(batch)
                yield batch

    batches = StepBatches(Noted(range(5)), isolated=False)
    for step, batch in enumerate(batches.lazily(0, 7)):
        assert drawn[-1] == batch == step % 5
        assert len(drawn) == step + 1
    assert batches.next_step == 7


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_found_again_from_every_position(name: str, isolated: bool) -> None:
    """At every step of two epochs and a bit, with another seed, and through tensors.

    Not isolated, the global random state is the caller's to restore, as the plant does.
    """
    seed_everything(3)
    batches = StepBatches(made(name), isolated=isolated, seed=11)
    positions, rng, drawn = [], [], []
    for t in range(25):
        positions.append(batches.position(t))
        rng.append(RandomState.capture())
        drawn.append(batches.take(t, t + 1)[0])
        batches.release(t + 1)
    for t in range(0, 25):
        seed_everything(99)
        again = StepBatches(made(name, seed=99), isolated=isolated, seed=99)
        outside = states()
        again.seek(Position.from_tensors(positions[t].to_tensors()))
        assert unequal(outside, states()) == []
        rng[t].restore()
        ahead = [again.take(s, s + 1)[0] for s in range(t, 25)]
        assert unequal(drawn[t:], ahead) == [], t


@pytest.mark.parametrize("name", MAKERS)
def test_a_position_taken_while_looking_ahead(name: str) -> None:
    """The place of a step whose batch, and those of the next epoch, were drawn long ago."""
    batches = StepBatches(made(name), isolated=True, seed=11)
    drawn = batches.take(0, 25)
    batches.release(4)
    for t in range(4, 25):
        again = StepBatches(made(name, seed=99), isolated=True, seed=99)
        again.seek(batches.position(t))
        assert unequal(drawn[t:], again.take(t, 25)) == [], t
        # And a second time from there, as a run that is interrupted twice.
        third = StepBatches(made(name), isolated=True, seed=5)
        third.seek(again.position(min(t + 2, 24)))
        assert unequal(drawn[min(t + 2, 24) :], third.take(min(t + 2, 24), 25)) == [], t


def test_going_further_within_an_epoch_does_not_begin_it_anew() -> None:
    begun = []

    class Noted(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            begun.append(len(begun))
            return super().__iter__()

    loader = Noted(torch.arange(10.0))
    stream = StepBatches(loader, isolated=True)
    stream.take(0, 8)
    early, late = stream.position(2), stream.position(7)
    again = StepBatches(loader, isolated=True)
    again.seek(early)
    passes = len(begun)
    again.seek(late)
    assert [int(b.opened()) for b in again.take(7, 9)] == [7, 8] and len(begun) == passes
    again.seek(early)
    assert [int(b.opened()) for b in again.take(2, 4)] == [2, 3] and len(begun) == passes + 1


@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.data())
def test_any_walk_sees_the_same_stream(strides: list[int], data: st.DataObject) -> None:
    """Windows slide, look ahead by any length, and are interrupted between any two of them."""
    loader = [torch.tensor([float(i)]) for i in range(5)]
    batches, step = StepBatches(loader, isolated=True), 0
    for stride in strides:
        ahead = stride + data.draw(st.integers(0, 7))
        assert [int(b.opened()) for b in batches.take(step, step + ahead)] == [
            t % 5 for t in range(step, step + ahead)
        ]
        step += stride
        batches.release(step)
        if data.draw(st.booleans()):
            position = batches.position(step)
            batches = StepBatches(loader, isolated=True)
            batches.seek(position)


# Accumulation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_micro_batches_are_the_loaders_in_order(name: str, isolated: bool) -> None:
    """Step t has the batches [3 t, 3 t + 3), also where an epoch of ten ends within them."""
    seed_everything(3)
    single = StepBatches(made(name), isolated=isolated, seed=11)
    drawn = [single.take(t, t + 1)[0] for t in range(24)]
    seed_everything(3)
    batches = StepBatches(made(name), isolated=isolated, seed=11, accumulate=3)
    steps = batches.take(0, 5) + batches.take(5, 8)
    assert all(isinstance(b, MicroBatches) and len(b) == 3 for b in steps)
    assert unequal(drawn, [micro for step in steps for micro in step]) == []
    assert batches.next_step == 8
    assert [batches.epoch_of(t) for t in (0, 3, 4)] == [single.epoch_of(3 * t) for t in (0, 3, 4)]


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("name", MAKERS)
def test_micro_batches_found_again_from_every_position(name: str, isolated: bool) -> None:
    seed_everything(3)
    batches = StepBatches(made(name), isolated=isolated, seed=11, accumulate=3)
    positions, rng, drawn = [], [], []
    for t in range(9):
        positions.append(batches.position(t))
        rng.append(RandomState.capture())
        drawn.append(batches.take(t, t + 1)[0])
        batches.release(t + 1)
    for t in range(9):
        seed_everything(99)
        again = StepBatches(made(name, seed=99), isolated=isolated, seed=99, accumulate=3)
        again.seek(Position.from_tensors(positions[t].to_tensors()))
        rng[t].restore()
        assert unequal(drawn[t:], [again.take(s, s + 1)[0] for s in range(t, 9)]) == [], t


@pytest.mark.parametrize("name", MAKERS)
def test_a_position_of_micro_batches_taken_while_looking_ahead(name: str) -> None:
    batches = StepBatches(made(name), isolated=True, seed=11, accumulate=3)
    drawn = batches.take(0, 9)
    for t in range(9):
        again = StepBatches(made(name, seed=99), isolated=True, seed=99, accumulate=3)
        again.seek(batches.position(t))
        assert unequal(drawn[t:], again.take(t, 9)) == [], t


def test_micro_batches_are_drawn_one_at_a_time() -> None:
    """Where the plain loop's random state is shared, none is drawn before the last was used."""
    drawn = []

    class Noted(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            for batch in super().__iter__():
                drawn.append(batch)
                yield batch

    batches = StepBatches(Noted(range(5)), isolated=False, accumulate=2)
    for step, micro_batches in enumerate(batches.lazily(0, 6)):
        assert isinstance(micro_batches, DrawnAsNeeded) and len(micro_batches) == 2
        for place, micro in enumerate(micro_batches):
            assert drawn[-1] == micro == (2 * step + place) % 5
            assert len(drawn) == 2 * step + place + 1
    assert batches.next_step == 6
    assert batches.position(6).index == 12 % 5


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isolated", [True, False])
def test_an_empty_loader(isolated: bool) -> None:
    empty = DataLoader(clouds(5), 8, drop_last=True)
    with pytest.raises(InputError) as error:
        StepBatches(empty, isolated=isolated, name="val_loader").take(0, 1)
    assert str(error.value) == (
        "val_loader yields no batches; check the dataset's length, batch_size and drop_last"
    )


def test_a_loader_that_can_be_iterated_once_only() -> None:
    once = (torch.zeros(2) for _ in range(3))
    batches = StepBatches(once, isolated=True)
    batches.take(0, 3)
    with pytest.raises(InputError, match="that it can be iterated more than once"):
        batches.take(3, 4)


def test_less_data_than_before() -> None:
    batches = StepBatches(made("in_order"), isolated=True)
    batches.take(0, 8)
    shorter = StepBatches(DataLoader(clouds(30), 8), isolated=True)
    with pytest.raises(InputError) as error:
        shorter.seek(batches.position(8))
    assert str(error.value) == (
        "train_loader ended after 4 batches, but the run that is resumed was at batch 8 of its "
        "epoch; give it the same data"
    )


def test_another_number_of_generators() -> None:
    batches = StepBatches(made("generator"), isolated=True)
    batches.take(0, 3)
    with pytest.raises(InputError, match=r"has 0 generators of its own, the run .* had 1; give it"):
        StepBatches(made("shuffled"), isolated=True).seek(batches.position(3))


# Counting ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(4, 2), 4),
        (torch.zeros(()), 1),
        ([torch.zeros(3), torch.zeros(5)], 3),
        ({"a": (torch.zeros(7, 1), 0)}, 7),
        ([], 1),
        ("text", 1),
        (MicroBatches(((torch.zeros(4, 2), 0), (torch.zeros(3, 2), 0))), 7),
    ],
)
def test_batch_size(batch: Any, size: int) -> None:
    assert batch_size(batch) == size

"""Weights by cell: values, bounds, plain loops, files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import rhc
from rhc.data_weights import per_row, weighed


def by_first(batch: Any) -> Tensor:
    return batch[0]


def test_an_indexed_dataset_gives_every_row_its_index() -> None:
    x = torch.arange(6.0)
    loader = DataLoader(rhc.indexed(TensorDataset(x)), batch_size=4, shuffle=True)
    for batch in loader:
        assert torch.equal(x[batch["index"]], batch["sample"][0])


def test_what_cannot_be_indexed_is_refused() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

    with pytest.raises(rhc.InputError, match="Stream cannot be indexed"):
        rhc.indexed(Stream())


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_weights_have_mean_one_whatever_is_given(values: list[float]) -> None:
    weights = rhc.DataWeights(len(values), by_first, values=torch.tensor(values))
    assert float(weights.values.mean()) == pytest.approx(1, rel=1e-5)
    ratio = weights.values / weights.values[0]
    assert torch.allclose(ratio, torch.tensor(values) / values[0], rtol=1e-5)


def test_moves_are_bounded_and_frozen_cells_stay() -> None:
    weights = rhc.DataWeights(4, by_first, frozen=[1], bounds=(0.5, 2.0))
    weights.move(torch.arange(4), torch.tensor([0.1, 5.0, 9.0, -9.0]))
    ratios = weights.values / weights.values[1]
    assert ratios.tolist() == pytest.approx([math.exp(0.1), 1.0, 2.0, 0.5], rel=1e-6)


def test_the_loss_of_a_plain_loop_is_the_mean_by_weight() -> None:
    weights = rhc.DataWeights(3, by_first, values=torch.tensor([1.0, 2.0, 5.0]))
    losses = torch.tensor([1.0, 3.0], requires_grad=True)
    loss = weights.weigh(losses, (torch.tensor([0, 2]),))
    assert loss.item() == pytest.approx((1 * 1 + 5 * 3) / 6)
    loss.backward()
    assert losses.grad is not None
    assert losses.grad.tolist() == pytest.approx([1 / 6, 5 / 6])


def test_a_sampler_draws_in_proportion() -> None:
    weights = rhc.DataWeights(3, by_first, values=torch.tensor([1.0, 2.0, 7.0]))
    drawn = list(weights.sampler(4000, generator=torch.Generator().manual_seed(0)))
    assert drawn.count(2) / 4000 == pytest.approx(0.7, abs=0.03)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_weights_of_a_step_have_mean_one_and_their_pullback_is_autograds(parts: int) -> None:
    values = torch.rand(5, dtype=torch.float64) + 0.1
    weights = rhc.DataWeights(5, by_first, values=values)
    cells = [torch.tensor([0, 3, 3, 1]), torch.tensor([4, 0])][:parts]
    step = weighed(weights, [(c,) for c in cells], torch.zeros((), dtype=torch.float64))
    every = torch.cat([part.weights for part in step])
    assert float(every.mean()) == pytest.approx(1)

    raw = torch.cat([weights.values[c] for c in cells]).requires_grad_()
    slopes = torch.randn(len(raw), dtype=torch.float64)
    ((raw * len(raw) / raw.sum()) * slopes).sum().backward()
    found = per_row(step, slopes.split([len(c) for c in cells]))
    assert raw.grad is not None
    assert torch.allclose(torch.cat(found), raw.grad, rtol=1e-12)


@pytest.mark.parametrize("frozen", [(), (0, 2)])
def test_files_come_back(tmp_path: Path, frozen: tuple[int, ...]) -> None:
    weights = rhc.DataWeights(
        ["a", "b", "c"], by_first, values=torch.tensor([1.0, 2.0, 4.0]), frozen=frozen
    )
    weights.save(tmp_path / "weights.safetensors")
    again = rhc.DataWeights.load(tmp_path / "weights.safetensors", by_first)
    assert torch.equal(again.values, weights.values)
    assert again.names == ("a", "b", "c")
    for one in (weights, again):
        one.move(torch.arange(3), torch.tensor([0.1, 0.2, 0.3]))
    assert torch.equal(again.values, weights.values)


@pytest.mark.parametrize("damage", ["flip", "cut", "no json", "other json", "version"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "weights.safetensors"
    rhc.DataWeights(3).save(path)
    document = path.with_suffix(".json")
    data, text = bytearray(path.read_bytes()), json.loads(document.read_text())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-2])
    elif damage == "no json":
        document.unlink()
    else:
        text["format" if damage == "other json" else "version"] = "x"
        document.write_text(json.dumps(text))
    with pytest.raises(rhc.InputError, match=r"cannot read data weights .*weights\.safetensors"):
        rhc.DataWeights.load(path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: rhc.DataWeights(0), "cells must be ≥ 1, got 0"),
        (lambda: rhc.DataWeights(["a", "a"]), "cells must be different names"),
        (lambda: rhc.DataWeights(2.5), "cells must be a whole number"),  # type: ignore[arg-type]
        (lambda: rhc.DataWeights(2, 3), "cell_of must be a function"),  # type: ignore[arg-type]
        (lambda: rhc.DataWeights(2, values=torch.ones(3)), r"values must be \(2,\)"),
        (lambda: rhc.DataWeights(2, values=torch.zeros(2)), "positive numbers"),
        (lambda: rhc.DataWeights(2, bounds=(2.0, 3.0)), "bounds of data weights"),
        (lambda: rhc.DataWeights(2, frozen=[2]), "cell 2 is out of range"),
        (lambda: rhc.DataWeights(2).cells((1,)), "has no 'index': wrap the dataset"),
        (lambda: rhc.DataWeights(2).cells({"index": torch.ones(2)}), "integers, one per row"),
        (lambda: rhc.DataWeights(2).cells({"index": torch.tensor([0, 7])}), "cell 7 is out of"),
        (
            lambda: rhc.DataWeights(2).weigh(torch.ones(()), {"index": torch.tensor([0])}),
            "losses must be one per row",
        ),
    ],
)
def test_what_cannot_be_is_said(make: Any, says: str) -> None:
    with pytest.raises(rhc.InputError, match=says):
        make()

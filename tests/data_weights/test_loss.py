"""Weighted losses in a plant: the step is that of a plain loop with the weights written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rhc
from rhc.training.batches import MicroBatches

ROWS, CELLS = 6, 10


def rows_of_loss(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    x, y, _ = batch
    out = model(x)
    return F.cross_entropy(out, y, reduction="none"), {"largest": out.max()}


def terms_of_loss(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    x, y, _ = batch
    out = model(x)
    return {"fit": F.cross_entropy(out, y, reduction="none"), "size": 0.1 * out.square().mean()}


def parts(count: int) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(ROWS, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (ROWS,), generator=generator),
            torch.randint(CELLS, (ROWS,), generator=generator),
        )
        for _ in range(count)
    ]


def made() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.optim.SGD(model.parameters(), 0.1)


def by_cell() -> rhc.DataWeights:
    values = torch.linspace(0.2, 3, CELLS, dtype=torch.float64)
    return rhc.DataWeights(CELLS, lambda batch: batch[2], values=values)


@pytest.mark.parametrize("count", [1, 3])
def test_a_step_is_the_plain_loops_with_its_weights_written_out(count: int) -> None:
    weights, batches = by_cell(), parts(count)
    model, optimizer = made()
    plant = rhc.Plant(model, optimizer, rows_of_loss, data_weights=weights)
    observed = plant.step(batches[0] if count == 1 else MicroBatches(batches), {}, 0)

    other, plain = made()
    x, y, cells = (torch.cat(t) for t in zip(*batches, strict=True))
    w = weights.values[cells]
    loss = (F.cross_entropy(other(x), y, reduction="none") * w / w.mean()).mean()
    loss.backward()
    plain.step()
    assert torch.allclose(observed.loss, loss.detach(), rtol=1e-12)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-15)


def test_weights_of_one_change_nothing() -> None:
    weights = rhc.DataWeights(CELLS, lambda batch: batch[2])
    model, optimizer = made()
    plant = rhc.Plant(model, optimizer, rows_of_loss, data_weights=weights)
    (batch,) = parts(1)
    found = plant.step(batch, {}, 0).loss
    other, _ = made()
    assert torch.allclose(found, rows_of_loss(other, batch)[0].mean(), rtol=1e-14)


def test_terms_of_a_loss_are_added_by_weight() -> None:
    values = torch.tensor([3.0, 1.0], dtype=torch.float64)
    weights = rhc.DataWeights(["fit", "size"], values=values)
    model, optimizer = made()
    plant = rhc.Plant(model, optimizer, terms_of_loss, data_weights=weights)
    (batch,) = parts(1)
    terms = terms_of_loss(model, batch)
    expected = 1.5 * terms["fit"].mean() + 0.5 * terms["size"]
    assert torch.allclose(plant.step(batch, {}, 0).loss, expected, rtol=1e-12)


def test_evaluations_are_plain_means() -> None:
    model, optimizer = made()
    plant = rhc.Plant(model, optimizer, rows_of_loss, data_weights=by_cell())
    (batch,) = parts(1)
    assert torch.equal(plant.loss(batch)[0], rows_of_loss(model, batch)[0].mean())


@pytest.mark.parametrize(
    ("loss_fn", "weights", "says"),
    [
        (lambda m, b: rows_of_loss(m, b)[0].mean(), by_cell(), "one loss per row, and loss_fn"),
        (lambda m, b: rows_of_loss(m, b)[0][:2], by_cell(), r"losses of shape \(2,\) for 6 rows"),
        (terms_of_loss, by_cell(), "the terms fit, size, and the cells are not named"),
        (terms_of_loss, rhc.DataWeights(["fit", "other"]), "the cells are fit, other"),
        (rows_of_loss, rhc.DataWeights(3, lambda b: b[2]), "is out of range: there are 3 cells"),
        (rows_of_loss, rhc.DataWeights(3), "has no 'index'"),
    ],
)
def test_what_cannot_be_weighed_is_one_sentence(loss_fn: Any, weights: Any, says: str) -> None:
    model, optimizer = made()
    plant = rhc.Plant(model, optimizer, loss_fn, data_weights=weights)
    with pytest.raises(rhc.InputError, match=says):
        plant.step(parts(1)[0], {}, 0)

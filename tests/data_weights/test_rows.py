"""Losses per row where loss_fn returns their mean, and the numbers of a batch's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from rhc.data_weights import DataWeights, Numbered, row_losses, weighed, weighing, with_index
from rhc.data_weights.rows import RowLosses
from rhc.errors import InputError

B, T, C = 6, 5, 4

CLASS_WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 1.5])


class Tagger(nn.Module):
    """(B, T) tokens -> (B, T, C)."""

    def __init__(self, *, normalised: bool = False, time_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, C)
        self.norm = nn.BatchNorm1d(8) if normalised else nn.Identity()
        self.dropout, self.time_first = nn.Dropout(0.5 if normalised else 0.0), time_first

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens).mean(1))
        x = self.dropout(x)[:, None] + self.embedding(tokens)
        found = self.head(x)
        return found.transpose(0, 1) if self.time_first else found


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    targets = torch.randint(0, C, (B, T), generator=draw)
    targets[0, :3] = -100
    return torch.randint(0, 9, (B, T), generator=draw), targets


def flattened(model: nn.Module, batch: Any) -> Tensor:
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def class_weighted(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    tokens, targets = batch
    return nn.CrossEntropyLoss(CLASS_WEIGHTS)(model(tokens).transpose(1, 2), targets), {}


def time_first(model: nn.Module, batch: Any) -> Tensor:
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.T.flatten().clamp(min=0))


def hand_written(model: nn.Module, batch: Any) -> Tensor:
    tokens, targets = batch
    picked = model(tokens).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])
    return -picked.mean()


def parts(found: Any) -> Any:
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize(
    ("loss_fn", "options", "taken_apart"),
    [
        (flattened, {}, True),
        (class_weighted, {}, True),
        (flattened, {"normalised": True}, True),
        (time_first, {"time_first": True}, False),
        (hand_written, {}, False),
    ],
)
def test_rows_have_the_losses_whose_mean_is_returned(
    loss_fn: Callable[..., Any], options: dict[str, bool], taken_apart: bool
) -> None:
    model = Tagger(**options)
    calls: list[int] = []

    def counted(model: nn.Module, own: Any) -> Any:
        calls.append(len(own[0]))
        return loss_fn(model, own)

    found = row_losses(counted, model, batch())
    assert model.training
    calls.clear()
    torch.manual_seed(5)
    rows = parts(found(model, batch()))
    assert isinstance(rows, RowLosses)
    assert calls == ([B] if taken_apart else [B] + [1] * B)
    torch.manual_seed(5)
    assert torch.equal(rows.mean, parts(loss_fn(model, batch())))
    torch.testing.assert_close(rows.each.mean(), rows.mean)
    if loss_fn is hand_written:
        alone = [loss_fn(model, tuple(t[i : i + 1] for t in batch())) for i in range(B)]
        torch.testing.assert_close(rows.each, torch.stack(alone))


def test_the_loss_of_weights_of_1_has_every_bit_and_its_slopes_are_the_rows_losses() -> None:
    model, weights = Tagger(), DataWeights(B, lambda batch: torch.arange(B))
    loss_fn = weighing(row_losses(flattened, model, batch()), weights)
    (own,) = weighed(weights, [batch()], torch.zeros(()))
    loss = loss_fn(model, own)
    assert torch.equal(loss, flattened(model, batch()))
    (slopes,) = torch.autograd.grad(loss, own.weights)
    rows = row_losses(flattened, model, batch())(model, batch())
    torch.testing.assert_close(slopes, rows.each / B)


def test_what_is_no_mean_over_rows_is_refused() -> None:
    with pytest.raises(InputError, match="is not the mean of its rows' losses"):
        row_losses(hand_written, Tagger(normalised=True), batch())
    with pytest.raises(InputError, match="must return a scalar or one loss per row, got float"):
        row_losses(lambda model, batch: 0.5, Tagger(), batch())


@pytest.mark.parametrize("kind", ["collated", "at once", "dictionaries"])
def test_batches_have_the_numbers_of_their_rows_and_the_same_draws(kind: str) -> None:
    x = torch.randn(23, 2)
    dataset = TensorDataset(x, torch.arange(23))
    options: dict[str, Any] = {"batch_size": 5, "shuffle": True}
    if kind == "at once":
        sampler = BatchSampler(RandomSampler(dataset), 5, drop_last=False)
        options = {"batch_size": None, "sampler": sampler}
    if kind == "dictionaries":
        options["collate_fn"] = lambda rows: {"y": torch.stack([y for _, y in rows])}
    loader = DataLoader(dataset, **options)
    numbered = with_index(loader)
    torch.manual_seed(2)
    plain = list(loader)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    found = list(numbered)
    assert torch.equal(torch.get_rng_state(), state)
    for own, expected in zip(found, plain, strict=True):
        assert isinstance(own, Numbered)
        labels = own.sample["y"] if kind == "dictionaries" else own.sample[1]
        assert torch.equal(own.numbers, labels)
        assert torch.equal(labels, expected["y"] if kind == "dictionaries" else expected[1])
    assert with_index([1, 2]) is None

"""What loaders and loss functions leave unsaid: which row of its dataset a row of a batch is, and
its own loss, where loss_fn returns the mean."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from rhc.containers import rows_of
from rhc.distributed import shard
from rhc.errors import InputError
from rhc.rng import RandomState, preserved

LossFn = Callable[[nn.Module, Any], Any]

REDUCING = (
    "cross_entropy", "nll_loss", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss",
    "binary_cross_entropy", "binary_cross_entropy_with_logits", "soft_margin_loss",
    "gaussian_nll_loss", "poisson_nll_loss", "hinge_embedding_loss", "margin_ranking_loss",
    "multi_margin_loss", "triplet_margin_loss", "cosine_embedding_loss",
)  # fmt: skip
"""Losses of torch.nn.functional with `reduction`, which torch.nn's classes call too."""

SAME_LOSS = 1e-3
"""Largest difference of a row's loss, relative to it, in a batch and alone: float32 rounds to 1e-6,
another row's loss is further away."""


@dataclass(frozen=True, eq=False)
class RowLosses:
    """A batch's loss as loss_fn gives it, and the losses (B,) whose mean it is."""

    mean: Tensor
    each: Tensor


def row_losses(loss_fn: LossFn, model: nn.Module, batch: Any) -> LossFn:
    """loss_fn with a loss per row: itself if it returns them, else with `RowLosses` in place of the
    mean. Which way there is, is tried on `batch`; the caller restores the model's state.

    The mean of a loss of torch.nn.functional that loss_fn returns is taken apart. Any other loss is
    evaluated for every row alone, which takes as many evaluations as there are rows.

    Raises:
        InputError: the loss is not the mean of its rows' losses.
    """
    if _loss_of(loss_fn(model, batch)).dim() == 1:
        return loss_fn
    size = rows_of(batch)
    modes = [(m, m.training) for m in model.modules()]
    with torch.no_grad(), preserved():
        try:
            model.eval()  # without dropout, which draws anew for a row alone
            _, elements = _elements(loss_fn, model, batch)
            if elements is not None and elements.numel() % size == 0:
                of_rows = elements.reshape(size, -1)
                ends = {
                    i: _elements(loss_fn, model, _row(batch, size, i))[1] for i in (0, size - 1)
                }
                if all(e is not None and _same(of_rows[i], e.flatten()) for i, e in ends.items()):
                    return _taken_apart(loss_fn)
        finally:
            for module, training in modes:
                module.training = training
        before = RandomState.capture()
        one_by_one = _one_by_one(loss_fn)
        error: Exception | None = None
        try:
            whole = _loss_of(one_by_one(model, batch), strict=False)
            if RandomState.capture().same(before) and _same(whole.mean, whole.each.mean()):
                return one_by_one
        except (ValueError, RuntimeError) as refusal:  # BatchNorm takes no row alone
            error = refusal
    raise InputError(
        "the loss of a batch is not the mean of its rows' losses, each evaluated alone (BatchNorm "
        "and dropout see to that): let loss_fn return a mean of torch's own, such as "
        "F.cross_entropy(…), or one loss per row, (B,), with reduction='none'"
    ) from error


def _loss_of(found: Any, *, strict: bool = True) -> Any:
    loss = found[0] if isinstance(found, tuple) and len(found) == 2 else found
    if strict and not isinstance(loss, Tensor):
        raise InputError(
            f"loss_fn must return a scalar or one loss per row, got {type(loss).__name__}"
        )
    return loss


def _row(batch: Any, size: int, i: int) -> Any:
    return shard(batch, size, i, size).rows


def _same(a: Tensor, b: Tensor) -> bool:
    relative = max(SAME_LOSS, 20 * torch.finfo(a.dtype).eps)
    return a.shape == b.shape and bool(
        torch.isclose(a, b.to(a.dtype), rtol=relative, atol=1e-7).all()
    )


def _one_by_one(loss_fn: LossFn) -> LossFn:
    @functools.wraps(loss_fn, updated=())
    def found(model: nn.Module, batch: Any) -> Any:
        size, whole = rows_of(batch), loss_fn(model, batch)
        each = [_loss_of(loss_fn(model, _row(batch, size, i))).reshape(()) for i in range(size)]
        return _with_rows(whole, torch.stack(each))

    return found


def _taken_apart(loss_fn: LossFn) -> LossFn:
    @functools.wraps(loss_fn, updated=())
    def found(model: nn.Module, batch: Any) -> Any:
        whole, elements = _elements(loss_fn, model, batch)
        size, loss = rows_of(batch), _loss_of(whole)
        if elements is None or elements.numel() % size:
            raise InputError(
                f"loss_fn returned no mean of torch's for a batch of {size} rows, and did for "
                "others; let it return one loss per row, (B,)"
            )
        # Class weights and ignored targets divide by another number than that of the elements.
        count: Any = elements.numel()
        if not _same(elements.detach().mean(), loss.detach()):
            count = (elements.sum() / loss).detach()
        return _with_rows(whole, elements.reshape(size, -1).sum(1) * (size / count))

    return found


def _elements(loss_fn: LossFn, model: nn.Module, batch: Any) -> tuple[Any, Tensor | None]:
    """(What loss_fn returns, the elements of which its loss is the mean), None for another loss."""
    with _unreduced() as taken:
        whole = loss_fn(model, batch)
    loss = _loss_of(whole)
    return whole, next((each for mean, each in taken if mean is loss), None)


def _with_rows(whole: Any, each: Tensor) -> Any:
    rows = RowLosses(_loss_of(whole), each)
    return (rows, whole[1]) if isinstance(whole, tuple) else rows


@contextmanager
def _unreduced() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects (mean, elements) of every loss of torch's that is reduced to its mean inside."""
    taken: list[tuple[Tensor, Tensor]] = []
    before = {name: getattr(F, name) for name in REDUCING}

    def noted(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def called(*args: Any, **options: Any) -> Tensor:
            mean = original(*args, **options)
            if options.get("reduction", "mean") == "mean" and len(args) <= 3:
                taken.append((mean, original(*args, **{**options, "reduction": "none"})))
            return mean

        return called

    for name, original in before.items():
        setattr(F, name, noted(original))
    try:
        yield taken
    finally:
        for name, original in before.items():
            setattr(F, name, original)


# Loaders -----------------------------------------------------------------------------------------


class Numbered(NamedTuple):
    """A batch, and the indices (B,) of its rows in their dataset."""

    numbers: Tensor
    sample: Any


def with_index(loader: Any) -> Any:
    """A DataLoader whose batches are `Numbered`, by the same draws; None where rows have no
    indices in a dataset."""
    dataset = getattr(loader, "dataset", None)
    sized = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or not sized:
        return None
    own = object.__new__(type(loader))
    whole = loader._auto_collation
    collate = _Collated(loader.collate_fn, whole)
    own.__dict__.update(vars(loader), dataset=_WithIndex(dataset), collate_fn=collate)
    return own


class _WithIndex(Dataset[Any]):
    """Samples with their index, or samples of several indices with these."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> tuple[Any, Any]:
        return index, self.dataset[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any]]:
        fetch = getattr(self.dataset, "__getitems__", None)
        samples = fetch(indices) if callable(fetch) else [self.dataset[i] for i in indices]
        return list(zip(indices, samples, strict=True))


class _Collated:
    def __init__(self, collate: Callable[[Any], Any], whole: bool) -> None:
        self.collate, self.whole = collate, whole

    def __call__(self, found: Any) -> Numbered:
        if self.whole:  # a list of single samples
            indices, samples = [i for i, _ in found], self.collate([s for _, s in found])
        else:
            indices, samples = found[0], self.collate(found[1])
        return Numbered(torch.as_tensor(indices).reshape(-1), samples)

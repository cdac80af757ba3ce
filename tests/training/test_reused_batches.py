"""Batches that runs use several times, from loaders and for losses that were written for once."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import Stop, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

import rhc
from rhc import InputError
from rhc.events import StepTaken
from rhc.training.batches import StepBatches

ROWS = 52
"""Six batches of eight, and one of four."""


def rows() -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
    return x, (x[:, 0] * x[:, 1] > 0).long()


@dataclass
class Batch:
    x: Tensor
    y: Tensor


def batches() -> list[Any]:
    x, y = rows()
    return [{"x": x[i : i + 8].clone(), "y": y[i : i + 8]} for i in range(0, ROWS, 8)]


def clean(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"] * 0.5), batch["y"])


def scaling(model: nn.Module, batch: Any) -> Tensor:
    batch["x"].mul_(0.5)
    return F.cross_entropy(model(batch["x"]), batch["y"])


def popping(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch.pop("x") * 0.5), batch.pop("y"))


def runner(loss: Any, train: Any, val: Any = None, **settings: Any) -> rhc.Runner:
    seed_everything(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = {"window": 5, "product": "exact", **settings}
    return rhc.Runner(model, optimizer, loss, train, val, **settings)


def figures(result: rhc.RunResult) -> Any:
    return [row["loss"] for row in result.tape], result.val_loss, result.train_loss


# Losses that change what they are given ----------------------------------------------------------


@pytest.mark.parametrize("loss", [scaling, popping])
@pytest.mark.parametrize("start", ["given", "probe", "zero"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_may_change_its_batch(loss: Any, start: Any, accumulate: int) -> None:
    """The lists of batches are the caller's own, and are left as they were."""
    settings = {"start": start, "accumulate": accumulate}
    right = runner(clean, batches(), batches(), **settings).fit(10)
    own = batches()
    found = runner(loss, own, own, **settings).fit(10)
    assert figures(found) == figures(right)
    for a, b in zip(own, batches(), strict=True):
        assert torch.equal(a["x"], b["x"]) and torch.equal(a["y"], b["y"])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"product": "forward-difference"},
        {"segment": 3},
        {"accumulate": 2},
        {"engine": "higher"},
    ],
)
@pytest.mark.parametrize("loss", [scaling, popping])
def test_hypergradients_leave_the_callers_batches_alone(loss: Any, settings: Any) -> None:
    def found(loss: Any, own: list[Any]) -> Tensor:
        seed_everything(1)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        h = rhc.hypergradient(
            model, optimizer, loss, own, controls={"lr": 0.1}, stage_weight=1.0, **settings
        )
        return h.grad["lr"]

    own = batches()[:6]
    assert torch.equal(found(loss, own), found(clean, batches()[:6]))
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(own, batches(), strict=False))


def test_without_rewriting_a_loss_has_what_the_loader_yields() -> None:
    own, seen = batches(), []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(batch)
        return clean(model, batch)

    runner(loss, own, rewrite=False).fit(9)
    assert all(a is b for a, b in zip(seen, own + own[:2], strict=True))


def test_the_probe_of_the_first_batch_leaves_it_whole(tmp_path: Path) -> None:
    """It is the caller's own, and the first step needs it."""
    right = runner(scaling, batches(), rewrite=False).fit(7)
    found = runner(scaling, batches(), rewrite=False, directory=tmp_path / "run").fit(7)
    assert figures(found) == figures(right)


# Loaders that fill the same memory ---------------------------------------------------------------


class Refilling:
    """Yields one batch, filled anew each time."""

    def __init__(self, fresh: bool) -> None:
        self.fresh = fresh

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Any]:
        x, y = rows()
        order = torch.randperm(ROWS)
        batch = {"x": torch.empty(8, 4), "y": torch.empty(8, dtype=torch.long)}
        for i in range(6):
            if self.fresh:
                batch = {name: t.clone() for name, t in batch.items()}
            part = order[8 * i : 8 * i + 8]
            torch.index_select(x, 0, part, out=batch["x"])
            batch["y"].numpy()[:] = y[part].numpy()
            yield batch


@pytest.mark.parametrize("start", ["given", "probe"])
def test_a_loader_may_fill_the_same_memory(start: Any) -> None:
    right, found = (
        figures(runner(clean, Refilling(fresh), Refilling(fresh), start=start).fit(15))
        for fresh in (True, False)
    )
    assert found == right


# Batches that cannot be copied -------------------------------------------------------------------


def locked() -> list[Any]:
    return [{**batch, "lock": threading.Lock()} for batch in batches()]


def test_a_plain_run_takes_batches_that_cannot_be_copied() -> None:
    right = figures(runner(clean, batches(), batches(), rewrite=False).fit(7))
    assert figures(runner(clean, locked(), locked(), rewrite=False).fit(7)) == right


def test_a_run_that_rewrites_refuses_them_before_it_trains() -> None:
    run = runner(clean, locked(), start="given")
    before = [p.clone() for p in run.plant.parameters]
    with pytest.raises(InputError, match=r"a dict of train_loader cannot be copied \(TypeError: "):
        run.fit(7)
    assert all(torch.equal(a, b) for a, b in zip(before, run.plant.parameters, strict=True))


# Rows --------------------------------------------------------------------------------------------


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dataclass": Batch,
    "texts first": lambda x, y: {"id": [str(i) for i in range(len(x))], "x": x, "y": y},
    "arrays": lambda x, y: {"x": x.numpy(), "y": y.numpy()},
    "scalar first": lambda x, y: {"scale": torch.tensor(0.5), "x": x, "y": y},
    "examples": lambda x, y: [(row, int(label)) for row, label in zip(x, y, strict=True)],
}


def of_any(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, list):
        x, y = torch.stack([x for x, _ in batch]), torch.tensor([y for _, y in batch])
    else:
        x, y = (batch.x, batch.y) if isinstance(batch, Batch) else (batch["x"], batch["y"])
    return F.cross_entropy(model(torch.as_tensor(x)), torch.as_tensor(y))


@pytest.mark.parametrize("name", CONTAINERS)
def test_validation_is_the_mean_over_rows(name: str) -> None:
    x, y = rows()
    made = [CONTAINERS[name](x[i : i + 8], y[i : i + 8]) for i in range(0, ROWS, 8)]
    run = runner(of_any, made, made, rewrite=False)
    result = run.fit(7)
    with torch.no_grad():
        right = F.cross_entropy(run.plant.model(x), y)
    assert result.val_loss == pytest.approx(float(right), rel=1e-6)


# One loader for several streams ------------------------------------------------------------------


def indices() -> TensorDataset:
    return TensorDataset(torch.arange(float(ROWS)))


@pytest.mark.parametrize("isolated", [True, False])
def test_two_streams_of_one_loader_whose_workers_persist(isolated: bool) -> None:
    loader = DataLoader(indices(), 8, shuffle=True, num_workers=1, persistent_workers=True)
    first = StepBatches(loader, isolated=isolated)
    second = StepBatches(loader, isolated=True, name="val_loader")
    seen: list[float] = []
    for t in range(7):
        seen += first.take(t, t + 1)[0].opened()[0].tolist()
        second.take(2 * t, 2 * t + 2)
    for stream in (first, second):
        stream.close()
    assert sorted(seen) == list(range(ROWS))


def test_a_validation_loader_whose_workers_persist_is_evaluated_between_windows() -> None:
    x, y = rows()
    data = TensorDataset(x, y)
    loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731

    def found(**workers: Any) -> Any:
        held = DataLoader(data, 16, shuffle=True, **workers)
        train = DataLoader(data, 16, shuffle=True)
        result = runner(loss, train, held, start="given", validate_every=5).fit(10)
        held_out = [row["val_loss"] for row in result.tape if "val_loss" in row]
        return [*held_out, *figures(result)[0], result.val_loss]

    right = found(num_workers=1)
    assert found(num_workers=1, persistent_workers=True) == pytest.approx(right, rel=1e-6)


class Unsized:
    def __iter__(self) -> Iterator[Any]:
        return iter(batches())


class OwnIterator:
    def __iter__(self) -> OwnIterator:
        self.place = iter(batches())
        return self

    def __next__(self) -> Any:
        return next(self.place)


class OwnPlace:
    def __iter__(self) -> Iterator[Any]:
        self.i = 0
        while self.i < 7:
            yield batches()[self.i]
            self.i += 1


class OwnOrder:
    def __init__(self) -> None:
        self.order = list(range(7))

    def __iter__(self) -> Iterator[Any]:
        random.Random(0).shuffle(self.order)
        for i in self.order:
            yield batches()[i]


class OwnIteratorOfRows(IterableDataset[Any]):
    def __iter__(self) -> OwnIteratorOfRows:
        self.place = iter(zip(*rows(), strict=True))
        return self

    def __next__(self) -> Any:
        x, y = next(self.place)
        return {"x": x, "y": y}


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (OwnIterator, "OwnIterator"),
        (OwnPlace, "OwnPlace"),
        (lambda: DataLoader(OwnIteratorOfRows(), 8), "OwnIteratorOfRows"),
    ],
)
def test_a_loader_with_one_place_is_not_used_twice_at_a_time(make: Any, kind: str) -> None:
    loader = make()
    right = figures(runner(clean, Unsized(), Unsized(), start="probe").fit(10))
    assert figures(runner(clean, make(), make(), start="probe").fit(10)) == right
    with pytest.raises(InputError) as error:
        runner(clean, loader, loader, start="given").fit(10)
    assert str(error.value) == (
        f"train_loader is iterated a second time before a pass over it has ended, and its {kind} "
        "keeps its place in itself: let each __iter__ return an iterator with a place of its own, "
        "or give train_loader and val_loader objects of their own, and leave validate_every out"
    )
    with pytest.raises(InputError, match="val_loader is iterated a second time"):
        runner(clean, batches(), make(), start="given", validate_every=5).fit(10)
    assert runner(clean, loader, loader, rewrite=False).fit(10).val_loss is not None


def test_nor_is_one_that_shuffles_its_own_order() -> None:
    with pytest.raises(InputError, match="its OwnOrder keeps its place in itself: let each"):
        runner(clean, loader := OwnOrder(), loader, start="given").fit(10)
    assert len(runner(clean, OwnOrder(), OwnOrder(), start="given").fit(10).tape) == 10


def test_one_object_of_ones_own_that_keeps_no_place_is_used_twice() -> None:
    loader = Refilling(True)
    right = figures(runner(clean, Refilling(True), Refilling(True), start="given").fit(10))
    assert figures(runner(clean, loader, loader, start="given").fit(10)) == right


class Counting(RandomSampler):
    """As accelerate's: makes its generator late, and seeds it by a counter of its passes."""

    epoch = 0

    def __init__(self, data: Any) -> None:
        super().__init__(data)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = self.generator or torch.Generator()
        self.generator.manual_seed(100 + self.epoch)
        yield from super().__iter__()
        self.set_epoch(self.epoch + 1)


def counting() -> DataLoader[Any]:
    data = [{"x": x, "y": y} for x, y in zip(*rows(), strict=True)]
    return DataLoader(data, 8, sampler=Counting(data))  # type: ignore[arg-type]


@pytest.mark.parametrize("isolated", [True, False])
def test_a_sampler_that_counts_its_passes(isolated: bool) -> None:
    """Every pass has its order, whoever else iterates the loader meanwhile."""
    plain = [batch["x"] for loader in [counting()] for _ in range(3) for batch in loader]
    loader = counting()
    first = StepBatches(loader, isolated=isolated)
    other = StepBatches(loader, isolated=True)
    found = []
    for t in range(21):
        found.append(first.take(t, t + 1)[0].opened()["x"])
        other.take(2 * t, 2 * t + 2)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    for t in (0, 5, 7, 13):
        again = StepBatches(counting(), isolated=isolated)
        stream = StepBatches(counting(), isolated=isolated)
        stream.take(0, t) if t else None
        again.seek(stream.position(t))
        assert torch.equal(again.take(t, t + 1)[0].opened()["x"], plain[t])


@pytest.mark.parametrize("rewrite", [True, False])
def test_a_run_with_such_a_sampler_is_resumed(rewrite: bool, tmp_path: Path) -> None:
    def fitted(directory: Path, stop: int | None = None) -> Any:
        def listener(event: Any) -> None:
            if stop is not None and isinstance(event, StepTaken) and event.step == stop:
                raise Stop

        train, val = counting(), counting()
        settings = {"start": "given", "rewrite": rewrite, "directory": directory}
        return figures(runner(clean, train, val, listeners=[listener], **settings).fit(20))

    right = fitted(tmp_path / "straight")
    with pytest.raises(Stop):
        fitted(tmp_path / "stopped", 13)
    assert fitted(tmp_path / "stopped") == right


def test_the_loader_of_a_hugging_face_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=12, n_positions=6, n_embd=8, n_layer=1, n_head=1)
    data = [{k: (i + torch.arange(6)) % 12 for k in ("input_ids", "labels")} for i in range(ROWS)]

    def trainer() -> Any:
        seed_everything(0)
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=8, report_to=[], use_cpu=True
        )
        model = transformers.GPT2LMHeadModel(config)
        return transformers.Trainer(
            model=model, args=arguments, train_dataset=data, eval_dataset=data[:12]
        )

    loader = trainer().get_train_dataloader()
    plain = [batch["input_ids"] for _ in range(2) for batch in loader]
    seen: list[Tensor] = []

    def loss(model: nn.Module, batch: Any) -> Any:
        seen.append(batch["input_ids"].clone())
        return model(**batch).loss

    made = trainer()
    loaders = made.get_train_dataloader(), made.get_eval_dataloader()
    run = rhc.Runner(made.model, made.create_optimizer(), loss, *loaders, rewrite=False)
    run.fit(14)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=False))
    result = rhc.Runner(made.model, made.create_optimizer(), loss, *loaders, window=5).fit(10)
    assert result.val_loss is not None and result.val_loss < 3

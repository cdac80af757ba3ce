"""What people give a Runner at first: it works, or one sentence says what, where and the mend."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import rhc
import rhc.training.evaluate
from rhc import InputError
from rhc.cli.main import main

Parts = dict[str, Any]


def points(
    n: int = 64, dtype: torch.dtype = torch.float32, labels: torch.dtype = torch.long
) -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, dtype=dtype, generator=draw)
    return TensorDataset(x, (x.sum(1) > 0).to(labels))


def loader(*given: Any, **settings: Any) -> DataLoader[Any]:
    return DataLoader(points(*given, **settings), batch_size=16)


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def net(*first: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(first or [nn.Linear(8, 8)]), nn.ReLU(), nn.Linear(8, 2))


def fitted(parts: Parts, steps: Any = 12, **settings: Any) -> rhc.RunResult:
    """The README's ten lines, with some of its parts replaced."""
    model = parts.get("model") or net()
    optimizer = parts.get("optimizer", torch.optim.SGD)
    if optimizer is torch.optim.SGD:
        optimizer = optimizer(model.parameters(), lr=0.05, momentum=0.9)
    elif callable(optimizer) and not isinstance(optimizer, type):
        optimizer = optimizer(model)
    train = parts.get("train", loader())
    runner = rhc.Runner(
        model, optimizer, parts.get("loss", cross_entropy), train, parts.get("val", train),
        **{"window": 4, **settings},
    )  # fmt: skip
    return runner.fit(steps=steps)


class Stream(IterableDataset[Any]):
    """Points without a length; without an end where there is no number of them."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from points(64 if self.count is None else self.count)
            if self.count is not None:
                return


class Sized(Stream):
    def __len__(self) -> int:
        return self.count or 0


class Output(dict[str, Any]):
    """As of Hugging Face: a dict, with its entries as attributes."""

    __getattr__ = dict.__getitem__


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, inputs: Tensor, labels: Tensor) -> Output:
        logits = self.net(inputs)
        return Output(loss=F.cross_entropy(logits, labels), logits=logits)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), x


class Remembering(nn.Module):
    """Keeps its output for the next batch, with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.before = net(), None

    def forward(self, x: Tensor) -> Tensor:
        self.before = self.net(x) + (0 if self.before is None else 0.1 * self.before)
        return self.before


def named(**names: str) -> DataLoader[Any]:
    rows = [dict(zip(names.values(), row, strict=True)) for row in points()]
    return DataLoader(rows, batch_size=16)  # type: ignore[arg-type]


def frozen_first(model: nn.Module) -> torch.optim.Optimizer:
    model[0].requires_grad_(False)  # type: ignore[index]
    return torch.optim.Adam(model.parameters(), lr=0.01)


def of_two_groups(model: nn.Module) -> torch.optim.Optimizer:
    first, second = model[0].parameters(), model[2].parameters()  # type: ignore[index]
    groups = [{"params": first, "lr": 0.01}, {"params": second, "lr": 0.1, "weight_decay": 0.01}]
    return torch.optim.SGD(groups, momentum=0.9)


WORKS: dict[str, Callable[[], Parts]] = {
    "dicts": lambda: {
        "train": named(x="x", y="label"),
        "loss": lambda model, batch: F.cross_entropy(model(batch["x"]), batch["label"]),
    },
    "three-tensors": lambda: {
        "train": DataLoader(TensorDataset(*points().tensors, torch.ones(64)), batch_size=16),
        "loss": lambda model, batch: (
            F.cross_entropy(model(batch[0]), batch[1], reduction="none") * batch[2]
        ).mean(),
    },
    "bare-tensors": lambda: {
        "train": DataLoader(points().tensors[0], batch_size=16),  # type: ignore[arg-type]
        "loss": lambda model, batch: model(batch).square().mean(),
    },
    "a-list-of-batches": lambda: {"train": list(loader())},
    "float64": lambda: {"model": net().double(), "train": loader(64, torch.float64)},
    "bfloat16": lambda: {"model": net().bfloat16(), "train": loader(64, torch.bfloat16)},
    "no-validation": lambda: {"val": None},
    "iterable": lambda: {"train": DataLoader(Stream(64), batch_size=16)},
    "iterable-with-a-length": lambda: {"train": DataLoader(Sized(64), batch_size=16)},
    "output-with-a-loss": lambda: {
        "model": WithLoss(),
        "train": named(x="inputs", y="labels"),
        "loss": lambda model, batch: model(**batch).loss,
    },
    "frozen": lambda: {"optimizer": frozen_first},
    "batch-norm-and-dropout": lambda: {
        "model": net(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2))
    },
    "groups": lambda: {"optimizer": of_two_groups},
    "amsgrad": lambda: {
        "optimizer": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3, amsgrad=True)
    },
    "smaller-than-a-window": lambda: {"train": loader(16)},
    "a-loss-of-one-element": lambda: {"loss": lambda m, b: cross_entropy(m, b).reshape(1)},
    "a-module-as-loss": lambda: {"loss": _ModuleLoss()},
}


class _ModuleLoss(nn.Module):
    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch)


@pytest.mark.parametrize("name", WORKS)
def test_it_works(name: str, tmp_path: Path) -> None:
    """With a directory too, where the first batch of every loader is tried."""
    for directory in (None, tmp_path / "run"):
        result = fitted(WORKS[name](), directory=directory)
        assert result.train_loss == pytest.approx(result.train_loss) and result.train_loss < 3
        assert (result.val_loss is None) == (name == "no-validation")


def test_workers_are_used(tmp_path: Path) -> None:
    train = DataLoader(points(), batch_size=16, num_workers=1, shuffle=True)
    assert fitted({"train": train}).train_loss < 3


def test_a_loader_without_an_end_is_judged_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rhc.training.evaluate, "UNSIZED_BATCHES", 7)
    endless = DataLoader(Stream(), batch_size=16)
    with pytest.warns(UserWarning, match="not ended after 7 batches"):
        assert fitted({"train": endless}).val_loss is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted({"train": loader(), "val": DataLoader(Stream(64), batch_size=16)})


def as_criterion(prediction: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(prediction, target)


def backwards(model: nn.Module, batch: Any) -> Tensor:
    loss = cross_entropy(model, batch)
    loss.backward()
    return loss


REFUSED: dict[str, tuple[Callable[[], Parts], str]] = {
    "a-class": (lambda: {"optimizer": torch.optim.Adam}, "optimizer .* the class Adam; make one: "),
    "a-partial": (
        lambda: {"optimizer": lambda m: functools.partial(torch.optim.SGD, lr=0.1)},
        "optimizer must be an instance, got a partial",
    ),
    "two-optimizers": (
        lambda: {
            "optimizer": lambda m: [torch.optim.SGD([p], lr=0.1) for p in m[0].parameters()]
        },
        "optimizer must be one, got 2: players .* an actor-critic, .* its own rhc.AdaptiveRL",
    ),
    "a-name": (lambda: {"optimizer": lambda m: "sgd"}, "optimizer .* got a str"),
    "a-vector": (
        lambda: {"loss": lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")},
        r"got shape \(16,\); reduce it with .mean\(\)",
    ),
    "nothing": (lambda: {"loss": lambda m, b: None}, "got NoneType; it has no return"),
    "a-number": (lambda: {"loss": lambda m, b: cross_entropy(m, b).item()}, r"not .item\(\)"),
    "detached": (lambda: {"loss": lambda m, b: cross_entropy(m, b).detach()}, "without a graph"),
    "an-output": (
        lambda: {"model": WithLoss(), "train": named(x="inputs", y="labels"),
                 "loss": lambda m, b: m(**b)},
        "got Output; return its .loss",
    ),
    "a-list": (lambda: {"loss": lambda m, b: [cross_entropy(m, b), {}]}, r"or \(loss, \{"),
    "too-few-outputs": (
        lambda: {"model": nn.Linear(8, 1)}, r"fewer outputs than there are classes"
    ),
    "a-missing-key": (
        lambda: {"train": named(x="x", y="y"), "loss": lambda m, b: m(b["label"]).sum()},
        "KeyError: 'label', .* a dict of x: float32 .* what is not there",
    ),
    "no-dict": (lambda: {"loss": lambda m, b: (cross_entropy(m, b), m(b[0]))}, "dict of metrics"),
    "a-criterion": (lambda: {"loss": nn.CrossEntropyLoss()}, r"criterion\(model\(batch\[0\]\)"),
    "a-functional": (lambda: {"loss": F.cross_entropy}, r"F.cross_entropy\(model"),
    "predictions": (
        lambda: {"loss": as_criterion},
        r"failed( at the first batch of train_loader)? .* not Sequential, "
        r"\S+ line \d+\); the batch is a list of float32 \(16, 8\), int64.* \(model, batch\), not",
    ),
    "three-arguments": (lambda: {"loss": lambda m, x, y: 0}, r"takes \(m, x, y\)"),
    "backward": (lambda: {"loss": backwards}, "leave backward"),
    "kept-graph": (lambda: {"model": Remembering()}, "detach"),
    "a-pair": (lambda: {"model": Pair()}, r"several things: model\(x\)\[0\]"),
    "float-labels": (
        lambda: {"train": loader(64, labels=torch.float32)}, r"labels are integers, .*y.long"
    ),
    "int32-labels": (lambda: {"train": loader(64, labels=torch.int32)}, r"y.long\(\)"),
    "float64-data": (lambda: {"train": loader(64, torch.float64)}, r"one dtype: x.float\(\)"),
    "another-val": (
        lambda: {"val": loader(64, torch.float64)},
        "failed( at the first batch of val_loader)? .* dtype",
    ),
    "wrong-shape": (lambda: {"model": net(nn.Linear(7, 8))}, "shapes .* 8x8|16x8 and 7x8"),
    "meta": (lambda: {"model": net().to("meta")}, "'0.weight' is on the meta device"),
    "lazy": (
        lambda: {"model": net(nn.LazyLinear(8))}, "no shape yet; call the model on one batch first"
    ),
    "a-dataset": (lambda: {"train": points()}, r"yields single examples; give DataLoader\(train_l"),
    "swapped": (lambda: {"loss": loader(), "train": cross_entropy}, "loss_fn .* the order is Run"),
    "no-loader": (lambda: {"train": cross_entropy}, "train_loader .* the function cross_entropy"),
    "empty-val": (lambda: {"val": []}, "val_loader yields no batches"),
    "no-model": (lambda: {"model": cross_entropy, "optimizer": lambda m: "x"}, "must be an nn.Mod"),
    "one-row": (
        lambda: {"model": net(nn.Linear(8, 8), nn.BatchNorm1d(8)), "train": loader(17)},
        "batch of one row: drop_last=True",
    ),
    "sparse": (
        lambda: {
            "model": nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Flatten(), nn.Linear(16, 2)),
            "train": DataLoader(TensorDataset(torch.ones(32, 8).long(), torch.ones(32).long()), 16),
        },
        "'0.weight' is sparse",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("where", ["", "run"])
def test_it_is_refused_in_one_sentence(name: str, where: str, tmp_path: Path) -> None:
    """With a directory, where the first batch of every loader is tried, and without."""
    parts, told = REFUSED[name]
    with pytest.raises(InputError) as refused:
        # Of a run that has the budget to look back at a window.
        fitted(parts(), steps=80, directory=tmp_path / where if where else None)
    assert "first batch" in str(refused.value) or not where or "failed(" not in told
    assert re.search(told, str(refused.value)), str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 450


@pytest.mark.parametrize("steps", [0, 1e2, "many"])
def test_steps_are_a_whole_number(steps: Any) -> None:
    with pytest.raises(InputError, match=r"steps must be (a whole number|≥ 1)"):
        fitted({}, steps)


def test_a_second_fit_in_memory(tmp_path: Path) -> None:
    """Of a Runner that looked for a start it ended with the sentence of a run that diverged."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    parts = (model, optimizer, cross_entropy, loader(), loader())
    runner = rhc.Runner(*parts, window=4, controls="lr")
    runner.fit(8)
    with pytest.raises(InputError, match=r"has been fitted, .* directory, which fit continues"):
        runner.fit(12)
    kept = rhc.Runner(*parts, window=4, directory=tmp_path / "run")
    kept.fit(8)
    assert len(kept.fit(12).schedule) == 12


def test_the_plain_loop_takes_what_looking_back_cannot() -> None:
    """Sparse gradients, and a loader that can be iterated only once."""
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Flatten(), nn.Linear(4, 2))
    batches = [(torch.randint(0, 5, (8, 2)), torch.randint(0, 2, (8,))) for _ in range(6)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    runner = rhc.Runner(model, optimizer, cross_entropy, iter(batches), batches, rewrite=False)
    assert runner.fit(6).val_loss is not None


def test_a_file_is_trained_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rhc train my_run.py`; what its loss fails with is one sentence, with its line."""
    monkeypatch.chdir(tmp_path)
    assert main(["init", "my_run.py"]) == 0
    assert main(["train", "my_run.py", "--steps", "4", "--window", "2", "--no-rewrite"]) == 0
    (directory,) = Path("runs").iterdir()
    assert directory.name.startswith("my_run-")
    text = Path("my_run.py").read_text()
    Path("other.py").write_text(text.replace("def my_run(", "def other(").replace("x, y =", "x ="))
    capsys.readouterr()
    assert main(["train", "other.py", "--steps", "4", "--no-rewrite"]) == 2
    line = text[: text.index("prediction = model(x)")].count("\n") + 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"other.py line {line})" in said, said
    Path("third.py").write_text("def make(*, seed, data): ...")
    assert main(["train", "third.py"]) == 2
    assert "such as make" in capsys.readouterr().err

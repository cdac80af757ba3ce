"""Runs that are resumed with data of a state of their own, other code, or an optimizer that keeps
more than tensors: the bits of a run that was left alone, or a sentence that says what differs."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

from rhc import InputError, Runner
from rhc.errors import RunWarning
from rhc.storage.trees import joined, parted, spelled, unspelled

ROWS, BATCH, STEPS, WINDOW = 64, 16, 14, 3
X = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] > 0).long()


class Stop(Exception):
    pass


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 2))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def plain_rows() -> Any:
    return DataLoader(TensorDataset(X, Y), BATCH, shuffle=True)


def run(
    directory: Path,
    loader: Any = None,
    stop: int | None = None,
    *,
    model: Callable[[], nn.Module] = network,
    optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
    loss: Callable[[nn.Module, Any], Tensor] = cross_entropy,
    seed: int = 0,
    **options: Any,
) -> tuple[list[float], list[str]]:
    """(losses, what a person was told); stop: after so many steps. seed: of the weights."""
    torch.manual_seed(seed)
    made = model()
    taken = 0

    def stopping(model: nn.Module, batch: Any) -> Tensor:
        nonlocal taken
        taken += torch.is_grad_enabled()
        if stop is not None and taken > stop:
            raise Stop
        return loss(model, batch)

    data = plain_rows() if loader is None else loader() if callable(loader) else loader
    chosen = optimizer(made)
    torch.manual_seed(1)
    options = {"rewrite": False, "window": WINDOW} | options
    runner = Runner(made, chosen, stopping, data, directory=directory, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            losses = [row["loss"] for row in runner.fit(STEPS).tape]
        except Stop:
            losses = []
    return losses, [str(w.message) for w in caught if w.category is RunWarning]


# Data with a state of their own -------------------------------------------------------------------


class Permuted:
    """A sampler with a generator of numpy."""

    def __init__(self) -> None:
        self.draw = np.random.default_rng(0)

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw.permutation(ROWS).tolist())


class Kept(Permuted):
    def state_dict(self) -> dict[str, Any]:
        return dict(self.draw.bit_generator.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draw.bit_generator.state = state


class OfPython(Permuted):
    """A generator of Python, whose state is a tuple in a tuple."""

    def __init__(self) -> None:
        self.own = random.Random(0)

    def __iter__(self) -> Iterator[int]:
        yield from self.own.sample(range(ROWS), ROWS)

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.own.getstate()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.own.setstate(state["state"])


class Legacy(Kept):
    """numpy's older generator: its state has an array of unsigned integers."""

    def __init__(self) -> None:
        self.draw = np.random.RandomState(0)  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.draw.get_state()}  # type: ignore[attr-defined]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draw.set_state(state["state"])  # type: ignore[attr-defined]


class Noisy(Dataset[Any]):
    def __init__(self) -> None:
        self.draw = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i] + torch.randn(6, generator=self.draw), Y[i]


class KeptNoisy(Noisy):
    def state_dict(self) -> dict[str, Any]:
        return {"draw": self.draw.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.draw.set_state(state["draw"])


class Stream(IterableDataset[Any]):
    """Goes on from epoch to epoch."""

    def __init__(self, rows: int = 72) -> None:
        self.at, self.rows = 0, rows

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.rows):
            yield X[self.at % ROWS], Y[self.at % ROWS]
            self.at += 1


class KeptStream(Stream):
    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


class Loader:
    """Of batches, with an epoch and a place within it."""

    def __init__(self) -> None:
        self.epoch = self.at = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(self.epoch)
        parts = torch.randperm(ROWS, generator=draw).split(BATCH)
        while self.at < len(parts):
            self.at += 1
            yield X[parts[self.at - 1]], Y[parts[self.at - 1]]
        self.at, self.epoch = 0, self.epoch + 1

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.at = state["epoch"], state["at"]


def stateful(*args: Any, **options: Any) -> Any:
    """torchdata's loader, where it is installed."""
    module = pytest.importorskip("torchdata.stateful_dataloader")
    return module.StatefulDataLoader(*args, **options)


KEPT: dict[str, Callable[[], Any]] = {
    "torch's own": plain_rows,
    "a torch generator": lambda: DataLoader(
        TensorDataset(X, Y), BATCH, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "a sampler": lambda: DataLoader(TensorDataset(X, Y), BATCH, sampler=Kept()),
    "a sampler of Python's": lambda: DataLoader(TensorDataset(X, Y), BATCH, sampler=OfPython()),
    "a sampler of numpy's older": lambda: DataLoader(TensorDataset(X, Y), BATCH, sampler=Legacy()),
    "a dataset": lambda: DataLoader(KeptNoisy(), BATCH, shuffle=True),
    "within others": lambda: DataLoader(
        Subset(ConcatDataset([KeptNoisy(), TensorDataset(X, Y)]), range(80)), BATCH, shuffle=True
    ),
    "a stream": lambda: DataLoader(KeptStream(), BATCH),
    "a stream without end": lambda: DataLoader(KeptStream(10**9), BATCH),
    "a loader": Loader,
    "torchdata": lambda: stateful(TensorDataset(X, Y), BATCH, shuffle=True),
    "torchdata, a dataset": lambda: stateful(KeptNoisy(), BATCH, shuffle=True),
    "torchdata, a stream": lambda: stateful(KeptStream(), BATCH),
    "torchdata, a sampler": lambda: stateful(TensorDataset(X, Y), BATCH, sampler=Kept()),
}

UNKEPT: dict[str, Callable[[], Any]] = {
    "a sampler": lambda: DataLoader(TensorDataset(X, Y), BATCH, sampler=Permuted()),
    "a dataset": lambda: DataLoader(Noisy(), BATCH, shuffle=True),
    "a stream": lambda: DataLoader(Stream(), BATCH),
}

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"accumulate": 3},
    "rewritten": {"rewrite": True, "start": "given", "window": 4, "stride": 3},
}
RESUMED_AT = {"plain": 8, "accumulated": 24, "rewritten": 30}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=[pytest.mark.slow] if slow else [])
        for name in KEPT
        for way in WAYS
        for slow in [way != "plain" and name not in ("a sampler", "a loader")]
    ],
)
def test_data_with_a_state_go_on_to_the_bit(name: str, way: str, tmp_path: Path) -> None:
    make, options = KEPT[name], WAYS[way]
    expected, _ = run(tmp_path / "whole", make, **options)
    stopped, _ = run(tmp_path / "run", make, RESUMED_AT[way], **options)
    found, told = run(tmp_path / "run", make, seed=5, **options)
    assert not stopped and found == expected and told == []


@pytest.mark.parametrize("name", UNKEPT)
def test_data_that_no_checkpoint_holds_are_told(name: str, tmp_path: Path) -> None:
    run(tmp_path / "run", UNKEPT[name](), 11)
    losses, told = run(tmp_path / "run", UNKEPT[name](), seed=5)
    assert len(losses) == STEPS and len(told) == 1
    assert "the first batch of epoch" in told[0] and "of train_loader is another" in told[0]
    assert "it goes on from step 9 with what it is given now" in told[0]
    assert "StatefulDataLoader" in told[0] and "persistent_workers" in told[0]


@pytest.mark.slow
def test_workers_that_persist_are_told(tmp_path: Path) -> None:
    def make() -> Any:
        return DataLoader(Noisy(), BATCH, shuffle=True, num_workers=1, persistent_workers=True)

    run(tmp_path / "run", make(), 11)
    assert "the first batch of epoch" in run(tmp_path / "run", make())[1][0]


def test_other_data_are_told(tmp_path: Path) -> None:
    run(tmp_path / "run", None, 8)
    other = DataLoader(TensorDataset(X.flip(0), Y), BATCH, shuffle=True)
    assert "of train_loader is another" in run(tmp_path / "run", other)[1][0]


def test_a_state_that_no_checkpoint_can_hold(tmp_path: Path) -> None:
    class Odd(Kept):
        def state_dict(self) -> dict[str, Any]:
            return {"draw": self.draw}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.draw = state["draw"]

    loader = DataLoader(TensorDataset(X, Y), BATCH, sampler=Odd())
    with pytest.raises(InputError, match=r"state\.batch_sampler\.sampler\.draw is a Generator"):
        run(tmp_path / "run", loader)


def test_a_loader_that_lost_its_state(tmp_path: Path) -> None:
    run(tmp_path / "run", KEPT["a sampler"](), 8)
    with pytest.raises(InputError, match=r"no load_state_dict of its batch_sampler\.sampler"):
        run(tmp_path / "run", UNKEPT["a sampler"]())


def test_trees_come_back() -> None:
    tensors: dict[str, Tensor] = {}
    tree = {
        "numbers": [1, 2.5, None, True, math.inf, 1 + 2j, 2**100],
        "tuple": (1, ("a", b"\x00\xff")),
        "keys": {1: "one", (2, 3): {4}},
        "scalar": np.float32(0.5),
        "array": np.arange(3, dtype=np.uint32),
        "empty": np.zeros((0, 2)),
        "tensor": torch.arange(3),
    }
    text = json.dumps(spelled(parted(tree, "x", tensors)), allow_nan=False)
    found = joined(unspelled(json.loads(text)), tensors)
    for name in ("array", "empty", "tensor"):
        a, b = found.pop(name), tree.pop(name)  # type: ignore[misc]
        assert a.dtype == b.dtype and a.tolist() == b.tolist()
    assert found == tree


# Other code in the same directory -----------------------------------------------------------------


def relu() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 2))


def smoothed(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)


EDITS: dict[str, tuple[dict[str, Any], str]] = {
    "loss": ({"loss": smoothed}, "the loss of step "),
    "modules": ({"model": relu}, 'modules.1 was "Tanh()", is "ReLU()"'),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("rewrite", [True, False])
@pytest.mark.parametrize("edit", EDITS)
def test_other_code_is_told(edit: str, rewrite: bool, finished: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"rewrite": rewrite, "start": "given"}
    first, _ = run(tmp_path, None, None if finished else 40 if rewrite else 11, **options)
    changed, expected = EDITS[edit]
    found, told = run(tmp_path, None, seed=5, **options, **changed)
    assert len(told) == 1 and expected in told[0]
    if finished:
        assert found == first
        assert "it is finished: nothing was trained" in told[0]
    else:
        assert "it goes on from step" in told[0]


def test_a_finished_run_says_that_nothing_was_trained(tmp_path: Path) -> None:
    first, told = run(tmp_path)
    assert told == []
    again, told = run(tmp_path, seed=5)
    assert again == first
    assert len(told) == 1 and "holds this run, and it is finished: nothing was trained" in told[0]


def test_another_number_of_batches_is_told(tmp_path: Path) -> None:
    run(tmp_path, [(X, Y)] * 20, 8)
    told = run(tmp_path, [(X, Y)] * 30)[1]
    assert "batches.train_loader was 20, is 30" in told[0]


def test_a_loss_with_a_generator_of_its_own_is_named(tmp_path: Path) -> None:
    def noisy() -> Callable[[nn.Module, Any], Tensor]:
        draw = np.random.default_rng(0)
        return lambda model, batch: cross_entropy(model, batch) * (1 + draw.random())

    run(tmp_path, None, 8, loss=noisy())
    assert "a generator or a counter of its own" in run(tmp_path, loss=noisy())[1][0]


# The optimizer ------------------------------------------------------------------------------------


class Hoarding(torch.optim.Optimizer):
    """SGD that keeps, and needs, more than tensors."""

    def __init__(self, params: Any, lr: float = 0.1, most: float = math.inf) -> None:
        super().__init__(params, {"lr": lr, "most": most})
        self.extra = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.extra += 1
        self.state["count"] = self.state.get("count", 0) + 1  # type: ignore[index,call-overload]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                lately = state.setdefault("lately", [])
                lately.append(p.grad.clone())
                del lately[:-2]
                state["tree"] = {"sum": state.get("tree", {}).get("sum", 0) + p.grad, 3: (1, "a")}
                scale = 1 / (self.state["count"] + self.extra)  # type: ignore[index]
                move = sum(lately) + 0.1 * state["tree"]["sum"]
                p.add_(move, alpha=-min(group["lr"] * scale, group["most"]))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "extra": self.extra}

    def load_state_dict(self, state: Any) -> None:
        self.extra = state["extra"]
        super().load_state_dict(state)


def test_all_that_an_optimizer_keeps_comes_back(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optimizer": lambda model: Hoarding(model.parameters())}
    expected, _ = run(tmp_path / "whole", **options)
    run(tmp_path / "run", None, 8, **options)
    assert run(tmp_path / "run", seed=5, **options) == (expected, [])


def square() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)
    )


def test_parameters_in_another_order_keep_their_state(tmp_path: Path) -> None:
    def ordered(*order: int) -> Callable[[nn.Module], torch.optim.Optimizer]:
        return lambda m: torch.optim.Adam([list(m.parameters())[i] for i in order], lr=0.01)

    given, other = ordered(0, 1, 2, 3), ordered(3, 1, 0, 2)
    expected, _ = run(tmp_path / "whole", model=square, optimizer=given)
    run(tmp_path / "run", None, 8, model=square, optimizer=given)
    found, told = run(tmp_path / "run", model=square, optimizer=other, seed=5)
    assert found == expected and told == []


def test_parameters_in_other_groups_are_refused(tmp_path: Path) -> None:
    def grouped(*first: int) -> Callable[[nn.Module], torch.optim.Optimizer]:
        def made(model: nn.Module) -> torch.optim.Optimizer:
            every = list(model.parameters())
            rest = [p for i, p in enumerate(every) if i not in first]
            groups = [{"params": [every[i] for i in first]}, {"params": rest, "weight_decay": 0.0}]
            return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)

        return made

    run(tmp_path, None, 8, model=square, optimizer=grouped(0, 2))
    with pytest.raises(InputError, match=r"parameter '2\.weight' is in group 0 .* and was not"):
        run(tmp_path, model=square, optimizer=grouped(1, 2))


class Remembering(nn.Module):
    """Buffers that the first batch fills, and that grow."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)
        self.register_buffer("scale", None)
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if self.scale is None:
                self.scale = x.std(0)
            self.seen = torch.cat([self.seen, x.mean().reshape(1)])
        return self.layer(x / (1 if self.scale is None else self.scale)) + self.seen.sum()


def test_buffers_that_are_filled_and_grow(tmp_path: Path) -> None:
    expected, _ = run(tmp_path / "whole", model=Remembering)
    run(tmp_path / "run", None, 8, model=Remembering)
    assert run(tmp_path / "run", model=Remembering, seed=5) == (expected, [])


class Sometimes(DataLoader[Any]):
    """As accelerate's loaders, whose state is there only where it was asked for."""

    def state_dict(self) -> Any:
        return self.state_that_was_asked_for  # type: ignore[attr-defined]

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError


def test_a_loader_whose_state_is_not_there_has_none(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = network()
    loader = Sometimes(TensorDataset(X, Y), BATCH)
    runner = Runner(model, sgd(model), cross_entropy, loader, loader, window=4, directory=tmp_path)
    assert math.isfinite(runner.fit(8).train_loss)

"""Ten further workloads on which the defaults were not made: do they hold elsewhere?

    python benchmarks/others.py [--workloads NAME …] [-o FOLDER]

Small models on data that come with scikit-learn or are made here, so that nothing is needed beside
the project. The same sweep of 25 runs as in `outcome.py` on seeds 0 and 1, whose best then meets
the defaults on other seeds. Each workload is also a run: `rhc train benchmarks/others.py:logistic`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from outcome import LRS, SWEPT, TUNING, Results
from torch import Tensor, nn
from torch.nn import functional as F

from rhc.compare.runs import Task
from rhc.workload import Workload
from runners.data import split, tensor_loader
from runners.digits import _load, cross_entropy

SEEDS = tuple(range(200, 206))
METHODS = ("zero-probe", "zero-probe-cosine", "no-rewrite", "rhc", "rhc-probe")
FIRST_LRS = (1e-5, 0.3)


def _workload(
    model: nn.Module,
    loss_fn: object,
    data: tuple[Tensor, ...],
    sizes: tuple[int, int, int],
    optimizer: str,
    steps: int,
    batch: int = 64,
) -> Workload:
    train, validation, test = split(data, sizes)
    return Workload(
        model=model,
        loss_fn=loss_fn,  # type: ignore[arg-type]
        train_loader=tensor_loader(train, batch, shuffle=True),
        val_loader=tensor_loader(validation, sizes[1], shuffle=False),
        test_loader=tensor_loader(test, sizes[2], shuffle=False),
        steps=steps,
        optimizer=optimizer,
        threads=1,
    )


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error of a batch."""
    inputs, targets = batch
    return F.mse_loss(model(inputs), targets)


DIGITS = (1100, 300, 397)


def digits_cnn(*, seed: int = 0, data: Path | None = None) -> Workload:
    """Digits, a CNN without normalisation, AdamW."""
    images, labels = _load()
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    return _workload(model, cross_entropy, (images.view(-1, 1, 8, 8), labels), DIGITS, "adamw", 500)


def digits_noisy(*, seed: int = 0, data: Path | None = None) -> Workload:
    """Digits with a third of the labels at random, a wide MLP, SGD: it over-fits."""
    images, labels = _load()
    own = torch.Generator().manual_seed(5)
    wrong = torch.rand(len(labels), generator=own) < 0.33
    labels = torch.where(wrong, torch.randint(10, labels.shape, generator=own), labels)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    return _workload(model, cross_entropy, (images, labels), DIGITS, "sgd", 600)


def friedman(*, seed: int = 0, data: Path | None = None) -> Workload:
    """Friedman's regression 1 with noise, an MLP of two layers, Adam, mean squared error."""
    from sklearn.datasets import make_friedman1

    x, y = make_friedman1(3000, noise=1.0, random_state=0)
    inputs = torch.tensor(x, dtype=torch.float32) * 2 - 1
    targets = torch.tensor(y, dtype=torch.float32)[:, None]
    targets = (targets - targets.mean()) / targets.std()
    model = nn.Sequential(
        nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
    )
    return _workload(model, squared_error, (inputs, targets), (1500, 500, 1000), "adam", 800)


class _LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(2, 32, batch_first=True), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def gru_adding(*, seed: int = 0, data: Path | None = None) -> Workload:
    """The adding problem of length 20, a GRU, Adam, mean squared error."""
    own = torch.Generator().manual_seed(7)
    values = torch.rand(4000, 20, generator=own)
    marks = torch.zeros(4000, 20)
    first = torch.randint(10, (4000,), generator=own)
    second = torch.randint(10, 20, (4000,), generator=own)
    rows = torch.arange(4000)
    marks[rows, first] = marks[rows, second] = 1
    target = (values * marks).sum(1, keepdim=True)
    inputs = torch.stack([values, marks], 2)
    return _workload(_LastState(), squared_error, (inputs, target), (2500, 500, 1000), "adam", 800)


class _Rows(nn.Module):
    """A transformer that reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, 32), nn.Parameter(0.1 * torch.randn(8, 32))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.view(-1, 8, 8)) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def digits_transformer(*, seed: int = 0, data: Path | None = None) -> Workload:
    """Digits read row by row by a transformer with dropout, AdamW."""
    return _workload(_Rows(), cross_entropy, _load(), DIGITS, "adamw", 600)


def digits_batchnorm(*, seed: int = 0, data: Path | None = None) -> Workload:
    """Digits, an MLP with BatchNorm, SGD, batches of 32."""
    model = nn.Sequential(
        nn.Linear(64, 128, bias=False),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 128, bias=False),
        nn.BatchNorm1d(128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    return _workload(model, cross_entropy, _load(), DIGITS, "sgd", 500, batch=32)


def reconstruction(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error of the image that comes out."""
    return F.mse_loss(model(batch[0]), batch[0])


def autoencoder(*, seed: int = 0, data: Path | None = None) -> Workload:
    """Digits through a bottleneck of 8, Adam, mean squared error."""
    model = nn.Sequential(
        nn.Linear(64, 128),
        nn.ReLU(),
        nn.Linear(128, 8),
        nn.Linear(8, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
    )
    return _workload(model, reconstruction, _load(), DIGITS, "adam", 800)


def logistic(*, seed: int = 0, data: Path | None = None) -> Workload:
    """Breast cancer, logistic regression, SGD: convex, with few data."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    x = (x - x.mean(0)) / x.std(0)
    inputs, labels = torch.tensor(x, dtype=torch.float32), torch.tensor(y)
    model = nn.Linear(30, 2)
    return _workload(model, cross_entropy, (inputs, labels), (300, 100, 169), "sgd", 300, batch=32)


def deep_tanh(*, seed: int = 0, data: Path | None = None) -> Workload:
    """Digits, ten narrow layers of tanh, SGD."""
    layers: list[nn.Module] = [nn.Linear(64, 48), nn.Tanh()]
    for _ in range(8):
        layers += [nn.Linear(48, 48), nn.Tanh()]
    return _workload(
        nn.Sequential(*layers, nn.Linear(48, 10)), cross_entropy, _load(), DIGITS, "sgd", 800
    )


def digits_small_batches(*, seed: int = 0, data: Path | None = None) -> Workload:
    """Digits, an MLP, AdamW, batches of 8."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    return _workload(model, cross_entropy, _load(), DIGITS, "adamw", 1000, batch=8)


WORKLOADS = {
    "digits_cnn": "adam",
    "digits_noisy": "sgd",
    "friedman": "adam",
    "gru_adding": "adam",
    "digits_transformer": "adam",
    "digits_batchnorm": "sgd",
    "autoencoder": "adam",
    "logistic": "sgd",
    "deep_tanh": "sgd",
    "digits_small_batches": "adam",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", choices=tuple(WORKLOADS), default=None)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/outcome/others"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.workloads or WORKLOADS:
        results = Results(Task(f"{__file__}:{name}"), arguments.output / f"{name}.jsonl")
        if not arguments.tables:
            results.run(SWEPT, LRS[WORKLOADS[name]], TUNING)
            best = results.best()
            assert best is not None
            results.run([best[0]], [best[1]], arguments.seeds)
            results.run(arguments.methods, FIRST_LRS, arguments.seeds)
        results.show(arguments.seeds)


if __name__ == "__main__":
    main()

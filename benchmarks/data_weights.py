"""Data weights on MNIST-10k with random labels: test loss, area under the curve, cost.

    python benchmarks/data_weights.py --data DIR --noise 0.4 --seeds 100-104 -o rows.jsonl

7,000 rows to train, of which a share has a random label (with --kind class the next class's),
1,000 to judge by (with --bounded as wrong as those, under 1 − p) and 2,000 to test, with right
labels; MLP 784-128-64-10, SGD with momentum 0.9, or with --model cnn that of `mnist_cnn` and AdamW,
cosine from --lr, 1,500 steps of 64 rows.
Methods: *plain* (all weights 1), *oracle* (the rows whose label is right), *weights* with every
--product, and *replay*: the weights that a run ended with, fixed, from other initial weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import rhc
from rhc.compare.pool import parsed_seeds
from runners.data import read_idx
from runners.mnist_cnn import mnist_cnn

STEPS, BATCH, JUDGED = 1500, 64, 64


def rows_of_loss(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch["sample"] if isinstance(batch, dict) else batch
    return F.cross_entropy(model(x), y, reduction="none")


class Task:
    def __init__(
        self,
        data: Path,
        noise: float,
        seed: int,
        kind: str = "symmetric",
        bounded: bool = False,
        model: str = "mlp",
    ) -> None:
        self.objective = rhc.Objective(rows=rhc.bounded) if bounded else None
        self.model, self.folder = model, data
        x = torch.as_tensor(read_idx(data / "t10k-images-idx3-ubyte.gz")).float()
        x = (x.reshape(-1, 784) / 255 - 0.1307) / 0.3081
        y = torch.as_tensor(read_idx(data / "t10k-labels-idx1-ubyte.gz")).long()
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
        train, held_out, test = order[:7000], order[7000:8000], order[8000:]
        generator = torch.Generator().manual_seed(1000 + seed)

        def spoilt(labels: Tensor) -> Tensor:
            drawn = torch.rand(len(labels), generator=generator) < noise
            given = labels.clone()
            others = torch.randint(10, (int(drawn.sum()),), generator=generator)
            given[drawn] = others if kind == "symmetric" else (labels[drawn] + 1) % 10
            return given

        given = spoilt(y[train])
        self.wrong = given != y[train]
        self.train = rhc.indexed(TensorDataset(x[train], given))
        judged = spoilt(y[held_out]) if bounded else y[held_out]
        self.held_out = TensorDataset(x[held_out], judged)
        self.test = TensorDataset(x[test], y[test])

    def fit(self, seed: int, lr: float, weights: rhc.DataWeights, **options: Any) -> rhc.RunResult:
        torch.manual_seed(seed)
        model: nn.Module = nn.Sequential(
            *(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
        )
        optimizer: torch.optim.Optimizer
        if self.model == "cnn":
            model = mnist_cnn(seed=seed, data=self.folder).model
            optimizer = torch.optim.AdamW(model.parameters(), lr)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
        right = options.pop("rows", None)
        train = self.train if right is None else Subset(self.train, right.tolist())
        return rhc.Runner(
            model,
            optimizer,
            rows_of_loss,
            DataLoader(train, BATCH, shuffle=True, drop_last=True),
            DataLoader(self.held_out, JUDGED, shuffle=True),
            test_loader=DataLoader(self.test, 500),
            start="given",
            template="cosine",
            data_weights=weights,
            objective=self.objective,
            **options,
        ).fit(STEPS)

    def auc(self, weights: Tensor) -> float | None:
        """The area under the curve of weights as a test for right labels."""
        right, wrong = weights[~self.wrong], weights[self.wrong]
        return float((right[:, None] > wrong).float().mean()) if len(wrong) else None


def measured(task: Task, seed: int, lr: float, products: list[str]) -> list[dict[str, Any]]:
    def row(method: str, found: rhc.RunResult, **more: Any) -> dict[str, Any]:
        test, cost = found.test_loss, found.cost["plain_run_equivalents"]
        return {"method": method, "seed": seed, "lr": lr, "test": test, "cost": cost, **more}

    def ones() -> rhc.DataWeights:
        return rhc.DataWeights(7000)

    rows = [row("plain", task.fit(seed, lr, ones(), rewrite=False))]
    known = (~task.wrong).nonzero()[:, 0]
    rows.append(row("oracle", task.fit(seed, lr, ones(), rewrite=False, rows=known)))
    for product in products:
        found = task.fit(seed, lr, ones(), controls=(), product=product)
        assert found.data_weights is not None
        share, spread = (found.record["data_weights"][name] for name in ("share", "spread"))
        auc = task.auc(found.data_weights.values)
        rows.append(row(f"weights, {product}", found, auc=auc, share=share, spread=spread))
        again = task.fit(seed + 1, lr, found.data_weights, rewrite=False)
        rows.append(row(f"replay, {product}", again))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--noise", type=float, default=0.4)
    parser.add_argument("--kind", choices=("symmetric", "class"), default="symmetric")
    parser.add_argument("--bounded", action="store_true")
    parser.add_argument("--model", choices=("mlp", "cnn"), default="mlp")
    parser.add_argument("--seeds", default="100-104")
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--products", nargs="+", default=["exact", "none"])
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for seed in parsed_seeds(arguments.seeds):
        kind, model = arguments.kind, arguments.model
        task = Task(arguments.data, arguments.noise, seed, kind, arguments.bounded, model)
        rows += measured(task, seed, arguments.lr, arguments.products)
        if arguments.output is not None:
            arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"noise {arguments.noise:g}, lr {arguments.lr:g}, seeds {arguments.seeds}")
    print("| method | test loss | each seed | AUC | cost |\n|---|---|---|---|---|")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        losses = [row["test"] for row in own]
        each = " ".join(f"{loss:.3f}" for loss in losses)
        aucs = [row["auc"] for row in own if row.get("auc") is not None]
        auc = f"{statistics.mean(aucs):.3f}" if aucs else ""
        cost = statistics.mean(row["cost"] for row in own)
        print(f"| {method} | {statistics.mean(losses):.3f} | {each} | {auc} | {cost:.2f} |")


if __name__ == "__main__":
    main()

"""The MNIST-10k figures of README.md and docs/log.md: test loss and cost over seeds.

    python benchmarks/mnist.py DIR --method rhc --lr 1e-3 --seeds 10 11 12 13 14

DIR holds the IDX files. Methods: `rhc` (the default law), `constant` and `cosine` (no rewriting,
through the schedule's own lr scheduler).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch

import rhc
from rhc.evaluate import evaluate
from runners.mnist import mnist


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--method", choices=("rhc", "constant", "cosine"), default="rhc")
    parser.add_argument("--optimizer", choices=("sgd", "adamw"), default="sgd")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--window", type=int, default=50)
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = [one(seed, arguments) for seed in arguments.seeds]
    for seed, (loss, cost) in zip(arguments.seeds, found, strict=True):
        print(f"seed {seed}  test loss {loss:.4f}  cost {cost:.2f} plain runs")
    losses = [loss for loss, _ in found]
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    mean = statistics.mean(losses)
    print(f"{arguments.method} lr {arguments.lr:g}: {mean:.4f} (sd {spread:.4f})")


def one(seed: int, arguments: argparse.Namespace) -> tuple[float, float]:
    """(test loss of the final weights, cost in plain runs)."""
    torch.manual_seed(seed)
    workload = mnist(seed=seed, data=arguments.data)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[arguments.optimizer]
    options = {"momentum": 0.9} if arguments.optimizer == "sgd" else {}
    optimizer = kind(workload.model.parameters(), lr=arguments.lr, **options)
    model, loss_fn, train = workload.model, workload.loss_fn, workload.train_loader
    if arguments.method == "rhc":
        runner = rhc.Runner(
            model,
            optimizer,
            loss_fn,
            train,
            workload.val_loader,
            test_loader=workload.test_loader,
            window=arguments.window,
            seed=seed,
        )
        record = runner.fit(arguments.steps).record
        return record["test_loss"], record["cost"]["plain_run_equivalents"]
    progress = torch.arange(arguments.steps, dtype=torch.float64) / arguments.steps
    shape = 0.5 * (1 + torch.cos(torch.pi * progress)) if arguments.method == "cosine" else 1.0
    lr = torch.full((arguments.steps,), arguments.lr, dtype=torch.float64) * shape
    scheduler = rhc.Schedule({"lr": lr}).to_lr_scheduler(optimizer)
    step = 0
    while step < arguments.steps:
        for batch in train:
            optimizer.zero_grad()
            loss, _ = loss_fn(model, batch)
            loss.backward()
            optimizer.step()
            scheduler.step()
            step += 1
            if step == arguments.steps:
                break
    losses = evaluate(rhc.Plant(model, optimizer, loss_fn), workload.test_loader)
    assert losses is not None
    return losses.loss, 1.0


if __name__ == "__main__":
    main()

"""Linear datamodeling score: do derivatives through training predict what half the data would do?

    python benchmarks/attribution.py mlp --data DIR --seeds 100 101 -o mlp.json

Per seed a model is trained, and dJ/dw of every training row taken, for J the losses of test rows at
the end: exactly, with H = 0 (a sum over steps of gradients' products, as TracIn's but with the
optimizer's own memory), and by the gradients' products at the end alone. Then it is trained again
from the same weights on random halves of the rows, each batch without the rows that are left out;
the score of a test row is Spearman's correlation, over the halves, of its loss with what was
predicted, Σ (w_i − 1) dJ/dw_i (Park et al. 2023). Means over rows, with a bootstrap 95 % interval.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import rhc
from rhc.hindsight.attribution import WholeRun
from rhc.hypergradient import schedule_of, steps_of
from rhc.training.objective import Average

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
DATA = Path(os.environ.get("RHC_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


class Task(NamedTuple):
    model: Callable[[], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    losses: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]  # (B,)
    train: tuple[Tensor, ...]
    test: tuple[Tensor, ...]
    batch: int
    steps: int


def mnist(arguments: argparse.Namespace, model: Callable[[], nn.Module]) -> Task:
    from runners.mnist import load_mnist

    train, _, test = load_mnist(arguments.data / "mnist")

    def losses(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y, reduction="none")

    lr = arguments.lr or 0.01
    return Task(
        model,
        lambda p: torch.optim.SGD(p, lr, momentum=0.9),
        losses,
        train,
        test,
        arguments.batch,
        arguments.steps or 500,
    )


def mlp(kind: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), kind(), nn.Linear(128, 64), kind(), nn.Linear(64, 10))


def cnn(kind: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), kind(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.GroupNorm(4, 16), kind(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * 7 * 7, 10),
    )  # fmt: skip


def gpt(arguments: argparse.Namespace) -> Task:
    from runners.char_lm import GPT, char_lm

    workload = char_lm(seed=0, data=arguments.data / "tinyshakespeare")
    loader: Any = workload.train_loader
    (pieces,) = loader.dataset.tensors
    held_out: Any = workload.test_loader
    (test,) = held_out.dataset.tensors
    characters = workload.model.embedding.num_embeddings

    def losses(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        (codes,) = batch
        logits = model(codes[:, :-1])
        each = F.cross_entropy(logits.flatten(0, 1), codes[:, 1:].flatten(), reduction="none")
        return each.view(len(codes), -1).mean(1)

    lr = arguments.lr or 1e-3
    return Task(
        lambda: GPT(characters),
        lambda p: torch.optim.AdamW(p, lr, eps=arguments.eps),
        losses,
        (pieces[:2000],),
        (test,),
        arguments.batch,
        arguments.steps or 400,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("mlp", "cnn", "gpt"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100])
    parser.add_argument("--rows", type=int, default=20, help="test rows, a reverse pass each")
    parser.add_argument("--halves", type=int, default=50)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--eps", type=float, default=1e-8, help="of AdamW")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--relu", action="store_true", help="ReLU in place of GELU")
    parser.add_argument("--average", type=float, help="decay of the average that J is taken at")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {arguments}")
    kind = nn.ReLU if arguments.relu else nn.GELU
    made = {
        "mlp": lambda: mnist(arguments, lambda: mlp(kind)),
        "cnn": lambda: mnist(arguments, lambda: cnn(kind)),
    }
    task = made[arguments.task]() if arguments.task in made else gpt(arguments)
    found = [measured(task, arguments, seed) for seed in arguments.seeds]
    for name in found[0]["scores"]:
        scores = torch.tensor([x for of_seed in found for x in of_seed["scores"][name]])
        print(f"{name:>12}  LDS {interval(scores)}")
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"arguments": vars(arguments), "found": found}, default=str) + "\n"
        )


def measured(task: Task, arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = task.model()
    draw = torch.Generator().manual_seed(seed)
    count = len(task.train[0])
    order: list[Tensor] = []
    while len(order) < task.steps:
        shuffled = torch.randperm(count, generator=draw)
        order += list(shuffled[: count // task.batch * task.batch].split(task.batch))
    batches = order[: task.steps]
    chosen = torch.randperm(len(task.test[0]), generator=draw)[: arguments.rows]
    rows = tuple(t[chosen] for t in task.test)
    halves = torch.stack(
        [torch.randperm(count, generator=draw) < count // 2 for _ in range(arguments.halves)]
    )

    def trained(kept: Tensor | None) -> tuple[nn.Module, Tensor]:
        own = copy.deepcopy(model)
        optimizer = task.optimizer(own.parameters())
        average = Average(arguments.average)
        for index in batches:
            index = index if kept is None else index[kept[index]]
            if len(index):
                optimizer.zero_grad()
                task.losses(own, tuple(t[index] for t in task.train)).mean().backward()
                optimizer.step()
            if arguments.average:
                average.update(list(own.parameters()))
        if arguments.average:
            with torch.no_grad():
                for p, value in zip(own.parameters(), average.values or [], strict=True):
                    p.copy_(value)
        with torch.no_grad():
            return own, task.losses(own.eval(), rows).double()

    start = time.perf_counter()
    final, whole = trained(None)
    plain = time.perf_counter() - start
    actual = torch.stack([trained(kept)[1] for kept in halves])
    derivatives = {"at the end": at_the_end(task, final, rows)}
    seconds: dict[str, float] = {"plain": plain}
    for name, product in (("exact", "exact"), ("H = 0", "none")):
        start = time.perf_counter()
        found = rhc.attribute(
            model,
            task.optimizer(model.parameters()),
            lambda m, index: task.losses(m, tuple(t[index] for t in task.train)),
            batches,
            [
                lambda m, i=i: task.losses(m, tuple(t[i : i + 1] for t in rows)).mean()
                for i in range(len(chosen))
            ],
            data_weights=rhc.DataWeights(count, lambda index: index),
            average=arguments.average,
            product=product,
            memory_budget=1_000_000_000,
        )
        seconds[name] = time.perf_counter() - start
        derivatives[name] = found.derivatives
        apart = float((found.values - whole).abs().max())
        print(
            f"seed {seed} {name}: {seconds[name]:.1f} s, {seconds[name] / plain:.1f} plain runs, "
            f"values apart {apart:.1e}, {found.results[0][0]}",
            flush=True,
        )
    moved = halves.double() - 1
    scores = {
        name: [spearman(moved @ d[m], actual[:, m]) for m in range(len(chosen))]
        for name, d in derivatives.items()
    }
    for name, of_rows in scores.items():
        print(f"seed {seed} {name}: {interval(torch.tensor(of_rows))}", flush=True)
    test = whole_loss(task, final)
    smooth = metasmoothness(task, model, batches, arguments.average)
    print(f"seed {seed}: test loss {test:.4f}, metasmoothness {smooth:.3f}", flush=True)
    return {
        "seed": seed,
        "test_loss": test,
        "metasmoothness": smooth,
        "scores": scores,
        "seconds": seconds,
        "losses": whole.tolist(),
    }


def metasmoothness(
    task: Task, model: nn.Module, batches: Sequence[Tensor], average: float | None
) -> float:
    """Over the losses of 300 test rows, along two directions of the weights."""
    weights = rhc.DataWeights(len(task.train[0]), lambda index: index)
    plant = rhc.Plant(
        model,
        task.optimizer(model.parameters()),
        lambda m, index: task.losses(m, tuple(t[index] for t in task.train)),
        data_weights=weights,
    )
    steps = steps_of(batches, 1)
    run = WholeRun(plant, steps, schedule_of(plant, {}, len(steps), 0), average)
    rows = tuple(t[:300] for t in task.test)
    return run.smoothness(lambda m: task.losses(m, rows), 2).metasmoothness


@torch.no_grad()
def whole_loss(task: Task, model: nn.Module) -> float:
    pieces = zip(*(t.split(500) for t in task.test), strict=True)
    return float(torch.cat([task.losses(model, batch) for batch in pieces]).mean())


def at_the_end(task: Task, model: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
    """(M, n) −⟨∇ℓ_i, ∇J_m⟩ at the trained weights: one step's influence, but for the lr."""
    parameters = list(model.parameters())
    found = []
    for m in range(len(rows[0])):
        loss = task.losses(model, tuple(t[m : m + 1] for t in rows)).mean()
        direction = torch.autograd.grad(loss, parameters)
        of_rows = []
        for index in torch.arange(len(task.train[0])).split(200):
            w = torch.ones(len(index), requires_grad=True)
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                losses = task.losses(model, tuple(t[index] for t in task.train))
            gradient = torch.autograd.grad((w * losses).sum(), parameters, create_graph=True)
            along = sum((g * v).sum() for g, v in zip(gradient, direction, strict=True))
            of_rows.append(torch.autograd.grad(along, w)[0])
        found.append(-torch.cat(of_rows).double())
    return torch.stack(found)


def spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def interval(scores: Tensor) -> str:
    draws = torch.randint(
        len(scores), (2000, len(scores)), generator=torch.Generator().manual_seed(0)
    )
    low, high = (
        scores[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=scores.dtype)).tolist()
    )
    return f"{float(scores.mean()):.3f} [{low:.3f}, {high:.3f}], lowest {float(scores.min()):.3f}"


if __name__ == "__main__":
    main()

"""What ranks do in tests: `python rank_programs.py FUNCTION [ARGUMENT …]`, one process per rank.

Each function returns what JSON can say, which is printed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from problems import OPTIMIZERS, Problem, cnn, mlp, steered, transformer
from runs import Stop, make_run, stop_at_step
from runs import classify as classify_with_accuracy
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import rhc
import rhc.runner
from rhc.distributed import leave, ranks_of
from rhc.errors import InputError
from rhc.events import Committed, Notice
from rhc.training.plant import Plant

STEPS = 5
STEP = {"lr": 1.0, "noise": 3.0, "momentum": 0.1}

SHARED: dict[str, Any] = {
    "optimizer": "adamw",
    "norm": False,
    "product": "forward-difference",
    "clip_norm": 0.5,
    "validate_every": 10,
    "keep_best": True,
}


def normed(dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """6-8-3 with BatchNorm over the rows of all ranks."""
    problem = mlp(dtype, seed)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.SyncBatchNorm(8), nn.Tanh(), nn.Linear(8, 3)
    ).to(dtype)
    return problem._replace(model=model)


PROBLEMS = {"mlp": mlp, "cnn": cnn, "transformer": transformer, "normed": normed}


def rows(batch: Any, first: int, stop: int) -> Any:
    return tuple(t[first:stop] for t in batch)


def single(name: str) -> nn.Module:
    """The problem's model for one process: BatchNorm in place of its synchronised form."""
    model = PROBLEMS[name]().model
    for i, layer in enumerate(model.children()):
        if isinstance(layer, nn.SyncBatchNorm):
            plain = nn.BatchNorm1d(layer.num_features, dtype=torch.float64)
            model[i] = plain  # type: ignore[index]
    return model


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def hypergradients(
    name: str, optimizer: str, product: str, uneven: str, *, alone: bool = False
) -> dict[str, Any]:
    """Of a window of STEPS steps, on this rank's rows or (alone) on all."""
    problem = PROBLEMS[name]()
    model = without_dropout(single(name) if alone else problem.model)
    opt = OPTIMIZERS[optimizer](model.parameters())
    batches = problem.batches(STEPS)
    held_out = problem.batches(1)[0]
    ranks = None
    if not alone:
        from rhc.distributed import ranks_of

        ranks = ranks_of("auto")
        assert ranks is not None
        r, n = ranks.rank, ranks.size
        total = len(batches[0][0])
        cuts = [total * k // n for k in range(n + 1)]
        if uneven == "uneven":
            cuts[1] -= 1
        batches = [rows(b, cuts[r], cuts[r + 1]) for b in batches]
        total = len(held_out[0])
        held_out = rows(held_out, total * r // n, total * (r + 1) // n)

    def terminal(model: nn.Module) -> Tensor:
        loss = problem.loss_fn(model, held_out)
        return loss[0] if isinstance(loss, tuple) else loss

    if name == "normed":  # what it reads of running statistics depends on every step
        plain = terminal

        def terminal(model: nn.Module) -> Tensor:
            model.eval()
            return plain(model)

    h = rhc.hypergradient(
        model,
        opt,
        problem.loss_fn,
        batches,
        controls={k: v for k, v in steered(opt, STEPS).items()},
        terminal=terminal,
        average=0.9,
        product=product,
    )
    return {
        "value": h.value,
        "grad": {k: v.tolist() for k, v in h.grad.items()},
        "norms": h.costate_norms.tolist(),
        "result": h.result.name,
    }


def many_hypergradients(cases: str) -> list[dict[str, Any]]:
    """Of every case in a JSON list."""
    return [hypergradients(*case) for case in json.loads(cases)]


def trained(
    optimizer: str,
    directory: str = "",
    *,
    rewrite: bool = True,
    steps: int = 50,
    alone: bool = False,
    dropout: float = 0.0,
    loader: str = "shuffled",
    loss_fn: Any = None,
    synchronise: bool = True,
    wrap: bool = False,
    share_out: bool = False,
    norm: bool = True,
    seen: Callable[[nn.Module], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """A run of five windows in float64, on all rows or this rank's: what it ends with."""
    run = make_run(optimizer, loader, dropout=dropout, norm=norm)
    model = run.model.double()
    if share_out:
        fully_shard(model[0])  # type: ignore[index]
        fully_shard(model)
    if seen is not None:
        seen(model[0])  # type: ignore[index]
    if not alone and synchronise and norm:
        model[1] = nn.SyncBatchNorm.convert_sync_batchnorm(model[1])  # type: ignore[index]
    optimizer_ = OPTIMIZERS[optimizer](model.parameters())
    result = rhc.Runner(
        nn.parallel.DistributedDataParallel(model) if wrap else model,
        optimizer_,
        loss_fn or doubled,
        run.train,
        run.val,
        window=settings.pop("window", 10),
        controls=("lr", "noise", *(() if norm else ("momentum",))) if rewrite else None,
        start="given",
        rewrite=rhc.Rewrite(step=STEP, accept=False) if rewrite else False,
        directory=directory or None,
        **settings,
    ).fit(steps)
    return {
        "parameters": [whole(p.detach()).flatten().tolist() for p in model.parameters()],
        "buffers": [b.flatten().tolist() for b in model.buffers()],
        "schedule": {k: v.tolist() for k, v in result.schedule.values.items()},
        "windows": [w["outcome"] for w in result.windows],
        "losses": {k: v for k, v in result.record.items() if k.endswith("_loss")},
        "best_step": result.record["best_step"],
        "tape": result.tape,
    }


def doubled(model: nn.Module, batch: Any) -> Any:
    return classify_with_accuracy(model, (batch[0].double(), batch[1]))


def shared_out(*, alone: bool = False) -> dict[str, Any]:
    """Hypergradients of models whose parameters are shared out by fully_shard, or are whole."""
    found: dict[str, Any] = {}
    for name, optimizer, product in (
        ("mlp", "adamw", "central-difference"),
        ("transformer", "momentum", "auto"),
        ("clipped", "adamw", "central-difference"),
        ("limited", "momentum", "central-difference"),
    ):
        problem = PROBLEMS.get(name, mlp)()
        clips = {"clipped": {"clip_norm": 0.3}, "limited": {"clip_value": 0.02}}.get(name, {})
        noisy = name in ("clipped", "limited")
        model = without_dropout(problem.model)
        batches = problem.batches(STEPS)
        if not alone:
            for child in model.children():
                if len(list(child.parameters())):
                    fully_shard(child)
            fully_shard(model)
            r, n = dist.get_rank(), dist.get_world_size()
            size = len(batches[0][0])
            batches = [rows(b, size * r // n, size * (r + 1) // n) for b in batches]
        opt = OPTIMIZERS[optimizer](model.parameters())
        for _ in range(2):  # the second time the optimizer has its slots
            before = [p.detach().clone() for p in model.parameters()]
            h = rhc.hypergradient(
                model,
                opt,
                problem.loss_fn,
                batches,
                controls={k: v for k, v in steered(opt, STEPS).items() if noisy or k != "noise"},
                **clips,
                terminal=problem.terminal,
                average=0.9,
                product="exact" if alone else product,
            )
            for p, kept in zip(model.parameters(), before, strict=True):
                assert all(map(torch.equal, *[[local(t)] for t in (p, kept)]))
            loss = problem.loss_fn(model, batches[0])
            opt.zero_grad()
            loss.backward()
            opt.step()
        found[name] = {
            "value": h.value,
            "grad": {k: v.tolist() for k, v in h.grad.items()},
            "norms": h.costate_norms.tolist(),
            "result": h.result.name,
            "why": h.why,
        }
    if not alone:
        found["refused"] = []
        for settings in ({"product": "exact"},):
            try:
                rhc.hypergradient(
                    model, opt, problem.loss_fn, batches, controls={"lr": 0.1}, **settings
                )
            except InputError as error:
                found["refused"].append(str(error))
    return found


def shared_runs(directory: str) -> list[dict[str, Any]]:
    """A run of a model that is shared out; and one that is stopped, and goes on."""
    with contextlib.suppress(Stop):
        trained(directory=directory, share_out=True, listeners=[stop_at_step(25)], **SHARED)
    return [
        trained(share_out=True, **SHARED),
        trained(directory=directory, share_out=True, **SHARED),
    ]


def shared_until(directory: str, step: str) -> dict[str, Any] | None:
    """A run of a model that is shared out, up to its end or the window before a step."""
    with contextlib.suppress(Stop):
        stop = [stop_at_step(int(step))]
        return trained(directory=directory, share_out=True, listeners=stop, **SHARED)
    return None


def refused_once(directory: str) -> dict[str, Any]:
    """A run of a model that is shared out, where a disk takes one checkpoint of rank 1 in part."""
    heard: list[str] = []
    with _disk(lambda: dist.get_rank() == 1, _full):
        run = trained(directory=directory, share_out=True, listeners=[_notices(heard)], **SHARED)
    return {"run": run, "notices": heard}


def killed(directory: str) -> None:
    """A run of a model that is shared out, in which rank 1 dies while it writes a checkpoint."""
    with _disk(lambda: dist.get_rank() == 1, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        trained(directory=directory, share_out=True, **SHARED)


def _full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@contextlib.contextmanager
def _disk(here: Callable[[], bool], fault: Callable[[], None]) -> Iterator[None]:
    """What this rank writes of its third checkpoint ends in a fault, in the middle of the file."""
    opened = FileSystem.create_stream
    count = [0]

    @contextlib.contextmanager
    def opening(self: Any, path: Any, mode: str) -> Iterator[Any]:
        with opened(self, path, mode) as stream:
            count[0] += mode == "wb"
            if mode == "wb" and here() and count[0] == 3:
                stream.write(b"half of it")
                stream.flush()
                fault()
            yield stream

    FileSystem.create_stream = opening
    try:
        yield
    finally:
        FileSystem.create_stream = opened


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def many_runs(cases: str) -> list[dict[str, Any]]:
    """Of every case in a JSON list."""
    return [trained(**case) for case in json.loads(cases)]


def counted() -> dict[str, list[int]]:
    """product -> elements that go between ranks in a window of 4 and of 12 steps; "size": of θ."""
    found: dict[str, list[int]] = {}
    elements = 0
    for name in ("all_reduce", "all_gather", "broadcast"):
        whole = getattr(dist, name)

        def counting(first: Any, *rest: Any, whole: Any = whole, **options: Any) -> Any:
            nonlocal elements
            tensors = first if isinstance(first, list) else [first]
            elements += sum(t.numel() for t in tensors)
            return whole(first, *rest, **options)

        setattr(dist, name, counting)
    problem = transformer()
    optimizer = OPTIMIZERS["adamw"](problem.model.parameters())
    found["size"] = [sum(p.numel() for p in problem.model.parameters())]
    found["tensors"] = [len(list(problem.model.parameters()))]
    for product in ("exact", "forward-difference"):
        found[product] = []
        for steps in (4, 12):
            batches = problem.batches(steps)
            elements = 0
            rhc.hypergradient(
                problem.model,
                optimizer,
                problem.loss_fn,
                batches,
                controls={"lr": 0.01},
                terminal=problem.terminal,
                product=product,
                verify=False,  # its plain steps would be counted too
            )
            found[product].append(elements)
    return found


def halted(directory: str) -> None:
    """A run that ends in its third window, with two of them saved."""
    with contextlib.suppress(Stop):
        trained("sgd", directory, listeners=[stop_at_step(25)])


def goes_on(directory: str) -> dict[str, Any]:
    return trained("sgd", directory)


def faults(directory: str) -> dict[str, Any]:
    """What becomes of runs in which one rank is not as the others: error or windows, by name."""
    rank = dist.get_rank()
    found: dict[str, Any] = {}

    def error(name: str, **settings: Any) -> None:
        try:
            trained("sgd", **settings)
            found[name] = "nothing"
        except (InputError, RuntimeError) as raised:
            found[name] = f"{type(raised).__name__}: {raised}"

    found["absent"] = absent(rank)
    error("configuration", window=10 + rank, product="none", steps=20)
    versions = rhc.runner.versions
    rhc.runner.versions = lambda: versions() | {"torch": f"2.1{rank}"}
    error("versions", product="none", steps=20)
    rhc.runner.versions = versions

    moved: list[Any] = []

    def move(event: Any) -> None:
        if isinstance(event, Committed) and event.stop == 20 and rank == 1:
            with torch.no_grad():
                moved[0].weight[0, 0] += 1e-9

    error("parameters", listeners=[move], seen=moved.append, product="none")
    error("threshold", listeners=[], seen=moved.append, product="none", clip_norm=1.0 + rank)

    calls = [0]

    def poisoned(model: nn.Module, batch: Any) -> Any:
        loss, metrics = doubled(model, batch)
        calls[0] += model.training
        return (loss * math.nan if rank == 1 and calls[0] == 6 else loss), metrics

    run = trained("sgd", loss_fn=poisoned, directory=directory, product="exact")
    found["nan"] = {"windows": run["windows"], "losses": run["losses"]}
    heard: list[str] = []
    settings: dict[str, Any] = {"synchronise": False, "steps": 20, "loader": "drop_last"}
    wrapped = trained("sgd", wrap=True, listeners=[_notices(heard)], **settings)
    found["ddp"] = {"same": wrapped == trained("sgd", **settings), "notices": heard}
    heard = []
    found["sampler"] = sampled()

    def late(model: nn.Module, batch: Any) -> Any:
        time.sleep(0.01 * rank)
        return doubled(model, batch)

    slow = trained("sgd", loss_fn=late, steps=10, product="none")
    found["straggler"] = slow == trained("sgd", steps=10, product="none")
    heard = []
    trained("sgd", listeners=[_notices(heard)], synchronise=False, steps=10, loader="drop_last")
    found["statistics"] = heard
    found["drawn"] = torch.rand(3).tolist()
    return found


def absent(rank: int) -> list[Any]:
    """The gradients of three parameters: one that rank 0 does not use, one of both, one unused."""
    model = nn.ParameterList([nn.Parameter(torch.ones(1)) for _ in range(3)])

    def loss_fn(model: Any, scale: float) -> Tensor:
        loss = scale * model[1].sum()
        return loss + 4 * model[0].sum() if rank else loss

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plant = Plant(model, optimizer, loss_fn, ranks=ranks_of("auto"))
    plant.backward(1.0 + 2 * rank)
    return [None if p.grad is None else p.grad.tolist() for p in model]


def _notices(heard: list[str]) -> Callable[[Any], None]:
    return lambda event: heard.append(event.message) if isinstance(event, Notice) else None


def sampled(*, alone: bool = False) -> list[float]:
    """Losses of a run whose loader shards itself, or of one process with the same rows a step."""
    run = make_run("sgd", dropout=0.0, norm=False)
    data = run.train.dataset  # type: ignore[attr-defined]
    if alone:
        order = [*range(len(data)), 0]  # DistributedSampler repeats, to share evenly
        batches = [order[i : i + 8] for i in range(0, len(order), 8)]
        loader = DataLoader(data, batch_sampler=batches)
    else:
        sampler = DistributedSampler(data, shuffle=False)
        loader = DataLoader(data, 4, sampler=sampler)
    result = rhc.Runner(
        run.model,
        run.optimizer,
        run.loss_fn,
        loader,
        run.val,
        window=5,
        start="given",
        product="exact",
    ).fit(20)
    return [row["loss"] for row in result.tape]


def replayed(*, share_out: bool) -> list[Any]:
    """How the first window replays where all is well, and where rank 1 counts in the dark."""
    found = []
    for hidden in (False, True):
        run = make_run("sgd", norm=False, dropout=0.0)
        if share_out:
            for layer in (*run.model, run.model):
                if any(True for _ in layer.parameters()):
                    fully_shard(layer)
            run = run._replace(optimizer=torch.optim.SGD(run.model.parameters(), lr=0.05))
        count = [0]

        def loss_fn(
            model: nn.Module, batch: Any, hidden: bool = hidden, count: list[int] = count
        ) -> Any:
            loss, metrics = classify_with_accuracy(model, batch)
            count[0] += 1
            odd = hidden and dist.get_rank() == 1
            return loss * (1 + 1e-3 * (count[0] % 7) * odd), metrics

        run = run._replace(loss_fn=loss_fn)
        product: Any = "forward-difference" if share_out else "none"
        runner = rhc.Runner(
            *run, window=4, start="given", rewrite=rhc.Rewrite(accept=False), product=product
        )
        result = runner.fit(8)
        found.append([result.replay, [w["outcome"] for w in result.windows]])
    return found


def row_losses(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, dict):
        batch = batch["sample"]
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def weighed(*, alone: bool = False) -> dict[str, Any]:
    """dJ/dw of data weights, and a run that moves them, on all rows or this rank's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(42, 4, dtype=torch.float64)
    right = x[:, :3].argmax(1)
    y = torch.cat([right[:14] + 1, right[14:]]) % 3  # a third of them is wrong
    index = torch.arange(42)
    batches = [(x[i : i + 7], y[i : i + 7], index[i : i + 7]) for i in range(0, 28, 7)]
    if not alone:
        cut = (0, 4, 7)[dist.get_rank() : dist.get_rank() + 2]
        batches = [rows(batch, *cut) for batch in batches]
    values = torch.linspace(0.5, 1.5, 42, dtype=torch.float64)
    found: dict[str, Any] = {}
    for product in ("exact", "forward-difference", "none"):
        h = rhc.hypergradient(
            model,
            torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
            row_losses,
            batches,
            controls={"lr": 0.1},
            data_weights=rhc.DataWeights(42, lambda batch: batch[2], values=values),
            terminal=lambda m: row_losses(m, (x, y)).mean(),
            product=product,
        )
        found[product] = [h.value, *h.grad["data_weights"].tolist()]
        found[product + " ended"] = h.result.name
    result = rhc.Runner(
        model,
        torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
        row_losses,
        DataLoader(rhc.indexed(torch.utils.data.TensorDataset(x, y)), 8, shuffle=True),
        DataLoader(torch.utils.data.TensorDataset(x, right), 16),
        window=5,
        start="given",
        controls=(),
        data_weights=rhc.DataWeights(42, values=torch.ones(42, dtype=torch.float64)),
    ).fit(60)
    assert result.data_weights is not None
    found["weights"] = result.data_weights.values.tolist()
    found["losses"] = [row["loss"] for row in result.tape]
    return found


def passed(folder: str | None = None) -> dict[str, Any]:
    """A run that a pass rewrites as a whole, on all ranks or alone, judged by one batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(60, 4, dtype=torch.float64)
    data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    result = rhc.Runner(
        model,
        torch.optim.SGD(model.parameters(), 0.02, momentum=0.9),
        lambda module, batch: row_losses(module, batch).mean(),
        DataLoader(data, 8, shuffle=True),
        DataLoader(torch.utils.data.TensorDataset(*data[:21]), 21),
        window=5,
        start="given",
        passes=1,
        directory=folder,
    ).fit(20)
    lines = [
        [line[name] for name in ("kept", "predicted_change", "held_out_after")]
        for line in result.passes
    ]
    return {"passes": lines, "losses": [row["loss"] for row in result.tape]}


def everything(cases: str, runs: str, folder: str) -> dict[str, Any]:
    """All that two ranks are asked for by the quick tests: starting processes takes longest."""
    found = {
        "hypergradients": many_hypergradients(cases),
        "runs": many_runs(runs),
        "weighed": weighed(),
        "passed": passed(f"{folder}/passed"),
        "faults": faults(f"{folder}/faults"),
        "shared_out": shared_out(),
        "shared_runs": shared_runs(f"{folder}/shared"),
        "refused_once": refused_once(f"{folder}/refused"),
    }
    found["replays"] = [replayed(share_out=share) for share in (False, True)]
    shared_until(f"{folder}/shared_halted", "25")
    halted(f"{folder}/halted")
    return found | {"counted": counted()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    dist.destroy_process_group()
    print("ended", file=sys.stderr)
    leave(0)

"""What ranks do in tests: `python rank_programs.py FUNCTION [ARGUMENT …]`, one process per rank.

Each function returns what JSON can say, which is printed.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from problems import OPTIMIZERS, Problem, cnn, mlp, steered, transformer
from runs import classify as classify_with_accuracy
from runs import make_run
from torch import Tensor, nn

import rhc
from rhc.distributed import leave

STEPS = 5


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
    **settings: Any,
) -> dict[str, Any]:
    """A run of five windows in float64, on all rows or this rank's: what it ends with."""
    run = make_run(optimizer, dropout=0.0)
    model = run.model.double()
    if not alone:
        model[1] = nn.SyncBatchNorm.convert_sync_batchnorm(model[1])  # type: ignore[index]
    optimizer_ = OPTIMIZERS[optimizer](model.parameters())
    result = rhc.Runner(
        model,
        optimizer_,
        doubled,
        run.train,
        run.val,
        window=10,
        controls=("lr", "noise") if rewrite else None,
        start="given",
        rewrite=rhc.Rewrite(step={"lr": 1.0, "noise": 3.0}, accept=False) if rewrite else False,
        directory=directory or None,
        **settings,
    ).fit(steps)
    return {
        "parameters": [p.detach().flatten().tolist() for p in model.parameters()],
        "buffers": [b.flatten().tolist() for b in model.buffers()],
        "schedule": {k: v.tolist() for k, v in result.schedule.values.items()},
        "windows": [w["outcome"] for w in result.windows],
        "losses": {k: v for k, v in result.record.items() if k.endswith("_loss")},
        "tape": result.tape,
    }


def doubled(model: nn.Module, batch: Any) -> Any:
    return classify_with_accuracy(model, (batch[0].double(), batch[1]))


def many_runs(cases: str) -> list[dict[str, Any]]:
    """Of every case in a JSON list."""
    return [trained(**case) for case in json.loads(cases)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
    dist.destroy_process_group()
    print("ended", file=sys.stderr)
    leave(0)

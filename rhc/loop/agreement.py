"""Ranks that train together: equal at the start, and compared after every window."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import Any, TextIO
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from rhc.distributed import (
    RankLoader,
    Ranks,
    RanksDiffer,
    SyncBatchNorm,
    Unshared,
    is_dtensor,
    joined,
)
from rhc.errors import InputError, plain
from rhc.loop.fit import Fit
from rhc.rng import mixed_seed, seed_everything
from rhc.schedulers import EpochPlanner
from rhc.training import interrupts
from rhc.training.batches import batch_size
from rhc.training.objective import Objective
from rhc.training.plant import Plant

_OF_ONE_RANK = ("hardware", "device", "data", "code")
"""Entries of config.json in which ranks may differ."""

_OF_ONE_LEDGER = ("peak_memory_bytes",)


def as_rank(command: Callable[[], int]) -> int:
    """The exit status of a command under torchrun, printed on the first rank only: 1 where ranks
    were lost or differ, so that torchrun may restart it."""
    with joined() as ranks:
        assert ranks is not None
        try:
            with open(os.devnull, "w") as nowhere, _silent(None if ranks.first else nowhere):
                return command()
        except Unshared:
            if ranks.first:
                raise
            return 2
        except InputError as error:
            if ranks.first:
                raise
            print(plain(f"rhc: error: rank {ranks.rank}: {error}"), file=sys.stderr)
            return 2
        except RanksDiffer as error:
            if ranks.first:
                print(plain(f"rhc: error: {error}"), file=sys.stderr)
            return 1
        except RuntimeError as error:
            if not _disconnected(error):
                raise
            print(
                f"rhc: error: rank {ranks.rank} has lost another rank; look at what that one said "
                "last, and start again to go on from the last checkpoint",
                file=sys.stderr,
            )
            return 1


@contextmanager
def _silent(nowhere: TextIO | None) -> Iterator[None]:
    if nowhere is None:
        yield
        return
    with redirect_stdout(nowhere):
        yield


def _disconnected(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("Connection closed by peer", "Connection reset", "gloo/transport")
    )


def check_ranks(planner: EpochPlanner | None, objective: Objective | None) -> None:
    """Raises InputError for settings that need a single process."""
    if planner is not None and planner.samples:
        raise InputError(
            "a LossSampler sees the examples of one process only; leave it out of the planner, or "
            "train with one process"
        )
    if objective is not None and objective.reward_weight and objective.reward is not None:
        raise InputError(
            "objective.reward is a function of one process's loss and metrics, which is not the "
            "mean over ranks; return metrics['reward'] from loss_fn instead"
        )


def loaders_of(ranks: Ranks, *loaders: Iterable[Any] | None) -> list[Any]:
    names = ("train_loader", "val_loader", "test_loader")
    return [
        None if loader is None else RankLoader(loader, ranks, batch_size, name)
        for loader, name in zip(loaders, names, strict=True)
    ]


def begin_together(plant: Plant, description: Mapping[str, Any], *, wrapped: bool) -> list[str]:
    """Checks that ranks have equal descriptions, shapes and slots; copies the first one's state.
    Returns what a person should know."""
    ranks = plant.ranks
    assert ranks is not None
    described = {k: v for k, v in description.items() if k not in _OF_ONE_RANK}
    shapes = {n: [list(p.shape), str(p.dtype)] for n, p in plant.model.named_parameters()}
    ranks.check_same(
        {
            **described,
            "model": shapes,
            "slots": [sorted(plant.optimizer.state.get(p, {})) for p in plant.parameters],
        }
    )
    ranks.broadcast_(
        [t for t in (*plant.model.parameters(), *plant.model.buffers()) if not is_dtensor(t)]
    )
    ranks.share_random_state()
    notices = []
    if wrapped:
        notices.append(
            "the module inside DistributedDataParallel is trained, and its gradients are averaged "
            "here: so products with the Hessian can be averaged too"
        )
    plant.parallel.find_statistics()
    own = _own_statistics(plant.model)
    if own:
        notices.append(
            f"{own} normalises by the rows of each rank alone: N ranks are not one process with "
            "all rows; torch.nn.SyncBatchNorm.convert_sync_batchnorm makes them one"
        )
    return notices


def draw_apart(ranks: Ranks) -> None:
    """Gives every rank a random stream of its own inside the model, such as for dropout."""
    seed = int(torch.initial_seed() % 2**31)
    if not ranks.first:
        seed_everything(mixed_seed(seed, ranks.rank) % 2**31)


def agreed(fit: Fit) -> bool:
    """Whether some rank was asked to stop; RanksDiffer where their windows ended differently."""
    state, ranks, length = fit.state, fit.plant.ranks, fit.window
    assert ranks is not None
    cost = {k: v for k, v in asdict(state.cost).items() if k not in _OF_ONE_LEDGER}
    decided = [state.step, state.correction, asdict(state.patience), asdict(state.antithetic)]
    decided += [cost, asdict(state.fallback)]
    committed = [row for row in state.tape[-length:] if row["step"] >= 0]
    names, ahead = state.schedule.names, min(state.step + length, state.steps)
    planned = state.schedule.window(state.step, ahead).values if state.step < ahead else {}
    parts = {
        "schedule": [
            [[row[name] for name in names] for row in committed],
            {name: values.tolist() for name, values in planned.items()},
        ],
        "decisions": decided,
        "losses": [[row["step"], row["loss"], row["gradient_norm"]] for row in committed],
        "parameters": fit.plant.parallel.parameter_norms(),
    }
    window = state.cost.windows - 1
    now = time.monotonic()
    since, waited_before, known = _CLOCK.get(ranks, (state.began, 0.0, frozenset[int]()))
    stop, waited = ranks.agree(
        {name: json.dumps(part, default=str).encode() for name, part in parts.items()},
        f"window {window} (up to step {state.step})",
        interrupts.asked(),
        ranks.waited - waited_before,
    )
    slow = straggler(waited, now - since)
    if slow is not None and slow not in known:
        fit.events.notice(
            f"rank {slow} keeps the others waiting, {max(waited):.2g} of {now - since:.2g} s in "
            f"window {window}: look at its machine, its data and who else computes there"
        )
        known |= {slow}
    _CLOCK[ranks] = time.monotonic(), ranks.waited, known
    return stop


_CLOCK: WeakKeyDictionary[Ranks, tuple[float, float, frozenset[int]]] = WeakKeyDictionary()
"""End of the last window, seconds waited until then, and ranks already named by a notice."""


def straggler(waited: Sequence[float], seconds: float) -> int | None:
    """The rank that waits < 10 % of the time while all others wait > 50 % of it."""
    least, *others = sorted(waited)
    if least < 0.1 * seconds and others[0] > 0.5 * seconds:
        return list(waited).index(least)
    return None


def _own_statistics(model: nn.Module) -> str | None:
    """The first BatchNorm layer whose statistics are of one rank's rows."""
    for name, module in model.named_modules():
        together = isinstance(module, (SyncBatchNorm, nn.SyncBatchNorm))
        if isinstance(module, _BatchNorm) and not together:
            return f"{name or 'the model'} ({type(module).__name__})"
    return None

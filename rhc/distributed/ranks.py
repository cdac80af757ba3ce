"""The ranks of a run: a torch.distributed process group and means over it.

J = mean_r J_r, so gradients and hvps are means over ranks: one bucketed all-reduce of the
gradient's size each. Other messages are a few numbers per step, and JSON (no pickled objects).
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.autograd import Function

from rhc.errors import InputError, StorageError
from rhc.rng import RandomState
from rhc.storage.files import differences

Group = dist.ProcessGroup | None | Literal["auto"]
"""A process group; None for one process; "auto" for the default group, if it has several."""

BUCKET_BYTES = 25 * 2**20
"""As in DistributedDataParallel."""

TIMEOUT = timedelta(minutes=30)
"""Longest wait for other ranks; a dead rank is noticed at once."""


class RanksDiffer(RuntimeError):
    """Ranks disagree; the message names rank, window and difference."""


class Unshared(InputError):
    """An InputError raised on all ranks, to be printed by one."""


class Ranks:
    """This process's rank and the collectives of its group."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.sent = 0
        """Elements all-reduced by this rank."""
        self.waited = 0.0
        """Seconds spent waiting; 0 on accelerators, where the host does not wait."""
        self.counted = True
        """False while the rows evaluated are a stand-in for an empty shard."""
        nccl_only = "gloo" not in str(dist.get_backend(group)).lower()
        self.device = torch.device("cuda" if nccl_only and torch.cuda.is_available() else "cpu")

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self

    @property
    def first(self) -> bool:
        return self.rank == 0

    # Means ---------------------------------------------------------------------------------------

    def means(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Means over ranks as new tensors; shapes must agree."""
        result: list[Tensor | None] = [None] * len(tensors)
        pending = []
        for indices in buckets(tensors):
            flat = torch.cat([tensors[i].detach().reshape(-1) for i in indices])
            pending.append((indices, flat, self.begin(flat)))
        for indices, flat, work in pending:
            self.finish(work, flat)
            parts = flat.split([tensors[i].numel() for i in indices])
            for i, part in zip(indices, parts, strict=True):
                result[i] = part.view(tensors[i].shape)
        return [t for t in result if t is not None]

    def value(self, number: Tensor) -> Tensor:
        flat = number.detach().double().reshape(1).clone()
        self.finish(self.begin(flat), flat)
        return flat.to(number.dtype).reshape(())

    def sums(self, numbers: Sequence[float]) -> list[float]:
        found = self.sum(torch.tensor(numbers, dtype=torch.float64, device=self.device))
        return [float(x) for x in found.tolist()]

    def sum(self, tensor: Tensor) -> Tensor:
        flat = tensor.detach().contiguous().clone()
        self._wait(self.begin(flat))
        return flat

    def begin(self, flat: Tensor) -> Any:
        """Starts an in-place all-reduce; returns the handle for `finish`."""
        self.sent += flat.numel()
        return dist.all_reduce(flat, group=self.group, async_op=True)

    def finish(self, work: Any, flat: Tensor) -> None:
        """Waits for the sum and divides by the number of ranks."""
        self._wait(work)
        flat.div_(self.size)

    def _wait(self, work: Any) -> None:
        began = time.monotonic()
        work.wait()
        self.waited += time.monotonic() - began

    # Words ---------------------------------------------------------------------------------------

    def gather(self, data: bytes) -> list[bytes]:
        length = torch.tensor([len(data)], dtype=torch.int64, device=self.device)
        lengths = [torch.zeros_like(length) for _ in range(self.size)]
        dist.all_gather(lengths, length, group=self.group)
        most = max(1, *(int(n) for n in lengths))
        own = torch.frombuffer(bytearray(data.ljust(most, b"\0")), dtype=torch.uint8)
        own = own.to(self.device)
        found = [torch.zeros_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self.group)
        return [t[: int(n)].cpu().numpy().tobytes() for t, n in zip(found, lengths, strict=True)]

    def gather_json(self, value: Any) -> list[Any]:
        text = json.dumps(value, sort_keys=True, default=str).encode()
        return [json.loads(found) for found in self.gather(text)]

    def share(self, value: Any) -> Any:
        """The first rank's JSON value, on every rank."""
        text = json.dumps(value).encode() if self.first else b""
        return json.loads(self.gather(text)[0])

    def by_first(self, function: Callable[[], Any]) -> Any:
        """The first rank's result of `function`, or its error, on every rank."""
        outcome: dict[str, Any] = {}
        error: Exception | None = None
        if self.first:
            try:
                outcome["value"] = function()
            except (InputError, StorageError, OSError) as raised:
                error = raised
                outcome["error"] = str(raised)
        outcome = self.share(outcome)
        if error is not None:
            raise error
        if "error" in outcome:
            raise Unshared(outcome["error"])
        return outcome["value"]

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        for tensor in tensors:
            shared = tensor.detach().contiguous()
            dist.broadcast(shared, source, group=self.group)
            tensor.detach().copy_(shared)

    def share_random_state(self) -> None:
        """Broadcasts the first rank's global random state, without accelerators'."""
        state = RandomState.capture().to_tensors()
        host = {name: t for name, t in state.items() if not name.startswith("torch_cuda")}
        shared = self.gather(save(host) if self.first else b"")[0]
        RandomState.from_tensors(load(shared)).restore()

    def check_same(self, described: Mapping[str, Any]) -> None:
        """Raises InputError with the difference if ranks were started differently."""
        first, *others = self.gather_json(dict(described))
        for rank, other in enumerate(others, 1):
            told = [f"{name} is {b}, on rank 0 {a}" for name, a, b in differences(first, other)]
            if told:
                raise Unshared(
                    f"rank {rank} was started otherwise than rank 0 ({'; '.join(told)}); "
                    "start all ranks by the same command, with the same versions"
                )

    def agree(
        self, parts: Mapping[str, bytes], where: str, stopping: bool, waited: float
    ) -> tuple[bool, list[float]]:
        """(whether any rank is stopping, seconds each waited); RanksDiffer if parts differ."""
        digests = {name: hashlib.sha256(part).hexdigest() for name, part in parts.items()}
        found = self.gather_json([digests, stopping, waited])
        for rank, (others, _, _) in enumerate(found):
            names = [name for name in parts if others[name] != found[0][0][name]]
            if names:
                raise RanksDiffer(
                    f"rank {rank} differs from rank 0 in {', '.join(names)} after {where}; look "
                    "for randomness or state in loss_fn that is neither the model's nor torch's, "
                    "and resume from the last checkpoint"
                )
        return any(stop for _, stop, _ in found), [seconds for _, _, seconds in found]


class SumOverRanks(Function):
    """y = Σ_r x_r on every rank. With J = mean_r J_r, R ∂J/∂x_r = Σ_s ∂J_s/∂y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return SumOverRanks.apply(gradient, ctx.ranks), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return ctx.ranks.sum(tangent)


# Joining ------------------------------------------------------------------------------------------


@contextmanager
def joined(device: str = "auto") -> Iterator[Ranks | None]:
    """The ranks started by torchrun or the same variables; None for one process.
    Destroys the group at exit if it created it. device: cuda and auto select the local rank's GPU.
    """
    named = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    if not named or int(os.environ["WORLD_SIZE"]) < 2:
        yield None
        return
    if dist.is_initialized():
        yield Ranks()
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=TIMEOUT)))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # A single launcher's store keeps the addresses of killed ranks, which the first restart
        # would dial in torch 2.13. With several launchers the store is new.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield Ranks()
    finally:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Ends the process with os._exit after flushing.
    Otherwise threads of the process group outlive the interpreter: 1 process in 50 aborted with
    SIGABRT (torch 2.13, gloo), and torchrun restarted them."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status)


def ranks_of(group: Group) -> Ranks | None:
    if group is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        if group == "auto":
            return None
        raise InputError(
            "process_group was given, but torch.distributed is not initialized; call "
            "torch.distributed.init_process_group first, or leave process_group out"
        )
    if isinstance(group, str):
        return Ranks() if dist.get_world_size() > 1 else None
    return Ranks(group)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, bypassing its reducer; else the model."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise InputError(
                f"{name or 'model'} is wrapped by FullyShardedDataParallel, which hides its "
                "parameters; use torch.distributed.fsdp.fully_shard instead"
            )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module
    return model


# Helpers ------------------------------------------------------------------------------------------


def buckets(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Indices of tensors grouped by dtype and device, up to BUCKET_BYTES each."""
    found: list[list[int]] = []
    open_: dict[Any, tuple[list[int], int]] = {}
    for i, t in enumerate(tensors):
        kind = (t.dtype, t.device)
        size = t.numel() * t.element_size()
        if kind in open_ and open_[kind][1] + size <= BUCKET_BYTES:
            bucket, filled = open_[kind]
            bucket.append(i)
            open_[kind] = bucket, filled + size
        else:
            found.append([i])
            open_[kind] = found[-1], size
    return found

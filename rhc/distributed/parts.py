"""Files of what is shared out: each rank writes its own parts, and any number of ranks reads them.

They are written and read by torch.distributed.checkpoint, in its safetensors format: a file per
rank, whose header says where each part lies in its whole. Here they are brought to the disk, read
back and summed as all files of a checkpoint are; the manifest that names them is written after all.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rhc.distributed.dtensors import is_dtensor, placed_as
from rhc.distributed.ranks import Ranks
from rhc.errors import InputError
from rhc.storage.files import sync

Sums = dict[str, tuple[int, str]]
"""Name of a file -> (bytes, SHA-256)."""

Trouble = tuple[int, str]
"""An OSError's number and words, which all ranks can be told."""

_PIECE = 2**20


def write_parts(
    ranks: Ranks, folder: Path, tensors: Mapping[str, Any]
) -> tuple[Sums, Trouble | None]:
    """(the files that the ranks wrote into `folder`, what the disk refused): alike on all ranks.

    tensors: DTensors by name; every rank gives the same names, and writes what it holds of them.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    trouble: Trouble | None = None
    sums: Sums = {}
    try:
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(dict(tensors), storage_writer=writer, process_group=ranks.group)
    except CheckpointException as error:
        trouble = _trouble(next(iter(error.failures.values()))[0])
    else:
        try:
            sums = _settled(folder, f"shard-{ranks.rank + 1:05d}-", tensors)
        except OSError as error:
            trouble = _trouble(error)
    for other_sums, other_trouble in ranks.gather_json([sums, trouble]):
        sums |= {name: (int(size), str(digest)) for name, (size, digest) in other_sums.items()}
        if trouble is None and other_trouble is not None:
            trouble = int(other_trouble[0]), str(other_trouble[1])
    return sums, trouble


def read_parts(folder: Path, like: Callable[[str], Any]) -> dict[str, Tensor]:
    """What lies in a folder of parts, by name: shared out as `like(name)` is, or else whole.

    Each process reads its own parts, whoever wrote them. An InputError where some are missing.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    found: dict[str, Tensor] = {}
    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        for name, entry in reader.read_metadata().state_dict_metadata.items():
            parts: Any = entry
            if sum(math.prod(part.sizes) for part in parts.chunks) != math.prod(parts.size):
                raise ValueError(f"{name} is not there whole")
            found[name] = _room(parts.size, parts.properties.dtype, like(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a process reads alone, which is meant
            dcp.load(dict(found), storage_reader=reader, no_dist=True)
    except (CheckpointException, LookupError, TypeError, ValueError, OSError, RuntimeError) as e:
        why = next(iter(e.failures.values()))[0] if isinstance(e, CheckpointException) else e
        raise InputError(f"{folder} is damaged ({type(why).__name__}: {why})") from None
    except Exception as error:  # of safetensors' parser in Rust
        raise InputError(f"{folder} is damaged ({error})") from None
    return found


def _room(size: torch.Size, dtype: torch.dtype, like: Any) -> Any:
    """An empty tensor of this size, shared out as `like` is if that has the size too."""
    if not is_dtensor(like) or like.shape != size:
        return torch.empty(size, dtype=dtype)
    return placed_as(torch.empty_like(like.detach().to_local(), dtype=dtype), like)


def _settled(folder: Path, prefix: str, tensors: Mapping[str, Any]) -> Sums:
    """The sums of a rank's files, once they are on the disk and give back what the rank holds."""
    from safetensors import safe_open

    sums: Sums = {}
    for path in sorted(folder.glob(f"{prefix}*.safetensors")):
        sync(path)
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = tensors[name].detach().to_local().cpu()
                if not _same_bytes(file.get_tensor(name), part):
                    raise OSError(errno.EIO, "it reads back other than it was written", str(path))
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as data:
            while piece := data.read(_PIECE):
                digest.update(piece)
                size += len(piece)
        sums[path.name] = size, digest.hexdigest()
    sync(folder)
    return sums


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same to the bit, not-a-numbers included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*flat)


def _trouble(error: BaseException) -> Trouble:
    number = error.errno if isinstance(error, OSError) else None
    words = os.strerror(number) if number else f"{type(error).__name__}: {error}"
    return number or errno.EIO, words

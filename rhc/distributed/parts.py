"""Files of sharded tensors: each rank writes its parts, any number of ranks can read them.

The format is torch.distributed.checkpoint's safetensors. Files are synced, read back and hashed
before the manifest is written.
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
from safetensors import safe_open
from torch import Tensor

from rhc.distributed.dtensors import is_dtensor, local_part, placed_as
from rhc.distributed.ranks import Ranks
from rhc.errors import InputError
from rhc.storage.files import sync

Sums = dict[str, tuple[int, str]]
"""File name -> (bytes, SHA-256)."""


def write_parts(ranks: Ranks, folder: Path, tensors: Mapping[str, Any]) -> Sums:
    """Writes the ranks' parts of DTensors; an OSError on one rank is raised on all."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    trouble: tuple[int, str] | None = None
    own: Sums = {}
    try:
        writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        dcp.save(dict(tensors), storage_writer=writer, process_group=ranks.group)
        own = _sums(folder, f"shard-{ranks.rank + 1:05d}-", tensors)
    except (CheckpointException, OSError) as error:
        cause = _cause(error)
        number = getattr(cause, "errno", None)
        words = os.strerror(number) if number else f"{type(cause).__name__}: {cause}"
        trouble = number or errno.EIO, words
    found = ranks.gather_json([own, trouble])
    for _, trouble in found:
        if trouble is not None:
            raise OSError(*trouble)
    return {
        name: (int(size), str(digest)) for sums, _ in found for name, (size, digest) in sums.items()
    }


def read_parts(folder: Path, like: Callable[[str], Any]) -> dict[str, Tensor]:
    """Tensors of a folder by name, sharded like `like(name)` or whole; InputError if incomplete."""
    import torch.distributed.checkpoint as dcp

    found: dict[str, Tensor] = {}
    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        for name, entry in reader.read_metadata().state_dict_metadata.items():
            parts: Any = entry
            if sum(math.prod(part.sizes) for part in parts.chunks) != math.prod(parts.size):
                raise ValueError(f"{name} is not there whole")
            found[name] = _empty(parts.size, parts.properties.dtype, like(name))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about reading in a single process, which is intended
            dcp.load(dict(found), storage_reader=reader, no_dist=True)
    except Exception as error:  # safetensors' Rust parser raises its own types
        cause = _cause(error)
        raise InputError(f"{folder} is damaged ({type(cause).__name__}: {cause})") from None
    return found


def _cause(error: BaseException) -> BaseException:
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error


def _empty(size: torch.Size, dtype: torch.dtype, like: Any) -> Any:
    if not is_dtensor(like) or like.shape != size:
        return torch.empty(size, dtype=dtype)
    return placed_as(torch.empty_like(local_part(like), dtype=dtype), like)


def _sums(folder: Path, prefix: str, tensors: Mapping[str, Any]) -> Sums:
    sums: Sums = {}
    for path in sorted(folder.glob(f"{prefix}*.safetensors")):
        sync(path)
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if not _same_bytes(file.get_tensor(name), local_part(tensors[name]).cpu()):
                    raise OSError(errno.EIO, "it reads back other than it was written", str(path))
        with path.open("rb") as data:
            digest = hashlib.file_digest(data, "sha256").hexdigest()
        sums[path.name] = path.stat().st_size, digest
    sync(folder)
    return sums


def _same_bytes(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, so NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*[t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)])

"""Data that fits in memory: splits, quick loaders, and MNIST's IDX format."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
)

from rhc.errors import InputError


def split(tensors: tuple[Tensor, ...], sizes: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    """Disjoint random parts of the examples, of the given sizes, the same in every run.

    tensors: each (N, ...), one row per example; sizes: summing to at most N.
    The permutation comes from a generator of its own with seed 0: runs of different seeds share
    their test set, and the global generator is left alone.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(tensors[0]), generator=generator)[: sum(sizes)]
    return [tuple(tensor[rows] for tensor in tensors) for rows in order.split(list(sizes))]


def tensor_loader(tensors: tuple[Tensor, ...], batch_size: int, *, shuffle: bool) -> DataLoader:
    """A DataLoader over tensors held in memory, which yields [rows of each tensor] per batch.

    tensors: each (N, ...). With shuffle, a new order per pass from the global generator, and a last
    partial batch is dropped, so that every training step sees batch_size examples.
    """
    dataset = TensorDataset(*tensors)
    order: Sampler[int] = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
    # A batch of indices in place of one index, and batch_size=None: the dataset is indexed once per
    # batch. Collating 64 single examples costs more than a step of a small MLP.
    batches = BatchSampler(order, batch_size, drop_last=shuffle)
    return DataLoader(dataset, sampler=batches, batch_size=None)


MOST_BYTES = 2**32
"""That a compressed file is unpacked to: MNIST has 47 million."""

IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path) -> Tensor:
    """The array in an IDX file, plain or gzip, with the shape and the element type it declares.

    Format (LeCun, http://yann.lecun.com/exdb/mnist): two zero bytes, a type code, the number D of
    dimensions, D sizes as big-endian uint32, then the elements in row-major order, big-endian.
    Raises InputError, naming the file and what is wrong with it, for anything else.
    """
    content = _read_bytes(path)
    type_code, dimensions = content[2:4] if len(content) >= 4 else (0, 0)
    if content[:2] != b"\0\0" or type_code not in IDX_TYPES or dimensions == 0:
        raise InputError(
            f"{path} is not an IDX file: it starts with {content[:4].hex() or 'nothing'} where "
            "MNIST's files start with 00000803 or 00000801; fetch it again"
        )
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise InputError(
            f"{path} is cut short: {len(content)} bytes, where the header alone has {header}; "
            "fetch it again"
        )
    shape = tuple(np.frombuffer(content, ">u4", dimensions, offset=4).tolist())
    dtype = np.dtype(IDX_TYPES[type_code])
    expected = math.prod(shape) * dtype.itemsize
    if len(content) - header != expected:
        raise InputError(
            f"{path} holds {len(content) - header} bytes of data where its header, "
            f"{shape} of {dtype.name}, promises {expected}; fetch it again"
        )
    try:
        array = np.frombuffer(content, dtype, offset=header).reshape(shape)
    except ValueError as error:  # sizes whose product is 0 and too large nevertheless
        raise InputError(f"{path} is damaged ({error}); fetch it again") from None
    # torch wants native byte order and memory that it may write to: a copy gives both.
    return torch.from_numpy(array.astype(dtype.newbyteorder("=")))


def _read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed where it is gzip, whatever its name says."""
    try:
        content = path.read_bytes()
        if not content.startswith(b"\x1f\x8b"):
            return content
        # A few kilobytes of gzip can stand for gigabytes of nothing.
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise InputError(f"{path} holds more than {MOST_BYTES} bytes; fetch it again")
        return content
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is damaged gzip ({error}); fetch it again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the file") from None

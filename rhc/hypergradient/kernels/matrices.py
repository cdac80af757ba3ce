"""Matrix products of the kernels, by the faster of torch's two CPU libraries.

MKL leaves AVX-512 unused on processors other than Intel's: 113 GFLOP/s on an EPYC, where oneDNN
reaches 250. oneDNN is used there for large float32 matrices outside graphs. It keeps 0.6 MB per
compiled shape, so rows go to it in powers of two, and the remainder to MKL.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_linear = F.linear

LEAST = 2**20
"""Multiplications from which oneDNN is faster: a call takes 9 µs more."""

FEWEST = 128
MOST_PARTS = 3
"""Rows that go to oneDNN at least, and in how many parts at most."""


CODE = 6 * 2**20
KERNEL = 5 * 2**17
"""Bytes that oneDNN keeps: for its code once it is used, and for every kernel."""


class _Use:
    off = False
    missed: set[Any] | None = None


def off() -> bool:
    return _Use.off


@contextmanager
def torchs_own(on: bool = True) -> Iterator[None]:
    """Inside, nothing goes to oneDNN: for a budget without room for its kernels."""
    before, _Use.off = _Use.off, _Use.off or on
    try:
        yield
    finally:
        _Use.off = before


@contextmanager
def noted() -> Iterator[Callable[[], int]]:
    """Inside `torchs_own`: yields the bytes that oneDNN would have kept."""
    missed: set[Any] = set()
    before, _Use.missed = _Use.missed, missed
    try:
        yield lambda: CODE + KERNEL * len(missed) if missed else 0
    finally:
        _Use.missed = before


@cache
def onednn_is_faster() -> bool:
    """By machine type, not by a clock: a resumed run must use the same library."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not _intel()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "AuthenticAMD" not in platform.processor()


@cache
def _works() -> bool:
    """Whether the undocumented operator works as assumed; tested on use: it loads 5 MB of code."""
    x, w, b = torch.arange(24.0).view(4, 6), torch.arange(12.0).view(2, 6), torch.ones(2)
    try:
        with torch.no_grad():
            return torch.equal(_onednn(x, w, b), _linear(x, w, b))
    except (AttributeError, RuntimeError, TypeError):
        return False


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x wᵀ + b: (…, rows, k), (n, k), (n,) -> (…, rows, n)."""
    rows = x.shape[:-1].numel()
    parts = _parts(x, w, rows, w.numel())
    if not parts:
        return _linear(x, w, b)
    if parts == (rows,):
        return _onednn(x, w, b)
    flat, found, first = x.reshape(rows, -1), x.new_empty(rows, len(w)), 0
    for count in parts:
        found[first : first + count] = _onednn(flat[first : first + count], w, b)
        first += count
    if first < rows:
        found[first:] = _linear(flat[first:], w, b)
    return found.view(*x.shape[:-1], len(w))


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b: (…, rows, k), (k, n) -> (…, rows, n)."""
    return linear(a, b.t())


def over_rows(a: Tensor, b: Tensor) -> Tensor:
    """Σ a bᵀ over all rows: (…, m), (…, n) -> (m, n)."""
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    parts = _parts(a, b, len(a), a.shape[1] * b.shape[1])
    if not parts:
        return a.t() @ b
    found, first = None, 0
    for count in parts:
        part = _onednn(a[first : first + count].t(), b[first : first + count].t(), None)
        found = part if found is None else found.add_(part)
        first += count
    assert found is not None
    return found if first == len(a) else found.addmm_(a[first:].t(), b[first:])


def sum_of(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a b: (rows, n) or (n,), (rows, k), (k, n) -> (rows, n)."""
    if not _parts(a, b.t(), len(a), b.numel()):
        return torch.addmm(total, a, b)
    if total.dim() == 1:
        return linear(a, b.t(), total)
    return product(a, b).add_(total)  # faster than oneDNN's own sum


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a b: (rows, n), (rows, k), (k, n)."""
    if not _parts(a, b.t(), len(a), b.numel()):
        return total.addmm_(a, b)
    return total.add_(product(a, b))


def _parts(a: Tensor, b: Tensor, rows: int, multiplications: int) -> tuple[int, ...]:
    """How many rows go to oneDNN at a time, () for none. multiplications: of every row."""
    if (
        rows * multiplications < LEAST
        or (_Use.off and _Use.missed is None)
        or torch.is_grad_enabled()
        or not onednn_is_faster()
        or not a.dtype == b.dtype == torch.float32
        or a.device.type != "cpu"
        or not torch.backends.mkldnn.enabled
        or torch.get_float32_matmul_precision() != "highest"
    ):
        return ()
    parts = tuple(n for n in _powers(rows, FEWEST) if n * multiplications >= LEAST)
    if not _Use.off:
        return parts if parts and _works() else ()
    assert _Use.missed is not None
    _Use.missed.update((n, b.shape, b.is_contiguous()) for n in parts)
    return ()


@cache
def _powers(rows: int, fewest: int) -> tuple[int, ...]:
    """Powers of two, or a single 3 · 2ⁿ that covers all rows; none below `fewest`."""
    largest = 1 << rows.bit_length() - 1
    if rows in (largest, largest // 2 * 3) and rows >= fewest:
        return (rows,)
    bits = [n for n in (largest >> i for i in range(rows.bit_length())) if rows & n]
    return tuple(n for n in bits[:MOST_PARTS] if n >= fewest)


def _onednn(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    if b is not None:  # oneDNN reads the elements one after the other, wherever they lie
        b = b.contiguous()
    elif w.is_contiguous():  # a bias of zeros selects the kernel of the layer itself
        b = w.new_zeros(len(w))
    if not (w.is_contiguous() or w.t().is_contiguous()):
        w = w.contiguous()
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
    return found

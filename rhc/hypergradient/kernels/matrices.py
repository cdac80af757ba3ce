"""Matrix products of the kernels, by the faster of the two libraries that torch has on a CPU.

torch multiplies float32 matrices with MKL, which on processors that are not Intel's leaves AVX-512
unused: an EPYC that has it does 113 GFLOP/s so, and 250 with oneDNN, by which torch convolves. So
these functions go to oneDNN there, by the operator that torch's own compiler calls, and are torch's
anywhere else: on other devices, for other types, for small matrices, and where a graph is made.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

_linear = F.linear

LEAST = 2**20
"""Multiplications from which on oneDNN is faster: a call takes 9 µs more."""


@cache
def onednn_is_faster() -> bool:
    """By what the machine is, not by a clock: a run that is resumed must go the same way."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not _intel()
        and _works()
    )


def _works() -> bool:
    """Whether the operator, which is not of torch's documented ones, does what it is taken for."""
    x, w, b = torch.arange(24.0).view(4, 6), torch.arange(12.0).view(2, 6), torch.ones(2)
    try:
        with torch.no_grad():
            return torch.equal(_onednn(x, w, b), _linear(x, w, b))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return "AuthenticAMD" not in platform.processor()


def applies(x: Tensor) -> bool:
    """Whether products of matrices like this one may go to oneDNN."""
    return (
        onednn_is_faster()
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
        and torch.get_float32_matmul_precision() == "highest"
    )


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x wᵀ + b: (…, k), (n, k), (n,) -> (…, n)."""
    if not _goes(x, w, x.numel() * w.shape[0]):
        return _linear(x, w, b)
    return _onednn(x, w, b)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b: (…, k), (k, n) -> (…, n)."""
    if not _goes(a, b, a.numel() * b.shape[1]):
        return a @ b
    return _onednn(a, b.t(), None)


def sum_of(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a b: (m, n) or (n,), (m, k), (k, n) -> (m, n)."""
    if not _goes(a, b, a.numel() * b.shape[1]):
        return torch.addmm(total, a, b)
    if total.dim() == 1:
        return _onednn(a, b.t(), total)
    return product(a, b).add_(total)  # faster than oneDNN's own sum


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a b: (m, n), (m, k), (k, n)."""
    if not _goes(a, b, a.numel() * b.shape[1]):
        return total.addmm_(a, b)
    return total.add_(product(a, b))


def _goes(a: Tensor, b: Tensor, multiplications: int) -> bool:
    return (
        multiplications >= LEAST
        and not torch.is_grad_enabled()
        and applies(a)
        and b.dtype == torch.float32
    )


def _onednn(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    if not (w.is_contiguous() or w.t().is_contiguous()):
        w = w.contiguous()
    if b is not None:  # it reads the elements of a bias one after the other, wherever they lie
        b = b.contiguous()
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, b, "none", [], "")
    return found

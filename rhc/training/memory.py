"""Memory of the process: its peak, and freed heap that the allocator keeps."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def peak_memory(device: torch.device) -> int:
    """Peak memory of the process in bytes: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on this operating system
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> None:
    """Resets the peak for `current_peak`, where possible (CUDA; Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def current_peak(device: torch.device) -> int:
    """Peak memory in bytes since `reset_peak`; 0 if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    return 0


def resident() -> int:
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


# The C heap --------------------------------------------------------------------------------------


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None


def trim() -> None:
    """Returns freed memory of glibc's heap to the operating system.

    torch's aligned CPU allocations are split by glibc before 2.38 so that freed space is badly
    reused (its bug 14581): a reverse pass over 25 steps of a GPT of 0.6 M parameters uses 160 MB
    above plain training, but 230 resident; trimmed after every step, 190, for 3 % of the time.
    """
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


HELD = 2**30
"""Freed bytes at the end of the C heap that `held` keeps, at least."""

MAPPED, RETURNED = 2**25, 2**26
"""glibc's thresholds after large blocks were freed, in bytes: blocks to map, freed memory to
keep."""

TUNED = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)
"""Environment variables by which users tune or replace glibc's heap."""

_held = 0


@contextlib.contextmanager
def held(size: int | None = None) -> Iterator[bool]:
    """Inside, glibc keeps `size` freed bytes for the next step; yields whether it can.

    A reverse pass frees megabytes at every step, which glibc otherwise returns to the system and
    faults in anew: a GPT of 0.6 M parameters lost 0.1 plain steps per step, and 1.3 with all graphs
    kept. Of several that are open, the largest size counts. `trim` still returns free memory.
    """
    global _held
    before, wanted = _held, max(size or 0, HELD)
    if can_hold() and wanted > before:
        _set_trim_threshold(wanted)
        _held = wanted
    try:
        yield can_hold()
    finally:
        if _held != before:
            _set_trim_threshold(before or RETURNED)
            _held = before


def can_hold() -> bool:
    """Whether the heap is glibc's, and the environment does not tune it."""
    tuned = any(name in os.environ for name in TUNED)
    return not tuned and platform.libc_ver()[0] == "glibc" and hasattr(_libc(), "mallopt")


def _set_trim_threshold(size: int) -> None:
    mmap_threshold, trim_threshold = -3, -1
    _libc().mallopt(mmap_threshold, MAPPED)  # setting either freezes it
    # An int; -1 stands for "never".
    _libc().mallopt(trim_threshold, size if size < 2**31 else -1)


GROWTH = 2**20
"""Growth in bytes that is ignored: code and small objects come and go."""


class Ceiling:
    """Keeps resident memory below a ceiling by trimming the heap, when `check` is called between
    pieces of work. Trimming at every step would cost a plain step each, as pages are faulted in
    again.

    above: bytes over the ground: resident bytes at the first call in this process, or at the last
    that found more than `spare` bytes too much. work: bytes of a piece of work, at most.
    """

    ground: int | None = None

    def __init__(self, above: int, *, work: int = 0, spare: int = 0) -> None:
        if Ceiling.ground is None or resident() > Ceiling.ground + above + spare:
            trim()
            Ceiling.ground = resident()
        self.above, self.limit, self.work = above, Ceiling.ground + above, work
        self._seen = resident()

    def make_room(self) -> None:
        """Trims before the first piece of work, which need not fit into the heap's holes."""
        if resident() + self.work > self.limit:
            trim()

    def check(self) -> None:
        if resident() > self.limit:
            trim()
            # Trimming at every step does not reduce memory without holes.
            self.limit = max(self.limit, resident() + self.above // 16)

    def check_growth(self) -> None:
        """Trims the heap if it is above and still grows by work; else its free memory is in use."""
        now = resident()
        if now > self.limit and now > self._seen + max(GROWTH, self.work // 4):
            trim()
            now = resident()
        self._seen = now

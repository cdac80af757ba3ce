"""What the process holds: its peak, and handing back what the allocator keeps without need."""

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
    """The most memory this process has held so far, in bytes: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on this operating system
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> None:
    """Forgets the peak so far, where that can be done (CUDA; Linux), for `current_peak`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def current_peak(device: torch.device) -> int:
    """The most memory in use since `reset_peak`, in bytes; 0 where nobody can say."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    return 0


def resident() -> int:
    """Bytes of this process in memory; 0 where nobody can say."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


# The C heap --------------------------------------------------------------------------------------


@functools.cache
def _libc() -> Any:
    """The functions of the C library on Linux; None elsewhere."""
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None


def trim() -> None:
    """Hands freed memory of the C heap back to the operating system, where glibc can.

    torch's CPU allocations are aligned ones, which glibc before 2.38 splits so that freed space is
    badly reused (its bug 14581): a reverse pass over 25 steps of a GPT of 0.6 M parameters holds
    160 MB above plain training, but resides in 230; trimmed after every step, in 190, for 3 % of
    the time. Elsewhere this does nothing.
    """
    if hasattr(_libc(), "malloc_trim"):
        _libc().malloc_trim(0)


HELD = 2**30
"""Bytes of freed memory at the end of the C heap that `held` lets stay there, at the least."""

MAPPED, RETURNED = 2**25, 2**26
"""Where glibc's thresholds end by themselves once large blocks were freed: bytes of a block that is
mapped, and of freed memory that may stay."""

TUNED = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
)
"""Where users tune glibc's heap, or replace it."""

_held = 0


@contextlib.contextmanager
def held(size: int | None = None) -> Iterator[bool]:
    """Inside, glibc keeps freed memory for the next step instead of handing it back.

    A reverse pass takes and frees megabytes at every step. As it comes, glibc returns the end of
    its heap to the system again and again, and each of its pages is faulted in anew: a GPT of 0.6 M
    parameters lost 0.1 plain steps a step, and 1.3 with all graphs kept. `trim` still hands back
    what is free. size: bytes that may stay; of several that are open, the most. Gives whether it
    is so, by `can_hold`.
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
    """Whether the heap is glibc's, and not tuned by its user in the environment."""
    tuned = any(name in os.environ for name in TUNED)
    return not tuned and platform.libc_ver()[0] == "glibc" and hasattr(_libc(), "mallopt")


def _set_trim_threshold(size: int) -> None:
    mmap_threshold, trim_threshold = -3, -1
    _libc().mallopt(mmap_threshold, MAPPED)  # setting either freezes it
    # An int, of which -1 is "never".
    _libc().mallopt(trim_threshold, size if size < 2**31 else -1)


GROWTH = 2**20
"""Bytes of growth that are none: code and small objects come and go."""


class Ceiling:
    """Keeps what the process resides in below a height, by handing back the heap's holes.

    It is made where nothing is held but what stays, and asked to `check` between pieces of work.
    Trimming at every step would cost a plain step each, since all its pages are faulted in again.
    above: bytes beyond the ground, which are the resident bytes at the first call in this process,
    or at the last that found more than spare bytes too much. work: bytes that a piece of work
    takes at most. Where nobody can say what resides, nothing is done.
    """

    ground: int | None = None

    def __init__(self, above: int, *, work: int = 0, spare: int = 0) -> None:
        if Ceiling.ground is None or resident() > Ceiling.ground + above + spare:
            trim()
            Ceiling.ground = resident()
        self.above, self.limit, self.work = above, Ceiling.ground + above, work
        self._seen = resident()

    def make_room(self) -> None:
        """Before the first piece of work: it need not fit into the holes that others have left."""
        if resident() + self.work > self.limit:
            trim()

    def check(self) -> None:
        """Trims the heap if it is above."""
        if resident() > self.limit:
            trim()
            # What is there without holes does not become less by trimming at every step.
            self.limit = max(self.limit, resident() + self.above // 16)

    def check_growth(self) -> None:
        """Trims the heap if it is above and still grows by work: as long as it does not, what is
        free in it is used, and would only be faulted in again."""
        now = resident()
        if now > self.limit and now > self._seen + max(GROWTH, self.work // 4):
            trim()
            now = resident()
        self._seen = now

"""The order in which a window's chunks are rolled again from few snapshots: Revolve.

Griewank, Walther 2000: it evaluates the fewest steps. Chunks are numbered from the window's start;
the first roll passes them all, leaves snapshots before some, and records the last one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

Action = tuple[Literal["restore", "advance", "keep", "record", "drop"], int]
"""restore: the snapshot before this chunk; advance: roll up to it; keep: a snapshot before it;
record: roll it, for the reverse pass; drop: its snapshot."""


def actions(chunks: int, snapshots: int) -> Iterator[Action]:
    """What is done after the first roll, and the reverse pass of the last chunk."""
    left = [(0, chunks, snapshots - 1, True)]
    while left:
        # Chunks [first, stop), last first, from the snapshot before `first`. passed: the first roll
        # has left its snapshots here, and the last chunk is done.
        first, stop, free, passed = left.pop()
        if stop - first == 1 or free == 0:
            for k in reversed(range(first, stop - passed)):
                yield "restore", first
                if k > first:
                    yield "advance", k
                yield "record", k
            yield "drop", first
            continue
        middle = first + split(stop - first, free)
        if not passed:
            yield "restore", first
            yield "advance", middle
            yield "keep", middle
        left += [(first, middle, free, False), (middle, stop, free - 1, passed)]


def first_snapshots(chunks: int, snapshots: int) -> list[int]:
    """The chunks before which the first roll leaves a snapshot."""
    marks, free = [0], snapshots - 1
    while chunks - marks[-1] > 1 and free > 0:
        marks.append(marks[-1] + split(chunks - marks[-1], free))
        free -= 1
    return marks


def chunk_bounds(steps: int, chunk: int) -> list[int]:
    """Where the chunks of a window begin, and its end: the first chunk may be shorter."""
    first = steps % chunk
    bounds = list(range(first, steps + 1, chunk))
    return bounds if first == 0 else [0, *bounds]


def recomputed_steps(steps: int, chunk: int, snapshots: int) -> int:
    """Steps that are rolled again, beyond the first roll."""
    bounds = chunk_bounds(steps, chunk)
    at = total = 0
    for kind, k in actions(len(bounds) - 1, snapshots):
        if kind == "restore":
            at = bounds[k]
        elif kind == "advance":
            total += bounds[k] - at
            at = bounds[k]
        elif kind == "record":
            total += bounds[k + 1] - bounds[k]
    return total


@lru_cache(maxsize=100_000)
def chunk_evaluations(chunks: int, free: int) -> int:
    """Chunks rolled to reverse `chunks` of them with room for `free` states beside the first.

    l chunks with s states take r l − C(s + r, s + 1) advances, r the smallest number with C(s + r,
    s) ≥ l, and every chunk is rolled once more to be recorded.
    """
    if chunks <= 1:
        return chunks
    s = free + 1
    r = 0
    while math.comb(s + r, s) < chunks:
        r += 1
    return r * chunks - math.comb(s + r, s + 1) + chunks


@lru_cache(maxsize=100_000)
def split(chunks: int, free: int) -> int:
    """After how many of `chunks` the next snapshot is best taken."""
    if free == 0:
        return chunks - 1
    return min(
        range(1, chunks),
        key=lambda m: m + chunk_evaluations(chunks - m, free - 1) + chunk_evaluations(m, free),
    )

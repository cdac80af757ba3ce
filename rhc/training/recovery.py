"""Decisions for reverse passes that run out of memory, and for steps that differ when replayed."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from rhc.training.plant import Plant

# Memory ------------------------------------------------------------------------------------------


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: of CUDA, of torch on a CPU, of Python."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    told = ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc")
    return isinstance(error, (RuntimeError, OSError)) and any(words in text for words in told)


@dataclass(frozen=True)
class OomFallback:
    """Limits on reverse passes since memory ran out; None for no limit. memory_budget: bytes, with
    segments of one step. product: in place of the chosen one. longest: steps of a window.
    never_differentiate: no reverse passes."""

    memory_budget: int | None = None
    product: str | None = None
    longest: int | None = None
    never_differentiate: bool = False

    def more(self, window: int, product: str, predicted: int | None) -> tuple[OomFallback, str]:
        """(the next fallback, its description): half the memory that the last plan wanted
        (`predicted`, None if unknown), then difference products, then windows of half the
        length."""
        if self.memory_budget is None and predicted is not None:
            budget = max(1, predicted // 2)
            return replace(self, memory_budget=budget), f"smaller segments, within {budget} bytes"
        if self.product is None and product == "exact":
            return replace(self, product="forward-difference"), "difference products"
        length = min(window, self.longest or window) // 2
        if length >= 2:
            return replace(self, longest=length), f"windows of {length} steps"
        return replace(self, never_differentiate=True), "no reverse pass"

    def to_json(self) -> dict[str, Any]:
        return {_IN_JSON.get(name, name): value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> OomFallback:
        names = {_IN_JSON.get(f.name, f.name): f.name for f in fields(cls)}
        return cls(**{names[key]: value for key, value in record.items()})


_IN_JSON = {"never_differentiate": "blind"}
"""Names in checkpoints."""


# Steps that differ when replayed ------------------------------------------------------------------


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Only deterministic operators inside, if wanted; torch raises where there is none."""
    if not wanted:
        yield
        return
    benchmark, name = torch.backends.cudnn.benchmark, "CUBLAS_WORKSPACE_CONFIG"
    variable = os.environ.get(name)
    try:
        os.environ.setdefault(name, ":4096:8")
        torch.backends.cudnn.benchmark = False
        with _deterministic_algorithms(warn_only=False):
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        if variable is None:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _deterministic_algorithms(*, warn_only: bool) -> Iterator[None]:
    was = torch.are_deterministic_algorithms_enabled()
    only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=only)


def nondeterministic(
    plant: Plant, batch: Any, controls: Mapping[str, Any], step: int
) -> tuple[str, ...]:
    """The operators of a step that torch reports as such. Takes the step."""
    with _deterministic_algorithms(warn_only=True), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plant.step(batch, controls, step)
    pattern = re.compile(r"([\w.:]+) does not have a deterministic implementation")
    found = [m[1] for w in caught if (m := pattern.search(str(w.message)))]
    return tuple(dict.fromkeys(found))

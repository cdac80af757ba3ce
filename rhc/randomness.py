"""The global random state of a process: torch (CPU, CUDA), numpy and python, as one value."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seeds every global generator."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@dataclass(frozen=True)
class RandomState:
    """A copy of every global generator; `capture()` takes it, `restore()` puts it back."""

    torch_cpu: Tensor
    torch_cuda: tuple[Tensor, ...]
    numpy: Any
    python: Any

    @classmethod
    def capture(cls) -> RandomState:
        """The state now. CUDA is asked only if this process has used it."""
        return cls(
            torch.get_rng_state(),
            tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else (),
            np.random.get_state(),
            random.getstate(),
        )

    def restore(self) -> None:
        """Puts every global generator back to this state."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda and torch.cuda.device_count() == len(self.torch_cuda):
            torch.cuda.set_rng_state_all(list(self.torch_cuda))
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def same(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two."""
        return (
            torch.equal(self.torch_cpu, other.torch_cpu)
            and len(self.torch_cuda) == len(other.torch_cuda)
            and all(map(torch.equal, self.torch_cuda, other.torch_cuda))
            and self.python == other.python
            and (
                self.numpy is other.numpy
                or (
                    self.numpy[2:] == other.numpy[2:]
                    and bool((self.numpy[1] == other.numpy[1]).all())
                )
            )
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """The state as named tensors, for safetensors."""
        _, keys, position, has_gauss, cached = self.numpy
        version, words, gauss = self.python
        tensors = {
            "torch_cpu": self.torch_cpu.clone(),
            "numpy_keys": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            "numpy_position": torch.tensor([position, has_gauss]),
            "numpy_cached": torch.tensor([cached], dtype=torch.float64),
            "python_words": torch.tensor([version, *words]),
            "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        }
        return tensors | {f"torch_cuda_{i}": s.clone() for i, s in enumerate(self.torch_cuda)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> RandomState:
        """The inverse of `to_tensors`."""
        position, has_gauss = tensors["numpy_position"].tolist()
        version, *words = tensors["python_words"].tolist()
        gauss = tensors["python_gauss"].tolist()
        cuda = [k for k in tensors if k.startswith("torch_cuda_")]
        return cls(
            tensors["torch_cpu"],
            tuple(tensors[f"torch_cuda_{i}"] for i in range(len(cuda))),
            (
                "MT19937",
                tensors["numpy_keys"].numpy().astype(np.uint32),
                position,
                has_gauss,
                float(tensors["numpy_cached"][0]),
            ),
            (version, tuple(words), gauss[0] if gauss else None),
        )


class RandomWatch:
    """Follows the global random state cheaply: asking numpy for its state takes 60 µs.

    As long as numpy has no half of a pair of normal draws in store, its state is the memory of its
    bit generator.
    """

    def __init__(self) -> None:
        self.state = RandomState.capture()
        self._numpy = _numpy_memory()

    def now(self) -> RandomState:
        """The state now: the very object of the last call if nothing was drawn since."""
        memory = _numpy_memory()
        untouched = memory is not None and memory == self._numpy and not self.state.numpy[3]
        self._numpy = memory
        state = RandomState(
            torch.get_rng_state(),
            tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else (),
            self.state.numpy if untouched else np.random.get_state(),
            random.getstate(),
        )
        if not state.same(self.state):
            self.state = state
        return self.state


def _numpy_memory() -> bytes | None:
    """The memory of numpy's global Mersenne Twister (624 words and a position), if it is one."""
    generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
    if type(generator) is not np.random.MT19937:
        return None
    return ctypes.string_at(generator.ctypes.state_address, 625 * 4)


@contextmanager
def preserved() -> Iterator[None]:
    """Whatever is drawn inside leaves the global random state as it was found."""
    state = RandomState.capture()
    try:
        yield
    finally:
        state.restore()

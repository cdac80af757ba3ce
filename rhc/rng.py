"""Random numbers: gradient noise as a function of time, and the global state as a value.

ξ_t comes from a generator seeded by (seed, t), so that a replay sees the same (as in diffrax).
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def mixed_seed(seed: int, step: int) -> int:
    """A 64-bit seed for `step` (SplitMix64, Steele et al. 2014). All bits are mixed, since torch's
    CPU generator uses only the low 32."""
    z = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xD1B54A32D192ED03) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def standard_noise(like: Sequence[Tensor], seed: int, step: int) -> list[Tensor]:
    """Independent standard normal ξ_t with the shape, dtype and device of each in `like`."""
    return list(drawn_noise(like, seed, step))


def drawn_noise(like: Iterable[Tensor], seed: int, step: int) -> Iterator[Tensor]:
    """`standard_noise`, one tensor after the other."""
    generators: dict[torch.device, torch.Generator] = {}
    for t in like:
        if t.device not in generators:
            generators[t.device] = torch.Generator(t.device).manual_seed(mixed_seed(seed, step))
        yield torch.randn(t.shape, dtype=t.dtype, device=t.device, generator=generators[t.device])


def root_mean_square(tensor: Tensor) -> Tensor:
    """RMS over all elements; its gradient at an all-zero tensor is 0, not NaN."""
    return torch.linalg.vector_norm(tensor) / max(tensor.numel(), 1) ** 0.5


@torch.no_grad()
def add_gradient_noise(parameters: Sequence[Tensor], sigma: float, seed: int, step: int) -> None:
    """Adds σ·RMS(g)·ξ_t to every `.grad`, in place; draws ξ_t also for parameters without one, so
    that the noise of others is the same."""
    if sigma == 0:
        return
    for parameter, xi in zip(parameters, standard_noise(parameters, seed, step), strict=True):
        if parameter.grad is not None:
            parameter.grad.addcmul_(xi, root_mean_square(parameter.grad), value=sigma)


def seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@dataclass(frozen=True)
class RandomState:
    """The state of every global generator."""

    torch_cpu: Tensor
    torch_cuda: tuple[Tensor, ...]
    numpy: Any
    python: Any

    @classmethod
    def capture(cls, numpy: Any = None) -> RandomState:
        """The state now. `numpy`: its state, if known. CUDA's is captured only if initialized."""
        return cls(
            torch.get_rng_state(),
            tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else (),
            np.random.get_state() if numpy is None else numpy,
            random.getstate(),
        )

    def restore(self) -> None:
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda and torch.cuda.device_count() == len(self.torch_cuda):
            torch.cuda.set_rng_state_all(list(self.torch_cuda))
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def now(self) -> RandomState:
        """The current state: this object if nothing was drawn since. The memory of numpy's Mersenne
        Twister, 624 words and a position, is compared, as asking numpy takes 60 µs."""
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]
        numpy = None
        if type(generator) is np.random.MT19937 and not self.numpy[3]:
            memory = ctypes.string_at(generator.ctypes.state_address, 625 * 4)
            if memory == self.numpy[1].tobytes() + np.int32(self.numpy[2]).tobytes():
                numpy = self.numpy
        state = RandomState.capture(numpy)
        return self if self.same(state) else state

    def same(self, other: RandomState) -> bool:
        """Whether nothing was drawn between the two."""
        own, others = (self.torch_cpu, *self.torch_cuda), (other.torch_cpu, *other.torch_cuda)
        return (
            len(own) == len(others)
            and all(map(torch.equal, own, others))
            and self.python == other.python
            and (self.numpy is other.numpy or _same_numpy(self.numpy, other.numpy))
        )

    def to_tensors(self) -> dict[str, Tensor]:
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


def _same_numpy(a: Any, b: Any) -> bool:
    return a[2:] == b[2:] and bool((a[1] == b[1]).all())


@contextmanager
def preserved() -> Iterator[None]:
    """Restores the global random state on exit."""
    state = RandomState.capture()
    try:
        yield
    finally:
        state.restore()

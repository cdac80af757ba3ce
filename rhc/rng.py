"""Random numbers: gradient noise as a function of time, and the global state as one value.

ξ_t is a standard normal draw from a private generator seeded by (seed, t) alone: it never touches
the global random state, and a rolled, recomputed or replayed step t sees the same ξ_t. The idea is
diffrax's, where Brownian motion is a function that can be asked twice.
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
    """A 64-bit seed for `step`, well spread in all its bits (SplitMix64, Steele et al. 2014).

    torch's CPU generator uses the low 32 bits only, so neighbouring steps must not differ in a
    few high bits alone.
    """
    z = (seed * 0x9E3779B97F4A7C15 + (step + 1) * 0xD1B54A32D192ED03) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def standard_noise(like: Sequence[Tensor], seed: int, step: int) -> list[Tensor]:
    """Independent standard normal tensors ξ_t, one of each shape, dtype and device in `like`."""
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
    """Adds σ·RMS(g)·ξ_t to every `.grad`, in place; does nothing, and draws nothing, at σ = 0.

    ξ_t is drawn for every parameter, also for one without a gradient, so that the noise of one
    tensor does not depend on which others took part in the step.
    """
    if sigma == 0:
        return
    for parameter, xi in zip(parameters, standard_noise(parameters, seed, step), strict=True):
        if parameter.grad is not None:
            parameter.grad.addcmul_(xi, root_mean_square(parameter.grad), value=sigma)


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
    def capture(cls, numpy: Any = None) -> RandomState:
        """The state now, where numpy's is known already with that. CUDA is asked only if used."""
        return cls(
            torch.get_rng_state(),
            tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else (),
            np.random.get_state() if numpy is None else numpy,
            random.getstate(),
        )

    def restore(self) -> None:
        """Puts every global generator back to this state."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda and torch.cuda.device_count() == len(self.torch_cuda):
            torch.cuda.set_rng_state_all(list(self.torch_cuda))
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    def now(self) -> RandomState:
        """The state now: this very object if nothing was drawn since it was captured.

        To ask numpy takes 60 µs. As long as it has no half of a pair of normal draws in store, its
        state is the memory of its bit generator, a Mersenne Twister: 624 words and a position.
        """
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


def _same_numpy(a: Any, b: Any) -> bool:
    return a[2:] == b[2:] and bool((a[1] == b[1]).all())


@contextmanager
def preserved() -> Iterator[None]:
    """Whatever is drawn inside leaves the global random state as it was found."""
    state = RandomState.capture()
    try:
        yield
    finally:
        state.restore()

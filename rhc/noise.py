"""Gradient noise as a function of time, so that replaying it is free.

ξ_t is a standard normal draw from a private generator seeded by (seed, t) alone: it never touches
the global random state, and a rolled, recomputed or replayed step t sees the same ξ_t. The idea is
diffrax's, where Brownian motion is a function that can be asked twice.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

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
    for tensor in like:
        device = tensor.device
        if device not in generators:
            generators[device] = torch.Generator(device=device)
            generators[device].manual_seed(mixed_seed(seed, step))
        yield torch.randn(
            tensor.shape, dtype=tensor.dtype, device=device, generator=generators[device]
        )


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


class BeforeSteps:
    """What steers an optimizer and acts before its steps, by methods that are hooked to it.

    The optimizer holds it weakly: who drops a scheduler for another is rid of its noise. A copy
    (copy.deepcopy, pickle) has hooks of its own; torch copies no optimizer's.
    """

    optimizer: Optimizer | None
    _hooked: tuple[str, ...] = ()

    def hook(self, *names: str) -> None:
        """Calls these methods, (optimizer, args, kwargs) -> None, before every step."""
        assert self.optimizer is not None
        self._hooked = (*self._hooked, *names)
        self._handles = [
            *getattr(self, "_handles", ()),
            *(_hooked_weakly(self.optimizer, getattr(self, name)) for name in names),
        ]

    def close(self) -> None:
        """Takes the noise off the optimizer; controls stay as they are."""
        for handle in getattr(self, "_handles", ()):
            handle.remove()
        self._handles, self._hooked = [], ()

    def steers(self) -> None:
        """Says that this is what steers the optimizer from now on, in place of any other."""
        assert self.optimizer is not None
        _STEERED_BY[self.optimizer] = weakref.ref(self)

    @property
    def is_steering(self) -> bool:
        """Whether nothing else that lives has taken the optimizer over."""
        other = _STEERED_BY.get(self.optimizer)
        return other is None or other() in (None, self)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = state.pop("_hooked", ())
        vars(self).update(state)
        if names:
            self.hook(*names)


_STEERED_BY: weakref.WeakKeyDictionary[Any, weakref.ref[BeforeSteps]] = weakref.WeakKeyDictionary()


def _hooked_weakly(optimizer: Optimizer, method: Callable[..., None]) -> RemovableHandle:
    alive = weakref.WeakMethod(method)

    def before_step(*given: Any) -> None:
        call = alive()
        if call is not None:
            call(*given)

    return optimizer.register_step_pre_hook(before_step)

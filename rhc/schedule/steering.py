"""The base of schedulers that act right before an optimizer's steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class BeforeSteps:
    """Calls methods before an optimizer's steps, by weak hooks, so that a dropped scheduler adds no
    noise. Copies of the scheduler have hooks of their own, copies of the optimizer none."""

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
        """Stops the noise; the other controls keep their values."""
        for handle in getattr(self, "_handles", ()):
            handle.remove()
        self._handles, self._hooked = [], ()

    def steers(self) -> None:
        """Makes this the optimizer's current scheduler."""
        assert self.optimizer is not None
        _STEERED_BY[self.optimizer] = weakref.ref(self)

    @property
    def is_steering(self) -> bool:
        """Whether no other live scheduler has replaced this one."""
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

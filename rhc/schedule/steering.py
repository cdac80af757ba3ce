"""What steers an optimizer step by step, and acts right before its steps."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


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

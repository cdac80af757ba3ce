"""Hooks that people hang on parameters and optimizers, in steps that are to be seen through.

What `Tensor.register_hook` makes of a parameter's gradient is a function of it, which is
differentiated like clipping. What other hooks change is no function of anything that a hypergradient
knows: they run, and where they change something, that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from rhc.errors import Unseen

Hook = Callable[..., Any]


class Hooks:
    """Those of an optimizer and its parameters. names: of every parameter."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
        names: Sequence[str],
    ) -> None:
        self.optimizer, self.parameters, self.names = optimizer, parameters, names
        self.acting: str | None = None
        """A parameter whose gradient some hook has changed."""

    @property
    def of_tensors(self) -> dict[int, tuple[Hook, ...]]:
        """Index of a parameter -> its hooks of Tensor.register_hook."""
        return {i: tuple(p._backward_hooks.values()) for i, p in self._with("_backward_hooks")}

    def _with(self, kind: str) -> Iterator[tuple[int, Any]]:
        return ((i, p) for i, p in enumerate(self.parameters) if getattr(p, kind, None))

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, backward leaves gradients as they are: hooks of parameters are off, to be `run`."""
        kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
        with without([getattr(p, kind) for kind in kinds for _, p in self._with(kind)]):
            yield

    def run(self) -> None:
        """What backward would have called, on the gradients of all parameters.

        Raises Unseen where a post-accumulate hook changes anything.
        """
        with torch.no_grad():
            for i, hooks in self.of_tensors.items():
                p = self.parameters[i]
                if p.grad is not None:
                    p.grad, before = through(hooks, p.grad.clone()), p.grad
                    if not _same(p.grad, before):
                        self.acting = self.names[i]
            for i, p in list(self._with("_post_accumulate_grad_hooks")):
                for hook in list(p._post_accumulate_grad_hooks.values()) if p.grad is not None else ():
                    self._watched(
                        hook,
                        (p,),
                        f"hook {_called(hook)} (register_post_accumulate_grad_hook of parameter "
                        f"{self.names[i]!r})",
                        "change its gradient by Tensor.register_hook, whose hooks are followed",
                    )

    def step(self) -> None:
        """`optimizer.step()`. Raises Unseen where one of its step hooks changes anything."""
        optimizer: Any = self.optimizer
        common: Any = torch_optimizer
        before = [common._global_optimizer_pre_hooks, optimizer._optimizer_step_pre_hooks]
        after = [optimizer._optimizer_step_post_hooks, common._global_optimizer_post_hooks]
        if not any((*before, *after)):
            optimizer.step()
            return
        for hook in [hook for own in before for hook in own.values()]:
            self._watched(
                hook,
                (optimizer, (), {}),
                f"step pre-hook {_called(hook)} of the optimizer",
                "change gradients by Tensor.register_hook of parameters, or by clip_norm or "
                "clip_value",
            )
        with without([*before, *after]):
            optimizer.step()
        for hook in [hook for own in after for hook in own.values()]:
            self._watched(
                hook,
                (optimizer, (), {}),
                f"step post-hook {_called(hook)} of the optimizer",
                "keep weights where they belong inside the model (torch.nn.utils.parametrize)",
            )

    def _watched(self, hook: Hook, arguments: tuple[Any, ...], called: str, mend: str) -> None:
        """Calls it, and compares what was before with what is after."""
        before = [_copied(t) for p in self.parameters for t in (p, p.grad)]
        returned = hook(*arguments)
        after = [t for p in self.parameters for t in (p, p.grad)]
        same = all(_same(a, b) for a, b in zip(after, before, strict=True))
        if not same or isinstance(returned, tuple):
            raise Unseen(
                f"{called} changes the step, which hypergradients cannot see through; {mend}, or do "
                "without them (rewrite=False)"
            )


@contextmanager
def without(hooks: Sequence[MutableMapping[Any, Any]]) -> Iterator[None]:
    """Inside, these are empty; what is added there stays."""
    kept = [(own, dict(own)) for own in hooks if own]
    for own, _ in kept:
        own.clear()
    try:
        yield
    finally:
        for own, before in kept:
            added = dict(own)
            own.clear()
            own.update(before | added)


def through(hooks: Sequence[Hook], gradient: Tensor) -> Tensor:
    """What hooks of Tensor.register_hook make of a gradient, one after the other."""
    for hook in hooks:
        found = hook(gradient)
        gradient = gradient if found is None else found
    return gradient


def module_hooks(module: Any) -> Mapping[Any, Hook]:
    """Those that run in a module's backward pass."""
    return {**module._backward_hooks, **module._backward_pre_hooks}


def _copied(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().clone()


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.layout != torch.strided or a.shape != b.shape:
        return a.shape == b.shape
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _called(hook: Hook) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__)).rpartition(".")[2]

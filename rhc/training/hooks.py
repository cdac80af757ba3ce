"""User hooks on parameters and optimizers, in steps that are to be differentiated.
`Tensor.register_hook` on a parameter is a function of its gradient and is differentiated like
clipping. Other hooks run, but raise Unseen if they change anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from rhc.containers import same
from rhc.errors import Unseen

Hook = Callable[..., Any]


class Hooks:
    """The hooks of an optimizer and its parameters. names: of every parameter."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[Tensor],
        names: Sequence[str],
    ) -> None:
        self.optimizer, self.parameters, self.names = optimizer, parameters, names
        self.acting: str | None = None
        """The name of a parameter whose gradient a hook changed."""
        self.of_tensors = self._having("_backward_hooks")
        """Index of a parameter -> its hooks of Tensor.register_hook."""
        # Searching again at every step takes 10 µs of a small model's.
        self._none = not self.of_tensors and not self._having("_post_accumulate_grad_hooks")

    def _having(self, kind: str) -> dict[int, tuple[Hook, ...]]:
        hooks = {i: getattr(p, kind, None) for i, p in enumerate(self.parameters)}
        return {i: tuple(own.values()) for i, own in hooks.items() if own}

    def taken(self) -> AbstractContextManager[Any]:
        """Inside, hooks of parameters are off, so that backward yields raw gradients."""
        if self._none:
            return nullcontext()
        kinds = ("_backward_hooks", "_post_accumulate_grad_hooks")
        places = [(self.parameters[i], kind) for kind in kinds for i in self._having(kind)]
        return without([getattr(p, kind) for p, kind in places])

    def run(self) -> None:
        """Runs parameters' hooks on gradients; Unseen if a post-accumulate hook changes any."""
        if self._none:
            return
        self.of_tensors = self._having("_backward_hooks")
        with torch.no_grad():
            for i, hooks in self.of_tensors.items():
                p = self.parameters[i]
                if p.grad is not None:
                    p.grad, before = through(hooks, p.grad.clone()), p.grad
                    if not same(p.grad, before):
                        self.acting = self.names[i]
            for i, hooks in self._having("_post_accumulate_grad_hooks").items():
                p = self.parameters[i]
                for hook in hooks if p.grad is not None else ():
                    self._watched(
                        hook,
                        (p,),
                        f"hook {_called(hook)} (register_post_accumulate_grad_hook of parameter "
                        f"{self.names[i]!r})",
                        "change its gradient by Tensor.register_hook, whose hooks are followed",
                    )

    def step(self) -> None:
        """`optimizer.step()`. Raises Unseen where a step hook changes anything."""
        own: Any = self.optimizer
        common: Any = torch_optimizer
        before = [common._global_optimizer_pre_hooks, own._optimizer_step_pre_hooks]
        after = [own._optimizer_step_post_hooks, common._global_optimizer_post_hooks]
        if not any((*before, *after)):
            own.step()
            return
        self._step_hooks(
            before,
            "step pre-hook",
            "change gradients by Tensor.register_hook of parameters, or by clip_norm or clip_value",
        )
        with without([*before, *after]):
            own.step()
        self._step_hooks(
            after,
            "step post-hook",
            "keep weights where they belong inside the model (torch.nn.utils.parametrize)",
        )

    def _step_hooks(self, places: Sequence[Mapping[Any, Hook]], kind: str, mend: str) -> None:
        arguments: tuple[Any, ...] = (self.optimizer, (self.optimizer,), {})
        for hook in [hook for hooks in places for hook in hooks.values()]:
            self._watched(hook, arguments, f"{kind} {_called(hook)} of the optimizer", mend)

    def _watched(self, hook: Hook, arguments: tuple[Any, ...], called: str, mend: str) -> None:
        """Calls a hook and raises Unseen if it changed anything."""
        before = [_copied(t) for p in self.parameters for t in (p, p.grad)]
        returned = hook(*arguments)
        after = [t for p in self.parameters for t in (p, p.grad)]
        if not all(map(same, after, before)) or isinstance(returned, tuple):
            raise Unseen(
                f"{called} changes the step, which hypergradients cannot see through; {mend}, or "
                "do without them (rewrite=False)"
            )


@contextmanager
def watched_inside(model: nn.Module) -> Iterator[None]:
    """Raises Unseen at the end where hooks of modules or intermediate tensors changed gradients:
    these are then no derivatives of the forward pass, and second ones would be wrong."""
    acting: list[str] = []

    def watched(hook: Hook, called: str) -> Hook:
        def run(*arguments: Any) -> Any:
            given = arguments[-1] if len(arguments) < 3 else arguments[1]
            before = [_copied(t) for t in _tuple(given)]
            found = hook(*arguments)
            after = _tuple(given if found is None else found)
            if not all(map(same, after, before)):
                acting.append(f"{called} ({_called(hook)})")
            return found

        return run

    common: Any = torch.nn.modules.module
    all_modules = "a backward hook of all modules"
    places: list[tuple[MutableMapping[Any, Any], str]] = [
        (common._global_backward_hooks, all_modules),
        (common._global_backward_pre_hooks, all_modules),
    ]
    for name, module in model.named_modules():
        called = f"a backward hook of module {name or 'model'!r}"
        places += [(module._backward_hooks, called), (module._backward_pre_hooks, called)]
    register = Tensor.register_hook

    def noticed(t: Tensor, hook: Hook) -> Any:
        return register(t, watched(hook, "Tensor.register_hook inside the model or loss_fn"))

    with without([own for own, _ in places]) as kept:
        for (own, called), before in zip(places, kept, strict=True):
            own.update({key: watched(hook, called) for key, hook in before.items()})
        Tensor.register_hook = noticed  # type: ignore[method-assign]
        try:
            yield
        finally:
            Tensor.register_hook = register  # type: ignore[method-assign]
    if acting:
        raise Unseen(
            f"{acting[0]} changes gradients on their way back, which hypergradients cannot see "
            "through; change those of parameters, by their Tensor.register_hook, or do without "
            "hypergradients (rewrite=False)"
        )


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


@contextmanager
def without(hooks: Sequence[MutableMapping[Any, Any]]) -> Iterator[list[dict[Any, Any]]]:
    """Inside, these dicts are empty; afterwards they have old and new entries."""
    kept = [dict(own) for own in hooks]
    for own in hooks:
        own.clear()
    try:
        yield kept
    finally:
        for own, before in zip(hooks, kept, strict=True):
            added = {key: hook for key, hook in own.items() if key not in before}
            own.clear()
            own.update(before | added)


def through(hooks: Sequence[Hook], gradient: Tensor) -> Tensor:
    """The gradient after hooks of Tensor.register_hook, in order."""
    for hook in hooks:
        found = hook(gradient)
        gradient = gradient if found is None else found
    return gradient


def _copied(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().clone()


def _called(hook: Hook) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__name__)).rpartition(".")[2]

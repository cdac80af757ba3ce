"""Stock torchopt transformations as optimizer steps, steered by lr and noise."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from rhc.errors import InputError
from rhc.optimizers.base import DifferentiableOptimizer, Group, Scalar


def from_torchopt(
    transformation: Callable[[dict[str, Any]], GradientTransformation],
    slots: Mapping[str, str],
    *,
    elementwise: bool = True,
) -> DifferentiableOptimizer:
    """The step θ ← θ − α T(g) with a stock torchopt transformation T, for `register_dynamics`.

        rhc.optimizers.from_torchopt(
            lambda group: torchopt.chain(
                torchopt.transform.scale_by_rms(group["alpha"], group["eps"]),
                torchopt.transform.trace(group["momentum"]),
            ),
            slots={"nu": "square_avg", "trace": "momentum_buffer"},
        )

    Without `eps_root`, torchopt's slope is infinite where a second moment is zero.

    Args:
        transformation: param group (a copy, at the step's values) -> T, without lr or sign.
        slots: Field of T's state -> slot in optimizer.state[p], for every field; a step count may
            be a tensor or a number.
        elementwise: As in `register_dynamics`.

    Raises:
        InputError: At first use, if slots and T's state do not match.
    """
    if not callable(transformation):
        raise InputError(
            f"transformation must be a function of the param group, got "
            f"{type(transformation).__name__}; write lambda group: torchopt.transform.…"
        )

    def stock_of(group: Group, controls: Mapping[str, Scalar]) -> GradientTransformation:
        own = dict(group)
        for name, value in controls.items():
            if name == "momentum" and "betas" in own:
                own["betas"] = (value, *own["betas"][1:])
            elif name != "lr":
                own[name] = value
        made = transformation(own)
        if not isinstance(made, GradientTransformation):
            raise InputError(
                f"transformation must return a torchopt GradientTransformation, got "
                f"{type(made).__name__}"
            )
        return made

    def step(
        group: Group, controls: Mapping[str, Scalar], shapes: Sequence[torch.Size]
    ) -> GradientTransformation:
        stock = stock_of(group, controls)
        lr = controls.get("lr", group["lr"])

        def update(
            updates: Tensor, state: Any, *, params: Any = None, inplace: bool = False
        ) -> tuple[Tensor, Any]:
            fresh, *slots_before = state
            with torch.no_grad():
                one = torch.zeros(1, dtype=params.dtype, device=params.device)
                skeleton = stock.init(one)
                if not fresh:
                    # torchopt's `trace` keeps its first call in a closure, so make it here.
                    stock.update(one, skeleton, params=one, inplace=False)
            before = _filled(skeleton, iter(slots_before))
            # torchopt defaults to inplace, which would overwrite tensors of the graph.
            direction, after = stock.update(updates, before, params=params, inplace=False)
            return -lr * direction, _flat_state(after, fresh=False)

        return GradientTransformation(lambda p: _flat_state(stock.init(p), fresh=True), update)

    def state(states: Sequence[Mapping[str, Any]], params: Sequence[Tensor], group: Group) -> Any:
        flat = torch.cat([p.detach().reshape(-1) for p in params])
        begin = stock_of(group, {}).init(flat)
        names = [name for name, _ in _leaves(begin)]
        _check_slots(slots, names)
        fresh = _flat_state(begin, fresh=True)
        if any(s.get(slot) is None for s in states for slot in slots.values()):
            return fresh
        live = (
            _live(leaf, [s[slots[name]] for s in states])
            for name, leaf in zip(names, fresh[1:], strict=True)
        )
        return type(fresh)(False, *live)

    return DifferentiableOptimizer(
        "a torchopt transformation", step, state, elementwise, controls=("lr",)
    )


def _flat_state(node: Any, *, fresh: bool) -> Any:
    """torchopt's nested state as one NamedTuple. fresh: before the first step."""
    leaves = _leaves(node)
    return _state_type(tuple(name for name, _ in leaves))(fresh, *(leaf for _, leaf in leaves))


@cache
def _state_type(names: tuple[str, ...]) -> Any:
    # Names may repeat until _check_slots rejects them.
    return namedtuple("StockState", ["fresh", *names], rename=True)


def _leaves(node: Any, name: str = "") -> list[tuple[str, Any]]:
    if not isinstance(node, tuple):
        return [(name, node)]
    names = getattr(node, "_fields", [name] * len(node))
    return [leaf for n, child in zip(names, node, strict=True) for leaf in _leaves(child, n)]


def _filled(node: Any, leaves: Iterator[Any]) -> Any:
    if not isinstance(node, tuple):
        return next(leaves)
    children = [_filled(child, leaves) for child in node]
    return type(node)(*children) if hasattr(node, "_fields") else tuple(children)


def _live(leaf: Any, values: Sequence[Any]) -> Any:
    """The live optimizer's values in the form of `leaf`: a vector, or one number."""
    if isinstance(leaf, Tensor) and leaf.dim() == 1:
        return torch.cat([v.detach().reshape(-1) for v in values])
    if any(float(v) != float(values[0]) for v in values):
        raise InputError(
            f"parameters that step together have different counts, {sorted(map(float, values))}; "
            "keep the count in optimizer.state[p]['step'], by which they are told apart"
        )
    if isinstance(leaf, Tensor):
        return torch.as_tensor(values[0]).detach().to(leaf.device, leaf.dtype, copy=True)
    return type(leaf)(values[0])


def _check_slots(slots: Mapping[str, str], fields: Sequence[str]) -> None:
    there = ", ".join(dict.fromkeys(fields)) or "none"
    for name in slots:
        if name not in fields:
            raise InputError(
                f"slots names {name!r}, which the transformation's state does not have; its fields "
                f"are: {there}"
            )
    for name in dict.fromkeys(fields):
        if name not in slots:
            raise InputError(
                f"slots does not say where the optimizer keeps {name!r} of the transformation's "
                f"state; name the slot of optimizer.state[p] for each of: {there}"
            )
        if fields.count(name) > 1:
            raise InputError(
                f"{name!r} occurs {fields.count(name)} times in the transformation's state; write "
                "the transformation and its state as functions for register_dynamics"
            )

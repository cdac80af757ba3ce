"""What the adjoint needs to know of an optimizer: the record, and helpers to fill it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from rhc.errors import InputError
from rhc.optimizers.transformations import Scalar

STEERED = ("lr", "momentum", "weight_decay")
"""The controls that act inside Φ; the noise acts on the gradient before it."""

Group = Mapping[str, Any]

TransformationOf = Callable[
    [Group, Mapping[str, Scalar], Sequence[torch.Size]], GradientTransformation
]
"""(param group, controls of the step, shapes of the parameters whose elements the vectors hold)."""

StateOf = Callable[[Sequence[Mapping[str, Any]], Sequence[Tensor], Group], Any]
"""(per-parameter optimizer states, the parameters, param group) -> the transformation's state."""

Advance = Callable[
    [Group, Mapping[str, float], Tensor, Tensor | None, Any], tuple[Tensor | None, Any]
]
"""(param group, controls, gradient, parameters, state) -> (parameters, state) one step later."""


class Pulled(NamedTuple):
    """What a pullback returns; None stands for zero.

    parameters: the costate of θ before the step, or the very tensor that was given where the step
    leaves it as it is. state: one entry per floating-point slot before the step. gradient: λ_g.
    controls: name -> dJ/du, 0-dim float64, in natural units.
    """

    parameters: Tensor | None
    state: list[Tensor | None]
    gradient: Tensor | None
    controls: dict[str, Tensor]


class PullBack(Protocol):
    """The pullback through one step Φ in closed form, at the step's own values.

    controls: plain floats. gradient, parameters: flat vectors; state: before the step. The costates
    are of after the step: costate_state has one entry per floating-point slot there, or none at all
    for zeros. wanted: the controls whose derivatives are needed. Nothing given is changed. Returns
    None where the closed form does not cover the options of the group.
    """

    def __call__(
        self,
        group: Group,
        controls: Mapping[str, float],
        gradient: Tensor,
        parameters: Tensor | None,
        state: Any,
        costate_parameters: Tensor | None,
        costate_state: Sequence[Tensor | None],
        wanted: Collection[str] = STEERED,
    ) -> Pulled | None: ...


class Fold(NamedTuple):
    """A Φ whose state after the step takes the gradient's place in memory, and says all of it.

    covers(group, controls): whether that is so at this step. onto(group, controls, gradient, state)
    writes the state after the step over the gradient and returns it; off(group, controls, after,
    state) writes the gradient back, to rounding. pull_back: as `PullBack`, given the states before
    and after in place of gradient, parameters and state.
    """

    covers: Callable[[Group, Mapping[str, float]], bool]
    onto: Callable[[Group, Mapping[str, float], Tensor, Any], Any]
    off: Callable[[Group, Mapping[str, float], Any, Any], None]
    pull_back: Callable[..., Pulled]


@dataclass(frozen=True)
class Dynamics:
    """What the adjoint needs to know of a torch.optim optimizer.

    name: as errors call it. transformation: the step Φ as a torchopt GradientTransformation on
    vectors of the concatenated elements of parameters that step alike. state: its state, read from
    the live optimizer, as a NamedTuple of vectors, numbers and None; costates are carried for the
    floating-point tensors among them.

    elementwise: whether Φ treats every element alone; otherwise every parameter has vectors of its
    own, and the transformation reshapes them by shapes[0]. controls: those that the transformation
    takes as tensors, of lr, momentum and weight_decay; None for all.

    pull_back, advance: the same Φ in closed form, backwards and forwards, for speed; None where
    autograd and the transformation do it. blind: whether both also take None for the parameters
    where there is no weight decay, nor a derivative by it: they never look at θ then. fold: in that
    case, the step in the gradient's memory. precision: the machine epsilon of what the optimizer
    computes in, where that is coarser than its parameters.
    """

    name: str
    transformation: TransformationOf
    state: StateOf
    elementwise: bool = True
    controls: tuple[str, ...] | None = None
    pull_back: PullBack | None = None
    advance: Advance | None = None
    blind: bool = False
    fold: Fold | None = None
    precision: float = 0.0

    def check_steerable(self, control: str) -> None:
        """Raises InputError where the transformation does not take `control` as a tensor."""
        if self.controls is None or control == "noise" or control in self.controls:
            return
        steerable = ", ".join((*self.controls, "noise"))
        raise InputError(
            f"control {control!r} of {self.name} cannot be steered: its dynamics were registered "
            f"without it; choose of {steerable}"
        )


def flat_slot(
    states: Sequence[Mapping[str, Any]], slot: str, parameters: Sequence[Tensor]
) -> Tensor:
    """The elements of one slot of all parameters as one vector: always a copy.

    Zeros shaped like the parameters where they have no such slot, as before the first step.
    """
    found = flat_slot_or_none(states, slot)
    if found is not None:
        return found
    return torch.cat([torch.zeros_like(p).reshape(-1) for p in parameters])


def flat_slot_or_none(states: Sequence[Mapping[str, Any]], slot: str) -> Tensor | None:
    """As `flat_slot`, but None where a parameter has no such slot."""
    tensors = [state.get(slot) for state in states]
    if any(t is None for t in tensors):
        return None
    return torch.cat([t.detach().reshape(-1) for t in tensors if t is not None])


def control_value(group: Group, controls: Mapping[str, Scalar], name: str) -> Scalar:
    """A control of the step; the group's own value where the step does not set it."""
    if name in controls:
        return controls[name]
    return group["betas"][0] if name == "momentum" and "betas" in group else group[name]

"""Optimizer steps as differentiable functions, and which optimizer has which.

The live steps of a run are taken by the optimizer itself; the functions here are only used to look
back at them. `transformations` has the steps as pure functions, `closed_forms` the pullbacks of
the commonest, `optimizers` ties them to torch.optim, and `stock` to torchopt's own transformations.
`register_dynamics` adds anyone's optimizer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from rhc.errors import InputError
from rhc.optimizers.base import (
    STEERED,
    Dynamics,
    Fold,
    PullBack,
    Pulled,
    StateOf,
    TransformationOf,
    flat_slot,
)
from rhc.optimizers.specifications import TORCH_DYNAMICS
from rhc.optimizers.stock import from_torchopt
from rhc.optimizers.transformations import (
    ROOT_EPSILON,
    AdagradState,
    AdamaxState,
    AdamState,
    LionState,
    MuonState,
    NAdamState,
    RAdamState,
    RMSpropState,
    Scalar,
    SGDState,
    adagrad,
    adam,
    adamax,
    adamw,
    lion,
    muon,
    nadam,
    radam,
    rmsprop,
    sgd,
)

__all__ = [
    "DYNAMICS",
    "ROOT_EPSILON",
    "STEERED",
    "AdagradState",
    "AdamState",
    "AdamaxState",
    "Dynamics",
    "Fold",
    "LionState",
    "MuonState",
    "NAdamState",
    "PullBack",
    "Pulled",
    "RAdamState",
    "RMSpropState",
    "SGDState",
    "Scalar",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "dynamics_of",
    "flat_slot",
    "from_torchopt",
    "lion",
    "muon",
    "nadam",
    "radam",
    "register_dynamics",
    "rmsprop",
    "sgd",
]

DYNAMICS: dict[type[torch.optim.Optimizer], Dynamics] = dict(TORCH_DYNAMICS)
"""Optimizer class -> its dynamics: torch.optim's, and those that were registered."""


def register_dynamics(
    optimizer: type[torch.optim.Optimizer],
    transformation: TransformationOf | Dynamics,
    state: StateOf | None = None,
    *,
    name: str | None = None,
    elementwise: bool = True,
    controls: tuple[str, ...] | None = None,
) -> None:
    """Makes an optimizer class of your own one that rhc can look back at.

    optimizer: a subclass of torch.optim.Optimizer, met by its exact class. transformation: (param
    group, controls, shapes) -> a torchopt GradientTransformation that equals the optimizer's step,
    written in tensor operations that autograd follows. It works on vectors: the concatenated
    elements of parameters that step alike. controls is name -> value, floats or 0-dim tensors, of
    lr, momentum (β1 where the group has betas) and weight_decay, as far as the group has them.
    state: (optimizer.state of every parameter, the parameters, param group) -> the transformation's
    state: a NamedTuple of vectors, numbers and None. It is also called before the first step.

    elementwise: False for a step that looks at whole matrices; every parameter then has vectors of
    its own, and shapes[0] is its shape. controls: those that may be steered, where not all may.
    name: as errors call it, default the class's. `from_torchopt` gives a finished Dynamics in place
    of transformation and state. Registering a class again replaces what it had.

    A complete example, for a Lion whose groups have lr, betas and weight_decay:

        def transformation(group, controls, shapes):
            return rhc.optimizers.lion(
                controls.get("lr", group["lr"]),
                controls.get("momentum", group["betas"][0]),
                group["betas"][1],
                controls.get("weight_decay", group["weight_decay"]),
            )

        def state(states, parameters, group):
            return rhc.optimizers.LionState(rhc.optimizers.flat_slot(states, "exp_avg", parameters))

        rhc.register_dynamics(Lion, transformation, state, controls=("lr", "weight_decay"))

    (The sign in Lion has no slope, so that its momentum is not worth steering: `lion`.)

    Raises InputError for arguments that cannot be used, and at the first use for a transformation
    or a state of another form. It does not check that the step is the optimizer's: compare both
    over a few steps in a test.
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise InputError(
            f"optimizer must be a subclass of torch.optim.Optimizer, got {optimizer!r}; give the "
            "class, not an instance"
        )
    if optimizer in TORCH_DYNAMICS:
        raise InputError(
            f"{optimizer.__name__} of torch.optim has its dynamics already; register a subclass"
        )
    called = optimizer.__name__ if name is None else name
    if isinstance(transformation, Dynamics):
        if state is not None or controls is not None or not elementwise:
            raise InputError(
                "a finished Dynamics has its own state, controls and elementwise; give it alone"
            )
        DYNAMICS[optimizer] = dataclasses.replace(transformation, name=called)
        return
    for argument, value in (("transformation", transformation), ("state", state)):
        if not callable(value):
            raise InputError(
                f"{argument} must be a function, got {type(value).__name__}; see the example of "
                "rhc.register_dynamics"
            )
    unknown = [c for c in controls or () if c not in STEERED]
    if unknown or isinstance(controls, str):
        raise InputError(
            f"controls must be a tuple of some of {', '.join(STEERED)}, got {controls!r}"
        )
    assert state is not None
    DYNAMICS[optimizer] = Dynamics(
        called,
        _checked_transformation(called, transformation),
        _checked_state(called, state),
        elementwise,
        None if controls is None else tuple(controls),
    )


def dynamics_of(optimizer: torch.optim.Optimizer) -> Dynamics:
    """The dynamics of `optimizer`, by its exact class: a subclass may step differently."""
    if type(optimizer) in DYNAMICS:
        return DYNAMICS[type(optimizer)]
    names = ", ".join(dynamics.name for dynamics in TORCH_DYNAMICS.values())
    raise InputError(
        f"optimizer {type(optimizer).__name__} has no differentiable dynamics; use one of {names} "
        "of torch.optim, give it some with rhc.register_dynamics, or turn rewriting off "
        "(rewrite=False, --no-rewrite)"
    )


def _checked_transformation(name: str, transformation: TransformationOf) -> TransformationOf:
    def checked(group: Any, controls: Any, shapes: Any) -> Any:
        made = transformation(group, controls, shapes)
        if not callable(getattr(made, "update", None)):
            raise InputError(
                f"the transformation registered for {name} must return a torchopt "
                f"GradientTransformation, got {type(made).__name__}"
            )
        return made

    return checked


def _checked_state(name: str, state: StateOf) -> StateOf:
    def checked(states: Any, parameters: Any, group: Any) -> Any:
        made = state(states, parameters, group)
        if not isinstance(made, tuple) or not hasattr(made, "_fields"):
            raise InputError(
                f"the state registered for {name} must return a NamedTuple, got "
                f"{type(made).__name__}"
            )
        size = sum(p.numel() for p in parameters)
        for field, value in zip(made._fields, made, strict=True):
            wrong = type(value).__name__
            if isinstance(value, torch.Tensor):
                if value.dim() == 0 or value.shape == (size,):
                    continue
                wrong = f"a tensor of shape {tuple(value.shape)}"
            elif value is None or isinstance(value, (int, float)):
                continue
            raise InputError(
                f"{field} in the state registered for {name} must be a vector of {size} elements, "
                f"a number or None, got {wrong}; rhc.optimizers.flat_slot makes vectors of slots"
            )
        return made

    return checked

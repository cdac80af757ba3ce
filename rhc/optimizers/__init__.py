"""Optimizer steps as differentiable functions, and which optimizer has which.

The live steps of a run are taken by the optimizer itself; the functions here are only used to
differentiate them. A family a file (`sgd_family`, `adam_family`, `rms_family`): of each optimizer
its step, its state and, where it is worth one, its vjp in closed form. `stock` has torchopt's own
transformations, and `register_dynamics` adds anyone's optimizer.
"""

from __future__ import annotations

import dataclasses

import torch

from rhc.errors import InputError
from rhc.optimizers.adam_family import adam, adamax, adamw, nadam, radam
from rhc.optimizers.base import (
    STEERED,
    DifferentiableOptimizer,
    Fold,
    Scalar,
    StateOf,
    TransformationOf,
    Vjp,
    flat_slot,
    of_torch,
)
from rhc.optimizers.rms_family import adagrad, rmsprop
from rhc.optimizers.sgd_family import LionState, lion, muon, sgd
from rhc.optimizers.stock import from_torchopt

__all__ = [
    "DIFFERENTIABLE",
    "DifferentiableOptimizer",
    "Fold",
    "LionState",
    "Scalar",
    "Vjp",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "differentiable",
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

TORCH: dict[type[torch.optim.Optimizer], DifferentiableOptimizer] = {
    torch.optim.SGD: of_torch("SGD", sgd),
    torch.optim.Adam: of_torch("Adam", adam),
    torch.optim.AdamW: of_torch("AdamW", adamw),
    torch.optim.RMSprop: of_torch("RMSprop", rmsprop),
    torch.optim.NAdam: of_torch("NAdam", nadam),
    torch.optim.RAdam: of_torch("RAdam", radam),
    torch.optim.Adamax: of_torch("Adamax", adamax),
    torch.optim.Adagrad: of_torch("Adagrad", adagrad),
    torch.optim.Muon: of_torch(
        "Muon",
        muon,
        elementwise=False,
        precision=torch.finfo(torch.bfloat16).eps,  # Newton and Schulz's iteration
    ),
}

DIFFERENTIABLE = dict(TORCH)
"""Optimizer class -> its differentiable form: torch.optim's, and those that were registered."""


def register_dynamics(
    optimizer: type[torch.optim.Optimizer],
    transformation: TransformationOf | DifferentiableOptimizer,
    state: StateOf | None = None,
    *,
    name: str | None = None,
    elementwise: bool = True,
    controls: tuple[str, ...] | None = None,
) -> None:
    """Makes an optimizer class of your own one whose steps rhc can differentiate.

    It does not check that the step is the optimizer's: compare both over a few steps in a test.

    Args:
        optimizer: a subclass of torch.optim.Optimizer, met by its exact class.
        transformation: (param group, controls, shapes) -> a torchopt GradientTransformation that
            equals the optimizer's step, written in tensor operations that autograd follows. It
            works on vectors: the concatenated elements of parameters that step alike. controls is
            name -> value, floats or 0-dim tensors, of lr, momentum (β1 where the group has betas)
            and weight_decay, as far as the group has them. Or what `from_torchopt` returns, in
            place of transformation and state.
        state: (optimizer.state of every parameter, the parameters, param group) -> the
            transformation's state: a NamedTuple of vectors, numbers and None. It is also called
            before the first step.
        name: as errors call it, default the class's.
        elementwise: False for a step that looks at whole matrices; every parameter then has vectors
            of its own, and shapes[0] is its shape.
        controls: those that may be steered, where not all may.

    Raises:
        InputError: for arguments that cannot be used, and at the first use for a transformation or
            a state of another form.

    Registering a class again replaces what it had.

    Example:
        For a Lion whose groups have lr, betas and weight_decay (the sign in Lion has no slope, so
        that its momentum is not worth steering):

            def transformation(group, controls, shapes):
                return rhc.optimizers.lion(
                    controls.get("lr", group["lr"]),
                    controls.get("momentum", group["betas"][0]),
                    group["betas"][1],
                    controls.get("weight_decay", group["weight_decay"]),
                )

            def state(states, parameters, group):
                return rhc.optimizers.LionState(
                    rhc.optimizers.flat_slot(states, "exp_avg", parameters)
                )

            rhc.register_dynamics(Lion, transformation, state, controls=("lr", "weight_decay"))
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        raise InputError(
            f"optimizer must be a subclass of torch.optim.Optimizer, got {optimizer!r}; give the "
            "class, not an instance"
        )
    if optimizer in TORCH:
        raise InputError(
            f"{optimizer.__name__} of torch.optim has its dynamics already; register a subclass"
        )
    called = optimizer.__name__ if name is None else name
    if isinstance(transformation, DifferentiableOptimizer):
        if state is not None or controls is not None or not elementwise:
            raise InputError(
                "a finished DifferentiableOptimizer has its own state, controls and elementwise; "
                "give it alone"
            )
        DIFFERENTIABLE[optimizer] = dataclasses.replace(transformation, name=called)
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
    DIFFERENTIABLE[optimizer] = DifferentiableOptimizer(
        called,
        transformation,
        state,
        elementwise,
        None if controls is None else tuple(controls),
    )


def differentiable(optimizer: torch.optim.Optimizer) -> DifferentiableOptimizer:
    """Of `optimizer`, by its exact class: a subclass may step differently."""
    if type(optimizer) in DIFFERENTIABLE:
        return DIFFERENTIABLE[type(optimizer)]
    names = ", ".join(known.name for known in TORCH.values())
    raise InputError(
        f"optimizer {type(optimizer).__name__} has no differentiable dynamics; use one of {names} "
        "of torch.optim, give it some with rhc.register_dynamics, or turn rewriting off "
        "(rewrite=False, --no-rewrite)"
    )

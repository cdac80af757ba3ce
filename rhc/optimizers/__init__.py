"""Optimizer steps as differentiable functions, by optimizer class.

Live steps are taken by the optimizer itself; these functions only differentiate them.
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
from rhc.optimizers.sgd_family import LionState, lion, muon, sgd, sgd_fold
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
    torch.optim.SGD: of_torch("SGD", sgd, fold=sgd_fold),
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
"""Optimizer class -> its differentiable form; extended by `register_dynamics`."""


def register_dynamics(
    optimizer: type[torch.optim.Optimizer],
    transformation: TransformationOf | DifferentiableOptimizer,
    state: StateOf | None = None,
    *,
    name: str | None = None,
    elementwise: bool = True,
    controls: tuple[str, ...] | None = None,
) -> None:
    """Registers the differentiable step of an optimizer class, replacing any earlier one.

    Nothing checks that the step is the optimizer's: compare them over a few steps in a test.

    Args:
        optimizer: A subclass of torch.optim.Optimizer, matched exactly.
        transformation: (param group, controls, shapes) -> a torchopt GradientTransformation on the
            concatenated elements of parameters that step alike. controls: lr, momentum (β1 with
            betas) and weight_decay, floats or 0-dim tensors. Or the result of `from_torchopt`,
            without state.
        state: (optimizer.state of every parameter, parameters, param group) -> the transformation's
            state, a NamedTuple of vectors, numbers and None; also called before the first step.
        name: For errors; default the class's.
        elementwise: False if a step needs whole matrices; every parameter then has its own vectors
            and shapes[0] is its shape.
        controls: Those that can be steered; None for all.

    Raises:
        InputError: An argument is invalid; at first use also for a wrong transformation or state.

    Example:
        Lion, whose sign has no slope, so momentum is not worth steering:

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
    """The form of `optimizer`, by its exact class, since a subclass may step differently."""
    if type(optimizer) in DIFFERENTIABLE:
        return DIFFERENTIABLE[type(optimizer)]
    names = ", ".join(known.name for known in TORCH.values())
    raise InputError(
        f"optimizer {type(optimizer).__name__} has no differentiable dynamics; use one of {names} "
        "of torch.optim, give it some with rhc.register_dynamics, or turn rewriting off "
        "(rewrite=False, --no-rewrite)"
    )

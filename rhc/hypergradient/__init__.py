"""Exact hypergradients dJ/du_t of a window, for every step and control, in one call.

`hypergradient` is the public edge: it checks its arguments once, rolls, looks back, and leaves
model, optimizer and random state as it found them. `segments` is the engine, `products` the
Hessian products, `crosscheck` an independent engine on the library `higher`.
"""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rhc.errors import InputError
from rhc.hypergradient.products import PRODUCT_COST, PRODUCTS, Product
from rhc.hypergradient.segments import Adjoint, Terminal, adjoint, kept_states
from rhc.objective import Average, Objective
from rhc.plant import LossFn, Plant, Trajectory
from rhc.schedule import CONTROLS, Schedule, control

Engine = Literal["adjoint", "higher"]
ENGINES: tuple[Engine, ...] = ("adjoint", "higher")


SAME_GRADIENT = 0.01
"""Largest relative difference between a step's gradient and the same computed again. Other kernels
and reduced precision stay below it; hidden state and randomness do not."""


@dataclass(frozen=True)
class Outcome:
    """How a hypergradient ended; `message` says the mend.

    name: "successful"; "non-finite"; or "inconsistent", where a step that is computed again is not
    the step that was rolled, so that the numbers cannot be trusted.

    step: the absolute step at which it began, going backwards; None where it succeeded.
    """

    name: str
    message: str
    step: int | None = None

    @property
    def successful(self) -> bool:
        return self.name == "successful"


@dataclass(frozen=True)
class Hypergradient:
    """J and its derivatives.

    value: J. grad: control -> (K,) float64, dJ/du_t in natural units. costate_norms: (K,) float64,
    |dJ/ds_t|. terminal: the terminal loss, NaN without one. losses: (K,) as rolled.
    gradient_equivalents: what looking back cost, in gradient evaluations.
    """

    value: float
    grad: dict[str, Tensor]
    costate_norms: Tensor
    result: Outcome
    terminal: float
    losses: Tensor
    engine: str
    product: str
    segment: int
    hessian_products: int
    gradient_equivalents: float


def hypergradient(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFn,
    batches: Sequence[Any],
    *,
    controls: Mapping[str, Any],
    terminal: Callable[[nn.Module], Tensor] | None = None,
    stage_weight: float = 1.0,
    average: float | None = None,
    segment: int | Literal["auto"] = "auto",
    product: Product | Literal["auto"] = "auto",
    engine: Engine = "adjoint",
    seed: int = 0,
    clip_norm: float | None = None,
) -> Hypergradient:
    """dJ/du_t for J = stage_weight · Σ_t ℓ_t + terminal(θ̄), over len(batches) optimizer steps.

    controls: name -> (K,) values in natural units, or one number for all steps; each is used in
    the steps and differentiated. What is absent stays as the optimizer has it. terminal: a
    differentiable scalar of the model, taken at the end of the window, or at the exponential
    average of its iterates with decay `average`. segment: steps per rebuilt graph, 1 to K.
    product: how the Hessian is applied (exact, forward-difference, central-difference; the
    differences with segment 1 only). seed: of the gradient noise.

    Model, optimizer and random state are left as they were found. Raises InputError for arguments
    that cannot be used. A non-finite result is reported in `result`, not raised. Buffers other
    than BatchNorm's running statistics are treated as constants of each step, and those statistics
    are followed for a terminal that reads them (in eval mode), not for a loss_fn that does.
    """
    batches = list(batches)
    if not batches:
        raise InputError("batches is empty; give one batch per step of the window")
    plant = Plant(model, optimizer, loss_fn, seed=seed, clip_norm=clip_norm)
    schedule = _schedule(plant, controls, len(batches), seed)
    objective = Objective(
        loss_weight=stage_weight, terminal_weight=0.0 if terminal is None else 1.0, average=average
    )
    before = plant.snapshot()
    grads = [p.grad for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        for p in model.parameters():
            p.grad = None  # backward would add to those that the optimizer does not hold
        with torch.enable_grad():
            return window_hypergradient(
                plant,
                batches,
                schedule,
                objective,
                tuple(controls),
                terminal=terminal,
                segment=segment,
                product=product,
                engine=engine,
            )
    finally:
        plant.restore(before)
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g
        for module, training in modes:
            module.training = training


def window_hypergradient(
    plant: Plant,
    batches: Sequence[Any],
    schedule: Schedule,
    objective: Objective,
    controls: Sequence[str],
    *,
    terminal: Terminal | None,
    segment: int | Literal["auto"],
    product: Product | Literal["auto"],
    engine: Engine,
) -> Hypergradient:
    """Rolls the live plant through the window and looks back; the plant is left at its end."""
    segment, product = resolve(len(batches), segment, product, engine, plant)
    check_steerable(plant, schedule, controls)
    if engine == "higher":
        from rhc.hypergradient.crosscheck import higher_hypergradient

        return higher_hypergradient(plant, batches, schedule, objective, controls, terminal)
    average = Average(objective.average)
    trajectory = plant.roll(
        batches, schedule, record=kept_states(len(batches), segment), average=average
    )
    return look_back(
        plant, trajectory, objective, controls, average, terminal, segment=segment, product=product
    )


def look_back(
    plant: Plant,
    trajectory: Trajectory,
    objective: Objective,
    controls: Sequence[str],
    average: Average,
    terminal: Terminal | None,
    *,
    segment: int,
    product: Product,
) -> Hypergradient:
    """The adjoint of a recorded roll whose end is the live state; parameters are left alone."""
    losses = torch.stack([x.double().cpu() for x in trajectory.losses])
    plant.optimizer.zero_grad()  # the last step's gradients are on the trajectory
    found, end = adjoint(
        plant,
        trajectory,
        objective,
        controls,
        terminal=terminal,
        average=average.values,
        segment=segment,
        product=product,
    )
    value = stage_sum(objective, trajectory)
    if end is not None:
        value += objective.terminal_weight * float(end)
    missing = (0, len(trajectory.schedule) - len(trajectory))  # a diverged roll stops early
    return Hypergradient(
        value=value,
        grad={n: pad(g, missing, value=math.nan) for n, g in found.gradient.items()},
        costate_norms=pad(found.costate_norms, missing, value=math.nan),
        result=_outcome(found, trajectory, value),
        terminal=math.nan if end is None else float(end),
        losses=pad(losses, missing, value=math.nan),
        engine="adjoint",
        product=product,
        segment=segment,
        hessian_products=found.hessian_products,
        gradient_equivalents=found.hessian_products * PRODUCT_COST[product] + (end is not None),
    )


def stage_sum(objective: Objective, trajectory: Trajectory) -> float:
    """Σ_t of the stage costs that a roll observed."""
    costs = [
        objective.stage(loss.double(), metrics)
        for loss, metrics in zip(trajectory.losses, trajectory.metrics, strict=True)
    ]
    return float(sum(float(c) for c in costs if c is not None))


def resolve(
    steps: int,
    segment: int | Literal["auto"],
    product: Product | Literal["auto"],
    engine: Engine,
    plant: Plant,
) -> tuple[int, Product]:
    """The segment length and product to use; settings that do not go together are InputErrors."""
    _known("engine", engine, ENGINES)
    if product != "auto":
        _known("product", product, ("auto", *PRODUCTS))
    _ = plant.dynamics
    if segment != "auto" and not (isinstance(segment, int) and 1 <= segment <= steps):
        raise InputError(
            f"segment must be in [1, {steps}] for a window of {steps} steps, got {segment}; "
            "use 1 for the least memory"
        )
    if engine == "higher" and segment not in ("auto", steps):
        raise InputError(
            f"engine 'higher' unrolls the whole window, got segment {segment} of {steps} steps; "
            "use segment 'auto' or engine 'adjoint'"
        )
    chosen: Product = "exact" if product == "auto" else product
    if chosen != "exact" and (segment not in ("auto", 1) or engine != "adjoint"):
        raise InputError(
            f"product {chosen!r} needs engine 'adjoint' with segment 1, got engine {engine!r} with "
            f"segment {segment}; use product 'exact' or segment 1"
        )
    return 1 if segment == "auto" else segment, chosen


def check_steerable(plant: Plant, schedule: Schedule, controls: Sequence[str]) -> None:
    """Every control in `controls` must exist, be had by the optimizer and be able to move."""
    for name in controls:
        control(name)
        if name not in plant.controls.available:
            raise InputError(
                f"control {name!r} does not exist for {type(plant.optimizer).__name__}; choose of "
                f"{', '.join(plant.controls.available)}"
            )
        if name == "momentum" and bool((schedule[name] == 0).any()):
            raise InputError(
                "momentum cannot be steered from 0, where the optimizer keeps no momentum buffer; "
                "give the optimizer momentum > 0 or leave momentum out of controls"
            )


def _schedule(plant: Plant, controls: Mapping[str, Any], steps: int, seed: int) -> Schedule:
    if not controls:
        raise InputError(f"controls is empty; name at least one of {', '.join(CONTROLS)}")
    values = {}
    for name, given in controls.items():
        control(name)
        value = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
        if value.dim() == 0:
            value = value.expand(steps)
        if value.shape != (steps,):
            raise InputError(
                f"controls[{name!r}] must have one value per batch, shape ({steps},), got "
                f"{tuple(value.shape)}"
            )
        if bool((value < 0).any()) or (name == "momentum" and bool((value >= 1).any())):
            raise InputError(
                f"controls[{name!r}] must be ≥ 0{' and < 1' if name == 'momentum' else ''}, got "
                f"{float(value.min()):g} … {float(value.max()):g}"
            )
        values[name] = value
    return Schedule(values, seed=seed)


def _outcome(found: Adjoint, trajectory: Trajectory, value: float) -> Outcome:
    bad = ~torch.isfinite(found.costate_norms)
    for g in found.gradient.values():
        bad |= ~torch.isfinite(g)
    last = trajectory.start + len(trajectory) - 1
    if not bool(bad.any()):
        if trajectory.diverged is None and math.isfinite(value):
            worst = max(found.discrepancies, key=lambda i: found.discrepancies[i], default=0)
            share = found.discrepancies.get(worst, 0.0)
            if share <= SAME_GRADIENT:
                return Outcome("successful", "every hypergradient is finite")
            step = trajectory.start + worst
            return Outcome(
                "inconsistent",
                f"the gradient of step {step}, computed again, differs by {share:.2g} of its norm; "
                "look for randomness or state that loss_fn keeps outside the model, activation "
                "checkpointing with segment > 1, and operators that are not deterministic",
                step,
            )
        message = f"the loss is not finite at step {last}; use a shorter window or a lower lr"
        return Outcome("non-finite", message, last)
    step = trajectory.start + int(bad.nonzero().max())
    return Outcome(
        "non-finite",
        f"the costate is not finite from step {step} backwards; use a shorter window or a lower lr",
        step,
    )


def _known(argument: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown {argument} {value!r}: {hint}there are: {', '.join(known)}")


class _CallableModule(ModuleType):
    """Importing this package binds `rhc.hypergradient` to it, so it must answer for the function.

    (Importing the function eagerly in `rhc` would bind the name first, and make `rhc --help` wait
    for torch.)
    """

    __call__ = staticmethod(hypergradient)


sys.modules[__name__].__class__ = _CallableModule

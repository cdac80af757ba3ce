"""Exact hypergradients dJ/du_t of a window, for every step and control, in one call."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rhc.containers import kept
from rhc.data_weights import DataWeights
from rhc.distributed import Ranks, Shard, Unshared, ranks_of, synchronised, unwrapped
from rhc.distributed.ranks import Group
from rhc.errors import InputError, whole_number
from rhc.hypergradient.adjoint import Boundary, Damping, Terminal
from rhc.hypergradient.hvp import PRODUCT_COST, PRODUCTS, Product
from rhc.hypergradient.memory_plan import Plan
from rhc.hypergradient.outcome import SAME_GRADIENT, Outcome
from rhc.hypergradient.reverse_pass import Hypergradient, ReversePass, stage_sum
from rhc.schedule import CONTROLS, Schedule, control
from rhc.training import memory
from rhc.training.batches import MicroBatches, batch_size
from rhc.training.losses import LossFn
from rhc.training.module_state import Buffers
from rhc.training.objective import Average, Objective, Reward
from rhc.training.plant import Plant

__all__ = [
    "ENGINES",
    "PRODUCTS",
    "PRODUCT_COST",
    "SAME_GRADIENT",
    "Boundary",
    "Damping",
    "Engine",
    "Hypergradient",
    "Outcome",
    "Plan",
    "Product",
    "ReversePass",
    "Terminal",
    "check_steerable",
    "hypergradient",
    "resolve",
    "stage_sum",
]

Engine = Literal["adjoint", "higher"]
ENGINES: tuple[Engine, ...] = ("adjoint", "higher")


def hypergradient(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFn,
    batches: Sequence[Any],
    *,
    controls: Mapping[str, Any],
    data_weights: DataWeights | None = None,
    terminal: Callable[[nn.Module], Tensor] | None = None,
    stage_weight: float = 1.0,
    reward_weight: float = 0.0,
    reward: Reward | None = None,
    average: float | None = None,
    segment: int | Literal["auto"] = "auto",
    product: Product | Literal["auto"] = "auto",
    engine: Engine = "adjoint",
    seed: int = 0,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    accumulate: int = 1,
    memory_budget: int | None = None,
    spill: bool | str | Path = True,
    discount: float = 1.0,
    costate_clip: float | None = None,
    process_group: Group = "auto",
    verify: Literal["auto", False] = "auto",
) -> Hypergradient:
    """dJ/du_t for J = Σ_t (stage_weight ℓ_t − reward_weight r_t) + terminal(θ̄), over the optimizer
    steps of `batches`.

    Model, optimizer and random state are left as they were found. A hypergradient that cannot be
    trusted is reported in `result`, not raised.

    Buffers are constants of each step, except the running statistics of BatchNorm and InstanceNorm,
    which are differentiated for a terminal that reads them in eval mode (not for a loss_fn). The
    singular vectors of spectral_norm are such constants: expect an error of 1e-4 to 1e-3. `why`
    names buffers and frozen parameters that training changes. Hooks of parameters are
    differentiated.

    Args:
        batches: one per step, or `accumulate` micro-batches per step, whose losses are averaged.
            Every evaluation gets a copy.
        controls: name -> (K,) values in natural units, (K, groups) for a value per parameter group,
            or one number for all steps. Absent controls stay as the optimizer has them. {} with
            data_weights alone.
        data_weights: of the rows of `batches`, of which loss_fn then returns one loss each, (B,),
            or a mapping of terms. `grad["data_weights"]` is dJ/dw by cell, (n,) float64, at weights
            of mean 1; `rows` has it per step and row.
        terminal: a differentiable scalar of the model, taken at the end of the window, or at the
            exponential average of its iterates with decay `average`.
        reward_weight: λ_r of the steps' rewards, which count against J.
        reward: (loss, metrics) -> r_t, differentiable; None for metrics["reward"] of loss_fn.
        segment: number of last steps, 1 to K, whose graphs the roll keeps, whatever memory_budget.
            "auto" and 1: as many as fit memory_budget, or cost little memory.
        product: how the Hessian is applied: "exact" (reverse over reverse), "forward-difference"
            (one gradient per step),
            "central-difference", or "none" (left out). "auto" is exact, or forward differences to
            either side of every step where the model has no second derivative or verification
            fails; `why` says which and why. All but "auto" and "exact" need segment 1.
        engine: "adjoint"; or "higher", the library, as an independent check.
        seed: of the gradient noise.
        clip_norm: of the gradient of all parameters together, as in a Plant.
        clip_value: of every element of the gradient.
        memory_budget: bytes that the reverse pass may take beyond plain training.
        spill: False, True for the temporary folder, or a folder.
        discount: γ ≤ 1 multiplies the costate at every step backwards.
        costate_clip: largest norm of the costate, as a multiple of its norm at the window's end.
        process_group: ranks that call this together, each with its own rows of every batch and its
            own (or the same) terminal, which is averaged; the result is that of one process with
            all rows, the same on every rank. "auto": the default group, if it has several ranks;
            None: this process alone.
        verify: "auto" compares the first hypergradient of a model, loss and optimizer with at most
            20 steps of the plain loop; `check` holds each control's relative disagreement. Above
            5 % (float64 1e-6, differences 1e-5, reduced precision 20 %) it is "inconsistent".
            False skips it; engine "higher" is never verified.

    Returns:
        J, its derivatives, and whether they can be trusted.

    Raises:
        InputError: unusable arguments; an operator without the derivative that `product` requires;
            a hook that changes a step other than through a gradient; a loss_fn that moves trained
            parameters.
    """
    accumulate, seed = whole_number("accumulate", accumulate), whole_number("seed", seed)
    segment = segment if segment == "auto" else whole_number("segment", segment)
    memory_budget = memory_budget and whole_number("memory_budget", memory_budget)
    ranks = ranks_of(process_group)
    model = unwrapped(model)
    if ranks is not None:
        if engine == "higher":
            raise InputError("engine 'higher' is for one process; use engine 'adjoint'")
        batches = _weighed(batches, ranks)
    batches = steps_of(batches, accumulate)
    plant = Plant(
        model,
        optimizer,
        loss_fn,
        seed=seed,
        clip_norm=clip_norm,
        clip_value=clip_value,
        ranks=ranks,
        data_weights=data_weights,
    )
    schedule = schedule_of(plant, controls, len(batches), seed)
    objective = Objective(
        loss_weight=stage_weight,
        reward_weight=reward_weight,
        reward=reward,
        terminal_weight=0.0 if terminal is None else 1.0,
        average=average,
    )
    if data_weights is not None and engine == "higher":
        raise InputError("engine 'higher' has no data weights; use engine 'adjoint'")
    if verify not in ("auto", False):
        raise InputError(f"verify must be 'auto' or False, got {verify!r}")
    segment = resolve(len(batches), segment, product, engine, plant)
    check_steerable(plant, schedule, tuple(controls))
    if ranks is not None:
        ranks.check_same(
            {
                "steps": len(batches),
                "controls": sorted(schedule.values),
                "schedule": schedule.digest(),
                "settings": [str(x) for x in (segment, product, seed, clip_norm, clip_value)],
                "terminal": terminal is not None,
                "parameters": plant.parallel.parameter_norms(),
            }
        )
    before, buffers = plant.snapshot(), Buffers(model)
    grads = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    groups = optimizer.param_groups
    tensors = [{k: v for k, v in g.items() if isinstance(v, Tensor)} for g in groups]
    try:
        for p in model.parameters():
            p.grad = None  # backward would add to those that the optimizer does not hold
        with torch.enable_grad(), synchronised(model, ranks), memory.held(memory_budget):
            if engine == "higher":
                from rhc.hypergradient.crosscheck import higher_hypergradient

                return higher_hypergradient(
                    plant, batches, schedule, objective, tuple(controls), terminal
                )
            reverse_pass = ReversePass(
                plant,
                objective,
                tuple(controls),
                segment=segment,
                product=product,
                memory_budget=memory_budget,
                spill=spill,
                damping=Damping(discount, costate_clip),
                verified=verify == "auto",
            )
            mean = Average(objective.average)
            recorder = reverse_pass.roll(batches, schedule, average=mean)
            try:
                return reverse_pass.differentiate(recorder, mean, terminal)
            finally:
                recorder.close()
    finally:
        for group, own in zip(groups, tensors, strict=True):
            group.update(own)  # the same objects, also where groups shared one
        for p, g, wanted in grads:
            p.grad, p.requires_grad = g, wanted
        for module, training in modes:
            module.training = training
        buffers.put(before.buffers)  # into the original tensors
        plant.restore(before)


def _weighed(batches: Sequence[Any], ranks: Ranks) -> list[Any]:
    """Every rank's batches, each with its share of the rows of that batch over all ranks."""
    own = [batch_size(batch) for batch in batches]
    of_all = ranks.gather_json(own)
    for rank, sizes in enumerate(of_all):
        if len(sizes) != len(own):
            raise Unshared(
                f"rank {rank} has {len(sizes)} batches, others {len(own)}; give every rank its "
                "rows of each batch"
            )
    totals = [sum(sizes) for sizes in zip(*of_all, strict=True)]
    return [
        Shard(batch, ranks.size * n / total, total)
        for batch, n, total in zip(batches, own, totals, strict=True)
    ]


def steps_of(batches: Sequence[Any], accumulate: int) -> list[Any]:
    """Copies of a step's batch each, or of its micro-batches."""
    batches = [  # the caller's own stay as they are
        MicroBatches(map(kept, batch)) if isinstance(batch, MicroBatches) else kept(batch)
        for batch in batches
    ]
    if not batches:
        raise InputError("batches is empty; give one batch per step of the window")
    if accumulate == 1:
        return batches
    if accumulate < 1 or len(batches) % accumulate:
        raise InputError(
            f"accumulate must be ≥ 1 and divide the number of batches, got {accumulate} for "
            f"{len(batches)} batches; give {max(accumulate, 1)} micro-batches per step"
        )
    groups = range(0, len(batches), accumulate)
    return [MicroBatches(batches[i : i + accumulate]) for i in groups]


def resolve(
    steps: int,
    segment: int | Literal["auto"],
    product: Product | Literal["auto"],
    engine: Engine,
    plant: Plant,
) -> int | Literal["auto"]:
    """The segment length to use; raises InputError for settings that exclude each other."""
    _known("engine", engine, ENGINES)
    if product != "auto":
        _known("product", product, ("auto", *PRODUCTS))
    _ = plant.differentiable
    plant.refuse_complex()
    if segment != "auto" and not 1 <= segment <= steps:
        raise InputError(
            f"segment must be in [1, {steps}] for a window of {steps} steps, got {segment}; "
            "use 1 for the least memory"
        )
    if engine == "higher" and segment not in ("auto", steps):
        raise InputError(
            f"engine 'higher' unrolls the whole window, got segment {segment} of {steps} steps; "
            "use segment 'auto' or engine 'adjoint'"
        )
    if product not in ("auto", "exact") and (segment not in ("auto", 1) or engine != "adjoint"):
        raise InputError(
            f"product {product!r} needs engine 'adjoint' with segment 1, got engine "
            f"{engine!r} and segment {segment}; use product 'exact' or segment 1"
        )
    return segment


def check_steerable(plant: Plant, schedule: Schedule, controls: Sequence[str]) -> None:
    """Raises InputError for a control that does not exist or that the optimizer cannot vary."""
    for name in controls:
        control(name)
        if name not in plant.controls.available:
            raise InputError(
                f"control {name!r} does not exist for {type(plant.optimizer).__name__}; choose of "
                f"{', '.join(plant.controls.available)}"
            )
        plant.differentiable.check_steerable(name)
        if name == "momentum" and bool((schedule[name] == 0).any()):
            raise InputError(
                "momentum cannot be steered from 0, where the optimizer keeps no momentum buffer; "
                "give the optimizer momentum > 0 or leave momentum out of controls"
            )


def schedule_of(plant: Plant, controls: Mapping[str, Any], steps: int, seed: int) -> Schedule:
    if not controls and plant.data_weights is None:
        raise InputError(f"controls is empty; name at least one of {', '.join(CONTROLS)}")
    if not controls:  # data weights alone: lr as the optimizer has it
        own = [float(group["lr"]) for group in plant.optimizer.param_groups]
        controls = {"lr": torch.tensor(own, dtype=torch.float64).expand(steps, -1)}
    values = {}
    for name, given in controls.items():
        control(name)
        value = torch.as_tensor(given, dtype=torch.float64).detach().cpu()
        if value.dim() == 0:
            value = value.expand(steps)
        groups = len(plant.optimizer.param_groups)
        if value.shape != (steps,) and (name == "noise" or value.shape != (steps, groups)):
            raise InputError(
                f"controls[{name!r}] must have one value per step, shape ({steps},), got "
                f"{tuple(value.shape)}; or one per step and parameter group, ({steps}, {groups})"
            )
        if bool((value < 0).any()) or (name == "momentum" and bool((value >= 1).any())):
            raise InputError(
                f"controls[{name!r}] must be ≥ 0{' and < 1' if name == 'momentum' else ''}, got "
                f"{float(value.min()):g} … {float(value.max()):g}"
            )
        values[name] = value
    return Schedule(values, seed=seed)


def _known(argument: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"unknown {argument} {value!r}: {hint}there are: {', '.join(known)}")


class _CallableModule(ModuleType):
    """Makes this package callable as the function, whose name it takes when it is imported. An
    eager import of the function in `rhc` would make `rhc --help` wait for torch."""

    __call__ = staticmethod(hypergradient)


sys.modules[__name__].__class__ = _CallableModule

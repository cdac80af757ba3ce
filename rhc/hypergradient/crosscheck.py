"""An independent engine to check `adjoint`: the window unrolled by the library `higher`. SGD and
Adam only, no clipping; memory grows with K. higher 0.2.1 is unmaintained since 2021."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rhc.errors import InputError
from rhc.hypergradient.evaluation import OnceDifferentiable, check_twice, double_backward
from rhc.hypergradient.support import unsupported
from rhc.rng import root_mean_square, standard_noise
from rhc.schedule import Schedule
from rhc.training.losses import checked_loss
from rhc.training.objective import Objective, average_weights
from rhc.training.plant import Plant

if TYPE_CHECKING:
    from rhc.hypergradient import Hypergradient
    from rhc.hypergradient.adjoint import Terminal


def higher_hypergradient(
    plant: Plant,
    batches: Sequence[Any],
    schedule: Schedule,
    objective: Objective,
    controls: Sequence[str],
    terminal: Terminal | None,
) -> Hypergradient:
    """The hypergradient of a window unrolled with higher; the plant does not move. A terminal loss
    must not read BatchNorm's running statistics, which are not differentiated."""
    import higher

    from rhc.hypergradient import Hypergradient, Outcome

    optimizer = plant.optimizer
    if type(optimizer) not in (torch.optim.SGD, torch.optim.Adam):
        raise InputError(
            f"engine 'higher' refuses {type(optimizer).__name__}; use engine 'adjoint', or SGD or "
            "Adam"
        )
    if any(group["maximize"] for group in optimizer.param_groups):
        raise InputError("engine 'higher' does not maximize; use engine 'adjoint'")
    if plant.hooks.of_tensors:
        raise InputError("engine 'higher' runs no hooks of parameters; use engine 'adjoint'")
    if plant.clip_norm is not None:
        raise InputError("engine 'higher' does not clip gradients; use engine 'adjoint'")
    steps = len(batches)
    leaves = {
        name: [schedule[name][i].clone().requires_grad_() for i in range(steps)]
        for name in controls
    }
    weights = average_weights(objective.average, steps)
    plant.controls.write({n: v for n, v in schedule.at(schedule.start).items()})
    taken = max(
        (int(s["step"]) for p in plant.parameters if "step" in (s := optimizer.state.get(p, {}))),
        default=0,
    )
    cost = torch.zeros((), dtype=torch.float64)
    losses: list[Tensor] = []
    with double_backward(plant.model):
        functional = higher.monkeypatch(plant.model, copy_initial_weights=True)
        start = list(functional.parameters())
        differentiable = higher.get_diff_optim(
            optimizer, list(plant.model.parameters()), fmodel=functional
        )
        for slots in (slots for group in differentiable.state for slots in group.values()):
            if "step" in slots:
                slots["step"] = int(slots["step"])  # higher counts in place, in the graph
        order = _optimizer_order(plant)
        mean: list[Tensor] | None = None
        for i, batch in enumerate(batches):
            values: dict[str, Any] = dict(schedule.at(schedule.start + i))
            values |= {name: leaf[i] for name, leaf in leaves.items()}
            loss, metrics = checked_loss(plant.loss_fn(functional, batch))
            losses.append(loss.detach())
            try:
                check_twice(loss)
            except OnceDifferentiable as error:
                raise unsupported(error, plant, batch, "exact") or error from error
            stage = objective.stage(loss, metrics)
            if stage is not None:
                cost = cost + stage.double().cpu()
            differentiable.step(
                loss,
                override=_override(plant, values, taken + i + 1),
                grad_callback=_noise_callback(plant, order, values, schedule.start + i),
            )
            if weights[i] and objective.average is not None:
                now = [weights[i] * p for p in functional.parameters()]
                mean = now if mean is None else [a + b for a, b in zip(mean, now, strict=True)]
        end = math.nan
        if terminal is not None and objective.terminal_weight:
            if mean is not None:
                functional.update_params(mean)
            value = checked_loss(terminal(functional))[0]
            end = float(value.detach())
            cost = cost + objective.terminal_weight * value.double().cpu()
        flat = [leaf for name in controls for leaf in leaves[name]]
        found = torch.autograd.grad(cost, [*flat, *start], allow_unused=True)
    grad = {
        name: torch.stack(
            [
                torch.zeros((), dtype=torch.float64) if g is None else g
                for g in found[c * steps : (c + 1) * steps]
            ]
        )
        for c, name in enumerate(controls)
    }
    norms = torch.full((steps,), math.nan, dtype=torch.float64)
    of_start = [g.double().norm() for g in found[len(flat) :] if g is not None]
    norms[0] = torch.stack(of_start).norm() if of_start else 0.0
    finite = all(bool(torch.isfinite(g).all()) for g in grad.values())
    return Hypergradient(
        value=float(cost.detach()),
        grad=grad,
        costate_norms=norms,
        result=Outcome("successful", "every hypergradient is finite")
        if finite
        else Outcome("non-finite", "use a shorter window or a lower lr", schedule.start),
        terminal=end,
        losses=torch.stack([x.double().cpu() for x in losses]),
        engine="higher",
        product="exact",
        segment=steps,
        hessian_products=steps,
        gradient_equivalents=3.0 * steps + (terminal is not None),
    )


def _override(plant: Plant, values: dict[str, Any], step: int) -> dict[str, list[Any]]:
    groups = plant.optimizer.param_groups
    override: dict[str, list[Any]] = {}
    for name, value in values.items():
        if name == "noise":
            continue
        of_groups = []
        for index, group in enumerate(groups):
            v = plant.controls.group_value(name, index, value)
            like = group["params"][0]
            of_groups.append(v.to(like.device, like.dtype) if isinstance(v, Tensor) else v)
        if name == "momentum" and "betas" in groups[0]:
            override["betas"] = [
                (v, group["betas"][1]) for v, group in zip(of_groups, groups, strict=True)
            ]
        else:
            override[name] = of_groups
    if "betas" in groups[0]:
        # higher adds eps to √v, torch to √v̂ = √v / √(1 − β2ᵗ).
        override["eps"] = [g["eps"] * math.sqrt(1 - g["betas"][1] ** step) for g in groups]
    return override


def _optimizer_order(plant: Plant) -> list[int | None]:
    """For each parameter of the model, its position in the optimizer; None for a frozen one."""
    position = {id(p): i for i, p in enumerate(plant.parameters)}
    return [position.get(id(p)) for p in plant.model.parameters()]


def _noise_callback(
    plant: Plant, order: Sequence[int | None], values: dict[str, Any], step: int
) -> Any:
    sigma = values.get("noise", 0.0)
    if not isinstance(sigma, Tensor) and sigma == 0:
        return None
    noise = standard_noise(plant.parameters, plant.seed, step)

    def callback(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [
            g
            if g is None or at is None
            else g + torch.as_tensor(sigma).to(g.dtype) * root_mean_square(g) * noise[at]
            for g, at in zip(gradients, order, strict=True)
        ]

    return callback

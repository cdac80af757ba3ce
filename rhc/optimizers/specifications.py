"""The dynamics of torch.optim's optimizers: from their groups and slots to the transformations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchopt.base import GradientTransformation

from rhc.optimizers import closed_forms
from rhc.optimizers.base import Dynamics, Group, control_value, flat_slot, flat_slot_or_none
from rhc.optimizers.transformations import (
    AdagradState,
    AdamaxState,
    AdamState,
    MuonState,
    NAdamState,
    RAdamState,
    RMSpropState,
    Scalar,
    SGDState,
    adagrad,
    adam,
    adamax,
    muon,
    nadam,
    radam,
    rmsprop,
    sgd,
)

States = Sequence[Mapping[str, Any]]
Controls = Mapping[str, Scalar]
Shapes = Sequence[torch.Size]


def _sgd(group: Group, controls: Controls, shapes: Shapes) -> GradientTransformation:
    return sgd(
        control_value(group, controls, "lr"),
        control_value(group, controls, "momentum"),
        group["dampening"],
        control_value(group, controls, "weight_decay"),
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )


def _sgd_state(states: States, params: Sequence[Tensor], group: Group) -> SGDState:
    return SGDState(flat_slot_or_none(states, "momentum_buffer"))


def _adam(group: Group, controls: Controls, shapes: Shapes) -> GradientTransformation:
    return adam(
        *_betas_and_decay(group, controls),
        decoupled=group.get("decoupled_weight_decay", False),
        amsgrad=group["amsgrad"],
        maximize=group["maximize"],
    )


def _adamw(group: Group, controls: Controls, shapes: Shapes) -> GradientTransformation:
    return _adam({**group, "decoupled_weight_decay": True}, controls, shapes)


def _adam_state(states: States, params: Sequence[Tensor], group: Group) -> AdamState:
    largest = flat_slot(states, "max_exp_avg_sq", params) if group["amsgrad"] else None
    return AdamState(*_moments(states, params, "exp_avg_sq"), largest)


def _nadam(group: Group, controls: Controls, shapes: Shapes) -> GradientTransformation:
    return nadam(
        *_betas_and_decay(group, controls),
        momentum_decay=group["momentum_decay"],
        decoupled=group["decoupled_weight_decay"],
        maximize=group["maximize"],
    )


def _nadam_state(states: States, params: Sequence[Tensor], group: Group) -> NAdamState:
    step, m, v = _moments(states, params, "exp_avg_sq")
    products = [s["mu_product"].detach() for s in states if "mu_product" in s]
    if not products:
        wide = torch.get_default_dtype() == torch.float64  # torch's choice
        products = [torch.ones((), dtype=torch.float64 if wide else torch.float32)]
    product = products[0].to(m.device, copy=True)
    if any(float(p) != float(product) for p in products):
        # As many steps, but not the same ones: a value per element says it all.
        product = torch.cat(
            [p.to(m.device).expand(x.numel()) for p, x in zip(products, params, strict=True)]
        )
    return NAdamState(step, m, v, product)


def _radam(group: Group, controls: Controls, shapes: Shapes) -> GradientTransformation:
    return radam(
        *_betas_and_decay(group, controls),
        decoupled=group["decoupled_weight_decay"],
        maximize=group["maximize"],
    )


def _radam_state(states: States, params: Sequence[Tensor], group: Group) -> RAdamState:
    return RAdamState(*_moments(states, params, "exp_avg_sq"))


def _adamax(group: Group, controls: Controls, shapes: Shapes) -> GradientTransformation:
    return adamax(*_betas_and_decay(group, controls), maximize=group["maximize"])


def _adamax_state(states: States, params: Sequence[Tensor], group: Group) -> AdamaxState:
    return AdamaxState(*_moments(states, params, "exp_inf"))


def _rmsprop(group: Group, controls: Controls, shapes: Shapes) -> GradientTransformation:
    return rmsprop(
        control_value(group, controls, "lr"),
        control_value(group, controls, "momentum"),
        group["alpha"],
        group["eps"],
        control_value(group, controls, "weight_decay"),
        centered=group["centered"],
        maximize=group["maximize"],
    )


def _rmsprop_state(states: States, params: Sequence[Tensor], group: Group) -> RMSpropState:
    square = flat_slot(states, "square_avg", params)
    mean = flat_slot(states, "grad_avg", params) if group["centered"] else None
    return RMSpropState(square, mean, flat_slot_or_none(states, "momentum_buffer"))


def _adagrad(group: Group, controls: Controls, shapes: Shapes) -> GradientTransformation:
    return adagrad(
        control_value(group, controls, "lr"),
        group["lr_decay"],
        group["eps"],
        control_value(group, controls, "weight_decay"),
        initial_accumulator_value=group["initial_accumulator_value"],
        maximize=group["maximize"],
    )


def _adagrad_state(states: States, params: Sequence[Tensor], group: Group) -> AdagradState:
    total = flat_slot_or_none(states, "sum")  # torch makes it in the constructor
    if total is None:
        full = [torch.full_like(p, group["initial_accumulator_value"]).reshape(-1) for p in params]
        return AdagradState(0, torch.cat(full))
    return AdagradState(int(states[0]["step"]), total)


def _muon(group: Group, controls: Controls, shapes: Shapes) -> GradientTransformation:
    step = muon(
        control_value(group, controls, "lr"),
        control_value(group, controls, "momentum"),
        control_value(group, controls, "weight_decay"),
        nesterov=group["nesterov"],
        ns_coefficients=group["ns_coefficients"],
        eps=group["eps"],
        ns_steps=group["ns_steps"],
        adjust_lr_fn=group["adjust_lr_fn"],
    )
    (shape,) = shapes

    def update(
        updates: Tensor, state: MuonState, *, params: Any = None, inplace: bool = False
    ) -> tuple[Tensor, MuonState]:
        matrices = MuonState(state.momentum_buffer.view(shape))
        new, after = step.update(
            updates.view(shape), matrices, params=params.view(shape), inplace=False
        )
        return new.reshape(-1), MuonState(after.momentum_buffer.reshape(-1))

    return GradientTransformation(step.init, update)


def _muon_state(states: States, params: Sequence[Tensor], group: Group) -> MuonState:
    return MuonState(flat_slot(states, "momentum_buffer", params))


def _betas_and_decay(
    group: Group, controls: Controls
) -> tuple[Scalar, Scalar, float, float, Scalar]:
    """(lr, β1, β2, eps, weight decay) of Adam and its kin."""
    return (
        control_value(group, controls, "lr"),
        control_value(group, controls, "momentum"),
        float(group["betas"][1]),
        group["eps"],
        control_value(group, controls, "weight_decay"),
    )


def _moments(states: States, params: Sequence[Tensor], second: str) -> tuple[int, Tensor, Tensor]:
    """(steps taken, first moment, second moment), zeros before the first step."""
    m, v = flat_slot(states, "exp_avg", params), flat_slot(states, second, params)
    return int(states[0].get("step", 0)), m, v


TORCH_DYNAMICS: dict[type[torch.optim.Optimizer], Dynamics] = {
    torch.optim.SGD: Dynamics(
        "SGD",
        _sgd,
        _sgd_state,
        pull_back=closed_forms.sgd_pull_back,
        advance=closed_forms.sgd_advance,
        blind=True,
        fold=closed_forms.SGD_FOLD,
    ),
    torch.optim.Adam: Dynamics(
        "Adam",
        _adam,
        _adam_state,
        pull_back=closed_forms.adam_pull_back,
        advance=closed_forms.adam_advance,
        blind=True,
    ),
    torch.optim.AdamW: Dynamics(
        "AdamW",
        _adamw,
        _adam_state,
        pull_back=closed_forms.adamw_pull_back,
        advance=closed_forms.adamw_advance,
        blind=True,
    ),
    torch.optim.RMSprop: Dynamics("RMSprop", _rmsprop, _rmsprop_state),
    torch.optim.NAdam: Dynamics("NAdam", _nadam, _nadam_state),
    torch.optim.RAdam: Dynamics("RAdam", _radam, _radam_state),
    torch.optim.Adamax: Dynamics("Adamax", _adamax, _adamax_state),
    torch.optim.Adagrad: Dynamics("Adagrad", _adagrad, _adagrad_state),
    torch.optim.Muon: Dynamics(
        "Muon",
        _muon,
        _muon_state,
        elementwise=False,
        precision=torch.finfo(torch.bfloat16).eps,  # Newton and Schulz's iteration
    ),
}

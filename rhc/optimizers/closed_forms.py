"""The steps of SGD, Adam and AdamW in closed form: backwards (pullbacks) and forwards (advances).

They equal autograd through the transformation, and the transformation itself, to rounding, in a
third of the passes over memory: this is what the costate recursion spends its time on beside the
Hessian products. Written for few passes, so a line may look roundabout; the derivation stands in
each docstring. λ' is the costate of after the step, λ of before; ⟨a, b⟩ is a dot product. θ is
read by weight decay alone: without it, and without a derivative by it, None will do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from rhc.optimizers.base import STEERED, Fold, Group, Pulled, control_value
from rhc.optimizers.transformations import ROOT_EPSILON, AdamState, Scalar, SGDState

_ROOT_EPSILON = torch.tensor(ROOT_EPSILON, dtype=torch.float64)
"""A tensor without dimensions: torch.add(_ROOT_EPSILON, v, alpha=β) is one pass."""


def sgd_pull_back(
    group: Group,
    controls: Mapping[str, float],
    gradient: Tensor,
    parameters: Tensor | None,
    state: SGDState,
    costate_parameters: Tensor | None,
    costate_state: Sequence[Tensor | None],
    wanted: Collection[str] = STEERED,
) -> Pulled:
    """The pullback through torch.optim.SGD's step; every option is covered.

    With d = ±g + λ_w θ, b' = μ b + c d (c = 1 − dampening; the first step: b' = d, c = 1) and
    θ' = θ − α u, u = b', or d + μ b' with Nesterov. The costate of b' in all is
    B = λ_b' − α λ_θ' (Nesterov: λ_b' − αμ λ_θ'), that of d is D = c B (c B − α λ_θ'), and
    λ_b = μ B, λ_g = ±D, λ_θ = λ_θ' + λ_w D, dJ/dα = −⟨λ_θ', u⟩, dJ/dλ_w = ⟨D, θ⟩,
    dJ/dμ = ⟨B, b⟩ (+ ⟨−α λ_θ', b'⟩). ⟨·, u⟩ and ⟨·, b'⟩ are made of ⟨·, g⟩, ⟨·, θ⟩, ⟨·, b⟩, so
    that neither u nor b' is computed again.
    """
    lr, momentum, weight_decay = _controls(group, controls)
    nesterov = group["nesterov"]
    sign = -1.0 if group["maximize"] else 1.0
    buffer = state.momentum_buffer
    of_parameters = costate_parameters
    of_buffer = costate_state[0] if costate_state else None
    found: dict[str, Scalar] = {}

    if momentum == 0:  # no buffer takes part; one that is there from before stays
        kept: list[Tensor | None] = [] if buffer is None else [of_buffer]
        if of_parameters is None:
            return Pulled(None, kept, None, _derivatives(found, wanted, gradient))
        along_theta: Scalar = 0.0
        if "weight_decay" in wanted or ("lr" in wanted and weight_decay != 0):
            along_theta = _dot(of_parameters, _known(parameters))
            found["weight_decay"] = -lr * along_theta
        if "lr" in wanted:
            found["lr"] = -sign * _dot(of_parameters, gradient) - weight_decay * along_theta
        left = of_parameters
        if weight_decay != 0:
            left = of_parameters * (1 - lr * weight_decay)
        of_gradient = of_parameters * (-sign * lr)
        return Pulled(left, kept, of_gradient, _derivatives(found, wanted, gradient))

    if of_parameters is None and of_buffer is None:
        none: list[Tensor | None] = [] if buffer is None else [None]
        return Pulled(None, none, None, _derivatives(found, wanted, gradient))

    c = 1.0 if buffer is None else 1.0 - group["dampening"]
    total = _of_new_buffer(of_parameters, of_buffer, lr * (momentum if nesterov else 1.0))

    if of_parameters is not None and ("lr" in wanted or (nesterov and "momentum" in wanted)):
        along_d = sign * _dot(of_parameters, gradient)
        if weight_decay != 0:
            along_d = along_d + weight_decay * _dot(of_parameters, _known(parameters))
        along_new = c * along_d  # ⟨λ_θ', b'⟩
        if buffer is not None:
            along_new = along_new + momentum * _dot(of_parameters, buffer)
        found["lr"] = -(along_d + momentum * along_new) if nesterov else -along_new
        if nesterov:
            found["momentum"] = -lr * along_new
    if buffer is not None and "momentum" in wanted:
        found["momentum"] = found.get("momentum", 0.0) + _dot(total, buffer)

    if nesterov and of_parameters is not None:
        of_d = torch.mul(total, c).add_(of_parameters, alpha=-lr)
    else:
        of_d = total if c == 1 else total * c
    if "weight_decay" in wanted:
        found["weight_decay"] = _dot(of_d, _known(parameters))
    of_theta = _with_coupled_decay(of_parameters, of_d, weight_decay)
    of_state: list[Tensor | None] = []
    if buffer is not None:
        of_state = [total * momentum if of_d is total else total.mul_(momentum)]
    of_gradient = of_d if sign > 0 else of_d.neg_()
    return Pulled(of_theta, of_state, of_gradient, _derivatives(found, wanted, gradient))


def _of_new_buffer(of_parameters: Tensor | None, of_buffer: Tensor | None, lr: float) -> Tensor:
    """B = λ_b' − α λ_θ', a tensor of its own; one of them is there."""
    if of_parameters is None:
        assert of_buffer is not None
        return of_buffer.clone()
    if of_buffer is None:
        return of_parameters * -lr
    return torch.add(of_buffer, of_parameters, alpha=-lr)


def sgd_advance(
    group: Group,
    controls: Mapping[str, float],
    gradient: Tensor,
    parameters: Tensor | None,
    state: SGDState,
) -> tuple[Tensor | None, SGDState]:
    """torch.optim.SGD's step on plain numbers."""
    lr, momentum, weight_decay = _controls(group, controls)
    d = _signed(group, gradient, parameters, weight_decay)
    if momentum == 0:
        return None if parameters is None else torch.add(parameters, d, alpha=-lr), state
    if state.momentum_buffer is None:
        buffer = d.clone() if d is gradient else d
    elif group["dampening"] == 0:
        buffer = torch.add(d, state.momentum_buffer, alpha=momentum)
    else:
        buffer = torch.mul(state.momentum_buffer, momentum).add_(d, alpha=1 - group["dampening"])
    if parameters is None:
        return None, SGDState(buffer)
    direction = torch.add(d, buffer, alpha=momentum) if group["nesterov"] else buffer
    return torch.add(parameters, direction, alpha=-lr), SGDState(buffer)


def _sgd_folds(group: Group, controls: Mapping[str, float]) -> bool:
    momentum = _controls(group, controls)[1]
    return momentum != 0 and not group["dampening"] and not group["nesterov"]


def _sgd_fold(
    group: Group, controls: Mapping[str, float], gradient: Tensor, state: SGDState
) -> SGDState:
    if group["maximize"]:
        gradient.neg_()
    if state.momentum_buffer is not None:
        gradient.add_(state.momentum_buffer, alpha=_controls(group, controls)[1])
    return SGDState(gradient)


def _sgd_unfold(
    group: Group, controls: Mapping[str, float], after: SGDState, state: SGDState
) -> None:
    gradient = after.momentum_buffer
    assert gradient is not None
    if state.momentum_buffer is not None:
        gradient.sub_(state.momentum_buffer, alpha=_controls(group, controls)[1])
    if group["maximize"]:
        gradient.neg_()


def _sgd_pull_back_folded(
    group: Group,
    controls: Mapping[str, float],
    before: SGDState,
    after: SGDState,
    costate_parameters: Tensor | None,
    costate_state: Sequence[Tensor | None],
    wanted: Collection[str] = STEERED,
) -> Pulled:
    """`sgd_pull_back` of θ' = θ − α b', b' = μ b ± g: B = λ_b' − α λ_θ', λ_b = μ B, λ_g = ±B."""
    lr, momentum, _ = _controls(group, controls)
    buffer, new = before.momentum_buffer, after.momentum_buffer
    of_parameters = costate_parameters
    of_buffer = costate_state[0] if costate_state else None
    assert new is not None
    found: dict[str, Scalar] = {}
    if of_parameters is None and of_buffer is None:
        none: list[Tensor | None] = [] if buffer is None else [None]
        return Pulled(None, none, None, _derivatives(found, wanted, new))
    total = _of_new_buffer(of_parameters, of_buffer, lr)
    if of_parameters is not None and "lr" in wanted:
        found["lr"] = -_dot(of_parameters, new)
    if buffer is not None and "momentum" in wanted:
        found["momentum"] = _dot(total, buffer)
    of_state: list[Tensor | None] = [] if buffer is None else [total * momentum]
    if group["maximize"]:
        total.neg_()
    return Pulled(of_parameters, of_state, total, _derivatives(found, wanted, new))


SGD_FOLD = Fold(_sgd_folds, _sgd_fold, _sgd_unfold, _sgd_pull_back_folded)
"""b' in the place of g: of SGD with momentum, and neither dampening nor Nesterov's."""


def adam_pull_back(
    group: Group,
    controls: Mapping[str, float],
    gradient: Tensor,
    parameters: Tensor | None,
    state: AdamState,
    costate_parameters: Tensor | None,
    costate_state: Sequence[Tensor | None],
    wanted: Collection[str] = STEERED,
) -> Pulled | None:
    """The pullback through torch.optim.Adam's step; None with AMSGrad, which it does not cover.

    With d = ±g (+ λ_w θ where coupled), c1 = 1 − β1ᵗ, c2 = √(1 − β2ᵗ), r = √(v' + ROOT_EPSILON) and
    w = r + eps c2 the step is θ' = θ − (α c2 / c1) m' / w (− α λ_w θ where decoupled). So with
    p = λ_θ' / w and y = p m', the costates of m' and v' in all are M = λ_m' − (α c2 / c1) p and
    V = λ_v' + (α c2 / 2 c1) y / (w r); D = (1 − β1) M + 2 (1 − β2) d V is that of d, and
    λ_m = β1 M, λ_v = β2 V, λ_g = ±D, dJ/dα = −(c2 / c1) Σ y (− λ_w ⟨λ_θ', θ⟩) and
    dJ/dβ1 = ⟨M, m − d⟩ − α c2 (t β1ᵗ⁻¹ / c1²) Σ y.
    """
    return _adam_pull_back(
        group,
        controls,
        gradient,
        parameters,
        state,
        costate_parameters,
        costate_state,
        wanted,
        decoupled=group.get("decoupled_weight_decay", False),
    )


def adamw_pull_back(
    group: Group,
    controls: Mapping[str, float],
    gradient: Tensor,
    parameters: Tensor | None,
    state: AdamState,
    costate_parameters: Tensor | None,
    costate_state: Sequence[Tensor | None],
    wanted: Collection[str] = STEERED,
) -> Pulled | None:
    """`adam_pull_back` with decoupled weight decay."""
    return _adam_pull_back(
        group,
        controls,
        gradient,
        parameters,
        state,
        costate_parameters,
        costate_state,
        wanted,
        decoupled=True,
    )


def _adam_pull_back(
    group: Group,
    controls: Mapping[str, float],
    gradient: Tensor,
    parameters: Tensor | None,
    state: AdamState,
    costate_parameters: Tensor | None,
    costate_state: Sequence[Tensor | None],
    wanted: Collection[str],
    *,
    decoupled: bool,
) -> Pulled | None:
    if group["amsgrad"]:
        return None
    lr, beta1, weight_decay = _controls(group, controls)
    beta2, eps = float(group["betas"][1]), float(group["eps"])
    step = state.step + 1
    c1, c2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
    of_parameters = costate_parameters
    of_m, of_v = costate_state if costate_state else (None, None)
    if of_parameters is None and of_m is None and of_v is None:
        return Pulled(None, [None, None], None, _derivatives({}, wanted, gradient))

    d = _signed(group, gradient, parameters, 0.0 if decoupled else weight_decay)
    along_update: Scalar = 0.0  # Σ y
    along_theta: Scalar = 0.0
    if of_parameters is None:
        total_m = torch.zeros_like(d) if of_m is None else of_m.clone()
        total_v = torch.zeros_like(d) if of_v is None else of_v.clone()
        room = torch.empty_like(d)
    else:
        y = torch.lerp(state.exp_avg, d, 1 - beta1)
        room = torch.add(_ROOT_EPSILON, state.exp_avg_sq, alpha=beta2)
        root = room.addcmul_(d, d, value=1 - beta2).sqrt_()
        w = root + eps * c2
        p = of_parameters / w
        y.mul_(p)
        if "lr" in wanted or "momentum" in wanted:
            along_update = _scalar(y.sum())
        scale = lr * c2 / c1
        w.mul_(root)
        # In place of y and p: fresh memory costs more than the arithmetic.
        if of_v is None:
            total_v = y.div_(w).mul_(scale / 2)
        else:
            total_v = torch.addcdiv(of_v, y, w, value=scale / 2, out=y)
        total_m = p.mul_(-scale) if of_m is None else torch.add(of_m, p, alpha=-scale, out=p)
        if decoupled and ("weight_decay" in wanted or ("lr" in wanted and weight_decay != 0)):
            along_theta = _dot(of_parameters, _known(parameters))

    found: dict[str, Scalar] = {}
    if "lr" in wanted:
        found["lr"] = -c2 / c1 * along_update - (weight_decay * along_theta if decoupled else 0.0)
    if "momentum" in wanted:
        slope = lr * c2 * step * beta1 ** (step - 1) / c1**2
        found["momentum"] = _dot(total_m, state.exp_avg) - _dot(total_m, d) - slope * along_update

    of_d = torch.mul(total_m, 1 - beta1, out=room)
    of_d.addcmul_(d, total_v, value=2 * (1 - beta2))
    if "weight_decay" in wanted:
        found["weight_decay"] = -lr * along_theta if decoupled else _dot(of_d, _known(parameters))
    if not decoupled:
        of_theta = _with_coupled_decay(of_parameters, of_d, weight_decay)
    elif weight_decay != 0 and of_parameters is not None:
        of_theta = of_parameters * (1 - lr * weight_decay)
    else:
        of_theta = of_parameters
    of_state: list[Tensor | None] = [total_m.mul_(beta1), total_v.mul_(beta2)]
    of_gradient = of_d.neg_() if group["maximize"] else of_d
    return Pulled(of_theta, of_state, of_gradient, _derivatives(found, wanted, d))


def adam_advance(
    group: Group,
    controls: Mapping[str, float],
    gradient: Tensor,
    parameters: Tensor | None,
    state: AdamState,
) -> tuple[Tensor | None, AdamState]:
    """torch.optim.Adam's step on plain numbers, AMSGrad's too."""
    decoupled = group.get("decoupled_weight_decay", False)
    return _adam_advance(group, controls, gradient, parameters, state, decoupled=decoupled)


def adamw_advance(
    group: Group,
    controls: Mapping[str, float],
    gradient: Tensor,
    parameters: Tensor | None,
    state: AdamState,
) -> tuple[Tensor | None, AdamState]:
    """torch.optim.AdamW's step on plain numbers."""
    return _adam_advance(group, controls, gradient, parameters, state, decoupled=True)


def _adam_advance(
    group: Group,
    controls: Mapping[str, float],
    gradient: Tensor,
    parameters: Tensor | None,
    state: AdamState,
    *,
    decoupled: bool,
) -> tuple[Tensor | None, AdamState]:
    lr, beta1, weight_decay = _controls(group, controls)
    beta2 = float(group["betas"][1])
    step = state.step + 1
    c1, c2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
    d = _signed(group, gradient, parameters, 0.0 if decoupled else weight_decay)
    m = torch.lerp(state.exp_avg, d, 1 - beta1)
    v = torch.mul(state.exp_avg_sq, beta2).addcmul_(d, d, value=1 - beta2)
    largest = torch.maximum(state.max_exp_avg_sq, v) if group["amsgrad"] else None
    if parameters is None:
        return None, AdamState(step, m, v, largest)
    # No ROOT_EPSILON: that is for slopes.
    w = (v if largest is None else largest).sqrt().add_(float(group["eps"]) * c2)
    scale = -lr * c2 / c1
    if decoupled and weight_decay != 0:
        moved = torch.mul(parameters, 1 - lr * weight_decay).addcdiv_(m, w, value=scale)
    else:
        moved = torch.addcdiv(parameters, m, w, value=scale)
    return moved, AdamState(step, m, v, largest)


def _controls(group: Group, controls: Mapping[str, float]) -> tuple[float, float, float]:
    """(lr, momentum or β1, weight decay) as plain floats."""
    lr, momentum, weight_decay = (float(control_value(group, controls, n)) for n in STEERED)
    return lr, momentum, weight_decay


def _signed(
    group: Group, gradient: Tensor, parameters: Tensor | None, weight_decay: float
) -> Tensor:
    """±g + λ_w θ; g itself where that is all."""
    d = gradient.neg() if group["maximize"] else gradient
    return d if weight_decay == 0 else torch.add(d, _known(parameters), alpha=weight_decay)


def _known(parameters: Tensor | None) -> Tensor:
    """θ, where weight decay reads it."""
    assert parameters is not None
    return parameters


def _with_coupled_decay(
    of_parameters: Tensor | None, of_d: Tensor, weight_decay: float
) -> Tensor | None:
    """λ_θ' + λ_w D: θ enters d through the coupled weight decay."""
    if weight_decay == 0:
        return of_parameters
    if of_parameters is None:
        return of_d * weight_decay
    return torch.add(of_parameters, of_d, alpha=weight_decay)


def _dot(a: Tensor, b: Tensor) -> Scalar:
    """⟨a, b⟩, accumulated in their dtype."""
    return _scalar(torch.dot(a, b))


def _scalar(value: Tensor) -> Scalar:
    """A float on the CPU, where sums of floats are ten times as cheap as those of small tensors.

    On an accelerator a tensor: reading it would make the host wait.
    """
    return value.item() if value.device.type == "cpu" else value.double()


def _derivatives(
    found: Mapping[str, Scalar], wanted: Collection[str], like: Tensor
) -> dict[str, Tensor]:
    """The wanted derivatives as float64 tensors; zero where none was found."""
    return {
        name: torch.as_tensor(found.get(name, 0.0), dtype=torch.float64, device=like.device)
        for name in STEERED
        if name in wanted
    }

"""An optimizer's step Φ as a torchopt GradientTransformation, differentiated by autograd.

`step_of` makes the transformation of one step at given controls; `DifferentiableOptimizer` connects
it to a torch.optim optimizer's groups and slots, and takes the vjp of its update.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torchopt.base import GradientTransformation, TransformInitFn
from torchopt.pytree import tree_flatten, tree_leaves, tree_unflatten

from rhc.errors import InputError

Scalar = float | Tensor
Group = Mapping[str, Any]

_run_backward: Any = getattr(torch.autograd.graph, "_engine_run_backward", None)

STEERED = ("lr", "momentum", "weight_decay")
"""The controls inside Φ; noise is added to the gradient before it."""

ROOT_EPSILON = 1e-30
"""Added under the root of every second moment: √v has infinite slope at v = 0 (unused embedding
rows), which would make hypergradients NaN. It changes an update by less than ROOT_EPSILON lr / 2
eps²: 5e-15 lr at eps 1e-8, 5e-11 lr at Adagrad's 1e-10."""

# One step ----------------------------------------------------------------------------------------


Move = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""(d, state) -> (the increment u of θ, the state after the step)."""


StepVjp = Callable[
    [Tensor, Tensor | None, Any, Tensor | None, Sequence[Tensor | None], Collection[str]], "Vjp"
]
"""(g, θ, state, λ_θ and λ of the slots after the step, controls wanted) -> the costates before."""

MoveVjp = Callable[[Tensor, Any, Tensor | None, Sequence[Tensor | None], Collection[str]], "Vjp"]
"""(d, state, λ_u, λ of the slots after, controls wanted) -> `Vjp` of `Move`: `gradient` is λ_d,
`parameters` is unused, and weight decay is not its business. At controls that are numbers."""


class ClosedTransformation(GradientTransformation):
    """A transformation with its vjp written out, which takes the place of autograd's: for steps
    that take more than 5 % of a whole reverse pass by autograd. A copy with another `update`
    (`_replace`) has none."""

    vjp: StepVjp | None = None


def step_of(
    init: TransformInitFn,
    move: Move,
    lr: Scalar,
    weight_decay: Scalar = 0.0,
    *,
    decoupled: bool = False,
    maximize: bool = False,
    closed: MoveVjp | None = None,
) -> GradientTransformation:
    """The torchopt transformation of a step: θ ← θ + u(d, state) with d = ±g + λ θ, or, decoupled,
    d = ±g and θ ← (1 − α λ) θ + u. On trees of tensors; lr, λ and what `move` closes over are
    floats, or 0-dim tensors to differentiate by. init: parameters -> the initial state."""
    decays = not is_zero(weight_decay)

    def d_of(gradient: Tensor, theta: Tensor | None) -> Tensor:
        d = gradient.neg() if maximize else gradient
        return plus(d, known(theta), weight_decay) if decays and not decoupled else d

    def of_one(gradient: Tensor, theta: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        increment, after = move(d_of(gradient, theta), state)
        if decays and decoupled:
            decay = -lr * weight_decay
            if increment.requires_grad or isinstance(decay, Tensor):
                increment = plus(increment, known(theta), decay)
            else:  # in place: allocation costs more than the arithmetic
                increment.add_(known(theta), alpha=decay)
        return increment, after

    def update(
        updates: Any, state: Any, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, Any]:
        if isinstance(updates, Tensor):
            return of_one(updates, params, state)
        return _on_trees(of_one, updates, state, params)

    def vjp(
        gradient: Tensor,
        theta: Tensor | None,
        state: Any,
        of_theta: Tensor | None,
        of_state: Sequence[Tensor | None],
        wanted: Collection[str],
    ) -> Vjp:
        assert closed is not None
        found = closed(d_of(gradient, theta), state, of_theta, of_state, wanted)
        of_d, controls, before = found.gradient, found.controls, of_theta
        if of_d is not None and not decoupled:
            if "weight_decay" in wanted:
                controls["weight_decay"] = dot(of_d, known(theta))
            if decays and of_theta is None:
                before = of_d * weight_decay
            elif decays:
                before = plus(known(of_theta), of_d, weight_decay)
        if of_theta is not None and decoupled:
            if "weight_decay" in wanted or ("lr" in wanted and decays):
                along = dot(of_theta, known(theta))
                if "weight_decay" in wanted:
                    controls["weight_decay"] = -lr * along
                if "lr" in wanted:
                    controls["lr"] = controls["lr"] - weight_decay * along
            if decays:
                before = of_theta * (1 - lr * weight_decay)
        if of_d is not None and maximize:
            of_d.neg_()
        return Vjp(before, found.state, of_d, controls)

    if closed is None:
        return GradientTransformation(init, update)
    made = ClosedTransformation(init, update)
    made.vjp = vjp
    return made


def _on_trees(
    of_one: Callable[[Tensor, Tensor | None, Any], tuple[Tensor, Any]],
    updates: Any,
    state: Any,
    params: Any,
) -> tuple[Any, Any]:
    gradients, tree = tree_flatten(updates)
    thetas = [None] * len(gradients) if params is None else tree_leaves(params)
    # A slot is a tree like the updates, or one value for all of them.
    slots = [
        [slot] * len(gradients)
        if slot is None or isinstance(slot, (int, float, Tensor))
        else tree_leaves(slot)
        for slot in state
    ]
    moved = [
        of_one(gradient, theta, type(state)(*own))
        for gradient, theta, *own in zip(gradients, thetas, *slots, strict=True)
    ]
    slots_after = zip(*(after for _, after in moved), strict=True)
    after = [
        tree_unflatten(tree, values)
        if isinstance(values[0], Tensor) and not isinstance(before, Tensor)
        else values[0]
        for before, values in zip(state, slots_after, strict=True)
    ]
    return tree_unflatten(tree, [added for added, _ in moved]), type(state)(*after)


class Fold(NamedTuple):
    """For a step whose new state can be stored in its gradient's memory.
    onto: (gradient, state before) -> state after, over the gradient. off: (state after, state
    before); restores the gradient, up to rounding."""

    onto: Callable[[Tensor, Any], Any]
    off: Callable[[Any, Any], None]


class Vjp(NamedTuple):
    """Costates before a step; None is zero.
    parameters: of θ, the given tensor itself if unchanged. state: per floating-point slot.
    gradient: of g. controls: name -> dJ/du."""

    parameters: Tensor | None
    state: Sequence[Tensor | None]
    gradient: Tensor | None
    controls: dict[str, Scalar]


# An optimizer ------------------------------------------------------------------------------------


TransformationOf = Callable[
    [Group, Mapping[str, Scalar], Sequence[torch.Size]], GradientTransformation
]
"""(param group, controls of the step, shapes of the concatenated parameters)."""

StateOf = Callable[[Sequence[Mapping[str, Any]], Sequence[Tensor], Group], Any]
"""(per-parameter optimizer states, parameters, param group) -> the transformation's state."""


@dataclass(frozen=True)
class DifferentiableOptimizer:
    """What an engine needs of a torch.optim optimizer.

    name: for errors. transformation: Φ on vectors of concatenated elements of parameters that step
    alike. state_of: the live state as a NamedTuple of vectors, numbers and None; floating-point
    tensors have costates. elementwise: whether Φ acts per element; else every parameter has its own
    vectors, of shape shapes[0]. controls: those accepted as tensors; None for lr, momentum and
    weight_decay. reads_parameters: whether Φ reads θ other than for weight decay. precision:
    machine epsilon of the optimizer's arithmetic, if coarser than its parameters'. own: whether Φ
    is of this package, and takes controls of float64 whatever its vectors are. fold: see `Fold`.
    """

    name: str
    transformation: TransformationOf
    state_of: StateOf
    elementwise: bool = True
    controls: tuple[str, ...] | None = None
    reads_parameters: bool = True
    precision: float = 0.0
    own: bool = False
    fold: Callable[[Group, Mapping[str, float]], Fold | None] = lambda group, controls: None

    def step(
        self, group: Group, controls: Mapping[str, Scalar], shapes: Sequence[torch.Size] = ()
    ) -> GradientTransformation:
        made = self.transformation(group, controls, shapes)
        if not callable(getattr(made, "update", None)):
            raise InputError(
                f"the transformation registered for {self.name} must return a torchopt "
                f"GradientTransformation, got {type(made).__name__}"
            )
        return made

    def state(
        self, states: Sequence[Mapping[str, Any]], parameters: Sequence[Tensor], group: Group
    ) -> Any:
        made = self.state_of(states, parameters, group)
        if not isinstance(made, tuple) or not hasattr(made, "_fields"):
            raise InputError(
                f"the state registered for {self.name} must return a NamedTuple, got "
                f"{type(made).__name__}"
            )
        size = sum(p.numel() for p in parameters)
        for field, value in zip(made._fields, made, strict=True):
            wrong = type(value).__name__
            if isinstance(value, Tensor):
                if value.dim() == 0 or value.shape == (size,):
                    continue
                wrong = f"a tensor of shape {tuple(value.shape)}"
            elif value is None or isinstance(value, (int, float)):
                continue
            raise InputError(
                f"{field} in the state registered for {self.name} must be a vector of {size} "
                f"elements, a number or None, got {wrong}; rhc.optimizers.flat_slot makes vectors "
                "of slots"
            )
        return made

    def check_steerable(self, control: str) -> None:
        if self.controls is None or control == "noise" or control in self.controls:
            return
        steerable = ", ".join((*self.controls, "noise"))
        raise InputError(
            f"control {control!r} of {self.name} cannot be steered: its dynamics were registered "
            f"without it; choose of {steerable}"
        )

    def advance(
        self,
        group: Group,
        controls: Mapping[str, Scalar],
        gradient: Tensor,
        theta: Tensor | None,
        state: Any,
        shapes: Sequence[torch.Size] = (),
    ) -> tuple[Tensor | None, Any]:
        """(θ, state) after the step; θ may be None if it is not read, and stays None."""
        made = self.step(group, controls, shapes)
        increment, after = made.update(gradient, state, params=theta, inplace=False)
        if theta is None:
            return None, after
        return torch.add(theta, increment, out=increment if self.own else None), after

    def vjp(
        self,
        group: Group,
        controls: Mapping[str, float],
        gradient: Tensor,
        theta: Tensor | None,
        state: Any,
        of_theta: Tensor | None,
        of_state: Sequence[Tensor | None],
        wanted: Collection[str] = STEERED,
        *,
        shapes: Sequence[torch.Size] = (),
    ) -> Vjp:
        """Pulls the costates after a step back through its transformation: by autograd, or by the
        vjp that it brings (`ClosedTransformation`).

        By autograd the step is taken again, with a graph that lives as long as this call. Inputs
        are not modified. controls: floats. gradient, theta: flat vectors; θ may be None if not
        read. of_theta, of_state: costates; of_state has one entry per floating-point slot, or is
        empty for zeros. wanted: controls to differentiate by.
        """
        if of_theta is None and all(costate is None for costate in of_state):
            return Vjp(None, [], None, {})
        wanted = [name for name in wanted if name in controls]
        made = self.step(group, controls, shapes)
        if isinstance(made, ClosedTransformation) and made.vjp is not None:
            return made.vjp(gradient, theta, state, of_theta, of_state, wanted)
        leaf_theta, leaf_gradient, *leaves = (
            v.detach().requires_grad_() if is_float_tensor(v) else v
            for v in (theta, gradient, *state)
        )
        steered = {
            name: torch.full(
                (), controls[name], dtype=torch.float64, device=gradient.device
            ).requires_grad_()
            for name in wanted
        }
        given: dict[str, Scalar] = {**controls, **steered}
        with torch.enable_grad():
            if not self.own:
                given = {name: cast_like(value, gradient) for name, value in given.items()}
            made = self.step(group, given, shapes)
            increment, after = made.update(
                leaf_gradient, type(state)(*leaves), params=leaf_theta, inplace=False
            )
        outputs = [increment, *(v for v in after if is_float_tensor(v))]
        costates = [of_theta, *(of_state or [None] * (len(outputs) - 1))]
        pairs = [
            (t, of)
            for t, of in zip(outputs, costates, strict=True)
            if of is not None and t.requires_grad
        ]
        if not pairs:
            return Vjp(of_theta, [], None, {})
        slots = [v for v in leaves if is_float_tensor(v)]
        inputs = [leaf_gradient, *([] if theta is None else [leaf_theta]), *slots]
        ends, seeds = zip(*pairs, strict=True)
        found = unchecked_grad(ends, [*inputs, *steered.values()], seeds)
        of_gradient, *rest = found  # of_inputs: θ, if it is read, and the slots
        of_inputs, of_controls = rest[: len(inputs) - 1], rest[len(inputs) - 1 :]
        through = None if theta is None else of_inputs.pop(0)
        if through is not None and of_theta is not None:
            fresh = self.own and (
                of_gradient is None or through.data_ptr() != of_gradient.data_ptr()
            )
            through = torch.add(of_theta, through, out=through if fresh else None)
        return Vjp(
            of_theta if through is None else through,
            of_inputs,
            of_gradient,
            {n: of for n, of in zip(steered, of_controls, strict=True) if of is not None},
        )


def unchecked_grad(
    outputs: Sequence[Tensor | GradientEdge],
    inputs: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    *,
    retain: bool = False,
) -> list[Tensor | None]:
    """torch.autograd.grad with allow_unused, without its checks of shapes, which take 100 µs for
    the six parameters of a small model, beside a vjp of 650."""
    if _run_backward is None or any(
        type(t) not in (Tensor, nn.Parameter, GradientEdge) for t in (*outputs, *inputs, *seeds)
    ):
        pulled = torch.autograd.grad(
            outputs,  # type: ignore[arg-type]
            inputs,
            seeds,
            retain_graph=retain,
            allow_unused=True,
        )
        return list(pulled)
    found = _run_backward(
        tuple(outputs),
        tuple(seeds),
        retain,
        False,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return list(found)


def by_arguments(make: Callable[..., GradientTransformation]) -> TransformationOf:
    """Calls `make` with its arguments taken from the step's controls or the group by name. Special
    names: beta1, beta2 (betas), shape (the parameter's), decoupled (decoupled_weight_decay)."""
    names = frozenset(inspect.signature(make).parameters)

    def transformation(
        group: Group, controls: Mapping[str, Scalar], shapes: Sequence[torch.Size]
    ) -> GradientTransformation:
        given = {**group, "shape": shapes[0] if shapes else None}
        given["decoupled"] = group.get("decoupled_weight_decay", False)
        if "beta1" in names:
            given["beta1"], given["beta2"] = map(float, group["betas"])
            given["beta1"] = controls.get("momentum", given["beta1"])
        for name in STEERED:
            if name in names:
                given[name] = controls.get(name, float(group[name]))
        return make(**{name: given[name] for name in names if name in given})

    return transformation


def of_torch(
    name: str, make: Callable[..., GradientTransformation], **options: Any
) -> DifferentiableOptimizer:
    """The form of a torch.optim optimizer whose slots are named like the state's fields."""
    transformation = by_arguments(make)

    def state(
        states: Sequence[Mapping[str, Any]], parameters: Sequence[Tensor], group: Group
    ) -> Any:
        return _live_state(transformation(group, {}, ()).init, states, parameters)

    return DifferentiableOptimizer(
        name, transformation, state, reads_parameters=False, own=True, **options
    )


def _live_state(
    init: Callable[[Any], Any], states: Sequence[Mapping[str, Any]], parameters: Sequence[Tensor]
) -> Any:
    """The slots of all parameters, with values from `init` for missing ones."""
    template = init(parameters[0].detach().new_empty(0))
    found = []
    for field, start in template._asdict().items():
        values = [state[field] for state in states if state.get(field) is not None]
        if len(values) < len(states):
            fresh = template if start is None else init(flat_slot([{}], field, parameters))
            found.append(getattr(fresh, field))
        elif isinstance(start, int):
            found.append(int(values[0]))
        elif start is None or start.dim() or len({float(v) for v in values}) > 1:
            # Parameters with different step counts: one value per element.
            sizes = zip(values, parameters, strict=True)
            found.append(
                torch.cat([v.detach().to(p.device).expand(p.shape).flatten() for v, p in sizes])
            )
        else:
            found.append(values[0].detach().to(parameters[0].device, copy=True))
    return type(template)(*found)


def flat_slot(
    states: Sequence[Mapping[str, Any]], slot: str, parameters: Sequence[Tensor]
) -> Tensor:
    """One slot of all parameters as one vector, a copy; zeros where missing."""
    tensors = [state[slot].detach() for state in states if state.get(slot) is not None]
    if len(tensors) < len(states):
        tensors = [torch.zeros_like(p) for p in parameters]
    return torch.cat([t.reshape(-1) for t in tensors])


# Arithmetic --------------------------------------------------------------------------------------


def plus(a: Tensor, b: Tensor, factor: Scalar) -> Tensor:
    """a + factor b; one pass and one rounding where the factor is a number."""
    if isinstance(factor, Tensor):
        return a + factor * b
    return torch.add(a, b, alpha=factor)


def dot(a: Tensor, b: Tensor) -> Scalar:
    return scalar(torch.dot(a, b))


def scalar(value: Tensor) -> Scalar:
    """A float on a CPU, where sums of floats take a tenth; elsewhere a tensor: no synchronising."""
    return value.item() if value.device.type == "cpu" else value.double()


def cast_like(value: Scalar, like: Tensor) -> Scalar:
    return value.to(like.device, like.dtype) if isinstance(value, Tensor) else value


def is_zero(value: Scalar) -> bool:
    return not isinstance(value, Tensor) and value == 0


def is_float_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def known(theta: Tensor | None) -> Tensor:
    return cast(Tensor, theta)

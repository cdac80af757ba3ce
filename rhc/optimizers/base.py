"""An optimizer's step Φ as a differentiable function.

`Step` is the arithmetic of one step at given controls; `DifferentiableOptimizer` connects it to a
torch.optim optimizer's groups and slots.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torchopt.base import GradientTransformation
from torchopt.pytree import tree_flatten, tree_leaves, tree_unflatten

from rhc.errors import InputError

Scalar = float | Tensor
Group = Mapping[str, Any]

STEERED = ("lr", "momentum", "weight_decay")
"""The controls inside Φ; noise is added to the gradient before it."""

ROOT_EPSILON = 1e-30
"""Added under the root of every second moment: √v has infinite slope at v = 0 (unused embedding
rows), which would make hypergradients NaN. It changes an update by less than ROOT_EPSILON lr / 2
eps²: 5e-15 lr at eps 1e-8, 5e-11 lr at Adagrad's 1e-10."""

# One step ----------------------------------------------------------------------------------------


class Vjp(NamedTuple):
    """Costates before a step; None is zero.
    parameters: of θ, the given tensor itself if unchanged. state: per floating-point slot.
    gradient: of g. controls: name -> dJ/du."""

    parameters: Tensor | None
    state: Sequence[Tensor | None]
    gradient: Tensor | None
    controls: dict[str, Scalar]


class Fold(NamedTuple):
    """For a step whose new state can be stored in its gradient's memory.
    onto: (gradient, state before) -> state after, over the gradient. off: (state after, state
    before); restores the gradient, up to rounding."""

    onto: Callable[[Tensor, Any], Any]
    off: Callable[[Any, Any], None]


Moved = tuple[Callable[[Tensor], Tensor], Any]
"""(θ -> θ + u, the state after the step)."""


@dataclass
class Step:
    """θ ← θ + u(d, state), d = ±g + λ θ, or decoupled θ ← (1 − α λ) θ first.
    A torchopt GradientTransformation on trees of tensors; lr, λ and what `move` closes over are
    floats, or 0-dim tensors to differentiate by. init: parameters -> the initial state. move: (d,
    state) -> changes of θ and state. vjp: its closed form, if any (`closed_vjp`). fold: see `Fold`.
    """

    init: Callable[[Any], Any]
    move: Callable[[Tensor, Any], Moved]
    lr: Scalar
    weight_decay: Scalar = 0.0
    decoupled: bool = False
    maximize: bool = False
    vjp: Callable[..., Vjp | None] | None = None
    fold: Fold | None = None

    def __iter__(self) -> Iterator[Any]:
        """For torchopt.chain, which unpacks transformations."""
        return iter((self.init, self.update))

    def update(
        self, updates: Any, state: Any, *, params: Any = None, inplace: bool = False
    ) -> tuple[Any, Any]:
        """(the increments of the parameters, the state after)."""
        if isinstance(updates, Tensor):
            return self._update(updates, params, state)
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
            self._update(gradient, theta, type(state)(*own))
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

    def _update(self, gradient: Tensor, theta: Tensor | None, state: Any) -> tuple[Tensor, Any]:
        d = self.d(gradient, theta)
        move, after = self.move(d, state)
        added = move(torch.zeros_like(d))
        if self.decoupled and not is_zero(self.weight_decay):
            added = added - self.lr * self.weight_decay * known(theta)
        return added, after

    def advance(
        self, gradient: Tensor, theta: Tensor | None, state: Any
    ) -> tuple[Tensor | None, Any]:
        """(θ, state) after the step, in fewer passes than `update`; θ may be None."""
        move, after = self.move(self.d(gradient, theta), state)
        if theta is None:
            return None, after
        if self.decoupled and not is_zero(self.weight_decay):
            theta = theta * (1 - self.lr * self.weight_decay)
        return move(theta), after

    def d(self, gradient: Tensor, theta: Tensor | None) -> Tensor:
        signed = gradient.neg() if self.maximize else gradient
        if self.decoupled or is_zero(self.weight_decay):
            return signed
        return plus(signed, known(theta), self.weight_decay)

    def along_d(self, a: Tensor, gradient: Tensor, theta: Tensor | None) -> Scalar:
        """⟨a, d⟩ without forming d."""
        along = dot(a, gradient)
        along = -along if self.maximize else along
        if self.decoupled or is_zero(self.weight_decay):
            return along
        return along + self.weight_decay * dot(a, known(theta))

    def closed_vjp(
        self,
        gradient: Tensor,
        theta: Tensor | None,
        before: Any,
        of_theta: Tensor | None,
        of_state: Sequence[Tensor | None],
        wanted: Collection[str],
        after: Any = None,
    ) -> Vjp | None:
        """The vjp of `advance` from that of `move`; None without a closed form. Controls are
        floats. `vjp` gets this step and the same arguments; its `gradient` is the costate of d, its
        `parameters` is unused."""
        if self.vjp is None:
            return None
        found = self.vjp(self, gradient, theta, before, of_theta, of_state, wanted, after)
        if found is None:
            return None
        of_d, controls, decay = found.gradient, found.controls, self.weight_decay
        of_theta_before = of_theta
        if self.decoupled and of_theta is not None:
            along_theta: Scalar = 0.0
            if "weight_decay" in wanted or ("lr" in wanted and not is_zero(decay)):
                along_theta = dot(of_theta, known(theta))
            if "weight_decay" in wanted:
                controls["weight_decay"] = -self.lr * along_theta
            if "lr" in wanted:
                controls["lr"] = controls["lr"] - decay * along_theta
            if not is_zero(decay):
                of_theta_before = of_theta * (1 - self.lr * decay)
        elif not self.decoupled and of_d is not None:
            if "weight_decay" in wanted:
                controls["weight_decay"] = dot(of_d, known(theta))
            if not is_zero(decay):
                of_theta_before = of_d * decay if of_theta is None else plus(of_theta, of_d, decay)
        if self.maximize and of_d is not None:
            of_d = of_d.neg_()
        return Vjp(of_theta_before, found.state, of_d, controls)


# An optimizer ------------------------------------------------------------------------------------


TransformationOf = Callable[
    [Group, Mapping[str, Scalar], Sequence[torch.Size]], GradientTransformation | Step
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
    machine epsilon of the optimizer's arithmetic, if coarser than its parameters'.
    """

    name: str
    transformation: TransformationOf
    state_of: StateOf
    elementwise: bool = True
    controls: tuple[str, ...] | None = None
    reads_parameters: bool = True
    precision: float = 0.0

    def step(
        self, group: Group, controls: Mapping[str, Scalar], shapes: Sequence[torch.Size] = ()
    ) -> GradientTransformation | Step:
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

    def fold(self, group: Group, controls: Mapping[str, float]) -> Fold | None:
        made = self.step(group, controls)
        return made.fold if isinstance(made, Step) else None

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
        own = {name: cast_like(value, gradient) for name, value in controls.items()}
        made = self.step(group, own, shapes)
        if isinstance(made, Step):
            return made.advance(gradient, theta, state)
        updates, after = made.update(gradient, state, params=theta, inplace=False)
        return known(theta) + updates, after

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
        after: Any = None,
    ) -> Vjp:
        """Pulls the costates after a step back through it; inputs are not modified.

        controls: floats. gradient, theta: flat vectors; θ may be None if not read. of_theta,
        of_state: costates; of_state has one entry per floating-point slot, or is empty for zeros.
        wanted: controls to differentiate by. after: the new state, if it is stored in the
        gradient's memory.
        """
        if of_theta is None and all(costate is None for costate in of_state):
            return Vjp(None, [], None, {})
        made = self.step(group, controls, shapes)
        if isinstance(made, Step):
            found = made.closed_vjp(gradient, theta, state, of_theta, of_state, wanted, after)
            if found is not None:
                return found
        theta = torch.zeros_like(gradient) if theta is None else theta
        theta, gradient = theta.detach().requires_grad_(), gradient.detach().requires_grad_()
        leaves = (v.detach().requires_grad_() if is_float_tensor(v) else v for v in state)
        state = type(state)(*leaves)
        with torch.enable_grad():
            steered = {
                name: torch.tensor(controls[name], dtype=torch.float64, requires_grad=True)
                for name in wanted
                if name in controls
            }
            own: dict[str, Scalar] = {**controls, **steered}
            theta_after, state_after = self.advance(group, own, gradient, theta, state, shapes)
        slots_after = [v for v in state_after if is_float_tensor(v)]
        costates = [of_theta, *(of_state or [None] * len(slots_after))]
        ends = zip([theta_after, *slots_after], costates, strict=True)
        pairs = [(t, of) for t, of in ends if of is not None and t.requires_grad]
        if not pairs:
            return Vjp(None, [], None, {})
        slots = [v for v in state if is_float_tensor(v)]
        inputs = [theta, gradient, *slots, *steered.values()]
        outputs, seeds = zip(*pairs, strict=True)
        pulled = torch.autograd.grad(outputs, inputs, seeds, allow_unused=True)
        of_theta, of_gradient, *rest = pulled
        of_controls = zip(steered, rest[len(slots) :], strict=True)
        return Vjp(
            of_theta,
            rest[: len(slots)],
            of_gradient,
            {name: of for name, of in of_controls if of is not None},
        )


def by_arguments(make: Callable[..., Step]) -> TransformationOf:
    """Calls `make` with its arguments taken from the step's controls or the group by name. Special
    names: beta1, beta2 (betas), shape (the parameter's), decoupled (decoupled_weight_decay)."""
    names = frozenset(inspect.signature(make).parameters)

    def transformation(
        group: Group, controls: Mapping[str, Scalar], shapes: Sequence[torch.Size]
    ) -> Step:
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
    name: str, make: Callable[..., Step], *, elementwise: bool = True, precision: float = 0.0
) -> DifferentiableOptimizer:
    """The form of a torch.optim optimizer whose slots are named like the state's fields."""
    transformation = by_arguments(make)

    def state(
        states: Sequence[Mapping[str, Any]], parameters: Sequence[Tensor], group: Group
    ) -> Any:
        return _live_state(transformation(group, {}, ()).init, states, parameters)

    return DifferentiableOptimizer(
        name, transformation, state, elementwise, reads_parameters=False, precision=precision
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
    """a + factor b; one pass and one rounding without a graph."""
    if isinstance(factor, Tensor) or a.requires_grad or b.requires_grad:
        return a + factor * b
    return torch.add(a, b, alpha=factor)


def dot(a: Tensor, b: Tensor) -> Scalar:
    return scalar(torch.dot(a, b))


def scalar(value: Tensor) -> Scalar:
    """A float on the CPU, where float sums are 10× cheaper; on accelerators a tensor (no sync)."""
    return value.item() if value.device.type == "cpu" else value.double()


def cast_like(value: Scalar, like: Tensor) -> Scalar:
    return value.to(like.device, like.dtype) if isinstance(value, Tensor) else value


def is_zero(value: Scalar) -> bool:
    return not isinstance(value, Tensor) and value == 0


def is_float_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def known(theta: Tensor | None) -> Tensor:
    return cast(Tensor, theta)

"""The engine: one segment-wise reverse pass over a rolled window.

λ_t = dJ/ds_t is carried backwards through s_{t+1} = F_t(s_t, u_t). The window is cut into segments;
the state at each segment's start was kept by the roll; going backwards, a segment's graph is built
again, the costate is pulled through it, and the graph is dropped. segment = K is the unrolled
graph, segment ≈ √K gradient checkpointing, segment = 1 the costate recursion, which needs no
graph through time at all:

1. pull (λ_θ, λ_h) of t+1 back through Φ at (θ_t, h_t, g_t, u_t): elementwise; gives dJ/du_t,
   parts of λ_θ and λ_h, and λ_g;
2. λ_θ += H_t λ_g: `products`;
3. add the stage cost's gradient and the average's share of the terminal gradient.

Rejected: torch.utils.checkpoint over the segments with an inner autograd.grad(create_graph=True)
takes +3960 MB where this takes under 150 (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torchopt
from torch import Tensor, nn

from rhc import memory
from rhc.hypergradient.evaluation import Evaluation, double_backward, visible_statistics
from rhc.hypergradient.products import (
    Product,
    StepPoint,
    pull_back,
    relative_difference,
)
from rhc.noise import root_mean_square, standard_noise
from rhc.objective import Objective, average_weights
from rhc.plant import Block, BlockState, Plant, Trajectory

Terminal = Callable[[nn.Module], Tensor]
Scalar = float | Tensor


@dataclass
class Costate:
    """λ = dJ/ds: per block, for θ and for every tensor of the optimizer's state; for b by name.

    None stands for zero.
    """

    parameters: list[Tensor | None]
    optimizer: list[list[Tensor | None]]
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def norm(self) -> Tensor:
        """Euclidean norm over everything, a float64 scalar."""
        parts = [
            t for t in [*self.parameters, *(t for h in self.optimizer for t in h)] if t is not None
        ] + list(self.statistics.values())
        if not parts:
            return torch.zeros((), dtype=torch.float64)
        norms = torch._foreach_norm(parts)
        device = norms[0].device
        return torch.linalg.vector_norm(torch.stack([n.to(device, torch.float64) for n in norms]))


@dataclass
class Adjoint:
    """dJ/du: control -> (K,) float64, natural units. costate_norms: (K,), |dJ/ds_t|.

    discrepancies: index of a step -> |g − g_t| / |g_t| of its gradient when computed again.
    """

    gradient: dict[str, Tensor]
    costate_norms: Tensor
    hessian_products: int
    discrepancies: dict[int, float]


def kept_states(steps: int, segment: int) -> Callable[[int], bool]:
    """Before which steps the roll keeps the whole state, for a reverse pass with `segment`.

    A segment needs the state at its start. The costate recursion needs every state, but rebuilds
    them from the first one and the roll's gradients, without evaluating the model: `_Rebuilt`.
    """
    if segment == 1:
        return lambda i: i == 0
    return lambda i: i < steps and i % segment == 0


def adjoint(
    plant: Plant,
    trajectory: Trajectory,
    objective: Objective,
    controls: Sequence[str],
    *,
    terminal: Terminal | None,
    average: Sequence[Tensor] | None,
    segment: int,
    product: Product,
) -> tuple[Adjoint, Tensor | None]:
    """(dJ/du for every step and control, the terminal loss).

    trajectory: of a roll that recorded `kept_states(K, segment)`. average: θ̄ in the optimizer's
    parameter order, where the terminal loss is taken; None for the last iterate, which must then
    be the live model's. The live model, its buffers and the random state are used as scratch only
    through substitution; the random state is left changed.
    """
    evaluation = Evaluation(plant, trajectory.blocks, objective)
    value, costate, mean = _terminal_costate(
        plant, trajectory, objective, evaluation, terminal, average
    )
    # Difference products need no double backward, and keep the model's own kernels.
    kernels = double_backward(plant.model) if product == "exact" else nullcontext()
    with kernels, visible_statistics(plant.model, update=bool(costate.statistics)):
        reverse = _Reverse(plant, trajectory, objective, evaluation, controls, mean)
        if segment == 1:
            result = reverse.recursion(costate, product)
        else:
            result = reverse.segments(costate, segment)
    return result, value


def _terminal_costate(
    plant: Plant,
    trajectory: Trajectory,
    objective: Objective,
    evaluation: Evaluation,
    terminal: Terminal | None,
    average: Sequence[Tensor] | None,
) -> tuple[Tensor | None, Costate, list[Tensor | None]]:
    """(terminal loss, λ at the window's end but for θ̄'s share, ∇terminal(θ̄) per block)."""
    blocks = trajectory.blocks
    costate = Costate([None] * len(blocks), [[] for _ in blocks])
    if terminal is None or objective.terminal_weight == 0:
        return None, costate, [None] * len(blocks)
    at = plant.parameters if average is None else average
    flats = [block.flatten(at).requires_grad_() for block in blocks]
    live = {name: b.detach() for name, b in plant.model.named_buffers()}
    leaves = {n: live[n].clone().requires_grad_() for n in evaluation.statistics_names}

    def pull(value: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        weighted = objective.terminal_weight * value
        return value.detach(), torch.autograd.grad(
            weighted, [*flats, *leaves.values()], allow_unused=True
        )

    with visible_statistics(plant.model, update=False):
        value, pulled = evaluation.terminal(terminal, flats, {**live, **leaves}, pull)
    for name, p in zip(leaves, pulled[len(flats) :], strict=True):
        if p is not None:
            costate.statistics[name] = p
    if costate.statistics:
        # From here on every statistic is carried, so that their updates compose.
        for name, leaf in leaves.items():
            costate.statistics.setdefault(name, torch.zeros_like(leaf))
    return value, costate, list(pulled[: len(flats)])


class _Reverse:
    """One reverse pass: what stays the same over its steps."""

    def __init__(
        self,
        plant: Plant,
        trajectory: Trajectory,
        objective: Objective,
        evaluation: Evaluation,
        controls: Sequence[str],
        mean_gradient: list[Tensor | None],
    ) -> None:
        self.plant = plant
        self.trajectory = trajectory
        self.objective = objective
        self.evaluation = evaluation
        self.blocks: tuple[Block, ...] = trajectory.blocks
        self.steps = len(trajectory)
        self.controls = tuple(controls)
        self.mean_gradient = mean_gradient
        self.weights = average_weights(objective.average, self.steps)
        self.gradient = {n: torch.zeros(self.steps, dtype=torch.float64) for n in controls}
        self.norms = torch.zeros(self.steps, dtype=torch.float64)
        self.products = 0
        # Whether a step computed again is the step that was rolled is looked at twice a window.
        self.compared = (self.steps - 1, 0)
        self.discrepancies = dict[int, float]()

    # segment = 1 ---------------------------------------------------------------------------------

    def recursion(self, costate: Costate, product: Product) -> Adjoint:
        """The costate recursion."""
        rebuilt = _Rebuilt(self.trajectory.states, self._state_after)
        large = rebuilt.size >= LARGE_STATE and self.plant.parameters[0].device.type == "cpu"
        costate = self._with_share(costate, self.steps)
        for i in reversed(range(self.steps)):
            states = rebuilt.take(i)
            costate, gradient_costates = self._pull_through_optimizer(i, states, costate)
            point = StepPoint(
                [s.parameters for s in states],
                self.trajectory.buffers[i],
                self.trajectory.batches[i],
                self.trajectory.rng[i],
                self.trajectory.gradients[i],
            )
            del states  # the product needs the parameters only
            if large:
                memory.trim()
            pulled = pull_back(
                product,
                self.evaluation,
                point,
                gradient_costates,
                costate.statistics,
                compare=i in self.compared,
            )
            self.discrepancies[i] = pulled.discrepancy
            self.products += 1
            costate = Costate(
                [_sum(a, b) for a, b in zip(costate.parameters, pulled.parameters, strict=True)],
                costate.optimizer,
                pulled.statistics,
            )
            if i:
                costate = self._with_share(costate, i)
            self.norms[i] = costate.norm()
        return Adjoint(self.gradient, self.norms, self.products, self.discrepancies)

    def _pull_through_optimizer(
        self, i: int, states: Sequence[BlockState], costate: Costate
    ) -> tuple[Costate, list[Tensor | None]]:
        """(λ_θ and λ_h of step i but for the loss's part, λ_g), and writes dJ/du_i."""
        with torch.enable_grad():
            leaves = [_leaf_state(state) for state in states]
            gradients = [
                None if g is None else g.detach().requires_grad_()
                for g in self.trajectory.gradients[i]
            ]
            values, steered = self._control_leaves(i)
            after = self._advance(i, leaves, gradients, values)
        outputs, seeds = _paired(after, costate)
        inputs = [t for leaf in leaves for t in _tensors(leaf)]
        taking_part = [g for g in gradients if g is not None]
        if not outputs:
            zero: list[list[Tensor | None]] = [
                [None] * (len(_tensors(leaf)) - 1) for leaf in leaves
            ]
            return Costate([None] * len(leaves), zero, costate.statistics), [None] * len(leaves)
        pulled: list[Tensor | None] = list(
            torch.autograd.grad(
                outputs, [*inputs, *taking_part, *steered.values()], seeds, allow_unused=True
            )
        )
        parameters, optimizer = _unflatten(pulled, leaves)
        gradient_costates = [None if g is None else pulled.pop(0) for g in gradients]
        self._write_gradient(i, steered, pulled)
        return Costate(parameters, optimizer, costate.statistics), gradient_costates

    def _state_after(self, i: int, states: list[BlockState]) -> list[BlockState]:
        """The states of step i + 1 from those of step i and the roll's gradients."""
        with torch.no_grad():
            values: dict[str, Scalar] = dict(self._values(i))
            return self._advance(i, states, self.trajectory.gradients[i], values)

    # segment > 1 ---------------------------------------------------------------------------------

    def segments(self, costate: Costate, segment: int) -> Adjoint:
        """Graphs of `segment` steps at a time."""
        costate = self._with_share(costate, self.steps)
        for start in reversed(range(0, self.steps, segment)):
            costate = self._segment(start, min(start + segment, self.steps), costate)
            if start:
                costate = self._with_share(costate, start)
                self.norms[start] = costate.norm()
        return Adjoint(self.gradient, self.norms, self.products, self.discrepancies)

    def _segment(self, start: int, stop: int, costate: Costate) -> Costate:
        trajectory = self.trajectory
        outputs: list[Tensor] = []
        seeds: list[Tensor | None] = []
        intermediate: list[list[Tensor]] = []
        steered: list[dict[str, Tensor]] = []
        with torch.enable_grad():
            leaves = states = [_leaf_state(s) for s in trajectory.states[start]]
            statistics = first_statistics = {
                n: trajectory.buffers[start][n].detach().clone().requires_grad_()
                for n in costate.statistics
            }
            trajectory.rng[start].restore()
            for i in range(start, stop):
                if i > start:
                    # θ_i was computed from h_i, so dJ/dh_i of the graph's own tensor would count
                    # the way through θ_i too; an alias is used by the steps that follow only.
                    states = [_alias(s) for s in states]
                    statistics = {n: b.view_as(b) for n, b in statistics.items()}
                    parts = [t for s in states for t in _tensors(s)]
                    intermediate.append([*parts, *statistics.values()])
                flats = [s.parameters for s in states]
                if i > start:
                    for flat, share in zip(flats, self._share(i), strict=True):
                        if share is not None and flat.requires_grad:
                            outputs.append(flat)
                            seeds.append(share)
                buffers = {**trajectory.buffers[i], **statistics}
                evaluated = self.evaluation(
                    flats, buffers, trajectory.batches[i], statistics=bool(statistics)
                )
                statistics = evaluated.statistics
                gradients: list[Tensor | None] = [None] * len(flats)
                active = [b for b, g in enumerate(trajectory.gradients[i]) if g is not None]
                graded = torch.autograd.grad(
                    evaluated.loss, [flats[b] for b in active], create_graph=True
                )
                for b, g in zip(active, graded, strict=True):
                    gradients[b] = g
                if i in self.compared:
                    self.discrepancies[i] = relative_difference(gradients, trajectory.gradients[i])
                self.products += 1
                if evaluated.stage is not None:
                    outputs.append(evaluated.stage)
                    seeds.append(None)
                values, leaf = self._control_leaves(i)
                steered.append(leaf)
                states = self._advance(i, states, gradients, values)
        end_outputs, end_seeds = _paired(states, costate)
        outputs += end_outputs
        seeds += end_seeds
        for name, after in statistics.items():
            if after.requires_grad:
                outputs.append(after)
                seeds.append(costate.statistics[name])
        if not outputs:
            return Costate(
                [None] * len(leaves), [[None] * (len(_tensors(s)) - 1) for s in leaves], {}
            )
        first = [t for s in leaves for t in _tensors(s)]
        wanted = [
            *first,
            *first_statistics.values(),
            *(u for leaf in steered for u in leaf.values()),
            *(t for step in intermediate for t in step if t.requires_grad),
        ]
        pulled: list[Tensor | None] = list(
            torch.autograd.grad(outputs, wanted, seeds, allow_unused=True)
        )
        parameters, optimizer = _unflatten(pulled, leaves)
        carried = {
            name: torch.zeros_like(leaf) if p is None else p
            for (name, leaf), p in zip(
                first_statistics.items(), [pulled.pop(0) for _ in first_statistics], strict=True
            )
        }
        for i, leaf in enumerate(steered, start):
            self._write_gradient(i, leaf, [pulled.pop(0) for _ in leaf])
        for i, step in enumerate(intermediate, start + 1):
            self.norms[i] = Costate([pulled.pop(0) for t in step if t.requires_grad], []).norm()
        result = Costate(parameters, optimizer, carried)
        self.norms[start] = result.norm()
        return result

    # Common to both ------------------------------------------------------------------------------

    def _values(self, i: int) -> dict[str, float]:
        return self.trajectory.schedule.at(self.trajectory.start + i)

    def _control_leaves(self, i: int) -> tuple[dict[str, Scalar], dict[str, Tensor]]:
        """(every control of step i, the steered ones of them as leaves)."""
        values: dict[str, Scalar] = dict(self._values(i))
        leaves = {
            name: torch.tensor(values[name], dtype=torch.float64, requires_grad=True)
            for name in self.controls
        }
        return values | leaves, leaves

    def _write_gradient(
        self, i: int, leaves: Mapping[str, Tensor], pulled: Sequence[Tensor | None]
    ) -> None:
        for name, p in zip(leaves, pulled, strict=True):
            if p is not None:
                self.gradient[name][i] = p

    def _share(self, n: int) -> list[Tensor | None]:
        """The terminal gradient's share of the n-th iterate θ_n, 1 ≤ n ≤ K."""
        w = self.weights[n - 1]
        return [None if g is None or w == 0 else w * g for g in self.mean_gradient]

    def _with_share(self, costate: Costate, n: int) -> Costate:
        parameters = [_sum(a, b) for a, b in zip(costate.parameters, self._share(n), strict=True)]
        return Costate(parameters, costate.optimizer, costate.statistics)

    def _advance(
        self,
        i: int,
        states: Sequence[BlockState],
        gradients: Sequence[Tensor | None],
        values: Mapping[str, Scalar],
    ) -> list[BlockState]:
        """Φ after clipping and noise, for every block; blocks without a gradient stay."""
        transformed = self._transform(i, gradients, values.get("noise", 0.0))
        result = []
        for block, state, g in zip(self.blocks, states, transformed, strict=True):
            if g is None:
                result.append(state)
                continue
            controls = {
                name: _cast(self.plant.controls.group_value(name, block.group, value), g)
                for name, value in values.items()
                if name != "noise"
            }
            group = self.plant.optimizer.param_groups[block.group]
            step = self.plant.dynamics.transformation(group, controls, block.shapes)
            updates, after = step.update(g, state.optimizer, params=state.parameters, inplace=False)
            result.append(
                BlockState(torchopt.apply_updates(state.parameters, updates, inplace=False), after)
            )
        return result

    def _transform(
        self, i: int, gradients: Sequence[Tensor | None], sigma: Scalar
    ) -> list[Tensor | None]:
        """Clipping to the global norm, then ĝ = g + σ RMS(g) ξ per parameter tensor."""
        result = list(gradients)
        if self.plant.clip_norm is not None:
            norms = [torch.linalg.vector_norm(g) for g in gradients if g is not None]
            total = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
            scale = (self.plant.clip_norm / (total + 1e-6)).clamp(max=1.0)
            result = [None if g is None else g * scale.to(g.device, g.dtype) for g in result]
        if not isinstance(sigma, Tensor) and sigma == 0:
            return result
        noise = standard_noise(self.plant.parameters, self.plant.seed, self.trajectory.start + i)
        for b, (block, g) in enumerate(zip(self.blocks, result, strict=True)):
            if g is not None:
                scale = torch.cat(
                    [
                        root_mean_square(v) * noise[p].reshape(-1)
                        for v, p in zip(block.views(g), block.indices, strict=True)
                    ]
                )
                result[b] = g + _cast(sigma, g) * scale
        return result


class _Rebuilt:
    """The states of a window in reverse order, rebuilt from the kept ones by `after`.

    A state costs the memory of parameters and optimizer slots, `after` a few elementwise passes.
    Where all states up to the one asked for are small, all are kept on the way there; otherwise
    only those at 2/3 of the way, at 2/3 of the rest, and so on, which bounds them by log3 K + 1 at
    about log3 K passes a step (recursive checkpointing, Griewank 1992).
    """

    def __init__(
        self,
        kept: Mapping[int, list[BlockState]],
        after: Callable[[int, list[BlockState]], list[BlockState]],
    ) -> None:
        self.states = dict(kept)
        self.after = after
        first = next(iter(kept.values()))
        self.size = sum(t.numel() * t.element_size() for s in first for t in _tensors(s))
        self.affordable = max(1, SMALL_STATES // max(1, self.size))

    def take(self, i: int) -> list[BlockState]:
        """The states of step i; those of later steps must have been taken."""
        start = max(k for k in self.states if k <= i)
        states = self.states[start]
        milestone = start
        for k in range(start, i):
            states = self.after(k, states)
            if i - start <= self.affordable or 3 * (k + 1 - milestone) >= 2 * (i - milestone):
                milestone = k + 1
                self.states[k + 1] = states
        return self.states.pop(i)


SMALL_STATES = 8 * 2**20
"""Bytes of rebuilt states that are kept at a time without a thought."""

LARGE_STATE = 2**20
"""Bytes of a state from which on the heap is trimmed before every product."""


def _leaf_state(state: BlockState) -> BlockState:
    return BlockState(
        state.parameters.detach().requires_grad_(),
        type(state.optimizer)(
            *(
                v.detach().requires_grad_()
                if isinstance(v, Tensor) and v.is_floating_point()
                else v
                for v in state.optimizer
            )
        ),
    )


def _alias(state: BlockState) -> BlockState:
    slots = (v.view_as(v) if isinstance(v, Tensor) else v for v in state.optimizer)
    return BlockState(state.parameters.view_as(state.parameters), type(state.optimizer)(*slots))


def _tensors(state: BlockState) -> list[Tensor]:
    """θ first, then the optimizer's floating-point slots, in their order."""
    slots = [v for v in state.optimizer if isinstance(v, Tensor) and v.is_floating_point()]
    return [state.parameters, *slots]


def _paired(
    states: Sequence[BlockState], costate: Costate
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(tensors of the end state that have both a graph and a costate, those costates)."""
    outputs: list[Tensor] = []
    seeds: list[Tensor | None] = []
    for state, of_parameters, of_optimizer in zip(
        states, costate.parameters, costate.optimizer, strict=True
    ):
        theta, *slots = _tensors(state)
        # At the window's end nothing depends on the optimizer's state, whatever its length.
        of_slots = of_optimizer or [None] * len(slots)
        for tensor, seed in zip([theta, *slots], [of_parameters, *of_slots], strict=True):
            if seed is not None and tensor.requires_grad:
                outputs.append(tensor)
                seeds.append(seed)
    return outputs, seeds


def _unflatten(
    pulled: list[Tensor | None], leaves: Sequence[BlockState]
) -> tuple[list[Tensor | None], list[list[Tensor | None]]]:
    """Takes the first tensors off `pulled`, in the order of the leaves' tensors."""
    parameters: list[Tensor | None] = []
    optimizer: list[list[Tensor | None]] = []
    for leaf in leaves:
        parameters.append(pulled.pop(0))
        optimizer.append([pulled.pop(0) for _ in _tensors(leaf)[1:]])
    return parameters, optimizer


def _cast(value: Scalar, like: Tensor) -> Scalar:
    return value.to(like.device, like.dtype) if isinstance(value, Tensor) else value


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b

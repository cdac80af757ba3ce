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

What the roll keeps for this, and what is recomputed or read from disk, is `plan`'s business.

Rejected: torch.utils.checkpoint over the segments with an inner autograd.grad(create_graph=True)
takes +3960 MB where this takes under 150 (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rhc.errors import Unseen
from rhc.hypergradient.evaluation import (
    Evaluation,
    Scratch,
    double_backward,
    fast_gradients,
    gradients_by_backward,
    visible_statistics,
)
from rhc.hypergradient.hvp import (
    KEPT_COST,
    PRODUCT_COST,
    NotAMean,
    Product,
    StepPoint,
    pull_back,
    relative_difference,
)
from rhc.hypergradient.record import Chunk, WindowRecorder
from rhc.hypergradient.states import (
    SMALL_STATES,
    Before,
    Folded,
    Rebuilt,
    SlotsAlone,
    Source,
    Whole,
    float_tensors,
)
from rhc.optimizers import Fold, Scalar, Vjp
from rhc.training import memory
from rhc.training.hooks import Hook, through
from rhc.training.losses import checked_loss
from rhc.training.module_state import Buffers
from rhc.training.objective import Objective, average_weights
from rhc.training.plant import Plant
from rhc.training.trajectory import Block, BlockState, Trajectory

Terminal = Callable[[nn.Module], Tensor]


@dataclass
class Costate:
    """λ = dJ/ds: per block, for θ and for every tensor of the optimizer's state; for b by name.

    None stands for zero.
    """

    parameters: list[Tensor | None]
    optimizer: list[list[Tensor | None]]
    statistics: dict[str, Tensor] = field(default_factory=dict)

    def norms(self) -> tuple[list[Tensor], list[Tensor]]:
        """Euclidean norms of the tensors: (of dJ/dθ, of the rest).

        Slots have units of their own: Adam's v at 0 has a huge slope.
        """
        theta = [t for t in self.parameters if t is not None]
        rest = [t for h in self.optimizer for t in h if t is not None]
        parts = [*theta, *rest, *self.statistics.values()]
        found = torch._foreach_norm(parts) if parts else ()
        return list(found[: len(theta)]), list(found[len(theta) :])

    def parameter_norm(self) -> Tensor:
        """Of dJ/dθ alone, a float64 scalar."""
        return _euclidean(self.norms()[0])


def _euclidean(parts: Sequence[Tensor]) -> Tensor:
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    device = parts[0].device
    return torch.linalg.vector_norm(torch.stack([p.to(device, torch.float64) for p in parts]))


@dataclass(frozen=True)
class Damping:
    """Remedies for costates that grow: both bias the hypergradient towards the near future.

    discount γ in (0, 1]: multiplies the costate at every step backwards. clip: largest norm of the
    costate's θ-part, as a multiple of what it is at the window's end; None for no limit.
    """

    discount: float = 1.0
    clip: float | None = None


@dataclass
class Adjoint:
    """dJ/du: control -> (K,) or (K, groups) float64, natural units.

    costate_norms: (K,), |dJ/ds_t|. parameter_norms: (K + 1,), |dJ/dθ_t|. equivalents: the cost in
    gradient evaluations. discrepancies: index of a step -> |g − g_t| / |g_t| of its gradient when
    computed again. disagreements: index -> |H v − H v′| / 2|λ| of difference products that were
    taken twice. undivided: index of the first step whose batch should have been taken in parts, and
    could not be. cut: where it was asked for.
    """

    gradient: dict[str, Tensor]
    costate_norms: Tensor
    parameter_norms: Tensor
    hessian_products: int
    equivalents: float
    discrepancies: dict[int, float]
    disagreements: dict[int, float]
    undivided: int | None = None
    cut: Cut | None = None


@dataclass
class Cut:
    """A reverse pass as it was before step k: what the rest of the window is worth to first order.

    costate: λ_k. weights, terminal: θ̄ takes w_n θ_n in for n = 1 … k − 1; the terminal loss's
    weighted gradient at θ̄, per block.
    """

    k: int
    costate: Costate
    weights: Sequence[float]
    terminal: Sequence[Tensor | None]


STRETCH = 1e-3
"""By which share a gradient is made longer and shorter to see what a hook does."""

SAME_SLOPE = 0.05
"""Largest difference of a hook's two slopes, relative to gradients: kinks of a clamp stay below."""


def adjoint(
    plant: Plant,
    recorder: WindowRecorder,
    objective: Objective,
    controls: Sequence[str],
    *,
    terminal: Terminal | None,
    average: Sequence[Tensor] | None,
    product: Product,
    damping: Damping,
    twice: Collection[int] = (),
    cut: int = 0,
) -> tuple[Adjoint, Tensor | None]:
    """(dJ/du for every step and control, the terminal loss).

    recorder: of a roll whose end is the live state. average: θ̄ in the optimizer's parameter order,
    where the terminal loss is taken; None for the last iterate. twice: steps at which a difference
    is taken twice, a forward one to either side, a central one at half the distance too; their mean
    counts, and how far they are apart is noted. cut: k of a `Cut` that is wanted; 0 for none. The
    live model and optimizer are used as scratch and put back; the random state is left changed.
    """
    trajectory = recorder.trajectory
    evaluation = Evaluation(plant, trajectory.blocks, objective)
    value, costate, mean = _terminal_costate(
        plant, trajectory, objective, evaluation, terminal, average
    )
    reverse = _Reverse(plant, trajectory, objective, evaluation, controls, mean, damping, cut)
    if recorder.plan.segment == 1:
        held = [costate]
        del costate  # whoever names a costate while a step is gone through keeps it from its end
        return reverse.recursion(held, recorder, product, frozenset(twice)), value
    with (
        double_backward(plant.model, light=False),
        visible_statistics(plant.model, update=bool(costate.statistics)),
    ):
        return reverse.segments(costate, recorder.plan.segment), value


def kernels_for(product: Product, model: nn.Module) -> AbstractContextManager[None]:
    """Difference products need no double backward, and keep most of the model's own kernels."""
    if product == "exact":
        return double_backward(model)
    if product == "forward-over-reverse":
        return double_backward(model, light=False)
    return fast_gradients(model)


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
    if plant.parallel.sharded:
        value, gradients = _of_parts(plant, trajectory, objective, terminal, at)
        return value, costate, gradients
    flats = [block.flatten(at).requires_grad_() for block in blocks]
    live = Buffers(plant.model).live()
    leaves = {
        n: b.detach().clone().requires_grad_()
        for n in evaluation.statistics_names
        if (b := live[n]) is not None
    }

    def pull(value: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        weighted = objective.terminal_weight * value
        wanted = [*flats, *leaves.values()]
        found = gradients_by_backward([weighted], wanted, [None], plant.model)
        return plant.parallel.value(value), plant.parallel.means(found, wanted)

    try:
        with visible_statistics(plant.model, update=False):
            value, pulled = evaluation.terminal(terminal, flats, {**live, **leaves}, pull)
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise Unseen(
            "the terminal loss cannot be differentiated: its batches change in place what the "
            "model has read before, such as a buffer; write a new tensor there, or judge by one "
            "batch"
        ) from error
    for name, p in zip(leaves, pulled[len(flats) :], strict=True):
        if p is not None:
            costate.statistics[name] = p
    if costate.statistics:
        # From here on every statistic is carried, so that their updates compose.
        for name, leaf in leaves.items():
            costate.statistics.setdefault(name, torch.zeros_like(leaf))
    return value, costate, list(pulled[: len(flats)])


def _of_parts(
    plant: Plant,
    trajectory: Trajectory,
    objective: Objective,
    terminal: Terminal,
    at: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor | None]]:
    """(terminal loss, its weighted gradient per block), where parameters are shared out.

    FSDP gathers what lies in its own memory, so that the values are put there.
    """
    assert plant.ranks is not None
    blocks = trajectory.blocks
    modes = [(m, m.training) for m in plant.model.modules()]
    buffers = Buffers(plant.model).copies()
    with Scratch(plant, blocks) as scratch:
        try:
            scratch.place([block.flatten(at) for block in blocks], buffers)
            value = checked_loss(terminal(plant.model), "terminal")[0]
            (objective.terminal_weight * value).backward()
            plant.parallel.take_gradients()
            gradients: list[Tensor | None] = [*scratch.gradients()]
        finally:
            for p in plant.parameters:
                p.grad = None
            for module, training in modes:
                module.training = training
    return plant.parallel.value(value), gradients


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
        damping: Damping,
        cut: int,
    ) -> None:
        self.plant = plant
        self.differentiable = plant.differentiable
        self.trajectory = trajectory
        self.objective = objective
        self.evaluation = evaluation
        self.blocks: tuple[Block, ...] = trajectory.blocks
        self.steps = len(trajectory)
        self.controls = tuple(controls)
        self.mean_gradient = mean_gradient
        self.damping = damping
        self._at = [trajectory.schedule.at(trajectory.start + i) for i in range(self.steps)]
        self.weights = average_weights(objective.average, self.steps)
        self.cut_at = cut
        self.cut: Cut | None = None
        # On the device until the end: writing to the host would make it wait at every step.
        self.device = plant.parameters[0].device
        self.groups = len(plant.optimizer.param_groups)
        # One room for each: small tensors that stay, among large ones that go, would pin the heap.
        self.pulled = {
            name: torch.zeros(self.steps, self.groups, dtype=torch.float64, device=self.device)
            for name in controls
        }
        self.norms = torch.zeros(self.steps + 1, 2, dtype=torch.float64, device=self.device)
        # On a CPU numbers, which cost a tenth of small tensors.
        self.numbers = {
            n: room.numpy() for n, room in self.pulled.items() if self.device.type == "cpu"
        }
        self.end_norm = torch.zeros((), dtype=torch.float64)
        self.products = 0
        self.equivalents = 0.0
        # Whether a step computed again is the step that was rolled is looked at twice a window.
        self.compared = (self.steps - 1, 0)
        self.discrepancies = dict[int, float]()
        self.disagreements = dict[int, float]()
        self.pieces = 1
        self.ceiling: memory.Ceiling | None = None
        self.tight = False
        self.undivided: int | None = None

    def _adjoint(self) -> Adjoint:
        schedule = self.trajectory.schedule
        gradient = {}
        parallel = self.plant.parallel
        self.pulled = {n: parallel.sum_of_parts(room) for n, room in self.pulled.items()}
        norms = parallel.norm_of_parts(self.norms).cpu()
        for name, room in self.pulled.items():
            total = room.cpu()
            gradient[name] = total if schedule[name].dim() == 2 else total.sum(1)
        return Adjoint(
            gradient,
            torch.linalg.vector_norm(norms[:-1], dim=1),
            norms[:, 0],
            self.products,
            self.equivalents,
            self.discrepancies,
            self.disagreements,
            self.undivided,
            self.cut,
        )

    def _keep_cut(self, i: int, costate: Costate) -> None:
        """Keeps a copy of λ_i, where it was asked for."""
        if i == self.cut_at:
            own = Costate(
                [None if t is None else t.clone() for t in costate.parameters],
                [[None if t is None else t.clone() for t in h] for h in costate.optimizer],
                {n: t.clone() for n, t in costate.statistics.items()},
            )
            self.cut = Cut(i, own, self.weights[: i - 1], self.mean_gradient)

    # segment = 1 ---------------------------------------------------------------------------------

    def recursion(
        self,
        held: list[Costate],
        recorder: WindowRecorder,
        product: Product,
        twice: frozenset[int],
    ) -> Adjoint:
        """The costate recursion; held: the costate at the end, which each chunk replaces."""
        self.pieces = recorder.plan.pieces
        self.tight = recorder.plan.budget is not None
        # Where graphs go one after the other, trimming would hand back the next window's heap.
        if recorder.ceiling is not None and not recorder.plan.graphs:
            self.ceiling = recorder.ceiling
            self.ceiling.make_room()
        held.append(self._with_share(held.pop(), self.steps))
        self._note(self.steps, held[0])
        self._keep_cut(self.steps, held[0])
        self.end_norm = self._parameter_norm(held[0])
        for chunk in recorder.backwards():
            self._chunk(chunk, held, product, recorder.plan.states_every, twice)
            del chunk
        self.equivalents += recorder.recomputed
        return self._adjoint()

    def _chunk(
        self,
        chunk: Chunk,
        held: list[Costate],
        product: Product,
        apart: int,
        twice: frozenset[int],
    ) -> None:
        """apart: how many steps the kept states lie apart; 0 for one state."""
        model, costate = self.plant.model, held.pop()
        kernels = kernels_for(product, model)
        statistics = visible_statistics(model, update=bool(costate.statistics))
        scratched = Scratch(self.plant, self.blocks)
        with kernels, statistics, scratched as scratch, ExitStack() as stack:
            whole, alone = self._sources(chunk, product, apart, stack)
            for i in reversed(range(chunk.start, chunk.stop)):
                gradients = chunk.gradients[i - chunk.start]
                graph = chunk.graphs.pop(i, None)
                source = whole if graph is None or alone is None else alone
                before = source.take(i)
                costate, gradient_costates = self._pull_through_optimizer(
                    i, before, gradients, costate, scratch
                )
                theta = before.theta
                del before
                source.done(i)
                point = StepPoint(
                    theta,
                    self.trajectory.buffers[i],
                    self.trajectory.batches[i],
                    self.trajectory.rng[i],
                    gradients,
                    graph,
                    owned=chunk.owned and i not in twice,
                    loss=self.trajectory.losses[i],
                )
                del theta, graph  # the product needs the parameters at most
                costate = self._pull_through_gradient(
                    i, scratch, point, costate, gradient_costates, product, i in twice
                )
        held.append(costate)

    def _sources(
        self, chunk: Chunk, product: Product, apart: int, stack: ExitStack
    ) -> tuple[Source, Source | None]:
        """Of the states of every step; of those whose graph is kept, if these need less."""
        small = 0 if self.tight else SMALL_STATES
        alone: Source | None = None
        schedule = self.trajectory.schedule
        blind = not self._hooks() and self.plant.slots_alone(schedule, self.controls)
        if chunk.graphs and product == "exact" and blind:
            theta = partial(self._rebuilt_theta, chunk)
            if self._folds(chunk):
                start, gradients = chunk.start, chunk.gradients
                moved = partial(self._moved, chunk)
                folded = Folded(start, chunk.slots[start], gradients, moved, theta)
                alone = stack.enter_context(folded)
            else:
                rebuilt = Rebuilt(chunk.slots, self._slots_after(chunk), apart, small)
                alone = SlotsAlone(rebuilt, theta)
        whole = Whole(Rebuilt(chunk.states, self._state_after(chunk), apart, small))
        if chunk.owned:
            chunk.states.clear()
        return whole, alone

    def _pull_through_gradient(
        self,
        i: int,
        scratch: Scratch,
        point: StepPoint,
        costate: Costate,
        gradient_costates: Sequence[Tensor | None],
        product: Product,
        twice: bool,
    ) -> Costate:
        """λ of step i, from what came through Φ and the product with the Hessian."""
        if self.ceiling is not None:
            self.ceiling.check()
        kept = point.graph is not None and product == "exact"
        pull = partial(
            pull_back,
            product,
            self.evaluation,
            scratch,
            point,
            gradient_costates,
            costate.statistics,
            compare=i in self.compared,
            into=None if twice else costate.parameters,  # a vector of our own
        )
        try:
            pulled = pull(pieces=self.pieces)
        except NotAMean:
            self.pieces, self.undivided = 1, i
            pulled = pull()
        self.products += product != "none"
        self.equivalents += KEPT_COST if kept else PRODUCT_COST[product]
        if twice:
            other = pull(into=None, again=True)
            self.products += 1
            self.equivalents += PRODUCT_COST[product]
            pairs = [
                None if a is None or b is None else ((a + b) / 2, (a - b) / 2)
                for a, b in zip(pulled.parameters, other.parameters, strict=True)
            ]
            apart = Costate([pair and pair[1] for pair in pairs], [])
            carried = self._parameter_norm(costate).clamp_min(1e-300)
            self.disagreements[i] = float(self._parameter_norm(apart) / carried)
            pulled = replace(pulled, parameters=[pair and pair[0] for pair in pairs])
        if not kept:
            self.discrepancies[i] = pulled.discrepancy
        parameters = pulled.parameters
        if twice:
            parameters = [_sum(a, b) for a, b in zip(costate.parameters, parameters, strict=True)]
        costate = self._damped(Costate(parameters, costate.optimizer, pulled.statistics))
        if i:
            costate = self._with_share(costate, i)
        self._note(i, costate)
        self._keep_cut(i, costate)
        return costate

    def _note(self, i: int, costate: Costate) -> None:
        """Keeps the norms of λ_i; they are put together, and looked at, at the end."""
        for part, norms in enumerate(costate.norms()):
            if self.device.type == "cpu":
                self.norms[i, part] = math.hypot(*[float(norm) for norm in norms])
            else:
                self.norms[i, part] = _euclidean(norms)

    def _parameter_norm(self, costate: Costate) -> Tensor:
        return self.plant.parallel.norm_of_parts(costate.parameter_norm())

    def _damped(self, costate: Costate) -> Costate:
        discount, clip = self.damping.discount, self.damping.clip
        scale: Tensor | float = discount
        if clip is not None:
            limit = clip * self.end_norm.to(self.device)
            norm = self._parameter_norm(costate).to(self.device).clamp_min(1e-300)
            scale = discount * (limit / norm).clamp(max=1.0)
        elif discount == 1:
            return costate

        def scaled(t: Tensor | None) -> Tensor | None:
            if t is None:
                return None
            return t * (scale.to(t.device, t.dtype) if isinstance(scale, Tensor) else scale)

        return Costate(
            [scaled(t) for t in costate.parameters],
            [[scaled(t) for t in slots] for slots in costate.optimizer],
            {n: t for n, b in costate.statistics.items() if (t := scaled(b)) is not None},
        )

    # Through the optimizer's step ----------------------------------------------------------------

    def _pull_through_optimizer(
        self,
        i: int,
        before: Before,
        gradients: Sequence[Tensor | None],
        costate: Costate,
        scratch: Scratch,
    ) -> tuple[Costate, list[Tensor | None]]:
        """(λ_θ and λ_h of step i but for the loss's part, λ_g), and adds to dJ/du_i."""
        values = self._values(i)
        sigma = values.get("noise", 0.0)
        steered = "noise" in self.controls
        hooks = self._hooks()
        changed = steered or sigma != 0 or self._clips or bool(hooks)
        raw = transformed = list(gradients)
        if changed:
            with torch.enable_grad():
                noise = torch.tensor(sigma, dtype=torch.float64, requires_grad=True)
                raw = [None if g is None else g.detach().requires_grad_() for g in gradients]
                if hooks:  # they may read the parameter
                    scratch.place(before.theta(), self.trajectory.buffers[i])
                    if i in self.compared:
                        self._check_hooks(hooks, raw)
                transformed = self._transform(
                    i, self._through_hooks(hooks, raw), noise if steered else sigma
                )
        parameters: list[Tensor | None] = []
        optimizer: list[list[Tensor | None]] = []
        of_gradients: list[Tensor | None] = []
        for b, g in enumerate(transformed):
            of_theta, of_slots = costate.parameters[b], costate.optimizer[b]
            if g is None:
                parameters.append(of_theta)
                optimizer.append(of_slots)
                of_gradients.append(None)
                continue
            vjp = self._pull_block(i, b, before, g.detach(), of_theta, of_slots)
            parameters.append(vjp.parameters)
            optimizer.append(list(vjp.state))
            of_gradients.append(vjp.gradient)
        if changed:
            pairs = [
                (g, v)
                for g, v in zip(transformed, of_gradients, strict=True)
                if g is not None and v is not None and g.requires_grad
            ]
            leaves = [g for g in raw if g is not None]
            read = [self.plant.parameters[k] for k in hooks]
            of_gradients = [None for _ in raw]
            if pairs:
                pulled = torch.autograd.grad(
                    [g for g, _ in pairs],
                    [*leaves, noise, *read],
                    [v for _, v in pairs],
                    allow_unused=True,
                )
                found = list(pulled)
                of_gradients = [None if g is None else found.pop(0) for g in raw]
                of_noise = found.pop(0)
                parameters = self._with_read(parameters, dict(zip(hooks, found, strict=True)))
                if steered and of_noise is not None:
                    self.pulled["noise"][i, 0].add_(of_noise)
        return Costate(parameters, optimizer, costate.statistics), of_gradients

    def _hooks(self) -> dict[int, tuple[Hook, ...]]:
        hooks = self.trajectory.hooks
        return {} if hooks is None else hooks.of_tensors

    def _through_hooks(
        self, hooks: Mapping[int, Sequence[Hook]], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """What hooks of parameters make of their gradients, in vectors per block."""
        result: list[Tensor | None] = []
        for block, g in zip(self.blocks, gradients, strict=True):
            if g is None or not any(k in hooks for k in block.indices):
                result.append(g)
                continue
            views = zip(block.indices, block.views(g), strict=True)
            parts = [through(hooks[k], v.clone()) if k in hooks else v for k, v in views]
            result.append(torch.cat([part.reshape(-1) for part in parts]))
        return result

    def _check_hooks(
        self, hooks: Mapping[int, Sequence[Hook]], gradients: Sequence[Tensor | None]
    ) -> None:
        """Unseen where autograd does not see what a hook does, as in no_grad or on `.data`.

        Derivatives along g and along θ, by autograd and by central differences.
        """
        names = self.trajectory.hooks.names if self.trajectory.hooks is not None else ()
        for block, vector in zip(self.blocks, gradients, strict=True):
            views = [] if vector is None else block.views(vector.detach())
            for k, g in zip(block.indices, views, strict=bool(views)):
                if k in hooks and not _is_seen(hooks[k], g, self.plant.parameters[k]):
                    raise Unseen(
                        f"a hook of parameter {names[k]!r} changes its gradient where autograd "
                        "does not see it (torch.no_grad, .data, .detach()); write it in "
                        "differentiable operations, or do without hypergradients (rewrite=False)"
                    )

    def _with_read(
        self, parameters: Sequence[Tensor | None], found: Mapping[int, Tensor | None]
    ) -> list[Tensor | None]:
        """λ_θ with what came through hooks that read parameters."""
        result = list(parameters)
        for b, block in enumerate(self.blocks):
            own = [found.get(k) for k in block.indices]
            like = next((t for t in own if t is not None), None)
            if like is not None:
                pairs = zip(own, block.sizes, strict=True)
                parts = [like.new_zeros(n) if t is None else t.reshape(-1) for t, n in pairs]
                result[b] = _sum(result[b], torch.cat(parts))
        return result

    def _pull_block(
        self,
        i: int,
        b: int,
        before: Before,
        g: Tensor,
        of_theta: Tensor | None,
        of_slots: list[Tensor | None],
    ) -> Vjp:
        """λ_θ, λ_h and λ_ĝ of one block before Φ; of_slots: [] where nothing depends on them."""
        block = self.blocks[b]
        vjp = self.differentiable.vjp(
            self.plant.optimizer.param_groups[block.group],
            self._group_values(i, block.group),
            g,
            before.thetas[b],
            before.slots[b],
            of_theta,
            of_slots,
            [name for name in self.controls if name != "noise"],
            shapes=block.shapes,
            after=None if before.after is None else before.after[b],
        )
        for name, derivative in vjp.controls.items():
            self._add(i, name, block.group, derivative)
        return vjp

    def _add(self, i: int, name: str, group: int, pulled: Scalar) -> None:
        """Adds dJ/d(the group's value) to the derivative by the schedule's value."""
        value = self._values(i)[name]
        slope = self.plant.controls.group_slope(name, group, value)
        if self.device.type == "cpu":
            self.numbers[name][i, group] += slope * float(pulled)
        else:
            self.pulled[name][i, group].add_(slope * pulled)

    def _state_after(self, chunk: Chunk) -> Callable[[int, list[BlockState]], list[BlockState]]:
        """From the states of step i to those of step i + 1, by the gradients of the roll."""

        @torch.no_grad()
        def after(i: int, states: list[BlockState]) -> list[BlockState]:
            gradients = chunk.gradients[i - chunk.start]
            values = self._values(i)
            transformed = self._transform(i, gradients, values.get("noise", 0.0))
            result = []
            for block, state, g in zip(self.blocks, states, transformed, strict=True):
                own = self._group_values(i, block.group)
                result.append(state if g is None else self._step(block, state, g, own))
            return result

        return after

    def _slots_after(self, chunk: Chunk) -> Callable[[int, list[Any]], list[Any]]:
        """As `_state_after`, of the optimizer's state alone."""
        advance = self.differentiable.advance

        @torch.no_grad()
        def after(i: int, slots: list[Any]) -> list[Any]:
            gradients = chunk.gradients[i - chunk.start]
            transformed = self._transform(i, gradients, self._values(i).get("noise", 0.0))
            result = []
            for block, own, g in zip(self.blocks, slots, transformed, strict=True):
                group = self.plant.optimizer.param_groups[block.group]
                values = self._group_values(i, block.group)
                result.append(own if g is None else advance(group, values, g, None, own)[1])
            return result

        return after

    def _folds(self, chunk: Chunk) -> bool:
        """Whether the optimizer's states of a chunk can take the place of its gradients."""
        return (
            len(chunk.graphs) == chunk.stop - chunk.start
            and self.trajectory.diverged is None
            and self.plant.folds(self.trajectory.schedule, self.controls)
        )

    def _moved(self, chunk: Chunk, i: int) -> Iterator[tuple[int, Fold]]:
        """(index of a block that step i moved, how its state takes the gradient's place)."""
        gradients = chunk.gradients[i - chunk.start]
        for b, (block, g) in enumerate(zip(self.blocks, gradients, strict=True)):
            if g is not None:
                group = self.plant.optimizer.param_groups[block.group]
                fold = self.differentiable.fold(group, self._group_values(i, block.group))
                assert fold is not None
                yield b, fold

    def _rebuilt_theta(self, chunk: Chunk, i: int) -> list[Tensor]:
        """θ_i, for once: of a graph that was lost."""
        states = Rebuilt(chunk.states, self._state_after(chunk)).take(i)
        return [s.parameters for s in states]

    # segment > 1 ---------------------------------------------------------------------------------

    def segments(self, costate: Costate, segment: int) -> Adjoint:
        """Graphs of `segment` steps at a time."""
        if self.trajectory.hooks is not None and self.trajectory.hooks.acting:
            raise Unseen(
                f"hooks of parameter {self.trajectory.hooks.acting!r} change its gradient, which "
                f"needs segment 1, got {segment}; leave segment 'auto'"
            )
        costate = self._with_share(costate, self.steps)
        self._note(self.steps, costate)
        self._keep_cut(self.steps, costate)
        self.end_norm = costate.parameter_norm()
        for start in reversed(range(0, self.steps, segment)):
            costate = self._segment(start, min(start + segment, self.steps), costate)
            if start:
                costate = self._with_share(costate, start)
                self._note(start, costate)
                self._keep_cut(start, costate)
        return self._adjoint()

    def _segment(self, start: int, stop: int, costate: Costate) -> Costate:
        trajectory = self.trajectory
        outputs: list[Tensor] = []
        seeds: list[Tensor | None] = []
        intermediate: list[list[Tensor]] = []
        steered: list[dict[str, Tensor]] = []
        thetas: dict[int, set[int]] = {}
        kinds: dict[int, list[BlockState]] = {}
        with torch.enable_grad():
            leaves = states = [_leaf_state(s) for s in trajectory.states[start]]
            statistics = first_statistics = {
                n: live.detach().clone().requires_grad_()
                for n in costate.statistics
                if (live := trajectory.buffers[start][n]) is not None
            }
            for i in range(start, stop):
                rng = trajectory.rng[i]
                if rng is not None:
                    rng.restore()
                if i > start:
                    # θ_i was computed from h_i, so dJ/dh_i of the graph's own tensor would count
                    # the way through θ_i too; an alias is used by the steps that follow only.
                    states = [_alias(s) for s in states]
                    statistics = {n: b.view_as(b) for n, b in statistics.items()}
                    parts = [t for s in states for t in float_tensors(s)]
                    thetas[i] = {id(s.parameters) for s in states}
                    kinds[i] = states
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
                for index, g in zip(active, graded, strict=True):
                    gradients[index] = g
                if i in self.compared:
                    self.discrepancies[i] = relative_difference(gradients, trajectory.gradients[i])
                self.products += 1
                self.equivalents += PRODUCT_COST["exact"]
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
                [None] * len(leaves), [[None] * (len(float_tensors(s)) - 1) for s in leaves], {}
            )
        first = [t for s in leaves for t in float_tensors(s)]
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
            found = [pulled.pop(0) if t.requires_grad else None for t in step]
            ours = [id(t) in thetas[i] for t in step]
            of_theta = [p for own, p in zip(ours, found, strict=True) if own]
            rest = [p for own, p in zip(ours, found, strict=True) if not own]
            self._note(i, Costate(of_theta, [rest]))
            if i == self.cut_at:
                of_theta, of_slots = _unflatten(found, kinds[i])
                left = zip(first_statistics, found, strict=True)
                between = {n: p for n, p in left if p is not None}
                self._keep_cut(i, Costate(of_theta, of_slots, between))
        result = Costate(parameters, optimizer, carried)
        self._note(start, result)
        return result

    # Common to both ------------------------------------------------------------------------------

    def _values(self, i: int) -> dict[str, Any]:
        return self._at[i]

    def _group_values(self, i: int, group: int) -> dict[str, Any]:
        """Every control but noise of step i as the group has it."""
        return {
            name: self.plant.controls.group_value(name, group, value)
            for name, value in self._values(i).items()
            if name != "noise"
        }

    @property
    def _clips(self) -> bool:
        return self.plant.clip_norm is not None or self.plant.clip_value is not None

    def _control_leaves(self, i: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(every control of step i, the steered ones of them as leaves)."""
        values = self._values(i)
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
                self.pulled[name][i, : p.numel()].add_(p.to(self.device).reshape(-1))

    def _share(self, n: int) -> list[Tensor | None]:
        """The terminal gradient's share of the n-th iterate θ_n, 1 ≤ n ≤ K."""
        w = self.weights[n - 1]
        return [None if g is None or w == 0 else w * g for g in self.mean_gradient]

    def _with_share(self, costate: Costate, n: int) -> Costate:
        w = self.weights[n - 1]
        if w == 0:
            return costate
        parameters = [
            a if g is None else w * g if a is None else a.add_(g, alpha=w)
            for a, g in zip(costate.parameters, self.mean_gradient, strict=True)
        ]
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
            own = {
                name: self.plant.controls.group_value(name, block.group, value)
                for name, value in values.items()
                if name != "noise"
            }
            result.append(self._step(block, state, g, own))
        return result

    def _step(
        self, block: Block, state: BlockState, g: Tensor, values: Mapping[str, Any]
    ) -> BlockState:
        """Φ of one block, with controls that may be tensors of a graph."""
        group = self.plant.optimizer.param_groups[block.group]
        theta, slots = self.differentiable.advance(
            group, values, g, state.parameters, state.optimizer, block.shapes
        )
        assert theta is not None
        return BlockState(theta, slots)

    def _transform(
        self, i: int, gradients: Sequence[Tensor | None], sigma: Scalar
    ) -> list[Tensor | None]:
        """Clipping, by norm or by value, then ĝ = g + σ RMS(g) ξ per parameter tensor."""
        result = list(gradients)
        clip = self.plant.clip_value
        if clip is not None:
            result = [None if g is None else g.clamp(-clip, clip) for g in result]
        if self.plant.clip_norm is not None:
            present = [g for g in gradients if g is not None]
            norms = self.plant.parallel.norms(present)
            total = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
            scale = (self.plant.clip_norm / (total + 1e-6)).clamp(max=1.0)
            result = [None if g is None else g * scale.to(g.device, g.dtype) for g in result]
        if not isinstance(sigma, Tensor) and sigma == 0:
            return result
        noise = self.plant.parallel.noise(self.plant.seed, self.trajectory.start + i)
        parts: list[Tensor | None] = [None] * len(noise)
        for block, g in zip(self.blocks, result, strict=True):
            if g is not None:
                for v, p in zip(block.views(g), block.indices, strict=True):
                    parts[p] = v
        rms = self.plant.parallel.root_mean_squares(parts)
        for b, (block, g) in enumerate(zip(self.blocks, result, strict=True)):
            if g is not None:
                scale = torch.cat(
                    [rms[p].to(g.dtype) * noise[p].reshape(-1) for p in block.indices]
                )
                result[b] = g + _cast(sigma, g) * scale
        return result


def _is_seen(hooks: Sequence[Hook], g: Tensor, p: Tensor) -> bool:
    """Whether autograd's derivatives of what hooks make of g, along g and along p, are right."""
    leaf, data = g.clone().requires_grad_(), p.data

    def made(of_g: float, of_p: float) -> Tensor:
        with torch.no_grad():
            p.data = data * (1 + of_p)
            return through(hooks, g * (1 + of_g))

    try:
        along_g = (made(STRETCH, 0) - made(-STRETCH, 0)) / (2 * STRETCH)
        along_p = (made(0, STRETCH) - made(0, -STRETCH)) / (2 * STRETCH)
    finally:
        p.data = data
    found = through(hooks, leaf.clone())
    for seed, slope in ((g, along_g), (along_g, along_g), (along_p, along_p)):
        pulled: Sequence[Tensor | None] = (None, None)
        if found.requires_grad:
            pulled = torch.autograd.grad(
                found, (leaf, p), seed, allow_unused=True, retain_graph=True
            )
        of, point = (pulled[1], data) if slope is along_p else (pulled[0], g)
        expected = float((seed * slope).sum())
        by_autograd = 0.0 if of is None else float((of * point).sum())
        size = float(seed.norm() * max(seed.norm(), slope.norm()))
        if math.isfinite(size) and not abs(by_autograd - expected) <= SAME_SLOPE * size:
            return False
    return True


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


def _paired(
    states: Sequence[BlockState], costate: Costate
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(tensors of the end state that have both a graph and a costate, those costates)."""
    outputs: list[Tensor] = []
    seeds: list[Tensor | None] = []
    for state, of_parameters, of_optimizer in zip(
        states, costate.parameters, costate.optimizer, strict=True
    ):
        theta, *slots = float_tensors(state)
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
        optimizer.append([pulled.pop(0) for _ in float_tensors(leaf)[1:]])
    return parameters, optimizer


def _cast(value: Scalar, like: Tensor) -> Scalar:
    return value.to(like.device, like.dtype) if isinstance(value, Tensor) else value


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b

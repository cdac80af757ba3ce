"""The adjoint engine: the costate recursion, backwards over a rolled window.

λ_t = dJ/ds_t is carried backwards through s_{t+1} = F_t(s_t, u_t), without a graph through time:

1. the vjp of Φ, elementwise, of (λ_θ, λ_h) of t+1 at (θ_t, h_t, g_t, u_t): gives dJ/du_t, parts of
   λ_θ and λ_h, and λ_g (`optimizer_step`);
2. λ_θ += H_t λ_g, the only expensive term (`hvp`);
3. plus the stage cost's gradient and the average's share of the terminal gradient.

This is gradient checkpointing, a step at a time: the roll keeps some states and every gradient, the
states between are computed again by the optimizer's torchopt transformation. It then makes one
step's graph, is pulled through by autograd, and drops it; SGD's and Adam's bring their vjp, for
speed (`rhc.optimizers.base.ClosedTransformation`).

Rejected: graphs of several steps. torch.utils.checkpoint over segments with an inner
autograd.grad(create_graph=True) takes +3960 MB where this takes under 150 (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rhc.containers import to_device
from rhc.data_weights import per_row
from rhc.errors import InputError, Unseen
from rhc.hypergradient.evaluation import (
    Evaluation,
    double_backward,
    fast_gradients,
    fresh_leaves,
    gradients_by_backward,
    modes_kept,
    parts,
    visible_statistics,
)
from rhc.hypergradient.halfway import Halfway, Keeper
from rhc.hypergradient.hvp import (
    KEPT_COST,
    PRODUCT_COST,
    NotAMean,
    Product,
    StepPoint,
    per_block,
    step_vjp,
)
from rhc.hypergradient.optimizer_step import Costate, OptimizerSteps, euclidean
from rhc.hypergradient.record import Chunk, WindowRecorder
from rhc.hypergradient.states import SMALL_STATES, Folded, Rebuilt
from rhc.training import memory
from rhc.training.losses import checked_loss
from rhc.training.objective import Objective, average_weights
from rhc.training.trajectory import Block, BlockState

Terminal = Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class Damping:
    """Remedies for costates that grow; both bias the hypergradient towards the near future."""

    discount: float = 1.0  # γ in (0, 1], multiplies the costate at every step backwards
    clip: float | None = None  # largest |λ_θ|, as a multiple of that at the window's end

    def __post_init__(self) -> None:
        if not 0 < self.discount <= 1:
            raise InputError(f"discount must be in (0, 1], got {self.discount:g}")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"costate_clip must be > 0, got {self.clip:g}; use None for none")


@dataclass
class Adjoint:
    """dJ/du: control -> (K,) or (K, groups) float64, natural units."""

    gradient: dict[str, Tensor]
    costate_norms: Tensor  # (K,), |dJ/ds_t|
    parameter_norms: Tensor  # (K + 1,), |dJ/dθ_t|
    hessian_products: int
    equivalents: float  # cost in gradient evaluations
    discrepancies: dict[int, float]  # step -> |g − g_t| / |g_t| of the recomputed gradient
    disagreements: dict[int, float]  # step -> |H v − H v′| / 2|λ| of differences taken twice
    undivided: int | None = None  # first step whose batch could not be taken in parts
    cut: Cut | None = None
    rows: list[list[Tensor]] = field(default_factory=list)
    """Per step dJ/dw of the rows of each micro-batch, (B,) float64, where rows are weighed."""
    before: Boundary | None = None


@dataclass
class Boundary:
    """λ between two windows of a run. end: |λ_θ| at the run's end."""

    blocks: tuple[Block, ...]
    costate: Costate
    end: float

    @classmethod
    def of(
        cls,
        blocks: Sequence[Mapping[str, Any]],
        costate: Mapping[str, Any],
        end: float,
        device: torch.device,
    ) -> Boundary:
        """From the `vars` of its parts, as they are read from a file."""
        parts = {name: to_device(part, device) for name, part in costate.items()}
        return cls(tuple(Block(**block) for block in blocks), Costate(**parts), end)

    def over(self, blocks: tuple[Block, ...]) -> Costate:
        """λ by the blocks of the window before, which may be coarser; a copy."""
        costate = self.costate
        own = zip(costate.parameters, costate.optimizer, strict=True)
        parts = dict(zip(self.blocks, own, strict=True))
        inside = {i: block for block in self.blocks for i in block.indices}
        parameters, optimizer = list[Tensor | None](), list[list[Tensor | None]]()
        for block in blocks:
            members = list(dict.fromkeys(inside[i] for i in block.indices))
            if [i for member in members for i in member.indices] != list(block.indices):
                raise Unseen("parameters begin or end to be trained together inside the run")
            sizes = [sum(member.sizes) for member in members]
            parameters.append(_together([parts[m][0] for m in members], sizes))
            slots = zip(*(parts[m][1] for m in members), strict=False)
            optimizer.append([_together(slot, sizes) for slot in slots])
        statistics = {name: t.clone() for name, t in costate.statistics.items()}
        return Costate(parameters, optimizer, statistics)


def _together(parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """Parts of λ as one vector; those of a number that the parts share are summed."""
    like = next((t for t in parts if t is not None), None)
    if like is None:
        return None
    known = [like.new_zeros(n) if t is None else t for t, n in zip(parts, sizes, strict=True)]
    if all(t.shape == (n,) for t, n in zip(known, sizes, strict=True)):
        return torch.cat(known)
    return torch.stack([t for t in parts if t is not None]).sum(0)


@dataclass
class Cut:
    """The reverse pass just before step k: what the rest of the window is worth to first order."""

    k: int
    costate: Costate  # λ_k
    weights: Sequence[float]  # w_n of θ_n in θ̄, for n = 1 … k − 1
    terminal: Sequence[Tensor | None]  # the terminal loss's weighted gradient at θ̄, per block


def adjoint(
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
    later: Boundary | None = None,
    keeper: Keeper | None = None,
) -> tuple[Adjoint, Tensor | None]:
    """(dJ/du for every step and control, the terminal loss).

    recorder: of a roll whose end is the live state, which serves as scratch and is restored; the
    random state is not. average: θ̄ in the optimizer's parameter order; None for the last iterate.
    twice: steps whose difference is also taken backwards (central: at half the distance); the mean
    counts. cut: k of the `Cut` to return; 0 for none. later: what the steps after the window make
    of its end. keeper: keeps the pass, and has where an earlier one, of an equal roll, was
    interrupted.
    """
    evaluation = Evaluation(recorder.plant, recorder.trajectory.blocks, objective)
    recursion = _Recursion(recorder, evaluation, controls, product, damping, frozenset(twice), cut)
    value = recursion.begin(terminal, average, later)
    if keeper is not None:
        recursion.keep(keeper)
    return recursion.run(), value


def kernels_for(product: Product, model: nn.Module) -> AbstractContextManager[None]:
    """Difference products need no double backward, and keep most of the model's own kernels."""
    if product == "exact":
        return double_backward(model)
    return fast_gradients(model)


def _terminal_gradient(
    evaluation: Evaluation, terminal: Terminal, average: Sequence[Tensor] | None
) -> tuple[Tensor, list[Tensor | None], dict[str, Tensor]]:
    plant, blocks = evaluation.plant, evaluation.blocks
    at = [block.flatten(plant.parameters if average is None else average) for block in blocks]
    with (
        visible_statistics(plant.model, update=False),
        evaluation,
        modes_kept(plant.model),
    ):
        leaves = fresh_leaves(evaluation.kept, evaluation.statistics_names)
        evaluation.place(at, evaluation.kept, leaves)
        value = checked_loss(terminal(plant.model), "terminal")[0]
        weighted = evaluation.objective.terminal_weight * value
        wanted = [*evaluation.leaves, *leaves.values()]
        if plant.parallel.sharded:
            weighted.backward()
            plant.parallel.take_gradients()
            found: list[Tensor | None] = [p.grad for p in evaluation.leaves]
        else:
            found = plant.parallel.means(
                gradients_by_backward([weighted], wanted, [None], plant.model), wanted
            )
    count = len(evaluation.leaves)
    of_statistics = {
        name: g for name, g in zip(leaves, found[count:], strict=False) if g is not None
    }
    if of_statistics:
        # From here on every statistic is carried, so that their updates compose.
        of_statistics |= {
            n: torch.zeros_like(leaf) for n, leaf in leaves.items() if n not in of_statistics
        }
    return plant.parallel.value(value), per_block(blocks, found[:count]), of_statistics


class _Recursion:
    def __init__(
        self,
        recorder: WindowRecorder,
        evaluation: Evaluation,
        controls: Sequence[str],
        product: Product,
        damping: Damping,
        twice: frozenset[int],
        cut: int,
    ) -> None:
        self.recorder, self.trajectory = recorder, recorder.trajectory
        self.evaluation, self.plant = evaluation, evaluation.plant
        self.product, self.damping, self.twice = product, damping, twice
        self.length = len(self.trajectory)
        # Two recomputed steps per window are compared with the roll's.
        self.compared = (self.length - 1, 0)
        self.optimizer = OptimizerSteps(self.plant, self.trajectory, controls, self.compared)
        self.weights = average_weights(evaluation.objective.average, self.length)
        self.mean_gradient: list[Tensor | None] = []
        self.device = self.optimizer.device
        self.norms = torch.zeros(self.length + 1, 2, dtype=torch.float64, device=self.device)
        self.products, self.equivalents = 0, 0.0
        self.discrepancies = dict[int, float]()
        self.disagreements = dict[int, float]()
        self.cut_at = cut
        self.cut: Cut | None = None
        self.pieces = recorder.plan.pieces
        self.undivided: int | None = None
        self.rows: list[list[Tensor]] = [[] for _ in range(self.length)]
        self.ceiling: memory.Ceiling | None = None
        self.keeper: Keeper | None = None
        self.reached = self.length  # the steps from here on are done

    def keep(self, keeper: Keeper) -> None:
        """Goes on where the keeper says, and tells it of what comes."""
        self.keeper = keeper
        halfway = keeper.load(self.device)
        if halfway is not None:
            self.reached, self.costate, self.norms = halfway.k, halfway.costate, halfway.norms
            self.rows = [list(parts) for parts in halfway.rows]

    def begin(
        self,
        terminal: Terminal | None,
        average: Sequence[Tensor] | None,
        later: Boundary | None,
    ) -> Tensor | None:
        """Sets λ at the window's end, the live state; returns the terminal loss."""
        blocks, objective = self.trajectory.blocks, self.evaluation.objective
        value: Tensor | None = None
        self.mean_gradient = [None] * len(blocks)
        costate = Costate(self.mean_gradient, [[] for _ in blocks])
        if later is not None:
            assert terminal is None
            costate = later.over(blocks)
        if terminal is not None and objective.terminal_weight:
            try:
                value, self.mean_gradient, costate.statistics = _terminal_gradient(
                    self.evaluation, terminal, average
                )
            except RuntimeError as error:
                if "modified by an inplace operation" not in str(error):
                    raise
                raise Unseen(
                    "the terminal loss cannot be differentiated: its batches change in place what "
                    "the model has read before, such as a buffer; write a new tensor there, or "
                    "judge by one batch"
                ) from error
        # Where graphs are freed one after the other, trimming would return the next window's heap.
        if self.recorder.ceiling is not None and not self.recorder.plan.graphs:
            self.ceiling = self.recorder.ceiling
            self.ceiling.make_room()
        self.costate = self._with_share(costate, self.length)
        self._note(self.length)
        self.end_norm = self.costate.parameter_norm(self.plant)
        if later is not None:
            self.end_norm = torch.full_like(self.end_norm, later.end)
        return value

    def run(self) -> Adjoint:
        for chunk in self.recorder.backwards():
            self._chunk(chunk)
            del chunk
        schedule, parallel = self.trajectory.schedule, self.plant.parallel
        norms = parallel.norm_of_parts(self.norms).cpu()
        on_host = {n: parallel.sum_of_parts(g).cpu() for n, g in self.optimizer.gradient.items()}
        return Adjoint(
            {n: g if schedule[n].dim() == 2 else g.sum(1) for n, g in on_host.items()},
            torch.linalg.vector_norm(norms[:-1], dim=1),
            norms[:, 0],
            self.products,
            self.equivalents + self.recorder.recomputed,
            self.discrepancies,
            self.disagreements,
            self.undivided,
            self.cut,
            self.rows,
            Boundary(self.trajectory.blocks, self.costate, float(self.end_norm)),
        )

    def _chunk(self, chunk: Chunk) -> None:
        model = self.plant.model
        kernels = kernels_for(self.product, model)
        statistics = visible_statistics(model, update=bool(self.costate.statistics))
        with kernels, statistics, self.evaluation, ExitStack() as stack:
            whole, with_graph = self._sources(chunk, stack)
            for i in reversed(range(chunk.start, min(chunk.stop, self.reached))):
                gradients = chunk.gradients[i - chunk.start]
                shared = self.recorder.shared
                graph = chunk.graphs.get(i) if shared else chunk.graphs.pop(i, None)
                source = whole if graph is None else with_graph
                before = source.before(i)
                self.costate, gradient_costates = self.optimizer.vjp(
                    i, before, gradients, self.costate, self.evaluation
                )
                theta = before.theta
                del before
                point = StepPoint(
                    theta,
                    self.trajectory.buffers[i],
                    self.trajectory.batches[i],
                    self.trajectory.rng[i],
                    gradients,
                    gradient_costates,
                    self.costate.statistics,
                    graph,
                    retain=shared,
                    owned=chunk.owned and i not in self.twice,
                    loss=self.trajectory.losses[i],
                    by_weight=self.trajectory.by_weight[i],
                )
                del theta, graph  # the product needs the parameters at most
                self._through_gradient(i, point)

    def _sources(self, chunk: Chunk, stack: ExitStack) -> tuple[Rebuilt | Folded, Rebuilt | Folded]:
        """(States of every step, states of the steps whose graph is kept, which may need less)."""
        plan, steps = self.recorder.plan, self.optimizer
        small = 0 if plan.budget is not None else SMALL_STATES

        def advance(i: int, states: Sequence[BlockState]) -> list[BlockState]:
            return steps.advance(i, states, chunk.gradients[i - chunk.start])

        kept = {i: s for i, s in chunk.states.items() if all(b.parameters is not None for b in s)}
        whole = Rebuilt(kept, advance, plan.states_every, small)
        if not (chunk.graphs and self.product == "exact" and self.recorder.without_theta):
            if chunk.owned:
                chunk.states.clear()
            return whole, whole

        def theta(i: int) -> list[Tensor]:
            states = Rebuilt(kept, advance).take(i)
            return [s.parameters for s in states if s.parameters is not None]

        schedule = self.trajectory.schedule
        every = len(chunk.graphs) == chunk.stop - chunk.start
        diverged = self.trajectory.diverged is not None
        if every and not diverged and self.plant.folds(schedule, steps.controls):
            first = [s.optimizer for s in chunk.states[chunk.start]]
            folded = Folded(
                chunk.start,
                first,
                chunk.gradients,
                lambda i: steps.folds(i, chunk.gradients[i - chunk.start]),
                theta,
            )
            return whole, stack.enter_context(folded.folding())
        slots = {
            i: [BlockState(None, s.optimizer) for s in states] for i, states in chunk.states.items()
        }
        return whole, Rebuilt(slots, advance, plan.states_every, small, theta)

    def _through_gradient(self, i: int, point: StepPoint) -> None:
        """λ of step i, from the vjp of Φ and the Hessian's product."""
        if self.ceiling is not None:
            self.ceiling.check()
        costate, twice = self.costate, i in self.twice
        kept = point.graph is not None and self.product == "exact"
        vjp = partial(
            step_vjp,
            self.product,
            self.evaluation,
            point,
            compare=i in self.compared,
            into=None if twice else costate.parameters,  # a vector of our own
        )
        try:
            found = vjp(pieces=self.pieces)
        except NotAMean:
            self.pieces, self.undivided = 1, i
            found = vjp()
        self.products += self.product != "none"
        self.equivalents += KEPT_COST if kept else PRODUCT_COST[self.product]
        parameters, by_weight = found.parameters, found.by_weight
        if twice:
            other = vjp(into=None, again=True)
            self.products += 1
            self.equivalents += PRODUCT_COST[self.product]
            parameters = self._mean_of_two(i, parameters, other.parameters)
            by_weight = [(a + b) / 2 for a, b in zip(by_weight, other.by_weight, strict=True)]
        if by_weight:
            self.rows[i] = self._of_rows(i, by_weight)
            # A forward evaluation, where the product takes none.
            self.equivalents += 1 / 3 if self.product == "none" else 0.0
        if not kept:
            self.discrepancies[i] = found.discrepancy
        self.costate = Costate(parameters, costate.optimizer, found.statistics)
        del costate
        self._damp()
        if i:
            self.costate = self._with_share(self.costate, i)
        self._note(i)
        if self.keeper is not None and self.keeper.due():
            self.keeper.save(Halfway(i, self.costate, self.norms, self.rows))

    def _of_rows(self, i: int, by_weight: Sequence[Tensor]) -> list[Tensor]:
        """dJ/dw of step i's rows from dJ/dŵ, of which this rank has its share."""
        ranks = self.plant.ranks
        share = 1.0 if ranks is None else 1 / ranks.size
        step = parts(self.trajectory.batches[i])
        return per_row(step, [r * share for r in by_weight], self.plant.parallel.sums)

    def _mean_of_two(
        self, i: int, first: Sequence[Tensor | None], second: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """λ_θ with the mean of two products; records their distance."""
        pairs = [
            None if a is None or b is None else ((a + b) / 2, (a - b) / 2)
            for a, b in zip(first, second, strict=True)
        ]
        apart = Costate([pair and pair[1] for pair in pairs], []).parameter_norm(self.plant)
        carried = self.costate.parameter_norm(self.plant).clamp_min(1e-300)
        self.disagreements[i] = float(apart / carried)
        means = [pair and pair[0] for pair in pairs]
        return [
            b if a is None else a if b is None else a + b
            for a, b in zip(self.costate.parameters, means, strict=True)
        ]

    def _note(self, i: int) -> None:
        """Records the norms of λ_i, and the `Cut` at i if requested."""
        costate = self.costate
        for part, norms in enumerate(costate.norms()):
            if self.device.type == "cpu":
                self.norms[i, part] = math.hypot(*[float(norm) for norm in norms])
            else:
                self.norms[i, part] = euclidean(norms)
        if i and i == self.cut_at:
            own = Costate(
                [None if t is None else t.clone() for t in costate.parameters],
                [[None if t is None else t.clone() for t in h] for h in costate.optimizer],
                {n: t.clone() for n, t in costate.statistics.items()},
            )
            self.cut = Cut(i, own, self.weights[: i - 1], self.mean_gradient)

    def _damp(self) -> None:
        costate = self.costate
        scale: float | Tensor = self.damping.discount
        if self.damping.clip is not None:
            limit = self.damping.clip * self.end_norm.to(self.device)
            norm = costate.parameter_norm(self.plant).to(self.device).clamp_min(1e-300)
            scale = scale * (limit / norm).clamp(max=1.0)
        elif scale == 1:
            return

        def scaled(t: Tensor) -> Tensor:
            return t * (scale.to(t.device, t.dtype) if isinstance(scale, Tensor) else scale)

        self.costate = Costate(
            [None if t is None else scaled(t) for t in costate.parameters],
            [[None if t is None else scaled(t) for t in slots] for slots in costate.optimizer],
            {n: scaled(b) for n, b in costate.statistics.items()},
        )

    def _with_share(self, costate: Costate, n: int) -> Costate:
        """Adds in place the terminal gradient's share of θ_n, 1 ≤ n ≤ K."""
        w = self.weights[n - 1]
        if w == 0:
            return costate
        parameters = [
            a if g is None else w * g if a is None else a.add_(g, alpha=w)
            for a, g in zip(costate.parameters, self.mean_gradient, strict=True)
        ]
        return replace(costate, parameters=parameters)

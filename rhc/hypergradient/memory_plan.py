"""How a window is remembered within a memory budget, and what that costs.

A reverse pass needs, at every step and in reverse order, the state, the gradient, and the graph of
the gradient. From the dearest in memory to the dearest in time:

- the roll keeps the graph (`graphs` last steps): no gradient is evaluated again;
- the gradient is kept (`kept` last steps): states are rebuilt from it, elementwise; the graph is
  made again;
- state and gradient are spilled to disk (`spilled` first steps);
- or nothing but `snapshots` states is kept, and the steps are rolled again in chunks of `chunk`, in
  the order of `revolve`.

What one product takes is a floor under all of these. Where that is more than the budget, the
product takes the rows of a batch in parts (`pieces`), each with a graph of its own, if the loss is
a mean over rows: then H v is the mean of the parts' products.

`segment` = N asks for the graphs of the last N steps, whatever they take.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

from rhc.hypergradient.hvp import KEPT_COST, PRODUCT_COST, Product
from rhc.hypergradient.revolve import chunk_evaluations, recomputed_steps

FREE_GRAPHS = 16 * 2**20
"""Bytes of graphs that the roll keeps where no budget is given: small models are bound by Python's
overhead, not by memory. Parameters of no more than these count as a small model."""


FREE_STATES = 16 * 2**20
"""Bytes of states that are kept without a budget, to rebuild the others from, whatever they are."""

MOST_STATES = 256 * 2**20
"""And up to these as much as the gradients take: with few states each is rebuilt log3 K times."""

MOST_GRAPHS = 256 * 2**20
"""Bytes of graphs that a small model keeps, if all of its graphs are no more, nor more than its
gradients, which are kept anyway."""


@dataclass(frozen=True)
class Sizes:
    """Bytes. parameters: θ that is trained. state: a whole snapshot. graph: of one step's gradient,
    with its own copy of what it reads of θ. product: the most that one Hessian product takes beyond
    plain training. slots: of the part of a state that a step whose graph is kept needs; 0 where
    that is all of it. folded: whether these may lie where the gradients lay. pieces: (n, product)
    of a product that takes a batch in n parts; None where that was not measured. plain: of one
    gradient while it is evaluated. kernels: that a library of matrix products would keep.
    """

    parameters: int
    state: int
    graph: int
    product: int
    slots: int = 0
    folded: bool = False
    pieces: tuple[tuple[int, int], ...] | None = ()
    plain: int = 0
    kernels: int = 0

    def __post_init__(self) -> None:
        if self.pieces is not None:  # lists, where they come from JSON
            object.__setattr__(self, "pieces", tuple((n, size) for n, size in self.pieces))

    @property
    def costates(self) -> int:
        """λ of the parameters, of the optimizer's state, and of the gradient."""
        return self.state + self.parameters


@dataclass(frozen=True)
class Plan:
    """What a window of `steps` keeps.

    graphs: of how many last steps the graph is kept. states_every: how far the kept states lie
    apart; 0 for one state. kept: of how many last steps the gradient is in memory. spilled: how
    many first steps are on disk. snapshots, chunk: what steps are rolled again from, and how many
    at a time; recomputed: how many are. twice: at how many steps a difference is taken twice.
    pieces: in how many parts a product takes the rows of its batch. onednn: whether matrices may be
    multiplied by a library that keeps kernels of its own. budget, predicted_bytes: beyond plain
    training.
    """

    steps: int
    product: Product
    segment: int = 1
    graphs: int = 0
    states_every: int = 0
    kept: int = 0
    spilled: int = 0
    snapshots: int = 0
    chunk: int = 0
    recomputed: int = 0
    twice: int = 0
    pieces: int = 1
    onednn: bool = True
    budget: int | None = None
    predicted_bytes: int | None = None

    @property
    def gradient_equivalents(self) -> float:
        """Predicted cost of the reverse pass, in gradient evaluations, without a terminal loss."""
        products = (self.steps + self.twice) * PRODUCT_COST[self.product]
        if self.product == "exact":
            products -= (PRODUCT_COST["exact"] - KEPT_COST) * self.graphs
        return float(products + self.recomputed)

    @property
    def fits(self) -> bool:
        """Whether the prediction is within the budget."""
        return (
            self.budget is None
            or self.predicted_bytes is None
            or self.predicted_bytes <= self.budget
        )

    def lines(self) -> list[str]:
        """The plan in words, for people."""
        per_step = 1 + self.gradient_equivalents / self.steps
        lines = [
            f"window of {self.steps} steps, segment {self.segment}, product {self.product}",
            f"roll and look back: {per_step:.2f} gradient evaluations per step",
        ]
        if self.twice:
            lines.append(f"differences held against others at {self.twice} of the steps")
        if self.graphs:
            lines.append(f"graphs kept by the roll: the last {self.graphs} steps")
        if self.kept:
            lines.append(f"gradients in memory: {self.kept} steps; states rebuilt from them")
        if self.spilled:
            lines.append(f"states and gradients on disk: {self.spilled} steps")
        if self.pieces > 1:
            lines.append(f"products take the rows of a batch in {self.pieces} parts")
        if self.chunk:
            lines.append(
                f"rolled again: {self.recomputed} steps in chunks of {self.chunk}, from "
                f"{self.snapshots} snapshots (Revolve)"
            )
        if self.predicted_bytes is not None:
            budget = "" if self.budget is None else f" of a budget of {_bytes(self.budget)}"
            lines.append(f"memory beyond plain training: {_bytes(self.predicted_bytes)}{budget}")
        if not self.fits:
            lines.append("the budget is too small for one Hessian product; this is the least")
        return lines


def make_plan(
    steps: int,
    product: Product,
    sizes: Sizes,
    budget: int | None,
    *,
    spill: bool,
    graph_bytes: int | None = None,
) -> Plan:
    """The plan that evaluates the fewest gradients within `budget` bytes.

    graph_bytes: of kept graphs, at most, where the budget would have room for more.

    Without a budget gradients are kept for all steps, and graphs as far as FREE_GRAPHS goes.
    """
    planned = partial(_planned, steps, product, sizes, spill=spill, graph_bytes=graph_bytes)
    if budget is None:
        return planned(None)
    if sizes.kernels:  # these stay with the process, and are the budget's, if it has room for them
        fast = planned(max(0, budget - sizes.kernels))
        assert fast.predicted_bytes is not None
        if fast.fits and fast.pieces == 1:
            predicted = fast.predicted_bytes + sizes.kernels
            return replace(fast, budget=budget, predicted_bytes=predicted)
    return replace(planned(budget), onednn=False)


def with_graphs(steps: int, graphs: int) -> Plan:
    """The plan that keeps the graphs of the last steps, so many, and every gradient."""
    every = math.isqrt(max(0, steps - 1)) + 1
    return Plan(steps, "exact", graphs, graphs=graphs, states_every=every, kept=steps)


def _planned(
    steps: int,
    product: Product,
    sizes: Sizes,
    budget: int | None,
    *,
    spill: bool,
    graph_bytes: int | None,
) -> Plan:
    """As `make_plan`, of sizes.kernels nothing."""
    exact = product == "exact"
    if budget is None:
        graphs = min(steps, FREE_GRAPHS // max(1, sizes.graph))
        small = sizes.graph <= sizes.parameters <= FREE_GRAPHS
        if small and steps * sizes.graph <= MOST_GRAPHS:
            graphs = steps
        return _kept(steps, product, sizes, None, graphs if exact else 0)
    whole = _kept(steps, product, sizes, budget, 0)
    if whole.fits:
        if not exact:
            return whole
        most = math.inf if graph_bytes is None else graph_bytes
        if steps * sizes.graph <= most:  # where every graph is kept, less of a state may do
            every = _kept(steps, product, sizes, budget, steps)
            if every.fits:
                return every
        # States that need not be rebuilt save less than one graph or two, but no more than they
        # cost.
        lean = _kept(steps, product, sizes, budget, 0, lean=True)
        assert lean.predicted_bytes is not None and whole.predicted_bytes is not None
        if whole.predicted_bytes - lean.predicted_bytes <= 2 * sizes.graph:
            lean = whole
        assert lean.predicted_bytes is not None
        left = min(budget - lean.predicted_bytes, most)
        return _kept(steps, product, sizes, budget, min(steps, int(left // max(1, sizes.graph))))
    plans = [_within(steps, product, sizes, budget, spill=spill)]
    for pieces, size in sizes.pieces or ():
        lighter = replace(sizes, product=min(size, sizes.product))
        plan = _within(steps, product, lighter, budget, spill=spill)
        plans.append(replace(plan, pieces=pieces))
    return min(plans, key=_rank)


PIECES_COST = {2: 0.2, 4: 0.5, 8: 1.2}
"""Parts of a batch's rows that are tried -> gradient evaluations that an exact product in so many
takes more, whose matrix products are smaller: on the GPT of benchmarks/models.py, 16 rows."""

SPILLED_COST = 0.2
"""Of a step's state on disk."""


def keeps_whole(steps: int, product: Product, sizes: Sizes, budget: int) -> bool:
    """Whether there is room for all gradients, and for products of whole batches."""
    return _kept(steps, product, sizes, budget, 0).fits


def _within(steps: int, product: Product, sizes: Sizes, budget: int, *, spill: bool) -> Plan:
    """A plan for a budget that has no room for graphs."""
    plan = _kept(steps, product, sizes, budget, 0)
    if plan.fits:
        return plan
    if spill:
        return _spilled(steps, product, sizes, budget)
    return _recomputed(steps, product, sizes, budget)


def _rebuilt(steps: int, state: int) -> int:
    """Bytes that `steps` states of `state` bytes need to be rebuilt: log3 of them, two of work.

    One step has its state already, two need one made.
    """
    if steps <= 2:
        return max(steps, 1) * state
    return (math.ceil(math.log(steps, 3)) + 2) * state


def _kept(
    steps: int,
    product: Product,
    sizes: Sizes,
    budget: int | None,
    graphs: int,
    *,
    lean: bool = False,
) -> Plan:
    """lean: with the fewest states."""
    # States of √K steps, so that every other is rebuilt once.
    apart = math.isqrt(max(0, steps - 1)) + 1
    one = sizes.slots if sizes.slots and graphs == steps else sizes.state
    states = 2 * apart * one
    # One state is what the window began with, which the caller keeps to go back to.
    fixed = steps * sizes.parameters + sizes.state + sizes.costates + sizes.product
    # A product without a graph does not fit in where the kept ones were: the heap has holes.
    fixed += graphs * sizes.graph
    most = max(FREE_STATES, min(MOST_STATES, steps * sizes.parameters))
    if graphs == steps and sizes.folded:
        apart, states = 0, one
    elif lean or (states > most if budget is None else fixed + states > budget):
        apart, states = 0, _rebuilt(steps, one)
    return Plan(
        steps,
        product,
        graphs=graphs,
        states_every=apart,
        kept=steps,
        budget=budget,
        predicted_bytes=fixed + states,
    )


def _spilled(steps: int, product: Product, sizes: Sizes, budget: int) -> Plan:
    # While a step is written or read there is its state, and its gradient.
    reading = sizes.state + sizes.parameters
    fixed = sizes.product + reading + sizes.state + sizes.costates
    kept = max(0, min(steps, (budget - fixed - _rebuilt(steps, sizes.state)) // sizes.parameters))
    rebuilt = _rebuilt(kept, sizes.state) if kept else 0
    return Plan(
        steps,
        product,
        kept=kept,
        spilled=steps - kept,
        budget=budget,
        predicted_bytes=fixed + kept * sizes.parameters + rebuilt,
    )


def _recomputed(steps: int, product: Product, sizes: Sizes, budget: int) -> Plan:
    # The beginning and the end of the window are kept as well, to go back to.
    fixed = sizes.product + sizes.costates + 2 * sizes.state
    plans = []
    for chunk in _candidates(steps):
        chunks = math.ceil(steps / chunk)
        one = chunk * sizes.parameters + _rebuilt(chunk, sizes.state)
        snapshots = max(1, min(chunks, (budget - fixed - one) // max(1, sizes.state)))
        plans.append(
            Plan(
                steps,
                product,
                kept=min(chunk, steps),
                snapshots=snapshots,
                chunk=chunk,
                recomputed=chunk_evaluations(chunks, snapshots - 1) * chunk - steps,
                budget=budget,
                predicted_bytes=fixed + one + snapshots * sizes.state,
            )
        )
    # The first chunk may be shorter, which the formula does not know.
    likely = sorted(plans, key=_rank)[: 256 if steps <= 1024 else 16]
    exactly = (replace(p, recomputed=recomputed_steps(steps, p.chunk, p.snapshots)) for p in likely)
    return min(exactly, key=_rank)


def _candidates(steps: int) -> list[int]:
    """Lengths of a chunk to look at: all up to 64, then such as give another number of chunks."""
    few = {math.ceil(steps / chunks) for chunks in range(1, 65)}
    return sorted(few | set(range(1, min(steps, 64) + 1)))


def _rank(plan: Plan) -> tuple[bool, float, float]:
    """Plans that fit by their cost; where none does, the smallest."""
    assert plan.predicted_bytes is not None
    cost = plan.recomputed + plan.spilled * SPILLED_COST
    cost += plan.steps * PIECES_COST.get(plan.pieces, 0.0)
    if plan.fits:
        return False, cost, plan.predicted_bytes
    return True, plan.predicted_bytes, cost


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"

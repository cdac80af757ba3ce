"""How a window is stored within a memory budget, and what that costs.

From the most memory to the most time, a roll keeps: graphs of the last steps; gradients, from which
states are rebuilt elementwise; state and gradient on disk; or `snapshots` states, from which chunks
of steps are rolled again in the order of `revolve`. One product is a floor under all of these;
above the budget it takes a batch's rows in parts (`pieces`), if the loss is a mean over rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

from rhc.hypergradient.hvp import KEPT_COST, PRODUCT_COST, Product
from rhc.hypergradient.revolve import chunk_evaluations, recomputed_steps

FREE_GRAPHS = 16 * 2**20
"""Bytes of graphs that the roll keeps without a budget, and of parameters of a small model, which
is bound by Python's overhead."""


FREE_STATES = 16 * 2**20
"""Bytes of states that are kept without a budget, to rebuild the others from."""

MOST_STATES = 256 * 2**20
"""Up to these, as much as the gradients take: with few states each is rebuilt log3 K times."""

MOST_GRAPHS = 256 * 2**20
"""Bytes of graphs that a small model keeps, if they are all of its graphs and no more than its
gradients, which are kept anyway."""


@dataclass(frozen=True)
class Sizes:
    """Memory in bytes."""

    parameters: int  # trained θ
    state: int  # a whole snapshot
    graph: int  # of one gradient, with its copy of θ
    product: int  # peak of one hvp beyond plain training
    slots: int = 0  # state needed with a kept graph; 0: all
    folded: bool = False  # whether slots may take the gradients' memory
    pieces: tuple[tuple[int, int], ...] | None = ()  # (n, product in n parts); None: unmeasured
    plain: int = 0  # of one gradient evaluation
    kernels: int = 0  # that oneDNN would keep

    def __post_init__(self) -> None:
        if self.pieces is not None:  # lists, where they come from JSON
            object.__setattr__(self, "pieces", tuple((n, size) for n, size in self.pieces))

    @property
    def costates(self) -> int:
        """λ of the parameters, of the optimizer's state, and of the gradient."""
        return self.state + self.parameters


@dataclass(frozen=True)
class Plan:
    """What a window of `steps` keeps."""

    steps: int
    product: Product
    segment: int = 1
    graphs: int = 0  # last steps whose graph is kept
    states_every: int = 0  # distance of the kept states; 0 for one state
    kept: int = 0  # last steps whose gradient is in memory
    spilled: int = 0  # first steps on disk
    snapshots: int = 0  # to roll again from
    chunk: int = 0  # steps rolled again at a time
    recomputed: int = 0  # steps rolled again
    twice: int = 0  # steps whose difference is taken twice
    pieces: int = 1  # parts of a batch's rows in a product
    onednn: bool = True  # whether oneDNN may keep kernels
    budget: int | None = None  # bytes beyond plain training
    predicted_bytes: int | None = None  # beyond plain training

    @property
    def gradient_equivalents(self) -> float:
        """Predicted cost of the reverse pass, in gradient evaluations, without a terminal loss."""
        products = (self.steps + self.twice) * PRODUCT_COST[self.product]
        if self.product == "exact":
            products -= (PRODUCT_COST["exact"] - KEPT_COST) * self.graphs
        return float(products + self.recomputed)

    @property
    def fits(self) -> bool:
        return (
            self.budget is None
            or self.predicted_bytes is None
            or self.predicted_bytes <= self.budget
        )

    def lines(self) -> list[str]:
        """The plan in words."""
        per_step = 1 + self.gradient_equivalents / self.steps
        lines = [
            f"window of {self.steps} steps, segment {self.segment}, product {self.product}",
            f"roll and reverse pass: {per_step:.2f} gradient evaluations per step",
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
    """The plan that evaluates the fewest gradients within `budget` bytes, with at most
    `graph_bytes` of kept graphs. Without a budget it keeps all gradients, and graphs up to
    FREE_GRAPHS bytes."""
    planned = partial(_planned, steps, product, sizes, spill=spill, graph_bytes=graph_bytes)
    if budget is None:
        return planned(None)
    if sizes.kernels:  # kernels stay with the process; the budget pays if it has room for them
        fast = planned(max(0, budget - sizes.kernels))
        assert fast.predicted_bytes is not None
        if fast.fits and fast.pieces == 1:
            predicted = fast.predicted_bytes + sizes.kernels
            return replace(fast, budget=budget, predicted_bytes=predicted)
    return replace(planned(budget), onednn=False)


def with_graphs(steps: int, graphs: int) -> Plan:
    """The plan that keeps the last `graphs` graphs, and every gradient."""
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
    """As `make_plan`, but for sizes.kernels."""
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
        # Kept states save less than one graph or two, but no more than they cost.
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
"""Parts of a batch's rows -> additional gradient evaluations of an exact product, because of
smaller matrix products: measured on the GPT of benchmarks/models.py, 16 rows."""

SPILLED_COST = 0.2
"""Of a step's state on disk."""


def keeps_whole(steps: int, product: Product, sizes: Sizes, budget: int) -> bool:
    """Whether there is room for all gradients, and for products of whole batches."""
    return _kept(steps, product, sizes, budget, 0).fits


def _within(steps: int, product: Product, sizes: Sizes, budget: int, *, spill: bool) -> Plan:
    plan = _kept(steps, product, sizes, budget, 0)
    if plan.fits:
        return plan
    if spill:
        return _spilled(steps, product, sizes, budget)
    return _recomputed(steps, product, sizes, budget)


def _rebuilt(steps: int, state: int) -> int:
    """Bytes to rebuild `steps` states of `state` bytes: log3 of them, two of work. One step has its
    state already, two need one made."""
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
    # The caller keeps the window's first state anyway.
    fixed = steps * sizes.parameters + sizes.state + sizes.costates + sizes.product
    # A product without a graph does not fit where the kept graphs were: the heap has holes.
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
    # A step's state and gradient exist while it is written or read.
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
    # The window's first and last states are kept as well.
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
    # The first chunk may be shorter, which the formula ignores.
    likely = sorted(plans, key=_rank)[: 256 if steps <= 1024 else 16]
    exactly = (replace(p, recomputed=recomputed_steps(steps, p.chunk, p.snapshots)) for p in likely)
    return min(exactly, key=_rank)


def _candidates(steps: int) -> list[int]:
    """Chunk lengths to try: all up to 64, then those that change the number of chunks."""
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

"""What a window keeps: sizes are measured once, and plans made of them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from rhc.errors import InputError
from rhc.hypergradient.hvp import Product
from rhc.hypergradient.kernels import matrices
from rhc.hypergradient.memory_plan import Plan, Sizes, keeps_whole, make_plan, with_graphs
from rhc.hypergradient.sizes import forget_pieces, measure_pieces, measure_sizes
from rhc.training import memory
from rhc.training.objective import Objective
from rhc.training.plant import Plant

HEAP = 0.9
"""Share of a budget that is planned with on a CPU: the C heap resides in a tenth more than is
allocated, in holes between tensors."""

FRESH_GRAPHS = 2**30
"""Upper bound on bytes of kept graphs, whatever the budget, on a CPU whose heap is not held. Fresh
pages take more time than graphs save: a GPT with K = 50 took 3.9 plain steps a step with 16 graphs
of 80 MB, 5.0 with 22, 5.4 with all 50; 3.3 from the second window on, where pages are held."""


class Planner:
    """Plans windows of a plant. sizes: product -> what was measured. segment, memory_budget: as in
    `rhc.hypergradient`. spill: whether states may go to disk."""

    def __init__(
        self,
        plant: Plant,
        objective: Objective,
        controls: Sequence[str],
        segment: int | Literal["auto"],
        memory_budget: int | None,
        spill: bool,
    ) -> None:
        if memory_budget is not None and not memory_budget > 0:
            raise InputError(f"memory_budget must be > 0 bytes, got {memory_budget}")
        if memory_budget is not None and segment not in ("auto", 1):
            raise InputError(
                f"memory_budget decides what is kept, got segment {segment} beside it; leave "
                "segment 'auto'"
            )
        self.plant, self.objective, self.controls = plant, objective, controls
        self.segment, self.memory_budget, self.spill = segment, memory_budget, spill
        self.sizes: dict[str, Sizes] = {}

    def plan(self, steps: int, product: Product, batch: Any, scheduled: Container[str]) -> Plan:
        """What a window of `steps` will keep; measures one step the first time, and undoes it.
        scheduled: the controls that are set at every step."""
        if self.segment not in ("auto", 1) and product == "exact":
            self.measured(batch, product)  # outside the roll: it evaluates the loss
            return with_graphs(steps, min(int(self.segment), steps))
        budget = self.memory_budget
        on_cpu = self.plant.parameters[0].device.type == "cpu"
        with matrices.torchs_own(budget is not None):
            sizes = self.measured(batch, product)
            allocated = budget
            if budget is not None and on_cpu:
                allocated = max(0, int(HEAP * (budget + sizes.plain)) - sizes.plain)
            if sizes.pieces is None and not (
                allocated is None or keeps_whole(steps, product, sizes, allocated)
            ):
                sizes = self._measured_in_pieces(batch, product)
        if not self.plant.slots_alone(scheduled, self.controls):
            sizes = replace(sizes, slots=0)
        if self.plant.hooks.of_tensors:  # every step keeps its state beside its gradient
            sizes = replace(sizes, parameters=sizes.parameters + sizes.state)
        sizes = replace(sizes, folded=self.plant.folds(scheduled, self.controls))
        most = FRESH_GRAPHS if on_cpu and not memory.can_hold() else None
        plan = make_plan(steps, product, sizes, allocated, spill=self.spill, graph_bytes=most)
        if on_cpu:
            assert plan.predicted_bytes is not None
            resident = int((plan.predicted_bytes + sizes.plain) / HEAP) - sizes.plain
            plan = replace(plan, budget=budget, predicted_bytes=resident)
        return plan

    def ceiling(self, plan: Plan) -> memory.Ceiling | None:
        """The ceiling of a CPU's heap under a budget, which the window's first state is part of."""
        if plan.budget is None or self.plant.parameters[0].device.type != "cpu":
            return None
        sizes = self.sizes[plan.product]
        whole = sizes.plain + plan.budget - sizes.state
        if plan.graphs:
            # The next graph must fit in, with holes that it cannot use, and a product; in all at
            # most a tenth above the budget. Trimming earlier costs more than it saves.
            reserve = 2 * sizes.graph - 2 * plan.budget // 25
            above = max(whole // 2, whole - reserve)
            return memory.Ceiling(above, work=sizes.graph, spare=plan.budget // 4)
        work = sizes.plain + dict(sizes.pieces or ()).get(plan.pieces, sizes.product)
        return memory.Ceiling(whole - int((1 - HEAP) * plan.budget), work=work)

    def divide_no_more(self, product: Product, batch: Any) -> None:
        """The loss is not a mean over rows: products take whole batches from now on."""
        self.sizes[product] = replace(self.sizes[product], pieces=())
        forget_pieces(self.plant, batch, self.objective)

    def measured(self, batch: Any, product: Product) -> Sizes:
        if product not in self.sizes:
            full = self.memory_budget is not None or self.segment not in ("auto", 1)
            sizes = measure_sizes(self.plant, batch, self.objective, product, full=full)
            if self.plant.ranks is not None:  # one plan for all
                sizes = Sizes(**self.plant.ranks.share(asdict(sizes)))
            self.sizes[product] = sizes
        return self.sizes[product]

    def _measured_in_pieces(self, batch: Any, product: Product) -> Sizes:
        """Also measures a product that takes the batch in parts, needed where a budget is tight."""
        pieces: tuple[tuple[int, int], ...] = ()
        if product == "exact":
            pieces = measure_pieces(self.plant, batch, self.objective)
        self.sizes[product] = replace(self.sizes[product], pieces=pieces)
        return self.sizes[product]

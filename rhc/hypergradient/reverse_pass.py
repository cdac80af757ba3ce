"""Rolls windows and differentiates them: chooses the product, plans, verifies and judges."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from rhc.data_weights import DATA_WEIGHTS, FEW, per_cell
from rhc.errors import InputError
from rhc.hypergradient.adjoint import Adjoint, Boundary, Damping, Terminal, adjoint
from rhc.hypergradient.evaluation import (
    Evaluation,
    functions_of,
    has_statistics,
    is_recurrent,
    parts,
)
from rhc.hypergradient.halfway import Keeper
from rhc.hypergradient.hvp import (
    Product,
)
from rhc.hypergradient.kernels import Sweep, matrices
from rhc.hypergradient.memory_plan import (
    Plan,
    Sizes,
)
from rhc.hypergradient.outcome import Outcome, outcome_of
from rhc.hypergradient.planning import Planner
from rhc.hypergradient.product_check import try_product
from rhc.hypergradient.record import WindowRecorder
from rhc.hypergradient.sizes import (
    known_of,
    signature,
)
from rhc.hypergradient.support import missing, unsupported
from rhc.hypergradient.verification import (
    Disagreements,
    hooks,
    is_double,
    steps_to_cut,
    verify,
)
from rhc.rng import RandomState
from rhc.schedule import Schedule
from rhc.training.module_state import Buffers, Captured
from rhc.training.objective import Average, Objective
from rhc.training.plant import Plant
from rhc.training.trajectory import StepRecord, Trajectory

SAMPLED = 12
"""Steps at which requested difference products are compared with others, once."""


@dataclass(frozen=True)
class Hypergradient:
    """J and its derivatives.

    Attributes:
        value: J.
        grad: control -> (K,) float64, dJ/du_t in natural units; (K, groups) with a value per group.
        costate_norms: (K,) float64, |dJ/ds_t|.
        result: whether it can be trusted.
        terminal: the terminal loss, NaN without one.
        losses: (K,) as rolled.
        engine: "adjoint" or "higher".
        product: how the Hessian was applied.
        segment: length that was used.
        hessian_products: number of them.
        gradient_equivalents: cost of the reverse pass, in gradient evaluations.
        why: why this product was taken, and what it leaves out.
        plan: what the roll kept.
        check: control -> relative disagreement with rolls of the plain loop; {} if not verified.
        rows: where data are weighed, per step dJ/dw of every row of its batch, (B,) float64;
            `grad["data_weights"]` has their sums by cell, (n,).
        cells_by_step: (K, n) the same sums step by step, where cells are few; else None.
    """

    value: float
    grad: dict[str, Tensor]
    costate_norms: Tensor
    result: Outcome
    terminal: float
    losses: Tensor
    engine: str
    product: str
    segment: int
    hessian_products: int
    gradient_equivalents: float
    why: str = ""
    plan: Plan | None = None
    check: dict[str, float] = field(default_factory=dict)
    rows: list[Tensor] = field(default_factory=list)
    cells_by_step: Tensor | None = None


class ReversePass:
    """Rolls windows of a plant and differentiates them. verified: whether the first hypergradient
    is compared with rolls of the plain loop. notice: receives decisions in words. Others as in
    `rhc.hypergradient`."""

    def __init__(
        self,
        plant: Plant,
        objective: Objective,
        controls: Sequence[str],
        *,
        segment: int | Literal["auto"] = "auto",
        product: Product | Literal["auto"] = "auto",
        memory_budget: int | None = None,
        spill: bool | str | Path = True,
        damping: Damping | None = None,
        verified: bool = False,
        notice: Callable[[str], None] = lambda message: None,
    ) -> None:
        if plant.parallel.sharded and objective.reward_weight:
            raise InputError(
                "rewards are not there for parameters that are shared out (fully_shard); judge "
                "windows by losses"
            )
        if plant.parallel.sharded and has_statistics(plant.model):
            raise InputError(
                "running statistics of BatchNorm are not followed where parameters are shared out "
                "(fully_shard); normalise otherwise, or leave fully_shard out"
            )
        self.plant, self.objective, self.controls = plant, objective, tuple(controls)
        self.planner = Planner(
            plant, objective, self.controls, segment, memory_budget, spill is not False
        )
        self.memory_budget = memory_budget
        self.spill = spill
        self.damping = damping or Damping()
        self.notice = notice
        self.automatic = product == "auto"
        self.product, self.why = self._first_choice(product)
        self.exact_fails = plant.parallel.sharded
        self.verified = verified
        self.check: Disagreements | None = None
        self.moving: list[str] | None = None
        self.whole = ""  # why no product takes batches in parts any more
        self.changed: list[str] | None = None  # what is computed otherwise than in plain training
        self.before: Boundary | None = None
        """λ at the start of the window that was differentiated last."""
        self._tried: set[type] = set()

    # Plan and roll -------------------------------------------------------------------------------

    def plan(self, steps: int, batch: Any, scheduled: Container[str] = ()) -> Plan:
        """What a window of `steps` will keep; measures one step the first time, and undoes it.
        scheduled: the controls that are set at every step."""
        plan = self.planner.plan(steps, self.product, batch, scheduled)
        return replace(plan, twice=len(self._twice(steps)))

    def _twice(self, steps: int, start: int = 0) -> Sequence[int]:
        """Steps at which differences are compared: all if exact products are missing; a few, once,
        if differences were requested; none in float64, where kinks are too far apart to hit."""
        if self.product not in ("forward-difference", "central-difference") or not self.verified:
            return ()
        if self.automatic:
            return range(steps)
        if self.check is not None or self.plant.parameters[0].dtype == torch.float64:
            return ()
        return random.Random(start).sample(range(steps), min(steps, SAMPLED))

    def roll(
        self,
        batches: Sequence[Any],
        schedule: Schedule,
        *,
        average: Average | None = None,
        on_step: Callable[[int, StepRecord], None] | None = None,
        limit: Callable[[float], float] = lambda first: math.inf,
        plan: Plan | None = None,
        shared: bool = False,
    ) -> WindowRecorder:
        """Rolls the live plant through the window; raises Unseen if it cannot be differentiated.
        plan: of an earlier roll that this one is to equal. shared: as of `WindowRecorder`."""
        self.plant.refuse_overlaps()
        Sweep.attention = False
        numbered = enumerate(batches, schedule.start)
        batches = [self.plant.weighed(batch, step) for step, batch in numbered]
        plan = plan or self.plan(len(batches), batches[0], schedule)
        folder = None if isinstance(self.spill, bool) else Path(self.spill)
        recorder = WindowRecorder(
            self.plant,
            self.objective,
            plan,
            folder,
            without_theta=self.plant.slots_alone(schedule, self.controls) and not shared,
            ceiling=self.planner.ceiling(plan),
            shared=shared,
        )
        if self.verified and self.check is None:
            self.check = self._remembered(batches[0]).get("check")
            recorder.beginning = None if self.check is not None else self.plant.snapshot()
        try:
            with matrices.torchs_own(not plan.onednn), recorder.kernels():
                self.plant.roll(
                    batches,
                    schedule,
                    record=recorder,
                    average=average,
                    on_step=on_step,
                    limit=limit,
                )
        except BaseException:
            recorder.close()
            raise
        return recorder

    # Differentiate -------------------------------------------------------------------------------

    def differentiate(
        self,
        recorder: WindowRecorder,
        average: Average,
        terminal: Terminal | None,
        damping: Damping | None = None,
        later: Boundary | None = None,
        keeper: Keeper | None = None,
    ) -> Hypergradient:
        """The adjoint of a roll whose end is the live state, which is restored. later: `before` of
        the window that follows, in place of a terminal loss. keeper: as of `adjoint`; for data
        weights alone."""
        damping = damping or self.damping
        self.plant.optimizer.zero_grad()  # the trajectory has the last step's gradients
        counted = self.plant.attributes()
        try:
            return self._differentiate(recorder, average, terminal, damping, counted, later, keeper)
        finally:
            counted.restore()

    def _differentiate(
        self,
        recorder: WindowRecorder,
        average: Average,
        terminal: Terminal | None,
        damping: Damping,
        counted: Captured,
        later: Boundary | None,
        keeper: Keeper | None,
    ) -> Hypergradient:
        trajectory, plan = recorder.trajectory, recorder.plan
        wasted, spent = 0, 0.0
        while True:
            product = self.product
            if trajectory.diverged is not None and plan.chunk:
                # The roll ended before the chunk that it would have recorded.
                found, end = _undefined(trajectory, self.controls), None
                outcome = outcome_of(found, trajectory, end, damping)
                break
            rng = RandomState.capture()
            try:
                with matrices.torchs_own(not plan.onednn):
                    found, end = adjoint(
                        recorder,
                        self.objective,
                        self.controls,
                        terminal=terminal,
                        average=average.values,
                        product=product,
                        damping=damping,
                        twice=self._twice(len(trajectory), trajectory.start),
                        cut=self._steps_to_verify(recorder, damping),
                        later=later,
                        keeper=keeper,
                    )
            except (RuntimeError, NotImplementedError) as error:
                self._fall_back(error, trajectory)
                if keeper is not None:
                    keeper.clear()
                continue
            outcome = outcome_of(found, trajectory, end, damping)
            if found.cut is None or not outcome.usable:
                break
            # A terminal loss that draws or counts is repeated from the same state.
            rng.restore()
            counted.restore()
            assert recorder.beginning is not None
            check = verify(
                self.plant,
                recorder.beginning,
                trajectory,
                self.objective,
                found.gradient,
                found.cut,
                product,
                terminal,
                0.0 if end is None else float(end),
                average.values,
                hessian=self._tries_product,
                rows=found.rows,
            )
            # A terminal loss is counted by its size, where that is known.
            taken = check.terminals * getattr(terminal, "share", 1.0) / 3
            spent += check.cost + taken
            if not check.finite:
                break
            if check.holds or not self._tries_differences(check, recorder):
                self._keep(check, trajectory)
                break
            wasted += found.hessian_products
            spent += found.equivalents
            if keeper is not None:
                keeper.clear()
        if outcome.usable and self.verified:
            spent += self._try_functions(trajectory)
        if outcome.usable and self.check is not None and not self.check.holds:
            outcome = Outcome("inconsistent", self.check.sentence(), trajectory.start)
        self.before = found.before
        if found.undivided is not None:
            self._divide_no_more(product, trajectory, found.undivided)
        if self.moving is None:
            self.moving = self._moving_buffers(trajectory)
        if self.changed is None:
            self.changed = self._what_changed(product)
            for change in self.changed:
                self.notice(change)
        missing = len(trajectory.schedule) - len(trajectory)  # a diverged roll stops early
        grad = {n: _padded(g, missing) for n, g in found.gradient.items()}
        by_step: Tensor | None = None
        if self.plant.data_weights is not None:
            grad[DATA_WEIGHTS], by_step = self._by_cell(trajectory, found.rows)
        value = stage_sum(self.objective, trajectory)
        if end is not None:
            value += self.objective.terminal_weight * float(end)
        losses = torch.stack([x.double().cpu() for x in trajectory.losses])
        return Hypergradient(
            value=value,
            grad=grad,
            costate_norms=_padded(found.costate_norms, missing),
            result=outcome,
            terminal=math.nan if end is None else float(end),
            losses=_padded(losses, missing),
            engine="adjoint",
            product=product,
            segment=plan.segment,
            hessian_products=found.hessian_products + wasted,
            gradient_equivalents=found.equivalents + spent + (end is not None),
            why=self._explained(),
            plan=plan,
            check={} if self.check is None else self.check.of,
            rows=[torch.cat(of_step) for of_step in found.rows if of_step],
            cells_by_step=by_step,
        )

    def _by_cell(
        self, trajectory: Trajectory, rows: Sequence[Sequence[Tensor]]
    ) -> tuple[Tensor, Tensor | None]:
        """(n,) float64, over all ranks, and (K, n) of few cells; NaN without a reverse pass."""
        assert self.plant.data_weights is not None
        n = len(self.plant.data_weights)
        total = torch.zeros(n, dtype=torch.float64)
        if not rows:
            return total.fill_(math.nan), None
        by_step = torch.zeros(len(rows) if n <= FEW else 0, n, dtype=torch.float64)
        for i, (batch, of_step) in enumerate(zip(trajectory.batches, rows, strict=False)):
            per_cell(by_step[i] if n <= FEW else total, parts(batch), of_step)
        ranks, device = self.plant.ranks, self.plant.parameters[0].device
        found = by_step if n <= FEW else total
        found = found if ranks is None else ranks.sum(found.to(device)).cpu()
        return (found.sum(0), found) if n <= FEW else (found, None)

    def _steps_to_verify(self, recorder: WindowRecorder, damping: Damping) -> int:
        """The k of `verify`; 0 for no verification."""
        trajectory = recorder.trajectory
        checked = recorder.beginning is None or self.check is not None
        if checked or trajectory.diverged is not None:
            return 0
        # Two steps are enough where the product is tried on its own.
        few = self._tries_product and not is_double(self.plant)
        return steps_to_cut(
            len(trajectory), self.controls, self.product, few=few, damped=damping != Damping()
        )

    @property
    def _tries_product(self) -> bool:
        return self.memory_budget is None and self.plant.ranks is None

    @property
    def prior_cost(self) -> float:
        """Upper estimate of the first verification's cost, in gradient evaluations."""
        if not self.verified or self.check is not None:
            return 0.0
        return 4.0 * len(self.controls) if self.product == "none" else 20.0

    @property
    def trusted(self) -> bool:
        """Whether rolls of the plain loop have not contradicted the hypergradients."""
        return self.check is None or self.check.holds

    def state(self) -> dict[str, Any]:
        """Decisions and measurements, JSON-able, so that a resumed run rolls alike."""
        sizes = {key: asdict(found) for key, found in self.planner.sizes.items()}
        return {
            "product": self.product,
            "why": self.why,
            "exact_fails": self.exact_fails,
            "whole": self.whole,
            "changed": self.changed,
            "sizes": sizes,
            "check": None if self.check is None else asdict(self.check),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.product, self.why = state["product"], state["why"]
        self.exact_fails = bool(state["exact_fails"])
        self.whole = state.get("whole", "")  # absent from older checkpoints
        self.changed = state.get("changed")
        self.planner.sizes = {key: Sizes(**found) for key, found in state["sizes"].items()}
        check = state.get("check")  # absent from older checkpoints
        self.check = None if check is None else Disagreements(**check)

    # Which product -------------------------------------------------------------------------------

    def _first_choice(self, product: Product | Literal["auto"]) -> tuple[Product, str]:
        if self.plant.parallel.sharded and product == "exact":
            raise InputError(
                f"product {product!r} needs second derivatives, which parameters that are shared "
                "out (fully_shard) have not; use 'auto', or a difference"
            )
        if product != "auto":
            return product, "as asked"
        if self.plant.parallel.sharded:
            return "forward-difference", "no exact product: parameters are shared out"
        return "exact", "right to rounding"

    def _explained(self) -> str:
        more = [*(self.changed or ()), *([_left_out(self.moving)] if self.moving else [])]
        if self.check is not None and not self.check.holds:
            more.append(self.check.sentence())
        return "; ".join([self.why, *more, *([self.whole] if self.whole else [])])

    def _what_changed(self, product: Product) -> list[str]:
        """What a reverse pass by `product` computes otherwise than plain training does."""
        changed = []
        if product == "exact" and Sweep.attention:
            changed.append(
                "attention was computed as softmax(q kᵀ) v, because its fused kernels have no "
                "second derivative"
            )
        if (
            product == "exact"
            and self.plant.parameters[0].is_cuda
            and is_recurrent(self.plant.model)
        ):
            changed.append("recurrent layers ran without cuDNN, which has no second derivative")
        followed = Evaluation(self.plant, self.plant.blocks(), self.objective).statistics_names
        if followed and self.objective.terminal_weight:
            changed.append(
                f"running statistics {_few(followed)} are differentiated where the terminal loss "
                "reads them"
            )
        return changed

    def _moving_buffers(self, trajectory: Trajectory) -> list[str]:
        """Buffers and frozen parameters that training changes, except differentiated statistics."""
        followed = Evaluation(self.plant, trajectory.blocks, self.objective).statistics_names
        moving = [
            name
            for name, live in Buffers(self.plant.model, self.plant.moved).live().items()
            if name not in followed
            and live is not None
            and live.is_floating_point()
            and _has_moved(live, [buffers.get(name) for buffers in trajectory.buffers])
        ]
        if moving:
            self.notice(_left_out(moving))
        return moving

    def _tries_differences(self, check: Disagreements, recorder: WindowRecorder) -> bool:
        """Switches from failing exact products to differences, under "auto" only."""
        ours = self.automatic and self.product == "exact"
        if not (ours and check.of_the_product and recorder.again):
            return False
        self.exact_fails = True
        self.product = "forward-difference"
        self.why = f"exact products did not hold: {check.sentence()}"
        self.notice(f"product forward-difference: {self.why}")
        return True

    def _try_functions(self, trajectory: Trajectory) -> float:
        """Tries the product with every newly seen custom Function; returns the cost."""
        new = [
            (cls, batch)
            for cls, batch in functions_of(self.plant).items()
            if cls not in self._tried
        ]
        cost = 0.0
        for cls, batch in new:
            self._tried.add(cls)
            if self.plant.ranks is not None or self.check is None or not self.check.holds:
                continue
            apart, taken = try_product(self.plant, self.product, trajectory.blocks, batch)
            cost += taken
            if apart > max(self.check.tolerance, 1e-4):
                self._keep(replace(self.check, hessian=apart, of_what=cls.__name__), trajectory)
        return cost

    def _keep(self, check: Disagreements, trajectory: Trajectory) -> None:
        """Stores the result for later windows and, if it holds, for other calls."""
        self.check = check
        if check.holds:
            self._remembered(trajectory.batches[0])["check"] = check
        else:
            self.notice(f"hypergradients are inconsistent: {check.sentence()}")

    def _remembered(self, batch: Any) -> dict[str, Disagreements]:
        """What is known of this model, loss and optimizer, and their hooks."""
        key = (
            "verified",
            type(self.plant.optimizer),
            self.product,
            self.controls,
            bool(self.objective.terminal_weight),
            hooks(self.plant),
            signature(self.plant, batch),
        )
        return known_of(self.plant).setdefault(key, {})

    def _divide_no_more(self, product: Product, trajectory: Trajectory, i: int) -> None:
        self.planner.divide_no_more(product, trajectory.batches[i])
        self.whole = (
            f"the loss of step {trajectory.start + i} is not the mean of its rows' losses: "
            "products take whole batches from now on, which may be more than the memory budget"
        )
        self.notice(self.whole)

    def _fall_back(self, error: BaseException, trajectory: Trajectory) -> None:
        """For an operator without the derivative: differences, under "auto" only."""
        batch = trajectory.batches[-1]
        if not self.automatic or self.exact_fails:
            raise unsupported(error, self.plant, batch, self.product) or error from error
        found = missing(error, self.plant, batch)
        if found is None:
            raise error
        self.exact_fails = True
        self.product = "forward-difference"
        self.why = f"no exact product: {found.reason}"
        self.notice(f"product forward-difference: {self.why}; {found.mend}")


def _has_moved(live: Tensor, before: Sequence[Tensor | None]) -> bool:
    """Whether it differs from its first value of the same shape: caches fill, and grow."""
    first = next((b for b in before if b is not None and b.shape == live.shape), live)
    return not torch.equal(live, first)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _left_out(moving: Sequence[str]) -> str:
    return (
        f"buffers or frozen parameters {_few(moving)} change in training and count as constants of "
        "each step: what loss_fn reads of them (spectral_norm does) is left out of the "
        "hypergradient"
    )


def _undefined(trajectory: Trajectory, controls: Sequence[str]) -> Adjoint:
    """The adjoint of a window whose reverse pass is impossible: NaN everywhere."""
    steps, schedule = len(trajectory), trajectory.schedule
    nothing = torch.full((steps,), math.nan, dtype=torch.float64)
    gradient = {n: torch.full_like(schedule[n][:steps], math.nan) for n in controls}
    return Adjoint(gradient, nothing, torch.full((steps + 1,), math.nan), 0, 0.0, {}, {})


def stage_sum(objective: Objective, trajectory: Trajectory) -> float:
    """Σ_t of the stage costs that a roll observed."""
    if not objective.reward_weight:
        if not objective.loss_weight or not trajectory.losses:
            return 0.0
        losses = torch.stack([x.double() for x in trajectory.losses]).tolist()
        return float(sum(objective.loss_weight * loss for loss in losses))
    costs = [
        objective.stage(loss.double(), metrics)
        for loss, metrics in zip(trajectory.losses, trajectory.metrics, strict=True)
    ]
    return float(sum(float(c) for c in costs if c is not None))


def _padded(values: Tensor, missing: int) -> Tensor:
    where = (0, 0, 0, missing) if values.dim() == 2 else (0, missing)
    return pad(values, where, value=math.nan)

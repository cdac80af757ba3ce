"""Rolling windows and looking back at them, with everything that is decided on the way.

`rhc.hypergradient` uses a `ReversePass` once, a Runner for all its windows: which product is taken
(`auto`), what the roll keeps (`plan`), and what became of it (`Outcome`).
"""

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

from rhc.errors import InputError
from rhc.hypergradient.evaluation import (
    Evaluation,
    functions_of,
    has_statistics,
)
from rhc.hypergradient.hvp import (
    Product,
)
from rhc.hypergradient.kernels import matrices
from rhc.hypergradient.memory_plan import (
    Plan,
    Sizes,
    keeps_whole,
    make_plan,
)
from rhc.hypergradient.record import WindowRecorder
from rhc.hypergradient.segments import Adjoint, Damping, Terminal, adjoint
from rhc.hypergradient.sizes import (
    forget_pieces,
    known_of,
    measure_pieces,
    measure_sizes,
    signature,
)
from rhc.hypergradient.support import missing, unsupported
from rhc.hypergradient.verification import (
    Disagreements,
    hooks,
    is_double,
    steps_to_cut,
    try_product,
    verify,
)
from rhc.rng import RandomState
from rhc.schedule import Schedule
from rhc.settings import Engine
from rhc.training import memory
from rhc.training.module_state import Buffers, Captured
from rhc.training.objective import Average, Objective
from rhc.training.plant import Plant
from rhc.training.trajectory import StepRecord, Trajectory

SAME_GRADIENT = 0.01
"""Largest relative difference between a step's gradient and the same computed again. Other kernels
and reduced precision stay below it; hidden state and randomness do not."""

EXPLODING = 1e4
"""A costate that has grown by this factor on its way back says more about rounding and chaos than
about the schedule (Metz et al. 2021)."""

VANISHING = 1e-6
"""A costate that has shrunk by this factor: steps before have no say in the objective."""


HEAP = 0.9
"""The share of a budget that is planned with on a CPU: the C heap resides in a tenth more than is
allocated, in holes between tensors."""

FRESH_GRAPHS = 2**30
"""Bytes of graphs that are kept at most, whatever the budget, on a CPU whose heap is not held. The
system's fresh pages take more time than is saved: a GPT with K = 50 took 3.9 plain steps a step
with 16 graphs of 80 MB, 5.0 with 22, 5.4 with all 50; from the second window on 3.3, where they
are held."""

AGREES = 0.05
"""Largest sum over a window of what differences to either side differ by, as shares of the costate,
that is put up with: about the error of dJ/du. Smooth models stay below 1e-3 in float32; one kink
crossed is off by a third of a product and more."""


SAMPLED = 12
"""Steps at which difference products that were asked for are held against others, once."""


@dataclass(frozen=True)
class Outcome:
    """How a hypergradient ended; `message` says the mend.

    name: "successful"; "vanishing" and "exploding", where the costate shrinks or grows too much on
    its way back; "non-finite"; or "inconsistent", where rolls of the plain loop contradict the
    numbers, a step that is computed again is not the step that was rolled, or differences to either
    side disagree, so that the numbers cannot be trusted.

    step: the absolute step at which it began, going backwards; None where it succeeded.
    """

    name: str
    message: str
    step: int | None = None

    @property
    def successful(self) -> bool:
        return self.name == "successful"

    @property
    def usable(self) -> bool:
        """Whether a schedule may be rewritten from it as it is."""
        return self.name in ("successful", "vanishing")


@dataclass(frozen=True)
class Hypergradient:
    """J and its derivatives.

    value: J. grad: control -> (K,) float64, dJ/du_t in natural units; (K, groups) where the
    schedule has a value per group. costate_norms: (K,) float64, |dJ/ds_t|. terminal: the terminal
    loss, NaN without one. losses: (K,) as rolled. product, why: the product that was taken.
    plan: what the roll kept. gradient_equivalents: what looking back cost, in gradient evaluations.
    check: control -> relative disagreement with two rolls of the plain loop over the first steps;
    "terminal": of the terminal loss with its gradient. {} where nothing was verified.
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


class ReversePass:
    """Rolls windows of a plant and looks back at them.

    segment, product, memory_budget (bytes beyond plain training), spill (False; True for the
    system's temporary folder; or a folder), damping: as in `rhc.hypergradient`. verified: whether
    the first hypergradient is held against rolls of the plain loop. notice: told, in words, what
    was decided and given up.
    """

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
        # What a budget allows is held from one window to the next.
        self.held = plant.parameters[0].device.type == "cpu" and memory.hold(memory_budget or 0)
        damping = damping or Damping()
        if memory_budget is not None and not memory_budget > 0:
            raise InputError(f"memory_budget must be > 0 bytes, got {memory_budget}")
        if memory_budget is not None and segment not in ("auto", 1):
            raise InputError(
                f"memory_budget decides what is kept, got segment {segment} beside it; leave "
                "segment 'auto'"
            )
        Engine(discount=damping.discount, costate_clip=damping.clip).checked()
        if plant.ranks is not None and segment not in ("auto", 1):
            raise InputError(
                f"segment must be 1 where ranks train together, got {segment}; leave segment 'auto'"
            )
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
        if damping != Damping() and segment not in ("auto", 1):
            raise InputError(
                f"discount and costate_clip need segment 1, got {segment}; leave segment 'auto'"
            )
        self.plant, self.objective, self.controls = plant, objective, tuple(controls)
        self.segment = segment
        self.memory_budget = memory_budget
        self.spill = spill
        self.damping = damping
        self.notice = notice
        self.automatic = product == "auto"
        self.product, self.why = self._first_choice(product)
        self.exact_fails = plant.parallel.sharded
        self.verified = verified
        self.check: Disagreements | None = None
        self.moving: list[str] | None = None
        self.whole = ""  # why no product takes batches in parts any more
        self._sizes: dict[str, Sizes] = {}
        self._tried: set[type] = set()

    # Plan and roll -------------------------------------------------------------------------------

    def plan(self, steps: int, batch: Any, scheduled: Container[str] = ()) -> Plan:
        """What a window of `steps` will keep; measures one step the first time, and undoes it.

        scheduled: the controls that are set at every step.
        """
        product = self.product
        if self.segment not in ("auto", 1):
            return Plan(steps, product, min(int(self.segment), steps), kept=steps)
        spill = self.spill is not False
        budget = self.memory_budget
        on_cpu = self.plant.parameters[0].device.type == "cpu"
        with matrices.torchs_own(budget is not None):
            sizes = self._measured(batch, product)
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
        most = None if self.held or not on_cpu else FRESH_GRAPHS
        plan = make_plan(steps, product, sizes, allocated, spill=spill, graph_bytes=most)
        if on_cpu:
            assert plan.predicted_bytes is not None
            resident = int((plan.predicted_bytes + sizes.plain) / HEAP) - sizes.plain
            plan = replace(plan, budget=budget, predicted_bytes=resident)
        return replace(plan, twice=len(self._twice(steps)))

    def _twice(self, steps: int, start: int = 0) -> Sequence[int]:
        """Steps at which a difference product is held against another.

        Everywhere if it stands in for an exact one that the model does not have; at a few, once, if
        it was asked for. In float64 kinks are too far apart to hit.
        """
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
    ) -> WindowRecorder:
        """Rolls the live plant through the window; the recorder has the trajectory.

        Raises Unseen where a step does what looking back cannot see through.
        """
        self.plant.refuse_overlaps()
        plan = self.plan(len(batches), batches[0], schedule)
        folder = None if isinstance(self.spill, bool) else Path(self.spill)
        blind = self.plant.slots_alone(schedule, self.controls)
        recorder = WindowRecorder(
            self.plant, self.objective, plan, folder, blind=blind, ceiling=self._ceiling(plan)
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

    def _ceiling(self, plan: Plan) -> memory.Ceiling | None:
        """Of a CPU's heap, where there is a budget; it begins now.

        What the window began with is there already, and the budget's.
        """
        if plan.budget is None or self.plant.parameters[0].device.type != "cpu":
            return None
        sizes = self._sizes[plan.product]
        whole = sizes.plain + plan.budget - sizes.state
        if plan.graphs:
            # The next graph must have room, with holes that it cannot use, and a product; in all no
            # more than a tenth above the budget. Trimming earlier costs more than it is worth.
            room = 2 * sizes.graph - 2 * plan.budget // 25
            above = max(whole // 2, whole - room)
            return memory.Ceiling(above, work=sizes.graph, spare=plan.budget // 4)
        work = sizes.plain + dict(sizes.pieces or ()).get(plan.pieces, sizes.product)
        return memory.Ceiling(whole - int((1 - HEAP) * plan.budget), work=work)

    # Differentiate -------------------------------------------------------------------------------

    def differentiate(
        self,
        recorder: WindowRecorder,
        average: Average,
        terminal: Terminal | None,
        damping: Damping | None = None,
    ) -> Hypergradient:
        """The adjoint of a roll whose end is the live state, which is put back."""
        damping = damping or self.damping
        self.plant.optimizer.zero_grad()  # the last step's gradients are on the trajectory
        counted = self.plant.attributes()
        try:
            return self._differentiate(recorder, average, terminal, damping, counted)
        finally:
            counted.restore()

    def _differentiate(
        self,
        recorder: WindowRecorder,
        average: Average,
        terminal: Terminal | None,
        damping: Damping,
        counted: Captured,
    ) -> Hypergradient:
        trajectory, plan = recorder.trajectory, recorder.plan
        wasted, spent = 0, 0.0
        while True:
            product = self.product
            if trajectory.diverged is not None and plan.chunk:
                # The roll ended before the chunk that it would have recorded.
                found, end = _undefined(trajectory, self.controls), None
                outcome = _outcome(found, trajectory, end, damping)
                break
            beginning = recorder.beginning if self.check is None else None
            hessian = self.memory_budget is None and self.plant.ranks is None
            rng = None if beginning is None else RandomState.capture()
            cut = 0
            if beginning is not None and trajectory.diverged is None:
                damped = damping != Damping()
                few = hessian and not is_double(self.plant)  # the product is tried on its own
                cut = steps_to_cut(len(trajectory), self.controls, product, few=few, damped=damped)
            try:
                with matrices.torchs_own(not plan.onednn):
                    found, end = adjoint(
                        self.plant,
                        recorder,
                        self.objective,
                        self.controls,
                        terminal=terminal,
                        average=average.values,
                        product=product,
                        damping=damping,
                        twice=self._twice(len(trajectory), trajectory.start),
                        cut=cut,
                    )
            except (RuntimeError, NotImplementedError) as error:
                self._fall_back(error, trajectory)
                continue
            outcome = _outcome(found, trajectory, end, damping)
            if beginning is None or rng is None or found.cut is None or not outcome.usable:
                break
            # A terminal loss that draws or counts is taken again as it was.
            rng.restore()
            counted.restore()
            check = verify(
                self.plant,
                beginning,
                trajectory,
                self.objective,
                found.gradient,
                found.cut,
                product,
                terminal,
                0.0 if end is None else float(end),
                average.values,
                hessian=hessian,
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
        if outcome.usable and self.verified:
            spent += self._try_functions(trajectory)
        if outcome.usable and self.check is not None and not self.check.holds:
            outcome = Outcome("inconsistent", self.check.sentence(), trajectory.start)
        if found.undivided is not None:
            self._divide_no_more(product, trajectory, found.undivided)
        if self.moving is None:
            self.moving = self._moving_buffers(trajectory)
        value = stage_sum(self.objective, trajectory)
        if end is not None:
            value += self.objective.terminal_weight * float(end)
        missing = len(trajectory.schedule) - len(trajectory)  # a diverged roll stops early
        losses = torch.stack([x.double().cpu() for x in trajectory.losses])
        return Hypergradient(
            value=value,
            grad={n: _padded(g, missing) for n, g in found.gradient.items()},
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
        )

    @property
    def prior_cost(self) -> float:
        """Gradient evaluations that the first hypergradient's proof takes, about at most."""
        if not self.verified or self.check is not None:
            return 0.0
        return 4.0 * len(self.controls) if self.product == "none" else 20.0

    @property
    def trusted(self) -> bool:
        """Whether rolls of the plain loop have not contradicted the hypergradients."""
        return self.check is None or self.check.holds

    def state(self) -> dict[str, Any]:
        """What was decided and measured, JSON-able: a resumed run must roll as the run did."""
        sizes = {key: asdict(found) for key, found in self._sizes.items()}
        return {
            "product": self.product,
            "why": self.why,
            "exact_fails": self.exact_fails,
            "whole": self.whole,
            "sizes": sizes,
            "check": None if self.check is None else asdict(self.check),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` gave."""
        self.product, self.why = state["product"], state["why"]
        self.exact_fails = bool(state["exact_fails"])
        self.whole = state.get("whole", "")  # not in checkpoints of before
        self._sizes = {key: Sizes(**found) for key, found in state["sizes"].items()}
        check = state.get("check")  # not in checkpoints of before
        self.check = None if check is None else Disagreements(**check)

    # Which product -------------------------------------------------------------------------------

    def _first_choice(self, product: Product | Literal["auto"]) -> tuple[Product, str]:
        if self.plant.parallel.sharded and product in ("exact", "forward-over-reverse"):
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
        """Why the product was taken, and what it leaves out."""
        more = [_left_out(self.moving)] if self.moving else []
        if self.check is not None and not self.check.holds:
            more.append(self.check.sentence())
        return "; ".join([self.why, *more, *([self.whole] if self.whole else [])])

    def _moving_buffers(self, trajectory: Trajectory) -> list[str]:
        """Buffers, and parameters that are not trained, that change in training, but for the
        statistics that are followed."""
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
        """Takes difference products where exact ones do not hold and it is ours to choose."""
        ours = self.automatic and self.product == "exact" and self.segment in ("auto", 1)
        if not (ours and check.of_the_product and recorder.again):
            return False
        self.exact_fails = True
        self.product = "forward-difference"
        self.why = f"exact products did not hold: {check.sentence()}"
        self.notice(f"product forward-difference: {self.why}")
        return True

    def _try_functions(self, trajectory: Trajectory) -> float:
        """Tries the product with every custom Function that was met the first time, wherever in a
        window; what that cost."""
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
        """Remembers what was found, for the windows to come and, if it holds, for other calls."""
        self.check = check
        if check.holds:
            self._remembered(trajectory.batches[0])["check"] = check
        else:
            self.notice(f"hypergradients are inconsistent: {check.sentence()}")

    def _remembered(self, batch: Any) -> dict[str, Disagreements]:
        """What is known of this model, loss and optimizer, with all that hangs on them."""
        key = (
            "verified",
            type(self.plant.optimizer),
            self.product,
            self.segment in ("auto", 1),
            self.controls,
            bool(self.objective.terminal_weight),
            hooks(self.plant),
            signature(self.plant, batch),
        )
        return known_of(self.plant).setdefault(key, {})

    def _divide_no_more(self, product: Product, trajectory: Trajectory, i: int) -> None:
        self._sizes[product] = replace(self._sizes[product], pieces=())
        forget_pieces(self.plant, trajectory.batches[i], self.objective)
        self.whole = (
            f"the loss of step {trajectory.start + i} is not the mean of its rows' losses: "
            "products take whole batches from now on, which may be more than the memory budget"
        )
        self.notice(self.whole)

    def _fall_back(self, error: BaseException, trajectory: Trajectory) -> None:
        """An operator lacks the derivative: differences where that is ours to choose."""
        batch = trajectory.batches[-1]
        if not self.automatic or self.exact_fails or self.segment not in ("auto", 1):
            raise unsupported(error, self.plant, batch, self.product) or error from error
        found = missing(error, self.plant, batch, "exact")
        if found is None:
            raise error
        self.exact_fails = True
        self.product = "forward-difference"
        self.why = f"no exact product: {found.reason}"
        self.notice(f"product forward-difference: {self.why}; {found.mend}")

    # Sizes ---------------------------------------------------------------------------------------

    def _measured(self, batch: Any, product: Product) -> Sizes:
        if product not in self._sizes:
            sizes = measure_sizes(
                self.plant, batch, self.objective, product, full=self.memory_budget is not None
            )
            if self.plant.ranks is not None:  # one plan for all
                sizes = Sizes(**self.plant.ranks.share(asdict(sizes)))
            self._sizes[product] = sizes
        return self._sizes[product]

    def _measured_in_pieces(self, batch: Any, product: Product) -> Sizes:
        """Also of a product that takes the batch in parts: only where a budget is tight."""
        pieces: tuple[tuple[int, int], ...] = ()
        if product == "exact":
            pieces = measure_pieces(self.plant, batch, self.objective)
        self._sizes[product] = replace(self._sizes[product], pieces=pieces)
        return self._sizes[product]


def _has_moved(live: Tensor, before: Sequence[Tensor | None]) -> bool:
    """Whether it differs from its first value of the same shape: caches are filled, and grow."""
    first = next((b for b in before if b is not None and b.shape == live.shape), live)
    return not torch.equal(live, first)


def _left_out(moving: Sequence[str]) -> str:
    names = ", ".join(moving[:3]) + (", …" if len(moving) > 3 else "")
    return (
        f"buffers or frozen parameters {names} change in training and count as constants of each "
        "step: what loss_fn reads of them (spectral_norm does) is left out of the hypergradient"
    )


def _undefined(trajectory: Trajectory, controls: Sequence[str]) -> Adjoint:
    """The adjoint of a window that cannot be looked back at: NaN everywhere."""
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


def _outcome(
    found: Adjoint, trajectory: Trajectory, end: Tensor | None, damping: Damping
) -> Outcome:
    norms = found.costate_norms
    bad = ~torch.isfinite(norms)
    for g in found.gradient.values():
        bad |= ~torch.isfinite(g).reshape(len(norms), -1).all(1)
    last = trajectory.start + len(trajectory) - 1
    if bool(bad.any()):
        step = trajectory.start + int(bad.nonzero().max())
        return Outcome(
            "non-finite",
            f"the costate is not finite from step {step} backwards; use a shorter window, a lower "
            "lr, discount < 1 or costate_clip",
            step,
        )
    losses = [*trajectory.losses[-1:], *([] if end is None else [end])]
    if trajectory.diverged is not None or not all(math.isfinite(float(x)) for x in losses):
        message = f"the loss is not finite at step {last}; use a shorter window or a lower lr"
        return Outcome("non-finite", message, last)
    taken = max(1, len(found.disagreements))
    share = sum(found.disagreements.values()) * len(trajectory) / taken
    if not share <= AGREES:
        worst = max(found.disagreements, key=lambda i: found.disagreements[i])
        return Outcome(
            "inconsistent",
            f"differences of gradients disagree by {share:.2g} over the window, "
            f"most at step {trajectory.start + worst}, as they do at kinks (ReLU, max-pooling) and "
            "in reduced precision; make exact products possible (`why` says what stands against "
            "them), or use float64",
            trajectory.start + worst,
        )
    worst = max(found.discrepancies, key=lambda i: found.discrepancies[i], default=0)
    share = found.discrepancies.get(worst, 0.0)
    if share > SAME_GRADIENT:
        step = trajectory.start + worst
        return Outcome(
            "inconsistent",
            f"the gradient of step {step}, computed again, differs by {share:.2g} of its norm; "
            "look for randomness or state that loss_fn keeps outside the model, activation "
            "checkpointing with segment > 1, and operators that are not deterministic",
            step,
        )
    # Of θ alone: other slots have units of their own.
    norms, last_norm = found.parameter_norms[:-1], float(found.parameter_norms[-1])
    grown = norms > EXPLODING * last_norm
    if last_norm > 0 and damping.clip is None and bool(grown.any()):
        step = trajectory.start + int(grown.nonzero().max())
        return Outcome(
            "exploding",
            f"the costate has grown {float(norms.max()) / last_norm:.1g}-fold, beyond "
            f"{EXPLODING:g} from step {step} backwards; use costate_clip, discount < 1, a shorter "
            "window, a lower lr",
            step,
        )
    largest = float(found.parameter_norms.max())
    faint = norms < VANISHING * largest
    if largest > 0 and bool(faint[0]):
        alive = (~faint).nonzero()
        step = trajectory.start + (int(alive.min()) - 1 if len(alive) else len(norms) - 1)
        return Outcome(
            "vanishing",
            f"the costate has shrunk below {VANISHING:g} of its largest from step {step} "
            "backwards, so that earlier steps have no say; use a shorter window",
            step,
        )
    return Outcome("successful", "every hypergradient is finite")

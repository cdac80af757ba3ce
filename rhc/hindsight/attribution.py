"""dJ/dw of every row of a run through the whole of its training, for one J or for several.

J is a loss at the end of the run; w weighs the losses of the training rows (or of classes, or of
sources). A row that is left out changes J by −dJ/dw to first order, where a row's weight goes from
1 to 0. Ilyas, Engstrom 2025 (MAGIC) compute the same by replaying training backwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rhc.containers import kept
from rhc.data_weights import DATA_WEIGHTS, DataWeights
from rhc.errors import InputError
from rhc.hypergradient import Hypergradient, check_steerable, resolve, schedule_of, steps_of
from rhc.hypergradient.adjoint import Terminal
from rhc.hypergradient.evaluation import visible_statistics
from rhc.hypergradient.halfway import Keeper
from rhc.hypergradient.hvp import Product
from rhc.hypergradient.reverse_pass import ReversePass
from rhc.schedule import Schedule
from rhc.training import memory
from rhc.training.batches import MicroBatches
from rhc.training.losses import LossFn
from rhc.training.objective import Average, Objective
from rhc.training.plant import Plant

PROBE = 0.5
"""How far the weights are moved to see how linear J is in them: half of the rows to 1.5, half to
0.5."""

SMOOTH = 0.8
"""Metasmoothness below which derivatives predict little of what half of the data would do: on
MNIST it was 0.99 where they did (a correlation of 0.97), 0.84 at 0.88, 0.49 at 0.63."""


FEW = 6
"""Changes of which a cosine says something."""


@dataclass(frozen=True)
class Smoothness:
    """How linear J is in the weights, measured by rolls at w = 1 ± h ξ, ξ = ±1 at random by cell.

    Attributes:
        metasmoothness: Σ |b| sign(b) sign(f) / Σ |b| with b = J(1) − J(1 − hξ) and f = J(1 + hξ) −
            J(1), over the probes and over the values J; 1 for a smooth J, 0 for noise (Engstrom et
            al. 2025).
        agreement: cosine of what derivatives predict of (f + b)/2, and what it is; NaN for fewer
            than 6 of them.
        probes: directions ξ; two runs each.
        step: h.
    """

    metasmoothness: float
    agreement: float
    probes: int
    step: float


@dataclass(frozen=True)
class Attribution:
    """What training data did for a run's results.

    Attributes:
        derivatives: (M, n) float64, dJ_m/dw_c at weights of 1, by cell: a row with a negative one
            lowers J.
        values: (M,) float64, J_m.
        results: per J, whether its derivatives can be trusted, as `Hypergradient.result`.
        check: relative disagreement with rolls of the plain loop; {} if it was not verified.
        product: how the Hessian was applied.
        why: why so, and what it leaves out.
        losses: (T,) as rolled.
        gradient_equivalents: cost of roll and reverse passes, in gradient evaluations.
    """

    derivatives: Tensor
    values: Tensor
    results: list[tuple[str, str]]
    check: Mapping[str, float]
    product: str
    why: str
    losses: Tensor
    gradient_equivalents: float


def attribute(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: LossFn,
    batches: Sequence[Any],
    targets: Sequence[Terminal],
    *,
    data_weights: DataWeights,
    controls: Mapping[str, Any] | None = None,
    average: float | None = None,
    product: Product | str = "auto",
    accumulate: int = 1,
    seed: int = 0,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    memory_budget: int | None = None,
) -> Attribution:
    """dJ_m/dw of every row of `batches`, for several J_m: one roll, and a reverse pass each.

    Model, optimizer and random state are left as they were found.

    Args:
        model: in the state before the first batch.
        optimizer: of the model's parameters, in the same state.
        loss_fn: (model, batch) -> one loss per row, (B,), or (losses, metrics).
        batches: one per step, or `accumulate` per step.
        targets: each a differentiable scalar of the model, J_m, taken at the end.
        data_weights: which cell each row belongs to.
        controls: name -> (T,) values that vary, as of `rhc.hypergradient`.
        average: decay of the exponential average of the iterates at which J is taken; None for the
            last one.
        product: as of `rhc.hypergradient`.
        accumulate: batches per step.
        seed: of the gradient noise.
        clip_norm: as training clips.
        clip_value: as training clips.
        memory_budget: bytes above plain training that the passes may take; None for no limit.

    Returns:
        The derivatives by cell, and what they are worth.

    Raises:
        InputError: unusable arguments, as of `rhc.hypergradient`.
    """
    plant = Plant(
        model,
        optimizer,
        loss_fn,
        seed=seed,
        clip_norm=clip_norm,
        clip_value=clip_value,
        data_weights=data_weights,
    )
    steps = steps_of(batches, accumulate)
    schedule = schedule_of(plant, controls or {}, len(steps), seed)
    course = WholeRun(plant, steps, schedule, average, product, memory_budget)
    grads = [(p, p.grad) for p in model.parameters()]
    try:
        return collected(course.passes(targets))
    finally:
        for p, grad in grads:
            p.grad = grad


def collected(passes: Iterator[Hypergradient]) -> Attribution:
    found = list(passes)
    if not found:
        raise InputError("targets is empty; give at least one loss to attribute")
    last = found[-1]
    return Attribution(
        torch.stack([h.grad[DATA_WEIGHTS] for h in found]),
        torch.tensor([h.value for h in found], dtype=torch.float64),
        [(h.result.name, h.result.message) for h in found],
        last.check,
        last.product,
        last.why,
        last.losses,
        len(last.losses) + sum(h.gradient_equivalents for h in found),
    )


@dataclass
class WholeRun:
    """A run of T steps, to be rolled from step 0 with weighted rows and differentiated. The plant's
    model and optimizer are at step 0 before and after every call."""

    plant: Plant
    batches: Sequence[Any]
    schedule: Schedule
    average: float | None = None
    product: Product | str = "auto"
    memory_budget: int | None = None
    rolls: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        resolve(len(self.batches), "auto", self.product, "adjoint", self.plant)  # type: ignore[arg-type]
        check_steerable(self.plant, self.schedule, ())
        self.beginning = self.plant.snapshot()

    def passes(
        self,
        targets: Sequence[Terminal],
        keepers: Sequence[Keeper] | None = None,
        *,
        shared: bool | None = None,
    ) -> Iterator[Hypergradient]:
        """One reverse pass per target; a roll and its graphs serve them all, where they may stay.
        keepers: of the passes, which go on where they were interrupted. shared: whether the targets
        are several, counting those of earlier calls, which are to have the same bits."""
        shared = len(targets) > 1 if shared is None else shared
        plant = self.plant
        pass_of = ReversePass(
            plant,
            Objective(terminal_weight=1.0, average=self.average),
            (),
            product=self.product,  # type: ignore[arg-type]
            memory_budget=self.memory_budget,
            verified=True,
        )
        recorder = None
        mean = Average(self.average)
        try:
            with torch.enable_grad(), memory.held(self.memory_budget):
                for m, target in enumerate(targets):
                    if recorder is None or not recorder.again:
                        self._begin()
                        plan = pass_of.plan(len(self.batches), self._first(), self.schedule)
                        if shared and self.memory_budget is not None:
                            # Its plan counts on graphs that are freed one after the other.
                            plan = replace(plan, graphs=0)
                        mean = Average(self.average)
                        if recorder is not None:
                            recorder.close()
                        recorder = pass_of.roll(
                            self.batches, self.schedule, average=mean, plan=plan, shared=shared
                        )
                        self.rolls += 1
                    keeper = None if keepers is None else keepers[m]
                    yield pass_of.differentiate(recorder, mean, target, keeper=keeper)
        finally:
            if recorder is not None:
                recorder.close()
            self._begin()

    def at_end(self, of_model: Callable[[nn.Module], Tensor], raw: Tensor | None = None) -> Tensor:
        """of_model after a plain roll, at its average of iterates if J is taken there; NaN if it
        diverges. raw: (n,) weights, positive; None for the present ones."""
        plant, weights = self.plant, self.plant.data_weights
        assert weights is not None
        before = weights.raw.clone()
        mean = Average(self.average)
        self._begin()
        try:
            if raw is not None:
                weights.adopt(raw)
            batches = (_fresh(batch) for batch in self.batches)
            trajectory = plant.roll(batches, self.schedule, average=mean)
            self.rolls += 1
            with torch.no_grad():
                if mean.values is not None:
                    torch._foreach_copy_([p.detach() for p in plant.parameters], mean.values)
                with visible_statistics(plant.model, update=False):
                    found = of_model(plant.model).detach().double().cpu().clone()
            return found if trajectory.diverged is None else torch.full_like(found, math.nan)
        finally:
            weights.adopt(before)
            self._begin()

    def smoothness(
        self,
        of_model: Callable[[nn.Module], Tensor],
        probes: int,
        derivatives: Tensor | None = None,
        seed: int = 0,
    ) -> Smoothness:
        """of_model: model -> (R,) values J. derivatives: (M, n), of the first of these."""
        weights = self.plant.data_weights
        assert weights is not None
        draw = torch.Generator().manual_seed(seed)
        middle = self.at_end(of_model)
        backward, forward, predicted, measured = [], [], [], []
        for _ in range(probes):
            xi = torch.ones(len(weights), dtype=torch.float64)
            xi[torch.randperm(len(weights), generator=draw)[: len(weights) // 2]] = -1
            up, down = (self.at_end(of_model, 1 + sign * PROBE * xi) for sign in (1, -1))
            backward.append(middle - down)
            forward.append(up - middle)
            if derivatives is not None:
                measured.append((up - down)[: len(derivatives)] / 2)
                predicted.append(PROBE * derivatives @ xi)
        b, f = torch.cat(backward), torch.cat(forward)
        size = float(b.abs().sum())
        smooth = float((b.abs() * b.sign() * f.sign()).sum()) / size if size else math.nan
        agreement = math.nan
        if derivatives is not None:
            p, q = torch.cat(predicted), torch.cat(measured)
            if len(p) >= FEW:
                agreement = float(p @ q / (p.norm() * q.norm()))
        return Smoothness(smooth, agreement, probes, PROBE)

    def _begin(self) -> None:
        self.plant.optimizer.zero_grad()
        self.plant.restore(self.beginning)

    def _first(self) -> Any:
        return self.plant.weighed(self.batches[0], 0)


def _fresh(batch: Any) -> Any:
    return MicroBatches(map(kept, batch)) if isinstance(batch, MicroBatches) else kept(batch)

"""The whole run as one window: exact dJ/du_t at every step, and schedules optimized by it.

Batches are on disk. The outer passes move knots, log- or logit-linear in between: one value per
step would overfit the objective's data.
"""

from __future__ import annotations

import copy
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils import _pytree

from rhc.containers import copied, kept, to_device
from rhc.data_weights import DataWeights
from rhc.distributed import rows_between
from rhc.errors import InputError
from rhc.hypergradient import Hypergradient, Product, hypergradient
from rhc.hypergradient.evaluation import visible_statistics
from rhc.loop.steps import EXPLODING_CLIP
from rhc.loop.update_rule import Rewrite
from rhc.rng import RandomState
from rhc.schedule import CONTROLS, Schedule
from rhc.training.batches import MicroBatches, batch_size
from rhc.training.evaluate import batch_statistics
from rhc.training.losses import LossFn
from rhc.training.objective import Average
from rhc.training.plant import Plant


class DiskBatches:
    """Batches in one file each; only one is in memory at a time."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="rhc-batches-", dir=folder))

    def put(self, number: int, batch: Any, rng: RandomState | None = None) -> BatchRef:
        leaves, form = _pytree.tree_flatten(batch)
        # safetensors refuses tensors that share memory, so clone.
        tensors = {
            str(i): leaf.detach().cpu().contiguous().clone()
            for i, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor)
        }
        rest = [None if isinstance(leaf, Tensor) else copied(leaf) for leaf in leaves]
        path = self.folder / f"{number:08d}.safetensors"
        save_file(tensors, path)
        return BatchRef(path, form, rest, batch_size(batch), rng)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True, eq=False)
class BatchRef:
    """A batch on disk, for a loss function from `from_disk`. rng: random state to restore where the
    model and the loader share a generator."""

    path: Path
    form: Any
    rest: list[Any]
    batch_size: int
    rng: RandomState | None
    between: tuple[int, int, int] | None = None  # (its rows, first, stop), where not all

    def rows_between(self, first: int, stop: int) -> BatchRef:
        return replace(self, batch_size=stop - first, between=(self.batch_size, first, stop))

    def __deepcopy__(self, memo: Any) -> BatchRef:
        return self

    def batch(self, device: torch.device) -> Any:
        tensors = load_file(self.path)
        rest = enumerate(self.rest)
        leaves = [tensors[str(i)] if str(i) in tensors else copied(leaf) for i, leaf in rest]
        found = to_device(_pytree.tree_unflatten(leaves, self.form), device)
        return found if self.between is None else rows_between(found, *self.between)


def from_disk(loss_fn: LossFn, device: torch.device) -> LossFn:
    def loss(model: nn.Module, batch: Any) -> Any:
        if not isinstance(batch, BatchRef):
            return loss_fn(model, batch)
        if batch.rng is not None:
            batch.rng.restore()
        return loss_fn(model, batch.batch(device))

    return loss


def weights_from_disk(weights: DataWeights | None) -> DataWeights | None:
    """The weights, whose cells are those of the batches on disk."""
    if weights is None or weights.of_terms:
        return weights
    found, cell_of = copy.copy(weights), weights.cell_of

    def cells(batch: Any) -> Any:
        if isinstance(batch, BatchRef):
            batch = batch.batch(torch.device("cpu"))
        return cell_of(batch)

    found.cell_of = cells
    return found


def target_of(
    plant: Plant,
    batches: Sequence[Any],
    loss_of: Callable[[Any], Tensor] | None = None,
    *,
    averaged: bool,
) -> Callable[[nn.Module], Tensor]:
    """The mean loss of `batches`, as evaluation takes it. loss_of: batch -> another loss of the
    plant's model. averaged: whether at an average of iterates, whose running statistics are not
    known."""
    loss_of = loss_of or (lambda batch: plant.loss(batch)[0])
    device = plant.parameters[0].device
    sizes = [batch_size(b) for b in batches]

    def target(model: nn.Module) -> Tensor:
        with plant.evaluating():
            if averaged:  # running statistics are the last iterate's
                batch_statistics(model)
            own = [kept(to_device(b, device)) for b in batches]
            losses = [loss_of(b) * n for b, n in zip(own, sizes, strict=True)]
            return torch.stack(losses).sum(0) / sum(sizes)

    return target


def steerable(schedule: Schedule) -> list[str]:
    """The controls with a defined dJ/du: not 0 throughout; momentum: 0 nowhere."""
    found = []
    for name, values in schedule.values.items():
        positive = values > 0
        if bool(positive.all() if name == "momentum" else positive.any()):
            found.append(name)
    return found


@dataclass
class Episode:
    """A run of T steps that is rolled and differentiated repeatedly from step 0.
    J = stage_weight · Σ ℓ_t + mean loss on `judged`, at the last iterate or at the average with
    decay `average`. model, optimizer: restored to step 0 after every call. spent: gradient
    evaluations."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: LossFn
    batches: Sequence[Any]
    judged: Sequence[Any] = ()
    stage_weight: float = 0.0
    average: float | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None
    seed: int = 0
    product: Product | str = "exact"
    memory_budget: int | None = None
    discount: float = 1.0
    data_weights: DataWeights | None = None
    spent: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if not self.judged and not self.stage_weight:
            raise InputError(
                "the objective is empty: give batches to judge by, or a weight to the stage losses"
            )
        self.plant = Plant(
            self.model,
            self.optimizer,
            self.loss_fn,
            seed=self.seed,
            clip_norm=self.clip_norm,
            clip_value=self.clip_value,
            data_weights=self.data_weights,
        )
        self.beginning = self.plant.snapshot()

    @property
    def steps(self) -> int:
        return len(self.batches) // self.accumulate

    def differentiate(self, schedule: Schedule, costate_clip: float | None = None) -> Hypergradient:
        """J and its derivative by every control at every step."""
        values = {n: schedule[n][: self.steps] for n in steerable(schedule)}
        self.plant.restore(self.beginning)
        h = hypergradient(
            self.model,
            self.optimizer,
            self.loss_fn,
            self.batches,
            controls=values,
            data_weights=self.data_weights,
            terminal=self.terminal if self.judged else None,
            stage_weight=self.stage_weight,
            average=self.average,
            product=self.product,  # type: ignore[arg-type]
            seed=self.seed,
            clip_norm=self.clip_norm,
            clip_value=self.clip_value,
            accumulate=self.accumulate,
            memory_budget=self.memory_budget,
            discount=self.discount,
            costate_clip=costate_clip,
        )
        self.plant.restore(self.beginning)
        self.spent += self.steps + h.gradient_equivalents - bool(self.judged) + self._share
        return h

    def value(self, schedule: Schedule) -> float:
        """J by a plain roll; infinite if it is not finite."""
        batches: Iterable[Any] = [kept(batch) for batch in self.batches]
        if self.accumulate > 1:
            batches = map(MicroBatches, zip(*[iter(batches)] * self.accumulate, strict=True))
        self.plant.restore(self.beginning)
        mean = Average(self.average)
        part = schedule.window(0, self.steps)
        trajectory = self.plant.roll(batches, part, average=mean)
        self.spent += len(trajectory)
        if trajectory.diverged is not None:
            self.plant.restore(self.beginning)
            return math.inf
        total = self.stage_weight * sum(float(x.double()) for x in trajectory.losses)
        if self.judged and mean.values is not None:
            with torch.no_grad():
                parameters = [p.detach() for p in self.plant.parameters]
                torch._foreach_copy_(parameters, [v.clone() for v in mean.values])
                with visible_statistics(self.model, update=False):
                    total += float(self.terminal(self.model))
            self.spent += self._share / 3
        self.plant.restore(self.beginning)
        return total if math.isfinite(total) else math.inf

    def terminal(self, model: nn.Module) -> Tensor:
        return target_of(self.plant, self.judged, averaged=self.average is not None)(model)

    @property
    def _share(self) -> float:
        """Size of `judged` relative to a training batch."""
        if not self.judged:
            return 0.0
        size = batch_size(self.batches[0])
        return sum(batch_size(b) for b in self.judged) / max(1, size * self.accumulate)


# Outer passes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OuterPass:
    """A rewrite of the whole schedule: J before and after, replays tried, outcome of the reverse
    pass. clipped: whether exploding costates were clipped."""

    before: float
    value: float
    accepted: bool
    tried: int
    outcome: str
    clipped: bool


def improved(
    episode: Episode,
    schedule: Schedule,
    *,
    passes: int,
    knots: int,
    controls: Sequence[str] = ("lr",),
    step: float = 0.3,
    tell: Callable[[int, OuterPass], None] = lambda number, done: None,
    first: Hypergradient | None = None,
) -> tuple[Schedule, list[OuterPass]]:
    """(the schedule after up to `passes` rewrites along whole-run hypergradients, their records).
    knots: values per control. step: largest move of a knot, in nats or logits; if J does not fall,
    0.3 and 0.09 of it are tried. Passes end at the first that is rejected or unusable. first: the
    known hypergradient of `schedule`."""
    if passes < 1:
        raise InputError(f"passes must be ≥ 1, got {passes}")
    if not 1 <= knots <= episode.steps:
        raise InputError(
            f"knots must be in [1, {episode.steps}] for {episode.steps} steps, got {knots}"
        )
    rule = Rewrite(step={name: step for name in CONTROLS}, knots=knots, cooldown=0.0)
    schedule = schedule.window(0, episode.steps)
    done: list[OuterPass] = []
    scale = 1.0
    for number in range(passes):
        h = first if first is not None and number == 0 else episode.differentiate(schedule)
        clipped = h.result.name == "exploding"
        if clipped:
            h = episode.differentiate(schedule, EXPLODING_CLIP)
        outer = OuterPass(h.value, h.value, False, 0, h.result.name, clipped)
        gradient = {name: h.grad[name] for name in controls if name in h.grad}
        for retry in range(3 if h.result.usable else 0):
            proposed = rule.propose(schedule, gradient, h.value, scale * 0.3**retry).schedule
            value = episode.value(proposed)
            outer = replace(outer, tried=retry + 1)
            if value < h.value:
                schedule = proposed
                outer = replace(outer, value=value, accepted=True)
                scale = min(scale * 0.3**retry * 1.5, 4.0)
                break
        done.append(outer)
        tell(number, outer)
        if not outer.accepted:
            break
    return schedule, done

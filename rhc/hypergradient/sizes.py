"""Measures the memory that a step and a product of a model take, for plans."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rhc.containers import tensors_of
from rhc.data_weights import taken_slopes
from rhc.hypergradient.differences import noting_precision, precision
from rhc.hypergradient.evaluation import (
    Evaluation,
    double_backward,
    parts,
    visible_statistics,
)
from rhc.hypergradient.graphs import GraphMaker, TooMuch
from rhc.hypergradient.hvp import Product, StepPoint, step_vjp
from rhc.hypergradient.kernels import matrices
from rhc.hypergradient.memory_plan import FREE_GRAPHS, PIECES_COST, Sizes
from rhc.hypergradient.support import missing_derivative
from rhc.rng import RandomState
from rhc.training import memory
from rhc.training.batches import batch_size
from rhc.training.module_state import Buffers
from rhc.training.objective import Objective
from rhc.training.plant import Plant
from rhc.training.recovery import out_of_memory

NEVER = 1 << 62
"""Bytes of a graph that cannot be kept."""

SAME_PARTS = 1000
"""Largest relative difference of a batch's gradient and its parts' mean, in machine epsilons."""


class Measured(NamedTuple):
    """Memory in bytes."""

    graph: int
    product: int = 0
    pieces: tuple[tuple[int, int], ...] | None = None  # (n, product in n parts)
    plain: int = 0  # one gradient
    kernels: int = 0  # that oneDNN would keep


def measure_sizes(
    plant: Plant, batch: Any, objective: Objective, product: Product, *, full: bool
) -> Sizes:
    """Memory of one step at the live state, which is restored. full: also a product, any graph."""
    known = known_of(plant)
    key = (product, full, signature(plant, batch), bool(objective.reward_weight))
    if key not in known:
        with _put_back(plant):
            known[key] = _Measuring(plant, batch, objective).sizes(product, full=full)
    return Sizes(
        parameters=_parameter_bytes(plant),
        state=_snapshot_bytes(plant),
        slots=_slot_bytes(plant),
        **known[key]._asdict(),
    )


def measure_pieces(plant: Plant, batch: Any, objective: Objective) -> tuple[tuple[int, int], ...]:
    """(n, bytes that an exact product in n parts of the batch takes), fewer parts first; () where
    the loss is not a mean over rows. The plant is restored."""
    known, key = known_of(plant), _pieces_key(plant, batch, objective)
    if key not in known:
        with _put_back(plant):
            known[key] = _Measuring(plant, batch, objective).pieces()
    return known[key]


def forget_pieces(plant: Plant, batch: Any, objective: Objective) -> None:
    known_of(plant)[_pieces_key(plant, batch, objective)] = ()


def _pieces_key(plant: Plant, batch: Any, objective: Objective) -> tuple[Any, ...]:
    return "pieces", signature(plant, batch), bool(objective.reward_weight)


_KNOWN: WeakKeyDictionary[nn.Module, WeakKeyDictionary[Any, dict[Any, Any]]]
_KNOWN = WeakKeyDictionary()
"""Model -> loss_fn -> what the figures depend on -> what was measured. Repeated calls of
`rhc.hypergradient` would spend a tenth of their time on measuring, and return the heap."""


def known_of(plant: Plant) -> dict[Any, Any]:
    """What was found out about a plant's model and loss, for as long as both live."""
    loss_fn = getattr(plant.loss_fn, "__wrapped__", plant.loss_fn)  # the plant's own wrapper is new
    try:
        return _KNOWN.setdefault(plant.model, WeakKeyDictionary()).setdefault(loss_fn, {})
    except TypeError:  # cannot be hashed, or be referred to weakly
        return {}


def signature(plant: Plant, batch: Any) -> tuple[Any, ...]:
    """All that a product's size depends on, beside model and loss."""
    live = (*plant.parameters, *tensors_of(batch))
    kinds = tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in live)
    return kinds, tuple(m.training for m in plant.model.modules())


@contextmanager
def _put_back(plant: Plant) -> Iterator[None]:
    state = plant.snapshot()
    grads = [p.grad for p in plant.model.parameters()]
    try:
        with plant.hooks.taken():
            yield
    finally:
        plant.restore(state)
        for p, g in zip(plant.model.parameters(), grads, strict=True):
            p.grad = g


class _Measuring:
    def __init__(self, plant: Plant, batch: Any, objective: Objective) -> None:
        self.plant, self.batch, self.objective = plant, batch, objective
        self.evaluation = Evaluation(plant, plant.blocks(), objective)
        self.device = plant.parameters[0].device

    def sizes(self, product: Product, *, full: bool) -> Measured:
        graph = _parameter_bytes(self.plant)
        if product == "exact" and (full or graph <= FREE_GRAPHS):
            # Ranks that share a collective layer must not leave it midway.
            ranks = self.plant.ranks is not None
            graph = self._graph(math.inf if full or ranks else FREE_GRAPHS)
        if not full:
            return Measured(graph)
        if graph <= FREE_GRAPHS:  # a small model: the code of kernels counts, read the first time
            self._one_product(product)
        with matrices.noted() as kept:
            taken, plain = self._one_product(product)
        return Measured(graph, taken, None, plain, kept())

    def _graph(self, enough: float) -> int:
        """Bytes of the graph of one gradient; NEVER if it cannot be kept or exceeds `enough`."""
        self._clear()
        try:
            found = GraphMaker(self.evaluation).survey(self.batch, enough)
        except TooMuch:
            size = NEVER
        except (RuntimeError, MemoryError) as error:
            if missing_derivative(error) is None and not self._too_large(error):
                raise
            size = NEVER
        else:
            size = found.size if found.steady else NEVER
        gc.collect()
        return size

    def _one_product(self, product: Product) -> tuple[int, int]:
        """Bytes of a product, of a gradient."""
        with self._ready():
            try:
                taken, _ = self._product(product)
            except (RuntimeError, MemoryError) as error:
                if self._too_large(error):
                    taken = NEVER
                elif missing_derivative(error) is not None:
                    taken = self._beyond()
                else:
                    raise
            gc.collect()  # cycles may hold what an error has left
            return taken, self._plain

    def pieces(self) -> tuple[tuple[int, int], ...]:
        found = []
        with self._ready():
            if self._draws or not self._may_be_cut():
                return ()
            rounding = SAME_PARTS * torch.finfo(self.plant.parameters[0].dtype).eps
            for pieces in PIECES_COST:
                if min(batch_size(part) for part in parts(self.batch)) < pieces:
                    break
                try:
                    _, discrepancy = self._product("exact", pieces, compare=True)
                    if not discrepancy <= rounding:
                        break
                    taken, _ = self._product("exact", pieces, times=2)
                    found.append((pieces, taken))
                except Exception as error:  # a loss that needs all rows raises any error
                    if not out_of_memory(error):
                        break
                    gc.collect()
        return tuple(found)

    def _may_be_cut(self) -> bool:
        """Whether the loss may be a mean over rows: full precision, one rank, no reward."""
        full = precision(self.plant) <= torch.finfo(torch.float32).eps
        return full and self.plant.ranks is None and not self.objective.reward_weight

    def _too_large(self, error: BaseException) -> bool:
        """Whether the error is exhausted memory, which a budget should prevent."""
        return out_of_memory(error) and self.plant.ranks is None

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Takes gradients at the live state; inside, products can be measured against them."""
        plant, blocks = self.plant, self.evaluation.blocks
        with torch.enable_grad():
            self._clear()
            plant.backward(self.batch)  # warm
            plant.refuse_sparse()
            self._clear()
            memory.trim()  # holes in the heap would hide what is taken
            memory.reset_peak(self.device)
            ground = memory.current_peak(self.device)
            watch = RandomState.capture()
            with noting_precision(plant):
                loss, _ = plant.backward(self.batch)
            self._top = memory.current_peak(self.device)
            self._plain = max(0, self._top - ground)
            self._draws = not watch.same(RandomState.capture())
            gradients = [
                block.flatten([_gradient(p) for p in plant.parameters]) for block in blocks
            ]
            self._clear()
            theta = [block.flatten(plant.parameters) for block in blocks]
            self._point = StepPoint(
                lambda: theta,
                Buffers(plant.model, plant.moved).copies(),
                self.batch,
                None,
                gradients,
                gradients,
                loss=loss.detach(),
                by_weight=taken_slopes(self.batch),
            )
            visible = visible_statistics(plant.model, update=False)
            try:
                with double_backward(plant.model), visible, self.evaluation:
                    yield
            finally:
                del self._point  # the next measurement would use its memory

    def _product(
        self, product: Product, pieces: int = 1, *, compare: bool = False, times: int = 1
    ) -> tuple[int, float]:
        """(Bytes beyond those of a gradient, relative error of its gradient), repeated because
        holes in the heap after the first need not suit the next."""
        memory.trim()
        memory.reset_peak(self.device)
        for _ in range(times):
            found = step_vjp(product, self.evaluation, self._point, compare=compare, pieces=pieces)
        return self._beyond(), found.discrepancy

    def _beyond(self) -> int:
        return max(0, memory.current_peak(self.device) - self._top)

    def _clear(self) -> None:
        for p in self.plant.model.parameters():
            p.grad = None


def _gradient(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def _parameter_bytes(plant: Plant) -> int:
    return sum(p.nbytes for p in plant.parameters if p.requires_grad)


def _snapshot_bytes(plant: Plant) -> int:
    snapshot = plant.snapshot()
    tensors = [*snapshot.parameters.values()]
    tensors += [b for b in snapshot.buffers.values() if b is not None]
    tensors += [v for slots in snapshot.slots for v in slots.values() if isinstance(v, Tensor)]
    total = sum(t.numel() * t.element_size() for t in tensors)
    if not any(snapshot.slots):  # no step was taken yet, and slots are to come
        total *= 2
    return total


def _slot_bytes(plant: Plant) -> int:
    """Bytes of the optimizer's state, now or after the first step."""
    slots = plant.block_slots(plant.blocks())
    held = sum(t.nbytes for own in slots for t in own if isinstance(t, Tensor))
    return held or _parameter_bytes(plant)

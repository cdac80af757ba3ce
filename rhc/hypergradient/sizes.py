"""What a step and a product of a model hold, as measured: what a plan is made of."""

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
from rhc.hypergradient.evaluation import (
    Evaluation,
    Scratch,
    double_backward,
    parts,
    visible_statistics,
)
from rhc.hypergradient.hvp import Product, StepPoint, noting_precision, precision, pull_back
from rhc.hypergradient.kernels import matrices
from rhc.hypergradient.memory_plan import FREE_GRAPHS, PIECES_COST, Sizes
from rhc.hypergradient.record import GraphMaker, TooMuch
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


def measure_sizes(
    plant: Plant, batch: Any, objective: Objective, product: Product, *, full: bool
) -> Sizes:
    """What one step at the live state holds; the plant is put back. full: also a product's peak.

    Without `full`, graphs that could not be kept anyway are not measured.
    """
    known = known_of(plant)
    key = (product, full, signature(plant, batch), bool(objective.reward_weight))
    if key not in known:
        known[key] = _measured_product(plant, batch, objective, product, full=full)
    return Sizes(
        parameters=_parameter_bytes(plant),
        state=_snapshot_bytes(plant),
        slots=_slot_bytes(plant),
        **known[key]._asdict(),
    )


class Measured(NamedTuple):
    """Bytes of a graph, of a product, (how many, of a product in so many parts) where that was
    measured, of a gradient, of what oneDNN would keep."""

    graph: int
    product: int = 0
    pieces: tuple[tuple[int, int], ...] | None = None
    plain: int = 0
    kernels: int = 0


def measure_pieces(plant: Plant, batch: Any, objective: Objective) -> tuple[tuple[int, int], ...]:
    """(n, bytes that an exact product in n parts of the batch takes), fewer parts first.

    () where the loss is not a mean over rows. The plant is put back.
    """
    known, key = known_of(plant), _pieces_key(plant, batch, objective)
    if key not in known:
        with _put_back(plant):
            known[key] = _with_pieces(plant, batch, objective)
    return known[key]


def forget_pieces(plant: Plant, batch: Any, objective: Objective) -> None:
    """The loss is no mean over rows after all."""
    known_of(plant)[_pieces_key(plant, batch, objective)] = ()


def _pieces_key(plant: Plant, batch: Any, objective: Objective) -> tuple[Any, ...]:
    return "pieces", signature(plant, batch), bool(objective.reward_weight)


_KNOWN: WeakKeyDictionary[nn.Module, WeakKeyDictionary[Any, dict[Any, Any]]]
_KNOWN = WeakKeyDictionary()
"""Model -> loss_fn -> what the figures depend on -> what was measured. `rhc.hypergradient`, called
again and again, would spend a tenth of its time on measuring, and hand back its heap."""


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


def _too_large(error: BaseException, plant: Plant) -> bool:
    """Whether this is memory that runs out, which a budget is there to prevent."""
    return out_of_memory(error) and plant.ranks is None


@contextmanager
def _put_back(plant: Plant) -> Iterator[None]:
    """Inside, the live state may be stepped on."""
    state = plant.snapshot()
    grads = [p.grad for p in plant.model.parameters()]
    try:
        with plant.hooks.taken():
            yield
    finally:
        plant.restore(state)
        for p, g in zip(plant.model.parameters(), grads, strict=True):
            p.grad = g


def _measured_product(
    plant: Plant, batch: Any, objective: Objective, product: Product, *, full: bool
) -> Measured:
    """By a step or two at the live state, which is put back."""
    with _put_back(plant):
        graph = _parameter_bytes(plant)
        if product == "exact" and (full or graph <= FREE_GRAPHS):
            for p in plant.model.parameters():
                p.grad = None
            # Ranks that go through a layer of all ranks must not leave it in the middle.
            enough = math.inf if full or plant.ranks is not None else FREE_GRAPHS
            try:
                graph = _graph_bytes(plant, batch, objective, enough)
            except (RuntimeError, MemoryError) as error:
                if missing_derivative(error) is None and not _too_large(error, plant):
                    raise
                graph = NEVER
            gc.collect()
        return _with_product(plant, batch, objective, product, graph) if full else Measured(graph)


def _graph_bytes(plant: Plant, batch: Any, objective: Objective, enough: float) -> int:
    """Bytes that the graph of one step's gradient holds; NEVER where it cannot be kept.

    enough: bytes from which on it is not worth going on.
    """
    make_graph = GraphMaker(Evaluation(plant, plant.blocks(), objective))
    try:
        found = make_graph.survey(batch, enough)
    except TooMuch:
        return NEVER
    return found.size if found.steady else NEVER


def _with_product(
    plant: Plant, batch: Any, objective: Objective, product: Product, size: int
) -> Measured:
    """The most that a Hessian product takes beyond one plain gradient. size: bytes of a graph."""
    if size <= FREE_GRAPHS:  # beside a small model the code of kernels counts, read the first time
        _one_product(plant, batch, objective, product)
    with matrices.noted() as kept:
        taken, plain = _one_product(plant, batch, objective, product)
    return Measured(size, taken, None, plain, kept())


def _one_product(
    plant: Plant, batch: Any, objective: Objective, product: Product
) -> tuple[int, int]:
    """Bytes of a product, of a gradient."""
    with _Probe.on(plant, batch, objective) as probe:
        try:
            taken, _ = probe.product(product)
        except (RuntimeError, MemoryError) as error:
            if _too_large(error, plant):
                taken = NEVER
            elif missing_derivative(error) is not None:
                taken = probe.beyond()
            else:
                raise
        gc.collect()  # what an error has cut off may be held by cycles
        return taken, probe.plain


def _with_pieces(plant: Plant, batch: Any, objective: Objective) -> tuple[tuple[int, int], ...]:
    found = []
    with _Probe.on(plant, batch, objective) as probe:
        if probe.draws or not _may_be_cut(plant, objective):
            return ()
        rounding = SAME_PARTS * torch.finfo(plant.parameters[0].dtype).eps
        for pieces in PIECES_COST:
            if min(batch_size(part) for part in parts(batch)) < pieces:
                break
            try:
                _, discrepancy = probe.product("exact", pieces, compare=True)
                if not discrepancy <= rounding:
                    break
                taken, _ = probe.product("exact", pieces, times=2)
                found.append((pieces, taken))
            except Exception as error:  # a loss that cannot do with fewer rows raises what it likes
                if not out_of_memory(error):
                    break
                gc.collect()
    return tuple(found)


class _Probe:
    """Takes products at the live state, and says how much memory they take.

    plain: bytes of one gradient while it is evaluated. draws: whether it draws random numbers.
    """

    def __init__(self, plant: Plant, batch: Any, objective: Objective) -> None:
        self.device = plant.parameters[0].device
        blocks = plant.blocks()
        for p in plant.model.parameters():
            p.grad = None
        plant.backward(batch)  # warm
        plant.refuse_sparse()
        for p in plant.model.parameters():
            p.grad = None
        memory.trim()  # holes in the heap would hide what is taken
        memory.reset_peak(self.device)
        ground = memory.current_peak(self.device)
        watch = RandomState.capture()
        with noting_precision(plant):
            loss, _ = plant.backward(batch)
        self._top = memory.current_peak(self.device)
        self.plain = max(0, self._top - ground)
        self.draws = not watch.same(RandomState.capture())
        self._gradients = [
            block.flatten([_gradient(p) for p in plant.parameters]) for block in blocks
        ]
        for p in plant.model.parameters():
            p.grad = None
        self._evaluation = Evaluation(plant, blocks, objective)
        theta = [block.flatten(plant.parameters) for block in blocks]
        self._point = StepPoint(
            lambda: theta,
            Buffers(plant.model, plant.moved).copies(),
            batch,
            None,
            self._gradients,
            loss=loss.detach(),
        )
        self._scratch = Scratch(plant, blocks)

    @classmethod
    @contextmanager
    def on(cls, plant: Plant, batch: Any, objective: Objective) -> Iterator[_Probe]:
        with torch.enable_grad():
            probe = cls(plant, batch, objective)
            with (
                double_backward(plant.model),
                visible_statistics(plant.model, update=False),
                probe._scratch,
            ):
                yield probe

    def product(
        self, product: Product, pieces: int = 1, *, compare: bool = False, times: int = 1
    ) -> tuple[int, float]:
        """(bytes beyond those of a gradient, how far its gradient is off).

        times: how often; what a first one leaves behind in the heap need not suit the next.
        """
        memory.trim()
        memory.reset_peak(self.device)
        for _ in range(times):
            pulled = pull_back(
                product,
                self._evaluation,
                self._scratch,
                self._point,
                self._gradients,
                {},
                compare=compare,
                pieces=pieces,
            )
        return self.beyond(), pulled.discrepancy

    def beyond(self) -> int:
        return max(0, memory.current_peak(self.device) - self._top)


def _may_be_cut(plant: Plant, objective: Objective) -> bool:
    """Whether the loss could be a mean over rows, as far as can be seen from here."""
    full = precision(plant) <= torch.finfo(torch.float32).eps
    return full and plant.ranks is None and not objective.reward_weight


SAME_PARTS = 1000
"""Largest relative difference between a batch's gradient and its parts' mean, in machine epsilons.
"""


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
    """Of the optimizer's state as it is, or as it will be after the first step."""
    slots = plant.block_slots(plant.blocks())
    held = sum(t.nbytes for own in slots for t in own if isinstance(t, Tensor))
    return held or _parameter_bytes(plant)

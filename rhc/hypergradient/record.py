"""What a roll remembers for looking back, as a plan has it: in memory, on disk, to roll again."""

from __future__ import annotations

import errno
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from rhc.containers import tensors_of
from rhc.hypergradient import kernels
from rhc.hypergradient.evaluation import (
    Evaluation,
    OnceDifferentiable,
    double_backward,
    graph_nodes,
    is_recurrent,
    visible_statistics,
)
from rhc.hypergradient.hvp import KeptGraph
from rhc.hypergradient.memory_plan import Plan, chunk_bounds, split
from rhc.rng import preserved
from rhc.storage.files import write_all
from rhc.training import memory
from rhc.training.losses import Observed
from rhc.training.module_state import filled
from rhc.training.objective import Objective
from rhc.training.plant import Plant
from rhc.training.recorder import Recorder, moved_by_loss
from rhc.training.snapshot import Snapshot
from rhc.training.trajectory import Block, BlockState, split_gradients, split_states


def kept_states(steps: int, segment: int) -> Callable[[int], bool]:
    """Before which steps the roll keeps the whole state, for a reverse pass with `segment`.

    A segment needs the state at its start. The costate recursion needs every state, but rebuilds
    them from the first one and the roll's gradients, without evaluating the model.
    """
    if segment == 1:
        return lambda i: i == 0
    return lambda i: i < steps and i % segment == 0


@dataclass
class Chunk:
    """Steps [start, stop) of the window, ready to be looked back at.

    states: index of a step -> states before it; at least those of `start`. gradients: of every
    step, from `start` on. graphs: index of a step -> the graph that the roll kept. owned: nobody
    else has these tensors, so that they may be let go, and changed, as soon as they were used.
    alone: index of a step -> the optimizer's states alone.
    """

    start: int
    stop: int
    states: dict[int, list[BlockState]]
    gradients: Sequence[Sequence[Tensor | None]]
    graphs: dict[int, KeptGraph] = field(default_factory=dict)
    owned: bool = False
    alone: dict[int, list[Any]] = field(default_factory=dict)

    @property
    def slots(self) -> dict[int, list[Any]]:
        """Index of a step -> the optimizer's states before it."""
        whole = {i: [s.optimizer for s in states] for i, states in self.states.items()}
        return {**whole, **self.alone}


class WindowRecorder(Recorder):
    """Remembers a window as `plan` has it, and gives it back, last steps first.

    blind: whether steps whose graph is kept need the optimizer's state alone. ceiling: of the heap,
    for whoever looks back. beginning: the whole state before the roll, where it is to be verified.
    """

    def __init__(
        self,
        plant: Plant,
        objective: Objective,
        plan: Plan,
        directory: Path | None = None,
        *,
        blind: bool = False,
        ceiling: memory.Ceiling | None = None,
    ) -> None:
        self.plan = plan
        self.objective = objective
        self.spill = _Spill(directory) if plan.spilled else None
        self.snapshots: dict[int, Snapshot] = {}
        self.beginning: Snapshot | None = None
        self.graphs: dict[int, KeptGraph] = {}
        self.ceiling = ceiling
        self.recomputed = 0
        self._make_graph: GraphMaker | None = None
        self._inside = False
        self._bounds = chunk_bounds(plan.steps, plan.chunk) if plan.chunk else [0]
        self._marks = set(_marks(len(self._bounds) - 1, plan.snapshots)) if plan.chunk else set()
        # The first step whose gradient is in memory after the roll.
        self.first = self._bounds[-2] if plan.chunk else plan.spilled
        every = kept_states(plan.steps, plan.segment)
        first, apart = self.first, plan.states_every or plan.steps
        if plant.hooks.of_tensors:  # nobody else knows what they make of a gradient
            apart = 1
        super().__init__(
            plant,
            plan.steps - first,
            every
            if plan.segment > 1
            else (lambda i: i < plan.steps and i >= first and (i - first) % apart == 0),
            whole=lambda i: not blind or i == first or i < plan.steps - plan.graphs,
        )

    # Forwards ------------------------------------------------------------------------------------

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """To roll inside: kernels for graphs, where every step keeps its own.

        To enter and leave them at every step takes a tenth of a small model's.
        """
        if self.plan.graphs < self.plan.steps:
            yield
            return
        with double_backward(self.plant.model, valued=True):
            self._inside = True
            try:
                yield
            finally:
                self._inside = False

    def before(self, i: int, batch: Any) -> None:
        super().before(i, batch)
        if i in self._bounds and self._bounds.index(i) in self._marks:
            self.snapshots[i] = self.plant.snapshot()
        if i < self.plan.spilled:
            self._state = self.plant.block_states(self.trajectory.blocks)
            self._blocks = self.trajectory.blocks

    def keep(self, i: int, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        if i >= self.first:
            return super().keep(i, gradients)
        if self.spill is not None:
            states = self._state
            if self._blocks != self.trajectory.blocks:  # split by this very step
                states = split_states(self._blocks, states)
            vectors = [_vector(block, gradients) for block in self.trajectory.blocks]
            self.spill.write(i, self.trajectory.blocks, states, vectors)
            del self._state
        return []

    def backward(self, batch: Any) -> Observed:
        """Of steps whose graph the plan keeps, by a graph that stays."""
        plant, blocks = self.plant, self.trajectory.blocks
        i = len(self.trajectory.batches) - 1
        if i < self.plan.steps - self.plan.graphs:
            return super().backward(batch)
        if self._make_graph is None or self._make_graph.blocks is not blocks:
            self._make_graph = GraphMaker(Evaluation(plant, blocks, self.objective))
        try:
            graph, values, buffers, steady = self._make_graph(batch, inside=self._inside)
        except OnceDifferentiable:  # which the reverse pass will meet again, and answer to
            before = self.trajectory.rng[-1]
            if before is not None:
                before.restore()
            return super().backward(batch)
        if steady:
            self.graphs[i] = graph
            # Earlier, what is free would be the room of the next graphs, from the window before.
            if self.ceiling is not None and 4 * len(self.graphs) >= 3 * self.plan.graphs:
                self.ceiling.check_growth()
        indices = (i for block in blocks for i in block.indices)
        close = self.looks_closely(i)
        for index, g, leaf in zip(indices, values, graph.leaves, strict=True):
            p = plant.parameters[index]
            if close and not torch.equal(leaf, p) and bool(leaf.isfinite().all()):
                raise moved_by_loss(self.hooks.names[index])
            p.grad = g
        with torch.no_grad():
            for own, name, live, after in buffers:
                own[name] = after if live is None or after is None else filled(live, after)
        found = graph.evaluated
        metrics = {k: v.detach() for k, v in found.metrics.items()}
        return plant.parallel.average(found.loss.detach(), metrics)

    # Backwards -----------------------------------------------------------------------------------

    def backwards(self) -> Iterator[Chunk]:
        """The window's chunks, last one first.

        The live plant is used to roll chunks again, and put back at the end; it must not be in use
        while the next chunk is asked for.
        """
        trajectory = self.trajectory
        end = len(trajectory)
        if end > self.first:
            yield Chunk(
                self.first,
                end,
                trajectory.states,
                trajectory.gradients[self.first :],
                self.graphs,
                alone=trajectory.slots,
            )
        if self.spill is not None:
            for i in reversed(range(min(end, self.first))):
                yield self._read(i)
        elif self.first:
            trajectory.states.clear()
            trajectory.gradients.clear()
            self.rows.clear()
            live = self.plant.snapshot()
            try:
                yield from self._again(0, len(self._bounds) - 1, self.plan.snapshots - 1, True)
            finally:
                self.plant.restore(live)

    def _read(self, i: int) -> Chunk:
        assert self.spill is not None
        states, gradients = self.spill.read(i, self.trajectory.blocks)
        return Chunk(i, i + 1, {i: states}, [gradients], owned=True)

    @property
    def again(self) -> bool:
        """Whether the window can be gone through more than once."""
        return not self.plan.chunk

    def close(self) -> None:
        """Removes what was spilled."""
        if self.spill is not None:
            self.spill.close()

    def _again(self, first: int, stop: int, free: int, rolled: bool) -> Iterator[Chunk]:
        """Chunks [first, stop), last one first, from the snapshot at `first`: Revolve.

        rolled: the first roll has left its snapshots here, and the window's last chunk is done.
        """
        if stop - first == 1:
            if not rolled:
                yield self._chunk(first)
            self.snapshots.pop(self._bounds[first], None)
            return
        if free == 0:
            for k in reversed(range(first, stop)):
                if rolled and k == stop - 1:
                    continue
                self.plant.restore(self.snapshots[self._bounds[first]])
                self._roll(self._bounds[first], self._bounds[k], None)
                yield self._chunk(k, here=True)
            self.snapshots.pop(self._bounds[first], None)
            return
        middle = first + split(stop - first, free)
        if not rolled:
            self.plant.restore(self.snapshots[self._bounds[first]])
            self._roll(self._bounds[first], self._bounds[middle], None)
            self.snapshots[self._bounds[middle]] = self.plant.snapshot()
        yield from self._again(middle, stop, free - 1, rolled)
        yield from self._again(first, middle, free, False)

    def _chunk(self, k: int, *, here: bool = False) -> Chunk:
        """Chunk k rolled again, from its snapshot or (here) from where the plant is."""
        start, stop = self._bounds[k], self._bounds[k + 1]
        if not here:
            self.plant.restore(self.snapshots[start])
        every = bool(self.plant.hooks.of_tensors)
        recorder = Recorder(
            self.plant, stop - start, lambda i: every or i == 0, blocks=self.trajectory.blocks
        )
        self._roll(start, stop, recorder)
        again = recorder.trajectory
        states = {start + i: own for i, own in again.states.items() if start + i < stop}
        return Chunk(start, stop, states, again.gradients)

    def _roll(self, start: int, stop: int, recorder: Recorder | None) -> None:
        if stop == start:
            return
        trajectory = self.trajectory
        first = trajectory.start
        self.plant.roll(
            trajectory.batches[start:stop],
            trajectory.schedule.window(first + start, first + stop),
            record=recorder,
        )
        self.plant.optimizer.zero_grad()
        self.recomputed += stop - start


def _marks(chunks: int, snapshots: int) -> list[int]:
    """The chunks before which the first roll leaves a snapshot."""
    marks, first, free = [0], 0, snapshots - 1
    while chunks - first > 1 and free > 0:
        first += split(chunks - first, free)
        free -= 1
        marks.append(first)
    return marks


def _vector(block: Block, gradients: Sequence[Tensor | None]) -> Tensor | None:
    parts = [g.reshape(-1) for i in block.indices if (g := gradients[i]) is not None]
    return torch.cat(parts) if parts else None


# Graphs ------------------------------------------------------------------------------------------


class Survey(NamedTuple):
    """What a plant's graphs hold: bytes; the parameters whose values they read again, which is
    whose leaves must be copies; and whether a graph outlives its step."""

    size: int
    read: frozenset[str]
    steady: bool


_SURVEYS: WeakKeyDictionary[Plant, Survey] = WeakKeyDictionary()


BufferAfter = tuple[dict[str, Any], str, Tensor | None, Tensor | None]
"""Where a buffer lies, its name there, the live one, and what the step has made of it."""


class TooMuch(Exception):
    """A graph is larger than is worth measuring."""


class GraphMaker:
    """Makes graphs of a plant's gradient at its live values, which stay when the values move on.

    The model sees leaves of its own in place of its parameters, and copies of its buffers. A leaf
    is a copy where the graph reads its value again; else it shares the live parameter's memory, and
    its count of changes, so that a graph that does read it, for once, says so.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self.blocks = evaluation.blocks
        plant = evaluation.plant
        model = plant.model
        indices = [i for block in self.blocks for i in block.indices]
        place = {id(plant.parameters[i]): n for n, i in enumerate(indices)}
        self._parameters = [plant.parameters[i] for i in indices]
        self._names = [name for block in self.blocks for name in block.names]
        self._recurrent = is_recurrent(model)
        self._owners: list[tuple[dict[str, Any], str, int]] = []
        self._buffers: list[tuple[str, dict[str, Any]]] = []
        for prefix, module in model.named_modules():
            for name, p in module._parameters.items():
                if id(p) in place:
                    self._owners.append((module._parameters, name, place[id(p)]))
            self._buffers.append((f"{prefix}." if prefix else "", module._buffers))

    def __call__(
        self, batch: Any, *, inside: bool = False
    ) -> tuple[KeptGraph, list[Tensor | None], list[BufferAfter], bool]:
        """(graph, gradients, buffers after the step, whether it stays).

        The graph itself holds no gradient's value, since nobody reads it again.

        A model that uses activation checkpointing runs again in the backward pass, with whatever
        parameters it then finds, so that its graph does not outlive the step.

        inside: whether the kernels that can be differentiated twice are in place already.
        """
        read = self.survey(batch).read
        leaves = [
            (p.detach().clone() if name in read else p.detach()).requires_grad_()
            for name, p in zip(self._names, self._parameters, strict=True)
        ]
        graph, found, after, steady = self._graph(batch, leaves, inside)
        return graph, [None if g is None else g.detach() for g in found], after, steady

    def survey(self, batch: Any, enough: float = math.inf) -> Survey:
        """Of a graph that is made the first time, and dropped; TooMuch beyond `enough` bytes."""
        plant = self.evaluation.plant
        if plant not in _SURVEYS:
            with torch.enable_grad(), preserved(), plant.untouched():
                _SURVEYS[plant] = self._survey(batch, enough)
        return _SURVEYS[plant]

    def _survey(self, batch: Any, enough: float) -> Survey:
        plant = self.evaluation.plant
        leaves = [p.detach().clone().requires_grad_() for p in self._parameters]
        place = {
            leaf.untyped_storage().data_ptr(): name
            for name, leaf in zip(self._names, leaves, strict=True)
        }
        held = [*plant.parameters, *plant.model.buffers(), *tensors_of(batch)]
        own = {t.untyped_storage().data_ptr() for t in held if t.layout == torch.strided}
        seen: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if t.layout != torch.strided:  # has no storage; the recorder will refuse it by name
                return t
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
                if sum(seen.values()) > enough:
                    raise TooMuch
            return t.detach()  # the tensor itself could hold the node that holds it

        try:
            with saved_tensors_hooks(pack, lambda t: t):
                _, found, _, steady = self._graph(batch, leaves)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):  # torch.func has none
                raise
            return Survey(0, frozenset(self._names), False)
        read = frozenset(name for pointer, name in place.items() if pointer in seen)
        size = sum(seen.values())
        for node in graph_nodes([g for g in found if g is not None]):
            function = getattr(type(node), "_forward_cls", None)
            if function is not None and not function.__module__.startswith(kernels.__name__):
                # It may keep tensors where nobody sees them.
                copies = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
                return Survey(size + copies, frozenset(self._names), steady)
        return Survey(size, read, steady)

    def _graph(
        self, batch: Any, flat: list[Tensor], inside: bool = False
    ) -> tuple[KeptGraph, Sequence[Tensor | None], list[BufferAfter], bool]:
        """(graph, gradients with their graph, buffers, whether it stays) at these leaves."""
        evaluation = self.evaluation
        model = evaluation.plant.model
        names = set(evaluation.statistics_names)
        statistics: dict[str, Tensor] = {}
        copies: dict[int, Tensor] = {}
        buffers = [
            (own, name, prefix + name, live)
            for prefix, own in self._buffers
            if own
            for name, live in own.items()
        ]
        for _, _, full, live in buffers:
            if live is not None and id(live) not in copies:
                copies[id(live)] = live.detach().clone()
                if full in names:
                    statistics[full] = copies[id(live)].requires_grad_()
        visible = visible_statistics(model, update=True) if names else nullcontext()
        kernels_of_two: AbstractContextManager[None] = (
            nullcontext()
            if inside
            else double_backward(model, valued=True, recurrent=self._recurrent)
        )
        versions = [leaf._version for leaf in flat]
        with kernels_of_two, visible, _checkpointing() as used:
            try:
                for owner, name, n in self._owners:
                    owner[name] = flat[n]
                for owner, name, _, live in buffers:
                    if live is not None:
                        owner[name] = copies[id(live)]
                joint = bool(names) or bool(evaluation.objective.reward_weight)
                evaluated = evaluation.of_model(
                    model, batch, statistics=bool(names), twice=True, stage=joint
                )
                for name, leaf, version in zip(self._names, flat, versions, strict=True):
                    if leaf._version != version:
                        raise moved_by_loss(name)
                found = torch.autograd.grad(
                    evaluated.loss, flat, create_graph=True, allow_unused=True
                )
                after = [
                    (owner, name, live, None if new is None else new.detach())
                    for owner, name, _, live in buffers
                    for new in (owner.get(name),)
                ]
            finally:
                for owner, name, n in self._owners:
                    owner[name] = self._parameters[n]
                for owner, name, _, live in buffers:
                    owner[name] = live
        edges = [None if g is None or not g.requires_grad else _edge(g) for g in found]
        return (
            KeptGraph(flat, statistics, edges, evaluated),
            found,
            after,
            not used,
        )


def _edge(g: Tensor) -> GradientEdge:
    """Where the graph of g begins. Nodes of C++ need none of get_gradient_edge's care."""
    node: Any = g.grad_fn
    if node is None or isinstance(node, torch._C._FunctionBase):
        return get_gradient_edge(g)
    return GradientEdge(node, g.output_nr)


@contextmanager
def _checkpointing() -> Iterator[list[bool]]:
    """A list that gets an entry for every use of torch.utils.checkpoint inside."""
    module: Any = torch.utils.checkpoint
    name = "_checkpoint_without_reentrant_generator"
    used: list[bool] = []
    original = getattr(module, name, None)
    if original is None:
        yield used
        return

    def noticed(*args: Any, **kwargs: Any) -> Any:
        used.append(True)
        return original(*args, **kwargs)

    setattr(module, name, noticed)
    try:
        yield used
    finally:
        setattr(module, name, original)


# Disk --------------------------------------------------------------------------------------------


class _Spill:
    """States and gradients on disk, one file per step: the tensors' bytes, one after the other.

    They are read into memory of their own, tensor by tensor. Tensors that are views of a mapped
    file keep all of it resident for as long as one of them is there.
    """

    def __init__(self, directory: Path | None) -> None:
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix="rhc-window-", dir=directory))
        self.rest: dict[int, tuple[tuple[Block, ...], list[_Written]]] = {}

    def write(
        self,
        i: int,
        blocks: tuple[Block, ...],
        states: Sequence[BlockState],
        gradients: Sequence[Tensor | None],
    ) -> None:
        written = []
        with self._file(i).open("wb", buffering=0) as file:
            for state, g in zip(states, gradients, strict=True):
                slots = state.optimizer._asdict()
                tensors = {n: v for n, v in slots.items() if isinstance(v, Tensor)}
                plain = {n: v for n, v in slots.items() if n not in tensors}
                stored = [state.parameters, *([] if g is None else [g]), *tensors.values()]
                for t in stored:
                    write_all(file.fileno(), memoryview(_bytes_of(t.detach().cpu().contiguous())))
                kinds = [(t.shape, t.dtype, t.device) for t in stored]
                written.append(
                    _Written(type(state.optimizer), plain, list(tensors), g is not None, kinds)
                )
        self.rest[i] = (blocks, written)

    def read(
        self, i: int, blocks: tuple[Block, ...]
    ) -> tuple[list[BlockState], list[Tensor | None]]:
        """States and gradients of step i for `blocks`."""
        written, rest = self.rest[i]
        states, gradients = [], list[Tensor | None]()
        with self._file(i).open("rb", buffering=0) as file:
            for kind, plain, names, graded, kinds in rest:
                own = [_read(file, *k) for k in kinds]
                theta = own.pop(0)
                gradients.append(own.pop(0) if graded else None)
                slots = dict(zip(names, own, strict=True))
                states.append(BlockState(theta, kind(**plain, **slots)))
        if written != blocks:
            states = split_states(written, states)
            gradients = split_gradients(written, gradients)
        return states, gradients

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, i: int) -> Path:
        return self.path / f"step-{i:08d}"


class _Written(NamedTuple):
    """What a file has of a block: the optimizer's state but for its tensors, the names of those,
    whether there is a gradient, and (shape, type, device) of parameters, gradient and slots."""

    kind: Callable[..., Any]
    plain: dict[str, Any]
    names: list[str]
    graded: bool
    kinds: list[tuple[torch.Size, torch.dtype, torch.device]]


def _bytes_of(t: Tensor) -> Any:
    return t.reshape(-1).view(torch.uint8).numpy()


def _read(file: Any, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    t = torch.empty(shape, dtype=dtype)
    room = memoryview(_bytes_of(t))
    while len(room):
        count = file.readinto(room)
        if not count:
            raise OSError(errno.EIO, "a spilled state is cut off", str(file.name))
        room = room[count:]
    return t.to(device)

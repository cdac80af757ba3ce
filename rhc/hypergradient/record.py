"""What a roll keeps for the reverse pass under a plan: in memory, on disk, or to roll again."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rhc.containers import mapped
from rhc.hypergradient.evaluation import Evaluation, OnceDifferentiable, double_backward
from rhc.hypergradient.graphs import GraphMaker
from rhc.hypergradient.hvp import KeptGraph
from rhc.hypergradient.memory_plan import Plan
from rhc.hypergradient.revolve import actions, chunk_bounds, first_snapshots
from rhc.storage.files import write_all
from rhc.training import memory
from rhc.training.losses import Observed
from rhc.training.objective import Objective
from rhc.training.plant import Plant
from rhc.training.recorder import Recorder, moved_by_loss
from rhc.training.snapshot import Snapshot
from rhc.training.trajectory import Block, BlockState, split_gradients, split_states


@dataclass
class Chunk:
    """Steps [start, stop) of the window, ready to be differentiated."""

    start: int
    stop: int
    states: dict[int, list[BlockState]]  # step -> states before it; `start` with θ
    gradients: Sequence[Sequence[Tensor | None]]  # of every step, from `start` on
    graphs: dict[int, KeptGraph] = field(default_factory=dict)
    owned: bool = False  # may be changed and freed after use


class WindowRecorder(Recorder):
    """Stores a window as `plan` says, and returns it in chunks, last steps first.

    without_theta: steps with a kept graph need the optimizer's state alone. ceiling: of the heap,
    for the reverse pass. beginning: the whole state before the roll, for verification. shared:
    whether several passes go through, each with the same graphs.
    """

    def __init__(
        self,
        plant: Plant,
        objective: Objective,
        plan: Plan,
        directory: Path | None = None,
        *,
        without_theta: bool = False,
        ceiling: memory.Ceiling | None = None,
        shared: bool = False,
    ) -> None:
        self.plan, self.shared = plan, shared
        self.objective = objective
        self.without_theta = without_theta
        self.spill = _Spill(directory) if plan.spilled else None
        self.snapshots: dict[int, Snapshot] = {}
        self.beginning: Snapshot | None = None
        self.graphs: dict[int, KeptGraph] = {}
        self.ceiling = ceiling
        self.recomputed = 0
        self._make_graph: GraphMaker | None = None
        self._inside = False
        self._bounds, self._marks = [0], list[int]()
        if plan.chunk:
            self._bounds = chunk_bounds(plan.steps, plan.chunk)
            self._marks = first_snapshots(len(self._bounds) - 1, plan.snapshots)
        # The first step whose gradient is in memory after the roll.
        self.first = self._bounds[-2] if plan.chunk else plan.spilled
        first, apart = self.first, plan.states_every or plan.steps
        if plant.hooks.of_tensors:  # nobody else knows what they make of a gradient
            apart = 1
        super().__init__(
            plant,
            plan.steps - first,
            lambda i: first <= i < plan.steps and (i - first) % apart == 0,
            whole=lambda i: not without_theta or i == first or i < plan.steps - plan.graphs,
        )

    # Forwards ------------------------------------------------------------------------------------

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """To roll inside: kernels for graphs, where every step keeps its own. Entering them at
        every step takes a tenth of a small model's."""
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
        """Takes the gradient by a graph that stays, for steps whose graph the plan keeps."""
        plant, blocks = self.plant, self.trajectory.blocks
        i = len(self.trajectory.batches) - 1
        if i < self.plan.steps - self.plan.graphs:
            return super().backward(batch)
        if self._make_graph is None or self._make_graph.blocks is not blocks:
            self._make_graph = GraphMaker(Evaluation(plant, blocks, self.objective))
        try:
            made = self._make_graph(batch, inside=self._inside)
        except OnceDifferentiable:  # the reverse pass will meet it again, and handle it
            before = self.trajectory.rng[-1]
            if before is not None:
                before.restore()
            return super().backward(batch)
        if made.steady:
            self.graphs[i] = made.graph
            # Memory freed earlier by the previous window holds the next graphs.
            if self.ceiling is not None and 4 * len(self.graphs) >= 3 * self.plan.graphs:
                self.ceiling.check_growth()
        indices = (i for block in blocks for i in block.indices)
        close = self.looks_closely(i)
        for index, g, leaf in zip(indices, made.gradients, made.graph.leaves, strict=True):
            p = plant.parameters[index]
            if close and not torch.equal(leaf, p) and bool(leaf.isfinite().all()):
                raise moved_by_loss(self.hooks.names[index])
            p.grad = g
        made.write_buffers()
        found = made.graph.evaluated
        metrics = {k: v.detach() for k, v in found.metrics.items()}
        return plant.parallel.average(found.loss.detach(), metrics)

    # Backwards -----------------------------------------------------------------------------------

    def backwards(self) -> Iterator[Chunk]:
        """The window's chunks, last first; uses the live plant, and restores it at the end."""
        trajectory = self.trajectory
        end = len(trajectory)
        if end > self.first:
            yield Chunk(
                self.first,
                end,
                trajectory.states,
                trajectory.gradients[self.first :],
                self.graphs,
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
                yield from self._again()
            finally:
                self.plant.restore(live)

    def _read(self, i: int) -> Chunk:
        assert self.spill is not None
        states, gradients = self.spill.read(i, self.trajectory.blocks)
        return Chunk(i, i + 1, {i: states}, [gradients], owned=True)

    @property
    def again(self) -> bool:
        """Whether the window can be traversed more than once."""
        return not self.plan.chunk

    def close(self) -> None:
        if self.spill is not None:
            self.spill.close()

    def _again(self) -> Iterator[Chunk]:
        """The chunks before the last one, rolled again."""
        plant, bounds, at = self.plant, self._bounds, 0
        for kind, k in actions(len(bounds) - 1, self.plan.snapshots):
            if kind == "restore":
                at = bounds[k]
                plant.restore(self.snapshots[at])
            elif kind == "advance":
                self._roll(at, bounds[k], None)
                at = bounds[k]
            elif kind == "keep":
                self.snapshots[at] = plant.snapshot()
            elif kind == "record":
                yield self._chunk(k)
            else:
                del self.snapshots[bounds[k]]

    def _chunk(self, k: int) -> Chunk:
        """Chunk k rolled again, from where the plant is."""
        start, stop = self._bounds[k], self._bounds[k + 1]
        every = bool(self.plant.hooks.of_tensors)
        recorder = Recorder(
            self.plant, stop - start, lambda i: every or i == 0, blocks=self.trajectory.blocks
        )
        self._roll(start, stop, recorder)
        again = recorder.trajectory
        states = {start + i: own for i, own in again.states.items() if start + i < stop}
        return Chunk(start, stop, states, again.gradients)

    def _roll(self, start: int, stop: int, recorder: Recorder | None) -> None:
        trajectory = self.trajectory
        first = trajectory.start
        self.plant.roll(
            trajectory.batches[start:stop],
            trajectory.schedule.window(first + start, first + stop),
            record=recorder,
        )
        self.plant.optimizer.zero_grad()
        self.recomputed += stop - start


def _vector(block: Block, gradients: Sequence[Tensor | None]) -> Tensor | None:
    parts = [g.reshape(-1) for i in block.indices if (g := gradients[i]) is not None]
    return torch.cat(parts) if parts else None


# Disk --------------------------------------------------------------------------------------------


class _OnDisk(NamedTuple):
    """The placeholder of a tensor that lies in a file."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class _Spill:
    """States and gradients on disk, one file of raw bytes per step, read into new memory: views of
    a mapped file would keep all of it resident."""

    def __init__(self, directory: Path | None) -> None:
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix="rhc-window-", dir=directory))
        self.rest: dict[int, tuple[tuple[Block, ...], Any]] = {}

    def write(
        self,
        i: int,
        blocks: tuple[Block, ...],
        states: Sequence[BlockState],
        gradients: Sequence[Tensor | None],
    ) -> None:
        with self._file(i).open("wb", buffering=0) as file:

            def written(value: Any) -> Any:
                if not isinstance(value, Tensor):
                    return mapped(written, value)
                t = value.detach().cpu().contiguous()
                write_all(file.fileno(), memoryview(_bytes_of(t)))
                return _OnDisk(value.shape, value.dtype, value.device)

            self.rest[i] = blocks, written((states, gradients))

    def read(
        self, i: int, blocks: tuple[Block, ...]
    ) -> tuple[list[BlockState], list[Tensor | None]]:
        written, rest = self.rest[i]
        with self._file(i).open("rb", buffering=0) as file:

            def back(value: Any) -> Any:
                return _read(file, value) if isinstance(value, _OnDisk) else mapped(back, value)

            states, gradients = back(rest)
        if written != blocks:
            states = split_states(written, states)
            gradients = split_gradients(written, gradients)
        return states, gradients

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, i: int) -> Path:
        return self.path / f"step-{i:08d}"


def _bytes_of(t: Tensor) -> Any:
    return t.reshape(-1).view(torch.uint8).numpy()


def _read(file: Any, known: _OnDisk) -> Tensor:
    t = torch.empty(known.shape, dtype=known.dtype)
    left = memoryview(_bytes_of(t))
    while len(left):
        count = file.readinto(left)
        if not count:
            raise OSError(errno.EIO, "a spilled state is cut off", str(file.name))
        left = left[count:]
    return t.to(known.device)

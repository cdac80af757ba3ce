"""Recording of a roll: memory for gradients, and checks that a reverse pass can represent it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rhc.data_weights import taken_slopes
from rhc.errors import Unseen
from rhc.rng import RandomState
from rhc.training.batches import DrawnAsNeeded, MicroBatches
from rhc.training.hooks import watched_inside
from rhc.training.losses import Observed
from rhc.training.module_state import Attributes, Buffers, Captured
from rhc.training.trajectory import Block, HiddenState, StepRecord, Trajectory

if TYPE_CHECKING:
    from rhc.training.plant import Plant

SLAB = 2**24
"""Bytes allocated at a time on a CPU: half of the size that glibc always maps."""


class Recorder:
    """Keeps what a reverse pass needs on the roll's trajectory; subclasses may store it elsewhere.
    steps: whose gradients are kept. states(i): whether to keep the state before the i-th step (i =
    K: the end); whole(i): all of it, or the optimizer's alone. blocks: None for the plant's."""

    trajectory: Trajectory

    def __init__(
        self,
        plant: Plant,
        steps: int,
        states: Callable[[int], bool],
        blocks: tuple[Block, ...] | None = None,
        whole: Callable[[int], bool] = lambda i: True,
    ) -> None:
        self.plant = plant
        self.states, self.whole = states, whole
        self.blocks = blocks
        self.hooks = plant.hooks
        self.rows = Rows(steps)
        self._scalars = Rows(0)
        self._random: RandomState | None = None
        # Modules stay, buffers may not. Finding them takes 50 µs a step of a small model.
        self._buffers = Buffers(plant.model, plant.moved)
        self._attributes = Attributes(plant.model)
        self._counted: list[Captured] = []
        self._untrained = plant.untrained
        self._versions: list[int] = []
        self._norms: list[Tensor] = []

    def begin(self, trajectory: Trajectory) -> None:
        trajectory.blocks = self.plant.blocks() if self.blocks is None else self.blocks
        trajectory.hooks = self.hooks
        self.trajectory = trajectory
        self._scalars = Rows(len(trajectory.schedule))

    def before(self, i: int, batch: Any) -> None:
        plant, trajectory = self.plant, self.trajectory
        if self.states(i):
            trajectory.states[i] = plant.block_states(trajectory.blocks, theta=self.whole(i))
        trajectory.batches.append(batch)
        if i == 1:
            self._find_moved()
        self._note_randomness()
        self._counted.append(self._attributes.capture(plant.counted))
        trajectory.buffers.append(self._buffers.copies())
        if i == 0 and plant.moved is None:
            trajectory.buffers[0] |= {n: p.detach().clone() for n, p in self._untrained.items()}
        self._versions = [p._version for p in plant.watched]
        self._norms = self._take_norms() if self.looks_closely(i) else []

    def backward(self, batch: Any) -> Observed:
        return self.plant.backward(batch)

    def watching(self) -> AbstractContextManager[Any]:
        """Around a step's loss and its backward pass."""
        if len(self.trajectory.batches) > 1:
            return self.hooks.taken()
        stack = ExitStack()
        stack.enter_context(self.hooks.taken())
        stack.enter_context(watched_inside(self.plant.model))
        return stack

    def keep_gradients(self) -> None:
        plant, trajectory = self.plant, self.trajectory
        self._refuse_moved()
        plant.refuse_sparse(slots=False)
        gradients = [p.grad for p in plant.parameters]
        if any(block.is_split_by(gradients) for block in trajectory.blocks):
            plant.singletons = True  # from now on, so that this rarely happens twice
            trajectory.split_blocks()
        trajectory.gradients.append(self.keep(len(trajectory.gradients), gradients))
        trajectory.by_weight.append(taken_slopes(trajectory.batches[-1]))
        self.hooks.run()
        several = isinstance(trajectory.batches[-1], (MicroBatches, DrawnAsNeeded))
        if self.hooks.acting and (several or plant.ranks is not None):
            raise Unseen(
                f"hooks of parameter {self.hooks.acting!r} change its gradient at every "
                "micro-batch or rank, and hypergradients see their mean; use accumulate=1 and one "
                "process, or do without them (rewrite=False)"
            )

    def keep(self, i: int, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradients of step i as kept, one vector per block; [] for none."""
        kept: list[Tensor | None] = []
        for block in self.trajectory.blocks:
            parts = [g.reshape(-1) for i in block.indices if (g := gradients[i]) is not None]
            if not parts:
                kept.append(None)
                continue
            row = self.rows.take(block.indices, parts[0], (sum(block.sizes),))
            kept.append(torch.cat(parts, out=row))
        return kept

    def keep_observed(self, observed: StepRecord) -> StepRecord:
        """The record with its numbers moved to the memory of all steps."""
        metrics = {name: self._scalar(name, value) for name, value in observed.metrics.items()}
        return StepRecord(self._scalar(None, observed.loss), metrics, observed.gradient_norm)

    def _scalar(self, name: str | None, value: Tensor) -> Tensor:
        return value if value.dim() else self._scalars.take(name, value, ()).copy_(value)

    def end(self) -> None:
        plant, trajectory = self.plant, self.trajectory
        self._note_randomness()
        trajectory.rng.pop()
        self._find_moved()
        if plant.counted:
            trajectory.rng = [
                HiddenState(rng, counted.only(plant.counted))  # type: ignore[arg-type]
                for rng, counted in zip(trajectory.rng, self._counted, strict=True)
            ]
        n = len(trajectory)
        if trajectory.diverged is None and self.states(n):
            trajectory.states[n] = plant.block_states(trajectory.blocks)

    def _note_randomness(self) -> None:
        """Keeps the random state, and drops the one before if nothing was drawn since."""
        before = self._random or RandomState.capture()
        now = self._random = before.now()
        rng = self.trajectory.rng
        if rng and now is before:
            rng[-1] = None
        rng.append(now)

    def _find_moved(self) -> None:
        """Finds what the plant's first recorded step changed besides trained parameters."""
        plant, first = self.plant, self.trajectory.buffers[0]
        if plant.counted is None:
            plant.counted = self._counted[0].moved(self._attributes.capture())
        if plant.moved is None:
            for name, p in self._untrained.items():
                if torch.equal(p, first[name]):  # type: ignore[arg-type]
                    del first[name]
            plant.moved = {n: p for n, p in self._untrained.items() if n in first}
            self._buffers.moved = plant.moved

    def looks_closely(self, i: int) -> bool:
        """Whether step i is compared by values: the window's first and last one."""
        return i in (0, len(self.trajectory.schedule) - 1)

    def _take_norms(self) -> list[Tensor]:
        watched = [p.detach() for p in self.plant.watched]
        return list(torch._foreach_norm(watched)) if watched else []

    def _refuse_moved(self) -> None:
        """Raises Unseen where loss_fn changed parameters that the optimizer trains."""
        watched = self.plant.watched
        moved = [a != p._version for a, p in zip(self._versions, watched, strict=True)]
        if self._norms:  # writing to .data counts no versions
            pairs = zip(self._norms, self._take_norms(), strict=True)
            moved = [bool(b.isfinite()) and a.item() != b.item() for a, b in pairs]
        names = [n for n, m in zip(self.hooks.names, moved, strict=True) if m]
        if names:
            raise moved_by_loss(names[0])


class Rows:
    """Memory for what every step of a roll keeps: the next of `steps` rows, by key.

    Allocated at once: many long-lived tensors between short-lived ones fragment the heap, +60 MB on
    a GPT of 0.6 M parameters with K = 25. On a CPU in slabs that glibc takes from its heap: larger
    ones are mapped and faulted in for every window, 1.4 ms of a 125 ms step of that GPT.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._free: dict[Any, Iterator[Tensor]] = {}

    def take(self, key: Any, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A row of this shape, of the type and device of `like`."""
        kind = key, like.dtype, like.device
        if kind not in self._free:
            self._free[kind] = self._rows(like, shape)
        return next(self._free[kind])

    def _rows(self, like: Tensor, shape: tuple[int, ...]) -> Iterator[Tensor]:
        rows = self.steps
        if like.device.type == "cpu":
            rows = max(1, SLAB // max(1, math.prod(shape) * like.element_size()))
        slabs = [
            like.new_empty((min(rows, self.steps - first), *shape))
            for first in range(0, self.steps, rows)
        ]
        return iter([row for slab in slabs for row in slab.unbind()])

    def clear(self) -> None:
        self._free.clear()


def moved_by_loss(name: str) -> Unseen:
    return Unseen(
        f"loss_fn changes parameter {name!r} in place (clamp_, .data, Embedding(max_norm=…)), "
        "which hypergradients cannot see through; compute what it is to be inside the model "
        "(torch.nn.utils.parametrize), or do without them (rewrite=False)"
    )

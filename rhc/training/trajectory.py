"""The record of a roll for the reverse pass; parameters that step alike form one `Block`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from rhc.rng import RandomState
from rhc.schedule import Schedule
from rhc.training.hooks import Hooks
from rhc.training.module_state import Captured


@dataclass(frozen=True)
class Block:
    """Parameters that step together. indices: positions in the optimizer's parameter order."""

    group: int
    indices: tuple[int, ...]
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    sizes: tuple[int, ...]

    def views(self, flat: Tensor) -> list[Tensor]:
        if len(self.sizes) == 1:
            return [flat.view(self.shapes[0])]
        return list(_unflatten_dense_tensors(flat, _templates(self.shapes)))

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """The concatenated elements of one tensor per parameter of the optimizer: always a copy."""
        return torch.cat([tensors[i].detach().reshape(-1) for i in self.indices])

    def is_split_by(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether some, but not all, of its parameters have a gradient."""
        missing = sum(gradients[i] is None for i in self.indices)
        return 0 < missing < len(self.indices)

    def singles(self) -> list[Block]:
        members = zip(self.indices, self.names, self.shapes, self.sizes, strict=True)
        return [Block(self.group, (i,), (n,), (shape,), (size,)) for i, n, shape, size in members]


@functools.cache
def _templates(shapes: tuple[torch.Size, ...]) -> list[Tensor]:
    return [torch.empty(shape, device="meta") for shape in shapes]


@dataclass
class BlockState:
    """θ and the optimizer's state of one block, flattened; parameters None if not kept."""

    parameters: Tensor | None
    optimizer: Any


@dataclass(frozen=True)
class HiddenState:
    """What a step reads and moves besides tensors. rng: None where it draws nothing."""

    rng: RandomState | None
    attributes: Captured

    def restore(self) -> None:
        if self.rng is not None:
            self.rng.restore()
        self.attributes.restore()


@dataclass(frozen=True)
class StepRecord:
    """Loss and metrics before an update, and the raw gradient's norm, a tensor on accelerators."""

    loss: Tensor
    metrics: dict[str, Tensor]
    gradient_norm: float | Tensor


@dataclass
class Trajectory:
    """A roll of K steps from absolute step `start`. diverged: index of the first step whose loss
    was not finite or above the limit.

    If recorded: states: index -> one BlockState per block. gradients: per step one vector per
    block, before parameter hooks, or None. batches, buffers, rng: before each step; rng None where
    it draws nothing. by_weight: per step dℓ/dŵ of each micro-batch's rows, where rows are weighed.
    """

    start: int
    schedule: Schedule
    blocks: tuple[Block, ...]
    batches: list[Any] = field(default_factory=list)
    states: dict[int, list[BlockState]] = field(default_factory=dict)
    gradients: list[list[Tensor | None]] = field(default_factory=list)
    by_weight: list[list[Tensor]] = field(default_factory=list)
    buffers: list[dict[str, Tensor | None]] = field(default_factory=list)
    rng: list[RandomState | HiddenState | None] = field(default_factory=list)
    hooks: Hooks | None = None
    losses: list[Tensor] = field(default_factory=list)
    metrics: list[dict[str, Tensor]] = field(default_factory=list)
    gradient_norms: list[float | Tensor] = field(default_factory=list)
    diverged: int | None = None

    def __len__(self) -> int:
        return len(self.losses)

    def split_blocks(self) -> None:
        """Makes every parameter a block of its own, also in what was recorded."""
        self.states = {
            i: split_states(self.blocks, states)
            for i, states in self.states.items()
            # Those without θ can be made of the others again.
            if all(state.parameters is not None for state in states)
        }
        self.gradients = [split_gradients(self.blocks, g) for g in self.gradients]
        self.blocks = tuple(single for block in self.blocks for single in block.singles())


def split_gradients(
    blocks: Sequence[Block], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    return [
        part
        for block, g in zip(blocks, gradients, strict=False)  # [] where they were not kept
        for part in ([None] * len(block.sizes) if g is None else g.split(block.sizes))
    ]


def split_states(blocks: Sequence[Block], states: Sequence[BlockState]) -> list[BlockState]:
    result = []
    for block, state in zip(blocks, states, strict=True):
        assert state.parameters is not None
        total = sum(block.sizes)
        slots = [
            v.split(block.sizes)
            if isinstance(v, Tensor) and v.shape == (total,)
            else [v] * len(block.sizes)
            for v in state.optimizer
        ]
        kind = type(state.optimizer)
        result += [
            BlockState(part, kind(*(slot[i] for slot in slots)))
            for i, part in enumerate(state.parameters.split(block.sizes))
        ]
    return result

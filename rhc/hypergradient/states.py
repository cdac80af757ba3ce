"""The states of a window's steps in reverse order, made of the few that were kept.

They are rebuilt from kept ones by the roll's gradients, elementwise (`Rebuilt`). Where a step's
graph is there, the optimizer's part of a state is enough; and where that part after a step says
all of the step, it takes the gradient's own place in memory (`Folded`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from rhc.optimizers import Fold
from rhc.training.trajectory import BlockState

SMALL_STATES = 8 * 2**20
"""Bytes of rebuilt states that are kept at a time without a thought."""


class Before(NamedTuple):
    """What a step's vjp through Φ needs, per block.

    states: before it, of parameters None where Φ does not read θ. theta: gives θ all the same.
    after: the optimizer's states after it, where these lie in the gradients' place.
    """

    states: Sequence[BlockState]
    theta: Callable[[], Sequence[Tensor]]
    after: Sequence[Any] | None = None


class Rebuilt:
    """The states of a window in reverse order, rebuilt from the kept ones by `advance`.

    A state costs the memory of parameters and optimizer slots, `advance` a few elementwise passes.
    Where all states up to the one asked for take no more than `small` bytes, or are no more than
    `apart`, all are kept on the way there; otherwise only those at 2/3 of the way, at 2/3 of the
    rest, and so on, which bounds them by log3 K + 1 at about log3 K passes a step (recursive
    checkpointing, Griewank 1992).

    theta(i): θ_i, where the states are without.
    """

    def __init__(
        self,
        kept: Mapping[int, Sequence[BlockState]],
        advance: Callable[[int, Sequence[BlockState]], Sequence[BlockState]],
        apart: int = 0,
        small: int = 0,
        theta: Callable[[int], Sequence[Tensor]] | None = None,
    ) -> None:
        self.states = dict(kept)
        self.advance, self._theta = advance, theta
        first = next(iter(kept.values()))
        self.size = sum(t.numel() * t.element_size() for s in first for t in float_tensors(s))
        self.affordable = max(1, apart, small // max(1, self.size))

    def before(self, i: int) -> Before:
        states = self.take(i)
        if self._theta is not None:
            return Before(states, partial(self._theta, i))
        theta = [s.parameters for s in states if s.parameters is not None]
        return Before(states, lambda: theta)

    def take(self, i: int) -> Sequence[BlockState]:
        """The states of step i; those of later steps must have been taken."""
        start = max(k for k in self.states if k <= i)
        states = self.states[start]
        milestone = start
        for k in range(start, i):
            states = self.advance(k, states)
            if i - start <= self.affordable or 3 * (k + 1 - milestone) >= 2 * (i - milestone):
                milestone = k + 1
                self.states[k + 1] = states
        return self.states.pop(i)

    def done(self, i: int) -> None:
        """Called when step i was differentiated."""


class Folded:
    """The optimizer's states of steps [start, stop), in the memory of their gradients.

    first: those before `start`. gradients: of every step, per block. moved(i): (block, how it
    folds) for the blocks that step i moved. theta(i): θ_i, made of the gradients.
    """

    def __init__(
        self,
        start: int,
        first: list[Any],
        gradients: Sequence[Sequence[Tensor | None]],
        moved: Callable[[int], Iterator[tuple[int, Fold]]],
        theta: Callable[[int], Sequence[Tensor]],
    ) -> None:
        self.start, self.gradients, self.moved = start, gradients, moved
        self.theta = theta
        # Index of a step -> the states before it, and after the last of those that are folded.
        self.slots: dict[int, list[Any]] = {start: first}
        self.folded = start  # the steps up to this one are

    @contextmanager
    def folding(self) -> Iterator[Folded]:
        """Inside, a gradient comes back, to rounding, when its step is done; at the end, all."""
        try:
            self._fold(self.start + len(self.gradients))
            yield self
        finally:
            self.done(self.start)

    def before(self, i: int) -> Before:
        states = [BlockState(None, slots) for slots in self.slots[i]]
        return Before(states, partial(self._lost_theta, i), self.slots[i + 1])

    def done(self, i: int) -> None:
        """Gives the gradients from step i on back."""
        while self.folded > i:
            last, after = self.folded - 1, self.slots.pop(self.folded)
            for b, fold in self.moved(last):
                fold.off(after[b], self.slots[last][b])
            self.folded = last

    def _lost_theta(self, i: int) -> Sequence[Tensor]:
        self.done(self.start)
        theta = self.theta(i)
        self._fold(i)
        return theta

    def _fold(self, stop: int) -> None:
        for i in range(self.folded, stop):
            gradients, after = self.gradients[i - self.start], list(self.slots[i])
            for b, fold in self.moved(i):
                g = gradients[b]
                assert g is not None
                after[b] = fold.onto(g, after[b])
            self.slots[i + 1] = after
            self.folded = i + 1


def float_tensors(state: BlockState) -> list[Tensor]:
    """θ, where it is there, then the optimizer's floating-point slots, in their order."""
    slots = [v for v in state.optimizer if isinstance(v, Tensor) and v.is_floating_point()]
    return slots if state.parameters is None else [state.parameters, *slots]

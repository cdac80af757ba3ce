"""The states of a window's steps in reverse order, recomputed elementwise from kept states and the
roll's gradients (`Rebuilt`). With kept graphs the optimizer's slots suffice; where they determine
the step, they replace its gradient in memory (`Folded`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from rhc.optimizers import Fold
from rhc.training.trajectory import BlockState

SMALL_STATES = 8 * 2**20
"""Bytes of rebuilt states that are always kept at a time."""


class Before(NamedTuple):
    """What a step's vjp through Φ needs, per block."""

    states: Sequence[BlockState]  # before it; without θ where Φ does not read it
    theta: Callable[[], Sequence[Tensor]]  # θ in any case


class Rebuilt:
    """The states of a window in reverse order, rebuilt from the kept ones by `advance`.

    States up to the requested one are all kept if they take at most `small` bytes or number at most
    `apart`; otherwise those at 2/3 of the way, at 2/3 of the rest, and so on: log3 K + 1 states,
    about log3 K passes a step (recursive checkpointing, Griewank 1992). theta(i): θ_i for states
    without it.
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


class Folded:
    """The optimizer's states of steps [start, stop), in the memory of their gradients. moved(i):
    (block, fold) for the blocks that step i moved. theta(i): θ_i, recomputed from the gradients."""

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
        # Step -> the states before it, and after the last folded step.
        self.slots: dict[int, list[Any]] = {start: first}
        self.folded = start  # the steps up to this one are

    @contextmanager
    def folding(self) -> Iterator[Folded]:
        """Inside, a step's gradient is restored, to rounding, when the step is asked for; at the
        end, all."""
        try:
            self._fold(self.start + len(self.gradients))
            yield self
        finally:
            self._unfold(self.start)

    def before(self, i: int) -> Before:
        self._unfold(i)
        states = [BlockState(None, slots) for slots in self.slots[i]]
        return Before(states, partial(self._lost_theta, i))

    def _unfold(self, i: int) -> None:
        """Restores the gradients from step i on."""
        while self.folded > i:
            last, after = self.folded - 1, self.slots.pop(self.folded)
            for b, fold in self.moved(last):
                fold.off(after[b], self.slots[last][b])
            self.folded = last

    def _lost_theta(self, i: int) -> Sequence[Tensor]:
        self._unfold(self.start)
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
    """θ, if present, then the optimizer's floating-point slots, in their order."""
    slots = [v for v in state.optimizer if isinstance(v, Tensor) and v.is_floating_point()]
    return slots if state.parameters is None else [state.parameters, *slots]

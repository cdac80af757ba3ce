"""The states of a window's steps in reverse order, made of the few that were kept.

Looking back needs them one at a time. They are rebuilt from kept ones by the roll's gradients,
elementwise (`Rebuilt`); where a step's graph is there, the optimizer's part of them is enough
(`SlotsAlone`), and where that says all of a step, it takes the gradient's own place (`Folded`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from rhc.optimizers import Fold
from rhc.training.trajectory import BlockState

States = TypeVar("States", bound=Sequence[Any])


class Before(NamedTuple):
    """What a step is pulled back through Φ with, per block.

    slots: the optimizer's states before it. thetas: None where Φ does not look at θ. theta: gives
    θ all the same. after: the optimizer's states after it, where these lie in the gradients' place.
    """

    slots: Sequence[Any]
    thetas: Sequence[Tensor | None]
    theta: Callable[[], Sequence[Tensor]]
    after: Sequence[Any] | None = None


class Source:
    """Of the states before a chunk's steps, last ones first."""

    def take(self, i: int) -> Before:
        raise NotImplementedError

    def done(self, i: int) -> None:
        """Called when step i was pulled back through Φ."""


class Rebuilt(Generic[States]):
    """The states of a window in reverse order, rebuilt from the kept ones by `after`.

    A state costs the memory of parameters and optimizer slots, `after` a few elementwise passes.
    Where all states up to the one asked for take no more than `small` bytes, or are no more than
    `apart`, all are kept on the way there; otherwise only those at 2/3 of the way, at 2/3 of the
    rest, and so on, which bounds them by log3 K + 1 at about log3 K passes a step (recursive
    checkpointing, Griewank 1992).
    """

    def __init__(
        self,
        kept: Mapping[int, States],
        after: Callable[[int, States], States],
        apart: int = 0,
        small: int = 0,
    ) -> None:
        self.states = dict(kept)
        self.after = after
        first = next(iter(kept.values()))
        self.size = sum(t.numel() * t.element_size() for s in first for t in float_tensors(s))
        self.affordable = max(1, apart, small // max(1, self.size))

    def take(self, i: int) -> States:
        """The states of step i; those of later steps must have been taken."""
        start = max(k for k in self.states if k <= i)
        states = self.states[start]
        milestone = start
        for k in range(start, i):
            states = self.after(k, states)
            if i - start <= self.affordable or 3 * (k + 1 - milestone) >= 2 * (i - milestone):
                milestone = k + 1
                self.states[k + 1] = states
        return self.states.pop(i)


class Whole(Source):
    """States rebuilt from kept ones."""

    def __init__(self, rebuilt: Rebuilt[list[BlockState]]) -> None:
        self.rebuilt = rebuilt

    def take(self, i: int) -> Before:
        states = self.rebuilt.take(i)
        thetas = [s.parameters for s in states]
        return Before([s.optimizer for s in states], thetas, lambda: thetas)


class SlotsAlone(Source):
    """The optimizer's states rebuilt from kept ones. theta(i): θ_i, of a graph that was lost."""

    def __init__(
        self, rebuilt: Rebuilt[list[Any]], theta: Callable[[int], Sequence[Tensor]]
    ) -> None:
        self.rebuilt, self.theta = rebuilt, theta

    def take(self, i: int) -> Before:
        slots = self.rebuilt.take(i)
        return Before(slots, [None] * len(slots), partial(self.theta, i))


class Folded(Source):
    """The optimizer's states of steps [start, stop), in the memory of their gradients.

    first: those before `start`. gradients: of every step, per block. moved(i): (block, how it
    folds) for the blocks that step i moved. theta(i): θ_i, made of the gradients.

    Inside, a gradient comes back, to rounding, when its step is done, and all of them at the end.
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
        self.before: dict[int, list[Any]] = {start: first}
        self.folded = start  # the steps up to this one are

    def __enter__(self) -> Folded:
        try:
            self._onto(self.start + len(self.gradients))
        except BaseException:
            self._off(self.start)
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self._off(self.start)

    def take(self, i: int) -> Before:
        slots = self.before[i]
        return Before(slots, [None] * len(slots), partial(self._theta, i), self.before[i + 1])

    def done(self, i: int) -> None:
        self._off(i)

    def _theta(self, i: int) -> Sequence[Tensor]:
        """Of a graph that was lost."""
        self._off(self.start)
        theta = self.theta(i)
        self._onto(i)
        return theta

    def _onto(self, stop: int) -> None:
        for i in range(self.folded, stop):
            gradients, after = self.gradients[i - self.start], list(self.before[i])
            for b, fold in self.moved(i):
                g = gradients[b]
                assert g is not None
                after[b] = fold.onto(g, after[b])
            self.before[i + 1] = after
            self.folded = i + 1

    def _off(self, first: int) -> None:
        """Gives the gradients from step `first` on back."""
        while self.folded > first:
            i, after = self.folded - 1, self.before.pop(self.folded)
            for b, fold in self.moved(i):
                fold.off(after[b], self.before[i][b])
            self.folded = i


SMALL_STATES = 8 * 2**20
"""Bytes of rebuilt states that are kept at a time without a thought."""


def float_tensors(state: Any) -> list[Tensor]:
    """θ first, then the optimizer's floating-point slots, in their order; or those slots alone."""
    if isinstance(state, BlockState):
        return [state.parameters, *float_tensors(state.optimizer)]
    return [v for v in state if isinstance(v, Tensor) and v.is_floating_point()]

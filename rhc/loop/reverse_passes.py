"""Looking back: a roll that is recorded, its hypergradient, and what is done where memory does not
suffice for them."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from rhc.errors import Unseen
from rhc.hypergradient import Damping, Hypergradient, Product, ReversePass
from rhc.hypergradient.record import WindowRecorder
from rhc.loop.records import Chronicle
from rhc.loop.state import Attempt, Loop
from rhc.loop.steps import Steps
from rhc.loop.window_objective import HeldOutLoss, Judge
from rhc.rng import preserved
from rhc.training.memory import trim
from rhc.training.objective import Average, Objective
from rhc.training.plant import Plant
from rhc.training.recovery import OomFallback, out_of_memory

EXPLODING_CLIP = 10.0
"""Where costates explode, the window is looked back at once more with their norms clipped to this
times the norm at its end, unless the run has a costate_clip of its own."""


@dataclass(frozen=True)
class ReversePassMaker:
    """Makes `ReversePass`s of a run, as it asks for them and memory suffices."""

    plant: Plant
    objective: Objective
    controls: tuple[str, ...]
    segment: int | Literal["auto"]
    product: Product | Literal["auto"]
    memory_budget: int | None
    spill: bool | str | Path
    damping: Damping
    notice: Callable[[str], None]

    def __call__(
        self, relief: OomFallback, product: Product | None = None, *, verified: bool = True
    ) -> ReversePass:
        """relief: what has to be done without. product: in any case."""
        return ReversePass(
            self.plant,
            self.objective,
            self.controls,
            segment=self.segment if relief.memory_budget is None else "auto",
            product=product or cast(Product | None, relief.product) or self.product,
            memory_budget=relief.memory_budget or self.memory_budget,
            spill=self.spill,
            damping=self.damping,
            verified=verified,
            notice=self.notice,
        )

    def resumed(self, relief: OomFallback, state: Mapping[str, Any]) -> ReversePass:
        """One that goes on from another's state."""
        made = self(relief)
        made.load_state(state)
        return made


class Looking:
    """Rolls windows and looks back at them; the hypergradient and its J are left in the attempt.

    by_batch: whether also by each batch of the objective alone.
    Writes in the loop: cost, live, relief, reverse_pass.
    """

    def __init__(
        self,
        plant: Plant,
        loop: Loop,
        steps: Steps,
        judge: Judge,
        make: ReversePassMaker,
        chronicle: Chronicle,
        *,
        by_batch: bool,
    ) -> None:
        self.plant, self.loop, self.steps, self.judge = plant, loop, steps, judge
        self.make, self.chronicle, self.by_batch = make, chronicle, by_batch

    def roll(self, attempt: Attempt, commit: int, terminal: HeldOutLoss | None) -> None:
        """Live steps through the attempt's window, and its hypergradient unless they fail."""
        unseen: str | None = None
        try:
            self._look_at(attempt, commit, terminal)
        except Unseen as error:
            attempt.starved, unseen = True, str(error)
        except (RuntimeError, MemoryError, OSError) as error:
            if not out_of_memory(error) or self.plant.ranks is not None:
                raise
            attempt.starved = True
        if attempt.starved:  # out of the handler, whose traceback holds what there was
            attempt.hypergradient, attempt.trajectory, self.loop.live = None, None, None
            if unseen is not None:
                self.plant.optimizer.zero_grad()
                self.loop.relief = replace(self.loop.relief, never_differentiate=True)
                attempt.failure = f"not looked back at: {unseen}"
                self.chronicle.tell(f"windows are not rewritten from now on: {unseen}")
                return
            attempt.failure = f"out of memory; from now on {self._relieved(attempt)}"
            self.chronicle.notice(f"looking back ran {attempt.failure}")

    def _look_at(self, attempt: Attempt, commit: int, terminal: HeldOutLoss | None) -> None:
        """`roll` where memory suffices."""
        judge, clip = self.judge, self.make.damping.clip
        mean, past = Average(judge.objective.average), judge.past()
        recorder = self.steps.run(attempt, commit, mean, self.loop.reverse_pass)
        assert recorder is not None
        if attempt.failure is not None:
            recorder.close()
            return
        share = judge.remember(mean, past)
        # Where no proposal is accepted, the next window goes on from the roll's random state.
        with preserved(), closing(recorder):
            h = self._look_back(recorder, mean, terminal, clip, share)
            attempt.first_look = h.result
            if h.result.name == "exploding" and clip is None and recorder.again:
                h = self._look_back(recorder, mean, terminal, EXPLODING_CLIP, share)
            if self.by_batch and recorder.again:
                attempt.samples = self._by_batch(recorder, mean, terminal, share)
        attempt.hypergradient = h
        attempt.value = h.value + judge.penalty(attempt.schedule)
        by_batch = all(bool(g.isfinite().all()) for g in attempt.samples.values())
        if not (math.isfinite(attempt.value) and by_batch):
            steps = f"[{attempt.schedule.start}, {attempt.schedule.stop})"
            attempt.failure = f"the objective is not finite at steps {steps}"

    def _look_back(
        self,
        recorder: WindowRecorder,
        mean: Average,
        terminal: HeldOutLoss | None,
        clip: float | None,
        past: float,
    ) -> Hypergradient:
        """The hypergradient of a recorded roll whose end is the live state, on the ledger.

        past: the share of steps before the window in `mean`, which no control of it moves.
        """
        reverse_pass, damping = self.loop.reverse_pass, replace(self.make.damping, clip=clip)
        assert reverse_pass is not None
        reverse_pass.objective = self._over_the_window(past)
        h = reverse_pass.differentiate(recorder, mean, terminal, damping)
        if past and terminal is not None:
            h = replace(h, value=h.value + self._weight * past * h.terminal)
        self.loop.cost.hessian_products += h.hessian_products
        # The terminal loss is counted by its size.
        self.loop.cost.gradient_equivalents += h.gradient_equivalents - (terminal is not None)
        return h

    @property
    def _weight(self) -> float:
        return self.judge.objective.terminal_weight

    def _over_the_window(self, past: float) -> Objective:
        """The objective with the terminal loss weighed by the window's own share of the average."""
        return replace(self.judge.objective, terminal_weight=self._weight * (1 - past))

    def _by_batch(
        self, recorder: WindowRecorder, mean: Average, terminal: HeldOutLoss | None, past: float
    ) -> dict[str, Tensor]:
        """control -> dJ/du by each batch of the objective alone, at H = 0: (n, K) or (n, K, G)."""
        if terminal is None or len(terminal.batches) < 2:
            return {}
        reverse_pass = self.make(self.loop.relief, "none", verified=False)
        reverse_pass.objective = self._over_the_window(past)
        found = []
        for part in terminal.parts():
            h = reverse_pass.differentiate(recorder, mean, part, self.make.damping)
            self.loop.cost.gradient_equivalents += h.gradient_equivalents - 1
            found.append(h.grad)
        # One more pass over the objective's data.
        self.loop.cost.gradients(terminal.share)
        return {name: torch.stack([grad[name] for grad in found]) for name in found[0]}

    def _relieved(self, attempt: Attempt) -> str:
        """Makes looking back do with less memory, and says in words how."""
        reverse_pass = self.loop.reverse_pass
        assert reverse_pass is not None
        self.plant.optimizer.zero_grad()
        # What an exception cut off is in cycles: without this the next plain step failed as well.
        gc.collect()
        trim()
        if self.plant.parameters[0].device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            schedule = attempt.schedule
            plan = reverse_pass.plan(len(schedule), next(iter(attempt.batches)), schedule)
            predicted, product = plan.predicted_bytes, str(plan.product)
        except (RuntimeError, MemoryError, OSError) as error:
            if not out_of_memory(error):
                raise
            predicted, product = None, reverse_pass.product
        self.loop.relief, words = self.loop.relief.more(len(attempt.schedule), product, predicted)
        state = reverse_pass.state()
        state = state | {"product": self.loop.relief.product or state["product"]}
        self.loop.reverse_pass = self.make.resumed(self.loop.relief, state)
        return words

"""Rewriting a window: propose, replay, compare, again while that is worth it.

The law proposes (`rhc.loop.update_rule`); what is kept is decided here, on the same batches, noise
and objective data.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from rhc.loop.base_schedule import LOOK, Budget, Course
from rhc.loop.records import Chronicle
from rhc.loop.reverse_passes import Looking
from rhc.loop.state import Attempt, Loop, Window
from rhc.loop.steps import Steps
from rhc.loop.update_rule import Rewrite, Twin, added, remembered
from rhc.loop.window_objective import HeldOutLoss, Judge


class Rewriting:
    """Rewrites windows from their hypergradients.

    Writes in the loop: cost, history.
    """

    def __init__(
        self,
        loop: Loop,
        law: Rewrite,
        course: Course,
        budget: Budget,
        steps: Steps,
        judge: Judge,
        looking: Looking,
        chronicle: Chronicle,
    ) -> None:
        self.loop, self.law, self.course, self.budget = loop, law, course, budget
        self.steps, self.judge, self.looking = steps, judge, looking
        self.chronicle = chronicle

    def rewritten(self, rolled: Attempt, window: Window) -> Attempt:
        """The best attempt that was found, or the roll itself; its end state live."""
        terminal = self.judge.terminal(window.start, window.stop)
        length, judged = window.stop - window.start, terminal.share if terminal else 0.0
        current, scale = rolled, 1.0
        for iteration in range(self.law.iterations):
            if iteration and not self.budget.affords(self.loop, length, LOOK, judged, looks=1):
                break
            if current.hypergradient is None:
                if self.loop.reverse_pass is not None and not self.loop.reverse_pass.trusted:
                    break
                self.steps.back_to(window, current, "roll")
                again = current.emptied()
                self.looking.roll(again, window.commit, terminal)
                if again.starved:
                    self.chronicle.record(again, "rejected", again.failure)
                if again.failure is not None:
                    break
                current = again
            better = self._better(current, window, terminal, scale)
            if better is None:
                self.loop.cost.rejected_windows += iteration == 0
                break
            gain = (current.value - better.value) / max(abs(current.value), 1e-12)
            better.gain = 1 - (1 - current.gain) * (1 - gain)
            current = better
            if gain < self.law.worth:
                break
            scale = min(scale * self.law.grow, self.law.farthest)
        return self.steps.settled(current, window)

    def _better(
        self, rolled: Attempt, window: Window, terminal: HeldOutLoss | None, scale: float
    ) -> Attempt | None:
        """A replay that lowers the objective, its end state live; None where none is found."""
        h = rolled.hypergradient
        assert h is not None
        start, stop = window.start, window.stop
        self.chronicle.verb("rewrite", start, stop, rolled.number)
        if not h.result.usable:
            why = f"hypergradient {h.result.name}: {h.result.message}"
            self.chronicle.record(rolled, "rejected", why)
            return None
        if rolled.plain and rolled is self.loop.live:
            rolled.end = self.steps.here()
        # A law of one's own that needs no history may do without the argument.
        past: dict[str, Any] = {}
        if self.law.rule != "normalised":
            past = {"history": self.loop.history}
        if self.law.rule == "batch-error":
            past["samples"] = rolled.samples
        highest = self.course.highest(self.loop, start, stop)
        for retry in range(self.law.retries + 1):
            judged = terminal.share if terminal else 0.0
            if retry and not self.budget.affords(self.loop, stop - start, 2, judged):
                break
            proposal = self.law.propose(
                rolled.schedule, h.grad, rolled.value, scale * self.law.shrink**retry, **past
            )
            if past and rolled.proposal is None and retry == 0:
                self.loop.history = remembered(self.loop.history, proposal.asked)
            proposed = self.law.bounded(proposal.schedule, rolled.schedule, highest)
            carry = proposal.carry
            if rolled.proposal is not None:
                carry = added(rolled.proposal.carry, carry)
            replayed = replace(
                rolled.emptied(),
                number=rolled.number + 1 + retry,
                schedule=proposed,
                proposal=replace(proposal, schedule=proposed, carry=carry),
            )
            self.judge.replay(replayed, window, terminal)
            if replayed.failure is None:
                if replayed.value < rolled.value or not self.law.accept:
                    self.chronicle.record(replayed, "accepted", None, rolled)
                    return replayed
                replayed.failure = (
                    f"the objective did not fall, where {proposal.predicted:.2g} was predicted"
                )
            self.chronicle.record(replayed, "rejected", replayed.failure, rolled)
        return None


class Twins:
    """Rewrites windows without hypergradients, by the law `Twin`.

    Writes in the loop: delta, upwards.
    """

    def __init__(
        self, loop: Loop, law: Twin, steps: Steps, judge: Judge, chronicle: Chronicle
    ) -> None:
        self.loop, self.law = loop, law
        self.steps, self.judge, self.chronicle = steps, judge, chronicle

    def better(self, rolled: Attempt, window: Window) -> Attempt:
        """The better of the window at a higher and at a lower lr; as rolled if both fail."""
        terminal = self.judge.terminal(window.start, window.stop)
        tried = []
        for number, proposal in enumerate(self.law.twins(rolled.schedule, self.loop.delta)):
            attempt = replace(
                rolled.emptied(),
                number=rolled.number + number,
                schedule=proposal.schedule,
                proposal=proposal,
            )
            self.judge.replay(attempt, window, terminal)
            if attempt.failure is None:
                tried.append(attempt)
                if number == 0:
                    attempt.end = self.steps.here()
        if not tried:
            return self.steps.settled(rolled, window)
        best = min(tried, key=lambda attempt: attempt.value)
        for attempt in tried:
            kept = attempt is best
            why = None if kept else "its twin is better"
            self.chronicle.record(attempt, "accepted" if kept else "rejected", why, attempt)
        assert best.proposal is not None
        up = cast(float, best.proposal.carry["lr"]) > 0
        self.loop.delta = self.law.next_delta(self.loop.delta, repeats=up == self.loop.upwards)
        self.loop.upwards = up
        return self.steps.settled(best, window)

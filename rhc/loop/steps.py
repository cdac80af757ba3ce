"""Live steps through a window, and the way back to where it began.

While windows are gone through, nothing else moves the plant forward or back.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from rhc.events import StepTaken, Verb
from rhc.hypergradient import ReversePass
from rhc.hypergradient.record import WindowRecorder
from rhc.loop.records import Chronicle
from rhc.loop.state import AVERAGE_EVERY, Attempt, Loop, Moment, Window
from rhc.rng import preserved
from rhc.training.objective import Average
from rhc.training.plant import Plant
from rhc.training.recovery import Deviation, replay_deviation
from rhc.training.trajectory import StepRecord

DIVERGED = 4.0
"""A window counts as diverged where its loss exceeds this times the loss that it began with, and
this times the mean loss of the window before, and 1.5 times the run's first loss."""


class Steps:
    """Runs attempts and restores moments, with the loop's average, ledger and `live` kept true.

    again: whether windows may be gone through again; where not, nobody asks for the state at its
    end, and steps are not looked at between.
    Writes in the loop: average, checked, cost, deviation, live, seen.
    """

    def __init__(self, plant: Plant, loop: Loop, chronicle: Chronicle, *, again: bool) -> None:
        self.plant, self.loop, self.chronicle, self.again = plant, loop, chronicle, again

    def run(
        self,
        attempt: Attempt,
        commit: int,
        mean: Average | None,
        recording: ReversePass | None = None,
    ) -> WindowRecorder | None:
        """Live steps through the attempt's window; keeps the moment at `commit` if it is inside.

        mean: takes every iterate in. recording: rolls in the plant's place; its recorder, which
        has what looking back needs, is returned.
        """
        schedule, parameters = attempt.schedule, self.plant.parameters
        loop, chronicle = self.loop, self.chronicle
        steps, again = loop.steps, self.again

        def on_step(step: int, observed: StepRecord) -> None:
            if step < commit and (steps - step) % AVERAGE_EVERY == 1:
                loop.average.update(parameters)
            if again:
                chronicle.check_stop()
            if step + 1 == commit < schedule.stop:
                attempt.inside = self.here()
            if chronicle.listeners:
                loss = float(observed.loss) if observed.loss.device.type == "cpu" else None
                chronicle.emit(StepTaken(step, loss, schedule.at(step)))

        def limit(first: float) -> float:
            lately, ever = loop.reference or (first, first)
            if not attempt.guarded or min(first, lately, ever) <= 0:
                return math.inf
            return max(DIVERGED * first, DIVERGED * lately, 1.5 * ever)

        recorder = None
        if recording is not None:
            recorder = recording.roll(
                list(attempt.batches), schedule, average=mean, on_step=on_step, limit=limit
            )
            trajectory = recorder.trajectory
        else:
            trajectory = self.plant.roll(
                attempt.batches, schedule, average=mean, on_step=on_step, limit=limit
            )
        attempt.trajectory = trajectory
        attempt.plain = recorder is None or not recorder.plan.graphs
        loop.live = attempt
        loop.cost.gradients(len(trajectory))
        if trajectory.diverged is not None:
            loss = float(trajectory.losses[trajectory.diverged])
            step = schedule.start + trajectory.diverged
            attempt.failure = f"the loss is {loss:.4g} at step {step}"
        elif not self.plant.is_finite():
            attempt.failure = f"the state is not finite after step {schedule.stop - 1}"
        if again:
            self._check_replay(attempt)
        return recorder

    def here(self) -> Moment:
        """The moment that the loop is at, to come back to."""
        return Moment(self.plant.snapshot(), self.loop.average.copy())

    def restore(self, moment: Moment) -> None:
        """Goes back to a moment."""
        self.loop.live = None
        self.plant.restore(moment.snapshot)
        self.loop.average.assign(moment.average)

    def back_to(self, window: Window, attempt: Attempt, verb: Verb) -> None:
        """Restores the window's beginning, and says that `verb` comes next."""
        start, stop = attempt.schedule.start, attempt.schedule.stop
        self.chronicle.verb("restore", start, stop, attempt.number)
        self.restore(window.before)
        self.chronicle.verb(verb, start, stop, attempt.number)

    def settled(self, attempt: Attempt, window: Window) -> Attempt:
        """The attempt with its end state live, as the plain loop's own steps reach it.

        A roll that keeps graphs takes kernels that can be differentiated twice, which differ from
        the plain ones by roundings: what is committed anyone can replay.
        """
        if attempt.plain and attempt is self.loop.live:
            return attempt
        if attempt.plain and attempt.end is not None:
            self.restore(attempt.end)
            return attempt
        self.back_to(window, attempt, "roll")
        plain = replace(attempt, trajectory=None, inside=None)
        self.run(plain, window.commit, None)
        return plain

    def _check_replay(self, attempt: Attempt) -> None:
        """Whether a step that is taken again is the same: once, in the first window that has one.

        The first loss and gradient of two ways through a window depend on where it begins alone, so
        that this costs nothing unless they differ.
        """
        trajectory = attempt.trajectory
        if self.loop.checked or not attempt.plain or not trajectory:
            return
        start = attempt.schedule.start
        norm = trajectory.gradient_norms[0]
        seen = (start, torch.stack([trajectory.losses[0].double(), torch.as_tensor(norm).double()]))
        before, self.loop.seen = self.loop.seen, seen
        if before is None or before[0] != start or not bool(seen[1].isfinite().all()):
            return
        self.loop.checked = True
        if torch.equal(before[1], seen[1]):
            return
        batch = next(iter(attempt.batches))
        with preserved():
            found = replay_deviation(self.plant, batch, attempt.schedule.at(start), start)
        self.loop.cost.gradients(2)
        apart = float(((before[1] - seen[1]).abs() / before[1].abs().clamp(min=1e-30)).max())
        self.loop.deviation = found or Deviation(apart, ())
        self.chronicle.tell(self.loop.deviation.sentence())

"""Rolling a window until it is finite, at an ever lower lr where it diverges."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from rhc.errors import DivergedError
from rhc.loop.base_schedule import Course
from rhc.loop.records import Chronicle
from rhc.loop.reverse_passes import Looking
from rhc.loop.state import Attempt, Loop, Window
from rhc.loop.steps import Steps
from rhc.loop.update_rule import Rewrite, Shift, replanned
from rhc.loop.window_objective import Judge
from rhc.schedule.planned import PlannedSchedule
from rhc.training.plant import PATIENCE


class Rolling:
    """Rolls the planned schedule, and lowers it where that does not stay finite.

    length: steps of a window as it was asked for, before memory did not suffice.
    Writes in the loop: correction, cost, schedule.
    """

    def __init__(
        self,
        loop: Loop,
        law: Rewrite,
        length: int,
        course: Course,
        steps: Steps,
        judge: Judge,
        looking: Looking,
        chronicle: Chronicle,
    ) -> None:
        self.loop, self.law, self.length, self.course = loop, law, length, course
        self.steps, self.judge, self.looking = steps, judge, looking
        self.chronicle = chronicle

    def until_finite(self, window: Window, *, looked: bool) -> Attempt:
        """The first attempt that is finite, its end state live. looked: also looked back at.

        Raises DivergedError where no lr is.
        """
        loop, law = self.loop, self.law
        start, stop = window.start, window.stop
        number, failed = 0, None
        for schedule, corrected, guarded in self._ladders(start, stop):
            # A loss that no lr lowers is not the lr's: if it is finite, it is let through.
            if not guarded and (failed is None or not math.isfinite(failed[1])):
                break
            loop.schedule, loop.correction, failed = schedule, corrected, None
            for _ in range(law.rewinds + 1):
                self.chronicle.verb("roll", start, stop, number)
                attempt = self._roll(window, number, looked=looked, guarded=guarded)
                if attempt.failure is None:
                    return attempt
                self.chronicle.verb("restore", start, stop, number)
                self.steps.restore(window.before)
                self.chronicle.record(attempt, "rewound", attempt.failure)
                loop.cost.rewound_windows += number == 0
                if attempt.starved:
                    # This window is let through where the next one will be shorter.
                    looked = stop - start <= (loop.relief.longest or self.length)
                    looked = looked and not loop.relief.never_differentiate
                    number += 1
                    continue
                failed, previous = _place(attempt), failed
                if guarded and _same_place(previous, failed):
                    break
                shift = {"lr": math.log(law.lower_lr)}
                loop.schedule = replanned(loop.schedule, start, shift)
                number += 1
        raise DivergedError(
            f"{attempt.failure}, also at lr x{law.lower_lr**law.rewinds:.0e}; "
            "look at the data and the loss of these steps"
        )

    def after(self, attempt: Attempt, window: Window) -> Attempt:
        """The window rolled anew, where the attempt failed when its steps were taken once more."""
        self.chronicle.record(attempt, "rewound", attempt.failure)
        self.steps.restore(window.before)
        self.loop.cost.rewound_windows += 1
        return self.until_finite(window, looked=False)

    def _ladders(
        self, start: int, stop: int
    ) -> Iterator[tuple[PlannedSchedule, dict[str, Shift], bool]]:
        """(schedule, correction, whether it is guarded) to roll from, each when the last failed."""
        planned, correction = self.loop.schedule, self.loop.correction
        yield planned, correction, True
        first = self.course.as_begun(self.loop)
        here, then = planned.window(start, stop), first.window(start, stop)
        others = [name for name in planned.names if name != "lr"]
        if not all(torch.equal(here[name], then[name]) for name in others):
            # No lr helps: it may be what rewriting made of the others.
            self.chronicle.notice(
                f"no lr keeps the steps from {start} on finite: all controls go back to what "
                "the run began with"
            )
            yield first, {}, True
        yield planned, correction, False

    def _roll(self, window: Window, number: int, *, looked: bool, guarded: bool) -> Attempt:
        """One roll of the planned schedule, with its hypergradient where it is looked back at."""
        start, stop = window.start, window.stop
        schedule = self.loop.schedule.window(start, stop)
        attempt = Attempt(number, schedule, self.loop.train.take(start, stop), guarded=guarded)
        if not looked:
            self.steps.run(attempt, window.commit, None)
            return attempt
        terminal = self.judge.terminal(start, stop)
        self.looking.roll(attempt, window.commit, terminal)
        if attempt.hypergradient is not None and terminal is not None:
            self.loop.cost.gradients(terminal.share)
        return attempt


def _place(attempt: Attempt) -> tuple[int, float] | None:
    """(the step of the window at which the loss was too high, the loss); None for none."""
    trajectory = attempt.trajectory
    if trajectory is None or trajectory.diverged is None:
        return None
    return trajectory.diverged, float(trajectory.losses[trajectory.diverged])


def _same_place(before: tuple[int, float] | None, now: tuple[int, float] | None) -> bool:
    """Whether a lower lr changed little: then the data are other than they were."""
    if before is None or now is None or not math.isfinite(before[1] + now[1]):
        return False
    return abs(before[0] - now[0]) <= PATIENCE and now[1] > 0.7 * before[1]

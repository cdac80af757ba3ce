"""One window, from the state before it to the attempt that is committed.

`PlainWindows` are followed as planned. `RewrittenWindows` are rolled until they are finite, looked
back at where the law and the budget want it, and rewritten. Both leave the end state live.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from rhc import stopping
from rhc.errors import DivergedError
from rhc.loop.course import Budget, Course
from rhc.loop.judge import Judge
from rhc.loop.looking import Looking
from rhc.loop.records import Chronicle, Teller
from rhc.loop.rewriting import Rewriting, Twins
from rhc.loop.state import Attempt, Loop, Window
from rhc.loop.steps import Steps
from rhc.loop.surprise import Surprise
from rhc.plant import PATIENCE
from rhc.rewrite import Rewrite, Shift, carried
from rhc.schedule import Schedule


class PlainWindows:
    """Windows with rewriting off: the plain loop, bit for bit.

    alone: no other rank, so that a window may end at any step where the run is being stopped.
    """

    def __init__(self, loop: Loop, steps: Steps, teller: Teller, *, alone: bool) -> None:
        self.loop, self.steps, self.teller, self.alone = loop, steps, teller, alone

    def go_through(self, start: int, stop: int, commit: int) -> tuple[Attempt, int]:
        """(the attempt to commit, the step up to which). DivergedError where it is not finite."""
        self.teller.verb("roll", self.loop.cost.windows, start, stop, 0)
        # The plain loop draws each batch just before its step, from the same random state.
        lazily = self.loop.train.lazily(start, stop)
        if self.alone:  # ranks end at the same step
            lazily = stopping.until_asked(lazily)
        attempt = Attempt(0, self.loop.schedule.window(start, stop), lazily, guarded=False)
        self.steps.run(attempt, commit, None)
        if attempt.failure is not None:
            raise DivergedError(
                f"{attempt.failure}; lower the lr, or turn rewriting on to have it lowered"
            )
        assert attempt.trajectory is not None
        return attempt, start + len(attempt.trajectory)  # fewer where the run is being stopped


class RewrittenWindows:
    """Windows with hindsight.

    length: steps of a window as it was asked for. controls: what is rewritten. rewriting: by what
    windows are looked back at, or tried as twins.
    """

    def __init__(
        self,
        loop: Loop,
        law: Rewrite,
        controls: tuple[str, ...],
        length: int,
        course: Course,
        budget: Budget,
        steps: Steps,
        judge: Judge,
        looking: Looking,
        rewriting: Rewriting | Twins,
        surprise: Surprise,
        chronicle: Chronicle,
        teller: Teller,
    ) -> None:
        self.loop, self.law, self.controls, self.length = loop, law, controls, length
        self.course, self.budget = course, budget
        self.steps, self.judge, self.looking = steps, judge, looking
        self.rewriting, self.surprise = rewriting, surprise
        self.chronicle, self.teller = chronicle, teller

    def go_through(self, start: int, stop: int, commit: int) -> tuple[Attempt, int]:
        """(the attempt to commit, the step up to which). DivergedError where no lr is finite."""
        loop, law, rewriting = self.loop, self.law, self.rewriting
        window = Window(start, stop, commit, self.steps.here())
        twins = isinstance(rewriting, Twins)
        wanted = loop.alert or start < law.until * loop.steps
        wanted = wanted and loop.passed_over == 0 and not loop.relief.blind
        # Looked back at, replayed, and rolled once more.
        looked = wanted and not twins and self._affords(3, window)
        attempt = self._roll_until_finite(window, looked=looked)
        looked = looked and attempt.hypergradient is not None  # unless memory did not suffice
        surprise = self.surprise.at(attempt)
        if surprise is not None and not self._affords(len(law.restart) + 4, window):
            surprise = None
        if surprise is not None and surprise - start > PATIENCE:
            # The window ends where the data change, and the next one begins there.
            return self.surprise.cut(attempt, surprise, window), surprise
        if surprise is not None and law.restart and "lr" in self.controls:
            attempt = self.surprise.begun_anew(attempt, surprise, window)
        if isinstance(rewriting, Twins):
            if self._affords(3, window):
                attempt = rewriting.better(attempt, window)
        elif looked or surprise is not None:
            attempt = rewriting.rewritten(attempt, window)
        self._pass_over(attempt, looked=looked, surprise=surprise is not None)
        return attempt, commit

    def _affords(self, times: int, window: Window) -> bool:
        """Whether so many more ways through the window are within the budget."""
        return self.budget.affords(self.loop, times * (window.stop - window.start))

    def _pass_over(self, attempt: Attempt, *, looked: bool, surprise: bool) -> None:
        """Decides how many windows to pass over, by what looking back at this one was worth."""
        loop, law = self.loop, self.law
        if surprise:
            loop.alert, loop.in_vain, loop.passed_over = True, 0, 0
            loop.regime = loop.step
        elif not looked:
            loop.passed_over = max(0, loop.passed_over - 1)
        elif attempt.gain >= law.worth:
            loop.in_vain = 0
        elif law.patience is not None:
            loop.in_vain += 1
            if loop.in_vain >= law.patience:
                loop.alert = False
                loop.passed_over = 2 ** (loop.in_vain - law.patience)

    # Rolling until it is finite ------------------------------------------------------------------

    def _roll_until_finite(self, window: Window, *, looked: bool) -> Attempt:
        """Rolls the planned schedule, at an ever lower lr while it diverges.

        looked: also looks back.
        """
        loop, law = self.loop, self.law
        start, stop = window.start, window.stop
        number, failed = 0, None
        for schedule, corrected, guarded in self._ladders(start):
            # A loss that no lr lowers is not the lr's: if it is finite, it is let through.
            if not guarded and (failed is None or not math.isfinite(failed[1])):
                break
            loop.schedule, loop.correction, failed = schedule, corrected, None
            for _ in range(law.rewinds + 1):
                self.teller.verb("roll", loop.cost.windows, start, stop, number)
                attempt = self._roll(window, number, looked=looked, guarded=guarded)
                if attempt.failure is None:
                    return attempt
                self.teller.verb("restore", loop.cost.windows, start, stop, number)
                self.steps.restore(window.before)
                self.chronicle.record(attempt, "rewound", attempt.failure)
                loop.cost.rewound_windows += number == 0
                if attempt.starved:
                    # This window is let through where the next one will be shorter.
                    looked = stop - start <= (loop.relief.longest or self.length)
                    looked = looked and not loop.relief.blind
                    number += 1
                    continue
                failed, previous = _place(attempt), failed
                if guarded and _same_place(previous, failed):
                    break
                shift = {"lr": math.log(law.lower_lr)}
                loop.schedule = carried(loop.schedule, start, shift)
                number += 1
        raise DivergedError(
            f"{attempt.failure}, also at lr x{law.lower_lr**law.rewinds:.0e}; "
            "look at the data and the loss of these steps"
        )

    def _ladders(self, start: int) -> Iterator[tuple[Schedule, dict[str, Shift], bool]]:
        """(schedule, correction, whether it is guarded) to roll from, each when the last failed."""
        planned, correction = self.loop.schedule, self.loop.correction
        yield planned, correction, True
        begun_with = self.course.as_begun(self.loop)
        first = planned.replaced(begun_with.window(start, planned.stop))
        others = [name for name in planned.values if name != "lr"]
        if not all(torch.equal(planned[name], first[name]) for name in others):
            # No lr helps: it may be what rewriting made of the others.
            self.teller.notice(
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

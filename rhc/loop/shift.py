"""Data that change within a window: where they do, and what is done about it."""

from __future__ import annotations

from dataclasses import replace

import torch

from rhc.loop.base_schedule import Course
from rhc.loop.records import Chronicle
from rhc.loop.state import Attempt, Loop, Window
from rhc.loop.steps import Steps
from rhc.loop.update_rule import Rewrite, surprised
from rhc.loop.window_objective import Judge
from rhc.schedule.planned import PlannedSchedule

REMEMBERED = 50
"""Committed steps whose losses a window is compared with, to see whether the data changed."""


class Surprise:
    """Sees that a window's losses have risen, and ends it there or begins the template anew.

    steers_lr: whether lr is rewritten.
    Writes in the loop: correction, schedule.
    """

    def __init__(
        self,
        loop: Loop,
        law: Rewrite,
        course: Course,
        steps: Steps,
        judge: Judge,
        chronicle: Chronicle,
        *,
        steers_lr: bool,
    ) -> None:
        self.loop, self.law, self.course = loop, law, course
        self.steps, self.judge = steps, judge
        self.chronicle = chronicle
        self.may_begin_anew = steers_lr and bool(law.restart)

    def at(self, attempt: Attempt) -> int | None:
        """The step from which losses are higher than those committed lately."""
        if self.law.surprise is None or attempt.trajectory is None:
            return None
        first = max(self.loop.regime, self.loop.step - REMEMBERED)
        before = [row["loss"] for row in self.loop.tape[first:] if row.get("loss") is not None]
        losses = torch.stack(attempt.trajectory.losses).double().tolist()
        at = surprised(before, losses, self.law.surprise)
        return None if at is None else attempt.schedule.start + at

    def cut(self, rolled: Attempt, step: int, window: Window) -> Attempt:
        """The same way up to `step`, its end state live."""
        self.chronicle.notice(f"the losses rise at step {step}, and the window ends there")
        short = replace(
            rolled.emptied(),
            schedule=rolled.schedule.window(window.start, step),
            batches=list(rolled.batches)[: step - window.start],
        )
        self.steps.back_to(window, short, "roll")
        self.steps.run(short, step, None)
        return short

    def begun_anew(self, rolled: Attempt, step: int, window: Window) -> Attempt:
        """The window with the template begun anew at `step`, where that is better than planned."""
        start, stop = window.start, window.stop
        terminal = self.judge.terminal(start, stop)
        if rolled.hypergradient is None:
            self.judge.replay(rolled, window, terminal)
        tried: list[tuple[Attempt, PlannedSchedule]] = []
        for number, factor in enumerate(self.law.restart, start=1):
            plan = self.course.begun_anew(self.loop, step, factor)
            attempt = replace(
                rolled.emptied(), number=rolled.number + number, schedule=plan.window(start, stop)
            )
            self.judge.replay(attempt, window, terminal)
            if attempt.failure is None:
                tried.append((attempt, plan))
            else:
                self.chronicle.record(attempt, "rejected", attempt.failure, rolled)
        bar = rolled.value + self.law.worth * abs(rolled.value)
        good = [pair for pair in tried if not pair[0].value >= bar]
        best = min(good, key=lambda pair: pair[0].value, default=None)
        for attempt, _ in tried:
            outcome = "accepted" if best is not None and attempt is best[0] else "rejected"
            why = f"the template begun anew at step {step}"
            self.chronicle.record(attempt, outcome, why, rolled)
        if best is None:
            return rolled
        self.loop.schedule, self.loop.correction = best[1], {}
        self.chronicle.notice(f"the template begins anew at step {step}")
        return best[0]

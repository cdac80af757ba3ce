"""One window, from the state before it to the attempt that is committed.

`PlainWindows` are followed as planned. `RewrittenWindows` are rolled until they are finite, looked
back at where the law and the budget want it, and rewritten. Both leave the end state live.
"""

from __future__ import annotations

import math

from rhc.errors import DivergedError
from rhc.loop.base_schedule import LOOK, Budget
from rhc.loop.records import Chronicle
from rhc.loop.rewriting import Rewriting, Twins
from rhc.loop.rolling import Rolling
from rhc.loop.shift import Surprise
from rhc.loop.state import Attempt, Loop, Window
from rhc.loop.steps import Steps
from rhc.loop.update_rule import Rewrite
from rhc.training import interrupts as stopping
from rhc.training.plant import PATIENCE


class PlainWindows:
    """Windows with rewriting off: the plain loop, bit for bit.

    alone: no other rank, so that a window may end at any step where the run is being stopped.
    """

    def __init__(self, loop: Loop, steps: Steps, chronicle: Chronicle, *, alone: bool) -> None:
        self.loop, self.steps, self.chronicle, self.alone = loop, steps, chronicle, alone

    def go_through(self, start: int, stop: int, commit: int) -> tuple[Attempt, int]:
        """(the attempt to commit, the step up to which). DivergedError where it is not finite."""
        self.chronicle.verb("roll", start, stop, 0)
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
    """Windows with hindsight. rewriting: by hypergradients, or by twins.

    Writes in the loop: alert, in_vain, passed_over, regime.
    """

    def __init__(
        self,
        loop: Loop,
        law: Rewrite,
        budget: Budget,
        steps: Steps,
        rolling: Rolling,
        surprise: Surprise,
        rewriting: Rewriting | Twins,
    ) -> None:
        self.loop, self.law, self.budget, self.steps = loop, law, budget, steps
        self.rolling, self.surprise, self.rewriting = rolling, surprise, rewriting

    def go_through(self, start: int, stop: int, commit: int) -> tuple[Attempt, int]:
        """(the attempt to commit, the step up to which). DivergedError where no lr is finite."""
        window = Window(start, stop, commit, self.steps.here())
        attempt, until = self._gone_through(window)
        if attempt.failure is not None:
            return self.rolling.after(attempt, window), commit
        return attempt, until

    def _gone_through(self, window: Window) -> tuple[Attempt, int]:
        """`go_through`; the attempt has failed where a way that was finite no longer is."""
        loop, law, rewriting = self.loop, self.law, self.rewriting
        start, commit = window.start, window.commit
        twins = isinstance(rewriting, Twins)
        wanted = loop.alert or start < law.until * loop.steps
        wanted = wanted and loop.passed_over == 0 and not loop.relief.never_differentiate
        wanted = wanted and (loop.reverse_pass is None or loop.reverse_pass.trusted)
        # Looked back at, replayed, and rolled once more.
        looked = wanted and not twins and self._affords(LOOK, window, looks=1)
        attempt = self.rolling.until_finite(window, looked=looked)
        looked = looked and attempt.hypergradient is not None  # unless memory did not suffice
        surprise = self.surprise.at(attempt)
        if surprise is not None and not self._affords(len(law.restart) + 4, window, looks=1):
            surprise = None
        if surprise is not None and surprise - start > PATIENCE:
            # The window ends where the data change, and the next one begins there.
            return self.surprise.cut(attempt, surprise, window), surprise
        if surprise is not None and self.surprise.may_begin_anew:
            attempt = self.surprise.begun_anew(attempt, surprise, window)
        if isinstance(rewriting, Twins):
            if self._affords(LOOK, window):
                attempt = rewriting.better(attempt, window)
        elif looked or surprise is not None:
            attempt = rewriting.rewritten(attempt, window)
        self._pass_over(attempt, looked=looked, surprise=surprise is not None)
        return attempt, commit

    def _affords(self, ways: int, window: Window, looks: int = 0) -> bool:
        """Whether so many more ways through the window are within the budget."""
        start, stop = window.start, window.stop
        judged = 0.0
        if math.isfinite(self.law.budget):
            terminal = self.rolling.judge.terminal(start, stop)
            judged = 0.0 if terminal is None else terminal.share
        return self.budget.affords(self.loop, stop - start, ways, judged, looks)

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

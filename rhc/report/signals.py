"""The signals of a run: as its scheduler recorded them, else computed from the tape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from rhc.report.records import SIGNALS, RunRecord, number, stretches
from rhc.schedulers.laws import Gains, paced
from rhc.schedulers.signals import Signals, Smoothing, observed, trends

EVERY = 20
"""Steps between updates of a long run, as of AdaptiveRL."""

MOST_OBSERVATIONS = 20_000
"""A longer tape is observed as the means of this many stretches."""

PLATEAU = 0.5
"""Score above which a step belongs to a plateau."""


@dataclass(frozen=True)
class RunSignals:
    """Δ̃ℓ, Δ̃r and P per update. origin, of_reward: where they are from, for a caption."""

    steps: list[float]
    loss: list[float]
    reward: list[float]
    plateau: list[float]
    origin: str
    of_reward: str

    @property
    def plateaus(self) -> list[tuple[float, float]]:
        """(start, stop) of the stretches with P > ½."""
        found: list[tuple[float, float]] = []
        for (step, score), (after, _) in pairwise(zip(self.steps, self.plateau, strict=True)):
            if score <= PLATEAU:
                continue
            start = found.pop()[0] if found and found[-1][1] == step else step
            found.append((start, after))
        return found


def signals_of(run: RunRecord) -> RunSignals:
    if signals_of not in run.known:
        run.known[signals_of] = _signals_of(run)
    found: RunSignals = run.known[signals_of]
    return found


def _signals_of(run: RunRecord) -> RunSignals:
    of_reward = "without a reward Δr is the fall of the loss over its noise"
    if run.reward:
        of_reward = f"Δr is the trend of {run.reward}"
    rows = list(_recorded(run))
    origin = "as the scheduler recorded them"
    if not rows:
        rows, origin = list(_computed(run)), "computed from the tape with AdaptiveRL's constants"
    steps, loss, reward, plateau = ([row[i] for row in rows] for i in range(4))
    return RunSignals(steps, loss, reward, plateau, origin, of_reward)


Row = tuple[float, float, float, float]


def _recorded(run: RunRecord) -> Iterator[Row]:
    """A row where the signals changed: a scheduler records them at every step."""
    before = None
    for row in run.tape:
        loss, reward, plateau = (number(row.get(name)) for name in SIGNALS)
        if loss is None or reward is None or plateau is None or (loss, reward, plateau) == before:
            continue
        before = loss, reward, plateau
        yield float(row["step"]), loss, reward, plateau


def _computed(run: RunRecord) -> Iterator[Row]:
    parts = list(stretches(len(run.tape), MOST_OBSERVATIONS))
    _, every, faster = paced(Gains(), EVERY, len(parts))
    signals, smoothing = Signals(), Smoothing().faster(faster)
    for count, (start, stop) in enumerate(parts, 1):
        rows = run.tape[start:stop]
        loss = number([row.get("loss") for row in rows])
        reward = number([row.get(run.reward) for row in rows]) if run.reward else None
        signals = observed(signals, math.nan if loss is None else loss, reward, smoothing)
        if count % every == 0:
            found, signals = trends(signals, smoothing)
            yield float(rows[-1]["step"]), found.loss, found.reward, found.plateau

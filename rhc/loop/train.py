"""The loop of the six verbs: a run, window by window."""

from __future__ import annotations

from rhc.loop.checkpointing import save
from rhc.loop.fit import Fit
from rhc.loop.records import note_online
from rhc.loop.replay_check import assert_replay
from rhc.loop.shift import adapt_to_shift
from rhc.loop.steps import replay, restore
from rhc.loop.windows import (
    accepts,
    antithetic_search,
    commit,
    hypergradient,
    next_window,
    rewrite,
    roll,
    settle,
    slide,
    worth_rewriting,
)


def train(fit: Fit) -> None:
    """Takes the run to its end: roll, rewrite, restore, replay, commit, slide."""
    while fit.state.step < fit.state.steps:
        window = next_window(fit)
        attempt = roll(fit, window)  # lr is lowered until all is finite
        note_online(fit, window, attempt)
        attempt = assert_replay(fit, window, attempt)  # once
        attempt = adapt_to_shift(fit, window, attempt)
        attempt = antithetic_search(fit, window, attempt)
        while worth_rewriting(fit, window, attempt):
            attempt = hypergradient(fit, window, attempt)
            for trial in rewrite(fit, window, attempt):
                restore(fit, window, trial)
                replay(fit, window, trial)
                if accepts(fit, attempt, trial):
                    attempt = trial
                    break
            else:
                break
        attempt = settle(fit, window, attempt)
        commit(fit, window, attempt)
        save(fit)
        slide(fit, window, attempt)

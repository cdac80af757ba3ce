"""Data weights in the loop: observed by a window's reverse pass, moved with its replay."""

from __future__ import annotations

from dataclasses import replace

from rhc.data_weights import DATA_WEIGHTS, Observation, factors_of
from rhc.loop.fit import Fit
from rhc.loop.state import Attempt, Window


def observe(fit: Fit, window: Window, attempt: Attempt) -> Observation | None:
    """What the window's first reverse pass says of the cells; None for later ones."""
    evidence, h, weights = fit.state.evidence, attempt.hypergradient, fit.plant.data_weights
    if evidence is None or h is None or weights is None or window.observation is not None:
        return None
    window.observation = evidence.observe(h.grad[DATA_WEIGHTS], weights.values)
    return window.observation


def weigh(fit: Fit, trial: Attempt, observed: Observation, scale: float) -> Attempt:
    """The trial on batches whose rows have their new weights."""
    assert trial.proposal is not None
    by = scale * observed.by
    factors = factors_of(observed.cells, by.exp())
    trial.batches = [fit.plant.weighed_by(batch, factors) for batch in trial.batches]
    trial.weights = by
    predicted = trial.proposal.predicted + scale * observed.predicted
    trial.proposal = replace(trial.proposal, predicted=predicted)
    return trial


def move_weights(fit: Fit, window: Window, attempt: Attempt) -> None:
    """Commits what was observed, and the moves that the attempt was replayed with."""
    observed, weights = window.observation, fit.plant.data_weights
    if observed is None or weights is None:
        return
    assert fit.state.evidence is not None
    fit.state.evidence.take(observed)
    if attempt.weights is not None:
        weights.move(observed.cells, attempt.weights)

"""Data weights in the loop: observed by a window's reverse pass, moved with its replay."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rhc.data_weights import Observation
from rhc.hypergradient.verification import DATA_WEIGHTS
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
    cells, by = observed.cells, scale * observed.by
    order = cells.argsort()
    places, factors = cells[order], by[order].exp()

    def factor(own: Tensor) -> Tensor:
        found = torch.searchsorted(places, own).clamp(max=len(places) - 1)
        return torch.where(places[found] == own, factors[found], 1.0)

    trial.batches = [fit.plant.weighed_by(batch, factor) for batch in trial.batches]
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

"""Data weights in the loop: observed by a window's reverse pass, moved with its replay."""

from __future__ import annotations

from dataclasses import replace

from rhc.data_weights import DATA_WEIGHTS, DataWeights, Observation, factors_of
from rhc.errors import InputError
from rhc.loop.fit import Fit
from rhc.loop.state import Attempt, State, Window
from rhc.training.objective import Objective
from rhc.training.plant import Plant


def judged_by(objective: Objective, *, on_val: bool) -> str:
    """What people are told of how data weights are judged; InputError where by themselves."""
    if not on_val or not objective.terminal_weight:
        raise InputError(
            "data weights are judged on rows that they do not weigh: give a val_loader, and an "
            "objective that takes its loss"
        )
    if objective.rows is None:
        return (
            "data weights are judged by the losses of held-out rows as they are, whose labels "
            "should be right; if they may be wrong, Objective(rows=rhc.bounded), or --bounded"
        )
    name = getattr(objective.rows, "__name__", type(objective.rows).__name__)
    return f"data weights are judged by {name} losses of held-out rows, which may be wrong too"


def observe(fit: Fit, window: Window, attempt: Attempt) -> Observation | None:
    """What the window's first reverse pass says of the cells; None for later ones."""
    evidence, h, weights = fit.state.evidence, attempt.hypergradient, fit.plant.data_weights
    if evidence is None or h is None or weights is None or window.observation is not None:
        return None
    window.observation = evidence.observe(h.grad[DATA_WEIGHTS], weights.values, h.cells_by_step)
    return window.observation


def weigh(fit: Fit, trial: Attempt, observed: Observation, scale: float) -> Attempt:
    """The trial on batches whose rows have their new weights."""
    weights = fit.plant.data_weights
    assert trial.proposal is not None and weights is not None
    by, now = scale * observed.by, weights.raw[observed.cells].double()
    factors = factors_of(observed.cells, weights.moved(observed.cells, by).double() / now)
    numbered = enumerate(trial.batches, trial.schedule.start)
    trial.batches = [fit.plant.weighed_by(batch, step, factors) for step, batch in numbered]
    trial.weights = by
    predicted = trial.proposal.predicted + scale * observed.predicted
    trial.proposal = replace(trial.proposal, predicted=predicted)
    return trial


def move_weights(fit: Fit, window: Window, attempt: Attempt) -> None:
    """Commits what was observed, the moves that the attempt was replayed with, and the course."""
    observed, weights, evidence = window.observation, fit.plant.data_weights, fit.state.evidence
    if weights is None or evidence is None:
        return
    if observed is not None:
        evidence.take(observed)
        if attempt.weights is not None:
            weights.move(observed.cells, attempt.weights)
    evidence.note(weights.by_step(window.start, window.commit))


def learned(plant: Plant, state: State) -> DataWeights | None:
    """The weights that a run ends with; of few cells that it moved, with their course."""
    weights, evidence = plant.data_weights, state.evidence
    if weights is None or evidence is None:
        return weights
    course = evidence.course(state.step)
    return weights if course is None else weights.over(course)

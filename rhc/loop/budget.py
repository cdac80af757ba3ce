"""What a run may cost and is expected to cost, in plain runs."""

from __future__ import annotations

import math

from rhc.containers import length
from rhc.hypergradient import PRODUCT_COST
from rhc.loop.fit import Fit
from rhc.loop.state import Window
from rhc.loop.window_objective import terminal_loss

REWRITE = 3
"""Rolls of a window that a rewrite takes: the roll, a replay, and one by plain kernels."""


def search_budget(fit: Fit) -> float:
    """Gradient evaluations left for the lr search beside the run and a first rewrite, which counts
    up to a third of the rest."""
    state = fit.state
    rest = (fit.rule.budget - 1) * state.steps - state.cost.gradient_equivalents
    if not fit.rewrites:
        return rest
    length = min(fit.window, state.steps)
    return rest - min(REWRITE * length + _reverse_pass(fit, length), rest / 3)


def affords(fit: Fit, window: Window, ways: int, reverse_passes: int = 0) -> bool:
    """Whether the budget allows these rolls and reverse passes, beside plain steps to the end; told
    where it does not."""
    if within_budget(fit, window, ways, reverse_passes):
        return True
    if not fit.state.budget_is_spent:
        fit.state.budget_is_spent = True
        budget = fit.rule.budget
        fit.events.notice(
            f"the budget of {budget:g} plain runs is spent: the rest is followed as planned"
        )
    return False


def within_budget(
    fit: Fit, window: Window, ways: int, reverse_passes: int = 0, evaluations: int = 0
) -> bool:
    """As `affords`, untold. evaluations: of a training batch's loss alone."""
    state, budget = fit.state, fit.rule.budget
    if math.isinf(budget):
        return True
    length, terminal = window.stop - window.start, terminal_loss(fit, window)
    share = 0.0 if terminal is None else terminal.share
    more = ways * (length + share / 3)  # no gradient of a replay's terminal loss
    more += reverse_passes * (_reverse_pass(fit, length) + share) + evaluations / 3
    spent = state.cost.gradient_equivalents + more + state.steps - state.step
    return spent <= budget * state.steps


def is_validated(fit: Fit, start: int) -> bool:
    """Whether the steps committed since `start` end with a validation: the last ones do if any do,
    others every so many steps, unless nobody asked and the budget does not allow it."""
    state, data = fit.state, fit.data
    every, stop = data.validate_every, state.step
    if stop == state.steps:
        return every is not None or state.best is not None
    if every is None or stop // every == start // every:
        return False
    spent = state.cost.gradient_equivalents + state.steps - stop
    more = (length(data.val_loader) or 1) / 3
    return data.validation_asked or spent + more <= fit.rule.budget * state.steps


def projected_cost(fit: Fit) -> float:
    """Expected cost in plain runs, if windows to differentiate cost as much as so far."""
    state = fit.state
    spent = state.cost.gradient_equivalents - state.start_gradients
    differentiated = math.ceil(fit.rule.until * state.steps) if fit.rewrites else 0
    dear = max(0, differentiated - state.step) * spent / state.step
    plain = state.steps - max(differentiated, state.step)
    projected = (state.start_gradients + spent + dear + plain) / state.steps
    least = (state.start_gradients + spent + state.steps - state.step) / state.steps
    return min(projected, max(least, fit.rule.budget))


def _reverse_pass(fit: Fit, length: int) -> float:
    """Gradient evaluations of the next reverse pass, at most, if memory suffices."""
    reverse_pass = fit.state.reverse_pass
    if reverse_pass is None:
        return 0.0
    return length * PRODUCT_COST[reverse_pass.product] + reverse_pass.prior_cost

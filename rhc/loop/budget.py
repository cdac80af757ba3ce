"""What a run may cost by its update rule, in plain runs, and what it will."""

from __future__ import annotations

import math

from rhc.hypergradient import PRODUCT_COST
from rhc.loop.fit import Fit
from rhc.loop.state import Window
from rhc.loop.window_objective import terminal_loss

REWRITE = 3
"""Ways through a window that a rewrite takes: the roll, a replay, and one by plain kernels."""


def search_budget(fit: Fit) -> float:
    """Gradient evaluations that the search for the first lr may take.

    Beside it there is the run itself, and a rewrite of the first window, unless that takes more
    than a third of the rest.
    """
    state = fit.state
    rest = (fit.rule.budget - 1) * state.steps - state.cost.gradient_equivalents
    if not fit.rewrites:
        return rest
    length = min(fit.window, state.steps)
    return rest - min(REWRITE * length + _reverse_pass(fit, length), rest / 3)


def affords(fit: Fit, window: Window, ways: int, reverse_passes: int = 0) -> bool:
    """Whether the budget has room for so many more ways through the window, of which so many are
    differentiated, beside plain steps to the end of the run."""
    state, budget = fit.state, fit.rule.budget
    if math.isinf(budget):
        return True
    length, terminal = window.stop - window.start, terminal_loss(fit, window)
    share = 0.0 if terminal is None else terminal.share
    more = ways * (length + share / 3)  # a replay's terminal loss takes no gradient
    more += reverse_passes * (_reverse_pass(fit, length) + share)
    if state.cost.gradient_equivalents + more + state.steps - state.step <= budget * state.steps:
        return True
    if not state.budget_is_spent:
        state.budget_is_spent = True
        fit.events.notice(
            f"the budget of {budget:g} plain runs is spent: the rest is followed as planned"
        )
    return False


def projected_cost(fit: Fit) -> float:
    """Of the whole run, in plain runs: the windows that will be differentiated as dear as those so
    far, the others plain, the search for the first lr paid for once."""
    state = fit.state
    spent = state.cost.gradient_equivalents - state.start_gradients
    differentiated = math.ceil(fit.rule.until * state.steps) if fit.rewrites else 0
    dear = max(0, differentiated - state.step) * spent / state.step
    plain = state.steps - max(differentiated, state.step)
    projected = (state.start_gradients + spent + dear + plain) / state.steps
    least = (state.start_gradients + spent + state.steps - state.step) / state.steps
    return min(projected, max(least, fit.rule.budget))


def _reverse_pass(fit: Fit, length: int) -> float:
    """Gradient evaluations that the next one takes, at most, where memory is not short."""
    reverse_pass = fit.state.reverse_pass
    if reverse_pass is None:
        return 0.0
    return length * PRODUCT_COST[reverse_pass.product] + reverse_pass.prior_cost

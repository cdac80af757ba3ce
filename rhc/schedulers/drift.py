"""A unit-free change-point test: has the level of a sequence risen?"""

from __future__ import annotations

import math
from typing import NamedTuple

from rhc.schedulers.signals import clip, is_usable

SHIFT = 2.0
"""Change of level to detect quickly, in standard deviations."""

FALSE_ALARMS = 0.01
"""Probability of a false alarm in 1000 steps of a stationary sequence."""

WARMUP = 100
"""Values before the first alarm."""

LAG = 50
"""Newest values, excluded from the reference."""

FORGETTING = 0.005
"""Smallest weight of a value in the reference, reached after 200 values."""

CUT = 3.0
"""Values are clipped at this many standard deviations from the level."""

SLOW = 0.1
"""Weight of the newest value in the slow average, from which φ is estimated."""

MOST_CORRELATED = 0.95


class ChangePoint(NamedTuple):
    """State of a two-sided CUSUM since the last change.
    mean: level of the `settled` values older than `LAG`. variance, product: averages of w² and
    w·w₋₁, w the clipped distance to the level. slow, slow_square: a running average of w and its
    square. falling: steps since `lower` was 0."""

    mean: float = 0.0
    variance: float = 0.0
    product: float = 0.0
    slow: float = 0.0
    slow_square: float = 0.0
    previous: float = 0.0
    settled: int = 0
    newest: tuple[float, ...] = ()
    upper: float = 0.0
    lower: float = 0.0
    falling: int = 0
    last: float = 0.0
    changes: int = 0


def cusum(state: ChangePoint, value: float) -> tuple[ChangePoint, bool]:
    """(the state after one more value, whether the level has risen). Values that are not finite are
    ignored.
    CUSUM (Page 1954) of the innovations e = (w − φ w₋₁) / (s √(1 − φ²)), which are white for
    autoregressive values; e is clipped at k + 1 against outliers. φ: the larger of the lag-1
    correlation and the one implied by the slow variance, plus half a standard error; k: half the
    shift in units of e. The threshold is Siegmund's (1985), times 1.3 for estimation errors. A
    falling level resets the reference without an alarm; negate returns. Error rates:
    docs/planning.md."""
    if not is_usable(value):
        return state, False
    value = float(value)
    newest = (*state.newest, value)
    seen = state.settled + len(newest)
    if seen <= WARMUP:
        return state._replace(newest=newest), False
    while len(newest) > LAG:
        state, newest = _settled(state, newest[0]), newest[1:]
    state = state._replace(newest=newest)
    if state.variance <= 0:
        return state, False
    correlation = _correlation(state)
    s = math.sqrt(state.variance)
    w = clip(value - state.mean, (-CUT * s, CUT * s))
    e = (w - correlation * state.last) / (s * math.sqrt(1 - correlation**2))
    k = 0.5 * SHIFT * math.sqrt((1 - correlation) / (1 + correlation))
    bar = 1.3 * (math.log1p(2 * k * k * 1000 / FALSE_ALARMS) / (2 * k) - 1.166)
    upper = max(0.0, state.upper + min(e, k + 1) - k)
    lower = max(0.0, state.lower + min(-e, k + 1) - k)
    if upper > bar:
        return ChangePoint(changes=state.changes + 1), True
    if lower > bar:
        since = newest[-min(state.falling + 1, LAG) :]  # the new level's own values
        return ChangePoint(newest=since, changes=state.changes), False
    falling = state.falling + 1 if lower > 0 else 0
    return state._replace(upper=upper, lower=lower, falling=falling, last=w), False


def _settled(state: ChangePoint, value: float) -> ChangePoint:
    n = state.settled
    if n == 0:
        return state._replace(mean=value, settled=1)
    s = math.sqrt(state.variance) if n >= 5 and state.variance > 0 else math.inf
    w = clip(value - state.mean, (-CUT * s, CUT * s))
    share, of_squares = max(FORGETTING, 1 / (n + 1)), max(FORGETTING, 1 / n)
    own = w * w * (1 - share) if n < 100 else w * w
    slow = state.slow + SLOW * (w - state.slow)
    spread = slow * slow * (2 - SLOW) / SLOW
    return state._replace(
        mean=state.mean + share * w,
        variance=state.variance + of_squares * (own - state.variance),
        product=state.product + of_squares * (w * state.previous - state.product),
        slow=slow,
        slow_square=state.slow_square + of_squares * (spread - state.slow_square),
        previous=w,
        settled=n + 1,
    )


def _correlation(state: ChangePoint) -> float:
    """φ of an autoregressive sequence with this slow variance."""
    ratio = state.slow_square / state.variance
    found = max(state.product / state.variance, (ratio - 1) / (ratio + 1))
    error = 1 / math.sqrt(min(state.settled, 2 / FORGETTING))
    return clip(found + 0.5 * error, (0.0, MOST_CORRELATED))

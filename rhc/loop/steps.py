"""Live steps through a window: plain, or recorded and differentiated."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace

import torch

from rhc.errors import Unseen
from rhc.events import StepTaken
from rhc.hypergradient import Hypergradient
from rhc.hypergradient.record import WindowRecorder
from rhc.loop.fit import Fit
from rhc.loop.state import AVERAGE_EVERY, Attempt, Window
from rhc.loop.window_objective import HeldOutLoss, penalty_of, terminal_loss, value_of
from rhc.rng import preserved
from rhc.training.memory import trim
from rhc.training.objective import Average
from rhc.training.recovery import out_of_memory
from rhc.training.trajectory import StepRecord, Trajectory

DIVERGED = 4.0
"""A window diverges where its loss exceeds this times its first loss, this times the mean loss of
the window before, and 1.5 times the run's first loss."""

EXPLODING_CLIP = 10.0
"""Where costates explode, the reverse pass is repeated with their norms clipped to this times the
norm at the window's end, unless costate_clip is set."""


def restore(fit: Fit, window: Window, attempt: Attempt) -> None:
    fit.announce("restore", attempt.schedule.start, attempt.schedule.stop, attempt.number)
    assert window.before is not None
    fit.go_back(window.before)


def replay(fit: Fit, window: Window, attempt: Attempt) -> Attempt:
    """The attempt, rolled by plain steps from the window's start, with its J unless they fail."""
    fit.announce("replay", attempt.schedule.start, attempt.schedule.stop, attempt.number)
    mean = Average(fit.objective.average)
    take_steps(fit, window, attempt, mean)
    if attempt.failure is None:
        attempt.value = value_of(fit, window, attempt, mean)
        terminal = terminal_loss(fit, window)
        if terminal is not None:
            fit.state.cost.gradient_equivalents += terminal.share / 3
        _check_value(attempt)
    return attempt


def take_steps(fit: Fit, window: Window, attempt: Attempt, mean: Average | None = None) -> None:
    """Takes plain steps through the attempt's window. mean: updated with every iterate."""
    trajectory = fit.plant.roll(
        attempt.batches,
        attempt.schedule,
        average=mean,
        on_step=_on_step(fit, window, attempt),
        limit=_limit(fit, attempt),
    )
    attempt.plain = True
    _observe(fit, attempt, trajectory)


def take_same_steps(fit: Fit, window: Window, first: Attempt, again: Attempt) -> None:
    """Takes the steps of `first`, which did not fail, by the kernels that it was rolled with."""
    if first.plain:
        take_steps(fit, window, again)
        return
    assert fit.state.reverse_pass is not None and first.hypergradient is not None
    recorder = fit.state.reverse_pass.roll(
        list(again.batches),
        again.schedule,
        on_step=_on_step(fit, window, again),
        limit=_limit(fit, again),
        plan=first.hypergradient.plan,
    )
    with closing(recorder):
        _observe(fit, again, recorder.trajectory)


def take_recorded_steps(fit: Fit, window: Window, attempt: Attempt) -> None:
    """Takes recorded steps through the window; adds hypergradient and J unless they fail."""
    reverse_pass, terminal = fit.state.reverse_pass, terminal_loss(fit, window)
    assert reverse_pass is not None
    unseen: str | None = None
    try:
        mean = Average(fit.objective.average)
        recorder = reverse_pass.roll(
            list(attempt.batches),
            attempt.schedule,
            average=mean,
            on_step=_on_step(fit, window, attempt),
            limit=_limit(fit, attempt),
        )
        with closing(recorder):
            attempt.plain = not recorder.plan.graphs
            _observe(fit, attempt, recorder.trajectory)
            if attempt.failure is None:
                # The next window may continue from the roll's random state.
                with preserved():
                    _differentiate(fit, attempt, recorder, mean, terminal)
    except Unseen as error:
        attempt.out_of_memory, unseen = True, str(error)
    except (RuntimeError, MemoryError, OSError) as error:
        if not out_of_memory(error) or fit.plant.ranks is not None:
            raise
        attempt.out_of_memory = True
    if attempt.out_of_memory:  # outside the handler, whose traceback keeps the graphs alive
        attempt.hypergradient, attempt.trajectory, fit.state.live = None, None, None
        _fall_back(fit, attempt, unseen)


def _differentiate(
    fit: Fit,
    attempt: Attempt,
    recorder: WindowRecorder,
    mean: Average,
    terminal: HeldOutLoss | None,
) -> None:
    """Adds hypergradient and J of a recorded roll, whose end is the live state."""
    assert fit.reverse_passes is not None
    clip = fit.reverse_passes.damping.clip
    h = _reverse_pass(fit, recorder, mean, terminal, clip)
    attempt.first_outcome = h.result
    if h.result.name == "exploding" and clip is None and recorder.again:
        h = _reverse_pass(fit, recorder, mean, terminal, EXPLODING_CLIP)
    attempt.hypergradient = h
    attempt.value = h.value + penalty_of(fit, attempt)
    _check_value(attempt)


def _reverse_pass(
    fit: Fit,
    recorder: WindowRecorder,
    mean: Average,
    terminal: HeldOutLoss | None,
    clip: float | None,
) -> Hypergradient:
    assert fit.reverse_passes is not None and fit.state.reverse_pass is not None
    damping, cost = replace(fit.reverse_passes.damping, clip=clip), fit.state.cost
    h = fit.state.reverse_pass.differentiate(recorder, mean, terminal, damping)
    cost.hessian_products += h.hessian_products
    # The terminal loss is counted by its size.
    cost.gradient_equivalents += h.gradient_equivalents - (terminal is not None)
    return h


def _check_value(attempt: Attempt) -> None:
    if not math.isfinite(attempt.value):
        steps = f"[{attempt.schedule.start}, {attempt.schedule.stop})"
        attempt.failure = f"the objective is not finite at steps {steps}"


# While steps are taken ----------------------------------------------------------------------------


def _on_step(fit: Fit, window: Window, attempt: Attempt) -> Callable[[int, StepRecord], None]:
    """The callback after every step; keeps the moment at `commit` if it is inside the window."""
    state, events, schedule = fit.state, fit.events, attempt.schedule
    steps, commit, rewrites = state.steps, window.commit, fit.rewrites
    parameters = fit.plant.parameters

    def on_step(step: int, observed: StepRecord) -> None:
        if step < commit and (steps - step) % AVERAGE_EVERY == 1:
            state.average.update(parameters)
        if rewrites:
            fit.check_stop()
        if step + 1 == commit < schedule.stop:
            attempt.inside = fit.here()
        if events.listeners:
            loss = float(observed.loss) if observed.loss.device.type == "cpu" else None
            events.emit(StepTaken(step, loss, schedule.at(step)))

    return on_step


def _limit(fit: Fit, attempt: Attempt) -> Callable[[float], float]:
    """First loss of a roll -> the loss above which it counts as diverged."""

    def limit(first: float) -> float:
        lately, ever = fit.state.reference or (first, first)
        if not attempt.guarded or min(first, lately, ever) <= 0:
            return math.inf
        return max(DIVERGED * first, DIVERGED * lately, 1.5 * ever)

    return limit


def _observe(fit: Fit, attempt: Attempt, trajectory: Trajectory) -> None:
    attempt.trajectory = trajectory
    fit.state.live = attempt
    fit.state.cost.gradients(len(trajectory))
    if trajectory.diverged is not None:
        loss = float(trajectory.losses[trajectory.diverged])
        step = attempt.schedule.start + trajectory.diverged
        attempt.failure = f"the loss is {loss:.4g} at step {step}"
    elif not fit.plant.is_finite():
        attempt.failure = f"the state is not finite after step {attempt.schedule.stop - 1}"


# Where memory does not suffice --------------------------------------------------------------------


def _fall_back(fit: Fit, attempt: Attempt, unseen: str | None) -> None:
    """Makes later reverse passes use less memory. unseen: why none is possible at all."""
    plant, state = fit.plant, fit.state
    plant.optimizer.zero_grad()
    if unseen is not None:
        state.fallback = replace(state.fallback, never_differentiate=True)
        attempt.failure = f"not differentiated: {unseen}"
        fit.events.tell(f"windows are not rewritten from now on: {unseen}")
        return
    # What an exception leaves is in cycles; without this the next plain step ran out of memory too.
    gc.collect()
    trim()
    if plant.parameters[0].device.type == "cuda":
        torch.cuda.empty_cache()
    assert state.reverse_pass is not None and fit.reverse_passes is not None
    schedule = attempt.schedule
    try:
        plan = state.reverse_pass.plan(len(schedule), next(iter(attempt.batches)), schedule)
        predicted, product = plan.predicted_bytes, str(plan.product)
    except (RuntimeError, MemoryError, OSError) as error:
        if not out_of_memory(error):
            raise
        predicted, product = None, state.reverse_pass.product
    state.fallback, words = state.fallback.more(len(schedule), product, predicted)
    known = state.reverse_pass.state()
    known |= {"product": state.fallback.product or known["product"]}
    state.reverse_pass = fit.reverse_passes.make(state.fallback, known)
    attempt.failure = f"out of memory; from now on {words}"
    fit.events.tell(f"the reverse pass ran {attempt.failure}")

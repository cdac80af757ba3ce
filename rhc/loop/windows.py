"""One window, from the state before it to the committed attempt: the verbs of the loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch

from rhc.errors import DivergedError
from rhc.events import Committed, VerbStarted
from rhc.loop.budget import REWRITE, affords, is_validated, projected_cost
from rhc.loop.data_weights import move_weights, observe, weigh
from rhc.loop.epochs import epoch_end, plan_epochs
from rhc.loop.fit import Fit
from rhc.loop.records import record, tape_rows, tell_online, validation_losses
from rhc.loop.state import Attempt, Window
from rhc.loop.steps import replay, restore, take_recorded_steps, take_steps
from rhc.loop.update_rule import Shift, Twin, added, faded, replanned
from rhc.loop.window_objective import terminal_loss
from rhc.schedule.planned import PlannedSchedule
from rhc.storage.files import finite
from rhc.training import interrupts
from rhc.training.memory import peak_memory
from rhc.training.plant import PATIENCE


def next_window(fit: Fit) -> Window:
    """The next steps, and the state at their start if they may be rewritten."""
    state, start = fit.state, fit.state.step
    length = fit.window if fit.rewrites else fit.stride
    stop = min(start + min(length, state.fallback.longest or length), state.steps)
    if fit.planner is not None:
        stop = min(stop, epoch_end(fit, start))
    commit = min(start + fit.stride, stop)
    return Window(start, stop, commit, fit.here() if fit.rewrites else None)


# Roll ---------------------------------------------------------------------------------------------


def roll(fit: Fit, window: Window, *, differentiate: bool | None = None) -> Attempt:
    """The window as planned, at an lr lowered until all is finite; its end is live. differentiate:
    whether to take its hypergradient; None for the update rule's choice. Raises DivergedError where
    no lr is finite, or, without rewriting, the planned one is not."""
    if not fit.rewrites:
        return _roll_lazily(fit, window)
    if differentiate is None:
        window.skipped = _why_not(fit, window)
        differentiate = window.skipped is None and not isinstance(fit.rule, Twin)
    state, rule, number = fit.state, fit.rule, 0
    failed: tuple[int, float] | None = None
    for schedule, correction, guarded in _schedules_to_roll(fit, window):
        # A loss that no lr lowers is not due to the lr: if finite, it is accepted.
        if not guarded and (failed is None or not math.isfinite(failed[1])):
            break
        state.schedule, state.correction, failed = schedule, correction, None
        for _ in range(rule.rewinds + 1):
            fit.announce("roll", window.start, window.stop, number)
            planned = state.schedule.window(window.start, window.stop)
            batches = fit.data.train.take(window.start, window.stop)
            attempt = Attempt(number, planned, batches, guarded)
            if differentiate:
                take_recorded_steps(fit, window, attempt)
                terminal = terminal_loss(fit, window)
                if attempt.hypergradient is not None and terminal is not None:
                    state.cost.gradients(terminal.share)
            else:
                take_steps(fit, window, attempt)
            if attempt.failure is None:
                window.differentiated |= attempt.hypergradient is not None
                return attempt
            restore(fit, window, attempt)
            record(fit, attempt, "rewound", attempt.failure)
            state.cost.rewound_windows += number == 0
            if attempt.out_of_memory:
                # This window is accepted where the next one will be shorter.
                length = window.stop - window.start
                differentiate = length <= (state.fallback.longest or fit.window)
                differentiate = differentiate and not state.fallback.never_differentiate
                number += 1
                continue
            failed, previous = _place(attempt), failed
            if guarded and _same_place(previous, failed):
                break
            lower = {"lr": math.log(rule.lower_lr)}
            state.schedule = replanned(state.schedule, window.start, lower)
            number += 1
    raise DivergedError(
        f"{attempt.failure}, also at lr x{rule.lower_lr**rule.rewinds:.0e}; "
        "look at the data and the loss of these steps"
    )


def _roll_lazily(fit: Fit, window: Window) -> Attempt:
    fit.announce("roll", window.start, window.stop, 0)
    # Like the plain loop, draw each batch just before its step, from the same random state.
    batches = fit.data.train.lazily(window.start, window.stop)
    if fit.plant.ranks is None:  # ranks end at the same step
        batches = interrupts.until_asked(batches)
    schedule = fit.state.schedule.window(window.start, window.stop)
    attempt = Attempt(0, schedule, batches, guarded=False)
    take_steps(fit, window, attempt)
    if attempt.failure is not None:
        raise DivergedError(
            f"{attempt.failure}; lower the lr, or turn rewriting on to have it lowered"
        )
    assert attempt.trajectory is not None
    window.commit = window.start + len(attempt.trajectory)  # fewer where the run is stopped
    return attempt


def _why_not(fit: Fit, window: Window) -> str | None:
    """Why the window is not looked at; None where it is. Words: `rhc.report.why`."""
    state = fit.state
    if state.replay is not None and not fit.may_rewrite:
        return "replay"
    if state.evidence is None and not _steers(fit, window):
        waits = fit.controls and state.patience.windows_to_skip
        return "waiting" if waits else "until"
    if state.fallback.never_differentiate:
        return "memory"
    if state.reverse_pass is not None and not state.reverse_pass.trusted:
        return "unreliable"
    if isinstance(fit.rule, Twin) or affords(fit, window, REWRITE, reverse_passes=1):
        return None
    return "budget"


def _steers(fit: Fit, window: Window) -> bool:
    """Whether the window's controls may be rewritten, by the rule's choice of windows."""
    patience = fit.state.patience
    within = patience.after_shift or window.start < fit.rule.until * fit.state.steps
    return bool(fit.controls) and within and patience.windows_to_skip == 0


def _schedules_to_roll(
    fit: Fit, window: Window
) -> Iterator[tuple[PlannedSchedule, dict[str, Shift], bool]]:
    """(schedule, correction, whether it is guarded) to roll, each when the last failed."""
    planned, correction = fit.state.schedule, fit.state.correction
    yield planned, correction, True
    first = fit.base.at_first(fit.state)
    here, then = (plan.window(window.start, window.stop) for plan in (planned, first))
    if not all(torch.equal(here[name], then[name]) for name in planned.names if name != "lr"):
        # No lr helps: the rewritten other controls may be the cause.
        fit.events.notice(
            f"no lr keeps the steps from {window.start} on finite: all controls go back to what "
            "the run began with"
        )
        yield first, {}, True
    yield planned, correction, False


def _place(attempt: Attempt) -> tuple[int, float] | None:
    """(step of the window at which the loss was too high, the loss)."""
    trajectory = attempt.trajectory
    if trajectory is None or trajectory.diverged is None:
        return None
    return trajectory.diverged, float(trajectory.losses[trajectory.diverged])


def _same_place(before: tuple[int, float] | None, now: tuple[int, float] | None) -> bool:
    """Whether a lower lr changed little, so that the data must have changed."""
    if before is None or now is None or not math.isfinite(before[1] + now[1]):
        return False
    return abs(before[0] - now[0]) <= PATIENCE and now[1] > 0.7 * before[1]


# Rewrite ------------------------------------------------------------------------------------------


def worth_rewriting(fit: Fit, window: Window, attempt: Attempt) -> bool:
    """Whether to rewrite: a roll by the rule's choice, a rewrite if the last was worth it."""
    rule, reverse_pass = fit.rule, fit.state.reverse_pass
    if not fit.may_rewrite or isinstance(rule, Twin) or window.cut:
        return False
    if attempt.rewrites == 0 and not window.differentiated and window.shift is None:
        return False
    if attempt.rewrites == rule.iterations or (attempt.rewrites and attempt.last_gain < rule.worth):
        return False
    if attempt.rewrites and not _steers(fit, window) and window.shift is None:
        return False  # a window moves data weights once
    if attempt.rewrites and not affords(fit, window, REWRITE, reverse_passes=1):
        return False
    return attempt.hypergradient is not None or reverse_pass is None or reverse_pass.trusted


def hypergradient(fit: Fit, window: Window, attempt: Attempt) -> Attempt:
    """The attempt with its hypergradient, rolled again if needed; unchanged where that fails."""
    if attempt.hypergradient is not None:
        return attempt
    restore(fit, window, attempt)
    fit.announce("roll", window.start, window.stop, attempt.number)
    again = attempt.again()
    take_recorded_steps(fit, window, again)
    if again.out_of_memory:
        record(fit, again, "rejected", again.failure)
    return attempt if again.failure is not None else again


def rewrite(fit: Fit, window: Window, attempt: Attempt) -> Iterator[Attempt]:
    """Attempts to replay, each when the last was rejected: a whole step downhill, then shorter."""
    rule, state, h = fit.rule, fit.state, attempt.hypergradient
    if h is None:
        return
    fit.announce("rewrite", window.start, window.stop, attempt.number)
    if h.result.usable:
        if attempt.plain and attempt is state.live and attempt.end is None:
            attempt.end = fit.here()
        highest = fit.base.highest(state, window.start, window.stop)
        steers = _steers(fit, window) or window.shift is not None
        gradient = {name: h.grad[name] for name in fit.controls} if steers else {}
        observed = observe(fit, window, attempt)
        for retry in range(rule.retries + 1):
            if retry and not affords(fit, window, 2):
                break
            scale = attempt.scale * rule.shrink**retry
            proposal = rule.propose(attempt.schedule, gradient, attempt.value, scale)
            schedule = rule.bounded(proposal.schedule, attempt.schedule, highest)
            carry = proposal.carry
            if attempt.proposal is not None:
                carry = added(attempt.proposal.carry, carry)
            trial = attempt.again(
                number=attempt.number + 1 + retry,
                schedule=schedule,
                proposal=replace(proposal, schedule=schedule, carry=carry),
            )
            yield trial if observed is None else weigh(fit, trial, observed, rule.shrink**retry)
    else:
        record(fit, attempt, "rejected", f"hypergradient {h.result.name}: {h.result.message}")
    state.cost.rejected_windows += attempt.rewrites == 0  # not reached where one was accepted


def accepts(fit: Fit, attempt: Attempt, trial: Attempt) -> bool:
    """Whether a replayed trial replaces the attempt that it was made from."""
    rule = fit.rule
    if trial.failure is None and rule.accept and not trial.value < attempt.value:
        assert trial.proposal is not None
        predicted = trial.proposal.predicted
        trial.failure = f"the objective did not fall, where {predicted:.2g} was predicted"
    if trial.failure is not None:
        record(fit, trial, "rejected", trial.failure, attempt)
        return False
    record(fit, trial, "accepted", None, attempt)
    gain = (attempt.value - trial.value) / max(abs(attempt.value), 1e-12)
    trial.last_gain, trial.gain = gain, 1 - (1 - attempt.gain) * (1 - gain)
    trial.rewrites = attempt.rewrites + 1
    trial.scale = min(attempt.scale * rule.grow, rule.farthest)
    return True


def antithetic_search(fit: Fit, window: Window, rolled: Attempt) -> Attempt:
    """The better of the window at a higher and at a lower lr, by a `Twin`; else as rolled."""
    rule, search = fit.rule, fit.state.antithetic
    if not isinstance(rule, Twin) or window.cut or not fit.may_rewrite:
        return rolled
    if not affords(fit, window, REWRITE):
        return rolled
    tried = []
    for number, proposal in enumerate(rule.twins(rolled.schedule, search.delta)):
        trial = rolled.again(
            number=rolled.number + number, schedule=proposal.schedule, proposal=proposal
        )
        restore(fit, window, trial)
        replay(fit, window, trial)
        if trial.failure is None:
            tried.append(trial)
            if number == 0:
                trial.end = fit.here()
    best = min(tried, key=lambda trial: trial.value, default=rolled)
    for trial in tried:
        kept = trial is best
        why = None if kept else "its twin is better"
        record(fit, trial, "accepted" if kept else "rejected", why, trial)
    if best.proposal is not None:
        upwards = cast(float, best.proposal.carry["lr"]) > 0
        search.delta = rule.next_delta(search.delta, repeats=upwards == search.upwards)
        search.upwards = upwards
    return best


# Commit -------------------------------------------------------------------------------------------


def settle(fit: Fit, window: Window, attempt: Attempt) -> Attempt:
    """The attempt with its end live, as the plain loop's own kernels reach it. Recorded rolls use
    kernels that can be differentiated twice, which round otherwise: committed steps must be
    reproducible by the plain loop. Rolled anew where the repeated steps fail."""
    if attempt.plain and attempt.end is not None and attempt is not fit.state.live:
        fit.go_back(attempt.end)
    elif not (attempt.plain and attempt is fit.state.live):
        restore(fit, window, attempt)
        fit.announce("roll", window.start, window.stop, attempt.number)
        attempt = copy.copy(attempt)
        attempt.trajectory = attempt.inside = None
        take_steps(fit, window, attempt)
    if attempt.failure is None:
        return attempt
    record(fit, attempt, "rewound", attempt.failure)
    assert window.before is not None
    fit.go_back(window.before)
    fit.state.cost.rewound_windows += 1
    return roll(fit, window, differentiate=False)


def commit(fit: Fit, window: Window, attempt: Attempt) -> None:
    """Commits the attempt's steps up to `commit`: to state, tape and plan."""
    state, data, stop = fit.state, fit.data, window.commit
    fit.announce("commit", window.start, attempt.schedule.stop, attempt.number)
    if attempt.inside is not None:
        fit.go_back(attempt.inside)
    if fit.rewrites:
        _update_patience(fit, window, attempt)
        if stop < state.steps:
            shifts = {} if attempt.proposal is None else attempt.proposal.carry
            state.correction, change = faded(state.correction, shifts, fit.rule.carry)
            state.schedule = replanned(state.schedule, stop, change)
    rows = tape_rows(attempt, stop)
    tell_online(window, rows)
    first = rows[0]["loss"] if state.reference is None else state.reference[1]
    state.reference = (sum(row["loss"] for row in rows) / len(rows), first)
    move_weights(fit, window, attempt)
    peak = peak_memory(fit.plant.parameters[0].device)
    state.cost.peak_memory_bytes = max(state.cost.peak_memory_bytes, peak)
    state.step = stop
    if fit.planner is not None:
        plan_epochs(fit, attempt, rows)
    if is_validated(fit, window.start):
        held_out = validation_losses(fit)
        found = {"loss": held_out.loss, **held_out.metrics}
        rows[-1] |= {f"val_{name}": finite(value) for name, value in found.items()}
    data.train.release(stop)
    state.tape += rows
    if fit.directory is not None:
        fit.directory.tape.append(rows)
    skipped = None if window.differentiated or window.shift is not None else window.skipped
    if skipped is not None:
        state.skip(window.start, stop, skipped)
    fit.events.emit(Committed(window.start, stop, rows, projected_cost(fit), skipped))
    state.cost.windows += 1


def slide(fit: Fit, window: Window, attempt: Attempt) -> None:
    number, stop = fit.state.cost.windows - 1, attempt.schedule.stop
    if fit.state.step < fit.state.steps:
        fit.events.emit(VerbStarted("slide", number, window.start, stop, attempt.number))


def _update_patience(fit: Fit, window: Window, attempt: Attempt) -> None:
    """Sets how many windows to skip, by the gain of rewriting this one."""
    rule, patience = fit.rule, fit.state.patience
    if window.cut:
        return
    if window.shift is not None:
        patience.after_shift, patience.data_since = True, window.start
        patience.unhelpful_windows = patience.windows_to_skip = 0
    elif not window.differentiated:
        patience.windows_to_skip = max(0, patience.windows_to_skip - 1)
    elif attempt.gain >= rule.worth:
        patience.unhelpful_windows = 0
    elif rule.patience is not None:
        patience.unhelpful_windows += 1
        if patience.unhelpful_windows >= rule.patience:
            patience.after_shift = False
            patience.windows_to_skip = 2 ** (patience.unhelpful_windows - rule.patience)

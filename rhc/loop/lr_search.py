"""The lr search: an lr for every parameter group, before the first step (numbers: docs/log.md).
`zero_lrs` gives the ratio between groups from the hypergradient at α = 0, `probe` the common scale
from short rolls. Where these learn nothing, longer rolls follow, and then the optimizer's own
lr."""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rhc.errors import DivergedError
from rhc.events import StartFound
from rhc.hypergradient import Hypergradient
from rhc.loop.epochs import begin_planning
from rhc.loop.fit import Fit
from rhc.loop.trials import NoRoom, Trial, Trials
from rhc.rng import preserved
from rhc.schedule import CONTROLS
from rhc.settings.owners import Start
from rhc.training.loaders import pristine

ZERO_STEPS = 50
"""Steps at constant weights of the hypergradient at α = 0."""

DROP = 0.05
"""Relative fall of the objective by the lrs from zero, to first order."""

GREED = 1.5
"""Divisor of the factor found: even a quarter of the run prefers an lr that is too high."""

ADAPTIVE_GREED = 1 / 1.5
"""The same for optimizers that divide by a second moment. Their probes are short beside the warm-up
and err to the other side: a language model wants twice the lr that a quarter of its run does."""

FEWEST, LEAST = 10, 5
"""Minimal steps of a probe, as fewer show little and save little; the second where the budget does
not allow the first. Below that, there is no probe."""

FEWEST_OF_STAGE = 3
"""Probes that a stage must afford: one at the best lr so far and one on either side."""

LEARNED = 0.1
"""Relative fall below the loss of shorter rolls that shows learning, which in the first steps may
be no more than the mean of the targets."""

ERRORS = 2.0
"""The fall must also exceed this many standard errors of the difference over common batches."""

LONGER_ROLLS, LONGER = 4, 1.5
"""Where nothing is learned: as many rolls as this, as long as the budget allows, if that is longer
than any before by this factor."""

LONGER_STEP = 3.0
"""Factor between the lrs of longer rolls; less where the given and the highest harmless lr are
close, so that one lies between them."""

LONGER_DIVERGED = 50.0
"""Longer rolls diverge above this times the first loss, since that one may be low by chance and
there are few rolls."""


@dataclass(frozen=True)
class Stage:
    """Probes of `share` of the run's steps, a factor apart, at most `farthest` to one side."""

    share: float
    factor: float
    farthest: int


STAGES = (Stage(0.025, 10.0, 12), Stage(0.1, 3.0, 4), Stage(0.25, 2.0, 2))
"""Short probes find the decade, long ones the factor of two. Short ones alone prefer an lr that is
too high, and the harm cannot be undone."""


def zero_lrs(
    gradient: Tensor, value: float, sizes: Sequence[int], own: Sequence[float]
) -> list[float] | None:
    """Every group's lr from dJ/dα at α = 0; None where no group's lr lowers the objective.

    gradient: (K, G) dJ/dα_ti. value: J there. sizes: n_i, parameters per group. own: the
    optimizer's lrs; a group at 0 stays there.

    α_i = DROP √n_i / (s_i Σ_j √n_j), s_i = −Σ_t dJ/dα_ti / |J|: every group lowers J by a share
    that goes by its size, in any units. A group whose lr would raise J gets the lowest of the
    others.
    """
    slopes = (-gradient.sum(0) / max(abs(value), 1e-12)).tolist()
    active = [i for i, lr in enumerate(own) if lr != 0 and sizes[i]]
    falling = [i for i in active if slopes[i] > 0 and math.isfinite(slopes[i])]
    if not falling:
        return None
    total = sum(math.sqrt(sizes[i]) for i in falling)
    found = {i: _bounded(DROP * math.sqrt(sizes[i]) / (total * slopes[i])) for i in falling}
    lowest = min(found.values())
    return [found.get(i, lowest if i in active else 0.0) for i in range(len(own))]


def _bounded(lr: float) -> float:
    return min(max(lr, CONTROLS["lr"].lower), CONTROLS["lr"].upper)


def probe(
    judge: Callable[[int, float], float],
    steps: int,
    lowest: float,
    highest: float,
    stages: Sequence[Stage] = STAGES,
    longest: Callable[[int], int] = lambda rolls: 2**63,
) -> float | None:
    """The common factor on all lrs; None where no probe is finite.

    judge(n, factor): the loss after n steps at `factor` times the lrs, inf where they diverge;
    raises NoRoom where that costs too much. longest(rolls): affordable steps for each of so many
    more rolls.

    Every stage starts at the best factor so far, tries both sides and descends until the minimum is
    passed; a parabola in log lr goes through the last three losses. A stage beyond the budget takes
    shorter rolls, or none if they would be shorter than those before.
    """
    centre, before = 1.0, min(LEAST, steps)
    for number, stage in enumerate(stages):
        n = min(steps, max(FEWEST, round(stage.share * steps)))
        n = min(n, longest(FEWEST_OF_STAGE))
        if n < before:
            break
        before = n
        seen: dict[int, float] = {}

        def at(
            k: int,
            n: int = n,
            stage: Stage = stage,
            centre: float = centre,
            seen: dict[int, float] = seen,
        ) -> float:
            if k not in seen:
                factor = centre * stage.factor**k
                inside = abs(k) <= stage.farthest and lowest <= factor <= highest
                found = judge(n, factor) if inside else math.inf
                seen[k] = found if math.isfinite(found) else math.inf
            return seen[k]

        try:
            best = _lowest(at, stage.farthest)
        except NoRoom:
            best = min(seen, key=lambda k: (seen[k], k), default=0)
            if seen and not math.isfinite(seen[best]):
                best -= 1  # below all that diverge
            centre *= stage.factor**best
            break
        if not math.isfinite(at(best)):
            return None if number == 0 else centre
        last = number == len(stages) - 1
        offset = _vertex(at(best - 1), at(best), at(best + 1)) if last else 0.0
        centre *= stage.factor ** (best + offset)
    return min(max(centre, lowest), highest)


def _lowest(at: Callable[[int], float], farthest: int) -> int:
    """The index of the minimum of `at`, downhill from 0; infinite values count as highest."""
    k = 0
    while not math.isfinite(at(k)) and k > -farthest:
        k -= 1
    upwards = at(k + 1) < at(k)
    side = 1 if upwards else -1
    while abs(k) < farthest and at(k + side) < at(k):
        k += side
    return k


def _vertex(left: float, middle: float, right: float) -> float:
    """The minimum of the parabola through losses at -1, 0, 1, within ±1/2."""
    curvature = left - 2 * middle + right
    if not math.isfinite(curvature) or curvature <= 0:
        return 0.0
    return min(max(0.5 * (left - right) / curvature, -0.5), 0.5)


# The search ---------------------------------------------------------------------------------------


def find_first_lr(fit: Fit, start: Start) -> None:
    """Searches the first lr and plans the run from it; DivergedError where no probe is finite. A
    run resumed at step 0 reads its trials in start.jsonl."""
    state, train_loader = fit.state, fit.data.train_loader
    search = LrSearch(fit)
    with preserved(), pristine(train_loader):
        lr = search.find(start)
    search.trials.stream.close()
    state.start_gradients = search.trials.gradients
    state.cost.gradients(state.start_gradients)
    if lr is None:
        raise DivergedError(
            "no lr within its bounds keeps a short roll finite; look at the data and the loss"
        )
    state.schedule, state.first_lr = fit.base.planned(state.steps, lr), lr
    begin_planning(fit, float(lr.max()))
    given = search.given.tolist()
    cost = state.start_gradients / state.steps
    state.chosen_start = search.chosen | {"start": start, "given": given, "cost": cost}
    fit.events.emit(StartFound(start, lr.tolist(), given, cost, state.chosen_start))


class LrSearch:
    """What trial rolls say about the first lr. rolls: those at an lr above 0, in order. chosen: by
    which rule, and from which roll; its words are in `rhc.report.why`."""

    def __init__(self, fit: Fit) -> None:
        self.fit, self.trials = fit, Trials(fit)
        self.given = self.trials.planned.window(0, 1)["lr"][0]
        self.rolls: list[Trial] = []
        self.chosen: dict[str, Any] = {}

    def find(self, start: Start) -> Tensor | None:
        """The lr of step 0, () or (G,); None where nothing is finite."""
        base, own = self.given, self.fit.plant.controls.own["lr"]
        if start == "zero":
            base = self._from_zero(base)
        elif (
            len(own) > 1 and len(set(own)) == 1 and own[0] > 0
        ):  # the ratio is not the user's choice
            ratio = self._from_zero(base)
            base = base.max() * ratio / ratio.max()
            # Start where the smallest lr is within its bounds.
            base = base * max(1.0, CONTROLS["lr"].lower / float(base[base > 0].min()))
        factor = self._factor(base)
        if factor is None:
            # A first loss that is low by chance would put all others above the limit.
            self.trials.limit = None
            factor = self._factor(base)
        if factor is None:
            return None
        if not self.rolls:
            self.fit.events.tell(
                f"the budget has no room to look for the lr: it stays {_words(self.given)}, "
                "as given"
            )
            return self._chosen("budget", self.given)
        greed = ADAPTIVE_GREED if "betas" in self.fit.plant.optimizer.param_groups[0] else GREED
        least = CONTROLS["lr"].lower
        found = torch.where(base == 0, base, (base * factor / greed).clamp(min=least))
        if not self._learned():
            return self._by_longer_rolls(found)
        return self._chosen("rolls", found, best=base * factor, divided_by=greed)

    def _chosen(self, rule: str, lr: Tensor, **more: Any) -> Tensor:
        """lr, after `chosen` says where it is from. rule: "rolls" for the usual one, "longer" for
        rolls that went on where shorter ones learned nothing, "short" or "given" where none did,
        "budget" where there was no room to look."""
        self.chosen = {"rule": rule, "lr": lr.tolist(), "rolls": len(self.rolls)}
        self.chosen |= {n: v.tolist() if isinstance(v, Tensor) else v for n, v in more.items()}
        if finite := self._finite():
            longest = max(trial.steps for trial in finite)
            best = self._best(longest)
            self.chosen |= {"steps": longest, "rolled": best.asked, "loss": best.loss}
        return lr

    def _from_zero(self, given: Tensor) -> Tensor:
        """The lrs at which the objective falls by DROP; else, or beyond the budget, `given`."""
        trials, plant = self.trials, self.fit.plant
        steps = math.floor(min(ZERO_STEPS, trials.steps, trials.room / 4))
        # Its result must be probed.
        probes = FEWEST_OF_STAGE * (min(LEAST, trials.steps) + trials.share / 3)
        if steps < 1 or steps + trials.share + probes > trials.room:
            return given

        def lrs(h: Hypergradient) -> list[float] | None:
            groups = plant.optimizer.param_groups
            sizes = [sum(p.numel() for p in g["params"] if p.requires_grad) for g in groups]
            own = plant.controls.own["lr"]
            return zero_lrs(h.grad["lr"], h.value, sizes, own) if h.result.usable else None

        found = trials.from_zero(steps, lrs)
        if found is None:
            return given
        return torch.tensor(found if len(found) > 1 else found[0], dtype=torch.float64)

    def _factor(self, base: Tensor) -> float | None:
        """The factor on the lrs that short rolls find."""
        highest, lowest = float(base.max()), float(base[base > 0].min())
        bounds = CONTROLS["lr"]
        return probe(
            lambda n, factor: self._roll(n, base * factor).loss,
            self.trials.steps,
            bounds.lower / lowest,
            bounds.upper / highest,
            longest=self.trials.longest,
        )

    def _roll(self, n: int, lr: Tensor) -> Trial:
        trial = self.trials.roll(n, lr)
        if trial not in self.rolls:
            self.rolls.append(trial)
        return trial

    # Where nothing is learned ---------------------------------------------------------------------

    def _learned(self) -> bool:
        """Whether longer rolls learned more than shorter ones; without any, the shortest decide. A
        loss that only falls at first may have found the mean of the targets, which any lr does."""
        lengths = sorted({trial.steps for trial in self._finite()})
        for n in lengths:
            shorter = [trial for trial in self._finite() if 2 * trial.steps <= n]
            if shorter:
                before = min(shorter, key=_loss)
            elif 2 * n <= lengths[-1]:
                continue
            else:
                before = self.trials.untrained(n)
            if self._below(self._best(n), before, LEARNED):
                return True
        return False

    def _below(self, a: Trial, b: Trial, least: float = 0.0) -> bool:
        """Whether a's loss is below b's by more than noise, and by the share `least`. With single
        batches the noise is unknown, and the share is `LEARNED` at least."""
        x, y, error = a.batches, b.batches, 0.0
        if min(len(x), len(y)) < 2:
            least = max(least, LEARNED)
        elif len(x) == len(y) and (self.trials.fixed or a.steps == b.steps):
            error = statistics.stdev(q - p for p, q in zip(x, y, strict=True)) / math.sqrt(len(x))
        else:
            error = math.sqrt(sum(statistics.variance(z) / len(z) for z in (x, y)))
        return b.loss - a.loss > max(least * abs(b.loss), ERRORS * error)

    def _finite(self) -> list[Trial]:
        return [trial for trial in self.rolls if math.isfinite(trial.loss)]

    def _best(self, n: int) -> Trial:
        return min((trial for trial in self.rolls if trial.steps == n), key=_loss)

    def _by_longer_rolls(self, found: Tensor) -> Tensor:
        """The lr by longer rolls where short ones, with result `found`, learned nothing."""
        before = max(trial.steps for trial in self.rolls)
        highest = self._highest()
        n = self.trials.longest(LONGER_ROLLS)
        longer = n >= LONGER * before
        if longer:
            self.trials.limit = self.trials.limit and LONGER_DIVERGED
        else:
            n = min(trial.steps for trial in self.rolls)
        with contextlib.suppress(NoRoom):
            self._roll(n, self.given)
            if longer:
                self._roll(n, highest)
        if longer and self._learned():
            lr = self._best_of_longer(n, highest)
            self.fit.events.tell(
                f"rolls of up to {before} steps learn nothing that tells lrs apart; by rolls of "
                f"{n} steps lr is {_words(lr)}"
            )
            return self._chosen("longer", lr)
        # The given lr stays unless a roll showed it to be worse.
        given = [trial for trial in self.rolls if trial.asked == self.given.tolist()]
        last = max(given, key=lambda trial: trial.steps, default=None)
        worse = last is not None and (
            math.isinf(last.loss) or self._below(self._best(last.steps), last)
        )
        lr, why = (found, "as short rolls find it") if worse else (self.given, "as given")
        longest = max(trial.steps for trial in self.rolls)
        self.fit.events.tell(
            f"no roll of up to {longest} steps learns anything that tells lrs apart: lr is "
            f"{_words(lr)}, {why}; if the run learns nothing, train for longer or give another lr"
        )
        return self._chosen("short" if worse else "given", lr)

    def _best_of_longer(self, n: int, highest: Tensor) -> Tensor:
        """The lr that rolls of n steps find around the better of the given and the highest one."""
        with contextlib.suppress(NoRoom):
            centre = self._best(n).lr
            apart = math.sqrt(float(highest.max() / self.given.max()))
            step = max(apart, 1 / apart)
            if not 1.2 <= step <= LONGER_STEP:
                step = LONGER_STEP
            _lowest(lambda k: self._roll(n, centre * step**k).loss, 2)
        # A run is longer than a roll and wants no higher lr: the lowest of the good ones.
        best, untrained = self._best(n), self.trials.untrained(n)
        good = [
            trial
            for trial in self._finite()
            if trial.steps == n
            and not self._below(best, trial)
            and self._below(trial, untrained, LEARNED)
        ]
        return min(good or [best], key=lambda trial: trial.highest).lr

    def _highest(self) -> Tensor:
        """The highest lr that does no harm in the first steps: the fastest where a loss is flat."""
        n = min(trial.steps for trial in self.rolls)
        harmful = [trial.highest for trial in self.rolls if self._harms(trial)]
        edge = min(harmful, default=math.inf)
        lower = [trial for trial in self._finite() if trial.highest < edge]
        lr = max(lower or self._finite(), key=lambda trial: trial.highest).lr
        highest = CONTROLS["lr"].upper / 10
        with contextlib.suppress(NoRoom):
            while not harmful and lr.max() <= highest and not self._harms(self._roll(n, 10 * lr)):
                lr = 10 * lr
        return lr

    def _harms(self, trial: Trial) -> bool:
        """Whether a roll ended above the untrained loss."""
        return math.isinf(trial.loss) or self._below(self.trials.untrained(trial.steps), trial)


def _loss(trial: Trial) -> float:
    return trial.loss


def _words(lr: Tensor) -> str:
    return ", ".join(f"{value:.3g}" for value in lr.reshape(-1).tolist())

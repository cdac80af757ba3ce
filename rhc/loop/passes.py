"""Passes: the whole run as one window, for the shape of its schedule.

The run is rolled; dJ/du of its steps is taken backwards from checkpoint to checkpoint; the schedule
moves by knots; the run is replayed. A replay is kept where the loss fell on held-out rows that the
gradient has not seen, and the one that is kept last is the run: nothing is trained again.

Every roll is a run in a folder of its own below `passes/`, and every segment of a reverse pass is
saved there, so that a killed run goes on with whatever it was doing. Decisions are made anew from
these files, to the bit.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rhc.containers import Kept
from rhc.distributed import halves
from rhc.distributed.directory import directory_of
from rhc.errors import DivergedError, InputError, StorageError
from rhc.events import CheckpointSaved, Committed, Event, Listener
from rhc.hypergradient import Boundary, Hypergradient, Product
from rhc.loop.checkpointing import open_run, stand_at, write_checkpoint
from rhc.loop.fit import EventLog, Fit, ReversePasses
from rhc.loop.records import smoothness
from rhc.loop.state import Cost, Moment, State
from rhc.loop.update_rule import Proposal, Rewrite, hat_functions
from rhc.loop.window_objective import HeldOutLoss, at_most, held_out_loss
from rhc.rng import mixed_seed
from rhc.schedule import CONTROLS, Schedule
from rhc.schedule.planned import Piece, PlannedSchedule
from rhc.schedulers import EpochPlanner
from rhc.storage.checkpoint import Checkpoint, CheckpointStore
from rhc.storage.files import finite, make_directory
from rhc.storage.run_directory import RunDirectory
from rhc.storage.run_files import PASSES
from rhc.storage.trees import joined, parted
from rhc.training.batches import StepBatches, batch_size
from rhc.training.objective import Average, Objective

KNOTS = 6
"""Values per control and pass: more follow the noise of the rows that judge."""

STEP = 0.5
"""Largest move of a knot in the first pass, in nats or logits: 1.5 times as far after a pass that
was kept, 0.3 times where its replay was not."""

SHRINK, GROW, FARTHEST = 0.3, 1.5, 4.0

WORTH = 0.005
"""Relative fall of the loss below which no further pass is made."""

MOST_BATCHES = 32
"""Held-out batches at most, half of them for the gradient."""

SEGMENTS = 32
"""Checkpoints of a roll at most; between two of them the memory plan decides."""

GROWN = 1e3
"""Growth of the costate, going backwards, beyond which earlier steps stay as they are: what they
do to the end is chaos (Metz et al. 2021)."""

STEEPEST = 1.0
"""Relative change of J per nat at one knot, beyond which it and all before it stay as they are: no
linear model reaches that far."""

LEAST = 1e-3
"""Share of J that a proposal is predicted to gain, or it is not replayed."""

POINTS = 200
"""Of a curve in passes.jsonl."""

BACKWARDS = "backwards"
"""Folder of a roll with what its reverse pass has found so far."""


@dataclass(frozen=True)
class Rows:
    """Held-out rows: those that J is the loss of, and others, by which replays are kept."""

    of_gradient: HeldOutLoss
    of_choice: HeldOutLoss


@dataclass
class Rolled:
    """A roll of the whole run. value: J at its end; held_out: the loss on the other rows; both inf
    where it diverged."""

    number: int
    schedule: Schedule
    fit: Fit
    value: float
    held_out: float

    @property
    def directory(self) -> RunDirectory:
        assert self.fit.directory is not None
        return self.fit.directory


@dataclass
class Backwards:
    """A reverse pass through a whole run, as far as it got, going backwards.

    gradient: of the steps from `first` on, a part per segment, control -> (n,) or (n, groups).
    norms: of the costate before each step. why: what ended it before step 0.
    """

    segments: int = 0
    first: int = 0
    gradient: list[dict[str, Tensor]] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    later: Boundary | None = None
    why: str | None = None
    cost: Cost = field(default_factory=Cost)

    def of(self, name: str) -> Tensor:
        """dJ/du of all steps, 0 before `first`."""
        found = torch.cat([part[name] for part in self.gradient])
        return torch.cat([found.new_zeros(self.first, *found.shape[1:]), found])


def passable(
    windows: ReversePasses | None, product: Product, planner: EpochPlanner | None
) -> ReversePasses:
    """Settings of the reverse passes through a whole run, from those of its windows. InputError
    where a run cannot be replayed as a whole."""
    if windows is None:
        raise InputError("passes rewrite a whole run, and rewrite=False; leave one of them out")
    plant, objective = windows.plant, windows.objective
    why = None
    if objective.reward_weight or not objective.terminal_weight:
        why = "the objective is not the held-out loss at its end"
    elif planner is not None:
        why = "epochs are planned from what is observed"
    elif plant.data_weights is not None:
        why = "the weights of its data move from window to window"
    elif plant.parallel.sharded:
        why = "parameters are shared out (fully_shard)"
    if why is not None:
        raise InputError(f"passes rewrite a whole run, and {why}; use passes=0")
    return replace(windows, objective=Objective(average=None), product=product)


def rewrite_whole_run(fit: Fit, train: Callable[[Fit], None]) -> None:
    """Rewrites a run that stands at step 0 up to `fit.passes` times while that pays, and commits
    all of its steps. train: takes a fit to its end."""
    with _folder(fit) as folder:
        passes = _Passes(fit, folder, train)
        first = best = passes.roll(0, None)
        passes.take_check(first)
        count, scale, number = fit.passes, 1.0, 0
        if first.fit.state.patience.data_since:
            since, count = first.fit.state.patience.data_since, 0
            fit.events.tell(
                f"no pass over the whole run: the data change at step {since}, and windows have "
                "followed them",
                mild=True,
            )
        for done in range(1, count + 1):
            back, kept, shrink = passes.differentiate(best), None, 1.0
            spent = back.cost
            while kept is None and shrink >= SHRINK:
                proposal, moved_from, why = _proposal(best, back, scale * shrink)
                if proposal is None:
                    fit.events.tell(
                        f"pass {done} over the whole run moves nothing: {why}", mild=True
                    )
                    break
                number += 1
                trial = passes.roll(number, proposal.schedule)
                spent = spent.plus(trial.fit.state.cost)
                kept = trial if trial.held_out < best.held_out else None
                record = {
                    **_compared(best, trial, proposal),
                    "pass": done,
                    "attempt": number,
                    "kept": kept is not None,
                    "moved_from": moved_from,
                    "reason": why,
                    "plain_run_equivalents": spent.gradient_equivalents / passes.steps,
                    "costate_norms": _curve(torch.cat(back.norms), passes.steps),
                }
                passes.note(record)
                scale *= 1.0 if kept is None else shrink * GROW
                shrink *= SHRINK
                passes.pay(spent)
                spent = Cost()
            passes.pay(spent)
            if kept is None:
                break
            gained, best = best.held_out - kept.held_out, kept
            if gained < WORTH * abs(best.held_out):
                break
            scale = min(scale, FARTHEST)
        passes.commit(best, first)


class _Passes:
    """What the passes of a fit share: the run's beginning, and the rows that judge."""

    def __init__(self, fit: Fit, folder: Path, train: Callable[[Fit], None]) -> None:
        self.fit, self.folder, self.train = fit, folder, train
        self.steps = fit.state.steps
        self.beginning: Moment = fit.here()
        self.positions = [(stream, stream.position(0)) for stream in _streams(fit)]
        self.apart = fit.stride * math.ceil(self.steps / (fit.stride * SEGMENTS))
        self.rows = _rows(fit)
        assert fit.whole_run is not None
        self.reverse_pass = fit.whole_run.make(fit.state.fallback)
        self.known = [] if fit.directory is None else fit.directory.passes.read()

    def pay(self, cost: Cost) -> None:
        self.fit.state.cost = self.fit.state.cost.plus(cost)

    def take_check(self, first: Rolled) -> None:
        """Products that windows have verified are not verified again."""
        windows = first.fit.state.reverse_pass
        if windows is not None and windows.product == self.reverse_pass.product:
            self.reverse_pass.check = windows.check

    def note(self, record: dict[str, Any]) -> None:
        """Adds a line to passes.jsonl, unless a run that was stopped has, and tells it."""
        fit, record = self.fit, finite(record)
        fit.state.passes.append(record)
        if fit.directory is not None and len(fit.state.passes) > len(self.known):
            fit.directory.record_now(fit.directory.passes, record)
        fit.events.tell(sentence(record), mild=True)

    # Rolls ---------------------------------------------------------------------------------------

    def roll(self, number: int, schedule: Schedule | None) -> Rolled:
        """The run by a schedule, or as it is without passes; one that is there is continued."""
        fit, plan = self.fit, self.fit.state.schedule
        fit.go_back(self.beginning)
        for stream, position in self.positions:
            stream.seek(position)
        if schedule is not None:
            plan = PlannedSchedule((Piece(0, schedule),), self.steps)
        state = State(self.steps, plan, fit.state.first_lr, None)
        directory = directory_of(
            self.folder / f"{number:02d}", 1, fit.events.notice, {}, fit.plant.ranks
        )
        directory.checkpoints.keeps = lambda step: step % self.apart == 0
        events = _apart(fit.events)
        sub = replace(fit, state=state, directory=directory, events=events)
        if schedule is not None:
            base = replace(fit.base, followed=schedule)
            sub = replace(sub, reverse_passes=None, base=base)
        elif fit.reverse_passes is not None:
            state.reverse_pass = fit.reverse_passes.make(state.fallback)
        described = {"steps": self.steps, "schedule": plan.window(0, self.steps).digest()}
        value = held_out = math.inf
        try:
            checkpoint = directory.open(described, "auto")
            open_run(sub, directory, checkpoint, fit.state.start_gradients * (schedule is None))
            fit.state.seconds_before += state.seconds_before
            self.train(sub)
            value, held_out = (self._loss(sub, rows) for rows in vars(self.rows).values())
        except DivergedError as error:
            if schedule is None:
                raise
            fit.events.notice(f"a replay of the whole run diverged: {error}")
        finally:
            directory.close()
            for message in events.told:
                if message not in fit.events.told:
                    fit.events.told.append(message)
        if schedule is None:
            schedule = state.committed()
            fit.state.cost = replace(state.cost)  # the search's cost is in it
        return Rolled(number, schedule, sub, value, held_out)

    def _loss(self, sub: Fit, rows: HeldOutLoss) -> float:
        with torch.no_grad():
            value = self.fit.plant.value(rows(self.fit.plant.model))
        sub.state.cost.gradient_equivalents += rows.share / 3
        return value if math.isfinite(value) else math.inf

    # Backwards -----------------------------------------------------------------------------------

    def differentiate(self, rolled: Rolled) -> Backwards:
        """dJ/du of the run's steps, backwards from checkpoint to checkpoint as far as it holds."""
        fit, reverse_pass = self.fit, self.reverse_pass
        store = CheckpointStore(self.folder / f"{rolled.number:02d}" / BACKWARDS, 1)
        back = self._found(store) or Backwards(first=self.steps)
        kept = rolled.directory.checkpoints.steps()
        places = sorted({*(step for step in kept if step % self.apart == 0), self.steps})
        for stop, start in list(zip(places[:0:-1], places[-2::-1], strict=True))[back.segments :]:
            if back.why is not None:
                break
            h = self._segment(rolled, start, stop, back)
            back.later = reverse_pass.before
            assert back.later is not None
            if h.result.usable:
                back.gradient.insert(0, {name: h.grad[name] for name in fit.controls})
                back.norms.insert(0, h.costate_norms)
                back.first = start
                if float(h.costate_norms[0]) > GROWN * back.later.end > 0:
                    back.why = f"by step {start} the costate has grown {GROWN:g}-fold"
            else:
                back.why = h.result.message
            back.segments += 1
            self._save(store, back)
            fit.check_stop()
        return back

    def _segment(self, rolled: Rolled, start: int, stop: int, back: Backwards) -> Hypergradient:
        """Steps [start, stop), rolled again from the checkpoint and differentiated."""
        fit, last = rolled.fit, back.later is None
        stand_at(fit, rolled.directory.at(start))
        fit.announce("roll", start, stop, rolled.number)
        terminal, mean = self.rows.of_gradient if last else None, Average(None)
        batches = fit.data.train.take(start, stop)
        reverse_pass = self.reverse_pass
        recorder = reverse_pass.roll(batches, rolled.schedule.window(start, stop), average=mean)
        with closing(recorder):
            h = reverse_pass.differentiate(recorder, mean, terminal, later=back.later)
        fit.data.train.release(stop)
        back.cost.gradients(stop - start)
        back.cost.hessian_products += h.hessian_products
        back.cost.gradient_equivalents += h.gradient_equivalents
        if last:  # counted by its size
            back.cost.gradient_equivalents += self.rows.of_gradient.share - 1
        return h

    def _save(self, store: CheckpointStore, back: Backwards) -> None:
        tensors: dict[str, Tensor] = {}
        later = back.later
        assert later is not None
        found = {
            **{name: value for name, value in vars(back).items() if name not in ("later", "cost")},
            "cost": asdict(back.cost),
            "costate": vars(later.costate),
            "blocks": [asdict(block) for block in later.blocks],
            "end": later.end,
            "reverse_pass": self.reverse_pass.state(),
        }
        values = {"found": parted(found, "found", tensors)}
        plain = {name: t.cpu().contiguous().clone() for name, t in tensors.items()}

        def write() -> None:
            store.save(Checkpoint(back.segments, {"found": plain}, values))

        ranks = self.fit.plant.ranks
        write() if ranks is None else ranks.by_first(write)

    def _found(self, store: CheckpointStore) -> Backwards | None:
        """What a reverse pass that was stopped had found."""
        newest = next(store.usable(), None)
        if newest is None:
            return None
        found = joined(newest.values["found"], newest.tensors["found"])
        self.reverse_pass.load_state(found.pop("reverse_pass"))
        later = Boundary.of(
            found.pop("blocks"),
            found.pop("costate"),
            found.pop("end"),
            self.fit.plant.parameters[0].device,
        )
        return Backwards(**{**found, "later": later, "cost": Cost(**found["cost"])})

    # Commit --------------------------------------------------------------------------------------

    def commit(self, best: Rolled, first: Rolled) -> None:
        """Commits all steps of the roll that is kept; windows are those of the first."""
        fit, state, own, windows = self.fit, self.fit.state, best.fit.state, first.fit.state
        if best.directory.saved != self.steps:
            raise StorageError(
                f"the end of the run that is kept could not be saved in {best.directory.path}; "
                "make room there and run the same command again"
            )
        stand_at(fit, best.directory.at(self.steps))
        state.step, state.tape, state.reference = own.step, own.tape, own.reference
        state.average, state.best = own.average, own.best
        state.schedule = PlannedSchedule((Piece(0, best.schedule),), self.steps)
        state.windows, state.skipped = windows.windows, windows.skipped
        state.replay = windows.replay
        state.cost = replace(state.cost, windows=own.cost.windows)
        if fit.directory is not None:
            fit.directory.tape.append(state.tape)
            fit.directory.windows.append(state.windows)
            if state.best is not None and fit.events.warns:
                make_directory(fit.directory.checkpoints.root)
                fit.directory.checkpoints.keep_best(best.directory.checkpoints.best)
        for start in range(0, self.steps, fit.stride):
            rows = state.tape[start : start + fit.stride]
            spent = state.cost.gradient_equivalents / self.steps
            fit.events.emit(Committed(start, start + len(rows), rows, spent))
        write_checkpoint(fit)


def sentence(record: dict[str, Any]) -> str:
    """A line of passes.jsonl in words."""
    before, after = record["held_out_before"], record["held_out_after"]
    head = f"pass {record['pass']} over the whole run"
    if after is None:
        return f"{head}: the replay diverged and is not kept"
    moved = (
        f"steps from {record['moved_from']} on move" if record["moved_from"] else "all steps move"
    )
    kept = "kept" if record["kept"] else "not kept"
    return (
        f"{head}: {moved}, held-out loss {before:.4g} -> {after:.4g}, {kept}; J changed by "
        f"{record['measured_change']:.2g} where {record['predicted_change']:.2g} was predicted"
    )


def _proposal(
    rolled: Rolled, back: Backwards, scale: float
) -> tuple[Proposal | None, int, str | None]:
    """(the schedule to replay, the first step that moves, why those before do not)."""
    schedule, first, why = rolled.schedule, back.first, back.why
    steps, size = len(schedule), max(abs(rolled.value), 1e-12)
    if not back.gradient:
        return None, steps, why
    gradient = {name: back.of(name) for name in back.gradient[0]}
    basis = hat_functions(steps, KNOTS)
    for name, natural in gradient.items():
        slope = natural * CONTROLS[name].slope(schedule[name])
        knots = (basis.T @ slope / size).abs().reshape(basis.shape[1], -1).amax(1)
        steep = (knots > STEEPEST).nonzero()
        if len(steep):
            place = (int(steep.max()) + 0.5) * (steps - 1) / max(1, len(knots) - 1)
            if place >= first:
                first = min(math.ceil(place), steps)
                why = f"before step {first} J changes by more than its own size per nat"
    held = {name: torch.zeros_like(g)[:first] for name, g in gradient.items()}
    gradient = {name: torch.cat([held[name], g[first:]]) for name, g in gradient.items()}
    rule = Rewrite(step=dict.fromkeys(CONTROLS, STEP), knots=KNOTS, cooldown=0.0)
    proposal = rule.propose(schedule, gradient, rolled.value, scale)
    moved = proposal.schedule.values
    values = {n: torch.cat([v[:first], moved[n][first:]]) for n, v in schedule.values.items()}
    proposal = replace(proposal, schedule=Schedule(values, 0, schedule.seed))
    if first == steps or not proposal.predicted < -LEAST * size:
        least = f"no more than {-proposal.predicted / size:.1g} of J is to be gained"
        return None, steps, why if first == steps else least
    return proposal, first, why


def _compared(before: Rolled, after: Rolled, proposal: Proposal) -> dict[str, Any]:
    """What passes.jsonl says of a replay and of what it was made from."""
    measured = after.value - before.value
    return {
        "objective_before": before.value,
        "objective_after": after.value,
        "held_out_before": before.held_out,
        "held_out_after": after.held_out,
        "predicted_change": proposal.predicted,
        "measured_change": measured,
        "smoothness": smoothness(measured, proposal.predicted),
        **{
            name: {n: _curve(v, len(rolled.schedule)) for n, v in rolled.schedule.values.items()}
            for name, rolled in (("before", before), ("after", after))
        },
    }


def _curve(values: Tensor, steps: int) -> list[list[Any]]:
    """[[step, value or values of groups], …], at most POINTS of them; values end at `steps`."""
    apart = math.ceil(len(values) / POINTS)
    first = steps - len(values)
    return [[first + i, values[i].tolist()] for i in range(0, len(values), max(1, apart))]


# What judges, and where it is kept ----------------------------------------------------------------


def _rows(fit: Fit) -> Rows:
    """Rows of val_loader; without one, training batches that follow the run's."""
    data, steps = fit.data, fit.state.steps
    seed = mixed_seed(fit.state.schedule.seed, 2) % 2**31
    if data.val_loader is not None:
        stream = StepBatches(
            data.val_loader, isolated=True, seed=seed, device=data.train.device, name="val_loader"
        )
        first, count = 0, at_most(data.val_loader, MOST_BATCHES)
    else:
        stream = StepBatches(
            data.train_loader, isolated=True, device=data.train.device, accumulate=data.accumulate
        )
        stream.seek(data.train.position(0))
        for _ in stream.lazily(0, steps):
            pass
        first, count = steps, 8
    with closing(stream):
        batches = stream.take(first, first + count)
    if len(batches) == 1:
        size, whole = batch_size(batches[0]), batches[0].batch
        batches = batches * 2 if size < 2 else list(map(Kept, halves(whole, size, fit.plant.ranks)))
    train = data.train.take(0, 1)[0]
    return Rows(*(held_out_loss(fit.plant, batches[i::2], train) for i in range(2)))


def _streams(fit: Fit) -> list[StepBatches]:
    data = fit.data
    return [data.train] if data.validation is None else [data.train, data.validation]


@contextmanager
def _folder(fit: Fit) -> Iterator[Path]:
    """Where rolls are kept: in the run's directory until it has ended, or a temporary one."""
    if fit.directory is not None:
        yield fit.directory.path / PASSES
        return
    ranks = fit.plant.ranks
    made = tempfile.mkdtemp if ranks is None else lambda: ranks.by_first(tempfile.mkdtemp)
    folder = Path(made())
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _apart(events: EventLog) -> EventLog:
    """Events of a roll that may not become the run."""

    def of(listener: Listener) -> Listener:
        def hear(event: Event) -> None:
            if not isinstance(event, (Committed, CheckpointSaved)):
                listener(event)

        return hear

    return replace(events, listeners=[of(each) for each in events.listeners], told=[*events.told])

"""Committing a window: what was tried until now becomes final."""

from __future__ import annotations

from rhc.events import Committed
from rhc.loop.base_schedule import Budget
from rhc.loop.epochs import Epochs
from rhc.loop.records import Chronicle, Validation, tape_rows
from rhc.loop.state import Attempt, Loop
from rhc.loop.steps import Steps
from rhc.loop.update_rule import faded, replanned
from rhc.storage.files import finite
from rhc.storage.run_directory import RunDirectory
from rhc.training.memory import peak_memory
from rhc.training.plant import Plant


class Committing:
    """Makes attempts final: state, tape, and the plan of what follows.

    carry: the share of a correction that is left after each window; None where nothing is
    rewritten. validate_every: steps from one row of the tape with validation losses to the next.
    Writes in the loop: correction, cost, reference, schedule, step, tape.
    """

    def __init__(
        self,
        plant: Plant,
        loop: Loop,
        steps: Steps,
        budget: Budget,
        carry: float | None,
        epochs: Epochs | None,
        validation: Validation | None,
        validate_every: int | None,
        directory: RunDirectory | None,
        chronicle: Chronicle,
    ) -> None:
        self.plant, self.loop, self.steps, self.budget = plant, loop, steps, budget
        self.carry, self.epochs = carry, epochs
        self.validation, self.validate_every = validation, validate_every
        self.directory, self.chronicle = directory, chronicle

    def commit(self, attempt: Attempt, commit: int) -> None:
        """The attempt's steps up to `commit` are the run's."""
        loop, chronicle = self.loop, self.chronicle
        start, stop = loop.step, attempt.schedule.stop
        chronicle.verb("commit", start, stop, attempt.number)
        if attempt.inside is not None:
            self.steps.restore(attempt.inside)
        self._correct(attempt, commit)
        rows = tape_rows(attempt, commit)
        first = rows[0]["loss"] if loop.reference is None else loop.reference[1]
        loop.reference = (sum(row["loss"] for row in rows) / len(rows), first)
        peak = peak_memory(self.plant.parameters[0].device)
        loop.cost.peak_memory_bytes = max(loop.cost.peak_memory_bytes, peak)
        loop.step = commit
        if self.epochs is not None:
            self.epochs.committed(attempt, rows)
        every = self.validate_every
        if every and commit // every > start // every:
            assert self.validation is not None
            held_out = self.validation.losses(loop.cost)
            found = {"loss": held_out.loss, **held_out.metrics}
            rows[-1] |= {f"val_{name}": finite(value) for name, value in found.items()}
        loop.train.release(commit)
        loop.tape += rows
        if self.directory is not None:
            self.directory.tape.append(rows)
        chronicle.emit(Committed(start, commit, rows, self.budget.projected(loop)))
        if commit < loop.steps:
            chronicle.verb("slide", start, stop, attempt.number)
        loop.cost.windows += 1

    def _correct(self, attempt: Attempt, commit: int) -> None:
        """What the attempt's rewrite carries on goes into the plan of the rest."""
        loop, proposal = self.loop, attempt.proposal
        if commit < loop.steps and self.carry is not None:
            shifts = {} if proposal is None else proposal.carry
            loop.correction, change = faded(loop.correction, shifts, self.carry)
            loop.schedule = replanned(loop.schedule, commit, change)

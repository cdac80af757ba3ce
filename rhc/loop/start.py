"""Before the first step: whether the data can be used, and from which lr to start."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rhc.containers import spare
from rhc.errors import DivergedError, InputError
from rhc.events import StartFound, StartTried
from rhc.loop.base_schedule import Budget, Course
from rhc.loop.epochs import Epochs
from rhc.loop.lr_search import (
    ADAPTIVE_GREED,
    FEWEST_BATCHES,
    GREED,
    PROBE_BATCHES,
    Start,
    StartSearch,
)
from rhc.loop.records import Teller
from rhc.loop.state import Loop
from rhc.loop.window_objective import HeldOutLoss, at_most, held_out_loss
from rhc.rng import preserved
from rhc.storage.run_directory import RunDirectory
from rhc.training import interrupts as stopping
from rhc.training.batches import StepBatches
from rhc.training.diagnostics import explained
from rhc.training.loaders import pristine
from rhc.training.losses import checked_loss
from rhc.training.objective import Objective
from rhc.training.plant import Plant
from rhc.training.recovery import out_of_memory


def try_first_batch(
    plant: Plant, loop: Loop, train_loader: Iterable[Any], val_loader: Iterable[Any] | None
) -> None:
    """A loader or a loss that cannot be used is an InputError before anything is written."""

    # Streams of their own: the place of the run's is saved with the first checkpoint.
    def first(loader: Iterable[Any], name: str) -> Any:
        stream = StepBatches(loader, isolated=True, device=loop.train.device, name=name)
        with pristine(loader):
            batch = spare(next(stream.lazily(0, 1)))
            stream.close()
        return batch

    batches = {"train_loader": first(train_loader, "train_loader")}
    if loop.validation is not None:
        assert val_loader is not None
        batches["val_loader"] = first(val_loader, "val_loader")
    for name, batch in batches.items():
        try:
            with plant.evaluating() as model:
                checked_loss(plant.loss_fn(model, batch))
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            if isinstance(error, InputError) or out_of_memory(error):
                raise
            where = f"at the first batch of {name}"
            raise InputError(explained(error, where, plant.model, batch)) from error


class Beginning:
    """Looks for the lr to start from, and plans the run from it.

    val_loader: probes are judged on its batches; None for training batches. accumulate: batches of
    a step.
    Writes in the loop: cost, first_lr, schedule, start_gradients.
    """

    def __init__(
        self,
        plant: Plant,
        loop: Loop,
        course: Course,
        budget: Budget,
        objective: Objective,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        accumulate: int,
        epochs: Epochs | None,
        directory: RunDirectory | None,
        teller: Teller,
    ) -> None:
        self.plant, self.loop, self.course, self.objective = plant, loop, course, objective
        self.budget = budget
        self.train_loader, self.val_loader, self.accumulate = train_loader, val_loader, accumulate
        self.epochs, self.directory, self.teller = epochs, directory, teller

    def find(self, start: Start) -> None:
        """Finds it by probes from "zero" or from the optimizer's own lr.

        What was tried is in start.jsonl, so that a run that is resumed at step 0 finds the same.
        Raises DivergedError where no probe is finite.
        """
        loop, course = self.loop, self.course
        stream = StepBatches(
            self.train_loader, isolated=True, device=loop.train.device, accumulate=self.accumulate
        )
        stream.seek(loop.train.position(0))  # the run's own first batches
        # So few that judging is cheap beside rolling.
        count = min(PROBE_BATCHES, max(FEWEST_BATCHES, loop.steps // 5))
        judged = self._judged(count)
        share = held_out_loss(self.plant, judged).share if judged else count * self.accumulate

        def held_out(n: int) -> HeldOutLoss:
            return held_out_loss(self.plant, judged or stream.take(n, n + count))

        def tell(record: dict[str, Any]) -> None:
            if self.directory is not None:
                self.directory.record_start(record)
            self.teller.emit(StartTried(record))
            if self.plant.ranks is None:  # ranks stop together, when a window is done
                stopping.check()

        planned = course.unshaped(loop.steps)
        known = [] if self.directory is None else self.directory.starts.read()
        adaptive = "betas" in self.plant.optimizer.param_groups[0]
        with preserved(), pristine(self.train_loader):
            search = StartSearch(
                self.plant,
                self.objective,
                planned,
                stream,
                held_out,
                known,
                tell,
                self.teller.tell,
                fixed=bool(judged),
                share=share,
                room=self.budget.for_search(loop),
                warmup=course.warmup,
                greed=ADAPTIVE_GREED if adaptive else GREED,
            )
            lr = search.find(start)
        stream.close()
        loop.cost.gradients(search.gradients)
        loop.start_gradients = search.gradients
        if lr is None:
            raise DivergedError(
                "no lr within its bounds keeps a short roll finite; look at the data and the loss"
            )
        given = planned.window(0, 1)["lr"][0].tolist()
        loop.schedule, loop.first_lr = course.planned(loop.steps, lr), lr
        if self.epochs is not None:
            self.epochs.begin(float(lr.max()))
        self.teller.emit(StartFound(start, lr.tolist(), given, search.gradients / loop.steps))

    def _judged(self, count: int) -> list[Any]:
        """The validation batches that probes are judged on: the run's own first ones."""
        if self.val_loader is None:
            return []
        validation = StepBatches(
            self.val_loader,
            isolated=True,
            seed=self.course.seed,
            device=self.loop.train.device,
            name="val_loader",
        )
        if self.loop.validation is not None:
            validation.seek(self.loop.validation.position(0))
        judged = validation.take(0, at_most(self.val_loader, count))
        validation.close()
        return judged

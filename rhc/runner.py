"""The loop: roll, rewrite, restore, replay, commit, slide.

The Runner checks what it is given, and goes from window to window. What is done in one is in the
rooms of `rhc.loop`: `_furnish` says which there are and what each is given, `self.loop` is the one
record that evolves. `fit` reads top-down.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from rhc import settings
from rhc.distributed import ranks_of, synchronised, unwrapped
from rhc.distributed.directory import directory_of
from rhc.distributed.ranks import Group
from rhc.errors import DivergedError, InputError, RunWarning, StorageError, whole_number
from rhc.events import Listener, RunEnded, RunStarted
from rhc.hypergradient import Damping, Engine, Product, ReversePass, resolve
from rhc.loop import Cost, Loop
from rhc.loop.agreement import agreed, begin, check_ranks, draw_apart, loaders_of
from rhc.loop.base_schedule import Budget, Course
from rhc.loop.checkpointing import Saving
from rhc.loop.checks import check_storable, followed, grouped, leave, low_lr, steered
from rhc.loop.committing import Committing
from rhc.loop.epochs import Epochs, epoch_steps
from rhc.loop.lr_search import Start
from rhc.loop.records import Chronicle, Teller, Validation, final_result, smoothness
from rhc.loop.reverse_passes import EXPLODING_CLIP, Looking, ReversePassMaker
from rhc.loop.rewriting import Rewriting, Twins
from rhc.loop.rolling import Rolling
from rhc.loop.shift import Surprise
from rhc.loop.start import Beginning, try_first_batch
from rhc.loop.steps import Steps
from rhc.loop.update_rule import (
    Rewrite,
    Twin,
    usual_law,
    usual_objective,
    usual_template,
    usual_warmup,
)
from rhc.loop.window_objective import Judge, JudgedOn
from rhc.loop.windows import PlainWindows, RewrittenWindows
from rhc.report.loggers import Logger, Logging, listeners_of
from rhc.rng import mixed_seed
from rhc.schedule import Schedule, Template
from rhc.schedulers import EpochPlanner
from rhc.storage.run_directory import RunDirectory, hardware, length, module_text, versions
from rhc.training import interrupts as stopping
from rhc.training.batches import StepBatches
from rhc.training.diagnostics import check_loader, check_parts
from rhc.training.losses import LossFn
from rhc.training.objective import HeldOutBatches, Objective
from rhc.training.plant import Plant
from rhc.training.recovery import OomFallback, deterministic

__all__ = ["EXPLODING_CLIP", "Cost", "DivergedError", "RunResult", "Runner", "smoothness"]

DEFAULT_CONTROLS = ("lr",)
"""Rewriting momentum and noise too made runs worse on all three tasks tried (docs/log.md)."""


LOADERS = ("train_loader", "val_loader", "test_loader")

SHOWN = 4
"""Differences from the run that is resumed of which a warning speaks; one is enough."""


@dataclass(frozen=True)
class RunResult:
    """What a fit ended with. record: the content of result.json."""

    schedule: Schedule
    record: dict[str, Any]
    tape: list[dict[str, Any]]
    windows: list[dict[str, Any]]
    directory: Path | None

    @property
    def train_loss(self) -> float | None:
        return self.record["train_loss"]

    @property
    def val_loss(self) -> float | None:
        return self.record["val_loss"]

    @property
    def test_loss(self) -> float | None:
        return self.record["test_loss"]

    @property
    def test_accuracy(self) -> float | None:
        return self.record["test_accuracy"]

    @property
    def cost(self) -> dict[str, Any]:
        """The ledger: plain_run_equivalents, gradient_evaluations, hessian_products and others."""
        return self.record["cost"]


class Runner:
    """Trains a model and writes its schedule with hindsight.

    model, optimizer, loss_fn: as in a plain loop; loss_fn(model, batch) returns a scalar tensor, or
    (scalar tensor, {"accuracy": tensor, …}). Tensors of a batch are moved to the device of the
    model. With rewriting every use of a batch has a copy of its own, which loss_fn may change;
    without, loss_fn has what the loader yields. Modules keep the modes (train, eval) they come in.
    train_loader, val_loader, test_loader: anything that can be iterated again and again. The
    windows are judged on val_loader; without one, on the training batches that follow the window.

    window K: steps rolled and differentiated at once; stride M ≤ K: steps committed before sliding
    on, K where None. controls: what is rewritten, of lr, momentum, noise and weight_decay; None for
    lr. per_group: those of them with a value per parameter group as well as per
    step; the groups of the others keep their ratios. rewrite: False for the plain loop, bit for
    bit; a `Rewrite` for another law than `rhc.loop.update_rule.usual_law`. objective: what a window
    is judged by. engine, product, segment: as in `rhc.hypergradient`; but where the start is looked
    for, product "auto" is "none": exact products cost half a run there, and gain nothing
    (docs/outcome.md). start: where lr starts: "given", as the optimizer has it; "probe" takes that
    for a first guess and finds a factor on it by short rolls (and the ratio of parameter groups,
    where they all have the same lr); "zero" needs no guess, and finds every parameter group's own
    lr. Where short rolls learn nothing that tells lrs apart, longer ones are taken, and then the
    optimizer's own lr. None for "probe" with rewriting, else "given". template: the shape of lr
    over the run that is rewritten, or followed: "constant", "cosine", "linear", "wsd" (constant,
    then linear over the law's cooldown), "1cycle". None, where the start is looked for: "cosine",
    with an Adam "linear"; where it is given: "wsd" with rewriting, "constant" without. schedule:
    followed as it is where nothing is rewritten, in place of a template; a control that it lacks
    stays as the optimizer has it. warmup: fraction of the run in which lr rises linearly to the
    template. None for `rhc.loop.lr_search.WARMUP` where the start of an Adam is looked for, else 0.
    memory_budget: bytes that looking back may take beyond plain training; spill: whether states may
    go to disk for it (True: to the system's temporary folder; or a folder). discount γ ≤ 1: the
    costate is multiplied by it at every step backwards; costate_clip: its largest norm, as a
    multiple of the norm at the window's end. Both favour the near future where costates grow.
    accumulate n: every step takes n batches of train_loader and the gradient of the mean of their
    losses. clip_norm, clip_value: clipping by the norm of all gradients, or of every element.
    validate_every n: after the window in which every n-th step falls, the loss and the metrics of
    val_loader go into the tape, as val_loss and val_…; a batch costs a third of a gradient.
    deterministic: only operators that give the same bits again, during a fit; torch raises where it
    has none. directory: of the run; None keeps everything in memory. seed: of the gradient noise.
    planner: plans every epoch from the one before, on top of the template; see `rhc.EpochPlanner`,
    which is built without the optimizer here. Windows end where epochs do. listeners: told of every
    event of `rhc.events`. logger: one or several of `rhc.report.loggers`, told of what is
    committed. process_group: the ranks that train this model together; "auto" takes the default
    process group where it has several, None this process alone. Every rank builds the same Runner;
    each takes its rows of every batch, so that all together do what one process does with these
    loaders, or, with a DistributedSampler, its own batches (docs/scaling.md). Raises InputError for
    settings that cannot be used, before anything is touched.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        *,
        test_loader: Iterable[Any] | None = None,
        window: int = 50,
        stride: int | None = None,
        controls: Sequence[str] | None = None,
        per_group: Sequence[str] = (),
        start: Start | None = None,
        template: Template | None = None,
        warmup: float | None = None,
        rewrite: bool | Rewrite = True,
        schedule: Schedule | None = None,
        objective: Objective | None = None,
        engine: Engine = "adjoint",
        product: Product | Literal["auto"] = "auto",
        segment: int | Literal["auto"] = "auto",
        memory_budget: int | None = None,
        spill: bool | str | Path = True,
        discount: float = 1.0,
        costate_clip: float | None = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        directory: str | Path | None = None,
        keep_checkpoints: int = 3,
        deterministic: bool = False,
        validate_every: int | None = None,
        seed: int = 0,
        planner: EpochPlanner | None = None,
        listeners: Sequence[Listener] = (),
        logger: Logger | Sequence[Logger] | None = None,
        config: Mapping[str, Any] | None = None,
        process_group: Group = "auto",
    ) -> None:
        windows = settings.Window(
            window=window,
            stride=stride,
            controls=cast(Any, controls),  # made tuples of by the check
            per_group=cast(Any, per_group or None),
        ).checked()
        shape = settings.Shape(start=start, template=template, warmup=warmup).checked()
        step = settings.Step(
            accumulate=accumulate,
            clip_norm=clip_norm,
            clip_value=clip_value,
            deterministic=deterministic,
        ).checked()
        engine_settings = settings.Engine(
            engine=engine,
            product=product,
            segment=segment,
            memory_budget=memory_budget,
            spill=spill,
            discount=discount,
            costate_clip=costate_clip,
        ).checked()
        storage = settings.Storage(
            keep_checkpoints=keep_checkpoints, validate_every=validate_every
        ).checked()
        self._settings = (windows, step, engine_settings, storage)
        self.window, self.stride = windows.window, windows.stride or windows.window
        self.accumulate, self.deterministic = step.accumulate, step.deterministic
        self.validate_every = storage.validate_every
        self.seed = whole_number("seed", seed)
        check_parts(model, optimizer, loss_fn)
        self.ranks = ranks_of(process_group)
        self.listeners = list(listeners)
        first = self.ranks is None or self.ranks.first
        self._teller = Teller(self.listeners, aloud=first)
        self._wrapped = unwrapped(model) is not model
        clips = {"clip_norm": step.clip_norm, "clip_value": step.clip_value}
        self.plant = Plant(
            unwrapped(model), optimizer, loss_fn, seed=self.seed, ranks=self.ranks, **clips
        )
        self.device = self.plant.parameters[0].device
        self._take_data(train_loader, val_loader, test_loader, planner, objective)
        self._take_schedule(shape, rewrite, schedule, planner)
        self.objective = objective or usual_objective(self.start, self.window)
        self._take_engine(windows, engine_settings)
        if first:
            self.listeners += listeners_of(logger, config)
        self.config = None if config is None else dict(config)
        self.directory = self._opened(directory, storage.keep_checkpoints)
        self._streams: list[StepBatches] = []
        self._fitted = False
        self._take_planner(planner)
        self._judged_on = JudgedOn(self.val_loader, self.objective.count, self.stride)
        self._budget = Budget(self.law, self.window, self.rewriting, self._teller.notice)

    def _take_data(
        self,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        test_loader: Iterable[Any] | None,
        planner: EpochPlanner | None,
        objective: Objective | None,
    ) -> None:
        if train_loader is None:
            raise InputError("train_loader is missing; give one that yields batches")
        if self.validate_every is not None and val_loader is None:
            raise InputError(
                f"validate_every needs a val_loader, got {self.validate_every} and none; leave it "
                "out, or give both"
            )
        loaders = (train_loader, val_loader, test_loader)
        for name, loader in zip(LOADERS, loaders, strict=True):
            check_loader(name, loader)
        if self.ranks is not None:
            check_ranks(planner, objective)
            self.train_loader, self.val_loader, self.test_loader = loaders_of(self.ranks, *loaders)
        else:
            self.train_loader, self.val_loader, self.test_loader = loaders

    def _take_schedule(
        self,
        shape: settings.Shape,
        rewrite: bool | Rewrite,
        schedule: Schedule | None,
        planner: EpochPlanner | None,
    ) -> None:
        """How lr is found and shaped, and by which law it is rewritten; or what is followed."""
        self.rewriting = isinstance(rewrite, Rewrite) or bool(rewrite)
        self.start = cast(Start, shape.start or ("probe" if self.rewriting else "given"))
        self.law = rewrite if isinstance(rewrite, Rewrite) else usual_law(self.start)
        adaptive = "betas" in self.plant.optimizer.param_groups[0]
        usual = usual_template(self.start, adaptive, self.rewriting)
        self.template = cast(Template, shape.template or usual)
        usual_rise = usual_warmup(self.start, adaptive)
        self.warmup = usual_rise if shape.warmup is None else shape.warmup
        follows_lr = schedule is not None and "lr" in schedule
        self._low_lr = None if follows_lr else low_lr(self.plant, self.start)
        self.owed = 0.0
        """Gradient evaluations that went into a schedule that is followed: the ledger's first."""
        self.followed = schedule
        if schedule is not None:
            plain = not self.rewriting and self.start == "given" and planner is None
            free = plain and shape.template is None and not self.warmup
            followed(self.plant, schedule, free=free)

    def _take_engine(self, windows: settings.Window, engine: settings.Engine) -> None:
        """What is rewritten, and what differentiates by it."""
        self.segment = cast(int | Literal["auto"], engine.segment)
        self.product = cast(Product | Literal["auto"], engine.product)
        if self.product == "auto" and self.segment == "auto" and self.start != "given":
            self.product = "none"
        self.controls: tuple[str, ...] = ()
        self._reverse_passes: ReversePassMaker | None = None
        self._reverse_pass: ReversePass | None = None
        if self.rewriting:
            resolve(self.window, self.segment, self.product, "adjoint", self.plant)
            self.controls = steered(self.plant, windows.controls, DEFAULT_CONTROLS)
            self._reverse_passes = ReversePassMaker(
                self.plant,
                self.objective,
                self.controls,
                self.segment,
                self.product,
                engine.memory_budget,
                engine.spill,
                Damping(engine.discount, engine.costate_clip),
                self._teller.tell,
            )
            self._reverse_pass = self._reverse_passes(OomFallback())
        elif self.start == "zero":
            self.plant.refuse_complex()
        self.per_group = grouped(self.plant, self.controls, windows.per_group or ())
        self._course = Course(
            self.plant,
            self.template,
            self.warmup,
            self.law.cooldown,
            "lr" in self.controls or not self.rewriting,
            self.per_group,
            self.seed,
            self.followed,
        )

    def _opened(self, directory: str | Path | None, keep_checkpoints: int) -> RunDirectory | None:
        if directory is None:
            return None
        check_storable(self.plant.model)
        known = settings.TrainConfig.known().items()
        may_change = {n: text for n, s in known if (text := s.setting.on_resume) is not None}
        opened = directory_of(
            Path(directory), keep_checkpoints, self._teller.notice, may_change, self.ranks
        )
        size = sum(p.nbytes for p in self.plant.model.parameters())
        opened.checkpoints.most_bytes = 2**30 + 64 * size
        return opened

    def _take_planner(self, planner: EpochPlanner | None) -> None:
        self.planner = planner
        self._validation = (
            None if self.val_loader is None else Validation(self.plant, self.val_loader)
        )
        self._epoch_steps = 0
        if planner is not None:
            judged = self.val_loader is not None and isinstance(self.objective.batches, int)
            self._epoch_steps = epoch_steps(
                planner,
                self.train_loader,
                self.accumulate,
                validated=self.val_loader is not None,
                ahead=self.rewriting and not judged,
            )

    # fit -----------------------------------------------------------------------------------------

    def fit(self, steps: int, resume: Literal["auto", "never"] = "auto") -> RunResult:
        """Trains until `steps` optimizer steps are committed, and returns what came out.

        resume: "auto" continues the run that `directory` holds, "never" refuses a directory that
        holds one. Raises DivergedError where no lr keeps the next window finite.
        """
        steps = whole_number("steps", steps)
        if steps < 1:
            raise InputError(f"steps must be a whole number ≥ 1, got {steps}; try steps=1000")
        settings.Run(steps=steps).checked()
        if self.followed is not None and len(self.followed) < steps:
            raise InputError(
                f"the schedule has {len(self.followed)} steps, fewer than the run's {steps}; "
                f"stretch it to {steps} steps, or train for at most {len(self.followed)}"
            )
        if self._fitted and self.directory is None and self.start != "given":
            raise InputError(
                f"this Runner has been fitted, and start={self.start!r} is for a model that has "
                "not; to train on give it a directory, which fit continues, or build another with "
                "start='given'"
            )
        if resume not in ("auto", "never"):
            raise InputError(f"resume must be 'auto' or 'never', got {resume!r}")
        try:
            with self.plant.optimizing():
                return self._fit(steps, resume)
        finally:
            for listener in self.listeners:
                if isinstance(listener, Logging):
                    listener.close()

    def _fit(self, steps: int, resume: Literal["auto", "never"]) -> RunResult:
        try:
            with (
                stopping.at_steps(),
                torch.enable_grad(),  # also where fit is called under no_grad
                deterministic(self.deterministic),
                synchronised(self.plant.model, self.ranks),
            ):
                self._train(steps, resume)
        except DivergedError:
            if self.directory is not None:
                self.directory.flush()  # what was tried last
            raise
        except StorageError as error:
            if self.loop.finished is not None:
                error.result = self._result()
            raise
        finally:
            if self.directory is not None:
                self.directory.close()
            for stream in self._streams:
                stream.close()
        leave(self.plant)
        result = self._result()
        self._fitted = True
        self._teller.emit(RunEnded(result.record))
        return result

    def _train(self, steps: int, resume: Literal["auto", "never"]) -> None:
        """From the beginning, or where the directory's run stands, to the result."""
        loop = self._begin(steps, resume)
        if loop.finished is not None:
            return
        self._teller.emit(
            RunStarted(
                loop.step,
                steps,
                self.window,
                self.stride,
                self.controls,
                self.rewriting,
                None if self.directory is None else self.directory.path,
            )
        )
        if loop.step == 0 and self._low_lr is not None:
            self._teller.tell(self._low_lr)
        if loop.step == 0 and self.start != "given":
            self._beginning.find(self.start)
        while loop.step < steps:
            self._window()
            stop = self.ranks is not None and agreed(
                self.ranks, self.plant, loop, self.window, self._teller.notice
            )
            self._save()
            stopping.check()
            if stop:
                raise KeyboardInterrupt
        if self.directory is not None and self.directory.saved != steps:
            self._save()  # the disk did not take it before
        self._end()

    def _window(self) -> None:
        """One window: six verbs, and the state, tape and schedule move on by up to M steps."""
        length = self.window if self.rewriting else self.stride
        length = min(length, self.loop.relief.longest or length)
        start, stop = self.loop.step, min(self.loop.step + length, self.loop.steps)
        if self._epochs is not None:
            stop = min(stop, self._epochs.end(start))
        commit = min(start + self.stride, stop)
        self._committing.commit(*self._windows.go_through(start, stop, commit))

    def _save(self) -> None:
        """A checkpoint, where there is a directory."""
        if self._saving is not None:
            self._saving.save()

    def _end(self) -> None:
        """Evaluates the final and the averaged weights and writes the result."""
        for stream in self._streams:
            stream.close()  # its loader is iterated anew
        self.loop.finished = final_result(
            self.plant, self.loop, self.train_loader, self.val_loader, self.test_loader
        )
        if self.directory is not None:
            self.directory.finish(self.loop.committed(), self.loop.finished)

    def _result(self) -> RunResult:
        loop = self.loop
        assert loop.finished is not None
        return RunResult(
            loop.committed(),
            loop.finished,
            loop.tape,
            loop.windows,
            None if self.directory is None else self.directory.path,
        )

    def plan(self) -> list[str]:
        """What a window will cost, in lines for people: gradient evaluations per step, bytes.

        Nothing is trained or written; model, optimizer and random states are left as they were.
        """
        if self._reverse_passes is None:
            raise InputError("a plan is of looking back; turn rewriting on to have one")
        stream = StepBatches(
            self.train_loader, isolated=True, device=self._moved_to, accumulate=self.accumulate
        )
        try:
            (batch,) = stream.take(0, 1)
        finally:
            stream.close()
        reverse_pass = self._reverse_passes(
            OomFallback() if self._before is None else self._before.relief
        )
        return [
            *reverse_pass.plan(self.window, batch, self.controls).lines(),
            f"product: {reverse_pass.why}",
        ]

    # Begin ---------------------------------------------------------------------------------------

    def _begin(self, steps: int, resume: Literal["auto", "never"]) -> Loop:
        """A fresh state of the loop, or the one that the directory's newest checkpoint holds."""
        device = self._moved_to
        self.plant.take_up()
        if self.ranks is not None:
            described = self._description(steps) | {"directory": self.directory is not None}
            notice = self._teller.notice
            begin(self.ranks, self.plant, described, notice, wrapped=self._wrapped)
        # With rewriting off nothing may be drawn that the plain loop does not draw.
        seed = int(torch.randint(2**31, ())) if self.rewriting else 0
        train = StepBatches(
            self.train_loader,
            isolated=self.rewriting or self.ranks is not None,
            seed=seed if self.rewriting else None,
            device=device,
            accumulate=self.accumulate,
            resumable=self.directory is not None,
            besides=() if self.planner is None else self.planner.knobs,
        )
        first_lr = torch.tensor(self._course.own()["lr"], dtype=torch.float64)
        self.loop = Loop(
            steps,
            self._course.planned(steps, first_lr),
            train,
            first_lr=first_lr,
            reverse_pass=self.reverse_pass,
        )
        self._streams = [train]
        self._furnish()
        if self._epochs is not None:
            self._epochs.begin(self.plant.controls.initial["lr"])
        validated = self.val_loader is not None and isinstance(self.objective.batches, int)
        if self.rewriting and validated and self.objective.terminal_weight:
            assert self.val_loader is not None
            self.loop.validation = StepBatches(
                self.val_loader,
                isolated=True,
                seed=mixed_seed(seed, 1) % 2**31,
                device=device,
                name="val_loader",
                resumable=self.directory is not None,
            )
            self._streams.append(self.loop.validation)
        if self.ranks is not None:
            draw_apart(self.ranks)
        if self.directory is not None and self._saving is not None:
            try_first_batch(self.plant, self.loop, self.train_loader, self.val_loader)
            checkpoint = self.directory.open(self._description(steps), resume)
            if checkpoint is None:
                self.loop.cost.gradients(self.owed)
                self.loop.start_gradients = self.owed
                self._save()
            else:
                differs = self._saving.load(checkpoint)
                if self.loop.step == steps:
                    self.loop.finished = self.directory.result()
                if self.ranks is None or self.ranks.first:
                    self._tell_of(self.directory.path, differs)
        return self.loop

    def _tell_of(self, path: Path, differs: list[str]) -> None:
        """Says of a run that is resumed what is not as it was, and that it is finished."""
        finished = self.loop.finished is not None
        goes_on = (
            "it is finished: nothing was trained, and its result is returned"
            if finished
            else f"it goes on from step {self.loop.step} with what it is given now"
        )
        if differs:
            more = f"; and {len(differs) - SHOWN} more" if len(differs) > SHOWN else ""
            self._teller.warn(
                f"{path} holds a run of other code or data ({'; '.join(differs[:SHOWN])}{more}); "
                f"{goes_on}. Give what it began with, or another directory for a new run; a "
                "sampler, dataset or loader with a state of its own needs state_dict and "
                "load_state_dict, as for torchdata's StatefulDataLoader, and no persistent_workers"
            )
        elif finished:
            warnings.warn(
                f"{path} holds this run, and {goes_on}; give more steps to train on, or another "
                "directory for a new run",
                RunWarning,
                stacklevel=2,
            )

    @property
    def _moved_to(self) -> torch.device | None:
        """Where batches are moved to; None where they can stay."""
        return None if self.device.type == "cpu" else self.device

    @property
    def _before(self) -> Loop | None:
        """Where the loop stands, or stood at the end of the last fit; None before the first."""
        return getattr(self, "loop", None)

    @property
    def reverse_pass(self) -> ReversePass | None:
        # What looks back at windows, where they are rewritten; a fit may replace it.
        return self._reverse_pass if self._before is None else self._before.reverse_pass

    # Rooms ---------------------------------------------------------------------------------------

    def _furnish(self) -> None:
        """The rooms of this fit, each given what it works with."""
        plant, loop, directory = self.plant, self.loop, self.directory
        teller, course, budget = self._teller, self._course, self._budget
        chronicle = Chronicle(self.listeners, loop, directory, self.ranks)
        steps = Steps(plant, loop, chronicle, again=self.rewriting)
        self._epochs: Epochs | None = None
        if self.planner is not None:
            self._epochs = Epochs(
                self.planner, self._epoch_steps, plant, loop, self._validation, teller
            )
        self._beginning = Beginning(
            plant,
            loop,
            course,
            budget,
            self.objective,
            self.train_loader,
            self.val_loader if isinstance(self.objective.batches, int) else None,
            self.accumulate,
            self._epochs,
            directory,
            teller,
        )
        self._windows: PlainWindows | RewrittenWindows = (
            PlainWindows(loop, steps, chronicle, alone=self.ranks is None)
            if self._reverse_passes is None
            else self._rewritten(self._reverse_passes, steps, chronicle)
        )
        self._committing = Committing(
            plant,
            loop,
            steps,
            budget,
            self.law.carry if self.rewriting else None,
            self._epochs,
            self._validation,
            self.validate_every,
            directory,
            chronicle,
        )
        self._saving: Saving | None = None
        if directory is not None:
            self._saving = Saving(
                plant,
                loop,
                directory,
                course,
                self._judged_on,
                self.planner,
                self._reverse_passes,
                teller,
            )

    def _rewritten(
        self, reverse_passes: ReversePassMaker, steps: Steps, chronicle: Chronicle
    ) -> RewrittenWindows:
        """The room of the windows that are rewritten, and those beside it."""
        plant, loop, law = self.plant, self.loop, self.law
        course, budget = self._course, self._budget
        penalty = partial(law.penalty, controls=self.controls)
        by_batch, steers_lr = law.rule == "batch-error", "lr" in self.controls
        judge = Judge(plant, loop, steps, self.objective, penalty, self._judged_on)
        looking = Looking(plant, loop, steps, judge, reverse_passes, chronicle, by_batch=by_batch)
        rolling = Rolling(loop, law, self.window, course, steps, judge, looking, chronicle)
        surprise = Surprise(loop, law, course, steps, judge, chronicle, steers_lr=steers_lr)
        rewriting = (
            Twins(loop, law, steps, judge, chronicle)
            if isinstance(law, Twin)
            else Rewriting(loop, law, course, budget, steps, judge, looking, chronicle)
        )
        return RewrittenWindows(loop, law, budget, steps, rolling, surprise, rewriting)

    # config.json ---------------------------------------------------------------------------------

    def _description(self, steps: int) -> dict[str, Any]:
        """config.json: everything that the run's numbers depend on."""
        described = {
            "steps": steps,
            "window": self.window,
            "stride": self.stride,
            "controls": list(self.controls),
            "rewrite": asdict(self.law) if self.rewriting else False,
            "objective": {k: _described(v) for k, v in vars(self.objective).items()},
            "validation": self.val_loader is not None,
            "product": self.product,
            "segment": self.segment,
            "clip_norm": self.plant.clip_norm,
            **self._unusual(),
            "seed": self.seed,
            "optimizer": type(self.plant.optimizer).__name__.lower(),
            "initial": self._course.own(),
            "parameters": sum(p.numel() for p in self.plant.owned),
            "device": str(self.device),
            "code": self._code(),
            "versions": versions(),
            "hardware": hardware(self.device),
        }
        return described if self.config is None else {**described, **self.config}

    def _code(self) -> dict[str, Any]:
        """What shows of the model and the data: modules, shapes of buffers, numbers of batches."""
        loaders = (self.train_loader, self.val_loader, self.test_loader)
        model = self.plant.model
        return {
            "modules": {name or "model": module_text(m) for name, m in model.named_modules()},
            "buffers": {name: list(b.shape) for name, b in model.named_buffers()},
            "batches": {n: length(loader) for n, loader in zip(LOADERS, loaders, strict=True)},
        }

    def _unusual(self) -> dict[str, Any]:
        """Settings that are recorded where they differ from what a run without them has.

        So that a directory that was begun before they existed can be continued.
        """
        wsd = self.rewriting and self.start == "given"
        values: dict[str, tuple[Any, Any]] = {
            "ranks": (self.ranks and self.ranks.size, None),
            "memory_budget": (self._settings[2].memory_budget, None),
            "start": (self.start, "given"),
            "warmup": (self.warmup, 0.0),
            "planner": (self.planner and self.planner.describe(), None),
            "followed": (self.followed and self.followed.digest(), None),
            "template": (self.template, "wsd" if wsd else "constant"),
        }
        given = {name: value for name, (value, usual) in values.items() if value != usual}
        for each in self._settings:
            given |= each.if_given()
        return given


def _described(value: Any) -> Any:
    """A field of the objective, for config.json."""
    if isinstance(value, HeldOutBatches):
        return {"held_out": value.count}
    return getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else value

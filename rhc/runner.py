"""The Runner: settings as values, and `fit`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from rhc import settings
from rhc.data_weights import DataWeights, Evidence
from rhc.distributed import ranks_of, synchronised, unwrapped
from rhc.distributed.ranks import Group
from rhc.errors import DivergedError, InputError, StorageError, whole_number
from rhc.events import Listener, RunEnded, RunStarted
from rhc.hypergradient import Damping, Engine, Product, ReversePass, resolve
from rhc.loop import description
from rhc.loop.agreement import begin_together, check_ranks, draw_apart
from rhc.loop.base_schedule import BaseSchedule
from rhc.loop.best import check_keep_best, validation_steps
from rhc.loop.checkpointing import finish, open_run, run_directory
from rhc.loop.checks import (
    check_course,
    checked_loaders,
    followed,
    grouped,
    leave,
    low_lr,
    steered,
    try_first_batch,
)
from rhc.loop.data_weights import judged_by, learned
from rhc.loop.epochs import announce_planning, begin_planning, epoch_steps
from rhc.loop.fit import Data, EventLog, Fit, ReversePasses
from rhc.loop.lr_search import find_first_lr
from rhc.loop.passes import passable, rewrite_whole_run
from rhc.loop.state import Cost, State
from rhc.loop.train import train
from rhc.loop.update_rule import (
    Rewrite,
    usual_law,
    usual_objective,
    usual_template,
    usual_warmup,
)
from rhc.report.callbacks import Shown, listening
from rhc.report.loggers import Logger, Logging, listeners_of
from rhc.report.result import RunResult
from rhc.rng import mixed_seed
from rhc.schedule import Schedule, Template
from rhc.schedulers import EpochPlanner
from rhc.settings.owners import Start
from rhc.storage.run_directory import hardware, versions
from rhc.training import interrupts, memory
from rhc.training.batches import StepBatches
from rhc.training.diagnostics import check_parts
from rhc.training.losses import LossFn
from rhc.training.objective import Objective
from rhc.training.plant import Plant
from rhc.training.recovery import OomFallback, deterministic

__all__ = ["Cost", "DivergedError", "RunResult", "Runner"]

DEFAULT_CONTROLS = ("lr",)
"""Rewriting momentum and noise too made runs worse on all three tasks tried (docs/log.md)."""


class Runner:
    """Trains a model and writes its schedule with hindsight.

    Args:
        model: trained in place. Its modules keep the modes (train, eval) that they come in.
        optimizer: as in a plain loop; its controls are what a run starts from.
        loss_fn: (model, batch) -> scalar tensor, or (scalar tensor, {"accuracy": tensor, …}).
            Tensors of a batch are moved to the model's device. With rewriting every use of a batch
            has a copy of its own; without, loss_fn has what the loader yields.
        train_loader: batches; anything that can be iterated again and again.
        val_loader: batches that windows are judged on; None for the training batches that follow.
        test_loader: batches for the result alone.
        window: K, steps that are rolled and differentiated at once.
        stride: M ≤ K, steps that are committed before sliding on; None for K.
        controls: what is rewritten, of lr, momentum, noise and weight_decay; None for lr.
        per_group: controls with a value per parameter group as well as per step; the groups of the
            others keep their ratios.
        start: where lr starts. "given": as the optimizer has it. "probe": short rolls find a factor
            on that, and the ratio of parameter groups with the same lr. "zero": every group's own
            lr is found, without a guess. None for "probe" with rewriting, else "given".
        template: the shape of lr that is rewritten, or followed: "constant", "cosine", "linear",
            "wsd" (constant, then linear over the update rule's cooldown), "1cycle". None where lr
            is found for "cosine", with an Adam "linear"; else for "wsd", plain "constant".
        warmup: fraction of the run in which lr rises linearly to the template. None for a tenth
            where the first lr of an Adam is found, else 0.
        rewrite: an update rule; True for the usual one; False for the plain loop, bit for bit.
        passes: rewrites of the whole run, at most, after it was rolled: each goes back through all
            of its steps, moves `controls` by knots, and replays it (docs/hindsight.md).
        inexact_replay: whether windows are rewritten although the first one, replayed, did not end
            in the same bits (`RunResult.replay`).
        schedule: followed as it is where nothing is rewritten, in place of a template; a control
            that it lacks stays as the optimizer has it.
        data_weights: of rows, of which loss_fn then returns one loss each, (B,), or of the loss's
            terms, then a mapping. Moved in place by windows, unless rewrite is False.
        objective: what a window is judged by; None for the usual one.
        engine: "adjoint"; others check single hypergradients (`rhc.hypergradient`).
        product: Hessian products, as in `rhc.hypergradient`. Where the first lr is found and data
            are weighed, "auto" is "none" (docs/data-weights.md).
        segment: steps of a segment of the reverse pass, as in `rhc.hypergradient`.
        memory_budget: bytes that a reverse pass may take beyond plain training; None for no limit.
        spill: whether states may go to disk for it: True for the system's temporary folder, or a
            folder.
        discount: γ ≤ 1 by which the costate is multiplied at every step backwards.
        costate_clip: the costate's largest norm, as a multiple of that at the window's end; None
            for none. Both favour the near future where costates grow.
        accumulate: batches of a step, whose mean loss is differentiated.
        clip_norm: largest norm of all gradients of a step; None for none.
        clip_value: largest element of the gradients of a step; None for none.
        directory: of the run; None keeps everything in memory.
        keep_checkpoints: the newest that are kept.
        deterministic: only operators that give the same bits again; torch raises where it has none.
        validate_every: steps from one row of the tape with the losses of val_loader to the next;
            None for at most 20 such rows, of 1 % of the run's cost, but with the optimizer's lr.
        keep_best: whether the model ends with the best validated state, in place of the last.
        seed: of the gradient noise.
        planner: plans every epoch, where windows end too; it is built without an optimizer.
        progress: whether progress is shown; None for yes in a terminal or a notebook, unless
            listeners are given.
        callbacks: objects with some of the methods of `rhc.Callback`.
        listeners: told of every event of `rhc.events`.
        logger: one or several of `rhc.report.loggers`, told of what is committed.
        config: further entries of config.json, which the run's numbers depend on.
        process_group: ranks that train this model together, each from a Runner built alike, as one
            process would with these loaders, or on batches of a DistributedSampler. "auto" for
            the default group; None for this process alone.

    Raises:
        InputError: for settings that cannot be used, before anything is touched.
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
        passes: int = 0,
        inexact_replay: bool = False,
        schedule: Schedule | None = None,
        data_weights: DataWeights | None = None,
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
        keep_best: bool = False,
        seed: int = 0,
        planner: EpochPlanner | None = None,
        progress: bool | None = None,
        callbacks: Sequence[Any] = (),
        listeners: Sequence[Listener] = (),
        logger: Logger | Sequence[Logger] | None = None,
        config: Mapping[str, Any] | None = None,
        process_group: Group = "auto",
    ) -> None:
        weights_alone = data_weights is not None and controls is not None and not controls
        windows = settings.Window(
            window=window,
            stride=stride,
            controls=None if weights_alone else cast(Any, controls),  # made tuples by the check
            per_group=cast(Any, per_group or None),
            passes=passes,
            inexact_replay=inexact_replay,
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
            keep_checkpoints=keep_checkpoints, validate_every=validate_every, keep_best=keep_best
        ).checked()
        self._settings = (windows, step, engine_settings, storage)
        self.window, self.stride = windows.window, windows.stride or windows.window
        self.passes, self.inexact_replay = windows.passes, windows.inexact_replay
        self.accumulate, self.deterministic = step.accumulate, step.deterministic
        self.validate_every, self.keep_best = storage.validate_every, storage.keep_best
        self.seed = whole_number("seed", seed)
        check_parts(model, optimizer, loss_fn)
        self.ranks = ranks_of(process_group)
        first = self.ranks is None or self.ranks.first
        self.listeners = listening(listeners, callbacks, progress if first else False)
        self._events = EventLog(self.listeners, warns=first)
        self._wrapped = unwrapped(model) is not model
        self.plant = Plant(
            unwrapped(model),
            optimizer,
            loss_fn,
            seed=self.seed,
            clip_norm=step.clip_norm,
            clip_value=step.clip_value,
            ranks=self.ranks,
            data_weights=data_weights,
        )
        self._weighed = data_weights and data_weights.describe()
        self.device = self.plant.parameters[0].device
        if self.ranks is not None:
            check_ranks(planner, objective)
        loaders = (train_loader, val_loader, test_loader)
        loaders = checked_loaders(*loaders, self.validate_every, self.ranks)
        self.train_loader, self.val_loader, self.test_loader = loaders
        check_keep_best(self.keep_best, val_loader, self.plant)
        self._take_schedule(shape, rewrite, schedule, planner)
        weighed = data_weights is not None
        self.objective = objective or usual_objective(self.start, self.window, weighed=weighed)
        usual = () if weights_alone else DEFAULT_CONTROLS
        self._take_engine(windows, engine_settings, usual, planner)
        if first:
            self.listeners += listeners_of(logger, config)
        self.config = None if config is None else dict(config)
        self.directory = run_directory(
            directory, storage.keep_checkpoints, self._events.notice, self.plant
        )
        self._streams: list[StepBatches] = []
        self._state: State | None = None
        self._fitted = False
        self.planner = planner
        self._epoch_steps = epoch_steps(
            planner,
            self.train_loader,
            self.accumulate,
            validated=self.val_loader is not None,
            ahead=self.rewriting and not self._judged_on_val,
        )

    def _take_schedule(
        self,
        shape: settings.Shape,
        rewrite: bool | Rewrite,
        schedule: Schedule | None,
        planner: EpochPlanner | None,
    ) -> None:
        """Takes how lr is found, shaped and rewritten, or the schedule to follow."""
        self.rewriting = isinstance(rewrite, Rewrite) or bool(rewrite)
        self.start = cast(Start, shape.start or ("probe" if self.rewriting else "given"))
        self.law = rewrite if isinstance(rewrite, Rewrite) else usual_law(self.start)
        adaptive = "betas" in self.plant.optimizer.param_groups[0]
        usual = usual_template(self.start, adaptive, self.rewriting)
        self.template = cast(Template, shape.template or usual)
        self.warmup = usual_warmup(self.start, adaptive) if shape.warmup is None else shape.warmup
        follows_lr = schedule is not None and "lr" in schedule
        self._low_lr = None if follows_lr else low_lr(self.plant, self.start)
        self.prior_cost = 0.0
        """Gradient evaluations that produced a followed schedule, first on the ledger."""
        self.followed = schedule
        if schedule is not None:
            plain = not self.rewriting and self.start == "given" and planner is None
            free = plain and shape.template is None and not self.warmup
            followed(self.plant, schedule, free=free)

    def _take_engine(
        self,
        windows: settings.Window,
        engine: settings.Engine,
        usual: tuple[str, ...],
        planner: EpochPlanner | None,
    ) -> None:
        self.segment = cast(int | Literal["auto"], engine.segment)
        self.product = cast(Product | Literal["auto"], engine.product)
        weighed = self.plant.data_weights is not None
        if weighed and (self.product, self.segment) == ("auto", "auto") and self.start != "given":
            self.product = "none"  # as good, for 2.5 baseline runs in place of 4.3
        self.controls: tuple[str, ...] = ()
        self._reverse_passes: ReversePasses | None = None
        self._reverse_pass: ReversePass | None = None
        if self.rewriting:
            resolve(self.window, self.segment, self.product, "adjoint", self.plant)
            self.controls = steered(self.plant, windows.controls, usual)
            self._reverse_passes = ReversePasses(
                self.plant,
                self.objective,
                self.controls,
                self.segment,
                self.product,
                engine.memory_budget,
                engine.spill,
                Damping(engine.discount, engine.costate_clip),
                self._events,
            )
            self._reverse_pass = self._reverse_passes.make(OomFallback())
        elif self.start == "zero":
            self.plant.refuse_complex()
        product = cast(Product, engine.product)
        self._whole_run = passable(self._reverse_passes, product, planner) if self.passes else None
        self.per_group = grouped(self.plant, self.controls, windows.per_group or ())
        self._base = BaseSchedule(
            self.plant,
            self.template,
            self.warmup,
            self.law.cooldown,
            "lr" in self.controls or not self.controls,
            self.per_group,
            self.seed,
            self.followed,
        )

    # fit -----------------------------------------------------------------------------------------

    def fit(self, steps: int, resume: Literal["auto", "never"] = "auto") -> RunResult:
        """Trains until `steps` optimizer steps are committed.

        Args:
            steps: optimizer steps, with those that were committed before.
            resume: "auto" continues the run that `directory` holds, "never" refuses a directory
                that holds one.

        Returns:
            What came out.

        Raises:
            InputError: for arguments that cannot be used, or a directory that holds another run.
            DivergedError: where no lr keeps the next window finite.
            StorageError: where the disk did not take all of the run.
        """
        steps = self._checked(steps, resume)
        with self._fitting():
            fit = self._begin(steps, resume)
            if fit.passes and fit.state.step == 0:
                rewrite_whole_run(fit, train)
            train(fit)
            finish(fit)
        return self._result()

    def _checked(self, steps: int, resume: str) -> int:
        steps = whole_number("steps", steps)
        settings.Run(steps=steps).checked()
        settings.Storage(resume=resume).checked()
        if self.followed is not None and len(self.followed) < steps:
            raise InputError(
                f"the schedule has {len(self.followed)} steps, fewer than the run's {steps}; "
                f"stretch it to {steps} steps, or train for at most {len(self.followed)}"
            )
        check_course(self.plant.data_weights, steps)
        if self._fitted and self.directory is None and self.start != "given":
            raise InputError(
                f"this Runner has been fitted, and start={self.start!r} is for a model that has "
                "not; to train on give it a directory, which fit continues, or build another with "
                "start='given'"
            )
        return steps

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """Sets global state inside, and closes everything at the end."""
        try:
            with self.plant.optimizing():
                try:
                    with (
                        interrupts.at_steps(),
                        torch.enable_grad(),  # fit may be called under no_grad
                        deterministic(self.deterministic),
                        synchronised(self.plant.model, self.ranks),
                        memory.held(self._settings[2].memory_budget),
                    ):
                        yield
                except DivergedError:
                    if self.directory is not None:
                        self.directory.flush()  # what was tried last
                    raise
                except StorageError as error:
                    if self._state is not None and self._state.result is not None:
                        error.result = self._result()
                    raise
                finally:
                    if self.directory is not None:
                        self.directory.close()
                    for stream in self._streams:
                        stream.close()
                leave(self.plant)
                self._fitted = True
                self._events.emit(RunEnded(self._result().record))
        finally:
            for listener in self.listeners:
                if isinstance(listener, (Logging, Shown)):
                    listener.close()

    @property
    def state(self) -> State:
        """The state of the current or the last fit."""
        if self._state is None:
            raise InputError("nothing has been fitted yet; call fit first")
        return self._state

    def _result(self) -> RunResult:
        state = self.state
        assert state.result is not None
        records = (state.result, state.tape, state.windows, self._path, learned(self.plant, state))
        config = self._description(state.steps)
        return RunResult(state.committed(), *records, config, state.starts)

    @property
    def _path(self) -> Path | None:
        return None if self.directory is None else self.directory.path

    def plan(self) -> list[str]:
        """The cost of a window in lines for people. Nothing is trained or written."""
        if self._reverse_passes is None:
            raise InputError("a plan is of the reverse pass; turn rewriting on to have one")
        stream = StepBatches(
            self.train_loader, isolated=True, device=self._moved_to, accumulate=self.accumulate
        )
        with closing(stream):
            (batch,) = stream.take(0, 1)
        fallback = OomFallback() if self._state is None else self._state.fallback
        reverse_pass = self._reverse_passes.make(fallback)
        return [
            *reverse_pass.plan(self.window, batch, self.controls).lines(),
            f"product: {reverse_pass.why}",
        ]

    # Begin ---------------------------------------------------------------------------------------

    def _begin(self, steps: int, resume: Literal["auto", "never"]) -> Fit:
        """A new run with its first lr, or the one in the directory."""
        self.plant.take_up()
        notices, judged = list[str](), ""
        if self.ranks is not None:
            described = self._description(steps) | {"directory": self.directory is not None}
            notices = begin_together(self.plant, described, wrapped=self._wrapped)
        first_lr = torch.tensor(self._base.own()["lr"], dtype=torch.float64)
        schedule = self._base.planned(steps, first_lr)
        reverse_pass = self._reverse_pass if self._state is None else self._state.reverse_pass
        state = self._state = State(steps, schedule, first_lr, reverse_pass)
        if self.rewriting and self.plant.data_weights is not None:
            state.evidence = Evidence(len(self.plant.data_weights))
            judged = judged_by(self.objective, on_val=self._judged_on_val)
        fit = Fit(
            self.plant,
            state,
            self.law,
            self.objective,
            self._base,
            self.window,
            self.stride,
            self._data(steps),
            self._reverse_passes,
            self.planner,
            self.directory,
            self._events,
            self.inexact_replay,
            self.passes,
            self._whole_run,
        )
        self._events.told.clear()
        begin_planning(fit, self.plant.controls.initial["lr"])
        if self.ranks is not None:
            draw_apart(self.ranks)
        if self.directory is not None:
            try_first_batch(fit)
            checkpoint = self.directory.open(self._description(steps), resume)
            open_run(fit, self.directory, checkpoint, self.prior_cost)
        for notice in notices:
            self._events.tell(notice)
        if judged:
            self._events.tell(judged, mild=True)
        if state.result is None:
            sizes = (state.step, steps, self.window, self.stride)
            rule = description.of_rule(self.law) if self.rewriting else {}
            self._events.emit(RunStarted(*sizes, self.controls, self.rewriting, self._path, rule))
            announce_planning(fit)
            if state.step == 0 and self._low_lr is not None:
                self._events.tell(self._low_lr)
            if state.step == 0 and self.start != "given":
                find_first_lr(fit, self.start)
        return fit

    def _data(self, steps: int) -> Data:
        # Without rewriting nothing may be drawn that the plain loop does not draw.
        seed = int(torch.randint(2**31, ())) if self.rewriting else None
        resumable = self.directory is not None
        train = StepBatches(
            self.train_loader,
            isolated=self.rewriting or self.ranks is not None,
            seed=seed,
            device=self._moved_to,
            accumulate=self.accumulate,
            resumable=resumable,
            besides=() if self.planner is None else self.planner.knobs,
        )
        self._streams = [train]
        validation = None
        if seed is not None and self._judged_on_val and self.objective.terminal_weight:
            assert self.val_loader is not None
            validation = StepBatches(
                self.val_loader,
                isolated=True,
                seed=mixed_seed(seed, 1) % 2**31,
                device=self._moved_to,
                name="val_loader",
                resumable=resumable,
            )
            self._streams.append(validation)
        loaders = (self.train_loader, self.val_loader, self.test_loader)
        plain = not self.rewriting and self.start == "given"
        kept = self.keep_best or (False if plain else None)
        every = validation_steps(self.validate_every, kept, self.val_loader, steps)
        sizes = (self.accumulate, every, self._epoch_steps)
        asked = self.validate_every is not None
        return Data(*loaders, *sizes, asked, self.keep_best, train, validation)

    @property
    def _judged_on_val(self) -> bool:
        return self.val_loader is not None and isinstance(self.objective.batches, int)

    @property
    def _moved_to(self) -> torch.device | None:
        """The device that batches are moved to; None where they can stay."""
        return None if self.device.type == "cpu" else self.device

    # config.json ---------------------------------------------------------------------------------

    def _description(self, steps: int) -> dict[str, Any]:
        """config.json: everything that the run's numbers depend on."""
        described = {
            "steps": steps,
            "window": self.window,
            "stride": self.stride,
            "controls": list(self.controls),
            "rewrite": description.of_rule(self.law) if self.rewriting else False,
            "objective": description.of_objective(self.objective),
            "validation": self.val_loader is not None,
            "product": self.product,
            "segment": self.segment,
            "clip_norm": self.plant.clip_norm,
            **self._unusual(),
            "seed": self.seed,
            "optimizer": type(self.plant.optimizer).__name__.lower(),
            "initial": self._base.own(),
            "parameters": sum(p.numel() for p in self.plant.owned),
            "device": str(self.device),
            "code": description.of_code(
                self.plant.model,
                train_loader=self.train_loader,
                val_loader=self.val_loader,
                test_loader=self.test_loader,
            ),
            "versions": versions(),
            "hardware": hardware(self.device),
        }
        return described if self.config is None else {**described, **self.config}

    def _unusual(self) -> dict[str, Any]:
        """Settings recorded only where not at their default, so that older runs can resume."""
        wsd = self.rewriting and self.start == "given"
        values: dict[str, tuple[Any, Any]] = {
            "ranks": (self.ranks and self.ranks.size, None),
            "start": (self.start, "given"),
            "warmup": (self.warmup, 0.0),
            "weighed": (self._weighed, None),
            "planner": (self.planner and self.planner.describe(), None),
            "followed": (self.followed and self.followed.digest(), None),
            "template": (self.template, "wsd" if wsd else "constant"),
        }
        given = {name: value for name, (value, usual) in values.items() if value != usual}
        for each in self._settings:
            given |= each.if_given()
        return given

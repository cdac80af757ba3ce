"""A Lightning Trainer, trained with rewriting: what comes back is the Trainer, trained.

from rhc.integrations.lightning import fit

result = fit(trainer, module, train_loader, val_loader, window=50)
trainer.validate(module, val_loader)
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rhc.errors import InputError
from rhc.events import Committed, Event
from rhc.integrations import aside, refuse, tell, unwrapped_optimizer
from rhc.runner import Runner, RunResult

__all__ = ["fit"]


def fit(
    trainer: Any,
    module: Any,
    train_loader: Any = None,
    val_loader: Any = None,
    *,
    datamodule: Any = None,
    window: int = 50,
    steps: int | None = None,
    directory: str | Path | None = None,
    **settings: Any,
) -> RunResult:
    """Trains a LightningModule by its Trainer with rewriting, in place of `trainer.fit(…)`.

    The Trainer sets up strategy, data, precision, callbacks and loggers as always; then windows of
    `training_step` are rolled and rewritten in the place of its loop. Callbacks are told of every
    committed step and epoch; validation and checkpoints come at the end of the window in which
    they fall due. What `training_step` logs is logged once a committed step.

    Args:
        trainer: a `lightning.Trainer` with one device.
        module: with automatic optimization and one optimizer.
        train_loader: as for `trainer.fit`, as the next two.
        val_loader: batches that windows are judged on; None for the module's own.
        datamodule: in place of both.
        window: steps that are rolled and rewritten at once.
        steps: optimizer steps; None for `max_steps`, else `max_epochs`.
        directory: of the run, which a second call continues; None for `default_root_dir`/rhc.
        settings: of `rhc.Runner`.

    Returns:
        The run; module, optimizer and `trainer.global_step` are those of its end.

    Raises:
        InputError: for a Trainer or module that cannot be trained so: manual or several
            optimizers, fp16, several devices.
    """
    refuse(
        "the LightningModule",
        [
            (not module.automatic_optimization, "it steps by itself (manual optimization)"),
            (str(trainer.precision) == "16-mixed", "fp16 scales losses; give bf16-mixed"),
            (trainer.world_size > 1, "the Trainer has several devices; give it devices=1"),
        ],
    )
    tell(
        "the Trainer",
        [
            "lr schedulers of configure_optimizers are not stepped: the schedule is found",
            "validation and checkpoints come at the end of a window",
            "hooks of the backward pass and of the optimizer's step are not called",
            "callbacks are given None for the batch of a step",
        ],
    )
    loop = _loop_of(trainer)(
        trainer, min_epochs=trainer.fit_loop.min_epochs, max_epochs=trainer.fit_loop.max_epochs
    )
    where = Path(trainer.default_root_dir) / "rhc" if directory is None else directory
    loop.asked = {"window": window, "directory": where, **settings}
    loop.asked_steps = steps
    before, trainer.fit_loop = trainer.fit_loop, loop
    try:
        trainer.fit(module, train_loader, val_loader, datamodule=datamodule)
    finally:
        before.epoch_progress = loop.epoch_progress
        before.epoch_loop = loop.epoch_loop
        trainer.fit_loop = before
    if loop.result is None:
        raise InputError("the Trainer ended before the first step; look at what it says above")
    found: RunResult = loop.result
    return found


def _loop_of(trainer: Any) -> Any:
    """The Trainer's kind of fit loop, with windows in place of its epochs' steps."""
    package = type(trainer).__module__.partition(".")[0]
    root = "lightning.pytorch" if package == "lightning" else "pytorch_lightning"
    call = importlib.import_module(f"{root}.trainer.call")
    base = type(trainer.fit_loop)

    class HindsightLoop(base):  # type: ignore[misc, valid-type]
        asked: dict[str, Any]
        asked_steps: int | None = None
        result: RunResult | None = None

        def run(self) -> None:
            self.setup_data()
            if self.skip:
                return
            self.reset()
            self.on_run_start()
            self.result = _fitted(self, call)
            self.on_run_end()

    return HindsightLoop


def _fitted(loop: Any, call: Any) -> RunResult:
    trainer = loop.trainer
    module, optimizers = trainer.lightning_module, trainer.optimizers
    refuse("the LightningModule", [(len(optimizers) != 1, f"it has {len(optimizers)} optimizers")])
    loaders = loop._combined_loader.flattened
    held_out = loop.epoch_loop.val_loop._combined_loader
    refuse("the LightningModule", [(len(loaders) != 1, "it has several training loaders")])
    accumulate = trainer.accumulate_grad_batches
    per_epoch = 0
    if math.isfinite(trainer.num_training_batches):
        per_epoch = max(1, int(trainer.num_training_batches) // accumulate)
    steps = loop.asked_steps or (trainer.max_steps if trainer.max_steps > 0 else None)
    if steps is None:
        if not per_epoch or not trainer.max_epochs or trainer.max_epochs < 0:
            raise InputError("the Trainer has no end; give steps=…, max_steps or max_epochs")
        steps = trainer.max_epochs * per_epoch
    told = _Told(loop, call, per_epoch)
    norm = trainer.gradient_clip_algorithm in (None, "norm")
    clips = {"clip_norm" if norm else "clip_value": trainer.gradient_clip_val or None}
    settings = dict(loop.asked)
    runner = Runner(
        module,
        unwrapped_optimizer(optimizers[0]),
        _loss_of(trainer),
        loaders[0],
        held_out.flattened[0] if held_out is not None and held_out.flattened else None,
        accumulate=accumulate,
        listeners=[*settings.pop("listeners", ()), told],
        **{**clips, **settings},
    )
    told.take_up(runner)
    result = runner.fit(steps)
    told.end(result)
    return result


def _loss_of(trainer: Any) -> Any:
    def loss_fn(module: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        with _logged(module) as logged, trainer.precision_plugin.train_step_context():
            found = module.training_step(  # type: ignore[operator]
                trainer.precision_plugin.convert_input(batch), 0
            )
        loss = found["loss"] if isinstance(found, Mapping) else found
        return loss, {name: value for name, value in logged.items() if name != "loss"}

    return loss_fn


@contextmanager
def _logged(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What a step logs by `self.log`, which the Trainer would count once for every roll."""
    logged: dict[str, Tensor] = {}

    def log(name: str, value: Any, *args: Any, **settings: Any) -> None:
        if hasattr(value, "compute"):
            raise InputError(f"{name!r} is logged as a torchmetrics object; log its value")
        logged[name] = torch.as_tensor(value).detach()

    def log_dict(values: Mapping[str, Any], *args: Any, **settings: Any) -> None:
        for name, value in values.items():
            log(name, value)

    own = module.__dict__
    own["log"], own["log_dict"] = log, log_dict
    try:
        yield logged
    finally:
        del own["log"], own["log_dict"]


class _Told:
    """A listener that does what Lightning's loop does beside its steps."""

    def __init__(self, loop: Any, call: Any, epoch_steps: int) -> None:
        self.loop, self.call, self.epoch_steps = loop, call, epoch_steps
        self.trainer = loop.trainer
        self.step = 0

    def take_up(self, runner: Runner) -> None:
        self.runner = runner

    def __call__(self, event: Event) -> None:
        if not isinstance(event, Committed):
            return
        if self.step == 0 and event.start:  # a resumed run
            self._count(event.start)
        if event.start == self.step:
            self.take(event.rows)

    def take(self, rows: list[dict[str, Any]]) -> None:
        trainer, call, ended = self.trainer, self.call, 0
        module = trainer.lightning_module
        if self.step == 0:
            self._hook("on_train_epoch_start")
        for row in rows:
            index = self.step % self.epoch_steps if self.epoch_steps else self.step
            call._call_callback_hooks(trainer, "on_train_batch_start", None, index)
            self._count(self.step + 1)
            self._log(row)
            outputs = {"loss": torch.tensor(math.nan if row["loss"] is None else row["loss"])}
            call._call_callback_hooks(trainer, "on_train_batch_end", outputs, None, index)
            call._call_lightning_module_hook(trainer, "on_train_batch_end", outputs, None, index)
            ended += bool(self.epoch_steps) and self.step % self.epoch_steps == 0
        if not ended:
            return
        # With the weights of the window's end, which the step count says.
        with aside(module):
            if (self.step // self.epoch_steps) % (trainer.check_val_every_n_epoch or 1) == 0:
                self._validate()
            for _ in range(ended):
                self._hook("on_train_epoch_end")
            self._hook("on_train_epoch_start")

    def _validate(self) -> None:
        trainer, loop = self.trainer, self.loop.epoch_loop.val_loop
        if trainer.enable_validation and loop._combined_loader is not None:
            trainer.validating = True
            try:
                loop.run()
            finally:
                trainer.training = True

    def _hook(self, name: str) -> None:
        self.call._call_callback_hooks(self.trainer, name)
        self.call._call_lightning_module_hook(self.trainer, name)

    def _count(self, step: int) -> None:
        self.step = step
        epoch_loop = self.loop.epoch_loop
        progress = epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        progress.ready = progress.completed = step
        epoch_loop._batches_that_stepped = step
        epoch_loop.batch_progress.total.ready = epoch_loop.batch_progress.total.completed = step
        if self.epoch_steps:
            epochs = step // self.epoch_steps
            current = self.loop.epoch_progress.current
            current.ready = current.started = current.processed = current.completed = epochs

    def _log(self, row: Mapping[str, Any]) -> None:
        known = ("step", "loss", "gradient_norm", "momentum", "noise", "weight_decay", "planning")
        found = {n: v for n, v in row.items() if n not in known and isinstance(v, (int, float))}
        trainer = self.trainer
        metrics = {
            name: torch.tensor(float(value)) for name, value in found.items() if name != "lr"
        }
        trainer._logger_connector._callback_metrics.update(metrics)
        if trainer.loggers and self.step % trainer.log_every_n_steps == 0:
            for logger in trainer.loggers:
                logger.log_metrics({**found, "train_loss": row["loss"]}, step=self.step)

    def end(self, result: RunResult) -> None:
        if self.step == 0:  # it was finished before
            self._count(len(result.tape))

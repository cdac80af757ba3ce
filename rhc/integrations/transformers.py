"""A Hugging Face Trainer, trained with rewriting: what comes back is the Trainer, trained.

from rhc.integrations.transformers import fit

result = fit(trainer, window=50)
trainer.evaluate()
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rhc.events import Committed, Event, RunStarted
from rhc.integrations import aside, earlier_rows, epoch_steps, refuse, tell, unwrapped_optimizer
from rhc.report.records import one_number
from rhc.runner import Runner, RunResult

__all__ = ["fit"]


def fit(
    trainer: Any,
    *,
    window: int = 50,
    steps: int | None = None,
    directory: str | Path | None = None,
    **settings: Any,
) -> RunResult:
    """Trains a `transformers.Trainer` with rewriting, in place of `trainer.train()`.

    The loss is the Trainer's `compute_loss`; its loaders, collator, optimizer with its groups,
    clipping, accumulation and bf16 autocast are used as they are. Callbacks are told of every
    committed step; `state.log_history` has the logs that its settings ask for; evaluation and
    checkpoints, in the Trainer's own format, come at the end of the window in which they fall due.

    Args:
        trainer: built, not trained yet.
        window: steps that are rolled and rewritten at once.
        steps: optimizer steps; None for `max_steps`, else `num_train_epochs`.
        directory: of the run, which a second call continues; None for `output_dir`/rhc.
        settings: of `rhc.Runner`.

    Returns:
        The run; model, optimizer and `trainer.state` are those of its end.

    Raises:
        InputError: for a Trainer that cannot be trained so: fp16, several processes or devices.
    """
    args = trainer.args
    refuse(
        "the Trainer",
        [
            (args.fp16, "fp16 scales losses by what overflowed before; give bf16=True, or neither"),
            (args.world_size > 1 or args.n_gpu > 1, "it has several devices; give it one"),
            (trainer.is_deepspeed_enabled, "DeepSpeed owns the step"),
            (trainer.is_fsdp_enabled, "FSDP owns the parameters; rhc.Runner takes fully_shard"),
            (trainer.neftune_noise_alpha is not None, "neftune hooks are set in its own loop"),
        ],
    )
    tell("the Trainer", _differences(trainer))
    trainer.create_optimizer()
    trainer.optimizer = unwrapped_optimizer(trainer.optimizer)
    trainer.model.train()
    loader = trainer.get_train_dataloader()
    accumulate = args.gradient_accumulation_steps
    per_epoch = 0
    if steps is None and args.max_steps <= 0:
        per_epoch = epoch_steps(loader, accumulate, "the Trainer's train_dataset")
        steps = math.ceil(args.num_train_epochs * per_epoch)
    elif hasattr(loader.dataset, "__len__"):
        per_epoch = epoch_steps(loader, accumulate, "the Trainer's train_dataset")
    steps = steps or args.max_steps
    told = _Told(trainer, steps, per_epoch)
    runner = Runner(
        trainer.model,
        trainer.optimizer,
        _loss_of(trainer),
        loader,
        None if trainer.eval_dataset is None else trainer.get_eval_dataloader(),
        window=window,
        accumulate=accumulate,
        clip_norm=args.max_grad_norm or None,
        seed=settings.pop("seed", args.seed),
        directory=Path(args.output_dir) / "rhc" if directory is None else directory,
        listeners=[*settings.pop("listeners", ()), told],
        **settings,
    )
    told.runner = runner
    trainer.is_in_train = True
    try:
        result = runner.fit(steps)
    finally:
        trainer.is_in_train = False
    told.end(result)
    return result


def _differences(trainer: Any) -> list[str]:
    from transformers import Trainer

    found = ["its lr scheduler is replaced by the schedule that is found"]
    if trainer.lr_scheduler is not None:
        found = ["the lr scheduler that was given is not used: the schedule is found"]
    if type(trainer).training_step is not Trainer.training_step:
        found.append("its own training_step is not called, compute_loss is")
    if trainer.args.gradient_accumulation_steps > 1:
        found.append("every accumulated batch counts alike, whatever its number of tokens")
    found.append("evaluation and checkpoints come at the end of a window")
    found.append("callbacks cannot end the training early: should_training_stop is not followed")
    return found


def _loss_of(trainer: Any) -> Any:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        inputs = trainer._prepare_inputs(batch)
        # As in its own loop: evaluation counts no items.
        items = None
        if model.training:
            items = trainer._get_num_items_in_batch([inputs], trainer.args.device)
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            loss: Tensor = trainer.compute_loss(model, inputs, num_items_in_batch=items)
        return loss

    return loss_fn


class _Schedule:
    """What the Trainer asks of an lr scheduler; steps are taken by the Runner."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.last_epoch = 0

    def get_last_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch, "_last_lr": self.get_last_lr()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.last_epoch = state["last_epoch"]

    def step(self) -> None:
        self.last_epoch += 1


class _Told:
    """A listener that does what the Trainer's loop does beside its steps."""

    def __init__(self, trainer: Any, steps: int, epoch_steps: int) -> None:
        self.trainer, self.steps, self.epoch_steps = trainer, steps, epoch_steps
        self.runner: Any = None
        self.losses: list[float] = []
        self.begun = False

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self.begin()
                self.take(earlier_rows(self.runner, event.start), again=True)
            case Committed(start=start) if start == self.trainer.state.global_step:
                self.take(event.rows)

    def begin(self) -> None:
        from transformers.trainer_callback import ExportableState, TrainerState

        trainer, args = self.trainer, self.trainer.args
        exported = [
            each
            for each in (*trainer.callback_handler.callbacks, trainer.control)
            if isinstance(each, ExportableState)
        ]
        trainer.state = TrainerState(stateful_callbacks=exported)
        state = trainer.state
        state.max_steps, state.num_train_epochs = self.steps, math.ceil(args.num_train_epochs)
        state.train_batch_size = args.train_batch_size
        state.is_local_process_zero = state.is_world_process_zero = True
        state.compute_steps(args, self.steps)
        handler = trainer.callback_handler
        handler.optimizer = trainer.optimizer
        trainer.lr_scheduler = handler.lr_scheduler = _Schedule(trainer.optimizer)
        self.begun = True
        trainer.control = handler.on_train_begin(args, state, trainer.control)

    def take(self, rows: list[dict[str, Any]], *, again: bool = False) -> None:
        """Tells of committed steps. again: those before a resume, for the log history alone."""
        trainer = self.trainer
        handler, args, state = trainer.callback_handler, trainer.args, trainer.state
        evaluates = saves = False
        for row in rows:
            if again:
                self._count(row)
                if state.logging_steps and state.global_step % state.logging_steps == 0:
                    state.log_history.append({**self._logs(row), "step": state.global_step})
                continue
            if self._begins_epoch():
                trainer.control = handler.on_epoch_begin(args, state, trainer.control)
            trainer.control = handler.on_step_begin(args, state, trainer.control)
            self._count(row)
            trainer.control = handler.on_step_end(args, state, trainer.control)
            evaluates |= trainer.control.should_evaluate
            saves |= trainer.control.should_save
            trainer.control.should_evaluate = trainer.control.should_save = False
            if trainer.control.should_log:
                trainer.log(self._logs(row))
                trainer.control.should_log = False
            if self._begins_epoch():
                trainer.control = handler.on_epoch_end(args, state, trainer.control)
                evaluates |= trainer.control.should_evaluate
                saves |= trainer.control.should_save
        if evaluates or saves:
            with aside(trainer.model):
                self._evaluate_and_save(evaluates, saves)

    def _evaluate_and_save(self, evaluates: bool, saves: bool) -> None:
        trainer = self.trainer
        if evaluates:
            metrics = trainer.evaluate()
            trainer._determine_best_metric(metrics=metrics, trial=None)
        if saves:
            trainer._save_checkpoint(trainer.model, trial=None)
            args, state = trainer.args, trainer.state
            trainer.control = trainer.callback_handler.on_save(args, state, trainer.control)

    def _count(self, row: Mapping[str, Any]) -> None:
        state = self.trainer.state
        state.global_step += 1
        self.trainer.lr_scheduler.last_epoch = state.global_step
        state.epoch = state.global_step / (self.epoch_steps or self.steps)
        self.losses.append(row["loss"])

    def _begins_epoch(self) -> bool:
        done = self.trainer.state.global_step
        return bool(self.epoch_steps) and done % self.epoch_steps == 0

    def _logs(self, row: Mapping[str, Any]) -> dict[str, Any]:
        mean, self.losses = sum(self.losses) / len(self.losses), []
        return {
            "loss": mean,
            "grad_norm": row["gradient_norm"],
            "learning_rate": one_number(row["lr"]),
            "epoch": self.trainer.state.epoch,
        }

    def end(self, result: RunResult) -> None:
        trainer = self.trainer
        if not self.begun:  # it was finished before
            self.begin()
            self.take(result.tape, again=True)
        mean = sum(row["loss"] for row in result.tape) / max(1, len(result.tape))
        seconds = result.record["wall_seconds"]
        trainer.log({"train_runtime": seconds, "train_loss": mean})
        handler, args, state = trainer.callback_handler, trainer.args, trainer.state
        trainer.control = handler.on_train_end(args, state, trainer.control)
        torch.set_grad_enabled(True)

"""EpochPlanner inside of other people's loops: Lightning and the Hugging Face Trainer.

    trainer = lightning.Trainer(callbacks=[lightning_callback(planner, validation="val_loss")])
    trainer = transformers.Trainer(…, callbacks=[hf_callback(planner)])

Both build the planner's optimizer side when the loop has made its optimizer, and keep the planner's
state with the loop's own checkpoints. Neither package is imported before it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from rhc.errors import InputError
from rhc.schedulers.planner import EpochPlanner, joined, parted

STATE = "rhc_planner"
"""Name of the two files, .json and .safetensors, beside a checkpoint of the Trainer."""


def lightning_callback(planner: EpochPlanner, *, validation: str = "val_loss") -> Any:
    """A `lightning.pytorch.Callback` that plans epochs.

    planner: built without an optimizer; the trainer's first one is steered. validation: the name
    under which the module logs its validation loss. The training loss is what `training_step`
    returns. Epochs without a validation pass are not planned.
    Raises InputError where Lightning is not installed.
    """
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError:
            raise InputError(
                "lightning_callback needs Lightning, which is not installed: pip install lightning"
            ) from None

    class PlannedEpochs(Callback):
        def __init__(self) -> None:
            self.restored: Mapping[str, Any] | None = None

        def on_fit_start(self, trainer: Any, module: Any) -> None:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            _take(planner, trainer.optimizers, schedulers, self.restored)

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
        ) -> None:
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
            if loss is not None and trainer.global_step > planner.steps:
                planner.step(loss)

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            found = trainer.callback_metrics.get(validation)
            if found is None and planner.needs_validation:
                if trainer.val_dataloaders is None:
                    planner.on_epoch_end()  # says what is missing
                if trainer.current_epoch % (trainer.check_val_every_n_epoch or 1) == 0:
                    raise InputError(
                        f"the module logs no {validation!r}; log it in validation_step, or give "
                        "lightning_callback(validation=…) its name"
                    )
                return
            planner.on_epoch_end(found)

        def state_dict(self) -> dict[str, Any]:
            return planner.state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.restored = state

    return PlannedEpochs()


def hf_callback(planner: EpochPlanner, *, validation: str = "eval_loss") -> Any:
    """A `transformers.TrainerCallback` that plans epochs.

    planner: built without an optimizer; the Trainer's own is steered, its scheduler's shape kept.
    Use it with `eval_strategy="epoch"`; the loss of training is the one that is logged, so that
    `logging_steps=1` shows most. An epoch's plan is made when its evaluation is there: at the end
    of the epoch where nothing is evaluated or needed.
    Raises InputError where transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError:
        raise InputError(
            "hf_callback needs transformers, which is not installed: pip install transformers"
        ) from None

    class PlannedEpochs(TrainerCallback):
        def __init__(self) -> None:
            self.restored: Mapping[str, Any] | None = None
            self.ended = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            folder = _checkpoint_of(args, state)
            if folder is not None:
                self.restored = _read(folder)
            _take(planner, [given["optimizer"]], [given["lr_scheduler"]], self.restored)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any
        ) -> None:
            if logs and "loss" in logs:
                planner.step(float(logs["loss"]), gradient_norm=_number(logs.get("grad_norm")))

        def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.ended = True
            if not planner.needs_validation:
                self.ended = False
                planner.on_epoch_end()

        def on_evaluate(
            self, args: Any, state: Any, control: Any, metrics: Any = None, **given: Any
        ) -> None:
            # The Trainer evaluates right after an epoch's end.
            if self.ended and metrics and validation in metrics:
                self.ended = False
                planner.on_epoch_end(float(metrics[validation]))

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                _write(folder, planner)

    return PlannedEpochs()


def _take(
    planner: EpochPlanner,
    optimizers: list[Any],
    schedulers: list[Any],
    restored: Mapping[str, Any] | None,
) -> None:
    """Hands the loop's optimizer to the planner, which then goes on from a state."""
    optimizer = optimizers[0]
    # Accelerate wraps the optimizer that the parameters' groups belong to.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    planner.attach(optimizer, schedulers)
    if restored is not None:
        planner.load_state_dict(restored)


def _checkpoint_of(args: Any, state: Any) -> Path | None:
    """The folder that the Trainer resumes from, if it does."""
    if not state.global_step:
        return None
    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    return folder if (folder / f"{STATE}.json").is_file() else None


def _write(folder: Path, planner: EpochPlanner) -> None:
    tensors, rest = parted(planner.state_dict())
    save_file(tensors, folder / f"{STATE}.safetensors")
    (folder / f"{STATE}.json").write_text(json.dumps(rest), encoding="utf-8")


def _read(folder: Path) -> dict[str, Any]:
    rest = json.loads((folder / f"{STATE}.json").read_text(encoding="utf-8"))
    return joined(load_file(folder / f"{STATE}.safetensors"), rest)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)

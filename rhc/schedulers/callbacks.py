"""EpochPlanner in Lightning and the Hugging Face Trainer.

    trainer = lightning.Trainer(callbacks=[lightning_callback(planner, validation="val_loss")])
    trainer = transformers.Trainer(…, callbacks=[hf_callback(planner)])

The planner's state is saved in their checkpoints.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from rhc.errors import InputError
from rhc.schedulers.planner import EpochPlanner, joined, parted

STATE = "rhc_planner"
"""Stem of the .json and .safetensors files in the Trainer's checkpoints."""


def lightning_callback(planner: EpochPlanner, *, validation: str = "val_loss") -> Any:
    """A `lightning.pytorch.Callback` that plans epochs; the planner is built without an optimizer.
    validation: logged name of the validation loss; epochs without one are not planned."""
    base = _imported("Callback", "lightning", "lightning.pytorch", "pytorch_lightning")

    class PlannedEpochs(base):  # type: ignore[misc, valid-type]
        restored: Mapping[str, Any] | None = None

        def on_fit_start(self, trainer: Any, module: Any) -> None:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            _attach(planner, trainer.optimizers[0], schedulers, self.restored)

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int
        ) -> None:
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
            if loss is not None and trainer.global_step > planner.steps:
                planner.step(loss)

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            found = trainer.callback_metrics.get(validation)
            if found is not None or not planner.needs_validation or trainer.val_dataloaders is None:
                planner.on_epoch_end(found)  # raises the error that says what is missing
            elif trainer.current_epoch % (trainer.check_val_every_n_epoch or 1) == 0:
                raise InputError(
                    f"the module logs no {validation!r}; log it in validation_step, or give "
                    "lightning_callback(validation=…) its name"
                )

        def state_dict(self) -> dict[str, Any]:
            return planner.state_dict()

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.restored = state

    return PlannedEpochs()


def hf_callback(planner: EpochPlanner, *, validation: str = "eval_loss") -> Any:
    """A `transformers.TrainerCallback` that plans epochs, with `eval_strategy="epoch"`; the planner
    is built without an optimizer.
    validation: name in the Trainer's metrics. The training loss is the logged one, so
    `logging_steps=1` gives the most data."""
    base = _imported("TrainerCallback", "transformers", "transformers")

    class PlannedEpochs(base):  # type: ignore[misc, valid-type]
        ended = False

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            resumed = state.global_step and (folder / f"{STATE}.json").is_file()
            restored = _read(folder) if resumed else None
            _attach(planner, given["optimizer"], [given["lr_scheduler"]], restored)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any
        ) -> None:
            if logs and "loss" in logs:
                planner.step(float(logs["loss"]), gradient_norm=logs.get("grad_norm"))

        def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            self.ended = planner.needs_validation
            if not self.ended:
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


def _imported(name: str, package: str, *modules: str) -> Any:
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except ImportError:
            continue
    raise InputError(
        f"this callback needs {package}, which is not installed: pip install {package}"
    )


def _attach(
    planner: EpochPlanner, optimizer: Any, schedulers: list[Any], state: Mapping[str, Any] | None
) -> None:
    # Accelerate wraps the optimizer that the parameters' groups belong to.
    planner.attach(getattr(optimizer, "optimizer", optimizer), schedulers)
    if state is not None:
        planner.load_state_dict(state)


def _write(folder: Path, planner: EpochPlanner) -> None:
    tensors, rest = parted(planner.state_dict())
    save_file(tensors, folder / f"{STATE}.safetensors")
    (folder / f"{STATE}.json").write_text(json.dumps(rest), encoding="utf-8")


def _read(folder: Path) -> dict[str, Any]:
    rest = json.loads((folder / f"{STATE}.json").read_text(encoding="utf-8"))
    return joined(load_file(folder / f"{STATE}.safetensors"), rest)

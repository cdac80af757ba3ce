"""A loop of Hugging Face Accelerate, trained with rewriting, from what `prepare` returned.

from rhc.integrations.accelerate import fit

model, optimizer, loader, held_out = accelerator.prepare(model, optimizer, loader, held_out)
result = fit(accelerator, model, optimizer, loss_fn, loader, held_out, steps=1000)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from rhc.events import Committed, Event
from rhc.integrations import refuse, tell, unwrapped_optimizer
from rhc.report.loggers import numbers_of
from rhc.runner import Runner, RunResult

__all__ = ["fit"]


def fit(
    accelerator: Any,
    model: nn.Module,
    optimizer: Any,
    loss_fn: Any,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any] | None = None,
    *,
    steps: int,
    window: int = 50,
    **settings: Any,
) -> RunResult:
    """Trains what `accelerator.prepare` returned, with rewriting.

    Autocast (bf16) and `gradient_accumulation_steps` are the Accelerator's; committed steps are
    logged to its trackers. `accelerator.save_state` saves model and optimizer as usual.

    Args:
        accelerator: with one process.
        model: as `prepare` returned it, like optimizer and loaders.
        optimizer: of the model's parameters.
        loss_fn: (model, batch) -> scalar, as for `rhc.Runner`.
        train_loader: batches; anything that can be iterated again and again.
        val_loader: batches that windows are judged on; None for training batches.
        steps: optimizer steps.
        window: steps that are rolled and rewritten at once.
        settings: of `rhc.Runner`, as clip_norm and directory.

    Returns:
        The run; model and optimizer are those of its end.

    Raises:
        InputError: for fp16, several processes, DeepSpeed or FSDP.
    """
    refuse(
        "what this Accelerator prepares",
        [
            (accelerator.mixed_precision == "fp16", "fp16 scales losses; give bf16, or neither"),
            (accelerator.num_processes > 1, "it has several processes; give rhc.Runner the ranks"),
            (str(accelerator.distributed_type).endswith(("DEEPSPEED", "FSDP")), "it owns the step"),
        ],
    )
    tell("the loop", ["lr schedulers that were prepared are not stepped: the schedule is found"])

    def autocast(module: nn.Module, batch: Any) -> Tensor:
        with accelerator.autocast():
            loss: Tensor = loss_fn(module, batch)
        return loss

    def tracked(event: Event) -> None:
        if isinstance(event, Committed) and accelerator.trackers:
            for row in event.rows:
                accelerator.log(dict(numbers_of(row)), step=row["step"])

    runner = Runner(
        model,
        unwrapped_optimizer(optimizer),
        loss_fn if accelerator.mixed_precision == "no" else autocast,
        train_loader,
        val_loader,
        window=window,
        accumulate=accelerator.gradient_accumulation_steps,
        listeners=[*settings.pop("listeners", ()), tracked],
        **settings,
    )
    return runner.fit(steps)

"""AdaptiveRL as the scheduler of a Hugging Face Trainer: passed with its optimizer.

The Trainer calls `scheduler.step()` after every optimizer step, and `compute_loss` for every
micro-batch; `observe` hands over the loss of each, so that an update sees the mean of all.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import rhc


class Points(Dataset):
    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, 4, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.x[i], "labels": self.x[i].sum(0, keepdim=True)}


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.net(x)
        return {"loss": nn.functional.mse_loss(y, labels), "logits": y}


class AdaptiveTrainer(Trainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        outcome = super().compute_loss(*args, **kwargs)
        loss = outcome[0] if isinstance(outcome, tuple) else outcome
        if self.model.training:
            # accelerate wraps the scheduler that it was given
            getattr(self.lr_scheduler, "scheduler", self.lr_scheduler).observe(loss)
        return outcome


def main() -> rhc.AdaptiveRL:
    torch.manual_seed(0)
    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = rhc.AdaptiveRL(optimizer, steps=200)
    with tempfile.TemporaryDirectory() as folder:
        trainer = AdaptiveTrainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=32,
                max_steps=200,
                save_steps=100,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                logging_steps=100,
            ),
            train_dataset=Points(640),
            optimizers=(optimizer, scheduler),  # type: ignore[arg-type]
        )
        trainer.train()
    print(f"{scheduler.updates} updates in {scheduler.steps} steps: {scheduler.values}")
    return scheduler


if __name__ == "__main__":
    main()

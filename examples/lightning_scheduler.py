"""AdaptiveRL as the scheduler of a Lightning module: configure_optimizers, and one line per step.

Lightning calls `scheduler.step()` after every optimizer step; the loss of that step is handed over
beforehand, by `observe`. Checkpoints hold the scheduler's state.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rhc


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.lr_schedulers().observe(loss)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        scheduler = rhc.AdaptiveRL(optimizer, steps=200)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


def main() -> rhc.AdaptiveRL:
    lightning.seed_everything(0, verbose=False)
    x = torch.randn(640, 4)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=32, shuffle=True)
    module = Regression()
    trainer = lightning.Trainer(
        max_epochs=10,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    scheduler: Any = module.lr_schedulers()
    print(f"{scheduler.updates} updates in {scheduler.steps} steps: {scheduler.values}")
    return scheduler


if __name__ == "__main__":
    main()

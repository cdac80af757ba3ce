"""A LightningModule trained by rhc's Runner: its training_step is the loss, nothing is rewritten.

What a Trainer would add (logging by `self.log`, hooks of epochs) does not happen here; the schedule
that comes out can be given back to Lightning by `result.schedule.to_lr_scheduler(optimizer)`.
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
        self.net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def loss_fn(module: Any, batch: Any) -> Tensor:
    return module.training_step(batch, 0)


def main() -> rhc.RunResult:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(640, 4)
    data = TensorDataset(x, x.sum(1, keepdim=True).sin())
    module = Regression()
    runner = rhc.Runner(
        module,
        module.configure_optimizers(),
        loss_fn,
        DataLoader(TensorDataset(*data[:512]), batch_size=32, shuffle=True),
        DataLoader(TensorDataset(*data[512:]), batch_size=128),
        window=20,
    )
    result = runner.fit(steps=100)
    print(f"validation loss {result.val_loss:.4f}")
    return result


if __name__ == "__main__":
    main()

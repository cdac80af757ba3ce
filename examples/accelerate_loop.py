"""AdaptiveRL in a loop of Hugging Face Accelerate, with accumulation: one line per batch.

The scheduler is not given to `prepare`, which would step it once per process; it is told every
micro-batch's loss, and steps where the optimizer does.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rhc


def main() -> rhc.AdaptiveRL:
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = rhc.AdaptiveRL(optimizer, steps=200)
    x = torch.randn(640, 4)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(20):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.observe(loss)
                if accelerator.sync_gradients:
                    scheduler.step()
    print(f"{scheduler.updates} updates in {scheduler.steps} steps: {scheduler.values}")
    return scheduler


if __name__ == "__main__":
    main()

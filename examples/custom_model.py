"""An own model, loss and DataLoader: two spirals, trained while rhc writes the schedule."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rhc

torch.manual_seed(0)
torch.set_num_threads(1)  # tensors this small are slower on several
radius, side = torch.rand(1200), torch.randint(2, (1200,))
points = torch.view_as_real(torch.polar(radius, 5 * radius + torch.pi * side))
train, val = TensorDataset(points[:900], side[:900]), TensorDataset(points[900:], side[900:])
model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)


def loss_fn(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


runner = rhc.Runner(model, optimizer, loss_fn, DataLoader(train, 64, True), DataLoader(val, 300))
result = runner.fit(steps=400)
print(f"validation loss {result.val_loss:.4f}, lr {result.schedule['lr'][::40].numpy().round(4)}")
result.schedule.save("schedule.json")  # later: Schedule.load("schedule.json").to_lr_scheduler(…)

"""One window, differentiated by hand: dJ/du_t of every step, and a central difference to check it.

`rhc.hypergradient` needs no Runner: it rolls the optimizer through the batches,
takes the reverse pass, and
leaves model, optimizer and random state as it found them. One step along the gradient gives a new
schedule, which is then used as an ordinary lr scheduler in an ordinary loop.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rhc

STEPS = 20
CHECKED = 5  # the step whose derivative is checked

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)  # so that the difference below has digits to show

x = torch.linspace(-3, 3, 256).unsqueeze(1)
y = torch.sin(2 * x)
batches = [(x[rows], y[rows]) for rows in torch.randint(256, (STEPS, 32))]
model = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def window(lr: Tensor) -> rhc.Hypergradient:
    """J, the loss on all points after the window, and its derivatives by lr and momentum."""
    return rhc.hypergradient(
        model,
        optimizer,
        loss_fn,
        batches,
        controls={"lr": lr, "momentum": 0.9},
        terminal=lambda model: loss_fn(model, (x, y)),
        stage_weight=0.0,
    )


lr = torch.full((STEPS,), 0.05)
found = window(lr)
print(f"J = {found.value:.6f} after {STEPS} steps at lr 0.05, {found.result.message}\n")
print("step     dJ/dlr   dJ/dmomentum   |costate|")
for step in range(0, STEPS, 5):
    print(
        f"{step:4}  {found.grad['lr'][step]:+9.5f}  {found.grad['momentum'][step]:+13.6f}"
        f"  {found.costate_norms[step]:10.5f}"
    )

h = 1e-5
moved = torch.zeros(STEPS)
moved[CHECKED] = h
difference = (window(lr + moved).value - window(lr - moved).value) / (2 * h)
exact = float(found.grad["lr"][CHECKED])
print(f"\ndJ/dlr at step {CHECKED}: exact {exact:+.9f}, central difference {difference:+.9f}")
print(f"relative error {abs(exact - difference) / abs(difference):.1e}")

# Half a natural unit downhill in log lr, where d/dlog(lr) = lr · d/dlr.
direction = lr * found.grad["lr"]
better = lr * torch.exp(-0.5 * direction / direction.abs().max())
print(f"\nJ of the rewritten schedule: {window(better).value:.6f}")

# The schedule as a torch.optim.lr_scheduler, in a loop of one's own.
scheduler = rhc.Schedule({"lr": better}).to_lr_scheduler(optimizer)
for batch in batches:
    optimizer.zero_grad()
    loss_fn(model, batch).backward()
    optimizer.step()
    scheduler.step()
print(f"J of an ordinary loop with it: {loss_fn(model, (x, y)).item():.6f}")

"""rhc as a trial of Optuna: what is left to search is the model, not the schedule.

Each trial finds its own learning rate and shape. Without rhc the study would have lr, warm-up and
decay as further dimensions. The trial's cost in plain runs is kept beside its value.
"""

from __future__ import annotations

import optuna
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rhc


def loss_fn(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def objective(trial: optuna.Trial) -> float:
    torch.manual_seed(0)
    x = torch.randn(640, 4)
    y = x.sum(1, keepdim=True).sin()
    width = trial.suggest_int("width", 8, 64, log=True)
    decay = trial.suggest_float("weight_decay", 1e-6, 1e-2, log=True)
    model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=decay)
    runner = rhc.Runner(
        model,
        optimizer,
        loss_fn,
        DataLoader(TensorDataset(x[:512], y[:512]), batch_size=32, shuffle=True),
        DataLoader(TensorDataset(x[512:], y[512:]), batch_size=128),
        window=20,
        start="zero",  # the lr above is not looked at
    )
    result = runner.fit(steps=100)
    trial.set_user_attr("plain_run_equivalents", result.cost["plain_run_equivalents"])
    assert result.val_loss is not None
    return result.val_loss


def main() -> optuna.Study:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=5)
    print(f"best {study.best_value:.4f} with {study.best_params}")
    return study


if __name__ == "__main__":
    main()

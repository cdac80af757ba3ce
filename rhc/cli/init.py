"""`rhc init`: writes a runner to start from."""

from __future__ import annotations

from rhc.errors import InputError
from rhc.report.live import Screen
from rhc.settings.commands import InitConfig

TEMPLATE = '''\
"""A run of your own: `rhc train {file}:{name}` trains it."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import rhc


def {name}(*, seed=0, data=None):
    """One sentence about the run. seed: already set, for the weights; data: the path of --data."""
    # Your data: here, points of a sine with noise. Keep validation and test apart from training.
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1024, 1, generator=generator) * 6 - 3
    y = torch.sin(x) + 0.1 * torch.randn(1024, 1, generator=generator)
    parts = ((0, 768), (768, 896), (896, 1024))
    train, val, test = (TensorDataset(x[a:b], y[a:b]) for a, b in parts)
    return rhc.Workload(
        # Any nn.Module; its weights are those of step 0.
        model=nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)),
        loss_fn=loss,
        train_loader=DataLoader(train, batch_size=32, shuffle=True),
        val_loader=DataLoader(val, batch_size=128),  # windows are judged by it
        test_loader=DataLoader(test, batch_size=128),  # for the final figures alone
        steps=300,
        optimizer="adam",  # or sgd, adamw
        threads=1,  # small models are slower on several
    )


def loss(model, batch):
    """The loss to differentiate, and whatever else should be recorded."""
    x, y = batch
    prediction = model(x)
    return F.mse_loss(prediction, y), {{"error": (prediction - y).abs().mean()}}
'''


def run(config: InitConfig, screen: Screen) -> int:
    path, name = config.run, config.run.stem
    if path.suffix != ".py" or not name.isidentifier():
        raise InputError(f"file must be a name of Python like my_run.py, got {path}; give another")
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(TEMPLATE.format(file=path.name, name=name))
    except FileExistsError:
        raise InputError(f"file {path} exists and is not overwritten; give another") from None
    except OSError as error:
        raise InputError(f"file {path} cannot be written ({error.strerror})") from None
    print(f"rhc train {path}:{name}")
    return 0

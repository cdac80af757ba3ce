"""A training run of a few seconds that a test kills: `python killed_run.py DIRECTORY SEED`.

It says READY when it begins to train, which verb it is at whenever that changes, and DONE.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from runs import Run, classify, clouds, network, seed_everything
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from rhc import Rewrite, Runner
from rhc.events import CheckpointSaved, VerbStarted

STEPS = 110


def make(seed: int) -> Run:
    """Shuffling, dropout, BatchNorm, and a law that soon adds gradient noise."""
    seed_everything(seed)
    model = network(dropout=0.3)
    return Run(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        classify,
        DataLoader(clouds(150), 8, shuffle=True),
        DataLoader(clouds(64, seed=1), 16, shuffle=True),
    )


def train(directory: Path, seed: int) -> None:
    """Trains to the end, and leaves final.safetensors: parameters, buffers, optimizer, RNG."""
    torch.set_num_threads(1)
    run = make(seed)

    def listener(event: Any) -> None:
        if isinstance(event, VerbStarted):
            print(event.verb, flush=True)
        elif isinstance(event, CheckpointSaved):
            print("saved", flush=True)

    runner = Runner(
        *run,
        window=12,
        stride=7,
        controls=("lr", "momentum", "noise"),
        rewrite=Rewrite(step={"lr": 1.0, "momentum": 0.1, "noise": 3.0}, damping=1e-9),
        directory=directory,
        listeners=[listener],
    )
    print("READY", flush=True)
    runner.fit(STEPS)
    tensors = {f"model.{k}": v.contiguous() for k, v in run.model.state_dict().items()}
    for index, slots in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in slots.items()}
    save_file(tensors | {"rng": torch.get_rng_state()}, directory / "final.safetensors")
    print("DONE", flush=True)


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))

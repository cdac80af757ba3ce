"""MNIST from a folder of IDX files, and the MLP that most figures are measured on."""

from __future__ import annotations

from pathlib import Path

import torch
from rhc.runners.data import read_idx, split, tensor_loader
from rhc.runners.planned import PLANNABLE
from torch import Tensor, nn
from torch.nn import functional as F

from rhc.errors import InputError
from rhc.schedulers import HeldOut
from rhc.workload import Workload

PIXEL_MEAN, PIXEL_STD = 0.1307, 0.3081  # of the 60,000 training images, scaled to [0, 1]
BATCH, EVALUATION_BATCH = 64, 500


def mnist(
    *, seed: int = 0, data: Path | None = None, width: int = 1, batch_size: int = BATCH
) -> Workload:
    """Handwritten digits of 28x28 pixels, from the IDX files in --data, and an MLP 784-128-64-10.

    With the training files in the folder: 55,000 images to train, 5,000 to validate, and the t10k
    files to test. Without them, *MNIST-10k*: the t10k files split 7,000 / 1,500 / 1,500.

    seed: the weights are drawn from the global generator, which the caller has seeded with it.
    data: the folder; files may be plain or gzip.
    width, batch_size: the hidden layers are `width` times as wide; examples per training batch.
    """
    train, validation, test = load_mnist(data)
    val_loader = tensor_loader(validation, EVALUATION_BATCH, shuffle=False)
    return Workload(
        model=nn.Sequential(
            nn.Linear(784, 128 * width),
            nn.ReLU(),
            nn.Linear(128 * width, 64 * width),
            nn.ReLU(),
            nn.Linear(64 * width, 10),
        ),
        loss_fn=cross_entropy,
        train_loader=tensor_loader(train, batch_size, shuffle=True),
        val_loader=val_loader,
        test_loader=tensor_loader(test, EVALUATION_BATCH, shuffle=False),
        steps=1000,
        optimizer="sgd",
        lr={"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3},
        threads=1,
        reward=HeldOut(cross_entropy, val_loader, metric="accuracy", trained_on=BATCH),
        plannable=PLANNABLE,
    )


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict]:
    """Mean cross-entropy of a batch in nats, and its accuracy in [0, 1]."""
    images, labels = batch
    logits = model(images)
    accuracy = (logits.argmax(1) == labels).float().mean()
    return F.cross_entropy(logits, labels), {"accuracy": accuracy}


def load_mnist(data: Path | None) -> list[tuple[Tensor, ...]]:
    """(images, labels) to train on, to validate on and to test on."""
    if data is None:
        raise InputError(
            "this runner needs MNIST's IDX files and got no folder: give --data DIR, the folder "
            "that holds t10k-images-idx3-ubyte or t10k-images-idx3-ubyte.gz"
        )
    if not data.is_dir():
        raise InputError(f"--data {data} is not a folder: give the one with MNIST's IDX files")
    test = _read_pair(data, "t10k")
    if any(data.glob("train-*-ubyte*")):
        train = _read_pair(data, "train")
        count = len(train[0])
        return [*split(train, (count - count // 12, count // 12)), test]
    count = len(test[0])
    held_out = count * 15 // 100
    return split(test, (count - 2 * held_out, held_out, held_out))


def _read_pair(folder: Path, prefix: str) -> tuple[Tensor, Tensor]:
    """Normalised images (N, 784) and labels (N,) of one pair of files, `train` or `t10k`."""
    images_path = _find(folder, f"{prefix}-images-idx3-ubyte")
    labels_path = _find(folder, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.dtype != torch.uint8 or images.shape[1:] != (28, 28):
        raise InputError(
            f"{images_path} holds {tuple(images.shape)} of {images.dtype} where MNIST has "
            "(N, 28, 28) of torch.uint8; fetch MNIST's own file"
        )
    if labels.dtype != torch.uint8 or labels.dim() != 1 or (labels > 9).any():
        raise InputError(
            f"{labels_path} holds {tuple(labels.shape)} of {labels.dtype} where MNIST has (N,) of "
            "torch.uint8, each from 0 to 9; fetch MNIST's own file"
        )
    if len(images) != len(labels):
        raise InputError(
            f"{images_path} has {len(images)} images and {labels_path.name} {len(labels)} labels; "
            "fetch both files from one place"
        )
    if len(images) < 2 * BATCH:
        raise InputError(
            f"{images_path} has {len(images)} images, too few for batches of {BATCH}; "
            "fetch MNIST's own file"
        )
    pixels = images.flatten(1).float() / 255
    return (pixels - PIXEL_MEAN) / PIXEL_STD, labels.long()


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise InputError(
        f"--data {folder} has neither {name} nor {name}.gz: give the folder with MNIST's IDX files"
    )

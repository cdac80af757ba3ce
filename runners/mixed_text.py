"""A language model on four sources of a text, of which only a small one is what it is judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rhc.runners.char_lm import CONTEXT, GPT, read_text
from rhc.runners.data import tensor_loader
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from rhc.data_weights import DataWeights, indexed
from rhc.errors import InputError
from rhc.workload import Workload

BATCH, CLEAN, OTHERS, HELD_OUT = 24, 150, 1500, 200
SOURCES = ("clean", "misspelt", "reversed", "scrambled")


def mixed_text(
    *,
    seed: int = 0,
    data: Path | None = None,
    width: int = 48,
    clean: int = CLEAN,
    others: int = OTHERS,
) -> Workload:
    """A character GPT on four sources; with --data-weights a weight for each, and its course.

    `clean` pieces of 64 characters are as they are; of each other source there are `others`: with
    30 % of the characters random, read backwards, and in random order. Held-out and test pieces are
    clean. Batches have the sources in proportion to their sizes, the same pieces for every seed.
    """
    text = read_text(data)
    alphabet = sorted(set(text))
    place = {character: i for i, character in enumerate(alphabet)}
    codes = torch.tensor([place[character] for character in text])
    pieces = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    sizes = [clean, others, others, others, HELD_OUT, HELD_OUT]
    if len(pieces) < sum(sizes):
        raise InputError(
            f"--data {data} has {len(pieces)} pieces of {CONTEXT + 1} characters, fewer than the "
            f"{sum(sizes)} of these sources; give a longer text, or --others {len(pieces) // 8}"
        )
    generator = torch.Generator().manual_seed(1000)
    order = torch.randperm(len(pieces), generator=generator)[: sum(sizes)]
    right, misspelt, backwards, scrambled, held_out, test = pieces[order].split(sizes)
    drawn = torch.rand(misspelt.shape, generator=generator) < 0.3
    random = torch.randint(len(alphabet), misspelt.shape, generator=generator)
    shuffled = torch.rand(scrambled.shape, generator=generator).argsort(1)
    sources = (
        right,
        torch.where(drawn, random, misspelt),
        backwards.flip(1),
        scrambled.gather(1, shuffled),
    )
    source = torch.arange(4).repeat_interleave(torch.tensor(sizes[:4]))
    return Workload(
        model=GPT(len(alphabet), width=width),
        loss_fn=next_characters,
        train_loader=DataLoader(
            indexed(TensorDataset(torch.cat(sources))), BATCH, shuffle=True, drop_last=True
        ),
        val_loader=tensor_loader((held_out,), BATCH, shuffle=True),
        test_loader=tensor_loader((test,), 50, shuffle=False),
        steps=600,
        optimizer="adam",
        lr={"sgd": 0.1, "adam": 3e-3, "adamw": 3e-3},
        threads=1,
        data_weights=DataWeights(SOURCES, lambda batch: source[batch["index"].cpu()]),
    )


def next_characters(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of the next character in nats by piece, (B,), and its accuracy."""
    (pieces,) = batch["sample"] if isinstance(batch, dict) else batch
    logits, targets = model(pieces[:, :-1]), pieces[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)
    return losses, {"accuracy": (logits.argmax(-1) == targets).float().mean()}

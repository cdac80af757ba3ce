"""A character-level language model: a small GPT on any text file."""

from __future__ import annotations

from pathlib import Path

import torch
from rhc.runners.data import tensor_loader
from torch import Tensor, nn
from torch.nn import functional as F

from rhc.errors import InputError
from rhc.workload import Workload

CONTEXT, BATCH, EVALUATED = 64, 16, 200


def char_lm(
    *, seed: int = 0, data: Path | None = None, width: int = 1, batch_size: int = BATCH
) -> Workload:
    """A GPT of 2 layers that predicts the characters of a text, the .txt file in --data.

    The text is cut into pieces of 65 characters: the first 90 % of them to train, 5 % to validate
    and 5 % to test, of which at most 200 each are used.
    seed: the weights are drawn from the global generator, which the caller has seeded with it.
    width, batch_size: the layers are `width` times as wide; pieces per training batch.
    """
    text = read_text(data)
    alphabet = sorted(set(text))
    index = {character: i for i, character in enumerate(alphabet)}
    codes = torch.tensor([index[character] for character in text])
    pieces = codes[: len(codes) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)
    held_out = len(pieces) // 20
    if held_out == 0 or len(pieces) - 2 * held_out < BATCH:
        raise InputError(
            f"--data {data} has {len(text)} characters, too few for batches of {BATCH} pieces of "
            f"{CONTEXT + 1}; give a text of {20 * (CONTEXT + 1)} or more"
        )
    train, validation, test = pieces.split([len(pieces) - 2 * held_out, held_out, held_out])
    return Workload(
        model=GPT(len(alphabet), width=64 * width),
        loss_fn=next_character,
        train_loader=tensor_loader((train,), batch_size, shuffle=True),
        val_loader=tensor_loader((validation[:EVALUATED],), BATCH, shuffle=False),
        test_loader=tensor_loader((test[:EVALUATED],), BATCH, shuffle=False),
        steps=600,
        optimizer="adamw",
        lr={"sgd": 0.1, "adam": 3e-3, "adamw": 3e-3},
        threads=1,
    )


def next_character(model: nn.Module, batch: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean cross-entropy of the next character in nats, and its accuracy in [0, 1]."""
    (pieces,) = batch
    logits = model(pieces[:, :-1])
    targets = pieces[:, 1:]
    accuracy = (logits.argmax(-1) == targets).float().mean()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), {"accuracy": accuracy}


class GPT(nn.Module):
    """Learned positions, pre-norm blocks, an untied head. Radford et al. 2019."""

    def __init__(self, characters: int, width: int = 64, layers: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.embedding(codes) + self.position[: codes.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        q, k, v = (
            t.view(rows, length, self.heads, -1).transpose(1, 2)
            for t in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return x + self.mlp(self.norms[1](x))


def read_text(data: Path | None) -> str:
    if data is None:
        raise InputError(
            "runner char_lm needs a text and got none: give --data a .txt file, or a folder with "
            "one in it"
        )
    files = sorted(data.glob("*.txt")) if data.is_dir() else [data]
    if len(files) != 1:
        raise InputError(
            f"--data {data} has {len(files) or 'no'} .txt files: give the one to train on"
        )
    try:
        return files[0].read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{files[0]} cannot be read ({error.strerror}); check the file") from None
    except UnicodeDecodeError:
        raise InputError(f"{files[0]} is not UTF-8 text: give a .txt file in UTF-8") from None

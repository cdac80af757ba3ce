"""Models to measure on, each with its loss and a maker of random batches.

Plain textbook versions: what is measured is rhc, and a reader must see at a glance what it ran on.
`CASES` has them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]


class Case(NamedTuple):
    """A model to measure on: `case.loss_fn(case.model(), case.make_batch())` is its loss."""

    model: Callable[..., nn.Module]
    loss_fn: Callable[[nn.Module, Batch], Tensor]
    make_batch: Callable[..., Batch]


def gpt(
    layers: int = 3,
    width: int = 128,
    context: int = 64,
    vocabulary: int = 65,
    heads: int = 4,
    attention: str = "fused",
) -> nn.Module:
    """A GPT: pre-LayerNorm, GELU, learned positions, no dropout. Tokens (B, T) -> logits (B, T, V).

    attention: "fused" is F.scaled_dot_product_attention, most kernels of which cannot be
    differentiated twice; "math" is an explicit softmax, which can, at O(T²) memory.
    """
    if attention not in ("fused", "math"):
        raise ValueError(f"attention must be 'fused' or 'math', got {attention!r}")
    return GPT(layers, width, context, vocabulary, heads, attention)


def mlp() -> nn.Module:
    """784-128-64-10 with ReLU. Images (B, 1, 28, 28) or (B, 784) -> logits (B, 10)."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 128),
        nn.ReLU(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def cnn(batch_norm: bool = True) -> nn.Module:
    """Two convolutions with max-pooling and one linear layer. (B, 1, 28, 28) -> logits (B, 10).

    batch_norm: whether each convolution is followed by one; it brings buffers into the state.
    """
    layers: list[nn.Module] = []
    for channels_in, channels_out in ((1, 16), (16, 32)):
        layers.append(nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1))
        if batch_norm:
            layers.append(nn.BatchNorm2d(channels_out))
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 7 * 7, 10))


def lstm(width: int = 128, layers: int = 1, vocabulary: int = 65) -> nn.Module:
    """A character LSTM. Tokens (B, T) -> logits (B, T, V)."""
    return LSTM(width, layers, vocabulary)


def text_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next token, in nats."""
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def image_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the label, in nats."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def text_batch(
    batch: int = 16,
    context: int = 64,
    vocabulary: int = 65,
    generator: torch.Generator | None = None,
) -> Batch:
    """Uniform random tokens (B, T), and the same shifted by one as targets (B, T)."""
    text = torch.randint(vocabulary, (batch, context + 1), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def image_batch(batch: int = 64, generator: torch.Generator | None = None) -> Batch:
    """Standard normal images (B, 1, 28, 28) and uniform random labels (B,)."""
    images = torch.randn(batch, 1, 28, 28, generator=generator)
    return images, torch.randint(10, (batch,), generator=generator)


class GPT(nn.Module):
    def __init__(
        self, layers: int, width: int, context: int, vocabulary: int, heads: int, attention: str
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads, attention) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        # GPT-2: N(0, 0.02²), and 1/√(2·layers) of that where a block adds to the residual stream.
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("out.weight", "mlp.2.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * layers) ** 0.5 if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.token(tokens) + self.position(positions))))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, attention: str) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, attention)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, attention: str) -> None:
        super().__init__()
        self.heads = heads
        self.attend = fused_attention if attention == "fused" else math_attention
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # (B, T, 3W) -> three of (B, heads, T, W / heads)
        query, key, value = (
            self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        return self.out(self.attend(query, key, value).transpose(1, 2).flatten(2))


def fused_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, (B, heads, T, C) each, by whichever kernel torch picks."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def math_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention, (B, heads, T, C) each: softmax(q·kᵀ/√C)·v, differentiable twice."""
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(-1) @ value


class LSTM(nn.Module):
    def __init__(self, width: int, layers: int, vocabulary: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.token(tokens))
        return self.head(hidden)


CASES = {
    "gpt": Case(gpt, text_loss, text_batch),
    "mlp": Case(mlp, image_loss, image_batch),
    "cnn": Case(cnn, image_loss, image_batch),
    "lstm": Case(lstm, text_loss, text_batch),
}

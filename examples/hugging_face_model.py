"""A Hugging Face model under rhc: its own loss, a batch that is a dict, hypergradients through it.

The model is made from a configuration, with random weights: nothing is downloaded. Its attention is
asked for as "eager", so that it can be differentiated twice; with another, rhc takes differences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import rhc


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def main() -> rhc.RunResult:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = GPT2Config(
        vocab_size=32, n_positions=16, n_embd=32, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    counting: list[Any] = []
    for start in torch.randint(32, (256,)).tolist():
        ids = (start + torch.arange(16)) % 32  # to be learned: what comes after n is n + 1
        counting.append({"input_ids": ids, "labels": ids})
    train, val = DataLoader(counting[:192], 16, shuffle=True), DataLoader(counting[192:], 16)
    h = rhc.hypergradient(model, optimizer, loss_fn, list(train)[:4], controls={"lr": 1e-3})
    print(f"dJ/dlr {h.grad['lr'].tolist()}, by {h.product} products, {h.result.name}")
    result = rhc.Runner(model, optimizer, loss_fn, train, val, window=20).fit(steps=60)
    print(f"validation loss {result.val_loss:.4f}, cost {result.cost['plain_run_equivalents']:.2f}")
    return result


if __name__ == "__main__":
    main()

"""Kernels with a cheap second derivative, in place of torch's while an hvp is taken.

torch decomposes convolution, normalisation and recurrent layers, cannot differentiate fused
attention twice, and computes the value of g, though only its vjp is read: of the 9 matrix products
of a linear layer, one is spared. Derivatives of any order are correct. Measured in docs/log.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import _VF

from rhc.hypergradient.kernels import layers, matrices, normalisation, recurrent
from rhc.hypergradient.kernels.common import Sweep, functions_allowed, valueless_gradients
from rhc.hypergradient.kernels.normalisation import moved_statistics

__all__ = [
    "LEAST_VALUED",
    "LEAST_VALUELESS",
    "REPLACED",
    "Sweep",
    "functions_allowed",
    "light_first_order",
    "light_second_order",
    "moved_statistics",
    "valueless_gradients",
]

LEAST_FIRST_ORDER = 2**23
"""Multiplications of a linear layer from which its first derivative is faster here."""

LEAST_VALUELESS = 2**21
LEAST_VALUED = 2**24
"""Multiplications of a linear layer from which its kernel here is faster than torch's, without and
with the gradients' values. A custom Function takes 40 µs more than a C++ node: a kept graph of the
MLP 784-128-64-10 took 1.49 gradients without this limit, 1.06 with it."""

REPLACED: list[tuple[Any, str, Callable[..., Any]]] = [
    (F, "linear", layers.linear),
    (F, "gelu", layers.gelu),
    (F, "layer_norm", normalisation.layer_norm),
    (F, "batch_norm", normalisation.batch_norm),
    (F, "scaled_dot_product_attention", layers.scaled_dot_product_attention),
    (F, "conv1d", layers.convolution(1, F.conv1d)),
    (F, "conv2d", layers.convolution(2, F.conv2d)),
    (F, "conv3d", layers.convolution(3, F.conv3d)),
    # called by nn.LSTM, nn.GRU and nn.RNN
    (_VF, "lstm", recurrent.lstm),
    (_VF, "gru", recurrent.gru),
    (_VF, "rnn_tanh", recurrent.rnn_tanh),
    (_VF, "rnn_relu", recurrent.rnn_relu),
]
"""(where a function is looked up, its name, its replacement)."""


@contextmanager
def light_first_order() -> Iterator[None]:
    """Linear layers whose gradient is faster than torch's; for gradients outside the roll, whose
    rounding differs anyway."""
    if matrices.off() or not matrices.onednn_is_faster():
        yield
        return
    with _in_place_of([(F, "linear", layers.linear)], LEAST_FIRST_ORDER):
        yield


@contextmanager
def light_second_order(least: int = 0) -> Iterator[None]:
    """This package's functions in place of torch's; linear layers of fewer than `least`
    multiplications stay torch's own."""
    with _in_place_of(REPLACED, least):
        yield


@contextmanager
def _in_place_of(
    replaced: Sequence[tuple[Any, str, Callable[..., Any]]], least: int
) -> Iterator[None]:
    before = [getattr(owner, name) for owner, name, _ in replaced]
    least, Sweep.least = Sweep.least, least
    for owner, name, function in replaced:
        setattr(owner, name, function)
    try:
        yield
    finally:
        Sweep.least = least
        for (owner, name, _), function in zip(replaced, before, strict=True):
            setattr(owner, name, function)

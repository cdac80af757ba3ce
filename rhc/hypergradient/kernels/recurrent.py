"""nn.LSTM, nn.GRU and nn.RNN over whole sequences: a node per layer, direction and order.

torch makes a dozen nodes a position, and ten times as many for the second derivative. The pullback
of a sequence is a linear recurrence backwards, its own pullback one forwards. Forward states and
gates are outputs, so that autograd differentiates their functions, the "slopes", and derivatives of
every order follow. T: positions of the sequence, B: rows of the batch, H: width of the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import _VF, Tensor

from rhc.hypergradient.kernels import gru as gru_cell
from rhc.hypergradient.kernels import lstm as lstm_cell
from rhc.hypergradient.kernels import rnn as rnn_cell
from rhc.hypergradient.kernels.cells import Weights
from rhc.hypergradient.kernels.common import plain

_lstm, _gru, _rnn_tanh, _rnn_relu = _VF.lstm, _VF.gru, _VF.rnn_tanh, _VF.rnn_relu


def lstm(*arguments: Any) -> tuple[Tensor, ...]:
    return _called(_lstm, lstm_cell.sequence, arguments, hidden=2)


def gru(*arguments: Any) -> tuple[Tensor, ...]:
    return _called(_gru, gru_cell.sequence, arguments)


def rnn_tanh(*arguments: Any) -> tuple[Tensor, ...]:
    return _called(_rnn_tanh, partial(rnn_cell.sequence, relu=False), arguments)


def rnn_relu(*arguments: Any) -> tuple[Tensor, ...]:
    # Nothing bounds the states at padded positions.
    return _called(_rnn_relu, partial(rnn_cell.sequence, relu=True), arguments, packed=False)


# Layers and directions ---------------------------------------------------------------------------

OfSequence = Callable[[Tensor, list[Tensor], Weights], list[Tensor]]
"""(input (T, B, ·), first states (B, H), weights) -> states (T + 1, B, H) of one layer in one
direction, the output's first."""


def _called(
    native: Callable[..., tuple[Tensor, ...]],
    sequence: OfSequence,
    arguments: Sequence[Any],
    *,
    hidden: int = 1,
    packed: bool = True,
) -> tuple[Tensor, ...]:
    """(output, last states), by `native` where the kernels here cannot take the call. hidden:
    number of states of a cell. packed: whether packed sequences are supported."""
    found = _ours(arguments, hidden, packed)
    return native(*arguments) if found is None else _layers(sequence, found)


class _Packing:
    """Index maps of a padded packed sequence, in both directions. batch_sizes: (T,), the rows that
    have so many positions, longest sequences first."""

    def __init__(self, batch_sizes: Tensor, device: torch.device) -> None:
        counts = batch_sizes.to(torch.long)
        places = torch.arange(len(counts)).unsqueeze(1)
        rows = torch.arange(int(counts[0])).unsqueeze(0)
        there = rows < counts.unsqueeze(1)
        lengths = there.sum(0)
        first = counts.cumsum(0) - counts
        row = torch.where(there, first.unsqueeze(1) + rows, 0)
        mirrored = (lengths - 1 - places).clamp_min(0)
        padded = places * there.shape[1] + rows
        self.rows = tuple(t.to(device) for t in (row, row.gather(0, mirrored)))
        """(T, B) per direction: index into the packed input, arbitrary where the sequence has
        ended."""
        self.back = tuple(t[there].to(device) for t in (padded, padded.gather(0, mirrored)))
        """(packed rows,) per direction: index into the padded output."""
        self.ends = lengths.to(device), torch.arange(there.shape[1], device=device)
        """Index into states (T + 1, B, H) of every sequence's end."""

    def padded(self, x: Tensor, direction: int) -> Tensor:
        return x[self.rows[direction]]

    def packed(self, y: Tensor, direction: int) -> Tensor:
        return y.flatten(0, 1)[self.back[direction]]


class _Call(NamedTuple):
    """Arguments of a recurrent layer."""

    x: Tensor  # (T, B, ·), or (packed rows, ·)
    states: list[Tensor]
    cells: list[Weights]  # weights per layer and direction
    layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    packing: _Packing | None


def _ours(arguments: Sequence[Any], hidden: int, packable: bool) -> _Call | None:
    """The parsed call; None for what the kernels here cannot take (projected states, autocast)."""
    if len(arguments) != 9:
        return None
    packed = isinstance(arguments[1], Tensor) and arguments[1].dtype == torch.int64
    x, rest = arguments[0], list(arguments[1:])
    if packed:  # (data, batch sizes, …), without batch_first
        rest = [*rest[1:], False]
    states, weights, has_bias, layers, dropout, training, bidirectional, batch_first = rest
    states = [states] if isinstance(states, Tensor) else list(states)
    per_cell = 4 if has_bias else 2
    count = layers * (2 if bidirectional else 1)
    if (
        (packed and not packable)
        or len(states) != hidden
        or len(weights) != per_cell * count
        or x.dim() != (2 if packed else 3)
        or not x.numel()
    ):
        return None
    tensors = [x, *states, *weights]
    if not plain(*tensors) or not any(t.requires_grad for t in tensors):
        return None
    cells = [weights[n * per_cell : (n + 1) * per_cell] for n in range(count)]
    packing = _Packing(arguments[1], x.device) if packed else None
    return _Call(x, states, cells, layers, dropout, training, bidirectional, batch_first, packing)


def _layers(sequence: OfSequence, call: _Call) -> tuple[Tensor, ...]:
    x = call.x.transpose(0, 1) if call.batch_first else call.x
    packing = call.packing
    directions = 2 if call.bidirectional else 1
    last = []
    for layer in range(call.layers):
        outputs = []
        for direction in range(directions):
            n = layer * directions + direction
            if packing is not None:
                given = packing.padded(x, direction)
            else:
                given = x.flip(0) if direction else x.contiguous()
            states = sequence(given, [s[n] for s in call.states], call.cells[n])
            y = states[0][1:]
            if packing is not None:
                outputs.append(packing.packed(y, direction))
                last.append([s[packing.ends] for s in states])
            else:
                outputs.append(y.flip(0) if direction else y)
                last.append([s[-1] for s in states])
        x = torch.cat(outputs, -1) if call.bidirectional else outputs[0]
        if call.dropout and call.training and layer < call.layers - 1:
            x = F.dropout(x, call.dropout)
    return (
        x.transpose(0, 1) if call.batch_first else x,
        *(torch.stack(ends) for ends in zip(*last, strict=True)),
    )

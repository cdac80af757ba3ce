"""The kernels for second derivatives are torch's functions, at every order and anywhere."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from problems import relative_error
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import rhc
from rhc.hypergradient.evaluation import visible_statistics
from rhc.hypergradient.kernels import (
    REPLACED,
    light_second_order,
    moved_statistics,
    valueless_gradients,
)


class Case(NamedTuple):
    """function(*tensors): a call of torch's functions, of tensors of these shapes.

    replaced: whether one of our kernels is to take it, or torch's own.
    """

    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    replaced: bool = True


def convolution(name: str, *shapes: tuple[int, ...], replaced: bool = True, **options: Any) -> Case:
    return Case(lambda *t: getattr(F, name)(*t, **options), shapes, replaced)


def attention(*shapes: tuple[int, ...], replaced: bool = True, **options: Any) -> Case:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)

    return Case(function, shapes, replaced)


def batch_norm(*shapes: tuple[int, ...], eps: float = 1e-5) -> Case:
    """Of input, and of weight and bias if there are any."""

    def function(x: Tensor, *affine: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, *affine, training=True, eps=eps)

    return Case(function, shapes)


def recurrent(
    kind: type[nn.RNNBase],
    *,
    packed: tuple[int, ...] = (),
    replaced: bool = True,
    sizes: tuple[int, int, int, int] = (3, 2, 2, 2),
    **options: Any,
) -> Case:
    """Of input, first states and weights; all outputs in one. sizes: T, B, input, state.

    packed: how many rows have each position, () for all.
    """
    positions, rows, width, state = sizes
    module = kind(width, state, **options)
    cells = module.num_layers * (2 if module.bidirectional else 1)
    states = [(cells, rows, module.proj_size or state)]
    if kind is nn.LSTM:
        states.append((cells, rows, state))
    first = (rows, positions, width) if module.batch_first else (positions, rows, width)
    if packed:
        first = (sum(packed), width)  # type: ignore[assignment]
    names = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu"}
    shapes = [first, *states, *(tuple(p.shape) for p in module.parameters())]

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        hidden, weights = tensors[: len(states)], list(tensors[len(states) :])
        hx: Any = hidden if kind is nn.LSTM else hidden[0]
        torch.manual_seed(0)  # for dropout
        settings = (module.bias, module.num_layers, module.dropout, True, module.bidirectional)
        called = getattr(torch._VF, names[module.mode])
        if packed:
            found = called(x, torch.tensor(packed), hx, weights, *settings)
        else:
            found = called(x, hx, weights, *settings, module.batch_first)
        return torch.cat([t.flatten() for t in found])

    return Case(function, tuple(shapes), replaced)


MASK = torch.tensor([[True, False, True], [True, True, False]])

CASES: dict[str, Case] = {
    "linear 1-d": Case(lambda *t: F.linear(*t), ((3,), (2, 3), (2,))),
    "linear 2-d": Case(lambda *t: F.linear(*t), ((4, 3), (2, 3), (2,))),
    "linear 3-d": Case(lambda *t: F.linear(*t), ((2, 2, 3), (2, 3), (2,))),
    "linear 4-d": Case(lambda *t: F.linear(*t), ((2, 1, 2, 3), (2, 3), (2,))),
    "linear, no bias": Case(lambda *t: F.linear(*t), ((4, 3), (2, 3))),
    "linear 1-d, no bias": Case(lambda *t: F.linear(*t), ((3,), (2, 3))),
    "linear 3-d, no bias": Case(lambda *t: F.linear(*t), ((2, 2, 3), (2, 3))),
    "linear, weight 1-d": Case(lambda *t: F.linear(*t), ((4, 3), (3,)), replaced=False),
    "linear, transposed": Case(
        lambda x, w, b: F.linear(x.transpose(0, 1), w.t(), b), ((3, 4, 2), (2, 3), (3,))
    ),
    "linear, expanded": Case(
        lambda x, w, b: F.linear(x.expand(4, 3), w.expand(2, 3), b.expand(2)),
        ((1, 3), (1, 3), (1,)),
    ),
    "linear, empty batch": Case(lambda *t: F.linear(*t), ((0, 3), (2, 3), (2,))),
    "linear 3-d, empty batch": Case(lambda *t: F.linear(*t), ((0, 2, 3), (2, 3), (2,))),
    "linear, expanded output": Case(
        lambda *t: F.linear(*t).sum((0, 1)).expand(3, 2), ((2, 2, 3), (2, 3), (2,))
    ),
    "linear, one weight twice": Case(
        lambda x, w, b: F.linear(torch.tanh(F.linear(x, w, b)), w, b), ((4, 3), (3, 3), (3,))
    ),
    "linear of two activations": Case(
        lambda x, w: F.linear(torch.tanh(x @ w), torch.sin(x @ w)), ((3, 3), (3, 2))
    ),
    "conv1d": convolution("conv1d", (2, 2, 5), (3, 2, 3), (3,)),
    "conv1d, stride, padding, dilation": convolution(
        "conv1d", (1, 2, 7), (2, 2, 2), (2,), stride=2, padding=1, dilation=2
    ),
    "conv1d, unbatched": convolution("conv1d", (2, 5), (3, 2, 3), (3,), replaced=False),
    "conv2d": convolution("conv2d", (2, 2, 4, 3), (2, 2, 2, 2), (2,)),
    "conv2d, no bias": convolution("conv2d", (1, 2, 4, 3), (2, 2, 3, 2), padding=(1, 0)),
    "conv2d, stride": convolution("conv2d", (1, 1, 5, 4), (2, 1, 2, 2), (2,), stride=(2, 3)),
    "conv2d, dilation": convolution("conv2d", (1, 1, 5, 4), (2, 1, 2, 2), (2,), dilation=(2, 1)),
    "conv2d, groups": convolution("conv2d", (2, 4, 3, 3), (6, 2, 2, 2), (6,), groups=2),
    "conv2d, depthwise": convolution(
        "conv2d", (1, 3, 4, 4), (3, 1, 3, 3), (3,), groups=3, padding=1
    ),
    "conv2d, same": convolution(
        "conv2d", (1, 1, 3, 3), (1, 1, 2, 2), (1,), padding="same", replaced=False
    ),
    "conv2d, unbatched": convolution("conv2d", (1, 3, 3), (2, 1, 2, 2), (2,), replaced=False),
    "conv2d, empty batch": convolution("conv2d", (0, 1, 3, 3), (2, 1, 2, 2), (2,)),
    "conv2d, transposed": Case(
        lambda x, w, b: F.conv2d(x.permute(0, 3, 1, 2), w.transpose(2, 3), b),
        ((1, 4, 3, 2), (2, 2, 2, 3), (2,)),
    ),
    "conv2d, expanded": Case(
        lambda x, w, b: F.conv2d(x.expand(2, 2, 3, 3), w, b), ((1, 1, 3, 3), (2, 2, 2, 2), (2,))
    ),
    "conv2d, one weight twice": Case(
        lambda x, w, b: F.conv2d(F.conv2d(x, w, b, padding=1).sin(), w, b),
        ((1, 2, 3, 3), (2, 2, 3, 3), (2,)),
    ),
    "conv3d": convolution("conv3d", (1, 1, 3, 3, 2), (2, 1, 2, 2, 1), (2,), padding=(1, 0, 0)),
    "gelu": Case(lambda x: F.gelu(x), ((3, 4),)),
    "gelu, tanh": Case(lambda x: F.gelu(x, approximate="tanh"), ((3, 4),), replaced=False),
    "gelu of a scalar": Case(lambda x: F.gelu(x), ((),)),
    "gelu, expanded": Case(lambda x: F.gelu(x.expand(3, 4)), ((1, 4),)),
    "layer_norm": Case(lambda *t: F.layer_norm(t[0], (5,), *t[1:]), ((3, 5), (5,), (5,))),
    "layer_norm 4-d": Case(lambda *t: F.layer_norm(t[0], (4,), *t[1:]), ((2, 1, 3, 4), (4,), (4,))),
    "layer_norm, no bias": Case(lambda x, w: F.layer_norm(x, (5,), w), ((2, 3, 5), (5,))),
    "layer_norm, no affine": Case(lambda x: F.layer_norm(x, (5,)), ((2, 3, 5),)),
    "layer_norm, no weight": Case(lambda x, b: F.layer_norm(x, (5,), None, b), ((2, 3, 5), (5,))),
    "layer_norm, two dimensions": Case(
        lambda x, w, b: F.layer_norm(x, (2, 3), w, b), ((2, 2, 3), (2, 3), (2, 3)), replaced=False
    ),
    "layer_norm, large eps": Case(
        lambda x, w, b: F.layer_norm(x, (5,), w, b, 0.3), ((3, 5), (5,), (5,))
    ),
    "layer_norm, transposed": Case(
        lambda x, w, b: F.layer_norm(x.transpose(1, 2), (5,), w, b), ((2, 5, 3), (5,), (5,))
    ),
    "layer_norm, expanded": Case(
        lambda x, w, b: F.layer_norm(x.expand(2, 3, 5), (5,), w.expand(5), b.expand(5)),
        ((3, 5), (1,), (1,)),
    ),
    "layer_norm, empty batch": Case(
        lambda x, w, b: F.layer_norm(x, (5,), w, b), ((0, 5), (5,), (5,))
    ),
    "batch_norm": batch_norm((4, 3, 2, 2), (3,), (3,)),
    "batch_norm 2-d": batch_norm((4, 3), (3,), (3,)),
    "batch_norm 3-d": batch_norm((2, 3, 4), (3,), (3,)),
    "batch_norm 5-d": batch_norm((2, 2, 2, 1, 2), (2,), (2,)),
    "batch_norm, no affine": batch_norm((4, 3, 2, 2)),
    "batch_norm, no bias": batch_norm((4, 3, 2), (3,)),
    "batch_norm, one row": batch_norm((1, 3, 4), (3,), (3,)),
    "batch_norm, large eps": batch_norm((4, 3, 2), (3,), (3,), eps=0.3),
    "batch_norm, transposed": Case(
        lambda x, w, b: F.batch_norm(x.permute(0, 3, 1, 2), None, None, w, b, training=True),
        ((2, 2, 3, 2), (2,), (2,)),
    ),
    "batch_norm, expanded": Case(
        lambda x, w, b: F.batch_norm(x.expand(3, 2, 4), None, None, w, b, training=True),
        ((3, 2, 1), (2,), (2,)),
    ),
    "batch_norm, in evaluation": Case(
        lambda x, w, b: F.batch_norm(x, x.new_ones(3), x.new_ones(3), w, b),
        ((4, 3, 2), (3,), (3,)),
        replaced=False,
    ),
    "attention": attention((2, 1, 3, 2), (2, 1, 3, 2), (2, 1, 3, 2)),
    "attention, causal": attention((1, 2, 3, 2), (1, 2, 3, 2), (1, 2, 3, 2), is_causal=True),
    "attention 3-d, scale": attention((2, 3, 2), (2, 3, 2), (2, 3, 2), scale=0.3),
    "attention 2-d": attention((3, 2), (3, 2), (3, 2), replaced=False),
    "attention, other lengths": attention((1, 1, 2, 3), (1, 1, 4, 3), (1, 1, 4, 2)),
    "attention, causal, more keys": attention(
        (1, 1, 2, 3), (1, 1, 4, 3), (1, 1, 4, 2), is_causal=True
    ),
    "attention, causal, more queries": attention(
        (1, 1, 4, 3), (1, 1, 2, 3), (1, 1, 2, 2), is_causal=True
    ),
    "attention, masked": attention(
        (1, 1, 2, 2), (1, 1, 3, 2), (1, 1, 3, 2), attn_mask=MASK, replaced=False
    ),
    "attention, added mask": attention(
        (1, 1, 2, 2), (1, 1, 3, 2), (1, 1, 3, 2), attn_mask=0.3 * MASK.double(), replaced=False
    ),
    "attention, grouped": attention(
        (1, 4, 2, 2), (1, 2, 3, 2), (1, 2, 3, 2), enable_gqa=True, replaced=False
    ),
    "attention, heads broadcast": attention(
        (1, 2, 2, 2), (1, 1, 3, 2), (1, 1, 3, 2), replaced=False
    ),
    "attention, batch broadcast": attention((2, 2, 2), (1, 3, 2), (1, 3, 2), replaced=False),
    "attention, empty batch": attention((0, 1, 3, 2), (0, 1, 3, 2), (0, 1, 3, 2)),
    "attention, transposed": Case(
        lambda q, k, v: F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True
        ),
        ((1, 3, 2, 2),) * 3,
    ),
    "attention, one tensor": Case(
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), ((1, 1, 3, 2),)
    ),
    "LSTM": recurrent(nn.LSTM),
    "LSTM, one position": recurrent(nn.LSTM, sizes=(1, 2, 1, 2)),
    "LSTM, no bias": recurrent(nn.LSTM, bias=False, sizes=(3, 1, 3, 2)),
    "LSTM, batch first": recurrent(nn.LSTM, batch_first=True, sizes=(2, 3, 1, 2)),
    "LSTM, two layers both ways, dropout": recurrent(
        nn.LSTM, num_layers=2, bidirectional=True, dropout=0.4, sizes=(3, 2, 1, 2)
    ),
    "LSTM, projected": recurrent(nn.LSTM, proj_size=1, sizes=(2, 1, 1, 2), replaced=False),
    "LSTM, packed": recurrent(nn.LSTM, packed=(2, 2, 1), sizes=(3, 2, 1, 2)),
    "LSTM, packed, two layers both ways, dropout": recurrent(
        nn.LSTM,
        packed=(3, 1),
        num_layers=2,
        bidirectional=True,
        dropout=0.4,
        sizes=(2, 3, 1, 2),
    ),
    "LSTM, empty batch": recurrent(nn.LSTM, sizes=(2, 0, 2, 2), replaced=False),
    "GRU": recurrent(nn.GRU),
    "GRU, one position": recurrent(nn.GRU, sizes=(1, 2, 1, 2)),
    "GRU, no bias": recurrent(nn.GRU, bias=False, sizes=(3, 1, 3, 2)),
    "GRU, batch first": recurrent(nn.GRU, batch_first=True, sizes=(2, 3, 1, 2)),
    "GRU, two layers both ways, dropout": recurrent(
        nn.GRU, num_layers=2, bidirectional=True, dropout=0.4, sizes=(3, 2, 1, 2)
    ),
    "GRU, packed": recurrent(nn.GRU, packed=(3, 2, 2), bidirectional=True, sizes=(3, 3, 1, 2)),
    "RNN": recurrent(nn.RNN),
    "RNN, one position": recurrent(nn.RNN, sizes=(1, 2, 1, 2)),
    "RNN, no bias": recurrent(nn.RNN, bias=False, batch_first=True, sizes=(3, 1, 3, 2)),
    "RNN, two layers both ways, dropout": recurrent(
        nn.RNN, num_layers=2, bidirectional=True, dropout=0.4
    ),
    "RNN, packed": recurrent(nn.RNN, packed=(2, 2, 1), sizes=(3, 2, 1, 2)),
    "RNN, relu": recurrent(nn.RNN, nonlinearity="relu"),
    "RNN, relu, packed": recurrent(
        nn.RNN, nonlinearity="relu", packed=(2, 2, 1), sizes=(3, 2, 1, 2), replaced=False
    ),
}


def tensors(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    made = [torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in case.shapes]
    return [t.requires_grad_() for t in made]


@contextmanager
def torchs_own() -> Iterator[None]:
    """torch's functions, with an attention that can be differentiated twice."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


def ours() -> Any:
    return light_second_order()


def subsets(count: int) -> Iterator[list[bool]]:
    """Every choice of inputs that require a gradient but the empty one.

    Of more than five inputs: one, all but one, all.
    """
    if count > 5:
        for one in range(count):
            yield [i == one for i in range(count)]
            yield [i != one for i in range(count)]
        yield [True] * count
        return
    for bits in range(1, 2**count):
        yield [bool(bits >> i & 1) for i in range(count)]


def chosen(case: Case, wanted: list[bool], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    found = tensors(case, dtype)
    return [t.requires_grad_(w) for t, w in zip(found, wanted, strict=True)]


# Derivatives --------------------------------------------------------------------------------------


BIAS_ALONE = "torch 2.13's own second derivative fails where there is a bias and no weight"


SLOW = [name for name in CASES if "two layers both ways" in name]
"""Differences take seconds here; against torch's own derivatives they are always tested."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in CASES]
)
def test_first_and_second_derivatives_are_those_of_differences(name: str) -> None:
    case = CASES[name]
    with torchs_own(), ours():
        assert gradcheck(case.function, tensors(case))
        assert gradgradcheck(case.function, tensors(case))


@pytest.mark.parametrize("name", CASES)
def test_whatever_inputs_require_a_gradient(name: str) -> None:
    """Derivatives up to the second, against torch's own."""
    if name == "layer_norm, no weight":
        pytest.skip(BIAS_ALONE)
    case = CASES[name]
    for wanted in subsets(len(case.shapes)):
        expected = derivatives(case, chosen(case, wanted), torchs_own())
        found = derivatives(case, chosen(case, wanted), ours())
        assert_close(found, expected, 1e-12)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_as_exact_as_torchs_own(name: str) -> None:
    """1e-5: a few dozen roundings of 6e-8, in another order."""
    if name == "layer_norm, no weight":
        pytest.skip(BIAS_ALONE)
    case = CASES[name]
    if name == "attention, added mask":
        pytest.skip("the mask is of float64")
    wanted = [True] * len(case.shapes)
    expected = derivatives(case, chosen(case, wanted, torch.float32), torchs_own())
    found = derivatives(case, chosen(case, wanted, torch.float32), ours())
    assert all(t.dtype == torch.float32 for t in found if t is not None)
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_third_derivatives(name: str) -> None:
    """The Hessian product of a loss with a gradient penalty."""
    if name == "layer_norm, two dimensions":
        pytest.skip("torch 2.13's own, whose third derivative takes mean and deviation as constant")
    case = CASES[name]

    def product(kernels: Any) -> list[Tensor | None]:
        inputs = tensors(case)
        with kernels, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            y = case.function(*inputs).sin().sum()
            penalty = torch.autograd.grad(y, inputs, create_graph=True)
            loss = y + sum(g.square().sum() for g in penalty)
            return products(loss, inputs)

    found = product(ours())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "layer_norm", composed_layer_norm)
        patch.setattr(F, "batch_norm", composed_batch_norm)
        assert_close(found, product(nullcontext()), 1e-10)


def composed_layer_norm(
    x: Tensor, shape: Any, w: Tensor | None = None, b: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Of elementary operations."""
    dims = list(range(-len(shape), 0))
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    y = (x - mean) * (variance + eps).rsqrt()
    y = y if w is None else y * w
    return y if b is None else y + b


def composed_batch_norm(
    x: Tensor, *running: Tensor | None, training: bool = False, eps: float = 1e-5, **_: Any
) -> Tensor:
    """Of elementary operations. running: mean and variance, weight and bias."""
    if not training:
        return own_batch_norm(x, *running)
    dims = [0, *range(2, x.dim())]
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    y = (x - mean) * (variance + eps).rsqrt()
    for t, change in zip(running[2:], (torch.mul, torch.add), strict=False):
        y = y if t is None else change(y, t.view(1, -1, *[1] * (x.dim() - 2)))
    return y


own_batch_norm = F.batch_norm


def derivatives(case: Case, inputs: list[Tensor], kernels: Any) -> list[Tensor | None]:
    """Value, gradients, and products of the second derivative, of sin f."""
    with kernels, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        y = case.function(*inputs)
        plain = torch.autograd.grad(y.sin().sum(), needing(inputs), retain_graph=True)
        return [y, *plain, *products(y.sin().sum(), needing(inputs))]


def products(loss: Tensor, inputs: list[Tensor], *, valueless: bool = False) -> list[Tensor | None]:
    with valueless_gradients(valueless):
        grads = torch.autograd.grad(loss, inputs, create_graph=True)
    draw = torch.Generator().manual_seed(3)
    seeds = [torch.randn(g.shape, generator=draw, dtype=torch.float64).to(g) for g in grads]
    pairs = [(g, s) for g, s in zip(grads, seeds, strict=True) if g.requires_grad]
    found = torch.autograd.grad(
        [g for g, _ in pairs], inputs, [s for _, s in pairs], allow_unused=True
    )
    return list(found) if valueless else [*grads, *found]


def needing(inputs: list[Tensor]) -> list[Tensor]:
    return [t for t in inputs if t.requires_grad]


def assert_close(
    found: list[Tensor | None], expected: list[Tensor | None], tolerance: float
) -> None:
    """None stands for zero."""
    for f, e in zip(found, expected, strict=True):
        for t, other in ((f, e), (e, f)):
            if t is None:
                assert other is None or not other.any()
        if f is None or e is None:
            continue
        assert f.shape == e.shape and f.dtype == e.dtype
        assert f.isfinite().all() == e.isfinite().all()
        difference = torch.linalg.vector_norm((f - e).double())
        assert difference <= tolerance * (1 + torch.linalg.vector_norm(e.double()))


# Gradients without a value ------------------------------------------------------------------------

LEAVES = {
    "linear": ("linear 3-d", 1),
    "linear, one weight twice": ("linear, one weight twice", 1),
    "conv2d": ("conv2d, groups", 1),
    "LSTM, of the input": ("LSTM", 3),
    "LSTM, of the state": ("LSTM", 4),
    "LSTM, a bias": ("LSTM", 6),
    "GRU, of the state": ("GRU", 3),
    "GRU, a bias": ("GRU", 5),
    "RNN, of the state": ("RNN", 3),
}


@pytest.mark.parametrize("name", CASES)
def test_products_are_right_without_the_gradients_values(name: str) -> None:
    case = CASES[name]
    loss = {}
    for valueless in (False, True):
        inputs = tensors(case)
        with torchs_own(), ours():
            y = case.function(*inputs).sin().sum()
            loss[valueless] = products(y, inputs, valueless=valueless)
    assert_close(loss[True], loss[False][-len(loss[True]) :], 1e-12)


@pytest.mark.parametrize("name", LEAVES)
def test_weights_gradients_then_read_zero(name: str) -> None:
    """Otherwise the test above would compare a thing with itself."""
    case = CASES[LEAVES[name][0]]
    inputs = tensors(case)
    with ours():
        y = case.function(*inputs).sin().sum()
        with valueless_gradients():
            found = torch.autograd.grad(y, inputs, create_graph=True, retain_graph=True)
        again = torch.autograd.grad(y, inputs, create_graph=True)
    assert not found[LEAVES[name][1]].any()
    assert again[LEAVES[name][1]].any()


class Reparametrized(nn.Module):
    """Weights that are functions of the parameters, in ways that are not linear."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.first = nn.Linear(4, 6)
        self.second = nn.Conv1d(1, 2, 3)
        if kind == "weight norm":
            for layer in (self.first, self.second):
                nn.utils.parametrizations.weight_norm(layer)
        if kind == "spectral norm":
            nn.utils.parametrizations.spectral_norm(self.first)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "exponentials":
            h = F.linear(x, self.first.weight.exp(), self.first.bias.square())
            return F.conv1d(torch.tanh(h).unsqueeze(1), self.second.weight.exp(), self.second.bias)
        h = torch.tanh(self.first(x))
        if self.kind == "activations":
            h = F.linear(h, h)
        return self.second(h.unsqueeze(1))


@pytest.mark.parametrize("kind", ["plain", "weight norm", "exponentials", "activations"])
def test_hypergradients_where_weights_are_functions_of_parameters(kind: str) -> None:
    """The chain rule goes on beyond the weight, and then reads the value of its gradient."""
    model = Reparametrized(kind)
    draw = torch.Generator().manual_seed(1)
    batches = list(torch.randn(6, 6, 4, generator=draw, dtype=torch.float64))
    found = []
    # Kernels with gradients that have no values, with such that have; and none, of torch alone.
    ways = ({"memory_budget": 1}, {"segment": 6}, {"engine": "higher"})
    for way in ways:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8)
        found.append(
            rhc.hypergradient(
                model,
                optimizer,
                lambda m, x: m(x).square().mean(),
                batches,
                controls={"lr": 0.05, "momentum": 0.8},
                spill=False,
                **{"product": "exact", **way},
            )
        )
    again, kept, expected = found
    assert again.plan is not None and not again.plan.graphs
    for name, g in expected.grad.items():
        assert relative_error(again.grad[name], g) < 1e-10, name
        assert relative_error(kept.grad[name], g) < 1e-10, name


# Where else they are met --------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1), nn.GELU(), nn.LayerNorm(5), nn.Flatten(), nn.Linear(20, 3)
    ).double()


INPUT = torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_without_gradients_torchs_own_are_called() -> None:
    with ours(), torch.no_grad():
        y = net()(INPUT)
    assert not y.requires_grad and torch.equal(y, net()(INPUT))
    with ours(), torch.inference_mode():
        assert torch.equal(net()(INPUT.clone()), y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Its casts happen inside torch's own functions."""
    found = []
    for kernels in (nullcontext(), ours()):
        model = net().float()
        with kernels, torch.autocast("cpu", dtype):
            y = model(INPUT.float())
            loss = y.float().square().sum()
        parameters = list(model.parameters())
        found.append([y.float(), *torch.autograd.grad(loss, parameters)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_transforms_of_torch_func_inside_a_loss() -> None:
    """Gradients per row, a Jacobian-vector product and a Hessian, as without our kernels."""

    def losses(model: nn.Module) -> Tensor:
        weights = {n: p for n, p in model.named_parameters()}

        def of_row(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(model, weights, (x[None],)).square().mean()

        rows = torch.func.vmap(torch.func.grad(of_row), in_dims=(None, 0))(weights, INPUT)
        _, moved = torch.func.jvp(lambda x: of_row(weights, x), (INPUT[0],), (INPUT[1],))
        bend = torch.func.hessian(lambda x: of_row(weights, x))(INPUT[0])
        return sum(g.square().sum() for g in rows.values()) + moved + bend.square().sum()

    found = []
    for kernels in (nullcontext(), ours()):
        model = net()
        with kernels:
            found.append(products(losses(model), list(model.parameters())))
    assert_close(found[1], found[0], 1e-10)


def test_forward_mode_inside_a_loss() -> None:
    """Dual numbers are ordinary tensors to look at."""
    from torch.autograd import forward_ad

    found = []
    for kernels in (nullcontext(), ours()):
        model = net()
        with kernels, forward_ad.dual_level():
            y = model(forward_ad.make_dual(INPUT, INPUT.flip(0)))
            tangent = forward_ad.unpack_dual(y).tangent
            assert tangent is not None
            found.append(list(torch.autograd.grad(tangent.square().sum(), model[4].weight)))
    assert_close(found[1], found[0], 1e-12)


def test_tensors_of_a_kind_of_their_own() -> None:
    class Labelled(Tensor):
        pass

    with ours():
        w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        y = F.linear(torch.ones(4, 3, dtype=torch.float64).as_subclass(Labelled), w)
    assert isinstance(y, Labelled)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    found = []
    for kernels in (nullcontext(), ours()):
        model = net()
        with kernels:
            x = INPUT.clone().requires_grad_()
            y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)
            y.square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert_close(found[1], found[0], 1e-12)


def test_a_graph_can_be_gone_through_twice_and_copied_models_work() -> None:
    model = net()
    with ours():
        loss = copy.deepcopy(model)(INPUT).square().sum() + model(INPUT).square().sum()
        parameters = list(model.parameters())
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
        with_graph = torch.autograd.grad(loss, parameters, create_graph=True)
        again = torch.autograd.grad(loss, parameters)
    for a, b, c in zip(first, with_graph, again, strict=True):
        assert torch.allclose(a, b, rtol=1e-13, atol=1e-13)
        assert torch.allclose(a, c, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_nothing_that_was_given_is_written_to(name: str) -> None:
    """Some kernels work in place, on tensors of their own."""
    inputs = tensors(CASES[name])
    with torchs_own(), ours():
        y = CASES[name].function(*inputs).sin().sum()
        grads = torch.autograd.grad(y, inputs, create_graph=True)
        seeds = [torch.randn_like(g) for g in grads]
        given = [*inputs, *grads, *seeds]
        before = [t.detach().clone() for t in given]
        for retain in (True, False):
            torch.autograd.grad(grads, inputs, seeds, retain_graph=retain, allow_unused=True)
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


# Taking their place -------------------------------------------------------------------------------


def functions() -> dict[str, Any]:
    return {name: getattr(owner, name) for owner, name, _ in REPLACED}


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (2, 3, 4, 2), (2, 3, 2, 2, 3)])
def test_running_statistics_have_first_and_second_derivatives(shape: tuple[int, ...]) -> None:
    """Of the values that are handed in, which torch's layer has found."""
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mean = torch.randn(3, dtype=torch.float64, requires_grad=True)
    var = torch.rand(3, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        moved = mean.detach().clone(), var.detach().clone()
        F.batch_norm(x.detach(), *moved, None, None, True, 0.3)
        return moved_statistics(x, mean, var, moved, 0.3)

    assert gradcheck(function, (x, mean, var))
    assert gradgradcheck(function, (x, mean, var))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_visible_statistics_are_torchs_to_the_bit(momentum: float | None) -> None:
    torch.manual_seed(0)
    seen, plain = nn.BatchNorm2d(3, momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5)
        with visible_statistics(seen, update=True):
            y = seen(x)
        assert torch.equal(y, plain(x))
        for ours, theirs in zip(seen.buffers(), plain.buffers(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4), (4, 3, 2, 2)])
def test_batch_norms_move_their_running_statistics_to_the_bit(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    found = []
    for kernels in (nullcontext(), ours()):
        running = torch.zeros(3), torch.ones(3)
        with kernels:
            y = F.batch_norm(x, *running, training=True, momentum=0.3)
        found.append([y, *running])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_functions_are_put_back_also_after_exceptions_and_when_nested() -> None:
    before = functions()
    with ours():
        inside = functions()
        assert all(inside[name] is not before[name] for name in before)
        with pytest.raises(ValueError, match="on purpose"), ours(), valueless_gradients():
            raise ValueError("on purpose")
        assert functions() == inside
    assert functions() == before


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.shapes[0] != ()])
def test_what_is_replaced_is_what_was_meant(name: str) -> None:
    """A kernel of ours leaves a node of its own, or for attention a batched product, in the graph.

    Otherwise these tests would compare torch with itself."""
    case = CASES[name]
    with torchs_own(), ours():
        y = case.function(*tensors(case))
    nodes, queue = set[str](), [y.grad_fn]
    while queue:
        node = queue.pop()
        if node is not None:
            nodes.add(node.name())
            queue += [parent for parent, _ in node.next_functions]
    own = {"_Value", "_Gelu", "_Lstm", "_Gru", "_Rnn"}
    mark = any(n.removesuffix("Backward") in own for n in nodes) or "BaddbmmBackward0" in nodes
    assert mark == case.replaced, nodes


def test_another_thread_gets_right_numbers_meanwhile() -> None:
    """The functions are the process's; whoever calls them elsewhere gets the same results."""
    model = net()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(INPUT).square().sum(), parameters)
    wrong: list[float] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            found = torch.autograd.grad(model(INPUT).square().sum(), parameters)
            wrong.extend(
                e
                for f, x in zip(found, expected, strict=True)
                if (e := relative_error(f, x)) > 1e-12
            )

    thread = threading.Thread(target=work)
    thread.start()
    own = net()
    for _ in range(30):
        with ours():
            products(own(INPUT).square().sum(), list(own.parameters()), valueless=True)
    stop.set()
    thread.join()
    assert wrong == []
    assert math.isfinite(float(expected[0].sum()))

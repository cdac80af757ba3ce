"""What users bring: hypergradients are right, or refused by name, for every kind of model.

`MODELS` is the table of what is covered. Each is trained for a few steps in float64 by SGD with
momentum and by Adam, and dJ/d(lr, momentum) of every step must equal central differences of J, as
an ordinary training loop of this file finds it. Below the table: ways of training (clipping,
accumulation, groups, …), reduced precision, and what cannot be differentiated twice.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
from problems import classify, in_mode, relative_error
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.optim import (
    SGD,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)
from torch.utils.checkpoint import checkpoint

import rhc
from rhc import InputError
from rhc.hypergradient import Hypergradient
from rhc.training.batches import MicroBatches

STEPS = 6
WARM = 3
"""Plain steps before the window: momentum and moments are then not at their start."""

EXACT = 1e-6
"""Central differences with a relative step of 1e-5 are good to about 1e-8 in float64: 1e-10 is cut
off and 1e-16 / 1e-5 rounded, times the little that one step contributes to J."""

OPTIMIZERS: Mapping[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=0.05, momentum=0.8),
    "adam": partial(Adam, lr=0.01, betas=(0.8, 0.95)),
}

WAYS: Mapping[str, dict[str, Any]] = {
    "exact": {"segment": 2, "product": "exact"},  # two graphs kept, four made again
    "differences": {"segment": 1, "product": "central-difference"},
}
EVERY = tuple(WAYS)
WITH_KINKS = ("exact",)
"""A difference that steps over a kink is wrong, and need not be."""


# Batches ----------------------------------------------------------------------------------------


def vectors(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(6, 4, generator=draw, dtype=torch.float64)
    return x, torch.randint(0, 3, (6,), generator=draw)


def images(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(5, 2, 5, 5, generator=draw, dtype=torch.float64)
    return x, torch.randint(0, 3, (5,), generator=draw)


def sequences(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(3, 5, 4, generator=draw, dtype=torch.float64)
    return x, torch.randint(0, 3, (3, 5), generator=draw)


def tokens(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of a vocabulary of 9, the last three never come."""
    x = torch.randint(0, 6, (3, 5), generator=draw)
    return x, torch.randint(0, 3, (3, 5), generator=draw)


# Models -----------------------------------------------------------------------------------------


def on_images(*layers: nn.Module) -> Callable[[], nn.Module]:
    """The layers, tanh, and a linear head on all that comes out."""
    return lambda: nn.Sequential(
        *map(copy.deepcopy, layers), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)
    )


def on_rows(*layers: nn.Module) -> Callable[[], nn.Module]:
    """A linear layer in, the layers between, a linear head; of the last dimension."""
    return lambda: nn.Sequential(
        nn.Linear(4, 6), *map(copy.deepcopy, layers), nn.Tanh(), nn.Linear(6, 3)
    )


def on_tokens(embedding: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(copy.deepcopy(embedding), nn.Tanh(), nn.Linear(4, 3))


class First(nn.Module):
    """The first output of a module that has several."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[0]


class SelfAttention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        # No bias: that of the keys has a gradient of rounding noise, and Adam makes steps of it.
        self.attention = nn.MultiheadAttention(6, 2, bias=False, batch_first=True)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, **self.options)[0]


class CausalAttention(nn.Module):
    """masked: with an explicit mask in place of is_causal."""

    def __init__(self, *, masked: bool = False) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 18, bias=False)
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (2, 3)).transpose(1, 2) for p in self.inner(x).chunk(3, dim=-1))
        if self.masked:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + attended.transpose(1, 2).flatten(-2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)))


class Checkpointed(nn.Module):
    """The middle of the model computed again in the backward pass."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.middle = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.reentrant is None:
            return self.head(self.middle(x))
        return self.head(checkpoint(self.middle, x, use_reentrant=self.reentrant))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    model[2].requires_grad_(False)
    return model


def recurrent(kind: type[nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(First(kind(4, 6, batch_first=True, **options)), nn.Linear(6, 3))


def encoder(**options: Any) -> nn.Module:
    # No bias: see SelfAttention. GELU, since differences are taken too.
    return nn.TransformerEncoderLayer(
        6, 2, 8, activation="gelu", bias=False, batch_first=True, **options
    )


def weight_normed() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), normed, nn.Tanh(), nn.Linear(6, 3))


class Covered(NamedTuple):
    """A model, what it is fed with, the ways that must find its hypergradients.

    evaluated: the terminal loss is taken in eval mode, else in train mode.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    ways: tuple[str, ...] = EVERY
    evaluated: bool = False


# No bias in front of a normalisation that takes it off again: see SelfAttention.
unbiased = partial(nn.Conv2d, bias=False)

MODELS: Mapping[str, Covered] = {
    "linear": Covered(on_rows(), vectors),
    "convolution": Covered(on_images(nn.Conv2d(2, 3, 3)), images),
    "convolution 1d": Covered(on_rows(nn.Conv1d(5, 5, 3, padding=1)), sequences),
    "convolution strided, grouped": Covered(
        on_images(nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)), images
    ),
    "convolution dilated, padded to the same": Covered(
        on_images(nn.Conv2d(2, 3, 2, dilation=2, padding="same")), images
    ),
    "convolution, circular": Covered(
        on_images(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")), images
    ),
    "convolution, transposed": Covered(on_images(nn.ConvTranspose2d(2, 3, 2, stride=2)), images),
    "average pooling": Covered(on_images(nn.Conv2d(2, 3, 2), nn.AvgPool2d(2)), images),
    "adaptive pooling": Covered(on_images(nn.Conv2d(2, 3, 2), nn.AdaptiveAvgPool2d(3)), images),
    "ReLU, max-pooling": Covered(
        on_images(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2)), images, WITH_KINKS
    ),
    "SiLU, GELU, softplus": Covered(
        on_rows(nn.SiLU(), nn.Linear(6, 6), nn.GELU("tanh"), nn.Linear(6, 6), nn.Softplus()),
        vectors,
    ),
    "BatchNorm, terminal in train mode": Covered(
        on_images(unbiased(2, 3, 3), nn.BatchNorm2d(3)), images
    ),
    "BatchNorm, terminal in eval mode": Covered(
        on_images(unbiased(2, 3, 3), nn.BatchNorm2d(3)), images, evaluated=True
    ),
    "LayerNorm": Covered(on_rows(nn.LayerNorm(6)), sequences),
    "LayerNorm without weights": Covered(
        on_rows(nn.LayerNorm(6, elementwise_affine=False)), vectors
    ),
    "LayerNorm over three dimensions": Covered(
        on_images(nn.Conv2d(2, 3, 3), nn.LayerNorm((3, 3, 3))), images
    ),
    "RMSNorm": Covered(on_rows(nn.RMSNorm(6)), vectors),
    "GroupNorm": Covered(on_images(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), images),
    "InstanceNorm": Covered(
        on_images(unbiased(2, 3, 3), nn.InstanceNorm2d(3, affine=True)), images
    ),
    "InstanceNorm with statistics, terminal in eval mode": Covered(
        on_images(unbiased(2, 3, 3), nn.InstanceNorm2d(3, track_running_stats=True)),
        images,
        evaluated=True,
    ),
    "dropout": Covered(on_rows(nn.Dropout(0.3)), vectors),
    "dropout, terminal in eval mode": Covered(on_rows(nn.Dropout(0.3)), vectors, evaluated=True),
    "embedding with rows never used": Covered(on_tokens(nn.Embedding(9, 4)), tokens),
    "embedding with padding": Covered(on_tokens(nn.Embedding(9, 4, padding_idx=2)), tokens),
    "tied weights": Covered(Tied, tokens),
    "frozen weights": Covered(frozen, vectors),
    "LSTM": Covered(recurrent(nn.LSTM), sequences),
    "LSTM, 2 layers with dropout": Covered(
        recurrent(nn.LSTM, num_layers=2, dropout=0.3), sequences
    ),
    "GRU": Covered(recurrent(nn.GRU), sequences),
    "GRU, 2 layers with dropout": Covered(recurrent(nn.GRU, num_layers=2, dropout=0.3), sequences),
    "MultiheadAttention": Covered(on_rows(SelfAttention()), sequences),
    "MultiheadAttention without its weights": Covered(
        on_rows(SelfAttention(need_weights=False)), sequences
    ),
    "TransformerEncoderLayer": Covered(on_rows(encoder()), sequences),
    "TransformerEncoderLayer, norm first, terminal in eval mode": Covered(
        on_rows(encoder(norm_first=True)), sequences, evaluated=True
    ),
    "attention, causal": Covered(on_rows(CausalAttention()), sequences),
    "attention, masked": Covered(on_rows(CausalAttention(masked=True)), sequences),
    "weight norm": Covered(weight_normed, vectors),
    "activation checkpointing": Covered(lambda: Checkpointed(reentrant=False), vectors),
    "activation checkpointing, reentrant": Covered(
        lambda: Checkpointed(reentrant=True), vectors, ("differences",)
    ),
}


# A window, and what it is compared with ----------------------------------------------------------


class Window(NamedTuple):
    model: nn.Module
    optimizer: Optimizer
    loss_fn: Callable[[nn.Module, Any], Any]
    batches: list[Any]
    terminal: Callable[[nn.Module], Tensor]
    controls: dict[str, Tensor]


def window(
    model: nn.Module,
    make: Callable[..., Optimizer],
    batch: Callable[[torch.Generator], Any],
    loss_fn: Callable[[nn.Module, Any], Any] = classify,
    *,
    evaluated: bool = False,
    dtype: torch.dtype = torch.float64,
    steps: int = STEPS,
) -> Window:
    """The model after a few plain steps, and the batches to come."""
    draw = torch.Generator().manual_seed(1)

    def cast(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(dtype) if x.is_floating_point() else x
        return type(x)(map(cast, x))

    batches = [cast(batch(draw)) for _ in range(WARM + steps)]
    held_out = cast(batch(draw))
    optimizer = make(p for p in model.parameters() if p.requires_grad)
    group = optimizer.param_groups[0]
    own = {"lr": group["lr"]}
    if group.get("momentum") or "betas" in group:
        own["momentum"] = group.get("momentum") or group["betas"][0]
    controls = {
        name: value * (0.8 + 0.4 * torch.rand(steps, generator=draw, dtype=torch.float64))
        for name, value in own.items()
    }

    def held_out_loss(model: nn.Module) -> Tensor:
        found = [loss_fn(model, part) for part in parts(held_out)]
        return sum(f[0] if isinstance(f, tuple) else f for f in found) / len(found)

    terminal = in_mode(held_out_loss, training=not evaluated)
    made = Window(model, optimizer, loss_fn, batches[WARM:], terminal, controls)
    warmed = made._replace(batches=batches[:WARM])
    train(warmed, {name: torch.full((WARM,), value) for name, value in own.items()})
    return made


def parts(batch: Any) -> tuple[Any, ...]:
    return batch if isinstance(batch, MicroBatches) else (batch,)


def train(
    window: Window,
    controls: Mapping[str, Tensor],
    *,
    clip_norm: float | None = None,
    clip_value: float | None = None,
) -> float:
    """J of an ordinary training loop, which trains the window's model: Σ_t ℓ_t + terminal."""
    model, optimizer = window.model.train(), window.optimizer
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    ratios = [group["lr"] / optimizer.param_groups[0]["lr"] for group in optimizer.param_groups]
    torch.manual_seed(5)
    total = 0.0
    for t, batch in enumerate(window.batches):
        values = {name: float(control[t]) for name, control in controls.items()}
        for group, ratio in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = values["lr"] * ratio
            if "betas" in group:
                group["betas"] = (values["momentum"], group["betas"][1])
            elif "momentum" in values:
                group["momentum"] = values["momentum"]
        optimizer.zero_grad()
        for part in parts(batch):
            found = window.loss_fn(model, part)
            loss = (found[0] if isinstance(found, tuple) else found) / len(parts(batch))
            loss.backward()
            total += loss.item()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        if clip_value is not None:
            nn.utils.clip_grad_value_(parameters, clip_value)
        optimizer.step()
    with torch.no_grad():
        return total + float(window.terminal(model))


def differences(window: Window, **options: Any) -> dict[str, Tensor]:
    """Central differences of J with respect to every control of every step."""

    def value(moved: Mapping[str, Tensor]) -> float:
        model, optimizer = copy.deepcopy((window.model, window.optimizer))
        return train(window._replace(model=model, optimizer=optimizer), moved, **options)

    def slope(name: str, t: int) -> float:
        step = 1e-5 * float(window.controls[name][t])
        ends = []
        for sign in (1, -1):
            moved = {n: v.clone() for n, v in window.controls.items()}
            moved[name][t] += sign * step
            ends.append(value(moved))
        return (ends[0] - ends[1]) / (2 * step)

    return {
        name: torch.tensor([slope(name, t) for t in range(STEPS)], dtype=torch.float64)
        for name in window.controls
    }


def look_back(window: Window, **options: Any) -> Hypergradient:
    window.model.train()
    torch.manual_seed(5)
    return rhc.hypergradient(
        window.model,
        window.optimizer,
        window.loss_fn,
        window.batches,
        controls=window.controls,
        terminal=window.terminal,
        **options,
    )


def assert_agrees(
    found: Hypergradient, expected: Mapping[str, Tensor], tolerance: float = EXACT
) -> None:
    assert found.result.successful, found.result
    for name, e in expected.items():
        assert relative_error(found.grad[name], e) < tolerance, (name, found.grad[name], e)


def built(make: Callable[[], nn.Module], batch: Callable[..., Any], seed: int = 0) -> nn.Module:
    """The model in float64, its lazy layers given their shapes."""
    torch.manual_seed(seed)
    model = make()
    if any(isinstance(m, nn.modules.lazy.LazyModuleMixin) for m in model.modules()):
        model.eval()(batch(torch.Generator().manual_seed(1))[0].float())
    # The table was built when this file was imported, whatever the seed then was.
    torch.manual_seed(seed)
    for module in model.modules():
        for reset in ("reset_parameters", "_reset_parameters"):
            getattr(module, reset, lambda: None)()
    return model.double().train()


@cache
def covered(name: str, optimizer: str) -> tuple[Window, dict[str, Tensor]]:
    case = MODELS[name]
    model = built(case.model, case.batch)
    made = window(model, OPTIMIZERS[optimizer], case.batch, evaluated=case.evaluated)
    return made, differences(made)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name, case in MODELS.items() for way in case.ways]
)
def test_models(name: str, way: str, optimizer: str) -> None:
    window, expected = covered(name, optimizer)
    assert all(bool(e.isfinite().all()) and e.abs().max() > 0 for e in expected.values())
    assert_agrees(look_back(window, **WAYS[way]), expected)


# Ways of training --------------------------------------------------------------------------------


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))


def in_groups(make: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    def grouped(parameters: Any) -> Optimizer:
        every = list(parameters)
        optimizer = make([{"params": every[:1]}, {"params": every[1:]}])
        optimizer.param_groups[1]["lr"] /= 10
        return optimizer

    return grouped


def with_metrics(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Any]]:
    loss = classify(model, batch)
    return loss, {"perplexity": loss.exp(), "examples": 6}


def accumulated(draw: torch.Generator) -> MicroBatches:
    return MicroBatches(vectors(draw) for _ in range(3))


def in_a_list(draw: torch.Generator) -> list[Any]:
    return [vectors(draw) for _ in range(3)]


def mean_of_list(model: nn.Module, batch: list[Any]) -> Tensor:
    return torch.stack([classify(model, part) for part in batch]).mean()


TRAINING: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: (how the window is made, what the loop and rhc are asked for)
    "clipping to the global norm": ({}, {"clip_norm": 0.1}),
    "clipping of every element": ({}, {"clip_value": 0.05}),
    "groups": ({"make": in_groups}, {}),
    "groups, clipping to the global norm": ({"make": in_groups}, {"clip_norm": 0.1}),
    "metrics": ({"loss_fn": with_metrics}, {}),
    "accumulation, by rhc": ({"batch": accumulated}, {}),
    "accumulation, by loss_fn": ({"batch": in_a_list, "loss_fn": mean_of_list}, {}),
}


@cache
def trained(name: str, optimizer: str) -> tuple[Window, dict[str, Tensor]]:
    how, options = TRAINING[name]
    make = how.get("make", lambda same: same)(OPTIMIZERS[optimizer])
    made = window(
        built(perceptron, vectors), make, how.get("batch", vectors), how.get("loss_fn", classify)
    )
    return made, differences(made, **options)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", EVERY)
@pytest.mark.parametrize("name", TRAINING)
def test_training(name: str, way: str, optimizer: str) -> None:
    window, expected = trained(name, optimizer)
    options = TRAINING[name][1]
    if options:  # what is tested takes part
        assert relative_error(differences(window)["lr"], expected["lr"]) > 1e-3
    assert_agrees(look_back(window, **WAYS[way], **options), expected)


def test_sparse_embeddings_are_refused() -> None:
    """Their gradients are sparse tensors, which hold no place for the rows that were not used."""
    made = window(built(on_tokens(nn.Embedding(9, 4, sparse=True)), tokens), SGD_MOMENTUM, tokens)
    with pytest.raises(InputError, match=r"sparse") as caught:
        look_back(made)
    assert "0.weight" in str(caught.value) and "sparse=False" in str(caught.value)


SGD_MOMENTUM = OPTIMIZERS["sgd"]


# Reduced precision and fused kernels -------------------------------------------------------------


def in_bfloat16(model: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return classify(model, batch)


LONG = 20
"""Steps from which on differences are tried where it is ours to choose."""

SMOOTH = on_rows(nn.LayerNorm(6), nn.Linear(6, 6), nn.GELU())
ATTENTIVE = on_rows(CausalAttention())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", ["exact", "auto"])
def test_autocast_to_bfloat16(way: str, optimizer: str) -> None:
    """bfloat16 keeps 8 bits: products of layers and of Hessians are good to about 2⁻⁸ each, and a
    few tens of them add up to no more than 5 %. Parameters and costates stay in float32."""
    made = OPTIMIZERS[optimizer]
    expected = look_back(window(built(SMOOTH, vectors), made, vectors)).grad
    model = built(SMOOTH, vectors).float()
    half = window(model, made, vectors, in_bfloat16, dtype=torch.float32)
    found = look_back(half, **WAYS.get(way, {}))
    assert_agrees(found, expected, 0.05)
    # 2⁻²⁴ of the costate is lost in float32, 2⁻⁸ in bfloat16.
    assert relative_error(found.grad["lr"], found.grad["lr"].bfloat16().double()) > 0
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_differences_are_no_silent_error_under_autocast(optimizer: str) -> None:
    """A step of √ε of float32 is lost in bfloat16: it gave 33 % and more. With a step of √2⁻⁷ the
    quotient is good to a few per cent a product."""
    made = OPTIMIZERS[optimizer]
    expected = look_back(window(built(SMOOTH, vectors), made, vectors, steps=LONG)).grad

    def half() -> Window:
        model = built(SMOOTH, vectors).float()
        return window(model, made, vectors, in_bfloat16, dtype=torch.float32, steps=LONG)

    found = look_back(half())
    assert found.product == "exact", found.why
    assert_agrees(found, expected, 0.05)
    asked = look_back(half(), product="forward-difference")
    assert relative_error(asked.grad["lr"], expected["lr"]) < 0.2


def perceptron_of_matrices() -> nn.Module:
    """For Muon, which takes nothing else."""
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False))


EVERY_OPTIMIZER: Mapping[str, Callable[..., Optimizer]] = {
    **OPTIMIZERS,
    "adamw": partial(AdamW, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1),
    "rmsprop": partial(RMSprop, lr=0.01, alpha=0.9, momentum=0.7, centered=True),
    "nadam": partial(NAdam, lr=0.01, betas=(0.8, 0.95)),
    "radam": partial(RAdam, lr=0.02, betas=(0.8, 0.95)),
    "adamax": partial(Adamax, lr=0.01, betas=(0.8, 0.95)),
    "adagrad": partial(Adagrad, lr=0.05, initial_accumulator_value=0.01),
    "muon": partial(Muon, lr=0.02, momentum=0.8),
}


@pytest.mark.parametrize("optimizer", EVERY_OPTIMIZER)
def test_the_default_in_float32(optimizer: str) -> None:
    """1e-4: exact products lose about 1e-6, times a window's growth."""

    def made(dtype: torch.dtype) -> Window:
        model = built(perceptron_of_matrices, vectors).to(dtype)
        return window(model, EVERY_OPTIMIZER[optimizer], vectors, dtype=dtype, steps=LONG)

    expected = look_back(made(torch.float64))
    found = look_back(made(torch.float32))
    assert expected.product == found.product == "exact"
    assert_agrees(found, expected.grad, 1e-4)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("way", ["exact", "differences", "auto"])
def test_fused_attention_in_float32(way: str, optimizer: str) -> None:
    """1e-3: exact products lose about 1e-6, central differences ε^⅔ ≈ 2e-5 per product, times a
    window's growth. The kernels of float32 are others than those of float64."""
    expected = look_back(window(built(ATTENTIVE, sequences), OPTIMIZERS[optimizer], sequences)).grad
    model = built(ATTENTIVE, sequences).float()
    single = window(model, OPTIMIZERS[optimizer], sequences, dtype=torch.float32)
    assert_agrees(look_back(single, **WAYS.get(way, {})), expected, 1e-3)


# What cannot be differentiated twice -------------------------------------------------------------


class OnceCubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x + x**3 / 3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * (1 + x**2)


class Cube(nn.Module):
    def __init__(self, *, once: bool) -> None:
        super().__init__()
        self.once = once

    def forward(self, x: Tensor) -> Tensor:
        return OnceCubed.apply(x) if self.once else x + x**3 / 3


class Bend(nn.Module):
    """A model with a cube in its middle; with kinks after it, which no difference survives."""

    def __init__(self, *, once: bool, kinks: bool = False) -> None:
        super().__init__()
        width = 64 if kinks else 6
        self.first = nn.Linear(4, width)
        self.middle = Cube(once=once)
        self.second = nn.Linear(width, width)
        self.bend = nn.Sequential(nn.ReLU(), nn.MaxPool1d(2)) if kinks else nn.Tanh()
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bend(self.second(self.middle(self.first(x)))))


class Bag(nn.Module):
    """Every position sees the mean of all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(x)))[:, None].expand(-1, x.shape[1], -1)


class PartlyCompiled(nn.Module):
    """A model with a part of it compiled, as users do with one block."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.body = torch.compile(perceptron(), backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def compiler_missing() -> str:
    """Why inductor cannot be tested here; empty where it can."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "inductor needs a C++ compiler"
    return ""


needs_compiler = pytest.mark.skipif(bool(compiler_missing()), reason=compiler_missing())
BACKENDS = ["aot_eager", pytest.param("inductor", marks=needs_compiler)]


def compiled(backend: str) -> Window:
    """The same model as `plain_twin`, compiled after its weights are drawn."""
    torch._dynamo.reset()
    model = built(on_rows(nn.LayerNorm(6)), vectors)
    return window(torch.compile(model, backend=backend), SGD_MOMENTUM, vectors)  # type: ignore[arg-type]


def plain_twin() -> Window:
    return window(built(on_rows(nn.LayerNorm(6)), vectors), SGD_MOMENTUM, vectors)


def words(found: Hypergradient) -> str:
    """Everything a hypergradient says of how it was found."""
    return f"{found.why}; {found.result.message}"


def assert_fell_back(found: Hypergradient, operator: str) -> None:
    assert found.product in ("forward-difference", "central-difference")
    assert operator in found.why and "exact" in found.why, found.why


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_models(backend: str) -> None:
    """1e-4: forward differences are good to √ε ≈ 1e-8 per product in float64, and compiled kernels
    may sum in another order."""
    made = compiled(backend)
    expected = differences(plain_twin())
    found = look_back(made)
    assert_fell_back(found, "compile")
    assert_agrees(found, expected, 1e-4)
    assert_agrees(look_back(made, **WAYS["differences"]), expected, 1e-4)
    with pytest.raises(InputError, match="compile") as caught:
        look_back(made, product="exact")
    assert "difference" in str(caught.value)


def test_compiled_parts_are_refused_by_name() -> None:
    torch._dynamo.reset()
    made = window(built(lambda: PartlyCompiled("aot_eager"), vectors), SGD_MOMENTUM, vectors)
    with pytest.raises(InputError, match="body") as caught:
        look_back(made, product="exact")
    assert "difference" in str(caught.value)
    assert_fell_back(look_back(made), "body")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_functions_without_a_second_derivative(optimizer: str) -> None:
    made, twin = (
        window(built(partial(Bend, once=once), vectors), OPTIMIZERS[optimizer], vectors)
        for once in (True, False)
    )
    expected = differences(twin)
    for options in ({"segment": 1}, {"segment": 2}, {"engine": "higher"}):
        with pytest.raises(InputError, match="OnceCubed") as caught:
            look_back(made, product="exact", **options)
        assert "middle" in str(caught.value) and "difference" in str(caught.value)
    found = look_back(made)
    assert_fell_back(found, "OnceCubed")
    assert_agrees(found, expected)
    assert_agrees(look_back(made, **WAYS["differences"]), expected)
    assert_agrees(look_back(twin), expected)  # which is exact, and has no reason to fall back
    assert look_back(twin).product == "exact"


def test_a_loss_without_a_second_derivative() -> None:
    """The last function of all is given a gradient of 1, which needs no graph: torch says nothing
    of it, even in `backward()`."""

    def cubed(model: nn.Module, batch: Any) -> Tensor:
        return OnceCubed.apply(classify(model, batch))

    made = window(built(perceptron, vectors), SGD_MOMENTUM, vectors, cubed)
    with pytest.raises(InputError, match=r"OnceCubed in loss_fn, outside any module"):
        look_back(made, product="exact")
    found = look_back(made)
    assert_fell_back(found, "OnceCubed")
    assert_agrees(found, differences(made))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_operators_without_a_second_derivative(optimizer: str) -> None:
    """torch itself has some, of which the mean of an embedding bag is the commonest."""
    made = window(built(Bag, tokens), OPTIMIZERS[optimizer], tokens)
    expected = differences(made)
    for segment in (1, 2):
        with pytest.raises(InputError, match="embedding_bag") as caught:
            look_back(made, segment=segment, product="exact")
        assert "bag" in str(caught.value) and "difference" in str(caught.value)
    found = look_back(made)
    assert_fell_back(found, "embedding_bag")
    assert_agrees(found, expected)


def test_reentrant_checkpointing_is_refused_by_name() -> None:
    made, _ = covered("activation checkpointing, reentrant", "sgd")
    with pytest.raises(InputError, match="use_reentrant") as caught:
        look_back(made, product="exact")
    assert "difference" in str(caught.value)
    assert_fell_back(look_back(made), "use_reentrant")


def many_vectors(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(64, 4, generator=draw, dtype=torch.float64)
    return x, torch.randint(0, 3, (64,), generator=draw)


@pytest.mark.parametrize("seed", range(3))
def test_kinks_are_right_or_reported(seed: int) -> None:
    """In float32 a difference steps over kinks of ReLU and of maxima: its jump divided by a small
    number. Where exact products are possible, `auto` must be right; where they are not, it must
    say that its differences disagree."""

    def single(*, once: bool) -> Window:
        model = built(partial(Bend, once=once, kinks=True), many_vectors, seed).float()
        make = partial(SGD, lr=0.3, momentum=0.8)
        return window(model, make, many_vectors, dtype=torch.float32)

    smooth, rough = single(once=False), single(once=True)
    exact = look_back(smooth, product="exact", stage_weight=0.0).grad["lr"]
    for product in ("forward-difference", "central-difference"):
        wrong = look_back(rough, product=product, stage_weight=0.0).grad["lr"]
        assert relative_error(wrong, exact) > 0.03  # else there is nothing to report
    found = look_back(smooth, stage_weight=0.0)
    assert_agrees(found, {"lr": exact}, 1e-4)
    reported = look_back(rough, stage_weight=0.0)
    assert not reported.result.successful
    assert "disagree" in words(reported)


@pytest.mark.parametrize("once", [False, True])
def test_kinks_in_long_windows_are_right_or_reported(once: bool) -> None:
    def single(*, once: bool) -> Window:
        model = built(partial(Bend, once=once, kinks=True), many_vectors).float()
        make = partial(SGD, lr=0.1, momentum=0.8)
        return window(model, make, many_vectors, dtype=torch.float32, steps=LONG)

    found = look_back(single(once=once), stage_weight=0.0)
    if once:
        assert found.result.name == "inconsistent" and "disagree" in found.result.message
        assert found.result.step is not None
    else:
        exact = look_back(single(once=once), stage_weight=0.0, product="exact").grad
        assert found.product == "exact"
        assert_agrees(found, exact, 1e-4)


def test_differences_that_agree_are_taken() -> None:
    """Where nothing is wrong with them, having no exact product is no reason for alarm."""
    made, single = (
        window(
            built(partial(Bend, once=True), vectors).to(dtype),
            SGD_MOMENTUM,
            vectors,
            dtype=dtype,
            steps=LONG,
        )
        for dtype in (torch.float64, torch.float32)
    )
    found = look_back(single)
    assert_fell_back(found, "OnceCubed")
    assert_agrees(found, look_back(made, product="central-difference").grad, 0.01)


# Buffers -----------------------------------------------------------------------------------------


def spectral() -> nn.Module:
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), normed, nn.Tanh(), nn.Linear(6, 3))


def test_buffers_that_count_as_constants_are_told() -> None:
    """The singular vectors of spectral_norm depend on the weights: off by 3e-4 here."""
    made = window(built(spectral, vectors), SGD_MOMENTUM, vectors)
    found = look_back(made)
    assert "2.parametrizations.weight.0._u" in found.why and "constants" in found.why
    assert found.result.name == "inconsistent"  # in float64, where 1e-6 is asked for
    assert_agrees(look_back(made, verify=False), differences(made), 0.01)
    case = MODELS["BatchNorm, terminal in eval mode"]
    followed = window(built(case.model, case.batch), SGD_MOMENTUM, case.batch)
    assert "constants" not in look_back(followed).why


class BatchNormTanh(nn.BatchNorm2d):
    """A class of one's own that does more than torch's, as timm's do."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))


@pytest.mark.parametrize("way", EVERY)
def test_a_batch_norm_of_ones_own_keeps_its_forward(way: str) -> None:
    made = window(
        built(on_images(unbiased(2, 3, 3), BatchNormTanh(3)), images), SGD_MOMENTUM, images
    )
    found = look_back(made, **WAYS[way])
    assert_agrees(found, differences(made))
    assert "1.running_mean" in found.why  # which a terminal in eval mode would read


def test_torch_is_left_as_it_was() -> None:
    fused = torch._weight_norm
    look_back(covered("weight norm", "sgd")[0])
    assert torch._weight_norm is fused


def test_what_is_given_up_is_told() -> None:
    """ReversePass's notices, which a Runner sends on as events."""
    torch.manual_seed(0)
    model = Bend(once=True)
    rows = torch.utils.data.TensorDataset(torch.randn(24, 4), torch.randint(0, 3, (24,)))
    model(rows[:2][0])
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.8)
    loader = torch.utils.data.DataLoader(rows, 6)
    told: list[str] = []
    runner = rhc.Runner(
        model,
        optimizer,
        classify,
        loader,
        loader,
        window=4,
        start="given",
        listeners=[lambda event: told.append(getattr(event, "message", ""))],
    )
    runner.fit(steps=8)
    given_up = [m for m in told if "OnceCubed" in m]
    assert len(given_up) == 1 and "module middle (Cube)" in given_up[0], told

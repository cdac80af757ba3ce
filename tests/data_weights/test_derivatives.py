"""dJ/dw of data weights equals central differences of the plain loop, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rhc
from rhc.data_weights import DataWeights

STEPS, ROWS, CELLS = 4, 5, 6

MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "batch norm": lambda: nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2), nn.Linear(5, 3)
    ),
    "layer norm": lambda: nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3)
    ),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)
    ),
    "linear": lambda: nn.Linear(4, 3),
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01),
}


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def terms(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    out = model(batch[0])
    return {"fit": F.cross_entropy(out, batch[1]), "size": 0.1 * out.square().mean()}


def batches(count: int = STEPS) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(ROWS, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (ROWS,), generator=generator),
            torch.randint(CELLS, (ROWS,), generator=generator),
        )
        for _ in range(count)
    ]


HELD_OUT = batches(7)[-1]


def found(
    values: Tensor, model: str = "mlp", optimizer: str = "sgd", names: Any = None, **options: Any
) -> rhc.Hypergradient:
    torch.manual_seed(0)
    net = MODELS[model]().double()
    made = OPTIMIZERS[optimizer](net.parameters())
    if optimizer != "sgd":  # away from the infinite slope at a second moment of 0
        for _ in range(2):
            loss_fn(net, HELD_OUT).mean().backward()
            made.step()
            made.zero_grad()
    weights = (
        DataWeights(CELLS, lambda batch: batch[2], values=values)
        if names is None
        else DataWeights(names, values=values)
    )
    return rhc.hypergradient(
        net,
        made,
        loss_fn if names is None else terms,
        batches(options.get("accumulate", 1) * STEPS),
        data_weights=weights,
        **{
            "controls": {"lr": made.param_groups[0]["lr"]},
            "terminal": lambda m: F.cross_entropy(m(HELD_OUT[0]), HELD_OUT[1]),
            "verify": False,
            **options,
        },
    )


def values_of(count: int) -> Tensor:
    raw = torch.linspace(0.3, 2, count, dtype=torch.float64)
    return raw / raw.mean()


def differences(values: Tensor, **options: Any) -> Tensor:
    """(J(w + εe_c) − J(w − εe_c)) / 2ε for every cell."""
    slopes = []
    for c in range(len(values)):
        sides = []
        for epsilon in (1e-5, -1e-5):
            moved = values.clone()
            moved[c] += epsilon
            sides.append(found(moved, **options, **{"product": "none"}).value)
        slopes.append((sides[0] - sides[1]) / 2e-5)
    return torch.tensor(slopes, dtype=torch.float64)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_equals_central_differences(model: str, optimizer: str) -> None:
    values = values_of(CELLS)
    h = found(values, model, optimizer)
    expected = differences(values, model=model, optimizer=optimizer)
    assert h.grad["data_weights"].shape == (CELLS,)
    assert apart(h.grad["data_weights"], expected) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate": 2},
        {"clip_norm": 0.05},
        {"average": 0.5},
        {"stage_weight": 0.0},
        {"terminal": None},
        {"segment": STEPS},
        {"segment": 2},
        {"memory_budget": 2000},
        {"controls": {"noise": 0.3}},
        {"controls": {}},
        {"names": ["fit", "size"]},
        {"names": ["fit", "size"], "accumulate": 2, "segment": STEPS},
    ],
    ids=str,
)
def test_every_setting_equals_central_differences(options: dict[str, Any]) -> None:
    values = values_of(len(options.get("names", range(CELLS))))
    settings = {k: v for k, v in options.items() if k != "segment"}
    expected = differences(values, **settings)
    assert apart(found(values, **options).grad["data_weights"], expected) < 1e-6


@pytest.mark.parametrize("model", ["mlp", "batch norm"])
@pytest.mark.parametrize("product", ["forward-difference", "central-difference"])
def test_difference_products_agree_with_exact(product: str, model: str) -> None:
    values = values_of(CELLS)
    exact = found(values, model).grad["data_weights"]
    other = found(values, model, product=product).grad["data_weights"]
    assert apart(other, exact) < 1e-5


def test_without_the_hessian_the_last_steps_rows_are_exact() -> None:
    values = values_of(CELLS)
    exact, without = (found(values, product=p).rows[-1] for p in ("exact", "none"))
    assert apart(without, exact) < 1e-6


def test_rows_add_up_to_cells_and_a_common_factor_changes_nothing() -> None:
    values = values_of(CELLS)
    h = found(values)
    total = torch.zeros(CELLS, dtype=torch.float64)
    for batch, rows in zip(batches(), h.rows, strict=True):
        total.index_add_(0, batch[2], rows)
    assert torch.allclose(total, h.grad["data_weights"], rtol=1e-12)
    assert abs(float(values @ h.grad["data_weights"])) < 1e-12


@pytest.mark.parametrize("product", ["auto", "forward-difference", "none"])
def test_it_is_verified_by_rolls_of_the_plain_loop(product: str) -> None:
    h = found(values_of(CELLS), verify="auto", product=product)
    assert h.result.successful, h.why
    assert h.check["data_weights"] < 1e-5


def test_a_wrong_derivative_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from rhc.hypergradient import adjoint

    right = adjoint.per_row
    monkeypatch.setattr(adjoint, "per_row", lambda *a, **k: [1.2 * rows for rows in right(*a, **k)])
    h = found(values_of(CELLS), verify="auto")
    assert h.result.name == "inconsistent"
    assert "data_weights" in h.why


def test_the_other_derivatives_are_those_of_the_weighted_loop() -> None:
    values = values_of(CELLS)

    def by_hand(model: nn.Module, batch: Any) -> Tensor:
        if batch is HELD_OUT:
            return loss_fn(model, batch).mean()
        w = values[batch[2]]
        return (w / w.mean() * loss_fn(model, batch)).mean()

    torch.manual_seed(0)
    net = MODELS["mlp"]().double()
    plain = rhc.hypergradient(
        net,
        OPTIMIZERS["sgd"](net.parameters()),
        by_hand,
        batches(),
        controls={"lr": 0.1},
        terminal=lambda m: F.cross_entropy(m(HELD_OUT[0]), HELD_OUT[1]),
    )
    assert apart(found(values).grad["lr"], plain.grad["lr"]) < 1e-12


def test_a_scalar_loss_is_one_sentence() -> None:
    net = MODELS["mlp"]().double()
    with pytest.raises(rhc.InputError, match="one loss per row"):
        rhc.hypergradient(
            net,
            OPTIMIZERS["sgd"](net.parameters()),
            lambda m, b: loss_fn(m, b).mean(),
            batches(),
            controls={},
            data_weights=DataWeights(CELLS, lambda batch: batch[2]),
        )

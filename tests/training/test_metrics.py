"""What loss_fn returns beside the loss: numbers, flags, live tensors, and nothing at some steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import seed_everything
from torch import Tensor, nn

import rhc
from rhc import InputError
from rhc.hypergradient.evaluation import mean_loss
from rhc.training.batches import MicroBatches
from rhc.training.losses import checked_loss
from rhc.training.objective import Objective


class Counting(nn.Module):
    """Counts its training steps in a buffer, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        return self.layer(x)


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 6, 3, generator=generator)
    return [(rows, (rows[:, 0] > 0).long(), i) for i, rows in enumerate(x)]


def loss_fn(model: Counting, batch: Any) -> tuple[Tensor, dict[str, Any]]:
    x, y, i = batch
    prediction = model(x)
    loss = F.cross_entropy(prediction, y)
    metrics: dict[str, Any] = {
        "integer_first": 0 if i == 0 else i + 0.5,
        "number": 0.1 * i,
        "flag": i % 2 == 0,
        "numpy": np.float32(i),
        "live": model.steps,
        "attached": 2 * loss,
        "row": prediction[0] > 0,
    }
    if i % 2:
        metrics["odd"] = torch.tensor(float(i))
    return loss, metrics


class Noted:
    """A logger that keeps what it is told of steps."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, float]] = []

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self.rows.append(values)

    def begin(self, *told: Any) -> None: ...

    attempt = text = end = begin


@pytest.mark.parametrize("rewrite", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_metrics_are_recorded_as_they_were(rewrite: bool, accumulate: int) -> None:
    seed_everything(0)
    model, logger = Counting(), Noted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    result = rhc.Runner(
        model,
        optimizer,
        loss_fn,
        batches(),
        batches()[:3],
        window=4,
        start="given",
        rewrite=rewrite,
        accumulate=accumulate,
        product="exact",
        logger=logger,  # type: ignore[arg-type]
    ).fit(8)
    for t, row in enumerate(result.tape):
        parts = [(accumulate * t + k) % 8 for k in range(accumulate)]

        def mean(values: list[float]) -> float:
            return sum(values) / len(values)

        assert row["integer_first"] == mean([0 if i == 0 else i + 0.5 for i in parts])
        assert row["number"] == mean([0.1 * i for i in parts])
        assert row["flag"] == mean([float(i % 2 == 0) for i in parts])
        assert row["numpy"] == mean([float(i) for i in parts])
        assert row["live"] == mean([accumulate * t + 1 + k for k in range(accumulate)])
        assert row["attached"] == pytest.approx(2 * row["loss"], rel=1e-6)
        assert len(row["row"]) == 2 and set(row["row"]) <= {0, 0.5, 1}
        odd = [float(i) for i in parts if i % 2]
        assert row.get("odd") == (mean(odd) if odd else None)
        assert {k: v for k, v in logger.rows[t].items() if k in row} == {
            k: v for k, v in row.items() if k != "step" and not isinstance(v, list)
        }
        assert type(logger.rows[t]["row/0"]) is float
    # A metric that is missing at some batches is the mean over the others.
    assert result.record["metrics"]["val"]["odd"] == 1
    assert result.record["metrics"]["val"]["flag"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("product", ["exact", "forward-difference"])
def test_rewards_beside_other_metrics(accumulate: int, product: Any) -> None:
    """Means over micro-batches are taken in a graph too, of whatever there is."""

    def rewarded(model: Counting, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        loss, metrics = loss_fn(model, batch)
        return loss, {**metrics, "reward": -loss}

    def found(loss: Any, objective: Objective) -> Tensor:
        seed_everything(0)
        model = Counting()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        run = rhc.Runner(
            model,
            optimizer,
            loss,
            batches(),
            window=4,
            start="given",
            objective=objective,
            accumulate=accumulate,
            product=product,
        )
        return torch.tensor(run.fit(4).windows[-1]["hypergradient"]["lr"])

    by_reward = found(rewarded, Objective(reward_weight=1.0, terminal_weight=0.0))
    by_loss = found(loss_fn, Objective(loss_weight=1.0, terminal_weight=0.0))
    assert torch.allclose(by_reward, by_loss, rtol=1e-3, atol=1e-6)


def test_mean_of_what_is_there() -> None:
    seed_everything(0)
    _, metrics = mean_loss(loss_fn, Counting(), MicroBatches(batches()[:2]))
    assert float(metrics["flag"]) == 0.5 and float(metrics["odd"]) == 1


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (
            {"accuracy": None},
            "metric 'accuracy' of loss_fn must be a number or a tensor, got NoneType; leave it out",
        ),
        (
            {3: 1.0},
            "metrics of loss_fn must be named by strings, got 3; give it a name such as 'metric_3'",
        ),
    ],
)
def test_what_is_no_metric_is_refused(metrics: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        checked_loss((torch.zeros((), requires_grad=True), metrics))
    assert str(error.value) == message

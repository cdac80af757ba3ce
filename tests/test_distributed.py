"""Ranks that train together do what one process does with the rows of all."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from rank_programs import hypergradients
from ranks import spawn

CASES = [
    ("normed", "sgd", "exact", "even"),
    ("normed", "adamw", "exact", "uneven"),
    ("mlp", "adamw", "forward-over-reverse", "uneven"),
    ("transformer", "adamw", "exact", "even"),
    ("transformer", "momentum", "central-difference", "even"),
]


@pytest.fixture(scope="module")
def of_two() -> list[Any]:
    """Every case, on two ranks."""
    return spawn(2, "rank_programs.py", "many_hypergradients", json.dumps(CASES))


def test_hypergradients_are_those_of_one_process(of_two: list[Any]) -> None:
    for k, case in enumerate(CASES):
        alone = hypergradients(*case, alone=True)
        assert of_two[0][k] == of_two[1][k], case  # to the bit
        close(of_two[0][k], alone, case)


def close(found: dict[str, Any], expected: dict[str, Any], case: Any) -> None:
    assert found["result"] == expected["result"], case
    assert abs(found["value"] - expected["value"]) <= 1e-9 * abs(expected["value"]), case
    for name, values in expected["grad"].items():
        a, b = torch.tensor(found["grad"][name]), torch.tensor(values)
        assert torch.linalg.vector_norm(a - b) <= 1e-6 * torch.linalg.vector_norm(b), (case, name)
    a, b = torch.tensor(found["norms"]), torch.tensor(expected["norms"])
    assert torch.linalg.vector_norm(a - b) <= 1e-6 * torch.linalg.vector_norm(b), case

"""Matrix products of the kernels by oneDNN: torch's to rounding, and only where they were meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import relative_error
from test_kernels import CASES, Case, assert_close, chosen, derivatives, ours, torchs_own
from torch import Tensor, nn
from torch.nn import functional as F

import rhc
from rhc.hypergradient import Hypergradient
from rhc.hypergradient.evaluation import fast_gradients
from rhc.hypergradient.kernels import matrices

needs_onednn = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="this build of torch has no oneDNN",
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """oneDNN takes whatever it can, on any machine; here is what it was called for."""
    made: list[str] = []
    assert matrices._works()

    class Noted:
        def __init__(self, operator: Any) -> None:
            self.operator = operator

        def __call__(self, *arguments: Any) -> Tensor:
            made.append("linear")
            found: Tensor = self.operator(*arguments)
            return found

    class Namespace:
        _linear_pointwise = Noted(torch.ops.mkldnn._linear_pointwise)

    monkeypatch.setattr(matrices, "LEAST", 1)
    monkeypatch.setattr(matrices, "FEWEST", 1)
    monkeypatch.setattr(matrices, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", Namespace)
    yield made


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "rows": lambda n, k: matrix(n, k),
    "columns": lambda n, k: matrix(k, n).t(),
    "every other": lambda n, k: matrix(n, 2 * k)[:, ::2],
    "a slice": lambda n, k: matrix(n, k + 3)[:, 2:-1],
    "one row": lambda n, k: matrix(1, k).expand(n, k),
    "one column": lambda n, k: matrix(n, 1).expand(n, k),
}


ROWS = {1: (1,), 6: (6,), 7: (4, 2, 1), 8: (8,), 13: (8, 4, 1), 31: (16, 8, 4)}
"""Rows -> how many go to oneDNN at a time; the rest goes to MKL."""


@needs_onednn
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("of_b", LAYOUTS)
@pytest.mark.parametrize("of_a", LAYOUTS)
def test_products_are_torchs(of_a: str, of_b: str, rows: int, calls: list[str]) -> None:
    """1e-6: a dozen roundings of 6e-8."""
    a, b = LAYOUTS[of_a](rows, 5), LAYOUTS[of_b](5, 4)
    bias, total = matrix(4, seed=1), matrix(rows, 4, seed=2)
    before = total.clone()
    exact = a.double() @ b.double()
    with torch.no_grad():
        pairs = [
            (matrices.product(a, b), exact),
            (matrices.linear(a, b.t()), exact),
            (matrices.linear(a, b.t(), bias), exact + bias),
            (matrices.product(a.unsqueeze(0), b), exact.unsqueeze(0)),
            (matrices.over_rows(a, total), a.double().t() @ total.double()),
            (matrices.over_rows(total.unsqueeze(1), a), total.double().t() @ a.double()),
            (matrices.linear(a, b.t(), bias[:1].expand(4)), exact + bias[0]),
            (matrices.linear(a, b.t(), matrix(8)[::2]), exact + matrix(8)[::2]),
            (matrices.sum_of(total, a, b), exact + total),
            (matrices.sum_of(bias, a, b), exact + bias),
        ]
        assert torch.equal(total, before)
        pairs.append((matrices.add_product(total, a, b), exact + before))
    assert pairs[-1][0] is total
    for found, expected in pairs:
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert relative_error(found, expected) < 1e-6
    assert len(calls) == len(pairs) * len(ROWS[rows])


@needs_onednn
@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if n.startswith(("linear", "LSTM", "GRU", "RNN"))]
)
def test_kernels_are_as_exact_with_it(name: str, calls: list[str]) -> None:
    """1e-5: as without, a few dozen roundings of 6e-8."""
    case: Case = CASES[name]
    wanted = [True] * len(case.shapes)
    expected = derivatives(case, chosen(case, wanted, torch.float32), torchs_own())
    assert not calls
    found = derivatives(case, chosen(case, wanted, torch.float32), ours())
    assert_close(found, expected, 1e-5)
    assert bool(calls) == (case.replaced and "empty" not in name)


@needs_onednn
def test_what_stays_torchs_own(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = matrix(6, 5), matrix(5, 4)

    def called() -> bool:
        calls.clear()
        matrices.product(a, b)
        matrices.linear(a, b.t())
        matrices.sum_of(matrix(6, 4).to(a.dtype), a, b)
        matrices.over_rows(a, matrix(6, 4).to(a.dtype))
        return bool(calls)

    assert not called()  # where a graph is made there is no derivative
    with torch.no_grad():
        assert called()
        with torch.backends.mkldnn.flags(enabled=False):
            assert not called()
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")  # then torch goes to oneDNN itself
        try:
            assert not called()
        finally:
            torch.set_float32_matmul_precision(precision)
        monkeypatch.setattr(matrices, "LEAST", 6 * 5 * 4 + 1)
        assert not called()
        monkeypatch.setattr(matrices, "LEAST", 6 * 5 * 4)
        assert called()
        monkeypatch.setattr(matrices, "FEWEST", 7)
        assert not called()
        monkeypatch.setattr(matrices, "FEWEST", 6)
        assert called()
        with matrices.torchs_own():
            assert not called()
            with matrices.torchs_own(False):
                assert not called()
        with matrices.torchs_own(False):
            assert called()
        a, b = a.double(), b.double()
        assert not called()


@pytest.mark.parametrize(
    ("capability", "vendor", "faster"),
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX512", "GenuineIntel", False),
        ("AVX2", "AuthenticAMD", False),
        ("DEFAULT", "AuthenticAMD", False),
    ],
)
def test_what_decides_is_the_machine(
    capability: str, vendor: str, faster: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(matrices, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    there = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    assert matrices.onednn_is_faster.__wrapped__() == (faster and there)


@needs_onednn
def test_an_operator_that_changes_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    works = matrices._works.__wrapped__
    assert works()
    own = torch.ops.mkldnn._linear_pointwise

    class Namespace:
        pass

    monkeypatch.setattr(torch.ops, "mkldnn", Namespace)
    assert not works()
    Namespace._linear_pointwise = staticmethod(lambda x, w, b: own(x, w, b, "none", [], ""))  # type: ignore[attr-defined]
    assert not works()
    Namespace._linear_pointwise = staticmethod(lambda x, w, b, *_: own(x, w, None, "none", [], ""))  # type: ignore[attr-defined]
    assert not works()


def hypergradient(model: nn.Module, product: Any, budget: int | None = None) -> Hypergradient:
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randn(64, 300, generator=draw) for _ in range(5)]
    return rhc.hypergradient(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        lambda m, x: m(x).square().mean(),
        batches[:4],
        controls={"lr": 0.1, "momentum": 0.9},
        terminal=lambda m: m(batches[4]).square().mean(),
        product=product,
        memory_budget=budget,
    )


def flat(found: Hypergradient) -> Tensor:
    return torch.cat(list(found.grad.values()))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    # Of more multiplications than a linear layer must have to be worth it.
    return nn.Sequential(nn.Linear(300, 1000), nn.Tanh(), nn.Linear(1000, 3))


@needs_onednn
@pytest.mark.parametrize("product", ["exact", "forward-difference", "central-difference"])
def test_hypergradients_with_it(product: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """1e-3: √ε of float32, which a difference leaves, a few times; an exact one loses 1e-6."""
    monkeypatch.setattr(matrices, "onednn_is_faster", lambda: False)
    expected = flat(hypergradient(network(), product))
    monkeypatch.undo()
    made: list[int] = []
    original = matrices._onednn

    def noted(*arguments: Any) -> Tensor:
        made.append(1)
        return original(*arguments)

    monkeypatch.setattr(matrices, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(matrices, "FEWEST", 1)
    monkeypatch.setattr(matrices, "_onednn", noted)
    found = flat(hypergradient(network(), product))
    assert made
    assert relative_error(found, expected) < (1e-5 if product == "exact" else 1e-3)


def test_a_compiled_model_keeps_its_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """For others dynamo would compile it again."""
    monkeypatch.setattr(matrices, "onednn_is_faster", lambda: True)
    own = F.linear
    with fast_gradients(network()):
        assert F.linear is not own
    with fast_gradients(torch.compile(network())):  # type: ignore[arg-type]
        assert F.linear is own
    assert F.linear is own


@needs_onednn
def test_what_it_would_keep_is_known_beforehand(calls: list[str]) -> None:
    """A kernel for a layer forwards, whoever's bias it has, and one for each of its gradients."""
    w, x, gy = matrix(4, 5), matrix(2, 8, 5), matrix(2, 8, 4)
    with torch.no_grad(), matrices.torchs_own(), matrices.noted() as kept:
        assert kept() == 0
        for _ in range(2):
            matrices.linear(x, w, matrix(4))
            matrices.add_product(gy.clone().flatten(0, 1), x.flatten(0, 1), w.t())
            matrices.product(gy, w)
            matrices.over_rows(gy, x)
        assert kept() == matrices.CODE + 3 * matrices.KERNEL
    assert not calls


def test_rows_of_any_number_take_few_kernels() -> None:
    sizes = {n for rows in range(1, 100_000) for n in matrices._powers(rows, matrices.FEWEST)}
    assert len(sizes) < 2 * 17 and min(sizes) == matrices.FEWEST
    for rows in range(1, 5000):
        parts = matrices._powers(rows, matrices.FEWEST)
        assert len(parts) <= matrices.MOST_PARTS and sum(parts) <= rows
        assert rows < matrices.FEWEST or sum(parts) > rows * 7 / 8 - matrices.FEWEST


@needs_onednn
def test_a_budget_without_room_for_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one with room counts them."""
    monkeypatch.setattr(matrices, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(matrices, "FEWEST", 1)
    used: list[bool] = []
    own = matrices._onednn

    def noted(*arguments: Any) -> Tensor:
        used.append(True)
        return own(*arguments)

    monkeypatch.setattr(matrices, "_onednn", noted)
    plans = {}
    for megabytes in (4, 400):
        used.clear()
        plan = hypergradient(network(), "exact", megabytes * 10**6).plan
        assert plan is not None and plan.onednn == bool(used) == (megabytes == 400)
        plans[megabytes] = plan
    assert plans[400].fits and plans[400].predicted_bytes is not None
    monkeypatch.setattr(matrices, "onednn_is_faster", lambda: False)
    without = hypergradient(network(), "exact", 400 * 10**6).plan
    assert without is not None and without.predicted_bytes is not None
    assert plans[400].predicted_bytes > without.predicted_bytes + matrices.CODE

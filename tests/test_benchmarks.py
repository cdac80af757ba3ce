"""The figures of docs/benchmarks.md come from code that finds the right hypergradients."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from problems import relative_error
from torch import tensor

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    """benchmarks/hypergradient.py as a module, under a name of its own."""
    sys.path.insert(0, str(FOLDER))  # it imports `models`, which lies beside it
    try:
        spec = importlib.util.spec_from_file_location(
            "benchmark_of_hypergradients", FOLDER / "hypergradient.py"
        )
        assert spec is not None and spec.loader is not None
        module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("model", ["mlp", "cnn", "lstm"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_all_engines_find_the_same_hypergradients(
    benchmark: Any, model: str, optimizer: str
) -> None:
    """2e-3: in float32, and Adam's first steps divide every gradient by itself."""
    task = benchmark.Task(model, optimizer, "cpu", 3)
    small = [task.batch(4) for _ in range(3)]
    task.held_out = task.batch(4)
    expected = benchmark.looking_back("higher", task, None)(small).lr
    for mode in ("torchopt", "1/exact", "all/exact", "auto"):
        found = benchmark.looking_back(mode, task, None)(small)
        assert relative_error(tensor(found.lr), tensor(expected)) < 2e-3, mode
        assert not found.note


def process(seconds: float, lr: list[float], *, megabytes: float = 10.0) -> dict[str, Any]:
    """What a measuring process reports."""
    return {
        "status": "measured", "seconds": [seconds], "fresh_seconds": [2 * seconds],
        "plain_seconds": [1.0], "bytes_above_plain": 1e6 * megabytes, "lr": lr,
        "differentiated": "lr", "evaluations": 4.0, "resolved": "", "note": "",
    }  # fmt: skip


def test_the_table_has_medians_ranges_and_reasons(benchmark: Any) -> None:
    found = {
        "plain": [process(1.0, [])],
        "higher": [process(s, [3.0, 4.0]) for s in (3.0, 5.0, 4.0)],
        "1/exact": [process(4.5, [3.0, 4.5])],
        "torchopt": [{"status": "skipped", "reason": "about 20 GB"}],
    }
    arguments = benchmark.parse_arguments(["--model", "gpt"])
    table = benchmark.table(2, benchmark.summarize(found), arguments)
    assert "| higher | lr | 4.00 (3.00–5.00) | 8.00 | 10 | 4.00 | 0 (reference) |" in table
    assert "| 1/exact | lr | 4.50 (4.50–4.50) | 9.00 | 10 | 4.00 | 1.0e-01 |" in table
    assert "| torchopt | skipped: about 20 GB |" in table


def test_a_process_reports_times_and_memory(benchmark: Any) -> None:
    arguments = ["--model", "mlp", "--steps", "3", "--alternations", "1", "--measure", "higher"]
    report = benchmark.measure("higher", benchmark.parse_arguments(arguments))
    json.dumps(report)
    assert report["status"] == "measured"
    assert len(report["seconds"]) == 1 and len(report["plain_seconds"]) == 2
    assert report["peak_bytes"][0] > 1e7 and len(report["lr"]) == 3


def test_budgets_are_shares_of_what_higher_took(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, float | None] = {}

    def run(mode: str, steps: int, unrolled: float | None, arguments: Any) -> dict[str, Any]:
        asked[f"{mode} {steps}"] = unrolled
        return process(2.0, [1.0] * steps, megabytes=100.0 * steps)

    monkeypatch.setattr(benchmark, "in_process", run)
    arguments = benchmark.parse_arguments(["--modes", "budget:1/3", "--limit-gb", "1.5"])
    memory_of: dict[str, tuple[int, float]] = {}
    benchmark.run_rounds(10, arguments, memory_of)
    assert asked["budget:1/3 10"] == 1e9
    found = benchmark.run_rounds(20, arguments, memory_of)
    assert found["higher"][0]["status"] == "skipped"  # 2 GB, judged by the K before
    assert asked["budget:1/3 20"] == 2e9


def test_a_mode_that_does_not_exist_is_refused(
    benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["--modes", "1/exactly"])
    assert "unknown mode '1/exactly'; the modes are: plain higher" in capsys.readouterr().err


def test_rows_that_are_there_are_not_run_again(tmp_path: Path) -> None:
    # By its path: there is a package of that name too.
    spec = importlib.util.spec_from_file_location("benchmarks_outcome", FOLDER / "outcome.py")
    assert spec is not None and spec.loader is not None
    outcome = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(outcome)
    path = tmp_path / "rows.jsonl"
    results = outcome.Results(outcome.Task("digits", steps=15), path)
    results.run(["constant"], [0.01, 0.1], [0, 1])
    results.run(["zero-probe-cosine"], [0.01], [100])
    lines = path.read_text().splitlines()
    assert len(lines) == 5
    again = outcome.Results(outcome.Task("nothing"), path)  # would fail, if it ran anything
    again.run(["constant"], [0.01, 0.1], [0, 1])
    again.run(["zero-probe-cosine"], [0.01], [100])
    assert path.read_text().splitlines() == lines
    assert again.best() == ("constant", 0.1)
    again.show()


def test_the_rows_behind_the_tables_are_of_methods_that_exist() -> None:
    from rhc.compare.methods import METHODS, method_of
    from rhc.compare.runs import Row

    method_of(f"{FOLDER / 'methods.py'}:no-average")  # those of the tables join the others
    files = sorted((FOLDER.parent / "docs" / "outcome").glob("*.jsonl"))
    assert files
    for file in files:
        rows = [Row(**json.loads(line)) for line in file.read_text().splitlines()]
        assert {row.method for row in rows} <= METHODS.keys()
        assert len({(row.method, row.lr, row.seed) for row in rows}) == len(rows)


def test_what_a_step_of_adaptive_rl_costs() -> None:
    sys.path.insert(0, str(FOLDER))
    try:
        causal = runpy.run_path(str(FOLDER / "causal.py"))
    finally:
        sys.path.remove(str(FOLDER))
    assert "ratio" in causal["overhead"]("mlp", 2, 2, 0.0)

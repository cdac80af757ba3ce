"""A table in time order: what a step trains on, what it watches, and what is told online."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from rhc.runners.stream import read_table, stream

from rhc import InputError, Rewrite, Runner, RunResult
from rhc.rng import seed_everything

ROWS = 16 * 24


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A label that follows one column, and then the other."""
    own = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 2, generator=own)
    label = (torch.where(torch.arange(ROWS) < ROWS // 2, x[:, 0], x[:, 1]) > 0).long()
    lines = [f"{a},{b},{c}" for (a, b), c in zip(x.tolist(), label.tolist(), strict=True)]
    path = tmp_path / "table.csv"
    path.write_text("\n".join(["a,b,target", *lines]))
    return path


def fitted(table: Path, **options: object) -> RunResult:
    seed_everything(0)
    workload = stream(data=table, batch_size=8)
    optimizer = torch.optim.SGD(workload.model.parameters(), 0.1)
    runner = Runner(
        workload.model, optimizer, workload.loss_fn, workload.train_loader, window=6, **options
    )
    return runner.fit(workload.steps)


def test_a_step_watches_rows_that_nothing_trains_on(table: Path) -> None:
    workload = stream(data=table, batch_size=8)
    assert workload.steps == ROWS // 16
    batches = [b for b, _ in zip(workload.train_loader, range(workload.steps + 1), strict=False)]
    rows = torch.cat([torch.stack([x, w], 1).flatten(0, 1) for x, _, w, _ in batches[:-1]])
    assert len(rows) == len(rows.unique(dim=0)) == ROWS
    assert all(map(torch.equal, batches[-1], batches[0])), "more steps begin it again"
    first = read_table(table)[:7, :-1]
    assert torch.allclose(rows[:7].mean(0), torch.zeros(2), atol=1e-6) and len(first) == 7
    _, metrics = workload.loss_fn(workload.model, batches[0])
    of_watched, _ = workload.loss_fn(workload.model, batches[0][2:])
    assert torch.equal(metrics["tracking"], of_watched)


def test_online_is_the_model_before_its_window_is_rewritten(table: Path) -> None:
    far = Rewrite(step={"lr": 1.5}, accept=False)
    rewritten = fitted(table, start="given", rewrite=far)
    plain = fitted(table, start="given", template="wsd", rewrite=False)
    rows = rewritten.tape
    for row, same in list(zip(rows, plain.tape, strict=True))[:6]:
        assert math.isclose(row["online_tracking"], same["tracking"], rel_tol=1e-5)
    assert rows[0]["online_tracking"] == pytest.approx(rows[0]["tracking"])
    assert any(abs(row["online_tracking"] - row["tracking"]) > 1e-3 for row in rows)
    for name in ("tracking", "online_tracking"):
        mean = sum(row[name] for row in rows) / len(rows)
        assert rewritten.record[name] == pytest.approx(mean)
    assert "online_tracking" not in plain.tape[0] and "online_tracking" not in plain.record


def test_an_lr_is_found_on_a_stream_without_validation(table: Path) -> None:
    assert math.isfinite(fitted(table, start="zero").record["tracking"])


@pytest.mark.parametrize(
    ("text", "words"),
    [("a,b\n1,x\n", "no table of numbers"), ("a,b\n1\n", "line 2"), ("a\n1\n", "two columns"),
     ("a,b\n1,inf\n", "not finite"), ("a,b\n1,2\n", "fewer than the 32")],
)  # fmt: skip
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        stream(data=path)
    with pytest.raises(InputError, match="needs a table"):
        stream()

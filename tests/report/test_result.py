"""What fit returns is looked at as people do, and they are told while it trains."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rhc
from rhc.report import callbacks


def run(**settings: Any) -> rhc.Runner:
    torch.manual_seed(0)
    x = torch.randn(96, 4)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    model = nn.Linear(4, 1)

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        return loss, {"size": loss.sqrt()}

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loaders = DataLoader(TensorDataset(*data[:64]), 16, shuffle=True), DataLoader(data, 32)
    return rhc.Runner(model, optimizer, loss_fn, *loaders, window=5, **settings)


@pytest.fixture(scope="module")
def result() -> rhc.RunResult:
    return run(validate_every=10).fit(20)


def test_a_result_is_a_short_table(result: rhc.RunResult) -> None:
    lines = repr(result).splitlines()
    assert len(lines) == 4 and len(repr(result)) < 500
    assert "20 steps" in lines[0] and "val loss" in lines[1] and "val size" in lines[1]
    assert f"{result.val_loss:.4f}" in lines[2]
    assert "<table>" in result._repr_html_() and f"{result.val_loss:.4f}" in result._repr_html_()


def test_a_result_in_memory_has_a_report(
    result: rhc.RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jinja2", reason="the extra `report` is not installed")
    monkeypatch.chdir(tmp_path)
    assert result.report().resolve() == tmp_path / "report.html"
    page = re.sub(r"</?abbr[^>]*>", "", result.report("page.html").read_text())
    assert "Why did it start at" in page and result.answers()["Where did the cost go?"] in page


def test_a_result_is_a_frame_and_a_figure(result: rhc.RunResult) -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = result.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and list(frame.index) == list(range(20))
    assert frame["loss"].tolist() == [row["loss"] for row in result.tape]
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    axes = result.plot().axes
    assert [axis.get_ylabel() for axis in axes] == ["loss", "lr", "momentum"]


@pytest.mark.parametrize("method, package", [("plot", "matplotlib"), ("to_pandas", "pandas")])
def test_what_is_missing_is_named(
    result: rhc.RunResult, method: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (package, f"{package}.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(rhc.InputError, match=f"needs {package}; pip install"):
        getattr(result, method)()


def test_callbacks_are_told_of_what_is_committed() -> None:
    told: dict[str, list[Any]] = {name: [] for name in callbacks.HOOKS}
    hooks = SimpleNamespace(**{name: kept.append for name, kept in told.items()})
    result = run(validate_every=10, callbacks=[hooks]).fit(20)
    assert told["on_step"] == result.tape
    assert [row["step"] for row in told["on_validate"]] == [9, 19]
    assert [window["start"] for window in told["on_window"]] == [0, 5, 10, 15]
    attempts = [each for window in told["on_window"] for each in window["attempts"]]
    assert attempts == result.windows and all(window["why"] for window in told["on_window"])
    assert len(told["on_start"]) == 1 and told["on_end"] == [result.record]


def test_a_callback_changes_nothing_and_one_without_hooks_is_refused() -> None:
    class Rude(rhc.Callback):
        def on_step(self, row: Any) -> None:
            row.clear()

    assert run(callbacks=[Rude()]).fit(10).tape == run().fit(10).tape
    with pytest.raises(rhc.InputError, match="must have one of on_start, on_step"):
        run(callbacks=[object()])


def test_progress_is_shown_in_a_terminal_alone_unless_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run().fit(10)
    assert capsys.readouterr().out == ""
    run(progress=True).fit(10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("run: 10 steps") and any(line.startswith("why ") for line in lines)
    assert not any(isinstance(each, callbacks.Shown) for each in run().listeners)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert any(isinstance(each, callbacks.Shown) for each in run().listeners)
    assert not any(isinstance(each, callbacks.Shown) for each in run(progress=False).listeners)
    assert not any(isinstance(each, callbacks.Shown) for each in run(listeners=[print]).listeners)

"""The tape of a loop of one's own: what it records, and that it is a run like others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rhc
from rhc.cli.main import main
from rhc.errors import InputError
from rhc.report.records import read_run


def optimizer(groups: int = 1) -> torch.optim.Optimizer:
    layers = [{"params": nn.Linear(1, 1).parameters(), "lr": 0.1 * (i + 1)} for i in range(groups)]
    return torch.optim.SGD(layers, momentum=0.9)


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "tape.jsonl").read_text().splitlines()]


def test_steps_are_recorded_with_the_controls_that_they_were_taken_with(tmp_path: Path) -> None:
    own = optimizer(2)
    halved = torch.optim.lr_scheduler.StepLR(own, 1, 0.5)
    tape = rhc.LoopTape(tmp_path / "run", own, halved, steps=25, seed=3)
    for step in range(25):
        own.step()
        halved.step()
        reward = {"reward": torch.tensor(2.0)} if step == 3 else {}
        tape.step(torch.tensor(1.5), metrics={"accuracy": step / 25, "loss": 7.0}, **reward)
        assert len(tape.rows) == 0 and len(rows_of(tmp_path / "run")) == (20 if step >= 19 else 0)
    tape.close(test_loss=0.25)
    rows = rows_of(tmp_path / "run")
    assert rows[1] == {
        "step": 1, "loss": 1.5, "lr": [0.05, 0.1], "momentum": 0.9, "accuracy": 0.04
    }  # fmt: skip
    assert [row["step"] for row in rows] == list(range(25)) and rows[3]["reward"] == 2.0
    run = read_run(tmp_path / "run")
    assert (run.config["scheduler"], run.config["seed"]) == ("StepLR", 3)
    assert (run.result["train_loss"], run.result["test_loss"]) == (1.5, 0.25)
    own.step()  # closed: the optimizer is left alone
    assert len(rows_of(tmp_path / "run")) == 25


def test_a_scheduler_says_what_it_saw(tmp_path: Path) -> None:
    own = optimizer()
    scheduler = rhc.AdaptiveRL(own, every=5, noise=0.02)
    with rhc.LoopTape(tmp_path / "run", own, scheduler) as tape:
        for step in range(40):
            own.step()
            scheduler.step(40.0 - step, float(step))
            tape.step(40.0 - step, float(step))
    rows = rows_of(tmp_path / "run")
    values = scheduler.values
    assert {n: rows[-1][n] for n in ("loss_trend", "reward_trend", "plateau")} == {
        n: values[n] for n in ("loss_trend", "reward_trend", "plateau")
    }
    assert rows[0]["noise"] == 0.02 and rows[0]["lr"] == rows[4]["lr"] == 0.1
    assert rows[5]["noise"] != 0.02
    planned = optimizer()
    planner = rhc.EpochPlanner(planned)
    with rhc.LoopTape(None, planned, planner) as tape:
        planned.step()
        tape.step(1.0)
    assert tape.rows == [{"step": 0, "loss": 1.0, "lr": 0.1, "momentum": 0.9, "noise": 0.0}]


def test_a_resumed_loop_continues_its_tape(tmp_path: Path) -> None:
    for start, steps in ((0, 45), (30, 5)):
        with rhc.LoopTape(tmp_path / "run", optimizer(), start=start) as tape:
            for step in range(steps):
                tape.step(float(start + step))
    assert [row["loss"] for row in rows_of(tmp_path / "run")] == [float(i) for i in range(35)]
    with rhc.LoopTape(tmp_path / "run", optimizer()) as tape:
        tape.step(9.0)
    assert [row["loss"] for row in rows_of(tmp_path / "run")] == [9.0]


def test_it_is_a_run_for_every_command_but_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tape = rhc.LoopTape("runs/mine", optimizer(), steps=3)
    for _ in range(3):
        tape.step(1.0)
    tape.flush()
    assert main(["inspect", "runs/mine"]) == 0
    shown = capsys.readouterr().out
    assert "at step 3 of 3" in shown and "a loop of a script, sgd, 3 steps" in shown
    assert main(["runs"]) == 0
    assert "runs/mine  at step 3 of 3" in capsys.readouterr().out
    tape.close(val_loss=0.5)
    for command in ("inspect", "watch"):
        assert main([command, "runs/mine"]) == 0
        assert "0.5000" in capsys.readouterr().out
    assert main(["resume", "runs/mine"]) == 2
    assert "without a checkpoint; run the script again" in capsys.readouterr().err


def test_a_loop_that_fails_leaves_its_tape(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), rhc.LoopTape(tmp_path / "run", optimizer()) as tape:
        tape.step(1.0)
        raise ZeroDivisionError
    assert len(rows_of(tmp_path / "run")) == 1 and not read_run(tmp_path / "run").result


def test_another_run_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"run": "digits"}')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tape.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    for directory in (tmp_path, tmp_path / "other"):
        with pytest.raises(InputError, match="holds another run, which is not overwritten"):
            rhc.LoopTape(directory, optimizer())
    with pytest.raises(InputError, match="cannot be written"):
        rhc.LoopTape(tmp_path / "file", optimizer())
    assert json.loads((tmp_path / "config.json").read_text()) == {"run": "digits"}

"""A schedule followed by a run that did not write it: other seeds, lengths, sizes, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import make_run, plain_loop, state_of

from rhc import InputError, Runner, Schedule
from rhc.cli.main import main
from rhc.cli.replay import rescaling
from rhc.loop.fit import Fit
from rhc.loop.state import Attempt, Window
from rhc.loop.windows import commit


@pytest.fixture(scope="module")
def cosine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 60 steps that nothing was rewritten in."""
    directory = tmp_path_factory.mktemp("runs") / "cosine"
    arguments = "train digits --no-rewrite --template cosine --lr 0.1 --steps 60 --window 30"
    assert main([*arguments.split(), "--directory", str(directory)]) == 0
    return directory


# The schedule as a value --------------------------------------------------------------------------


def test_stretching_keeps_the_shape_and_the_ends() -> None:
    lr = torch.linspace(-1, -5, 101, dtype=torch.float64).exp()
    schedule = Schedule({"lr": lr, "momentum": torch.full((101,), 0.9, dtype=torch.float64)})
    longer = schedule.stretched(1010)
    assert len(longer) == 1010
    torch.testing.assert_close(longer["lr"][5::10], lr[0:], rtol=0.03, atol=0)
    assert torch.equal(longer["momentum"], torch.full((1010,), 0.9, dtype=torch.float64))
    assert float(longer["lr"][0]) == float(lr[0])
    assert float(longer["lr"][-1]) == float(lr[-1])
    assert schedule.stretched(101) is schedule


def test_a_step_between_two_values_is_their_geometric_mean() -> None:
    assert Schedule({"lr": [0.1, 0.001]}).stretched(3)["lr"][1] == pytest.approx(0.01)
    half = Schedule({"momentum": [0.2, 0.8]}).stretched(3)["momentum"][1]
    assert float(half) == pytest.approx(0.5)


def test_zeros_and_groups_are_stretched_too() -> None:
    schedule = Schedule({"noise": [0.0, 0.1], "lr": [[0.1, 0.0], [0.2, 0.0]]})
    longer = schedule.stretched(4)
    assert longer["noise"].tolist() == [0.0, 0.0, 0.1, 0.1]
    assert longer["lr"].shape == (4, 2)
    assert not longer["lr"][:, 1].any()


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=20), st.integers(1, 60))
def test_stretched_values_stay_between_the_old_ones(values: list[float], steps: int) -> None:
    longer = Schedule({"lr": values}).stretched(steps)["lr"]
    assert len(longer) == steps
    assert float(longer.min()) >= min(values) * (1 - 1e-9)
    assert float(longer.max()) <= max(values) * (1 + 1e-9)


def test_rescaling_one_control() -> None:
    schedule = Schedule({"lr": [0.1, 0.0], "momentum": [0.5, 0.5]}).rescaled(2)
    assert schedule["lr"].tolist() == [0.2, 0.0]
    assert schedule["momentum"].tolist() == [0.5, 0.5]
    assert float(schedule.rescaled(3, "momentum")["momentum"][0]) == pytest.approx(0.75)
    assert float(schedule.rescaled(1e9)["lr"][0]) == 10.0  # the bound of lr
    with pytest.raises(InputError, match="the schedule has no noise"):
        schedule.rescaled(2, "noise")
    with pytest.raises(InputError, match="factor must be > 0"):
        schedule.rescaled(0)


@pytest.mark.parametrize(
    ("rule", "factor"), [("none", 1), ("linear", 4), ("sqrt", 2), ("width", 1 / 3)]
)
def test_rules_of_rescaling(rule: str, factor: float) -> None:
    found, why = rescaling(rule, {"batch_size": 16, "width": 1}, {"batch_size": 64, "width": 3})
    assert found == pytest.approx(factor)
    assert why.startswith(rule)
    if rule != "none":
        assert f"{factor:.4g}" in why


# The Runner ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_following_is_the_plain_loop_with_the_schedule(optimizer: str) -> None:
    lr = torch.linspace(-2, -4, 25, dtype=torch.float64).exp()
    schedule = Schedule({"lr": lr, "noise": torch.full((25,), 0.01)})
    mine = make_run(optimizer, seed=3)
    Runner(*mine, rewrite=False, schedule=schedule).fit(25)
    ours = state_of(mine)
    plain = make_run(optimizer, seed=3)
    plain_loop(plain, 25, schedule)
    theirs = state_of(plain)
    for name, value in theirs["model"].items():
        assert torch.equal(ours["model"][name], value), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "use it with rewrite=False"),
        ({"rewrite": False, "template": "cosine"}, "without start, template"),
        ({"rewrite": False, "schedule": Schedule({"lr": [0.1]}, start=5)}, "start at step 0"),
    ],
)
def test_schedules_that_a_runner_cannot_follow(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Runner(*make_run(), **{"schedule": Schedule({"lr": [0.1] * 9}), **settings})


def test_a_schedule_that_is_too_short_or_of_other_groups() -> None:
    with pytest.raises(InputError, match="9 steps, fewer than the run's 10; stretch it"):
        Runner(*make_run(), rewrite=False, schedule=Schedule({"lr": [0.1] * 9})).fit(10)
    with pytest.raises(InputError, match="2 parameter groups"):
        Runner(*make_run(), rewrite=False, schedule=Schedule({"lr": [[0.1, 0.2]] * 9}))


# The command --------------------------------------------------------------------------------------


def test_the_same_seed_repeats_the_run_bit_for_bit(
    cosine: Path, call: Callable[..., Any], tmp_path: Path
) -> None:
    status, out, _ = call("replay", cosine, "--directory", tmp_path / "again")
    assert status == 0
    assert "all 60 steps" in out
    for name in ("tape.jsonl", "schedule.json"):
        assert (tmp_path / "again" / name).read_bytes() == (cosine / name).read_bytes()
    result = json.loads((tmp_path / "again" / "result.json").read_text())
    assert result["cost"]["plain_run_equivalents"] == 1.0
    assert result["test_loss"] == json.loads((cosine / "result.json").read_text())["test_loss"]


def test_a_run_that_ended_with_its_best_state_is_repeated_to_there(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    noisy = tmp_path / "noisy.py"
    noisy.write_text(
        "import torch\n"
        "from runners.digits import digits\n"
        "def noisy(*, seed=0, data=None):\n"
        "    workload = digits(seed=seed)\n"
        "    labels = workload.train_loader.dataset.tensors[1]\n"
        "    own = torch.Generator().manual_seed(0)\n"
        "    labels[::2] = torch.randint(10, labels[::2].shape, generator=own)\n"
        "    return workload\n"
    )
    train = "--lr 0.1 --no-rewrite --steps 150 --window 10 --validate-every 10 --keep-best"
    assert call("train", noisy, *train.split(), "--directory", tmp_path / "run")[0] == 0
    assert call("replay", tmp_path / "run", "--trust", "--directory", tmp_path / "again")[0] == 0
    first, again = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "again")
    )
    assert first["ends_with"] == "best" and first["best_step"] < 150
    for name in ("best_step", "ends_with", "test_loss", "last_test_loss"):
        assert again[name] == first[name]


def test_another_seed_batch_size_and_length(
    cosine: Path, call: Callable[..., Any], tmp_path: Path
) -> None:
    arguments = "--seed 5 --steps 90 --stretch --batch-size 128 --rescale linear"
    status, out, _ = call("replay", cosine, *arguments.split(), "--directory", tmp_path / "b")
    assert status == 0
    assert "stretched from 60 to 90 steps" in out
    assert "linear: lr x 2, batch size 64 -> 128" in out
    schedule = Schedule.load(tmp_path / "b" / "schedule.json")
    expected = Schedule.load(cosine / "schedule.json").stretched(90).rescaled(2)
    assert torch.equal(schedule["lr"], expected["lr"])
    tape = (tmp_path / "b" / "tape.jsonl").read_text().splitlines()
    assert len(tape) == 90
    assert json.loads(tape[7])["lr"] == float(expected["lr"][7])
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["replay"]["factor"] == 2
    assert config["batch_size"] == 128


def test_a_wider_model(cosine: Path, call: Callable[..., Any], tmp_path: Path) -> None:
    command = ("replay", cosine / "schedule.json", "digits", "--width", 2, "--rescale", "width")
    assert call(*command, "--steps", 20, "--directory", tmp_path / "w")[0] == 0
    config = json.loads((tmp_path / "w" / "config.json").read_text())
    assert config["parameters"] == 64 * 256 + 256 + 256 * 10 + 10
    first = json.loads((tmp_path / "w" / "tape.jsonl").read_text().splitlines()[0])
    assert first["lr"] == 0.05


def test_a_file_alone_and_the_optimizer_that_is_asked_for(
    cosine: Path, call: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copy(cosine / "schedule.json", tmp_path / "mine.json")
    status, _, err = call("replay", tmp_path / "mine.json")
    assert (status, "name the RUN too" in err) == (2, True)
    command = ("replay", tmp_path / "mine.json", "sine", "--optimizer", "adam", "--steps", 10)
    status, out, _ = call(*command, "--directory", tmp_path / "s")
    assert status == 0
    assert "the first 10 steps of 60" in out
    assert json.loads((tmp_path / "s" / "config.json").read_text())["optimizer"] == "adam"


def test_a_replay_that_was_stopped_goes_on_bit_for_bit(
    cosine: Path,
    call: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def command(name: str) -> tuple[Any, ...]:
        return ("replay", cosine, "--seed", 2, "--batch-size", 32, "--directory", tmp_path / name)

    assert call(*command("whole"))[0] == 0

    def stopped(fit: Fit, window: Window, attempt: Attempt) -> None:
        if window.commit > 50:
            raise KeyboardInterrupt
        commit(fit, window, attempt)

    monkeypatch.setattr("rhc.loop.train.commit", stopped)
    assert call(*command("cut"))[0] == 130
    monkeypatch.undo()
    assert call("resume", tmp_path / "cut")[0] == 0
    for name in ("tape.jsonl", "schedule.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert "holds this run, finished" in call(*command("cut"))[1]
    status, _, err = call(*command("cut"), "--steps", 40)
    assert (status, "belongs to another configuration" in err) == (2, True)


def test_a_plan_that_was_not_run_to_its_end_is_said(
    cosine: Path, call: Callable[..., Any], tmp_path: Path
) -> None:
    shutil.copytree(cosine, tmp_path / "half")
    lines = (tmp_path / "half" / "tape.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "half" / "tape.jsonl").write_text("".join(lines[:30]))
    out = call("replay", tmp_path / "half", "--directory", tmp_path / "r")[1]
    assert "has not ended: from step 30 it is a plan" in out


def test_a_lr_that_diverges_ends_with_status_1_and_a_mend(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    Schedule.constant(60, lr=10.0).save(tmp_path / "high.json")
    status, _, err = call(
        "replay", tmp_path / "high.json", "sine", "--directory", tmp_path / "high"
    )
    assert status == 1
    assert "a schedule with a lower lr" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 61", "has 60 steps, fewer than the run's 61; add --stretch"),
        ("--steps 0", "steps must be ≥ 1, got 0"),
        ("--stretch", "stretch needs a length; give --steps T too"),
        ("--rescale linear", "give --batch-size B or leave --rescale out"),
        ("--rescale width", "give --width N"),
        ("--rescale cube", "rescale must be one of none, linear, sqrt, width"),
        ("--seed -1", "seed must be in"),
        ("--batch-size 0", "batch_size must be ≥ 1"),
        ("--data nowhere", "data nowhere does not exist"),
        ("ill_scaled --width 2", "has no width of its own choosing"),
        ("--batch-size 5000", "yields no batches"),
    ],
)
def test_what_a_replay_refuses(
    cosine: Path, call: Callable[..., Any], tmp_path: Path, arguments: str, message: str
) -> None:
    words = arguments.split()
    status, _, err = call("replay", cosine, *words, "--directory", tmp_path / "x")
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "x" / "tape.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; give a schedule.json"),
        ("[1, 2]", "is not a schedule written by rhc"),
        ('{"format": "rhc.schedule", "version": 9}', "has schedule version 9"),
        ("{", "is not valid JSON"),
    ],
)
def test_files_that_are_no_schedule(
    call: Callable[..., Any], tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "s.json").write_text(content)
    status, _, err = call("replay", tmp_path / "s.json", "digits")
    assert (status, message in err) == (2, True), err
    (tmp_path / "empty").mkdir()
    assert "has no schedule.json" in call("replay", tmp_path / "empty", "digits")[2]

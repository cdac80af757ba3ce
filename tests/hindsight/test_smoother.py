"""The two-pass smoother: it knows the future, keeps its bounds, and what is better is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rhc import AdaptiveRL, Gains, InputError, Schedule
from rhc.hindsight import USUAL_GAINS, Pass, Smoother, Tape, held_out, reward_of, smooth
from rhc.hindsight.smoother import AGAINST, data_changed
from rhc.loop.fit import Fit
from rhc.loop.state import Attempt, Window
from rhc.loop.windows import commit
from rhc.workload import Goal

STEPS = 200
FALLING = [math.exp(-t / 60) + 0.1 for t in range(STEPS)]


def schedule_of(losses: list[float], **settings: Any) -> Schedule:
    probe = Schedule.constant(len(losses), lr=0.01, momentum=0.9, noise=0.0)
    return Smoother(**settings).schedule(Tape(losses), probe)


# What is known when -------------------------------------------------------------------------------


@pytest.mark.parametrize("baseline", [True, False])
def test_the_schedule_of_a_step_depends_on_what_comes_after_it(baseline: bool) -> None:
    later = list(FALLING)
    for t in range(120, 140):
        later[t] += 1.0
    before = schedule_of(FALLING, baseline=baseline)["lr"]
    after = schedule_of(later, baseline=baseline)["lr"]
    assert not torch.equal(before[:100], after[:100])


def test_that_of_adaptive_rl_does_not() -> None:
    def lrs(losses: list[float]) -> list[float]:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01, momentum=0.9)
        scheduler, found = AdaptiveRL(optimizer), []
        for loss in losses:
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step(loss)
        return found

    later = FALLING[:120] + [x + 1.0 for x in FALLING[120:]]
    assert lrs(FALLING)[:121] == lrs(later)[:121]
    assert lrs(FALLING)[160:] != lrs(later)[160:]


def test_the_estimate_has_no_lag() -> None:
    """Read backwards, a tape gives the same trends backwards, with the other sign."""
    smoother = Smoother(every=10, baseline=False)
    bumps = [math.sin(t / 17) + 0.3 * math.cos(t / 5) for t in range(STEPS)]
    forwards = [t.loss for t in smoother.trends(Tape(bumps))]
    backwards = [t.loss for t in smoother.trends(Tape(bumps[::-1]))]
    assert forwards == pytest.approx([-x for x in backwards[::-1]], abs=1e-12)
    plateaus = [t.plateau for t in smoother.trends(Tape(bumps))]
    assert any(plateaus)
    # A jump is seen as far before it as after it.
    jump = [0.0] * 100 + [1.0] * 100
    seen = [t.loss for t in smoother.trends(Tape(jump))]
    assert seen == pytest.approx(seen[::-1], abs=1e-12)
    assert seen[9] == max(seen) > seen[0]  # the block that begins at step 100


def test_progress_above_the_usual_raises_and_below_it_lowers() -> None:
    lr = schedule_of(FALLING)["lr"]
    assert float(lr[60]) > 0.01
    assert float(lr[-1]) < 0.01
    assert torch.equal(lr[:20], torch.full((20,), 0.01, dtype=torch.float64))
    without = schedule_of(FALLING, baseline=False)["lr"]
    assert bool((without[1:] >= without[:-1]).all())


# Bounds and scales --------------------------------------------------------------------------------


@given(
    st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=120),
    st.floats(1e-5, 0.1),
)
def test_whatever_the_tape_says_the_bounds_hold(losses: list[float], lr: float) -> None:
    probe = Schedule.constant(len(losses), lr=lr, momentum=0.9, noise=0.0)
    law = Smoother(3, ("lr", "momentum", "noise"), Gains(5, 5, 5, 5, 5, 5))
    found = law.schedule(Tape(losses), probe)
    assert 1e-5 <= float(found["lr"].min()) <= float(found["lr"].max()) <= 0.1
    assert 0.6 <= float(found["momentum"].min()) <= float(found["momentum"].max()) <= 0.995
    assert float(found["noise"].max()) <= 0.2


def test_momentum_moves_by_default_and_noise_where_it_is_asked_for() -> None:
    losses = [0.3 + math.exp(-t / 20) + 0.05 * math.sin(9 * t * t) for t in range(400)]
    found = schedule_of(losses)
    assert float(found["momentum"].max()) > 0.9 > float(found["momentum"][-1])
    assert not found["noise"].any()
    every = schedule_of(losses, controls=("lr", "momentum", "noise"))
    assert torch.equal(every["momentum"], found["momentum"])
    assert not every["noise"][:40].any() and every["noise"][-1] > 1e-3  # it starts on the plateau
    alone = schedule_of(losses, controls=("noise",))
    assert torch.equal(alone["noise"], every["noise"])
    assert bool((alone["lr"] == 0.01).all()) and bool((alone["momentum"] == 0.9).all())
    backwards = schedule_of(losses, controls=("momentum",), gains=USUAL_GAINS.times(-1))
    moved = found["momentum"].logit() - math.log(9)
    torch.testing.assert_close(backwards["momentum"].logit() - math.log(9), -moved)


@pytest.mark.parametrize("loss", [1000.0, 0.7, 1e-6, 0.0])
def test_a_constant_loss_is_a_plateau_whatever_its_value(loss: float) -> None:
    found = {t.plateau for t in Smoother().trends(Tape([loss] * 120))}
    assert len(found) == 1 and found.pop() > 0.97
    # Also after a descent, where the mean approaches it for ever.
    after = [loss + max(loss, 1.0) * math.exp(-min(t, 100) / 20) for t in range(600)]
    scores = [t.plateau for t in Smoother().trends(Tape(after))]
    assert scores[0] < 0.01 and scores[-1] > 0.9


def test_units_do_not_matter() -> None:
    thousand = schedule_of([1000 * x for x in FALLING])
    torch.testing.assert_close(schedule_of(FALLING)["lr"], thousand["lr"], rtol=1e-9, atol=0)


def test_no_step_of_the_walk_goes_beyond_the_cap() -> None:
    lr = schedule_of(FALLING, gains=Gains(9, 9))["lr"]
    ratios = lr[20:] / lr[:-20]
    assert float(ratios.max()) <= 1.25 + 1e-9
    assert float(ratios.min()) >= 0.8 - 1e-9


def test_what_was_not_finite_lowers_the_lr_where_it_was() -> None:
    broken = list(FALLING)
    broken[105] = math.nan
    lr, usual = schedule_of(broken)["lr"], schedule_of(FALLING)["lr"]
    assert float(lr[100]) == pytest.approx(float(usual[100]) / 2, rel=0.05)
    norms = [1.0] * STEPS
    norms[105] = math.inf
    probe = Schedule.constant(STEPS, lr=0.01)
    exploded = Smoother().schedule(Tape(FALLING, None, norms), probe)["lr"]
    assert float(exploded[100]) == pytest.approx(float(usual[100]) / 2)


def test_a_template_is_moved_and_groups_keep_their_ratios() -> None:
    lr = torch.linspace(0.1, 1e-7, STEPS, dtype=torch.float64)
    probe = Schedule({"lr": torch.stack([lr, lr / 10], 1), "weight_decay": torch.zeros(STEPS)})
    found = Smoother().schedule(Tape(FALLING), probe)
    assert torch.equal(found["lr"][:20], probe["lr"][:20])
    ratio = found["lr"] / probe["lr"]
    inside = slice(40, 150)  # of the bounds, which the two reach at different steps
    torch.testing.assert_close(ratio[inside, 0], ratio[inside, 1])
    assert float(found["lr"][-1].min()) <= 1e-7  # not pulled up to the bound
    assert not found["weight_decay"].any()


def test_a_reward_that_rises_raises_lr() -> None:
    probe = Schedule.constant(STEPS, lr=0.01)
    rewards = [-x for x in FALLING]  # rises, and ever more slowly
    flat = [1.0] * STEPS
    found = Smoother(source="reward").schedule(Tape(flat, rewards), probe)["lr"]
    assert float(found[60]) > 0.01
    found = Smoother(source="reward", baseline=False).schedule(Tape(flat, rewards), probe)["lr"]
    assert float(found[-1]) > float(found[60]) > 0.01
    falling = [-r for r in rewards]
    found = Smoother(source="both", baseline=False).schedule(Tape(flat, falling), probe)["lr"]
    assert float(found[-1]) < 0.01
    ignored = Smoother(source="loss").schedule(Tape(flat, rewards), probe)["lr"]
    assert torch.equal(ignored, probe["lr"])


def test_tapes_that_cannot_be_used() -> None:
    with pytest.raises(InputError, match="needs a reward, and the tape has none; return a metric"):
        Smoother(source="reward").trends(Tape(FALLING))
    with pytest.raises(InputError, match="the tape has 200 steps and the schedule 3"):
        Smoother().schedule(Tape(FALLING), Schedule.constant(3, lr=0.1))
    with pytest.raises(InputError, match="the tape is empty"):
        Tape.of([])
    with pytest.raises(InputError, match="controls must be some of lr, momentum, noise, got x"):
        Smoother(controls=("x",))
    with pytest.raises(InputError, match="gain momentum_loss must be finite, got nan"):
        Gains(momentum_loss=math.nan)
    with pytest.raises(InputError, match="source must be one of"):
        Smoother(source="x")
    with pytest.raises(InputError, match="every must be ≥ 1"):
        Smoother(every=0)


# Passes -------------------------------------------------------------------------------------------


def test_passes_start_from_the_best_and_turn_round_after_a_failure() -> None:
    seen: list[Schedule] = []

    def train(number: int, schedule: Schedule | None) -> Pass:
        schedule = schedule or Schedule.constant(STEPS, lr=0.01)
        seen.append(schedule)
        rows = [{"loss": x} for x in FALLING]
        return Pass(schedule, rows, [1.0, 2.0, 0.5, 0.7][number])

    runs, best = smooth(train, Smoother(), 3)
    assert len(runs) == 4
    assert best == 2
    first, second = (s["lr"][80].log() - math.log(0.01) for s in seen[1:3])
    assert float(first) > 0 > float(second)
    on_top = seen[3]["lr"][80].log() - seen[2]["lr"][80].log()
    assert float(on_top) == pytest.approx(float(second))
    with pytest.raises(InputError, match="passes must be ≥ 1"):
        smooth(train, Smoother(), 0)


def test_where_the_data_change_the_first_pass_goes_the_other_way() -> None:
    jumps = [0.05 + math.exp(-(t % 100) / 15) for t in range(STEPS)]
    assert data_changed(Tape(jumps))
    assert not data_changed(Tape(FALLING))
    noisy = [x * (1 + 0.3 * math.sin(37 * t * t)) for t, x in enumerate(FALLING)]
    assert not data_changed(Tape(noisy))
    assert AGAINST < 0
    seen: list[Schedule] = []

    def train(number: int, schedule: Schedule | None) -> Pass:
        seen.append(schedule or Schedule.constant(STEPS, lr=0.01, momentum=0.9))
        return Pass(seen[-1], [{"loss": x} for x in jumps], 1.0)

    smooth(train, Smoother(), 1)
    assert float(seen[1]["lr"][100]) > float(seen[1]["lr"][60])
    assert bool((seen[1]["momentum"] == 0.9).all())
    smooth(train, Smoother(controls=("momentum",)), 1)
    assert float(seen[3]["momentum"].max()) > 0.9 and bool((seen[3]["lr"] == 0.01).all())


def test_what_a_run_is_judged_by() -> None:
    rows = [{"loss": 1.0, "reward": 2.0}, {"loss": 3.0, "reward": None}]
    assert held_out({"val_loss": 0.25}, rows) == 0.25
    assert held_out({"val_loss": math.nan}, rows) == math.inf
    assert held_out({"val_loss": None}, rows) == -2.0
    assert held_out({"val_loss": None}, [{"loss": 1.0}, {"loss": 3.0}]) == 2.0
    assert held_out({"val_loss": None}, [{"loss": 1.0}, {"loss": None}]) == math.inf
    # A goal comes before a loss, which in reinforcement learning says nothing.
    played = [{"loss": 1.0, "return": x} for x in (1.0, 5.0, 7.0)]
    assert held_out({"val_loss": 0.2}, played, Goal("return", over=2, higher=True)) == -6.0
    assert held_out({"val_loss": 0.2}, played, Goal("loss", over=2, last=False)) == 1.0
    assert reward_of(Goal("return", over=2, higher=True)) == "return"
    assert reward_of(Goal("tracking", over=2)) == reward_of(None) == "reward"
    assert Tape.of(played, "return").rewards == [1.0, 5.0, 7.0]
    assert not data_changed(Tape([1.0, 9.0, 1.0, 9.0] * 20, [1.0] * 80))


# The command --------------------------------------------------------------------------------------


def test_one_pass_costs_two_plain_runs_and_leaves_a_run(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    directory = tmp_path / "s"
    status, out, _ = call("smooth", "sine", "--steps", 120, "--directory", directory)
    assert status == 0
    assert "2.00 plain runs" in out
    result = json.loads((directory / "result.json").read_text())
    assert result["cost"]["plain_run_equivalents"] == 2.0
    assert result["cost"]["gradient_evaluations"] == 240
    assert result["cost"]["hessian_products"] == 0
    held = [row["held_out"] for row in result["passes"]]
    kept = [row["kept"] for row in result["passes"]]
    assert kept.index(True) == held.index(min(held))
    assert result["val_loss"] == min(held)
    best = directory / f"pass-{kept.index(True)}"
    assert (directory / "schedule.json").read_bytes() == (best / "schedule.json").read_bytes()
    # The second run is the smoother's, step by step.
    rows = [json.loads(x) for x in (directory / "pass-0" / "tape.jsonl").read_text().splitlines()]
    probe = Schedule.load(directory / "pass-0" / "schedule.json")
    expected = Smoother().schedule(Tape.of(rows), probe)
    written = Schedule.load(directory / "pass-1" / "schedule.json")
    assert torch.equal(written["lr"], expected["lr"])
    assert torch.equal(written["momentum"], expected["momentum"])
    taped = (directory / "pass-1" / "tape.jsonl").read_text().splitlines()
    assert [json.loads(x)["lr"] for x in taped] == expected["lr"].tolist()
    # The probe and the rerun begin at the same place.
    assert json.loads(taped[0])["loss"] == rows[0]["loss"]
    assert call("inspect", directory)[0] == 0
    again = call("replay", directory, "--seed", 3, "--steps", 20, "--directory", tmp_path / "r")
    assert again[0] == 0


def test_a_smoothing_that_was_stopped_goes_on(
    call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(name: str) -> tuple[Any, ...]:
        options = "smooth sine --steps 90 --passes 2 --template cosine --lr 0.05"
        return (*options.split(), "--directory", tmp_path / name)

    assert call(*command("whole"))[0] == 0
    seen = []

    def stopped(fit: Fit, window: Window, attempt: Attempt) -> None:
        seen.append(window)
        if len(seen) == 4:  # in the second run
            raise KeyboardInterrupt
        commit(fit, window, attempt)

    monkeypatch.setattr("rhc.loop.train.commit", stopped)
    assert call(*command("cut"))[0] == 130
    monkeypatch.undo()
    status, _, err = call("resume", tmp_path / "cut" / "pass-0")
    assert status == 2
    assert "is one run of" in err
    assert call("resume", tmp_path / "cut")[0] == 0
    for name in ("schedule.json", "tape.jsonl", "pass-2/tape.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert "holds this, finished" in call(*command("cut"))[1]
    status, _, err = call(*command("cut"), "--seed", 9)
    assert (status, "belongs to another configuration (seed was 0, is 9)" in err) == (2, True)


def test_gains_are_flags_and_are_resumed(call: Callable[..., Any], tmp_path: Path) -> None:
    line = "smooth sine --steps 90 --controls momentum noise --momentum-reward 0.1 --noise-reward 0"
    assert call(*line.split(), "--directory", tmp_path / "s")[0] == 0
    record = json.loads((tmp_path / "s" / "config.json").read_text())["smooth"]
    assert record["controls"] == ["momentum", "noise"]
    assert (record["momentum_reward"], record["noise_reward"]) == (0.1, 0.0)
    probe, written = (
        Schedule.load(tmp_path / "s" / name / "schedule.json") for name in ("pass-0", "pass-1")
    )
    lines = (tmp_path / "s" / "pass-0" / "tape.jsonl").read_text().splitlines()
    gains = replace(USUAL_GAINS, momentum_reward=0.1, noise_reward=0.0)
    law = Smoother(controls=("momentum", "noise"), gains=gains)
    expected = law.schedule(Tape.of([json.loads(row) for row in lines]), probe)
    for name in ("lr", "momentum", "noise"):
        assert torch.equal(written[name], expected[name])
    assert bool((written["lr"] == probe["lr"]).all())
    status, out, _ = call("resume", tmp_path / "s")
    assert status == 0 and "holds this, finished" in out


def test_a_smoothing_from_before_other_controls_moved_goes_on_by_lr(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    assert (
        call("smooth", "sine", "--steps", 60, "--controls", "lr", "--directory", tmp_path)[0] == 0
    )
    assert "controls" not in json.loads((tmp_path / "config.json").read_text())["smooth"]
    before = (tmp_path / "schedule.json").read_bytes()
    (tmp_path / "result.json").unlink()
    assert call("resume", tmp_path)[0] == 0
    assert (tmp_path / "schedule.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--passes 0", "passes must be ≥ 1, got 0"),
        ("--gain 0", "gain must be > 0, got 0"),
        ("--source mood", "source must be one of both, loss, reward"),
        ("--template wave", "template must be one of"),
        ("--source reward", "needs a reward, and the tape has none"),
        ("--lr 99", "lr must be in"),
        ("--controls lr weight_decay", "some of lr, momentum, noise, got weight_decay"),
        ("--controls", "some of lr, momentum, noise, got none"),
        ("--noise-plateau 0.1", "noise_plateau is a gain of noise, which stays; add noise to"),
        ("--lr-reward nan", "gain lr_reward must be finite, got nan"),
    ],
)
def test_what_smoothing_refuses(
    call: Callable[..., Any], tmp_path: Path, arguments: str, message: str
) -> None:
    command = ("smooth", "sine", "--steps", 30, *arguments.split())
    status, _, err = call(*command, "--directory", tmp_path / "x")
    assert status == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_probe_that_diverges_says_what_to_do(call: Callable[..., Any], tmp_path: Path) -> None:
    command = ("smooth", "sine", "--steps", 60, "--lr", 10, "--directory", tmp_path / "x")
    status, _, err = call(*command)
    assert status == 1
    assert "begin at a lower --lr" in err

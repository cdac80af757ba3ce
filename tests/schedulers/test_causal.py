"""AdaptiveRL: causal, free of units, bounded whatever it is told, and resumable to the bit."""

from __future__ import annotations

import json
import math
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rhc
from rhc.schedulers import HeldOut, ZScored
from rhc.schedulers.laws import (
    IGNITION,
    Bounds,
    Controls,
    Gains,
    adapted,
    dipped,
    lowered,
    paced,
    updated,
)
from rhc.schedulers.signals import Signals, Smoothing, Trends, observed, plateau, surprise, trends

SMOOTHING = Smoothing()
anything = st.floats(allow_nan=True, allow_infinity=True)


def optimizer(kind: str = "sgd", lr: float = 0.01) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=lr)


def told(
    losses: list[float], rewards: list[float] | None = None, scale: float = 1.0, **settings: object
) -> rhc.AdaptiveRL:
    scheduler = rhc.AdaptiveRL(optimizer(), **settings)  # type: ignore[arg-type]
    for i, loss in enumerate(losses):
        scheduler.step(scale * loss, None if rewards is None else scale * rewards[i])
    return scheduler


def noisy(steps: int, slope: float, seed: int = 0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (
        3 + slope * torch.arange(steps) + 0.1 * torch.randn(steps, generator=generator)
    ).tolist()


shapes = st.one_of(
    st.builds(lambda level: [level] * 80, st.floats(-10, 10).filter(lambda x: abs(x) > 1e-3)),
    st.builds(
        lambda level, slope: [level + slope * i for i in range(80)],
        st.floats(-10, 10), st.floats(1e-6, 1),
    ),
    st.builds(
        lambda seed, slope: noisy(120, slope, seed), st.integers(0, 2**32), st.floats(-0.05, 0.05)
    ),
)  # fmt: skip
"""Losses that are constant, a ramp, or noise around either."""

# Squares of numbers near the smallest there are lose digits in another unit.
any_losses = st.lists(
    st.floats(-1e3, 1e3).map(lambda x: x if abs(x) > 1e-100 else 0.0), min_size=1, max_size=60
)


class TestSignals:
    def test_an_average_is_corrected_for_its_start(self) -> None:
        signals = observed(Signals(), 5.0, None, SMOOTHING)
        assert signals.loss.value == pytest.approx(5.0)
        assert observed(signals, 5.0, None, SMOOTHING).loss.value == pytest.approx(5.0)

    def test_a_trend_summarises_all_steps_since_the_last(self) -> None:
        # The loss falls at first and is the same in the two newest steps: the fall still counts.
        signals = Signals()
        for loss in [3.0, 2.0, 1.0, 1.0, 1.0]:
            signals = observed(signals, loss, None, SMOOTHING)
        found, after = trends(signals, SMOOTHING)
        assert found.loss == -1.0
        assert trends(after, SMOOTHING)[0].loss == 0.0

    def test_without_reward_the_fall_of_the_loss_is_the_reward(self) -> None:
        signals = observed(observed(Signals(), 3.0, None, SMOOTHING), 2.0, None, SMOOTHING)
        found, _ = trends(signals, SMOOTHING)
        assert found.loss == -1.0 and 0.9 < found.reward < 1  # as far as it exceeds the noise

    def test_a_fall_counts_as_far_as_it_stands_out_from_the_noise(self) -> None:
        rewards = []
        for noise in (0.0, 0.3, 1.5):
            found = 0.0
            for seed in range(20):
                generator, signals = torch.Generator().manual_seed(seed), Signals()
                swings = noise * torch.randn(100, generator=generator)
                for i, swing in enumerate(swings.tolist()):
                    signals = observed(signals, 3 - 0.01 * i + swing, None, SMOOTHING)
                found += trends(signals, SMOOTHING)[0].reward / 20
            rewards.append(found)
        assert rewards[0] > 0.9 > rewards[1] > rewards[2] + 0.2

    def test_a_rare_reward_keeps_its_trend_until_the_next_is_due(self) -> None:
        signals, found = Signals(), []
        for step in range(1, 61):
            reward = float(step) if step % 20 == 0 and step <= 40 else None
            signals = observed(signals, 3.0, reward, SMOOTHING)
            if step % 5 == 0:
                now, signals = trends(signals, SMOOTHING)
                found.append(now.reward)
        assert found[7:11] == [1.0] * 4  # the second came at 40: a rise, for the next 20 steps
        assert found[11] == 0.0  # and nothing from 60 on, where the third was due
        assert signals.reward.value == pytest.approx(30.0, abs=3.0)  # it weighs 20 steps, not one

    def test_rounding_is_no_trend(self) -> None:
        signals = Signals()
        for _ in range(50):
            signals = observed(signals, 0.1 + 0.2, None, SMOOTHING)
        signals = observed(signals, 0.3, None, SMOOTHING)
        assert trends(signals, SMOOTHING)[0].loss == 0.0

    def test_surprises_are_rises_of_another_kind(self) -> None:
        falsely = 0
        for seed in range(20):
            losses, signals = noisy(600, 0.0, seed), Signals()
            for start in range(0, 600, 20):
                falsely += surprise(signals, losses[start : start + 20]) is not None
                for loss in losses[start : start + 20]:
                    signals = observed(signals, loss, None, SMOOTHING)
            assert surprise(signals, [3.0, math.nan, 9.0, 9.0]) == 2
            assert surprise(signals, [2.0] * 20) is None and surprise(signals, [math.nan]) is None
        assert falsely == 0
        assert surprise(Signals(), [9.0]) is None

    def test_a_reward_that_did_not_come_is_no_trend(self) -> None:
        signals = observed(Signals(), 3.0, 1.0, SMOOTHING)
        _, signals = trends(signals, SMOOTHING)
        found, _ = trends(observed(signals, 2.0, None, SMOOTHING), SMOOTHING)
        assert found.reward == 0.0 and found.loss < 0

    @pytest.mark.parametrize("slope, least, most", [(0.0, 0.5, 1.0), (-0.05, 0.0, 0.05)])
    def test_a_plateau_is_where_the_loss_is_flat(
        self, slope: float, least: float, most: float
    ) -> None:
        scores = []
        for seed in range(10):
            signals = Signals()
            for loss in noisy(300, slope, seed):
                signals = observed(signals, loss, None, SMOOTHING)
            scores.append(plateau(signals))
        assert least <= sum(scores) / len(scores) <= most

    def test_swings_are_no_plateau(self) -> None:
        signals = Signals()
        for i in range(400):
            swing = 0.1 if i < 350 else 1.0
            signals = observed(signals, 3 + swing * (-1) ** i, None, SMOOTHING)
        assert plateau(signals) < 0.1

    @given(st.floats(1e-12, 1e12), st.sampled_from([-1, 1]), st.integers(20, 300))
    def test_a_constant_is_a_plateau_whatever_its_value(
        self, value: float, sign: int, steps: int
    ) -> None:
        score = self.scores([sign * value] * steps)[-1]
        assert score == self.scores([1.0] * steps)[-1] > 0.9  # to the bit: nothing is rounded

    @given(shapes | any_losses, st.integers(-40, 40))
    def test_a_power_of_two_as_unit_changes_no_bit(self, losses: list[float], power: int) -> None:
        unit = 2.0**power
        assert self.scores(losses) == self.scores([unit * x for x in losses])
        assert self.trends(losses) == self.trends([unit * x for x in losses])

    @given(shapes, st.floats(1e-12, 1e12))
    def test_any_unit_changes_rounding_alone(self, losses: list[float], unit: float) -> None:
        assert self.scores([unit * x for x in losses]) == pytest.approx(
            self.scores(losses), abs=1e-6
        )

    @given(st.floats(1e-12, 1e12), st.floats(-10, 10), st.sampled_from([-1, 1]), st.floats(1e-6, 1))
    def test_a_ramp_is_no_plateau(self, unit: float, level: float, sign: int, slope: float) -> None:
        assert max(self.scores([unit * (level + sign * slope * i) for i in range(60)])) < 0.01

    @given(st.floats(1e-12, 1e12), st.floats(-10, 10), st.integers(0, 2**32), st.floats(0.001, 1))
    def test_noise_around_a_constant_is_a_plateau(
        self, unit: float, level: float, seed: int, spread: float
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        swings = spread * torch.randn(600, generator=generator, dtype=torch.float64)
        scores = self.scores([unit * (level + swing) for swing in swings.tolist()])[100:]
        assert sum(score > 0.5 for score in scores) > 0.7 * len(scores)

    def test_a_descent_that_has_ended_is_a_plateau(self) -> None:
        scores = self.scores([*(3 - 0.01 * i for i in range(200)), *[1.0] * 350])
        assert max(scores[:200]) < 0.01 and scores[-1] > 0.9

    @staticmethod
    def scores(losses: list[float]) -> list[float]:
        signals, found = Signals(), []
        for loss in losses:
            signals = observed(signals, loss, None, SMOOTHING)
            found.append(plateau(signals))
        return found

    @staticmethod
    def trends(losses: list[float]) -> Trends:
        signals = Signals()
        for loss in losses:
            signals = observed(signals, loss, None, SMOOTHING)
        return trends(signals, SMOOTHING)[0]


class TestLaws:
    def test_directions(self) -> None:
        before = Controls(0.01, 0.9, 0.02)
        better = updated(before, Trends(-1, 1, 0), Gains(), Bounds())
        worse = updated(before, Trends(1, -1, 0), Gains(), Bounds())
        stuck = updated(before, Trends(0, 0, 1), Gains(), Bounds())
        assert better.lr == pytest.approx(0.01 * math.exp(0.02))
        assert worse.lr == pytest.approx(0.01 * math.exp(-0.04))
        assert better.momentum is not None and worse.momentum is not None
        assert worse.momentum < 0.9 < better.momentum
        assert stuck.noise == pytest.approx(0.02 * math.exp(0.05))
        assert better.noise == pytest.approx(0.02 * math.exp(-0.04))
        assert (stuck.lr, stuck.momentum) == (0.01, pytest.approx(0.9))

    def test_short_runs_are_updated_more_often_and_further_but_as_far_in_all(self) -> None:
        usual = Gains()
        assert paced(usual, 20, None) == paced(usual, 20, 10_000) == (usual, 20, 1.0)
        for steps in (500, 1000, 3000):
            gains, every, faster = paced(usual, 20, steps)
            in_all = gains.lr_reward * steps / every
            assert in_all == pytest.approx(usual.lr_reward * 10_000 / 20, rel=0.01)
            assert 1 <= every < 20 and faster > 1
            assert gains.lr_loss / gains.lr_reward == usual.lr_loss / usual.lr_reward
        assert paced(usual, 20, 1)[1] >= 1

    def test_improvement_raises_lr_more_in_the_beginning(self) -> None:
        before, trend = Controls(0.01, 0.9, 0.02), Trends(-1, 1, 0, 0)
        young, old = (
            adapted(before, trend, Gains(), Bounds(), None, every=20, age=age) for age in (0, 1e3)
        )
        assert young.lr == pytest.approx(0.01 * math.exp(0.04))
        assert old.lr == pytest.approx(0.01 * math.exp(0.02))
        assert young.momentum and young.momentum > 0.9 and young.noise < 0.02
        worse = adapted(before, Trends(1, -1, 0, 0), Gains(), Bounds(), None, every=20, age=0)
        assert worse.momentum and worse.momentum < 0.9 and worse.lr < 0.01

    def test_momentum_dips_by_a_distance_on_the_logit_scale(self) -> None:
        assert dipped(Controls(0.01, 0.9), Bounds()).momentum == pytest.approx(0.7, abs=1e-3)
        assert dipped(Controls(0.01, 0.62), Bounds()).momentum == 0.6
        assert dipped(Controls(0.01, 0.99), Bounds()).momentum == 0.75
        assert dipped(Controls(0.01, None), Bounds()) == Controls(0.01, None)

    def test_noise_leaves_zero_on_a_plateau_only_and_comes_back_to_exactly_zero(self) -> None:
        off = Controls(0.01, 0.9, 0.0)
        assert updated(off, Trends(0, 0, 0.4), Gains(), Bounds()).noise == 0
        lit = updated(off, Trends(0, 0, 0.9), Gains(), Bounds())
        assert lit.noise == IGNITION
        assert updated(lit, Trends(-1, 1, 0), Gains(), Bounds()).noise == 0
        never = Bounds(noise=(0.0, 0.0))
        assert updated(off, Trends(0, 0, 0.9), Gains(), never).noise == 0

    @given(
        st.floats(1e-5, 1e-1), st.floats(0.6, 0.995), st.floats(0, 0.2),
        st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 1), st.floats(0, 50),
    )  # fmt: skip
    def test_bounds_and_cap_hold(
        self, lr: float, mu: float, sigma: float, dl: float, dr: float, p: float, gain: float
    ) -> None:
        gains, cap = Gains(*[gain] * 6), (0.8, 1.25)
        new = updated(Controls(lr, mu, sigma), Trends(dl, dr, p), gains, Bounds(), cap)
        assert 1e-5 <= new.lr <= 1e-1 and 0.8 * lr * (1 - 1e-12) <= new.lr <= 1.25 * lr * 1.001
        assert new.momentum is not None and 0.6 <= new.momentum <= 0.995
        assert 0 <= new.noise <= 0.2

    def test_what_is_not_finite_halves_lr_down_to_its_bound(self) -> None:
        assert lowered(Controls(0.01), Bounds()).lr == 0.005
        assert lowered(Controls(1e-5), Bounds()).lr == 1e-5

    @pytest.mark.parametrize(
        "bounds", [{"lr": (1, 0.1)}, {"momentum": (0.5, 1.5)}, {"noise": (-1, 1)}]
    )
    def test_impossible_bounds_are_refused(self, bounds: dict[str, tuple[float, float]]) -> None:
        with pytest.raises(rhc.InputError, match="bounds of"):
            Bounds(**bounds)


class TestScheduler:
    def test_the_two_lines_of_the_readme(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        scheduler = rhc.AdaptiveRL(optimizer)
        x = torch.randn(64, 4)
        y = x.sum(1, keepdim=True)
        losses = []
        for _ in range(200):
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step(loss)
            losses.append(loss.item())
        assert scheduler.updates == 10 and scheduler.get_last_lr()[0] > 0.01
        assert losses[-1] < 0.1 * losses[0]

    @pytest.mark.parametrize("slope, sign", [(-0.02, 1), (0.02, -1)])
    def test_lr_follows_the_trend(self, slope: float, sign: int) -> None:
        scheduler = told(noisy(400, slope))
        assert sign * math.log(scheduler.controls.lr / 0.01) > 0.1
        assert scheduler.controls.momentum is not None
        assert sign * (scheduler.controls.momentum - 0.9) > 0

    def test_as_specified_has_the_constants_and_the_laws_alone(self) -> None:
        s = rhc.AdaptiveRL.as_specified(optimizer())
        g, b = s.gains, s.smoothing
        assert (g.lr_reward, g.lr_loss, g.momentum_reward, g.momentum_loss) == (
            0.02, 0.02, 0.01, 0.02,
        )  # fmt: skip
        assert (g.noise_plateau, g.noise_reward, s.every, s.cap) == (0.05, 0.04, 20, (0.8, 1.25))
        assert (b.loss, b.reward, b.variance, b.scale) == (0.02, 0.02, 0.01, 0.02)
        assert s.bounds == Bounds((1e-5, 1e-1), (0.6, 0.995), (0.0, 0.2))
        jump = [*noisy(200, -0.01), *(x + 50 for x in noisy(200, 0.0, seed=1))]
        for loss in jump:
            before = s.controls
            s.step(loss)
            if s.steps % 20 == 0:
                expected = updated(before, s.trends, Gains(), Bounds(), (0.8, 1.25))
                assert s.controls == expected and s.trends.reward == -s.trends.loss
        assert s.updates == 20 and s.surprises == 0
        assert s.get_last_lr() == [s.controls.lr]
        assert rhc.AdaptiveRL.as_specified(optimizer(), every=5).every == 5

    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    def test_momentum_settles_at_the_same_effective_step(self, kind: str) -> None:
        scheduler = rhc.AdaptiveRL(optimizer(kind))
        for _ in range(2000):
            scheduler.step(1.0)
        c = scheduler.controls
        assert c.momentum is not None and 0.96 < c.momentum <= 0.97
        effective = c.lr / (1 - c.momentum) if kind == "sgd" else c.lr
        assert effective == pytest.approx(0.01 / (1 - 0.9) if kind == "sgd" else 0.01)

    def test_a_stall_raises_noise_for_a_while(self) -> None:
        course = []
        scheduler = rhc.AdaptiveRL(optimizer(), every=5)
        for loss in [*noisy(300, -0.02), *(x - 6 for x in noisy(1500, 0.0, seed=1))]:
            scheduler.step(loss)
            course.append(scheduler.values["noise"])
        assert set(course[:300]) == {0.0} and max(course) >= IGNITION and course[-1] == 0.0

    def test_after_a_surprise_everything_dips_or_spikes_and_comes_back(self) -> None:
        losses = [*noisy(500, 0.0), *(x + 5 for x in noisy(100, -0.05, seed=1))]
        losses += noisy(600, 0.0, seed=2)
        scheduler = rhc.AdaptiveRL(optimizer(), every=5)
        course = []
        for loss in losses:
            if len(course) == 507:  # between the dip and the rebound
                state = scheduler.state_dict()
                scheduler = rhc.AdaptiveRL(optimizer(), every=5)
                scheduler.load_state_dict(json.loads(json.dumps(state)))
            scheduler.step(loss)
            course.append(scheduler.controls)
        assert scheduler.surprises == 1
        before, dip, back, end = (course[i] for i in (503, 504, 509, -1))
        assert dip.lr == pytest.approx(0.8 * before.lr) and back.lr > 2 * before.lr
        assert dip.momentum and before.momentum and end.momentum
        assert dip.momentum <= 0.75 < 0.93 < before.momentum and end.momentum > 0.93
        assert before.noise < 0.01 and dip.noise == 0.02 and end.noise < 0.002
        assert back.lr / (1 - dip.momentum) < before.lr / (1 - before.momentum)

    def test_one_loss_is_no_surprise_and_waits_for_the_next(self) -> None:
        calm = noisy(300, 0.0)
        for after, surprises in ((3.0, 0), (9.0, 1)):
            scheduler = told([*calm[:-1], 9.0])
            assert scheduler.surprises == 0 and len(scheduler._pending) == 1
            assert scheduler.signals.loss.value < 3.1  # it has not moved what it is held against
            for _ in range(20):
                scheduler.step(after)
            assert scheduler.surprises == surprises and not scheduler._pending

    @pytest.mark.parametrize("on", [True, False])
    def test_a_jump_of_the_loss_begins_the_trends_anew(self, on: bool) -> None:
        losses = [*noisy(210, -0.005), *(x + 5 for x in noisy(200, -0.01, seed=1))]
        scheduler = rhc.AdaptiveRL(optimizer(), surprise=on)
        course = []
        for loss in losses:
            scheduler.step(loss)
            course.append(scheduler.controls)
        assert scheduler.surprises == on
        before, after, end = course[200], course[220], course[-1]
        assert before.momentum and after.momentum and end.momentum
        if on:
            assert after.lr < before.lr < end.lr  # it dips and rebounds
            assert after.momentum < 0.75 < before.momentum and end.momentum > after.momentum
        else:
            assert after.momentum > before.momentum - 0.05

    def test_lr_is_annealed_where_the_length_is_known(self) -> None:
        """The square of half a cosine on what the laws say; state_dict goes on with it."""
        losses = noisy(600, 0.0)
        whole = told(losses, steps=600)
        constant = told(losses, steps=600, anneal=False)
        assert whole.controls == constant.controls  # the laws know nothing of it
        assert whole.get_last_lr() == [whole.values["lr"]] == [whole.bounds.lr[0]]
        assert constant.get_last_lr() == [constant.controls.lr]
        half = told(losses[:300], steps=600)
        assert half.get_last_lr()[0] == pytest.approx(half.controls.lr / 4)
        resumed = rhc.AdaptiveRL(optimizer(), steps=600)
        resumed.load_state_dict(half.state_dict())
        assert resumed.get_last_lr() == half.get_last_lr()
        # What has changed once may change again.
        shifted = told([*losses[:300], *(x + 5 for x in losses[300:])], steps=600)
        assert shifted.surprises and shifted.get_last_lr() == [shifted.controls.lr]

    def test_a_thousand_times_the_loss_changes_nothing(self) -> None:
        losses, rewards = noisy(400, -0.001), noisy(400, 0.001, seed=1)
        one, other = told(losses, rewards), told(losses, rewards, scale=1000.0)
        assert one.values == pytest.approx(other.values, rel=1e-6)

    def test_it_looks_at_the_past_only(self) -> None:
        losses = noisy(200, -0.01)
        other = losses[:100] + [9.0] * 100
        course, changed = [], []
        for found, seen in ((course, losses), (changed, other)):
            scheduler = rhc.AdaptiveRL(optimizer())
            for loss in seen:
                scheduler.step(loss)
                found.append(dict(scheduler.values))
        assert course[:119] == changed[:119] and course[-1] != changed[-1]

    @given(
        st.lists(st.tuples(anything, st.none() | anything), max_size=60),
        st.sampled_from(["sgd", "adamw"]),
    )
    def test_bounded_whatever_it_is_told(
        self, seen: list[tuple[float, float | None]], kind: str
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scheduler = rhc.AdaptiveRL(optimizer(kind), every=3)
            for loss, reward in seen:
                scheduler.step(loss, reward)
        c = scheduler.controls
        assert 1e-5 <= c.lr <= 1e-1 and 0 <= c.noise <= 0.2
        assert c.momentum is not None and 0.6 <= c.momentum <= 0.995
        assert all(math.isfinite(lr) for lr in scheduler.get_last_lr())

    def test_not_finite_is_counted_lowers_lr_and_is_warned_of_once(self) -> None:
        losses = [1.0] * 50 + [math.nan, math.inf] + [1.0] * 50 + [math.nan] + [1.0] * 30
        clean = told([1.0] * 130)
        with pytest.warns(UserWarning, match="not finite") as caught:
            scheduler = told(losses)
        assert len(caught) == 1 and scheduler.ignored == 3
        assert scheduler.signals.loss.value == 1.0
        assert scheduler.controls.lr == pytest.approx(clean.controls.lr / 4)

    @pytest.mark.parametrize("kind", ["sgd", "adamw"])
    def test_state_goes_on_to_the_bit(self, kind: str) -> None:
        losses = noisy(150, -0.01)
        whole = rhc.AdaptiveRL(optimizer(kind), noise=0.05)
        half = rhc.AdaptiveRL(optimizer(kind), noise=0.05)
        for loss in losses:
            whole.step(torch.tensor(loss))
        for loss in losses[:71]:
            half.step(torch.tensor(loss))
        rest = rhc.AdaptiveRL(optimizer(kind, lr=0.05))
        rest.load_state_dict(half.state_dict())
        assert rest.get_last_lr() == half.get_last_lr()
        for loss in losses[71:]:
            rest.step(torch.tensor(loss))
        assert rest.state_dict() == whole.state_dict()
        assert rest.optimizer.param_groups[0] | {"params": 0} == (
            whole.optimizer.param_groups[0] | {"params": 0}
        )

    def test_a_state_with_means_as_sums_goes_on(self) -> None:
        """As they were saved first: total / weight."""

        def as_sums(record: dict[str, object]) -> dict[str, object]:
            if record.keys() == {"value", "weight"}:
                return {"total": record["value"] * record["weight"], "weight": record["weight"]}
            return {k: as_sums(v) if isinstance(v, dict) else v for k, v in record.items()}

        one = told(noisy(150, -0.01))
        other = rhc.AdaptiveRL(optimizer())
        other.load_state_dict(as_sums(one.state_dict()))
        assert other.signals.loss.value == pytest.approx(one.signals.loss.value, rel=1e-12)
        for loss in noisy(60, -0.01, seed=1):
            one.step(loss)
            other.step(loss)
        assert other.controls.lr == pytest.approx(one.controls.lr, rel=1e-6) != 0.01

    def test_a_state_of_another_optimizer_is_refused(self) -> None:
        state = rhc.AdaptiveRL(optimizer()).state_dict()
        with pytest.raises(rhc.InputError, match="the optimizer has 2"):
            a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
            two = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=0.01)
            rhc.AdaptiveRL(two).load_state_dict(state)
        with pytest.raises(rhc.InputError, match="version"):
            rhc.AdaptiveRL(optimizer()).load_state_dict(state | {"version": 99})

    def test_groups_keep_their_ratio(self) -> None:
        a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        two = torch.optim.SGD(
            [{"params": [a], "lr": 0.01}, {"params": [b], "lr": 0.001}], momentum=0.9
        )
        scheduler = rhc.AdaptiveRL(two)
        for loss in noisy(200, -0.02):
            scheduler.step(loss)
        first, second = scheduler.get_last_lr()
        assert first / second == pytest.approx(10) and first > 0.01

    def test_beta2_stays_unless_coupled(self) -> None:
        swings = [3 + (0.1 if i < 300 else 0.5) * (-1) ** i for i in range(400)]
        for coupled in (False, True):
            scheduler = rhc.AdaptiveRL(optimizer("adamw"), couple_beta2=coupled)
            for loss in swings:
                scheduler.step(loss)
            beta2 = scheduler.optimizer.param_groups[0]["betas"][1]
            assert beta2 == pytest.approx(0.9995) if coupled else beta2 == 0.999

    def test_an_lr_outside_the_bounds_is_said(self) -> None:
        with pytest.warns(UserWarning, match=r"lr 0\.5 lies outside .* begins at 0\.1"):
            assert rhc.AdaptiveRL(optimizer(lr=0.5)).get_last_lr() == [0.1]

    @pytest.mark.parametrize("on", ["gradients", "gradients-by-weights", "parameters"])
    def test_noise_has_the_size_that_is_said(self, on: str) -> None:
        # Another tensor of another size: σ is relative to each by itself.
        other = nn.Parameter(torch.full((20000,), 300.0))
        p = nn.Parameter(torch.full((20000,), 2.0))
        sgd = torch.optim.SGD([other, p], lr=0.1)
        scheduler = rhc.AdaptiveRL(sgd, noise=0.2, noise_on=on)  # type: ignore[arg-type]
        before = torch.get_rng_state()
        other.grad, p.grad = torch.full_like(other, 7.0), torch.full_like(p, 0.5)
        sgd.step()
        size = (p - (2.0 - 0.1 * 0.5)).std().item()
        expected = {
            "gradients": 0.1 * 0.2 * 0.5,
            "gradients-by-weights": 0.1 * 0.2 * 2.0,
            "parameters": 0.2 * 2.0,
        }[on]
        assert size == pytest.approx(expected, rel=0.05) and scheduler.noise_steps == 1
        assert torch.equal(before, torch.get_rng_state())

    def test_noise_comes_off_when_it_is_closed(self) -> None:
        p = nn.Parameter(torch.ones(5))
        sgd = torch.optim.SGD([p], lr=0.1)
        rhc.AdaptiveRL(sgd, noise=0.2).close()
        p.grad = torch.ones(5)
        sgd.step()
        assert torch.equal(p, torch.full((5,), 0.9))

    def test_with_grad_scaler_and_accumulation(self) -> None:
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu")
        scheduler = rhc.AdaptiveRL(sgd, every=5, noise=0.02)
        for _ in range(20):
            total = torch.zeros(())
            for _ in range(2):
                loss = model(torch.randn(8, 3)).square().mean() / 2
                scaler.scale(loss).backward()
                total += loss.detach()
            scaler.step(sgd)
            scaler.update()
            sgd.zero_grad()
            scheduler.step(total)
        assert scheduler.updates == 4 and scheduler.noise_steps == 20 and scheduler.ignored == 0

    def test_losses_are_read_when_an_update_is_due(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reads = 0
        tolist = torch.Tensor.tolist

        def counted(tensor: torch.Tensor) -> object:
            nonlocal reads
            reads += 1
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)
        for name in ("item", "__float__", "__bool__"):
            monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a step waited"))
        scheduler = rhc.AdaptiveRL(optimizer(), every=10)
        for _ in range(30):
            scheduler.step(torch.tensor(1.0))
        assert reads == 3

    @pytest.mark.gpu
    def test_no_step_waits_for_a_gpu(self) -> None:
        p = nn.Parameter(torch.ones(5, device="cuda"))
        sgd = torch.optim.SGD([p], lr=0.01, momentum=0.9)
        scheduler = rhc.AdaptiveRL(sgd, every=50, noise=0.02)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(49):
                loss = p.square().sum()
                sgd.zero_grad()
                loss.backward()
                sgd.step()
                scheduler.step(loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scheduler.step(p.square().sum())
        assert scheduler.updates == 1

    @pytest.mark.parametrize(
        "settings, says",
        [
            ({"steps": 0}, "steps"),
            ({"every": 0}, "every"), ({"cap": (1.1, 1.2)}, "cap"), ({"noise": -1.0}, "noise"),
            ({"noise_on": "x"}, "noise_on"), ({"source": "x"}, "source"),
        ],
    )  # fmt: skip
    def test_bad_settings_are_refused(self, settings: dict[str, object], says: str) -> None:
        with pytest.raises(rhc.InputError, match=says):
            rhc.AdaptiveRL(optimizer(), **settings)  # type: ignore[arg-type]

    def test_a_loss_per_example_is_refused(self) -> None:
        with pytest.raises(rhc.InputError, match="pass its mean"):
            rhc.AdaptiveRL(optimizer()).step(torch.ones(3))


class TestRewards:
    def test_held_out_is_the_mean_over_examples_and_leaves_the_model_as_it_was(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5))
        batches = [torch.randn(8, 3), torch.randn(4, 3)]

        def loss_fn(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, object]]:
            return model(x).square().mean(), {"largest": x.max(), "mode": float(model.training)}

        reward = HeldOut(loss_fn, batches, every=10, trained_on=6)
        state = torch.get_rng_state()
        assert reward(model, 9) is None and reward.forward_passes == 0
        model.eval()
        losses = [model(x).square().mean().item() for x in batches]
        model.train()
        assert reward(model, 10) == pytest.approx(-(8 * losses[0] + 4 * losses[1]) / 12)
        assert model.training and reward.forward_passes == 2
        assert torch.equal(torch.get_rng_state(), state)
        assert HeldOut(loss_fn, batches, metric="mode", every=1)(model, 1) == 0.0
        with pytest.raises(rhc.InputError, match="not what loss_fn returns, which has largest"):
            HeldOut(loss_fn, batches, metric="accuracy", every=1)(model, 1)

    def test_z_scores_are_of_the_last_values(self) -> None:
        reward = ZScored("return", over=3)
        found = [reward(None, i, {"return": x}) for i, x in enumerate([9.0, 1.0, 2.0, 3.0, 3.0])]
        assert found[0] == 0.0
        assert found[3] == pytest.approx((3 - 2) / (2 / 3) ** 0.5)
        assert found[4] == pytest.approx((3 - 8 / 3) / (2 / 9) ** 0.5)
        flat = ZScored("return")
        assert [flat(None, 0, {"return": 5.0}) for _ in range(3)] == [0.0] * 3


class TestFrameworks:
    """The examples run where the package is installed; both steer to the end and learn."""

    @pytest.mark.parametrize(
        "name, package",
        [("lightning_scheduler", "lightning"), ("hugging_face_scheduler", "transformers")],
    )
    def test_examples(self, name: str, package: str) -> None:
        pytest.importorskip(package)
        if package == "transformers":
            pytest.importorskip("accelerate")
        path = Path(__file__).resolve().parents[2] / "examples" / f"{name}.py"
        scheduler = runpy.run_path(str(path))["main"]()
        assert scheduler.steps == 200 and scheduler.updates == 200 // scheduler.every
        assert scheduler.signals.steps + len(scheduler._pending) == 200  # each loss was seen, once
        assert scheduler.get_last_lr()[0] != 1e-3

"""Distillation: what a policy may look at, what it learns, its files, and how it steers."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rhc
from rhc import DistilledScheduler, InputError, Schedule
from rhc.cli.main import main
from rhc.hindsight.distill import Example, form_of, lesson, target
from rhc.hindsight.features import Form, Observer, natural, raw
from rhc.hindsight.policy import LIMIT, Policy, error, fitted

STEPS = 400


def example(seed: int = 0, *, name: str = "run", **columns: Any) -> Example:
    """A run whose lr rises while the loss falls, and then falls."""
    draw = torch.Generator().manual_seed(seed)
    t = torch.arange(STEPS, dtype=torch.float64)
    noise = 1 + 0.05 * torch.randn(STEPS, generator=draw, dtype=torch.float64)
    losses = ((-t / 80).exp() + 0.1) * noise
    lr = 0.01 * (2 * torch.sin(math.pi * t / STEPS) - 2 * t / STEPS).exp()
    values = {"lr": lr, "momentum": torch.full((STEPS,), 0.9, dtype=torch.float64), **columns}
    rows = [{"loss": x, "gradient_norm": 1 + x} for x in losses.tolist()]
    return Example(name, rows, Schedule(values))


def policy_of(kind: str = "laws", count: int = 3, **settings: Any) -> Policy:
    examples = [example(seed) for seed in range(count)]
    form = form_of(examples, None, gradient_norm=False)
    lessons = [lesson(e, form, 20, known=known) for e in examples for known in (True, False)]
    return fitted(kind, form, 20, lessons, **{"epochs": 150, **settings})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "gru"
    policy_of("gru").save(folder)
    return folder


def optimizer(lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=lr, momentum=0.9)


def steered(scheduler: DistilledScheduler, losses: list[float]) -> list[float]:
    """The lr of every step."""
    found = []
    for loss in losses:
        found.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step(loss)
    return found


def losses_of(seed: int) -> list[float]:
    return [row["loss"] for row in example(seed).rows]


# Features -----------------------------------------------------------------------------------------


def test_features_have_no_units() -> None:
    form = Form(("lr", "momentum"), gradient_norm=True)
    plain, scaled = example(), example()
    scaled.rows = [{k: 1000 * v for k, v in row.items()} for row in plain.rows]
    scaled.columns["lr"] = plain.columns["lr"] * 50
    scaled.start_lr = plain.start_lr * 50
    a, b = (lesson(e, form, 20, known=True) for e in (plain, scaled))
    torch.testing.assert_close(a.features, b.features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.targets, b.targets, rtol=1e-5, atol=1e-6)
    assert a.features.shape == (STEPS // 20 - 1, len(form.names))


def test_features_depend_on_the_past_alone() -> None:
    form = Form(("lr",))
    one, other = example(), example()
    other.rows = [*one.rows[:200], *({"loss": 9.0} for _ in range(200))]
    a, b = (lesson(e, form, 20, known=True).features for e in (one, other))
    assert torch.equal(a[:10], b[:10])
    assert not torch.equal(a[10:], b[10:])


def test_what_a_schedule_does_next_from_where_a_run_is() -> None:
    run, form = example(), Form(("lr",))
    now = run.block(4, 20)
    (move,) = target(run, form, 100, 20, now)
    assert move == pytest.approx(raw("lr", run.block(5, 20).lr) - raw("lr", now.lr))
    low = run.block(4, 20).__class__(now.lr / 100, 0.9, 0.0)
    assert target(run, form, 100, 20, low) == [LIMIT]


@pytest.mark.parametrize("name", ["lr", "momentum", "noise"])
def test_coordinates_round_trip(name: str) -> None:
    for value in (0.02, 0.3, 0.9):
        assert natural(name, raw(name, value)) == pytest.approx(value)
    assert natural("noise", raw("noise", 0.0)) == 0.0
    assert natural(name, 1e9) <= rhc.CONTROLS[name].upper


def test_the_observer_s_state_goes_on() -> None:
    form, run = Form(("lr",), gradient_norm=True), example()
    one = Observer(form, run.start())
    for row in run.rows[:50]:
        one.observe(row["loss"], None)
    one.observe_norm(2.0)
    one.features(run.start(), 0.1)
    other = Observer(form, run.start())
    other.load_state(json.loads(json.dumps(one.state())))
    for row in run.rows[50:90]:
        one.observe(row["loss"], None)
        other.observe(row["loss"], None)
    assert one.features(run.start(), 0.2) == other.features(run.start(), 0.2)


# What goes together -------------------------------------------------------------------------------


def test_runs_that_do_not_go_together() -> None:
    both = example(name="b", momentum=torch.linspace(0.5, 0.9, STEPS, dtype=torch.float64))
    with pytest.raises(InputError, match="runs a and b have different controls, lr and lr, mom"):
        form_of([example(name="a"), both], None, gradient_norm=False)
    assert form_of([example(), both], ["lr"], gradient_norm=False).steered == ("lr",)
    lacking = example(name="c")
    del lacking.columns["momentum"]
    with pytest.raises(InputError, match="runs a and c have different controls"):
        form_of([example(name="a"), lacking], ["lr"], gradient_norm=False)
    rewarded = example(name="r")
    rewarded.rows = [{**row, "reward": 1.0} for row in rewarded.rows]
    with pytest.raises(InputError, match="run a has no reward in its tape and run r has; distil"):
        form_of([rewarded, example(name="a")], None, gradient_norm=False)
    without = example(name="w")
    without.rows = [{"loss": 1.0} for _ in without.rows]
    with pytest.raises(InputError, match="run w has no gradient_norm"):
        form_of([without], None, gradient_norm=True)
    still = example(name="s", lr=torch.full((STEPS,), 0.1))
    with pytest.raises(InputError, match="nothing moves in run s"):
        form_of([still], None, gradient_norm=False)
    assert form_of([still, example()], None, gradient_norm=False).steered == ("lr",)
    with pytest.raises(InputError, match="'weight_decay' is not in these runs"):
        form_of([example()], ["weight_decay"], gradient_norm=False)
    with pytest.raises(InputError, match="a tape of 3 steps and a schedule of 400"):
        Example("x", example().rows[:3], example().schedule)
    with pytest.raises(InputError, match="too few for updates every 500"):
        lesson(example(), Form(("lr",)), 500, known=True)
    with pytest.raises(InputError, match="nothing to distil"):
        form_of([], None, gradient_norm=False)


# Fitting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["laws", "gru"])
def test_a_policy_repeats_what_it_saw_on_a_run_that_it_did_not_see(kind: str) -> None:
    policy = policy_of(kind)
    fresh = lesson(example(9), policy.form, 20, known=True)
    assert error(policy, [fresh]) < 0.2
    scheduler = DistilledScheduler(optimizer(), policy, steps=STEPS)
    lrs = torch.tensor(steered(scheduler, losses_of(9)), dtype=torch.float64)
    wanted = example().columns["lr"]
    # Steering by itself it comes within a third of the schedule, which moves lr by a factor of 10.
    assert float((lrs.log() - wanted.log()).abs().mean()) < 0.33
    assert scheduler.fallbacks == 0


def test_moves_are_bounded_whatever_goes_in() -> None:
    for kind in ("laws", "gru"):
        policy = policy_of(kind, count=1)
        wild = [1e6] * len(policy.form.names)
        moves, _ = policy.moves(wild, policy.network.memory(1))
        assert abs(moves["lr"]) <= LIMIT + 1e-6


def test_fitting_twice_gives_the_same_and_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    one, other = policy_of("gru", epochs=5), policy_of("gru", epochs=5)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in one.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[name])
    with pytest.raises(InputError, match="kind must be one of gru, laws"):
        policy_of("tree")


# Steering -----------------------------------------------------------------------------------------


def test_the_scheduler_depends_on_the_past_alone(saved: Path) -> None:
    def lrs(losses: list[float]) -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return steered(DistilledScheduler.load(saved, optimizer(), steps=STEPS), losses)

    usual = losses_of(0)
    later = usual[:200] + [2 * x for x in usual[200:]]
    assert lrs(usual)[:201] == lrs(later)[:201]
    assert lrs(usual)[240:] != lrs(later)[240:]


def test_a_saved_state_goes_on_bit_for_bit(saved: Path) -> None:
    losses = losses_of(5)
    whole = DistilledScheduler.load(saved, optimizer(), steps=STEPS)
    lrs = steered(whole, losses)
    first = DistilledScheduler.load(saved, optimizer(), steps=STEPS)
    steered(first, losses[:170])
    state = json.loads(json.dumps(first.state_dict()))
    second = DistilledScheduler.load(saved, optimizer(), steps=STEPS)
    second.load_state_dict(state)
    assert steered(second, losses[170:]) == lrs[170:]
    assert second.state_dict() == whole.state_dict()
    with pytest.raises(InputError, match="not of a DistilledScheduler with this policy"):
        second.load_state_dict(rhc.AdaptiveRL(optimizer()).state_dict())


def test_outside_of_what_it_was_distilled_from_the_laws_take_over(saved: Path) -> None:
    scheduler = DistilledScheduler.load(saved, optimizer(), steps=STEPS)
    with pytest.warns(
        UserWarning, match=r"outside what the policy was distilled from \(fast.loss\)"
    ):
        steered(scheduler, [math.exp(t / 20) for t in range(100)])
    assert scheduler.fallbacks >= 3
    laws = rhc.AdaptiveRL(optimizer())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        always = DistilledScheduler.load(saved, optimizer(), steps=STEPS)
        always.policy.low.fill_(1e9)
        mine = steered(always, losses_of(1))
    theirs = []
    for loss in losses_of(1):
        theirs.append(laws.optimizer.param_groups[0]["lr"])
        laws.optimizer.step()
        laws.step(loss)
    assert mine == theirs
    assert always.fallbacks == STEPS // 20


def test_bounds_groups_noise_and_losses_that_are_not_finite(saved: Path) -> None:
    parameters = [torch.zeros(2, requires_grad=True) for _ in range(2)]
    groups = [{"params": [parameters[0]]}, {"params": [parameters[1]], "lr": 0.001}]
    sgd = torch.optim.SGD(groups, lr=0.01, momentum=0.9)
    bounds = rhc.Bounds(lr=(0.009, 0.012))
    scheduler = DistilledScheduler.load(saved, sgd, steps=STEPS, bounds=bounds)
    for loss in losses_of(2):
        sgd.step()
        scheduler.step(loss)
        assert 0.009 <= sgd.param_groups[0]["lr"] <= 0.012
        assert sgd.param_groups[1]["lr"] == pytest.approx(sgd.param_groups[0]["lr"] / 10)
    assert sgd.param_groups[0]["momentum"] == 0.9  # not steered, so left alone
    with pytest.warns(UserWarning, match="not finite"):
        for _ in range(20):
            scheduler.step(math.nan)
    assert scheduler.ignored == 20
    scheduler.close()
    assert not sgd._optimizer_step_pre_hooks


def test_gradient_norms_are_taken_once_per_update() -> None:
    examples = [example(seed) for seed in range(2)]
    form = form_of(examples, None, gradient_norm=True)
    policy = fitted("laws", form, 20, [lesson(e, form, 20, known=True) for e in examples])
    p = torch.ones(4, requires_grad=True)
    sgd = torch.optim.SGD([p], lr=0.01)
    scheduler = DistilledScheduler(sgd, policy, steps=STEPS)
    policy.low.fill_(-9)
    for step in range(20):
        p.grad = torch.full((4,), float(step))
        sgd.step()
        scheduler.step(1.0)
    assert scheduler.observer.norm == pytest.approx(19.0 * 2)
    scheduler.close()
    assert not sgd._optimizer_step_pre_hooks


def test_a_policy_that_goes_by_a_reward_needs_one() -> None:
    rewarded = example()
    rewarded.rows = [{**row, "reward": -row["loss"]} for row in rewarded.rows]
    form = form_of([rewarded], None, gradient_norm=False)
    policy = fitted("laws", form, 20, [lesson(rewarded, form, 20, known=True)])
    scheduler = DistilledScheduler(optimizer(), policy, steps=STEPS)
    with pytest.warns(UserWarning, match="reward, which the policy goes by and nobody gave"):
        steered(scheduler, losses_of(0)[:20])


# Files --------------------------------------------------------------------------------------------


def test_a_policy_comes_back_as_it_was(saved: Path) -> None:
    policy = Policy.load(saved)
    assert policy.kind == "gru"
    features = [0.1] * len(policy.form.names)
    again = Policy.load(saved)
    memory = policy.network.memory(1)
    assert policy.moves(features, memory)[0] == again.moves(features, memory)[0]
    assert sorted(p.name for p in saved.iterdir()) == ["policy.json", "weights.safetensors"]


def _json(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "policy.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    """Other weights, with the size and the digest that belong to them."""

    def apply(folder: Path) -> None:
        import hashlib

        path = folder / "weights.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        data = path.read_bytes()
        _json(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())(folder)

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "version": (_json(version=7), "has version 7, this rhc reads version 1; distil it again"),
    "format": (_json(format="x"), "is no policy"),
    "kind": (_json(kind="tree"), "is damaged"),
    "every": (_json(every=0), "is damaged"),
    "features": (_json(features=["a"]), "is damaged"),
    "steered": (_json(steered=["temperature"]), "is damaged"),
    "bytes": (_json(bytes=3), "is not the file that policy.json was written with"),
    "json": (lambda f: (f / "policy.json").write_text("{"), "is damaged (not JSON"),
    "list": (lambda f: (f / "policy.json").write_text("[]"), "it holds list"),
    "gone": (lambda f: (f / "weights.safetensors").unlink(), "cannot be read"),
    "empty": (lambda f: (f / "policy.json").unlink(), "cannot read"),
    "cut": (
        lambda f: (f / "weights.safetensors").write_bytes(b"1234"),
        "is not the file that policy.json was written with",
    ),
    "missing": (_weights(lambda t: t.pop("mean")), "mean is missing"),
    "extra": (_weights(lambda t: t.update(more=torch.zeros(1))), "more is too much"),
    "shape": (_weights(lambda t: t.update(low=torch.zeros(3))), "low is (3,)"),
    "dtype": (_weights(lambda t: t.update(low=t["low"].double())), "of torch.float64"),
    "nan": (_weights(lambda t: t["low"].fill_(math.nan)), "low is not finite"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_policies_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(saved, tmp_path / "p")
    damage, message = DAMAGE[name]
    damage(tmp_path / "p")
    with pytest.raises(InputError) as refused:
        DistilledScheduler.load(tmp_path / "p", optimizer())
    assert message in str(refused.value)


# The command --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three short runs with a cosine, and a user's lr that is not where it begins."""
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for seed in range(3):
        line = f"train sine --no-rewrite --template cosine --lr 0.05 --steps 100 --seed {seed}"
        assert main([*line.split(), "--directory", str(folder / f"r{seed}")]) == 0
        found.append(folder / f"r{seed}")
    return found


def test_a_run_that_was_rewritten_is_learned_from(call: Callable[..., Any], tmp_path: Path) -> None:
    """Its settings of rewriting, a budget among them, mean nothing to the policy's plain runs."""
    train = ["train", "sine", "--steps", 40, "--window", 10, "--directory", tmp_path / "run"]
    assert call(*train)[0] == 0
    options = ["--kind", "laws", "--rounds", 0, "--every", 10]
    status, _, err = call("distill", tmp_path / "run", "-o", tmp_path / "p", *options)
    assert (status, err) == (0, "")


def test_runs_become_a_scheduler(
    runs: list[Path], call: Callable[..., Any], tmp_path: Path
) -> None:
    options = ["--kind", "laws", "--rounds", 1, "--per-round", 1, "--every", 10]
    status, out, err = call("distill", *runs, "-o", tmp_path / "p", *options)
    assert status == 0, err
    assert "2 runs to learn from, 1 held out" in out
    assert "law " in out
    document = json.loads((tmp_path / "p" / "policy.json").read_text())
    assert document["notes"]["plain_runs_spent"] == 3  # two judgements, and a correction
    assert len(document["notes"]["held_out"]) == 1
    assert not set(document["notes"]["held_out"]) & set(document["notes"]["runs"])
    model = nn.Linear(2, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = DistilledScheduler.load(tmp_path / "p", sgd, steps=100)
    for step in range(100):
        loss = model(torch.ones(4, 2)).square().mean() + 1 / (1 + step)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        scheduler.step(loss)
    assert scheduler.updates == 10
    assert scheduler.values["lr"] != 0.05


def test_what_distilling_refuses(
    runs: list[Path], call: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "p"
    for arguments, message in (
        ([*runs, "-o", out, "--kind", "tree"], "kind must be one of gru, laws"),
        ([*runs, "-o", out, "--controls", "momentum,lr"], "'momentum,lr' is not in these"),
        ([*runs, "-o", out, "--every", 200], "too few for updates every 200"),
        ([tmp_path / "x", "-o", out], "is no run: it has no config.json"),
        ([*runs, "-o", runs[0]], "holds something that is no policy"),
        ([*runs, "-o", out, "--rounds", -1], "rounds must be ≥ 0"),
        ([*runs, "-o", out, "--held-out", 1], "held_out must be in [0, 1)"),
    ):
        status, _, err = call("distill", *arguments)
        assert status == 2, arguments
        assert message in err
        assert len(err.strip().splitlines()) == 1
    assert not out.exists()
    unfinished = tmp_path / "half"
    shutil.copytree(runs[0], unfinished)
    (unfinished / "result.json").unlink()
    assert "has not ended; resume it first" in call("distill", unfinished, "-o", out)[2]
    assert call("distill", runs[0])[0] == 2
    assert call("distill", "-o", out)[0] == 2

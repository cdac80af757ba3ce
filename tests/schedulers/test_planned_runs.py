"""Runs whose epochs are planned: the ready-made ones, `rhc compare`, and other people's loops."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rhc
from rhc.cli.main import main
from rhc.compare.methods import method_of
from rhc.compare.runs import Task, run
from rhc.loop.fit import Fit
from rhc.loop.state import Attempt, Window
from rhc.loop.windows import commit
from rhc.rng import seed_everything
from rhc.schedulers import (
    STEERED,
    VALUES,
    EpochPlanner,
    EpochStats,
    FreshSeeds,
    LossSampler,
    hf_callback,
    lightning_callback,
)
from rhc.schedulers.planner import planned
from rhc.settings import TrainConfig
from rhc.workload import Workload, load_runner, optimizer_of


def digits(names: tuple[str, ...], seed: int = 0) -> tuple[Workload, list[Any]]:
    pytest.importorskip("sklearn")
    seed_everything(seed)
    workload = load_runner("digits")(seed=seed)
    assert workload.plannable is not None
    return workload.plannable.build(workload, names)


class TestKnobsOfReadyMadeRuns:
    def test_without_knobs_the_run_is_the_same(self) -> None:
        workload, knobs = digits(())
        assert knobs == [] and workload.loss_fn is load_runner("digits")(seed=0).loss_fn

    def test_a_sampler_without_strength_leaves_the_loss_as_it_is(self) -> None:
        workload, _ = digits(("sampling",))
        plain, _ = digits(())
        batch = next(iter(workload.train_loader))
        weighted, metrics = workload.loss_fn(workload.model, batch)
        loss, _ = plain.loss_fn(workload.model, batch[:2])
        assert weighted.item() == pytest.approx(loss.item(), rel=1e-6)
        assert torch.equal(metrics["example_index"], batch[2])
        workload.model.eval()
        assert "example_index" not in workload.loss_fn(workload.model, batch)[1]

    def test_augmentation_moves_training_images_only(self) -> None:
        workload, (augmentation,) = digits(("augmentation",))
        augmentation.value = 1.0
        batch = next(iter(workload.train_loader))
        seen: list[Tensor] = []
        workload.model.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
        workload.loss_fn(workload.model, batch)
        workload.model.eval()
        workload.loss_fn(workload.model, batch)
        assert not torch.equal(seen[0], batch[0]) and torch.equal(seen[1], batch[0])


def ppo(
    names: tuple[str, ...] = (), directory: Path | None = None, listener: Any = None
) -> rhc.Runner:
    pytest.importorskip("gymnasium")
    seed_everything(0)
    workload = load_runner("cartpole_ppo")(seed=0)
    assert workload.plannable is not None
    workload, knobs = workload.plannable.build(workload, names)
    return rhc.Runner(
        workload.model,
        optimizer_of("adam", workload.model.parameters(), 1e-3),
        workload.loss_fn,
        workload.train_loader,
        workload.val_loader,
        rewrite=False,
        window=15,
        directory=directory,
        planner=EpochPlanner(
            steer=("lr", "noise"), knobs=knobs, reward=FreshSeeds("fresh_return"), epoch_steps=40
        ),
        listeners=[] if listener is None else [listener],
    )


class TestPPO:
    @pytest.mark.slow
    def test_returns_rise_and_the_knobs_move(self) -> None:
        runner = ppo(("entropy", "clip_range", "gae_lambda"))
        result = runner.fit(240)
        returns = [row["fresh_return"] for row in result.tape if "fresh_return" in row]
        assert len(returns) == 12 and sum(returns[-3:]) > 2 * sum(returns[:3])
        assert runner.planner is not None and runner.planner.plan is not None
        plan = runner.planner.plan
        assert plan.entropy != 0.01 and len(runner.planner.history) == 6
        assert runner.planner.history[-1].source == "fresh seeds"

    @pytest.mark.parametrize("stop", [7, pytest.param(31, marks=pytest.mark.slow)])
    def test_a_run_that_is_stopped_within_a_rollout_ends_bit_for_bit(
        self, stop: int, tmp_path: Path
    ) -> None:
        from runs import FILES, Stop, stop_at_step

        names = ("entropy", "clip_range", "gae_lambda")
        ppo(names, tmp_path / "straight").fit(45)
        with pytest.raises(Stop):
            ppo(names, tmp_path / "stopped", stop_at_step(stop)).fit(45)
        ppo(names, tmp_path / "stopped").fit(45)
        for name in FILES:
            ours, theirs = (tmp_path / which / name for which in ("stopped", "straight"))
            assert ours.read_bytes() == theirs.read_bytes(), name

    def test_the_first_step_of_a_rollout_is_a_policy_gradient(self) -> None:
        """At a ratio of 1 nothing is clipped: the gradient of the surrogate is −E[Â ∇ log π]."""
        runner = ppo()
        loss_fn: Any = runner.plant.loss_fn.__wrapped__  # type: ignore[attr-defined]
        model: Any = runner.plant.model
        loss_fn.entropy.value = 1e-4
        batch = next(iter(runner.train_loader))
        loss, metrics = loss_fn(model, batch)
        loss.backward()
        played = loss_fn._kept
        generator = torch.Generator().manual_seed(int(batch["rollout"][0]) * 4)
        rows = torch.randperm(len(played.actions), generator=generator).tensor_split(5)[0]
        a = played.advantages[rows]
        a = (a - a.mean()) / (a.std() + 1e-6)
        logits = model(played.observations[rows])[:, 0]
        sign = torch.where(played.actions[rows], 1.0, -1.0)
        log_pi = nn.functional.logsigmoid(sign * logits)
        p = torch.sigmoid(logits)
        entropy = nn.functional.binary_cross_entropy(p, p)
        wanted = torch.autograd.grad(-(a * log_pi).mean() - 1e-4 * entropy, model.policy[0].weight)
        assert torch.allclose(model.policy[0].weight.grad, wanted[0], rtol=1e-3, atol=1e-6)
        assert loss.item() == pytest.approx(1 - float(metrics["return"]) / 200)

    def test_generalised_advantages(self) -> None:
        """λ = 1: returns to the end of the rollout minus the value, with its value at the end."""
        runner = ppo()
        loss_fn: Any = runner.plant.loss_fn.__wrapped__  # type: ignore[attr-defined]
        loss_fn.gae_lambda.bounds = (0.0, 1.0)
        loss_fn.gae_lambda.value = 1.0
        played = loss_fn._rollout(runner.plant.model, 5)
        # Of an episode that ends with its pole fallen k steps later, the return is 1 − γᵏ.
        k = torch.log(1 - played.returns.double().clamp(max=1 - 1e-9)) / math.log(0.99)
        whole = (k - k.round()).abs() < 1e-2
        assert float(whole.double().mean()) > 0.6

    def test_judging_leaves_the_model_as_it_is(self) -> None:
        runner = ppo()
        model: Any = runner.plant.model
        before = [b.clone() for b in model.buffers()]
        batch = next(iter(runner.val_loader or ()))
        model.eval()
        first = runner.plant.loss_fn(model, batch)[0]
        runner.plant.loss_fn(model, next(iter(runner.train_loader)))
        assert float(first) == float(runner.plant.loss_fn(model, batch)[0])
        assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))

    def test_data_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(rhc.InputError, match="takes no data"):
            load_runner("cartpole_ppo")(data=tmp_path)


class TestInOneWord:
    """`EpochPlanner.as_specified` and `rhc train --planner`."""

    def test_as_specified_plans_lr_momentum_and_noise_and_the_guards_stay(self) -> None:
        parameter = torch.zeros(1, requires_grad=True)
        sgd = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        planner = EpochPlanner.as_specified(sgd, knobs=("entropy", "gae_lambda"))
        assert planner.steer == STEERED
        for epoch in range(3):
            for step in range(20):
                planner.step(2.0 - 0.01 * (20 * epoch + step))
            planner.on_epoch_end(3.0 - epoch)
        group = sgd.param_groups[0]
        assert 0.1 < group["lr"] < 0.2 and 0.9 < group["momentum"] < 0.99
        assert planner.plan is not None and planner.plan.entropy == planner.knobs[0].value < 0.01
        still = planner.law(EpochStats(plateau=1.0), planner.plan)
        assert still.noise > 0 and (still.entropy or 0) > planner.plan.entropy
        for worse in (2.0, 3.0):
            plan = planner.on_epoch_end(worse)
        assert plan.mode == "conservative"

    def test_knobs_that_need_more_than_a_name(self) -> None:
        with pytest.raises(rhc.InputError, match="give a LossSampler"):
            EpochPlanner.as_specified(knobs=("sampling",))
        with pytest.raises(rhc.InputError, match="unknown knob 'colour': there are: augmentation"):
            EpochPlanner.as_specified(knobs=("colour",))

    @pytest.mark.parametrize("names", ["", "momentum sampling augmentation"])
    def test_a_run_is_planned_told_recorded_and_resumed_to_the_bit(
        self, names: str, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("sklearn")
        line = ["train", "digits", "--no-rewrite", "--steps", 60, "--window", 10, "--planner"]
        line += names.split()
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        status, out, _ = call(*line, "--directory", whole)
        assert status == 0 and "notice: epochs of 17 steps are planned in" in out
        assert "planned lr" in out and "momentum 0.907" in out
        rows = [json.loads(row) for row in (whole / "tape.jsonl").read_text().splitlines()]
        moved = {name for name in STEERED if len({row[name] for row in rows}) > 1}
        wanted = names.split() or list(STEERED)
        assert moved == {"lr", "momentum"}.intersection(wanted)
        for a, b in pairwise(row["planning"]["plan"] for row in rows if "planning" in row):
            for name in wanted:
                assert 0.8 * a[name] <= b[name] <= 1.25 * a[name] or a[name] == 0
        config = json.loads((whole / "config.json").read_text())["planner"]
        assert [*config["steer"], *config["knobs"]] == wanted

        def stopped(fit: Fit, window: Window, attempt: Attempt) -> None:
            if fit.state.step > 25:
                raise KeyboardInterrupt
            commit(fit, window, attempt)

        monkeypatch.setattr("rhc.loop.train.commit", stopped)
        assert call(*line, "--directory", cut)[0] == 130
        monkeypatch.undo()
        assert call("resume", cut)[0] == 0
        for name in ("tape.jsonl", "schedule.json"):
            assert (cut / name).read_bytes() == (whole / name).read_bytes()
        assert f"planned   {', '.join(wanted)}" in call("inspect", cut)[1]
        # What was planned in the loss or the data is in no schedule.
        status, out, err = call("replay", whole, "--seed", 3, "--directory", tmp_path / "replayed")
        assert status == 0 and ("sampling, augmentation is not in it" in out) == bool(names)
        status, out, err = call("hypergradient", whole)
        if names:
            assert status == 2 and "was planned in sampling, augmentation" in err
        else:
            assert status == 0 and "from the tape" not in out

    def test_without_it_nothing_is_planned(self, call: Callable[..., Any], tmp_path: Path) -> None:
        status, out, _ = call(
            "train", "sine", "--no-rewrite", "--steps", 40, "--directory", tmp_path
        )
        assert status == 0 and "planned" not in out and "--planner" in call("train", "--help")[1]
        assert "planner" not in json.loads((tmp_path / "config.json").read_text())

    def test_ppo_by_name(self, call: Callable[..., Any], tmp_path: Path) -> None:
        pytest.importorskip("gymnasium")
        line = "train cartpole_ppo --no-rewrite --steps 85 --planner entropy clip_range gae_lambda"
        status, out, _ = call(*line.split(), "--directory", tmp_path)
        assert status == 0 and "reward: fresh seeds" in out
        rows = [json.loads(row) for row in (tmp_path / "tape.jsonl").read_text().splitlines()]
        plans = [row["planning"]["plan"] for row in rows if "planning" in row]
        assert len(plans) == 2 and plans[-1]["entropy"] != 0.01
        assert {row["lr"] for row in rows} == {0.001}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("digits --planner entropy", "cannot steer 'entropy' in this run, which has lr, "
             "momentum, noise, sampling, augmentation; name some"),
            ("digits --planner beta1", "cannot steer 'beta1'"),
            ("sine --planner momentum --optimizer adagrad --lr 0.1", "which has lr, noise;"),
        ],
    )  # fmt: skip
    def test_what_a_run_does_not_have(
        self, call: Callable[..., Any], tmp_path: Path, arguments: str, message: str
    ) -> None:
        line = ["train", *arguments.split(), "--no-rewrite", "--directory", tmp_path / "x"]
        status, _, err = call(*line)
        assert (status, message in err) == (2, True), err
        assert not (tmp_path / "x").exists()

    def test_beta1_is_adam_s_momentum(self, call: Callable[..., Any], tmp_path: Path) -> None:
        pytest.importorskip("sklearn")
        line = "train digits --optimizer adam --no-rewrite --steps 51 --planner beta1 --directory"
        assert call(*line.split(), tmp_path)[0] == 0
        rows = [json.loads(row) for row in (tmp_path / "tape.jsonl").read_text().splitlines()]
        assert rows[-1]["momentum"] > 0.9 and rows[-1]["lr"] == 0.001

    def test_streams_and_momentum_that_is_not_there(self) -> None:
        workload = load_runner("drifting_sine")(seed=0)
        _, planner = planned(workload, STEERED)
        assert planner.epoch_steps == workload.steps // 20
        assert planner.reward.source == "training tape"
        config = TrainConfig(run="sine", optimizer="adagrad", lr=0.1, planner=())
        assert config.resolved(load_runner("sine")(seed=0), 1).planner == ("lr", "noise")


TABLES = Path(__file__).parents[2] / "benchmarks" / "methods.py"


class TestCompare:
    def test_every_planned_value_has_a_method_of_its_own(self) -> None:
        for name in (*VALUES, "drift", "failsafe"):
            assert method_of(f"{TABLES}:planner-{name.replace('_', '-')}").plans is not None

    @pytest.mark.parametrize(
        "method", [f"{TABLES}:planner-all", f"{TABLES}:planner-preset", "planner"]
    )
    def test_a_planned_run_costs_a_plain_one_and_its_validation(self, method: str) -> None:
        pytest.importorskip("sklearn")
        row = run(Task("digits", None, 60), method, 0.05, 0)
        assert math.isfinite(row.score) and 1 < row.cost < 1.1

    def test_a_planner_that_plans_nothing_is_the_run_without_it(self) -> None:
        pytest.importorskip("sklearn")
        task = Task("digits", None, 60)
        without = run(task, "constant", 0.05, 0)
        assert run(task, f"{TABLES}:planner-failsafe", 0.05, 0).score == without.score
        assert run(task, f"{TABLES}:planner-lr", 0.05, 0).score != without.score

    def test_at_the_command_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        pytest.importorskip("sklearn")
        line = "compare digits --methods planner --versus constant --seeds 2 --steps 40"
        assert main(line.split()) == 0
        assert "planner" in capsys.readouterr().out


def regression() -> tuple[TensorDataset, TensorDataset]:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    y = x.sum(1, keepdim=True)
    return TensorDataset(x[:48], y[:48]), TensorDataset(x[48:], y[48:])


class TestOtherLoops:
    def test_lightning_s_hooks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Played by hand, without the package."""
        stub: Any = ModuleType("lightning.pytorch")
        stub.Callback = object
        monkeypatch.setitem(sys.modules, "lightning", ModuleType("lightning"))
        monkeypatch.setitem(sys.modules, "lightning.pytorch", stub)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        planner = EpochPlanner(steer=("lr",))
        callback = lightning_callback(planner)
        trainer = SimpleNamespace(
            lr_scheduler_configs=[], optimizers=[optimizer], global_step=1, callback_metrics={},
            val_dataloaders=[1], current_epoch=0, check_val_every_n_epoch=1,
        )  # fmt: skip
        callback.on_fit_start(trainer, None)
        callback.on_train_batch_end(trainer, None, {"loss": torch.tensor(1.0)}, None, 0)
        with pytest.raises(rhc.InputError, match="the module logs no 'val_loss'"):
            callback.on_train_epoch_end(trainer, None)
        for loss in (2.0, 1.0):
            trainer.callback_metrics["val_loss"] = torch.tensor(loss)
            callback.on_train_epoch_end(trainer, None)
        assert planner.steps == 1 and optimizer.param_groups[0]["lr"] > 0.1
        again = EpochPlanner(steer=("lr",))
        resumed = lightning_callback(again)
        resumed.load_state_dict(callback.state_dict())
        resumed.on_fit_start(trainer, None)
        assert again.plan == planner.plan

    def test_the_trainer_s_hooks(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        stub: Any = ModuleType("transformers")
        stub.TrainerCallback = object
        monkeypatch.setitem(sys.modules, "transformers", stub)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        planner = EpochPlanner(steer=("lr",), knobs=[LossSampler(5)])
        callback = hf_callback(planner)
        given = {"optimizer": SimpleNamespace(optimizer=optimizer), "lr_scheduler": None}
        args, state = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(global_step=0)
        callback.on_train_begin(args, state, None, **given)
        callback.on_log(args, state, None, logs={"loss": 1.0, "grad_norm": 2.0})
        callback.on_epoch_end(args, state, None)
        assert not planner.history
        callback.on_evaluate(args, state, None, metrics={"eval_loss": 1.0})
        assert planner.history[0].gradient_rms == 2.0
        state.global_step = 7
        (tmp_path / "checkpoint-7").mkdir()
        callback.on_save(args, state, None)
        again = EpochPlanner(steer=("lr",), knobs=[LossSampler(5)])
        hf_callback(again).on_train_begin(args, state, None, **given)
        assert again.plan == planner.plan and again.steps == 1

    @pytest.mark.parametrize(
        "make, module", [(lightning_callback, "lightning"), (hf_callback, "transformers")]
    )
    def test_what_is_not_installed_is_named(
        self, make: Callable[..., Any], module: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in (module, "lightning.pytorch", "pytorch_lightning"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(rhc.InputError, match=f"pip install {module}"):
            make(EpochPlanner())

    @pytest.mark.filterwarnings("ignore")
    def test_lightning(self, tmp_path: Path) -> None:
        lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

        class Module(lightning.LightningModule):  # type: ignore[misc,name-defined]
            def __init__(self) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.model = nn.Linear(3, 1)

            def training_step(self, batch: Any, index: int) -> Tensor:
                return nn.functional.mse_loss(self.model(batch[0]), batch[1])

            def validation_step(self, batch: Any, index: int) -> None:
                self.log("val_loss", nn.functional.mse_loss(self.model(batch[0]), batch[1]))

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.5)
                scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.99**t)
                return [optimizer], [scheduler]

        train, val = regression()

        def trained(epochs: int, checkpoint: Any = None) -> tuple[EpochPlanner, Any, Any]:
            planner, module = EpochPlanner(steer=("lr", "momentum")), Module()
            trainer = lightning.Trainer(
                max_epochs=epochs, callbacks=[lightning_callback(planner)], logger=False,
                enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
                default_root_dir=tmp_path, enable_checkpointing=False,
            )  # fmt: skip
            trainer.fit(
                module, DataLoader(train, 8), DataLoader(val, 8), ckpt_path=checkpoint,
                **({"weights_only": False} if checkpoint else {}),
            )  # fmt: skip
            return planner, module, trainer

        straight, module, trainer = trained(6)
        assert [e.steps for e in straight.history] == [6] * 6
        assert straight.plan is not None and straight.plan.lr != 0.02
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        assert lr == pytest.approx(straight.plan.lr * 0.99**6)
        _, _, half = trained(3)
        half.save_checkpoint(tmp_path / "half.ckpt")
        resumed, again, _ = trained(6, tmp_path / "half.ckpt")
        assert resumed.plan == straight.plan
        assert torch.equal(again.model.weight, module.model.weight)

    @pytest.mark.filterwarnings("ignore")
    def test_the_hugging_face_trainer(self, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        pytest.importorskip("accelerate", reason="accelerate is not installed")

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(3, 1)

            def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
                found = self.linear(x)
                return {"loss": nn.functional.mse_loss(found, labels), "logits": found}

        train, val = ([{"x": x, "labels": y} for x, y in data] for data in regression())

        def trained(epochs: int, resume: bool = False) -> tuple[EpochPlanner, Any]:
            torch.manual_seed(0)
            planner = EpochPlanner(steer=("lr", "momentum"))
            trainer = transformers.Trainer(
                Model(),
                transformers.TrainingArguments(
                    output_dir=str(tmp_path / ("a" if epochs == 6 and not resume else "b")),
                    num_train_epochs=6, eval_strategy="epoch", save_strategy="epoch",
                    logging_steps=1, per_device_train_batch_size=8, learning_rate=0.02,
                    use_cpu=True, report_to=[], disable_tqdm=True,
                ),
                train_dataset=train, eval_dataset=val, callbacks=[hf_callback(planner)],
            )  # fmt: skip
            if epochs < 6:

                class StopThere(transformers.TrainerCallback):  # type: ignore[misc,name-defined]
                    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                        control.should_training_stop = state.epoch >= epochs

                trainer.add_callback(StopThere())
            trainer.train(resume_from_checkpoint=resume)
            return planner, trainer

        straight, trainer = trained(6)
        assert [e.steps for e in straight.history] == [6] * 6
        assert straight.plan is not None and straight.plan.lr != 0.02
        assert straight.plan.first_lr == 0.02
        trained(3)
        resumed, again = trained(6, resume=True)
        assert resumed.plan == straight.plan
        assert torch.equal(again.model.linear.weight, trainer.model.linear.weight)

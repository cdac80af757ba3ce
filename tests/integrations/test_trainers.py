"""Trainers whose loop is rewritten: equal to the Runner on the same parts, and trained as if they
had trained themselves. They run where the packages are installed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rhc
from rhc.errors import RunWarning
from rhc.events import Committed, Event

STEPS = 40


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


class Stop(Exception):
    pass


def stops_at(step: int) -> Any:
    def listener(event: Event) -> None:
        if isinstance(event, Committed) and event.stop >= step:
            raise Stop

    return listener


def same_bits(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# Hugging Face ------------------------------------------------------------------------------------


def rows(count: int, seed: int) -> list[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 32, (count, 8), generator=draw)
    return [{"input_ids": each, "labels": (each[0] > 15).long()} for each in ids]


def text() -> list[dict[str, Tensor]]:
    lines = [(start + torch.arange(9)) % 16 for start in range(80)]
    return [{"input_ids": line, "labels": line} for line in lines]


def hugging_face(folder: Path, kind: str, **settings: Any) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=8,
        )  # fmt: skip
        model, data, held_out = transformers.BertForSequenceClassification(config), rows, rows
        sets = data(160, 0), held_out(32, 1)
    else:
        config = transformers.GPT2Config(
            vocab_size=16, n_positions=9, n_embd=8, n_layer=1, n_head=2
        )
        model, sets = transformers.GPT2LMHeadModel(config), (text(), text()[:16])
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=16, max_steps=STEPS, logging_steps=10,
        eval_strategy="steps", eval_steps=20, save_steps=20, report_to=[], use_cpu=True,
        disable_tqdm=True, learning_rate=1e-3, **settings,
    )  # fmt: skip
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=sets[0], eval_dataset=sets[1]
    )


@pytest.mark.parametrize(
    "kind, settings",
    [("bert", {}), ("gpt", {"gradient_accumulation_steps": 2}), ("gpt", {"bf16": True})],
)
def test_a_hugging_face_trainer_is_trained_as_by_the_runner(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    trainer = hugging_face(tmp_path / "own", kind, **settings)
    from rhc.integrations.transformers import fit

    result = fit(trainer, window=10, start="given")
    assert any(row["outcome"] == "accepted" for row in result.windows)

    other = hugging_face(tmp_path / "other", kind, **settings)
    other.model.train()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        items = other._get_num_items_in_batch([batch], "cpu") if model.training else None
        more = {} if items is None else {"num_items_in_batch": items}
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(settings.get("bf16"))):
            return model(**batch, **more).loss

    runner = rhc.Runner(
        other.model, other.create_optimizer(), loss_fn, other.get_train_dataloader(),
        other.get_eval_dataloader(), window=10, start="given", clip_norm=1.0, seed=42,
        accumulate=settings.get("gradient_accumulation_steps", 1), directory=tmp_path / "run",
    )  # fmt: skip
    assert runner.fit(STEPS).val_loss == result.val_loss
    assert same_bits(other.model, trainer.model)

    history = trainer.state.log_history
    assert [log["step"] for log in history if "loss" in log] == [10, 20, 30, 40]
    assert [log["step"] for log in history if "eval_loss" in log] == [20, 40]
    assert trainer.state.global_step == STEPS
    saved = tmp_path / "own" / "checkpoint-40"
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= {
        path.name for path in saved.iterdir()
    }
    (last,) = [log["eval_loss"] for log in history if "eval_loss" in log and log["step"] == STEPS]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(last)


def test_a_hugging_face_trainer_is_resumed(tmp_path: Path) -> None:
    straight = hugging_face(tmp_path / "straight", "bert")
    from rhc.integrations.transformers import fit

    fit(straight, window=10)
    with pytest.raises(Stop):
        fit(hugging_face(tmp_path / "own", "bert"), window=10, listeners=[stops_at(20)])
    again = hugging_face(tmp_path / "own", "bert")
    fit(again, window=10)
    assert same_bits(again.model, straight.model)
    logs = [
        [(log["step"], log["loss"]) for log in each.state.log_history if "loss" in log]
        for each in (straight, again)
    ]
    assert logs[0] == logs[1]


def test_what_a_hugging_face_trainer_cannot_keep_is_named(tmp_path: Path) -> None:
    trainer = hugging_face(tmp_path, "bert")
    from rhc.integrations.transformers import fit

    with pytest.warns(RunWarning, match="lr scheduler is replaced .*; evaluation and checkpoints"):
        fit(trainer, window=10, steps=10)
    trainer.args.fp16 = True
    with pytest.raises(rhc.InputError, match="cannot be trained with rewriting: fp16"):
        fit(trainer)


# Lightning ---------------------------------------------------------------------------------------


def images() -> tuple[DataLoader[Any], DataLoader[Any]]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(160, 1, 8, 8, generator=draw)
    y = (x[:, 0, :4].sum((1, 2)) > 0).long()
    train, held_out = TensorDataset(x[:128], y[:128]), TensorDataset(x[128:], y[128:])
    return DataLoader(train, 16, shuffle=True), DataLoader(held_out, 16)


def cnn() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def lightning_parts(folder: Path) -> tuple[Any, Any, Any]:
    """(trainer, module, what was called)."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Classifier(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = cnn()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            out = self.net(batch[0])
            self.log("accuracy", (out.argmax(1) == batch[1]).float().mean())
            return nn.functional.cross_entropy(out, batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("held_out", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    class Counts(lightning.Callback):
        def __init__(self) -> None:
            self.steps = self.epochs = 0

        def on_train_start(self, *given: Any) -> None:
            torch.manual_seed(2)

        def on_train_batch_end(self, *given: Any) -> None:
            self.steps += 1

        def on_train_epoch_end(self, *given: Any) -> None:
            self.epochs += 1

    counts = Counts()
    checkpoints = lightning.pytorch.callbacks.ModelCheckpoint(folder, monitor="held_out")
    trainer = lightning.Trainer(
        max_epochs=5, accelerator="cpu", default_root_dir=folder, logger=False,
        callbacks=[counts, checkpoints], enable_progress_bar=False, enable_model_summary=False,
        gradient_clip_val=1.0, num_sanity_val_steps=0,
    )  # fmt: skip
    return trainer, Classifier(), counts


def test_a_lightning_trainer_is_trained_as_by_the_runner(tmp_path: Path) -> None:
    trainer, module, counts = lightning_parts(tmp_path)
    from rhc.integrations.lightning import fit

    result = fit(trainer, module, *images(), window=10)
    other = cnn()
    torch.manual_seed(2)
    loss = nn.functional.cross_entropy
    runner = rhc.Runner(
        other, torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9),
        lambda model, batch: loss(model(batch[0]), batch[1]), *images(), window=10, clip_norm=1.0,
    )  # fmt: skip
    assert runner.fit(STEPS).val_loss == result.val_loss and same_bits(other, module.net)
    assert trainer.global_step == counts.steps == STEPS
    assert trainer.current_epoch == counts.epochs == 5
    assert "accuracy" in result.tape[0] and "accuracy" in trainer.callback_metrics
    assert [path for path in tmp_path.glob("*.ckpt") if "step=" in path.name]
    (found,) = trainer.validate(module, images()[1], verbose=False)
    assert found["held_out"] == pytest.approx(result.val_loss)


def test_a_lightning_trainer_is_resumed(tmp_path: Path) -> None:
    from rhc.integrations.lightning import fit

    straight = lightning_parts(tmp_path / "straight")
    fit(*straight[:2], *images(), window=10)
    stopped = lightning_parts(tmp_path / "own")
    with pytest.raises(Stop):
        fit(*stopped[:2], *images(), window=10, listeners=[stops_at(20)])
    again = lightning_parts(tmp_path / "own")
    fit(*again[:2], *images(), window=10)
    assert same_bits(again[1], straight[1]) and again[0].global_step == STEPS


def test_a_module_that_steps_by_itself_is_refused(tmp_path: Path) -> None:
    trainer, module, _ = lightning_parts(tmp_path)
    from rhc.integrations.lightning import fit

    module.automatic_optimization = False
    with pytest.raises(rhc.InputError, match="it steps by itself"):
        fit(trainer, module, *images())


# Accelerate --------------------------------------------------------------------------------------


def accelerated(folder: Path, precision: str, *listeners: Any) -> tuple[nn.Module, rhc.RunResult]:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from rhc.integrations.accelerate import fit

    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    parts = accelerator.prepare(model, optimizer, *images())
    torch.manual_seed(2)
    loss = nn.functional.cross_entropy
    result = fit(
        accelerator, *parts[:2], lambda m, b: loss(m(b[0]), b[1]), *parts[2:], steps=STEPS,
        window=10, directory=folder, listeners=listeners,
    )  # fmt: skip
    return model, result


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_what_accelerate_prepared_is_trained_and_resumed(precision: str, tmp_path: Path) -> None:
    model, result = accelerated(tmp_path / "straight", precision)
    with pytest.raises(Stop):
        accelerated(tmp_path / "own", precision, stops_at(20))
    again, resumed = accelerated(tmp_path / "own", precision)
    assert same_bits(model, again) and resumed.val_loss == result.val_loss
    if precision == "no":
        other = cnn()
        torch.manual_seed(2)
        loss = nn.functional.cross_entropy
        runner = rhc.Runner(
            other, torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9),
            lambda m, b: loss(m(b[0]), b[1]), *images(), window=10, directory=tmp_path / "run",
        )  # fmt: skip
        assert runner.fit(STEPS).val_loss == result.val_loss and same_bits(other, model)

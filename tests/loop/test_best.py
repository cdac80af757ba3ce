"""The best validated state: which one it is, that it is kept, and that a run can end with it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Run, Stop, clouds, files, make_run, state_of, stop_at_event, unequal
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from rhc import InputError, Rewrite, Runner
from rhc.events import CheckpointSaved, Committed
from rhc.loop.best import validation_steps
from rhc.storage.checkpoint import CheckpointStore
from rhc.training.evaluate import evaluate

STEPS, WINDOW = 24, 3


def over_fitting(seed: int = 0) -> Run:
    """Eight rows of training data at a high lr: the loss on others falls, and then rises."""
    run = make_run("sgd", seed=seed, lr=0.05, dropout=0.0)
    return run._replace(train=DataLoader(clouds(8), 4, shuffle=True))


def runner(run: Run, directory: Path | None = None, **options: Any) -> Runner:
    usual = {"window": WINDOW, "validate_every": WINDOW, "test_loader": run.val, "start": "given"}
    return Runner(*run, directory=directory, **{**usual, **options})


def followed(keep_best: bool, directory: Path | None, **options: Any) -> dict[str, Any]:
    """A run whose validation losses and models are noted from outside."""
    run, seen = over_fitting(), dict[int, tuple[float, Any]]()

    def note(event: Any) -> None:
        if isinstance(event, Committed):
            judged = evaluate(made.plant, run.val)
            model = {k: v.clone() for k, v in run.model.state_dict().items()}
            assert judged is not None
            seen[event.stop] = judged.loss, model

    made = runner(run, directory, keep_best=keep_best, listeners=[note], **options)
    result = made.fit(STEPS)
    best = min(seen, key=lambda step: seen[step][0])
    return {"run": run, "seen": seen, "best": best, "record": result.record}


@pytest.mark.parametrize("rewrite", [False, Rewrite(step={"lr": 0.1})])
def test_a_run_ends_with_its_best_validated_state(tmp_path: Path, rewrite: Any) -> None:
    found = followed(True, tmp_path, rewrite=rewrite)
    record, best, seen = found["record"], found["best"], found["seen"]
    assert 0 < best < STEPS and seen[best][0] < 0.9 * seen[STEPS][0], "it over-fits"
    assert record["best_step"] == best and record["ends_with"] == "best"
    assert record["val_loss"] == record["best_val_loss"] == seen[best][0]
    assert record["test_loss"] == record["best_test_loss"] == seen[best][0]
    assert record["last_val_loss"] == seen[STEPS][0]
    assert record["train_loss"] > record["last_train_loss"]
    assert unequal(dict(found["run"].model.state_dict()), seen[best][1]) == []
    kept = load_file(tmp_path / "checkpoints/best/model.safetensors")
    for name, value in found["run"].model.named_parameters():
        assert torch.equal(kept[f"parameter.{name}"], value)


def test_or_with_its_last_and_says_what_the_best_was() -> None:
    ends = {keep: followed(keep, None, rewrite=False) for keep in (False, True)}
    record = ends[False]["record"]
    assert record["ends_with"] == "last" and record["val_loss"] > record["best_val_loss"]
    last = ends[False]["seen"][STEPS][1]
    assert unequal(dict(ends[False]["run"].model.state_dict()), last) == []
    for name in ("best_step", "best_val_loss", "best_test_loss", "best_metrics"):
        assert len({json.dumps(each["record"][name]) for each in ends.values()}) == 1
    assert any("ends with the state of step" in text for text in ends[True]["record"]["notices"])


def test_unasked_a_steered_run_ends_with_its_last_state_and_knows_the_best() -> None:
    record = followed(False, None, rewrite=Rewrite(step={"lr": 0.1}))["record"]
    assert record["ends_with"] == "last" and record["best_step"] < STEPS
    assert record["best_val_loss"] < record["val_loss"]


def test_how_often_a_run_is_validated_unasked() -> None:
    """At most twenty times, and a batch at most at every thirtieth step."""
    batches = [None] * 2
    found = {steps: validation_steps(None, None, batches, steps) for steps in (50, 600, 9000)}
    assert found == {50: None, 600: 60, 9000: 450}
    assert validation_steps(7, None, batches, 600) == 7
    assert validation_steps(None, True, batches, 600) == 60
    assert validation_steps(None, False, batches, 600) is None
    assert validation_steps(None, None, iter(batches), 600) is None

    class Own(torch.utils.data.IterableDataset[int]):
        def __iter__(self) -> Own:
            return self

        def __next__(self) -> int:
            return 0

        def __len__(self) -> int:
            return 2

    loader = DataLoader(Own(), None)
    assert validation_steps(None, None, loader, 600) is None, "a place of its own"


def test_keeping_needs_something_to_judge_by() -> None:
    run = over_fitting()._replace(val=None)
    with pytest.raises(InputError, match="keep_best needs a val_loader"):
        runner(run, keep_best=True, validate_every=None)
    record = runner(run, rewrite=False, validate_every=None).fit(4).record
    assert record["best_step"] is None and record["best_val_loss"] is None


def test_passes_keep_the_best_state_of_the_roll_that_is_kept(tmp_path: Path) -> None:
    """Also where the run is asked for again."""
    for _ in range(2):
        run = over_fitting()
        made = runner(run, tmp_path, rewrite=True, passes=1, keep_best=True)
        result = made.fit(STEPS)
        losses = {r["step"] + 1: r["val_loss"] for r in result.tape if "val_loss" in r}
        best = min(losses, key=lambda step: losses[step])
        assert result.record["best_step"] == best < STEPS and result.passes
        kept = load_file(tmp_path / "checkpoints/best/model.safetensors")
        for name, value in run.model.named_parameters():
            assert torch.equal(kept[f"parameter.{name}"], value)


# Interrupted -------------------------------------------------------------------------------------


OPTIONS: dict[str, Any] = {"keep_best": True, "rewrite": Rewrite(step={"lr": 0.3})}


def outcome(run: Run, directory: Path, record: dict[str, Any]) -> dict[str, Any]:
    record = json.loads(json.dumps(record))
    del record["wall_seconds"], record["cost"]["peak_memory_bytes"]
    kept = {
        path.name: load_file(path)
        for path in sorted((directory / "checkpoints/best").glob("*.safetensors"))
    }
    return {"state": state_of(run), "files": files(directory), "record": record, "kept": kept}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory, run = tmp_path_factory.mktemp("straight") / "run", over_fitting()
    found = outcome(run, directory, runner(run, directory, **OPTIONS).fit(STEPS).record)
    assert WINDOW < found["record"]["best_step"] < STEPS - WINDOW
    return found


def goes_on(directory: Path) -> dict[str, Any]:
    """To the end with new objects of another seed."""
    run = over_fitting(seed=5)
    return outcome(run, directory, runner(run, directory, **OPTIONS).fit(STEPS).record)


def test_an_interrupted_run_keeps_the_same_state(straight: dict[str, Any], tmp_path: Path) -> None:
    number, directory = 7, tmp_path / "run"
    while True:
        try:
            listeners = [stop_at_event(number)]
            runner(over_fitting(), directory, listeners=listeners, **OPTIONS).fit(STEPS)
        except Stop:
            assert unequal(goes_on(directory), straight) == [], number
            shutil.rmtree(directory)
            number += 41
        else:
            break
    again = goes_on(directory)  # finished: what it ended with is there at once
    assert unequal(again["state"]["model"], straight["state"]["model"]) == []


def test_killed_before_the_best_one_is_kept(
    straight: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint of the best step is there, and nothing called best."""
    keep_best = CheckpointStore.keep_best

    def killed(store: CheckpointStore, source: Path) -> None:
        if source == store.path(straight["record"]["best_step"]):
            raise Stop
        keep_best(store, source)

    monkeypatch.setattr(CheckpointStore, "keep_best", killed)
    with pytest.raises(Stop):
        runner(over_fitting(), tmp_path, **OPTIONS).fit(STEPS)
    monkeypatch.undo()

    def stop_later(event: Any) -> None:
        later = straight["record"]["best_step"] + WINDOW
        if isinstance(event, CheckpointSaved) and event.step == later:
            raise Stop

    with pytest.raises(Stop):
        runner(over_fitting(1), tmp_path, listeners=[stop_later], **OPTIONS).fit(STEPS)
    assert unequal(goes_on(tmp_path), straight) == []


def test_training_on_goes_on_from_the_last_state(tmp_path: Path) -> None:
    options = {"rewrite": False, "keep_best": True}
    whole = over_fitting()
    runner(whole, tmp_path / "whole", **options).fit(2 * STEPS)
    first = runner(over_fitting(), tmp_path / "run", **options).fit(STEPS)
    assert first.record["ends_with"] == "best"
    run = over_fitting(seed=5)
    runner(run, tmp_path / "run", **options).fit(2 * STEPS)
    assert unequal(state_of(run), state_of(whole)) == []


def test_a_damaged_best_state_is_told_and_another_takes_its_place(tmp_path: Path) -> None:
    def stop_late(event: Any) -> None:
        if isinstance(event, CheckpointSaved) and event.step == STEPS - WINDOW:
            raise Stop

    heard: list[Any] = []
    with pytest.raises(Stop):
        runner(over_fitting(), tmp_path, listeners=[stop_late], **OPTIONS).fit(STEPS)
    (tmp_path / "checkpoints/best/model.safetensors").unlink()
    made = runner(over_fitting(), tmp_path, listeners=[heard.append], **OPTIONS)
    record = made.fit(STEPS).record
    assert any("the best validated state" in getattr(event, "message", "") for event in heard)
    assert record["best_step"] == STEPS and record["ends_with"] == "last"

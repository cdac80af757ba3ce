"""Loggers hear of what was committed, once and in order, also of runs that are resumed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from runs import Stop, make_run, stop_at_step

import rhc
from rhc import Runner
from rhc.cli.main import main
from rhc.errors import InputError
from rhc.loop.update_rule import Rewrite
from rhc.report.loggers import WandB, listeners_of


def trained(**settings: Any) -> Runner:
    """A Runner that looks back at every window."""
    law = Rewrite(until=1.0)
    return Runner(*make_run(), **{"start": "given", "rewrite": law, "window": 5, **settings})


class Book:
    """A logger that writes down what it is told."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, int]] = []
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.attempts: list[tuple[int, dict[str, float]]] = []
        self.texts: list[tuple[int, str, str]] = []
        self.results: list[dict[str, float]] = []

    def begin(self, step: int, attempts: int, settings: Mapping[str, Any]) -> None:
        self.begun.append((step, attempts))

    def step(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append((step, dict(values)))

    def attempt(self, number: int, values: Mapping[str, float]) -> None:
        self.attempts.append((number, dict(values)))

    def text(self, step: int, kind: str, message: str) -> None:
        self.texts.append((step, kind, message))

    def end(self, result: Mapping[str, float]) -> None:
        self.results.append(dict(result))


def test_committed_steps_once_and_in_order() -> None:
    book = Book()
    result = trained(logger=book, window=5).fit(30)
    assert [step for step, _ in book.steps] == list(range(30))
    assert [v["loss"] for _, v in book.steps] == [row["loss"] for row in result.tape]
    assert [number for number, _ in book.attempts] == list(range(len(result.windows)))
    assert {"objective_before", "accepted"} <= book.attempts[0][1].keys()
    assert book.results[0]["cost/plain_run_equivalents"] == result.cost["plain_run_equivalents"]


def test_a_run_that_is_resumed_goes_on_where_its_checkpoint_is(tmp_path: Path) -> None:
    first, second = Book(), Book()
    with pytest.raises(Stop):
        trained(directory=tmp_path, window=5, logger=first, listeners=[stop_at_step(17)]).fit(30)
    result = trained(directory=tmp_path, window=5, logger=second).fit(30)
    (step, attempts) = second.begun[0]
    assert 0 < step <= 17 and 0 < attempts <= len(first.attempts)
    merged = dict(first.steps[:step]) | dict(second.steps)
    assert [merged[i]["loss"] for i in range(30)] == [row["loss"] for row in result.tape]
    assert [n for n, _ in second.attempts] == list(range(attempts, len(result.windows)))


def test_one_that_fails_is_left_alone() -> None:
    class Broken(Book):
        def step(self, step: int, values: Mapping[str, float]) -> None:
            raise ConnectionError("the server is gone")

    broken, book = Broken(), Book()
    with pytest.warns(UserWarning, match=r"logger Broken failed .* the server is gone"):
        trained(logger=[broken, book], window=5).fit(20)
    assert len(book.steps) == 20 and broken.results == [{}]


class Picky(Book):
    """One that takes no "@", and says so when it has taken what comes before it."""

    def step(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if "@" in name:
                raise ValueError(f"no {name}")
            super().step(step, {name: value})

    def end(self, result: Mapping[str, float]) -> None:
        if any("@" in name for name in result):
            raise ValueError("no @")
        super().end(result)


def test_a_name_that_a_logger_does_not_take_loses_nothing_else() -> None:
    run = make_run()

    def loss_fn(model: Any, batch: Any) -> Any:
        loss, _ = run.loss_fn(model, batch)
        return loss, {"acc@1": loss.detach(), "kept": loss.detach(), "acc@5": loss.detach()}

    book = Picky()
    with pytest.warns(UserWarning, match="Picky does not take the name") as told:
        result = Runner(
            run.model, run.optimizer, loss_fn, run.train, run.val, rewrite=False, window=5,
            logger=book,
        ).fit(20)  # fmt: skip
    assert [str(w.message).split("'")[1] for w in told] == ["acc@1", "acc@5"]
    for name in ("loss", "kept"):
        found = [(step, v[name]) for step, v in book.steps if name in v]
        assert dict(found) == {row["step"]: row[name] for row in result.tape}
    assert book.results[0]["val_loss"] == result.val_loss
    assert "metrics/val/kept" in book.results[0] and len(book.results) == 1


def test_a_run_that_is_stopped_ends_its_logger() -> None:
    book = Book()
    with pytest.raises(Stop):
        trained(logger=book, listeners=[stop_at_step(7)]).fit(20)
    assert book.results == [{}]


def test_names_for_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMLflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    logger = rhc.report.loggers.MLflow()
    names = ["acc@1", "acc(1", "acc_1", "loss (ce)", "a//b/", "../x", "/", "", "é:%", "x" * 400]
    logger.begin(0, 0, {"a setting [x]": 1, "steps": 2})
    for _ in range(2):
        logger.step(0, {name: float(i) for i, name in enumerate(names)})
    logger.text(0, "not finite: α", "a message")
    told = [name for name, _, _ in fake.metrics]
    assert told[: len(names)] == told[len(names) :] and len(set(told)) == 2 * len(names) // 2
    assert told[:9] == [
        "acc_1", "acc_1_2", "acc_1_3", "loss _ce_", "a/_/b/_", "_/x", "_/_", "_", "é__"
    ]  # fmt: skip
    assert max(map(len, told)) <= 250
    assert set(fake.params) == {"a setting _x_", "steps"}
    assert "rhc.not finite_ α.0" in fake.tags
    logger.end({"metrics/val/acc@1": 0.5})
    assert fake.metrics[-1][0] == "result/metrics/val/acc_1" and fake.status == "FINISHED"


def test_mlflow_itself_takes_every_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow or mlflow-skinny is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path / 'mlruns'}")
    run = make_run()

    def loss_fn(model: Any, batch: Any) -> Any:
        loss, _ = run.loss_fn(model, batch)
        return loss, {name: loss.detach() for name in ("acc@1", "acc(1", "../a", "loss (ce)")}

    runner = Runner(run.model, run.optimizer, loss_fn, run.train, rewrite=False, window=5,
                    logger=rhc.report.loggers.MLflow(), config={"a [b]": 1})  # fmt: skip
    assert runner.fit(10).tape and mlflow.active_run() is None
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()])
    for name in ("loss", "acc_1", "acc_1_2", "_/a", "loss _ce_"):
        assert len(client.get_metric_history(found.info.run_id, name)) == 10
    assert found.info.status == "FINISHED" and "a _b_" in found.data.params


def test_what_is_no_logger_is_refused() -> None:
    with pytest.raises(InputError, match="has no begin, step, attempt, text, end"):
        listeners_of(3, None)  # type: ignore[arg-type]


# Services, by fakes of their API ------------------------------------------------------------------


class FakeWandB(ModuleType):
    """What wandb.init, run.log and run.finish keep; a run of a known id is taken up again."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: dict[str, Any] = {}
        self.run: Any = None
        self.offline = False

    def init(self, **settings: Any) -> Any:
        name = settings.get("id", f"run-{len(self.runs)}")
        run = self.runs.setdefault(
            name,
            SimpleNamespace(
                rows=[], summary={}, axes={}, finished=0, settings=settings, id=name, step=0
            ),
        )
        self.run = run
        if self.offline:  # what the run has lies in another file, which wandb does not read
            run.summary, run.step = {}, 0

        def log(values: dict[str, Any], step: int) -> None:
            if step >= run.step:
                run.rows.append({**values, "_step": step})
                run.summary.update(values)
                run.step = step

        def define_metric(name: str, step_metric: str | None = None) -> None:
            run.axes[name] = step_metric

        def finish() -> None:
            assert self.run is run
            run.finished += 1
            self.run = None

        run.log, run.define_metric, run.finish = log, define_metric, finish
        return run


class FakeMLflow(ModuleType):
    """What mlflow keeps of one run."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.metrics: list[tuple[str, float, int | None]] = []
        self.params: dict[str, str] = {}
        self.tags: dict[str, Any] = {}
        self.ended = 0
        self.active: Any = None

    def active_run(self) -> Any:
        return self.active

    def start_run(self, **settings: Any) -> Any:
        assert self.active is None, "mlflow has one active run"
        name = settings.get("run_id", "one")
        self.active = SimpleNamespace(info=SimpleNamespace(run_id=name), data=SimpleNamespace())
        return self.active

    def log_metrics(self, values: dict[str, float], step: int | None = None) -> None:
        self.metrics += [(name, value, step) for name, value in values.items()]

    def log_params(self, values: dict[str, str]) -> None:
        if self.params:
            raise ValueError("a parameter cannot be changed")
        assert all(len(v) <= 500 for v in values.values())
        self.params = values

    def set_tag(self, name: str, value: Any) -> None:
        self.tags[name] = value

    def end_run(self, status: str = "FINISHED") -> None:
        self.status = status
        self.ended += 1
        self.active = None

    def MlflowClient(self) -> Any:
        def history(run: str, metric: str) -> list[Any]:
            return [SimpleNamespace(step=s) for name, _, s in self.metrics if name == metric]

        return SimpleNamespace(get_metric_history=history)


@pytest.mark.parametrize("service", ["wandb", "wandb offline", "mlflow"])
@pytest.mark.parametrize("process", ["same", "another"])
def test_services_never_go_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: str, process: str
) -> None:
    """Interrupted past its checkpoint and resumed: every step and attempt is there once.

    As wandb 0.31 and mlflow 3.17 were seen to do it: docs/log.md.
    """
    fake: Any = FakeMLflow() if service == "mlflow" else FakeWandB()
    monkeypatch.setitem(sys.modules, service.split()[0], fake)
    kind = rhc.report.loggers.MLflow if service == "mlflow" else rhc.report.loggers.WandB
    with pytest.raises(Stop):
        trained(directory=tmp_path, window=5, logger=kind(), listeners=[stop_at_step(17)]).fit(30)
    if service == "mlflow":  # the run is not left open for the next to log into
        assert fake.active is None and fake.status == "FAILED"
    else:
        assert fake.run is None
    if process == "another":
        fake.offline = service == "wandb offline"
    result = trained(directory=tmp_path, window=5, logger=kind()).fit(30)
    if service != "mlflow":
        (run,) = fake.runs.values()
        numbers = [row["_step"] for row in run.rows]
        assert numbers == sorted(numbers), "wandb drops a row with a number that it has passed"
        steps = [row["step"] for row in run.rows if "loss" in row]
        attempts = [row["windows/number"] for row in run.rows if "windows/number" in row]
        assert run.axes["*"] == "step" and run.axes["windows/*"] == "windows/number"
        assert run.summary["result/val_loss"] == result.val_loss and run.finished == 2
    else:
        steps = [s for name, _, s in fake.metrics if name == "loss"]
        attempts = [s for name, _, s in fake.metrics if name == "windows/accepted"]
        assert ("result/val_loss", result.val_loss, None) in fake.metrics
        assert (fake.ended, fake.status) == (2, "FINISHED")
        assert fake.params["window"] == "5"
    assert steps == list(range(30))
    assert attempts == list(range(len(result.windows)))


@pytest.mark.parametrize("service", ["wandb", "mlflow"])
def test_a_run_of_a_service_that_is_active_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    """And left active: whoever began it ends it."""
    fake: Any = FakeMLflow() if service == "mlflow" else FakeWandB()
    monkeypatch.setitem(sys.modules, service, fake)
    mine = fake.start_run(run_id="mine") if service == "mlflow" else fake.init(id="mine")
    if service == "wandb":
        mine.log({"mine": 1}, step=7)
    kind = rhc.report.loggers.MLflow if service == "mlflow" else rhc.report.loggers.WandB
    trained(directory=tmp_path, window=5, logger=kind()).fit(10)
    assert (tmp_path / f"{service}.id").read_text() == "mine"
    if service == "wandb":
        assert fake.run is mine and not mine.finished and len(fake.runs) == 1
        assert [row["step"] for row in mine.rows if "loss" in row] == list(range(10))
    else:
        assert fake.active is mine and not fake.ended


def test_a_service_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        WandB()


# TensorBoard --------------------------------------------------------------------------------------


def test_tensorboard_at_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    line = "train sine --steps 60 --window 20 --budget 9 --tensorboard --directory run"
    assert main(line.split()) == 0

    def read(part: str, tag: str) -> list[tuple[int, float]]:
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / part))
        events.Reload()
        return [(e.step, e.value) for e in events.Scalars(tag)]

    assert [step for step, _ in read("steps", "loss")] == list(range(60))
    numbers = [step for step, _ in read("windows", "windows/accepted")]
    assert numbers == list(range(len(numbers))) and numbers
    # Asked for when the run had ended: the same, from its files.
    assert main([*line.replace("--tensorboard", "").split()[:-1], "later"]) == 0
    assert not (tmp_path / "later" / "tensorboard").exists()
    assert main([*line.split()[:-1], "later"]) == 0
    (tmp_path / "run").rename(tmp_path / "first")
    (tmp_path / "later").rename(tmp_path / "run")
    assert [step for step, _ in read("steps", "loss")] == list(range(60))
    assert [step for step, _ in read("windows", "windows/accepted")] == numbers
    # More steps: the files are gone on with, as they are there.
    assert main(["resume", "run", "--steps", "80"]) == 0
    assert [step for step, _ in read("steps", "loss")] == list(range(80))

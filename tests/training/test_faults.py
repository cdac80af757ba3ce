"""Faults while a run trains: disks, signals, memory, numbers, loaders. What was saved stays."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_disk import FaultyDisk
from runs import Run, classify, files, make_run, state_of, unequal
from safetensors.torch import load_file
from torch import nn

from rhc import InputError, Rewrite, Runner
from rhc.errors import DivergedError, StorageError
from rhc.events import CheckpointSaved, Notice, StepTaken
from rhc.hypergradient import ReversePass
from rhc.loop.update_rule import Twin
from rhc.training import interrupts as stopping
from rhc.training.recovery import OomFallback, out_of_memory

STEPS = 11
LAW = Rewrite(step={"lr": 1.5, "momentum": 0.5, "noise": 4.0}, damping=1e-9)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def runner(run: Run, directory: Path | None, listener: Any = None, **options: Any) -> Runner:
    options = {"window": 4, "rewrite": LAW, "start": "given"} | options
    listeners = [] if listener is None else [listener]
    return Runner(*run, directory=directory, listeners=listeners, **options)


def notices_of(events: list[Any]) -> list[str]:
    """But for what every run with BatchNorm is told."""
    found = [e.message for e in events if isinstance(e, Notice)]
    return [n for n in found if not n.startswith("running statistics ")]


def outcome(run: Run, directory: Path, record: dict[str, Any]) -> dict[str, Any]:
    record = json.loads(json.dumps(record))
    del record["wall_seconds"], record["cost"]["peak_memory_bytes"]
    return {"state": state_of(run), "files": files(directory), "record": record}


# The disk ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How the run ends that no fault comes in the way of."""
    run, directory = make_run("adamw"), tmp_path_factory.mktemp("expected") / "whole"
    result = runner(run, directory).fit(STEPS)
    return outcome(run, directory, result.record)


ERRORS = {"full": errno.ENOSPC, "broken": errno.EIO, "read-only": errno.EROFS}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("operation", ["write", "fsync", "open", "rename", "replace", "mkdir"])
def test_a_disk_that_fails_for_a_while(
    name: str, operation: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    """From the first committed window on, for as long as the next one takes: said once each way."""
    events: list[Any] = []
    failing = [False]

    def listener(event: Any) -> None:
        events.append(event)
        if isinstance(event, StepTaken):
            failing[0] = 4 <= event.step < 8

    run = make_run("adamw")
    error = OSError(ERRORS[name], os.strerror(ERRORS[name]))
    with FaultyDisk(lambda n, what: error if failing[0] and what == operation else None) as disk:
        result = runner(run, tmp_path / "run", listener).fit(STEPS)
    assert disk.failed
    found = [n for n in notices_of(events) if "older checkpoints" not in n]
    assert len(found) == 2, found
    assert f"cannot be written ({error.strerror}): training goes on" in found[0]
    assert "can be written again, and nothing of the run is missing" in found[1]
    assert unequal(expected, outcome(run, tmp_path / "run", result.record)) == []


@pytest.mark.parametrize("name", ERRORS)
def test_a_disk_that_never_comes_back(name: str, expected: dict[str, Any], tmp_path: Path) -> None:
    """It trains to the end and says so; the next run goes on from what is there."""
    failing = [False]

    def listener(event: Any) -> None:
        failing[0] |= isinstance(event, CheckpointSaved) and event.step == 4

    run = make_run("adamw")
    error = OSError(ERRORS[name], os.strerror(ERRORS[name]))
    with (
        FaultyDisk(lambda n, what: error if failing[0] else None),
        pytest.raises(StorageError) as raised,
    ):
        runner(run, tmp_path / "run", listener).fit(STEPS)
    message = str(raised.value)
    assert "the run has ended, but the result of 11 steps could not be written" in message
    assert "the checkpoint of step 4 is there" in message and "\n" not in message
    assert raised.value.result.record["steps"] == STEPS  # type: ignore[attr-defined]
    assert unequal(expected["state"], state_of(run)) == []
    again = make_run("adamw", seed=99)
    result = runner(again, tmp_path / "run").fit(STEPS)
    assert unequal(expected, outcome(again, tmp_path / "run", result.record)) == []


@pytest.mark.parametrize("since", ["the first checkpoint", "the first window"])
def test_a_disk_that_comes_back_at_the_end(
    since: str, expected: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that is owed is written with the result, and first: nothing is missing."""
    failing = [False]

    def listener(event: Any) -> None:
        if since == "the first window" and isinstance(event, CheckpointSaved) and event.step == 4:
            failing[0] = True

    def sleep(seconds: float) -> None:
        if seconds:  # the result is tried for the second time
            failing[0] = False

    monkeypatch.setattr("rhc.storage.run_directory.time.sleep", sleep)
    run = make_run("adamw")
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    made = [0]

    def fault(number: int, what: str) -> OSError | None:
        made[0] += what == "mkdir"  # of the run's directory, then of checkpoints/
        if since == "the first checkpoint" and what == "mkdir" and made[0] == 2:
            failing[0] = True
        return error if failing[0] else None

    with FaultyDisk(fault) as disk:
        result = runner(run, tmp_path / "run", listener).fit(STEPS)
    assert disk.failed
    assert unequal(expected, outcome(run, tmp_path / "run", result.record)) == []
    again = make_run("adamw", seed=99)
    assert runner(again, tmp_path / "run").fit(STEPS).record["steps"] == STEPS
    assert unequal(expected["state"]["model"], state_of(again)["model"]) == []


def test_a_tape_is_not_written_before_a_checkpoint(
    expected: dict[str, Any], tmp_path: Path
) -> None:
    """A disk that takes everything but checkpoints: told at the end, and begun again."""
    run = make_run("adamw")
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        FaultyDisk(lambda n, what: error if what == "rename" else None),
        pytest.raises(StorageError, match="no checkpoint is there"),
    ):
        runner(run, tmp_path / "run").fit(STEPS)
    again = make_run("adamw")
    result = runner(again, tmp_path / "run").fit(STEPS)
    assert unequal(expected, outcome(again, tmp_path / "run", result.record)) == []


def full_at(number: int, operations: int) -> Any:
    """A disk that has no room for `operations` operations from `number` on."""
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return lambda n, what: error if number <= n < number + operations else None


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.slow)])
def test_full_at_every_operation(every: int, expected: dict[str, Any], tmp_path: Path) -> None:
    """Once, and three times in a row: the run ends as ever, or, where the last operations fail,
    says so and ends when it is asked again; a good checkpoint stays."""
    with FaultyDisk() as disk:
        runner(make_run("adamw"), tmp_path / "counted").fit(STEPS)
    first = disk.names.index("write") + 20  # before the configuration is written there is no run
    for number in range(first, len(disk.names), every):
        directory = tmp_path / str(number)
        run = make_run("adamw")
        with FaultyDisk(full_at(number, 1 + 2 * (number % 2))) as faulty:
            try:
                result = runner(run, directory).fit(STEPS)
            except InputError as error:
                assert "cannot be" in str(error)
                shutil.rmtree(directory)
                continue
            except StorageError:
                # The last operations of the run, three times in a row: said, and made good here.
                faulty.fault = lambda n, what: None
                run = make_run("adamw")
                result = runner(run, directory).fit(STEPS)
        assert faulty.failed
        assert unequal(expected, outcome(run, directory, result.record)) == [], disk.names[number]
        again = make_run("adamw", seed=99)
        assert runner(again, directory).fit(STEPS).record["steps"] == STEPS
        shutil.rmtree(directory)


@pytest.mark.parametrize(
    "removed",
    [
        "tape.jsonl",
        ".windows.jsonl.crc32",
        "config.json",
        "schedule.json",
        ".lock",
        "checkpoints",
        "",
    ],
)
def test_a_file_that_is_removed_while_it_trains(
    removed: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    """Also the whole directory: what is kept open or in memory is put back."""
    directory = tmp_path / "run"

    def listener(event: Any) -> None:
        if isinstance(event, StepTaken) and event.step == 9:
            path = directory / removed
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    run = make_run("adamw")
    result = runner(run, directory, listener).fit(STEPS)
    assert unequal(expected, outcome(run, directory, result.record)) == []
    assert (directory / "config.json").exists() and (directory / "checkpoints").is_dir()
    assert runner(make_run("adamw", seed=99), directory).fit(STEPS).record == result.record


# Signals -----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A suite that a shell began in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [0, 6, 10])
@pytest.mark.parametrize("rewrite", [LAW, False])
def test_a_signal_while_it_trains(number: int, step: int, rewrite: Any, tmp_path: Path) -> None:
    """The step is finished; a plain loop keeps it; what was saved goes on to the same end."""
    whole = make_run("adamw")
    runner(whole, tmp_path / "whole", rewrite=rewrite).fit(STEPS)
    taken: list[int] = []

    def listener(event: Any) -> None:
        if isinstance(event, StepTaken):
            taken.append(event.step)
            if event.step == step:
                os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt) as raised:
        runner(make_run("adamw"), tmp_path / "run", listener, rewrite=rewrite).fit(STEPS)
    assert isinstance(raised.value, SystemExit) == (number == signal.SIGTERM)
    assert taken[-1] in (step, step + 1)
    saved = sorted(int(p.name[-8:]) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved[-1] == (taken[-1] + 1 if rewrite is False else step // 4 * 4)
    again = make_run("adamw", seed=99)
    runner(again, tmp_path / "run", rewrite=rewrite).fit(STEPS)
    assert unequal(state_of(whole), state_of(again)) == []
    assert files(tmp_path / "run")["tape.jsonl"] == files(tmp_path / "whole")["tape.jsonl"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_step_that_does_not_end_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "GRACE", 0.2)
    run = make_run("adamw")

    def waiting(model: nn.Module, batch: Any) -> Any:
        if model.training and (tmp_path / "run" / "checkpoints").exists():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
        return classify(model, batch)

    began = time.monotonic()
    with pytest.raises(stopping.Terminated):
        runner(run._replace(loss_fn=waiting), tmp_path / "run").fit(STEPS)
    assert time.monotonic() - began < 10


class Closing:
    """Waits in a place where Python swallows every exception."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)


def closing() -> None:
    Closing()


def catching() -> None:
    with contextlib.suppress(BaseException):
        Closing.__del__(None)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("swallow", [closing, catching])
@pytest.mark.parametrize("options", [{}, {"rewrite": False}, {"start": "zero"}])
def test_a_signal_whose_exception_is_swallowed(
    swallow: Any, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is raised again after the step, or after the roll in search of a start."""
    monkeypatch.setattr(stopping, "GRACE", 0.1)
    run, calls = make_run("adamw"), []

    def loss(model: nn.Module, batch: Any) -> Any:
        calls.append(model.training)
        if len(calls) == 5:
            swallow()
        return classify(model, batch)

    with pytest.raises(stopping.Terminated):
        runner(run._replace(loss_fn=loss), tmp_path / "run", **options).fit(STEPS)
    assert len(calls) < 60 and not stopping.asked()
    runner(make_run("adamw"), tmp_path / "run", **options).fit(STEPS)


SCRIPT = """
import sys, time, pathlib
import torch
from torch.utils.data import DataLoader, Dataset
import rhc

kind = sys.argv[2]

class Slow(Dataset):
    def __len__(self): return 64
    def __getitem__(self, i):
        if kind == "loading" and pathlib.Path(sys.argv[1], "config.json").exists(): time.sleep(30)
        return torch.full((4,), float(i % 7)), torch.tensor(i % 3)

def make(*, seed, data):
    print("BEGUN", flush=True)
    if kind == "making": time.sleep(30)
    workers = 1 if kind == "loading" else 0
    return rhc.Workload(torch.nn.Linear(4, 3),
        lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]),
        DataLoader(Slow(), 8, num_workers=workers), None, None,
        optimizer="sgd", lr={"sgd": 0.1}, steps=100000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("kind", ["making", "loading", "training"])
def test_the_exit_status_of_a_signal(kind: str, number: int, tmp_path: Path) -> None:
    """Within five seconds, wherever the command is."""
    (tmp_path / "own.py").write_text(
        SCRIPT.replace("sys.argv[2]", repr(kind)).replace(
            "sys.argv[1]", repr(str(tmp_path / "run"))
        )
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "rhc", "train", "own.py:make", "--window", "5", "--lr", "0.1",
         "--start", "given", "--directory", "run"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while "BEGUN" not in process.stdout.readline():
        pass
    time.sleep(2)
    began = time.monotonic()
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number], out
    assert "Traceback" not in out and "rhc: stopped" in out


# Memory ------------------------------------------------------------------------------------------


def test_what_out_of_memory_looks_like() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert out_of_memory(raised.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory.")) and out_of_memory(
        MemoryError()
    )
    assert out_of_memory(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    assert out_of_memory(RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)"))
    assert not out_of_memory(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert not out_of_memory(RuntimeError("shapes differ")) and not out_of_memory(ValueError())


def test_the_ladder() -> None:
    """Smaller segments, difference products, smaller windows, and at last none."""
    relief, words = OomFallback(), []
    while not relief.never_differentiate:
        relief, text = relief.more(9, "exact", 1000)
        words.append(text)
    assert words == [
        "smaller segments, within 500 bytes", "difference products", "windows of 4 steps",
        "windows of 2 steps", "no reverse pass",
    ]  # fmt: skip
    assert OomFallback.from_json(relief.to_json()) == relief


@pytest.mark.parametrize("fails", [1, 2, 3, 5, 100])
def test_out_of_memory_in_the_reverse_pass(
    fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rung is recorded, the run goes on, and one that is stopped keeps what it gave up."""
    look_back, count = ReversePass.differentiate, [0]

    def failing(self: ReversePass, *args: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] <= fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return look_back(self, *args, **options)

    monkeypatch.setattr(ReversePass, "differentiate", failing)
    events: list[Any] = []
    run = make_run("adamw")
    law = replace(LAW, until=1.0, patience=None)
    fitted = runner(run, tmp_path, events.append, product="exact", rewrite=law)
    result = fitted.fit(STEPS)
    reasons = [w["reason"] for w in result.windows if "memory" in (w["reason"] or "")]
    words = ["smaller segments, within", "difference products", "windows of 2 steps", "no reverse"]
    assert len(reasons) == min(fails, 4)
    for reason, word in zip(reasons, words, strict=False):
        assert reason.startswith(f"out of memory; from now on {word}")
    assert notices_of(events)[: len(reasons)] == [f"the reverse pass ran {r}" for r in reasons]
    assert [row["step"] for row in result.tape] == list(range(STEPS))
    assert all(w["outcome"] == "rewound" for w in result.windows if w["reason"] in reasons)
    relief = json.loads((tmp_path / "checkpoints" / "window-00000011" / "values.json").read_text())
    assert OomFallback.from_json(relief["relief"]) == fitted.state.fallback != OomFallback()
    if fails >= 3:
        assert max(w["stop"] - w["start"] for w in result.windows[3:]) <= 4


STARVED = """
import resource, sys
import torch
from torch import nn
from rhc import Rewrite, Runner

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(),
                      nn.Linear(512, 1))
x = torch.randn(2048, 16)
batches = [(x, x.sum(1, keepdim=True).sin())] * 4
loss = lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])
loss(model, batches[0]).backward()
runner = Runner(
    model, torch.optim.SGD(model.parameters(), lr=0.05), loss, batches, batches[:1], window=12,
    start="given", product="exact", segment="auto" if sys.argv[3] == "auto" else int(sys.argv[3]),
    rewrite=Rewrite(until=1.0, patience=None), directory=sys.argv[1],
)
size = next(int(x.split()[1]) for x in open("/proc/self/status") if x.startswith("VmSize"))
limit = 1024 * size + int(sys.argv[2]) * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
runner.fit(24)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize(("megabytes", "segment"), [(150, "12"), (220, "12")])
def test_memory_that_really_ends(megabytes: int, segment: str, tmp_path: Path) -> None:
    """Allocations fail, not a mock: plain training fits, looking back does not, and it goes on."""
    (tmp_path / "starved.py").write_text(STARVED)
    command = [sys.executable, "starved.py", "run", str(megabytes), segment]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = (tmp_path / "run" / "windows.jsonl").read_text().splitlines()
    reasons = [json.loads(row)["reason"] or "" for row in rows]
    assert any(reason.startswith("out of memory; from now on") for reason in reasons), reasons
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 24


def test_another_error_in_the_reverse_pass_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: ReversePass, *args: Any, **options: Any) -> Any:
        raise RuntimeError("a kernel of mine")

    monkeypatch.setattr(ReversePass, "differentiate", failing)
    with pytest.raises(RuntimeError, match="a kernel of mine"):
        runner(make_run("adamw"), None).fit(STEPS)


# Numbers -----------------------------------------------------------------------------------------


def bad(kind: str, value: float) -> Run:
    """A run whose loss, gradient or validation is not finite now and then."""
    run = make_run("sgd", "list", norm=False, dropout=0.0)

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        loss, metrics = classify(model, batch)
        poisoned = float(batch[0][0, 0]) == 77.0
        if poisoned and kind == "loss":
            loss = loss * value
        if poisoned and kind == "gradient":
            loss = loss + 0 * torch.sqrt(0 * next(model.parameters())).sum()
        return loss, metrics

    train, val = list(run.train), list(run.val or [])
    if kind == "validation":
        val[1][0][0, 0] = value
    else:
        train[5][0][0, 0] = 77.0
    return run._replace(train=train, val=val, loss_fn=loss_fn)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["loss", "gradient", "validation"])
def test_numbers_that_are_not_finite_are_never_committed(
    kind: str, value: float, tmp_path: Path
) -> None:
    run = bad(kind, value)
    try:
        runner(run, tmp_path).fit(STEPS)
    except RuntimeError as error:
        assert "not finite" in str(error) or "the loss is" in str(error)
    else:
        assert kind == "validation"
    rows = [json.loads(x) for x in (tmp_path / "tape.jsonl").read_text().splitlines()]
    assert all(row["loss"] is not None for row in rows)
    attempts = [json.loads(x) for x in (tmp_path / "windows.jsonl").read_text().splitlines()]
    assert any("not finite" in (w["reason"] or "") or "the loss is" in (w["reason"] or "")
               for w in attempts), attempts  # fmt: skip
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        assert all(
            bool(t.isfinite().all()) for t in load_file(checkpoint / "model.safetensors").values()
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_number_that_is_not_finite_once(kind: str, value: float, tmp_path: Path) -> None:
    """A glitch: the window is rewound and recorded, and the run comes to its end."""
    run, count = make_run("sgd", "list", norm=False, dropout=0.0), [0]

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        loss, metrics = classify(model, batch)
        count[0] += torch.is_grad_enabled()
        if count[0] == 3 and kind == "loss":
            loss = loss * value
        elif count[0] == 3:
            loss = loss + 0 * torch.sqrt(0 * next(model.parameters())).sum()
        return loss, metrics

    result = runner(run._replace(loss_fn=loss_fn), tmp_path, product="none").fit(STEPS)
    assert [row["step"] for row in result.tape] == list(range(STEPS))
    assert all(row["loss"] is not None and row["gradient_norm"] is not None for row in result.tape)
    rewound = [w["reason"] for w in result.windows if w["outcome"] == "rewound"]
    assert any("not finite" in reason or "the loss is" in reason for reason in rewound), rewound
    assert all(bool(p.isfinite().all()) for p in run.model.parameters())


ENDS = {
    "Twin": {"rewrite": Twin()},
    "one window": {},
    "sliding": {"stride": 2, "rewrite": Rewrite(iterations=3)},
}


@pytest.mark.parametrize("every", [8, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("name", ENDS)
def test_a_number_that_is_not_finite_at_any_evaluation(name: str, once: bool, every: int) -> None:
    """Of the roll, the reverse pass, the objective, a replay: once heals, for good is told."""
    for first in range(5, 26, every):
        run, calls = make_run("sgd", "list", norm=False, dropout=0.0), 0

        def loss_fn(model: nn.Module, batch: Any, first: int = first) -> Any:
            nonlocal calls
            calls += 1
            loss, metrics = classify(model, batch)
            bad = calls == first if once else calls >= first
            return (loss * math.nan if bad else loss), metrics

        train = runner(run._replace(loss_fn=loss_fn), None, **ENDS[name])
        if once:
            assert [row["step"] for row in train.fit(5).tape] == list(range(5))
        else:
            with pytest.raises(DivergedError, match=r"the loss is nan at step \d"):
                train.fit(STEPS)


# Loaders and operators ---------------------------------------------------------------------------


DYING = """
import os, signal, sys
from pathlib import Path
import torch
from runs import classify, clouds, make_run
from torch.utils.data import DataLoader
from rhc import Rewrite, Runner

class Dying(torch.utils.data.Dataset):
    rows = clouds(75)
    def __len__(self): return 75
    def __getitem__(self, index):
        if index == 60 and Path("marker").exists(): os.kill(os.getpid(), signal.SIGKILL)
        return self.rows[index]

run = make_run("adamw")._replace(train=DataLoader(Dying(), 8, num_workers=1))
Runner(*run, window=4, start="given", directory=sys.argv[1]).fit(11)
"""


@pytest.mark.slow
def test_a_worker_that_dies(tmp_path: Path) -> None:
    """Its exception, not a hang; and the run goes on afterwards as if it had not.

    In a process of its own: torch raises wherever the main thread is.
    """
    (tmp_path / "dying.py").write_text(DYING)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def trained(directory: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "dying.py", directory]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )

    (tmp_path / "marker").write_text("")
    failed = trained("run")
    # torch names the worker, or finds the pipe to it closed, whichever it sees first.
    assert failed.returncode == 1
    assert "RuntimeError: DataLoader worker" in failed.stderr or "ConnectionReset" in failed.stderr
    (tmp_path / "marker").unlink()
    for directory in ("run", "whole"):
        done = trained(directory)
        assert done.returncode == 0, done.stderr
    assert files(tmp_path / "whole") == files(tmp_path / "run")


@pytest.mark.parametrize("before", [False, True])
def test_deterministic_on_request(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen: list[tuple[Any, ...]] = []

    def modes(event: object = None) -> None:
        seen.append(
            (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
                torch.backends.cudnn.benchmark,
                os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            )
        )

    def failing(event: object) -> None:
        modes()
        raise KeyError("of a listener")

    was = torch.backends.cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(before, warn_only=before)
        torch.backends.cudnn.benchmark = before
        modes()
        runner(make_run("sgd"), None, modes, deterministic=True).fit(4)
        modes()
        with pytest.raises(KeyError, match="of a listener"):
            runner(make_run("sgd"), None, failing, deterministic=True).fit(4)
        modes()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = was
    assert seen[1] == (True, False, False, ":4096:8")
    found = (before, before, before, None)
    after = [i for i, one in enumerate(seen) if one == found]
    assert after[0] == 0 and after[-1] == len(seen) - 1 and len(after) >= 3


def test_a_fit_takes_gradients_also_where_they_are_off() -> None:
    plain = make_run("sgd")
    runner(plain, None).fit(4)
    within = make_run("sgd")
    with torch.no_grad():
        runner(within, None).fit(4)
        assert not torch.is_grad_enabled()
    assert unequal(state_of(plain), state_of(within)) == []

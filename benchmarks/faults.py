"""The campaign: kills, flips, truncations, full disks and fuzzed files, and what became of them.

    python benchmarks/faults.py kills --count 200
    python benchmarks/faults.py flips truncations full tiny
    python benchmarks/faults.py fuzz --count 100000
    python benchmarks/faults.py cost size

Each prints a table; docs/reliability.md has the figures. `tests/` has pieces of all this that take
seconds.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import contextlib
import copy
import errno
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

_ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_ROOT / "tests"), str(_ROOT / "benchmarks"), str(_ROOT)]

import killed_run
from faulty_disk import FaultyDisk
from runs import files, make_run, seed_everything, state_of, unequal

from rhc import InputError, Rewrite, Runner
from rhc.errors import StorageError
from rhc.events import CheckpointSaved, StepTaken, VerbStarted
from rhc.hypergradient import ReversePass
from rhc.loop import train as loop_module
from rhc.loop.fit import Fit
from rhc.schedule import Schedule
from rhc.settings import TrainConfig
from rhc.storage.checkpoint import Checkpoint, CheckpointStore, _sealed, _tensors
from rhc.storage.files import parsed_json, parsed_toml, read_json
from rhc.storage.jsonl import JsonLines
from rhc.training.plant import Plant
from rhc.training.snapshot import snapshot_from_tensors, snapshot_to_tensors

KILLED_STEPS = 14
"""Of the run that is killed: five windows."""

# Kills -------------------------------------------------------------------------------------------


def kills(count: int, seed: int, passes: int = 0) -> bool:
    """SIGKILLs at random instants, each resumed; every run must end as the one that was left alone.

    A forked process trains a run like that of tests/killed_run.py, and says in which phase it is.
    Half of the kills come after a random time, half at a random change of phase, so that short ones
    (a rename, a truncation) are hit as well. A run is killed until it ends; then the next begins.
    """
    draw = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="rhc-kills-"))
    _small(folder / "first")  # imports in the parent what every child would import anew
    began = time.monotonic()
    phases, _ = _child(folder / "whole", None, None, passes)
    seconds = time.monotonic() - began
    print(f"a run takes {seconds:.1f} s and has {phases} changes of phase", flush=True)
    expected = _final(folder / "whole")
    histogram: Counter[str] = Counter()
    run = ended = equal = 0
    while histogram.total() < count:
        directory = folder / str(run)
        timed = draw.random() < 0.5
        after = draw.uniform(0, 0.4) * seconds if timed else None
        change = None if timed else draw.randrange(max(1, int(0.4 * phases)))
        _, phase = _child(directory, after, change, passes)
        if phase is not None:
            histogram[phase] += 1
            continue
        run, ended = run + 1, ended + 1
        equal += not unequal(expected, _final(directory))
        shutil.rmtree(directory)
        print(f"{histogram.total()} kills, {equal} of {ended} runs equal", flush=True)
    if (folder / str(run)).exists():
        _child(folder / str(run), None, None, passes)
        ended += 1
        equal += not unequal(expected, _final(folder / str(run)))
    print(f"{histogram.total()} kills in {ended} runs of {seconds:.1f} s: {equal} ended bit-equal")
    print("| killed while | kills |\n|---|---|")
    for phase, kills_there in histogram.most_common():
        print(f"| {phase} | {kills_there} |")
    shutil.rmtree(folder)
    return equal == ended


def _final(directory: Path) -> dict[str, Any]:
    return {"tensors": load_file(directory / "final.safetensors"), "files": files(directory)}


def pass_kills(count: int, seed: int) -> bool:
    """The same of a run that two passes rewrite as a whole."""
    return kills(count, seed, passes=2)


def _child(
    directory: Path, after: float | None, change: int | None, passes: int
) -> tuple[int, str | None]:
    """(changes of phase, the phase that a kill found; None where the run came to its end)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        status = 1
        with contextlib.suppress(BaseException):
            _train(directory, writing, change, passes)
            status = 0
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        first = pipe.readline()
        if after is not None:
            time.sleep(after)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        said = (first + pipe.read()).decode().splitlines()
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return len(said), said[-1] if said else "begin"
    assert os.WEXITSTATUS(status) == 0, f"the run itself failed in {directory}: {said[-3:]}"
    return len(said), None


def _train(directory: Path, pipe: int, change: int | None, passes: int) -> None:
    torch.set_num_threads(1)
    said = 0

    def say(phase: str) -> None:
        nonlocal said
        os_write(pipe, f"{phase}\n".encode())
        if said == change:
            os.kill(os.getpid(), signal.SIGKILL)
        said += 1

    os_write, saving = os.write, [False]

    def on_disk(number: int, name: str) -> None:
        say(f"disk: {name}")

    def listener(event: Any) -> None:
        if isinstance(event, VerbStarted):
            say(event.verb)
        elif isinstance(event, StepTaken) and event.step % 5 == 0:
            say("in a roll or replay")

    look_back = ReversePass.differentiate

    def looking(self: ReversePass, *args: Any, **options: Any) -> Any:
        say("reverse pass")
        found = look_back(self, *args, **options)
        say("rewrite")
        return found

    ReversePass.differentiate = looking  # type: ignore[method-assign]
    run = killed_run.make(0)

    class Loading:
        """The loader, saying when it is at work."""

        def __init__(self, loader: Any) -> None:
            self.loader, self.generator = loader, loader.generator
            self.sampler, self.batch_sampler = loader.sampler, loader.batch_sampler

        def __len__(self) -> int:
            return len(self.loader)

        def __iter__(self) -> Iterator[Any]:
            say("loading data")
            yield from self.loader

    run = run._replace(train=Loading(run.train))
    del saving
    say("open")
    with FaultyDisk(on_disk):  # type: ignore[arg-type]
        runner = Runner(
            *run,
            window=4,
            stride=3,
            start="given",
            controls=("lr", "momentum", "noise"),
            rewrite=Rewrite(step={"lr": 1.0, "momentum": 0.1, "noise": 3.0}, damping=1e-9),
            passes=passes,
            directory=directory,
            listeners=[listener],
        )
        runner.fit(KILLED_STEPS)
        say("end")
    tensors = {f"model.{k}": v.contiguous() for k, v in run.model.state_dict().items()}
    for index, slots in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in slots.items()}
    save_file(tensors | {"rng": torch.get_rng_state()}, directory / "final.safetensors")


# Damage ------------------------------------------------------------------------------------------

STEPS = 11
LAW = Rewrite(step={"lr": 1.5, "momentum": 0.5, "noise": 4.0}, damping=1e-9)
SEALED = ("checkpoints/*/*", "*.json", "*.jsonl", ".*.crc32")
"""Files that carry a digest or checksums: all but .lock, which is empty."""


def _small(
    directory: Path, steps: int = STEPS, seed: int = 0, listener: Any = None
) -> tuple[Any, Any]:
    run = make_run("adamw", seed=seed)
    listeners = [] if listener is None else [listener]
    law = Runner(*run, window=4, rewrite=LAW, directory=directory, listeners=listeners)
    return run, law.fit(steps)


def _found(directory: Path, path: Path) -> bool:
    """Whether damage of a file is found, and told with its name (or of the one beside it)."""
    told: list[str] = []
    if path.parent.parent.name == "checkpoints":
        store = CheckpointStore(directory / "checkpoints", notice=told.append)
        step = int(path.parent.name.rpartition("-")[2])
        try:
            store.load(step)
        except InputError as error:
            return path.name in str(error) or path.name == "manifest.json"
        return False
    name = path.name.removeprefix(".").removesuffix(".crc32")
    if name.endswith(".json"):
        try:
            read_json(directory / name, told.append)
        except InputError as error:
            told.append(str(error))
        return any(name in text for text in told)
    lines = JsonLines(directory / name)
    whole = (directory / name).read_bytes().count(b"\n")
    found = lines.intact()
    return (found.lines < whole_lines[name] and name in found.fault) or whole < whole_lines[name]


whole_lines: dict[str, int] = {}


def _sealed_files(directory: Path) -> list[Path]:
    found = sorted({p for pattern in SEALED for p in directory.glob(pattern) if p.is_file()})
    for path in found:
        if path.suffix == ".jsonl":
            whole_lines[path.name] = path.read_bytes().count(b"\n")
    return found


def flips(count: int, seed: int) -> bool:
    """`count` bit flips in every file that carries a digest, and what was found of them."""
    draw = random.Random(seed)
    return _damages(
        "bit flips",
        lambda data: (_flipped(data, draw) for _ in range(count)),
    )


def _flipped(data: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(data)
    damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def truncations(count: int, seed: int) -> bool:
    """Every file cut at every 4 KiB, at its beginning and one byte before its end."""
    return _damages(
        "truncations",
        lambda data: (data[:n] for n in sorted({*range(0, len(data), 4096), len(data) - 1})),
    )


def _damages(what: str, damages: Callable[[bytes], Iterator[bytes]]) -> bool:
    folder = Path(tempfile.mkdtemp(prefix="rhc-damage-"))
    _small(folder / "run")
    table: Counter[str] = Counter()
    detected: Counter[str] = Counter()
    for path in _sealed_files(folder / "run"):
        data = path.read_bytes()
        for damaged in damages(data) if data else ():
            path.write_bytes(damaged)
            table[path.name] += 1
            detected[path.name] += _found(folder / "run", path)
        path.write_bytes(data)
    print(f"| file | {what} | found by name |\n|---|---|---|")
    for name in sorted(table):
        print(f"| {name} | {table[name]} | {detected[name]} |")
    print(f"| all | {table.total()} | {detected.total()} |")
    shutil.rmtree(folder)
    return table == detected


def full(count: int, seed: int) -> bool:
    """ENOSPC at every single operation on the disk of a run: once, for a while, and for ever."""
    folder = Path(tempfile.mkdtemp(prefix="rhc-full-"))
    run, _result = _small(folder / "whole")
    expected = state_of(run), files(folder / "whole")
    with FaultyDisk() as disk:
        _small(folder / "counted")
    names, good = disk.names, True
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    print(f"a run has {len(names)} operations: {dict(Counter(names).most_common())}")
    print("| ENOSPC from each operation on | what became of the run | cases |\n|---|---|---|")
    for label, length in {
        "once": 1,
        "for 4 operations": 4,
        "for 40 operations": 40,
        "for ever": len(names) ** 2,
    }.items():
        table = Counter[str]()
        for number in range(len(names)):
            fault = lambda n, _, a=number, k=length: error if a <= n < a + k else None  # noqa: E731
            kind = _survived(folder / "run", FaultyDisk(fault), expected)
            table[kind if kind in OUTCOMES else f"{kind} at {number} ({names[number]})"] += 1
            shutil.rmtree(folder / "run", ignore_errors=True)
        good &= table.keys() <= set(OUTCOMES)
        for kind, cases in table.most_common():
            print(f"| {label} | {kind} | {cases} |", flush=True)
    shutil.rmtree(folder)
    return good


OUTCOMES = (
    "ended like a run that was left alone",
    "told at the end, in one sentence; resumed to an equal end",
    "refused before the first step, in one sentence; begun again to an equal end",
)


def _survived(
    directory: Path,
    disk: contextlib.AbstractContextManager[Any],
    expected: Any,
    mend: Callable[[], Any] = lambda: None,
) -> str:
    """One of OUTCOMES, or what was wrong with a run on `disk`; mend: called when it has ended."""
    saved: list[int] = []

    def listener(event: Any) -> None:
        if isinstance(event, CheckpointSaved):
            saved.append(event.step)

    run: Any = None
    with disk, mock.patch("rhc.storage.run_directory.time.sleep"):  # between its last attempts
        try:
            run, _ = _small(directory, listener=listener)
            kind = OUTCOMES[0]
        except (StorageError, InputError) as told:
            kind = OUTCOMES[1] if isinstance(told, StorageError) else OUTCOMES[2]
            if "\n" in str(told) or (isinstance(told, InputError) and saved):
                return f"FAILED: {told}"
    found = CheckpointStore(directory / "checkpoints").latest()
    if saved and (found is None or found.step < saved[-1]):
        return f"FAILED: of the checkpoint of step {saved[-1]}, {found and found.step} was left"
    mend()
    if kind != OUTCOMES[0]:
        try:
            # From a checkpoint it goes on whatever the seed is; without one it begins again.
            run, _ = _small(directory, seed=99 if kind == OUTCOMES[1] and found else 0)
        except InputError as error:
            return f"FAILED: not resumed: {error}"
    unlike = unequal(expected, (state_of(run), files(directory)))
    return f"FAILED: {unlike[:2]} differ" if unlike else kind


def tiny(count: int, seed: int) -> bool:
    """Runs on a tmpfs of every size, in pages and in names, from too small to large enough."""
    if "RHC_OWN_MOUNTS" not in os.environ:
        command = ["unshare", "-rm", sys.executable, __file__, "tiny", "--seed", str(seed)]
        try:
            environment = {**os.environ, "RHC_OWN_MOUNTS": "1"}
            if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0:
                return subprocess.run(command, env=environment).returncode == 0
        except FileNotFoundError:
            pass
        print("not done: nothing can be mounted here without root (unshare -rm)")
        return True
    folder = Path(tempfile.mkdtemp(prefix="rhc-tiny-"))
    run, _result = _small(folder / "whole")
    expected = state_of(run), files(folder / "whole")
    place = folder / "disk"
    place.mkdir()
    good = True
    print("| tmpfs | what became of the run | sizes |\n|---|---|---|")
    for unit, limits in {
        "pages of 4 KiB": [f"size={4 * n}k" for n in range(1, 120)],
        "names": [f"size=64m,nr_inodes={n}" for n in range(2, 90)],
    }.items():
        table: dict[str, list[str]] = {}
        for limit in limits:
            subprocess.run(["mount", "-t", "tmpfs", "-o", limit, "none", place], check=True)
            kind = _survived(
                place / "run",
                contextlib.nullcontext(),
                expected,
                lambda: subprocess.run(
                    ["mount", "-o", "remount,size=64m,nr_inodes=1000", place], check=True
                ),
            )
            table.setdefault(kind, []).append(limit.rpartition("=")[2])
            subprocess.run(["umount", "-l", place], check=True)
        good &= table.keys() <= set(OUTCOMES)
        for kind, found in table.items():
            print(f"| {unit} | {kind} | {len(found)}: {found[0]} to {found[-1]} |", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    return good


# Fuzzing -----------------------------------------------------------------------------------------

SLOW = 1.0
"""Seconds after which a parser hangs."""


def fuzz(count: int, seed: int, only: str = "") -> bool:
    """`count` mutated inputs for every parser: an answer or its own error, and nothing else."""
    folder = Path(tempfile.mkdtemp(prefix="rhc-fuzz-"))
    _small(folder / "run")
    good = True
    print("| parser | inputs | read | refused | worst ms | failures |\n|---|---|---|---|---|---|")
    for name, (parse, seeds) in parsers(folder).items():
        if only not in name:
            continue
        draw = random.Random(f"{seed} {name}")
        read = refused = 0
        worst, failures = 0.0, []
        clock = time.process_time  # of a machine that is shared
        for _ in range(count):
            data = mutated(draw.choice(seeds), draw)
            began = clock()
            try:
                parse(data)
                read += 1
            except (InputError, ValueError):
                refused += 1
            except Exception as error:
                failures.append((type(error).__name__, str(error)[:200], data[:200]))
            took = clock() - began
            worst = max(worst, took)
            if took > SLOW:
                failures.append(("slow", f"{took:.1f} s", data[:80]))
        row = f"| {name} | {count} | {read} | {refused} | {1e3 * worst:.0f} | {len(failures)} |"
        print(row, flush=True)
        for failure in failures[:3]:
            print("   ", failure)
        good &= not failures
    shutil.rmtree(folder)
    return good


def parsers(folder: Path) -> dict[str, tuple[Callable[[bytes], Any], list[bytes]]]:
    """Every reader of what may come from somebody else, and inputs to begin with."""
    run = folder / "run"
    from rhc.compare import pool as comparison
    from rhc.hindsight.features import Form
    from rhc.hindsight.policy import Policy, _blank
    from rhc.loop import trials
    from rhc.report.live import Screen
    from rhc.report.records import read_run
    from rhc.report.text import print_run
    from rhc.storage.run_files import read_result
    from runners.data import read_idx

    store = CheckpointStore(run / "checkpoints")
    step = store.steps()[-1]
    checkpoint = store.path(step)
    model = (checkpoint / "model.safetensors").read_bytes()
    whole = store.load(step)
    plant = Plant(*make_run("adamw")[:3])
    tensors, rest = snapshot_to_tensors(plant, plant.snapshot())
    toml = TrainConfig().to_toml().encode()

    def manifest(data: bytes) -> None:
        document = parsed_json(data)
        # Forged: with the digest that it should have.
        forged = _sealed(document) if isinstance(document, dict) else data
        (checkpoint / "manifest.json").write_bytes(forged)
        store._manifest(store.path(step), step)

    def line(data: bytes) -> None:
        path = folder / "lines.jsonl"
        path.write_bytes(data)
        lines = JsonLines(path)
        lines.sums.unlink(missing_ok=True)
        lines.intact()
        lines.read()

    def values(data: bytes) -> None:
        document = parsed_json(data)
        with contextlib.suppress(LookupError, TypeError, AttributeError):
            # What the Runner turns into an InputError of the checkpoint (`Saving.load`).
            snapshot_from_tensors(plant, tensors, document["optimizer"])

    def config(data: bytes) -> None:
        document = parsed_json(data)
        if not isinstance(document, dict):
            raise ValueError("no object")
        TrainConfig.from_record(document, "config.json").checked()

    def settings(data: bytes) -> None:
        TrainConfig.from_record(parsed_toml(data), "run.toml").checked()

    def strictly(read: Callable[[], Any]) -> None:
        """What is read by an InputError alone, at the edge: a ValueError there is a traceback."""
        try:
            read()
        except InputError:
            raise
        except ValueError as error:
            raise AssertionError(f"{type(error).__name__}: {error}") from None

    def beside(name: str, read: Callable[[Path], Any]) -> Callable[[bytes], None]:
        """A reader of a file that lies among others: they are there, and `name` is the input."""
        place = folder / f"{read.__name__}-{name}"
        shutil.copytree(run, place, ignore=shutil.ignore_patterns("checkpoints"))

        def parse(data: bytes) -> None:
            (place / name).write_bytes(data)
            strictly(lambda: read(place))

        return parse

    def shown(place: Path) -> None:
        found = read_run(place)
        assert found.kept is not None and found.events is not None and found.metrics is not None
        [found.series(name) for name in ("loss", "lr")]

    def printed(place: Path) -> None:
        with open(os.devnull, "w") as nowhere:
            print_run(Screen(file=nowhere), place)

    def starts(data: bytes) -> None:
        known = [parsed_json(text) for text in data.splitlines()]
        for record in known:
            if isinstance(record, dict) and trials._readable(record):
                trials._key(record)
                float(record["gradients"])
                torch.tensor(record["lr"] if record["kind"] == "zero" else record["loss"] or 0.0)

    def of_compare(data: bytes) -> None:
        path = folder / "rows.jsonl"
        path.write_bytes(data)
        for found in comparison._read(path):
            comparison._row(found.get("row"))

    policy = folder / "policy"
    form = Form(("lr",), False, False)
    wide = torch.ones(len(form.names))
    network = _blank("laws", form)
    Policy("laws", form, 5, network, -wide, wide, {"runs": ["a"]}).save(policy)
    told = (policy / "policy.json").read_bytes()
    weights = (policy / "weights.safetensors").read_bytes()

    def policies(name: str) -> Callable[[bytes], None]:
        place = folder / f"policy-{name}"
        shutil.copytree(policy, place)
        document = json.loads(told)

        def parse(data: bytes) -> None:
            (place / name).write_bytes(data)
            if name != "policy.json":  # forged: with the digest that it should have
                digest = hashlib.sha256(data).hexdigest()
                forged = {**document, "bytes": len(data), "sha256": digest}
                (place / "policy.json").write_text(json.dumps(forged))
            strictly(lambda: Policy.load(place))

        return parse

    def idx(data: bytes) -> None:
        (folder / "images-idx").write_bytes(data)
        strictly(lambda: read_idx(folder / "images-idx"))

    images = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 3, 4)) + bytes(24)
    attempts = b"".join((run / "windows.jsonl").read_bytes().splitlines(True)[:2])
    tried = b"".join((run / "start.jsonl").read_bytes().splitlines(True)[:3])
    ended = (run / "result.json").read_bytes()
    row = {"method": "rhc", "lr": 0.1, "seed": 100, "score": 1.0, "cost": 1.0, "curve": [[1, 0.5]],
           "validation": None, "test_loss": 1.0, "test_accuracy": None, "higher": False,
           "average_test_loss": None, "course": {"lr": [0.1]}}  # fmt: skip
    cell = json.dumps({"task": "a1b2", "row": row}).encode() + b"\n"
    given = (run / "schedule.json").read_bytes()
    record = json.dumps(TrainConfig().to_record()).encode()
    saved = json.dumps(whole.values).encode()
    tape = b"".join((run / "tape.jsonl").read_bytes().splitlines(True)[:3])
    return {
        "JSON within limits": (parsed_json, [given, record, b'{"a": [[[1]]], "b": "[{"}']),
        "schedule.json": (lambda d: Schedule.from_json(parsed_json(d)), [given]),
        "config.json": (config, [record]),
        "a TOML file of settings": (settings, [toml]),
        "manifest.json": (manifest, [(checkpoint / "manifest.json").read_bytes()]),
        "safetensors": (lambda d: _tensors(Path("model.safetensors"), d), [model]),
        "values.json": (values, [saved, json.dumps({"optimizer": rest}).encode()]),
        "tape.jsonl": (line, [tape]),
        "tape.jsonl, for a screen": (beside("tape.jsonl", printed), [tape]),
        "tape.jsonl, for a page": (beside("tape.jsonl", shown), [tape]),
        "windows.jsonl, for a page": (beside("windows.jsonl", shown), [attempts]),
        "start.jsonl": (starts, [tried]),
        "result.json": (beside("result.json", read_result), [ended]),
        "rows.jsonl of rhc compare": (of_compare, [cell]),
        "policy.json": (policies("policy.json"), [told]),
        "weights of a policy": (policies("weights.safetensors"), [weights]),
        "an IDX file": (idx, [images, gzip.compress(images)]),
    }


TOKENS = (
    *(
        b"[",
        b"]",
        b"{",
        b"}",
        b'"',
        b",",
        b":",
        b"\\",
        b"null",
        b"true",
        b"NaN",
        b"Infinity",
        b"-0",
    ),
    *(b"1e999", b"-1", b"9" * 400, b"1" * 5000, b"\xff", b"\0", b"[" * 200, b'{"a":' * 100, b"\n"),
    *(
        b"a.b.c",
        b"[[x]]",
        b"= ",
        b"'''",
        b"18446744073709551616",
        b"1e-320",
        b"../",
        b"/etc/passwd",
    ),
)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to six edits: bits, bytes, cuts, repetitions, swaps, and words that parsers trip over.

    Every third time, where it is JSON: a document that is still one, with a value of another kind.
    """
    if data[:1] == b"{" and draw.random() < 1 / 3:
        return warped(data, draw)
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 3, 6))):
        at = draw.randrange(len(out) + 1)
        kind = draw.randrange(7)
        if kind == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            out[at:at] = draw.choice(TOKENS)
        elif kind == 2:
            del out[at : at + draw.choice((1, 2, 8, 64))]
        elif kind == 3:
            out[at : at + draw.randrange(8)] = draw.choice(TOKENS)
        elif kind == 4:
            out[at:at] = out[at : at + draw.choice((1, 8, 64))]
        elif kind == 5:
            del out[at:]
        else:
            out[at:at] = draw.randbytes(draw.choice((1, 4, 16)))
    return bytes(out)


VALUES = (None, True, -1, 0, 2**64, 1e308, "", "x", "9" * 50, [], {}, [None], [["1"]], {"a": {}})


def warped(data: bytes, draw: random.Random) -> bytes:
    """JSON, or a line of JSON lines, with one to three entries replaced, removed or doubled."""
    lines = data.split(b"\n")
    at = draw.randrange(len(lines)) if len(lines) > 1 and lines[0][-1:] == b"}" else None
    document = json.loads(data if at is None else lines[at] or b"{}")
    for _ in range(draw.choice((1, 1, 2, 3))):
        place, key = None, None
        inner: Any = document
        while isinstance(inner, (dict, list)) and inner:
            keys = list(inner) if isinstance(inner, dict) else range(min(3, len(inner)))
            place, key = inner, draw.choice(keys)
            inner = inner[key]
            if draw.random() < 0.3:
                break
        if place is None:
            break
        kind = draw.randrange(4)
        if kind == 0:
            del place[key]
        elif kind == 1 and isinstance(place, dict):
            place[f"{key}x"] = place.pop(key)
        else:
            place[key] = copy.deepcopy(draw.choice(VALUES))
    if at is None:
        return json.dumps(document).encode()
    return b"\n".join([*lines[:at], json.dumps(document).encode(), *lines[at + 1 :]])


def atheris(count: int, seed: int) -> bool:
    """The same parsers under libFuzzer, which looks at what its inputs reach; where it installs."""
    try:
        import atheris as engine
    except ImportError:
        print("atheris is not installed: pip install atheris")
        return True
    folder = Path(tempfile.mkdtemp(prefix="rhc-atheris-"))
    _small(folder / "run")
    good = True
    for name, (parse, seeds) in parsers(folder).items():
        corpus = folder / name.replace(" ", "-")
        corpus.mkdir()
        for number, data in enumerate(seeds):
            (corpus / str(number)).write_bytes(data)

        def one(data: bytes, parse: Callable[[bytes], Any] = parse) -> None:
            with contextlib.suppress(InputError, ValueError):
                parse(data)

        pid = os.fork()
        if pid == 0:
            _instrument(engine)
            flags = [f"-runs={count}", f"-seed={seed + 1}", "-timeout=10", "-verbosity=0"]
            engine.Setup([sys.argv[0], *flags, "-max_len=20000", str(corpus)], one)
            engine.Fuzz()
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        fine = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        print(f"| {name} | {count} | {'no failure' if fine else f'FAILED, status {status}'} |")
        good &= fine
    shutil.rmtree(folder)
    return good


def _instrument(engine: Any) -> None:
    """Lets libFuzzer see which branches of the parsers an input reaches."""
    import json.decoder
    import tomllib._parser  # type: ignore[import-not-found]
    import types

    import rhc.storage.files

    for module in (rhc.storage.files, json.decoder, tomllib._parser, sys.modules["rhc.schedule"]):
        for function in list(vars(module).values()):
            if isinstance(function, types.FunctionType):
                engine.instrument_func(function)


# Cost --------------------------------------------------------------------------------------------


def cost(count: int, seed: int) -> bool:
    """What saving takes of a run of the GPT, with a checkpoint per window of 50 plain steps."""
    from models import CASES

    torch.set_num_threads(1)
    case, save = CASES["gpt"], loop_module.save
    for label, rewrite in (("no rewriting", False), ("rewriting (the default law)", True)):
        seed_everything(seed)
        model = case.model()
        batches = [case.make_batch() for _ in range(50)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        folder = Path(tempfile.mkdtemp(prefix="rhc-cost-"))
        runner = Runner(
            model, optimizer, case.loss_fn, batches, batches[:4],
            window=50, rewrite=rewrite, start="given", directory=folder,
        )  # fmt: skip
        spent = [0.0, 0.0]

        def timed(fit: Fit, spent: list[float] = spent) -> None:
            wall, cpu = time.perf_counter(), time.process_time()
            save(fit)
            spent[0] += time.perf_counter() - wall
            spent[1] += time.process_time() - cpu

        loop_module.save = timed
        wall, cpu = time.perf_counter(), time.process_time()
        runner.fit(50 * count)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        size = sum(p.stat().st_size for p in max((folder / "checkpoints").iterdir()).iterdir())
        print(
            f"{label}: {count} windows, {wall:.1f} s, of which saving {spent[0]:.2f} s = "
            f"{100 * spent[0] / wall:.2f} % (CPU {100 * spent[1] / cpu:.2f} %); {size / 1e6:.1f} MB"
        )
        shutil.rmtree(folder)
    return True


def size(count: int, seed: int) -> bool:
    """Time and bytes of a checkpoint of 100 M parameters with Adam, beside a plain one."""
    from safetensors.torch import load, save

    folder = Path(tempfile.mkdtemp(prefix="rhc-size-"))
    one = {f"layer.{i}": torch.randn(1000, 1000) for i in range(100)}
    groups = {"model": one, "optimizer": {f"{k}.{s}": v + 1 for k, v in one.items() for s in "mv"}}

    def plainly() -> None:
        for name, tensors in groups.items():
            data = save(tensors)
            hashlib.sha256(data).hexdigest()
            with (folder / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

    def plainly_read() -> None:
        for name in groups:
            data = (folder / name).read_bytes()
            hashlib.sha256(data).hexdigest()
            load(data)

    store = CheckpointStore(folder / "checkpoints", keep=1)
    rows: dict[str, list[tuple[float, float]]] = {}
    for n in range(count):
        for name, action in {
            "save, safetensors + SHA-256 + fsync": plainly,
            "save, rhc": lambda n=n: store.save(Checkpoint(n, groups, {})),
            "load, safetensors + SHA-256": plainly_read,
            "load, rhc": lambda n=n: store.load(n),
        }.items():
            wall, cpu = time.perf_counter(), time.process_time()
            action()
            took = time.perf_counter() - wall, time.process_time() - cpu
            rows.setdefault(name, []).append(took)
    total = sum(p.stat().st_size for p in max((folder / "checkpoints").iterdir()).iterdir())
    print(f"{total / 1e9:.2f} GB; medians of {count}, taken in turn, in {folder.parent}")
    print("| | seconds | of CPU | all |\n|---|---|---|---|")
    for name, found in rows.items():
        middle = [sorted(column)[count // 2] for column in zip(*found, strict=True)]
        every = ", ".join(f"{wall:.1f}" for wall, _ in found)
        print(f"| {name} | {middle[0]:.2f} | {middle[1]:.2f} | {every} |")
    for verb in ("save", "load"):
        plain, ours = (v for name, v in rows.items() if name.startswith(verb))
        ratios = [[o[i] / p[i] for o, p in zip(ours, plain, strict=True)] for i in range(2)]
        wall, cpu = (sorted(r)[count // 2] for r in ratios)
        print(f"{verb}: {wall:.2f} times the seconds, {cpu:.2f} times the CPU (medians of ratios)")
    shutil.rmtree(folder)
    return True


CAMPAIGNS: dict[str, tuple[Callable[[int, int], bool], int]] = {
    "kills": (kills, 200),
    "pass_kills": (pass_kills, 40),
    "flips": (flips, 200),
    "truncations": (truncations, 1),
    "full": (full, 1),
    "tiny": (tiny, 1),
    "fuzz": (fuzz, 100_000),
    "atheris": (atheris, 100_000),
    "cost": (cost, 8),
    "size": (size, 5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("campaigns", nargs="+", choices=CAMPAIGNS)
    parser.add_argument("--count", type=int, help="kills, flips per file, inputs, windows, times")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    good = True
    for name in given.campaigns:
        campaign, usual = CAMPAIGNS[name]
        began = time.monotonic()
        good &= campaign(given.count or usual, given.seed)
        print(f"{name}: {time.monotonic() - began:.0f} s\n", flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

"""Launchers: local processes, submitit (Slurm, else local) and ray (RAY_ADDRESS, else local).

A launcher takes one line of JSON per run and yields the answers as they arrive.
"""

from __future__ import annotations

import importlib
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from rhc.errors import InputError

Answer = Callable[[str], str]

PROCESSES = "processes"
LAUNCHERS = (PROCESSES, "submitit", "ray")


def parsed_launcher(text: str) -> tuple[str, dict[str, Any]]:
    """("submitit", {"timeout_min": 60}) from "submitit:timeout_min=60"; InputError otherwise."""
    name, _, rest = text.partition(":")
    if name not in LAUNCHERS:
        raise InputError(f"launcher must be one of {', '.join(LAUNCHERS)}, got {name!r}")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier() or name == PROCESSES:
            raise InputError(
                f"launcher takes options as submitit:timeout_min=60,slurm_partition=gpu, got "
                f"{part!r} for {name}"
            )
        options[key] = int(value) if value.isdecimal() else value
    if name != PROCESSES:
        try:
            importlib.import_module(name)
        except ImportError:
            raise InputError(
                f"launcher {name} needs the package {name}, which is not installed; "
                f"pip install 'rhc[{name}]'"
            ) from None
    return name, options


def launched(
    launcher: str, answer: Answer, lines: Sequence[str], jobs: int, folder: Path
) -> Iterator[tuple[int, str | Exception]]:
    """(index of a line, its answer or exception), as they arrive. `answer` must be importable in
    other processes; `jobs` run at once."""
    name, options = parsed_launcher(launcher)
    begin = {PROCESSES: _by_processes, "submitit": _by_submitit, "ray": _by_ray}[name]
    return begin(answer, lines, jobs, folder, options)


def _by_processes(
    answer: Answer, lines: Sequence[str], jobs: int, folder: Path, options: dict[str, Any]
) -> Iterator[tuple[int, str | Exception]]:
    own, workers = threading.local(), list[_Worker]()

    def begin() -> None:
        own.worker = _Worker(answer)
        workers.append(own.worker)

    threads = ThreadPoolExecutor(jobs, initializer=begin)
    try:
        yield from _answers(
            lines,
            jobs,
            lambda line: threads.submit(lambda: own.worker.ask(line)),
            lambda running: wait(running, return_when=FIRST_COMPLETED).done,
            Future.result,
            Future.cancel,
        )
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()


class _Worker:
    """A process that answers lines of JSON; restarted when it dies, at the cost of one cell."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.process: subprocess.Popen[str] | None = None

    def ask(self, line: str) -> str:
        if self.process is None or self.process.poll() is not None:
            self.process = self._begin()
        process = self.process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        if not answer:
            status = process.wait()
            raise RuntimeError(f"its process ended with status {status}; run it with --jobs 1")
        return answer

    def _begin(self) -> subprocess.Popen[str]:
        # In its own session Ctrl-C does not reach it; the parent kills it. One thread, since the
        # other workers use the other cores.
        module, name = self.answer.__module__, self.answer.__qualname__
        code = f"from {__name__} import serve; from {module} import {name}; serve({name})"
        return subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


def serve(answer: Answer) -> None:
    """A worker process: answers lines from stdin until its parent exits."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # stdout is for answers alone
    asked: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            asked.put(line)
        os._exit(0)  # even while training: the parent is gone

    threading.Thread(target=listen, daemon=True).start()
    while True:
        answers.write(answer(asked.get()) + "\n")
        answers.flush()


def _by_submitit(
    answer: Answer, lines: Sequence[str], jobs: int, folder: Path, options: dict[str, Any]
) -> Iterator[tuple[int, str | Exception]]:
    submitit: Any = importlib.import_module("submitit")
    executor = submitit.AutoExecutor(folder=folder / "jobs")
    executor.update_parameters(**{"timeout_min": 24 * 60, "name": "rhc", **options})

    def done(running: Sequence[Any]) -> list[Any]:
        found = [job for job in running if job.done()]
        if not found:
            time.sleep(0.2)
        return found

    begin = partial(executor.submit, answer)
    yield from _answers(
        lines, jobs, begin, done, lambda job: job.result(), lambda job: job.cancel()
    )


def _by_ray(
    answer: Answer, lines: Sequence[str], jobs: int, folder: Path, options: dict[str, Any]
) -> Iterator[tuple[int, str | Exception]]:
    ray: Any = importlib.import_module("ray")
    began = not ray.is_initialized()
    if began:
        here = {"num_cpus": jobs, "include_dashboard": False}
        local = {"address": "auto"} if "RAY_ADDRESS" in os.environ else here
        ray.init(log_to_driver=False, **local)
    remote = ray.remote(num_cpus=1, **options)(answer)
    try:
        yield from _answers(
            lines,
            jobs,
            remote.remote,
            lambda running: ray.wait(list(running), num_returns=1)[0],
            ray.get,
            partial(ray.cancel, force=True),
        )
    finally:
        if began:
            ray.shutdown()


def _answers(
    lines: Sequence[str],
    jobs: int,
    begin: Callable[[str], Any],
    done: Callable[[Sequence[Any]], Iterable[Any]],
    result: Callable[[Any], str],
    cancel: Callable[[Any], object],
) -> Iterator[tuple[int, str | Exception]]:
    """Answers of an engine that runs each line as a job, `jobs` at once."""
    waiting = list(enumerate(lines))[::-1]
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index, line = waiting.pop()
                running[begin(line)] = index
            for job in done(list(running)):
                index = running.pop(job)
                try:
                    yield index, result(job)
                except Exception as error:  # of that one run, or of the engine
                    yield index, error
    finally:
        for job in running:
            cancel(job)

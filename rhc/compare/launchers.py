"""Where the runs of a comparison are computed: processes here, or an engine that is there already.

A launcher takes lines of JSON, one per run, and gives their answers as they come; what a line means
is `rhc.compare.pool`'s business. submitit hands runs to Slurm where there is one, else to processes
of this machine; ray to the cluster that RAY_ADDRESS names, else to one that it begins here. Both
are optional: pip install 'rhc[submitit]', 'rhc[ray]'.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rhc.errors import InputError

Answer = Callable[[str], str]

PROCESSES = "processes"
LAUNCHERS = (PROCESSES, "submitit", "ray")


def parsed_launcher(text: str) -> tuple[str, dict[str, Any]]:
    """("submitit", {"timeout_min": 60}) of "submitit:timeout_min=60"; InputErrors for the rest."""
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
    """(index of a line, its answer or why there is none), in the order in which they come.

    answer: a function of a module that the engine's processes can import. jobs: how many at once.
    """
    name, options = parsed_launcher(launcher)
    begin = {"submitit": _by_submitit, "ray": _by_ray}[name]
    return begin(answer, lines, jobs, folder, options)


def _by_submitit(
    answer: Answer, lines: Sequence[str], jobs: int, folder: Path, options: dict[str, Any]
) -> Iterator[tuple[int, str | Exception]]:
    submitit: Any = importlib.import_module("submitit")
    executor = submitit.AutoExecutor(folder=folder / "jobs")
    executor.update_parameters(**{"timeout_min": 24 * 60, "name": "rhc", **options})
    waiting = list(enumerate(lines))[::-1]
    running: dict[int, Any] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index, line = waiting.pop()
                running[index] = executor.submit(answer, line)
            done = [index for index, job in running.items() if job.done()]
            for index in done:
                job = running.pop(index)
                try:
                    yield index, job.result()
                except Exception as error:  # of that one run, or of the engine
                    yield index, error
            if not done:
                time.sleep(0.2)
    finally:
        for job in running.values():
            job.cancel()


def _by_ray(
    answer: Answer, lines: Sequence[str], jobs: int, folder: Path, options: dict[str, Any]
) -> Iterator[tuple[int, str | Exception]]:
    ray: Any = importlib.import_module("ray")
    here = "RAY_ADDRESS" not in os.environ
    began = not ray.is_initialized()
    if began:
        local = {"num_cpus": jobs, "include_dashboard": False} if here else {"address": "auto"}
        ray.init(log_to_driver=False, **local)
    remote = ray.remote(num_cpus=1, **options)(answer)
    waiting = list(enumerate(lines))[::-1]
    running: dict[Any, int] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index, line = waiting.pop()
                running[remote.remote(line)] = index
            for reference in ray.wait(list(running), num_returns=1)[0]:
                index = running.pop(reference)
                try:
                    yield index, ray.get(reference)
                except Exception as error:
                    yield index, error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if began:
            ray.shutdown()

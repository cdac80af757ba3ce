"""Several ranks on this machine: `spawn` runs a function of this file in each, and gathers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }


def spawn(ranks: int, program: str, *arguments: str, timeout: float = 120) -> list[Any]:
    """The last line that each rank of `python program arguments` prints, read as JSON."""
    outcomes = outputs(ranks, program, *arguments, timeout=timeout)
    for status, output, errors in outcomes:
        assert status == 0, errors[-3000:] or output[-3000:]
    return [json.loads(output.strip().splitlines()[-1]) for _, output, _ in outcomes]


def outputs(
    ranks: int, program: str, *arguments: str, timeout: float = 120
) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each rank."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / program), *arguments],
            env=environment(rank, ranks, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        found = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, found, strict=True)]

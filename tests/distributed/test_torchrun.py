"""torchrun as people use it: several ranks, ranks that die, two nodes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import HERE, free_port
from runs import FILES
from safetensors.torch import load_file

STEPS = 60
WORKLOAD = f"{HERE / 'rank_workload.py'}:make"


def torchrun(
    directory: Path, ranks: int = 2, *options: str, port: int | None = None, steps: int = STEPS
) -> subprocess.Popen[str]:
    """A run of six windows that has begun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    settings = ["--window", "10", "--steps", str(steps), "--start", "given"]
    settings += ["--controls", "lr", "noise", "--product", "exact"]
    return subprocess.Popen(
        [
            *(*launcher, "--master-addr", "127.0.0.1", "--master-port", str(port or free_port())),
            *(*options, "-m", "rhc", "--", "train", WORKLOAD, *settings),
            *("--directory", str(directory)),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0, output[-3000:]
    return output


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes of the ranks."""
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def kill_one(process: subprocess.Popen[str], draw: random.Random) -> bool:
    """Kills a rank with SIGKILL, where there is one."""
    alive = workers(process)
    if not alive:
        return False
    os.kill(draw.choice(alive), signal.SIGKILL)
    return True


def assert_same_end(a: Path, b: Path) -> None:
    for name in FILES:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    last = f"checkpoints/window-{STEPS:08d}"
    for file in sorted(path.name for path in (a / last).glob("*.safetensors")):
        one, other = load_file(a / last / file), load_file(b / last / file)
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), (file, name)
    assert "ranks.safetensors" in {path.name for path in (a / last).iterdir()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing befell."""
    directory = tmp_path_factory.mktemp("ranks") / "straight"
    ended(torchrun(directory))
    return directory


def test_a_rank_that_dies_is_started_again_and_the_end_is_the_same(
    straight: Path, tmp_path: Path
) -> None:
    process = torchrun(tmp_path / "killed", 2, "--max-restarts", "3")
    deadline = time.monotonic() + 100
    while not (tmp_path / "killed/checkpoints/window-00000020/manifest.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    assert kill_one(process, random.Random(1))
    output = ended(process)
    assert "from step" in output
    assert_same_end(straight, tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_sigkill_of_a_random_rank_at_a_random_moment(
    straight: Path, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    process = torchrun(tmp_path / "killed", 2, "--max-restarts", "3")
    while not workers(process):
        time.sleep(0.05)
    time.sleep(draw.uniform(0.0, 12.0))
    kill_one(process, draw)
    ended(process)
    assert_same_end(straight, tmp_path / "killed")


@pytest.mark.slow
def test_two_nodes(straight: Path, tmp_path: Path) -> None:
    """Two launchers that meet at one address: the same run as two ranks of one."""
    port = free_port()
    nodes = [
        torchrun(tmp_path / "two", 1, "--nnodes", "2", "--node-rank", str(node), port=port)
        for node in range(2)
    ]
    for node in nodes:
        ended(node)
    assert_same_end(straight, tmp_path / "two")


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(straight: Path, tmp_path: Path) -> None:
    ended(torchrun(tmp_path / "more", 2, steps=30))
    output = ended(torchrun(tmp_path / "more", 4))
    assert "saved by 2 ranks and goes on with 4" in output
    result = json.loads((tmp_path / "more/result.json").read_text())
    assert result["steps"] == STEPS and result["status"] == "finished"

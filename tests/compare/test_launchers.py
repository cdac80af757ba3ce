"""The same rows from every launcher, and what cannot be launched is said in a sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from rhc.cli.main import main
from rhc.compare.launchers import parsed_launcher
from rhc.errors import InputError

COMPARE = ["compare", "sine", "--methods", "constant", "cosine", "--lrs", "0.01"]
COMPARE += ["--seeds", "2", "--steps", "20", "--jobs", "2"]


def test_options_of_a_launcher() -> None:
    pytest.importorskip("submitit", reason="pip install 'rhc[submitit]'")
    assert parsed_launcher("processes") == ("processes", {})
    found = parsed_launcher("submitit:timeout_min=5,slurm_partition=gpu")
    assert found == ("submitit", {"timeout_min": 5, "slurm_partition": "gpu"})


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ("slurm", "launcher must be one of processes, submitit, ray, got 'slurm'"),
        ("processes:jobs=3", "got 'jobs=3' for processes"),
        ("submitit:gpu", "launcher takes options as submitit:timeout_min=60,.*, got 'gpu'"),
    ],
)
def test_launchers_that_cannot_be_used(launcher: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parsed_launcher(launcher)


def test_a_launcher_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*COMPARE, "--launcher", "ray", "--directory", str(tmp_path)]) == 2
    assert "pip install 'rhc[ray]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit", "ray"])
def test_every_launcher_finds_the_same_rows(launcher: str, tmp_path: Path) -> None:
    pytest.importorskip(launcher, reason=f"pip install 'rhc[{launcher}]'")
    scores = []
    for name in ("processes", launcher):
        assert main([*COMPARE, "--launcher", name, "--directory", str(tmp_path / name)]) == 0
        lines = (tmp_path / name / "rows.jsonl").read_text().splitlines()
        rows = [json.loads(line)["row"] for line in lines]
        scores.append(sorted((r["method"], r["seed"], r["score"]) for r in rows))
    assert len(scores[0]) == 4 and scores[0] == scores[1]

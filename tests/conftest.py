"""What every test shares: one thread, no deadlines, and the folder of real data."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from rhc.cli.main import main

# A deadline is an asserted timing, and a busy machine fails it.
settings.register_profile("rhc", deadline=None)
settings.load_profile("rhc")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small tensors are slower on many threads, and sums differ in the last bit between counts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets, one folder each; skips where it is absent."""
    repository = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("RHC_DATA") or repository.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}: set RHC_DATA to a folder with mnist/ in it")
    return folder


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line: (exit status, stdout, stderr)."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        status = main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run

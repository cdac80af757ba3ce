"""The names of the directories of runs, which old ones are found by: they never change."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from rhc.cli.main import main

SHORT = "--steps 2 --window 2 --threads 1"

NAMES = {
    f"train digits {SHORT}": "digits-b0c81797",
    f"train sine {SHORT} --no-rewrite --lr 0.01 --seed 3 --template cosine": "sine-5676015b",
    f"train digits {SHORT} --optimizer adamw --memory-budget 1GB --controls lr,momentum "
    "--per-group lr --discount 0.9 --costate-clip 3 --clip-norm 1 "
    "--accumulate 2": "digits-2b97855a",
    f"train digits {SHORT} --segment 2 --product exact --start given --lr 0.05 --cooldown 0 "
    "--until 0.5 --budget 9 --average 0.5 --objective-batches 2 --validate-every 1 "
    "--keep-checkpoints 5 --device cpu": "digits-7943adc9",
    # Before momentum moved by default, this was the same without --controls.
    "smooth sine --steps 40 --threads 1 --gain 0.5 --lr 0.01 --controls lr": "sine-smooth-65bea5b5",
    "smooth sine --steps 40 --threads 1 --gain 0.5 --lr 0.01": "sine-smooth-dd71fe12",
}
"""Command lines, and the directory below runs/ that each has made ever since."""


@pytest.mark.parametrize("line", NAMES)
def test_a_configuration_has_the_directory_it_always_had(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)) == 0
    assert [path.name for path in Path("runs").iterdir()] == [NAMES[line]]


def test_what_follows_a_run_has_the_directory_it_always_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = f"train sine {SHORT} --no-rewrite --lr 0.01 --directory first"
    assert main(first.split()) == 0
    assert main(["replay", "first", "--seed", "1", "--threads", "1"]) == 0
    assert main(["hypergradient", "first", "--passes", "1", "--knots", "1"]) == 0
    horizon, replay = sorted(path.name for path in Path("runs").iterdir())
    assert replay == "sine-replay-fc3c11e7"
    # Named by the schedule that passes found, whose last bits are those of the engine.
    assert horizon.startswith("sine-horizon-")

"""Deliberate breakages, one at a time in a copy of the code: does a test notice?

    python benchmarks/breakages.py            # all of them, a quarter of an hour
    python benchmarks/breakages.py clip noise # those whose names have one of these words

Each row is a line of rhc that stands there once, what it becomes, and the tests that are asked. The
exit status is 1 where a breakage goes unnoticed, or where a line has moved: then mend the row.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Breakage(NamedTuple):
    what: str
    file: str
    line: str
    broken: str
    tests: str


BREAKAGES = (
    Breakage(
        "the costate is not clipped", "hypergradient/adjoint.py",
        "(limit / norm).clamp(max=1.0)", "(limit / norm).clamp(min=1.0, max=1.0)",
        "hypergradient/test_hypergradient.py",
    ),
    Breakage(
        "the discount is ignored", "hypergradient/adjoint.py",
        "scale: float | Tensor = self.damping.discount", "scale: float | Tensor = 1.0",
        "hypergradient/test_hypergradient.py",
    ),
    Breakage(
        "a control leaves its bounds", "schedule/controls.py",
        "natural = natural.clamp(self.lower, self.upper)", "natural = natural + 0.0",
        "schedule/test_schedule.py",
    ),
    Breakage(
        "AdaptiveRL moves further than its cap", "schedulers/laws.py",
        "lr = _capped(lr, controls.lr, cap)", "lr = _capped(lr, controls.lr, None)",
        "schedulers/test_causal.py",
    ),
    Breakage(
        "a snapshot aliases the parameters", "training/snapshot.py",
        "{n: p.detach().clone() for n, p in plant.model.named_parameters()}",
        "{n: p.detach() for n, p in plant.model.named_parameters()}",
        "training/test_plant.py",
    ),
    Breakage(
        "random states are not restored", "training/snapshot.py",
        "        self.rng.restore()\n", "",
        "training/test_plant.py",
    ),
    Breakage(
        "noise is the same at every step", "rng.py",
        "(step + 1) * 0xD1B54A32D192ED03", "1 * 0xD1B54A32D192ED03",
        "training/test_plant.py hypergradient/test_hypergradient.py schedule",
    ),
    Breakage(
        "a damaged file of a checkpoint is loaded", "storage/checkpoint.py",
        "if hashlib.sha256(data).hexdigest() != digest:", "if False:",
        "storage/test_checkpoint.py",
    ),
    Breakage(
        "a worse replay is accepted", "loop/windows.py",
        "rule.accept and not trial.value < attempt.value", "False",
        "loop/test_runner.py loop/test_rewrite.py",
    ),
    Breakage(
        "a window that diverges is committed", "loop/steps.py",
        "return max(DIVERGED * first, DIVERGED * lately, 1.5 * ever)", "return math.inf",
        "loop/test_runner.py",
    ),
    Breakage(
        "SIGTERM ends with another status", "training/interrupts.py",
        "signal.SIGTERM: 143", "signal.SIGTERM: 1",
        "cli/test_cli.py loop/test_resume.py",
    ),
    Breakage(
        "a resumed run begins its epoch anew", "training/batches.py",
        "        start.rng.restore()\n", "",
        "training/test_batches.py loop/test_resume.py",
    ),
)  # fmt: skip


def noticed(breakage: Breakage) -> bool | None:
    """Whether a test fails; None where the line is not there once."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "site"))
        path = copy / "rhc" / breakage.file
        code = path.read_text(encoding="utf-8")
        if code.count(breakage.line) != 1:
            return None
        path.write_text(code.replace(breakage.line, breakage.broken), encoding="utf-8")
        tests = [f"tests/{name}" for name in breakage.tests.split()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        return (
            subprocess.run(command, cwd=copy, env=environment, capture_output=True).returncode == 1
        )


def main() -> None:
    words = sys.argv[1:]
    missed = 0
    for breakage in BREAKAGES:
        if not words or any(word in breakage.what for word in words):
            found = noticed(breakage)
            missed += not found
            says = {True: "noticed", False: "NOT NOTICED", None: "the line has moved"}[found]
            print(f"{breakage.what}: {says}", flush=True)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()

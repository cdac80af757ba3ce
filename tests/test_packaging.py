"""What is installed: one name in site-packages, its types, its ready-made runs."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from rhc.workload import load_runner

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_has_one_top_level_package(tmp_path: Path) -> None:
    pytest.importorskip("hatch_vcs", reason="hatch-vcs is not installed")
    build = pytest.importorskip("hatchling.build", reason="hatchling is not installed")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        names = zipfile.ZipFile(tmp_path / build.build_wheel(str(tmp_path))).namelist()
    finally:
        os.chdir(before)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"rhc"}
    assert {"rhc/py.typed", "rhc/runners/digits.py", "rhc/report/page.html"} <= set(names)


def test_runners_are_found_beside_the_sources_too() -> None:
    import rhc.runners.sine

    assert Path(rhc.runners.sine.__file__ or "") == ROOT / "runners" / "sine.py"
    assert callable(load_runner("digits")) and (ROOT / "rhc" / "py.typed").exists()

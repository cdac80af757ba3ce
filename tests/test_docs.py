"""The documentation does what it says: code is run, commands are read, pictures are current."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rhc.cli.main import COMMANDS, main, parsed
from rhc.workload import load_runner

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LEARNED = 0.05
"""Largest share of the error of predicting the mean that the first example may be left with."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def commands(page: Path) -> Iterator[list[str]]:
    """The `rhc …` lines of a page, without their comments."""
    for code in blocks(page, ""):
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["rhc"]:
                yield words[1:]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy of one short run, fitted badly."""
    folder = tmp_path_factory.mktemp("policy")
    line = "train sine --no-rewrite --template cosine --lr 0.05 --steps 100 --directory"
    assert main([*line.split(), str(folder / "run")]) == 0
    distilled = ["distill", str(folder / "run"), "-o", str(folder / "policy"), "--kind", "laws"]
    assert main([*distilled, "--rounds", "0"]) == 0
    return folder / "policy"


WITH_CODE = [page for page in PAGES if blocks(page, "python")]


def given() -> dict[str, Any]:
    """What a page may take for granted: what every training loop has."""
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = (x.sum(1) > 0).long()
    model = nn.Linear(8, 2)

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    import rhc

    return {
        "rhc": rhc, "torch": torch, "model": model, "optimizer": optimizer, "loss_fn": loss_fn,
        "train_loader": loader, "val_loader": loader, "batches": list(loader)[:4],
        "train": TensorDataset(x, y), "rows_of_loss": loss_fn, "held_out": (x, y),
        "loss": loss_fn(model, (x, y)), "__name__": "page",
    }  # fmt: skip


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
def test_every_block_of_code_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: Path
) -> None:
    """In the order of the page, in one namespace. `...` stands for the rest of a loop."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(policy, tmp_path / "policy")
    names = given()
    names["rhc"].Schedule.constant(2000, lr=0.01, momentum=0.9).save("schedule.json")
    names["loss"].backward()  # what a loop has done before it steps
    threads = torch.get_num_threads()
    try:
        for code in blocks(page, "python"):
            exec(compile(code, str(page), "exec"), names)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_is_one(page: Path) -> None:
    for words in commands(page):
        if words[0] == "--help":
            continue
        name, *rest = words
        assert name in COMMANDS, words
        rest = [word.strip("[]") for word in rest if word != "…"]
        files = ("--config", "run.toml", "config.json") if name == "train" else ()
        parsed(name, [word for word in rest if not word.endswith(files)])


@pytest.mark.slow
def test_the_commands_of_the_readme_run_as_printed(tmp_path: Path, data_dir: Path) -> None:
    """Those of the first list, in their order, with DIR for a folder of MNIST."""
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "COLUMNS": "80"}
    assert load_runner("digits")
    lines = list(commands(ROOT / "README.md"))
    assert {words[0] for words in lines} >= set(COMMANDS)
    for words in lines:
        line = " ".join(str(data_dir / "mnist") if word == "DIR" else word for word in words)
        found = subprocess.run(
            f"rhc {line}", shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert found.returncode == 0, (line, found.stderr[-2000:])


def test_the_first_run_is_called_as_the_readme_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--window", "50"]) == 0
    (directory,) = (tmp_path / "runs").iterdir()
    named = set(re.findall(r"runs/(digits-\w{8})", (ROOT / "README.md").read_text()))
    assert named == {directory.name}


def test_the_notebook_ends_with_the_report() -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    pytest.importorskip("jinja2", reason="the extra `report` is not installed")
    import nbformat

    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "store it without outputs"
    nbclient.NotebookClient(notebook, timeout=120).execute()
    (shown,) = notebook.cells[-1].outputs
    assert "srcdoc" in shown["data"]["text/html"] and "Plotly" in shown["data"]["text/html"]


@pytest.mark.parametrize("name", ["commands", "house"])
def test_what_scripts_draw_is_current(name: str) -> None:
    script = ROOT / "docs" / f"{name}.py"
    found = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_pictures_are_current() -> None:
    script = ROOT / "docs" / "pictures.py"
    found = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    made = json.loads((ROOT / "docs" / "pictures" / "made.json").read_text())
    used = {
        name
        for page in PAGES
        for name in re.findall(r"\]\((?:docs/)?pictures/([\w.]+)\)", page.read_text())
    }
    assert used and used <= set(made["pictures"])


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed; make docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "hypergradient" in (tmp_path / "api" / "index.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 110))
def test_the_first_example_learns(seed: int, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "docs" / "index.md", "python")
    torch.manual_seed(seed)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(code, "index.md", "exec"), names)
    mean = float(names["y"][1024:].var())
    print(seed, names["result"].val_loss, mean)
    assert names["result"].val_loss < LEARNED * mean

"""Imports point downwards only, runners stay outside, and nothing is ever pickled or evaluated."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

FLOORS = (
    {"errors", "events", "rng", "runner_files", "runners"},
    {"containers", "optimizers", "storage", "workload"},
    {"distributed", "schedule", "settings"},
    {"data_weights"},
    {"training"},
    {"hypergradient", "schedulers"},
    {"loop", "report"},
    {"hindsight", "runner"},
    {"compare", "integrations"},
    {"cli"},
    {"__main__"},
)
"""The house, from the ground: a file or folder of rhc imports from the floors below its own."""

FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}

FORBIDDEN_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save"}


def sources(folder: str) -> list[str]:
    """The Python files below a folder, relative to the repository."""
    found = (REPOSITORY / folder).rglob("*.py")
    return sorted(path.relative_to(REPOSITORY).as_posix() for path in found)


def parsed(path: str) -> ast.Module:
    return ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))


def imports(tree: ast.Module, path: str) -> Iterator[str]:
    """Dotted names of all that a file imports, inside functions too; relative ones resolved.

    `from rhc import plant` imports a module and `from rhc.training.plant import Plant` a name: both
    give rhc.training.plant as the first two parts.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = Path(path).parts[: -node.level] if node.level else ()
            base = (*above, *([node.module] if node.module else ()))
            yield from (".".join((*base, alias.name)) for alias in node.names)


def upward(tree: ast.Module, path: str) -> list[str]:
    """The imports of a module of rhc that do not point down."""
    own = Path(path).with_suffix("").parts[1]
    assert own in FLOOR, f"{path} is on no floor; place it in FLOORS of tests/test_layers.py"
    wrong = []
    for name in imports(tree, path):
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if package != "rhc" or other in ("", "__version__"):
            continue
        assert other in FLOOR, f"{path} imports {name}, which is on no floor of this test"
        if other != own and FLOOR[other] >= FLOOR[own]:
            wrong.append(f"{path} is on {FLOOR[own]} and imports {name}, on {FLOOR[other]}")
    return wrong


# The front door names everything, and imports none of it until it is used.
@pytest.mark.parametrize("path", [p for p in sources("rhc") if p != "rhc/__init__.py"])
def test_imports_point_downwards(path: str) -> None:
    assert not upward(parsed(path), path)


@pytest.mark.parametrize("path", sources("rhc/loop"))
def test_no_room_of_the_loop_knows_the_runner(path: str) -> None:
    names = [name.split(".")[:2] for name in imports(parsed(path), path)]
    assert not [n for n in names if n in (["rhc", "runner"], ["rhc", "Runner"])]


@pytest.mark.parametrize("path", sources("rhc"))
def test_rhc_never_imports_runners(path: str) -> None:
    assert not [n for n in imports(parsed(path), path) if n.split(".")[0] == "runners"]


@pytest.mark.parametrize("path", sources("rhc") + sources("runners"))
def test_nothing_is_pickled_or_evaluated(path: str) -> None:
    tree = parsed(path)
    assert not {name.split(".")[0] for name in imports(tree, path)} & FORBIDDEN_MODULES
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not {ast.unparse(call.func) for call in calls} & FORBIDDEN_CALLS
    assert not [c for c in calls if any(k.arg == "allow_pickle" for k in c.keywords)]


@pytest.mark.parametrize(
    "source",
    [
        "import rhc.runner",
        "from rhc import runner",
        "from rhc.runner import Runner",
        "from .. import runner",
        "from ..runner import Runner",
        "def later():\n    from rhc.runner import Runner",
    ],
)
def test_every_way_to_import_upwards_is_seen(source: str) -> None:
    assert len(upward(ast.parse(source), "rhc/hypergradient/imagined.py")) == 1


def test_each_module_is_on_one_floor() -> None:
    assert sum(map(len, FLOORS)) == len(FLOOR)
    with pytest.raises(AssertionError, match="place it in FLOORS"):
        upward(ast.parse(""), "rhc/imagined.py")

"""docs/reliability.md and docs/specification.md: every row names tests, which are all there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = {path.name: path for path in TESTS.rglob("test_*.py")}
DOCS = TESTS.parent / "docs"
TEXT = (DOCS / "reliability.md").read_text(encoding="utf-8")
NAME = re.compile(r"(?P<slow>\*slow\*\s+)?`(?P<file>test_\w+\.py)?::(?P<test>test_\w+)`")


def promises(text: str) -> dict[str, list[tuple[str, str, bool]]]:
    """promise -> (file, test, whether it is said to be slow) of each test that holds it."""
    rows = re.search(r"\n\| promise \| held by \|\n\|[-|]+\|\n((?:\|.*\n)+)", text)
    assert rows is not None, "the table of promises is gone"
    pairs = (row.strip("| ").split(" | ") for row in rows[1].splitlines())
    return {promise: named_tests(promise, held_by) for promise, held_by in pairs}


def named_tests(promise: str, held_by: str) -> list[tuple[str, str, bool]]:
    found, file = [], ""
    for match in NAME.finditer(held_by):
        file = match["file"] or file
        found.append((file, match["test"], match["slow"] is not None))
    rest = NAME.sub("", held_by)
    assert "test_" not in rest, f"{promise}: {rest.strip()} is no name of a test"
    return found


def systems() -> dict[str, str]:
    """system -> what holds it, of docs/specification.md."""
    text = (DOCS / "specification.md").read_text(encoding="utf-8")
    rows = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ")]
    header, *rows = rows
    assert header == ["system", "what was asked", "where it is", "held by", "figure"]
    assert all(len(row) == 5 for row in rows), [row[0] for row in rows if len(row) != 5]
    return {row[0]: row[3] for row in rows}


def known(file: str) -> dict[str, bool]:
    """The tests of a file, and whether all of their cases are slow."""
    tree = ast.parse(FILES[file].read_text(encoding="utf-8"))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    return {
        f.name: any(ast.unparse(d) == "pytest.mark.slow" for d in f.decorator_list)
        for f in functions
        if f.name.startswith("test_")
    }


@pytest.mark.parametrize("promise", promises(TEXT))
def test_a_promise_is_held(promise: str) -> None:
    check(promise, promises(TEXT)[promise])


@pytest.mark.parametrize("system", systems())
def test_a_system_is_held(system: str) -> None:
    check(system, named_tests(system, systems()[system]))


def test_every_system_of_the_specification_has_a_row() -> None:
    assert [name.partition(" ")[0] for name in systems()] == [str(n) for n in range(1, 29)]


def check(promise: str, held_by: list[tuple[str, str, bool]]) -> None:
    assert held_by, f"no test holds: {promise}"
    for file, test, slow in held_by:
        assert file in FILES, f"{promise}: there is no {file} in tests/"
        tests = known(file)
        assert test in tests, f"{promise}: there is no {file}::{test}"
        assert slow or not tests[test], f"{promise}: {file}::{test} is slow, and not said to be"


def test_a_promise_without_a_test_is_found() -> None:
    table = (
        "\n| promise | held by |\n|---|---|\n| a | `test_x.py::test_y`, `::test_z` |\n| b | – |\n"
    )
    assert promises(table) == {
        "a": [("test_x.py", "test_y", False), ("test_x.py", "test_z", False)],
        "b": [],
    }

"""docs/reliability.md: every promise names tests, and every test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = {path.name: path for path in TESTS.rglob("test_*.py")}
TEXT = (TESTS.parent / "docs" / "reliability.md").read_text(encoding="utf-8")
NAME = re.compile(r"(?P<slow>\*slow\*\s+)?`(?P<file>test_\w+\.py)?::(?P<test>test_\w+)`")


def promises(text: str) -> dict[str, list[tuple[str, str, bool]]]:
    """promise -> (file, test, whether it is said to be slow) of each test that holds it."""
    rows = re.search(r"\n\| promise \| held by \|\n\|[-|]+\|\n((?:\|.*\n)+)", text)
    assert rows is not None, "the table of promises is gone"
    found: dict[str, list[tuple[str, str, bool]]] = {}
    for row in rows[1].splitlines():
        promise, held_by = row.strip("| ").split(" | ")
        file = ""
        found[promise] = []
        for match in NAME.finditer(held_by):
            file = match["file"] or file
            found[promise].append((file, match["test"], match["slow"] is not None))
        rest = NAME.sub("", held_by)
        assert "test_" not in rest, f"{promise}: {rest.strip()} is no name of a test"
    return found


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
    held_by = promises(TEXT)[promise]
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

"""Runner files as modules: `rhc.runner_files./home/me/my_run%2Epy` is that file.

A name of its own, since a file called data.py or test.py must not replace an installed module; and
one that any process can import, since workers that are spawned (DataLoader on macOS and Windows,
forkserver from Python 3.14 on) look up the file's classes by their module's name.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from urllib.parse import unquote

__path__: list[str] = []  # what makes it a package


def module_name(path: Path) -> str:
    """The name under which the file at this absolute path can be imported."""
    return f"{__name__}.{str(path).replace('%', '%25').replace('.', '%2E')}"


class _Finder:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        parent, _, file = name.rpartition(".")
        if parent != __name__:
            return None
        return importlib.util.spec_from_file_location(name, unquote(file))


sys.meta_path.append(_Finder)

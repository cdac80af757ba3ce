"""Runner files as modules: `rhc.runner_files./home/me/my_run%2Epy` is that file.

The name does not hide an installed module (data.py, test.py), and spawned DataLoader workers can
import it to unpickle the file's classes.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from urllib.parse import unquote

__path__: list[str] = []  # what makes it a package


def module_name(path: Path) -> str:
    """The importable name of the file at this absolute path."""
    return f"{__name__}.{str(path).replace('%', '%25').replace('.', '%2E')}"


class _Finder:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        parent, _, file = name.rpartition(".")
        if parent != __name__:
            return None
        return importlib.util.spec_from_file_location(name, unquote(file))


sys.meta_path.append(_Finder)

"""The report: one HTML page about one run or several, which needs no network.

`page_of` reads the directories and returns the page. Everything that a run wrote is escaped, in
the text by Jinja, in the data by `_inline`, and the page forbids itself every connection by its
content security policy.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rhc.errors import InputError
from rhc.report.records import RunRecord, read_run
from rhc.storage.files import write_durably

__all__ = ["missing_packages", "page_of", "write_report"]

PACKAGES = {"jinja2": "jinja2"}

LIBRARY = Path(__file__).parent / "plotly-cartesian.min.js"
"""plotly.js with the charts of a plane alone, 1.3 MB. The Python package plotly has the whole of it
only, which made every page 4.9 MB. It is the file of npm's plotly.js-cartesian-dist-min, under the
MIT licence beside it; a newer one takes its place as it is."""


def missing_packages() -> list[str]:
    """Packages of the extra `report` that are not installed."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def write_report(directories: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the page of these runs, and returns where.

    output: by default report.html in the directory of the one run, or here for several. Raises
    InputError where a directory holds no run, a package is missing or the page cannot be written.
    """
    page = page_of(directories)
    given = output is not None
    if output is None:
        output = directories[0] / "report.html" if len(directories) == 1 else Path("report.html")
    if output.is_dir():
        raise InputError(f"output {output} is a directory; give -o the name of a file")
    try:
        if given and output.exists() and not output.is_file():  # a pipe or a device stays one
            output.write_bytes(page.encode("utf-8", "replace"))
            return output
        # Whole or not at all; it can be made again, so nothing waits for the disk.
        fresh = output.with_name(f".{output.name}.{os.getpid()}")
        write_durably(fresh, page.encode("utf-8", "replace"), wait=False)
        os.replace(fresh, output)
    except OSError as error:
        raise InputError(
            f"output {output} cannot be written ({error.strerror}); give another with -o"
        ) from None
    return output


def page_of(directories: Sequence[Path]) -> str:
    """The whole page about the runs in these directories."""
    if not directories:
        raise InputError("DIR is missing: give the directory of a run")
    runs: list[RunRecord] = [read_run(directory) for directory in dict.fromkeys(directories)]
    missing = missing_packages()
    if missing:
        raise InputError(
            f"the report needs {' and '.join(missing)}, which are not installed; "
            "pip install 'rhc[report]'"
        )
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from rhc.report.charts import NIGHT, charts_of
    from rhc.report.tables import facts_of

    charts = charts_of(runs)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(
        charts=charts,
        figures=Markup(_inline({chart.key: chart.figure for chart in charts})),
        library=Markup(_library()),
        night=Markup(_inline(NIGHT)),
        **facts_of(runs),
    )


def _library() -> str:
    """plotly.js, so that a script element can hold it."""
    try:
        text = LIBRARY.read_text(encoding="utf-8")
    except OSError:
        raise InputError(f"{LIBRARY} is missing; install rhc again") from None
    return text.replace("</script", "<\\/script")


def _inline(value: Any) -> str:
    """JSON that a script element can hold: nothing in it ends the element or begins a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text

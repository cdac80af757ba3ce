"""The report: one self-contained HTML page about one run or several.

Everything a run wrote is escaped, and a content security policy forbids all connections.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rhc import __version__
from rhc.errors import InputError
from rhc.report import why
from rhc.report.records import RunRecord, entry, number, read_run, runs_in
from rhc.settings import TrainConfig
from rhc.storage.files import write_durably

__all__ = ["page_of", "write_page", "write_report"]

LIBRARY = Path(__file__).parent / "plotly-cartesian.min.js"
"""plotly.js with cartesian charts alone (1.3 MB; the whole library made pages of 4.9 MB): npm's
plotly.js-cartesian-dist-min, unchanged, with its MIT licence beside it."""


def write_report(directories: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the page of these runs and returns its path, by default report.html in the one run's
    directory, or here for several. InputError where a run or a package is missing."""
    folder = directories[0] if len(directories) == 1 else Path()
    return write_page(_read(directories), output, folder)


def page_of(directories: Sequence[Path]) -> str:
    """The page of the runs in these directories, as HTML."""
    return _page(_read(directories))


def _read(directories: Sequence[Path]) -> list[RunRecord]:
    if not directories:
        raise InputError("DIR is missing: give the directory of a run")
    return [
        read_run(directory) for each in dict.fromkeys(directories) for directory in runs_in(each)
    ]


def write_page(
    runs: Sequence[RunRecord], output: Path | None = None, folder: Path | None = None
) -> Path:
    """Writes the page of these runs, by default to report.html in `folder`, or in the run's."""
    page = _page(runs)
    given = output is not None
    if output is None:
        output = (runs[0].directory if folder is None else folder) / "report.html"
    if output.is_dir():
        raise InputError(f"output {output} is a directory; give -o the name of a file")
    try:
        if given and output.exists() and not output.is_file():  # a pipe or a device stays one
            output.write_bytes(page.encode("utf-8", "replace"))
            return output
        # Atomic, but not fsynced: it can be made again.
        fresh = output.with_name(f".{output.name}.{os.getpid()}")
        write_durably(fresh, page.encode("utf-8", "replace"), wait=False)
        os.replace(fresh, output)
    except OSError as error:
        raise InputError(
            f"output {output} cannot be written ({error.strerror}); give another with -o"
        ) from None
    return output


def _page(runs: Sequence[RunRecord]) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader
        from markupsafe import Markup
    except ImportError as error:
        raise InputError(
            f"the report needs {error.name}, which is not installed; pip install 'rhc[report]'"
        ) from None
    from rhc.report.charts import charts_of, parts_of
    from rhc.report.figure import NIGHT

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["glossed"] = lambda text: Markup(_glossed(str(text)))
    charts = charts_of(runs)
    return environment.get_template("page.html").render(
        parts=parts_of(charts),
        figures={chart.key: chart.figure for chart in charts},
        library=Markup(_library()),
        night=NIGHT,
        version=__version__,
        faults=[f"{run.name}: {fault}" for run in runs for fault in run.faults],
        **(_facts(runs[0]) if len(runs) == 1 else _comparison(runs)),
    )


def _facts(run: RunRecord) -> dict[str, Any]:
    """What the page says of a single run, besides its charts."""
    schedule = run.directory / "schedule.json"
    progress = f"unfinished, {len(run.tape)} of {run.steps} steps are recorded"
    known = [(label, number(entry(run.result, *path)), form) for label, path, form in _FIGURES]
    numbers = [(label, format(value, form)) for label, value, form in known if value is not None]
    return {
        "title": run.name,
        "state": f"{run.runner}: {f'finished, {run.steps} steps' if run.result else progress}",
        "numbers": [*numbers, ("windows", run.tally.words)] if run.windows else numbers,
        "settings": _settings(run),
        "headline": why.headline(run),
        "answers": why.answers(run),
        "notices": run.told.get("notices") or [],
        "product": run.product,
        "events": run.events[:100],
        "attributions": run.attributions[:MOST_PREDICTIONS],
        "smoothness": number(entry(run.attribution, "smoothness", "metasmoothness")),
        "schedule": str(schedule) if schedule.exists() else "",
    }


_FIGURES = (
    ("test loss", ("test_loss",), ".4g"),
    ("test loss, averaged weights", ("average_test_loss",), ".4g"),
    ("test accuracy", ("test_accuracy",), ".4g"),
    ("tracking loss, as committed", ("tracking",), ".4g"),
    ("tracking loss, online", ("online_tracking",), ".4g"),
    ("validation loss", ("val_loss",), ".4g"),
    ("best validation loss", ("best_val_loss",), ".4g"),
    ("test loss there", ("best_test_loss",), ".4g"),
    ("best validated step", ("best_step",), ".0f"),
    ("cost in plain runs", ("cost", "plain_run_equivalents"), ".2f"),
    ("seconds", ("wall_seconds",), ".1f"),
)
"""Label, path in result.json and format of the figures of one run."""

_COMPARED = (
    ("val loss", ("val_loss",)),
    ("test loss", ("test_loss",)),
    ("test accuracy", ("test_accuracy",)),
    ("cost in plain runs", ("cost", "plain_run_equivalents")),
)
"""Label and path in result.json of the columns that compare runs."""


MOST_PREDICTIONS = 100
"""Predictions with a table of rows that helped and hurt."""

_DECIDED = {
    "steps", "stride", "optimizer", "lr", "weight_decay", "controls", "start", "template", "warmup",
    "cooldown", "until", "budget", "average", "objective_batches", "threads", "device",
}  # fmt: skip
"""Settings that the run chooses where they are not given."""
_NOT_SETTINGS = ("format", "version", "versions", "hardware", "directory", "resume", "config")


def _settings(run: RunRecord) -> list[tuple[str, str, str]]:
    """(name, value, default where it differs), those that differ first."""
    usual = TrainConfig().to_record()
    rows = []
    for name, value in run.config.items():
        if name in _NOT_SETTINGS:
            continue
        default = usual.get(name)
        # The run resolved it, as its update rule.
        decided = isinstance(value, dict) or name in _DECIDED
        differs = name in usual and value != default and not decided
        given = json.dumps(default, ensure_ascii=False) if differs else ""
        rows.append((name, json.dumps(value, ensure_ascii=False), given))
    return sorted(rows, key=lambda row: not row[2])


def _comparison(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """A row per group of runs that differ in the seed alone: mean and 95 % interval."""
    from rhc.report.charts import groups_of

    rows = []
    for name, members in groups_of(runs):
        row = {
            "runs": name if len(members) == 1 else f"{name} and {len(members) - 1} further seeds",
            "steps": str(members[0].steps),
            "finished": f"{sum(bool(run.result) for run in members)} of {len(members)}",
        }
        for label, path in _COMPARED:
            found = [number(entry(run.result, *path)) for run in members]
            row[label] = _mean([value for value in found if value is not None])
        rows.append(row)
    return {"title": f"{len(runs)} runs", "table": rows}


def _mean(values: Sequence[float]) -> str:
    import numpy as np

    if not values:
        return "–"
    text = f"{sum(values) / len(values):.4g}"
    if len(values) == 1:
        return text
    draws = np.random.default_rng(0).choice(np.asarray(values), (2000, len(values))).mean(axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{text} [{low:.4g}, {high:.4g}]"


GLOSSARY = {
    "plain runs?": "the same training without anything of rhc: the unit of cost",
    "J": "what a window is judged by: the loss on held-out data at its end, and a little of the "
    "training losses on the way",
    "windows? looked at": "windows are some steps that are rolled and looked back at, to be "
    "replayed with a better schedule",
    "attempts?": "an attempt is one schedule tried on a window",
    "rewound": "the steps diverged, and were rolled again at a lower learning rate",
    "hindsight": "a schedule that was rewritten with what happened after it in view",
    "short rolls": "a few steps from the start that are taken back again",
}
"""Words of the sentences -> what they mean, where a reader points at them."""


def _glossed(text: str) -> str:
    """The text as HTML, in which a word that needs explaining has a tooltip at its first place."""
    shown = html.escape(text)
    for word, meaning in GLOSSARY.items():
        marked = f'<abbr tabindex="0" title="{html.escape(meaning)}">\\g<0></abbr>'
        shown = re.sub(rf"(?<![\w=\"/-])\b{word}\b(?![^<]*</abbr>|[^<]*>)", marked, shown, count=1)
    return shown


def _library() -> str:
    """plotly.js, safe within a script element."""
    try:
        text = LIBRARY.read_text(encoding="utf-8")
    except OSError:
        raise InputError(f"{LIBRARY} is missing; install rhc again") from None
    return text.replace("</script", "<\\/script")

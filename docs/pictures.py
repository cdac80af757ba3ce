"""The pictures of the documentation, of the terminal and of reports.

    pip install -c constraints.txt -e '.[figures,runners]'     and Chromium with its driver
    python docs/pictures.py            # writes docs/pictures/
    python docs/pictures.py --text DIR    # also the gallery's char_lm, of the .txt file in DIR
    python docs/pictures.py --mnist DIR   # also AdaptiveRL on MNIST, and docs/figures/whole_run.png
    python docs/pictures.py --check    # exit status 1 where they would look otherwise today

Terminal and report are of `rhc train --window 50`, the README's first command; the gallery is of
`rhc train` and the demonstrations of AdaptiveRL are of `rhc compare`, seed 100.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

import rhc
import rhc.cli.building
import rhc.report
from rhc.cli.main import main as command
from rhc.events import Event, StartFound, StepTaken
from rhc.report.charts import OUTCOMES, charts_of
from rhc.report.figure import INK
from rhc.report.live import Progress, found, frame, heading
from rhc.report.records import read_run

PICTURES = Path(__file__).parent / "pictures"
CHARTS = {"losses": "losses", "control-lr": "schedule", "objectives": "windows", "heat": "heat"}
WIDTH = 79
GALLERY = {
    "digits": ("losses", "control-lr"),
    "cartpole": ("metric-0", "control-lr"),
    "char_lm": ("losses", "control-lr"),
    "drifting_sine": ("metric-0", "control-lr"),
}
"""The runs of the gallery, `rhc train NAME --validate-every 50`, and the charts that are shown."""
DEMONSTRATIONS = {"sine": 0.01, "mnist": 0.01, "cartpole": 0.01, "drifting_sine": 0.03}
"""Where AdaptiveRL is shown, and its first lr there."""
SIGNALS = ("overlay", "changes", "plateaus")
"""The charts of a demonstration."""
SHOWN_AT = 60
"""The step of the second window at which the terminal is shown."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="say whether they are current")
    parser.add_argument("--text", type=Path, help="folder with a text, for char_lm")
    parser.add_argument("--mnist", type=Path, help="folder with MNIST's IDX files")
    arguments = parser.parse_args()
    if arguments.check:
        return check()
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        here = Path.cwd()
        os.chdir(folder)
        try:
            terminal(PICTURES / "train.svg")
            (directory,) = Path("runs").iterdir()
            look = looks(PICTURES / "train.svg", directory)
            report(directory.absolute() / "report.html")
            gallery(arguments.text and here / arguments.text)
            demonstrations(arguments.mnist and here / arguments.mnist)
            if arguments.mnist:
                whole_run(here / arguments.mnist)
        finally:
            os.chdir(here)
    names = sorted(p.name for p in PICTURES.iterdir() if p.name != "made.json")
    made = {"version": rhc.__version__, "looks": look, "pictures": names}
    (PICTURES / "made.json").write_text(json.dumps(made, indent=2) + "\n")
    return 0


def check() -> int:
    """0 where every picture is there, and the run that they show would be shown the same today."""
    try:
        made = json.loads((PICTURES / "made.json").read_text())
    except FileNotFoundError:
        made = {"version": "none", "looks": {}, "pictures": []}
    wrong = [f"{name} is missing" for name in made["pictures"] if not (PICTURES / name).exists()]
    if made["version"].split(".")[:2] != rhc.__version__.split(".")[:2]:
        wrong.append(f"they are of version {made['version']}")
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            terminal(Path("train.svg"))
            (directory,) = Path("runs").iterdir()
            today = looks(Path("train.svg"), directory)
        finally:
            os.chdir(here)
    wrong += [f"the {name} has changed" for name in today if today[name] != made["looks"].get(name)]
    if not wrong:
        return 0
    told = f"the pictures are not current: {'; '.join(wrong)}"
    print(f"{told}; python docs/pictures.py makes them anew", file=sys.stderr)
    return 1


def looks(svg: Path, run: Path) -> dict[str, str]:
    """What the terminal and the report look like, whatever the numbers are on this machine."""
    text = re.sub(r"<style.*?</style>", "", svg.read_text(), flags=re.DOTALL)
    text = re.sub(r"<[^>]*>|&#\d+;", " ", text)
    # Outcomes and durations may be others there.
    words = [w for w in re.findall(r"[a-z]{3,}", text) if w not in (*OUTCOMES, "left")]
    drawn = [(chart.key, chart.title, chart.caption) for chart in charts_of([read_run(run)])]
    template = Path(rhc.report.__file__).with_name("page.html").read_text()
    shown = {"terminal": " ".join(dict.fromkeys(words)), "report": f"{drawn}{INK}{template}"}
    return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in shown.items()}


def terminal(path: Path) -> None:
    """`rhc train --window 50`, and its display in the middle of the second window."""
    console = Console(record=True, width=WIDTH, file=sys.stderr, force_terminal=True)
    console.print(Text("$ rhc train --window 50", style="bold"))

    @contextmanager
    def watched(progress: Progress, _: Console) -> Iterator[Any]:
        shown = False

        def listener(event: Event) -> None:
            nonlocal shown
            progress.observe(event)
            if isinstance(event, StartFound):
                for line in heading(progress)[:1]:
                    console.print(Text(line, style="dim"))
                console.print(Text(f"start: {found(event)}"))
            elif isinstance(event, StepTaken) and event.step == SHOWN_AT and not shown:
                shown = True
                console.print(frame(progress, WIDTH))

        yield listener

    original, rhc.cli.building.display = rhc.cli.building.display, watched  # type: ignore[assignment]
    try:
        if command(["train", "--window", "50"]):
            raise SystemExit("the run failed")
    finally:
        rhc.cli.building.display = original
    console.save_svg(str(path), title="rhc train")


def gallery(text: Path | None) -> None:
    """Two charts side by side of each run of the gallery; of char_lm where there is a text."""
    for name, keys in GALLERY.items():
        line = ["train", name, "--directory", f"gallery/{name}"]
        if name == "char_lm":
            if text is None:
                continue
            line += ["--data", str(text)]
        # Tasks that track or collect have no validation data.
        line += ["--validate-every", "50"] if name in ("digits", "char_lm") else []
        if command(line):
            raise SystemExit(f"the run {name} failed")
        charts(Path(f"gallery/{name}/report.html"), keys, PICTURES / f"gallery_{name}.png")


def demonstrations(mnist: Path | None) -> None:
    """AdaptiveRL on each task: what it saw and did; on MNIST where there is a folder of it."""
    for name, lr in DEMONSTRATIONS.items():
        line = f"compare {name} --methods adaptive --lrs {lr} --seeds 100-100 -o {name}".split()
        if name == "mnist":
            if mnist is None:
                continue
            line += ["--data", str(mnist)]
        page = Path(f"{name}/report.html")
        if command(line) or command(["report", name, "-o", str(page)]):
            raise SystemExit(f"AdaptiveRL on {name} failed")
        charts(page, SIGNALS, PICTURES / f"adaptive_{name}.png")


def charts(page: Path, keys: Sequence[str], path: Path) -> None:
    """A picture of these charts of a report alone; the first of an odd number is a wide one."""
    with opened(page.absolute()) as browser:
        shown = ", ".join(f"#chart-{key}" for key in keys)
        browser.execute_script(
            "for (const each of document.querySelectorAll('figure'))"
            f" if (!each.querySelector('{shown}')) each.remove();"
            "for (const each of document.querySelectorAll('.charts'))"
            " if (!each.querySelector('figure')) each.remove();"
        )
        size(browser, 1400)
        if len(keys) % 2:
            browser.execute_async_script(
                "document.querySelector('figure').style.gridColumn = '1 / -1';"
                "for (const each of document.querySelectorAll('.chart')) {"
                " Plotly.purge(each); draw(each); }"
                "setTimeout(arguments[0], 500);"
            )
        (found,) = browser.find_elements("css selector", ".charts")
        found.screenshot(str(path))


def whole_run(data: Path) -> None:
    """The chart of `rhc hypergradient` for a cosine of 2000 steps on MNIST."""
    line = "train mnist --no-rewrite --template cosine --lr 0.03 --steps 2000 --directory whole"
    if command([*line.split(), "--data", str(data)]) or command(
        ["hypergradient", "whole", "--memory-budget", "256MB"]
    ):
        raise SystemExit("the whole run failed")
    command(["report", "whole"])
    with opened(Path("whole/report.html").absolute()) as browser:
        (chart,) = browser.find_elements("css selector", "#chart-whole")
        chart.screenshot(str(PICTURES.parent / "figures" / "whole_run.png"))


def report(page: Path) -> None:
    """The report's first screen, and some of its charts."""
    with opened(page) as browser:
        browser.save_screenshot(str(PICTURES / "report.png"))
        for key, name in CHARTS.items():
            (chart,) = browser.find_elements("css selector", f"#chart-{key}")
            chart.screenshot(str(PICTURES / f"{name}.png"))


@contextmanager
def opened(page: Path) -> Iterator[Any]:
    """Headless Chromium with the page, all charts drawn."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = shutil.which("chromedriver")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        size(browser, 1000)
        browser.get(page.as_uri())
        browser.set_script_timeout(60)
        browser.execute_async_script(
            "const done = arguments[0], all = document.querySelectorAll('.chart').length;"
            "(function wait() { document.querySelectorAll('.chart .main-svg:first-child').length"
            " < all ? setTimeout(wait, 50) : setTimeout(done, 500); })()"
        )
        yield browser
    finally:
        browser.quit()


def size(browser: Any, height: int) -> None:
    """Makes the screen 1200 columns wide, and as high as that."""
    shape = {"width": 1200, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)


if __name__ == "__main__":
    sys.exit(main())

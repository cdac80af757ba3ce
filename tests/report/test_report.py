"""The report: what it shows of whole, unfinished and damaged runs, and in a browser."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import rhc
from rhc.cli.main import main
from rhc.report.charts import PARTS, charts_of, groups_of, parts_of
from rhc.report.figure import INK, NIGHT
from rhc.report.records import SIGNALS, read_run, runs_in, thinned
from rhc.report.signals import signals_of

pytest.importorskip("jinja2", reason="the extra `report` is not installed")

ATTACK = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>"


def written(directory: Path, steps: int = 100, *, seed: int = 0, name: str = "digits") -> Path:
    """A run's directory as the Runner writes it, with every kind of row."""
    directory.mkdir(parents=True)
    config = {"run": name, "steps": steps, "window": 50, "controls": ["lr"], "seed": seed}
    (directory / "config.json").write_text(json.dumps(config))
    rows: list[dict[str, Any]] = []
    for step in range(steps):
        loss = math.exp(-3 * step / steps) + 0.1 * math.sin(step + seed)
        lr = 0.1 * (1 - step / steps)
        rows.append({"step": step, "loss": 0.2 + loss, "lr": lr, "momentum": 0.9, name: step})
    rows[7]["planning"] = {"interventions": [{"kind": "drift", "reason": name}]}
    _lines(directory / "tape.jsonl", rows)
    attempts = []
    for start in range(0, steps, 50):
        for attempt, outcome in ((0, "rewound"), (1, "accepted"), (2, "rejected")):
            attempts.append(
                {"window": start // 50, "start": start, "stop": start + 50, "attempt": attempt,
                 "outcome": outcome, "reason": name, "objective_before": 1.0,
                 "objective_after": 0.9, "before": {"lr": 0.1}, "after": {"lr": 0.2},
                 "hypergradient": {"lr": [-0.1] * 50}, "costate_norms": [0.5] * 50,
                 "product": "none"}
            )  # fmt: skip
    _lines(directory / "windows.jsonl", attempts)
    start = [{"kind": "probe", "steps": 3, "from": 0.1, "loss": 1.0, "course": [3.0, 2.0, 1.0],
              "gradients": 3.0}]  # fmt: skip
    _lines(directory / "start.jsonl", start)
    cost = {"plain_run_equivalents": 2.5}
    result = {"steps": steps, "val_loss": 0.3, "test_loss": 0.3 + seed, "cost": cost}
    (directory / "result.json").write_text(json.dumps(result))
    (directory / "schedule.json").write_text("{}")
    whole = {
        "start": 0,
        "costate_norms": [1.0] * steps,
        "raw_grad": {"lr": [-0.1, 0.0] * (steps // 2)},
    }
    (directory / "hypergradient.json").write_text(json.dumps(whole))
    return directory


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


CHARTS = {"losses", "metric-0", "control-lr", "objectives", "starts", "courses", "overlay",
          "changes", "plateaus", "heat", "costates", "whole", "events", "cost"}  # fmt: skip


def test_peaks_outlive_thinning() -> None:
    values = [0.0] * 100_000
    values[54_321] = 1.0
    steps, kept = thinned(range(100_000), values, 1000)
    assert len(kept) <= 1002 and kept[steps.index(54_321)] == 1.0


def test_the_window_is_shown_as_it_was_committed(tmp_path: Path) -> None:
    run = read_run(written(tmp_path / "run"))
    assert [row["outcome"] for row in run.kept] == ["accepted", "accepted"]
    assert run.events == [(7, "drift", "digits")]


def test_what_a_run_wrote_is_text(tmp_path: Path) -> None:
    written(tmp_path / "run", name=ATTACK)
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<script>document.title" not in page and "<img src=x" not in page
    assert "&lt;/script&gt;" in page


def test_unfinished_and_damaged_runs_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = written(tmp_path / "run")
    (directory / "result.json").unlink()
    (directory / "windows.jsonl").write_bytes(
        b'{"outcome": 3}\n{"start": [], "outcome": "x"}\n\xff'
    )
    with open(directory / "tape.jsonl", "a") as tape:
        tape.write("nonsense\n")
    (directory / "start.jsonl").write_text('{"kind": 1, "from": "x", "course": {}}\n[]\n')
    assert main(["report", str(directory), "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "unfinished, 100 of 100 steps" in page
    assert "tape.jsonl is damaged at line 101" in page
    (directory / "config.json").write_text("{")
    assert main(["report", str(directory), "-o", str(tmp_path / "page.html")]) == 0
    assert "config.json cannot be read" in (tmp_path / "page.html").read_text()
    capsys.readouterr()


@pytest.mark.parametrize("given", ["nowhere", "empty", "file", "output"])
def test_what_is_no_run_is_one_sentence(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    arguments = ["report", str(tmp_path / given)]
    if given == "output":
        arguments = ["report", str(written(tmp_path / "run")), "-o", str(tmp_path / "empty")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("rhc: error: ") and error.count("\n") == 1 and given[:5] in error


def test_seeds_share_a_line(tmp_path: Path) -> None:
    runs = [str(written(tmp_path / f"run-{seed}", seed=seed)) for seed in range(3)]
    assert main(["report", *runs, "-o", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "run-0 and 2 further seeds" in page and "3 of 3" in page and "1.3 [0.3" in page


def test_a_seed_that_was_run_twice_counts_once(tmp_path: Path) -> None:
    runs = [read_run(written(tmp_path / f"run-{i}", seed=seed)) for i, seed in enumerate((0, 1, 1))]
    assert [[run.name for run in held] for _, held in groups_of(runs)] == [["run-0", "run-1"]]


def test_charts_stand_under_headings_and_compare_like_with_like(tmp_path: Path) -> None:
    runs = [read_run(written(tmp_path / name, name=name)) for name in ("one", "two")]
    for row in runs[1].tape:
        row["loss"] *= 10
    made = charts_of(runs)
    ranges = [each.figure["layout"]["yaxis"]["range"] for each in made if "overlay" in each.key]
    assert len(ranges) == 2 and ranges[0] == ranges[1]
    headings = [heading for heading, _ in parts_of(charts_of(runs[:1]))]
    assert headings == [heading for heading, _ in PARTS]


def test_a_missing_package_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["report", str(written(tmp_path / "run"))]) == 2
    assert "pip install 'rhc[report]'" in capsys.readouterr().err


# In a browser -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium without a network."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("chromedriver is not installed")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    chrome.execute_cdp_cmd("Network.enable", {})
    chrome.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
    )
    yield chrome
    chrome.quit()


def _opened(browser: Any, page: Path, width: int) -> set[str]:
    """Keys of the charts that are drawn, on a screen of this width."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.get(page.as_uri())
    browser.set_script_timeout(60)
    browser.execute_async_script(
        "const done = arguments[0], all = document.querySelectorAll('.chart').length;"
        "(function wait() { document.querySelectorAll('.chart .main-svg:first-child').length < all"
        " ? setTimeout(wait, 20) : done(); })()"
    )
    drawn = "[...document.querySelectorAll('.chart')].filter(c => c.querySelector('.main-svg'))"
    return set(browser.execute_script(f"return {drawn}.map(c => c.dataset.key)"))


@pytest.mark.parametrize("width", [320, 1440])
def test_every_chart_is_drawn_offline(browser: Any, tmp_path: Path, width: int) -> None:
    main(["report", str(written(tmp_path / "run", name=ATTACK))])
    assert _opened(browser, tmp_path / "run" / "report.html", width) == CHARTS
    assert browser.get_log("browser") == []
    # Had any of it been markup, the title would be another, and an image would be there.
    assert browser.title == f"{ATTACK} – rhc report" or ATTACK not in browser.title
    assert browser.title != "owned"
    assert browser.execute_script("return document.images.length") == 0
    assert ATTACK in browser.execute_script("return document.body.textContent")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert not browser.execute_script(
        "return [...document.querySelectorAll('.chart')].filter(c => !c.ariaLabel).length"
    )


@pytest.mark.parametrize(
    ("width", "scheme", "count"),
    [
        (320, "light", 1),
        (1440, "dark", 2),
        pytest.param(320, "light", 2, marks=pytest.mark.slow),
        pytest.param(1440, "dark", 1, marks=pytest.mark.slow),
    ],
)
def test_everyone_can_read_it(
    browser: Any, tmp_path: Path, width: int, scheme: str, count: int
) -> None:
    """axe-core: contrast, alternative text, keyboard, landmarks; on a dark screen too."""
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    axe = pytest.importorskip("axe_core_python.selenium", reason="axe-core-python is missing")
    runs = [str(written(tmp_path / f"run-{seed}", seed=seed)) for seed in range(count)]
    main(["report", *runs, "-o", str(tmp_path / "page.html")])
    assert _opened(browser, tmp_path / "page.html", width)
    found = axe.Axe().run(browser)
    assert len(found["passes"]) > 20
    assert [(v["id"], v["nodes"][0]["html"]) for v in found["violations"]] == []
    colour = "return getComputedStyle(document.querySelector('{}')).{}"
    page = browser.execute_script(colour.format("html", "backgroundColor"))
    chart = browser.execute_script(colour.format(".main-svg", "backgroundColor"))
    assert page == chart == {"dark": "rgb(17, 24, 39)"}.get(scheme, "rgb(255, 255, 255)")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_inks_stand_out_from_light_and_dark_pages() -> None:
    """4.5 to 1, by the formula of WCAG: axe does not look into charts."""

    def luminance(ink: str) -> float:
        parts = [int(ink[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one: str, other: str) -> float:
        low, high = sorted(map(luminance, (one, other)))
        return (high + 0.05) / (low + 0.05)

    assert all(contrast(ink, "#ffffff") >= 4.5 for ink in INK)
    assert all(contrast(NIGHT[ink], NIGHT["#ffffff"]) >= 4.5 for ink in INK)


def test_validation_while_it_trains_is_a_curve(tmp_path: Path) -> None:
    directory = written(tmp_path / "run")
    rows = [json.loads(line) for line in (directory / "tape.jsonl").read_text().splitlines()]
    for step in (49, 99):
        rows[step] |= {"val_loss": 1.0 / step, "val_accuracy": 0.5}
    _lines(directory / "tape.jsonl", rows)
    charts = {chart.title: chart for chart in charts_of([read_run(directory)])}
    (curve,) = (t for t in charts["Losses"].figure["data"] if t["name"] == "validation")
    assert curve["x"] == [49.0, 99.0]
    assert "Metric: val_accuracy" in charts and "Metric: val_loss" not in charts


@pytest.mark.parametrize("steps", [1200, None])
def test_every_run_has_its_signals(tmp_path: Path, steps: int | None) -> None:
    """Those that AdaptiveRL records are those that are computed from a tape without them."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    scheduler = rhc.AdaptiveRL(optimizer, steps=steps, surprise=False, anneal=False)
    noise = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).tolist()
    with rhc.LoopTape(tmp_path / "run", optimizer, scheduler) as tape:
        for step in range(steps or 10_000):
            loss = 1 + math.exp(-step / 100) + 0.1 * noise[step]
            optimizer.step()
            scheduler.step(loss, -loss)
            tape.step(loss, -loss)
    run = read_run(tmp_path / "run")
    recorded = signals_of(run)
    for row in run.tape:
        for name in SIGNALS:
            del row[name]
    run.known.clear()
    computed = signals_of(run)
    assert recorded.loss[-60:] == computed.loss[-60:]
    assert recorded.reward[-60:] == computed.reward[-60:]
    assert recorded.plateau[-60:] == computed.plateau[-60:]
    assert "recorded" in recorded.origin and "computed" in computed.origin
    assert len(computed.plateaus) >= 1 and computed.plateaus[-1][1] > 0.8 * len(run.tape)
    assert all(start < stop for start, stop in computed.plateaus)


def test_a_run_shows_what_its_scheduler_saw(tmp_path: Path) -> None:
    directory = written(tmp_path / "run")
    rows = [json.loads(line) for line in (directory / "tape.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {
            "reward": row["step"] / 100,
            "noise": 0.01,
            "loss_trend": -0.5,
            "reward_trend": 0.25,
        }
        row["plateau"] = 0.9 if 20 <= row["step"] < 60 else 0.1
    _lines(directory / "tape.jsonl", rows)
    charts = {chart.key: chart.figure for chart in charts_of([read_run(directory)])}
    overlaid = {trace["name"]: trace for trace in charts["overlay"]["data"]}
    assert list(overlaid) == ["loss", "reward", "lr 0.001 to 0.1", "momentum 0.9", "noise 0.01"]
    assert len({trace.get("yaxis") for trace in overlaid.values()}) == 5
    (updates,) = charts["changes"]["data"]
    assert set(updates["x"]) == {-0.5} and set(updates["y"]) == {0.25}
    assert updates["marker"]["color"] == [0.0, 20.0, 60.0]
    band, _, score = charts["plateaus"]["data"]
    assert band["x"] == [20.0, 20.0, 60.0, 60.0, 20.0, None] and score["y"] == [0.1, 0.9, 0.1]


def test_runs_stand_side_by_side(tmp_path: Path) -> None:
    """A folder of runs is its runs; of seeds the first one has charts of its own."""
    for seed in range(2):
        written(tmp_path / "runs" / f"one-{seed}", seed=seed)
        written(tmp_path / "runs" / f"two-{seed}", 50, seed=seed)
    runs = [read_run(directory) for directory in runs_in(tmp_path / "runs")]
    assert [run.name for run in runs] == ["one-0", "one-1", "two-0", "two-1"]
    assert runs_in(tmp_path / "runs" / "one-0") == [tmp_path / "runs" / "one-0"]
    titles = {chart.key: chart.title for chart in charts_of(runs)}
    kinds = ("overlay", "changes", "plateaus")
    assert {key for key in titles if key.startswith(kinds)} == {
        f"{k}-{i}" for k in kinds for i in (0, 1)
    }
    keys = list(titles)
    assert keys.index("cost") < keys.index("overlay-0") < keys.index("overlay-1")
    assert titles["plateaus-0"].endswith(": one-0") and titles["plateaus-1"].endswith(": two-0")
    assert main(["report", str(tmp_path / "runs"), "-o", str(tmp_path / "page.html")]) == 0
    assert "two-0 and 1 further seeds" in (tmp_path / "page.html").read_text()


def test_of_many_runs_every_group_has_a_curve(tmp_path: Path) -> None:
    many = [written(tmp_path / f"many-{seed}", 50, seed=seed) for seed in range(14)]
    runs = [read_run(d) for d in (*many, written(tmp_path / "other", 60))]
    (losses,) = (chart for chart in charts_of(runs) if chart.key == "losses")
    names = [trace["name"] for trace in losses.figure["data"]]
    assert len(names) == 12 and names[:3] == ["many-0 train", "other train", "many-1 train"]


def test_few_attempts_stand_for_many(tmp_path: Path) -> None:
    """Of thousands of windows those are drawn that moved J furthest; the counts are of all."""
    directory = written(tmp_path / "run", 25_000)
    rows = [json.loads(line) for line in (directory / "windows.jsonl").read_text().splitlines()]
    rows[901]["objective_after"] = -5.0
    _lines(directory / "windows.jsonl", rows)
    (chart,) = (c for c in charts_of([read_run(directory)]) if c.key == "objectives")
    drawn = [t for t in chart.figure["data"] if t["mode"] == "markers" and t["name"] == "accepted"]
    assert len(drawn[0]["x"]) <= 250 and -5.0 in drawn[0]["y"]
    assert "500 accepted" in chart.alternative


def test_a_long_run_makes_a_page_of_the_same_size(tmp_path: Path) -> None:
    began = time.process_time()
    main(["report", str(written(tmp_path / "long", 20_000)), "-o", str(tmp_path / "long.html")])
    assert time.process_time() - began < 60  # a hang, not a timing
    main(["report", str(written(tmp_path / "short", 100)), "-o", str(tmp_path / "short.html")])
    long, short = ((tmp_path / f"{n}.html").stat().st_size for n in ("long", "short"))
    assert long < 2_000_000 and long - short < 500_000

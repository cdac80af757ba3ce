"""`Runner.fit` is the loop of the six verbs; few frames lie between it and the optimizer's step."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from runs import make_run

import rhc
from rhc import Rewrite, Runner, Twin

LETTER = {
    "next_window": "n", "roll": "r", "assert_replay": "t", "adapt_to_shift": "d",
    "antithetic_search": "a", "hypergradient": "h", "rewrite": "w", "restore": "b",
    "replay": "p", "accepts": "?", "settle": "e", "commit": "c", "save": "s", "slide": "l",
}  # fmt: skip


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The verbs that `fit` calls, in order, a letter each."""
    letters: list[str] = []

    def noted(letter: str, verb: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*arguments: Any) -> Any:
            letters.append(letter)
            return verb(*arguments)

        return noting

    for name, letter in LETTER.items():
        verb = getattr(sys.modules["rhc.loop.train"], name)
        monkeypatch.setattr(f"rhc.loop.train.{name}", noted(letter, verb))
    return letters


@pytest.mark.parametrize(
    ("rewrite", "window"),
    [
        (Rewrite(), r"nrtdahw(bp\?){1,2}ecsl"),
        (Rewrite(iterations=2, worth=-1.0), r"nrtda(hw(bp\?){1,2}){1,2}ecsl"),
        (Twin(), "nrtdaecsl"),
        (False, "nrtdaecsl"),
    ],
    ids=["a rewrite", "two rewrites", "antithetic search", "the plain loop"],
)
def test_fit_calls_the_verbs_in_order(
    rewrite: bool | Rewrite, window: str, called: list[str]
) -> None:
    Runner(*make_run("sgd"), window=4, start="given", rewrite=rewrite).fit(12)
    assert re.fullmatch(f"({window}){{3}}", "".join(called))


def frames_to_fit(frame: FrameType | None) -> Iterator[str]:
    """The functions of rhc that lie between a frame and `Runner.fit`."""
    root = str(Path(rhc.__file__).parent)
    while frame is not None and frame.f_code is not Runner.fit.__code__:
        # The hook that counts is itself watched by two of them.
        watching = frame.f_code.co_name in ("_watched", "_step_hooks")
        if frame.f_code.co_filename.startswith(root) and not watching:
            yield frame.f_code.co_name
        frame = frame.f_back
    assert frame is not None, "fit is below"


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"rewrite": Rewrite(iterations=2)}, 7),
        ({"rewrite": Twin()}, 7),
        ({"rewrite": False}, 6),
    ],
    ids=["rewriting", "antithetic search", "the plain loop"],
)
def test_few_frames_lie_between_fit_and_the_optimizers_step(
    options: dict[str, Any], most: int
) -> None:
    run = make_run("sgd")
    chains: set[tuple[str, ...]] = set()

    def noting(optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        chain = tuple(frames_to_fit(sys._getframe(1)))
        if "verify" not in chain:  # the proof of the first hypergradient has rolls of its own
            chains.add(chain)

    run.optimizer.register_step_pre_hook(noting)
    Runner(*run, window=4, start="given", **options).fit(8)
    assert chains and max(map(len, chains)) <= most, max(chains, key=len)

"""`rhc hypergradient`: a recorded run, rolled again as one window and differentiated."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rhc.cli.building import (
    PlainRun,
    hashed,
    plain_run,
    plain_settings,
)
from rhc.cli.recorded import recorded
from rhc.data_weights import DATA_WEIGHTS
from rhc.errors import InputError
from rhc.hindsight.whole_run import (
    Episode,
    OuterPass,
    from_disk,
    improved,
    steerable,
    weights_from_disk,
)
from rhc.hypergradient import Hypergradient
from rhc.loop.steps import EXPLODING_CLIP
from rhc.report.live import Screen, sparkline
from rhc.report.records import means, one_number
from rhc.schedule import CONTROLS, Schedule, control
from rhc.settings import TrainConfig
from rhc.settings.commands import HypergradientConfig
from rhc.storage.files import finite, read_json, replace_durably
from rhc.training import memory

NAME = "hypergradient.json"


def run(config: HypergradientConfig, screen: Screen) -> int:
    with _episode(config) as known:
        episode, schedule = known.episode, known.schedule
        asked = config.controls or tuple(steerable(schedule))
        _check(asked, schedule)
        steps = episode.steps
        screen.say(
            f"{config.directory}: {steps} steps, differentiated as one window by {', '.join(asked)}"
        )
        device = episode.plant.parameters[0].device
        memory.reset_peak(device)
        before = memory.current_peak(device)
        h = episode.differentiate(schedule, config.costate_clip)
        peak = max(0, memory.current_peak(device) - before)
        document = _document(config, known, h, asked, peak)
        replace_durably(config.directory / NAME, (json.dumps(document) + "\n").encode())
        _print(screen, document, config.directory / NAME)
        if not config.passes:
            return 0
        if not h.result.usable and h.result.name != "exploding":
            raise InputError(
                f"the schedule cannot be rewritten from a hypergradient that is {h.result.name}: "
                f"{h.result.message}"
            )
        better, done = improved(
            episode,
            schedule,
            passes=config.passes,
            knots=config.knots or steps,
            controls=asked,
            step=config.step,
            tell=lambda number, outer: _tell(screen, number, outer),
            first=h,
        )
        spent = episode.spent / steps
    return _trained(config, known, better, done, spent, screen)


@contextmanager
def _episode(config: HypergradientConfig) -> Iterator[_Recorded]:
    judging = config.objective_batches
    with recorded(config, steps=config.steps, judging=judging, weighed=True) as run:
        weight = config.stage_weight
        if weight is None:
            weight = 0.0 if run.judged else 1 / len(run.schedule)
        episode = Episode(
            run.workload.model,
            run.optimizer,
            from_disk(run.workload.loss_fn, run.device),
            run.batches,
            run.judged,
            weight,
            config.average or None,
            run.plain.config.accumulate,
            run.plain.config.clip_norm,
            run.plain.config.clip_value,
            run.plain.config.seed,
            config.product,
            config.memory_budget,
            config.discount,
            weights_from_disk(run.workload.data_weights),
        )
        yield _Recorded(episode, run.schedule, run.plain, run.losses)


@dataclass
class _Recorded:
    """A run that can be rolled again. losses: of its tape."""

    episode: Episode
    schedule: Schedule
    run: PlainRun
    losses: list[float]


def _check(asked: tuple[str, ...], schedule: Schedule) -> None:
    possible = steerable(schedule)
    for name in asked:
        control(name)
        if name not in possible:
            raise InputError(
                f"control {name!r} is 0 in this run, where it has no derivative of use; choose of "
                f"{', '.join(possible)}"
            )


# What is written and shown ------------------------------------------------------------------------


def _document(
    config: HypergradientConfig,
    recorded: _Recorded,
    h: Hypergradient,
    asked: tuple[str, ...],
    peak: int,
) -> dict[str, Any]:
    """hypergradient.json. grad: dJ/du in natural units; log_grad: by log u, logit for momentum."""
    episode, schedule = recorded.episode, recorded.schedule
    apart = [abs(a - b) for a, b in zip(h.losses.tolist(), recorded.losses, strict=True)]
    document: dict[str, Any] = {
        "format": "rhc.hypergradient",
        "version": 1,
        "start": 0,
        "steps": episode.steps,
        "value": h.value,
        "terminal": h.terminal,
        "objective": {
            "batches": len(episode.judged),
            "stage_weight": episode.stage_weight,
            "average": episode.average,
        },
        "grad": {name: h.grad[name].tolist() for name in asked},
        **_of_weights(episode, h),
        "raw_grad": {
            name: (h.grad[name] * CONTROLS[name].slope(schedule[name])).tolist() for name in asked
        },
        "costate_norms": h.costate_norms.tolist(),
        "losses": h.losses.tolist(),
        "furthest_from_tape": max(apart) if all(map(math.isfinite, apart)) else None,
        "result": {"name": h.result.name, "message": h.result.message, "step": h.result.step},
        "product": h.product,
        "why": h.why,
        "segment": h.segment,
        "hessian_products": h.hessian_products,
        "plain_run_equivalents": episode.spent / episode.steps,
        "memory_budget": episode.memory_budget,
        "peak_memory_bytes": peak,
        "discount": config.discount,
        "costate_clip": config.costate_clip,
        "plan": [] if h.plan is None else h.plan.lines(),
    }
    found: dict[str, Any] = finite(document)
    return found


def _of_weights(episode: Episode, h: Hypergradient) -> dict[str, Any]:
    """dJ/dlog w of every cell, and of few by step."""
    weights = episode.data_weights
    if weights is None:
        return {}
    w = weights.raw.double()
    found: dict[str, Any] = {"log_grad": (h.grad[DATA_WEIGHTS] * w).tolist()}
    if h.cells_by_step is not None:
        found["log_grad_by_step"] = (h.cells_by_step * w).tolist()
    return {DATA_WEIGHTS: found}


def _print(screen: Screen, document: dict[str, Any], path: Path) -> None:
    def line(label: str, text: str) -> None:
        screen.say(f"{label:<10}{text}")

    apart = document["furthest_from_tape"]
    if apart != 0:
        line("note", f"rolled losses differ from the tape by up to {apart}")
    result = document["result"]
    line("J", f"{document['value']}")
    line("result", f"{result['name']}: {result['message']}")
    line("costate", f"|dJ/ds|, log scale, first to last step: {_course(document['costate_norms'])}")
    for name, values in document["raw_grad"].items():
        numbers = [one_number(v) or 0.0 for v in values]
        total = sum(sum(v) if isinstance(v, list) else (v or 0.0) for v in values)
        size = max(1, len(numbers) // 10)
        tenths = [sum(numbers[i : i + size]) for i in range(0, len(numbers), size)][:10]
        shown = " ".join(f"{x:+.2g}" for x in tenths)
        line(
            name, f"dJ/d{'logit' if name == 'momentum' else 'log'} {total:+.4g}; by tenths {shown}"
        )
    if weighed := document.get(DATA_WEIGHTS):
        slopes = weighed["log_grad"]
        lowest, highest = min(slopes, key=_known), max(slopes, key=_known)
        line("weights", f"dJ/dlog w of {len(slopes)} cells, {lowest:+.2g} to {highest:+.2g}")
    line(
        "cost",
        f"{document['plain_run_equivalents']:.2f} plain runs, {document['hessian_products']} "
        f"Hessian products ({document['product']}), peak {document['peak_memory_bytes'] / 1e6:.0f} "
        "MB above what was there",
    )
    line("file", f"{path}")


def _known(slope: float | None) -> float:
    return 0.0 if slope is None else slope


def _course(norms: list[float | None]) -> str:
    known = [n or 0.0 for n in norms]
    return f"{known[0]:.2g} {sparkline(means(known, known, 40)[1])} {known[-1]:.2g}"


def _tell(screen: Screen, number: int, outer: OuterPass) -> None:
    what = "kept" if outer.accepted else "not kept"
    clipped = f"; costates exploded and were clipped to {EXPLODING_CLIP:g}" * outer.clipped
    screen.say(
        f"pass {number + 1}    J {outer.before:.6g} -> {outer.value:.6g}  {what} after "
        f"{outer.tried} tries{clipped}"
    )


# The run that it ends with ------------------------------------------------------------------------


def _trained(
    config: HypergradientConfig,
    recorded: _Recorded,
    schedule: Schedule,
    done: list[OuterPass],
    spent: float,
    screen: Screen,
) -> int:
    """Trains by the rewritten schedule, with all costs on the ledger, and returns the status."""
    was = recorded.run
    settings = {**plain_settings(was.config), "steps": len(schedule)}
    settings["data_weights"] = was.config.data_weights
    plain = plain_run(TrainConfig(**settings), was.sizes)
    document = [plain.to_record(), schedule.digest()]
    directory = config.output or hashed(f"{was.config.short_name}-horizon", document)
    record = {
        "command": "replay",
        "replay": {"schedule": str(config.directory), "passes": len(done), "spent": spent},
    }
    status = plain.follow(schedule, directory, record, screen, spent=spent)
    if status == 0:
        result = read_json(directory / "result.json")
        total = result["cost"]["plain_run_equivalents"]
        screen.say(f"in all    {total:.2f} plain runs")
    return status

"""`rhc distill`: reads runs, fits a policy, corrects it where it steers, and reports."""

from __future__ import annotations

import math
import random
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch

from rhc.cli.building import (
    PlainRun,
    built_optimizer,
    built_plant,
    config_of,
    plain_run,
    planned_knobs,
    sizes_of,
)
from rhc.errors import InputError
from rhc.hindsight.distill import DistilledScheduler, Example, form_of, lesson, target
from rhc.hindsight.features import Form
from rhc.hindsight.policy import Lesson, Policy, error, fitted
from rhc.report.live import Screen
from rhc.schedule import Schedule
from rhc.settings.commands import DistillConfig
from rhc.storage.jsonl import read_rows
from rhc.storage.run_files import read_record, read_result
from rhc.training.evaluate import evaluate


def run(config: DistillConfig, screen: Screen) -> int:
    _check_output(config.output)
    sources = [_Source.read(path, config.data, config.trust) for path in config.directories]
    examples = [source.example for source in sources]
    form = form_of(examples, config.controls, gradient_norm=config.gradient_norms)
    learned, held = _split(sources, config.held_out, config.seed)
    screen.say(
        f"{len(learned)} runs to learn from, {len(held)} held out; steering "
        f"{', '.join(form.steered)} every {config.every} steps by {len(form.names)} features"
    )
    if not held:
        screen.say(
            "note      none is held out of so few, and the policy is judged where it learned"
        )
    lessons = _lessons(learned, form, config.every)
    judged_by = _lessons(held, form, config.every)
    steerable = [source for source in learned if source.run is not None]
    judges = [s for s in held if s.run is not None] or steerable[: max(1, config.per_round // 2)]
    spent, best = 0.0, None
    rounds = config.rounds if steerable else 0
    if rounds < config.rounds:
        screen.say("note      none of the runs can be trained again here, so that no round is")
    draw = random.Random(config.seed)
    unseen = judged_by if any(bool(x.targets.any()) for x in judged_by) else lessons
    for number in range(rounds + 1):
        policy = fitted(config.kind, form, config.every, lessons, judged_by, seed=config.seed)
        driven = [drive(source, policy) for source in judges]
        spent += len(driven)
        # Without a run to train again, only the moves can be compared.
        score = statistics.fmean(d.apart for d in driven) if driven else error(policy, unseen)
        screen.say(
            f"round {number}   off by {error(policy, unseen):.3f} of the moves; "
            + (f"steering ends {100 * score:+.1f} % from the runs' own losses" if driven else "")
        )
        if best is None or score < best[0]:
            best = (score, policy, number, driven)
        if number < rounds:
            chosen = draw.sample(steerable, min(config.per_round, len(steerable)))
            for source in chosen:
                lessons += drive(source, policy).lessons
                spent += 1
    assert best is not None
    score, policy, number, driven = best
    notes: dict[str, Any] = {
        "runs": [source.example.name for source in learned],
        "held_out": [source.example.name for source in held],
        "round": number,
        "plain_runs_spent": spent,
        "ends_from_the_runs_own": score if driven else None,
        "fallbacks": sum(d.fallbacks for d in driven),
    }
    replace(policy, notes=notes).save(config.output)
    for d in driven:
        own = "held out" if held else "learned from"
        screen.say(f"{d.name}, {own}: loss {d.loss:.5g} where the run's own is {d.own:.5g}")
    if config.kind == "laws":
        _print_gains(screen, policy)
    screen.say(f"cost      {spent:.0f} plain runs; the policy itself costs one")
    screen.say(f"policy    {config.output}")
    screen.say(f'use       rhc.DistilledScheduler.load("{config.output}", optimizer, steps=T)')
    return 0


def _check_output(folder: Path) -> None:
    other = folder.exists() and not (folder / "policy.json").exists()
    if other and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output {folder} holds something that is no policy; choose another -o")


# Runs ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A run to learn from. run: None for a script's. loss: final validation or mean training."""

    example: Example
    run: PlainRun | None
    loss: float

    @classmethod
    def read(cls, path: Path, data: Path | None, trust: bool) -> _Source:
        record = read_record(path)
        result_path = path / "result.json"
        if not result_path.exists():
            raise InputError(f"run {path} has not ended; resume it first: rhc resume {path}")
        result = read_result(path)
        rows = read_rows(path / "tape.jsonl")
        schedule = Schedule.load(path / "schedule.json")
        run, start_lr = None, None
        if "run" in record:
            config = config_of(path, trust=trust, data=data).checked()
            start_lr = config.lr
            if not planned_knobs(config):  # which no schedule holds
                run = plain_run(config.without_rewriting(), sizes_of(path))
        example = Example(str(path), rows, schedule, start_lr)
        return cls(example, run, _loss_of(result.get("val_loss"), rows))


def _loss_of(validation: float | None, rows: Sequence[Any]) -> float:
    if validation is not None:
        return validation
    losses = [math.inf if row.get("loss") is None else float(row["loss"]) for row in rows]
    return statistics.fmean(losses)


def _split(
    sources: Sequence[_Source], share: float, seed: int
) -> tuple[list[_Source], list[_Source]]:
    """(training runs, held-out runs): whole runs, never steps of one."""
    count = int(share * len(sources)) or (1 if share and len(sources) >= 3 else 0)
    order = list(range(len(sources)))
    random.Random(seed).shuffle(order)
    held = set(order[:count])
    return (
        [s for i, s in enumerate(sources) if i not in held],
        [s for i, s in enumerate(sources) if i in held],
    )


def _lessons(sources: Sequence[_Source], form: Form, every: int) -> list[Lesson]:
    """Every run twice: with and without its length known."""
    return [
        lesson(source.example, form, every, known=known)
        for source in sources
        for known in (True, False)
    ]


# Steering -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Driven:
    """A run steered by a policy. own: the original's loss. lessons: its states and right moves."""

    name: str
    loss: float
    own: float
    fallbacks: int
    lessons: list[Lesson]

    @property
    def apart(self) -> float:
        """Its loss above the original run's, as a share of it."""
        if not math.isfinite(self.loss):
            return 10.0
        return (self.loss - self.own) / max(abs(self.own), 1e-12)


def drive(source: _Source, policy: Policy) -> Driven:
    run, example = source.run, source.example
    assert run is not None
    config, workload = run.config, run.workload()
    model, steps = workload.model, len(example.rows)
    optimizer = built_optimizer(config, workload)
    plant = built_plant(config, workload, optimizer)
    features: list[list[float]] = []
    targets: list[list[float]] = []
    losses: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is outside: that is what this is to find out
        scheduler = DistilledScheduler(optimizer, policy, steps=steps, seed=config.seed)
        batches = chain.from_iterable(repeat(workload.train_loader))
        for step in range(steps):
            optimizer.zero_grad()
            found = [plant.loss(b) for b in islice(batches, config.accumulate)]
            loss = torch.stack([x for x, _ in found]).mean()
            metrics = found[-1][1]
            loss.backward()
            if config.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            if config.clip_value is not None:
                torch.nn.utils.clip_grad_value_(model.parameters(), config.clip_value)
            optimizer.step()
            reward = metrics.get("reward") if policy.form.reward else None
            before = scheduler.controls
            scheduler.step(loss, reward)
            losses.append(float(loss.detach()))
            done = step + 1
            if done % policy.every == 0 and done < steps:
                features.append(scheduler.seen)
                targets.append(target(example, policy.form, done, policy.every, before))
            if not math.isfinite(losses[-1]):
                break
        scheduler.close()
    held = evaluate(plant, workload.val_loader)
    finite = len(losses) == steps and math.isfinite(losses[-1])
    validation = None if held is None else held.loss
    loss_value = _loss_of(validation, [{"loss": x} for x in losses]) if finite else math.inf
    lessons = []
    if features and bool(torch.tensor(features).isfinite().all()):
        lessons.append(Lesson(example.name, torch.tensor(features), torch.tensor(targets)))
    return Driven(example.name, loss_value, source.loss, scheduler.fallbacks, lessons)


def _print_gains(screen: Screen, policy: Policy) -> None:
    network = policy.network
    weights = network.linear.weight / network.scale
    constants = network.linear.bias - weights @ network.mean
    for number, name in enumerate(policy.form.steered):
        terms = sorted(
            zip(policy.form.names, weights[number].tolist(), strict=True), key=lambda t: -abs(t[1])
        )
        shown = "  ".join(f"{value:+.3f} {what}" for what, value in terms[:8])
        screen.say(f"law       Δ{name} = {float(constants[number]):+.3f}  {shown} …")

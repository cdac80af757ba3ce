"""Why a run did what it did, in one sentence per decision.

The live display, `rhc inspect`, the report and the loggers all take their sentences from here. To
have a question answered, write a function under `@question`; None leaves the question out.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rhc.report.records import RunRecord, decisive, entry, number, one_number
from rhc.storage.files import read_json

SWEEP = 25
"""Runs of a usual grid search that one run replaces: five lrs by five momenta."""
MOST_JUMPS = 6
"""Jumps of lr that are told, the largest."""
MOST_BESIDE = 200
"""Runs beside a run that are looked through for the same run without hindsight."""

SKIPPED = {
    "until": "only {share} of a run is looked at, unless the data change: later windows gained "
    "nothing in the tests of this rule",
    "waiting": "the last window that was looked at was not worth it, so the next ones are passed "
    "over, twice as many each time",
    "budget": "the budget of {budget:g} plain runs has no room for it",
    "replay": "the run's first window, replayed, did not end in the same bits",
    "memory": "the gradients of the schedule do not fit in memory",
    "unreliable": "the gradients of the schedule were checked against the run and were wrong",
}
"""Reason in `skipped` of result.json -> its words."""

RULES = {
    "longer": "short rolls learned nothing that tells lrs apart; of rolls of {steps} steps this "
    "one was best",
    "short": "no roll learned anything that tells lrs apart, and the given {given} was worse",
    "given": "no roll learned anything that tells lrs apart, so it stays as given",
    "budget": "the budget had no room to look for another",
}
"""Rule in `chosen_start` of result.json -> its words."""


class Answer(NamedTuple):
    """label: of the line in `rhc inspect`."""

    label: str
    question: str
    sentence: str


Answerer = Callable[[RunRecord], str | None]
_QUESTIONS: list[tuple[str, str, Answerer]] = []


def question(label: str, asked: str) -> Callable[[Answerer], Answerer]:
    """Registers what answers a question; in it {lr} and {step} are the run's own."""

    def registered(answer: Answerer) -> Answerer:
        _QUESTIONS.append((label, asked, answer))
        return answer

    return registered


def answers(run: RunRecord) -> list[Answer]:
    """What a person asks of a run, and the sentences that answer it."""
    moved = jumps(run)
    words = {
        "lr": lr_words(entry(run.told, "chosen_start", "lr") or _first_lr(run)),
        "step": str(moved[0][0]) if moved else "some step",
    }
    found = [(label, asked, answer(run)) for label, asked, answer in _QUESTIONS]
    return [
        Answer(label, asked.format(**words), sentence)
        for label, asked, sentence in found
        if sentence
    ]


# Decisions ----------------------------------------------------------------------------------------


def start(chosen: Mapping[str, Any]) -> str:
    """Why a run starts at its lr: the rule, the roll that it chose, what it divided by."""
    lr, given = lr_words(chosen["lr"]), lr_words(chosen.get("given"))
    if chosen["rule"] != "rolls":
        words = RULES.get(chosen["rule"], chosen["rule"])
        return f"lr {lr}: {words.format(steps=chosen.get('steps'), given=given)}"
    greed, best, steps = chosen["divided_by"], lr_words(chosen["best"]), chosen.get("steps")
    rolled, loss = lr_words(chosen.get("rolled")), number(chosen.get("loss"))
    measured = "" if loss is None else f" (the lowest loss, {loss:.4g}, was at {rolled})"
    then = (
        f"divided by {greed:.3g}, since a short roll likes a higher lr than a whole run does"
        if greed > 1
        else f"times {1 / greed:.3g}, since short rolls of an Adam lie within its warm-up"
    )
    instead = (
        f" in place of {given} (--start given keeps that)" if chosen.get("start") == "probe" else ""
    )
    return (
        f"lr {lr}{instead}: of {chosen['rolls']} short rolls those of {steps} steps "
        f"were best around lr {best}{measured}, {then}"
    )


def attempt(record: Mapping[str, Any]) -> str:
    """Why an attempt at a window was accepted, rejected or rewound."""
    where, outcome, reason = _steps(record), record["outcome"], record.get("reason")
    if outcome not in ("accepted", "rejected"):
        return f"{where} {outcome}: {reason}; tried again at a lower lr"
    before, after = (number(record.get(f"objective_{end}")) for end in ("before", "after"))
    if before is None or after is None:
        return f"{where} {outcome}: {reason}"
    course = "fell" if after < before else "rose"
    judged = f"J {course} from {before:.4g} to {after:.4g}"
    if reason and "did not fall" not in str(reason):
        return f"{where} {outcome}: {reason}; {judged}"
    return f"{where} {outcome}: {_change(record)} {judged}"


def skipped(why: str, first: int, stop: int, rule: Mapping[str, Any]) -> str:
    """Why windows were not looked at. rule: the update rule in config.json."""
    until = number(rule.get("until"))
    share = "a part" if until is None else f"the first {until:.0%}"
    words = SKIPPED.get(why, why).format(share=share, budget=number(rule.get("budget")) or 0.0)
    return f"steps {first}–{stop} not looked at: {words}"


def jumps(run: RunRecord) -> list[tuple[int, str]]:
    """(step, sentence) of the largest jumps of lr, in order."""
    course = [(row["step"], one_number(row.get("lr"))) for row in run.tape]
    course = [(step, lr) for step, lr in course if isinstance(lr, (int, float))]
    if len(course) < 3:
        return []
    moves = [(abs(b[1] - a[1]), a, b) for a, b in pairwise(course)]
    peak = max(lr for _, lr in course)
    least = max(0.02 * peak, 5 * statistics.median(size for size, *_ in moves))
    largest = sorted((m for m in moves if m[0] > least), reverse=True)[:MOST_JUMPS]
    windows = run.kept
    return [
        (
            b[0],
            f"at step {b[0]} lr goes from {a[1]:.3g} to {b[1]:.3g}: {_cause(run, windows, b[0])}",
        )
        for _, a, b in sorted(largest, key=lambda move: move[2][0])
    ]


def _cause(run: RunRecord, windows: Sequence[Mapping[str, Any]], step: int) -> str:
    """What moved lr at the start of `step`."""
    told = next((reason for at, _, reason in run.events if at == step and reason), None)
    begun = next((w for w in windows if w["start"] == step), None)
    rewritten = [w for w in windows if w["outcome"] == "accepted" and w["stop"] <= step]
    lowered = any(w["start"] == step and w["outcome"] == "rewound" for w in run.windows)
    restarted = next((w for w in windows if f"anew at step {step}" in str(w.get("reason"))), None)
    if restarted is not None:
        return "the data changed there, and the schedule begins anew"
    if lowered:
        return "the steps from there on diverged, so lr was lowered until they did not"
    if begun is not None and begun["outcome"] == "accepted":
        before, after = (number(begun.get(f"objective_{end}")) for end in ("before", "after"))
        if before is not None and after is not None:
            return f"{_steps(begun)} were rewritten, as J fell from {before:.4g} to {after:.4g}"
    if told:
        return told
    left, stride = number(entry(run.config, "rewrite", "carry")), number(run.config.get("stride"))
    if rewritten and left is not None and left < 1 and stride:
        newest = rewritten[-1]
        if (step - newest["stop"]) % stride == 0:
            return (
                f"at the end of each window {1 - left:.0%} of what is left of the rewrite of "
                f"{_steps(newest)} is taken back"
            )
    return "its schedule has that step"


# Questions ----------------------------------------------------------------------------------------


@question("start", "Why did it start at {lr}?")
def _start(run: RunRecord) -> str | None:
    chosen = entry(run.told, "chosen_start")
    if isinstance(chosen, Mapping) and chosen.get("rule"):
        return f"{start(chosen)}."
    lr = _first_lr(run)
    if lr is None:
        return None
    if run.starts:  # unfinished, or of an older version
        best = [r for r in run.starts if r.get("kind") == "probe" and number(r.get("loss"))]
        longest = max((number(r.get("steps")) or 0 for r in best), default=0)
        found = min(
            (r for r in best if r.get("steps") == longest), key=lambda r: r["loss"], default=None
        )
        if found is not None:
            return (
                f"lr {lr_words(lr)}: of {len(best)} short rolls the longest, of "
                f"{longest:g} steps, had the lowest loss ({found['loss']:.4g}) at lr "
                f"{lr_words(found['from'])}; an SGD starts below that, an Adam above."
            )
    where = "as the schedule that it follows has it" if run.config.get("followed") else "as given"
    return f"lr {lr_words(lr)}, {where}."


@question("jumps", "Why does lr jump at {step}?")
def _jumps(run: RunRecord) -> str | None:
    if not run.tape:
        return None
    found = [sentence for _, sentence in jumps(run)]
    if found:
        return _sentence("; ".join(found))
    template = run.config.get("template")
    shape = f", only the {template} shape that it follows" if template else ""
    return f"lr has no jumps{shape}."


@question("windows", "What was looked at, kept and left alone, and why?")
def _windows(run: RunRecord) -> str | None:
    looked = run.tally
    if not run.windows:
        return None if run.config.get("rewrite") is None else _unrewritten(run)
    told = [f"{looked.words}"]
    told += [attempt(row) for row in run.kept[:3]]
    if len(run.kept) > 3:
        told.append(f"and {len(run.kept) - 3} more windows, listed in the report")
    return _sentence("; ".join([*told, *_skips(run)]))


def _unrewritten(run: RunRecord) -> str:
    if not run.config.get("rewrite"):
        return "Nothing was rewritten: the run was asked for without (--no-rewrite)."
    return _sentence("; ".join(["no window was looked at", *_skips(run)]))


def _skips(run: RunRecord) -> list[str]:
    rule = run.config.get("rewrite")
    rule = rule if isinstance(rule, Mapping) else {}
    found = run.told.get("skipped")
    rows = [row for row in found or () if isinstance(row, list) and len(row) == 3]
    first: dict[str, list[Any]] = {}
    for row in rows:  # of each reason from its first window to its last
        known = first.setdefault(str(row[2]), [row[0], row[1]])
        known[1] = row[1]
    return [skipped(why, first_, stop, rule) for why, (first_, stop) in first.items()]


@question("worth", "Was rewriting worth it?")
def _worth(run: RunRecord) -> str | None:
    if not run.config.get("rewrite") or not run.result:
        return None
    beside = without_hindsight(run)
    cost = number(entry(run.result, "cost", "plain_run_equivalents")) or 0.0
    if beside is not None:
        name, ours, theirs, theirs_cost = beside
        share = (ours - theirs) / abs(theirs) if theirs else 0.0
        better = "lower" if ours < theirs else "higher"
        return (
            f"The same run without rewriting ({name}) ends at a test loss of {theirs:.4g}, this "
            f"one at {ours:.4g}: {abs(share):.1%} {better}, for {cost - theirs_cost:.2f} plain "
            "runs more, with the search for the start."
        )
    gains = [
        1 - float(row["objective_after"]) / float(row["objective_before"])
        for row in run.windows
        if row["outcome"] == "accepted"
        and (number(row.get("objective_before")) or 0) > 0
        and number(row.get("objective_after")) is not None
    ]
    paid = _spent(run)["windows"]
    if gains:
        first = (
            f"In the windows that were rewritten J fell by {max(gains):.1%} at most, for "
            f"{paid:.2f} plain runs"
        )
    else:
        first = f"No rewrite lowered J, and looking cost {paid:.2f} plain runs"
    return f"{first}; what the end would be without is known by one more run: {_command(run)}."


@question("passes", "Did it pay to go over the whole run?")
def _passes(run: RunRecord) -> str | None:
    if not run.passes:
        return None
    kept = [row for row in run.passes if row.get("kept") is True]
    cost = _spent(run)["passes"]
    tried = f"{len(run.passes)} replays of the whole run" if len(run.passes) > 1 else "One replay"
    if not kept:
        return f"{tried} did not lower the loss on held-out rows, for {cost:.2f} plain runs."
    before = number(kept[0].get("held_out_before")) or 0.0
    after = number(kept[-1].get("held_out_after")) or 0.0
    return (
        f"{tried}, of which {len(kept)} kept: the loss on held-out rows fell from {before:.4g} to "
        f"{after:.4g}, for {cost:.2f} plain runs."
    )


@question("examples", "Which examples hurt?")
def _examples(run: RunRecord) -> str | None:
    found = entry(run.result, "data_weights")
    if not isinstance(found, Mapping):
        if run.config.get("weighed") or not run.config.get("rewrite"):
            return None
        return (
            "All examples counted alike: rhc.DataWeights, or --data-weights where the run has "
            "them, gives each a weight that held-out data ask for."
        )
    lowest = lowest_weights(run.directory)
    listed = ", ".join(f"{cell} ({weight:.2g})" for cell, weight in lowest)
    most = f"; the lowest weights have the cells {listed}" if listed else ""
    return (
        f"{found.get('observed')} of {found.get('cells')} weights were moved by what held-out "
        f"data lose or gain by each{most}; rhc weights {shlex.quote(str(run.directory))} lists all."
    )


@question("sweep", "What would a sweep have cost?")
def _sweep(run: RunRecord) -> str | None:
    cost = number(entry(run.result, "cost", "plain_run_equivalents"))
    if cost is None:
        return None
    return (
        f"A grid of five learning rates by five momenta is {SWEEP} plain runs; this run cost "
        f"{cost:.2f}."
    )


@question("spent", "Where did the cost go?")
def _cost(run: RunRecord) -> str | None:
    if number(entry(run.result, "cost", "plain_run_equivalents")) is None:
        return None
    parts = {"search": "the search for the start", "training": "the training itself",
             "windows": "looking at windows and replaying them",
             "passes": "passes over the whole run"}  # fmt: skip
    spent = _spent(run)
    known = [name for name in parts if name != "passes" or run.passes]
    told = ", ".join(f"{spent[name]:.2f} for {parts[name]}" for name in known)
    return f"In plain runs: {told}."


@question("replay", "Can its steps be trusted to repeat?")
def _replay(run: RunRecord) -> str | None:
    replay = run.told.get("replay")
    return f"{replayed(replay)}." if isinstance(replay, Mapping) else None


def replayed(replay: Mapping[str, Any]) -> str:
    """How the first window replayed, as in result.json or values.json."""
    if replay.get("equal"):
        return f"steps [{replay['start']}, {replay['stop']}) to the bit, when they were taken again"
    step, what = replay.get("first_step", 0), replay.get("what", "the loss")
    blamed = f", by {', '.join(replay['operators'])}" if replay.get("operators") else ""
    return f"not to the bit: {what} of step {step} differs{blamed}"


@question("over-fit", "Did it learn the training data by heart?")
def _over_fit(run: RunRecord) -> str | None:
    train, val = (number(run.result.get(f"{name}_loss")) for name in ("train", "val"))
    if train is None or val is None:
        return None
    steps, losses = run.series("val_loss")
    told = f"At the end the loss is {train:.4g} on training and {val:.4g} on validation data"
    if len(losses) < 2:
        return f"{told}; --validate-every N records when they part."
    low = min(range(len(losses)), key=losses.__getitem__)
    return f"{told}; the lowest validation loss, {losses[low]:.4g}, was at step {steps[low]:g}."


@question("averaged", "Are the averaged weights better?")
def _averaged(run: RunRecord) -> str | None:
    name = "test" if number(run.result.get("test_loss")) is not None else "val"
    last, averaged = (number(run.result.get(f"{p}{name}_loss")) for p in ("", "average_"))
    if last is None or averaged is None:
        return None
    which = "the averaged" if averaged < last else "the last"
    return (
        f"The {name} loss is {averaged:.4g} with the weights averaged over the last steps and "
        f"{last:.4g} with the last ones: {which} are better here."
    )


@question("again", "How do I use its schedule again?")
def _again(run: RunRecord) -> str | None:
    if not (run.directory / "schedule.json").exists():
        return None
    return (
        f"rhc replay {shlex.quote(str(run.directory))} --seed 1 follows it on another seed for one "
        "plain run; Schedule.load(…).to_lr_scheduler(optimizer) does in any loop."
    )


# The headline -------------------------------------------------------------------------------------


def headline(run: RunRecord) -> str:
    """The run in one sentence: what it started from, where it ended, for how much."""
    lr = lr_words(entry(run.told, "chosen_start", "lr") or _first_lr(run))
    began = {
        "zero": f"Started from nothing, found the learning rate {lr} by itself",
        "probe": f"Started from a guess of {lr_words(_given(run))}, found the learning rate {lr}",
    }.get(str(run.config.get("start", "given")), f"Started from the learning rate {lr}")
    if not run.result:
        newest = number(run.tape[-1].get("loss")) if run.tape else None
        now = "" if newest is None else f", where the training loss is {newest:.4g}"
        return f"{began}; is at step {len(run.tape)} of {run.steps}{now}."
    name, loss = next(
        (
            (name, value)
            for name in ("test", "val", "train")
            if (value := number(run.result.get(f"{name}_loss"))) is not None
        ),
        ("", None),
    )
    kind = {"val": "validation", "train": "training"}.get(name, name)
    ended = "ended" if loss is None else f"ended at {loss:.4g} {kind} loss"
    accuracy = number(run.result.get("test_accuracy"))
    right = "" if accuracy is None else f" ({accuracy:.1%} right)"
    cost = number(entry(run.result, "cost", "plain_run_equivalents"))
    price = "" if cost is None else f" for {cost:.2f} plain runs"
    return f"{began}, and {ended}{right}{price}{_kept(run)}."


def _kept(run: RunRecord) -> str:
    if not run.windows:
        return ""
    tally = run.tally
    return f"; hindsight rewrote {tally.accepted} of the {tally.looked} windows that it looked at"


# The same run without hindsight -------------------------------------------------------------------

_ALIKE = ("run", "steps", "seed", "optimizer", "template", "data", "momentum", "weight_decay")


def without_hindsight(run: RunRecord) -> tuple[str, float, float, float] | None:
    """(name, this run's test loss, that of the run beside it that differs by rewriting alone, its
    cost), where somebody has trained one."""
    ours, lr = number(run.result.get("test_loss")), _chosen_lr(run)
    if ours is None or lr is None:
        return None
    beside = sorted(run.directory.resolve().parent.glob("*/result.json"))[:MOST_BESIDE]
    for path in beside:
        try:
            config = read_json(path.parent / "config.json")
            if config.get("rewrite") or any(
                config.get(name) != run.config.get(name) for name in _ALIKE
            ):
                continue
            first = number(entry(config, "initial", "lr"))
            result = read_json(path)
        except (OSError, ValueError):
            continue
        theirs = number(result.get("test_loss"))
        cost = number(entry(result, "cost", "plain_run_equivalents"))
        if first is None or theirs is None or not math.isclose(first, lr, rel_tol=1e-3):
            continue
        return path.parent.name, ours, theirs, cost or 1.0
    return None


def _command(run: RunRecord) -> str:
    """What trains the same run without hindsight."""
    lr, name = _chosen_lr(run), run.config.get("run")
    template = run.config.get("template", "constant")
    if name is None or lr is None:
        return f"Runner(rewrite=False, template={template!r}) from this start"
    words = {"lr": f"{lr:.6g}", "template": template, "steps": run.steps,
             "seed": run.config.get("seed", 0)}  # fmt: skip
    flags = " ".join(f"--{flag} {value}" for flag, value in words.items())
    return f"rhc train {shlex.quote(str(name))} --no-rewrite --start given {flags}"


def _chosen_lr(run: RunRecord) -> float | None:
    """The one lr that the run starts from; None where groups have their own."""
    lr = entry(run.told, "chosen_start", "lr")
    lr = _given(run) if lr is None else lr
    lrs = lr if isinstance(lr, list) else [lr]
    return number(lrs[0]) if len(set(map(str, lrs))) == 1 else None


# Words --------------------------------------------------------------------------------------------


def lr_words(lr: Any) -> str:
    """`0.149`, or one per parameter group."""
    found = [number(each) for each in (lr if isinstance(lr, (list, tuple)) else [lr])]
    words = ["?" if each is None else f"{each:.3g}" for each in found[:8]]
    words = words[:1] if len(set(words)) == 1 else words
    return f"{', '.join(words)}{', …' if len(found) > 8 else ''}"


def lowest_weights(directory: Path, count: int = 5) -> list[tuple[int, float]]:
    """(cell, weight) of the cells that held-out data like least; [] where none can be read."""
    try:
        from safetensors.numpy import load_file

        found = load_file(directory / "weights.safetensors")
        values = found["weights"]
    except Exception:  # missing, damaged, of another version
        return []
    order = values.argsort()[:count].tolist()
    return [(int(i), float(values[i])) for i in order]


def _change(record: Mapping[str, Any]) -> str:
    before, after = record.get("before"), record.get("after")
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return "as rewritten"
    moved = []
    for name, new in after.items():
        old, now = number(before.get(name)), number(new)
        if old is not None and now is not None and not math.isclose(old, now, rel_tol=1e-9):
            moved.append(f"{name} {now:.3g} instead of {old:.3g}")
    return f"with {', '.join(moved) or 'other data weights'}"


def _steps(record: Mapping[str, Any]) -> str:
    return f"steps {record['start']}–{record['stop']}"


def _spent(run: RunRecord) -> dict[str, float]:
    """Plain runs by what they were spent on."""
    cost = number(entry(run.result, "cost", "plain_run_equivalents")) or 0.0
    tried = sum(number(row.get("gradients")) or 0.0 for row in run.starts)
    search = min(tried / run.steps if run.steps else 0.0, cost)
    passes = sum(number(row.get("plain_run_equivalents")) or 0.0 for row in run.passes)
    windows = max(0.0, cost - search - passes - 1.0)
    return {"search": search, "training": 1.0, "windows": windows, "passes": passes}


def _given(run: RunRecord) -> Any:
    given = entry(run.told, "chosen_start", "given")
    return entry(run.config, "initial", "lr") if given is None else given


def _first_lr(run: RunRecord) -> Any:
    """The lr of step 0: planned, before any window was rewritten, or as on the tape."""
    first = decisive([run.windows[0]]) if run.windows and run.windows[0]["start"] == 0 else None
    planned = None if first is None else entry(first, "before", "lr")
    return planned if planned is not None else (run.tape[0].get("lr") if run.tape else None)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."

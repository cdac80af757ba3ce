"""The settings of a run by owner, from the Runner's keywords or from flags."""

# ruff: noqa: RUF009  (the default of a setting is a field)
from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from rhc.errors import InputError, whole_number
from rhc.settings.fields import (
    SEEDS,
    Settings,
    above_0,
    at_least,
    fraction,
    one_of,
    setting,
    share,
)
from rhc.storage.run_files import WEIGHTS
from rhc.workload import OPTIMIZERS, TEMPLATES

MOST_STEPS = 50_000_000
"""Limit of a run, whose plan takes 8 bytes per control and step."""

Start = Literal["zero", "probe", "given"]
PRODUCTS = ("auto", "exact", "forward-difference", "central-difference", "none")
"""Repeats those of a module that imports torch; a test compares them."""


def parsed_names(given: Any) -> tuple[str, ...]:
    """Each name once, in order; `lr,momentum` is two."""
    parts = (given,) if isinstance(given, str) else given
    return tuple(dict.fromkeys(name for part in parts for name in part.split(",") if name))


def parsed_options(given: Any) -> tuple[str, ...]:
    """The last value of each name, by name."""
    found = {}
    for part in (given,) if isinstance(given, str) else given:
        name, equals, value = part.partition("=")
        if not (equals and name.isidentifier()):
            raise InputError(f"options must be NAME=VALUE, got {part!r}; try --options noise=0.2")
        found[name] = value
    return tuple(f"{name}={value}" for name, value in sorted(found.items()))


def parsed_weights(given: Any) -> bool | str:
    """Whether data are weighted, or the file of the weights that they begin with."""
    if isinstance(given, bool):
        return given
    path = Path(given)
    file = path / WEIGHTS if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        raise InputError(
            f"data_weights must be a run's directory with {WEIGHTS}, or such a file, got "
            f"{str(given)!r}; give --data-weights alone to learn them anew, and RUN before it"
        )
    return str(file.resolve())


def parsed_segment(given: Any) -> int | Literal["auto"]:
    """A segment as a number, if it is one; `Window` checks its length."""
    if given == "auto":
        return "auto"
    if isinstance(given, str):
        number = int(given) if given.isdecimal() else 0
    else:
        number = whole_number("segment", given)
    if number < 1:
        raise InputError(f"segment must be auto or ≥ 1, got {given!r}; try --segment auto")
    return number


def existing(given: Any) -> Path:
    if not given.exists():
        raise InputError(f"data {given} does not exist; give --data an existing folder")
    return Path(given)


_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}
_UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}


def parsed_bytes(given: Any) -> int:
    """A size in bytes: `1000000`, `500MB` (10⁶ each), `1.5 GiB` (2³⁰); InputError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", f"{given}".strip().lower())
    unit = None if match is None else _UNITS.get(match[2])
    number = 0.0 if match is None or unit is None else float(match[1]) * unit
    size = int(number) if number < 2**63 else 0
    if size < 1:
        raise InputError(
            f"memory_budget must be a number of bytes, such as 500MB or 2GiB, got {given!r}; try "
            "--memory-budget 2GiB"
        )
    return size


@dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """What is trained, and on what."""

    heading = "what is trained"

    run: str = setting("digits", "[RUN]", place="argument")
    """A name of `rhc runs`, or file.py:function. file.py alone is file.py:file."""
    data: Path | None = setting(None, "DIR", parse=existing, on_resume="its data must be the same")
    """Folder of the run's data, for runs that need one."""
    steps: int | None = setting(
        None, "T", at_least(1, 1000), unset="the run's own", most=MOST_STEPS
    )
    """Optimizer steps in all."""
    seed: int = setting(0, "S", SEEDS)
    """Seed of weights, batches, dropout and noise."""
    options: tuple[str, ...] | None = setting(
        None, "NAME=VALUE …", place="rare", parse=parsed_options, recorded="if given"
    )
    """Keywords of RUN's function. Each has a flag of its own too: --noise 0.2 is noise=0.2."""
    device: str = setting(
        "auto", "NAME", one_of("auto", "cpu", "cuda"), recorded="by the runner", on_resume=""
    )
    """cpu, cuda, or auto: cuda where there is one."""
    threads: int | None = setting(
        None,
        "N",
        at_least(1, 1),
        unset="the run's own",
        place="rare",
        most=max(256, 4 * (os.cpu_count() or 1)),
        on_resume="its bits may differ",
    )
    """CPU threads of torch; small tensors are slower on several."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """The optimizer, and what it begins with."""

    heading = "the optimizer"

    optimizer: str | None = setting(
        None, "NAME", one_of(*OPTIMIZERS, mend="only these have dynamics"), unset="the run's own"
    )
    """sgd, adam or adamw. Also nadam, radam, adamax, rmsprop, adagrad of torch.optim."""
    lr: float | None = setting(None, "A", unset="found by a search")
    """Initial learning rate. A first guess for the search, or with --start given the value itself,
    by default the run's own."""
    momentum: float = setting(0.9, "MU")
    """Initial momentum of sgd, or β1 of the Adams. Also of rmsprop; adagrad has none."""
    weight_decay: float | None = setting(None, "W", unset="0; 0.01 for adamw")
    """Weight decay. Its initial value where it is among --controls."""
    nesterov: bool = setting(False, place="rare")
    """Nesterov's momentum, for sgd."""

    def checked(self) -> Self:
        if self.nesterov and (self.optimizer not in (None, "sgd") or self.momentum == 0):
            raise InputError(
                f"nesterov needs sgd with momentum, got optimizer {self.optimizer or 'sgd'} with "
                f"momentum {self.momentum:g}; leave --nesterov out"
            )
        return super().checked()


@dataclass(frozen=True, kw_only=True)
class Step(Settings):
    """One step: the gradient that it goes by."""

    heading = "the optimizer"

    clip_norm: float | None = setting(
        None, "C", above_0("not to clip"), unset="no clipping", place="rare"
    )
    """Clip the norm of the gradient to C. Over all parameters together."""
    clip_value: float | None = setting(
        None, "C", above_0("not to clip"), unset="no clipping", place="rare", recorded="if given"
    )
    """Clip every element of the gradient to [−C, C]."""
    accumulate: int = setting(
        1,
        "N",
        at_least(1, 1, mend="use 1 not to accumulate, as by"),
        place="rare",
        most=10**5,
        recorded="if given",
    )
    """Batches per optimizer step. The step uses the gradient of their mean loss."""
    deterministic: bool = setting(False, place="rare", recorded="if given")
    """Use deterministic operators only; an error where an operator has no such version."""

    def checked(self) -> Self:
        checked = super().checked()
        if self.clip_norm is not None and self.clip_value is not None:
            raise InputError(
                f"clip_norm and clip_value cannot go together, got {self.clip_norm:g} and "
                f"{self.clip_value:g}; give one of them: leave --clip-norm or --clip-value out"
            )
        return checked


@dataclass(frozen=True, kw_only=True)
class Shape(Settings):
    """The schedule before anything is rewritten: how lr is found, and its shape over the run."""

    heading = "its schedule"

    start: str | None = setting(None, "NAME", one_of(*get_args(Start)), unset="by --lr")
    """zero, probe or given: how lr is found. zero needs no --lr, and finds one per parameter group
    from a hypergradient and short rolls; probe takes --lr as a first guess; given keeps --lr. The
    default is zero, with --lr it is probe, with --no-rewrite given."""
    template: str | None = setting(
        None, "NAME", one_of(*TEMPLATES), unset="by --start", recorded="if given"
    )
    """constant, cosine, linear, wsd or 1cycle. The shape of lr over the run, before rewriting. By
    default cosine, or linear for the Adams; wsd with --start given; constant with --no-rewrite."""
    warmup: float | None = setting(
        None,
        "F",
        fraction(0.1),
        unset="0.1 for a start of adam, adamw; else 0",
        place="rare",
        recorded="if given",
    )
    """Fraction of the run over which lr rises linearly to the template."""


@dataclass(frozen=True, kw_only=True)
class Planning(Settings):
    """What is planned anew at the end of every epoch."""

    heading = "its schedule"

    planner: tuple[str, ...] | None = setting(
        None, "[NAME …]", unset="none", parse=parsed_names, recorded="by the runner"
    )
    """Plan every epoch's lr, momentum, noise. From the last one; or what is named, also of
    sampling, augmentation, entropy, clip_range and gae_lambda where the run has them; beta1 is
    the momentum of the Adams."""


@dataclass(frozen=True, kw_only=True)
class Window(Settings):
    """What is rolled, differentiated and rewritten at once."""

    heading = "hindsight"

    window: int = setting(50, "K", at_least(1, 50), most=MOST_STEPS)
    """Steps rolled, differentiated and rewritten at once."""
    stride: int | None = setting(None, "M", unset="the window", place="rare")
    """Steps committed before the window slides. At most the window; fewer is model-predictive
    control, at window / stride times the cost."""
    passes: int = setting(0, "N", at_least(0, 1), rewriting=True, recorded="if given")
    """Rewrites of the whole run, after it was rolled. Each goes back through all of its steps,
    moves the schedule by knots and replays the run, which is kept where held-out rows say so: 4
    more baseline runs with exact products, beyond --budget."""
    controls: tuple[str, ...] | None = setting(
        None, "NAME …", unset="lr", parse=parsed_names, rewriting=True, recorded="by the runner"
    )
    """Controls to rewrite. Some of lr, momentum, noise, weight_decay."""
    per_group: tuple[str, ...] | None = setting(
        None, "NAME …", place="rare", parse=parsed_names, rewriting=True, recorded="if given"
    )
    """Controls with a value per parameter group. Some of --controls; others keep groups' ratios."""
    data_weights: bool | str = setting(
        False, "[DIR]", parse=parsed_weights, recorded="if given", on_resume=""
    )
    """Learn a weight for every row of the data. Or class, source, loss term, as RUN has it; of DIR:
    begin with the weights of another run, or with their course."""
    inexact_replay: bool = setting(
        False,
        place="rare",
        rewriting=True,
        recorded="if given",
        on_resume="windows to come are rewritten or not by what it is now",
    )
    """Rewrite windows although the first one does not replay to the bit."""

    def checked(self) -> Self:
        checked = super().checked()
        if checked.stride is not None and not 1 <= checked.stride <= checked.window:
            raise InputError(
                f"stride must be in [1, {self.window}] for window={self.window}, got "
                f"{self.stride}; lower --stride or raise --window"
            )
        if checked.controls == ():
            raise InputError(
                "controls is empty; name some of lr, momentum, noise, weight_decay, or rewrite "
                "none with --no-rewrite"
            )
        if checked.per_group == ():
            raise InputError("per_group is empty; name some controls, or leave --per-group out")
        return checked


@dataclass(frozen=True, kw_only=True)
class Law(Settings):
    """What of the update rule and the objective has a flag; None leaves it to the usual ones."""

    heading = "hindsight"

    rewrite: bool = setting(True, recorded="by the runner")
    """Train as the plain loop does, bit for bit."""
    budget: float | None = setting(
        None, "X", at_least(1, 5, "plain run"), unset="5; none for a given start", rewriting=True
    )
    """Largest cost, in plain runs. Beyond it windows follow the schedule as it is."""
    until: float | None = setting(
        None, "F", share(0.5), unset="0.1; 1 for a given start", place="rare", rewriting=True
    )
    """Fraction of the run in which windows are rewritten. Later ones follow the schedule."""
    cooldown: float | None = setting(
        None, "F", fraction(0.2), unset="0.2", place="rare", rewriting=True
    )
    """Fraction of the run, at its end, over which lr falls linearly to 0; 0 for none."""
    average: float | None = setting(
        None, "D", fraction(0.99, "a decay"), unset="0.99", place="rare", rewriting=True
    )
    """Decay of the average of iterates at which a window is judged; 0 for the last iterate."""
    objective_batches: int | None = setting(
        None, "N", at_least(1, 4), unset="4", place="rare", most=10**5, rewriting=True
    )
    """Validation batches in the objective of a window."""
    bounded: bool = setting(False, place="rare", rewriting=True, recorded="if given")
    """Judge data weights by 1 - e^-loss of held-out rows. For held-out rows whose labels may be as
    wrong as those of the training rows; of a cross-entropy it is 1 - p(label)."""


@dataclass(frozen=True, kw_only=True)
class Engine(Settings):
    """How a window is differentiated."""

    heading = "hindsight"

    product: str = setting("auto", "NAME", one_of(*PRODUCTS), rewriting=True)
    """Hessian products: exact, none and others. forward-difference (half the cost) and
    central-difference approximate; none sets the Hessian to 0. auto is exact, or an approximation
    that agrees with it; none where data are weighed and lr is searched for."""
    segment: int | str = setting(
        "auto", "N", place="rare", parse=parsed_segment, rewriting=True, recorded="by the runner"
    )
    """Last steps whose graphs the roll keeps: 1 (least memory) to the window (fastest)."""
    memory_budget: int | None = setting(
        None,
        "SIZE",
        place="rare",
        parse=parsed_bytes,
        rewriting=True,
        recorded="if given",
        on_resume="what the reverse pass keeps changes, and its bits may differ",
    )
    """Memory that a reverse pass may take beyond plain training: bytes, 500MB, 2GiB."""
    discount: float = setting(1.0, "G", share(), place="rare", rewriting=True, recorded="if given")
    """Factor on the costate per step backwards in time; below 1 the far future counts less."""
    costate_clip: float | None = setting(
        None, "C", above_0("for none"), place="rare", rewriting=True, recorded="if given"
    )
    """Largest norm of the costate, as a multiple of its norm at the window's end."""
    engine: str = setting(
        "adjoint",
        "",
        one_of("adjoint", mend="'higher' is for rhc.hypergradient alone"),
        place="none",
    )
    """How the run is differentiated."""
    spill: bool | str | Path = True
    """Whether states may go to disk for the budget; or the folder that they go to."""


@dataclass(frozen=True, kw_only=True)
class Storage(Settings):
    """Where a run is kept, and what is kept of it."""

    heading = "files"

    directory: Path | None = setting(None, "DIR", unset="runs/RUN-HASH", on_resume="")
    """Directory of the run. By default one per configuration."""
    resume: str = setting("auto", "auto|never", one_of("auto", "never"), place="rare", on_resume="")
    """auto continues a run in the directory, never refuses one."""
    validate_every: int | None = setting(
        None,
        "N",
        at_least(1, 100),
        unset="20 times a run, or fewer",
        place="rare",
        recorded="if given",
    )
    """Steps between validation losses on the tape. Evaluated after the window of the step, as
    val_loss; a batch costs a third of a gradient. By default all of them cost 1 % of the run at
    most, and with --no-rewrite there are none before the end."""
    keep_best: bool = setting(
        False,
        place="rare",
        recorded="if given",
        on_resume="the state that it ends with is chosen by what it is now",
    )
    """End with the best validated state in place of the last. result.json has both's losses."""
    keep_checkpoints: int = setting(3, "N", at_least(1, 3), place="rare", recorded="never")
    """Number of newest checkpoints to keep."""

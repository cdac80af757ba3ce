"""Flags of the commands that use a run after it has ended: replay, smooth, hypergradient, distill.

As in `rhc.settings`, each field's sentence is the help of its flag, checks are cheap, and nothing
imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro.conf
from tyro.conf import arg

from rhc.errors import InputError
from rhc.settings import (
    DEVICES,
    OPTIMIZERS,
    PRODUCTS,
    RESUMES,
    TEMPLATES,
    check_most,
    checked_choice,
    parsed_bytes,
)

RESCALES = ("none", "linear", "sqrt", "width")


def _unset(meaning: str, metavar: str) -> Any:
    return arg(metavar=metavar, help_behavior_hint=f"(default: {meaning})")


def _check_least(settings: Any, *names: str) -> None:
    """Raises InputError where a whole number that must be ≥ 1 is not."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise InputError(
                f"{name} must be ≥ 1, got {value}; leave --{name.replace('_', '-')} out for the "
                "usual one"
            )
        check_most(name, value)


def check_seed(seed: int) -> None:
    """Raises InputError unless torch and numpy can be seeded with it."""
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must be in [0, 2**32), got {seed}; try --seed 0")


def check_data(data: Path | None) -> None:
    """Raises InputError where a folder that was named does not exist."""
    if data is not None and not data.exists():
        raise InputError(f"data {data} does not exist; give --data an existing folder")


@dataclass(frozen=True)
class ReplayConfig:
    """What `rhc replay` does."""

    schedule: Annotated[tyro.conf.Positional[Path], arg(metavar="DIR|FILE")]
    """The directory of a run, or its schedule.json."""
    run: Annotated[
        tyro.conf.Positional[str | None],
        arg(metavar="[RUN]", help_behavior_hint="(default: as before)"),
    ] = None
    """A name of `rhc runs`, or file.py:function."""

    seed: Annotated[int, arg(metavar="S")] = 0
    """Seed of weights, batches, dropout and noise."""
    steps: Annotated[int | None, _unset("the schedule's", "T")] = None
    """Optimizer steps in all. Fewer than the schedule has are its first ones."""
    stretch: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """The whole schedule over --steps. Longer or shorter, in place of its first steps."""
    batch_size: Annotated[int | None, _unset("the run's own", "B")] = None
    """Examples per batch. For runs that can have other ones."""
    width: Annotated[int | None, _unset("1", "N")] = None
    """Hidden layers N times as wide. For runs that can have other ones."""
    rescale: Annotated[str, arg(metavar="NAME")] = "none"
    """none, linear, sqrt or width: what lr is scaled by. linear: × (batch size / what it was),
    sqrt: × the root of that, width: / how many times as wide the model is; none leaves it."""
    optimizer: Annotated[str | None, _unset("as before", "NAME")] = None
    """sgd, adam or adamw. Also nadam, radam, adamax, rmsprop, adagrad of torch.optim."""

    data: Annotated[Path | None, _unset("as before", "DIR")] = None
    """Folder of the run's data. For runs that need one."""
    device: Annotated[str, arg(metavar="NAME")] = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    threads: Annotated[int | None, _unset("the run's own", "N")] = None
    """CPU threads of torch; small tensors are slower on several."""
    directory: Annotated[Path | None, _unset("runs/RUN-replay-HASH", "DIR")] = None
    """Where the run is kept. By default one directory per schedule and settings."""
    resume: Annotated[str, arg(metavar="auto|never")] = "auto"
    """auto continues the run that is there, never refuses it."""
    keep_checkpoints: Annotated[int, arg(metavar="N")] = 3
    """Newest checkpoints that are kept."""
    trust: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the file that DIR names. Wherever it lies: it may be somebody else's."""

    def checked(self) -> ReplayConfig:
        """These settings if they make sense by themselves; an InputError otherwise."""
        checked_choice("rescale", self.rescale, RESCALES)
        checked_choice("resume", self.resume, RESUMES)
        checked_choice("device", self.device, DEVICES)
        if self.optimizer is not None:
            checked_choice("optimizer", self.optimizer, OPTIMIZERS)
        _check_least(self, "steps", "batch_size", "width", "threads", "keep_checkpoints")
        check_seed(self.seed)
        check_data(self.data)
        if self.stretch and self.steps is None:
            raise InputError("stretch needs a length; give --steps T too")
        if self.rescale in ("linear", "sqrt") and self.batch_size is None:
            raise InputError(
                f"rescale {self.rescale} is by batch size, which is as it was; give --batch-size B "
                "or leave --rescale out"
            )
        if self.rescale == "width" and self.width is None:
            raise InputError(
                "rescale width is by the model's width, which is as it was; give --width N or "
                "leave --rescale out"
            )
        return self


@dataclass(frozen=True)
class PlainSettings:
    """What the commands that train by plain runs have in common."""

    run: Annotated[tyro.conf.Positional[str], arg(metavar="[RUN]")] = "digits"
    """A name of `rhc runs`, or file.py:function."""

    steps: Annotated[int | None, _unset("the run's own", "T")] = None
    """Optimizer steps of every run."""
    optimizer: Annotated[str | None, _unset("the run's own", "NAME")] = None
    """sgd, adam or adamw. Also nadam, radam, adamax, rmsprop, adagrad of torch.optim."""
    lr: Annotated[float | None, _unset("the run's own", "A")] = None
    """Learning rate of the first run."""
    momentum: Annotated[float, arg(metavar="MU")] = 0.9
    """Momentum of sgd, β1 of the Adams. Of the first run; also of rmsprop."""
    weight_decay: Annotated[float | None, _unset("0; 0.01 for adamw", "W")] = None
    """Weight decay."""
    clip_norm: Annotated[float | None, _unset("no clipping", "C")] = None
    """Norm that gradients are clipped to. Of all parameters together."""
    seed: Annotated[int, arg(metavar="S")] = 0
    """Seed of weights, batches, dropout and noise. The same for all runs."""
    data: Annotated[Path | None, _unset("none", "DIR")] = None
    """Folder of the run's data, for runs that need one."""
    device: Annotated[str, arg(metavar="NAME")] = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    threads: Annotated[int | None, _unset("the run's own", "N")] = None
    """CPU threads of torch; small tensors are slower on several."""

    def check_plain(self) -> None:
        """Raises InputError where one of these makes no sense."""
        if self.optimizer is not None:
            checked_choice("optimizer", self.optimizer, OPTIMIZERS)
        checked_choice("device", self.device, DEVICES)
        _check_least(self, "steps", "threads")
        check_seed(self.seed)
        check_data(self.data)


@dataclass(frozen=True)
class SmoothConfig(PlainSettings):
    """What `rhc smooth` does."""

    passes: Annotated[int, arg(metavar="N")] = 1
    """Schedules that are written and tried. N passes take N + 1 plain runs."""
    template: Annotated[str, arg(metavar="NAME")] = "constant"
    """constant, cosine, linear, wsd or 1cycle. Of lr in the first run."""
    source: Annotated[str, arg(metavar="both|loss|reward")] = "both"
    """Trends that count. Both, the loss alone, or the reward alone, a metric called reward."""
    every: Annotated[int, arg(metavar="N")] = 20
    """Steps from one move of the controls to the next."""
    gain: Annotated[float, arg(metavar="G")] = 1.0
    """Factor on how far the laws go at each."""
    baseline: Annotated[bool, arg(help_behavior_hint="(default: baseline)")] = True
    """--no-baseline takes trends as they are. Not from their mean over the run."""
    directory: Annotated[Path | None, _unset("runs/RUN-smooth-HASH", "DIR")] = None
    """Where all is kept. Every run has a directory of its own in it."""

    def checked(self) -> SmoothConfig:
        """These settings if they make sense by themselves; an InputError otherwise."""
        self.check_plain()
        checked_choice("template", self.template, TEMPLATES)
        checked_choice("source", self.source, ("both", "loss", "reward"))
        _check_least(self, "passes", "every")
        if not 0 < self.gain < float("inf"):
            raise InputError(f"gain must be > 0, got {self.gain:g}; try --gain 1")
        return self


@dataclass(frozen=True)
class HypergradientConfig:
    """What `rhc hypergradient` does."""

    directory: Annotated[tyro.conf.Positional[Path], arg(metavar="DIR")]
    """The directory of a run."""

    controls: Annotated[tuple[str, ...] | None, _unset("all that are not 0", "NAME …")] = None
    """What J is differentiated by. Some of lr, momentum, noise, weight_decay."""
    steps: Annotated[int | None, _unset("all of them", "T")] = None
    """Only the first T steps of the run. With J at their end."""
    product: Annotated[str, arg(metavar="NAME")] = "exact"
    """Hessian products, as of rhc train."""
    average: Annotated[float, arg(metavar="D")] = 0.0
    """J is taken at the average of the iterates. This is its decay; 0 for the last one."""
    stage_weight: Annotated[float | None, _unset("0; 1/T without validation data", "W")] = None
    """Weight of the sum of the training losses in J."""
    objective_batches: Annotated[int, arg(metavar="N")] = 16
    """Validation batches in J, at most."""
    memory_budget: Annotated[str | None, _unset("none", "SIZE")] = None
    """Memory that looking back may take. Beyond plain training: bytes, 500MB, 2GiB."""
    discount: Annotated[float, arg(metavar="G")] = 1.0
    """Factor on the costate at every step backwards; below 1 the far future counts less."""
    costate_clip: Annotated[float | None, _unset("none", "C")] = None
    """Largest norm of the costate, as a multiple of its norm at the end."""

    passes: Annotated[int, arg(metavar="N")] = 0
    """Rewrites of the whole schedule. Each is kept where J falls on the same data; a run by what
    comes out is trained in the end."""
    knots: Annotated[int, arg(metavar="M")] = 8
    """Knots that --passes move. With log-linear values between them; 0 for one per step."""
    step: Annotated[float, arg(metavar="X")] = 0.3
    """Largest move of a knot per rewrite. In nats (momentum: logits)."""
    output: Annotated[Path | None, _unset("runs/RUN-horizon-HASH", "DIR")] = None
    """Where their last run is kept."""

    data: Annotated[Path | None, _unset("as before", "DIR")] = None
    """Where the same data are now. If they were moved."""
    device: Annotated[str | None, _unset("as before", "NAME")] = None
    """Where to compute: cpu, cuda or auto."""
    trust: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the file that DIR names. Wherever it lies: it may be somebody else's."""

    def checked(self) -> HypergradientConfig:
        """These settings if they make sense by themselves; an InputError otherwise."""
        checked_choice("product", self.product, PRODUCTS)
        if self.device is not None:
            checked_choice("device", self.device, DEVICES)
        _check_least(self, "steps", "objective_batches")
        for name in ("passes", "knots"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be ≥ 0, got {getattr(self, name)}")
        if not 0 <= self.average < 1:
            raise InputError(f"average must be in [0, 1), got {self.average:g}; it is a decay")
        if not 0 < self.discount <= 1:
            raise InputError(
                f"discount must be in (0, 1], got {self.discount:g}; leave --discount out for none"
            )
        if self.costate_clip is not None and not self.costate_clip > 0:
            raise InputError(
                f"costate_clip must be > 0, got {self.costate_clip:g}; leave it out for none"
            )
        if not self.step > 0:
            raise InputError(f"step must be > 0, got {self.step:g}; try --step 0.3")
        if self.memory_budget is not None:
            parsed_bytes(self.memory_budget)
        check_data(self.data)
        if self.output is not None and not self.passes:
            raise InputError("output is where --passes ends; give --passes N too")
        return self


@dataclass(frozen=True)
class DistillConfig:
    """What `rhc distill` does."""

    directories: Annotated[tyro.conf.Positional[tuple[Path, ...]], arg(metavar="DIR …")]
    """Directories of runs. Written with hindsight: by rhc smooth, hypergradient or train."""
    output: Annotated[Path, arg(metavar="POLICY", aliases=("-o",))]
    """Folder for the policy. rhc.DistilledScheduler.load takes it."""

    kind: Annotated[str, arg(metavar="gru|laws")] = "gru"
    """A recurrent network, or laws. Those of AdaptiveRL with fitted gains, to be read."""
    controls: Annotated[tuple[str, ...] | None, _unset("what moves in the runs", "NAME …")] = None
    """What the policy steers. Some of lr, momentum, noise."""
    every: Annotated[int, arg(metavar="N")] = 20
    """Steps from one move of the controls to the next."""
    gradient_norms: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Look at the gradient's norm too. At its trend, taken once per move."""
    held_out: Annotated[float, arg(metavar="F")] = 0.2
    """Share of the runs to judge policies by. Nothing is learned from them: policies steer them."""
    rounds: Annotated[int, arg(metavar="N")] = 2
    """Rounds of correction. In each the policy steers the training runs and is corrected where it
    goes."""
    per_round: Annotated[int, arg(metavar="N")] = 8
    """Training runs steered per round, at most. One plain run each."""
    seed: Annotated[int, arg(metavar="S")] = 0
    """Seed of the fit and of the split."""
    data: Annotated[Path | None, _unset("as before", "DIR")] = None
    """Where the runs' data are now. If they were moved."""
    trust: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the file that a DIR names. Wherever it lies: it may be somebody else's."""

    def checked(self) -> DistillConfig:
        """These settings if they make sense by themselves; an InputError otherwise."""
        checked_choice("kind", self.kind, ("gru", "laws"))
        _check_least(self, "every", "per_round")
        if self.rounds < 0:
            raise InputError(f"rounds must be ≥ 0, got {self.rounds}; try --rounds 2")
        if not 0 <= self.held_out < 1:
            raise InputError(
                f"held_out must be in [0, 1), got {self.held_out:g}; it is a share, try 0.2"
            )
        check_seed(self.seed)
        check_data(self.data)
        return self


DISTILL = """\
Fit a causal scheduler to runs that were written with hindsight: it sees the
past alone, costs one plain run, and works in any loop:
  scheduler = rhc.DistilledScheduler.load("POLICY", optimizer, steps=T)

examples:
  rhc distill runs/mnist-smooth-* -o policy
  rhc distill runs/mnist-smooth-* -o laws --kind laws --rounds 0
  rhc compare mnist --data mnist/ --methods distilled constant --policy policy"""

DISTILL_FLAGS = {
    "arguments": ("directories output", ""),
    "the policy": ("kind controls", "every gradient_norms"),
    "its fit": ("rounds seed data", "per_round held_out trust"),
}

HYPERGRADIENT = """\
Exact dJ/du of every step and control of a recorded run, however long it is; J
is the validation loss at its end. Written to DIR/hypergradient.json.

examples:
  rhc hypergradient runs/mnist-1a2b3c4d
  rhc hypergradient runs/mnist-1a2b3c4d --memory-budget 256MB
  rhc hypergradient runs/mnist-1a2b3c4d --passes 4   # rewrite it all, and train"""

HYPERGRADIENT_FLAGS = {
    "what is looked back at": ("directory controls steps data device", ""),
    "how": ("product memory_budget", "trust average stage_weight objective_batches discount "
            "costate_clip"),
    "rewriting it": ("passes knots output", "step"),
}  # fmt: skip

SMOOTH = """\
Train RUN, look at its tape from both ends, write a schedule, train by it: the
laws of AdaptiveRL, driven by what came after a step as well as before. The
best run by held-out loss is kept; no gradients of gradients.

examples:
  rhc smooth digits                                  # two plain runs
  rhc smooth drifting_sine --passes 3                # four
  rhc smooth mnist --data mnist/ --template cosine   # corrects a cosine
  rhc replay runs/digits-smooth-1a2b3c4d --seed 1    # what came out, again"""

SMOOTH_FLAGS = {
    "what is trained": ("run data steps seed device", "threads"),
    "the first run": ("optimizer lr template", "momentum weight_decay clip_norm"),
    "smoothing": ("passes", "source every gain baseline"),
    "files": ("directory", ""),
}

REPLAY = """\
Train RUN by a schedule that another run wrote, for one plain run, on any seed.
It is followed step by step; nothing is rewritten, nothing looked for.

examples:
  rhc replay runs/digits-1a2b3c4d --seed 1           # the run on another seed
  rhc replay schedule.json mnist --data mnist/       # any run, any schedule
  rhc replay schedule.json --steps 2000 --stretch    # the same shape, longer
  rhc replay schedule.json --batch-size 256 --rescale sqrt
  rhc replay schedule.json --width 4 --rescale width # lr / 4, as muP has it"""

REPLAY_FLAGS = {
    "what is trained": ("schedule run data seed device", "threads optimizer"),
    "another length or size": ("steps stretch batch_size width rescale", ""),
    "files": ("directory", "resume keep_checkpoints trust"),
}
"""Headings of the help, as in `rhc.settings.TRAIN_FLAGS`."""

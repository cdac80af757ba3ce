"""The settings of the commands besides `rhc train`, with the same fields for the same meaning. Each
docstring is a command's help; from "more examples" on it is in `--help-all` only."""

# ruff: noqa: RUF009  (the default of a setting is a field)
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rhc.errors import InputError
from rhc.settings.fields import (
    Check,
    Settings,
    at_least,
    fraction,
    like,
    one_of,
    setting,
)
from rhc.settings.owners import (
    Engine,
    Law,
    OptimizerSettings,
    Run,
    Shape,
    Step,
    Storage,
    parsed_names,
)
from rhc.settings.train import Files

SIZES = ("batch_size", "width")
"""Keywords of a run function besides seed and data."""


@dataclass(frozen=True, kw_only=True)
class Directory(Settings):
    """An existing run."""

    heading = "arguments"

    directory: Path = setting(metavar="DIR", place="argument")
    """The directory of a run."""


@dataclass(frozen=True, kw_only=True)
class Recorded(Directory):
    """An existing run, to be trained or rolled again."""

    heading = "arguments"

    data: Path | None = like(Run, "data", unset="as before")
    """Folder of the same data, if it was moved."""
    device: str | None = like(Run, "device", default=None, unset="as before")
    """Device: cpu, cuda or auto."""
    trust: bool = like(Files, "trust")
    """Run the file that DIR names, wherever it lies. It may be somebody else's."""


@dataclass(frozen=True, kw_only=True)
class ResumeConfig(Recorded):
    """Continue a run that was stopped, at its newest checkpoint, bit for bit.

    example:
      rhc resume runs/digits-1a2b3c4d
    """

    heading = "what is changed"

    steps: int | None = like(Run, "steps", unset="as before")
    """Total number of steps, more than before. The schedule is planned anew for the rest."""


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(Settings):
    """Train RUN by a schedule that another run wrote, for one plain run, on any seed.
    The schedule is followed step by step, without rewriting or an lr search.

    examples:
      rhc replay runs/digits-1a2b3c4d --seed 1           # the run on another seed
      rhc replay schedule.json mnist --data mnist/       # any run, any schedule
      rhc replay schedule.json --steps 2000 --stretch    # the same shape, longer
      rhc replay schedule.json --batch-size 256 --rescale sqrt
      rhc replay schedule.json --width 4 --rescale width # lr / 4, as muP has it
    """

    heading = "what is trained"

    schedule: Path = setting(metavar="DIR|FILE", place="argument")
    """The directory of a run, or its schedule.json."""
    run: str | None = like(Run, "run", default=None)
    """A name of `rhc runs`, or file.py:function."""
    data: Path | None = like(Run, "data", unset="as before")
    seed: int = like(Run, "seed")
    device: str = like(Run, "device")
    threads: int | None = like(Run, "threads")
    optimizer: str | None = like(OptimizerSettings, "optimizer", unset="as before", place="rare")

    steps: int | None = like(Run, "steps", unset="the schedule's", heading="another length or size")
    """Optimizer steps in all. If fewer than the schedule has, its first ones."""
    stretch: bool = setting(False)
    """Stretch the whole schedule to --steps. Instead of taking its first steps."""
    batch_size: int | None = setting(None, "B", at_least(1, 64), unset="the run's own", most=10**8)
    """Examples per batch, for runs that support other sizes."""
    width: int | None = setting(None, "N", at_least(1, 2), unset="1", most=10**5)
    """Factor on the width of hidden layers, for runs that support it."""
    rescale: str = setting("none", "NAME", one_of("none", "linear", "sqrt", "width"))
    """none, linear, sqrt or width: how lr is scaled. linear: by the ratio of batch sizes, sqrt: by
    its root, width: by 1 / the ratio of widths."""

    directory: Path | None = like(
        Storage, "directory", unset="runs/RUN-replay-HASH", heading="files"
    )
    """Directory of the run. By default one per schedule and settings."""
    resume: str = like(Storage, "resume")
    keep_checkpoints: int = like(Storage, "keep_checkpoints")
    trust: bool = like(Recorded, "trust")

    def checked(self) -> Self:
        checked = super().checked()
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
        return checked


@dataclass(frozen=True, kw_only=True)
class SmoothConfig(Step, OptimizerSettings, Run):
    """Train RUN, smooth its tape in both directions, write a schedule, train by it:
    the laws of AdaptiveRL with trends of what came before and after each step. The
    run with the lowest held-out loss is kept; no second derivatives are taken.

    examples:
      rhc smooth digits                                  # two plain runs
      rhc smooth drifting_sine --passes 3                # four
      rhc smooth mnist --data mnist/ --template cosine   # corrects a cosine
      rhc replay runs/digits-smooth-1a2b3c4d --seed 1    # its schedule again
    """

    lr: float | None = like(OptimizerSettings, "lr", unset="the run's own", heading="the optimizer")
    """Learning rate of the first run."""
    template: str = like(Shape, "template", default="constant", unset="", heading="the optimizer")
    """constant, cosine, linear, wsd or 1cycle. Of lr in the first run."""
    passes: int = setting(1, "N", at_least(1, 1), heading="smoothing")
    """Schedules that are written and tried. N passes take N + 1 plain runs."""
    controls: tuple[str, ...] | None = setting(
        None, "NAME …", parse=parsed_names, unset="lr momentum"
    )
    """What moves: some of lr, momentum, noise. By default lr alone where the data change."""
    source: str = setting(
        "both", "both|loss|reward", one_of("both", "loss", "reward"), place="rare"
    )
    """Trends that count. Both, the loss alone, or the reward alone, a metric called reward."""
    every: int = setting(20, "N", at_least(1, 20), place="rare")
    """Steps from one move of the controls to the next."""
    gain: float = setting(
        1.0, "G", Check("> 0", lambda x: 0 < x < float("inf"), "try --gain 1"), place="rare"
    )
    """Factor on how far the laws go at each. On all of the gains below."""
    lr_reward: float | None = setting(None, "K", unset="0.24", place="rare")
    """Gain of log lr by the trend of the reward. Without one, by the fall of the loss."""
    lr_loss: float | None = setting(None, "K", unset="0.24", place="rare")
    """Fall of log lr by the rise of the loss."""
    momentum_reward: float | None = setting(None, "K", unset="0.03", place="rare")
    """Gain of logit momentum, as --lr-reward."""
    momentum_loss: float | None = setting(None, "K", unset="0.06", place="rare")
    """Fall of logit momentum, as --lr-loss."""
    noise_plateau: float | None = setting(None, "K", unset="0.05", place="rare")
    """Gain of log noise by the plateau score."""
    noise_reward: float | None = setting(None, "K", unset="0.04", place="rare")
    """Fall of log noise by the trend of the reward."""
    baseline: bool = setting(True, place="rare")
    """Trends as they are. Not from their mean over the run."""
    directory: Path | None = like(
        Storage, "directory", unset="runs/RUN-smooth-HASH", heading="files"
    )
    """Where all is kept. Every run has a directory of its own in it."""

    def checked(self) -> Self:
        checked = super().checked()
        for name in SmoothConfig.known():
            control, _, trend = name.partition("_")
            gain = trend in ("reward", "loss", "plateau") and getattr(self, name) is not None
            if gain and control not in (checked.controls or ("lr", "momentum")):
                raise InputError(
                    f"{name} is a gain of {control}, which stays; add {control} to --controls or "
                    f"leave --{name.replace('_', '-')} out"
                )
        return checked


@dataclass(frozen=True, kw_only=True)
class WeightsConfig(Settings):
    """The weights that a run gave its data: how they are spread, and the lowest.

    examples:
      rhc weights runs/noisy_mnist-1a2b3c4d
      rhc weights runs/noisy_mnist-1a2b3c4d --lowest 50 -o weights.csv
    """

    heading = "what is shown"

    directory: Path = setting(metavar="DIR", place="argument")
    """The run's directory."""
    lowest: int = setting(10, "N", at_least(1, 10))
    """Cells to list, the lowest weights first."""
    output: Path | None = setting(None, "FILE", unset="none", alias="-o")
    """Write all cells to FILE, as CSV: cell, weight, windows that saw it, mean slope."""
    course: Path | None = setting(None, "FILE", unset="none")
    """Write the course of few cells to FILE, as CSV: a line per change, a column per cell."""


@dataclass(frozen=True, kw_only=True)
class HypergradientConfig(Recorded):
    """Exact dJ/du of every step and control of a recorded run, however long it is; J
    is the validation loss at its end. Written to DIR/hypergradient.json.

    examples:
      rhc hypergradient runs/mnist-1a2b3c4d
      rhc hypergradient runs/mnist-1a2b3c4d --memory-budget 256MB
      rhc hypergradient runs/mnist-1a2b3c4d --passes 4   # rewrite it all, and train
    """

    heading = "what is differentiated"

    controls: tuple[str, ...] | None = setting(None, "NAME …", unset="all that are not 0")
    """Controls to differentiate by. Some of lr, momentum, noise, weight_decay."""
    steps: int | None = like(Run, "steps", unset="all of them")
    """Differentiate the first T steps only, with J at their end."""

    product: str = like(Engine, "product", default="exact", heading="method")
    """Hessian products, as of rhc train."""
    memory_budget: int | None = like(Engine, "memory_budget", place="usual")
    average: float = like(Law, "average", default=0.0, unset="")
    """Decay of the average of iterates at which J is taken; 0 for the last iterate."""
    stage_weight: float | None = setting(
        None, "W", unset="0; 1/T without validation data", place="rare"
    )
    """Weight of the sum of the training losses in J."""
    objective_batches: int = like(Law, "objective_batches", default=16, unset="")
    """Validation batches in J, at most."""
    discount: float = like(Engine, "discount")
    costate_clip: float | None = like(Engine, "costate_clip")
    """Largest norm of the costate, as a multiple of its norm at the end."""

    passes: int = setting(0, "N", at_least(0, 4), heading="rewriting")
    """Rewrites of the whole schedule. One is kept if J falls on the same data; at the end a run is
    trained with the result."""
    knots: int = setting(8, "M", at_least(0, 8))
    """Knots of the schedule that --passes moves. Log-linear between them; 0 for one per step."""
    step: float = setting(0.3, "X", Check("> 0", lambda x: x > 0, "try --step 0.3"), place="rare")
    """Largest move of a knot per rewrite. In nats (momentum: logits)."""
    output: Path | None = setting(None, "DIR", unset="runs/RUN-horizon-HASH")
    """Directory of the last run of --passes."""

    def checked(self) -> Self:
        checked = super().checked()
        if self.output is not None and not self.passes:
            raise InputError("output is where --passes ends; give --passes N too")
        return checked


@dataclass(frozen=True, kw_only=True)
class AttributeConfig(Recorded):
    """What every training row did for a recorded run: dJ/dw of its weight, through
    all of the training; J is the validation loss at its end. Written to DIR/
    attribution.safetensors, .csv and .json. If interrupted, call it again.

    examples:
      rhc attribute runs/mnist-1a2b3c4d
      rhc attribute runs/mnist-1a2b3c4d --per-row 20   # and of 20 predictions
      rhc attribute runs/mnist-1a2b3c4d --cells classes --average 0.98
    """

    heading = "what is attributed"

    cells: str = setting("rows", "rows|classes|own|FILE.py:NAME")
    """What has a derivative each. Rows; classes, by their labels; own, the cells of the Workload's
    data_weights; or those of a function, batch -> (B,) integers."""
    per_row: int = setting(0, "N", at_least(0, 20))
    """Also attribute the losses of the first N validation rows. A reverse pass each."""
    bounded: bool = setting(False)
    """Take 1 − exp(−loss) for the loss. It is bounded, so that J is more linear in the weights."""
    average: float = like(Law, "average", default=0.0, unset="")
    """Decay of the average of iterates at which J is taken; 0 for the last iterate."""
    objective_batches: int = like(Law, "objective_batches", default=16, unset="")
    """Validation batches in J, at most."""

    product: str = like(Engine, "product", heading="method")
    """Hessian products, as of rhc train."""
    memory_budget: int | None = like(Engine, "memory_budget", place="usual")
    probes: int = setting(2, "N", at_least(0, 2))
    """Random directions of the weights along which J is rolled, to see how linear it is. Two plain
    runs each."""
    show: int = setting(5, "N", at_least(0, 5))
    """Most helpful and most harmful rows that are shown, of each kind."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Settings):
    """Fit a causal scheduler to runs that were written with hindsight: it sees the
    past alone, costs one plain run, and works in any loop:
      scheduler = rhc.DistilledScheduler.load("POLICY", optimizer, steps=T)

    examples:
      rhc distill runs/mnist-smooth-* -o policy
      rhc distill runs/mnist-smooth-* -o laws --kind laws --rounds 0
      rhc compare mnist --data mnist/ --methods distilled constant --policy policy
    """

    directories: tuple[Path, ...] = setting(metavar="DIR …", place="argument", heading="arguments")
    """Directories of runs by rhc smooth, hypergradient or train."""
    output: Path = setting(metavar="POLICY", alias="-o")
    """Folder for the policy. rhc.DistilledScheduler.load takes it."""
    kind: str = setting("gru", "gru|laws", one_of("gru", "laws"), heading="the policy")
    """A recurrent network, or the laws of AdaptiveRL with fitted gains."""
    controls: tuple[str, ...] | None = setting(None, "NAME …", unset="those that vary in the runs")
    """Controls that the policy sets. Some of lr, momentum, noise."""
    every: int = like(SmoothConfig, "every")
    gradient_norms: bool = setting(False, place="rare")
    """Use the trend of the gradient's norm too. Taken once per update."""
    rounds: int = setting(2, "N", at_least(0, 2), heading="fitting")
    """Rounds of correction. In each, the policy steers the training runs and is fitted again on the
    states that it reaches."""
    seed: int = like(Run, "seed")
    """Seed of the fit and of the split."""
    data: Path | None = like(Recorded, "data")
    per_round: int = setting(8, "N", at_least(1, 8), place="rare")
    """Most training runs per round. One plain run each."""
    held_out: float = setting(0.2, "F", fraction(0.2, "a share"), place="rare")
    """Share of the runs that policies are validated on. They are not fitted to."""
    trust: bool = like(Recorded, "trust")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Settings):
    r"""Train RUN by several methods on several seeds; compare results and costs.

    examples:
      rhc compare digits --methods rhc cosine --lrs 0.03 0.1 0.3 --seeds 10
      rhc compare sine --methods adaptive constant cosine --tune 0-2 --jobs 2
      rhc compare my_run.py:make --methods rhc twin --seeds 100-104

    methods: rhc, rhc-probe; templates from --lrs: constant cosine linear 1cycle
    wsd; adaptive (AdaptiveRL); smooth; planner; search-cosine-4; and others

    more examples:
      rhc compare sine --ablations --lrs 0.01
      rhc compare mnist --data mnist/ --methods smooth replay distilled \
          search-cosine-2 constant --schedule runs/mnist-smooth-1a2b3c4d \
          --policy policy --oracle smooth   # what is kept of hindsight's gain

    all methods:
      rhc  rhc-probe                     the default, without an lr or from one
      zero-probe  zero-probe-cosine      the start alone, and a template
      probe-cosine                       the same from an lr
      constant cosine linear 1cycle wsd  plain templates from the lrs that are given
      step  on-plateau  adamw-cosine     other schedulers; adamw: at its own lr
      schedule-free  prodigy             optimizers without a schedule (packages)
      adaptive  adaptive-…               AdaptiveRL; parts of it, see --ablations
      random-search                      the best of several runs, by validation
      twin                               rhc without gradients
      smooth  smooth-3                   the two-pass smoother, from an lr
      replay  distilled                  the schedule, the policy that are given
      search-cosine-2  search-cosine-4   random lrs for a cosine, best by validation
      planner                            epochs planned from the tape
      FILE.py:NAME                       NAME of the METHODS of that file
    """

    heading = "what is trained"

    run: str = like(Run, "run")
    """A name of `rhc runs`, or file.py:function."""
    data: Path | None = like(Run, "data")
    steps: int | None = like(Run, "steps")
    """Optimizer steps of every run."""
    batch_size: int | None = like(ReplayConfig, "batch_size", place="rare")
    width: int | None = like(ReplayConfig, "width", place="rare")

    methods: tuple[str, ...] = setting(
        (), "NAME …", unset="rhc zero-probe-cosine cosine", heading="methods"
    )
    """Methods, from the list above."""
    lrs: tuple[float, ...] = setting((), "A …", unset="the run's own")
    """Learning rates, for the methods that need one."""
    tune: str | None = setting(None, "N|FIRST-LAST", unset="all are reported")
    """Seeds on which each method's lr is chosen. Among --lrs, or six from 0.001 to 0.3; only that
    lr is reported, with the cost of choosing it."""
    ablations: bool = setting(False, place="rare")
    """Variants of AdaptiveRL with one part changed. Besides other methods, or alone."""
    schedule: Path | None = setting(None, "DIR|FILE", place="rare")
    """Schedule for the method replay. A run's, stretched to the length of these."""
    policy: Path | None = setting(None, "FOLDER", place="rare")
    """Policy for the method distilled, by rhc distill."""

    seeds: str = setting("5", "N|FIRST-LAST", heading="seeds and results")
    """Number of seeds, from 100 on, or a range. Choose on 0-9, report on 100 and more."""
    versus: str | None = setting(None, "NAME", unset="the last method")
    """Method that others are compared with, at its best lr."""
    output: Path | None = setting(None, "FILE")
    """Another file for the rows and the lines of the table, as JSON."""
    target: float | None = setting(None, "X", unset="the run's own", place="rare")
    """Score to which steps are counted. By default the final score of the reference, 5 % worse."""
    oracle: str | None = setting(None, "NAME", place="rare")
    """Method whose gain over --versus is 100 %. Others are reported as a share of it."""

    directory: Path | None = setting(
        None, "DIR", unset="runs/compare-RUN", alias="-o", heading="files and processes"
    )
    """Folder of the rows and of the runs. Rows in it are not computed again."""
    jobs: int = setting(1, "N", at_least(1, 2), most=1024)
    """Number of parallel processes."""
    launcher: str = setting("processes", "NAME", place="rare")
    """Launcher: processes, submitit or ray. Processes of this machine, or Slurm or ray, if
    installed; options after a colon, such as submitit:slurm_partition=gpu,timeout_min=60 or
    ray:num_gpus=1."""


@dataclass(frozen=True, kw_only=True)
class RunsConfig(Settings):
    """List the available runs, and the results in runs/.

    example:
      rhc runs
    """


@dataclass(frozen=True, kw_only=True)
class InspectConfig(Directory):
    """Show a run: its settings, schedule, windows and losses.

    example:
      rhc inspect runs/digits-1a2b3c4d
    """


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Settings):
    """Write one HTML page about a run, or about several; it loads nothing.

    examples:
      rhc report runs/digits-1a2b3c4d
      rhc report runs/digits-* -o digits.html
    """

    heading = "arguments"

    directories: tuple[Path, ...] = setting(metavar="DIR …", place="argument")
    """Directories of runs, or folders of runs. Several are shown side by side."""
    output: Path | None = setting(None, "FILE", unset="DIR/report.html, or here", alias="-o")
    """File of the page."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig(Directory):
    """Follow a run from another terminal until it ends; nothing is written.

    example:
      rhc watch runs/digits-1a2b3c4d
    """


@dataclass(frozen=True, kw_only=True)
class InitConfig(Settings):
    """Write a working runner as a starting point for your own.

    example:
      rhc init my_run.py && rhc train my_run.py:my_run
    """

    heading = "arguments"

    run: Path = setting(Path("my_run.py"), "[RUN]", place="argument")
    """The file to write, which must not exist."""

"""The command line `rhc`: flags from types, errors in one sentence, exit statuses.

0 done, 1 the run diverged, 2 something that was given cannot be used, 3 the disk did not take all,
130 and 143 stopped by Ctrl-C and SIGTERM. torch is imported by the commands that need it, so that
help and mistyped flags are answered at once.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import os
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import arg

from rhc import __version__
from rhc.cli.usage import Groups, page
from rhc.errors import InputError, StorageError, plain
from rhc.settings import TRAIN_FLAGS, TrainConfig, field_kind
from rhc.settings.commands import (
    DISTILL,
    DISTILL_FLAGS,
    HYPERGRADIENT,
    HYPERGRADIENT_FLAGS,
    REPLAY,
    REPLAY_FLAGS,
    SMOOTH,
    SMOOTH_FLAGS,
    DistillConfig,
    HypergradientConfig,
    ReplayConfig,
    SmoothConfig,
)
from rhc.training import interrupts as stopping
from rhc.workload import refuse_strange, with_function


@dataclass(frozen=True)
class ResumeConfig:
    """What `rhc resume` does."""

    directory: Annotated[tyro.conf.Positional[Path], arg(metavar="DIR")]
    """The directory of a run that was stopped."""
    data: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: as before)")] = (
        None
    )
    """Where the same data are now. If they were moved."""
    steps: Annotated[int | None, arg(metavar="T", help_behavior_hint="(default: as before)")] = None
    """More steps in all than before. The plan is made anew for those to come."""
    device: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(default: as before)")
    ] = None
    """Where to go on: cpu, cuda or auto."""
    trust: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the file that DIR names. Wherever it lies: it may be somebody else's."""


@dataclass(frozen=True)
class InspectConfig:
    """What `rhc inspect` does."""

    directory: Annotated[tyro.conf.Positional[Path], arg(metavar="DIR")]
    """The directory of a run."""


@dataclass(frozen=True)
class ReportConfig:
    """What `rhc report` does."""

    directories: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        arg(metavar="DIR …", help_behavior_hint="(one or more)"),
    ]
    """Directories of runs. Several are laid over each other."""
    output: Annotated[
        Path | None,
        arg(
            metavar="FILE",
            aliases=("-o",),
            help_behavior_hint="(default: DIR/report.html, or here)",
        ),
    ] = None
    """Where the page is written."""


@dataclass(frozen=True)
class WatchConfig:
    """What `rhc watch` does."""

    directory: Annotated[tyro.conf.Positional[Path], arg(metavar="DIR")]
    """The directory of a run that another process trains."""


@dataclass(frozen=True)
class InitConfig:
    """What `rhc init` does."""

    run: Annotated[tyro.conf.Positional[Path], arg(metavar="[RUN]")] = Path("my_run.py")
    """The file to write, which must not exist."""


@dataclass(frozen=True)
class CompareConfig:
    """What `rhc compare` does. Each field's sentence is the help of its flag."""

    run: Annotated[tyro.conf.Positional[str], arg(metavar="[RUN]")] = "digits"
    """A name of `rhc runs`, or file.py:function."""
    methods: Annotated[
        tuple[str, ...],
        arg(metavar="NAME …", help_behavior_hint="(default: rhc zero-probe-cosine cosine)"),
    ] = ()
    """Methods. Those that there are stand above."""
    ablations: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """AdaptiveRL with one part changed, each. Beside or in place of other methods."""
    lrs: Annotated[
        tuple[float, ...], arg(metavar="A …", help_behavior_hint="(default: the run's own)")
    ] = ()
    """Learning rates. For the methods that need one."""
    tune: Annotated[
        str | None, arg(metavar="N|FIRST-LAST", help_behavior_hint="(default: all are reported)")
    ] = None
    """Seeds on which lrs are chosen. Each method's, among --lrs or six from 0.001 to 0.3; only that
    one is reported, and what the choice took is said."""
    seeds: Annotated[str, arg(metavar="N|FIRST-LAST")] = "5"
    """How many seeds, from 100 on, or which. Choose on 0-9, report on 100 and more."""
    versus: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(default: the last method)")
    ] = None
    """The method others are compared with. At its best lr."""
    steps: Annotated[
        int | None, arg(metavar="T", help_behavior_hint="(default: the run's own)")
    ] = None
    """Optimizer steps of every run."""
    data: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: none)")] = None
    """Folder of the run's data, for runs that need one."""
    target: Annotated[
        float | None, arg(metavar="X", help_behavior_hint="(default: the run's own)")
    ] = None
    """What a run must reach for its steps to be counted. By default what the reference ends with,
    give or take 5 %."""
    schedule: Annotated[
        Path | None, arg(metavar="DIR|FILE", help_behavior_hint="(default: none)")
    ] = None
    """The schedule that the method replay follows. Of a run, stretched to the length of these."""
    policy: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = (
        None
    )
    """The policy that steers the method distilled. Of rhc distill."""
    oracle: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="(default: none)")] = None
    """The method whose gain is 1. Of its gain over --versus the others are said to keep a share."""
    width: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: 1)")] = None
    """Hidden layers N times as wide. For runs that can have other ones."""
    batch_size: Annotated[
        int | None, arg(metavar="B", help_behavior_hint="(default: the run's own)")
    ] = None
    """Examples per batch. For runs that can have other ones."""
    jobs: Annotated[int, arg(metavar="N")] = 1
    """Processes that run at once."""
    launcher: Annotated[str, arg(metavar="NAME")] = "processes"
    """What runs them: processes, submitit or ray. Processes of this machine, or Slurm or ray, if
    installed; options after a colon, such as submitit:slurm_partition=gpu,timeout_min=60 or
    ray:num_gpus=1."""
    directory: Annotated[
        Path | None,
        arg(metavar="DIR", aliases=("-o",), help_behavior_hint="(default: runs/compare-RUN)"),
    ] = None
    """Where rows are kept. As they come, and not computed again."""
    output: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """A further file for all rows, as JSON. And for all lines of the table."""


@dataclass(frozen=True)
class RunsConfig:
    """What `rhc runs` does."""


@dataclass(frozen=True)
class Command:
    """A subcommand: its flags, what it does, a line for `rhc --help` and its own help."""

    flags: type[Any]
    act: Callable[[Any], int]
    summary: str
    about: str
    groups: Groups
    more: str = ""
    """What `--help-all` says beside that."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that is not UTF-8 gets a question mark in place of "≥", not a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if argv is None and _is_rank(arguments):
        # A rank that waits for others cannot answer, and torchrun would wait for it in its turn.
        # What a run has saved is whole at any moment.
        stopping.at_once(signal.SIGTERM)
    with stopping.handled():
        status = _status(arguments)
    # Whoever caught a signal on the way took it for Ctrl-C, and Python may have swallowed it.
    number = stopping.received()
    if number is not None and (status == 130 or stopping.asked()):
        status = stopping.STATUS[number]
    if argv is None and _is_rank(arguments):
        from rhc.distributed import leave

        leave(status)
    return status


def _is_rank(arguments: Sequence[str]) -> bool:
    """Whether torchrun started this command on several ranks, to train together."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "MASTER_ADDR" in os.environ
    return several and bool(arguments) and arguments[0] in ("train", "resume", "replay")


def _status(arguments: list[str]) -> int:
    try:
        if _is_rank(arguments):
            from rhc.loop.agreement import as_rank

            return as_rank(lambda: _dispatch(arguments))
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except InputError as error:
        print(plain(f"rhc: error: {error}"), file=sys.stderr)
        return 2
    except StorageError as error:
        print(plain(f"rhc: error: {error}"), file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("rhc: stopped", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        from rhc.training.recovery import out_of_memory

        if not out_of_memory(error):
            raise
        what = str(error).partition("\n")[0] or type(error).__name__
        print(plain(f"rhc: error: memory does not suffice ({what}); lower a size"), file=sys.stderr)
        return 2
    except SystemExit as stop:  # tyro's way to end after --help
        return int(stop.code or 0)
    except OSError as error:
        # Of the screen, or of the file or the pipe in its place: any other file has a name.
        if error.filename is not None or error.errno not in UNWRITABLE:
            raise
        with contextlib.suppress(OSError):  # what is left to be written goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            return 141  # as of SIGPIPE: `rhc inspect DIR | head` is no error
        print(f"rhc: error: the output cannot be written ({error.strerror})", file=sys.stderr)
        return 3


UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EDQUOT)


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        print(f"rhc {__version__}")
        return 0
    if arguments[:1] == ["help"]:  # as of git and pip
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        return _overview()
    if arguments[0] == "--completion":
        return _completion(arguments[1:])
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"unknown command {name!r}: {hint}there are: {', '.join(COMMANDS)}; see rhc --help"
        )
    command = COMMANDS[name]
    if {"-h", "--help", "--help-all"} & set(rest):
        print(_help(name, whole="--help-all" in rest))
        return 0
    default, below = tyro.MISSING_NONPROP, None
    if command.flags is TrainConfig:
        below = _defaults(rest)
        default = below if below.config is None else replace(below, run="")
    config = _parsed(name, command, rest, default)
    if below is not None and below.config is not None and not config.run:  # RUN is not given
        refuse_strange(below.run, below.config, trust=config.trust)
        config = replace(config, run=below.run)
    if isinstance(run := getattr(config, "run", None), str):
        config = replace(config, run=with_function(run))
    return command.act(config)


def _commands() -> Any:
    """All commands as one type, for tyro."""
    commands: Any = None
    for name, command in COMMANDS.items():
        flags: Any = command.flags
        one = Annotated[flags, tyro.conf.subcommand(name, description=command.summary)]
        commands = one if commands is None else commands | one
    return commands


def _completion(arguments: Sequence[str]) -> int:
    """`rhc --completion bash`: a script for the shell to source."""
    shells = ("bash", "zsh", "tcsh")
    if len(arguments) != 1 or arguments[0] not in shells:
        raise InputError(
            f"--completion takes one of {', '.join(shells)}, got {' '.join(arguments) or 'none'}; "
            'try: eval "$(rhc --completion bash)"'
        )
    with contextlib.suppress(SystemExit):
        tyro.cli(_commands(), prog="rhc", args=["--tyro-print-completion", arguments[0]])
    return 0


def _overview() -> int:
    """`rhc --help`."""
    lines = [f"  {name:<14} {command.summary}" for name, command in COMMANDS.items()]
    print("\n".join([OVERVIEW, *lines]))
    return 0


def _help(name: str, *, whole: bool) -> str:
    """The help of a command; whole: every flag, in full."""
    command = COMMANDS[name]
    return page(name, command.flags, command.groups, command.about, command.more, whole=whole)


def _defaults(arguments: Sequence[str]) -> TrainConfig:
    """The settings below the flags: those of --config FILE where it is given."""
    path: str | None = None
    for place, token in enumerate(arguments):
        flag, given, value = token.partition("=")
        if flag == "--config":
            path = value if given else next(iter(arguments[place + 1 :]), None)
    if not path or path[:2] == "--":
        return TrainConfig()
    return replace(TrainConfig.from_file(Path(path)), config=Path(path))


def _parsed(name: str, command: Command, arguments: list[str], default: Any) -> Any:
    """The command's flags as its dataclass; what tyro refuses becomes an InputError."""
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                command.flags,
                prog=f"rhc {name}",
                args=arguments,
                default=default,
                config=(tyro.conf.DisallowNone,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        fault = _fault(command.flags, arguments) or _unboxed(captured.getvalue())
    raise InputError(f"{fault}{'' if fault.endswith('?') else ';'} see rhc {name} --help")


def _fault(flags: type[Any], arguments: Sequence[str]) -> str | None:
    """What is wrong with the flags in one clause; None where it is not a flag or its value."""
    hints = typing.get_type_hints(flags)
    kinds = {f"--{f.name.replace('_', '-')}": field_kind(hints[f.name])[0] for f in fields(flags)}
    known = [*kinds, *(f"--no-{flag[2:]}" for flag, kind in kinds.items() if kind is bool)]
    for place, token in enumerate(arguments):
        if not token.startswith("--"):
            continue
        written, given, value = token.partition("=")
        flag = written.replace("_", "-")
        if flag not in known:
            near = difflib.get_close_matches(flag, known, n=1)
            return f"unknown flag {flag}" + (f": did you mean {near[0]}?" if near else "")
        kind = kinds.get(flag, bool)
        if kind is bool:
            continue
        text = value if given else next(iter(arguments[place + 1 :]), None)
        if text is None or text.startswith("--"):
            return f"{flag} needs a value"
        if kind in (int, float):
            try:
                kind(text)
            except ValueError:
                number = "a whole number" if kind is int else "a number"
                return f"{flag} must be {number}, got {text!r}"
    required = [f.name for f in fields(flags) if f.default is MISSING]
    if required and not any(token[:1] != "-" for token in arguments):
        if required[0] != "directory":
            return f"{required[0]} is missing: give the directory of a run, or one of its files"
        return "DIR is missing: give the directory of a run"
    return None


def _unboxed(text: str) -> str:
    """The message inside the box that tyro draws, up to its first rule, on one line."""
    lines = [line.strip("│ ") for line in text.splitlines()[1:]]
    message = []
    for line in filter(None, lines):
        if line.strip("─-"):
            message.append(line)
        elif message:
            break
    text = " ".join(message).strip(" .╰╯─") or "these arguments cannot be read"
    return text[0].lower() + text[1:]


# Commands -----------------------------------------------------------------------------------------


def _train(config: TrainConfig) -> int:
    config = config.checked()
    from rhc.report.live import Screen

    screen = Screen()
    with screen.waiting("loading torch"):
        from rhc.cli.train import train
    return train(config, screen)


def _resume(config: ResumeConfig) -> int:
    from rhc.storage.run_files import read_record

    record = read_record(config.directory)  # what is no run is said before torch is imported
    from rhc.report.live import Screen

    if config.steps is not None and "command" in record:
        raise InputError(
            f"steps belongs to the schedule that is used again, got {config.steps}; leave --steps "
            "out"
        )
    if record.get("command") == "replay":
        from rhc.cli.replay import resume_replay

        return resume_replay(
            config.directory, config.data, config.device, Screen(), trust=config.trust
        )
    if "pass" in record:
        raise InputError(
            f"directory {config.directory} is one run of {config.directory.parent}; resume that"
        )
    if record.get("command") == "smooth":
        from rhc.cli.smooth import resume_smooth

        return resume_smooth(record, config.directory, Screen(), trust=config.trust)
    from rhc.cli.train import config_of, train

    recorded = config_of(config.directory, trust=config.trust)
    moved = None if config.data is None else recorded.data
    settings = replace(
        recorded,
        data=config.data or recorded.data,
        device=config.device or recorded.device,
        steps=recorded.steps if config.steps is None else config.steps,
    )
    return train(settings.checked(), Screen(), recorded_data=moved)


def _runs(config: RunsConfig) -> int:
    from rhc.report.live import Screen
    from rhc.report.text import print_runs

    print_runs(Screen())
    return 0


def _inspect(config: InspectConfig) -> int:
    from rhc.report.live import Screen
    from rhc.report.text import print_run

    print_run(Screen(), config.directory)
    return 0


def _report(config: ReportConfig) -> int:
    from rhc.report import write_report

    print(plain(str(write_report(config.directories, config.output))))
    return 0


def _watch(config: WatchConfig) -> int:
    from rhc.report.live import Screen
    from rhc.report.watch import watch

    watch(config.directory, Screen())
    return 0


def _init(config: InitConfig) -> int:
    from rhc.cli.init import write_template

    print(write_template(config.run))
    return 0


def _replay(config: ReplayConfig) -> int:
    config = config.checked()
    from rhc.cli.replay import replay
    from rhc.report.live import Screen

    return replay(config, Screen())


def _smooth(config: SmoothConfig) -> int:
    config = config.checked()
    from rhc.cli.smooth import smooth_run
    from rhc.report.live import Screen

    return smooth_run(config, Screen())


def _hypergradient(config: HypergradientConfig) -> int:
    config = config.checked()
    from rhc.storage.run_files import read_record

    read_record(config.directory)  # what is no run is said before torch is imported
    from rhc.cli.whole_run import hypergradient_of
    from rhc.report.live import Screen

    return hypergradient_of(config, Screen())


def _distill(config: DistillConfig) -> int:
    config = config.checked()
    from rhc.cli.distill import distill
    from rhc.report.live import Screen

    return distill(config, Screen())


def _compare(config: CompareConfig) -> int:
    from rhc.compare.pool import print_comparison
    from rhc.report.live import Screen

    short = config.run.rpartition(":")[2]
    return print_comparison(
        Screen(),
        config.run,
        methods=config.methods,
        ablations=config.ablations,
        lrs=config.lrs,
        tune=config.tune,
        seeds=config.seeds,
        versus=config.versus,
        target=config.target,
        steps=config.steps,
        data=config.data,
        schedule=config.schedule,
        policy=config.policy,
        oracle=config.oracle,
        width=config.width,
        batch_size=config.batch_size,
        jobs=config.jobs,
        launcher=config.launcher,
        directory=config.directory or Path("runs") / f"compare-{short}",
        output=config.output,
    )


OVERVIEW = """\
usage: rhc COMMAND …

Train a PyTorch model, and have its schedule written with hindsight:
  rhc train --window 50    a first run: digits, no download, a few seconds
  rhc train --help         its settings; --help-all for all of them
  rhc --version            the version

commands, each with --help:"""

TRAIN = """\
Train RUN and write its schedule with hindsight: roll K steps, look back with
gradients by every control of every step, rewrite, restore, replay, slide on.
The same command continues a run that was stopped; so does rhc resume DIR.

examples:
  rhc train --window 50                           # digits, 50 steps at once
  rhc train mnist --data mnist/ --optimizer adam  # a folder of IDX files
  rhc train my_run.py:make --seed 1               # your own, see rhc init
  rhc train --no-rewrite --start zero             # 2 plain runs, no lr"""

TRAIN_MORE = """\
more examples:
  rhc train my_run.py:make --controls lr momentum
  rhc train --no-rewrite                          # the plain loop, to compare
  rhc train --print-config > run.toml && rhc train --config run.toml --seed 1
  rhc train --memory-budget 500MB --plan          # what a window will cost
  torchrun --nproc-per-node 2 -m rhc -- train     # two ranks, one result"""

COMPARE = """\
Train RUN by several methods on several seeds; what each ends with and costs.

examples:
  rhc compare digits --methods rhc cosine --lrs 0.03 0.1 0.3 --seeds 10
  rhc compare sine --methods adaptive constant cosine --tune 0-2 --jobs 2
  rhc compare my_run.py:make --methods rhc twin --seeds 100-104

methods: rhc, rhc-probe; templates from --lrs: constant cosine linear 1cycle
wsd; adaptive (AdaptiveRL); smooth; planner; search-cosine-4; and others"""

COMPARE_MORE = """\
more examples:
  rhc compare sine --ablations --lrs 0.01
  rhc compare mnist --data mnist/ --methods smooth replay distilled \\
      search-cosine-2 constant --schedule runs/mnist-smooth-1a2b3c4d \\
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
  FILE.py:NAME                       NAME of the METHODS of that file"""

COMPARE_FLAGS = {
    "what is trained": ("run data steps", "batch_size width"),
    "by what": ("methods lrs tune", "ablations schedule policy"),
    "how it is told": ("seeds versus output", "target oracle"),
    "where": ("directory jobs", "launcher"),
}

COMMANDS = {
    "train": Command(
        TrainConfig,
        _train,
        "Train and rewrite:   rhc train mnist --data mnist/",
        TRAIN,
        TRAIN_FLAGS,
        TRAIN_MORE,
    ),
    "resume": Command(
        ResumeConfig,
        _resume,
        "Go on after a stop:  rhc resume runs/digits-1a2b3c4d",
        "Continue a run that was stopped, at its newest checkpoint, bit for bit.\n\n"
        "example:\n  rhc resume runs/digits-1a2b3c4d",
        {"arguments": ("directory", ""), "what is changed": ("steps data device", "trust")},
    ),
    "replay": Command(
        ReplayConfig,
        _replay,
        "Use a schedule:      rhc replay runs/digits-1a2b3c4d",
        REPLAY,
        REPLAY_FLAGS,
    ),
    "smooth": Command(
        SmoothConfig,
        _smooth,
        "Two plain runs:      rhc smooth drifting_sine",
        SMOOTH,
        SMOOTH_FLAGS,
    ),
    "hypergradient": Command(
        HypergradientConfig,
        _hypergradient,
        "The whole run:       rhc hypergradient runs/digits",
        HYPERGRADIENT,
        HYPERGRADIENT_FLAGS,
    ),
    "distill": Command(
        DistillConfig,
        _distill,
        "A causal scheduler:  rhc distill runs/* -o policy",
        DISTILL,
        DISTILL_FLAGS,
    ),
    "compare": Command(
        CompareConfig,
        _compare,
        "Methods x seeds:     rhc compare digits --seeds 5",
        COMPARE,
        COMPARE_FLAGS,
        COMPARE_MORE,
    ),
    "runs": Command(
        RunsConfig,
        _runs,
        "What can be trained, and what has been:  rhc runs",
        "List what can be trained, and the runs that lie in runs/.\n\nexample:\n  rhc runs",
        {},
    ),
    "inspect": Command(
        InspectConfig,
        _inspect,
        "What a run did:      rhc inspect runs/digits-1a2b3c4d",
        "Show a run: its settings, schedule, windows and losses.\n\n"
        "example:\n  rhc inspect runs/digits-1a2b3c4d",
        {"arguments": ("directory", "")},
    ),
    "report": Command(
        ReportConfig,
        _report,
        "One page of charts:  rhc report runs/digits-1a2b3c4d",
        "Write one HTML page about a run, or about several; it needs no network.\n\n"
        "examples:\n  rhc report runs/digits-1a2b3c4d\n  rhc report runs/digits-* -o digits.html",
        {"arguments": ("directories output", "")},
    ),
    "watch": Command(
        WatchConfig,
        _watch,
        "Follow a run:        rhc watch runs/digits-1a2b3c4d",
        "Follow a run from another terminal until it ends; nothing is written.\n\n"
        "example:\n  rhc watch runs/digits-1a2b3c4d",
        {"arguments": ("directory", "")},
    ),
    "init": Command(
        InitConfig,
        _init,
        "A run of your own:   rhc init my_run.py",
        "Write a runner of your own that works as it stands, to be changed.\n\n"
        "example:\n  rhc init my_run.py && rhc train my_run.py:my_run",
        {"arguments": ("run", "")},
    ),
}

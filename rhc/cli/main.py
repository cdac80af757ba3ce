"""The command line `rhc`. Commands import torch only when needed, so that help is immediate. Exit
statuses: 0 done, 1 the run diverged, 2 unusable input, 3 the disk did not take all, 130 and 143
stopped by Ctrl-C and SIGTERM."""

from __future__ import annotations

import contextlib
import difflib
import errno
import importlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rhc import __version__
from rhc.cli.flags import SHELLS, completion, page
from rhc.cli.flags import parsed as parsed_flags
from rhc.errors import InputError, StorageError, plain
from rhc.settings import TrainConfig
from rhc.settings.commands import (
    AttributeConfig,
    CompareConfig,
    DistillConfig,
    HypergradientConfig,
    InitConfig,
    InspectConfig,
    ReplayConfig,
    ReportConfig,
    ResumeConfig,
    RunsConfig,
    SmoothConfig,
    WatchConfig,
    WeightsConfig,
)
from rhc.settings.fields import Settings
from rhc.training import interrupts
from rhc.workload import refuse_strange, with_function

OVERVIEW = """\
usage: rhc COMMAND …

Train a PyTorch model, and have its schedule written with hindsight:
  rhc train --window 50    a first run: digits, no download, a few seconds
  rhc train --help         its settings; --help-all for all of them
  rhc --version            the version

commands, each with --help:"""

COMMANDS: dict[str, tuple[type[Settings], str]] = {
    "train": (TrainConfig, "Train and rewrite:   rhc train mnist --data mnist/"),
    "resume": (ResumeConfig, "Go on after a stop:  rhc resume runs/digits-1a2b3c4d"),
    "replay": (ReplayConfig, "Use a schedule:      rhc replay runs/digits-1a2b3c4d"),
    "smooth": (SmoothConfig, "Two plain runs:      rhc smooth drifting_sine"),
    "hypergradient": (HypergradientConfig, "The whole run:       rhc hypergradient runs/digits"),
    "attribute": (AttributeConfig, "What rows did:       rhc attribute runs/mnist-1a2b3c4d"),
    "distill": (DistillConfig, "A causal scheduler:  rhc distill runs/* -o policy"),
    "compare": (CompareConfig, "Methods x seeds:     rhc compare digits --seeds 5"),
    "weights": (WeightsConfig, "Which rows hurt:     rhc weights runs/noisy_mnist-1a2b"),
    "runs": (RunsConfig, "What can be trained, and what has been:  rhc runs"),
    "inspect": (InspectConfig, "What a run did:      rhc inspect runs/digits-1a2b3c4d"),
    "report": (ReportConfig, "One page of charts:  rhc report runs/digits-1a2b3c4d"),
    "watch": (WatchConfig, "Follow a run:        rhc watch runs/digits-1a2b3c4d"),
    "init": (InitConfig, "A run of your own:   rhc init my_run.py"),
}
"""The settings of each command and its line in `rhc --help`; `rhc.cli.NAME.run` runs it, or
`rhc.cli.show.NAME`."""

SHOWING = ("runs", "inspect", "report", "watch")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (default: the process's own) and returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        # A terminal without UTF-8 gets a question mark for "≥", not a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if argv is None and _is_rank(arguments):
        # A rank that waits for others cannot answer, and torchrun would wait for it.
        # Saved files are complete at any moment.
        interrupts.at_once(signal.SIGTERM)
    with interrupts.handled():
        status = _status(arguments)
    # A handler installed meanwhile would see the signal as Ctrl-C, and Python may swallow it.
    number = interrupts.received()
    if number is not None and (status == 130 or interrupts.asked()):
        status = interrupts.STATUS[number]
    if argv is None and _is_rank(arguments):
        from rhc.distributed import leave

        leave(status)
    return status


def _is_rank(arguments: Sequence[str]) -> bool:
    """Whether torchrun started this command on several ranks."""
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
    except SystemExit as stop:  # of the user's code
        return int(stop.code or 0)
    except OSError as error:
        # Of standard output, a file or a pipe: any other file has a name.
        if error.filename is not None or error.errno not in UNWRITABLE:
            raise
        with contextlib.suppress(OSError):  # discard the rest of the output
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            return 141  # like SIGPIPE: `rhc inspect DIR | head` is no error
        print(f"rhc: error: the output cannot be written ({error.strerror})", file=sys.stderr)
        return 3


UNWRITABLE = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EDQUOT)


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        print(f"rhc {__version__}")
        return 0
    if arguments[:1] == ["help"]:  # like git and pip
        arguments = [*arguments[1:2], "--help"]
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<14} {summary}" for name, (_, summary) in COMMANDS.items()]
        print("\n".join([OVERVIEW, *lines]))
        return 0
    if arguments[0] == "--completion":
        return _completion(arguments[1:])
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"unknown command {name!r}: {hint}there are: {', '.join(COMMANDS)}; see rhc --help"
        )
    if {"-h", "--help", "--help-all"} & set(rest):
        print(page(name, COMMANDS[name][0], whole="--help-all" in rest))
        return 0
    config = parsed(name, rest).checked()  # before torch is imported, to fail at once
    from rhc.report.live import Screen

    screen = Screen()
    with screen.waiting("loading torch") if name == "train" else nullcontext():
        module, function = ("show", name) if name in SHOWING else (name, "run")
        command = getattr(importlib.import_module(f"rhc.cli.{module}"), function)
    status: int = command(config, screen)
    return status


def parsed(name: str, words: Sequence[str]) -> Settings:
    below = None
    if name == "train" and (source := _named_file(words)) is not None:
        below = replace(TrainConfig.from_file(source), config=source)
    usual = None if below is None else replace(below, run="")
    config: Any = parsed_flags(name, COMMANDS[name][0], words, usual, _of_runner)
    if below is not None and below.config is not None and not config.run:  # RUN is not given
        refuse_strange(below.run, below.config, trust=config.trust)
        config = replace(config, run=below.run)
    if isinstance(run := getattr(config, "run", None), str):
        config = replace(config, run=with_function(run))
    return config


def _of_runner(flag: str, words: Sequence[str]) -> bool:
    """Whether the function of the RUN among these words has a keyword of the flag's name."""
    from rhc.cli.building import keywords_of

    name = flag[2:].replace("-", "_")
    return any(name in keywords_of(word) for word in words if word[:1] != "-")


def _named_file(words: Sequence[str]) -> Path | None:
    """The file of --config, whose settings flags override."""
    path: str | None = None
    for place, word in enumerate(words):
        flag, given, value = word.partition("=")
        if flag == "--config":
            path = value if given else next(iter(words[place + 1 :]), None)
    return Path(path) if path and path[:2] != "--" else None


def _completion(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or arguments[0] not in SHELLS:
        raise InputError(
            f"--completion takes one of {', '.join(SHELLS)}, got {' '.join(arguments) or 'none'}; "
            'try: eval "$(rhc --completion bash)"'
        )
    print(completion(arguments[0], {name: flags for name, (flags, _) in COMMANDS.items()}))
    return 0

"""TrainConfig: the one source of `rhc train`'s flags, of a --config file and of config.json.

Every check here is cheap and needs no torch, so that a mistyped flag is answered at once. What
depends on the model or the numerics is checked where it is used.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro.conf
from tyro.conf import arg

from rhc.errors import InputError, whole_number
from rhc.storage.files import MOST_TOML_BYTES, parsed_json, parsed_toml, read_regular
from rhc.workload import OPTIMIZERS, Workload, usual_lr, usual_weight_decay

RECORD_VERSION = 1
"""Of the command line's part of config.json."""

STARTS = ("zero", "probe", "given")
TEMPLATES = ("constant", "cosine", "linear", "wsd", "1cycle")
"""Starts and templates are those of rhc.loop.lr_search and rhc.schedule, which import torch."""
ENGINES = ("adjoint",)
PRODUCTS = (
    *("auto", "exact", "forward-over-reverse", "forward-difference", "central-difference"),
    "none",
)
"""Those of rhc.hypergradient.hvp, which imports torch; a test holds the two together."""
DEVICES = ("auto", "cpu", "cuda")
RESUMES = ("auto", "never")


MOST_STEPS = 50_000_000
"""Of a run: it is planned step by step, which takes 8 bytes for every control of each."""

MOST = {
    **dict.fromkeys(("steps", "window"), MOST_STEPS),
    **dict.fromkeys(("accumulate", "objective_batches", "width"), 10**5),
    "batch_size": 10**8,
    # A run may have begun on a larger machine.
    "threads": max(256, 4 * (os.cpu_count() or 1)),
    "jobs": 1024,
    "seeds": 10**5,
}
"""Of settings that memory goes by: more is a slip of the finger, or somebody's joke."""


def check_most(name: str, value: Any) -> None:
    """An InputError where a setting is beyond `MOST`."""
    if value is not None and value > MOST.get(name, value):
        raise InputError(f"{name} must be ≤ {MOST[name]}, got {value}; lower {_flag(name)}")


TRAIN_FLAGS = {
    "what is trained": ("run data steps seed device", "threads deterministic"),
    "the optimizer": (
        "optimizer lr momentum weight_decay clip_norm",
        "clip_value nesterov accumulate",
    ),
    "its schedule": ("start template rewrite", "warmup cooldown"),
    "hindsight": (
        "window controls budget product",
        "stride until per_group average objective_batches segment memory_budget discount "
        "costate_clip engine",
    ),
    "files": (
        "directory config print_config",
        "resume validate_every keep_checkpoints tensorboard plan trust",
    ),
}
"""Headings of the help: the flags that are given often, and those that `--help-all` adds."""

REWRITING: dict[str, Any] = {
    "controls": None,
    "per_group": None,
    "cooldown": None,
    "until": None,
    "budget": None,
    "average": None,
    "objective_batches": None,
    "product": "auto",
    "segment": "auto",
    "memory_budget": None,
    "discount": 1.0,
    "costate_clip": None,
    "plan": False,
}
"""Settings that mean nothing where nothing is rewritten, with their values where none was given."""


def _unset(meaning: str, metavar: str) -> Any:
    """How help shows a flag whose default is decided later."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {meaning})")


@dataclass(frozen=True)
class TrainConfig:
    """What `rhc train` does. Each field's sentence is the help of its flag."""

    run: Annotated[tyro.conf.Positional[str], arg(metavar="[RUN]")] = "digits"
    """A name of `rhc runs`, or file.py:function. file.py alone is file.py:file."""

    window: Annotated[int, arg(metavar="K")] = 50
    """Steps that are looked back at and rewritten at once. They are rolled, differentiated,
    rewritten and replayed together."""
    stride: Annotated[int | None, _unset("the window", "M")] = None
    """Steps committed before sliding on. At most the window; fewer is
    model-predictive control, at window / stride times the cost."""
    steps: Annotated[int | None, _unset("the run's own", "T")] = None
    """Optimizer steps in all."""

    optimizer: Annotated[str | None, _unset("the run's own", "NAME")] = None
    """sgd, adam or adamw. Also nadam, radam, adamax, rmsprop, adagrad of torch.optim."""
    lr: Annotated[float | None, _unset("it is found", "A")] = None
    """Learning rate to start from. A first guess, or what is kept with --start given, where it is
    the run's own by default."""
    momentum: Annotated[float, arg(metavar="MU")] = 0.9
    """Momentum of sgd, β1 of the Adams. To start from; also of rmsprop; adagrad has none."""
    weight_decay: Annotated[float | None, _unset("0; 0.01 for adamw", "W")] = None
    """Weight decay. To start from, where it is among --controls."""
    nesterov: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Nesterov's momentum, for sgd."""
    clip_norm: Annotated[float | None, _unset("no clipping", "C")] = None
    """Norm that gradients are clipped to. Of all parameters together."""
    clip_value: Annotated[float | None, _unset("no clipping", "C")] = None
    """Absolute value that every element of the gradient is clipped to."""
    accumulate: Annotated[int, arg(metavar="N")] = 1
    """Batches per optimizer step. It goes by the gradient of the mean of their losses."""

    controls: Annotated[tuple[str, ...] | None, _unset("lr", "NAME …")] = None
    """Some of lr, momentum, noise, weight_decay. Those are rewritten."""
    per_group: Annotated[tuple[str, ...] | None, _unset("none", "NAME …")] = None
    """Those of --controls with a value per parameter group. The others keep the groups' ratios."""
    rewrite: Annotated[bool, arg(help_behavior_hint="(default: rewrite)")] = True
    """--no-rewrite Train as the plain loop does. Bit for bit."""
    start: Annotated[
        str | None,
        _unset("by --lr", "NAME"),
    ] = None
    """zero, probe or given: how lr is found. zero needs no --lr, and finds one for every parameter
    group by a hypergradient and short rolls; probe takes --lr for a first guess; given keeps it.
    zero by default, probe with --lr, given with --no-rewrite."""
    template: Annotated[str | None, _unset("by --start", "NAME")] = None
    """constant, cosine, linear, wsd or 1cycle. The shape of lr, to be rewritten or followed. By
    default cosine, linear for the Adams; with --start given wsd, and constant with --no-rewrite."""
    warmup: Annotated[float | None, _unset("0.1 for a start of adam, adamw; else 0", "F")] = None
    """Fraction of the run over which lr rises linearly to the template."""
    cooldown: Annotated[float | None, _unset("0.2", "F")] = None
    """Fraction of the run, at its end, over which lr falls linearly to 0; 0 for none."""
    until: Annotated[float | None, _unset("0.1; 1 for a given start", "F")] = None
    """Fraction of the run in which windows are looked back at. After it the schedule is followed
    as it then stands."""
    budget: Annotated[float | None, _unset("5; none for a given start", "X")] = None
    """Plain runs that it may cost. Windows beyond it are followed as planned."""
    average: Annotated[float | None, _unset("0.99", "D")] = None
    """A window is judged at the average of its iterates with this decay; 0 for the last one."""
    objective_batches: Annotated[int | None, _unset("4", "N")] = None
    """Validation batches that a window is judged on."""
    product: Annotated[str, arg(metavar="NAME")] = "auto"
    """Hessian products: exact, none and others. exact, forward-over-reverse, or approximately
    forward-difference (half the cost) or central-difference; none leaves the Hessian out. auto is
    none where the start is looked for, else what is exact or agrees with it."""
    segment: Annotated[str, arg(metavar="N")] = "auto"
    """Steps per rebuilt graph: 1 (least memory) to the window (fastest)."""
    memory_budget: Annotated[str | None, _unset("none", "SIZE")] = None
    """Memory that looking back may take beyond plain training: bytes, 500MB, 2GiB."""
    discount: Annotated[float, arg(metavar="G")] = 1.0
    """Factor on the costate at every step backwards; below 1 the far future counts less."""
    costate_clip: Annotated[float | None, _unset("none", "C")] = None
    """Largest norm of the costate, as a multiple of its norm at the window's end."""
    engine: Annotated[str, arg(metavar="adjoint")] = "adjoint"
    """How the run is differentiated."""

    deterministic: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only operators that give the same bits again; an error where there is none."""
    seed: Annotated[int, arg(metavar="S")] = 0
    """Seed of weights, batches, dropout and noise."""
    data: Annotated[Path | None, _unset("none", "DIR")] = None
    """Folder of the run's data, for runs that need one."""
    device: Annotated[str, arg(metavar="NAME")] = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    threads: Annotated[int | None, _unset("the run's own", "N")] = None
    """CPU threads of torch; small tensors are slower on several."""

    directory: Annotated[Path | None, _unset("runs/RUN-HASH", "DIR")] = None
    """Where the run is kept. By default one directory per configuration."""
    resume: Annotated[str, arg(metavar="auto|never")] = "auto"
    """auto continues the run that is there, never refuses it."""
    validate_every: Annotated[int | None, _unset("at the end alone", "N")] = None
    """Steps between losses on validation data in the tape. Taken after the window in which the step
    falls, as val_loss; a batch costs a third of a gradient."""
    keep_checkpoints: Annotated[int, arg(metavar="N")] = 3
    """Newest checkpoints that are kept."""
    tensorboard: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write event files. To DIR/tensorboard; needs the package tensorboard."""
    config: Annotated[Path | None, _unset("none", "FILE")] = None
    """A TOML file of such settings, or a run's config.json. Flags override it."""
    print_config: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the settings as such a file, and exit."""
    plan: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print what a window will cost in time and memory, and exit."""
    trust: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Run the file that --config names. Wherever it lies: it may be somebody else's."""

    # Checks ---------------------------------------------------------------------------------------

    def checked(self) -> TrainConfig:
        """These settings if they make sense by themselves; an InputError otherwise."""
        if self.start is not None:
            _one_of("start", self.start, STARTS)
        if self.template is not None:
            _one_of("template", self.template, TEMPLATES)
        _one_of("engine", self.engine, ENGINES, "'higher' is for rhc.hypergradient alone")
        _one_of("product", self.product, PRODUCTS)
        _one_of("device", self.device, DEVICES)
        _one_of("resume", self.resume, RESUMES)
        if self.optimizer is not None:
            _one_of("optimizer", self.optimizer, OPTIMIZERS, "only these have dynamics")
        for name, least, example in (
            ("window", 1, 50),
            ("steps", 1, 1000),
            ("seed", 0, 0),
            ("threads", 1, 1),
            ("objective_batches", 1, 4),
            ("keep_checkpoints", 1, 3),
            ("accumulate", 1, 1),
            ("validate_every", 1, 100),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(
                    f"{name} must be ≥ {least}, got {value}; try {_flag(name)} {example}"
                )
            check_most(name, value)
        if self.seed >= 2**32:
            raise InputError(f"seed must be below 2**32, got {self.seed}; try --seed 0")
        if self.stride is not None and not 1 <= self.stride <= self.window:
            raise InputError(
                f"stride must be in [1, {self.window}] for window={self.window}, got "
                f"{self.stride}; lower --stride or raise --window"
            )
        if self.cooldown is not None and not 0 <= self.cooldown < 1:
            raise InputError(
                f"cooldown must be in [0, 1), got {self.cooldown:g}; it is a fraction of the run, "
                "try --cooldown 0.2"
            )
        if self.warmup is not None and not 0 <= self.warmup < 1:
            raise InputError(
                f"warmup must be in [0, 1), got {self.warmup:g}; it is a fraction of the run, "
                "try --warmup 0.1"
            )
        if self.until is not None and not 0 < self.until <= 1:
            raise InputError(
                f"until must be in (0, 1], got {self.until:g}; it is a fraction of the run, "
                "try --until 0.5"
            )
        if self.budget is not None and not self.budget >= 1:
            raise InputError(f"budget must be ≥ 1 plain run, got {self.budget:g}; try --budget 5")
        if self.average is not None and not 0 <= self.average < 1:
            raise InputError(
                f"average must be in [0, 1), got {self.average:g}; it is a decay, "
                "try --average 0.99"
            )
        for name in ("clip_norm", "clip_value"):
            level = getattr(self, name)
            if level is not None and not level > 0:
                raise InputError(
                    f"{name} must be > 0, got {level:g}; leave {_flag(name)} out not to clip"
                )
        if self.clip_norm is not None and self.clip_value is not None:
            raise InputError(
                f"clip_norm and clip_value cannot go together, got {self.clip_norm:g} and "
                f"{self.clip_value:g}; leave --clip-norm or --clip-value out"
            )
        if not 0 < self.discount <= 1:
            raise InputError(
                f"discount must be in (0, 1], got {self.discount:g}; leave --discount out for none"
            )
        if self.costate_clip is not None and not self.costate_clip > 0:
            raise InputError(
                f"costate_clip must be > 0, got {self.costate_clip:g}; leave --costate-clip out "
                "for none"
            )
        self._check_segment()
        if self.memory_budget is not None:
            parsed_bytes(self.memory_budget)
        if self.data is not None and not self.data.exists():
            raise InputError(f"data {self.data} does not exist; give --data an existing folder")
        checked = self
        if self.controls is not None:
            names = _names(self.controls)
            if not names:
                raise InputError("controls is empty; name some, or rewrite none with --no-rewrite")
            checked = replace(self, controls=names)
        if self.per_group is not None:
            names = _names(self.per_group)
            if not names:
                raise InputError("per_group is empty; name some controls, or leave --per-group out")
            checked = replace(checked, per_group=names)
        checked._check_used()
        return checked

    def _check_segment(self) -> None:
        if self.segment == "auto":
            return
        if not self.segment.isdecimal() or not 1 <= int(self.segment) <= self.window:
            raise InputError(
                f"segment must be auto or in [1, {self.window}] for window={self.window}, got "
                f"{self.segment!r}; try --segment auto"
            )

    def _check_used(self) -> None:
        """A setting that would be ignored is an error, not a silence."""
        if not self.rewrite:
            for name, unset in REWRITING.items():
                if getattr(self, name) != unset:
                    raise InputError(
                        f"{name} is about rewriting, which --no-rewrite turns off, and got "
                        f"{_text(getattr(self, name))}; leave {_flag(name)} or --no-rewrite out"
                    )
        elif self.controls is not None and "lr" not in self.controls and self.cooldown:
            raise InputError(
                f"cooldown is of an lr that is rewritten, got {self.cooldown:g} with controls "
                f"{_text(self.controls)}; add lr to --controls or leave --cooldown out"
            )
        if self.nesterov and (self.optimizer not in (None, "sgd") or self.momentum == 0):
            raise InputError(
                f"nesterov needs sgd with momentum, got optimizer {self.optimizer or 'sgd'} with "
                f"momentum {self.momentum:g}; leave --nesterov out"
            )

    # Resolution -----------------------------------------------------------------------------------

    def resolved(self, workload: Workload, threads: int) -> TrainConfig:
        """These settings with the workload's defaults filled in; threads: where it has none."""
        optimizer = self.optimizer or workload.optimizer
        _one_of("optimizer", optimizer, OPTIMIZERS, "only these have dynamics")
        if optimizer == "adagrad" and self.momentum != TrainConfig.momentum:
            raise InputError(
                f"adagrad has no momentum, got {self.momentum:g}; leave --momentum out"
            )
        lr = self.lr if self.lr is not None else usual_lr(workload, optimizer)
        if lr is None:
            raise InputError(f"lr: run {self.run!r} has no default for {optimizer}; give --lr")
        decay = self.weight_decay
        if decay is None:
            decay = usual_weight_decay(optimizer)
        return replace(
            self,
            optimizer=optimizer,
            lr=float(lr),
            weight_decay=decay,
            steps=whole_number("steps", workload.steps if self.steps is None else self.steps),
            stride=self.window if self.stride is None else self.stride,
            start=self.start or self._usual_start(),
            data=None if self.data is None else self.data.resolve(),
            threads=whole_number("threads", self.threads or workload.threads or threads),
            run=_absolute(self.run),
        ).checked()

    def _usual_start(self) -> str:
        if not self.rewrite:
            return "given"
        return "zero" if self.lr is None else "probe"

    @property
    def short_name(self) -> str:
        """The run's name as part of a directory's name: a file's runner by its function."""
        return self.run.rpartition(":")[2]

    # Records --------------------------------------------------------------------------------------

    def to_record(self) -> dict[str, Any]:
        """All settings as flat JSON values; trust is for one command alone."""
        names = [f.name for f in fields(self) if f.name != "trust"]
        return {name: _plain(getattr(self, name)) for name in names}

    @classmethod
    def from_record(cls, values: Mapping[str, Any], source: str) -> TrainConfig:
        """The inverse of `to_record`; what is absent has its default.

        Raises InputError for an unknown name or a value of another type, naming `source`.
        """
        return from_record(cls, values, source)

    @classmethod
    def from_run(cls, record: Mapping[str, Any], path: Path) -> TrainConfig:
        """The settings of a run of `rhc train`, from its config.json, which is at `path`.

        In no directory of their own: whoever trains by them says where.
        """
        if "run" not in record:
            raise InputError(
                f"{path} was written by rhc.Runner in a script, not by rhc train; run that script "
                "again to continue"
            )
        if record.get("version") != RECORD_VERSION:
            raise InputError(
                f"{path} has version {record.get('version')!r}, this rhc reads version "
                f"{RECORD_VERSION}; continue with the rhc that began the run"
            )
        values = {name: record[name] for name in cls().to_record() if name in record}
        values["rewrite"] = record.get("rewrite") is not False
        values["controls"] = record.get("controls") or None
        values["device"] = str(record.get("device", "auto")).partition(":")[0]
        found = cls.from_record(values, str(path))
        return replace(found, directory=None, resume="auto", config=None)

    @classmethod
    def from_file(cls, path: Path) -> TrainConfig:
        """Settings from a TOML file, or from the config.json of a run; errors name the file."""
        if path.suffix != ".json":
            return cls.from_toml(path)
        try:
            record = parsed_json(read_regular(path.resolve(), MOST_TOML_BYTES))
        except OSError as error:
            raise InputError(
                f"config {path} cannot be read ({error.strerror}); give --config the config.json "
                "of a run"
            ) from None
        except ValueError as error:
            raise InputError(f"config {path} is not valid JSON ({error}); mend the file") from None
        if not isinstance(record, dict):
            raise InputError(f"config {path} holds no settings; give the config.json of a run")
        command = "smooth" if "pass" in record else record.get("command")
        if command is not None:
            raise InputError(
                f"{path} is of a run of rhc {command}, which rhc train cannot repeat; use "
                f"rhc {command}"
            )
        # Without a format it is somebody's own file, with names as in TOML.
        if "format" not in record:
            return cls.from_record(record, str(path))
        return cls.from_run(record, path)

    @classmethod
    def from_toml(cls, path: Path) -> TrainConfig:
        """Settings from a TOML file; errors name the file."""
        try:
            values = parsed_toml(read_regular(path.resolve(), MOST_TOML_BYTES))
        except OSError as error:
            raise InputError(
                f"config {path} cannot be read ({error.strerror}); give --config a TOML file"
            ) from None
        except ValueError as error:
            raise InputError(f"config {path} is not valid TOML ({error}); mend the file") from None
        if "config" in values:
            raise InputError(f"{path}: config must not name another file; leave it out")
        return cls.from_record(values, str(path))

    def to_toml(self) -> str:
        """A file that `from_toml` reads; settings that are None are left out."""
        lines = []
        for name, value in self.to_record().items():
            if value is not None and name not in ("config", "print_config", "plan"):
                lines.append(f"{name} = {json.dumps(value, ensure_ascii=False)}")
        return "\n".join(lines) + "\n"


_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}
_UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}


def parsed_bytes(text: str) -> int:
    """A size in bytes: `1000000`, `500MB` (10⁶ each), `1.5 GiB` (2³⁰); InputError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", text.strip().lower())
    unit = None if match is None else _UNITS.get(match[2])
    number = 0.0 if match is None or unit is None else float(match[1]) * unit
    size = int(number) if number < 2**63 else 0
    if size < 1:
        raise InputError(
            f"memory_budget must be a number of bytes, such as 500MB or 2GiB, got {text!r}; try "
            "--memory-budget 2GiB"
        )
    return size


Settings = TypeVar("Settings")


def from_record(kind: type[Settings], values: Mapping[str, Any], source: str) -> Settings:
    """A dataclass of settings from names and JSON values; what is absent has its default.

    Raises InputError for an unknown name or a value of another type, naming `source`. trust is
    said on the command line alone.
    """
    hints = typing.get_type_hints(kind)
    hints.pop("trust", None)
    given: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in hints:
            raise InputError(
                f"{source}: unknown setting {key!r}; {_nearest(name, list(hints))}"
                "`rhc train --help` lists them"
            )
        given[name] = _typed(name, hints[name], value, source)
    return kind(**given)


def _one_of(argument: str, value: str, known: Sequence[str], remark: str = "") -> None:
    if value not in known:
        text = repr(known[0]) if len(known) == 1 else f"one of {', '.join(known)}"
        raise InputError(
            f"{argument} must be {text}, got {value!r}; {_nearest(value, known)}"
            f"{remark or f'give {_flag(argument)} one of these'}"
        )


def checked_choice(argument: str, value: str, known: Sequence[str]) -> None:
    """Raises InputError unless `value` is one of `known`."""
    _one_of(argument, value, known)


def _nearest(value: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(value, known, n=1, cutoff=0.7)
    return f"did you mean {near[0]!r}? " if near else ""


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _names(given: Sequence[str]) -> tuple[str, ...]:
    """Each name once, in order; `lr,momentum` is two."""
    return tuple(dict.fromkeys(name for part in given for name in part.split(",") if name))


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else f"{value}"


def _absolute(run: str) -> str:
    """A file's runner is recorded by its absolute path, so that a run resumes from anywhere."""
    path, separator, function = run.rpartition(":")
    return f"{Path(path).resolve()}:{function}" if separator and path.endswith(".py") else run


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def field_kind(hint: Any) -> tuple[type, bool]:
    """(the type that a field's value has, whether it may be None)."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(k for k in options if k is not type(None))
    return typing.get_origin(kind) or kind, type(None) in options


def _typed(name: str, hint: Any, value: Any, source: str) -> Any:
    """`value` as the field's type, or an InputError that says what it should be."""
    kind, optional = field_kind(hint)
    if value is None and optional:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number and abs(value) < 1e300:
        return float(value)
    if kind is int and number and isinstance(value, int):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and (
        isinstance(value, str) or (name in ("segment", "memory_budget") and number)
    ):
        return str(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is tuple and isinstance(value, str):
        return (value,)
    if kind is tuple and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    raise InputError(f"{source}: {name} must be {_KINDS[kind]}, got {value!r}; mend it there")


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path in quotes",
    tuple: "a list of names",
}

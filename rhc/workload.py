"""What is trained: the Workload that a runner returns, and how a runner is found by name.

A runner is a function that makes everything a run needs:

    def digits(*, seed: int = 0, data: Path | None = None) -> Workload

`rhc` never imports one. It is found through the entry-point group `rhc.runners`, which any package
can join, or as `path/to/file.py:function`. The caller seeds the global generator with `seed` before
it calls the runner, so that weights made in the usual way depend on the seed alone; a runner draws
nothing else from the global generator, and gives its data splits a generator of their own.

Importing this module does not import torch: `rhc --help` and `rhc runs` stay quick.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rhc import runner_files
from rhc.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

ENTRY_POINT_GROUP = "rhc.runners"

OPTIMIZERS = ("sgd", "adam", "adamw", "nadam", "radam", "adamax", "rmsprop", "adagrad")
"""What `optimizer_of` knows. Muon takes matrices alone: not a whole model."""


@dataclass(frozen=True)
class Goal:
    """What runs are compared by where it is not the test loss: a metric of every training step."""

    metric: str
    """A name among the metrics that loss_fn returns."""
    over: int
    """Steps of its running mean."""
    last: bool = True
    """The mean over the last of these counts; False for the mean over all steps."""
    higher: bool = False
    """Higher is better."""
    target: float | None = None
    """What a good run's running mean reaches."""


@dataclass(frozen=True)
class Plannable:
    """What an epoch planner can drive in a run beside its optimizer."""

    names: tuple[str, ...]
    """Of the values that there are knobs for, see `rhc.schedulers.VALUES`."""
    build: Callable[[Workload, Sequence[str]], tuple[Workload, list[Any]]]
    """(the workload, some of the names) -> the same run with these knobs, and the knobs."""
    epoch_steps: int | None = None
    """Steps of an epoch, where a pass over train_loader has no end."""
    returns: str | None = None
    """The metric that is a return played on fresh seeds, in reinforcement learning."""


@dataclass
class Workload:
    """What a runner hands to the command line: model, loss and data, with defaults that suit them.

    The loaders yield batches that loss_fn understands; rhc never looks inside a batch.
    """

    model: nn.Module
    """The weights of step 0."""
    loss_fn: Callable[[nn.Module, Any], Any]
    """(model, batch) -> scalar tensor, or (loss, {"accuracy": tensor, ...})."""
    train_loader: Iterable[Any]
    """One pass is one epoch; a shuffling loader is asked for a new order by each pass."""
    val_loader: Iterable[Any] | None = None
    """Data for objectives and choices; None where there is none."""
    test_loader: Iterable[Any] | None = None
    """Data for the final figures, on which nothing is chosen."""
    steps: int = 1000
    """Default number of optimizer steps."""
    optimizer: str = "sgd"
    """Default optimizer."""
    lr: Mapping[str, float] = field(
        default_factory=lambda: {"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3}
    )
    """Default learning rate for each optimizer by name."""
    parameter_groups: list[dict[str, Any]] | None = None
    """Passed to the optimizer in place of model.parameters()."""
    threads: int | None = None
    """Default CPU threads; None leaves it to torch. Small tensors are slower on several."""
    noise: float = 0.0
    """Gradient noise, relative to the RMS of the gradient, that a causal scheduler begins with."""
    goal: Goal | None = None
    """What `rhc compare` compares by; None for the test loss."""
    reward: Callable[[nn.Module, int, Mapping[str, Any]], float | None] | None = None
    """(model, steps taken, metrics of the step) -> what a causal scheduler is told beside the loss,
    after every step; None where there is nothing new. Its attribute `forward_passes`, where it has
    one, counts those of a training batch that it spent."""
    plannable: Plannable | None = None
    """What `rhc.EpochPlanner` can drive here beside lr, momentum and noise."""


def optimizer_of(
    name: str,
    parameters: Any,
    lr: float,
    *,
    momentum: float = 0.9,
    weight_decay: float | None = None,
    nesterov: bool = False,
) -> Optimizer:
    """The optimizer of torch.optim that has this name, one of OPTIMIZERS.

    momentum: β1 where it has betas; adagrad has neither. weight_decay: None for the usual one, 0.01
    for adamw and 0 for the others.
    """
    import torch

    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "sgd": (torch.optim.SGD, {"momentum": momentum, "nesterov": nesterov}),
        "rmsprop": (torch.optim.RMSprop, {"momentum": momentum}),
        "adagrad": (torch.optim.Adagrad, {}),
        "adam": (torch.optim.Adam, {"betas": (momentum, 0.999)}),
        "adamw": (torch.optim.AdamW, {"betas": (momentum, 0.999)}),
        "nadam": (torch.optim.NAdam, {"betas": (momentum, 0.999)}),
        "radam": (torch.optim.RAdam, {"betas": (momentum, 0.999)}),
        "adamax": (torch.optim.Adamax, {"betas": (momentum, 0.999)}),
    }
    kind, settings = kinds[name]
    decay = usual_weight_decay(name) if weight_decay is None else weight_decay
    made: Optimizer = kind(parameters, lr=lr, weight_decay=decay, **settings)
    return made


def usual_weight_decay(optimizer: str) -> float:
    return 0.01 if optimizer == "adamw" else 0.0


def usual_lr(workload: Workload, optimizer: str) -> float | None:
    """The workload's default for this optimizer; adam's where it has none of its own.

    None where it has neither, and for sgd, whose steps have another unit.
    """
    own = workload.lr.get(optimizer)
    return workload.lr.get("adam") if own is None and optimizer != "sgd" else own


def available_runners() -> dict[str, str]:
    """`module:function` of the installed runners by name, in alphabetical order; none is imported.

    Raises InputError where two packages claim one name, as either choice would be a silent one.
    """
    found: dict[str, str] = {}
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP):
        known = found.setdefault(entry.name, entry.value)
        if known != entry.value:
            raise InputError(
                f"runner {entry.name!r} is claimed by both {known} and {entry.value}: "
                "uninstall one of the two packages"
            )
    return dict(sorted(found.items()))


def runner_summary(target: str) -> str:
    """First line of the docstring of `module:function`; empty where there is none to be read.

    Parses the module's source instead of importing it, because a runner's module imports torch.
    """
    module_name, _, function_name = target.partition(":")
    try:
        spec = importlib.util.find_spec(module_name)
    except ImportError:  # a parent package is missing
        return ""
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return ""
    for node in ast.parse(Path(spec.origin).read_bytes()).body:
        if isinstance(node, ast.FunctionDef) and node.name == function_name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


def load_runner(name: str) -> Callable[..., Workload]:
    """The runner of that name; calling it checks that what it returns is a Workload.

    name: one of `available_runners()`, `path/to/file.py:function`, or `path/to/file.py` for the
    function that is called like the file.
    Raises InputError for an unknown name, a missing file or function, and a function that cannot be
    called with `seed` and `data`. An exception of the runner's own module passes through unchanged:
    its traceback is what its author needs.
    """
    name = with_function(name)
    path, _, function_name = name.rpartition(":")
    if path.endswith(".py"):
        function = _function_in_file(Path(path), function_name, name)
    else:
        function = _installed_function(name)
    try:
        inspect.signature(function).bind(seed=0, data=None)
    except TypeError as error:
        raise InputError(
            f"runner {name!r} cannot be called with seed and data ({error}): "
            "define it with (*, seed: int = 0, data: Path | None = None) -> Workload"
        ) from None

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Workload:
        workload = function(*args, **kwargs)
        if not isinstance(workload, Workload):
            raise InputError(
                f"runner {name!r} returned {type(workload).__name__}: "
                "return an rhc.workload.Workload"
            )
        return workload

    return checked


def with_function(name: str) -> str:
    """`my_run.py` as `my_run.py:my_run`; other names as they are."""
    return f"{name}:{Path(name).stem}" if name.endswith(".py") else name


def refuse_strange(run: str, path: Path, *, trust: bool) -> None:
    """An InputError where the settings in `path` name a file to run that is not the person's own.

    Settings may come from somebody else. A file of the current folder is run, unless it lies in the
    run's directory that names it; so is whatever is named as RUN, or where `trust` says so.
    """
    name = with_function(run).rpartition(":")[0]
    if trust or not name.endswith(".py"):
        return
    file, where = Path(name).resolve(), ""
    if path.suffix == ".json" and file.is_relative_to(path.parent.resolve()):
        where = "in the run's own directory"
    elif not file.is_relative_to(Path.cwd().resolve()):
        where = "outside the current folder"
    if where:
        raise InputError(
            f"{path} names the file {file}, {where}, which would be run: look at it, then say "
            "--trust, or name it as RUN of rhc train or replay"
        )


def _installed_function(name: str) -> Callable[..., Any]:
    runners = available_runners()
    if name not in runners:
        near = difflib.get_close_matches(name, runners, n=1)
        suggestion = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"unknown runner {name!r}: {suggestion}there are: {', '.join(runners) or 'none'}; "
            "or give path/to/file.py:function"
        )
    entry = metadata.EntryPoint(name=name, value=runners[name], group=ENTRY_POINT_GROUP)
    function: Callable[..., Any] = entry.load()
    return function


def _function_in_file(path: Path, function_name: str, name: str) -> Callable[..., Any]:
    if not path.is_file():
        raise InputError(
            f"runner {name!r}: there is no file {path} in {Path.cwd()}: correct the path"
        )
    module = module_of_file(path.resolve())
    function = getattr(module, function_name, None)
    if inspect.isroutine(function):
        return function
    own = [
        each
        for each, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    ]
    such = f", such as {', '.join(own[:4])}" if own else ""
    script = f"; a script that trains by itself is run by: python {path}"
    raise InputError(
        f"runner {name!r}: {path} defines no function {function_name!r}: give {path}:function "
        f"with the name of one that it defines{such}{script if hasattr(module, 'rhc') else ''}"
    )


def module_of_file(path: Path) -> ModuleType:
    """The module in that file; its folder joins sys.path, as in `python path/to/file.py`."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = runner_files.module_name(path)
    sys.modules.pop(name, None)  # the file may have changed since
    return importlib.import_module(name)

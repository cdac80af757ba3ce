"""Workload, which a runner returns, and how a runner is found by name; without importing torch.

A runner, `def digits(*, seed=0, data=None) -> Workload`, is an entry point of `rhc.runners`, or
`path/to/file.py:function`. Before the call the global generator is seeded with `seed`, for weights
alone: data are split by a generator of their own.
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
from typing import TYPE_CHECKING, Any, Literal, get_args

from rhc import runner_files
from rhc.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

ENTRY_POINT_GROUP = "rhc.runners"

OPTIMIZERS = ("sgd", "adam", "adamw", "nadam", "radam", "adamax", "rmsprop", "adagrad")
"""Names for `optimizer_of`. Muon takes only matrices, not a whole model."""

Template = Literal["constant", "cosine", "linear", "wsd", "1cycle"]
TEMPLATES: tuple[Template, ...] = get_args(Template)
"""Shapes of lr: constant; half a cosine; a line; warm-up, stable, decay (constant, then linear);
1cycle along half cosines (Smith, Topin 2019). `rhc.schedule` has their factors."""


@dataclass(frozen=True)
class Goal:
    """The metric that compares runs in place of the test loss."""

    metric: str
    """A name among the metrics of loss_fn."""
    over: int
    """Steps of its running mean."""
    last: bool = True
    """True for the mean over the last of these, False for that over all steps."""
    higher: bool = False
    """Whether higher is better."""
    target: float | None = None
    """Running mean that a good run reaches."""


@dataclass(frozen=True)
class Plannable:
    """What an epoch planner can drive beside the optimizer."""

    names: tuple[str, ...]
    """Values with knobs; see `rhc.schedulers.VALUES`."""
    build: Callable[[Workload, Sequence[str]], tuple[Workload, list[Any]]]
    """(workload, some of the names) -> (the workload with these knobs, the knobs)."""
    epoch_steps: int | None = None
    """Steps of an epoch, if train_loader is endless."""
    returns: str | None = None
    """In reinforcement learning, the metric that is a return on fresh seeds."""


@dataclass
class Workload:
    """Model, loss and data of a run, with defaults that suit them.

    Batches are opaque to rhc: only loss_fn must understand them.
    """

    model: nn.Module
    """The weights of step 0."""
    loss_fn: Callable[[nn.Module, Any], Any]
    """(model, batch) -> scalar tensor, or (loss, {"accuracy": tensor, ...})."""
    train_loader: Iterable[Any]
    """One pass is one epoch; a shuffling loader gives a new order in each."""
    val_loader: Iterable[Any] | None = None
    """Data for objectives and choices; None if there are none."""
    test_loader: Iterable[Any] | None = None
    """Data for the final figures alone."""
    steps: int = 1000
    """Default number of optimizer steps."""
    optimizer: str = "sgd"
    """Default optimizer."""
    lr: Mapping[str, float] = field(
        default_factory=lambda: {"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3}
    )
    """Default learning rate by optimizer."""
    parameter_groups: list[dict[str, Any]] | None = None
    """For the optimizer, in place of model.parameters()."""
    threads: int | None = None
    """Default CPU threads; None for torch's. Small tensors are slower on several."""
    noise: float = 0.0
    """Initial gradient noise of causal schedulers, relative to the gradient's RMS."""
    goal: Goal | None = None
    """What `rhc compare` compares by; None for the test loss."""
    reward: Callable[[nn.Module, int, Mapping[str, Any]], float | None] | None = None
    """(model, steps taken, metrics of the step) -> reward of a causal scheduler after each step,
    None if there is none. Its attribute `forward_passes`, if any, counts those it used, of a
    training batch."""
    plannable: Plannable | None = None
    """What `rhc.EpochPlanner` can drive beside lr, momentum and noise."""
    data_weights: Any = None
    """`rhc.DataWeights` that the run can learn; loss_fn then returns one loss per row, or terms."""


def optimizer_of(
    name: str,
    parameters: Any,
    lr: float,
    *,
    momentum: float = 0.9,
    weight_decay: float | None = None,
    nesterov: bool = False,
) -> Optimizer:
    """The torch.optim optimizer called `name`, one of OPTIMIZERS. momentum: or β1; adagrad has
    none. weight_decay: None for 0.01 with adamw, else 0."""
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
    """The workload's default for this optimizer, else adam's, except for sgd; or None."""
    own = workload.lr.get(optimizer)
    return workload.lr.get("adam") if own is None and optimizer != "sgd" else own


def available_runners() -> dict[str, str]:
    """Name -> `module:function` of the installed runners, sorted, without importing them.
    InputError where two packages claim one name."""
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
    """First line of the docstring of `module:function`, or ""; parsed: importing imports torch."""
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
    """The runner of that name; calling it checks that it returns a Workload.

    name: of `available_runners()`, or `path/to/file.py[:function]`. InputError if unknown or
    without arguments `seed` and `data`. Exceptions of the runner's module keep their traceback.
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
    """`my_run.py` as `my_run.py:my_run`; other names unchanged."""
    return f"{name}:{Path(name).stem}" if name.endswith(".py") else name


def refuse_strange(run: str, path: Path, *, trust: bool) -> None:
    """Raises InputError where settings in `path` name a file to run that may be somebody else's:
    outside the current folder or in the run's own directory, not named as RUN, and without
    `trust`."""
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
    """Imports a file; its folder joins sys.path, as in `python path/to/file.py`."""
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = runner_files.module_name(path)
    sys.modules.pop(name, None)  # the file may have changed since
    return importlib.import_module(name)

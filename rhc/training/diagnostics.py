"""What is wrong with a model, optimizer, loss or loader, and how to fix it, in one sentence."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import Dataset, IterableDataset

from rhc.containers import Kept
from rhc.errors import InputError

ORDER = "the order is Runner(model, optimizer, loss_fn, train_loader, val_loader)"

MENDS = (
    (
        r"expected (target dtype|scalar type|dtype).*(Long|Byte)",
        "class labels are integers, such as y.long()",
    ),
    (
        r"same dtype|expected scalar type|Found dtype|should be the same|not implemented for '",
        "data and model need one dtype: x.float() in loss_fn, or model.double()",
    ),
    (r"same device|device type", "the model and what loss_fn makes must be on one device"),
    (
        r"more than 1 value per channel",
        "BatchNorm cannot train on a batch of one row: drop_last=True in the DataLoader",
    ),
    (r"must be Tensor, not (tuple|list)", "the model returns several things: model(x)[0]"),
    (
        r"must be Tensor, not ",
        "loss_fn gets (model, batch), not (prediction, target): it calls model(batch[0]) itself",
    ),
    (r"cannot be multiplied|size mismatch|must match|size of tensor|Expected input batch_size",
     "the shapes do not fit each other"),
    (r"Target -?\d+ is out of bounds", "the model has fewer outputs than there are classes"),
    (r"index out of range in self", "an Embedding has fewer rows than there are indices"),
    (
        r"must be the same as input size",
        "prediction and target differ in shape: y.unsqueeze(1), or model(x).squeeze(1)",
    ),
    (r"positional argument|unexpected keyword", "loss_fn is called as loss_fn(model, batch)"),
    (r"indices must be|not subscriptable|KeyError|out of range",
     "it takes from the batch what is not there"),
)  # fmt: skip
"""Messages of torch and Python -> how to fix the cause; the first match counts."""

_OWN = Path(__file__).parent
_TORCH = Path(torch.__file__).parent


def check_parts(model: Any, optimizer: Any, loss_fn: Any) -> None:
    """Raises InputError where one of them has the wrong kind."""
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be an nn.Module, got {_called(model)}; {ORDER}")
    if isinstance(optimizer, (list, tuple, dict)) and len(optimizer) > 1:
        raise InputError(
            f"optimizer must be one, got {len(optimizer)}: players with losses of their own, as in "
            "a GAN or an actor-critic, have no single objective to look back from; give each its "
            "own rhc.AdaptiveRL (docs/when-not.md), or one optimizer with a group for each"
        )
    if not hasattr(optimizer, "param_groups") or isinstance(optimizer, type):
        raise InputError(
            f"optimizer must be an instance, got {_called(optimizer)}; make one: "
            "torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)"
        )
    for name, p in model.named_parameters():
        if is_lazy(p):
            raise InputError(
                f"parameter {name!r} has no shape yet; call the model on one batch first, and make "
                "the optimizer afterwards"
            )
        if p.is_meta:
            raise InputError(
                f"parameter {name!r} is on the meta device, without values; "
                "model.to_empty(device='cpu') and initialise it"
            )
    if not callable(loss_fn):
        raise InputError(
            f"loss_fn must be a function (model, batch) -> loss, got {_called(loss_fn)}; {ORDER}"
        )
    kind = type(loss_fn) if isinstance(loss_fn, nn.Module) else loss_fn
    if getattr(kind, "__module__", "") in ("torch.nn.modules.loss", "torch.nn.functional"):
        raise InputError(
            f"loss_fn must take (model, batch), and {_called(loss_fn)} takes predictions and "
            "targets; give: lambda model, batch: "
            f"{'criterion' if isinstance(loss_fn, nn.Module) else 'F.' + kind.__name__}"
            "(model(batch[0]), batch[1])"
        )
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):  # of a builtin, or hidden by a wrapper
        return
    try:
        signature.bind(model, None)
    except TypeError:
        raise InputError(
            f"loss_fn is called as loss_fn(model, batch), and takes {signature}; give: "
            "lambda model, batch: …"
        ) from None


def check_loader(name: str, loader: Any) -> None:
    """Raises InputError where it cannot be a loader of batches; None is accepted."""
    if loader is None:
        return
    several = isinstance(loader, Iterable) or hasattr(loader, "__getitem__")
    if not several or isinstance(loader, (str, bytes, Tensor)):
        raise InputError(f"{name} must yield batches, got {_called(loader)}; {ORDER}")
    indexed = isinstance(loader, Dataset) and not isinstance(loader, IterableDataset)
    if indexed and not hasattr(type(loader), "__iter__"):
        raise InputError(
            f"{name} must yield batches, and {_called(loader)} yields single examples; give "
            f"DataLoader({name}, batch_size=32), or batch_size=None where they are batches"
        )


def mend_of(error: BaseException) -> str | None:
    """How to fix the cause; None if unknown."""
    said = f"{type(error).__name__}: {error}"
    return next((mend for pattern, mend in MENDS if re.search(pattern, said)), None)


def explained(error: BaseException, where: str, model: nn.Module, batch: Any) -> str:
    """How loss_fn failed, `where` ("at the first batch of train_loader"), on what, and the fix."""
    said = " ".join(str(error).split())
    said = f"{type(error).__name__}: {said[:200]}{'…' if len(said) > 200 else ''}"
    mend = mend_of(error) or "try it alone: loss_fn(model, next(iter(train_loader)))"
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not {_OWN, _TORCH} & {*Path(frame.filename).parents}
    ]
    line = f", {Path(own[-1].filename).name} line {own[-1].lineno}" if own else ""
    where = f" {where}" if where else ""
    return (
        f"loss_fn failed{where} ({said}{line}); the batch is {described(batch)}, the model "
        f"{_described(model)}: {mend}"
    )


def described(batch: Any) -> str:
    """A batch in words: `a list of float32 (32, 8), int64 (32,)`."""
    if isinstance(batch, Kept):
        return described(batch.batch)
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        parts = [f"{key}: {described(value)}" for key, value in list(batch.items())[:6]]
    elif isinstance(batch, (list, tuple)):
        parts = [described(value) for value in batch[:6]]
    else:
        return _called(batch)
    return f"a {type(batch).__name__} of {', '.join(parts) or 'nothing'}"


def _described(model: nn.Module) -> str:
    first = next(model.parameters(), None)
    if first is None:
        return type(model).__name__
    return f"{type(model).__name__} of {str(first.dtype).removeprefix('torch.')} on {first.device}"


def _called(value: Any) -> str:
    """`the class SGD`, `a DataLoader`, `the function f`."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeio' else 'a'} {name}"

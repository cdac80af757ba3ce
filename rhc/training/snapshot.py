"""A copy of everything a step can change: in memory, as named tensors and JSON, and back."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import keystr, tree_flatten_with_path

from rhc.containers import same
from rhc.distributed import read_parts, shared_as
from rhc.errors import InputError
from rhc.rng import RandomState, preserved
from rhc.storage.trees import joined, parted
from rhc.training.module_state import Buffers, Captured

if TYPE_CHECKING:
    from rhc.training.plant import Plant

Tensors = dict[str, dict[str, Tensor]]
"""Group (model, optimizer, rng, …) -> name -> tensor."""


@dataclass(frozen=True)
class Snapshot:
    """A copy in memory of everything a step can change.

    parameters, buffers: by name; a buffer may be None. slots: one dict per parameter. groups: the
    hyperparameters. rng: the global random state. attributes: of modules; None from a checkpoint.
    others: the optimizer's state under keys that are no parameters.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor | None]
    slots: list[dict[str, Any]]
    groups: list[dict[str, Any]]
    rng: RandomState
    attributes: Captured | None = None
    others: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def of(cls, plant: Plant) -> Snapshot:
        """The current state; `optimizer.state_dict()` would alias the live tensors."""
        state = plant.optimizer.state
        return cls(
            {n: p.detach().clone() for n, p in plant.model.named_parameters()},
            Buffers(plant.model).copies(),
            [_copied(dict(state.get(p, {}))) for p in plant.owned],
            [_copied({k: v for k, v in g.items() if k != "params"}) for g in plant.groups],
            RandomState.capture(),
            plant.attributes(),
            _copied({k: v for k, v in state.items() if not isinstance(k, Tensor)}),
        )

    @torch.no_grad()
    def put(self, plant: Plant) -> None:
        """Restores the state in place; the snapshot stays usable."""
        for name, parameter in plant.model.named_parameters():
            parameter.copy_(self.parameters[name])
        Buffers(plant.model).put(self.buffers)
        if self.attributes is not None:
            self.attributes.restore()
        state = plant.optimizer.state
        for p, slots in zip(plant.owned, self.slots, strict=True):
            if slots:
                live = state[p]
                for key in live.keys() - slots.keys():
                    del live[key]
                _put(live, slots)
            else:
                state.pop(p, None)
        for group, values in zip(plant.groups, self.groups, strict=True):
            _put(group, values)
        for key in [k for k in state if not isinstance(k, Tensor)]:
            del state[key]
        state.update(_copied(self.others))
        self.rng.restore()


def state_difference(plant: Plant, first: Snapshot, second: Snapshot) -> tuple[str, float] | None:
    """(what differs in a bit, by which share of its largest element), of this rank's parts of
    parameters, buffers, optimizer state and the global random state; None for nothing."""
    local = plant.parallel.local
    names = [name for group in plant.names for name in group]

    def leaves(snapshot: Snapshot) -> dict[str, Any]:
        known: list[tuple[str, Any]] = [
            (f"parameter {name!r}", value) for name, value in snapshot.parameters.items()
        ]
        known += [(f"buffer {name!r}", value) for name, value in snapshot.buffers.items()]
        own = [*zip(names, snapshot.slots, strict=True), ("all", snapshot.others)]
        for name, slots in own:
            for path, value in tree_flatten_with_path(slots)[0]:
                known.append((f"the optimizer's {keystr(path)} of {name!r}", value))
        return {what: local(value) for what, value in known}

    before, after = leaves(first), leaves(second)
    for what in before | after:
        a, b = before.get(what), after.get(what)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if not same(a, b):
                return what, _apart(a, b)
        elif isinstance(a, (Tensor, float, int)) and a != b:
            return what, math.inf
    return None if first.rng.same(second.rng) else ("the global random state", math.inf)


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return math.inf
    found = float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-30))
    return found if math.isfinite(found) else math.inf


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(_copied(v) for v in value)
    if isinstance(value, dict):
        found = copy.copy(value)
        found.update({k: _copied(v) for k, v in value.items()})
        return found
    return value


def _put(live: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Updates tensors in their memory, which others may share; everything else is copied."""
    for key, value in values.items():
        if isinstance(value, Tensor) and isinstance(live.get(key), Tensor):
            live[key].copy_(value)
        else:
            live[key] = _copied(value)


# Checkpoints --------------------------------------------------------------------------------------


def snapshot_to_tensors(plant: Plant, snapshot: Snapshot) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by group, rest of the optimizer for JSON); InputError if it cannot be stored."""
    model = {f"parameter.{n}": t for n, t in snapshot.parameters.items()}
    model |= {f"buffer.{n}": t for n, t in snapshot.buffers.items() if t is not None}
    tensors: dict[str, Tensor] = {}

    def records(prefix: str, values: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        return [
            {key: parted(v, f"{prefix}.{i}.{key}", tensors) for key, v in record.items()}
            for i, record in enumerate(values)
        ]

    rest = {
        "names": plant.names,
        "slots": records("slot", snapshot.slots),
        "groups": records("group", snapshot.groups),
        "others": parted(snapshot.others, "others", tensors),
        "own": parted(_own_entries(plant.optimizer), "own", tensors),
    }
    return {"model": model, "optimizer": tensors, "rng": snapshot.rng.to_tensors()}, rest


def _own_entries(optimizer: Optimizer) -> dict[str, Any]:
    """What a custom class adds to `state_dict()` besides state and groups."""
    if type(optimizer).state_dict is Optimizer.state_dict:
        return {}
    found = optimizer.state_dict()
    return {k: v for k, v in found.items() if k not in ("state", "param_groups")}


def places(plant: Plant, rest: Mapping[str, Any]) -> list[int]:
    """Each parameter's position in the checkpoint's optimizer; InputError if groups differ."""
    slots, groups = len(rest["slots"]), len(rest["groups"])
    if slots != len(plant.parameters) or groups != len(plant.optimizer.param_groups):
        raise InputError(
            f"the checkpoint's optimizer has {slots} parameters in {groups} groups, this one "
            f"{len(plant.parameters)} in {len(plant.optimizer.param_groups)}; resume with the "
            "optimizer that the run began with"
        )
    now = plant.names
    began = rest.get("names", now)  # old checkpoints have the order only
    for index, (were, are) in enumerate(zip(began, now, strict=True)):
        for name in are:
            if name not in were:
                raise InputError(
                    f"parameter {name!r} is in group {index} of the optimizer and was not; resume "
                    "with the groups that the run began with, in their order"
                )
    place = {name: i for i, name in enumerate(name for were in began for name in were)}
    return [place[name] for are in now for name in are]


def with_parts(plant: Plant, tensors: Tensors, rest: Mapping[str, Any], folder: Path) -> Tensors:
    """A checkpoint's tensors with this process's parts of those that ranks wrote into `folder`."""
    parameters = dict(plant.model.named_parameters())
    owned = {str(place): p for place, p in zip(places(plant, rest), plant.owned, strict=True)}

    def like(name: str) -> Tensor | None:
        group, _, path = name.partition(".")
        if group == "model":
            return parameters.get(path.removeprefix("parameter."))
        return owned.get(path.removeprefix("slot.").partition(".")[0])

    found = {group: dict(own) for group, own in tensors.items()}
    for name, tensor in read_parts(folder, like).items():
        group, _, path = name.partition(".")
        found.setdefault(group, {})[path] = tensor
    return found


def snapshot_from_tensors(plant: Plant, tensors: Tensors, rest: Mapping[str, Any]) -> Snapshot:
    """The inverse of `snapshot_to_tensors`; InputError for names or shapes that the model lacks."""
    found, buffers = tensors["model"], Buffers(plant.model).live()
    _check_model(plant.model, found, buffers)
    order = places(plant, rest)
    placed = _on_their_devices(plant, tensors["optimizer"], order)
    slots, groups = (
        [{key: joined(v, placed) for key, v in record.items()} for record in rest[name]]
        for name in ("slots", "groups")
    )
    if "names" not in rest:
        _complete(slots, groups, placed)
    for group in groups:
        group.pop("param_names", None)  # the live optimizer's own, in its own order
    rng = RandomState.from_tensors(tensors["rng"])
    with preserved():
        rng.restore()  # raise what torch, numpy or Python raise
    return Snapshot(
        {n: shared_as(found[f"parameter.{n}"], p) for n, p in plant.model.named_parameters()},
        dict.fromkeys(buffers)
        | {n.removeprefix("buffer."): b for n, b in found.items() if n.startswith("buffer.")},
        [slots[place] for place in order],
        groups,
        rng,
        others=joined(rest.get("others", {}), placed),
    )


def _check_model(
    model: nn.Module, found: Mapping[str, Tensor], buffers: Mapping[str, Tensor | None]
) -> None:
    """Raises InputError for another model; buffers may differ in shape or be missing."""
    expected: dict[str, Tensor] = {f"parameter.{n}": p for n, p in model.named_parameters()}
    expected |= {f"buffer.{n}": b for n, b in buffers.items() if b is not None}
    modules = dict(model.named_modules())
    for name in expected.keys() ^ found.keys():
        module = name.removeprefix("buffer.").rpartition(".")[0]
        if name in found and name.startswith("buffer.") and module in modules:
            continue
        where = "checkpoint" if name in found else "model"
        raise InputError(
            f"{name} is in the {where} only; resume with the model that the run began with"
        )
    for name, live in expected.items():
        value = found[name]
        same_shape = name.startswith("buffer.") or value.shape == live.shape
        if not same_shape or value.dtype != live.dtype:
            raise InputError(
                f"{name} is {tuple(value.shape)} of {value.dtype} in the checkpoint, "
                f"{tuple(live.shape)} of {live.dtype} in the model; resume with the model that the "
                "run began with"
            )


def _on_their_devices(
    plant: Plant, tensors: Mapping[str, Tensor], order: Sequence[int]
) -> dict[str, Tensor]:
    """The optimizer's tensors, slots on their parameters' devices; InputError for other shapes."""
    known = _is_differentiable(plant)
    groups = [g for g in plant.optimizer.param_groups for _ in g["params"]]
    placed = dict(tensors)
    for name, value in tensors.items():
        kind, _, path = name.partition(".")
        if kind != "slot":
            continue
        index, _, key = path.partition(".")
        here = order.index(int(index))
        owner, group = plant.owned[here], groups[here]
        if known and value.numel() != 1 and value.shape != owner.shape:
            raise InputError(
                f"the optimizer's {key} of parameter {index} is {tuple(value.shape)} in the "
                f"checkpoint, its parameter {tuple(owner.shape)}; resume with the optimizer that "
                "the run began with"
            )
        # torch keeps the step count on the CPU unless asked otherwise.
        if key != "step":
            placed[name] = shared_as(value.to(owner.device), owner)
        elif group.get("capturable") or group.get("fused"):
            placed[name] = value.to(owner.device)
    return placed


def _is_differentiable(plant: Plant) -> bool:
    """Whether slots are known to be numbers, or of the parameter's shape."""
    try:
        return bool(plant.differentiable)
    except InputError:
        return False


def _complete(
    slots: list[dict[str, Any]], groups: list[dict[str, Any]], tensors: Mapping[str, Tensor]
) -> None:
    """Completes the JSON of an old checkpoint, without places of tensors and tuples."""
    for group in groups:
        group |= {k: tuple(v) for k, v in group.items() if isinstance(v, list)}
    for name, value in tensors.items():
        kind, index, key = name.split(".", 2)
        (slots if kind == "slot" else groups)[int(index)][key] = value


def adopt(plant: Plant, tensors: Tensors, rest: Mapping[str, Any], snapshot: Snapshot) -> None:
    """Puts the plant into the state of a snapshot by `snapshot_from_tensors`."""
    own = joined(rest.get("own", {}), tensors["optimizer"])
    if own:
        optimizer, count = plant.optimizer, iter(range(len(plant.owned)))
        groups = [
            {**values, "params": [next(count) for _ in group["params"]]}
            for values, group in zip(snapshot.groups, optimizer.param_groups, strict=True)
        ]
        state = dict(enumerate(snapshot.slots)) | snapshot.others
        optimizer.load_state_dict({"state": state, "param_groups": groups, **own})
    plant.restore(snapshot)

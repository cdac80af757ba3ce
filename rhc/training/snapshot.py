"""A snapshot as named tensors and JSON, and back, checked against the model that takes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rhc.distributed import read_parts, shared_as
from rhc.errors import InputError
from rhc.rng import RandomState, preserved
from rhc.storage.trees import joined, parted
from rhc.training.module_state import Buffers
from rhc.training.plant import Plant, Snapshot

Tensors = dict[str, dict[str, Tensor]]


def snapshot_to_tensors(plant: Plant, snapshot: Snapshot) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by group: model, optimizer, rng; the JSON-able rest of the optimizer).

    InputError where the optimizer's state has what no checkpoint can hold.
    """
    model = {f"parameter.{n}": t for n, t in snapshot.parameters.items()}
    model |= {f"buffer.{n}": t for n, t in snapshot.buffers.items() if t is not None}
    optimizer: dict[str, Tensor] = {}
    rest: dict[str, Any] = {"names": plant.names}
    for name, prefix, records in (
        ("slots", "slot", snapshot.slots),
        ("groups", "group", snapshot.groups),
    ):
        rest[name] = [
            {key: parted(v, f"{prefix}.{i}.{key}", optimizer) for key, v in record.items()}
            for i, record in enumerate(records)
        ]
    rest["others"] = parted(snapshot.others, "others", optimizer)
    rest["own"] = parted(_own_entries(plant.optimizer), "own", optimizer)
    tensors = {"model": model, "optimizer": optimizer, "rng": snapshot.rng.to_tensors()}
    return tensors, rest


def _own_entries(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a class of its own adds to `state_dict()`, beside the state and the groups."""
    if type(optimizer).state_dict is torch.optim.Optimizer.state_dict:
        return {}
    found = optimizer.state_dict()
    return {k: v for k, v in found.items() if k not in ("state", "param_groups")}


def places(plant: Plant, rest: Mapping[str, Any]) -> list[int]:
    """Where the checkpoint's optimizer has each parameter of this one, by their names.

    InputError where they are others, or in other groups.
    """
    slots, groups = len(rest["slots"]), len(rest["groups"])
    if slots != len(plant.parameters) or groups != len(plant.optimizer.param_groups):
        raise InputError(
            f"the checkpoint's optimizer has {slots} parameters in {groups} groups, this one "
            f"{len(plant.parameters)} in {len(plant.optimizer.param_groups)}; resume with the "
            "optimizer that the run began with"
        )
    now = plant.names
    began = rest.get("names", now)  # checkpoints of before know the order alone
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
    """A checkpoint's tensors, and those of which ranks have written their parts into `folder`.

    This process gets its parts as its model is shared out, or the whole where it is not.
    """
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
    """The inverse, for `plant`; names or shapes that its model lacks are InputErrors.

    Buffers may have another shape, and those that are None another value: a forward pass fills
    them, and lets them grow.
    """
    expected: dict[str, Tensor] = {f"parameter.{n}": p for n, p in plant.model.named_parameters()}
    buffers = Buffers(plant.model).live()
    expected |= {f"buffer.{n}": b for n, b in buffers.items() if b is not None}
    found = tensors["model"]
    for name in expected.keys() ^ found.keys():
        if name in found and _may_come(plant, name):
            continue
        where = "checkpoint" if name in found else "model"
        raise InputError(
            f"{name} is in the {where} only; resume with the model that the run began with"
        )
    for name, live in expected.items():
        may_grow = name.startswith("buffer.")
        same_shape = may_grow or found[name].shape == live.shape
        if not same_shape or found[name].dtype != live.dtype:
            raise InputError(
                f"{name} is {tuple(found[name].shape)} of {found[name].dtype} in the checkpoint, "
                f"{tuple(live.shape)} of {live.dtype} in the model; resume with the model that the "
                "run began with"
            )
    order = places(plant, rest)
    known = _has_dynamics(plant)
    groups_of = [g for g in plant.optimizer.param_groups for _ in g["params"]]
    placed: dict[str, Tensor] = {}
    for name, value in tensors["optimizer"].items():
        kind, _, path = name.partition(".")
        placed[name] = value
        if kind != "slot":
            continue
        index, _, key = path.partition(".")
        here = order.index(int(index))
        owner, group = plant.owned[here], groups_of[here]
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
        rng.restore()  # what torch, numpy or python refuse, they refuse here
    return Snapshot(
        {n: shared_as(found[f"parameter.{n}"], p) for n, p in plant.model.named_parameters()},
        {n: None for n in buffers}
        | {n.removeprefix("buffer."): b for n, b in found.items() if n.startswith("buffer.")},
        [slots[place] for place in order],
        groups,
        rng,
        others=joined(rest.get("others", {}), placed),
    )


def _may_come(plant: Plant, name: str) -> bool:
    """Whether it is of a buffer that a forward pass fills or registers: its module is there."""
    module, _, _ = name.removeprefix("buffer.").rpartition(".")
    return name.startswith("buffer.") and module in dict(plant.model.named_modules())


def _complete(
    slots: list[dict[str, Any]], groups: list[dict[str, Any]], tensors: Mapping[str, Tensor]
) -> None:
    """Of a checkpoint of before: its tensors have no place in the JSON, and tuples are lists."""
    for group in groups:
        group |= {k: tuple(v) for k, v in group.items() if isinstance(v, list)}
    for name, value in tensors.items():
        kind, index, key = name.split(".", 2)
        (slots if kind == "slot" else groups)[int(index)][key] = value


def adopt(plant: Plant, tensors: Tensors, rest: Mapping[str, Any], snapshot: Snapshot) -> None:
    """Puts the plant into the state that `snapshot_from_tensors` made of these."""
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


def _has_dynamics(plant: Plant) -> bool:
    """Whether it is an optimizer whose slots are numbers, or have the parameter's shape."""
    try:
        return bool(plant.dynamics)
    except InputError:
        return False

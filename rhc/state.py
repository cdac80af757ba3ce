"""A snapshot as named tensors and JSON, and back, checked against the model that takes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rhc.distributed import read_parts, shared_as
from rhc.errors import InputError
from rhc.module_state import Buffers
from rhc.plant import Plant, Snapshot
from rhc.randomness import RandomState, preserved

Tensors = dict[str, dict[str, Tensor]]


def snapshot_to_tensors(snapshot: Snapshot) -> tuple[Tensors, dict[str, Any]]:
    """(tensors by group: model, optimizer, rng; the JSON-able rest of the optimizer)."""
    model = {f"parameter.{n}": t for n, t in snapshot.parameters.items()}
    model |= {f"buffer.{n}": t for n, t in snapshot.buffers.items() if t is not None}
    optimizer: dict[str, Tensor] = {}
    slots: list[dict[str, Any]] = []
    groups: list[dict[str, Any]] = []
    for records, prefix, rest in (
        (snapshot.slots, "slot", slots),
        (snapshot.groups, "group", groups),
    ):
        for index, record in enumerate(records):
            plain = {}
            for key, value in record.items():
                if isinstance(value, Tensor):
                    optimizer[f"{prefix}.{index}.{key}"] = value
                elif _is_plain(value):
                    plain[key] = value
            rest.append(plain)
    tensors = {"model": model, "optimizer": optimizer, "rng": snapshot.rng.to_tensors()}
    return tensors, {"slots": slots, "groups": groups}


def with_parts(plant: Plant, tensors: Tensors, folder: Path) -> Tensors:
    """A checkpoint's tensors, and those of which ranks have written their parts into `folder`.

    This process gets its parts as its model is shared out, or the whole where it is not.
    """
    parameters = dict(plant.model.named_parameters())

    def like(name: str) -> Tensor | None:
        group, _, rest = name.partition(".")
        if group == "model":
            return parameters.get(rest.removeprefix("parameter."))
        index = rest.removeprefix("slot.").partition(".")[0]
        known = index.isdecimal() and int(index) < len(plant.owned)
        return plant.owned[int(index)] if known else None

    found = {group: dict(own) for group, own in tensors.items()}
    for name, tensor in read_parts(folder, like).items():
        group, _, rest = name.partition(".")
        found.setdefault(group, {})[rest] = tensor
    return found


def snapshot_from_tensors(plant: Plant, tensors: Tensors, rest: Mapping[str, Any]) -> Snapshot:
    """The inverse, for `plant`; names or shapes that its model lacks are InputErrors."""
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
    slots = [dict(s) for s in rest["slots"]]
    groups = [
        {k: tuple(v) if isinstance(v, list) else v for k, v in g.items()} for g in rest["groups"]
    ]
    if len(slots) != len(plant.parameters) or len(groups) != len(plant.optimizer.param_groups):
        raise InputError(
            f"the checkpoint's optimizer has {len(slots)} parameters in {len(groups)} groups, this "
            f"one {len(plant.parameters)} in {len(plant.optimizer.param_groups)}; resume with the "
            "optimizer that the run began with"
        )
    known = _has_dynamics(plant)
    for name, value in tensors["optimizer"].items():
        kind, index, key = name.split(".", 2)
        if kind == "slot":
            owner = plant.owned[int(index)]
            shape = owner.shape
            if known and value.numel() != 1 and value.shape != shape:
                raise InputError(
                    f"the optimizer's {key} of parameter {index} is {tuple(value.shape)} in the "
                    f"checkpoint, its parameter {tuple(shape)}; resume with the optimizer that the "
                    "run began with"
                )
            # torch keeps the step count on the CPU unless asked otherwise.
            device = value.device if key == "step" else owner.device
            moved = value.to(device)
            slots[int(index)][key] = moved if key == "step" else shared_as(moved, owner)
        else:
            groups[int(index)][key] = value
    rng = RandomState.from_tensors(tensors["rng"])
    with preserved():
        rng.restore()  # what torch, numpy or python refuse, they refuse here
    return Snapshot(
        {n: shared_as(found[f"parameter.{n}"], p) for n, p in plant.model.named_parameters()},
        {n: None for n in buffers}
        | {n.removeprefix("buffer."): b for n, b in found.items() if n.startswith("buffer.")},
        slots,
        groups,
        rng,
    )


def _may_come(plant: Plant, name: str) -> bool:
    """Whether it is of a buffer that a forward pass fills or registers: its module is there."""
    module, _, _ = name.removeprefix("buffer.").rpartition(".")
    return name.startswith("buffer.") and module in dict(plant.model.named_modules())


def _has_dynamics(plant: Plant) -> bool:
    """Whether it is an optimizer whose slots are numbers, or have the parameter's shape."""
    try:
        return bool(plant.dynamics)
    except InputError:
        return False


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))

"""Conversions of DTensors (FSDP2's parameters) to local parts and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_dtensor(value: Any) -> bool:
    return hasattr(value, "device_mesh")


def local_part(value: Any) -> Any:
    """The local part of a DTensor; other values unchanged."""
    return value.detach().to_local() if is_dtensor(value) else value


def placed_as(part: Any, like: Any) -> Any:
    """A local part as a DTensor like `like`; unchanged if `like` is none."""
    if not (is_dtensor(like) and isinstance(part, Tensor)):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def shared_as(whole: Any, like: Any) -> Any:
    """A whole tensor as a DTensor like `like`; unchanged if shapes differ or `like` is none."""
    if not (isinstance(whole, Tensor) and is_dtensor(like)):
        return whole
    if is_dtensor(whole) or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    moved = whole.to(like.device)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)


def part_like(whole: Tensor, like: Any) -> Tensor:
    """This rank's part of a whole tensor, placed like `like`, as a copy."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(
        like.shape, like.device_mesh, like.placements
    )
    places = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
    return whole[places].clone()

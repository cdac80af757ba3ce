"""Parameters that are shared out: every rank holds a part of each, as FSDP2's fully_shard has it.

A part is seen as a parameter of its own: a leaf in the same memory as the DTensor's local tensor,
with a `.grad` that is filled from the DTensor's. FSDP gathers the whole before a layer runs, and
leaves gradients as means over ranks, cut to the parts. It has no second derivatives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rhc.distributed.ranks import Ranks
from rhc.errors import InputError


def is_shared_out(parameters: Iterable[Tensor]) -> bool:
    """Whether these are DTensors."""
    return any(hasattr(p, "device_mesh") for p in parameters)


def part_of(value: Any) -> Any:
    """The rank's own part of a DTensor; anything else as it is."""
    return value.detach().to_local() if hasattr(value, "device_mesh") else value


def parts_of(model: nn.Module, parameters: Sequence[Tensor], ranks: Ranks | None) -> list[Tensor]:
    """A leaf for the rank's part of each parameter, in the parameter's own memory.

    An InputError where the parts are not those of `ranks`.
    """
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "unshard") and hasattr(module, "reshard"):
            module.unshard()  # FSDP settles where its parts are when it is first used
            module.reshard()
    for p in parameters:
        mesh: Any = getattr(p, "device_mesh", None)
        if mesh is None or mesh.ndim != 1 or ranks is None or mesh.size() != ranks.size:
            raise InputError(
                f"a parameter of shape {tuple(p.shape)} is not shared out over all ranks as the "
                "others are; apply fully_shard to the whole model, with a mesh of one dimension "
                "over the process group"
            )
    return [part_of(p).requires_grad_(p.requires_grad) for p in parameters]


def settle(model: nn.Module) -> None:
    """Gives up what FSDP has gathered, so that it gathers anew what lies in the parts now.

    The outermost module keeps it from a forward pass to the backward pass, which an evaluation
    never has.
    """
    modules: list[Any] = list(model.modules())
    for module in modules:
        if hasattr(module, "unshard") and hasattr(module, "reshard"):
            module.reshard()


def norm_over(ranks: Ranks, norm: Tensor) -> Tensor:
    """The norm of what all ranks hold together, from that of this rank's part."""
    return torch.sqrt(ranks.sum(norm.detach().double() ** 2)).to(norm.dtype)


def placed_as(part: Any, like: Any) -> Any:
    """This rank's part of a tensor, as a DTensor like `like`; as it is where that is none."""
    if not (hasattr(like, "device_mesh") and isinstance(part, Tensor)):
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


class _SumOver(torch.autograd.Function):
    """A sum over ranks, of which every rank uses its own copy: so the derivatives sum too."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, tensor: Tensor) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(tensor)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, Tensor]:
        return None, ctx.ranks.sum(slopes[0])


def norms_of_wholes(ranks: Ranks, parts: Sequence[Tensor]) -> Tensor:
    """The norm of the whole of which each is this rank's part, a float64 vector.

    It can be differentiated, on all ranks together; at zero the derivative is zero.
    """
    squares = torch.stack([part.double().square().sum() for part in parts])
    found: Tensor = _SumOver.apply(ranks, squares)
    return found.clamp_min(1e-300).sqrt()


def cut_as(whole: Tensor, like: Any) -> Tensor:
    """This rank's part of a whole tensor that is shared out as `like` is, in new memory."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, offsets = compute_local_shape_and_global_offset(
        like.shape, like.device_mesh, like.placements
    )
    places = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
    return whole[places].clone()


def whole_of(value: Any) -> Any:
    """A DTensor's whole tensor, anything else as it is. All ranks must ask, for all get it."""
    return value.full_tensor() if hasattr(value, "device_mesh") else value


def shared_as(whole: Any, like: Any) -> Any:
    """This rank's share of a whole tensor, as a DTensor like `like`; as it is for other shapes."""
    if not (isinstance(whole, Tensor) and hasattr(like, "device_mesh")):
        return whole
    if hasattr(whole, "device_mesh"):
        return whole
    if whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    moved = whole.to(like.device)
    return distribute_tensor(moved, like.device_mesh, like.placements, src_data_rank=None)

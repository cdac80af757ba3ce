"""Many processes that train one model: what is averaged over them, and what each has of its own.

Data parallel: every rank holds the whole model and the whole optimizer, and sees its own rows of
every batch. Gradients, products with the Hessian, losses and metrics are averaged as they arise;
everything that follows from them is then the same on all ranks, to the bit, and needs no word
between them. `ranks` is the group and its means, `shards` says whose rows are whose, `batch_norm`
takes statistics over the rows of all ranks. `sharing` is for parameters of which each rank holds a
part, and `parts` for their files. rank_directory.py is the run's directory that the first rank
writes.
"""

from rhc.distributed.batch_norm import SyncBatchNorm, synchronised
from rhc.distributed.parts import read_parts, write_parts
from rhc.distributed.ranks import (
    Ranks,
    RanksDiffer,
    Unshared,
    joined,
    launched,
    leave,
    ranks_of,
    unwrapped,
)
from rhc.distributed.shards import RankLoader, Shard, shard, weighing
from rhc.distributed.sharing import (
    cut_as,
    is_shared_out,
    norm_over,
    norms_of_wholes,
    part_of,
    parts_of,
    placed_as,
    settle,
    shared_as,
    whole_of,
)

__all__ = [
    "RankLoader",
    "Ranks",
    "RanksDiffer",
    "Shard",
    "SyncBatchNorm",
    "Unshared",
    "cut_as",
    "is_shared_out",
    "joined",
    "launched",
    "leave",
    "norm_over",
    "norms_of_wholes",
    "part_of",
    "parts_of",
    "placed_as",
    "ranks_of",
    "read_parts",
    "settle",
    "shard",
    "shared_as",
    "synchronised",
    "unwrapped",
    "weighing",
    "whole_of",
    "write_parts",
]

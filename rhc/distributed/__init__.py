"""Training on several ranks, replicated (data parallel) or sharded (FSDP).

Gradients, hvps, losses and metrics are averaged as they arise, so all ranks compute bit-identical
updates without further communication.
"""

from rhc.distributed.batch_norm import SyncBatchNorm, synchronised
from rhc.distributed.dtensors import is_dtensor, local_part, placed_as, shared_as
from rhc.distributed.parallel import parallel_of
from rhc.distributed.parts import read_parts
from rhc.distributed.ranks import Ranks, RanksDiffer, Unshared, joined, leave, ranks_of, unwrapped
from rhc.distributed.shards import RankLoader, Shard, halves, rows_between, shard

__all__ = [
    "RankLoader",
    "Ranks",
    "RanksDiffer",
    "Shard",
    "SyncBatchNorm",
    "Unshared",
    "halves",
    "is_dtensor",
    "joined",
    "leave",
    "local_part",
    "parallel_of",
    "placed_as",
    "ranks_of",
    "read_parts",
    "rows_between",
    "shard",
    "shared_as",
    "synchronised",
    "unwrapped",
]

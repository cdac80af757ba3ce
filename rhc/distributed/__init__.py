"""Many processes that train one model: what is averaged over them, and what each has of its own.

Data parallel: every rank holds the whole model and the whole optimizer, and sees its own rows of
every batch. Gradients, products with the Hessian, losses and metrics are averaged as they arise;
everything that follows from them is then the same on all ranks, to the bit, without a word between
them. `ranks` is the group and its means, `parallel` what a plant exchanges, `shards` says whose
rows are whose, `batch_norm` takes statistics over the rows of all ranks. Where FSDP leaves each
rank a part of every parameter, `dtensors` converts them and `parts` has their files. `directory` is
the run's directory, which the first rank writes.
"""

from rhc.distributed.batch_norm import SyncBatchNorm, synchronised
from rhc.distributed.dtensors import is_dtensor, local_part, placed_as, shared_as
from rhc.distributed.parallel import parallel_of
from rhc.distributed.parts import read_parts
from rhc.distributed.ranks import Ranks, RanksDiffer, Unshared, joined, leave, ranks_of, unwrapped
from rhc.distributed.shards import RankLoader, Shard, shard

__all__ = [
    "RankLoader",
    "Ranks",
    "RanksDiffer",
    "Shard",
    "SyncBatchNorm",
    "Unshared",
    "is_dtensor",
    "joined",
    "leave",
    "local_part",
    "parallel_of",
    "placed_as",
    "ranks_of",
    "read_parts",
    "shard",
    "shared_as",
    "synchronised",
    "unwrapped",
]

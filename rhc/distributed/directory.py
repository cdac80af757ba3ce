"""The run's directory with several ranks: the first writes, all read (shared file system).

ranks.safetensors holds each rank's random state and data position, shards/ its parts of sharded
tensors. With the same number of ranks runs resume bit for bit, else to rounding, from the first
rank's position and new random states.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from rhc.distributed.dtensors import is_dtensor
from rhc.distributed.parts import write_parts
from rhc.distributed.ranks import Ranks, Unshared
from rhc.errors import InputError, StorageError
from rhc.rng import RandomState, mixed_seed, preserved, seed_everything
from rhc.storage.checkpoint import SHARDS, Checkpoint
from rhc.storage.jsonl import JsonLines
from rhc.storage.run_directory import Plan, RunDirectory, Whole

OWN = ("rng", "train_batches", "validation_batches")
"""Groups of a checkpoint's tensors that are specific to a rank."""

GROUP = "ranks"


def directory_of(
    path: Path,
    keep_checkpoints: int,
    notice: Callable[[str], None],
    may_change: Mapping[str, str],
    ranks: Ranks | None,
) -> RunDirectory:
    may_change = {**may_change, "ranks": "it goes on to rounding, not to the bit"}
    if ranks is None:
        return RunDirectory(path, keep_checkpoints, notice, may_change)
    return RanksDirectory(path, keep_checkpoints, notice, may_change, ranks)


class RanksDirectory(RunDirectory):
    """Collective: every method is called on all ranks. The first rank's disk errors reach all."""

    def __init__(
        self,
        path: Path,
        keep_checkpoints: int,
        notice: Callable[[str], None],
        may_change: Mapping[str, str],
        ranks: Ranks,
    ) -> None:
        super().__init__(path, keep_checkpoints, notice, may_change)
        self.ranks = ranks
        self._unsaved: tuple[Checkpoint, Plan] | None = None
        """A checkpoint with parts whose save failed; retrying needs all ranks."""
        if not ranks.first:
            self.tape, self.windows, self.starts, self.passes = (
                _Unwritten(path / f"{name}.jsonl")
                for name in ("tape", "windows", "start", "passes")
            )

    # Reading -------------------------------------------------------------------------------------

    def open(
        self, config: Mapping[str, Any], resume: Literal["auto", "never"]
    ) -> Checkpoint | None:
        step = self.ranks.by_first(lambda: _step(RunDirectory.open(self, config, resume)))
        self.saved = step
        return self._loaded(step)

    def earlier(self, step: int) -> Checkpoint | None:
        return self._loaded(self.ranks.by_first(lambda: _step(RunDirectory.earlier(self, step))))

    def at(self, step: int) -> Checkpoint:
        found = self._loaded(step)
        assert found is not None
        return found

    def best(self, step: int) -> Checkpoint | None:
        found = self.ranks.by_first(lambda: _step(RunDirectory.best(self, step)))
        return self._loaded(found, best=True)

    def _loaded(self, step: int | None, *, best: bool = False) -> Checkpoint | None:
        """The checkpoint for this rank; InputError on all if a rank cannot read it."""
        if step is None:
            return None
        found, trouble = None, ""
        try:
            found = self.checkpoints.load(step, (self.ranks.rank, self.ranks.size), best=best)
        except InputError as error:
            trouble = str(error)
        for rank, text in enumerate(self.ranks.gather_json(trouble)):
            if text:
                raise Unshared(
                    f"rank {rank} cannot read what rank 0 can ({text}); give a --directory that "
                    "all ranks share"
                )
        assert found is not None
        return replace(found, tensors=self._own(found))

    def _own(self, checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
        tensors, ranks = dict(checkpoint.tensors), self.ranks
        kept = tensors.pop(GROUP, {})
        before = int(kept.get("size", 1))
        if before == ranks.size:
            for name in OWN:
                prefix = f"{ranks.rank}.{name}."
                own = {k.removeprefix(prefix): t for k, t in kept.items() if k.startswith(prefix)}
                if own:
                    tensors[name] = own
            return tensors
        self.notice(
            f"the run was saved by {before} ranks and goes on with {ranks.size}: equal to "
            "rounding where nothing is drawn inside the model"
        )
        if not ranks.first:
            with preserved():
                seed_everything(mixed_seed(checkpoint.step, ranks.rank) % 2**31)
                tensors["rng"] = RandomState.capture().to_tensors()
        return tensors

    # Writing -------------------------------------------------------------------------------------

    def save(self, checkpoint: Checkpoint, schedule: Plan) -> Path | None:
        whole: dict[str, dict[str, Tensor]] = {}
        parts: dict[str, Tensor] = {}
        for group, own in checkpoint.tensors.items():
            whole[group] = {name: t for name, t in own.items() if not is_dtensor(t)}
            parts |= {f"{group}.{name}": t for name, t in own.items() if is_dtensor(t)}
        whole[GROUP] = self._gathered(checkpoint)
        if parts:
            self._unsaved = checkpoint, schedule
            return self._save_parts(replace(checkpoint, tensors=whole), parts, schedule)
        return self._save_first(replace(checkpoint, tensors=whole), schedule)

    def _gathered(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        own = {
            f"{name}.{key}": t.detach().cpu().contiguous()
            for name in OWN
            for key, t in checkpoint.tensors.get(name, {}).items()
        }
        found = {"size": torch.tensor(self.ranks.size)}
        for rank, data in enumerate(self.ranks.gather(save_tensors(own))):
            if self.ranks.first:
                found |= {f"{rank}.{key}": t for key, t in load_tensors(data).items()}
        return found

    def _save_first(self, checkpoint: Checkpoint, schedule: Plan) -> Path | None:
        def saved() -> bool:
            return RunDirectory.save(self, checkpoint, schedule) is not None

        if not self.ranks.by_first(saved):
            return None
        self.saved = checkpoint.step
        return self.checkpoints.path(checkpoint.step)

    def _save_parts(
        self, whole: Checkpoint, parts: Mapping[str, Tensor], schedule: Plan
    ) -> Path | None:
        """The checkpoint's directory; None if writing failed (StorageError if it is the first)."""
        for attempt in (0, 1):
            try:
                folder = self._of_first(lambda: str(self.checkpoints.prepare(whole.step)))
                sums = write_parts(self.ranks, Path(folder), parts)
                shards = {f"{SHARDS}/{name}": s for name, s in sums.items()}
                if path := self._save_first(replace(whole, shards=shards), schedule):
                    self._unsaved = None
                    return path
                self._of_first(self._raise_trouble)
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                if attempt == 0 and full and self._of_first(self.checkpoints.make_room):
                    self.notice(f"{self.path} is full: older checkpoints are removed to make room")
                    continue
                self._give_up(error)
                return None
        return None

    def _raise_trouble(self) -> None:
        assert self.trouble is not None
        raise self.trouble

    def _give_up(self, trouble: OSError) -> None:
        def gave_up() -> None:
            # The next save is collective again, not by the first rank alone.
            self._first = self._late = None
            self._troubled(trouble)
            if self.saved is None:
                raise StorageError(
                    f"the run's first checkpoint could not be written to {self.path} "
                    f"({trouble.strerror}); mend the disk, or choose another --directory"
                )

        self.ranks.by_first(gave_up)

    def _of_first(self, function: Callable[[], Any]) -> Any:
        """The first rank's result, or its OSError, on every rank."""

        def tried() -> list[Any]:
            try:
                return [function(), None]
            except OSError as error:
                return [None, [error.errno or errno.EIO, error.strerror or str(error)]]

        found, trouble = self.ranks.by_first(tried)
        if trouble is not None:
            raise OSError(*trouble)
        return found

    def finish(self, schedule: Whole, result: Mapping[str, Any]) -> None:
        if self._unsaved is not None:
            self.save(*self._unsaved)
        self.ranks.by_first(lambda: RunDirectory.finish(self, schedule, result))


def _step(checkpoint: Checkpoint | None) -> int | None:
    return None if checkpoint is None else checkpoint.step


class _Unwritten(JsonLines):
    """A log that only the first rank writes."""

    def append(self, rows: Any) -> None:
        pass

    def flush(self) -> None:
        pass

"""A run's directory where ranks train together: the first rank writes it, all ranks read it.

A checkpoint holds the state that is the same on all ranks once, and beside it, in
ranks.safetensors, what each rank has of its own: its random state and its place in the data. What
is shared out (parameters, optimizer slots, the average) each rank writes by itself into shards/,
before the first writes the manifest. With as many ranks as before a run continues to the bit, with
others to rounding, from the first rank's place and new random states. The directory must be where
all ranks can read it.
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

from rhc.distributed import Ranks, Unshared, is_dtensor, write_parts
from rhc.errors import InputError, StorageError
from rhc.rng import RandomState, mixed_seed, preserved, seed_everything
from rhc.storage.checkpoint import SHARDS, Checkpoint
from rhc.storage.jsonl import JsonLines
from rhc.storage.run_directory import Plan, RunDirectory, Whole

OWN = ("rng", "train_batches", "validation_batches")
"""Groups of a checkpoint's tensors that each rank has of its own."""

GROUP = "ranks"


def directory_of(
    path: Path,
    keep_checkpoints: int,
    notice: Callable[[str], None],
    may_change: Mapping[str, str],
    ranks: Ranks | None,
) -> RunDirectory:
    """The run's directory as this process has it. may_change: see `RunDirectory`."""
    may_change = {**may_change, "ranks": "it goes on to rounding, not to the bit"}
    if ranks is None:
        return RunDirectory(path, keep_checkpoints, notice, may_change)
    kind = _Written if ranks.first else _Followed
    return kind(path, keep_checkpoints, notice, may_change, ranks)


class _OfRanks(RunDirectory):
    """What all ranks do together: each method is called on all of them, at the same time."""

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

    def _checkpoint_of(self, step: int | None) -> Checkpoint | None:
        """The checkpoint as this rank goes on from it; an InputError where one cannot read it."""
        if step is None:
            return None
        found, trouble = None, ""
        try:
            found = self.checkpoints.load(step, (self.ranks.rank, self.ranks.size))
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

    def earlier(self, step: int) -> Checkpoint | None:
        def found() -> int | None:
            checkpoint = super(_OfRanks, self).earlier(step)
            return None if checkpoint is None else checkpoint.step

        return self._checkpoint_of(self.ranks.by_first(found))

    def _save_parts(
        self, whole: Checkpoint, parts: Mapping[str, Tensor], schedule: Plan
    ) -> Path | None:
        """Brings a checkpoint to the disk, of which each rank writes its parts; its directory.

        None where the disk does not take it; a StorageError for a run's first one.
        """
        trouble: Any = None
        for attempt in (0, 1):
            folder, trouble = self._of_first(lambda: str(self.checkpoints.prepare(whole.step)))
            if trouble is None:
                sums, trouble = write_parts(self.ranks, Path(folder), parts)
            if trouble is None:
                shards = {f"{SHARDS}/{name}": s for name, s in sums.items()}
                checkpoint = replace(whole, shards=shards)

                def saved(checkpoint: Checkpoint = checkpoint) -> None:
                    if RunDirectory.save(self, checkpoint, schedule) is None:
                        assert self.trouble is not None
                        raise self.trouble

                _, trouble = self._of_first(saved)
            if trouble is None:
                self.saved, self._unsaved = whole.step, None
                return self.checkpoints.path(whole.step)
            full = trouble[0] in (errno.ENOSPC, errno.EDQUOT)
            if attempt or not full or not self._of_first(self.checkpoints.make_room)[0]:
                break
            self.notice(f"{self.path} is full: older checkpoints are removed to make room")

        def gave_up() -> None:
            # Whatever comes next is written by all ranks again, not by the first alone.
            self._first = self._late = None
            self._troubled(OSError(*trouble))
            if self.saved is None:
                raise StorageError(
                    f"the run's first checkpoint could not be written to {self.path} "
                    f"({trouble[1]}); mend the disk, or choose another --directory"
                )

        self.ranks.by_first(gave_up)
        return None

    def _of_first(self, function: Callable[[], Any]) -> tuple[Any, Any]:
        """(what the first rank finds, its OSError's number and words), on every rank."""

        def tried() -> list[Any]:
            try:
                return [function(), None]
            except OSError as error:
                return [None, [error.errno or errno.EIO, error.strerror or str(error)]]

        found, trouble = self.ranks.by_first(tried)
        return found, trouble

    def save(self, checkpoint: Checkpoint, schedule: Plan) -> Path | None:
        tensors = {
            group: {name: t for name, t in own.items() if not is_dtensor(t)}
            for group, own in checkpoint.tensors.items()
        }
        parts = {
            f"{group}.{name}": t
            for group, own in checkpoint.tensors.items()
            for name, t in own.items()
            if is_dtensor(t)
        }
        tensors[GROUP] = self._gathered(checkpoint)
        whole = replace(checkpoint, tensors=tensors)
        if parts:
            self._unsaved = checkpoint, schedule
            return self._save_parts(whole, parts, schedule)
        return self._save_whole(whole, schedule)

    def _save_whole(self, checkpoint: Checkpoint, schedule: Plan) -> Path | None:
        """Brings a checkpoint to the disk that the first rank writes alone; its directory."""
        path: list[Path | None] = [None]

        def saved() -> int | None:
            path[0] = RunDirectory.save(self, checkpoint, schedule)
            return None if path[0] is None else self.saved

        step = self.ranks.by_first(saved)
        if step is None or self.ranks.first:
            return path[0]
        self.saved = step
        return self.checkpoints.path(step)

    def finish(self, schedule: Whole, result: Mapping[str, Any]) -> None:
        if self._unsaved is not None:
            self.save(*self._unsaved)
        self.ranks.by_first(lambda: RunDirectory.finish(self, schedule, result))

    def _own(self, checkpoint: Checkpoint) -> dict[str, dict[str, Tensor]]:
        """A checkpoint's tensors with this rank's own in the place of the first rank's."""
        tensors = dict(checkpoint.tensors)
        kept = tensors.pop(GROUP, {})
        ranks = self.ranks
        before = int(kept["size"]) if "size" in kept else 1
        if before == ranks.size:
            prefix = f"{ranks.rank}."
            for name in OWN:
                own = {
                    k.removeprefix(f"{prefix}{name}."): t
                    for k, t in kept.items()
                    if k.startswith(f"{prefix}{name}.")
                }
                if own:
                    tensors[name] = own
        else:
            self.notice(
                f"the run was saved by {before} ranks and goes on with {ranks.size}: equal to "
                "rounding where nothing is drawn inside the model"
            )
            if not ranks.first:
                with preserved():
                    seed_everything(mixed_seed(checkpoint.step, ranks.rank) % 2**31)
                    tensors["rng"] = RandomState.capture().to_tensors()
        return tensors

    def _gathered(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """ranks.safetensors: what every rank has of its own."""
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


class _Written(_OfRanks):
    """The first rank's."""

    def open(
        self, config: Mapping[str, Any], resume: Literal["auto", "never"]
    ) -> Checkpoint | None:
        def opened() -> int | None:
            checkpoint = super(_OfRanks, self).open(config, resume)
            return None if checkpoint is None else checkpoint.step

        return self._checkpoint_of(self.ranks.by_first(opened))


class _Followed(_OfRanks):
    """That of every other rank: it reads, and hears from the first what became of writing."""

    def open(
        self, config: Mapping[str, Any], resume: Literal["auto", "never"]
    ) -> Checkpoint | None:
        step = self.ranks.by_first(lambda: None)
        self.tape = _Unwritten(self.path / "tape.jsonl")
        self.windows = _Unwritten(self.path / "windows.jsonl")
        self.starts = _Unwritten(self.path / "start.jsonl")
        checkpoint = self._checkpoint_of(step)
        self.saved = step
        return checkpoint

    def record_start(self, record: Mapping[str, Any]) -> None:
        pass

    def flush(self) -> None:
        pass


class _Unwritten(JsonLines):
    """Lines that another process writes."""

    def append(self, rows: Any) -> None:
        pass

    def flush(self) -> None:
        pass

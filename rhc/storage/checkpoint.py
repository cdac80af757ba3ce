"""Checkpoints: directories with a manifest of sizes and SHA-256, written aside and then renamed.

Nothing is pickled, and files are not trusted; docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from rhc.errors import InputError
from rhc.storage.files import (
    CLOSED_ON_EXEC,
    MOST_JSON_BYTES,
    NO_LINK,
    created,
    make_directory,
    parsed_json,
    read_regular,
    remove,
    sealed,
    sync,
    write_all,
    write_durably,
)
from rhc.storage.jsonl import encode
from rhc.storage.run_files import BEST, checkpoint_path, checkpoint_steps
from rhc.storage.trees import spelled, unspelled

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
VALUES = "values.json"
SHARDS = "shards"
"""Folder of the files that torch.distributed.checkpoint writes on every rank."""

_SHARD = re.compile(rf"{SHARDS}/shard-[0-9]{{5}}-model-[0-9]{{5}}-of-[0-9]{{5}}\.safetensors")
_NAME = re.compile(rf"[A-Za-z0-9_]{{1,64}}\.safetensors|values\.json|{_SHARD.pattern}")

MOST_FILES = 64
MOST_SHARDS = 4096
MOST_MANIFEST_BYTES = 2**20
MOST_HEADER_BYTES = 32 * 2**20
"""Limit of a safetensors header, which has 100 bytes a tensor."""

MOST_TENSOR_BYTES = 2**40

PARALLEL = 32 * 2**20
"""Checkpoints of this many bytes and more are hashed and written by several threads."""


@dataclass(frozen=True)
class Checkpoint:
    step: int
    """Committed steps."""
    tensors: dict[str, dict[str, Tensor]]
    """Group -> name -> tensor."""
    values: dict[str, Any]
    """The JSON part."""
    shards: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Name -> (bytes, SHA-256) of the files that the ranks write to the folder of
    `CheckpointStore.prepare` and read themselves."""


class CheckpointStore:
    """The checkpoints of one run, in `root`; the `keep` newest stay."""

    def __init__(
        self, root: Path, keep: int = 3, notice: Callable[[str], None] = lambda message: None
    ) -> None:
        if keep < 1:
            raise InputError(f"keep_checkpoints must be ≥ 1, got {keep}")
        self.root = root
        self.keep = keep
        self.notice = notice
        self.most_bytes = MOST_TENSOR_BYTES
        """A checkpoint whose manifest lists more is refused unread."""
        self._damaged: set[int] = set()
        self.keeps: Callable[[int], bool] = lambda step: False
        """Steps whose checkpoints stay, beside the `keep` newest."""

    def path(self, step: int) -> Path:
        return checkpoint_path(self.root, step)

    @property
    def best(self) -> Path:
        """The checkpoint of the best validated state, if any, which stays."""
        return self.root / BEST

    def steps(self) -> list[int]:
        """Steps with a checkpoint directory, valid or not, ascending."""
        return checkpoint_steps(self.root)

    # Saving --------------------------------------------------------------------------------------

    def prepare(self, step: int) -> Path:
        """An empty folder for the shards of `step`, to be filled before `save`."""
        temporary = self._temporary(step)
        make_directory(self.root)
        remove(temporary)
        make_directory(temporary / SHARDS)
        return temporary / SHARDS

    def _temporary(self, step: int) -> Path:
        return self.root / f".writing-{self.path(step).name}"

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint, then removes those beyond the `keep` newest; returns its directory.
        After an OSError the earlier checkpoints are unchanged."""
        final = self.path(checkpoint.step)
        temporary = self._temporary(checkpoint.step)
        make_directory(self.root)
        try:
            if not checkpoint.shards:
                remove(temporary)
                os.mkdir(temporary)
            self._write(temporary, checkpoint)
            gone = self.root / f".removing-{checkpoint.step:08d}"
            remove(gone)
            if os.path.lexists(final):  # damaged, or saved before
                os.rename(final, gone)
            os.rename(temporary, final)
            sync(self.root)
        except BaseException:
            # A leftover would take up disk space at the next attempt.
            with contextlib.suppress(OSError):
                remove(temporary)
            raise
        self._damaged.discard(checkpoint.step)
        with contextlib.suppress(OSError):  # the next save retries
            good = [step for step in self.steps() if step not in self._damaged]
            self._clear(
                s for s in self.steps() if s not in good[-self.keep :] and not self.keeps(s)
            )
        return final

    def keep_best(self, source: Path) -> None:
        """Makes `best` the checkpoint in this directory, by links to its files where it can."""
        temporary, gone = self.root / f".writing-{BEST}", self.root / f".removing-{BEST}"
        remove(temporary)
        remove(gone)
        shutil.copytree(source, temporary, copy_function=_linked)
        if os.path.lexists(self.best):
            os.rename(self.best, gone)
        os.rename(temporary, self.best)
        sync(self.root)
        with contextlib.suppress(OSError):  # the next save retries
            remove(gone)

    def make_room(self) -> bool:
        """Removes all but the newest valid checkpoint; returns whether anything was removed."""
        if not self.root.is_dir():
            return False
        before = self.steps()
        good = (s for s in reversed(before) if s not in self._damaged and self._whole(s))
        valid = next(good, None)
        if valid is None:
            return False
        with contextlib.suppress(OSError):
            self._clear(step for step in before if step != valid)
        return self.steps() != before

    def _write(self, directory: Path, checkpoint: Checkpoint) -> None:
        """Writes all files and reads each back before the manifest lists it."""
        values = (encode(spelled(checkpoint.values)) + "\n").encode()
        contents: dict[str, Callable[[], Iterable[Piece]]] = {
            f"{group}.safetensors": functools.partial(_pieces, tensors)
            for group, tensors in checkpoint.tensors.items()
        }
        contents[VALUES] = lambda: [values]

        def written(name: str) -> tuple[int, str]:
            return _write_pieces(directory / name, contents[name]())

        def confirmed(name: str) -> None:
            sync(directory / name)
            _read_back(directory / name, contents[name]())

        size = sum(t.nbytes for group in checkpoint.tensors.values() for t in group.values())
        threads = min(4, os.cpu_count() or 1) if size >= PARALLEL else 0
        with ThreadPoolExecutor(threads) if threads else contextlib.nullcontext() as pool:
            each = map if pool is None else pool.map
            files = dict(zip(contents, each(written, contents), strict=True))
            # The first fsync waits for all of them.
            list(each(confirmed, contents))
        manifest = {
            "format": "rhc.checkpoint",
            "version": FORMAT_VERSION,
            "step": checkpoint.step,
            "torch": torch.__version__,
            "files": {
                name: {"bytes": size, "sha256": digest}
                for name, (size, digest) in (files | checkpoint.shards).items()
            },
        }
        data = _sealed(manifest)
        write_durably(directory / MANIFEST, data)
        _read_back(directory / MANIFEST, [data])
        sync(directory)

    def tidy(self, *, ended: bool) -> None:
        """Removes leftovers of a save and, unless the run has `ended`, surplus checkpoints."""
        good = [] if ended else [step for step in self.steps() if step not in self._damaged]
        self._clear(step for step in good[: -self.keep] if not self.keeps(step))

    def _clear(self, steps: Iterable[int]) -> None:
        for leftover in [*self.root.glob(".removing-*"), *self.root.glob(".writing-*")]:
            remove(leftover)
        for step in list(steps):
            # Renamed first: a half-removed directory never looks like a checkpoint.
            gone = self.root / f".removing-{step:08d}"
            os.rename(self.path(step), gone)
            remove(gone)
            self._damaged.discard(step)

    # Loading -------------------------------------------------------------------------------------

    def latest(self) -> Checkpoint | None:
        """The newest valid checkpoint, or None."""
        return next(self.usable(), None)

    def usable(self) -> Iterator[Checkpoint]:
        """Valid checkpoints, newest first; each invalid one is reported and skipped."""
        for step in reversed(self.steps()):
            try:
                yield self.load(step)
            except InputError as error:
                self.leave_out(step, str(error))

    def leave_out(self, step: int, why: str) -> None:
        """Reports an unusable checkpoint, which does not count towards `keep`."""
        self._damaged.add(step)
        self.notice(f"{why}; passing over this checkpoint")

    def load(self, step: int, share: tuple[int, int] = (0, 1), *, best: bool = False) -> Checkpoint:
        """Reads one checkpoint; InputError where it does not match its manifest. Shards are only
        verified: with share (r, n), every n-th from the r-th on, since n ranks divide them. best:
        whether from the directory of the best, which must be of this step."""
        directory = self.best if best else self.path(step)
        files = self._manifest(directory, step)
        tensors: dict[str, dict[str, Tensor]] = {}
        values: Any = None
        for name, data in self._contents(directory, files, share):
            path = directory / name
            if _SHARD.fullmatch(name):
                continue
            if name != VALUES:
                tensors[path.stem] = _tensors(path, data)
                continue
            try:
                values = unspelled(parsed_json(data))
            except ValueError as error:
                raise InputError(f"{path} is damaged ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"{directory / VALUES} is missing or no JSON object")
        shards = {name: sums for name, sums in files.items() if _SHARD.fullmatch(name)}
        return Checkpoint(step, tensors, values, shards)

    def _contents(
        self,
        directory: Path,
        files: Mapping[str, tuple[int, str]],
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[str, bytes]]:
        """(name, content) of every file, verified against the manifest."""
        if sum(size for size, _ in files.values()) > self.most_bytes:
            raise InputError(
                f"{directory / MANIFEST} lists more than {self.most_bytes} bytes, far more than "
                "this model needs"
            )
        shards = sorted(name for name in files if _SHARD.fullmatch(name))
        self._check_folder(directory / SHARDS, shards)
        others = set(shards) - set(shards[share[0] :: share[1]])
        for name, (size, digest) in files.items():
            if name in others:
                continue
            path = directory / name
            most = MOST_JSON_BYTES if name == VALUES else MOST_TENSOR_BYTES
            altered = f"{path} does not match its manifest: it was truncated or altered"
            try:
                data = read_regular(path, most, exactly=size)
            except OSError as error:
                raise InputError(f"{path} cannot be read ({error.strerror})") from None
            except ValueError as error:
                raise InputError(f"{altered} ({error})") from None
            if hashlib.sha256(data).hexdigest() != digest:
                raise InputError(altered)
            yield name, data

    def _check_folder(self, folder: Path, names: Sequence[str]) -> None:
        """Raises InputError unless the folder is no link and holds exactly these shards."""
        if not names:
            return
        try:
            real = stat.S_ISDIR(os.lstat(folder).st_mode)
            there = sorted(f"{SHARDS}/{path.name}" for path in folder.iterdir()) if real else []
        except OSError as error:
            raise InputError(f"{folder} cannot be read ({error.strerror})") from None
        if there != list(names):
            raise InputError(
                f"{folder} does not match its manifest: it has {len(there)} files for {len(names)}"
            )

    def _manifest(self, directory: Path, step: int) -> dict[str, tuple[int, str]]:
        """Name -> (bytes, SHA-256) of every file of a checkpoint."""
        path = directory / MANIFEST
        try:
            if not stat.S_ISDIR(os.lstat(directory).st_mode):
                raise ValueError("its directory is a link")
            data = read_regular(path, MOST_MANIFEST_BYTES)
            manifest = parsed_json(data)
            if manifest["format"] != "rhc.checkpoint" or manifest["version"] != FORMAT_VERSION:
                raise ValueError(f"version {manifest['version']}")
            files = {
                str(k): (int(v["bytes"]), str(v["sha256"])) for k, v in manifest["files"].items()
            }
            # The first manifests had no digest of their own.
            if set(manifest) != _UNSEALED and data != _sealed(manifest):
                raise ValueError("it does not match its own digest")
            if int(manifest["step"]) != step:
                raise ValueError(f"step {manifest['step']}")
            shards = sum(bool(_SHARD.fullmatch(name)) for name in files)
            if shards > MOST_SHARDS or len(files) - shards > MOST_FILES:
                raise ValueError(f"{len(files)} files")
            if any(size < 0 for size, _ in files.values()):
                raise ValueError("a negative size")
        except OSError as error:
            raise InputError(f"{path} is damaged ({error.strerror})") from None
        except (ArithmeticError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({error})") from None
        for name in files:
            if not _NAME.fullmatch(name):
                raise InputError(
                    f"{path} names {name[:80]!r}, outside its directory or not of a checkpoint"
                )
        return files

    def _whole(self, step: int) -> bool:
        directory = self.path(step)
        try:
            return all(True for _ in self._contents(directory, self._manifest(directory, step)))
        except InputError:
            return False


def _linked(source: str, target: str) -> None:
    """Links a file, or copies it durably where the disk has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(Path(target))


_UNSEALED = {"format", "version", "step", "torch", "files"}


def _sealed(manifest: Mapping[str, Any]) -> bytes:
    return sealed(manifest, indent=None)


Piece = bytes | memoryview

_PIECE = 2**20
"""Bytes hashed, written and compared at a time, to stay in the cache: a gigabyte at a time is three
times slower."""

_TYPES = {
    **{torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16"},
    **{torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32"},
    **{torch.float64: "F64", torch.int64: "I64"},
}
"""Names of dtypes in safetensors, in the reverse of its sort order."""


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[Piece]:
    """The bytes of `safetensors.torch.save`, without its copy of all tensors."""
    if not all(t.dtype in _TYPES for t in tensors.values()):
        yield save_tensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        return
    rank = {dtype: number for number, dtype in enumerate(_TYPES)}
    names = sorted(tensors, key=lambda name: (-rank[tensors[name].dtype], name))
    header, at = dict[str, Any](), 0
    for name in names:
        t = tensors[name]
        place = [at, at := at + t.nbytes]
        shape = list(t.shape)
        header[name] = {"dtype": _TYPES[t.dtype], "shape": shape, "data_offsets": place}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def _write_pieces(path: Path, content: Iterable[Piece]) -> tuple[int, str]:
    """Writes a file without fsync; returns (bytes, SHA-256)."""
    digest, size = hashlib.sha256(), 0
    with created(path) as descriptor:
        for piece in _cut(content):
            digest.update(piece)
            write_all(descriptor, piece)
            size += len(piece)
    return size, digest.hexdigest()


def _cut(pieces: Iterable[Piece]) -> Iterator[memoryview]:
    for piece in pieces:
        view = memoryview(piece)
        for at in range(0, len(view), _PIECE):
            yield view[at : at + _PIECE]


def _read_back(path: Path, content: Iterable[Piece]) -> None:
    """Raises OSError unless the file holds what was written."""
    with open(os.open(path, os.O_RDONLY | CLOSED_ON_EXEC | NO_LINK), "rb", buffering=0) as file:
        same = all(file.read(len(piece)) == bytes(piece) for piece in _cut(content))
        same = same and not file.read(1)
    if not same:
        raise OSError(errno.EIO, "it reads back other than it was written", str(path))


def _tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file; InputError where it is damaged."""
    size = int.from_bytes(data[:8], "little")
    if size > min(MOST_HEADER_BYTES, len(data)):
        raise InputError(
            f"{path} is damaged: its header claims {size} bytes of the file's {len(data)}"
        )
    try:
        return load_tensors(data)
    except Exception as error:  # safetensors' Rust parser or torch
        raise InputError(f"{path} is damaged ({error})") from None

"""Checkpoints: a directory of safetensors with a manifest, which is there whole or not at all.

Everything is written into a temporary directory and fsynced, the manifest (sizes and SHA-256)
last; then the directory is renamed. A directory that does not match its manifest is passed over
with a notice, and the one before it is used. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from rhc.errors import InputError
from rhc.tape import encode

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_PREFIX = "window-"


@dataclass(frozen=True)
class Checkpoint:
    """step: committed steps. tensors: group -> name -> tensor. values: the JSON part."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    values: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run, in `root`; `keep` newest ones stay."""

    def __init__(
        self, root: Path, keep: int = 3, notice: Callable[[str], None] = lambda message: None
    ) -> None:
        if keep < 1:
            raise InputError(f"keep_checkpoints must be ≥ 1, got {keep}")
        self.root = root
        self.keep = keep
        self.notice = notice

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` is."""
        return self.root / f"{_PREFIX}{step:08d}"

    def steps(self) -> list[int]:
        """Steps that have a checkpoint directory, valid or not, ascending."""
        if not self.root.is_dir():
            return []
        names = [p.name[len(_PREFIX) :] for p in self.root.iterdir() if p.name.startswith(_PREFIX)]
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint, returns its directory, and removes those older than the newest n."""
        self.root.mkdir(parents=True, exist_ok=True)
        final = self.path(checkpoint.step)
        temporary = self.root / f".writing-{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        contents = {
            f"{group}.safetensors": save_tensors(
                {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
            )
            for group, tensors in checkpoint.tensors.items()
        }
        contents["values.json"] = (encode(checkpoint.values) + "\n").encode()
        for name, data in contents.items():
            write_durably(temporary / name, data)
        manifest = {
            "format": "rhc.checkpoint",
            "version": FORMAT_VERSION,
            "step": checkpoint.step,
            "torch": torch.__version__,
            "files": {
                name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                for name, data in contents.items()
            },
        }
        write_durably(temporary / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        sync_directory(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync_directory(self.root)
        self._retire()
        return final

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that matches its manifest, or None."""
        for step in reversed(self.steps()):
            try:
                return self.load(step)
            except InputError as error:
                self.notice(f"{error}; passing over this checkpoint")
        return None

    def load(self, step: int) -> Checkpoint:
        """Reads one checkpoint; whatever does not match its manifest is an InputError."""
        directory = self.path(step)
        try:
            manifest = json.loads((directory / MANIFEST).read_bytes())
            if manifest["format"] != "rhc.checkpoint" or manifest["version"] != FORMAT_VERSION:
                raise ValueError(f"version {manifest['version']}")
            files = {
                str(k): (int(v["bytes"]), str(v["sha256"])) for k, v in manifest["files"].items()
            }
            if int(manifest["step"]) != step:
                raise ValueError(f"step {manifest['step']}")
        except (OSError, ArithmeticError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{directory / MANIFEST} is damaged ({error})") from None
        tensors: dict[str, dict[str, Tensor]] = {}
        values: dict[str, Any] = {}
        for name, (size, digest) in files.items():
            path = directory / name
            if path.parent != directory:
                raise InputError(f"{directory / MANIFEST} names {name!r}, outside its directory")
            try:
                data = path.read_bytes()
            except OSError as error:
                raise InputError(f"{path} cannot be read ({error.strerror})") from None
            if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
                raise InputError(f"{path} does not match its manifest: it was truncated or altered")
            if path.suffix == ".safetensors":
                tensors[path.stem] = load_tensors(data)
            else:
                values = json.loads(data)
        return Checkpoint(step, tensors, values)

    def _retire(self) -> None:
        for leftover in self.root.glob(".removing-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for step in self.steps()[: -self.keep]:
            # Renamed first: a half-removed directory never looks like a checkpoint.
            gone = self.root / f".removing-{step:08d}"
            shutil.rmtree(gone, ignore_errors=True)
            self.path(step).rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def write_durably(path: Path, data: bytes) -> None:
    """Writes a file and returns when its content is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, data: bytes) -> None:
    """Replaces a file in one step: a reader sees the old content or the new, never half."""
    temporary = path.with_name(f".writing-{path.name}")
    write_durably(temporary, data)
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

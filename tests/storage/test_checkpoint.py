"""Checkpoints: whole or not there at all, what was put in comes out, and damage is seen by name."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from runs import seed_everything, unequal
from torch import Tensor

from rhc import InputError
from rhc.rng import RandomState, preserved
from rhc.storage.checkpoint import _TYPES, Checkpoint, CheckpointStore, _sealed, _write_pieces
from rhc.storage.files import replace_durably, write_durably
from rhc.training.batches import Position, StepBatches

TENSORS: dict[str, Tensor] = {
    "float32": torch.randn(3, 4),
    "float64": torch.randn(2, dtype=torch.float64),
    "bfloat16": torch.randn(5).to(torch.bfloat16),
    "float16": torch.randn(5).half(),
    "bool": torch.tensor([True, False, True]),
    "int64": torch.tensor([-(2**63), 2**63 - 1]),
    "uint8": torch.arange(7, dtype=torch.uint8),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
    "another empty": torch.zeros(0),
    "not contiguous": torch.randn(4, 3).t(),
    "strided": torch.arange(10)[::3],
    "expanded": torch.tensor([2.0]).expand(4),
    "special": torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0]),
    "ungraded": torch.ones(2, requires_grad=True),
    "ключ/with.dots": torch.ones(1),
}

VALUES: dict[str, Any] = {
    "none": None,
    "list": [1, 0.1, "a", True],
    "nested": {"a": {"b": 1e-300}},
    "third": 1 / 3,
}


def checkpoint(step: int, fill: float = 1.0) -> Checkpoint:
    return Checkpoint(
        step,
        {"model": {"w": torch.full((3,), fill), "b": torch.arange(4)}, "average": {}},
        {"count": step, "text": "some words"},
    )


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


def same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach(), b.detach()
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    return torch.equal(a.isnan(), b.isnan()) and bool(
        (torch.where(a.isnan(), 0, a) == torch.where(b.isnan(), 0, b)).all()
    )


# Round trips -------------------------------------------------------------------------------------


def test_what_was_put_in_comes_out(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    store.save(Checkpoint(7, {"all": TENSORS, "none": {}}, VALUES))
    found = store.latest()
    assert found is not None and found.step == 7
    assert found.values == VALUES
    assert found.tensors.keys() == {"all", "none"} and found.tensors["none"] == {}
    assert found.tensors["all"].keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert same_bits(tensor, found.tensors["all"][name]), name


def test_numbers_that_json_lacks_come_back(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(Checkpoint(0, {}, {"a": float("nan"), "b": [float("-inf")], "c": (1, 2)}))
    found = store.load(0).values
    assert math.isnan(found.pop("a")) and found == {"b": [-math.inf], "c": [1, 2]}


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    directory = store.save(checkpoint(50))
    assert directory == tmp_path / "window-00000050"
    manifest = json.loads((directory / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("rhc.checkpoint", 1)
    assert manifest["step"] == 50 and manifest["torch"] == torch.__version__
    listed = manifest["files"]
    assert sorted([*listed, "manifest.json"]) == sorted(p.name for p in directory.iterdir())
    for name, record in listed.items():
        data = (directory / name).read_bytes()
        assert record == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert b"pickle" not in b"".join(p.read_bytes() for p in directory.iterdir())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_stay(keep: int, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep)
    for step in (0, 5, 10, 100, 20):
        store.save(checkpoint(step))
    assert store.steps() == [0, 5, 10, 20, 100][-keep:]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"window-{step:08d}" for step in store.steps()
    ]


def test_what_is_damaged_does_not_count(tmp_path: Path) -> None:
    """Of the two that are to stay both can be used; the damaged one goes."""
    store = CheckpointStore(tmp_path, keep=2)
    for step in (0, 5):
        store.save(checkpoint(step))
    (store.path(5) / "model.safetensors").write_bytes(b"")
    found = store.latest()
    assert found is not None and found.step == 0
    store.save(checkpoint(7))
    assert store.steps() == [0, 7]


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keep_checkpoints must be ≥ 1, got 0"):
        CheckpointStore(tmp_path, 0)


def test_a_step_saved_again_is_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(checkpoint(5, 1.0))
    store.save(checkpoint(5, 2.0))
    assert float(store.load(5).tensors["model"]["w"][0]) == 2
    assert store.steps() == [5]


def test_nothing_there(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "absent")
    assert store.steps() == [] and store.latest() is None
    with pytest.raises(InputError, match=r"manifest.json is damaged"):
        store.load(3)


# Interrupted writes ------------------------------------------------------------------------------


def test_leftovers_are_no_checkpoints_and_are_cleaned(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    store.save(checkpoint(5))
    shutil.copytree(store.path(5), tmp_path / ".writing-window-00000010")
    shutil.copytree(store.path(5), tmp_path / ".removing-00000000")
    (tmp_path / "window-old").mkdir()
    assert store.steps() == [5]
    found = store.latest()
    assert found is not None and found.step == 5
    store.save(checkpoint(10))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "window-00000005", "window-00000010", "window-old",
    ]  # fmt: skip


def test_a_checkpoint_without_its_manifest_is_passed_over(tmp_path: Path) -> None:
    notices: list[str] = []
    store = CheckpointStore(tmp_path, notice=notices.append)
    store.save(checkpoint(5))
    store.save(checkpoint(10))
    (store.path(10) / "manifest.json").unlink()
    found = store.latest()
    assert found is not None and found.step == 5
    assert len(notices) == 1 and str(store.path(10) / "manifest.json") in notices[0]


def test_the_manifest_is_written_last_and_the_rename_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file is durable before the manifest, the manifest before the name."""
    done: list[str] = []

    def noted(path: Path, data: Any, **settings: Any) -> Any:
        done.append(path.name)
        write = write_durably if path.name == "manifest.json" else _write_pieces
        return write(path, data, **settings)

    rename = os.rename
    monkeypatch.setattr("rhc.storage.checkpoint.write_durably", noted)
    monkeypatch.setattr("rhc.storage.checkpoint._write_pieces", noted)
    monkeypatch.setattr(
        "rhc.storage.checkpoint.sync", lambda path: done.append(f"sync {path.name}")
    )
    monkeypatch.setattr("os.rename", lambda a, b: (done.append("rename"), rename(a, b))[1])
    CheckpointStore(tmp_path / "root").save(checkpoint(5))
    assert sorted(done[:3]) == ["average.safetensors", "model.safetensors", "values.json"]
    assert done[3:6] == [f"sync {name}" for name in done[:3]]
    assert done[6:] == ["manifest.json", "sync .writing-window-00000005", "rename", "sync root"]


def test_a_replaced_file_is_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_durably(path, b"old")

    def half(at: Path, data: bytes) -> None:
        at.write_bytes(data[:1])
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr("rhc.storage.files.write_durably", half)
        with pytest.raises(OSError, match="no space"):
            replace_durably(path, b"new")
    assert path.read_bytes() == b"old"
    replace_durably(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


# Damage ------------------------------------------------------------------------------------------


def positions(size: int, at_most: int = 60) -> list[int]:
    return sorted(random.Random(size).sample(range(size), min(size, at_most)))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "average.safetensors", "values.json", "manifest.json"]
)
def test_a_flipped_bit_never_gives_another_checkpoint(name: str, tmp_path: Path) -> None:
    """The file is named."""
    store = CheckpointStore(tmp_path)
    store.save(checkpoint(5))
    path = store.path(5) / name
    whole, expected = path.read_bytes(), store.load(5)
    harmless = 0
    for position in positions(len(whole)):
        for bit in (0, 5, 7):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                found = store.load(5)
            except InputError as error:
                assert str(store.path(5)) in str(error)
                assert name == "manifest.json" or str(path) in str(error)
            else:
                harmless += 1
                assert unequal(expected.tensors, found.tensors) == []
                assert expected.values == found.values
    assert harmless == 0


@pytest.mark.parametrize("name", ["model.safetensors", "values.json", "manifest.json"])
def test_a_truncated_lengthened_or_missing_file_is_named(name: str, tmp_path: Path) -> None:
    notices: list[str] = []
    store = CheckpointStore(tmp_path, notice=notices.append)
    store.save(checkpoint(5))
    store.save(checkpoint(10))
    path = store.path(10) / name
    whole = path.read_bytes()
    for data in (*(whole[:n] for n in positions(len(whole) - 1, 20)), whole + b"x", None):
        path.unlink(missing_ok=True)
        if data is not None:
            path.write_bytes(data)
        notices.clear()
        found = store.latest()
        assert found is not None and found.step == 5
        assert len(notices) == 1 and notices[0].startswith(str(path))


def edited(store: CheckpointStore, step: int, edit: Any) -> None:
    path = store.path(step) / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]  # as of an older version, or forged
    manifest = edit(manifest) or manifest
    sealed = _sealed(manifest) if isinstance(manifest, dict) else json.dumps(manifest).encode()
    path.write_bytes(sealed)


MANIFESTS = {
    "not an object": lambda m: [1],
    "other format": lambda m: m.update(format="x"),
    "newer version": lambda m: m.update(version=2),
    "other step": lambda m: m.update(step=6),
    "files a list": lambda m: m.update(files=["model.safetensors"]),
    "size not a number": lambda m: m["files"]["values.json"].update(bytes="many"),
    "size infinite": lambda m: m["files"]["values.json"].update(bytes=float("inf")),
    "no digest": lambda m: m["files"]["values.json"].pop("sha256"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_cannot_be(name: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(checkpoint(5))
    edited(store, 5, MANIFESTS[name])
    with pytest.raises(InputError, match=r"window-00000005/manifest.json is damaged"):
        store.load(5)
    assert store.latest() is None


def test_a_link_a_pipe_and_a_sparse_giant_are_refused(tmp_path: Path) -> None:
    """Nothing outside is read, nothing is waited for, and nothing huge is taken into memory."""
    store = CheckpointStore(tmp_path / "checkpoints")
    path = store.save(checkpoint(5)) / "model.safetensors"
    whole = path.read_bytes()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"model.safetensors cannot be read"):
        store.load(5)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"model.safetensors does not match.*not a regular file"):
        store.load(5)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**42)
    with pytest.raises(InputError, match=r"it has 4398046511104 bytes in place of"):
        store.load(5)
    record = {"bytes": 2**45, "sha256": "0" * 64}
    edited(store, 5, lambda m: m["files"].update({"model.safetensors": record}))
    with pytest.raises(InputError, match="far more than this model needs"):
        store.load(5)
    path.unlink()
    path.write_bytes(whole)
    final = store.path(5)
    final.rename(tmp_path / "moved")
    final.symlink_to(tmp_path / "moved", target_is_directory=True)
    with pytest.raises(InputError, match="its directory is a link"):
        store.load(5)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        (2**40).to_bytes(8, "little"),
        b"\x02\0\0\0\0\0\0\0{}",
        b"\x08" + b"\0" * 7 + b"[" * 8,
    ],
)
def test_a_header_beyond_reason(data: bytes, tmp_path: Path) -> None:
    """Although size and digest are as the manifest says: a stranger wrote both."""
    store = CheckpointStore(tmp_path)
    path = store.save(checkpoint(5)) / "model.safetensors"
    path.write_bytes(data)
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edited(store, 5, lambda m: m["files"].update({"model.safetensors": record}))
    if data.endswith(b"{}"):
        assert store.load(5).tensors["model"] == {}
        return
    with pytest.raises(InputError, match=r"model.safetensors is damaged"):
        store.load(5)


def test_values_beyond_reason(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for data in (b"[" * 10**5, b'{"a": ' * 70 + b"1" + b"}" * 70, b"[1]", b'{"a": NaN}', b"\xff"):
        path = store.save(checkpoint(5)) / "values.json"
        path.write_bytes(data)
        record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        edited(store, 5, lambda m, record=record: m["files"].update({"values.json": record}))
        with pytest.raises(InputError, match=r"values.json is (damaged|missing)"):
            store.load(5)


def test_the_newest_good_one_stays_until_the_next_is_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that gives back other than it was given."""
    store = CheckpointStore(tmp_path, keep=1)
    store.save(checkpoint(5))

    def rotten(path: Path) -> None:
        if path.name == "model.safetensors":
            path.write_bytes(path.read_bytes()[:-1] + b"!")

    with monkeypatch.context() as patched:
        patched.setattr("rhc.storage.checkpoint.sync", rotten)
        with pytest.raises(OSError, match="reads back other than it was written"):
            store.save(checkpoint(10))
    assert store.steps() == [5] and store.load(5).step == 5
    store.save(checkpoint(10))
    assert store.steps() == [10]


@pytest.mark.parametrize(
    "name", ["../outside.json", "/outside.json", "sub/outside.json", "..", ".", "", "../../x"]
)
def test_a_manifest_cannot_point_outside(name: str, tmp_path: Path) -> None:
    """A file outside that matches size and digest is not read either."""
    store = CheckpointStore(tmp_path)
    store.save(checkpoint(5))
    data = b'{"stolen": 1}'
    (tmp_path / "outside.json").write_bytes(data)
    (store.path(5) / "sub").mkdir()
    (store.path(5) / "sub" / "outside.json").write_bytes(data)
    if name == "/outside.json":
        name = str(tmp_path / "outside.json")
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edited(store, 5, lambda m: m["files"].update({name: record}))
    with pytest.raises(InputError, match=r"outside its directory|cannot be read"):
        store.load(5)


# Random states and positions ---------------------------------------------------------------------


def drawn() -> list[Any]:
    return [
        torch.randn(3),
        torch.rand(2),
        np.random.standard_normal(3).tolist(),  # an odd number: numpy keeps the second of a pair
        np.random.randint(0, 100, 5).tolist(),
        random.gauss(0, 1),  # python keeps the second of a pair, too
        random.random(),
    ]


@given(st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_random_state_round_trip(seed: int, ahead: int) -> None:
    """Through tensors and back, in the middle of numpy's and python's pairs of normal draws."""
    with preserved():
        seed_everything(seed)
        for _ in range(ahead):
            drawn()
        if ahead % 2:
            np.random.standard_normal()
            random.gauss(0, 1)
        state = RandomState.capture()
        expected = [drawn(), drawn()]
        seed_everything(1)
        RandomState.from_tensors(state.to_tensors()).restore()
        assert unequal(expected, [drawn(), drawn()]) == []


def test_preserved_also_where_an_error_passes() -> None:
    before = RandomState.capture()
    with pytest.raises(ZeroDivisionError), preserved():
        drawn()
        raise ZeroDivisionError
    first = drawn()
    before.restore()
    assert unequal(first, drawn()) == []


def test_a_captured_state_is_a_copy() -> None:
    with preserved():
        state = RandomState.capture()
        first = drawn()
        state.restore()
        assert unequal(first, drawn()) == []
        state.restore()
        assert unequal(first, drawn()) == []


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_position_round_trip_through_a_checkpoint(taken: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(range(9), 3, shuffle=True, generator=generator)
    batches = StepBatches(loader, isolated=True, seed=5)
    batches.take(0, taken)
    position = batches.position(taken)
    store = CheckpointStore(tmp_path)
    store.save(Checkpoint(taken, {"train_batches": position.to_tensors()}, {}))
    found = Position.from_tensors(store.load(taken).tensors["train_batches"])
    assert unequal(position.to_tensors(), found.to_tensors()) == []
    assert (found.step, found.epoch, found.index) == (position.step, position.epoch, position.index)
    assert (found.start is None) == (taken == 0)


# Large ones ---------------------------------------------------------------------------------------


def test_a_large_checkpoint_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written by pieces, without a copy: any type, names, views, nothing, one number."""
    dtypes = [*_TYPES, torch.complex64]
    tensors = {f'{i}."é': torch.arange(-3, 9).view(3, 4).to(t).t() for i, t in enumerate(dtypes)}
    tensors |= {"none": torch.zeros(0, 4), "one": torch.tensor(3), "half": torch.ones(3).half()}
    groups = {"model": tensors, "rng": {"plain": torch.ones(2**19)}, "average": {}}
    groups["plain"] = {k: t for k, t in tensors.items() if t.dtype != torch.complex64}
    contents = []
    for limit in (2**40, 0):
        monkeypatch.setattr("rhc.storage.checkpoint.PARALLEL", limit)
        path = CheckpointStore(tmp_path / str(limit)).save(Checkpoint(7, groups, {"a": 1}))
        contents.append({p.name: p.read_bytes() for p in path.iterdir()})
    assert contents[0] == contents[1]
    found = CheckpointStore(tmp_path / "0").load(7).tensors
    assert all(torch.equal(found["model"][k], t) for k, t in tensors.items())


@pytest.mark.parametrize("limit", [2**40, 0])
@pytest.mark.parametrize("damage", ["a bit", "an end", "more"])
def test_what_reads_back_otherwise_is_not_kept(
    limit: int, damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rhc.storage.checkpoint.PARALLEL", limit)
    groups = {"model": {"w": torch.randn(2**19)}}
    store = CheckpointStore(tmp_path)
    store.save(Checkpoint(1, groups, {}))
    fsync = os.fsync

    def damaging(descriptor: int) -> None:
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.name == "model.safetensors":
            data = path.read_bytes()
            changed = bytes([data[-1] ^ 1])
            rest = {"a bit": data[:-1] + changed, "an end": data[:-1], "more": data + b"x"}
            path.write_bytes(rest[damage])

    monkeypatch.setattr("os.fsync", damaging)
    with pytest.raises(OSError, match="reads back other"):
        store.save(Checkpoint(2, groups, {}))
    assert store.steps() == [1]

"""Durable writes, and reads within limits: files may be huge, deeply nested, links or pipes.

benchmarks/faults.py injects faults into the functions of `os` that are called here by name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from rhc.errors import InputError

MOST_JSON_BYTES = 256 * 2**20
"""Limit of a JSON document; the tape of a million steps is smaller."""

MOST_TOML_BYTES = 2**20

MOST_DEPTH = 64
"""Limit of nesting; rhc writes six levels at most."""

OWN = re.compile(
    r"\.?[a-z]+(-\d+)?\.(json|jsonl|html|id)(\.crc32)?|\.lock|\.writing-.*|"
    r"checkpoints|tensorboard|jobs|pass-\d+"
)
"""Names that rhc writes, removes or makes in its directories."""

CLOSED_ON_EXEC = getattr(os, "O_CLOEXEC", 0)
NO_LINK = getattr(os, "O_NOFOLLOW", 0)


# Writing -----------------------------------------------------------------------------------------


def write_durably(path: Path, data: bytes, *, wait: bool = True) -> None:
    """Writes a file, replacing a link, and fsyncs it unless `wait` is False."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    with created(path) as descriptor:
        write_all(descriptor, data)
        if wait:
            os.fsync(descriptor)


@contextlib.contextmanager
def created(path: Path) -> Iterator[int]:
    """A descriptor of a new file; OSError where the file exists."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | CLOSED_ON_EXEC, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes all of `data`, in as many calls as the system needs."""
    rest = memoryview(data)
    while rest:
        written = os.write(descriptor, rest[: 2**26])
        rest = rest[written:]


def replace_durably(path: Path, data: bytes) -> None:
    """Replaces a file atomically."""
    temporary = path.with_name(f".writing-{path.name}")
    write_durably(temporary, data)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Fsyncs a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY | CLOSED_ON_EXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Makes a directory and its parents, each fsynced in the one above."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory)
        sync(directory.parent)


def remove(path: Path) -> None:
    if os.path.islink(path) or path.is_file():
        os.unlink(path)
    elif path.exists():
        shutil.rmtree(path)


def refuse_links(directory: Path) -> None:
    """Raises OSError where a name that rhc writes in a directory is a link, pipe or device, since
    writing would change what it points to. The directory itself may be a link."""
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            usual = entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
            if usual or not OWN.fullmatch(entry.name):
                continue
            mend = "remove it"
            if entry.is_symlink():
                mend += ", or put what it points to in its place, or link the whole directory"
            kind = "a link" if entry.is_symlink() else "no regular file"
            raise OSError(errno.ELOOP, f"{entry.name} is {kind}: {mend}", entry.path)


def cut(path: Path, length: int) -> None:
    """Truncates a file to `length` bytes without following a link."""
    descriptor = os.open(path, os.O_WRONLY | CLOSED_ON_EXEC | NO_LINK)
    try:
        os.ftruncate(descriptor, length)
    finally:
        os.close(descriptor)


def unshare(path: Path) -> None:
    """Breaks a hard link, so that changes to this file affect no other."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(path, follow_symlinks=False).st_nlink > 1:
            replace_durably(path, read_regular(path, sys.maxsize))


# Reading -----------------------------------------------------------------------------------------


def reason(error: OSError | ValueError) -> str:
    """Why a file could not be read or written, without its name."""
    return getattr(error, "strerror", None) or str(error)


@contextlib.contextmanager
def opened_regular(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading; OSError or ValueError for a link, pipe or device."""
    flags = os.O_RDONLY | CLOSED_ON_EXEC | NO_LINK | getattr(os, "O_NONBLOCK", 0)
    with open(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        yield file


def read_regular(path: Path, most: int, *, exactly: int | None = None) -> bytes:
    """The content of a regular file of at most `most` bytes, and `exactly` so many where that is
    given; OSError or ValueError otherwise."""
    with opened_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if exactly is not None and size != exactly:
            raise ValueError(f"it has {size} bytes in place of {exactly}")
        if size > most:
            raise ValueError(f"it has {size} bytes, more than the {most} that are read")
        data = file.read()
    if exactly is not None and len(data) != exactly:
        raise ValueError(f"it gave {len(data)} bytes in place of {exactly}")
    return data


_LONG_NUMBER = re.compile(rb"[0-9]{300}|[eE]\+?0*[1-9][0-9]{2}")
"""Matches in every number ≥ 1e300."""


def parsed_json(data: bytes | str) -> Any:
    """Parses JSON of bounded size and depth; ValueError otherwise, also for NaN, infinities and
    numbers that overflow a float (1e400)."""
    raw = data.encode() if isinstance(data, str) else bytes(data)
    if len(raw) > MOST_JSON_BYTES:
        raise ValueError(f"it has {len(raw)} bytes, more than the {MOST_JSON_BYTES} that are read")
    # The hooks are slower than the number parser in C: only for numbers that may overflow.
    hooks: dict[str, Any] = {}
    if _LONG_NUMBER.search(raw):
        hooks = {"parse_float": _finite, "parse_int": lambda text: int(_finite(text) and text)}
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, **hooks)
        # With fewer brackets the depth is within the limit.
        if raw.count(b"[") + raw.count(b"{") > MOST_DEPTH and _depth(value) > MOST_DEPTH:
            raise RecursionError
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None
    return value


def _depth(value: Any) -> int:
    if not isinstance(value, (list, dict)):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max(map(_depth, inner), default=0)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"a number is beyond 1e308: {text[:20]}…")
    return value


# What a document must have -----------------------------------------------------------------------

Kinds = Mapping[str, "tuple[type, ...] | Kinds"]
"""Entry of a JSON object -> the types it may have, or the entries of a nested object.

An entry may be missing or null where its types include NoneType; a nested object always may."""

NUMBER = (int, float)
NUMBER_OR_NONE = (int, float, type(None))

_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "nothing",
}


def misfit(record: Mapping[str, Any], kinds: Kinds, within: str = "") -> str | None:
    """What is wrong with an object, as a clause; None where every entry has its type."""
    for name, known in kinds.items():
        value = record.get(name)
        types = (dict, type(None)) if isinstance(known, Mapping) else known
        if type(value) not in types:
            words = " or ".join(_WORDS[kind] for kind in types)
            return f"{within}{name} must be {words}, got {str(json.dumps(value))[:60]}"
        if isinstance(known, Mapping):
            fault = misfit(value or {}, known, f"{within}{name}.")
            if fault is not None:
                return fault
    return None


def check_kinds(record: Mapping[str, Any], kinds: Kinds, source: Path | str) -> None:
    """Raises InputError naming `source` where an entry has another type."""
    fault = misfit(record, kinds)
    if fault is not None:
        raise InputError(f"{source} is damaged: {fault}; restore it")


# Documents: JSON objects with a digest -----------------------------------------------------------

SEAL = "sha256"
"""Last entry of a document: the digest of what precedes it."""


def finite(value: Any) -> Any:
    """`value` as strict JSON: NaN and infinities become null, arrays become lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if hasattr(value, "tolist"):  # a number or an array of numpy or torch
        return finite(value.tolist())
    return value


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """(path of an entry, its value in the first, in the second) where two JSON objects differ."""
    for key in sorted(first.keys() | second.keys()):
        a, b = first.get(key), second.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", short(a), short(b)


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def plain_document(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(finite(value), indent=1, allow_nan=False) + "\n").encode()


def sealed(value: Mapping[str, Any], *, indent: int | None = 1) -> bytes:
    """A JSON document that ends with the SHA-256 of its other entries, as text with `indent`."""
    plain = {key: entry for key, entry in finite(value).items() if key != SEAL}
    text = json.dumps(plain, indent=indent, allow_nan=False)
    return plain_document({**plain, SEAL: hashlib.sha256(text.encode()).hexdigest()})


def sum_beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.crc32")


def crc32_line(data: bytes) -> bytes:
    return b"%08x\n" % zlib.crc32(data)


def replace_summed(path: Path, data: bytes) -> None:
    """Replaces a file and its CRC-32, which is kept in a file beside it."""
    replace_durably(sum_beside(path), crc32_line(data))
    replace_durably(path, data)


def read_document(path: Path) -> tuple[Any, bool]:
    """(content without its seal, whether it was altered), also of an old or handwritten document
    without a seal; OSError or ValueError where it is no JSON."""
    # A run's own files may be reached through a link; a checkpoint's may not.
    data = read_regular(path.resolve(), MOST_JSON_BYTES)
    found = parsed_json(data)
    if not isinstance(found, dict):
        return found, False
    if (beside := sum_beside(path)).exists():
        return found, read_regular(beside, 2**10) != crc32_line(data)
    plain = {key: value for key, value in found.items() if key != SEAL}
    last = next(reversed(list(found.values())), None)
    # A last entry of 64 letters is a seal whose name is damaged.
    closed = SEAL in found or (isinstance(last, str) and len(last) == 64)
    return plain, closed and data != sealed(found)


def altered(path: Path) -> str:
    return (
        f"{path} was altered since it was written (restore it or, if that is meant, delete its "
        f"{SEAL} entry or the checksum beside it)"
    )


def read_json(path: Path, told: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """A JSON object from a file; InputErrors begin with its path. `told` gets a message where the
    document was altered."""
    try:
        found, changed = read_document(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)})") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(found).__name__}")
    if changed:
        told(altered(path))
    return found


def parsed_toml(data: bytes) -> dict[str, Any]:
    """Parses TOML of bounded size and depth; ValueError otherwise."""
    import tomllib

    if len(data) > MOST_TOML_BYTES:
        raise ValueError(f"it has {len(data)} bytes, more than the {MOST_TOML_BYTES} that are read")
    text = data.decode("utf-8")
    for line in text.splitlines():
        # Dotted keys nest without brackets, and tomllib takes quadratic time for them.
        if line.count(".") > 8 * MOST_DEPTH or line.count("[") + line.count("{") > 64 * MOST_DEPTH:
            raise ValueError("it is nested too deep")
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None

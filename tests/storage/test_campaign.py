"""Pieces of the campaign of benchmarks/faults.py: short ones always, the rest with -m slow."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rhc.errors import InputError
from rhc.storage.files import MOST_DEPTH, parsed_json, parsed_toml


def campaign() -> Any:
    """benchmarks/faults.py as a module."""
    if "rhc_faults_campaign" not in sys.modules:
        path = Path(__file__).resolve().parents[2] / "benchmarks" / "faults.py"
        spec = importlib.util.spec_from_file_location("rhc_faults_campaign", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["rhc_faults_campaign"] = module
        spec.loader.exec_module(module)
    return sys.modules["rhc_faults_campaign"]


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.mark.parametrize("count", [4, pytest.param(200, marks=pytest.mark.slow)])
def test_every_flip_is_found(count: int) -> None:
    assert campaign().flips(count, seed=count)


def test_every_truncation_is_found() -> None:
    assert campaign().truncations(1, seed=0)


@pytest.mark.slow
def test_a_disk_that_is_full_at_every_operation() -> None:
    assert campaign().full(1, seed=0)


@pytest.mark.parametrize("count", [60, pytest.param(20_000, marks=pytest.mark.slow)])
def test_parsers_answer_or_refuse(count: int) -> None:
    assert campaign().fuzz(count, seed=count)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(10))
def test_killed_anywhere(piece: int) -> None:
    """Twenty of the two hundred kills."""
    assert campaign().kills(20, seed=100 + piece)


# What JSON and TOML may be ------------------------------------------------------------------------

DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(DOCUMENTS)
def test_documents_come_back(document: Any) -> None:
    """Whatever brackets and quotes are inside their strings."""
    import json

    if "Infinity" not in json.dumps(document):
        assert parsed_json(json.dumps(document)) == document


@given(st.binary(max_size=200) | st.text("[]{}\",:\\ 1ea.=\n'", max_size=200).map(str.encode))
@settings(max_examples=300)
def test_anything_else_is_a_value_error(data: bytes) -> None:
    for parse in (parsed_json, parsed_toml):
        try:
            parse(data)
        except InputError:
            raise AssertionError("the caller names the file") from None
        except ValueError:
            pass


@pytest.mark.parametrize("depth", [MOST_DEPTH, MOST_DEPTH + 1, 10**5])
def test_how_deep_a_document_may_be(depth: int) -> None:
    for opening, closing in (("[", "]"), ('{"a":', "}")):
        text = opening * depth + "1" + closing * depth
        quoted = f'["{"[" * depth}", "\\\\", {"1," * 9} 1]'
        assert parsed_json(quoted)
        if depth <= MOST_DEPTH:
            assert parsed_json(text)
        else:
            with pytest.raises(ValueError, match="nested"):
                parsed_json(text)


def test_a_number_that_no_float_holds() -> None:
    """Found by 12,000 inputs: an OverflowError."""
    with pytest.raises(InputError, match="momentum must be"):
        campaign().TrainConfig.from_record({"momentum": 10**400}, "run.toml")


def test_sizes_of_an_idx_file_whose_product_is_0(tmp_path: Path) -> None:
    """Found by 100,000 inputs: a ValueError of numpy."""
    from runners.data import read_idx

    sizes = b"".join(n.to_bytes(4, "big") for n in (50331648, 33554432, 50331648, 67108864, 0))
    (tmp_path / "images").write_bytes(b"\0\0\x08\x05" + sizes)
    with pytest.raises(InputError, match="images is damaged"):
        read_idx(tmp_path / "images")


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 10**5, "a = " + "{b=" * 5000, ".".join("a" * 10**5) + " = 1", "#" * 2**21],
)
def test_settings_beyond_reason(text: str) -> None:
    with pytest.raises(ValueError, match=r"nested|bytes"):
        parsed_toml(text.encode())

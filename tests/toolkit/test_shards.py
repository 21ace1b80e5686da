"""The reader of safetensors headers refuses everything the format forbids, and reads all that the reference writes."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from quantlab.errors import PreflightError
from quantlab.output import ShardWriter
from quantlab.shards import BITS, TAGS, ShardReader, TensorSlot, layout, read_header


def file_with(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


EIGHT = bytes(8)

MALFORMED = {
    "empty": (b"", b"", 0, None),
    "not JSON": (b"{not json", EIGHT, None, "corrupt, the header is not JSON (download it again)"),
    "a list": ([], b"", None, "corrupt, the header is not a JSON object"),
    "a blank before the object": (b" {}", b"", None, "corrupt, the header is not a JSON object"),
    "header longer than the file": ({}, b"", 1000, "truncated, its header of 1,000 bytes does not fit into 10"),
    "header too large": ({}, b"", 200_000_000, "header too large, 200,000,000 bytes (the limit is 100,000,000)"),
    "truncated data": ({"a": entry()}, bytes(4), None, "a: truncated or out of range, it ends at byte"),
    "trailing data": ({"a": entry()}, bytes(12), None, "corrupt, 4 bytes after the last tensor"),
    "overlap": ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), None, "b: corrupt, its offsets overlap"),
    "gap": ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20), None, "b: corrupt, 4 unused bytes before it"),
    "out of range": ({"a": entry(shape=(1 << 40,), offsets=(0, 4 << 40))}, EIGHT, None, "a: truncated or out of range"),
    "backwards": ({"a": entry(offsets=(8, 0))}, EIGHT, None, "a: corrupt, offsets [8, 0] run backwards"),
    "wrong dtype tag": ({"a": entry("F31")}, EIGHT, None, "a: unknown dtype 'F31'; known: BOOL"),
    "dtype no string": ({"a": entry() | {"dtype": 3}}, EIGHT, None, "a: unknown dtype 3"),
    "shape and bytes differ": ({"a": entry(shape=(3,))}, EIGHT, None, "a: F32 [3] does not fit its 8 bytes"),
    "negative extent": ({"a": entry(shape=(-2,))}, EIGHT, None, "a: corrupt, shape [-2], data_offsets [0, 8]"),
    "extent no number": ({"a": entry(shape=(True, 2))}, EIGHT, None, "a: corrupt, shape [True, 2]"),
    "three offsets": ({"a": entry(offsets=(0, 4, 8))}, EIGHT, None, "a: corrupt, shape [2], data_offsets [0, 4, 8]"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, EIGHT, None, "a: corrupt, needs exactly dtype, shape"),
    "extra field": ({"a": entry() | {"x": 1}}, EIGHT, None, "a: corrupt, needs exactly dtype, shape"),
    "name with a newline": ({"a\nb": entry()}, EIGHT, None, "corrupt, tensor name 'a\\nb' has characters that do not"),
    "lone surrogate": (b'{"\\ud800": {}}', b"", None, "corrupt, tensor name '\\ud800' has characters that do not"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", None, "corrupt, __metadata__ must map strings to strings"),
    "deep nesting": (b'{"a":' + b"[" * 100_000, b"", None, "corrupt, the header is not JSON"),
    "huge number": (b'{"a":' + b"1" * 10_000 + b"}", b"", None, "corrupt, the header is not JSON"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    header, data, length, message = MALFORMED[case]
    path = file_with(tmp_path / "x.safetensors", header, data, length)
    if case == "empty":
        path.write_bytes(b"")
        message = "0 bytes are no safetensors file (download it again)"
    with pytest.raises(PreflightError, match=re.escape(f"{path}: {message}")) as error:
        read_header(path)
    assert "\n" not in str(error.value)


def test_duplicate_names_in_one_header(tmp_path: Path) -> None:
    one = json.dumps(entry())
    path = file_with(tmp_path / "x.safetensors", f'{{"a": {one}, "a": {one}}}'.encode(), EIGHT)
    with pytest.raises(PreflightError, match="corrupt, duplicate name 'a' in the header"):
        read_header(path)


@settings(max_examples=300)
@given(data=st.binary(max_size=300), length=st.none() | st.integers(0, 1 << 64) | st.integers(0, 400))
def test_any_bytes_give_a_header_or_one_line(data: bytes, length: int | None, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(data if length is None else min(length, (1 << 64) - 1).to_bytes(8, "little") + data)
    check_reads_or_refuses(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
near_entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F31", None, 7]),
        "shape": st.lists(st.integers(-1, 5), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=1, max_size=3) | json_values,
    }
)


@settings(max_examples=300)
@given(
    header=st.dictionaries(st.text(max_size=6), near_entries | json_values, max_size=3) | json_values, tail=st.binary()
)
def test_any_json_gives_a_header_or_one_line(header: Any, tail: bytes, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz-json.safetensors"
    check_reads_or_refuses(file_with(path, header, tail))


def check_reads_or_refuses(path: Path) -> None:
    tensors = {}
    with suppress(PreflightError):  # any other exception fails the test
        tensors, _ = read_header(path)
    with path.open("rb") as file:
        size = len(file.read())
    assert all(8 <= info.begin <= info.end <= size for info in tensors.values())
    assert sum(info.nbytes for info in tensors.values()) <= size


def some_tensors() -> dict[str, torch.Tensor]:
    return {
        "byte": torch.arange(3, dtype=torch.uint8),
        "double": torch.randn(2, 3, dtype=torch.float64),
        "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 5, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "half": torch.randn(5).half(),
    }


def test_reads_what_the_reference_library_writes(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found, metadata = read_header(tmp_path / "x.safetensors")
    reader = ShardReader()
    assert metadata == {"format": "pt"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = reader.read(found[name])
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape
        assert torch.equal(read.double(), tensor.double()), name
    assert torch.equal(reader.read(found["double"], (1, 2)), tensors["double"][1:2])
    reader.close()


def test_the_reference_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = some_tensors()
    made = layout([TensorSlot(n, TAGS[t.dtype], tuple(t.shape)) for n, t in tensors.items()], {"format": "pt"})
    writer = ShardWriter(tmp_path / "x.safetensors", made)
    for name in reversed(tensors):  # in any order
        writer.write(name, 0, tensors[name].contiguous().view(-1).view(torch.uint8))
    writer.close()
    assert (tmp_path / "x.safetensors").stat().st_size == made.nbytes
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(tensor.double(), tensors[name].double())
    found, _ = read_header(tmp_path / "x.safetensors")
    assert all(info.begin % (BITS[info.dtype] // 8) == 0 for info in found.values()), "aligned to the element"


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(8)}, tmp_path / "x.safetensors")
    found, _ = read_header(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"short")
    with pytest.raises(PreflightError, match=r"x\.safetensors: truncated while it was being read"):
        ShardReader().read(found["a"])

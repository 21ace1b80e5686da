"""One safetensors file: a strict reader of its header, reads of single tensors, and a writer of known size.

The format: eight bytes N (unsigned, little-endian), N bytes of JSON `{name: {dtype, shape, data_offsets}}` with an
optional `__metadata__` of strings, then the data without gaps. Everything is checked before a byte of data is read: a
damaged shard of a large model should be found in the first second and not after an hour.

Data is read with `pread` into a buffer of the caller and not through a memory map: mapped pages count as resident
memory, a file that shrinks under a map kills the process, and a pinned buffer can go to the GPU without another copy.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from quantlab.errors import PreflightError

HEADER_LIMIT = 100_000_000  # the format's own limit

# Bits of one element of every dtype of the format, and the torch dtypes for those that this project reads.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip
TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
TAGS = {dtype: tag for tag, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shard` is the path of its file, `begin` and `end` are absolute byte positions in it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class TurnedInfo(TensorInfo):
    """A matrix [N, K] that lies as columns `first` to `first + N` of the rows [K, width] between `begin` and `end`."""

    first: int = 0
    width: int = 0

    @property
    def nbytes(self) -> int:
        return (self.end - self.begin) // self.width * self.shape[0]


@dataclass(frozen=True)
class TensorSlot:
    """A tensor to be written: what a header says of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * BITS[self.dtype] // 8


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of one file. Raises PreflightError, one line, for anything the format forbids."""
    try:
        with path.open("rb") as file:
            return _parse(path, *_raw_header(path, file))
    except OSError as error:
        raise PreflightError(f"{path}: cannot be read: {error.strerror}") from None


def _raw_header(path: Path, file: BinaryIO) -> tuple[bytes, int]:
    """The header's bytes and the size of the file."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    if len(start) < 8:
        raise PreflightError(f"{path}: {size} bytes are no safetensors file (download it again)")
    length = int.from_bytes(start, "little")
    if length > HEADER_LIMIT:
        raise PreflightError(
            f"{path}: header too large, {length:,} bytes (the limit is {HEADER_LIMIT:,}): not a safetensors file"
        )
    if length > size - 8:
        raise PreflightError(f"{path}: truncated, its header of {length:,} bytes does not fit into {size:,}")
    return file.read(length), size


def _parse(path: Path, raw: bytes, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except PreflightError as error:
        raise PreflightError(f"{path}: {error}") from None
    except (ValueError, RecursionError):
        raise PreflightError(f"{path}: corrupt, the header is not JSON (download it again)") from None
    if not isinstance(header, dict) or raw[:1] != b"{":
        raise PreflightError(f"{path}: corrupt, the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise PreflightError(f"{path}: corrupt, __metadata__ must map strings to strings")
    data_start = 8 + len(raw)
    tensors = {name: _entry(path, name, entry, data_start) for name, entry in header.items()}
    _check_layout(path, sorted(tensors.values(), key=lambda t: (t.begin, t.end)), data_start, size)
    return tensors, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise PreflightError(f"corrupt, duplicate name {twice!r} in the header")
    return result


def _entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not name.isprintable():  # control characters and lone surrogates: no message and no file can hold them
        raise PreflightError(f"{path}: corrupt, tensor name {name!r} has characters that do not print")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise PreflightError(f"{path}: {name}: corrupt, needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise PreflightError(f"{path}: {name}: unknown dtype {dtype!r}; known: {', '.join(BITS)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise PreflightError(f"{path}: {name}: corrupt, shape {shape!r}, data_offsets {offsets!r}")
    begin, end = offsets
    if begin > end:
        raise PreflightError(f"{path}: {name}: corrupt, offsets [{begin}, {end}] run backwards")
    if prod(shape) * BITS[dtype] != (end - begin) * 8:
        raise PreflightError(f"{path}: {name}: {dtype} {shape} does not fit its {end - begin:,} bytes")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, data_start + end)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def _check_layout(path: Path, ordered: list[TensorInfo], data_start: int, size: int) -> None:
    """No gap, no overlap, nothing past the end, nothing left over: the format demands all four."""
    position = data_start
    for tensor in ordered:
        if tensor.begin < position:
            raise PreflightError(f"{path}: {tensor.name}: corrupt, its offsets overlap another tensor")
        if tensor.begin > position:
            raise PreflightError(f"{path}: {tensor.name}: corrupt, {tensor.begin - position:,} unused bytes before it")
        position = tensor.end
        if position > size:
            raise PreflightError(
                f"{path}: {tensor.name}: truncated or out of range, it ends at byte {position:,} of {size:,}"
            )
    if position < size:
        raise PreflightError(f"{path}: corrupt, {size - position:,} bytes after the last tensor")


class ShardReader:
    """Reads byte ranges of files, from any number of threads; every file is opened once."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def read_into(self, path: Path, begin: int, buffer: Tensor) -> None:
        """Fill `buffer` (uint8, contiguous, on the CPU) with the bytes from `begin` on."""
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        while view:
            try:
                count = os.preadv(self._open(path), [view], begin)
            except OSError as error:
                raise PreflightError(f"{path}: cannot be read: {error.strerror}") from None
            if count == 0:
                raise PreflightError(f"{path}: truncated while it was being read")
            view, begin = view[count:], begin + count

    def read(self, info: TensorInfo, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor, or its rows [rows[0], rows[1]), as torch holds it: on the CPU, in the dtype of the file."""
        if isinstance(info, TurnedInfo):
            lies = TensorInfo(info.name, info.dtype, (info.shape[1], info.width), info.shard, info.begin, info.end)
            begin, end = rows or (0, info.shape[0])
            return self.read(lies)[:, info.first + begin : info.first + end].T.contiguous()
        shape, begin, end = info.shape, info.begin, info.end
        if rows is not None:
            row_bytes = info.nbytes // shape[0]
            shape = (rows[1] - rows[0], *shape[1:])
            begin, end = begin + rows[0] * row_bytes, begin + rows[1] * row_bytes
        buffer = torch.empty(end - begin, dtype=torch.uint8)
        self.read_into(info.shard, begin, buffer)
        return as_dtype(buffer, info, shape)

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def _open(self, path: Path) -> int:
        if path not in self._files:
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise PreflightError(f"{path}: cannot be read: {error.strerror}") from None
            if self._files.setdefault(path, descriptor) != descriptor:  # another thread was faster
                os.close(descriptor)
        return self._files[path]


def as_dtype(buffer: Tensor, info: TensorInfo, shape: tuple[int, ...]) -> Tensor:
    if info.dtype not in TORCH_DTYPES:
        raise PreflightError(f"{info.name}: dtype {info.dtype} can be copied but not computed with")
    return buffer.view(TORCH_DTYPES[info.dtype]).view(shape)


@dataclass(frozen=True)
class ShardLayout:
    """A file to be written: every position is fixed before the first byte is, so the bytes may come in any order."""

    header: bytes
    offsets: dict[str, int]
    nbytes: int


def layout(slots: list[TensorSlot], metadata: dict[str, str]) -> ShardLayout:
    """Header and positions of tensors in one file.

    Wide elements come first, as the reference writer does it: every tensor is then aligned to its own element size,
    which readers that map the file rely on. Tensors of one width keep the order given.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    position, relative = 0, {}
    for slot in sorted(slots, key=lambda slot: -BITS[slot.dtype]):
        relative[slot.name] = position
        end = position + slot.nbytes
        entries[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # the data starts aligned
    header = len(text).to_bytes(8, "little") + text
    return ShardLayout(header, {name: len(header) + at for name, at in relative.items()}, len(header) + position)

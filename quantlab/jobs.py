"""What is done to one tensor on its way from the source to the output, cut into pieces of bounded size.

Scales belong to blocks of at most 128 rows, so a band of rows can be quantized without the rest of its tensor: memory
depends on the size of a piece, not of a tensor, and one huge tensor keeps all workers busy. A piece reads its bytes,
computes on its lane's device, and writes at positions that are known beforehand: how a tensor is cut, and in which
order pieces run, does not show in the output.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from quantlab.checkpoint import STACK_SCALE, WEIGHT, Stored, encode, slots, stack_slots
from quantlab.errors import PreflightError
from quantlab.fused_experts import Stack, flat
from quantlab.shards import TAGS, TORCH_DTYPES, ShardReader, TensorInfo, TensorSlot, TurnedInfo, as_dtype
from quantlab_calib.rounding import round_int4
from quantlab_kernels.formats import INT4
from quantlab_kernels.packing import unpack_int4
from quantlab_kernels.qtensor import QuantizedTensor, TensorSpec, quantize

# On a CPU the float32 temporaries of a piece should stay in the cache: at four times this size it takes five times as
# long per element, most of it page faults. On a GPU a piece should hide the cost of launching kernels.
PIECE_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 22}
COPY_BYTES = 1 << 22

# Integer type of the same width, and the bits that are all set in Inf and NaN: a test that costs one pass.
EXPONENT = {"BF16": (torch.int16, 0x7F80), "F16": (torch.int16, 0x7C00), "F32": (torch.int32, 0x7F800000)}

Write = Callable[[str, int, Tensor], None]
Piece = Callable[["Lane", Write], None]


@dataclass
class Lane:
    """What one worker thread owns: its pinned buffers, and its share of the clock by stage."""

    reader: ShardReader
    device: torch.device
    seconds: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "quantize": 0.0, "write": 0.0})
    _buffers: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start

    def read(self, info: TensorInfo, begin: int, end: int) -> Tensor:
        """Bytes [begin, end) of a tensor, uint8 on the CPU, in a buffer that the lane's next read overwrites."""
        with self.clock("read"):
            buffer = self._buffer("read", end - begin)
            self.reader.read_into(info.shard, info.begin + begin, buffer)
        return buffer

    def read_rows(self, info: TensorInfo, begin: int, end: int) -> Tensor:
        """Rows [begin, end) of a tensor, on the lane's device."""
        if isinstance(info, TurnedInfo):
            with self.clock("read"):
                return self.reader.read(info, (begin, end)).to(self.device)
        row_bytes = info.nbytes // info.shape[0]
        buffer = self.read(info, begin * row_bytes, end * row_bytes)
        moved = buffer.to(self.device, non_blocking=True)
        return as_dtype(moved, info, (end - begin, *info.shape[1:]))

    def fetch(self, tensor: Tensor, use: str) -> Tensor:
        """The bytes of a tensor on the CPU. From a GPU the copy is only queued: `wait` before reading them."""
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        return flat if flat.device.type == "cpu" else self._buffer(use, flat.numel()).copy_(flat, non_blocking=True)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _buffer(self, use: str, nbytes: int) -> Tensor:
        held = self._buffers.get(use)
        if held is None or held.numel() < nbytes:
            held = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            self._buffers[use] = held
        return held[:nbytes]


class Job(Protocol):
    """One or more tensors of the output, and how they come about."""

    @property
    def slots(self) -> tuple[TensorSlot, ...]: ...

    @property
    def info(self) -> TensorInfo: ...

    def pieces(self, elements: int) -> Iterator[tuple[int, Piece]]:
        """(bytes of the source that it handles, piece), in order; a piece has about so many elements."""
        ...


@dataclass(frozen=True)
class Copy:
    """A tensor as it is, maybe under another name."""

    info: TensorInfo
    name: str

    @property
    def slots(self) -> tuple[TensorSlot, ...]:
        return (TensorSlot(self.name, self.info.dtype, self.info.shape),)

    def pieces(self, elements: int) -> Iterator[tuple[int, Piece]]:
        for begin in range(0, self.info.nbytes, COPY_BYTES):
            end = min(begin + COPY_BYTES, self.info.nbytes)
            yield end - begin, partial(self._run, begin, end)

    def _run(self, begin: int, end: int, lane: Lane, write: Write) -> None:
        data = lane.read(self.info, begin, end)
        refuse_nonfinite(data, self.info, lane.reader)
        with lane.clock("write"):
            write(self.name, begin, data)


@dataclass(frozen=True)
class Replace:
    """A tensor that calibration changed or added: `info` is that of the source's, or would be."""

    info: TensorInfo
    value: Tensor

    @property
    def slots(self) -> tuple[TensorSlot, ...]:
        return (TensorSlot(self.info.name, self.info.dtype, self.info.shape),)

    def pieces(self, elements: int) -> Iterator[tuple[int, Piece]]:
        yield self.info.nbytes, self._run

    def _run(self, lane: Lane, write: Write) -> None:
        data = self.value.to(TORCH_DTYPES[self.info.dtype]).contiguous().view(-1).view(torch.uint8)
        with lane.clock("write"):
            write(self.info.name, 0, data)


@dataclass(frozen=True)
class Quantize:
    """A weight [N, K] into codes and scales.

    rounded  None: rounded to nearest. Else a function of a band of rows and the number of its first row that returns
             it quantized, or None
    """

    info: TensorInfo
    module: str
    stored: Stored
    rounded: Callable[[Tensor, int], QuantizedTensor | None] | None = None

    @property
    def slots(self) -> tuple[TensorSlot, ...]:
        return slots(self.module, self.info.shape, self.info.dtype, self.stored)

    def pieces(self, elements: int) -> Iterator[tuple[int, Piece]]:
        yield from bands(self.info, self.stored.kind(self.module).weight, self._run, elements)

    def _run(self, begin: int, end: int, lane: Lane, write: Write) -> None:
        weight = lane.read_rows(self.info, begin, end)
        with lane.clock("quantize"):
            refuse_nonfinite(weight.view(-1), self.info, lane.reader)
            quantized = self.rounded(weight, begin) if self.rounded else None
            quantized = quantized or nearest(weight, self.stored.kind(self.module).weight)
            parts = list(encode(quantized, self.module, self.stored, self.info.dtype, begin, self.info.shape[0]))
            fetched = [(name, row, part, lane.fetch(part, str(i))) for i, (name, row, part) in enumerate(parts)]
            lane.wait()
        with lane.clock("write"):
            for name, row, part, data in fetched:
                write(name, row * part[0].nbytes, data)


@dataclass(frozen=True)
class QuantizeStack:
    """Experts that stay one tensor into codes and scales that lie like it. With `rounded`, a function of the module and
    then as in `Quantize`, an expert at a time, turned so that its matrices are [N, K]."""

    stack: Stack
    stored: Stored
    rounded: Callable[[str, Tensor, int], QuantizedTensor | None] | None = None

    @property
    def info(self) -> TensorInfo:
        return self.stack.info

    @property
    def slots(self) -> tuple[TensorSlot, ...]:
        return stack_slots(self.info.name, self.info.shape, self.stored)

    def pieces(self, elements: int) -> Iterator[tuple[int, Piece]]:
        expert = self.info.elements // self.info.shape[0]
        elements = expert if self.rounded else min(elements, expert)
        yield from bands(flat(self.info), self.stored.weight, self._run, elements)

    def _run(self, begin: int, end: int, lane: Lane, write: Write) -> None:
        weight = lane.read_rows(flat(self.info), begin, end)
        with lane.clock("quantize"):
            refuse_nonfinite(weight.view(-1), self.info, lane.reader)
            found = self._expert(weight, begin) if self.rounded else quantize(weight, self.stored.weight)
            codes, scale = lane.fetch(found.codes, "codes"), lane.fetch(found.scale, "scale")
            lane.wait()
        with lane.clock("write"):
            write(self.info.name, begin * found.codes[0].nbytes, codes)
            write(self.info.name + STACK_SCALE, begin // self.stored.weight.block[0] * found.scale[0].nbytes, scale)

    def _expert(self, weight: Tensor, begin: int) -> QuantizedTensor:
        """One expert, each of its matrices rounded by itself."""
        assert self.rounded is not None
        spec, modules = self.stored.weight, self.stack.modules(begin // self.info.shape[1])
        matrices = (weight.T if self.stack.transposed else weight).chunk(len(modules))
        found = [
            self.rounded(module, matrix.contiguous(), 0) or quantize(matrix.contiguous(), spec)
            for module, matrix in zip(modules, matrices, strict=True)
        ]
        codes = torch.cat([part.codes.view(torch.uint8) for part in found])
        scale = torch.cat([part.scale for part in found])
        codes, scale = (codes.T, scale.T) if self.stack.transposed else (codes, scale)
        return QuantizedTensor(codes.contiguous().view(spec.format.dtype), scale.contiguous(), spec)


def nearest(weight: Tensor, spec: TensorSpec) -> QuantizedTensor:
    """A weight [N, K] rounded without data: INT4 with the best clip of each group, FP8 to the scale of its largest."""
    if spec.format is INT4:
        return QuantizedTensor(*round_int4(weight, group=spec.block[1]), spec)
    return quantize(weight, spec)


@dataclass(frozen=True)
class Widen:
    """A scale under another name, in F32 whatever it was in. Scales are small: one piece."""

    info: TensorInfo
    name: str

    @property
    def slots(self) -> tuple[TensorSlot, ...]:
        return (TensorSlot(self.name, "F32", self.info.shape),)

    def pieces(self, elements: int) -> Iterator[tuple[int, Piece]]:
        yield self.info.nbytes, self._run

    def _run(self, lane: Lane, write: Write) -> None:
        scale = lane.reader.read(self.info).to(torch.float32)
        write(self.name, 0, scale.view(-1).view(torch.uint8))


@dataclass(frozen=True)
class Dequantize:
    """Codes and scales back into a weight of `dtype`. `stored` is the kind of this one; K is a multiple of 8. `module`
    of a stack of experts is the tensor's name."""

    info: TensorInfo
    scale: TensorInfo
    module: str
    stored: Stored
    dtype: torch.dtype

    @property
    def slots(self) -> tuple[TensorSlot, ...]:
        *rows, columns = self.info.shape
        packed = self.stored.weight.format is INT4
        return (TensorSlot(self._name, TAGS[self.dtype], (*rows, columns * 8 if packed else columns)),)

    @property
    def _name(self) -> str:
        return self.module + WEIGHT if len(self.info.shape) == 2 else self.info.name

    def pieces(self, elements: int) -> Iterator[tuple[int, Piece]]:
        yield from bands(flat(self.info), self.stored.weight, self._run, elements)

    def _run(self, begin: int, end: int, lane: Lane, write: Write) -> None:
        spec = self.stored.weight
        block = spec.block[0]
        rows = None if block == -1 else (begin // block, -(-end // block))
        scale = lane.reader.read(flat(self.scale), rows).to(lane.device, torch.float32)
        codes = lane.read_rows(flat(self.info), begin, end)
        with lane.clock("quantize"):
            if spec.format is INT4:
                codes = unpack_int4(codes, codes.shape[1] * 8)
            scale = scale.view(spec.scale_shape(tuple(codes.shape)))
            values = QuantizedTensor(codes, scale, spec).dequantize(self.dtype)
            data = lane.fetch(values, "values")
            lane.wait()
        with lane.clock("write"):
            write(self._name, begin * values[0].nbytes, data)


def bands(
    info: TensorInfo, spec: TensorSpec, run: Callable[[int, int, Lane, Write], None], elements: int
) -> Iterator[tuple[int, Piece]]:
    """Cut a weight into bands of whole blocks of rows, of about so many elements."""
    rows, columns = info.shape
    block = max(spec.block[0], 1)
    whole = spec.block[0] == -1 or isinstance(info, TurnedInfo)  # to be turned, all of a matrix is read at once
    step = rows if whole else max(elements // max(columns, 1) // block, 1) * block
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        yield (end - begin) * (info.nbytes // rows), partial(run, begin, end)


def refuse_nonfinite(piece: Tensor, info: TensorInfo, reader: ShardReader) -> None:
    """Raise PreflightError if a piece of the tensor holds NaN or Inf, counting those of the whole tensor.

    Inf is let through in what is no weight or bias: attention masks are kept as buffers with -Inf.
    """
    if info.dtype not in EXPONENT or not piece.numel():
        return
    integer, exponent = EXPONENT[info.dtype]
    if int((piece.view(integer) & exponent).amax()) != exponent:
        return
    nans, infs = _count_nonfinite(info, reader)
    if nans or info.name.endswith((WEIGHT, ".bias")):
        raise PreflightError(
            f"{info.name}: {nans:,} NaN and {infs:,} Inf among its {info.elements:,} values; the source is damaged"
        )


def _count_nonfinite(info: TensorInfo, reader: ShardReader) -> tuple[int, int]:
    if isinstance(info, TurnedInfo):
        whole = reader.read(info)
        return int(whole.isnan().sum()), int(whole.isinf().sum())
    flat = replace(info, shape=(info.elements,))
    nans = infs = 0
    for begin in range(0, info.elements, COPY_BYTES):
        part = reader.read(flat, (begin, min(begin + COPY_BYTES, info.elements)))
        nans += int(part.isnan().sum())
        infs += int(part.isinf().sum())
    return nans, infs

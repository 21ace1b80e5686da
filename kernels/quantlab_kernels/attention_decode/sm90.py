"""Hopper backend: `sm90.cu`, compiled at run time by NVRTC, one pair of kernels per configuration."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantlab_kernels.attention_decode import triton
from quantlab_kernels.attention_decode.reference import Attributes
from quantlab_kernels.attention_decode.splits import shares
from quantlab_kernels.common import driver, nvrtc
from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.common.kv import Code, PackedKV
from quantlab_kernels.kv_append.triton import _strides

if TYPE_CHECKING:
    from quantlab_kernels.attention_decode.op import Problem

_FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CODES: dict[Code, int] = {"e4m3": 0, "int8": 1, "int4": 2}
TILE = 16  # tokens of an MMA
WARPS = 8  # of a CTA, unless it is alone
# Of the processors, from which on a CTA of many warps for each sequence and head is quickest; and of very long INT4.
ONE_WAVE, BUSY = 0.72, 0.84
LONG, VERY_LONG = 4096, 12288  # tokens
_HEADERS = ("operands.cuh", "tiles.cuh", "sums.cuh")
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Config:
    """eights: query rows of a tile / 8; warps, stages of a warp's ring, tiles of a stage, ctas on a multiprocessor."""

    eights: int
    warps: int = WARPS
    stages: int = 3
    ctas: int = 2
    tiles: int = 1

    def shared_bytes(self, problem: Problem, cluster: int = 1) -> int:
        """Rings or warps' sums, barriers; queries, mean and channels; the sums that a CTA gets from its cluster."""
        d, rows = problem.d, 8 * self.eights
        row = sum(d // (2 if code == "int4" else 1) + 4 for code in (problem.key, problem.value))
        merged = rows * (4 * d + 24)
        rings = self.warps * (max(self.stages * self.tiles * TILE * row, merged) + 8 * self.stages)
        queries = rows * d * problem.dtype.itemsize + 8 * d
        valid = min(problem.heads_q // problem.heads_kv * problem.sq, rows)
        sums = 32 * (valid * d // 4 + cluster) if cluster > 1 else 0
        return -(-rings // 16) * 16 + queries + sums


def supports(problem: Problem) -> str | None:
    if problem.sm != 90:
        return f"compiled for sm_90 only, the GPU is sm_{problem.sm}"
    if problem.d not in (64, 128, 256):
        return f"head dim {problem.d}, needs 64, 128 or 256"
    if problem.key not in _CODES or problem.value not in _CODES:
        return "reads codes of 8 and 4 bits only"
    if problem.page % TILE:
        return f"pages and rings need a multiple of {TILE} slots"
    return nvrtc.missing()


@remembered
def config(problem: Problem, sm_count: int = 132) -> Config:
    """Two CTAs of eight warps; one where accumulators fill the registers. Short rows come 32 at a time.

    Almost as many sequences and heads as multiprocessors get one CTA of twelve warps each, and are not divided. INT4 is
    bound by instructions: long sequences get sixteen warps, and very long ones leave no processors without work.
    """
    rows = problem.heads_q // problem.heads_kv * problem.sq
    wide = sum(problem.d // (2 if code == "int4" else 1) for code in (problem.key, problem.value))
    tiles = 2 if wide <= 128 and problem.page % (2 * TILE) == 0 else 1
    if problem.d == 256:
        return Config(1, stages=2 if wide > 256 else 3, ctas=1)
    if rows > 8:
        return Config(2, ctas=1, tiles=tiles)
    int4 = problem.key == problem.value == "int4"
    least = BUSY if int4 and problem.longest > VERY_LONG else ONE_WAVE
    if not least * sm_count <= problem.batch * problem.heads_kv <= sm_count:
        return Config(1, tiles=tiles)
    return Config(1, warps=16 if int4 and problem.longest > LONG else 12, ctas=1, tiles=tiles)


def source(config: Config, problem: Problem) -> nvrtc.Source:
    """What is compiled for a configuration."""
    macros = {
        "D": problem.d, "NT": config.eights, "KEY": _CODES[problem.key], "VALUE": _CODES[problem.value],
        "QUERY": _FLOATS[problem.dtype], "PAGED": int(problem.page > 0 and not problem.ring), "RING": int(problem.ring),
        "SOFTCAP": int(problem.softcap), "NEAR": int(problem.near > 0), "WARPS": config.warps,
        "STAGES": config.stages, "TILES": config.tiles, "CTAS": config.ctas,
    }  # fmt: skip
    headers = {name: (_FOLDER / name).read_text() for name in _HEADERS}
    headers |= {name: (_FOLDER.parent / "common" / name).read_text() for name in ("sm90.cuh", "attention.cuh")}
    return nvrtc.Source("attention_decode", (_FOLDER / "sm90.cu").read_text(), headers, macros)


@functools.cache
def _compiled(source: _Key) -> tuple[driver.Kernel, driver.Kernel]:
    code = nvrtc.cubin(source.source)
    return driver.Kernel(code, "attention_decode"), driver.Kernel(code, "merge")


@dataclass(frozen=True)
class _Key:
    """A source by its hash, which decides the machine code."""

    key: str
    source: nvrtc.Source

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key


@remembered
def kernels(config: Config, problem: Problem) -> tuple[driver.Kernel, driver.Kernel]:
    """The kernel that attends and the one that merges."""
    text = source(config, problem)
    return _compiled(_Key(text.key(""), text))


def warmup(problems: Iterable[Problem], *, workers: int = 8) -> int:
    """Compile what the problems need into the disk cache; returns how many kernels that are. Needs no GPU."""
    return nvrtc.compile_all((source(config(p), p) for p in problems if supports(p) is None), workers=workers)


def launch(
    problem: Problem, q: Tensor, cache: PackedKV, length: Tensor, start: Tensor | None, table: Tensor | None,
    attributes: Attributes, sinks: Tensor | None, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fill out [B, Sq, Hq, D] and lse [B, Hq, Sq]. A cache whose slots lie apart goes to Triton."""
    p, sm_count = problem, gpu_of(q).sm_count
    chosen = config(problem, sm_count)
    if not (_plain(cache.k, cache.k_scale) and _plain(cache.v, cache.v_scale) and _others_plain(cache)):
        return triton.launch(problem, q, cache, length, start, table, attributes, sinks, out, lse)
    if q.stride(3) != 1 or not _in_pieces(q):
        q = q.clone(memory_format=torch.contiguous_format)
    rows = p.heads_q // p.heads_kv * p.sq
    tiles = -(-rows // (8 * chosen.eights))
    tokens = p.longest if p.window < 0 else min(p.longest, p.window + p.sq)
    pairs = p.batch * p.heads_kv * tiles
    count, clustered = 1, False
    if chosen.warps == WARPS:
        count, clustered = shares(pairs, tokens, chosen.ctas, sm_count, WARPS * chosen.tiles * TILE)
    mergers = 1 if count <= 8 else 4  # threads that add up the shares of one element
    part = sums = None
    if count > 1 and not clustered:
        part = q.new_empty(count * p.batch * p.heads_kv * rows * p.d, dtype=torch.float32)
        sums = q.new_empty(count * p.batch * p.heads_kv * rows * 2, dtype=torch.float32)
    addresses = (
        q, cache.k, cache.v, cache.k_scale, cache.v_scale, cache.k_mean, cache.k_channel, length, start, table, sinks,
        cache.k_near, cache.v_near, part, sums, out, lse,
    )  # fmt: skip
    strides = (
        *q.stride()[:3], *_bytes(cache.k), *_bytes(cache.v), *_bytes(cache.k_scale), *_bytes(cache.v_scale),  # type: ignore[arg-type]
        _per_sequence(cache.k_mean), _per_sequence(cache.k_channel), *_strides(cache.k_near), *_strides(cache.v_near),
    )  # fmt: skip
    params = struct.pack(
        "<17Q19q16i2f", *(0 if t is None else t.data_ptr() for t in addresses), *strides,
        p.batch, p.heads_kv, p.heads_q // p.heads_kv, p.sq, rows, tiles, count, cache.capacity,
        0 if table is None else table.stride(0), attributes.window, 0 if sinks is None else _FLOATS[sinks.dtype],
        cache.first, cache.newest, 0 if cache.k_near is None else _FLOATS[cache.k_near.dtype], mergers, int(clustered),
        attributes.scale, attributes.softcap,
    )  # fmt: skip
    attend, merge = kernels(chosen, problem)
    device = q.get_device()
    cluster = count if clustered else 1
    shape = driver.Launch(pairs * count, 32 * chosen.warps, cluster, chosen.shared_bytes(p, cluster), early=True)
    attend.launch(shape, params, device)
    if count > cluster:
        merge.launch(driver.Launch(p.batch * p.heads_kv * rows, mergers * p.d, 1, 0, early=True), params, device)


def _plain(codes: Tensor, scale: Tensor | None) -> bool:
    """Whether slots follow each other, and sequences and heads begin at a multiple of 16 bytes."""
    assert scale is not None
    together = codes.stride(2) == codes.shape[3] and scale.stride(2) * scale.element_size() == 4
    return together and codes.data_ptr() % 16 == 0 and codes.stride(0) % 16 == 0 and codes.stride(1) % 16 == 0


def _others_plain(cache: PackedKV) -> bool:
    """Whether near tokens and numbers of channels, if there are any, are read 16 bytes at a time."""
    near = [t for t in (cache.k_near, cache.v_near) if t is not None]
    numbers = [t for t in (cache.k_mean, cache.k_channel) if t is not None]
    return all(t.element_size() == 2 and t.stride(3) == 1 and _in_pieces(t) for t in near) and all(
        t.is_contiguous() and t.data_ptr() % 16 == 0 for t in numbers
    )


def _in_pieces(tensor: Tensor) -> bool:
    """Whether rows of the last dimension begin at a multiple of 16 bytes."""
    bytes_ = tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(
        size == 1 or stride * bytes_ % 16 == 0 for size, stride in zip(tensor.shape[:3], tensor.stride(), strict=False)
    )


def _bytes(tensor: Tensor) -> tuple[int, int]:
    return tensor.stride(0) * tensor.element_size(), tensor.stride(1) * tensor.element_size()


def _per_sequence(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)

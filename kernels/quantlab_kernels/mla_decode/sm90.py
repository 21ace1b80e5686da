"""Hopper backend: `sm90.cu`, compiled at run time by NVRTC, one pair of kernels per configuration."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantlab_kernels.common import driver, nvrtc
from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.hardware import gpu_of
from quantlab_kernels.common.kv import Code
from quantlab_kernels.common.latent import PackedLatent
from quantlab_kernels.common.wgmma import wgmma_variant
from quantlab_kernels.mla_decode import triton
from quantlab_kernels.mla_decode.division import TILE, parts, row_tile

if TYPE_CHECKING:
    from quantlab_kernels.mla_decode.op import Problem

FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_CODES: dict[Code, int] = {"float": 0, "e4m3": 1, "int8": 2, "int4": 3}
_MAPPED = {torch.bfloat16: driver.BFLOAT16, torch.float16: driver.FLOAT16}
_FOLDER = Path(__file__).parent
CHUNK, ROPE = 8192, 64  # bytes of 64 tokens in the ring, channels of the position
MERGED = 32  # channels times parts that a thread of the second kernel merges
MANY_PARTS = 32  # from which on a CTA of the second kernel takes but 128 channels
SHARED = 232448  # bytes of shared memory that a CTA may have


@dataclass(frozen=True)
class Config:
    """rows of a tile (heads times queries), a multiple of 8 for each of `share` warpgroups that divide a tile's
    channels; teams of them that take tiles in turns."""

    rows: int
    share: int = 1
    teams: int = 1

    @property
    def threads(self) -> int:
        return 128 * self.share * self.teams + 128

    def ring(self, rank: int) -> int:
        """Chunks in flight: what the rest leaves of shared memory."""
        fixed = (rank + ROPE) // 64 * 128 * self.rows + 12 * self.rows + 16
        team = self.rows * (128 + 16 + 16 + (256 if self.share == 2 else 0))
        return (SHARED - fixed - self.teams * team) // (CHUNK + 24)


def supports(problem: Problem) -> str | None:
    p = problem
    if p.sm != 90:
        return f"compiled for sm_90 only, the GPU is sm_{p.sm}"
    if p.rank not in (256, 512) or p.rope != ROPE:
        return f"{p.rank} latent channels and {p.rope} of the position, needs 256 or 512 and {ROPE}"
    if p.kept not in _MAPPED:
        return f"the cache keeps {p.kept}, needs bfloat16 or float16"
    if p.page % 16 or (p.page % TILE and TILE % p.page):
        return f"pages of {p.page} tokens, needs multiples of {TILE}, or 16, 32"
    return nvrtc.missing()


@remembered
def config(problem: Problem) -> Config:
    """The tile of rows that `row_tile` chooses, and as many teams as registers and shared memory hold.

    For more than 16 rows of latents in 16 bits, and more than 32 of INT8, two warpgroups divide the outputs. Other
    codes take 32 where `sm90_rows` would be quicker with more than 16 but cannot run.
    """
    rows, tile = problem.heads * problem.sq, row_tile(problem)
    if tile == 16:
        return Config(16, teams=2 if problem.code == "float" else 3)
    if problem.code == "float" or (tile > 32 and problem.code == "int8" and problem.rank > 256):
        return Config(min(64, -(-rows // 16) * 16), share=2)
    return Config(min(32, -(-rows // 8) * 8), teams=2)


def source(config: Config, problem: Problem) -> nvrtc.Source:
    """What is compiled for a configuration."""
    p = problem
    macros = {
        "L": p.rank, "FORMAT": _CODES[p.code], "KEPT": FLOATS[p.kept], "QUERY": FLOATS[p.dtype], "N": config.rows,
        "SHARE": config.share, "TEAMS": config.teams, "RING": config.ring(p.rank), "PAGED": int(p.page > 0),
        "BOX": math.gcd(p.page, TILE), "SHARED": SHARED,
    }  # fmt: skip
    kept, rows = "bf16" if p.kept == torch.bfloat16 else "f16", config.rows
    both = rows if rows > 32 else 2 * rows  # queries are two numbers, which a product takes at once or one by one
    wgmma = {
        "float": [wgmma_variant("wgmma_turned", rows, "f32", kept, kept, registers=False, turned=True)],
        "e4m3": [
            wgmma_variant("wgmma_codes", both, "f32", "e4m3", "e4m3", registers=False),
            wgmma_variant("wgmma_outputs", rows, "f32", "e4m3", "e4m3", registers=True),
        ],
        "int8": [
            wgmma_variant("wgmma_codes", both, "s32", "s8", "s8", registers=False),
            wgmma_variant("wgmma_outputs", rows, "f32", "f16", "f16", registers=True),
        ],
        "int4": [
            wgmma_variant("wgmma_codes", both, "s32", "u8", "s8", registers=True),
            wgmma_variant("wgmma_outputs", rows, "f32", "e4m3", "e4m3", registers=True),
        ],
    }[p.code]
    wgmma.append(wgmma_variant("wgmma_kept", rows, "f32", kept, kept, registers=False))
    headers = {name: (_FOLDER.parent / "common" / name).read_text() for name in ("sm90.cuh", "attention.cuh")}
    own = ("work.cuh", "codes.cuh", "queries.cuh", "scores.cuh", "outputs.cuh", "merge.cuh")
    headers |= {name: (_FOLDER / name).read_text() for name in own}
    headers["wgmma.cuh"] = "".join(wgmma)
    return nvrtc.Source("mla_decode", (_FOLDER / "sm90.cu").read_text(), headers, macros)


@remembered
def kernels(config: Config, problem: Problem) -> tuple[driver.Kernel, driver.Kernel]:
    """The kernel that attends and the one that merges."""
    code = nvrtc.cubin(source(config, problem))
    return driver.Kernel(code, "mla_decode"), driver.Kernel(code, "merge")


def launch(
    problem: Problem, q_latent: Tensor, q_rope: Tensor, cache: PackedLatent, length: Tensor, start: Tensor | None,
    table: Tensor | None, scale: float, out: Tensor, lse: Tensor, chosen: Config | None = None,
) -> None:  # fmt: skip
    """Fill out [B, Sq, H, L] and lse [B, H, Sq]. A cache that the copy engine cannot read goes to Triton."""
    c = chosen or config(problem)
    pair, grid = kernels(c, compiled_for(problem)), Grid(c.rows, c.threads, pieces=4)
    run(pair, grid, problem, q_latent, q_rope, cache, length, start, table, scale, out, lse)


def compiled_for(problem: Problem) -> Problem:
    """Of a problem what `source` reads."""
    return replace(problem, batch=0, heads=0, sq=0, longest=0)


@dataclass(frozen=True)
class Grid:
    """rows of a CTA's tile, and its threads; channels of queries that are read at a time: `pieces`; CTAs of
    neighbouring tiles that work together: `cluster`; channels of a thread of the kernel that merges: `merged`."""

    rows: int
    threads: int
    pieces: int = 8
    cluster: int = 1
    merged: int = 4


def run(
    pair: tuple[driver.Kernel, driver.Kernel], grid: Grid, problem: Problem, q_latent: Tensor, q_rope: Tensor,
    cache: PackedLatent, length: Tensor, start: Tensor | None, table: Tensor | None, scale: float, out: Tensor,
    lse: Tensor,
) -> None:  # fmt: skip
    """As `launch`: one of the pair attends and, where sequences are divided, the other merges."""
    p, (attend, merge) = problem, pair
    if not (_readable(cache.latent) and _readable(cache.rope)):
        return triton.launch(problem, q_latent, q_rope, cache, length, start, table, scale, out, lse)
    q_latent, q_rope = (x if _in_pieces(x, grid.pieces) else x.contiguous() for x in (q_latent, q_rope))
    rows = p.heads * p.sq
    tiles = -(-rows // grid.rows)
    count = parts(p, grid.rows, gpu_of(q_latent).sm_count)
    part = sums = None
    if count > 1:
        part = q_latent.new_empty(count * p.batch * rows * p.rank, dtype=torch.float32)
        sums = q_latent.new_empty(count * p.batch * rows * 2, dtype=torch.float32)
    addresses = (q_latent, q_rope, cache.scale, length, start, table, part, sums, out, lse)
    params = b"".join((
        _map(cache.latent, math.gcd(p.page, TILE)), _map(cache.rope, math.gcd(p.page, TILE)),
        struct.pack("<10Q", *(0 if t is None else t.data_ptr() for t in addresses)),
        struct.pack(
            "<7q10if", *q_latent.stride()[:3], *q_rope.stride()[:3],
            0 if cache.scale is None else cache.scale.stride(0),
            p.heads, p.sq, rows, tiles, count, cache.capacity, 0 if table is None else table.stride(0),
            _rows_apart(cache.latent), _rows_apart(cache.rope), p.batch, scale * math.log2(math.e),
        ),
    ))  # fmt: skip
    params += bytes(-len(params) % 64)
    device = q_latent.get_device()
    shape = driver.Launch(p.batch * tiles * count, grid.threads, grid.cluster, SHARED, early=True)
    attend.launch(shape, params, device)
    if count > 1:
        merge.launch(merge_shape(p, count, grid.merged), params, device)


def merge_shape(problem: Problem, count: int, width: int) -> driver.Launch:
    """Of the kernel that adds `count` parts: a row's threads, of `width` channels each, in groups that share the parts
    and meet in shared memory, with sums of all channels and two numbers for each group."""
    p, channels = problem, problem.rank if count < MANY_PARTS else 128
    groups = -(-count * width // MERGED)
    shared = groups * (4 * channels + 8) if groups > 1 else 0
    ctas = p.batch * p.heads * p.sq * p.rank // channels
    return driver.Launch(ctas, channels // width * groups, 1, shared, early=True)


def _in_pieces(x: Tensor, channels: int) -> bool:
    """Whether every row is read so many channels at a time."""
    aligned = x.data_ptr() % (channels * x.element_size()) == 0 and all(s % channels == 0 for s in x.stride()[:3])
    return x.stride(3) == 1 and aligned


def _readable(x: Tensor) -> bool:
    """Whether the copy engine reads all sequences, or pages, as rows of one matrix."""
    return x.data_ptr() % 16 == 0 and x.stride(0) % x.shape[2] == 0


def _rows_apart(x: Tensor) -> int:
    """Rows from a sequence, or page, to the next."""
    return x.stride(0) // x.shape[2]


def _map(x: Tensor, box: int) -> bytes:
    """All slots as rows, in boxes of 128 bytes."""
    return _encoded(
        _MAPPED.get(x.dtype, driver.UINT8), x.data_ptr(), x.shape[2], (x.shape[0] - 1) * _rows_apart(x) + x.shape[1],
        x.element_size(), box,
    )  # fmt: skip


@remembered
def _encoded(kind: int, pointer: int, columns: int, rows: int, itemsize: int, box: int) -> bytes:
    return driver.tensor_map(
        kind, pointer, columns, rows, columns * itemsize, 128 // itemsize, box, driver.SWIZZLE_128
    )  # fmt: skip

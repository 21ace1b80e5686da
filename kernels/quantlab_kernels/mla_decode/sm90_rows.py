"""Hopper backend for many rows (heads times queries): `floats.cu` for latents in 16 bits, `rows.cu` for codes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantlab_kernels.common import driver, nvrtc
from quantlab_kernels.common.backends import remembered
from quantlab_kernels.common.latent import PackedLatent
from quantlab_kernels.common.wgmma import wgmma_variant
from quantlab_kernels.mla_decode import sm90
from quantlab_kernels.mla_decode.division import EVEN, LARGEST, TILE, even_tiles, row_tile, time_us

if TYPE_CHECKING:
    from quantlab_kernels.mla_decode.op import Problem

_FOLDER = Path(__file__).parent
_FORMATS = {"float": 0, "e4m3": 1, "int4": 3}


@dataclass(frozen=True)
class Config:
    """halves of tiles of latents in the ring, and position parts: `ropes`; rows of a tile (heads times queries), 64 in
    16 bits; warpgroups that score: `scorers`; CTAs that bring tiles to each other: `cluster`."""

    halves: int
    ropes: int = 2
    rows: int = LARGEST
    scorers: int = 1
    cluster: int = 1

    @property
    def threads(self) -> int:
        return 128 * (self.scorers + 2)


def supports(problem: Problem) -> str | None:
    if reason := able(problem):
        return reason
    tile = row_tile(problem)
    return None if tile in wide_tiles(problem) else f"sm90 is quicker with {tile} rows a tile"


def able(problem: Problem) -> str | None:
    """Whether it can run; queries of codes and weights of E4M3 are rounded, see the README."""
    p = problem
    if p.code not in _FORMATS or (p.code == "int4" and p.rank != 512):
        return f"{p.code} latents of {p.rank} channels, needs floats, E4M3, or INT4 of 512"
    if p.dtype not in (torch.bfloat16, torch.float16) or (p.code == "float" and p.dtype != p.kept):
        return f"{p.dtype} queries for a cache of {p.kept}, needs 16 bits, of one dtype for latents in 16 bits"
    return sm90.supports(problem)


def wide_tiles(problem: Problem) -> tuple[int, ...]:
    """Rows of a tile that it can have."""
    return even_tiles(problem) if problem.code in EVEN else (LARGEST,)


@remembered
def config(problem: Problem) -> Config:
    """The quickest of its tiles; CTAs in pairs where a sequence has an even number of row tiles.

    As much is in the ring as shared memory holds beside queries of 64 rows. More for fewer rows takes no less time, nor
    do two warpgroups that score E4M3, for which up to 48 rows leave registers.
    """
    rows = min(wide_tiles(problem), key=lambda tile: time_us(problem, tile))
    tiles = -(-problem.heads * problem.sq // rows)
    return {
        "float": Config(6, cluster=1 if tiles % 2 else 2), "e4m3": Config(8, rows=rows),
        "int4": Config(12, ropes=6, rows=rows, scorers=2),
    }[problem.code]  # fmt: skip


def source(config: Config, problem: Problem) -> nvrtc.Source:
    """What is compiled for a configuration."""
    p, c = problem, config
    macros = {
        "L": p.rank, "FORMAT": _FORMATS[p.code], "KEPT": sm90.FLOATS[p.kept], "QUERY": sm90.FLOATS[p.dtype],
        "PAGED": int(p.page > 0), "BOX": math.gcd(p.page, TILE), "SHARED": sm90.SHARED, "N": c.rows,
        "HALVES": c.halves, "ROPES": c.ropes, "SCORERS": c.scorers, "CLUSTER": c.cluster,
    }  # fmt: skip
    kept = "bf16" if p.kept == torch.bfloat16 else "f16"
    if p.code == "float":
        wgmma = [
            wgmma_variant("wgmma_scores", LARGEST, "f32", kept, kept, registers=True),
            wgmma_variant("wgmma_rest", LARGEST, "f32", kept, kept, registers=False),
            wgmma_variant("wgmma_outputs", p.rank // 2, "f32", kept, kept, registers=False, turned_b=True),
        ]
    else:
        scores = ("s32", "s8", "s8") if p.code == "int4" else ("f32", "e4m3", "e4m3")
        columns = c.rows if p.code == "int4" else 2 * c.rows  # both numbers of a query at once
        weights = "f16" if p.code == "int4" else "e4m3"
        wgmma = [
            wgmma_variant("wgmma_rope", c.rows, "f32", kept, kept, registers=False),
            wgmma_variant("wgmma_scores", columns, *scores, registers=p.code == "int4"),
            wgmma_variant("wgmma_outputs", c.rows, "f32", weights, weights, registers=True),
        ]
    headers = {name: (_FOLDER.parent / "common" / name).read_text() for name in ("sm90.cuh", "attention.cuh")}
    rows = (f"rows_{part}.cuh" for part in ("softmax", "codes", "e4m3", "int4"))
    own = ("work.cuh", "tiles.cuh", "codes.cuh", *rows, "merge.cuh")
    headers |= {name: (_FOLDER / name).read_text() for name in own}
    headers["wgmma.cuh"] = "".join(wgmma)
    name = "floats" if p.code == "float" else "rows"
    return nvrtc.Source(f"mla_decode_{name}", (_FOLDER / f"{name}.cu").read_text(), headers, macros)


@remembered
def kernels(config: Config, problem: Problem) -> tuple[driver.Kernel, driver.Kernel]:
    """The kernel that attends and the one that merges."""
    code = nvrtc.cubin(source(config, problem))
    return driver.Kernel(code, "mla_decode"), driver.Kernel(code, "merge")


def launch(
    problem: Problem, q_latent: Tensor, q_rope: Tensor, cache: PackedLatent, length: Tensor, start: Tensor | None,
    table: Tensor | None, scale: float, out: Tensor, lse: Tensor, chosen: Config | None = None,
) -> None:  # fmt: skip
    """As `sm90.launch`."""
    c = chosen or config(problem)
    pair, grid = kernels(c, sm90.compiled_for(problem)), sm90.Grid(c.rows, c.threads, cluster=c.cluster, merged=8)
    sm90.run(pair, grid, problem, q_latent, q_rope, cache, length, start, table, scale, out, lse)

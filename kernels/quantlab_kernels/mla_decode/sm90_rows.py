"""Hopper backend for many rows (heads times queries): `floats.cu` for latents in 16 bits, `rows.cu` for codes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantlab_kernels.common import driver, nvrtc
from quantlab_kernels.common.latent import PackedLatent
from quantlab_kernels.common.wgmma import wgmma_variant
from quantlab_kernels.mla_decode import sm90
from quantlab_kernels.mla_decode.division import TILE, row_tile

if TYPE_CHECKING:
    from quantlab_kernels.mla_decode.op import Problem

_FOLDER = Path(__file__).parent
ROWS = 64
_FORMATS = {"float": 0, "e4m3": 1, "int4": 3}


@dataclass(frozen=True)
class Config:
    """halves of tiles of latents in the ring, and position parts: `ropes`; warpgroups that score: `scorers`; CTAs that
    bring tiles to each other: `cluster`."""

    halves: int
    ropes: int = 2
    scorers: int = 1
    cluster: int = 1

    @property
    def threads(self) -> int:
        return 128 * (self.scorers + 2)


def supports(problem: Problem) -> str | None:
    if reason := able(problem):
        return reason
    tile = row_tile(problem)
    return None if tile == ROWS else f"sm90 is quicker with {tile} rows a tile"


def able(problem: Problem) -> str | None:
    """Whether it can run; queries of codes and weights of E4M3 are rounded, see the README."""
    p = problem
    if p.code not in _FORMATS or (p.code == "int4" and p.rank != 512):
        return f"{p.code} latents of {p.rank} channels, needs floats, E4M3, or INT4 of 512"
    if p.dtype not in (torch.bfloat16, torch.float16) or (p.code == "float" and p.dtype != p.kept):
        return f"{p.dtype} queries for a cache of {p.kept}, needs 16 bits, of one dtype for latents in 16 bits"
    return sm90.supports(problem)


@functools.cache
def config(problem: Problem) -> Config:
    """As much in the ring as shared memory holds; CTAs in pairs where a sequence has an even number of row tiles."""
    tiles = -(-problem.heads * problem.sq // ROWS)
    return {
        "float": Config(6, cluster=1 if tiles % 2 else 2), "e4m3": Config(8), "int4": Config(12, ropes=6, scorers=2),
    }[problem.code]  # fmt: skip


def source(config: Config, problem: Problem) -> nvrtc.Source:
    """What is compiled for a configuration."""
    p, c = problem, config
    macros = {
        "L": p.rank, "FORMAT": _FORMATS[p.code], "KEPT": sm90.FLOATS[p.kept], "QUERY": sm90.FLOATS[p.dtype], "N": ROWS,
        "PAGED": int(p.page > 0), "BOX": math.gcd(p.page, TILE), "SHARED": sm90.SHARED, "HALVES": c.halves,
        "ROPES": c.ropes, "SCORERS": c.scorers, "CLUSTER": c.cluster,
    }  # fmt: skip
    kept = "bf16" if p.kept == torch.bfloat16 else "f16"
    if p.code == "float":
        wgmma = [
            wgmma_variant("wgmma_scores", ROWS, "f32", kept, kept, registers=True),
            wgmma_variant("wgmma_rest", ROWS, "f32", kept, kept, registers=False),
            wgmma_variant("wgmma_outputs", p.rank // 2, "f32", kept, kept, registers=False, turned_b=True),
        ]
    else:
        scores = ("s32", "s8", "s8") if p.code == "int4" else ("f32", "e4m3", "e4m3")
        columns = ROWS if p.code == "int4" else 2 * ROWS  # both numbers of a query at once
        weights = "f16" if p.code == "int4" else "e4m3"
        wgmma = [
            wgmma_variant("wgmma_rope", ROWS, "f32", kept, kept, registers=False),
            wgmma_variant("wgmma_scores", columns, *scores, registers=p.code == "int4"),
            wgmma_variant("wgmma_outputs", ROWS, "f32", weights, weights, registers=True),
        ]
    headers = {name: (_FOLDER.parent / "common" / name).read_text() for name in ("sm90.cuh", "attention.cuh")}
    own = ("work.cuh", "tiles.cuh", "rows_softmax.cuh", "rows_codes.cuh", "rows_e4m3.cuh", "rows_int4.cuh", "merge.cuh")
    headers |= {name: (_FOLDER / name).read_text() for name in own}
    headers["wgmma.cuh"] = "".join(wgmma)
    name = "floats" if p.code == "float" else "rows"
    return nvrtc.Source(f"mla_decode_{name}", (_FOLDER / f"{name}.cu").read_text(), headers, macros)


@functools.cache
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
    pair, grid = kernels(c, sm90.compiled_for(problem)), sm90.Grid(ROWS, c.threads, cluster=c.cluster)
    sm90.run(pair, grid, problem, q_latent, q_rope, cache, length, start, table, scale, out, lse)

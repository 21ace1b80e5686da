"""Hopper backend for many rows (heads times queries): `rows.cu`, compiled at run time by NVRTC."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantlab_kernels.common import driver, nvrtc
from quantlab_kernels.common.latent import PackedLatent
from quantlab_kernels.common.wgmma import wgmma_variant
from quantlab_kernels.mla_decode import sm90, triton

if TYPE_CHECKING:
    from quantlab_kernels.mla_decode.op import Problem

_FOLDER = Path(__file__).parent
ROWS, THREADS = 64, 384
_FORMATS = {"float": 0, "e4m3": 1, "int4": 3}


@dataclass(frozen=True)
class Config:
    """halves: of tiles of latents in the ring, position parts: `ropes`;  parts: E4M3 numbers that make a query."""

    halves: int = 5
    ropes: int = 2
    parts: int = 1
    in_turn: bool = False
    raws: int = 0
    early: bool = False


def supports(problem: Problem) -> str | None:
    return able(problem)


def able(problem: Problem) -> str | None:
    p = problem
    if p.code not in _FORMATS:
        return f"{p.code} latents, needs floats, E4M3 or INT4"
    if p.heads * p.sq < ROWS // 2:
        return f"{p.heads * p.sq} rows, takes {ROWS} at once"
    if p.dtype not in (torch.bfloat16, torch.float16) or (p.code == "float" and p.dtype != p.kept):
        return f"{p.dtype} queries, needs the cache's 16-bit dtype"
    return sm90.supports(problem)


@functools.cache
def config(problem: Problem) -> Config:
    if problem.code == "float":
        return Config()
    return Config(halves=10, ropes=3, parts=2) if problem.code == "e4m3" else Config(halves=6, ropes=3, parts=2, raws=8)


def source(config: Config, problem: Problem) -> nvrtc.Source:
    """What is compiled for a configuration."""
    p, c = problem, config
    macros = {
        "L": p.rank, "FORMAT": _FORMATS[p.code], "KEPT": sm90.FLOATS[p.kept], "QUERY": sm90.FLOATS[p.dtype], "N": ROWS,
        "PAGED": int(p.page > 0), "BOX": math.gcd(p.page, sm90.TILE), "SHARED": sm90.SHARED, "HALVES": c.halves,
        "ROPES": c.ropes, "PARTS": c.parts, "RAWS": c.raws, "EARLY": int(c.early), "IN_TURN": int(c.in_turn),
    }  # fmt: skip
    kept = "bf16" if p.kept == torch.bfloat16 else "f16"
    wgmma = [wgmma_variant("wgmma_rope", ROWS, "f32", kept, kept, registers=True)]
    if p.code == "float":
        wgmma += [
            wgmma_variant("wgmma_scores", ROWS, "f32", kept, kept, registers=True),
            wgmma_variant("wgmma_shared", ROWS, "f32", kept, kept, registers=False),
            wgmma_variant("wgmma_outputs", p.rank // 2, "f32", kept, kept, registers=False, turned_b=True),
        ]
    else:
        wgmma += [
            wgmma_variant("wgmma_scores", ROWS, "f32", "e4m3", "e4m3", registers=True),
            wgmma_variant("wgmma_shared", ROWS, "f32", "e4m3", "e4m3", registers=False),
            wgmma_variant("wgmma_outputs", ROWS, "f32", "e4m3", "e4m3", registers=True),
        ]
    headers = {name: (_FOLDER.parent / "common" / name).read_text() for name in ("sm90.cuh", "attention.cuh")}
    headers |= {name: (_FOLDER / name).read_text() for name in ("work.cuh", "merge.cuh")}
    headers["wgmma.cuh"] = "".join(wgmma)
    return nvrtc.Source("mla_decode_rows", (_FOLDER / "rows.cu").read_text(), headers, macros)


@functools.cache
def kernels(config: Config, problem: Problem) -> tuple[driver.Kernel, driver.Kernel]:
    """The kernel that attends and the one that merges; of the problem only what `source` reads matters."""
    code = nvrtc.cubin(source(config, problem))
    return driver.Kernel(code, "mla_decode"), driver.Kernel(code, "merge")


def warmup(problems: Iterable[Problem], *, workers: int = 8) -> int:
    """Compile what the problems need into the disk cache; returns how many kernels that are. Needs no GPU."""
    return nvrtc.compile_all((source(config(p), p) for p in problems if supports(p) is None), workers=workers)


def launch(
    problem: Problem, q_latent: Tensor, q_rope: Tensor, cache: PackedLatent, length: Tensor, start: Tensor | None,
    table: Tensor | None, scale: float, out: Tensor, lse: Tensor, chosen: Config | None = None,
) -> None:  # fmt: skip
    """Fill out [B, Sq, H, L] and lse [B, H, Sq]. A cache that the copy engine cannot read goes to Triton."""
    p, c = problem, chosen or config(problem)
    if not sm90.readable(cache):
        return triton.launch(problem, q_latent, q_rope, cache, length, start, table, scale, out, lse)
    q_latent, q_rope = (x if _in_pieces(x) else x.contiguous() for x in (q_latent, q_rope))
    pair, grid = kernels(c, replace(p, batch=0, heads=0, sq=0, longest=0)), sm90.Grid(ROWS, THREADS)
    sm90.run(pair, grid, p, q_latent, q_rope, cache, length, start, table, scale, out, lse)


def _in_pieces(x: Tensor) -> bool:
    """Whether every row is read in pieces of 16 bytes."""
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in x.stride()[:3])

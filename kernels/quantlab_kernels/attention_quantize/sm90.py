"""Hopper backend: `sm90.cu`, compiled at run time by NVRTC."""

from __future__ import annotations

import functools
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantlab_kernels.attention_quantize.reference import BLOCK, Rotary, hadamard, signs
from quantlab_kernels.common import driver, nvrtc
from quantlab_kernels.common.lasting import lasting

if TYPE_CHECKING:
    from quantlab_kernels.attention_quantize.op import Problem

_FOLDER = Path(__file__).parent
_INPUT = {torch.bfloat16: 1, torch.float16: 2}
_THREADS = 256
HEAD_DIMS = (64, 96, 128)


def supports(problem: Problem) -> str | None:
    if problem.sm != 90:
        return f"compiled for sm_90 only, the GPU is sm_{problem.sm}"
    if problem.d not in HEAD_DIMS or problem.dtype not in _INPUT:
        return f"takes 16 bits and head dimensions of {HEAD_DIMS}, this is {problem.dtype} of {problem.d}"
    least = 8 if problem.interleaved else 16
    if problem.rotary % least:
        return f"turns channels eight at a time, {problem.rotary} of the rotary embedding are no multiple of {least}"
    return nvrtc.missing()


def source(
    d: int, dtype: torch.dtype, qk: torch.dtype, pv: torch.dtype, rotary: int = 0, interleaved: bool = False
) -> nvrtc.Source:
    """What is compiled; `rotary` channels turn."""
    fp8 = torch.float8_e4m3fn
    macros = {"D": d, "INPUT": _INPUT[dtype], "QK_FP8": int(qk == fp8), "PV_FP8": int(pv == fp8)}
    macros |= {"ROTARY": rotary, "INTERLEAVED": int(interleaved)}
    headers = {"sm90.cuh": (_FOLDER.parent / "common/sm90.cuh").read_text()}
    return nvrtc.Source("attention_quantize", (_FOLDER / "sm90.cu").read_text(), headers, macros)


@functools.cache
def _kernels(*key: object) -> tuple[driver.Kernel, driver.Kernel]:
    code = nvrtc.cubin(source(*key))  # type: ignore[arg-type]
    return driver.Kernel(code, "attention_means"), driver.Kernel(code, "attention_quantize")


@functools.cache
def _signs(d: int) -> bytes:
    """A bit per channel, 1 where the rotation's sign is minus."""
    bits = sum(1 << i for i, sign in enumerate(signs(d).tolist()) if sign < 0)
    return bits.to_bytes(16, "little")


def fragments(d: int) -> Tensor:
    """[D / 32, 2, 32, 2, 2, 2] of ±1, by chunk, half, lane, tile, register and element: operands B of the MMAs.

    Lane t + 4 n of operand B holds rows 2 t + {0, 1} and 8 + 2 t + {0, 1} of column n. The rows stand for channels
    4 half + 0 .. 3 of the 8 that each thread of a quad has of a chunk, the columns of both tiles for those of half 0.
    """
    shape = d // 32, 2, 32, 2, 2, 2
    axes = (torch.arange(size).view(-1, *(1,) * (5 - axis)) for axis, size in enumerate(shape))
    chunk, half, lane, tile, register, element = axes
    row = 32 * chunk + 8 * (lane % 4) + 4 * half + 2 * register + element
    column = row // (d & -d) * (d & -d) + 8 * (lane // 8) + 2 * tile + lane // 4 % 2
    return hadamard(d)[row.expand(shape), column.expand(shape)]


@functools.cache
def _rotation(d: int, dtype: torch.dtype, device: int) -> Tensor:
    return lasting(lambda: fragments(d).to(f"cuda:{device}", dtype))


def _divisor(n: int) -> tuple[int, int]:
    """`Divisor` of the source."""
    return n, (2**32 - 1) // max(n, 1)


def _input(x: Tensor) -> tuple[Tensor, bytes]:
    """The tensor, or a copy of it where a thread cannot read 16 bytes at once; its address and strides."""
    if x.data_ptr() % 16 or x.stride(3) != 1 or any(x.stride(i) % 8 for i in range(3)):
        x = x.contiguous()
    return x, struct.pack("<Q3q", x.data_ptr(), *x.stride()[:3])


def _table(x: Tensor, batch: int) -> tuple[Tensor, bytes]:
    """`_input` of cosines or sines, the same for all heads."""
    return _input(x[:, None].expand(batch, 1, -1, -1))


def launch(
    q: Tensor, k: Tensor, v: Tensor, key_range: Tensor | None, out: tuple[Tensor, ...], rotary: Rotary | None = None
) -> None:
    """Fill the eight outputs of `op.attention_quantize`."""
    (batch, heads_q, sq, d), (_, heads_kv, skv, _) = q.shape, k.shape
    device = q.get_device()
    inputs = [_input(x) for x in (q, k, v)]
    tables = [] if rotary is None else [_table(x, batch) for x in (rotary.cos, rotary.sin)]
    turning = (0, False) if rotary is None else (rotary.cos.shape[2], rotary.interleaved)
    key_range = None if key_range is None else key_range.contiguous()
    turned = torch.empty((2, batch, heads_kv, d), dtype=torch.float32, device=q.device)
    q_codes, q_scale, q_shift, k_codes, k_scale, v_codes, v_scale, v_mean = (t.data_ptr() for t in out)
    blocks_q, blocks_k = -(-sq // BLOCK), -(-skv // BLOCK)
    packed = [data for _, data in inputs + tables] + [bytes(32)] * (2 - len(tables))
    params = b"".join(packed) + struct.pack(
        "<11Q7if16s10I", _rotation(d, q.dtype, device).data_ptr(), 0 if key_range is None else key_range.data_ptr(),
        q_codes, k_codes, v_codes, q_scale, q_shift, k_scale, v_scale, v_mean, turned.data_ptr(), batch, heads_q,
        heads_kv, sq, skv, blocks_q, blocks_k, (d & -d) ** -0.5, _signs(d),
        *(part for n in (blocks_q, blocks_k, heads_q, heads_kv, heads_q // heads_kv) for part in _divisor(n)),
    )  # fmt: skip
    means, quantize = _kernels(d, q.dtype, out[0].dtype, out[5].dtype, *turning)
    tiles = batch * (heads_q * blocks_q + 2 * heads_kv * blocks_k)
    if batch:
        means.launch(driver.Launch(2 * batch * heads_kv, _THREADS, 1, 0), params, device)
    if tiles:
        quantize.launch(driver.Launch(tiles, _THREADS, 1, 0, early=True), params, device)

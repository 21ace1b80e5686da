"""Hopper backend: `sm90.cu`, compiled at run time by NVRTC, one kernel per configuration, head dimension and option."""

from __future__ import annotations

import functools
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quantlab_kernels.attention_prefill.reference import Attributes
from quantlab_kernels.attention_quantize.op import Quantized
from quantlab_kernels.attention_quantize.reference import hadamard
from quantlab_kernels.common import driver, nvrtc
from quantlab_kernels.common.hardware import gpu
from quantlab_kernels.common.lasting import lasting, lasting_zeros
from quantlab_kernels.common.wgmma import wgmma_variant

if TYPE_CHECKING:
    from quantlab_kernels.attention_prefill.op import Problem

_FOLDER = Path(__file__).parent
_OUTPUT = {torch.bfloat16: 1, torch.float16: 2}
HEAD_DIMS = (64, 80, 96, 128)
_L2_SHARE = 8 << 20  # bytes of keys and values


@dataclass(frozen=True)
class Config:
    """consumers: warpgroups of 64 queries; stages of the ring."""

    consumers: int = 2
    stages: int = 4

    def shared_bytes(self, d: int) -> int:
        """What `sm90.cu` lays out."""
        rows = 64 * self.consumers
        turn = -(-d // 64) * d * 128
        ring = self.stages * 128 * (128 + d)
        barriers, tiles = 8 * (4 * self.stages + 9), 2 * (44 + 8 * self.consumers)
        return 2 * rows * 128 + ring + turn + rows * (2 * d + 16) + barriers + tiles


BEST = Config()  # of what was measured on an H200: README


def supports(problem: Problem) -> str | None:
    if problem.sm != 90:
        return f"Hopper's instructions exist on sm_90 only, the GPU is sm_{problem.sm}"
    if problem.d not in HEAD_DIMS:
        return (
            f"two accumulators of head dimension {problem.d} do not fit into the registers, at most {HEAD_DIMS[-1]} do"
        )
    if problem.out_dtype not in _OUTPUT:
        return f"writes bfloat16 or float16, not {problem.out_dtype}"
    return nvrtc.missing()


def source(
    config: Config, d: int, qk: torch.dtype, pv: torch.dtype, softcap: bool, sinks: bool, out_dtype: torch.dtype
) -> nvrtc.Source:
    """What is compiled."""
    qk_fp8, pv_fp8 = qk == torch.float8_e4m3fn, pv == torch.float8_e4m3fn
    macros = {key.upper(): value for key, value in asdict(config).items()}
    macros |= {
        "D": d, "QK_FP8": int(qk_fp8), "PV_FP8": int(pv_fp8), "SOFTCAP": int(softcap), "SINKS": int(sinks),
        "OUTPUT": _OUTPUT[out_dtype], "SHARED": config.shared_bytes(d),
    }  # fmt: skip
    scores = ("f32", "e4m3", "e4m3") if qk_fp8 else ("s32", "s8", "s8")
    sums = ("f32", "e4m3", "e4m3") if pv_fp8 else ("s32", "u8", "s8")
    wgmma = [
        wgmma_variant("wgmma_qk", 128, *scores, registers=False),
        wgmma_variant("wgmma_pv", d, *sums, registers=True),
        wgmma_variant("wgmma_turn", d, "f32", "f16", "f16", registers=True),
    ]
    headers = {name: (_FOLDER.parent / "common" / name).read_text() for name in ("sm90.cuh", "attention.cuh")}
    headers["wgmma.cuh"] = "".join(wgmma)
    return nvrtc.Source("attention_prefill", (_FOLDER / "sm90.cu").read_text(), headers, macros)


@functools.cache
def kernel(*key: object) -> driver.Kernel:
    """Loaded; the arguments are those of `source`."""
    return driver.Kernel(nvrtc.cubin(source(*key)), "attention_prefill")  # type: ignore[arg-type]


@functools.cache
def _turn(d: int, device: int) -> Tensor:
    """`hadamard` on the GPU, exact in 16 bits."""
    return lasting(lambda: hadamard(d).to(f"cuda:{device}", torch.float16))


def launch(
    problem: Problem, operands: Quantized, attributes: Attributes, sinks: Tensor | None, key_range: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, out: Tensor, lse: Tensor, config: Config = BEST,
) -> None:  # fmt: skip
    """Fill out [B, Sq, Hq, D] and lse [B, Hq, Sq]."""
    device = out.get_device()
    sinks = None if sinks is None else sinks.to(torch.float32)
    sequences = 0 if cu_seqlens_q is None else cu_seqlens_q.numel() - 1
    addresses = tuple(
        0 if t is None else t.data_ptr()
        for t in (*operands, sinks, key_range, cu_seqlens_q, cu_seqlens_k, out, lse, _counters(device))
    )
    code, shape, params = _prepared(config, problem, attributes, sequences, addresses, device)
    code.launch(shape, params, device)


@functools.lru_cache(maxsize=1024)
def _prepared(
    config: Config, problem: Problem, attributes: Attributes, sequences: int, addresses: tuple[int, ...], device: int
) -> tuple[driver.Kernel, driver.Launch, bytes]:
    """Kernel, shape of the launch and the kernel's `Params`."""
    q, q_scale, q_shift, k, k_scale, v, v_scale, v_mean, *others = addresses
    p, rows = problem, 64 * config.consumers
    blocks = -(-p.skv // 128)
    maps = (
        _map(q, p.batch * p.heads_q * p.sq, p.d, rows),
        _map(k, p.batch * p.heads_kv * p.skv, p.d, 128),
        _map(v, p.batch * p.heads_kv * p.d, blocks * 128, p.d),
        driver.tensor_map(
            driver.FLOAT16, _turn(p.d, device).data_ptr(), p.d, p.d, 2 * p.d, 64, p.d, driver.SWIZZLE_128
        ),
    )
    tiles = -(-p.sq // rows) + sequences  # a sequence of several ends with a tile of its own
    items = p.batch * p.heads_q * tiles
    scalars = struct.pack(
        "<12Q11i3f", q_scale, q_shift, k_scale, v_scale, v_mean, *others,
        p.batch, p.heads_q, p.heads_kv, p.sq, p.skv, blocks, sequences, items, attributes.left, attributes.right,
        _together(p), attributes.scale, attributes.softcap, (p.d & -p.d) ** -0.5,
    )  # fmt: skip
    params = b"".join(maps) + scalars
    params += bytes(-len(params) % 64)
    code = kernel(config, p.d, p.qk, p.pv, p.softcap, p.sinks, p.out_dtype)
    threads = 128 * (config.consumers + 1)
    return code, driver.Launch(min(items, gpu(device).sm_count), threads, 1, config.shared_bytes(p.d)), params


def _together(p: Problem) -> int:
    """How many heads are worked on at a time: the more, the more even the end, but their keys should stay in the L2."""
    return max(1, min(p.batch * p.heads_q, _L2_SHARE // max(2 * p.skv * p.d, 1)))


# Zeros that a launch leaves as zeros. Launches of one stream cannot overlap and share theirs; a captured one, which may
# be replayed beside anything, gets its own, cleared by a node of the graph.
_STREAM_COUNTERS: dict[tuple[int, int], Tensor] = {}


def _counters(device: int) -> Tensor:
    """Two zeros for one launch on the current stream."""
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=f"cuda:{device}")
    key = device, torch._C._cuda_getCurrentRawStream(device)
    if key not in _STREAM_COUNTERS:
        _STREAM_COUNTERS[key] = lasting_zeros(2, device)
    return _STREAM_COUNTERS[key]


def _map(pointer: int, rows: int, columns: int, box_rows: int) -> bytes:
    """8-bit codes in boxes of 128 columns; columns beyond the last read as 0."""
    return driver.tensor_map(driver.UINT8, pointer, columns, rows, columns, 128, box_rows, driver.SWIZZLE_128)

"""Attention in 8 bits by others, for the benchmark: what of it can be imported here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_E4M3_MAX = 448.0


class Fp8Operands(NamedTuple):
    """What cuDNN multiplies: E4M3 codes [B, H, S, D] with one scale per tensor."""

    q: Tensor
    k: Tensor
    v: Tensor
    scales: tuple[Tensor, Tensor, Tensor]


def fp8_operands(q: Tensor, k: Tensor, v: Tensor) -> Fp8Operands | None:
    """None where cuDNN's frontend is missing, which alone reads them."""
    if importlib.util.find_spec("cudnn") is None or not q.is_cuda:
        return None
    (q_codes, q_scale), (k_codes, k_scale), (v_codes, v_scale) = (_per_tensor(x) for x in (q, k, v))
    return Fp8Operands(q_codes, k_codes, v_codes, (q_scale, k_scale, v_scale))


def _per_tensor(x: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes and their scale [1, 1, 1, 1]."""
    scale = (x.abs().amax().float() / _E4M3_MAX).view(1, 1, 1, 1)
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def cudnn_fp8(causal: bool) -> Callable[..., Tensor] | str:
    """cuDNN's `sdpa_fp8` on `Fp8Operands`, without their quantization; E4M3 [B, H, S, D]."""
    if importlib.util.find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed"
    return lambda operands: _graph(
        tuple(operands.q.shape), tuple(operands.k.shape), causal, operands.q.get_device()
    )(operands)  # fmt: skip


@functools.cache
def _graph(shape_q: tuple[int, ...], shape_k: tuple[int, ...], causal: bool, device: int) -> Callable[..., Tensor]:
    """A plan for one shape."""
    cudnn = importlib.import_module("cudnn")
    fp8, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    handle = cudnn.create_handle()
    graph = cudnn.pygraph(io_data_type=fp8, intermediate_data_type=fp32, compute_data_type=fp32, handle=handle)

    def tensor(shape: tuple[int, ...], kind: Any) -> Any:
        stride = torch.empty(shape, device="meta").stride()
        return graph.tensor(dim=list(shape), stride=list(stride), data_type=kind)

    codes = [tensor(shape, fp8) for shape in (shape_q, shape_k, shape_k)]
    scales = [tensor((1, 1, 1, 1), fp32) for _ in range(6)]  # of q, k, v, and of the weights, there and back, of out
    names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
    out, _, amax_s, amax_o = graph.sdpa_fp8(
        *codes, **dict(zip(names, scales, strict=True)), is_inference=True, attn_scale=shape_q[3] ** -0.5,
        use_causal_mask=causal,
    )  # fmt: skip
    out.set_output(True).set_dim(list(shape_q)).set_stride(list(torch.empty(shape_q, device="meta").stride()))
    out.set_data_type(fp8)
    for amax in (amax_s, amax_o):
        amax.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(fp32)
    graph.build([cudnn.heur_mode.A])
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=f"cuda:{device}")
    result = torch.empty(shape_q, dtype=torch.float8_e4m3fn, device=f"cuda:{device}")
    constants = [torch.full((1, 1, 1, 1), x, device=f"cuda:{device}") for x in (1.0 / 256, 256.0, 1.0, 0.0, 0.0)]

    def run(operands: Fp8Operands) -> Tensor:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
        given = dict(zip([*codes, *scales], [*operands[:3], *operands.scales, *constants[:3]], strict=True))
        graph.execute({**given, out: result, amax_s: constants[3], amax_o: constants[4]}, workspace, handle=handle)
        return result

    return run


def sage(causal: bool) -> Callable[..., Tensor] | str:
    """SageAttention on 16-bit q, k, v [B, H, S, D], with its quantization."""
    if importlib.util.find_spec("sageattention") is None:
        return "sageattention is not installed"
    return functools.partial(importlib.import_module("sageattention").sageattn, is_causal=causal)

"""Number formats, quantized tensors and the kernels that compute with them. Needs torch; triton only on a GPU.

The ops are imported here and not on demand: a room has the name of its op, and only an import that is over before
anybody else's makes `quantlab_kernels.gemm_fp8_block` the function and never the folder. It costs a few milliseconds
on top of torch and touches no CUDA; backends (triton, compilers) load at their first launch.
"""

from quantlab_kernels.aot import warmup
from quantlab_kernels.attention_decode.op import attention_decode
from quantlab_kernels.attention_prefill.op import attention_8bit, attention_prefill
from quantlab_kernels.attention_quantize.op import attention_quantize
from quantlab_kernels.bmm_fp8.op import bmm_fp8
from quantlab_kernels.common.int4 import prepare_int4, repack_int4, unrepack_int4
from quantlab_kernels.common.kv import PackedKV
from quantlab_kernels.common.latent import PackedLatent
from quantlab_kernels.gemm_fp8_block.op import gemm_fp8_block
from quantlab_kernels.gemm_fp8_grouped.op import gemm_fp8_grouped
from quantlab_kernels.gemm_fp8_row.op import gemm_fp8_row
from quantlab_kernels.gemm_int4.op import gemm_int4
from quantlab_kernels.gemm_int4_fp8.op import gemm_int4_fp8
from quantlab_kernels.gemm_int4_grouped.op import gemm_int4_grouped
from quantlab_kernels.kv_append.op import kv_append
from quantlab_kernels.mla_append.op import mla_append, mla_step, mla_turn
from quantlab_kernels.mla_decode.op import mla_decode
from quantlab_kernels.moe_combine.op import moe_combine
from quantlab_kernels.moe_dispatch.op import moe_dispatch
from quantlab_kernels.moe_route.op import moe_route
from quantlab_kernels.quantize_fp8.op import quantize_fp8_block, quantize_fp8_group, quantize_fp8_token
from quantlab_kernels.rmsnorm_quantize.op import rmsnorm, rmsnorm_quantize
from quantlab_kernels.rope.op import rope
from quantlab_kernels.swiglu_quantize.op import swiglu_quantize

__all__ = [
    "PackedKV",
    "PackedLatent",
    "attention_8bit",
    "attention_decode",
    "attention_prefill",
    "attention_quantize",
    "bmm_fp8",
    "gemm_fp8_block",
    "gemm_fp8_grouped",
    "gemm_fp8_row",
    "gemm_int4",
    "gemm_int4_fp8",
    "gemm_int4_grouped",
    "kv_append",
    "mla_append",
    "mla_decode",
    "mla_step",
    "mla_turn",
    "moe_combine",
    "moe_dispatch",
    "moe_route",
    "prepare_int4",
    "quantize_fp8_block",
    "quantize_fp8_group",
    "quantize_fp8_token",
    "repack_int4",
    "rmsnorm",
    "rmsnorm_quantize",
    "rope",
    "swiglu_quantize",
    "unrepack_int4",
    "warmup",
]

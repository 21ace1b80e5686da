"""Routed experts in FP8: all experts of a layer in one 3-D tensor of codes and one of scales.

Checkpoints hold one matrix per expert; transformers stacks them while loading and splits them while saving, and the
scales go the same way (`quantizers.py`). A forward sorts the tokens by expert, so that each expert's rows are one
slice; `grouped_gemm_fp8_block` and `_row` then multiply slice by slice. They are ops of their own because the loop
over experts depends on data, which a traced graph cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.linear import CODES, Fp8BlockLinear, Fp8Linear, Fp8RowLinear, MovesWithoutCasting
from quantlab_kernels import gemm_fp8_block, gemm_fp8_row, quantize_fp8_group, quantize_fp8_token
from quantlab_kernels.common.ops import define


class Fp8Experts(MovesWithoutCasting):
    """What the two layouts share; built from the module it replaces, whose activation, gating and numbers it keeps.

    gate_up_proj, down_proj          [E, 2I, H], [E, H, I]  float8_e4m3fn; gate rows come before up rows
    gate_up_proj<s>, down_proj<s>    their scales, stacked; <s> is what the scale's name adds to "weight"

    Inference only: a gradient through the experts raises.
    """

    linear: type[Fp8Linear]

    def __init__(self, original: Any, *, scale_name: str, scale_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.__dict__.update({k: v for k, v in vars(original).items() if not k.startswith("_")})
        self._modules.update(original._modules)
        self.gate = type(original)._apply_gate
        self.num_experts, self.hidden_dim, self.intermediate_dim = original.down_proj.shape
        self.suffix = scale_name.removeprefix("weight")
        double, hidden, inner = 2 * self.intermediate_dim, self.hidden_dim, self.intermediate_dim
        rows, columns = self.linear.scale_shape(inner, hidden)
        self._register("gate_up_proj", (double, hidden), (2 * rows, columns), scale_dtype)
        self._register("down_proj", (hidden, inner), self.linear.scale_shape(hidden, inner), scale_dtype)

    def _register(self, name: str, shape: tuple[int, int], scale_shape: tuple[int, int], dtype: torch.dtype) -> None:
        codes = torch.empty(self.num_experts, *shape, dtype=CODES)
        scale = torch.empty(self.num_experts, *scale_shape, dtype=dtype)
        self.register_parameter(name, nn.Parameter(codes, requires_grad=False))
        self.register_parameter(name + self.suffix, nn.Parameter(scale, requires_grad=False))
        self.register_buffer(f"_{name}_scale", None, persistent=False)

    def finish_loading(self) -> None:
        """As `Fp8Linear.finish_loading`."""
        for name in ("gate_up_proj", "down_proj"):
            stored = getattr(self, name + self.suffix)
            if stored.dtype != torch.float32:
                setattr(self, f"_{name}_scale", stored.detach().to(torch.float32))

    def scale(self, name: str) -> Tensor:
        """The stacked scales of the weight `name`, in float32."""
        copy = getattr(self, f"_{name}_scale")
        return copy if copy is not None else getattr(self, name + self.suffix).to(torch.float32)

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def grouped_matmul(self, codes: Tensor, scale: Tensor, name: str, counts: Tensor, dtype: torch.dtype) -> Tensor:
        """[S, N] of rows sorted by expert with the stacked weight `name`; counts [E] rows per expert."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, k]; returns [T, H].

        An index of E (another rank's expert) contributes nothing.
        """
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            return _NoGradient.apply(hidden_states, top_k_index, top_k_weights, self)
        return self._forward(hidden_states, top_k_index, top_k_weights)

    def _forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens, choices = top_k_index.shape
        order = torch.argsort(top_k_index.reshape(-1), stable=True)
        experts = torch.arange(self.num_experts, device=order.device)
        counts = (top_k_index.reshape(-1, 1) == experts).sum(0)
        codes, scale = self.quantize_input(hidden_states)
        rows = order // choices
        inner = self.grouped_matmul(codes[rows], scale[rows], "gate_up_proj", counts, hidden_states.dtype)
        inner = self.gate(self, inner)
        out = self.grouped_matmul(*self.quantize_input(inner), "down_proj", counts, torch.float32)
        out = out * top_k_weights.reshape(-1, 1)[order]
        out = torch.empty_like(out).index_copy(0, order, out)  # back into token order; no atomics, so repeatable
        return out.view(tokens, choices, self.hidden_dim).sum(1).to(hidden_states.dtype)

    def _quantized(self, name: str) -> bool:
        return True


class Fp8BlockExperts(Fp8Experts):
    """128x128 weight blocks, 1x128 activation groups."""

    linear = Fp8BlockLinear

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_fp8_group(x)

    def grouped_matmul(self, codes: Tensor, scale: Tensor, name: str, counts: Tensor, dtype: torch.dtype) -> Tensor:
        weight, weight_scale = getattr(self, name), self.scale(name)
        if name == "gate_up_proj" and self.intermediate_dim % 128:
            # Blocks were cut separately for gate and up, so those of up do not begin on a multiple of 128 rows.
            halves = zip(weight.chunk(2, 1), weight_scale.chunk(2, 1), strict=True)
            return torch.cat([_BLOCK(codes, scale, w, s, counts, dtype) for w, s in halves], 1)
        return _BLOCK(codes, scale, weight, weight_scale, counts, dtype)


class Fp8RowExperts(Fp8Experts):
    """One scale per weight row and one per token."""

    linear = Fp8RowLinear

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_fp8_token(x)

    def grouped_matmul(self, codes: Tensor, scale: Tensor, name: str, counts: Tensor, dtype: torch.dtype) -> Tensor:
        return _ROW(codes, scale, getattr(self, name), self.scale(name), counts, dtype)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, index: Tensor, weights: Tensor, experts: Fp8Experts) -> Tensor:
        return experts._forward(hidden, index, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("FP8 experts have no gradient; load the checkpoint with dequantize=True to train it")


def unsupported(module: nn.Module) -> str | None:
    """Why an experts module cannot be replaced by ours, or None."""
    up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not isinstance(up, Tensor) or not isinstance(down, Tensor) or up.ndim != 3 or down.ndim != 3:
        return "its experts have no fused gate and up projection"
    if getattr(module, "is_transposed", False) or up.shape != (down.shape[0], 2 * down.shape[2], down.shape[1]):
        return "its experts are stored transposed"
    if not getattr(module, "is_concatenated", True):
        return "its experts interleave gate and up"
    if any(name not in ("gate_up_proj", "down_proj") for name, _ in module.named_parameters()):
        return "its experts have biases or norms"
    if not hasattr(type(module), "_apply_gate"):
        return "its experts compute in a way of their own"
    return None


def _grouped(
    gemm: Callable[..., Tensor], a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out: Tensor
) -> Tensor:
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            rows = slice(start, start + count)
            out[rows] = gemm(a[rows], a_scale[rows], b[expert], b_scale[expert], out_dtype=out.dtype)
        start += count
    return out


def _grouped_fake(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """Zeros: rows behind the last expert's belong to nobody here."""
    return a.new_zeros((a.shape[0], b.shape[1]), dtype=out_dtype)


def _grouped_block(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return _grouped(
        gemm_fp8_block, a, a_scale, b, b_scale, counts, _grouped_fake(a, a_scale, b, b_scale, counts, out_dtype)
    )


def _grouped_row(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out_dtype: torch.dtype
) -> Tensor:
    return _grouped(
        gemm_fp8_row, a, a_scale, b, b_scale, counts, _grouped_fake(a, a_scale, b, b_scale, counts, out_dtype)
    )


_ARGUMENTS = "(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor counts, ScalarType out_dtype) -> Tensor"
# They read the counts on the host, which a CUDA graph cannot record.
_TAGS = (torch.Tag.cudagraph_unsafe,)
_BLOCK = define(
    "grouped_gemm_fp8_block" + _ARGUMENTS, fake=_grouped_fake, cpu=_grouped_block, cuda=_grouped_block, tags=_TAGS
)
_ROW = define("grouped_gemm_fp8_row" + _ARGUMENTS, fake=_grouped_fake, cpu=_grouped_row, cuda=_grouped_row, tags=_TAGS)

"""Routed experts with INT4 weights: all experts of a layer in one tensor of words and one of scales.

As in `experts`, but expert by expert: there is no grouped INT4 kernel yet, so the counts of rows are read on the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantlab.int4_linear import Int4Fp8Linear, Int4Linear
from quantlab.linear import MovesWithoutCasting
from quantlab_kernels import gemm_int4, gemm_int4_fp8, moe_combine, moe_dispatch, quantize_fp8_group
from quantlab_kernels.common.int4 import GROUP, prepare_int4, unrepack_int4
from quantlab_kernels.common.ops import define


class Int4Experts(MovesWithoutCasting):
    """INT4 weights, activations in 16 bits; built from the module it replaces, whose activation and gating it keeps.

    gate_up_proj_packed, down_proj_packed  int32 [E, 2I, H/8], [E, H, I/8]; gate rows come before up rows
    gate_up_proj_scale, down_proj_scale    [E, 2I, H/128], [E, H, I/128]
    gate_up_proj_shape, down_proj_shape    int64 [E, 4], [E, 2]: N and K of each matrix

    Inference only.
    """

    linear: type[Int4Linear] = Int4Linear

    def __init__(self, original: Any, *, scale_name: str, scale_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.__dict__.update({k: v for k, v in vars(original).items() if not k.startswith("_")})
        self._modules.update(original._modules)
        self.gate = type(original)._apply_gate
        self.num_experts, self.hidden_dim, self.intermediate_dim = original.down_proj.shape
        hidden, inner = self.hidden_dim, self.intermediate_dim
        self.rows = {"gate_up_proj": 2 * inner, "down_proj": hidden}
        for name, rows, columns, parts in (("gate_up_proj", 2 * inner, hidden, 2), ("down_proj", hidden, inner, 1)):
            words = torch.empty(self.num_experts, rows, columns // 8, dtype=torch.int32)
            scale = torch.empty(self.num_experts, rows, columns // GROUP, dtype=scale_dtype)
            shape = torch.tensor([[rows // parts, columns] * parts] * self.num_experts)
            self.register_parameter(name + "_packed", nn.Parameter(words, requires_grad=False))
            self.register_parameter(name + "_scale", nn.Parameter(scale, requires_grad=False))
            self.register_buffer(name + "_shape", shape)

    def finish_loading(self) -> None:
        """Repack for the device's kernels, all experts as one tall weight where each fills whole tiles."""
        for name, rows in self.rows.items():
            words = getattr(self, name + "_packed")
            if not words.is_meta and words.dim() == 3 and words.shape[1] == rows and rows % 64 == 0:
                bits = self.linear.activation_bits
                tiles = prepare_int4(words.data.flatten(0, 1), activation_bits=bits)
                if tiles.dim() > 2:
                    words.data = tiles.unflatten(0, (self.num_experts, -1))

    def words(self, name: str) -> Tensor:
        """The words [E, N, K/8] of a weight."""
        held = getattr(self, name + "_packed").data
        if held.dim() == 3:
            return held
        return unrepack_int4(held.flatten(0, 1), self.num_experts * self.rows[name]).unflatten(
            0, (self.num_experts, -1)
        )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index and top_k_weights [T, k]; returns [T, H]. An index of E adds nothing."""
        x, scale, positions, counts = self._dispatch(hidden_states, top_k_index)
        inner = self.gate(self, self._multiply(x, scale, "gate_up_proj", counts, hidden_states.dtype))
        out = self._multiply(*self._quantize(inner), "down_proj", counts, hidden_states.dtype)
        return moe_combine(out, positions, top_k_weights)

    def _dispatch(self, x: Tensor, top_k_index: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        codes, scale, positions, counts = moe_dispatch(x, top_k_index, self.num_experts)
        if self.linear.activation_bits == 8:
            return codes, scale, positions, counts
        rows = x.new_zeros(codes.shape)
        token, choice = (positions >= 0).nonzero(as_tuple=True)
        rows[positions[token, choice].long()] = x[token]
        return rows, None, positions, counts

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return quantize_fp8_group(x) if self.linear.activation_bits == 8 else (x, None)

    def _multiply(self, x: Tensor, scale: Tensor | None, name: str, counts: Tensor, dtype: torch.dtype) -> Tensor:
        return _EACH(x, scale, getattr(self, name + "_packed"), getattr(self, name + "_scale"), counts, dtype)

    def _quantized(self, name: str) -> bool:
        return True

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for name in self.rows:
            getattr(self, name + "_packed").data = self.words(name)
        moved = super()._apply(fn, recurse)
        self.finish_loading()
        return moved

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.rows:
            destination[f"{prefix}{name}_packed"] = self.words(name)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        for name in self.rows:
            getattr(self, name + "_packed").data = self.words(name)
        super()._load_from_state_dict(*args, **kwargs)


class Int4Fp8Experts(Int4Experts):
    """INT4 weights, E4M3 activations with a scale for each group of 128."""

    linear = Int4Fp8Linear


def _each(x: Tensor, scale: Tensor | None, b: Tensor, b_scale: Tensor, counts: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows sorted by expert, each times its expert's weight."""
    out = _each_fake(x, scale, b, b_scale, counts, dtype)
    start = 0
    for expert, count in enumerate(counts.tolist()):
        rows = slice(start, start + count)
        if count and scale is None:
            out[rows] = gemm_int4(x[rows], b[expert], b_scale[expert])
        elif count and scale is not None:
            out[rows] = gemm_int4_fp8(x[rows], scale[rows], b[expert], b_scale[expert], out_dtype=dtype)
        start += count
    return out


def _each_fake(
    x: Tensor, scale: Tensor | None, b: Tensor, b_scale: Tensor, counts: Tensor, dtype: torch.dtype
) -> Tensor:
    """Zeros: rows behind the last expert's belong to nobody here."""
    return x.new_zeros((x.shape[0], b_scale.shape[1]), dtype=dtype)


_EACH = define(
    "gemm_int4_each(Tensor x, Tensor? scale, Tensor b, Tensor b_scale, Tensor counts, ScalarType dtype) -> Tensor",
    fake=_each_fake, cpu=_each, cuda=_each,
    tags=(torch.Tag.cudagraph_unsafe,),  # it reads the counts on the host, which a CUDA graph cannot record
)  # fmt: skip

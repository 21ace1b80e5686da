"""Routed experts with INT4 weights: all experts of a layer in one tensor of words and one of scales.

As in `experts`; as in `int4_linear` the words lie in the order of the device's kernels, and go back for a state dict.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantlab.experts import Experts, lengthened
from quantlab.int4_linear import Int4Fp8Linear, Int4Linear
from quantlab_kernels import gemm_int4_grouped, moe_dispatch
from quantlab_kernels.common.gemm import as_group_scale
from quantlab_kernels.common.int4 import GROUP, ROWS, prepare_int4, unrepack_int4


class Int4Experts(Experts):
    """INT4 weights, activations in 16 bits.

    gate_up_proj_packed, down_proj_packed  int32 [E, 2I, H/8], [E, H, I/8]; gate rows come before up rows
    gate_up_proj_scale, down_proj_scale    [E, 2I, H/128], [E, H, I/128]
    gate_up_proj_shape, down_proj_shape    int64 [E, 4], [E, 2]: N and K of each matrix

    Without a gate the first is up_proj [E, I, H/8].
    """

    linear: type[Int4Linear] = Int4Linear
    suffix = "_scale"
    own: int  # experts that the checkpoint has here
    shared: tuple[Int4Linear, ...]  # gate, up and down of a layer that follows them as further experts

    def __init__(self, original: Any, *, scale_name: str, scale_dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(original)
        self.own, self.shared = self.num_experts, ()
        hidden, inner = self.hidden_dim, self.intermediate_dim
        self.rows = {self.first: self.first_rows, "down_proj": hidden}
        for name, columns in ((self.first, hidden), ("down_proj", inner)):
            rows, parts = self.rows[name], 2 if name == "gate_up_proj" else 1
            words = torch.empty(self.num_experts, rows, columns // 8, dtype=torch.int32)
            scale = torch.empty(self.num_experts, rows, columns // GROUP, dtype=scale_dtype)
            shape = torch.tensor([[rows // parts, columns] * parts] * self.num_experts)
            self.register_parameter(name + "_packed", nn.Parameter(words, requires_grad=False))
            self.register_parameter(name + "_scale", nn.Parameter(scale, requires_grad=False))
            self.register_buffer(name + "_shape", shape)

    def append(self, gate: Int4Linear, up: Int4Linear, down: Int4Linear) -> int:
        """As `Fp8Experts.append`."""
        more = gate.out_features // self.intermediate_dim
        for name in self.rows:
            packed, scale = getattr(self, name + "_packed"), getattr(self, name + "_scale")
            packed.data, scale.data = lengthened(self.words(name), more), lengthened(scale.data, more)
        self.num_experts, self.shared = self.own + more, (gate, up, down)
        self.finish_loading()
        return more

    def _copy_shared(self) -> None:
        """Words of `packing.pack_int4`, and scales, of the shared layers behind those of the experts."""
        for name in self.rows:
            getattr(self, name + "_packed").data = self.words(name)
        gate, up, down = self.shared
        more, inner = self.num_experts - self.own, self.intermediate_dim
        for kind, stored in (("_packed", _words), ("_scale", _scale)):
            both, last = (getattr(self, name + kind).data[self.own :] for name in self.rows)
            for first, layer in ((0, gate), (inner, up)):
                both[:, first : first + inner] = stored(layer).unflatten(0, (more, inner))
            last.copy_(stored(down).unflatten(1, (more, -1)).transpose(0, 1))

    def finish_loading(self) -> None:
        """Bring words and scales into the layout of the device's kernels, all experts as one tall weight; words only
        where each expert fills whole tiles."""
        if self.shared:
            self._copy_shared()
        for name, rows in self.rows.items():
            words, scale = getattr(self, name + "_packed"), getattr(self, name + "_scale")
            if words.is_meta:
                continue
            if words.dim() == 3 and rows % ROWS == 0:
                tiles = prepare_int4(words.data.flatten(0, 1), activation_bits=self.linear.activation_bits)
                if tiles.dim() > 2:
                    words.data = tiles.unflatten(0, (self.num_experts, -1))
            if scale.is_cuda:
                scale.data = as_group_scale(scale.data.flatten(0, 1)).unflatten(0, (self.num_experts, rows))

    def words(self, name: str) -> Tensor:
        """The words [E, N, K/8] of a weight."""
        held = getattr(self, name + "_packed").data
        if held.dim() == 3:
            return held
        words = unrepack_int4(held.flatten(0, 1), self.num_experts * self.rows[name])
        return words.unflatten(0, (self.num_experts, -1))

    def dispatch(self, x: Tensor, top_k_index: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        _, _, positions, counts = moe_dispatch(x, top_k_index, self.num_experts)
        # A choice that no expert here takes goes to a row behind all others, which is cut off.
        rows = positions.numel()
        at = positions.flatten().masked_fill(positions.flatten() < 0, rows).long()
        copies = x[:, None].expand(-1, positions.shape[1], -1).flatten(0, 1)
        return x.new_zeros(rows + 1, x.shape[1]).index_copy_(0, at, copies)[:rows], None, positions, counts

    def gate_and_quantize(self, inner: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.gate(self, inner), None

    def grouped_matmul(self, x: Tensor, scale: Tensor | None, name: str, counts: Tensor, dtype: torch.dtype) -> Tensor:
        words, weight_scale = getattr(self, name + "_packed"), getattr(self, name + "_scale")
        return gemm_int4_grouped(x, scale, words, weight_scale, counts, out_dtype=dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for name in self.rows:
            getattr(self, name + "_packed").data = self.words(name)
        moved = super()._apply(fn, recurse)
        self.finish_loading()
        return moved

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.rows:
            destination[f"{prefix}{name}_packed"] = self.words(name)[: self.own]
            destination[f"{prefix}{name}_scale"] = getattr(self, name + "_scale").detach()[: self.own].contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self.rows:
            getattr(self, name + "_packed").data = self.words(name)
            for key in (f"{prefix}{name}_packed", f"{prefix}{name}_scale") if self.shared else ():
                if key in state_dict and len(state_dict[key]) == self.own:
                    state_dict[key] = lengthened(state_dict[key], self.num_experts - self.own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _words(layer: Int4Linear) -> Tensor:
    words = layer.weight_packed.data
    return words if words.dim() == 2 else unrepack_int4(words, layer.out_features)


def _scale(layer: Int4Linear) -> Tensor:
    return layer.get_parameter(layer.scale_name).data


class Int4Fp8Experts(Int4Experts):
    """INT4 weights, E4M3 activations."""

    linear = Int4Fp8Linear
    dispatch = Experts.dispatch
    gate_and_quantize = Experts.gate_and_quantize

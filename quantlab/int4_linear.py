"""Linear layers that keep INT4 weights and compute with them, on CPU and GPU.

The state dict is what is on disk: words of eight codes, a scale per row and group of 128, the shape. On a GPU whose
kernels read the words in another order they are repacked when they arrive there, and packed back for a state dict, so
that memory holds them once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantlab.linear import QuantizedLinear, as_autocast
from quantlab_kernels import gemm_int4, gemm_int4_fp8, quantize_fp8_group, quantize_fp8_token
from quantlab_kernels.common.gemm import as_group_scale
from quantlab_kernels.common.int4 import GROUP, decode, prepare_int4, scales_by_group, unrepack_int4


class Int4Linear(QuantizedLinear):
    """INT4 weights, activations in 16 bits (W4A16).

    weight_packed  int32 [N, K/8] words of `packing.pack_int4`, or the tiles that `common.int4` makes of them
    weight_scale   [N, K/128]
    weight_shape   int64 [2]: N, K, of each of the tensors that were joined to one
    bias           [N] in the model's dtype, or None
    """

    activation_bits = 16

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scale_name: str = "weight_scale",
        scale_dtype: torch.dtype = torch.bfloat16,
        dtype: torch.dtype | None = None,
        parts: int = 1,
    ) -> None:
        super().__init__(in_features, out_features, scale_name)
        words = torch.empty(out_features, in_features // 8, dtype=torch.int32)
        self.weight_packed = nn.Parameter(words, requires_grad=False)
        scale = torch.empty(out_features, in_features // GROUP, dtype=scale_dtype)
        self.register_parameter(scale_name, nn.Parameter(scale, requires_grad=False))
        self.register_buffer("weight_shape", torch.tensor([out_features // parts, in_features] * parts))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None)
        self.register_buffer("_scale", None, persistent=False)
        self._home: Tensor | None = None

    @property
    def key(self) -> Tensor:
        return self.weight_packed

    @property
    def weight(self) -> Tensor:
        """The weight [N, K] multiplied out, for code that looks at it."""
        return self.dequantize(getattr(self, self.scale_name).dtype)

    @property
    def scale(self) -> Tensor:
        return self._scale if self._scale is not None else getattr(self, self.scale_name)

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x, None

    def matmul(self, codes: Tensor, scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        return as_autocast(gemm_int4(codes, self.weight_packed, self.scale, self.bias))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return decode(self.weight_packed, getattr(self, self.scale_name), torch.float32).to(dtype)

    def finish_loading(self) -> None:
        """Bring words and scales into the layout that the kernels of their device read. What is there already is
        written over: it may be a view of what joined layers share."""
        if self.weight_packed.is_meta:
            return
        if self.weight_packed.dim() == 2:
            prepared = prepare_int4(self.weight_packed.data, activation_bits=self.activation_bits)
            home, self._home = self._home, None
            same = home is not None and (home.shape, home.device) == (prepared.shape, prepared.device)
            self.weight_packed.data = home.copy_(prepared) if same and home is not None else prepared
        stored = getattr(self, self.scale_name).detach()
        if self._scale is not None and self._scale.device == stored.device:
            self._scale.copy_(stored)
        elif stored.is_cuda:
            self._scale = as_group_scale(stored)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        device = self.weight_packed.device
        moved = super()._apply(fn, recurse)
        if self.weight_packed.device != device:
            self._unpack()
            self._scale = None
            self.finish_loading()
        return moved

    def _unpack(self) -> None:
        if self.weight_packed.dim() > 2:
            self._home = self.weight_packed.data
            self.weight_packed.data = unrepack_int4(self._home, self.out_features)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight_packed.dim() > 2:
            destination[prefix + "weight_packed"] = unrepack_int4(self.weight_packed.data, self.out_features)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._unpack()
        super()._load_from_state_dict(*args, **kwargs)


class Int4Fp8Linear(Int4Linear):
    """INT4 weights, E4M3 activations. Checkpoints say a scale per token, and so it is for many tokens; of few tokens
    each group of 128 has its own (`scales_by_group`)."""

    activation_bits = 8

    @staticmethod
    def grouped(tokens: int) -> bool | None:
        return scales_by_group(tokens)

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return quantize_fp8_group(x) if self.grouped(x.shape[0]) else quantize_fp8_token(x)

    def matmul(self, codes: Tensor, scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        assert scale is not None
        return as_autocast(gemm_int4_fp8(codes, scale, self.weight_packed, self.scale, self.bias, out_dtype=out_dtype))

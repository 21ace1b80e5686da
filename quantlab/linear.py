"""Linear layers that keep quantized weights and compute with them, on CPU and GPU; those of INT4 are in `int4_linear`.

Parameter names and dtypes are those on disk, so loading and saving move bytes and convert nothing. A forward is two
ops: quantize the tokens, multiply. They are two methods here, `quantize_input` and `matmul`, so that layers which see
the same input (q, k, v; gate, up) can share the first and be joined in the second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quantlab_kernels import gemm_fp8_block, gemm_fp8_row, quantize_fp8_group, quantize_fp8_token
from quantlab_kernels.qtensor import expand_blocks

CODES = torch.float8_e4m3fn


def as_autocast(out: Tensor) -> Tensor:
    """A tensor in the dtype that autocast asks of linear layers' results and of what attention reads. A model with two
    16-bit dtypes fails under it: torch joins neither with the other."""
    kind = "cuda" if out.is_cuda else "cpu"  # half as long as `device.type`, in every call
    return out.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else out


class MovesWithoutCasting(nn.Module):
    """`module.half()` and `module.to(dtype)` move codes and scales but keep their dtype: a cast of codes without
    their scale would be silent garbage. Everything else in the module is cast as usual."""

    def _quantized(self, name: str) -> bool:
        raise NotImplementedError

    def finish_loading(self) -> None:
        """Derive what is kept beside the state dict; to be called when codes and scales have come from elsewhere."""
        raise NotImplementedError

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.finish_loading()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        tensors = (*self._parameters.items(), *self._buffers.items())
        keep = {id(tensor) for name, tensor in tensors if tensor is not None and self._quantized(name)}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if id(tensor) not in keep or moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class QuantizedLinear(MovesWithoutCasting):
    """What all layouts share; a subclass holds codes and scales and says which ops compute.

    Input [..., K] in bfloat16, float16 or float32; output [..., N] in the same dtype. The gradient of the input is that
    of the dequantized weight, the rounding of the input counting as the identity; weight and scale have none.
    """

    bias: Any  # Tensor or None
    _scale: Tensor | None

    def __init__(self, in_features: int, out_features: int, scale_name: str) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the weight in full precision
        self.in_features = in_features
        self.out_features = out_features
        self.scale_name = scale_name

    @property
    def key(self) -> Tensor:
        """The tensor that holds the codes."""
        raise NotImplementedError

    @property
    def scale(self) -> Tensor:
        """The weight's scale as the kernels take it."""
        raise NotImplementedError

    @staticmethod
    def grouped(tokens: int) -> bool | None:
        """How a norm or gate may quantize so many tokens for the layer as it makes them: in groups of 128 (True), with
        one scale for each (False), or not at all (None)."""
        return None

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes and scale of x [M, K]; x itself and None where activations stay in 16 bits."""
        raise NotImplementedError

    def matmul(self, codes: Tensor, scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """[M, N] of what `quantize_input` returned, bias added."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] in full precision."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        if torch.is_grad_enabled() and (flat.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            out = _StraightThrough.apply(flat, self.bias, self)
        else:
            out = self.matmul(*self.quantize_input(flat), x.dtype)
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def reset_parameters(self) -> None:
        """Codes come from a checkpoint; there is nothing sensible to draw."""

    def _quantized(self, name: str) -> bool:
        return name != "bias"


class _StraightThrough(torch.autograd.Function):
    """The layer with a gradient: forward as without, backward through the dequantized weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return layer.matmul(*layer.quantize_input(x), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        to_x = grad @ ctx.layer.dequantize(grad.dtype) if ctx.needs_input_grad[0] else None
        to_bias = grad.sum(0).to(ctx.layer.bias.dtype) if ctx.needs_input_grad[1] else None
        return to_x, to_bias, None


class Fp8Linear(QuantizedLinear, nn.Linear):
    """What the two FP8 layouts share; a subclass says how scales are laid out and which ops compute.

    weight        [N, K]  float8_e4m3fn
    <scale_name>  `scale_shape(N, K)`, float32 (checkpoints of others also hold bfloat16 or float8_e8m0fnu)
    bias          [N] in the model's dtype, or None
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scale_name: str,
        scale_dtype: torch.dtype = torch.float32,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, scale_name)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=CODES), requires_grad=False)
        scale = torch.empty(self.scale_shape(out_features, in_features), dtype=scale_dtype)
        self.register_parameter(scale_name, nn.Parameter(scale, requires_grad=False))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None)
        self.register_buffer("_scale", None, persistent=False)

    @staticmethod
    def scale_shape(out_features: int, in_features: int) -> tuple[int, int]:
        raise NotImplementedError

    @property
    def key(self) -> Tensor:
        return self.weight

    @property
    def scale(self) -> Tensor:
        """The weight's scale in float32, which is how the kernels take it."""
        stored = self._parameters[self.scale_name]
        if stored is not None and stored.dtype == torch.float32:
            return stored
        return self._scale if self._scale is not None else getattr(self, self.scale_name).to(torch.float32)

    def finish_loading(self) -> None:
        """Keep a float32 copy of a scale that is stored in another dtype: converting it in every call would cost a
        kernel launch. The copy is not in the state dict, so saving writes what was read. One that is there already is
        written over: it may be a view of the copy that joined layers share. A scale that is offloaded has no copy:
        what brings it for a call knows nothing of copies."""
        stored = getattr(self, self.scale_name)
        if stored.dtype == torch.float32:
            return
        if stored.is_meta:
            self._scale = None
        elif self._scale is not None and self._scale.device == stored.device:
            self._scale.copy_(stored.detach())
        else:
            self._scale = stored.detach().to(torch.float32)


class Fp8BlockLinear(Fp8Linear):
    """128x128 weight blocks, 1x128 activation groups (DeepSeek-V3, arXiv 2412.19437 §3.3).

    Its scale is [ceil(N/128), ceil(K/128)]. `activation_scale`, None or float32 [ceil(K/128)], replaces the scales
    computed from the data at run time; it is not part of the state dict, a side file holds it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        scale_name: str = "weight_scale_inv",
        **kwargs: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, scale_name=scale_name, **kwargs)
        self.activation_scale: Tensor | None
        self.register_buffer("activation_scale", None, persistent=False)

    @staticmethod
    def scale_shape(out_features: int, in_features: int) -> tuple[int, int]:
        return -(-out_features // 128), -(-in_features // 128)

    @staticmethod
    def grouped(tokens: int) -> bool | None:
        return True

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_fp8_group(x, scale=self.activation_scale)

    def matmul(self, codes: Tensor, scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        assert scale is not None
        return as_autocast(gemm_fp8_block(codes, scale, self.weight, self.scale, self.bias, out_dtype=out_dtype))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.weight.float() * expand_blocks(self.scale, (128, 128), self.weight.shape)).to(dtype)


class Fp8RowLinear(Fp8Linear):
    """One scale per weight row, [N, 1], and one per token."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, scale_name: str = "weight_scale", **kwargs: Any
    ) -> None:
        super().__init__(in_features, out_features, bias, scale_name=scale_name, **kwargs)

    @staticmethod
    def scale_shape(out_features: int, in_features: int) -> tuple[int, int]:
        return out_features, 1

    @staticmethod
    def grouped(tokens: int) -> bool | None:
        return False

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return quantize_fp8_token(x)

    def matmul(self, codes: Tensor, scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        assert scale is not None
        return as_autocast(gemm_fp8_row(codes, scale, self.weight, self.scale, self.bias, out_dtype=out_dtype))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.weight.float() * self.scale).to(dtype)

"""Routed experts in FP8: all experts of a layer in one 3-D tensor of codes and one of scales.

Checkpoints hold one matrix per expert; transformers stacks them while loading and splits them while saving, and the
scales go the same way (`quantizers.py`). A forward quantizes each token once and writes it to the rows of its experts,
multiplies all rows by their experts' weights in one launch for each projection, and adds the results up. How many rows
an expert has is never read on the host, so nothing waits for the router and a CUDA graph holds the whole layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantlab.formulas import is_silu
from quantlab.linear import CODES, Fp8BlockLinear, Fp8Linear, Fp8RowLinear, MovesWithoutCasting, QuantizedLinear
from quantlab_kernels import (
    gemm_fp8_grouped,
    moe_combine,
    moe_dispatch,
    quantize_fp8_group,
    quantize_fp8_token,
    swiglu_quantize,
)


class Experts(MovesWithoutCasting):
    """What all formats share; built from the module it replaces, whose activation, gating and numbers it keeps.

    Inference only: a gradient through the experts raises. Activations are E4M3, with scales as a `linear` has them that
    sees the tokens of an expert.
    """

    linear: type[QuantizedLinear]

    def __init__(self, original: Any) -> None:
        super().__init__()
        self.__dict__.update({k: v for k, v in vars(original).items() if not k.startswith("_")})
        self._modules.update(original._modules)
        self.gate = type(original)._apply_gate if has_gate(original) else _activate
        self.first = "gate_up_proj" if has_gate(original) else "up_proj"
        self.swiglu = self.gate.__name__ == "_default_apply_gate" and is_silu(original.act_fn)
        self.num_experts, self.hidden_dim, self.intermediate_dim = original.down_proj.shape

    @property
    def extents(self) -> tuple[int, int, int]:
        """Experts E, hidden H, intermediate I."""
        return self.num_experts, self.hidden_dim, self.intermediate_dim

    @property
    def first_rows(self) -> int:
        """N of the first projection."""
        return (2 if self.first == "gate_up_proj" else 1) * self.intermediate_dim

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def dispatch(self, x: Tensor, top_k_index: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Rows of tokens sorted by expert, their scales, positions [T, k] of each choice and counts [E]."""
        return moe_dispatch(x, top_k_index, self.num_experts, group=self.grouped(top_k_index.numel()))

    def gate_and_quantize(self, inner: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gated products [S, I] of inner [S, 2I], or the activated [S, I] of [S, I], and their scales."""
        group = self.grouped(inner.shape[0])
        if self.swiglu:
            return swiglu_quantize(inner, group=group)
        return (quantize_fp8_group if group else quantize_fp8_token)(self.gate(self, inner))

    def grouped(self, rows: int) -> bool:
        """Whether rows of all experts have a scale for each group of 128: by how many an expert has on average."""
        return bool(self.linear.grouped(rows // self.num_experts))

    def grouped_matmul(self, x: Tensor, scale: Tensor | None, name: str, counts: Tensor, dtype: torch.dtype) -> Tensor:
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
        x, scale, positions, counts = self.dispatch(hidden_states, top_k_index)
        inner = self.grouped_matmul(x, scale, self.first, counts, hidden_states.dtype)
        x, scale = self.gate_and_quantize(inner)
        out = self.grouped_matmul(x, scale, "down_proj", counts, hidden_states.dtype)
        return moe_combine(out, positions, top_k_weights)

    def _quantized(self, name: str) -> bool:
        return True


class Fp8Experts(Experts):
    """What the two layouts share.

    gate_up_proj, down_proj          [E, 2I, H], [E, H, I]  float8_e4m3fn; gate rows come before up rows
    gate_up_proj<s>, down_proj<s>    their scales, stacked; <s> is what the scale's name adds to "weight"

    Without a gate the first is up_proj [E, I, H].
    """

    linear: type[Fp8Linear]
    own: int  # experts that the checkpoint has here
    shared: tuple[Fp8Linear, ...]  # gate, up and down of a layer that follows them as further experts

    def __init__(self, original: Any, *, scale_name: str, scale_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(original)
        self.suffix = scale_name.removeprefix("weight")
        self.own, self.shared = self.num_experts, ()
        first, hidden, inner = self.first_rows, self.hidden_dim, self.intermediate_dim
        rows, columns = self.linear.scale_shape(inner, hidden)
        self._register(self.first, (first, hidden), (first // inner * rows, columns), scale_dtype)
        self._register("down_proj", (hidden, inner), self.linear.scale_shape(hidden, inner), scale_dtype)

    def _register(self, name: str, shape: tuple[int, int], scale_shape: tuple[int, int], dtype: torch.dtype) -> None:
        codes = torch.empty(self.num_experts, *shape, dtype=CODES)
        scale = torch.empty(self.num_experts, *scale_shape, dtype=dtype)
        self.register_parameter(name, nn.Parameter(codes, requires_grad=False))
        self.register_parameter(name + self.suffix, nn.Parameter(scale, requires_grad=False))
        self.register_buffer(f"_{name}_scale", None, persistent=False)

    def append(self, gate: Fp8Linear, up: Fp8Linear, down: Fp8Linear) -> int:
        """Let copies of a gated MLP's layers, as wide as n experts, be n further experts; returns n. They are not in
        the state dict. For a moment it takes the memory of all experts once more."""
        more = gate.out_features // self.intermediate_dim
        for name in ("gate_up_proj", "down_proj"):
            for parameter in (getattr(self, name), getattr(self, name + self.suffix)):
                parameter.data = lengthened(parameter.data, more)
        self.num_experts, self.shared = self.own + more, (gate, up, down)
        self.finish_loading()
        return more

    def _copy_shared(self) -> None:
        gate, up, down = self.shared
        more = self.num_experts - self.own
        for name, kind in (("", "weight"), (self.suffix, gate.scale_name)):
            both, last = (getattr(self, each + name).data for each in ("gate_up_proj", "down_proj"))
            rows = both.shape[1] // 2
            for first, layer in ((0, gate), (rows, up)):
                _copy(both[self.own :, first : first + rows], layer.get_parameter(kind).unflatten(0, (more, rows)))
            columns = down.get_parameter(kind)
            split = columns.shape[1] % more == 0 and columns.shape[1] > 1
            parts = columns.unflatten(1, (more, -1)).transpose(0, 1) if split else columns.expand(more, -1, -1)
            _copy(last[self.own :], parts)

    def finish_loading(self) -> None:
        """As `Fp8Linear.finish_loading`."""
        if self.shared:
            self._copy_shared()
        for name in (self.first, "down_proj"):
            stored = getattr(self, name + self.suffix)
            if stored.dtype != torch.float32:
                copy = None if stored.is_meta else stored.detach().to(torch.float32)
                setattr(self, f"_{name}_scale", copy)

    def scale(self, name: str) -> Tensor:
        """The stacked scales of the weight `name`, in float32."""
        copy = getattr(self, f"_{name}_scale")
        return copy if copy is not None else getattr(self, name + self.suffix).to(torch.float32)

    def grouped_matmul(self, x: Tensor, scale: Tensor | None, name: str, counts: Tensor, dtype: torch.dtype) -> Tensor:
        assert scale is not None
        return gemm_fp8_grouped(x, scale, getattr(self, name), self.scale(name), counts, out_dtype=dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self._parameters if self.shared else ():
            destination[prefix + name] = destination[prefix + name][: self.own]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, parameter in self._parameters.items() if self.shared else ():
            given = state_dict.get(prefix + name)
            if parameter is not None and given is not None and len(given) == self.own:
                state_dict[prefix + name] = lengthened(given, self.num_experts - self.own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def lengthened(x: Tensor, more: int) -> Tensor:
    """A copy with so many further rows."""
    longer = x.new_empty((len(x) + more, *x.shape[1:]))
    _copy(longer[: len(x)], x)
    return longer


def _copy(to: Tensor, source: Tensor) -> None:
    """Codes as bytes: torch cannot copy all of them everywhere."""
    if to.element_size() == 1:
        to, source = to.view(torch.uint8), source.view(torch.uint8)
    to.copy_(source.detach())


class Fp8BlockExperts(Fp8Experts):
    """128x128 weight blocks, 1x128 activation groups."""

    linear = Fp8BlockLinear

    def grouped_matmul(self, x: Tensor, scale: Tensor | None, name: str, counts: Tensor, dtype: torch.dtype) -> Tensor:
        if name == "gate_up_proj" and self.intermediate_dim % 128 and scale is not None:
            # Blocks were cut separately for gate and up, so those of up do not begin on a multiple of 128 rows.
            halves = zip(getattr(self, name).chunk(2, 1), self.scale(name).chunk(2, 1), strict=True)
            return torch.cat([gemm_fp8_grouped(x, scale, w, s, counts, out_dtype=dtype) for w, s in halves], 1)
        return super().grouped_matmul(x, scale, name, counts, dtype)


class Fp8RowExperts(Fp8Experts):
    """One scale per weight row and one per token."""

    linear = Fp8RowLinear


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, index: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        return experts._forward(hidden, index, weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "quantized experts have no gradient; load the checkpoint with dequantize=True to train it"
        )


def has_gate(module: nn.Module) -> bool:
    """Whether experts multiply what they activate by a second projection; transformers marks those that do not."""
    return getattr(module, "has_gate", True)


def _activate(experts: Any, inner: Tensor) -> Tensor:
    return experts.act_fn(inner)


def unsupported(module: nn.Module) -> str | None:
    """Why an experts module cannot be replaced by ours, or None."""
    first, parts = ("gate_up_proj", 2) if has_gate(module) else ("up_proj", 1)
    up, down = getattr(module, first, None), getattr(module, "down_proj", None)
    if not isinstance(up, Tensor) or not isinstance(down, Tensor) or up.ndim != 3 or down.ndim != 3:
        return "its experts have no fused gate and up projection"
    if any(name not in (first, "down_proj") for name, _ in module.named_parameters()):
        return "its experts have biases or norms"
    if not getattr(module, "is_concatenated", True):
        return "its experts interleave gate and up"
    if getattr(module, "is_transposed", False) or up.shape[1:] != (parts * down.shape[2], down.shape[1]):
        return "its experts are stored transposed"
    if len(up) != len(down):
        return "some of its experts compute nothing"
    if not hasattr(type(module), "_apply_gate"):
        return "its experts compute in a way of their own"
    return None

"""The routed experts of a whole layer in every format, beside transformers' own: what ``quantlab bench moe`` times.

Random codes and routing: right for times, of no use for quality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.experts import Experts, Fp8BlockExperts
from quantlab.int4_experts import Int4Experts, Int4Fp8Experts


@dataclass(frozen=True)
class Layer:
    """experts of [2 inner, hidden] and [hidden, inner], of which a token goes to `choices`."""

    experts: int
    hidden: int
    inner: int
    choices: int

    def flops(self, tokens: int) -> int:
        return 6 * tokens * self.choices * self.hidden * self.inner


LAYERS = {"deepseek-v3": Layer(256, 7168, 2048, 8), "qwen3-30b": Layer(128, 2048, 768, 8)}
TINY = Layer(4, 128, 128, 2)
TOKENS = (1, 16, 128, 512, 2048)
# format -> its experts, the name of their scales
FORMATS: dict[str, tuple[Callable[..., Experts], str]] = {
    "fp8-block": (Fp8BlockExperts, "weight_scale_inv"),
    "int4-fp8": (Int4Fp8Experts, "weight_scale"),
    "int4": (Int4Experts, "weight_scale"),
}


def dry_run() -> list[str]:
    """Run every format of a tiny layer once, on any device; the names of all cases."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in FORMATS:
        build(TINY, name, device)(*routed(TINY, 3, device))
    return cases()


def cases() -> list[str]:
    return [case(layer, name, tokens) for layer in LAYERS for tokens in TOKENS for name in FORMATS]


def case(layer: str, format_name: str, tokens: int) -> str:
    return f"{layer} experts {format_name} M={tokens}"


def run() -> Iterator[tuple[Any, ...]]:
    """(case, "", us, TFLOP/s, GB/s, share of the roofline, transformers' time over ours) of each, on this GPU."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    from quantlab_kernels.common.timing import measure

    for name, layer in LAYERS.items():
        modules = {format_name: build(layer, format_name, "cuda") for format_name in FORMATS}
        theirs = partial(grouped_mm_experts_forward, randomize(original(layer).to_empty(device="cuda")))
        for tokens in TOKENS:
            inputs = routed(layer, tokens, "cuda")
            calls = {each: [partial(module, *inputs)] for each, module in modules.items()}
            with torch.no_grad():
                times = measure(calls | {"theirs": [partial(theirs, *inputs)]}, rounds=7)
            other = times["theirs"].median_us
            for each, module in modules.items():
                us = times[each].median_us
                traffic = _traffic(layer, module, inputs)
                figures = _figures(layer.flops(tokens), traffic, us, narrow=each != "int4")
                yield case(name, each, tokens), "", *figures, f"transformers bf16 grouped_mm {other / us:.2f}x"


def build(layer: Layer, format_name: str, device: str) -> Experts:
    """The layer's experts of random codes."""
    kind, scale_name = FORMATS[format_name]
    with torch.device(device):
        module: Experts = randomize(kind(original(layer), scale_name=scale_name))
    module.finish_loading()
    return module


def original(layer: Layer) -> nn.Module:
    """transformers' experts of these extents, bfloat16, on the meta device."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

    config = Qwen3MoeConfig(
        num_experts=layer.experts, hidden_size=layer.hidden, moe_intermediate_size=layer.inner,
        num_experts_per_tok=layer.choices,
    )  # fmt: skip
    with torch.device("meta"):
        return Qwen3MoeExperts(config).to(torch.bfloat16)


def randomize(module: Any) -> Any:
    """Fill parameters with codes that are numbers, and small scales."""
    for parameter in module.parameters():
        if parameter.dtype == torch.float8_e4m3fn:
            parameter.data.view(torch.uint8).random_().bitwise_and_(0xBF)  # below 2, never NaN
        elif parameter.dtype == torch.int32:
            parameter.data.random_().bitwise_or_(0x11111111)  # never -8
        else:
            parameter.data.uniform_(0.005, 0.015)
    return module


def routed(layer: Layer, tokens: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [T, H], their experts [T, k] and the weights of those."""
    generator = torch.Generator(device).manual_seed(0)
    scores = torch.rand(tokens, layer.experts, generator=generator, device=device)
    weights, index = scores.topk(layer.choices)
    hidden = torch.randn(tokens, layer.hidden, generator=generator, device=device, dtype=torch.bfloat16)
    return hidden, index, weights


def _traffic(layer: Layer, module: Experts, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Bytes of the weights that are needed, each read once."""
    everything = sum(p.numel() * p.itemsize for p in module.parameters())
    return everything * len(inputs[1].unique()) / layer.experts


def _figures(flops: int, traffic: float, us: float, *, narrow: bool) -> tuple[str, str, str, str]:
    """TFLOP/s and so on as text; narrow: the products are of 8-bit numbers."""
    from quantlab_kernels.common.hardware import gpu

    rates, share = gpu().rates, ""
    if rates is not None:
        floor_us = max(traffic / rates.hbm, flops / ((narrow and rates.fp8) or rates.bf16)) * 1e6
        share = f"{floor_us / us:.0%}"
    return f"{us:.1f}", f"{flops / us / 1e6:.0f}", f"{traffic / us / 1e3:.0f}", share

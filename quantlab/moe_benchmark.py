"""The routed experts of a whole layer in every format, beside transformers' own: what ``quantlab bench moe`` times.

Random codes and routing: right for times, of no use for quality.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
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


def dry_run() -> None:
    """Run every format of a tiny layer once, on any device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name in FORMATS:
        build(TINY, name, device)(*routed(TINY, 3, device))


def cases(only: str = "") -> list[str]:
    """The names that contain `only`."""
    return [case(layer, *each) for layer in LAYERS for each in picked(layer, only)]


def case(layer: str, tokens: int, format_name: str) -> str:
    return f"{layer} experts {format_name} M={tokens}"


def picked(layer: str, only: str) -> list[tuple[int, str]]:
    """(tokens, format) of a layer's cases whose name contains `only`."""
    return [(tokens, name) for tokens in TOKENS for name in FORMATS if only in case(layer, tokens, name)]


def run(only: str = "") -> Iterator[tuple[Any, ...]]:
    """(case, "", us, TFLOP/s, GB/s, share of the roofline, transformers' time over ours) of each of the `cases`, on
    this GPU."""
    for layer in LAYERS:
        if wanted := picked(layer, only):
            yield from measured(layer, wanted)


def measured(name: str, wanted: list[tuple[int, str]]) -> Iterator[tuple[Any, ...]]:
    """Rows of `run` for (tokens, format) of one layer, the same tokens side by side."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    from quantlab_kernels.common.timing import measure

    layer = LAYERS[name]
    modules = {each: build(layer, each, "cuda") for each in dict.fromkeys(each for _, each in wanted)}
    theirs = partial(grouped_mm_experts_forward, randomize(original(layer).to_empty(device="cuda")))
    for tokens, group in groupby(wanted, itemgetter(0)):
        inputs = routed(layer, tokens, "cuda")
        calls = {each: [partial(modules[each], *inputs)] for _, each in group}
        with torch.no_grad():
            times = measure(calls | {"theirs": [partial(theirs, *inputs)]}, rounds=7)
        other = times["theirs"].median_us
        for each in calls:
            us = times[each].median_us
            traffic = _traffic(layer, modules[each], inputs)
            figures = _figures(layer.flops(tokens), traffic, us, narrow=each != "int4")
            yield case(name, tokens, each), "", *figures, f"transformers bf16 grouped_mm {other / us:.2f}x"


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

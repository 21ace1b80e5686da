"""A decoding step of one attention layer over packed latents, beside transformers' own: part of ``quantlab bench mla``.

The layer is that of DeepSeek-V2-Lite with random weights, projections, norms and the cache included.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab import cache, hf, latent
from quantlab.pipeline import quantize

BATCH, TOKENS = 16, 4096
ROOM = 512  # steps that a cache takes while it is timed
FORMATS = ("16bit", "fp8", "int4")
PROJECTIONS = ("bf16", "fp8-block")
VARIANTS = [(scheme, name) for scheme in PROJECTIONS for name in FORMATS]
_CONFIG = {
    "vocab_size": 64, "hidden_size": 2048, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": None, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "first_k_dense_replace": 1, "n_routed_experts": 4,
    "max_position_embeddings": 8192,
}  # fmt: skip


def case(scheme: str, name: str) -> str:
    return f"deepseek-v2-lite layer {scheme}, latents {name} {BATCH}x{TOKENS}"


def dry_run() -> None:
    """One step of each over a few tokens, on any device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        for scheme, name in VARIANTS:
            ours_step(scheme, name, 2, 8, device)()
        their_step(2, 8, device)()


def cases(only: str = "") -> list[str]:
    """The names that contain `only`."""
    return [case(*each) for each in VARIANTS if only in case(*each)]


def run(only: str = "") -> Iterator[tuple[Any, ...]]:
    """(case, "", us, "", "", "", transformers' time over ours and how far off the first step is) of each of the
    `cases`, on this GPU."""
    from quantlab_kernels.common.timing import measure

    wanted = [each for each in VARIANTS if only in case(*each)]
    with torch.no_grad():
        theirs = their_step(BATCH, TOKENS, "cuda")
        steps = {each: ours_step(*each, BATCH, TOKENS, "cuda") for each in wanted}
        exact = theirs().float()
        errors = {each: float((step().float() - exact).norm() / exact.norm()) for each, step in steps.items()}
        calls = {case(*each): [step] for each, step in steps.items()}
        times = measure(calls | {"theirs": [theirs]}, rounds=7)
    for each, error in errors.items():
        us = times[case(*each)].median_us
        beside = f"transformers bf16 {times['theirs'].median_us / us:.2f}x, error {error:.1%}"
        yield case(*each), "", f"{us:.1f}", "", "", "", beside


def _model(device: str) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.DeepseekV2Config(**_CONFIG)
    return transformers.DeepseekV2ForCausalLM(config).to(device, torch.bfloat16).eval()


def _filled(model: Any, past: Any, batch: int, tokens: int) -> Callable[[], Tensor]:
    """Let the layer read a prompt; returns its next step."""
    device = model.device
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(batch, tokens + 1, 2048, generator=generator, device=device, dtype=torch.bfloat16)
    places = model.model.rotary_emb(hidden, position_ids=torch.arange(tokens + 1, device=device)[None])
    attention = next(latent.modules(model))
    given = {"attention_mask": None, "past_key_values": past}
    attention(hidden_states=hidden[:, :tokens], position_embeddings=places[:, :tokens], **given)
    last, place = hidden[:, tokens:].contiguous(), places[:, tokens:]
    return lambda: attention(hidden_states=last, position_embeddings=place, **given)[0]


def ours_step(scheme: str, name: str, batch: int, tokens: int, device: str) -> Callable[[], Tensor]:
    """Steps over a static cache of a format, one token longer after each."""
    import transformers

    model = cache.use(_model(device), name) if scheme == "bf16" else _quantized(scheme, name, device)
    prepared: Any = cache.prepared(model)
    shape = transformers.StaticCache(config=model.config, max_cache_len=tokens + ROOM)
    return _filled(model, prepared.like(shape), batch, tokens)


def _quantized(scheme: str, kv: str, device: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "bf16", Path(folder) / scheme
        _model(device).save_pretrained(source)
        quantize(source, scheme, output, device=device)
        return hf.load(output, dtype=torch.bfloat16, device_map=device, kv=kv).eval()


def their_step(batch: int, tokens: int, device: str) -> Callable[[], Tensor]:
    """transformers' step over its own growing cache, always the same one."""
    import transformers

    model = _model(device)
    past = transformers.DynamicCache(config=model.config)
    step, layer = _filled(model, past, batch, tokens), past.layers[0]
    keys, values = layer.keys, layer.values

    def again() -> Tensor:
        layer.keys, layer.values = keys, values
        return step()

    return again

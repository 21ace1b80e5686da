"""Whole-job benchmarks on checkpoints of random weights in the shape of a real model: conversion, prefill, decode.

Random weights have a real model's sizes, so times are right; its text and its quality are not, and are not reported.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import UsageError
from quantlab.scheme import did_you_mean


@dataclass(frozen=True)
class Shape:
    """A Llama-architecture model: what its config.json needs to say."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rope_theta: float = 500000.0
    max_position_embeddings: int = 131072


SHAPES = {
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128256),
    "tiny": Shape(256, 512, 2, 4, 2, 512),
}


def shape_named(name: str) -> Shape:
    if name not in SHAPES:
        raise UsageError(f"unknown model shape {name!r}; {did_you_mean(name, SHAPES)}")
    return SHAPES[name]


def make_checkpoint(shape: Shape, folder: Path, *, device: str, seed: int = 0) -> int:
    """Write a bf16 checkpoint of N(0, 0.02) weights, a shard per four layers; returns its bytes."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(seed)
    weight_map: dict[str, str] = {}
    total = 0
    for shard, names in enumerate(_shards(shape)):
        tensors = {}
        for name, size in names:
            values = torch.empty(size, device=device, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            tensors[name] = (values + 1 if "norm" in name else values).cpu()
            total += tensors[name].nbytes
        file = f"model-{shard:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **asdict(shape),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return total


def _shards(shape: Shape, layers_per_shard: int = 4) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    kv = hidden // shape.num_attention_heads * shape.num_key_value_heads
    yield [("model.embed_tokens.weight", (shape.vocab_size, hidden))]
    for first in range(0, shape.num_hidden_layers, layers_per_shard):
        names: list[tuple[str, tuple[int, ...]]] = []
        for layer in range(first, min(first + layers_per_shard, shape.num_hidden_layers)):
            prefix = f"model.layers.{layer}"
            names += [
                (f"{prefix}.input_layernorm.weight", (hidden,)),
                (f"{prefix}.self_attn.q_proj.weight", (hidden, hidden)),
                (f"{prefix}.self_attn.k_proj.weight", (kv, hidden)),
                (f"{prefix}.self_attn.v_proj.weight", (kv, hidden)),
                (f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)),
                (f"{prefix}.post_attention_layernorm.weight", (hidden,)),
                (f"{prefix}.mlp.gate_proj.weight", (mlp, hidden)),
                (f"{prefix}.mlp.up_proj.weight", (mlp, hidden)),
                (f"{prefix}.mlp.down_proj.weight", (hidden, mlp)),
            ]
        yield names
    yield [("model.norm.weight", (hidden,)), ("lm_head.weight", (shape.vocab_size, hidden))]


def generation(folder: str, cases: list[str]) -> list[dict[str, Any]]:
    """Time a checkpoint in plain transformers on the present GPU.

    A case is "prefill BxS" (one forward over B sequences of S tokens, logits of the last position, as in `generate`) or
    "decode BxS" (one step after S tokens of context, static cache, the forward compiled as `generate` does).
    Returns a row per case: tokens per second and milliseconds, median of several runs.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda").eval()
    rows = []
    for case in cases:
        kind, _, extent = case.partition(" ")
        batch, length = map(int, extent.split("x"))
        tokens = torch.randint(3, model.config.vocab_size, (batch, length), device="cuda")
        with torch.inference_mode():
            ms = _prefill_ms(model, tokens) if kind == "prefill" else _decode_ms(model, tokens)
        per_run = batch * length if kind == "prefill" else batch
        rows.append({"case": case, "ms": ms, "tokens_per_s": per_run / ms * 1e3})
        torch.cuda.empty_cache()
    return rows


def _prefill_ms(model: Any, tokens: Any, runs: int = 5) -> float:
    import torch

    times = []
    for _ in range(runs + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(tokens, use_cache=False, logits_to_keep=1)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def _decode_ms(model: Any, tokens: Any, steps: int = 64) -> float:
    """Milliseconds a step of `generate`: the difference of a long and a short run takes prefill and start-up out."""
    import torch

    def run(new_tokens: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            cache_implementation="static",
            pad_token_id=0,
        )
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    short, long = 8, 8 + steps
    run(long), run(long)  # compiles, then captures
    return statistics.median((run(long) - run(short)) / steps for _ in range(3))

"""Checkpoints of random weights in the shape of real models, for benchmarks.

Models with experts are whole but for their number of layers, which are alike: of all layers they would not fit beside
their quantized copy, and a step takes a layer's time as often as there are layers.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import UsageError
from quantlab.scheme import Recipe, did_you_mean
from quantlab_kernels.common.cache import cache_folder


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


@dataclass(frozen=True)
class Mixture:
    """A model with experts, by its architecture in transformers and what its config.json needs to say."""

    architecture: str
    config: dict[str, Any]


LAYERS_PER_SHARD = 4
_LATENT = {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "head_dim": 64, "q_lora_rank": None}
SHAPES: dict[str, Shape | Mixture] = {
    "llama-3.1-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-3.2-1b": Shape(2048, 8192, 16, 32, 8, 128256),
    "tiny": Shape(256, 512, 2, 4, 2, 512),
    "deepseek-v2-lite-9l": Mixture(  # 9 of 27 layers
        "DeepseekV2",
        {
            **_LATENT, "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
            "moe_intermediate_size": 1408, "num_hidden_layers": 9, "num_attention_heads": 16, "num_key_value_heads": 16,
            "kv_lora_rank": 512, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1,
            "topk_group": 1, "topk_method": "greedy", "routed_scaling_factor": 1.0, "first_k_dense_replace": 1,
            "max_position_embeddings": 16384,
        },
    ),
    "qwen3-30b-a3b-8l": Mixture(  # 8 of 48 layers
        "Qwen3Moe",
        {
            "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 8,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
            "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 40960,
        },
    ),
    "tiny-experts": Mixture(
        "DeepseekV2",
        {
            **_LATENT, "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 128,
            "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
            "topk_method": "greedy", "routed_scaling_factor": 1.0, "first_k_dense_replace": 1,
            "max_position_embeddings": 1024,
        },
    ),
}  # fmt: skip


def shape_named(name: str) -> Shape | Mixture:
    if name not in SHAPES:
        raise UsageError(f"unknown model shape {name!r}; {did_you_mean(name, SHAPES)}")
    return SHAPES[name]


@contextmanager
def work_folder(given: Path | None) -> Iterator[Path]:
    """The folder for checkpoints: the one that was given, else one that does not outlast the context."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="quantlab-bench-") as folder:
        yield Path(folder)


@contextmanager
def holding_gpu(kind: int) -> Iterator[None]:
    """Hold the present GPU: with LOCK_SH to prepare, as others may meanwhile, with LOCK_EX to be timed alone.

    Waits for processes that hold it otherwise; one that ends, however that may be, holds nothing any more.
    """
    import torch

    name = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid if torch.cuda.is_available() else "cpu"
    file = cache_folder("locks") / str(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as opened:
        fcntl.flock(opened, kind)
        yield


def checkpoint(shape: Shape | Mixture, folder: Path) -> Path:
    """The random checkpoint, made if it is not there yet; it appears whole."""
    import torch

    if (folder / "config.json").is_file():
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder}: exists and is no checkpoint; move it, or choose another --workdir")
    half = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(half, ignore_errors=True)  # of a run that was killed
    make_checkpoint(shape, half, device="cuda" if torch.cuda.is_available() else "cpu")
    return half.rename(folder)


def without_data(scheme: str) -> Recipe:
    """A recipe that calibrates nothing, INT4 neither: random weights have no tokenizer, and mean nothing."""
    return Recipe(scheme)


def make_checkpoint(shape: Shape | Mixture, folder: Path, *, device: str) -> int:
    """Write a bf16 checkpoint of N(0, 0.02) weights; returns its bytes."""
    return _make_mixture(shape, folder, device) if isinstance(shape, Mixture) else _make(shape, folder, device)


def _make_mixture(shape: Mixture, folder: Path, device: str) -> int:
    """As transformers makes and writes it, all of it in the device's memory."""
    import torch
    import transformers

    config = getattr(transformers, f"{shape.architecture}Config")(**shape.config)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def _make(shape: Shape, folder: Path, device: str) -> int:
    """A shard per LAYERS_PER_SHARD layers, one at a time."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(0)
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


def _shards(shape: Shape) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    kv = hidden // shape.num_attention_heads * shape.num_key_value_heads
    yield [("model.embed_tokens.weight", (shape.vocab_size, hidden))]
    for first in range(0, shape.num_hidden_layers, LAYERS_PER_SHARD):
        names: list[tuple[str, tuple[int, ...]]] = []
        for layer in range(first, min(first + LAYERS_PER_SHARD, shape.num_hidden_layers)):
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

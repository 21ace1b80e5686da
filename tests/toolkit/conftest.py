"""Tiny random models of many architectures, their quantized checkpoints, and inputs that run them.

All are made once a session. Extents are multiples of 128 where a scheme needs it and small where it does not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class Tiny:
    """A checkpoint of a tiny model: its class, the folder it was saved to, and what its forward takes."""

    name: str
    model_class: Any
    folder: Path

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 90, (2, 8), generator=generator)

        def pixels(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        if self.name == "vit":
            return {"pixel_values": pixels(2, 3, 32, 32)}
        if self.name in ("rt_detr", "d_fine"):
            return {"pixel_values": pixels(1, 3, 64, 64)}
        if self.name == "whisper":
            return {"input_features": pixels(2, 16, 64), "decoder_input_ids": ids}
        if self.name == "t5":
            return {"input_ids": ids, "decoder_input_ids": ids}
        if self.name == "gemma3_vision":
            ids[:, 1:5] = 100
            return {"input_ids": ids, "pixel_values": pixels(2, 3, 32, 32), "token_type_ids": (ids == 100).long()}
        return {"input_ids": ids}


def text_config(**changes: Any) -> dict[str, Any]:
    return {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 128, "max_position_embeddings": 64,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    } | changes  # fmt: skip


def latent_config(**changes: Any) -> dict[str, Any]:
    """DeepSeek: latent attention, one dense layer, one of routed and shared experts."""
    return text_config(
        num_key_value_heads=4, head_dim=32, kv_lora_rank=128, q_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32,
        v_head_dim=64, first_k_dense_replace=1, moe_intermediate_size=128, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, n_group=1, topk_group=1,
    ) | changes  # fmt: skip


def detector_config(**changes: Any) -> dict[str, Any]:
    return {
        "d_model": 128, "encoder_hidden_dim": 128, "encoder_in_channels": [64, 128, 256], "encoder_ffn_dim": 256,
        "decoder_ffn_dim": 256, "encoder_layers": 1, "decoder_layers": 2, "num_queries": 10, "num_labels": 4,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "anchor_image_size": None,
        "decoder_in_channels": [128, 128, 128], "decoder_n_points": 4, "num_denoising": 0,
    } | changes  # fmt: skip


WORDS = "It is a truth universally acknowledged, that a single man in possession of a good fortune must be in want of"

IMAGE = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
QWEN_IMAGE = {
    "depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "patch_size": 8, "out_hidden_size": 384,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
RESNET = {
    "embedding_size": 32, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1], "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip
HGNET = {
    "hidden_sizes": [64, 128, 256, 256], "stem_channels": [3, 16, 16], "stage_in_channels": [16, 64, 128, 256],
    "stage_mid_channels": [16, 32, 64, 128], "stage_out_channels": [64, 128, 256, 256],
    "stage_num_blocks": [1, 1, 1, 1], "stage_numb_of_layers": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip


def tiny_models() -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Name -> (model class, config)."""
    import transformers as t

    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    gemma = text_config(query_pre_attn_scalar=64, sliding_window=32)
    whisper = {
        "d_model": 128, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "vocab_size": 128,
        "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
        "suppress_tokens": None, "begin_suppress_tokens": None,
    }  # fmt: skip
    return {
        "llama": lambda: (t.LlamaForCausalLM, t.LlamaConfig(**text_config())),
        "qwen2": lambda: (t.Qwen2ForCausalLM, t.Qwen2Config(**text_config(), tie_word_embeddings=True)),
        "qwen3": lambda: (t.Qwen3ForCausalLM, t.Qwen3Config(**text_config())),
        "qwen3_moe": lambda: (
            t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig(**text_config(moe_intermediate_size=128, **experts))
        ),
        "mixtral": lambda: (
            t.MixtralForCausalLM, t.MixtralConfig(**text_config(num_local_experts=4, num_experts_per_tok=2))
        ),
        "qwen3_vl_moe": lambda: (
            t.Qwen3VLMoeForConditionalGeneration,
            t.Qwen3VLMoeConfig(
                text_config=text_config(
                    hidden_size=384, moe_intermediate_size=128, pad_token_id=None,
                    rope_parameters={"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 10000.0},
                    **experts,
                ),
                vision_config=QWEN_IMAGE, image_token_id=100, video_token_id=101, vision_start_token_id=102,
                vision_end_token_id=103,
            ),
        ),
        "llama4": lambda: (
            t.Llama4ForCausalLM,
            t.Llama4TextConfig(**text_config(
                intermediate_size=128, intermediate_size_mlp=256, num_local_experts=4, num_experts_per_tok=1,
                interleave_moe_layer_step=1,
            )),
        ),
        "gemma4_moe": lambda: (
            t.Gemma4ForCausalLM,
            t.Gemma4TextConfig(**text_config(
                num_experts=4, top_k_experts=2, moe_intermediate_size=128, enable_moe_block=True, global_head_dim=64,
                hidden_size_per_layer_input=0, layer_types=["sliding_attention", "full_attention"], sliding_window=32,
                num_kv_shared_layers=0,
            )),
        ),
        "gemma3": lambda: (t.Gemma3ForCausalLM, t.Gemma3TextConfig(**gemma)),
        "gemma3_vision": lambda: (
            t.Gemma3ForConditionalGeneration,
            t.Gemma3Config(text_config=gemma, vision_config=IMAGE, mm_tokens_per_image=4, image_token_index=100,
                           boi_token_index=101, eoi_token_index=102),
        ),
        "phi3": lambda: (t.Phi3ForCausalLM, t.Phi3Config(**text_config(head_dim=32, num_key_value_heads=4))),
        "deepseek_v2": lambda: (t.DeepseekV2ForCausalLM, t.DeepseekV2Config(**latent_config())),
        "deepseek_v3": lambda: (t.DeepseekV3ForCausalLM, t.DeepseekV3Config(**latent_config())),
        "bert": lambda: (t.BertForMaskedLM, t.BertConfig(**text_config())),
        "whisper": lambda: (t.WhisperForConditionalGeneration, t.WhisperConfig(**whisper)),
        "t5": lambda: (
            t.T5ForConditionalGeneration,
            t.T5Config(d_model=128, d_kv=64, d_ff=256, num_layers=2, num_heads=2, vocab_size=128,
                       decoder_start_token_id=0),
        ),
        "vit": lambda: (t.ViTForImageClassification, t.ViTConfig(**IMAGE, num_labels=4)),
        "rt_detr": lambda: (
            t.RTDetrForObjectDetection,
            t.RTDetrConfig(backbone_config=t.RTDetrResNetConfig(**RESNET), **detector_config()),
        ),
        "d_fine": lambda: (
            t.DFineForObjectDetection,
            t.DFineConfig(backbone_config=t.HGNetV2Config(**HGNET), **detector_config()),
        ),
    }  # fmt: skip


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """The bfloat16 checkpoint of a tiny model by name, random weights from a fixed seed."""
    models = tiny_models()

    @cache
    def make(name: str) -> Tiny:
        model_class, config = models[name]()
        torch.manual_seed(0)
        model = model_class._from_config(config, dtype=torch.bfloat16)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.data = buffer.data.float()  # as published checkpoints have it
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return Tiny(name, model_class, folder)

    return make


@pytest.fixture(scope="session")
def quantized(tiny: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Tiny]:
    """The quantized checkpoint of a tiny model, by name and scheme."""
    from quantlab.pipeline import quantize

    @cache
    def make(name: str, scheme: str) -> Tiny:
        source = tiny(name)
        folder = tmp_path_factory.mktemp(f"{name}-{scheme}") / "out"
        quantize(source.folder, scheme, folder, device="cpu", workers=1)
        return Tiny(name, source.model_class, folder)

    return make


def decoder_weights(layers: int = 2, hidden: int = 256, inner: int = 384, vocabulary: int = 320) -> dict[str, Any]:
    """The tensors of a small decoder under the names that most checkpoints use, bfloat16, from a fixed seed."""
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden, hidden),
        "self_attn.v_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
    }  # fmt: skip
    all_shapes = {"model.embed_tokens": (vocabulary, hidden)}
    for layer in range(layers):
        all_shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}
    all_shapes |= {"model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    return {
        f"{name}.weight": torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in all_shapes.items()
    }


@pytest.fixture
def raw_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Write a checkpoint of an architecture unknown to transformers: raw_checkpoint(tensors, shards, **config)."""
    from safetensors.torch import save_file

    def make(tensors: dict[str, Any] | None = None, shards: int = 1, name: str = "model", **config: Any) -> Path:
        tensors = decoder_weights() if tensors is None else tensors
        folder = tmp_path / name
        folder.mkdir()
        config = {
            "model_type": "unheard_of",
            "vocab_size": 320,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        } | config
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer.json").write_text('{"version": "1.0"}')
        names = sorted(tensors)
        parts = [names[i::shards] for i in range(shards)]
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        if shards == 1:
            files = ["model.safetensors"]
        else:
            weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        for file, part in zip(files, parts, strict=True):
            save_file({name: tensors[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture
def hub_models(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Path]], list[tuple[str, str | None]]]:
    """Puts folders on a hub, by their ids there. The list gets the id and the revision of every download."""

    def put(models: dict[str, Path]) -> list[tuple[str, str | None]]:
        asked = []

        def snapshot_download(name: str, *, revision: str | None, dry_run: bool = False, **_: Any) -> str | list[Any]:
            if dry_run:
                return []
            asked.append((name, revision))
            return str(models[name])

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        monkeypatch.setattr("quantlab.locate._hub_info", lambda *_: None)
        return asked

    return put


@pytest.fixture(scope="session")
def edited() -> Callable[..., Path]:
    """Copies a checkpoint with fields of its quantization config changed; None removes one."""

    def copy(source: Tiny, to: Path, **quantization: Any) -> Path:
        shutil.copytree(source.folder, to, dirs_exist_ok=True)
        config = json.loads((to / "config.json").read_text())
        for key, value in quantization.items():
            config["quantization_config"][key] = value
            if value is None:
                del config["quantization_config"][key]
        (to / "config.json").write_text(json.dumps(config))
        return to

    return copy


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Ten thousand characters in which no two windows are alike."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = WORDS.split()
    path.write_text(" ".join(words[i * i % len(words)] + str(i) for i in range(1500)))
    return str(path)


@pytest.fixture(scope="session")
def with_tokenizer(tiny, character_tokenizer):
    def make(name: str):
        model = tiny(name)
        if not (model.folder / "tokenizer.json").exists():
            character_tokenizer(bos=True).save_pretrained(model.folder)
        return model

    return make

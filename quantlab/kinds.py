"""What a tensor is, by its name, shape and dtype alone: all there is for architectures transformers does not know.

Where it knows them, `architecture` says it better, and only what no module tree tells (towers, MTP) is asked here.

Names are read as dotted paths; the last component of the module's path is its leaf.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantlab.checkpoint import WEIGHT, module_of
from quantlab.shards import TensorInfo

FLOATS = {"BF16", "F16", "F32"}
ENGINE_ALIGNMENT = 16  # FP8 GEMMs of cuBLASLt and CUTLASS take N and K in multiples of this

# Why a tensor of a kind that is never quantized stays.
STAY = {
    "embedding": "embedding: a table, not a product",
    "head": "output head: kept in full precision, engines do not load it quantized",
    "router": "router: small, and decides which experts run",
    "conv": "convolution",
    "norm": "norm",
}

EMBEDDING = re.compile(
    r"(^|_)(embed|embeds|embedding|embeddings|embedder|emb)(_tokens|_positions|_in)?$|^(wte|wpe|shared|tok_embeddings)$"
    r"|^relative_attention_bias$|_embeddings?(_table)?$|^embed_"
)
HEAD = re.compile(
    r"^(lm_head|embed_out|output|head|classifier|score|proj_out|qa_outputs|decoder|fc_out|logits?|class_embed|bbox_embed"
    r"|class_head|bbox_head|heads?|.*_head|.*_classifier|classification_head|enc_score_head|enc_bbox_head)$"
)
# Output layers that no module tree marks as such: what classifies, scores or places boxes.
PREDICTION = re.compile(
    r"(^|\.)(classifier|score|qa_outputs|class_embed|bbox_embed|enc_score_head|enc_bbox_head|\w+_classifier)(\.|$)"
)
ROUTER = re.compile(r"^(gate|router|gate_network|wg|shared_expert_gate|shared_expert_router|switch)$")
NORM = re.compile(r"norm|(^|_)ln(_|\d|$)|^bn\d*$|batch_?norm", re.IGNORECASE)
TOWER = re.compile(
    r"^(visual|vision|audio|image|speech|sam|siglip|clip|vit)(_|$)|^(multi_modal|multimodal|mm|connector|aligner"
    r"|embed_vision|embed_audio|mlp1|resampler|patch_merger|patch_merge|vqmodel|vision2text|perceiver|talker|token2wav)(_|$|projector)"
)
MTP = re.compile(r"(^|\.)(mtp|mtp_layers|mtp_block|nextn|next_n|num_nextn)(\.|_|$)")
EXPERTS = re.compile(r"(^|\.)((?!shared)\w+_)?experts(?=\.|$)")  # shared experts are ordinary layers
EXPERT = re.compile(r"(?P<list>.*\.experts)\.(?P<number>\d+)\.(?P<part>.+)")

# GPT-2 and its kin store these as [in, out] in a class of their own; a reader of quantized checkpoints knows nn.Linear.
TRANSPOSED_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
TRANSPOSED = {"c_attn", "c_proj", "c_fc", "q_attn"}
USED_DIRECTLY = {"dt_proj"}  # state-space scans read this weight, they do not call the layer

# Members that engines fuse into one layer, which then has one scheme. Order as fused: the last member may be ragged.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("wi_0", "wi_1"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)
FUSED_OF = {member: group for group in FUSED for member in group}
ROW_PARALLEL = {"o_proj", "out_proj", "down_proj", "w2", "wo", "dense", "fc2", "c_proj", "dense_4h_to_h", "linear_fc2"}
REPLICATED = {"q_a_proj", "kv_a_proj_with_mqa", "fused_qkv_a_proj_with_mqa", "gate", "eh_proj"}


@dataclass(frozen=True)
class Model:
    """What the config tells about all tensors: sizes that mark embeddings and routers, and which part is the language
    model where there are several."""

    model_type: str
    vocabulary: int | None
    experts: frozenset[int]
    layers: int | None
    multimodal: bool
    tied: bool

    @classmethod
    def of(cls, config: dict[str, Any]) -> Model:
        text = text_config(config)
        counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        return cls(
            model_type=str(config.get("model_type", "")),
            vocabulary=positive(text.get("vocab_size", config.get("vocab_size"))),
            experts=frozenset(n for part in (text, config) for key in counts if (n := positive(part.get(key)))),
            layers=positive(text.get("num_hidden_layers", config.get("num_hidden_layers"))),
            multimodal=text is not config or any(key.endswith(("vision_config", "audio_config")) for key in config),
            tied=bool(tied),
        )


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model."""
    for key in ("text_config", "llm_config", "thinker_config"):
        if isinstance(config.get(key), dict):
            return text_config(config[key])
    return config


def context_length(config: dict[str, Any]) -> int | None:
    """Tokens that the language model was made for, None where its config does not say."""
    return positive(text_config(config).get("max_position_embeddings"))


def positive(value: Any) -> int | None:
    """A config value if it is a positive integer; configs hold lists, null and strings in the same places."""
    return value if type(value) is int and value > 0 else None


def kind_of(info: TensorInfo, model: Model) -> str:
    """One of the kinds of `architecture`: linear, expert, router, embedding, head, conv, norm, other."""
    module = module_of(info.name)
    leaf = _leaf(module)
    if info.dtype not in FLOATS or not info.elements:
        return "other"
    if len(info.shape) == 3 and (EXPERTS.search(info.name) or info.shape[0] in model.experts):
        return "expert"
    if len(info.shape) >= 3:
        return "conv"
    if len(info.shape) < 2 or not info.name.endswith(WEIGHT):
        return "norm" if NORM.search(leaf) else "other"
    if EMBEDDING.search(leaf) or re.search(r"(^|\.)embeddings\.\w*_embeddings$", module):
        return "embedding"
    if HEAD.match(leaf) and not (leaf == "output" and info.shape[0] != model.vocabulary):
        return "head"
    if model.vocabulary == info.shape[0] and not re.search(r"\.\d+(\.|$)", module):
        return "head"  # of an unusual name, but outside the layers and as long as the vocabulary
    if "router" in module.split(".") or (
        ROUTER.match(leaf) and (not model.experts or info.shape[0] in model.experts | {1})
    ):
        return "router"
    if (model.model_type in TRANSPOSED_MODELS and leaf in TRANSPOSED) or leaf in USED_DIRECTLY or NORM.search(leaf):
        return "other"
    return "expert" if EXPERTS.search(module) else "linear"


def _leaf(module: str) -> str:
    """The last component of a path that is not a number: the leaf of `lm_head.0` is `lm_head`."""
    return next((part for part in reversed(module.split(".")) if not part.isdigit()), module)


def leaf_of(module: str) -> str:
    return module.rpartition(".")[2]


def position(module: str) -> tuple[int | None, str]:
    """Depth of a layer and its type, from its path: ``model.layers.3.mlp.up_proj`` -> (3, "mlp.up_proj").

    Experts are of one type: their number becomes a star. A path without a number has no depth.
    """
    found = re.search(r"(?:^|\.)(\d+)\.", module)
    if found is None:
        return None, module
    return int(found[1]), re.sub(r"\.\d+(?=\.|$)", ".*", module[found.end() :])


def common_name(modules: Sequence[str]) -> str:
    """One name for layers that belong together: ``model.layers.3.self_attn.q/k/v_proj``."""
    parent, leaves = modules[0].rpartition(".")[0], [leaf_of(module) for module in modules]
    if len(leaves) > 1 and all(leaf.endswith("_proj") for leaf in leaves):
        leaves = ["/".join(leaf.removesuffix("_proj") for leaf in leaves) + "_proj"]
    return (parent + "." if parent else "") + "/".join(leaves)


def is_mtp(name: str, model: Model) -> bool:
    """Multi-token-prediction layers: named so, or numbered past the last layer of the config (DeepSeek-V3)."""
    if MTP.search(name):
        return True
    number = re.match(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.", name)
    return bool(number and model.layers and int(number[1]) >= model.layers)


def in_tower(name: str, model: Model) -> bool:
    """Part of a vision, audio or connecting tower of a model whose main part is a language model."""
    return model.multimodal and any(TOWER.match(part) for part in name.split(".")[:3])


def fused_group(module: str) -> tuple[str, ...]:
    """The modules that engines fuse with this one, itself included, in the order they are fused."""
    parent, _, leaf = module.rpartition(".")
    prefix = parent + "." if parent else ""
    return tuple(prefix + member for member in FUSED_OF.get(leaf, (leaf,)))


def experts_of(module: str) -> str | None:
    """The path of the list of experts that a module belongs to; engines give all of it one scheme."""
    found = EXPERTS.search(module)
    return module[: found.end()] if found else None


def missing_experts(names: Iterable[str], counts: Mapping[str, int] | None = None) -> Iterator[str]:
    """Names that single experts lack and others of their list have: ``mlp.experts.3.up_proj``, from names of modules or
    tensors. `counts` has the number of experts by the path of their list, where that is known."""
    lists: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if match := EXPERT.fullmatch(name):
            lists[match["list"]][match["part"]].add(int(match["number"]))
    for path, parts in lists.items():
        wanted = set(range(counts[path])) if counts and path in counts else set().union(*parts.values())
        for part, numbers in parts.items():
            yield from (f"{path}.{number}.{part}" for number in sorted(wanted - numbers))

"""What the keys of each layer look like after their rotation, at all places of a context.

Rotary embeddings turn pairs of channels by an angle that grows with the position, fast pairs within a few tokens, slow
ones over a whole context. Biases and norms give some pairs a large constant part; turned, it becomes a channel whose
values drift. Statistics of a text's first tokens know nothing of that drift. So short pieces of text are run as if they
lay anywhere in the context: attention depends on distances alone, so hidden states are what they always are, and keys
are rotated by the model's own code, whatever kind of rotary embedding it has (partial, interleaved, scaled, none).

The alternative, scales of pairs before the rotation folded into weights (FireQ, arXiv 2505.20839, section 4.2), costs
nothing at run time, but has to know the pairs, cannot subtract means, and measures worse (README).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

PIECES, PIECE = 16, 64  # sequences, and tokens of each
HORIZON = 32768  # places to cover, where the model's context is not shorter
SKIPPED = 4  # tokens at the start of a piece: keys of an attention sink are like no others

Statistics = dict[int, tuple[Tensor, Tensor]]


@torch.no_grad()
def key_statistics(model: Any, tokens: Tensor, horizon: int | None = None) -> Statistics:
    """Layer -> (mean, spread) of its keys, each [1, Hkv, D] float32; spread is the largest distance from the mean.

    tokens   [pieces, length] int64, pieces of text; they are spread evenly over the places 0 .. horizon - 1
    horizon  by default the model's `max_position_embeddings`, `HORIZON` at most

    Layers that cache no keys are not in the result.
    """
    config = model.config.get_text_config(decoder=True)
    if horizon is None:
        horizon = min(getattr(config, "max_position_embeddings", None) or HORIZON, HORIZON)
    pieces, length = tokens.shape
    first = torch.linspace(0, max(horizon - length, 0), pieces).round().long()
    places = (first[:, None] + torch.arange(length)).to(model.device)
    recorder = Cache(layer_class_to_replicate=_Recorder)
    was_training = model.training
    model.eval()
    model(tokens.to(model.device), position_ids=places, past_key_values=recorder, use_cache=True, logits_to_keep=1)
    model.train(was_training)
    return {i: layer.statistics for i, layer in enumerate(recorder.layers) if layer.statistics is not None}


class _Recorder(CacheLayerMixin):
    """Takes statistics of the keys that it is given and keeps nothing else."""

    is_sliding = False
    statistics: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        skipped = min(SKIPPED, key_states.shape[2] - 1)
        keys = key_states[:, :, skipped:].float().transpose(0, 1).flatten(1, 2)
        mean = keys.mean(1, keepdim=True)
        spread = (keys - mean).abs().amax(1)
        self.statistics = mean[:, 0][None], spread[None]
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

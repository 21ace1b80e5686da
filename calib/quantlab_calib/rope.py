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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from quantlab_calib.capture import Walk, Weights, loading_when_called

PIECES, PIECE = 16, 64  # sequences, and tokens of each
HORIZON = 32768  # places to cover, where the model's context is not shorter
SKIPPED = 4  # tokens at the start of a piece: keys of an attention sink are like no others


@dataclass(frozen=True)
class LayerStatistics:
    """Of the keys of one layer, and of its values.

    mean, spread  [1, Hkv, D] float32; spread is the largest distance from the mean
    amax          [2] float32, the largest magnitudes of keys and of values, those of attention sinks included
    """

    mean: Tensor
    spread: Tensor
    amax: Tensor


Statistics = dict[int, LayerStatistics]


def horizon_of(config: Any) -> int:
    """Places that a model is measured on: all of its context, `HORIZON` at most."""
    return min(getattr(config, "max_position_embeddings", None) or HORIZON, HORIZON)


@torch.no_grad()
def key_statistics(model: Any, tokens: Tensor) -> Statistics:
    """Statistics of the layers of a model.

    tokens  [pieces, length] int64, pieces of text; they are spread evenly over the places before `horizon_of` it

    Layers that cache no keys are not in the result.
    """
    recorder, given = _recording(model, tokens)
    was_training = model.training
    model.eval()
    model(tokens.to(model.device), **given, logits_to_keep=1)
    model.train(was_training)
    return _recorded(recorder)


@torch.no_grad()
def key_statistics_by_block(
    model: Any,
    tokens: Tensor,
    weights: Weights,
    blocks: str,
    device: torch.device,
    progress: Callable[[str, int, int], None] | None = None,
) -> Statistics:
    """The same, with the weights of one block of the list at path `blocks` in memory.

    model     its parameters may be on the meta device; `weights` loads parts of it to `device` and releases them
    progress  called with (path of a block, number of blocks done, number of all)

    Raises CaptureError where the model does not run so.
    """
    recorder, given = _recording(model, tokens, device)
    walk = Walk(model, blocks, device, given)
    hidden: Tensor | None = None
    with loading_when_called(model, blocks, weights):
        for index in range(len(walk.blocks)):
            path = f"{blocks}.{index}"
            weights.load(path)
            hidden = walk.through(index, hidden, tokens)
            weights.release(path)
            if progress is not None:
                progress(path, index + 1, len(walk.blocks))
    return _recorded(recorder)


def _recording(model: Any, tokens: Tensor, device: torch.device | None = None) -> tuple[Cache, dict[str, Any]]:
    """A cache that takes statistics, and the arguments by which a model runs with it at places all over its context."""
    pieces, length = tokens.shape
    horizon = horizon_of(model.config.get_text_config(decoder=True))
    first = torch.linspace(0, max(horizon - length, 0), pieces).round().long()
    places = (first[:, None] + torch.arange(length)).to(device or model.device)
    recorder = Cache(layer_class_to_replicate=_Recorder)
    return recorder, {"position_ids": places, "past_key_values": recorder, "use_cache": True}


def _recorded(recorder: Cache) -> Statistics:
    return {i: layer.statistics for i, layer in enumerate(recorder.layers) if layer.statistics is not None}


class _Recorder(CacheLayerMixin):
    """Takes statistics of the keys and values that it is given and keeps nothing else."""

    is_sliding = False
    statistics: LayerStatistics | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        skipped = min(SKIPPED, key_states.shape[2] - 1)
        keys = key_states[:, :, skipped:].float().transpose(0, 1).flatten(1, 2)
        mean = keys.mean(1, keepdim=True)
        spread = (keys - mean).abs().amax(1)
        amax = torch.stack([key_states.abs().amax().float(), value_states.abs().amax().float()])
        self.statistics = LayerStatistics(mean[:, 0][None], spread[None], amax)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

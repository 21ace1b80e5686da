"""A baseline that has run: its last hidden states, kept between runs, and its head, which makes logits of them.

Hidden states are exact and small (tokens x hidden x 2 bytes: 12 MB where the logits would be 2 GB); stored top-k logits
would make KL a lower bound. They lie in the cache folder (`quantlab_kernels.common.cache`) and may
be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlab.lazy import LazyModel
from quantlab.output import hash_file
from quantlab.scoring import Logits, base_of, head_of
from quantlab.source import Source
from quantlab_calib.capture import load_when_called
from quantlab_kernels.common.cache import cache_folder

FORMAT = 1  # of the files; part of their name


@dataclass(frozen=True)
class Baseline:
    """hidden  [windows, length - 1, hidden size] on the CPU, in the dtype that the model computes in"""

    source: Source
    hidden: Tensor
    cached: bool
    trust_remote_code: bool = False

    def head(self, device: torch.device) -> Logits:
        """The head alone: of the checkpoint's weights only those of the output layer are read."""
        lazy = LazyModel(self.source, device, self.hidden.dtype, trust_remote_code=self.trust_remote_code)
        base = base_of(lazy.model)
        path = next(name for name, module in lazy.model.named_modules() if module is base)
        load_when_called(lazy.model, path, lazy)
        return head_of(lazy.model)


def cache_file(source: Source, tokens: Tensor, settings: Mapping[str, Any]) -> Path:
    """Where the hidden states for these tokens are kept; the name is a hash of all that they depend on.

    The weights count by content: reading them once takes a fraction of the time of running them.
    """
    shards = sorted({info.shard for info in source.tensors.values()})
    key = [FORMAT, source.config, [hash_file(shard) for shard in shards], digest(tokens), dict(settings)]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_folder("baselines") / f"{name}.safetensors"


def digest(tokens: Tensor) -> str:
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def read(file: Path, tokens: Tensor) -> Tensor | None:
    """The hidden states that an earlier run left, None where there are none or they are damaged."""
    try:
        hidden = load_file(file)["hidden"]
    except (OSError, SafetensorError, KeyError):
        return None
    return hidden if hidden.shape[:2] == (tokens.shape[0], tokens.shape[1] - 1) else None


def write(file: Path, hidden: Tensor) -> None:
    """Keep them for the next run; a disk that does not take them costs only time."""
    temporary = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"hidden": hidden}, temporary)
        temporary.replace(file)
    except (OSError, SafetensorError):
        with contextlib.suppress(OSError):
            temporary.unlink()

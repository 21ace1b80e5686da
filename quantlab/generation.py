"""What a model writes, and how fast: greedy continuations of the same prompts, for one model beside another.

Greedy, because sampling would show chance and not quantization. Where two texts part says little by itself (one token
of nearly equal probability is enough); nonsense after that point says much.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlab import hf
from quantlab.errors import UsageError
from quantlab.kinds import context_length
from quantlab_calib import data

PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Written:
    """What one model wrote.

    texts              continuations of the prompts
    tokens_per_second  of one sequence at a time, prompts included in the time
    weight_bytes       of parameters and buffers, as they lie in memory
    peak_bytes         of GPU memory, None on a CPU
    """

    device: str
    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    tokens_per_second: float
    weight_bytes: int
    peak_bytes: int | None


def write(
    folder: str | Path,
    load: Callable[[], Any] | None = None,
    *,
    count: int = 3,
    tokens: int = 48,
    trust_remote_code: bool = False,
) -> Written:
    """Let a causal model continue `count` prompts out of the bundled text, on a GPU where there is one.

    load  gives the model of the folder, by default `hf.load`
    """
    try:
        tokenizer = data.load_tokenizer(folder, trust_remote_code=trust_remote_code)
        prompts = data.windows("bundled", tokenizer, "evaluation", count=count, length=PROMPT_TOKENS)
    except data.DataError as error:
        raise UsageError(str(error)) from None
    on_gpu = torch.cuda.is_available()
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    model = load() if load else hf.load(folder, device_map="auto" if on_gpu else None, warmup=on_gpu, **options)
    model = model.eval()
    if not model.can_generate():
        raise UsageError(f"{folder}: {type(model).__name__} writes no text; leave out --generate")
    context = context_length(model.config.to_dict())
    tokens = tokens if context is None else max(1, min(tokens, context - PROMPT_TOKENS))
    _continue(model, prompts[:1], 2)  # the first call allocates and compiles
    start = time.perf_counter()
    ids = [_continue(model, prompt[None], tokens) for prompt in prompts]
    seconds = time.perf_counter() - start
    every = [*model.parameters(), *model.buffers()]
    cuda = model.device.type == "cuda"
    return Written(
        device=torch.cuda.get_device_name() if cuda else "cpu",
        prompts=tuple(tokenizer.batch_decode(prompts, skip_special_tokens=True)),
        texts=tuple(tokenizer.decode(found, skip_special_tokens=True) for found in ids),
        tokens_per_second=sum(len(found) for found in ids) / seconds,
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in every),
        peak_bytes=torch.cuda.max_memory_allocated() if cuda else None,
    )


@torch.no_grad()
def _continue(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    """New token ids after a prompt [1, length]."""
    ids = prompt.to(model.device)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return found[0, ids.shape[1] :].cpu()


def rows(models: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """(what, of the one model, of the other) for people, of `Written` as dicts."""
    every = list(models.values())
    found = [("tokens per second, one sequence", *(f"{w['tokens_per_second']:.1f}" for w in every))]
    found.append(("weights in memory (MB)", *(f"{w['weight_bytes'] / 1e6:.1f}" for w in every)))
    if all(w["peak_bytes"] is not None for w in every):
        found.append(("peak of GPU memory (MB)", *(f"{w['peak_bytes'] / 1e6:.1f}" for w in every)))
    texts = ((prompt, *(w["texts"][i] for w in every)) for i, prompt in enumerate(every[0]["prompts"]))
    return found + [tuple(" ".join(text.split()) for text in row) for row in texts]


def agreement(a: str, b: str) -> int:
    """Characters that two texts have in common from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

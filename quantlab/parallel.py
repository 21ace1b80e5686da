"""Over how many GPUs a quantized checkpoint can be split: the shape rules of vLLM and SGLang for tensor parallelism.

Column-parallel layers (q, k, v, gate, up) split N, row-parallel ones (o, down) split K; a part must hold whole blocks
of scales. Attention splits by heads; fewer key-value heads than GPUs are repeated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quantlab import kinds

if TYPE_CHECKING:
    from quantlab.preflight import Decision

CANDIDATES = (64, 32, 16, 8, 4, 2)


def largest_tensor_parallel(quantized: list[Decision], config: dict[str, Any]) -> int:
    """The largest power of two up to 64 at which every quantized layer still holds whole blocks on every GPU."""
    return next((size for size in CANDIDATES if _fits(size, quantized, config)), 1)


def _fits(size: int, quantized: list[Decision], config: dict[str, Any]) -> bool:
    text = kinds.text_config(config)
    heads, kv_heads = (kinds.positive(text.get(f"num_{which}_heads")) for which in ("attention", "key_value"))
    if heads and heads % size:
        return False
    if kv_heads and kv_heads % size and size % kv_heads:
        return False
    shapes = {(kinds.leaf_of(m), part.shape, d.scheme.alignment) for d in quantized if d.scheme for m, part in d.parts}
    return all(_layer_fits(size, leaf, shape, alignment, kv_heads) for leaf, shape, alignment in shapes)


def _layer_fits(size: int, leaf: str, shape: tuple[int, ...], alignment: tuple[int, int], kv_heads: int | None) -> bool:
    if leaf in kinds.REPLICATED:
        return True
    rows, columns = shape
    if leaf in kinds.ROW_PARALLEL:
        return columns % size == 0 and columns // size % alignment[1] == 0
    if leaf in ("k_proj", "v_proj") and kv_heads:
        size = min(size, kv_heads)
    return rows % size == 0 and rows // size % alignment[0] == 0

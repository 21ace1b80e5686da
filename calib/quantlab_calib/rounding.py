"""INT4 codes and group scales for a weight: a search over clips, on the grid of scales that every engine keeps.

A group of 128 weights shares a scale; fitting it to the largest of them wastes the few codes there are on the tails.
The search takes the scale with the least squared error of what the deployed decode (`scale * code`) makes of the group.

Scales lie on a grid: vLLM stores the scales of a row as E4M3 numbers f times one FP32 factor c = max / 448, and scales
that are not of that form lose 2.7 % (rms) there. With c of four significant bits and the row's largest scale exactly
448 c, every product c f fits bfloat16, and its conversion changes nothing. The alternative, any bfloat16 scale, costs
as much memory and is rounded once more by somebody else after the codes were chosen for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GROUP = 128  # weights along K that share a scale
POWER, FREE_POWER = 2.0, 4.0  # of errors, with and without knowledge of the inputs
CODE_MAX = 7  # -8 is left unused: symmetric, and sign-magnitude in the kernels
SMALLEST = 0.125  # of the E4M3 numbers: an eighth of it is still normal, which is how vLLM stores them
FLOOR = 1 / (448 * 512)  # vLLM takes no smaller factor for a row
CLIPS = tuple(2 ** (-i / 8) for i in range(-1, 10))  # tried on the scale that just fits: 1.09 to 0.46
FREE_CLIPS = CLIPS[:4]  # with FREE_POWER no group of weights wants less than 0.92
CHUNK = {"cpu": 1 << 20, "cuda": 1 << 26}  # weights at a time: one pass stays in the cache, or fills the GPU


def round_int4(weight: Tensor, *, group: int = GROUP, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight [N, K] of any floating dtype.

    importance  [K] float32, weight of each channel's squared error, say the energy of its inputs; None: all alike

    Returns codes int8 [N, K] in -7..7 and scale float32 [N, K / group], on the grid of `on_grid`. A group of zeros has
    codes 0. Raises ValueError for a K that is not a multiple of `group`.
    """
    _check(weight, group)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(weight.shape[0], weight.shape[1] // group, device=weight.device)
    rows = max(1, CHUNK.get(weight.device.type, CHUNK["cuda"]) // weight.shape[1])
    for begin in range(0, weight.shape[0], rows):
        band = slice(begin, begin + rows)
        part = weight[band].to(torch.float32)
        scale[band] = search_scales(part, group=group, importance=importance)
        codes[band] = nearest_codes(part, scale[band])
    return codes, scale


def nearest_codes(weight: Tensor, scale: Tensor) -> Tensor:
    """Codes int8 [N, K] nearest to a weight [N, K] for given scales [N, G]."""
    groups = weight.to(torch.float32).unflatten(1, (scale.shape[1], -1))
    return (groups / scale[:, :, None]).round_().clamp_(-CODE_MAX, CODE_MAX).flatten(1).to(torch.int8)


def decode_int4(codes: Tensor, scale: Tensor) -> Tensor:
    """What codes [N, K] and scales [N, G] stand for, float32 [N, K]: the deployed decode."""
    return (codes.to(torch.float32).unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)


def search_scales(weight: Tensor, *, group: int = GROUP, importance: Tensor | None = None) -> Tensor:
    """Scales float32 [N, K / group] with the least error ``sum importance |W - scale code|^p``, on the grid.

    p is 2 where the importance is known, and 4 where it is not: large weights are cut off less. Those that belong to
    outlier channels matter more than their number, and without data nobody knows which they are (the README has both).
    First the clip of each group, whatever the grid; then the row's factor, set by its largest scale; then of the grid's
    numbers around each group's choice the best.
    """
    _check(weight, group)
    groups = weight.to(torch.float32).unflatten(1, (-1, group))
    weights = None if importance is None else importance.to(groups.dtype).reshape(-1, group)
    amax = groups.abs().amax(dim=2)
    fits = amax / CODE_MAX
    best, least = fits, torch.full_like(fits, torch.inf)
    for clip in FREE_CLIPS if weights is None else CLIPS:
        best, least = _better(groups, weights, fits * clip, best, least)
    factor = row_factor(best.amax(dim=1, keepdim=True))
    base = _codes_of(best, factor)
    top = best.argmax(dim=1, keepdim=True)
    chosen, least = _on_grid(base, factor, top), torch.full_like(fits, torch.inf)
    for step in (0, -1, 1):
        chosen, least = _better(groups, weights, _on_grid(base + step, factor, top), chosen, least)
    return chosen


def _better(
    groups: Tensor, weights: Tensor | None, scale: Tensor, best: Tensor, least: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the scales found so far [N, G], with their errors, and others: the better ones. Of equals the earlier."""
    step = scale.clamp_min(torch.finfo(torch.float32).tiny)[:, :, None]
    error = (
        (groups / step)
        .round_()
        .clamp_(-CODE_MAX, CODE_MAX)
        .mul_(step)
        .sub_(groups)
        .abs_()
        .pow_(FREE_POWER if weights is None else POWER)
    )
    if weights is not None:
        error *= weights
    total = error.sum(dim=2)
    better = total < least
    return torch.where(better, scale, best), torch.where(better, total, least)


def on_grid(scale: Tensor) -> Tensor:
    """The nearest scales [N, G] that survive vLLM's conversion: float32, exact in bfloat16, the row's largest 448 c.

    Rows whose largest scale is below 448 FLOOR get c = FLOOR, as vLLM does, and their scales are the nearest bfloat16
    numbers: there the conversion moves them by 2^-9.
    """
    factor = row_factor(scale.amax(dim=1, keepdim=True))
    return _on_grid(_codes_of(scale, factor), factor, scale.argmax(dim=1, keepdim=True))


def row_factor(largest: Tensor) -> Tensor:
    """The factor c of each row, of four significant bits, from its largest scale [N, 1]."""
    mantissa, exponent = torch.frexp(largest.to(torch.float32) / 448)
    rounded = torch.ldexp((mantissa * 16).round() / 16, exponent)
    return torch.where(rounded > FLOOR, rounded, torch.full_like(rounded, FLOOR))


def _codes_of(scale: Tensor, factor: Tensor) -> Tensor:
    """Bytes of the E4M3 numbers next to ``scale / factor``, as int16: positive ones are ordered like their bytes."""
    numbers = (scale / factor).clamp(SMALLEST, 448.0).to(torch.float8_e4m3fn)
    return numbers.view(torch.uint8).to(torch.int16)


def _on_grid(codes: Tensor, factor: Tensor, top: Tensor) -> Tensor:
    """Scales for bytes of E4M3 numbers; the group `top` of each row gets 448, unless the row lies below the floor."""
    lowest = 8 * (math.frexp(SMALLEST)[1] - 1 + 7)  # byte of SMALLEST: a power of two, exponent biased by 7
    numbers = codes.clamp(lowest, 0x7E).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
    largest = torch.where(factor > FLOOR, torch.full_like(factor, 448.0), numbers.gather(1, top))
    return (numbers.scatter(1, top, largest) * factor).to(torch.bfloat16).to(torch.float32)


def _check(weight: Tensor, group: int) -> None:
    if weight.ndim != 2 or weight.shape[1] % group:
        raise ValueError(f"weight {tuple(weight.shape)}: needs [N, K] with K a multiple of the group of {group}")

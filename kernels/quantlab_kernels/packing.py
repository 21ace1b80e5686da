"""INT4 codes to 32-bit words and back, in the layout of compressed-tensors' `pack-quantized` checkpoints.

Element i of a row sits in bits ``4 * (i % 8)`` to ``4 * (i % 8) + 3`` of word ``i // 8``, as ``code + 8``: lowest
nibble first, rows of K, no interleave. A row whose length is not a multiple of 8 is padded with code 0 (nibble 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

_PER_WORD = 8


def pack_int4(codes: Tensor) -> Tensor:
    """codes [N, K] int8 in -8..7 -> words [N, ceil(K / 8)] int32."""
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise ValueError(f"pack_int4: got {codes.dtype} {tuple(codes.shape)}, needs int8 with two dimensions")
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError(f"pack_int4: codes reach from {int(codes.min())} to {int(codes.max())}, needs -8 to 7")
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % _PER_WORD)).contiguous()
    nibbles = padded.view(torch.uint8).add(8).unflatten(1, (-1, 4, 2))  # modulo 256: -8 becomes 0
    return (nibbles[..., 1] << 4).bitwise_or_(nibbles[..., 0]).view(torch.int32).squeeze(2)


def unpack_int4(words: Tensor, columns: int) -> Tensor:
    """words [N, ceil(columns / 8)] int32 -> codes [N, columns] int8 in -8..7. Inverse of `pack_int4`."""
    if words.dtype != torch.int32 or words.ndim != 2 or words.shape[1] != -(-columns // _PER_WORD):
        needed = -(-columns // _PER_WORD)
        raise ValueError(f"unpack_int4: got {words.dtype} {tuple(words.shape)}, needs int32 [N, {needed}]")
    pairs = words.contiguous().unsqueeze(2).view(torch.uint8)
    nibbles = torch.stack((pairs & 0xF, pairs >> 4), dim=3).flatten(1)
    return nibbles[:, :columns].sub(8).view(torch.int8)

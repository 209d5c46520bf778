"""Counter-based random projections: the same on CPU and GPU, for any number of ranks and any order of parameters.

Element (column i, row k) of the projection of parameter ``name`` in interval ``refresh`` is a pure function of
(seed, name, refresh, i, k): one Philox4x32-10 call per column and 128 rows. A rank that holds only some columns makes
only those, and nothing is stored in checkpoints. Philox: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3",
SC 2011; known answers from Random123.

This module knows nothing of matrices, gradients or ranks: it maps integers to random numbers.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_BITS_PER_CALL = 128

Word = Tensor | int
"""A 32-bit unsigned number, or an int64 tensor of such."""


def stream_key(seed: int, name: str, purpose: str) -> tuple[int, int]:
    """The 64-bit Philox key, as two 32-bit words, of one use ("projection", "rounding") of one parameter name.

    A keyed hash and not the position in a list: adding or reordering parameters leaves all other streams alone.
    """
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _multiply(a: int, b: Word) -> tuple[Word, Word]:
    """(high, low) 32-bit words of the product of two 32-bit words, with no intermediate above 2**63."""
    upper, lower = (a >> 16) * b, (a & 0xFFFF) * b
    low = (((upper & 0xFFFF) << 16) + lower) & _MASK
    high = (upper + (lower >> 16)) >> 16
    return high, low


def philox4x32(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10: four 32-bit random words per counter. Tensors are int64 and broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def num_words(rank: int) -> int:
    """int32 words that hold the ``rank`` sign bits of one column."""
    return (rank + 31) // 32


def sign_words(key: tuple[Word, Word], refresh: Word, columns: Tensor, rank: int) -> Tensor:
    """Packed signs of a Rademacher projection, int32 [columns, ceil(r / 32)].

    ``columns`` holds global column numbers (int64); ``key`` and ``refresh`` may be int64 tensors of the same length, so
    that the columns of many parameters come out of one call. Bit k % 32 of word k // 32 is the sign of row k.
    """
    words: list[Tensor] = []
    for block in range((rank + _BITS_PER_CALL - 1) // _BITS_PER_CALL):
        words += [torch.as_tensor(word) for word in philox4x32((columns, block, refresh, 0), key)]
    packed = torch.stack(words[: num_words(rank)], dim=1)
    return torch.where(packed > 0x7FFFFFFF, packed - (1 << 32), packed).to(torch.int32)


def unpack_signs(words: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dense [columns, r] tensor of +1 and -1 (exact in every dtype) from packed ``words``."""
    shifts = torch.arange(32, device=words.device, dtype=torch.int32)
    bits = (words[:, :, None] >> shifts) & 1
    return (1 - 2 * bits.flatten(1)[:, :rank]).to(dtype)


def gaussian(key: tuple[int, int], refresh: int, columns: Tensor, rank: int) -> Tensor:
    """Dense fp32 [columns, r] of standard normal numbers, by Box-Muller in fp64.

    fp64 so that the last bits of log and cos, which differ between CPU and GPU, are rounded away.
    """
    blocks = torch.arange((rank + 3) // 4, device=columns.device)
    words = philox4x32((columns[:, None], blocks[None, :], refresh, 1), key)
    u0, u1, u2, u3 = ((torch.as_tensor(word).double() + 0.5) / 2.0**32 for word in words)
    parts = []
    for radius_uniform, angle_uniform in ((u0, u1), (u2, u3)):
        radius = torch.sqrt(-2.0 * torch.log(radius_uniform))
        parts += [radius * torch.cos(2.0 * math.pi * angle_uniform), radius * torch.sin(2.0 * math.pi * angle_uniform)]
    return torch.stack(parts, dim=2).flatten(1)[:, :rank].float()

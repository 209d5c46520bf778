"""fp32 values that are not finite, by their bits."""

from __future__ import annotations

import numpy as np
import torch

# sign and payload of NaNs, from the smallest payload to the largest
NOT_FINITE = [
    sign | payload for sign in (0, 1 << 31) for payload in (0x7F800001, 0x7FC00000, 0x7FFFFF7F, 0x7FFFFF80, 0x7FFFFFFF)
]


def from_bits(bits):
    """fp32 numbers of these 32-bit patterns."""
    return torch.from_numpy(np.array(bits, dtype=np.uint32).view(np.float32))

"""Are this GPU's matrix products right? Those of the model's own shapes against sums that use no matrix product.

Where CUDA MPS lets a process use a part of a GPU's multiprocessors (CUDA_MPS_ACTIVE_THREAD_PERCENTAGE), cuBLAS 13 was
seen to leave tiles of results unwritten, without an error, on H100s and H200s (docs/decisions/sharing-gpus.md).
Training on such products would write garbage into served weights. So the trainer checks before its first step.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from apollo_tp.errors import DeviceError
from apollo_tp.gpu_sharing.mps import MPS_SHARE

MAX_BYTES = 256 * 2**20
"""Limit of the larger one of a product's inputs and outputs; wide layers are tried with fewer tokens for it."""
MAX_TOKENS = 8192
"""Longer products are not tried."""
SLACK = 8
"""A row's sum may be off by this many roundings of the row's norm: n roundings with random signs stay below two."""
BLOCK_BYTES = 64 * 2**20
"""Limit of what the comparison converts of a matrix to fp32 at once."""
MAX_LISTED = 3
"""Wrong products that the refusal lists."""


def check_products(tensors: Iterable[Tensor], max_tokens: int, rank: int) -> None:
    """Try the products of layers with weights like the matrices among ``tensors``: shapes and dtypes, not values.

    ``tensors`` (any shapes, this rank's) are on one device; those of more than two dimensions (experts) count as stacked
    matrices [..., R, C]. Local, no collective. Takes twice the memory of the largest weight, and inputs and outputs of at
    most MAX_BYTES each. Raises DeviceError with the first products that are wrong.
    """
    matrices = [tensor for tensor in tensors if tensor.ndim >= 2]
    kinds = {(matrix.shape[-2], matrix.shape[-1], matrix.dtype) for matrix in matrices if matrix.numel()}
    lengths = sampled_lengths(max_tokens)
    found = (line for kind in sorted(kinds, key=str) for line in wrong_products(*kind, lengths, matrices[0].device))
    if wrong := list(itertools.islice(found, MAX_LISTED)):
        expected = "expected right ones"
        cure = "do not train on this GPU: it is defective, or its driver or cuBLAS is"
        if (percentage := os.environ.get(MPS_SHARE, "100")) != "100":
            expected += f" with the multiprocessors that MPS grants for {MPS_SHARE}={percentage}"
            cure = "unset that and use qos.sm_percent, which takes multiprocessors in another way"
        raise DeviceError(f"rank {rank}: got wrong matrix products ({'; '.join(wrong)}), {expected}; {cure}")


def sampled_lengths(max_tokens: int) -> list[int]:
    """Numbers of tokens to try: sixteenths of the longest micro-batch, and odd ones between, since cuBLAS chooses kernels by
    them. A sample of the lengths that training may have, not all of them."""
    longest = min(max_tokens, MAX_TOKENS)
    return sorted({n for i in range(1, 17) for n in (longest * i // 16, longest * i // 16 - 7 * i) if n > 0})


def wrong_products(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    lengths: Iterable[int],
    device: torch.device,
    max_bytes: int = MAX_BYTES,
) -> Iterator[str]:
    """Try a linear layer [rows, columns] with these numbers of tokens; one line for each wrong product.

    The products are the output, the gradient of the input, and that of the weight, over random numbers in ``dtype``.
    ``max_bytes``: see MAX_BYTES. Local.
    """
    most_tokens = max(1, max_bytes // (dtype.itemsize * max(rows, columns)))
    lengths = sorted({min(tokens, most_tokens) for tokens in lengths})
    random = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(generator=random)

    weight, inputs, grads = draw(rows, columns), draw(lengths[-1], columns), draw(lengths[-1], rows)
    for tokens in lengths:
        x, grad = inputs[:tokens], grads[:tokens]
        for what, a, b in (
            ("output", x, weight.T),
            ("gradient of the input", grad, weight),
            ("gradient of the weight", grad.T, x),
        ):
            for kind, bad in _wrong_rows(a, b):
                if bad:
                    yield f"{what}{kind} of a layer [{rows}, {columns}] at {tokens} tokens: {bad} of {len(a)} rows"


def _wrong_rows(a: Tensor, b: Tensor) -> Iterator[tuple[str, int]]:
    """Numbers of wrong rows of ``a @ b``, and of it added to ones, which may be another kernel; ``a`` [m, k], ``b`` [k, n].

    The result's memory is never that of an earlier, right product: unwritten parts would still have its values.
    """
    result = torch.full((len(a), b.shape[1]), torch.nan, dtype=a.dtype, device=a.device)
    yield "", count_wrong_rows(a, b, torch.mm(a, b, out=result))
    yield " in a sum", count_wrong_rows(a, b, result.fill_(1.0).addmm_(a, b), addend=1.0)


def count_wrong_rows(a: Tensor, b: Tensor, product: Tensor, addend: float = 0.0) -> int:
    """How many rows of ``product`` [m, n] are not those of ``a @ b + addend``, by sums with random signs (Freivalds 1977).

    ``a`` [m, k] and ``b`` [k, n] have the product's dtype. Local, no matrix product.
    """
    random = torch.Generator(b.device).manual_seed(0)  # the same verdict every time
    signs = torch.randint(0, 2, (b.shape[1],), generator=random, device=b.device).float().mul_(2).sub_(1)
    sums, norms = _sums_and_norms(product, signs)
    expected, _ = _sums_and_norms(a, _sums_and_norms(b, signs)[0])
    rounding = max(torch.finfo(product.dtype).eps / 2, 2.0**-16)
    right = (sums - expected - addend * signs.sum()).abs() <= SLACK * rounding * norms  # NaN is not
    return int((~right).sum())


def _sums_and_norms(matrix: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix @ vector`` and the norms of the rows of ``matrix`` [m, n]: fp32 [m] each, ``vector`` fp32 [n].

    Without a matrix product, a block of rows at a time. Local.
    """
    sums, norms = (torch.empty(len(matrix), device=matrix.device) for _ in range(2))
    step = max(1, BLOCK_BYTES // (4 * matrix.shape[1]))
    for start in range(0, len(matrix), step):
        rows = matrix[start : start + step].float()
        norms[start : start + step] = rows.norm(dim=1)
        sums[start : start + step] = (rows * vector).sum(dim=1)
    return sums, norms

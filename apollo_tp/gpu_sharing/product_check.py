"""Does this GPU multiply right? Products of the model's own shapes against sums that use no matrix product.

Where CUDA MPS lets a process use a part of a GPU's multiprocessors (CUDA_MPS_ACTIVE_THREAD_PERCENTAGE), cuBLAS 13 was seen
to leave whole tiles of results unwritten, without an error, on H100s and H200s (docs/decisions/sharing-gpus.md).
Training on such products would write garbage into served weights. So the trainer asks before its first step.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from apollo_tp.errors import DeviceError
from apollo_tp.gpu_sharing.mps import MPS_SHARE

MOST_BYTES = 256 * 2**20
"""Of the larger one of a product's inputs and outputs; the longest products of wide layers are cut to it."""
MAX_TOKENS = 8192
"""Longer products are not tried."""
SLACK = 8
"""A row's sum may be off by this many roundings of the row's norm: n roundings with random signs stay below two."""
BLOCK_BYTES = 64 * 2**20
"""What the comparison holds of a matrix in fp32 at once."""
SHOWN = 3
"""Wrong products that the refusal lists."""


def check_products(tensors: Iterable[Tensor], max_tokens: int, rank: int) -> None:
    """Try the products of layers with weights like the matrices among ``tensors``, all on one device; stacked matrices
    (experts) as if each was a layer.

    Local, no collective. Takes twice the memory of the largest weight, and inputs and outputs of at most MOST_BYTES each.
    Raises DeviceError with the first that are wrong.
    """
    matrices = [tensor for tensor in tensors if tensor.ndim >= 2]
    kinds = {(matrix.shape[-2], matrix.shape[-1], matrix.dtype) for matrix in matrices if matrix.numel()}
    lengths = sampled_lengths(max_tokens)
    found = (line for kind in sorted(kinds, key=str) for line in wrong_products(*kind, lengths, matrices[0].device))
    if wrong := list(itertools.islice(found, SHOWN)):
        expected = "expected right ones"
        cure = "do not train on this GPU: it is defective, or its driver or cuBLAS is"
        if (percentage := os.environ.get(MPS_SHARE, "100")) != "100":
            expected += f" with the multiprocessors that MPS grants for {MPS_SHARE}={percentage}"
            cure = "unset that and use qos.sm_percent, which takes multiprocessors in another way"
        raise DeviceError(f"rank {rank}: got wrong matrix products ({'; '.join(wrong)}), {expected}; {cure}")


def sampled_lengths(max_tokens: int) -> list[int]:
    """Numbers of tokens to try: sixteenths of the longest micro-batch, and odd ones between, since kernels are chosen by
    them. A sample of what traffic may bring, not all of it."""
    longest = min(max_tokens, MAX_TOKENS)
    return sorted({n for i in range(1, 17) for n in (longest * i // 16, longest * i // 16 - 7 * i) if n > 0})


def wrong_products(
    rows: int, columns: int, dtype: torch.dtype, lengths: Iterable[int], device: torch.device
) -> Iterator[str]:
    """What came out wrong of a linear layer [rows, columns] with that many tokens, one line each: its output, the gradient
    of its input, and that of its weight."""
    most = max(1, MOST_BYTES // (dtype.itemsize * max(rows, columns)))
    lengths = sorted({min(tokens, most) for tokens in lengths})
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
    """Wrong rows of the product, and of it added to ones: two kernels perhaps. The result's memory is never that of an
    earlier, right product, which unwritten parts would hold."""
    result = torch.full((len(a), b.shape[1]), torch.nan, dtype=a.dtype, device=a.device)
    yield "", count_wrong_rows(a, b, torch.mm(a, b, out=result))
    yield " in a sum", count_wrong_rows(a, b, result.fill_(1.0).addmm_(a, b), addend=1.0)


def count_wrong_rows(a: Tensor, b: Tensor, product: Tensor, addend: float = 0.0) -> int:
    """Rows of ``product`` that are not those of ``a @ b + addend``, told from sums with random signs (Freivalds 1977)."""
    random = torch.Generator(b.device).manual_seed(0)  # the same verdict every time
    signs = torch.randint(0, 2, (b.shape[1],), generator=random, device=b.device).float().mul_(2).sub_(1)
    sums, norms = _sums_and_norms(product, signs)
    expected, _ = _sums_and_norms(a, _sums_and_norms(b, signs)[0])
    rounding = max(torch.finfo(product.dtype).eps / 2, 2.0**-16)
    right = (sums - expected - addend * signs.sum()).abs() <= SLACK * rounding * norms  # NaN is not
    return int((~right).sum())


def _sums_and_norms(matrix: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix @ vector`` and the rows' norms, fp32, without a matrix product, a block of rows at a time."""
    sums, norms = (torch.empty(len(matrix), device=matrix.device) for _ in range(2))
    step = max(1, BLOCK_BYTES // (4 * matrix.shape[1]))
    for start in range(0, len(matrix), step):
        rows = matrix[start : start + step].float()
        norms[start : start + step] = rows.norm(dim=1)
        sums[start : start + step] = (rows * vector).sum(dim=1)
    return sums, norms

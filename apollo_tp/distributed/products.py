"""Products that are summed over ranks: ``TPGroup.sum_product`` writes them where they are summed, at once or in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Product(Protocol):
    """A local matrix [m, n] that is computed where it is needed, from operands with ``contracted`` columns."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def contracted(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def write(self, out: Tensor, first: int = 0) -> Tensor:
        """Write the rows from ``first`` on to ``out`` [rows, n], as many as it has, and return it. Local."""


@dataclass(frozen=True)
class SumOfProducts:
    """The sum of ``a @ b`` over ``pairs``: a [m, k] and b [k, n] of one dtype; k may differ between pairs."""

    pairs: Sequence[tuple[Tensor, Tensor]]

    @property
    def shape(self) -> tuple[int, int]:
        a, b = self.pairs[0]
        return a.shape[0], b.shape[1]

    @property
    def contracted(self) -> int:
        return self.pairs[0][0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.pairs[0][0].dtype

    @property
    def device(self) -> torch.device:
        return self.pairs[0][0].device

    def write(self, out: Tensor, first: int = 0) -> Tensor:
        for position, (a, b) in enumerate(self.pairs):
            rows = a[first : first + out.shape[0]]
            if position == 0:
                torch.mm(rows, b, out=out)
            else:
                out.addmm_(rows, b)
        return out


@dataclass(frozen=True)
class ScaledProduct:
    """``a @ b.T`` in bf16, of FP8 ``a`` [m, k] and ``b`` [n, k], contiguous, times the inverses of their scales.

    Inverse scales fp32: 0-d or [m], and 0-d or [n]. ``fast``: partial sums are kept by the tensor cores alone, which on
    Hopper have fewer bits than fp32, as torchao has it for forward passes.
    """

    a: Tensor
    b: Tensor
    a_inverse: Tensor
    b_inverse: Tensor
    fast: bool

    dtype = torch.bfloat16

    @property
    def shape(self) -> tuple[int, int]:
        return self.a.shape[0], self.b.shape[0]

    @property
    def contracted(self) -> int:
        return self.a.shape[1]

    @property
    def device(self) -> torch.device:
        return self.a.device

    def write(self, out: Tensor, first: int = 0) -> Tensor:
        a, (m, n) = self.a[first : first + out.shape[0]], self.shape
        a_inverse, b_inverse = self.a_inverse, self.b_inverse
        if a_inverse.ndim or b_inverse.ndim:  # then torch takes a column and a row of them
            a_inverse = a_inverse.expand(m)[first : first + out.shape[0], None].contiguous()
            b_inverse = b_inverse.expand(n)[None, :].contiguous()
        return torch._scaled_mm(  # type: ignore[no-any-return]
            a, self.b.t(), a_inverse, b_inverse, out_dtype=self.dtype, use_fast_accum=self.fast, out=out
        )

    def new(self) -> Tensor:
        """The product in new memory."""
        return self.write(torch.empty(self.shape, dtype=self.dtype, device=self.device))

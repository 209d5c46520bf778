"""Linear layers that vLLM serves as one fused tensor run as one matrix product here too.

Query, key and value projections (gate and up projections, ...) take the same input, and their rows follow each other in the
served tensor. One product over all rows is faster than three over few rows each, forward and backward, and has one gradient.
The modules of the architecture stay where they are: each returns its rows of the common product.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.model.fp8_linear import column_parallel_fp8_linear
from apollo_tp.model.tp_linear import ALONE, MIN_PART_ROWS, column_parallel_linear


class JoinedLinear(nn.Module):
    """``x @ weight.T + bias`` over the rows of all parts; ``weight`` [sum of ``rows``, C] and ``bias`` are local.

    Each part asks for its rows with the same ``x``: the first one computes, the last one releases what was computed. A
    part that asks out of turn, or with another ``x``, gets a product of its own, which is slower but correct. With the
    input of a parallel region this module sums that input's gradient itself, while the weight's is computed (see
    ``enter``).
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, rows: Sequence[int], min_part_rows: int = MIN_PART_ROWS
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.rows = tuple(rows)
        self.min_part_rows = min_part_rows
        self.is_fp8 = False
        self.last_input: Tensor | None = None
        self.outputs: tuple[Tensor, ...] = ()
        self.entry: tuple[Tensor, Tensor, TPGroup] | None = None

    def enter(self, outside: Tensor, inside: Tensor, tp: TPGroup) -> None:
        """Announce the input of a parallel region, before it and after its entrance, where its gradient would be summed.

        Both [..., C] and the same on all ranks. With ``inside`` as input, this module computes from ``outside`` and sums the
        gradient over ``tp`` itself. The entrance sums what comes from other uses of ``inside`` in the region.
        """
        self.entry = outside, inside, tp

    def _products(self, x: Tensor) -> tuple[Tensor, ...]:
        tp = ALONE
        if self.entry is not None and self.entry[1] is x:
            x, _, tp = self.entry
        if self.is_fp8:
            return column_parallel_fp8_linear(x, self.weight, self.bias, self.rows, tp)
        return column_parallel_linear(x, self.weight, self.bias, self.rows, tp, self.min_part_rows)

    def part(self, position: int, x: Tensor) -> Tensor:
        """The rows of part ``position`` of the product with ``x`` [..., C]: local [..., rows[position]]."""
        if self.last_input is not x:
            self.outputs = self._products(x)  # first: it may raise
            self.last_input = x
        output = self.outputs[position]
        if position == len(self.rows) - 1:
            self.release()
        return output

    def release(self) -> None:
        """Forget inputs and outputs, also of a pass that raised between two parts: they keep all that autograd saved."""
        self.last_input, self.outputs, self.entry = None, (), None


class JoinedPart(nn.Module):
    """Replaces the linear layer whose rows are part number ``position`` of ``joined``."""

    def __init__(self, joined: JoinedLinear, position: int) -> None:
        super().__init__()
        self.position = position
        if position == 0:
            self.joined = joined
        else:  # the first part has the parameters
            object.__setattr__(self, "joined", joined)

    def forward(self, x: Tensor) -> Tensor:
        return self.joined.part(self.position, x)


def stack_rows(tensors: Sequence[Tensor]) -> Tensor | None:
    """One view [sum of R, ...] over tensors [R, ...] whose rows follow each other in memory, in this order.

    None if they do not, or if dtypes or other dimensions differ. Local, no copy.
    """
    first = tensors[0]
    end = first.storage_offset()
    for tensor in tensors:
        same = tensor.dtype == first.dtype and tensor.shape[1:] == first.shape[1:] and tensor.is_contiguous()
        here = tensor.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and here and tensor.storage_offset() == end):
            return None
        end += tensor.numel()
    return first.as_strided(
        (sum(t.shape[0] for t in tensors), *first.shape[1:]), first.stride(), first.storage_offset()
    )

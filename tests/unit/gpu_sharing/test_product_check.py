"""Wrong matrix products are found, whichever part of them is wrong, and right ones are not accused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apollo_tp.errors import DeviceError
from apollo_tp.gpu_sharing.product_check import SLACK, check_products, count_wrong_rows, sampled_lengths, wrong_products

CPU = torch.device("cpu")
LEAVES = [torch.empty(96, 64), torch.empty(64), torch.empty(4, 32, 64), torch.empty(0, 64)]
"""A matrix, a vector, stacked experts, and a shard without rows; only shapes and types count."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_right_products_pass(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding, at any length of the sums, stays at a quarter of what is called wrong."""
    monkeypatch.setattr("apollo_tp.gpu_sharing.product_check.SLACK", SLACK / 4)
    draw = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((300, 64, 512), (64, 20_000, 300), (7, 1, 5), (1, 300, 1)):
        a, b = torch.randn(rows, inner, generator=draw).to(dtype), torch.randn(inner, columns, generator=draw).to(dtype)
        assert count_wrong_rows(a, b, a @ b) == 0
        assert count_wrong_rows(a, b, torch.ones(rows, columns, dtype=dtype).addmm_(a, b), addend=1.0) == 0
    check_products([leaf.to(dtype) for leaf in LEAVES], 100, 0)


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
@pytest.mark.parametrize("columns", [16, 256])
def test_a_tile_that_was_not_written_is_found(columns: int, value: float) -> None:
    """With whatever was there, all its rows count and no others; with zeros most, by the luck of the signs."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=draw).bfloat16() for size in ((256, 128), (128, 1024)))
    product = a @ b
    product[64:128, 1000 - columns : 1000] = value
    found = count_wrong_rows(a, b, product)
    assert 32 < found <= 64 if value == 0.0 else found == 64


def test_what_is_wrong_is_named_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By layer, product and length; the cure depends on whether multiprocessors are limited."""
    multiply = torch.mm

    def leaves_a_row(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        """Of the gradient of the input of one layer; the row keeps what was in its memory."""
        rows = len(a) - (a.shape == (100, 96))
        multiply(a[:rows], b, out=out[:rows])
        return out

    monkeypatch.setattr(torch, "mm", leaves_a_row)
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "75")
    with pytest.raises(DeviceError) as refused:
        check_products(LEAVES, 100, 3)
    assert str(refused.value) == (
        "rank 3: got wrong matrix products (gradient of the input of a layer [96, 64] at 100 tokens: 1 of 100 rows), "
        "expected right ones with the multiprocessors that MPS grants for CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=75; unset that "
        "and use qos.sm_percent, which takes multiprocessors in another way"
    )
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100")  # as qos.sm_percent has it
    with pytest.raises(DeviceError, match=r"expected right ones; do not train on this GPU"):
        check_products(LEAVES, 100, 0)


def test_a_sum_that_a_product_is_not_added_to_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unwritten tile keeps the sum so far there: finite, and of the usual size."""
    add = Tensor.addmm_

    def leaves_a_tile(self: Tensor, a: Tensor, b: Tensor) -> Tensor:
        before = self[:32, :32].clone()
        add(self, a, b)
        self[:32, :32] = before
        return self

    monkeypatch.setattr(Tensor, "addmm_", leaves_a_tile)
    lines = list(wrong_products(96, 64, torch.bfloat16, [100], CPU))
    assert [line.partition(" of a layer")[0] for line in lines] == [
        "output in a sum", "gradient of the input in a sum", "gradient of the weight in a sum",
    ]  # fmt: skip


def test_lengths_are_spread_and_wide_layers_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampled_lengths(4096)[-1] == 4096
    assert {1024, 2048, 3072} <= set(sampled_lengths(4096)), "blocks of rows that sums over ranks are cut into"
    assert sum(n % 2 for n in sampled_lengths(4096)) >= 8
    assert sampled_lengths(1) == [1]
    assert max(sampled_lengths(1 << 20)) == 8192
    monkeypatch.setattr(
        "apollo_tp.gpu_sharing.product_check.count_wrong_rows",
        lambda a, b, product, addend=0.0: len(product) * (not addend),
    )
    lines = list(wrong_products(96, 64, torch.bfloat16, [5, 40, 70], CPU, max_bytes=96 * 2 * 10))
    assert [line.rpartition(" tokens")[0].rpartition(" ")[2] for line in lines] == ["5"] * 3 + ["10"] * 3

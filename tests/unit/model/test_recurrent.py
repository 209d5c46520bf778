"""Which recurrence gated delta nets run on."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from apollo_tp.model.recurrent import _backward_is_refused, _packed_recurrence


@pytest.mark.parametrize(
    ("capability", "triton", "tilelang", "expected"),
    [
        ((9, 0), "3.6.0", False, True),
        ((9, 0), "3.6.0", True, False),
        ((9, 0), "3.7.0", False, True),
        ((9, 0), "3.7.1", False, False),
        ((9, 0), "3.3.1+git5", False, False),
        ((8, 0), "3.6.0", False, False),
    ],
)
def test_the_kernel_is_left_alone_where_it_refuses_its_backward_pass(
    capability: tuple[int, int], triton: str, tilelang: bool, expected: bool
) -> None:
    assert _backward_is_refused(capability, triton, tilelang) is expected


def test_without_a_kernel_sequences_go_through_plain_torch_one_by_one() -> None:
    """transformers replaces its own function by flash-linear-attention's where that is installed, whatever the device."""
    seen = []

    def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        seen.append(value.shape[1])
        return value, None

    @functools.wraps(plain)
    def replaced(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the replacement must not be called")

    states = [torch.randn(1, 5, 2, 4) for _ in range(3)]
    gates = {name: torch.randn(1, 5, 2) for name in ("g", "beta")}
    boundaries = {"cu_seqlens": torch.tensor([0, 2, 5]), "sequence_lengths": (2, 3)}
    output, _ = _packed_recurrence(replaced)(*states, **gates, **boundaries)
    assert torch.equal(output, states[2])
    assert seen == [2, 3]

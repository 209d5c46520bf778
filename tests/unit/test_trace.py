"""What a loader does to what it has copied is seen, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from apollo_tp.vllm_plugin.trace import Trace, trace_loader


def _trace(after: Callable[[Tensor], object]) -> Trace:
    """Of a loader that copies a weight of 4 x 4 into 6 rows, and then does ``after`` to the parameter."""
    layer = nn.Linear(4, 6, bias=False)
    before = layer.weight.detach().clone()

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, weight in weights:
            layer.weight.data[:4].copy_(weight)
            after(layer.weight.data)

    (trace,) = trace_loader(layer, [("w", (4, 4), torch.float32)], load)
    assert torch.equal(layer.weight, before), "a trace writes nothing"
    return trace


@pytest.mark.parametrize("fill", [lambda w: w[4:].zero_(), lambda w: w[4:].fill_(0), lambda w: None])
def test_padding_may_be_filled(fill: Callable[[Tensor], object]) -> None:
    trace = _trace(fill)
    assert (trace.refusal, len(trace.copies)) == ("", 1)


@pytest.mark.parametrize("change", [lambda w: w.copy_(-w.exp()), lambda w: w.add_(1), lambda w: w[:4].mul_(2)])
def test_a_weight_that_is_changed_behind_its_copy_is_refused(change: Callable[[Tensor], object]) -> None:
    """What is served is not what the checkpoint holds, though it was copied."""
    assert "to the parameter that it was copied to" in _trace(change).refusal

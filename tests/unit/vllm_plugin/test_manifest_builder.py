"""What is recorded of copies that vLLM's loader made, and of copies that went elsewhere than into a parameter."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from apollo_tp.shards.boxes import Box
from apollo_tp.shards.manifest import Refusal, ServedTensor
from apollo_tp.vllm_plugin import memory
from apollo_tp.vllm_plugin.manifest_builder import _served_tensors, _unique_parameters, segments_of
from apollo_tp.vllm_plugin.trace import Copy, Trace
from apollo_tp.vllm_plugin.views import held_tensors, is_view

ROWS, GAP = 4, 2


@pytest.fixture
def served() -> tuple[list[nn.Parameter], list[ServedTensor]]:
    """Two parameters of 4 x 8 in one block of memory: GAP rows that belong to nobody, first, GAP rows, second, GAP rows."""
    memory = torch.zeros(3 * GAP + 2 * ROWS, 8)
    parameters = [nn.Parameter(memory[start : start + ROWS]) for start in (GAP, 2 * GAP + ROWS)]
    tensors = [
        ServedTensor(name=name, allocation=0, offset_bytes=0, shape=[ROWS, 8], stride=[8, 1], dtype="float32")
        for name in ("first", "second")
    ]
    return parameters, tensors


def _trace(name: str, *addresses: int) -> Trace:
    copies = [Copy(Box((index, 0), (1, 8)), address, (0, 1)) for index, address in enumerate(addresses)]
    return Trace(name, copies, served=True)


def test_copies_become_segments_of_the_parameter_that_holds_their_address(
    served: tuple[list[nn.Parameter], list[ServedTensor]],
) -> None:
    """Also of its first and its last row, and whatever the order of the parameters is."""
    (first, second), (its, others) = served
    row = 8 * first.element_size()
    trace = _trace("w", second.data_ptr() + 3 * row, first.data_ptr(), first.data_ptr() + 3 * row)
    for parameters, tensors in (([first, second], [its, others]), ([second, first], [others, its])):
        segments, refusals = segments_of([trace], parameters, tensors)
        assert refusals == []
        assert [(s.served, s.view_offset, s.box_offset) for s in segments] == [
            ("second", 24, [0, 0]), ("first", 0, [1, 0]), ("first", 24, [2, 0])
        ]  # fmt: skip


@pytest.mark.parametrize("place", ["before all parameters", "in a gap", "after all parameters"])
@pytest.mark.parametrize("before", [0, 1], ids=["alone", "after a good copy"])
def test_a_copy_into_a_temporary_tensor_is_refused(
    served: tuple[list[nn.Parameter], list[ServedTensor]], place: str, before: int
) -> None:
    """Taken for a copy into the parameter below it in memory, other memory would be trained than what is served."""
    (first, second), tensors = served
    address = {
        "before all parameters": first.data_ptr() - 8,
        "in a gap": first.data_ptr() + first.nbytes,
        "after all parameters": second.data_ptr() + second.nbytes + 8,
    }[place]
    temporary = _trace("t", *[first.data_ptr()] * before, address)
    segments, refusals = segments_of([_trace("w", second.data_ptr()), temporary], [first, second], tensors)
    reason = "vLLM's loader copies it into a temporary tensor, not into a parameter"
    assert refusals == [Refusal(name="t", reason=reason)]
    assert [segment.checkpoint for segment in segments] == ["w"]


def test_an_empty_parameter_has_no_memory_to_share() -> None:
    """vLLM's models may have some (a bias that a rank has no rows of). The others are found in the shared memory."""
    model = nn.ParameterDict({"a": nn.Parameter(torch.ones(4)), "b": nn.Parameter(torch.ones(0, 3))})
    model["c"] = nn.Parameter(torch.full((2, 2), 7.0))
    parameters, names = _unique_parameters(model)
    assert names == [["a"], ["c"]]
    allocations = memory.share(parameters, device=torch.device("cpu"))
    served = _served_tensors(parameters, names, allocations)
    assert [(t.name, t.allocation, t.offset_bytes) for t in served] == [("a", 0, 0), ("c", 0, memory.ALIGNMENT_BYTES)]


def test_views_of_a_parameter_follow_it_into_shared_memory() -> None:
    """What vLLM makes of a loaded weight, registered or not: a write to the shared weight reaches it, and it is not served
    by itself."""
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.arange(24.0).view(6, 4))
    layer.attn = nn.Module()
    by_head = layer.weight.detach().T.view(4, 2, 3)
    layer.attn.absorbed = nn.Parameter(by_head[..., 1:].transpose(0, 1), requires_grad=False)
    layer.attn.impl = SimpleNamespace(plain=by_head[..., :1].permute(1, 2, 0), own=torch.ones(3))
    expected = [layer.attn.absorbed.clone(), layer.attn.impl.plain.clone()]
    parameters, names = _unique_parameters(layer)
    assert names == [["weight"]]
    held = [tensor for module in layer.modules() for _, tensor in held_tensors(module)]
    memory.share(parameters, held, device=torch.device("cpu"))
    views = [layer.attn.absorbed, layer.attn.impl.plain]
    assert all(is_view(view, layer.weight) for view in views)
    assert all(torch.equal(view, values) for view, values in zip(views, expected, strict=True))
    with torch.no_grad():
        layer.weight.neg_()
    assert all(torch.equal(view, -values) for view, values in zip(views, expected, strict=True))
    assert torch.equal(layer.attn.impl.own, torch.ones(3))

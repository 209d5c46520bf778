"""What a loader does to what it has copied is seen, or refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from apollo_tp.shards.boxes import Box
from apollo_tp.vllm_plugin.trace import Trace, trace_loader
from tests.support import forks
from tests.support.families import FAMILIES
from tests.support.processes import FORKING_SERVER


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


@pytest.mark.parametrize(
    ("copy", "reason"),
    [
        (lambda w, probe: w.copy_(probe[:1]), "broadcasts (1, 4) into (6, 4)"),
        (lambda w, probe: w[0].copy_(probe[:1].t()[0]), "broadcasts (1,) into (4,)"),
        (lambda w, probe: w.copy_(probe[0]), "broadcasts (4,) into (6, 4)"),
        (lambda w, probe: w[:4].copy_(probe.to(torch.float16)), "applies aten._to_copy"),
        (lambda w, probe: w[:4].copy_(probe.half().float()), "applies aten._to_copy"),
        (lambda w, probe: w[:4].copy_(probe.double()), "applies aten._to_copy"),
        (lambda w, probe: w[0].copy_(probe.view(-1)[2:6]), "across its rows"),
        (lambda w, probe: w[:2].copy_(probe.view(-1)[3:11].view(2, 4)), "across its rows"),
        (lambda w, probe: w[:4].copy_(probe.as_strided((4, 4), (4, 1), 1)), "applies aten.as_strided|across its rows"),
    ],
)  # fmt: skip
def test_a_copy_that_is_not_a_block_of_the_checkpoint_tensor_is_refused(
    copy: Callable[[Tensor, Tensor], object], reason: str
) -> None:
    """Broadcast, cast, or across the ends of rows. Recorded as a plain copy, it would train other values than are served."""
    layer = nn.Linear(4, 6, bias=False)

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, weight in weights:
            copy(layer.weight.data, weight)

    (trace,) = trace_loader(layer, [("w", (4, 4), torch.float32)], load)
    assert re.search("|".join(map(re.escape, reason.split("|"))), trace.refusal), trace.refusal
    assert not trace.copies


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda probe: probe.zero_(), ""),
        (lambda probe: probe[:2].zero_(), "applies aten.zero_"),
        (lambda probe: probe.mul_(2), "applies aten.mul_"),
        (lambda probe: probe.fill_(1), "applies aten.fill_"),
    ],
)
def test_a_tensor_that_is_set_to_zero_before_its_copy_is_not_on_this_rank(
    change: Callable[[Tensor], object], refusal: str
) -> None:
    """gpt-oss's biases after a sum over ranks, on all ranks but one. Recorded as a copy, they would be trained there."""
    layer = nn.Linear(4, 4, bias=False)

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, weight in weights:
            change(weight)
            layer.weight.data.copy_(weight)

    (trace,) = trace_loader(layer, [("w", (4, 4), torch.float32)], load)
    assert refusal in trace.refusal
    assert (trace.served, trace.copies, trace.refusal != "") == (not refusal, [], bool(refusal))


def test_copies_of_the_same_dtype_and_shape_are_followed() -> None:
    """Moved to a device, cloned, or cast to the dtype that it has: the values stay."""
    layer = nn.Linear(4, 6, bias=False)

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for _, weight in weights:
            layer.weight.data[1:3].copy_(weight.to("cpu").float().clone()[2:4])

    (trace,) = trace_loader(layer, [("w", (4, 4), torch.float32)], load)
    (copy,) = trace.copies
    assert (trace.refusal, copy.box) == ("", Box((2, 0), (2, 4)))
    assert copy.address == layer.weight.data_ptr() + 4 * layer.weight.element_size()


def test_a_parameter_that_a_loader_registers_anew_stays_what_it_was() -> None:
    """vLLM's Transformers backend does so with a head's bias: the server would go on with memory that nobody wrote."""
    layer = nn.Linear(4, 4)
    layer.register_buffer("scale", torch.ones(4))
    before = {name: (tensor, tensor.detach().clone()) for name, tensor in layer.state_dict(keep_vars=True).items()}

    def load(weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            layer.register_parameter("bias", nn.Parameter(torch.empty(4)))
            layer.scale = torch.zeros(4)
            layer.register_parameter("other", nn.Parameter(torch.empty(4)))
            layer.get_parameter(name).data.copy_(weight)

    bias, weight = trace_loader(layer, [("bias", (4,), torch.float32), ("weight", (4, 4), torch.float32)], load)
    after = layer.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    assert all(after[name] is tensor and torch.equal(tensor, values) for name, (tensor, values) in before.items())
    assert weight.copies[0].address == layer.weight.data_ptr()
    assert bias.copies[0].address != layer.bias.data_ptr(), "its copy went elsewhere, so that it is refused"


class _Loader:
    """Of four rows of one parameter, one tensor for each; ``calls`` counts, and ``order`` rearranges what was given."""

    def __init__(
        self, order: Callable[[list[tuple[str, Tensor]]], list[tuple[str, Tensor]]] = lambda given: given
    ) -> None:
        self.layer, self.order, self.calls = nn.Linear(4, 4, bias=False), order, 0

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.calls += 1
        for name, weight in self.order(list(weights)):
            if name == "strange":
                raise KeyError(name)
            if name != "passed over":
                self.layer.weight.data[int(name)].copy_(weight)

    def rows(self, *names: str) -> dict[str, list[int] | str]:
        """By tensor: the rows that it went to, or why it was refused."""
        traces = trace_loader(self.layer, [(name, (4,), torch.float32) for name in names], self)
        start = self.layer.weight.data_ptr()
        return {t.name: t.refusal or [(copy.address - start) // 16 for copy in t.copies] for t in traces}


def test_the_loader_is_called_once_for_all_tensors() -> None:
    """A call takes vLLM's loaders 2 ms whatever it is given: 38 s of each start with 19,000 tensors of experts."""
    for order in (lambda given: given, lambda given: given[::-1]):
        loader = _Loader(order)
        assert loader.rows("0", "3", "passed over", "1") == {"0": [0], "3": [3], "passed over": [], "1": [1]}
        assert loader.calls == 1


@pytest.mark.parametrize("place", range(4))
def test_an_error_is_that_of_its_tensor_alone(place: int) -> None:
    names = ["0", "1", "2"]
    names.insert(place, "strange")
    expected = {name: "KeyError: 'strange'" if name == "strange" else [int(name)] for name in names}
    assert _Loader().rows(*names) == expected


def test_all_tensors_at_once_give_what_each_alone_gives(tmp_path: Path) -> None:
    """Every family over vLLM's real loader; of one with a vision tower, transformers' names are refused."""
    done = forks.run(FORKING_SERVER, ["tests.support.trace_both_ways", str(tmp_path)], 240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == list(FAMILIES)
    for ranks in found.values():
        assert [differ for _, _, differ in ranks] == [[], []]
        assert all(tensors > 10 for tensors, _, _ in ranks)
    assert [bool(refused) for _, refused, _ in found["gemma3-vision"]] == [True, True]

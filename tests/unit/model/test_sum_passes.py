"""Independent sums over ranks in a traced layer keep one order, whatever the compiler does with the rest."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx

from apollo_tp.distributed.collectives import all_reduce
from apollo_tp.distributed.tp_group import TPGroup
from apollo_tp.model.sum_passes import OrderSums
from apollo_tp.model.tp_linear import column_backward, row_parallel

ALONE = TPGroup.single()


def _traced() -> fx.Graph:
    """Four sums over the same input, none of which needs another: as of a parallel residual, forward and backward."""
    graph, x, weight = fx.Graph(), torch.randn(3, 4), torch.randn(4, 4)
    inputs = [graph.placeholder(name) for name in ("x", "weight")]
    results = [
        graph.call_function(row_parallel, (*inputs, ALONE.number)),
        graph.call_function(all_reduce, (inputs[0], ALONE.number)),
        graph.call_function(column_backward, ([inputs[0]], *inputs, ALONE.number)),
    ]
    results[2].meta["val"] = column_backward([x], x, weight, ALONE.number)
    last = graph.call_function(all_reduce, (graph.call_function(torch.relu, (inputs[0],)), ALONE.number))
    graph.output((results[0], results[1], graph.call_function(operator.getitem, (results[2], 0)), last))
    return graph


def _orders(graph: fx.Graph) -> Iterator[list[object]]:
    """The sums in each order of the graph's nodes that its dependencies allow and that prefers late nodes or early ones."""
    for sign in (1, -1):
        rest, order = list(graph.nodes), []
        while rest:
            ready = [n for n in rest if not any(needed in rest for needed in n.all_input_nodes)]
            chosen = ready[0] if sign == 1 else ready[-1]
            rest.remove(chosen)
            order.append(chosen)
        yield [n.name for n in order if n.target in (all_reduce, row_parallel, column_backward)]


def test_there_is_one_order_of_sums() -> None:
    graph = _traced()
    first, other = _orders(graph)
    assert first != other, "without the pass, another order is allowed"
    OrderSums()(graph)
    graph.lint()
    first, other = _orders(graph)
    assert first == other


@pytest.mark.parametrize("ordered", [False, True])
def test_sums_are_what_they_were(ordered: bool) -> None:
    graph = _traced()
    if ordered:
        OrderSums()(graph)
    x, weight = torch.randn(3, 4), torch.randn(4, 4)
    got: tuple[Tensor, ...] = fx.GraphModule(torch.nn.Module(), graph)(x, weight)
    expected = (x @ weight.T, x, x @ weight, x.relu())
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)

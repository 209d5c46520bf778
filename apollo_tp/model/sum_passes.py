"""Passes over traced layers: a row-parallel product and the residual that is added to it become one operator, and sums over
ranks keep their order.

Where the sum over two ranks is a kernel that reads the other rank's memory, the residual is added there, which saves a pass
over memory.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from apollo_tp.distributed import collectives
from apollo_tp.model import fp8_linear, tp_linear

ADDING = {
    tp_linear.row_parallel: tp_linear.row_parallel_add,
    fp8_linear.row_parallel_fp8: fp8_linear.row_parallel_add_fp8,
}
"""Row-parallel products, and the operators that add a residual to them: before the last argument, the group."""


_VIEWS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


class JoinResiduals(CustomGraphPass):
    """Turn ``residual + row_parallel(x, weight)`` into ``row_parallel_add(x, weight, residual)``, with the same rounding.

    Products that have another use, and residuals of another shape or dtype, are not changed.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for add in graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
            if add.kwargs:  # alpha, a factor
                continue
            for product, residual in (add.args, add.args[::-1]):
                shaped, product = product, _viewed(product)
                if _has_one_use(product) and _match(shaped, residual):
                    with graph.inserting_before(add):
                        *operands, number = product.args
                        joined = graph.call_function(ADDING[product.target], (*operands, residual, number))
                    joined.meta.update(add.meta)
                    add.replace_all_uses_with(joined)
                    graph.erase_node(add)
                    if shaped is not product:
                        graph.erase_node(shaped)
                    graph.erase_node(product)
                    break

    def uuid(self) -> bytes:
        """The key of this pass in caches of compiled code: change it whenever the pass changes."""
        return b"apollo_tp.model.sum_passes.JoinResiduals 3"


def _viewed(node: Any) -> Any:
    """What ``node`` is the only view of, as of a product that was flattened to a matrix; else ``node``."""
    is_view = isinstance(node, fx.Node) and node.target in _VIEWS and len(node.users) == 1
    return node.args[0] if is_view else node


def _has_one_use(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target in ADDING and len(node.users) == 1


def _match(product: fx.Node, residual: object) -> bool:
    if not isinstance(residual, fx.Node):
        return False
    one, other = product.meta["val"], residual.meta["val"]
    return bool(one.dtype == other.dtype and one.shape == other.shape)


class OrderSums(CustomGraphPass):
    """Let each sum over ranks depend on the one before it, in the order in which they were traced.

    Two sums may be independent of each other (attention and MLP of a parallel residual; a joined product's input and what
    else uses it). The compiler could then order them by the shapes of a rank, which differ where a cut is uneven, and ranks
    would add up different tensors.
    """

    def __call__(self, graph: fx.Graph) -> None:
        before: fx.Node | None = None
        for node in list(graph.nodes):
            if node.target not in (collectives.all_reduce, *tp_linear.SUMS, *fp8_linear.SUMS):
                continue
            if before is not None:
                node.kwargs = {**node.kwargs, "after": before}
            before = node
            if node.target in (tp_linear.column_backward, fp8_linear.column_backward_fp8):  # which has two results
                with graph.inserting_after(node):
                    before = graph.call_function(operator.getitem, (node, 0))
                before.meta["val"] = node.meta["val"][0]

    def uuid(self) -> bytes:
        """See JoinResiduals.uuid."""
        return b"apollo_tp.model.sum_passes.OrderSums 2"

"""A pass over traced layers: a row-parallel product and the residual that is added to it become one operator.

Where the sum over two ranks is a kernel that reads the other rank's memory, the residual is added there, which saves a pass
over memory.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from apollo_tp.model import tp_linear


class JoinResiduals(CustomGraphPass):
    """Turn ``residual + row_parallel(x, weight)`` into ``row_parallel_add(x, weight, residual)``, with the same rounding.

    Products that have another use, and residuals of another shape or dtype, are not changed.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for add in graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
            if add.kwargs:  # alpha, a factor
                continue
            for product, residual in (add.args, add.args[::-1]):
                if _has_one_use(product) and _match(product, residual):
                    with graph.inserting_before(add):
                        x, weight, number = product.args
                        joined = graph.call_function(tp_linear.row_parallel_add, (x, weight, residual, number))
                    joined.meta.update(add.meta)
                    add.replace_all_uses_with(joined)
                    graph.erase_node(add)
                    graph.erase_node(product)
                    break

    def uuid(self) -> bytes:
        """The key of this pass in caches of compiled code: change it whenever the pass changes."""
        return b"apollo_tp.model.residuals 1"


def _has_one_use(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target == tp_linear.row_parallel and len(node.users) == 1


def _match(product: fx.Node, residual: object) -> bool:
    if not isinstance(residual, fx.Node):
        return False
    one, other = product.meta["val"], residual.meta["val"]
    return bool(one.dtype == other.dtype and one.shape == other.shape)

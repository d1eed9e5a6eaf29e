"""Gives attention masks the rows that ONNX Runtime wants.

It broadcasts a mask over batch and heads, but refuses one row for all queries, [.., 1, T], which
the standard allows and exporters write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.raising.dims import Dim, Shape
from optimizer.raising.shapes import Shapes

#: Input of Attention.
MASK = 3
#: A mask and the number of queries it is to be written out for.
_Key = tuple[ir.Value, Dim | ir.Value]


def widen_masks(model: ir.Model, allowed: Callable[[ir.Value], bool] = lambda _: True) -> int:
    """Write out the query dimension of masks, in place; each at most once for a number of queries.

    Args:
        model: Its main graph is rewritten.
        allowed: Is asked before each mask.

    Returns:
        How many masks were written.
    """
    wide: dict[_Key, ir.Value] = {}
    for node, mask, key in _narrow(model):
        if key not in wide:
            if not allowed(mask):
                continue
            wide[key] = _widen(model.graph, node, mask)
        node.replace_input_with(MASK, wide[key])
    return len(wide)


def _narrow(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value, _Key]]:
    """Attentions whose mask may have one row for all queries; equal keys can share a wide one."""
    shapes = Shapes()
    dims = [dim for value in model.graph.inputs for dim in value.shape or ()]
    names = frozenset(str(dim) for dim in dims if not isinstance(dim, int))
    for node in [n for n in model.graph if n.op_type == "Attention" and n.domain == ""]:
        mask = node.inputs[MASK] if len(node.inputs) > MASK else None
        query = node.inputs[0]
        if mask is None or query is None or _has_query_rows(shapes.of(mask), names):
            continue
        rows = shapes.of(query)
        yield node, mask, (mask, query if rows is None else rows[-2])


def _has_query_rows(mask: Shape | None, names: frozenset[str]) -> bool:
    """Whether the second last dimension of a mask is certainly the number of queries.

    It is that or 1 in any valid model; so it is not 1 where it is written in terms of dimensions
    of the model's inputs.
    """
    if mask is None or len(mask) < 2:
        return False
    rows = mask[-2]
    if isinstance(rows, int):
        return rows > 1
    return all(name in names for product, _ in rows for name in product)


def _widen(graph: ir.Graph, anchor: ir.Node, mask: ir.Value) -> ir.Value:
    """``mask`` with a row for each query of the Attention ``anchor``."""
    # The sequence length is dimension 1 of a 3-D and dimension 2 of a 4-D query: always -2.
    rows = graphs.insert(
        graph, anchor, "Shape", anchor.inputs[:1], {"start": -2, "end": -1},
        name=f"{mask.name}_rows", dtype=ir.DataType.INT64, shape=(1,),
    )  # fmt: skip
    one = graphs.add_initializer(graph, "mask_one", np.array([1], np.int64))
    shape = graphs.insert(
        graph, anchor, "Concat", (rows, one), {"axis": 0}, name=f"{mask.name}_shape",
        dtype=ir.DataType.INT64, shape=(2,),
    )  # fmt: skip
    # Expand broadcasts both ways, so (S, 1) leaves every other dimension as it is.
    return graphs.insert(
        graph, anchor, "Expand", (mask, shape), name=f"{mask.name}_wide", dtype=mask.dtype
    )


def runnable(model: ir.Model) -> ir.Model:
    """A copy whose masks ONNX Runtime takes; the same model where it takes them already."""
    if not any(True for _ in _narrow(model)):
        return model
    copy = model.clone()
    widen_masks(copy)
    return copy

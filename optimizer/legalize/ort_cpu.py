"""The spelling that ONNX Runtime's CPU kernels run fastest.

Int8 products are in ``int8``, the KV cache in ``kv_in_place``; here is what remains of the float
graph. Attention, RMSNormalization, RotaryEmbedding and Gelu stay the standard operators in their
3-D forms: measured, nothing in ``com.microsoft`` is faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.legalize import int8
from optimizer.pass_base import Skip
from optimizer.raising.dims import Shape
from optimizer.raising.shapes import Shapes

_MASK = 3


@dataclass(frozen=True)
class Lowered:
    """Rewrites by kind, and sites left alone."""

    counts: dict[str, int]
    skipped: tuple[Skip, ...]


def lower(model: ir.Model) -> Lowered:
    """Rewrite ``model`` in place."""
    masks = widen_masks(model)  # first: it asks for shapes, which standard operators answer
    products, skipped = int8.lower(model)
    residuals = spell_residuals(model)
    counts = {"attention mask": masks, "int8 product": products, "residual add": residuals}
    return Lowered(counts, skipped)


def spell_residuals(model: ir.Model) -> int:
    """Write the Add before a LayerNormalization as a Sum of two.

    ONNX Runtime fuses Add and LayerNormalization into ``SkipLayerNormalization``, whose CPU kernel
    takes several times as long as the two alone; it does not look at Sum, which computes the same.
    """
    count = 0
    for node in model.graph:
        if node.op_type != "LayerNormalization" or node.domain != "" or node.inputs[0] is None:
            continue
        add = node.inputs[0].producer()
        if add is None or add.op_type != "Add" or add.domain != "":
            continue
        if any(graphs.constant(value) is not None for value in add.inputs):
            continue
        add.op_type = "Sum"
        count += 1
    return count


def widen_masks(model: ir.Model) -> int:
    """Write out the query dimension of attention masks.

    ONNX Runtime broadcasts a mask over batch and heads, but refuses one query row for all.
    """
    count = 0
    shapes = Shapes()
    dims = [dim for value in model.graph.inputs for dim in value.shape or ()]
    names = frozenset(str(dim) for dim in dims if not isinstance(dim, int))
    wide: dict[ir.Value, ir.Value] = {}
    for node in [n for n in model.graph if n.op_type == "Attention" and n.domain == ""]:
        mask = node.inputs[_MASK] if len(node.inputs) > _MASK else None
        query = node.inputs[0]
        if mask is None or query is None or _has_query_rows(shapes.of(mask), names):
            continue
        if mask not in wide:
            wide[mask] = _widen(model.graph, node, mask, query)
            count += 1
        node.replace_input_with(_MASK, wide[mask])
    return count


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


def _widen(graph: ir.Graph, anchor: ir.Node, mask: ir.Value, query: ir.Value) -> ir.Value:
    # The sequence length is dimension 1 of a 3-D and dimension 2 of a 4-D query: always -2.
    rows = graphs.insert(
        graph, anchor, "Shape", (query,), {"start": -2, "end": -1}, name=f"{mask.name}_rows",
        dtype=ir.DataType.INT64, shape=(1,),
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

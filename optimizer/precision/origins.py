"""Values whose type follows from where they come from, whatever their numbers are."""

from __future__ import annotations

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.half_weights import HALF_TYPES
from optimizer.nodes import node_of
from optimizer.precision.limits import FLOATS
from optimizer.precision.rules import is_product
from optimizer.widening import EXACT


def from_integers(graph: ir.Graph) -> set[ir.Value]:
    """Floating values computed from integers, bools and constants alone.

    Positions, the angles and tables of rotary embedding, masks and distances: few numbers, which
    every layer reads, and whose last digits count. What is looked up in a table by integers, and
    the results of products, are activations.
    """
    found: set[ir.Value] = set()
    for node in graph:
        if is_product(node) or node.op_type in ("DequantizeLinear", "GatherND", "GatherElements"):
            continue
        sources = [v for v in node.inputs if _is_float(v) and graphs.constant(v) is None]
        if all(source in found for source in sources) and not _holds_graph(node):
            found.update(value for value in node.outputs if _is_float(value))
    return found


def cast_integers(graph: ir.Graph) -> set[ir.Value]:
    """Floating values that hold integers of any size: casts, and what only moves those around."""
    found: set[ir.Value] = set()
    for node in graph:
        source = node.inputs[0] if node.inputs else None
        if node.op_type == "Cast" and node.domain == "" and source is not None:
            moved = source.dtype is not None and source.dtype.is_integer()
        else:
            moved = node.op_type in EXACT and any(value in found for value in node.inputs)
        if moved:
            found.update(value for value in node.outputs if _is_float(value))
    return found


def widened(graph: ir.Graph) -> set[ir.Value]:
    """Float32 values computed from half-precision activations, behind a Cast of the model's own.

    Who exports a half-precision model with such a piece wants that piece in float32.
    """
    found: set[ir.Value] = set()
    for node in graph:
        cast = node_of(node.outputs[0], "Cast") if node.outputs else None
        source = None if cast is None else cast.inputs[0]
        if source is not None and graphs.constant(source) is None and source.dtype in HALF_TYPES:
            starts = True
        else:
            starts = any(value in found for value in node.inputs)
        if starts:
            found.update(v for v in node.outputs if v.dtype == ir.DataType.FLOAT)
    return found


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype in FLOATS


def _holds_graph(node: ir.Node) -> bool:
    return any(True for _ in graphs.attribute_graphs(node))

"""A tensor that is split into a sequence, of which elements are taken, is split into tensors.

Rewrite:      SequenceAt(SplitToSequence(x, sizes), i) -> output i of Split(x, sizes)
Applies when: nothing but SequenceAt with a constant position reads the sequence, and the sizes of
              all parts are constant or follow from a known axis
Exactness:    bitwise
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.graph import scalar
from optimizer.nodes import operand, optional
from optimizer.raising.base import Miss, RuleReport, site, sweep
from optimizer.raising.shape_rules import numbers
from optimizer.raising.shapes import Shapes


def run(model: ir.Model) -> RuleReport:
    """Apply the rule to every SplitToSequence of the main graph."""
    return sweep(model, {"SplitToSequence": partial(_split, shapes=Shapes())})


def _split(node: ir.Node, shapes: Shapes) -> bool | Miss:
    source, graph = operand(node), node.graph
    readers = [use.node for use in node.outputs[0].uses()]
    positions = [scalar(r.inputs[1]) if r.op_type == "SequenceAt" else None for r in readers]
    if node.outputs[0].is_graph_output() or None in positions or not isinstance(graph, ir.Graph):
        return Miss(site(node), "its sequence is read by more than SequenceAt at fixed positions")
    axis = node.attributes.get_int("axis", 0)
    sizes = _sizes(node, shapes, axis)
    if sizes is None:
        return Miss(site(node), "the sizes of its parts are not known")
    places = [int(position or 0) for position in positions]
    if any(not -len(sizes) <= place < len(sizes) for place in places):
        return Miss(site(node), "a position outside of its sequence is read")
    vector = graphs.add_initializer(graph, "sizes", np.array(sizes, np.int64))
    parts = graphs.insert(
        graph, node, "Split", [source, vector], {"axis": axis}, name=node.outputs[0].name,
        outputs=len(sizes), dtype=source.dtype,
    )  # fmt: skip
    parts = parts if isinstance(parts, tuple) else (parts,)
    for reader, place in zip(readers, places, strict=True):
        graphs.replace_value(reader.outputs[0], parts[place], keep_name=True)
    return True


def _sizes(node: ir.Node, shapes: Shapes, axis: int) -> list[int] | None:
    """The sizes of all parts along ``axis``; None where an axis may go away or is not known."""
    given = optional(node, 1)
    if given is None and not node.attributes.get_int("keepdims", 1):
        return None
    sizes = numbers(given) if given is not None else [1]
    tensor = graphs.constant(given)
    if sizes is None:
        return None
    if tensor is not None and len(tensor.shape) == 1:
        return sizes
    shape = shapes.of(operand(node))
    total = None if shape is None else shape[axis]
    if not isinstance(total, int) or sizes[0] <= 0:
        return None
    each = sizes[0]
    return [min(each, total - start) for start in range(0, total, each)]

"""Weights stored in half precision and computed with in float32 become float32 constants.

Rewrite:      Cast(W16, to = float) -> initializer W, which remembers W16
Applies when: W16 is a constant of more than one number; smaller ones are folded with the rest
Exactness:    bitwise
Cost:         none: the numbers are converted when somebody reads them, and ``legalize`` stores what
              no pass has changed as it was
"""

from __future__ import annotations

import onnx_ir as ir

from optimizer.graph import constant, inherit_name
from optimizer.half_weights import HALF_TYPES, widened
from optimizer.raising.base import RuleReport, sweep
from optimizer.raising.constants import make_initializer


def run(model: ir.Model) -> RuleReport:
    """Raise every such Cast of the main graph."""
    return sweep(model, {"Cast": _raise})


def _raise(node: ir.Node) -> bool:
    source, output, graph = node.inputs[0], node.outputs[0], node.graph
    tensor = constant(source)
    if source is None or tensor is None or not isinstance(graph, ir.Graph):
        return False
    if tensor.dtype not in HALF_TYPES or tensor.size == 1 or output.is_graph_output():
        return False
    if ir.DataType(node.attributes["to"].as_int()) != ir.DataType.FLOAT:
        return False
    made = make_initializer(graph, output, widened(source))
    graph.remove(node, safe=True)
    inherit_name(graph, source, made)
    return True

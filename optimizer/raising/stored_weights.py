"""``optimize.SparseMatMul`` becomes standard operators on its decoded weight.

Rewrite:      SparseMatMul(x, bitmap, values, offsets, ..) -> its body on W [K, N], an initializer
Applies when: the declaration is this version's, and the stored weight is constant and sound;
              otherwise the body that the model carries decodes it, operator by operator
Exactness:    bitwise
"""

from __future__ import annotations

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.custom_ops.bodies import add_body, operators
from optimizer.custom_ops.cuda_layout import most_values, unpack_cuda
from optimizer.custom_ops.declaration import OP_TYPE, declaration_hash
from optimizer.custom_ops.packing import Packed
from optimizer.raising.base import RuleReport, attempt


def run(model: ir.Model) -> RuleReport:
    """Let every node call a body that takes the decoded weight; ``inline`` puts it in its place."""
    return RuleReport(sum(attempt(node, _decode, model, node) for node in operators(model)))


def _decode(model: ir.Model, node: ir.Node) -> bool:
    arrays = [graphs.const(value) for value in node.inputs[1:4]]
    attributes = node.attributes
    layout = attributes.get_string("layout", "")
    k, n = attributes.get_int("K", 0), attributes.get_int("N", 0)
    known = attributes.get_int("declaration", 0) == declaration_hash()
    if not known or any(array is None for array in arrays):
        return False
    packed = Packed(*(array for array in arrays if array is not None))
    try:
        if 0 < attributes.get_int("most_values", 0) < most_values(packed):
            return False
        weight = unpack_cuda(packed, layout, k, n)
        add_body(model, node, decoded=True)
    except ValueError:
        return False
    name = str(operand.name) if (operand := node.inputs[1]) is not None else OP_TYPE
    value = graphs.add_initializer(model.graph, name.removesuffix(".bitmap"), weight)
    node.replace_input_with(1, value)
    return True

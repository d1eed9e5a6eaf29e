"""Raises the forms that ``legalize`` writes for ONNX Runtime's CPU kernels.

Rewrite: ``MatMulIntegerToFloat(QuantizeLinear(x, s, 128), W, s, w, 128[, 0], b)``
         -> ``MatMul(DQ(Q(x, s, 0)), DQ(W, w)) + b`` with int8 codes;
         ``Sum(a, b)`` -> ``Add(a, b)``;
         ``Softmax(Max(x, ReduceMax(x) - d))`` -> ``Softmax(x)`` for d of 60 or more;
         ``QuantizeLinear(x * Reciprocal(m))`` -> ``QuantizeLinear(x / m)``;
         Q/DQ pairs of uint8 codes with offset 128 -> of int8 codes.
Applies when: weights are constant int8 with zero point 0, the activation's codes are uint8 and the
         product takes 128 for zero. A quantizer whose own zero point is another code z carries a
         shift: then ``x`` becomes ``x + (z - 128) s``.
Exactness: bitwise, apart from the order of float scaling; exp(-60) = 9e-27 of the largest
         probability of a row is far below the rounding of its sum.
Source:  uint8 code q with offset 128 and int8 code q - 128 stand for the same number, and saturate
         at the same two numbers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import node_of
from optimizer.raising.base import Miss, RuleReport, allow, attempt, site

_CONTRIB = "com.microsoft"
_OFFSET = 128
#: A score this far below the largest of its row has no part in the result.
_LOW = 60.0


def run(model: ir.Model) -> RuleReport:
    """Raise every int8 product and two-operand Sum of the main graph."""
    raiser = _Raiser(model.graph)
    for node in model.graph:
        if node.domain == _CONTRIB and node.op_type == "MatMulIntegerToFloat":
            raiser.product(node)
        elif node.domain == "" and node.op_type == "Sum" and len(node.inputs) == 2:
            if not allow(node):
                continue
            node.op_type = "Add"
            raiser.applied += 1
        elif node.domain == "" and node.op_type in ("Softmax", "QuantizeLinear"):
            raiser.applied += attempt(node, _raise_floor, node)
            raiser.applied += attempt(node, _raise_quotient, node)
            raiser.applied += attempt(node, _raise_pair, node)
        elif node.domain == _CONTRIB and node.op_type == "GroupQueryAttention":
            reason = (
                "each row keeps its own cache, perhaps in place, which no standard operator does; "
                "passes that regroup heads need a model with an appended cache"
            )
            raiser.skipped.append(Miss(site(node), reason))
    if raiser.applied:
        graphs.remove_dead(model)
    if all(node.domain != _CONTRIB for node in model.graph.all_nodes()):
        model.graph.opset_imports.pop(_CONTRIB, None)
    return RuleReport(raiser.applied, tuple(raiser.skipped))


class _Raiser:
    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.applied = 0
        self.skipped: list[Miss] = []
        self._zero: ir.Value | None = None
        self._floats: dict[ir.Node, ir.Value] = {}

    def product(self, node: ir.Node) -> None:
        """Raise one MatMulIntegerToFloat."""
        reason = _fault(node)
        if reason is not None:
            self.skipped.append(Miss(site(node), reason))
            return
        if not allow(node):
            return
        codes, weight, _, weight_scale = node.inputs[:4]
        bias = node.inputs[6] if len(node.inputs) > 6 else None
        quantize = None if codes is None else codes.producer()
        assert quantize is not None and weight is not None  # noqa: PT018, S101 - see _fault
        old = node.outputs[0]
        left = self.activation(quantize)
        right = graphs.insert(
            self.graph, node, "DequantizeLinear", (weight, weight_scale), {"axis": 1},
            name=f"{weight.name}_float", dtype=ir.DataType.FLOAT, shape=weight.shape,
        )  # fmt: skip
        new = graphs.insert(
            self.graph, node, "MatMul", (left, right), dtype=ir.DataType.FLOAT, shape=old.shape
        )
        if bias is not None:
            new = graphs.insert(
                self.graph, node, "Add", (new, bias), dtype=ir.DataType.FLOAT, shape=old.shape
            )
        graphs.replace_value(old, new, keep_name=True)
        self.applied += 1

    def activation(self, quantize: ir.Node) -> ir.Value:
        """The float numbers that the codes of ``quantize`` stand for; one pair for all users."""
        if quantize in self._floats:
            return self._floats[quantize]
        source, scale, zero_point = quantize.inputs[:3]
        assert source is not None  # noqa: S101 - required by the operator
        steps = int(graphs.scalar(zero_point) or 0) - _OFFSET
        if steps:
            shift = np.array(steps * float(graphs.scalar(scale) or 0), np.float32)
            constant = graphs.add_initializer(self.graph, f"{source.name}_shift", shift)
            source = graphs.insert(
                self.graph, quantize, "Add", (source, constant), name=f"{source.name}_shifted",
                dtype=ir.DataType.FLOAT, shape=source.shape,
            )  # fmt: skip
        if self._zero is None:
            self._zero = graphs.add_initializer(self.graph, "zero_point_0", np.array(0, np.int8))
        codes = graphs.insert(
            self.graph, quantize, "QuantizeLinear", (source, scale, self._zero),
            name=f"{source.name}_s8", dtype=ir.DataType.INT8, shape=source.shape,
        )  # fmt: skip
        result = graphs.insert(
            self.graph, quantize, "DequantizeLinear", (codes, scale, self._zero),
            name=f"{source.name}_rounded", dtype=ir.DataType.FLOAT, shape=source.shape,
        )  # fmt: skip
        self._floats[quantize] = result
        return result


def _fault(node: ir.Node) -> str | None:
    """Why this product has no symmetric int8 form."""
    inputs = [*node.inputs, *(None,) * (7 - len(node.inputs))]
    codes, weight, scale, _, zero_point, weight_zero = inputs[:6]
    quantize = None if codes is None else codes.producer()
    if quantize is None or quantize.domain != "" or quantize.op_type != "QuantizeLinear":
        return "its activation is not quantized by a QuantizeLinear"
    tensor = graphs.constant(weight)
    if tensor is None or tensor.dtype != ir.DataType.INT8 or len(tensor.shape) != 2:
        return "its weight is not a constant int8 matrix"
    weight_zeros = graphs.const(weight_zero)
    if weight_zero is not None and (weight_zeros is None or np.any(weight_zeros)):
        return "the zero point of its weight is not 0"
    if graphs.scalar(zero_point) != _OFFSET:
        return f"the zero point of its activation is not {_OFFSET}"
    if graphs.scalar(scale) is None or graphs.scalar(scale) != graphs.scalar(quantize.inputs[1]):
        return "it does not scale its activation by the scale it was quantized with"
    own_zero = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    if own_zero is None or own_zero.dtype != ir.DataType.UINT8 or graphs.scalar(own_zero) is None:
        return "the zero point of its activation is not one constant uint8"
    return None


def _raise_floor(softmax: ir.Node) -> bool:
    """Drop a floor under the scores that is too low to matter."""
    floor = node_of(softmax.inputs[0], "Max")
    if softmax.op_type != "Softmax" or floor is None or len(floor.inputs) != 2:
        return False
    scores, least = floor.inputs
    below = node_of(least, "Sub")
    top = None if below is None else node_of(below.inputs[0], "ReduceMax")
    if below is None or top is None or top.inputs[0] is not scores or scores is None:
        return False
    if (graphs.scalar(below.inputs[1]) or 0) < _LOW or len(top.inputs) < 2:
        return False
    if not top.attributes.get_int("keepdims", 1):
        return False
    if graphs.scalar(top.inputs[1]) != -1 or softmax.attributes.get_int("axis", -1) != -1:
        return False
    softmax.replace_input_with(0, scores)
    return True


def _raise_quotient(quantize: ir.Node) -> bool:
    """A product with an inverse is a quotient."""
    product = node_of(quantize.inputs[0], "Mul")
    if quantize.op_type != "QuantizeLinear" or product is None:
        return False
    inverse = node_of(product.inputs[1], "Reciprocal")
    if inverse is None:
        return False
    product.op_type = "Div"
    product.replace_input_with(1, inverse.inputs[0])
    return True


def _raise_pair(quantize: ir.Node) -> bool:
    """Codes of a Q/DQ pair with offset 128 become int8 codes of the same numbers."""
    graph, codes = quantize.graph, quantize.outputs[0]
    readers = list(dict.fromkeys(use.node for use in codes.uses()))
    nodes = (quantize, *readers)
    if quantize.op_type != "QuantizeLinear" or not readers or codes.is_graph_output():
        return False
    if any(node.op_type != "DequantizeLinear" or node.domain for node in readers):
        return False
    zeros = [node.inputs[2] if len(node.inputs) > 2 else None for node in nodes]
    offsets = {
        None if z is None or z.dtype != ir.DataType.UINT8 else graphs.scalar(z) for z in zeros
    }
    if offsets != {_OFFSET} or not isinstance(graph, ir.Graph):
        return False
    zero = graphs.add_initializer(graph, "zero_point_0", np.array(0, np.int8))
    attributes = {k: v for k, v in quantize.attributes.items() if k != "output_dtype"}
    signed = graphs.insert(
        graph, quantize, "QuantizeLinear", (*quantize.inputs[:2], zero), attributes,
        name=f"{codes.name}_s8", dtype=ir.DataType.INT8, shape=codes.shape,
    )  # fmt: skip
    for node in readers:
        node.replace_input_with(0, signed)
        node.replace_input_with(2, zero)
    return True

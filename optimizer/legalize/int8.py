"""Lowers canonical symmetric int8 Q/DQ around MatMul to ONNX Runtime's fast CPU form.

``MatMul(DQ(Q(x, s)), DQ(W, w)) + b`` becomes
``MatMulIntegerToFloat(Q(x, s, 128), W, s, w, 128, b)``: the kernels of x86-64 multiply uint8 by
int8 natively (int8 by int8 goes through a slow generic path), so the activation is stored with an
offset of 128. Both forms round and saturate at the same real numbers, ``-128 s`` and ``127 s``, so
the integers differ by exactly 128 and the product is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import operand, reader
from optimizer.pass_base import Skip
from optimizer.quantized_parts import scaled_along
from optimizer.raising.base import allow, attempt

CONTRIB = "com.microsoft"
#: uint8 code of the real number zero.
OFFSET = 128
#: How far a constant shift may be from a whole number of quantization steps to be absorbed: far
#: below the rounding step itself, and above the float32 error of dividing two such constants.
_WHOLE_STEP = 1e-3


@dataclass(frozen=True)
class QuantizedMatMul:
    """One canonical int8 product.

    Attributes:
        matmul: The MatMul.
        quantize: The QuantizeLinear of the activation.
        scale: The activation's scale, one element.
        weight: int8 initializer [K, N].
        weight_scale: Float initializer, [N] or one element.
        add: The Add of the bias that directly follows, or None.
        bias: Initializer [N], or None.
    """

    matmul: ir.Node
    quantize: ir.Node
    scale: ir.Value
    weight: ir.Value
    weight_scale: ir.Value
    add: ir.Node | None
    bias: ir.Value | None


def lower(model: ir.Model) -> tuple[int, tuple[Skip, ...]]:
    """Rewrite every int8 product of the main graph.

    Returns:
        How many were rewritten, and quantized products left as Q/DQ with the reason.
    """
    graph = model.graph
    found: list[QuantizedMatMul] = []
    skipped: list[Skip] = []
    for node in graph:
        if node.op_type == "MatMul" and node.domain == "":
            match = match_product(node)
            if isinstance(match, QuantizedMatMul):
                if allow(node, "int8 product"):
                    found.append(match)
            elif match is not None:
                skipped.append(Skip(str(node.name), match))
    if found:
        writer = _Writer(graph, found)
        for product in found:
            writer.write(product)
        graph.opset_imports[CONTRIB] = 1
        graphs.remove_dead(graph)
    count = sum(attempt(node, _unsigned, node) for node in graph)
    if count:
        graphs.remove_dead(graph)
    return len(found) + count, tuple(skipped)


def _unsigned(quantize: ir.Node) -> bool:
    """Codes of a Q/DQ pair that stays, as uint8: they stand for the same numbers.

    ONNX Runtime turns int8 pairs into uint8 ones itself, and from opset 21 on fails where it has
    moved such a pair through a Reshape before (1.32: output_dtype and zero point differ).
    """
    graph = quantize.graph
    if quantize.op_type != "QuantizeLinear" or quantize.domain != "" or not _is_int8(quantize):
        return False
    readers = list(dict.fromkeys(use.node for use in quantize.outputs[0].uses()))
    pairs = all(node.op_type == "DequantizeLinear" and not node.domain for node in readers)
    zeros = [_zero(node) for node in (quantize, *readers)]
    if not readers or not pairs or None in zeros or not isinstance(graph, ir.Graph):
        return False
    if len(set(zeros)) > 1 or quantize.outputs[0].is_graph_output():
        return False
    products = (use.node for node in readers for use in node.outputs[0].uses())
    if any(n.op_type == "MatMul" and scaled_along(operand(n, 1), 0) for n in products):
        return False  # as uint8, ONNX Runtime would fuse it
    code = np.array(OFFSET + int(zeros[0] or 0), np.uint8)
    zero = graphs.add_initializer(graph, f"zero_point_{code}", code)
    attributes = {k: v for k, v in quantize.attributes.items() if k != "output_dtype"}
    codes = graphs.insert(
        graph, quantize, "QuantizeLinear", (*quantize.inputs[:2], zero), attributes,
        name=f"{quantize.outputs[0].name}_u8", dtype=ir.DataType.UINT8,
        shape=quantize.outputs[0].shape,
    )  # fmt: skip
    for node in readers:
        node.resize_inputs(3)
        node.replace_input_with(0, codes)
        node.replace_input_with(2, zero)
    return True


def _zero(node: ir.Node) -> int | None:
    """The one zero point of a Q or DQ, 0 where it has none."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        return 0
    number = graphs.scalar(value)
    return None if number is None else int(number)


def match_product(node: ir.Node) -> QuantizedMatMul | str | None:
    """The int8 product around a MatMul, why it is none, or None where nothing is quantized."""
    left, right = node.inputs
    data, weight = _producer(left, "DequantizeLinear"), _producer(right, "DequantizeLinear")
    if data is None and weight is None:
        return None
    if data is None:
        return "only the weight is quantized"
    if weight is None or graphs.constant(weight.inputs[0]) is None:
        return "its second factor is not an int8 constant"
    quantize = _producer(data.inputs[0], "QuantizeLinear")
    if quantize is None:
        return "its activation is not quantized by a QuantizeLinear"
    reason = _activation_fault(quantize, data) or _weight_fault(weight)
    if reason is not None:
        return reason
    w, w_scale, scale = weight.inputs[0], weight.inputs[1], quantize.inputs[1]
    assert w is not None and w_scale is not None and scale is not None  # noqa: PT018, S101
    add, bias = _bias(node, w)
    return QuantizedMatMul(node, quantize, scale, w, w_scale, add, bias)


def _producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain == "" else None


def _activation_fault(quantize: ir.Node, dequantize: ir.Node) -> str | None:
    scales = []
    for node in (quantize, dequantize):
        scale = graphs.scalar(node.inputs[1])
        if scale is None:
            return "the scale of its activation is not one constant number"
        scales.append(scale)
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if zero is not None and graphs.scalar(zero) != 0:
            return "the zero point of its activation is not 0"
    if scales[0] != scales[1]:
        return "its QuantizeLinear and DequantizeLinear have different scales"
    if quantize.outputs[0].dtype not in (None, ir.DataType.INT8) or not _is_int8(quantize):
        return "its activation is not int8"
    scale_value = quantize.inputs[1]
    if scale_value is None or scale_value.dtype != ir.DataType.FLOAT:
        return "its activation is not float32"
    return None


def _is_int8(quantize: ir.Node) -> bool:
    zero = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    if zero is not None:
        return zero.dtype == ir.DataType.INT8
    declared = quantize.attributes.get("output_dtype")
    return declared is not None and declared.as_int() == ir.DataType.INT8.value


def _weight_fault(dequantize: ir.Node) -> str | None:
    weight = graphs.constant(dequantize.inputs[0])
    scale = graphs.constant(dequantize.inputs[1])
    if weight is None or scale is None:
        return "its weight or the weight's scale is not a constant"
    if weight.dtype != ir.DataType.INT8 or len(weight.shape) != 2:
        return "its weight is not an int8 matrix"
    zero = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    if zero is not None:
        values = graphs.const(zero)
        if values is None or np.any(values):
            return "the zero point of its weight is not 0"
    if scale.size != 1:
        axis = dequantize.attributes.get("axis")
        per_column = axis is None or axis.as_int() in (1, -1)
        if not per_column or list(scale.shape) != [weight.shape[1]]:
            return "its weight is not scaled per output channel"
    if scale.dtype != ir.DataType.FLOAT:
        return "the scale of its weight is not float32"
    return None


def _bias(matmul: ir.Node, weight: ir.Value) -> tuple[ir.Node | None, ir.Value | None]:
    add = reader(matmul.outputs[0], "Add")
    if add is None or weight.shape is None:
        return None, None
    bias = next((v for v in add.inputs if v is not matmul.outputs[0]), None)
    tensor = graphs.constant(bias)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return None, None
    if list(tensor.shape) != [weight.shape[1]]:
        return None, None
    return add, bias


class _Writer:
    """Writes the lowered form; one shared QuantizeLinear per activation and scale."""

    def __init__(self, graph: ir.Graph, products: list[QuantizedMatMul]) -> None:
        self.graph = graph
        self.offset = graphs.add_initializer(graph, "zero_point_128", np.array(OFFSET, np.uint8))
        wanted = {product.quantize for product in products}
        by_source: dict[tuple[int, float], ir.Value] = {}
        self.codes: dict[ir.Node, ir.Value] = {}
        for node in [node for node in graph if node in wanted]:  # graph order: first one is shared
            key = (id(node.inputs[0]), float(graphs.scalar(node.inputs[1]) or 0))
            if key not in by_source:
                by_source[key] = self.quantize(node)
            self.codes[node] = by_source[key]

    def quantize(self, node: ir.Node) -> ir.Value:
        """The uint8 codes of what ``node`` turns into int8."""
        source, scale = node.inputs[0], node.inputs[1]
        zero_point = self.offset
        shift = absorbable_shift(node)
        if shift is not None:
            source, steps = shift
            zero_point = self.zero_point(OFFSET + steps)
        return graphs.insert(
            self.graph,
            node,
            "QuantizeLinear",
            (source, scale, zero_point),
            name=f"{node.outputs[0].name}_u8",
            dtype=ir.DataType.UINT8,
            shape=node.outputs[0].shape,
        )

    def zero_point(self, code: int) -> ir.Value:
        name = f"zero_point_{code}"
        known = self.graph.initializers.get(name)
        if known is not None and known.dtype == ir.DataType.UINT8:
            return known
        return graphs.add_initializer(self.graph, name, np.array(code, np.uint8))

    def write(self, product: QuantizedMatMul) -> None:
        last = product.add or product.matmul
        inputs = [
            self.codes[product.quantize],
            product.weight,
            product.scale,
            product.weight_scale,
            self.offset,
            None,
            product.bias,
        ]
        old = last.outputs[0]
        new = graphs.insert(
            self.graph,
            last,
            "MatMulIntegerToFloat",
            inputs if product.bias is not None else inputs[:5],
            domain=CONTRIB,
            dtype=ir.DataType.FLOAT,
            shape=old.shape,
        )
        graphs.replace_value(old, new, keep_name=True)


def absorbable_shift(quantize: ir.Node) -> tuple[ir.Value, int] | None:
    """What ``quantize`` reads before a constant shift, and the shift in whole steps.

    ``round((x - c) / s) = round(x / s) - c / s`` where ``c / s`` is whole, so a subtraction of a
    whole number of steps moves into the zero point for free. Only where the shifted value has no
    other user (then the subtraction goes away), and the zero point stays a uint8.
    """
    node = quantize.inputs[0].producer() if quantize.inputs[0] is not None else None
    if node is None or node.domain != "" or node.op_type not in {"Add", "Sub"}:
        return None
    if graphs.only_user(node.outputs[0]) is not quantize:
        return None
    left, right = node.inputs
    constant = graphs.scalar(right)
    if constant is None and node.op_type == "Add":
        left, constant = right, graphs.scalar(left)
    scale = graphs.scalar(quantize.inputs[1])
    if constant is None or not scale or left is None:
        return None
    steps = (constant if node.op_type == "Add" else -constant) / scale
    if abs(steps - round(steps)) > _WHOLE_STEP or not 0 <= OFFSET + round(steps) <= 255:
        return None
    return left, round(steps)


def products(graph: ir.Graph) -> Iterator[ir.Node]:
    """The lowered products of a graph."""
    return (n for n in graph if n.op_type == "MatMulIntegerToFloat" and n.domain == CONTRIB)

"""Recognises int8 linear layers in a canonical graph.

A quantized layer is more than a product: its input is scaled, shifted and rounded first, and what
was scaled token by token is multiplied back after. Everything between the value that a float layer
would read and the one it would compute belongs to the layer's view::

    x [Mul, Add by constants] [Clip] Q DQ                            MatMul             [Add bias]
    x [Mul, Add by constants] [Sub c] Div r [Add or Sub number] Q DQ MatMul [Add vector] Mul r
                                                             [Add of (c Mul vector)] [Add bias]
    x DynamicQuantizeLinear MatMulInteger Cast Mul (of both scales) [Add bias]

A product that is rounded itself, Q and DQ after it, goes on after that, and a layer may end with
such a pair. r and c hold one number per
token, each computed from x; steps in brackets may be missing. A step
that divides rows belongs to the layer only where the layer multiplies by the same numbers after:
then, and only then, the whole is linear up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import dims, node_of, operand, operands, other, reader, users
from optimizer.norm_parts import norm
from optimizer.structure import Linear

_REDUCTIONS = frozenset(
    {"ReduceMax", "ReduceMin", "ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"}
)
_POINTWISE = frozenset({"Abs", "Add", "Div", "Max", "Min", "Mul", "Neg", "Reciprocal", "Sub"})
_ON_THE_WAY = (
    "Add", "Clip", "DequantizeLinear", "Div", "DynamicQuantizeLinear", "Mul", "QuantizeLinear",
    "Sub",
)  # fmt: skip
_PRODUCTS = ("MatMul", "MatMulInteger")
#: Nodes after the product: Q, DQ, what an offset took, the gain, what the middle took, the bias.
_MAX_AFTER = 6
#: Nodes before it: Mul, Add, Sub, Div, Sub, Q, DQ.
_MAX_BEFORE = 7
#: Nodes that compute the reach of a token from its numbers.
_MAX_REACH = 12


@dataclass(frozen=True)
class _Way:
    """How a value gets to an int8 product.

    Attributes:
        source: Where it starts.
        nodes: The steps, the last one first.
        gain: r [..., 1], or None.
        middle: c [..., 1], or None.
    """

    source: ir.Value
    nodes: tuple[ir.Node, ...]
    gain: ir.Value | None = None
    middle: ir.Value | None = None

    def past(self, node: ir.Node) -> _Way:
        """One step further back; the first operand carries the activation."""
        constant_first = graphs.constant(node.inputs[0]) is not None
        source = operand(node, int(constant_first))
        return replace(self, source=source, nodes=(*self.nodes, node))


def weight_of(value: ir.Value) -> ir.Value | None:
    """``value`` if it is a constant matrix or the dequantized form of one."""
    shape = dims(stored(value))
    return value if shape is not None and len(shape) == 2 else None


def stored(weight: ir.Value) -> ir.Value:
    """The initializer of a weight: what is dequantized, or the weight itself."""
    dequantize = node_of(weight, "DequantizeLinear")
    return weight if dequantize is None else operand(dequantize)


def scaled_along(weight: ir.Value, axis: int) -> bool:
    """Whether a matrix is dequantized with a scale for each index of ``axis``.

    ONNX Runtime fuses int8 products of weights with a scale for each row, and then cannot run them.
    """
    node = node_of(weight, "DequantizeLinear")
    scale = None if node is None else graphs.constant(node.inputs[1])
    if node is None or scale is None or len(scale.shape) != 1 or scale.size == 1:
        return False
    return node.attributes.get_int("axis", 1) % 2 == axis


def quantized_linear(output: ir.Value) -> Linear | None:
    """The int8 layer whose result, multiplied back and with its bias, is ``output``."""
    pending = [(output, _MAX_AFTER)]
    while pending:
        value, steps = pending.pop()
        matmul = node_of(value, *_PRODUCTS)
        if matmul is not None:
            found = quantized_at(matmul)
            if found is not None and output in (found.output, rounded(found.output)):
                return replace(found, output=output)
        node = node_of(value, "Add", "Cast", "DequantizeLinear", "Mul", "QuantizeLinear")
        if node is None or not steps:
            continue
        binary = node.op_type in ("Add", "Mul")
        sides = [v for v in (operands(node) if binary else node.inputs[:1]) if v is not None]
        pending.extend((v, steps - 1) for v in reversed(sides) if graphs.constant(v) is None)
    return None


def quantized_at(matmul: ir.Node) -> Linear | None:
    """The int8 layer around a product of integers, or of numbers that are both dequantized."""
    if matmul.op_type == "MatMulInteger":
        return _integer_product(matmul)
    left, weight = operands(matmul)
    if node_of(weight, "DequantizeLinear") is None or weight_of(weight) is None:
        return None
    for way in _ways(left):
        found = _restored(matmul, way)
        if found is not None:
            return found
    return None


def fed_by(value: ir.Value) -> list[Linear]:
    """The int8 layers whose input is ``value``."""
    found: dict[ir.Node, Linear] = {}
    pending = [(value, _MAX_BEFORE)]
    while pending:
        current, steps = pending.pop()
        for matmul in users(current, *_PRODUCTS):
            layer = quantized_at(matmul)
            if layer is not None and layer.input is value:
                found[matmul] = layer
        if steps:
            following = reversed(list(users(current, *_ON_THE_WAY)))
            pending.extend((node.outputs[0], steps - 1) for node in following)
    return list(found.values())


def reads(layer: Linear) -> set[ir.Node]:
    """The nodes through which a layer reads its input: of a float layer, the MatMul."""
    dynamic = node_of(operand(layer.matmul), "DynamicQuantizeLinear")
    if dynamic is not None:
        return {dynamic}
    for way in _ways(operand(layer.matmul)):
        if way.source is layer.input:
            nodes = {layer.matmul, *way.nodes}
            for row in (way.gain, way.middle):
                nodes.update(_reach(row, layer.input) or () if row is not None else ())
            return nodes
    return {layer.matmul}


def _ways(left: ir.Value) -> Iterator[_Way]:
    """How the left factor came to be, the longest way first; none where it is not rounded."""
    dequantize = node_of(left, "DequantizeLinear")
    quantize = None if dequantize is None else node_of(dequantize.inputs[0], "QuantizeLinear")
    if dequantize is None or quantize is None:
        return
    rounded = _Way(operand(quantize), (dequantize, quantize))
    by_row = _by_row(rounded)
    if by_row is not None:
        yield _by_channel(by_row)
    clip = node_of(rounded.source, "Clip")
    yield _by_channel(rounded if clip is None or not _is_symmetric(clip) else rounded.past(clip))


def _by_row(way: _Way) -> _Way | None:
    """Past the division of rows by their reach, and the shift by their middle and by a number."""
    shift = node_of(way.source, "Add", "Sub")
    if shift is not None and any(graphs.scalar(v) is not None for v in operands(shift)):
        way = way.past(shift)
    divide = node_of(way.source, "Div")
    if divide is None or not _is_per_row(operand(divide, 1)):
        return None
    way = replace(way.past(divide), gain=operand(divide, 1))
    centre = node_of(way.source, "Sub")
    if centre is not None and _is_per_row(operand(centre, 1)):
        way = replace(way.past(centre), middle=operand(centre, 1))
    return way


def _by_channel(way: _Way) -> _Way:
    """Past an Add and a Mul by constant vectors, unless they end a norm or a layer."""
    for op_type in ("Add", "Mul"):
        node = node_of(way.source, op_type)
        if node is None or norm(way.source) is not None or not any(map(_is_vector, operands(node))):
            continue
        before = way.past(node)
        if node_of(before.source, "MatMul") is None:
            way = before
    return way


def _is_symmetric(clip: ir.Node) -> bool:
    """Whether a Clip narrows the range of the codes; others are activations."""
    low, high = (graphs.scalar(v) for v in (*clip.inputs[1:3], None, None)[:2])
    return low is not None and high is not None and low == -high


def _is_per_row(value: ir.Value) -> bool:
    """Whether ``value`` has one number per row: computed from reductions over the last axis."""
    if graphs.constant(value) is not None:
        return False
    nodes = _reach(value, None)
    return nodes is not None and any(node.op_type in _REDUCTIONS for node in nodes)


def _reach(value: ir.Value, source: ir.Value | None) -> tuple[ir.Node, ...] | None:
    """The nodes that compute one number per row, down to reductions or, if given, ``source``.

    None where something else has a part in it.
    """
    found: dict[ir.Node, None] = {}
    pending = [value]
    while pending:
        current = pending.pop()
        if current is source or graphs.scalar(current) is not None:
            continue
        if source is not None and graphs.constant(current) is not None:
            continue
        node = current.producer()
        if node is None or node.domain != "" or len(found) >= _MAX_REACH:
            return None
        if node.op_type in _REDUCTIONS and _reduces_rows(node):
            pending.extend(() if source is None else (operand(node),))
        elif node.op_type in _POINTWISE:
            pending.extend(v for v in node.inputs if v is not None)
        else:
            return None
        found[node] = None
    return tuple(found)


def _reduces_rows(node: ir.Node) -> bool:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    return graphs.scalar(axes) == -1 and node.attributes.get_int("keepdims", 1) == 1


def _restored(matmul: ir.Node, way: _Way) -> Linear | None:
    """The layer with what follows its product; None where rows are not multiplied back."""
    value, weight = rounded(matmul.outputs[0]), operands(matmul)[1]
    columns = (dims(stored(weight)) or (0,))[-1]
    if way.gain is not None:
        lost = _vector_added(value, columns)
        value = value if lost is None else lost.outputs[0]
        scale = reader(value, "Mul")
        if scale is None or other(scale, value) is not way.gain:
            return None
        value = scale.outputs[0]
    if way.middle is not None:
        add = reader(value, "Add")
        product = None if add is None else node_of(other(add, value), "Mul")
        if add is None or product is None or way.middle not in operands(product):
            return None
        if dims(other(product, way.middle)) != (columns,):
            return None
        value = add.outputs[0]
    last = _vector_added(value, columns)
    bias = None if last is None else other(last, value)
    output = value if last is None else last.outputs[0]
    return Linear(matmul, last, way.source, weight, bias, output)


def _integer_product(matmul: ir.Node) -> Linear | None:
    """The layer around a MatMulInteger of what a DynamicQuantizeLinear gives."""
    left, weight = operands(matmul)
    quantize = node_of(left, "DynamicQuantizeLinear")
    cast = reader(matmul.outputs[0], "Cast")
    scaled = None if cast is None else reader(cast.outputs[0], "Mul")
    if quantize is None or cast is None or scaled is None or weight_of(weight) is None:
        return None
    factor = other(scaled, cast.outputs[0])
    product = node_of(factor, "Mul")
    if quantize.outputs[1] not in ((factor,) if product is None else operands(product)):
        return None
    value = scaled.outputs[0]
    last = _vector_added(value, (dims(weight) or (0,))[-1])
    bias = None if last is None else other(last, value)
    output = value if last is None else last.outputs[0]
    return Linear(matmul, last, operand(quantize), weight, bias, output)


def rounded_forms(value: ir.Value) -> Iterator[ir.Value]:
    """``value`` after each Q/DQ pair that reads it."""
    for quantize in users(value, "QuantizeLinear"):
        for dequantize in users(quantize.outputs[0], "DequantizeLinear"):
            yield dequantize.outputs[0]


def rounded(value: ir.Value) -> ir.Value:
    """``value`` after a Q/DQ pair that alone reads it, itself without one."""
    quantize = reader(value, "QuantizeLinear")
    dequantize = None if quantize is None else reader(quantize.outputs[0], "DequantizeLinear")
    return value if dequantize is None else dequantize.outputs[0]


def unrounded(value: ir.Value) -> ir.Value:
    """What a Q/DQ pair that gives ``value`` reads; ``value`` itself without one."""
    dequantize = node_of(value, "DequantizeLinear")
    quantize = None if dequantize is None else node_of(dequantize.inputs[0], "QuantizeLinear")
    return value if quantize is None else operand(quantize)


def _vector_added(value: ir.Value, columns: int) -> ir.Node | None:
    """The Add of a constant [N], perhaps a dequantized one, that alone reads ``value``."""
    add = reader(value, "Add")
    if add is None or dims(stored(other(add, value))) != (columns,):
        return None
    return add


def _is_vector(value: ir.Value) -> bool:
    shape = dims(stored(value))
    return shape is not None and len(shape) == 1

"""Linear layers that ``SparseMatMul`` can take the place of, and the replacement."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.arrays import contiguous_copy
from optimizer.custom_ops.declaration import (
    DOMAIN,
    FLOOR,
    MAX_K_INT8,
    OP_TYPE,
    VERSION,
    body,
    declaration_hash,
    overload,
)
from optimizer.custom_ops.packing import pack
from optimizer.linear_layers import SHARED, is_shared, layer_name, linear_at, matches
from optimizer.nodes import dims, node_of, operand, operands, optional, other, reader, users
from optimizer.pass_base import Skip
from optimizer.quantized_parts import quantized_at, scaled_along, stored
from optimizer.structure import Linear

#: The first opset with the operator Gelu, which a body with that activation contains.
GELU_OPSET = 20
_OVERFLOW = f"sums of more than {MAX_K_INT8} int8 products may overflow"


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        name: Of its weight.
        linear: The canonical layer; ``output`` is what is replaced.
        int8: Whether the product is done in int8.
        codes: Initializer int8 [K, N] and ...
        scale: ... float32 [N], of a layer that is int8 already.
        x_scale: Of its input, one number.
        reader: The node whose first input is the layer's; what that is changes when the layer
            before is replaced.
        activation: As in the operator's attribute.
        output: What the operator computes.
    """

    name: str
    linear: Linear
    reader: ir.Node
    int8: bool
    activation: str
    output: ir.Value
    codes: ir.Value | None = None
    scale: ir.Value | None = None
    x_scale: ir.Value | None = None


def find_layers(
    model: ir.Model, precision: str, exclude: tuple[str, ...]
) -> tuple[list[Layer], list[Skip]]:
    """Layers of the main graph in order, and those that cannot be replaced, with the reason."""
    layers: list[Layer] = []
    skipped: list[Skip] = []
    for node in model.graph:
        found = _int8_at(node) or _body_at(node) or _float_at(node, precision)
        if isinstance(found, Layer) and matches(found.linear, exclude):
            found = "excluded"
        if isinstance(found, Layer):
            layers.append(_with_activation(found, model.graph.opset_imports.get("", 23)))
        elif found is not None:
            skipped.append(Skip(layer_name(node), found))
    return layers, skipped


def _float_at(node: ir.Node, precision: str) -> Layer | str | None:
    linear = linear_at(node)
    if not isinstance(linear, Linear):
        return linear
    if is_shared(linear):
        return SHARED
    tensor = graphs.constant(linear.weight)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT:
        return f"its weight is {tensor.dtype.name if tensor else 'unknown'}, expected FLOAT"
    int8 = precision == "int8"
    if int8 and _rows(linear.weight) > MAX_K_INT8:
        return _OVERFLOW
    return Layer(str(linear.weight.name), linear, node, int8, "none", linear.output)


def _rows(weight: ir.Value) -> int:
    shape = dims(weight)
    return 0 if shape is None else shape[0]


def _int8_at(node: ir.Node) -> Layer | str | None:
    """A layer x Q DQ MatMul (W8 DQ) [Add bias]; None for what is no int8 layer."""
    if node.domain != "" or node.op_type != "MatMul":
        return None
    left, weight = operands(node)
    dequantize = node_of(weight, "DequantizeLinear")
    linear = quantized_at(node) if dequantize is not None else None
    if linear is None or dequantize is None:
        return None
    quantize = _quantize(left, linear)
    if isinstance(quantize, str):
        return quantize
    codes = stored(weight)
    if reason := _weight_refusal(weight, codes, dequantize):
        return reason
    if linear.output.producer() not in (node, linear.add):
        return "its output is scaled or rounded by nodes of its own"
    return Layer(
        str(codes.name),
        linear,
        quantize,
        int8=True,
        activation="none",
        output=linear.output,
        codes=codes,
        scale=dequantize.inputs[1],
        x_scale=operand(quantize, 1),
    )


def _quantize(left: ir.Value, linear: Linear) -> ir.Node | str:
    """What rounds a layer's input with one static scale, or why there is no such node."""
    rounded = node_of(left, "DequantizeLinear")
    quantize = None if rounded is None else node_of(rounded.inputs[0], "QuantizeLinear")
    if rounded is None or quantize is None or operand(quantize) is not linear.input:
        return "its input is scaled by nodes of its own; sparse-matmul takes one static scale"
    number = graphs.scalar(quantize.inputs[1])
    if number is None or number != graphs.scalar(rounded.inputs[1]) or _shifted(quantize):
        return "its input has no single symmetric scale"
    return quantize


def _weight_refusal(weight: ir.Value, codes: ir.Value, dequantize: ir.Node) -> str | None:
    tensor = graphs.constant(codes)
    if tensor is None or tensor.dtype != ir.DataType.INT8 or not scaled_along(weight, 1):
        return "its weight is not int8 with a scale per output channel"
    if _shifted(dequantize):
        return "its weight has a zero point"
    return _codes_refusal(codes)


def _codes_refusal(codes: ir.Value) -> str | None:
    if len(codes.uses()) > 1:
        return SHARED
    return _OVERFLOW if _rows(codes) > MAX_K_INT8 else None


def _body_at(node: ir.Node) -> Layer | str | None:
    """A layer spelled as the operator's own int8 body, which is what an earlier run has left.

    Rounding, floor and order of the products are the operator's: the numbers stay the same.
    """
    if node.domain != "" or node.op_type != "MatMulInteger":
        return None
    left, codes = operands(node)
    floats = reader(node.outputs[0], "Cast")
    by_token = None if floats is None else reader(floats.outputs[0], "Mul")
    by_column = None if by_token is None else reader(by_token.outputs[0], "Mul")
    if floats is None or by_token is None or by_column is None or len(node.inputs) > 2:
        return None
    step = other(by_token, floats.outputs[0])
    reads = _rounding(left, step)
    if reads is None:
        return None
    tensor, scale = graphs.constant(codes), other(by_column, by_token.outputs[0])
    columns = dims(codes)
    if tensor is None or tensor.dtype != ir.DataType.INT8 or columns is None:
        return None
    if graphs.constant(scale) is None or dims(scale) != columns[1:]:
        return None
    if reason := _codes_refusal(codes):
        return reason
    output, bias = by_column.outputs[0], None
    add = reader(output, "Add")
    if add is not None:
        bias = other(add, output)
        if graphs.constant(bias) is None or dims(bias) != columns[1:]:
            add, bias = None, None
    linear = Linear(node, add, operand(reads), codes, bias, add.outputs[0] if add else output)
    return Layer(
        str(codes.name), linear, reads, int8=True, activation="none", output=linear.output,
        codes=codes, scale=scale, x_scale=None if graphs.constant(step) is None else step,
    )  # fmt: skip


def _rounding(codes: ir.Value, step: ir.Value) -> ir.Node | None:
    """The node that reads x, of int8 codes that are made as by the operator with this step."""
    chain: list[ir.Node] = []
    value: ir.Value | None = codes
    for op_type in ("Cast", "Clip", "Round", "Mul"):
        node = node_of(value, op_type)
        if node is None:
            return None
        chain.append(node)
        value = node.inputs[0]
    _, clip, _, scaled = chain
    x, inverse = operands(scaled)
    if [graphs.scalar(optional(clip, i)) for i in (1, 2)] != [-128, 127]:
        return None
    number, factor = graphs.scalar(step), graphs.scalar(inverse)
    if number is not None and factor is not None:
        same = number > 0 and np.float32(1) / np.float32(number) == np.float32(factor)
        return scaled if same else None
    reciprocal = node_of(inverse, "Reciprocal")
    divide = node_of(operand(reciprocal), "Div") if reciprocal else None
    floor = node_of(operand(divide), "Max") if divide else None
    if divide is None or divide.outputs[0] is not step:
        return None
    if floor is None or len(floor.inputs) != 2:
        return None
    top = node_of(operand(floor), "ReduceMax")
    size = node_of(operand(top), "Abs") if top else None
    if top is None or size is None or operand(size) is not x:
        return None
    axis = graphs.scalar(optional(top, 1))
    rank = None if x.shape is None else len(x.shape)
    numbers = (graphs.scalar(operand(divide, 1)), graphs.scalar(operand(floor, 1)))
    if numbers != (127, float(np.float32(FLOOR))):
        return None
    last = axis == -1 or (axis is not None and rank is not None and axis == rank - 1)
    keepdims = top.attributes.get("keepdims")
    return size if last and (keepdims is None or keepdims.as_int() == 1) else None


def _shifted(node: ir.Node) -> bool:
    zero = graphs.const(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    return zero is not None and bool(np.any(zero))


def _with_activation(layer: Layer, opset: int) -> Layer:
    """The layer with the activation after it, where one follows and nothing else reads between."""
    value = layer.output
    if relu := reader(value, "Relu"):
        return changed(layer, activation="relu", output=relu.outputs[0])
    gelu = reader(value, "Gelu")
    if gelu is not None and opset >= GELU_OPSET:
        tanh = gelu.attributes.get_string("approximate", "none") == "tanh"
        kind = "gelu_tanh" if tanh else "gelu"
        return changed(layer, activation=kind, output=gelu.outputs[0])
    sigmoid = next(users(value, "Sigmoid"), None)
    if sigmoid is None or value.is_graph_output() or len(value.uses()) != 2:
        return layer
    product = reader(sigmoid.outputs[0], "Mul")
    if product is not None and value in product.inputs:
        return changed(layer, activation="silu", output=product.outputs[0])
    return layer


def shape_of(layer: Layer) -> tuple[int, int]:
    """[K, N] of the weight."""
    weight = graphs.const(layer.codes or layer.linear.weight)
    assert weight is not None  # noqa: S101  (a layer has a constant weight)
    return weight.shape[0], weight.shape[1]


def measured_density(layer: Layer) -> float:
    """Share of the weights that is not zero."""
    weight = graphs.const(layer.codes or layer.linear.weight)
    return 0.0 if weight is None or not weight.size else float(np.mean(weight != 0))


def replace(model: ir.Model, layer: Layer) -> int:
    """Put the operator in the layer's place; returns the bytes of the stored weight."""
    graph, linear = model.graph, layer.linear
    codes, scale = _numbers(layer)
    layout = "n16k4" if layer.int8 else "n64k1"
    packed = pack(codes, layout)
    n = codes.shape[1]

    def constant(part: str, array: np.ndarray) -> ir.Value:
        return graphs.add_initializer(graph, f"{layer.name}.{part}", contiguous_copy(array))

    inputs = [
        operand(layer.reader),
        constant("bitmap", packed.bitmap),
        constant("values", packed.values),
        constant("offsets", packed.offsets),
    ]
    if linear.bias is not None:
        bias = graphs.const(linear.bias)
        inputs.append(
            constant("bias", bias) if bias is not None and bias.ndim != 1 else linear.bias
        )
    elif layer.int8:
        inputs.append(constant("bias", np.zeros(n, np.float32)))
    if scale is not None:
        inputs.append(constant("scale", scale))
    if layer.x_scale is not None:
        number = np.array([graphs.scalar(layer.x_scale)], np.float32)
        inputs.append(constant("x_scale", number))
    attributes: dict[str, Any] = {
        "K": codes.shape[0],
        "N": n,
        "layout": layout,
        "activation": layer.activation,
        "num_inputs": len(inputs),
        "declaration": declaration_hash(),
    }
    anchor = layer.output.producer()
    output = graphs.insert(
        graph, anchor, OP_TYPE, inputs, attributes, domain=DOMAIN,
        name=f"{linear.matmul.name or layer.name}/sparse",
        dtype=ir.DataType.FLOAT, shape=layer.output.shape,
    )  # fmt: skip
    node = output.producer()
    if node is not None:
        node.overload = overload(layout, layer.activation, len(inputs))
    graphs.replace_value(layer.output, output, keep_name=True)
    define(model, layout, layer.activation, len(inputs))
    return packed.nbytes


def _numbers(layer: Layer) -> tuple[np.ndarray, np.ndarray | None]:
    """The weight [K, N] to store, and its scales [N] if it is int8."""
    if layer.codes is not None:
        codes, scale = graphs.const(layer.codes), graphs.const(layer.scale)
        assert codes is not None  # noqa: S101  (found by _int8_at)
        return codes, scale
    weight = graphs.const(layer.linear.weight)
    assert weight is not None  # noqa: S101  (found by _float_at)
    if not layer.int8:
        return weight, None
    top = np.abs(weight).max(axis=0)
    scale = np.where(top > 0, top / 127, 1).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def define(model: ir.Model, layout: str, activation: str, inputs: int) -> None:
    """Add the body of a form of the operator to the model's functions."""
    opset = model.graph.opset_imports.get("", 23)
    function = body(layout, activation, inputs, opset)
    model.functions.setdefault(function.identifier(), function)
    model.graph.opset_imports.setdefault(DOMAIN, VERSION)
    model.ir_version = max(model.ir_version, 10)  # the first with overloads

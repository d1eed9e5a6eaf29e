"""Linear layers that ``SparseMatMul`` can take the place of, and the layout of each."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import replace as changed

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.custom_ops.cuda_layout import check_24
from optimizer.custom_ops.declaration import FLOOR, MAX_K_INT8
from optimizer.half_weights import HALF_TYPES
from optimizer.linear_layers import SHARED, is_shared, layer_name, linear_at, matches
from optimizer.nodes import dims, node_of, operand, operands, optional, other, reader, users
from optimizer.pass_base import Skip
from optimizer.quantized_parts import quantized_at, scaled_along, stored
from optimizer.structure import Linear

#: The first opset with the operator Gelu, which a body with that activation contains.
GELU_OPSET = 20
#: Below this density a bitmap and the values are read faster than pairs of four, half of them
#: zeros (benchmarks/results/gpu.json: 1.5 times as fast as dense, as a bitmap is at 0.2).
_PAIRS = 0.25
_OVERFLOW = f"sums of more than {MAX_K_INT8} int8 products may overflow"


@dataclass(frozen=True)
class Layer:
    """One layer.

    Attributes:
        name: Of its weight.
        linear: The canonical layer; ``output`` is what is replaced.
        int8: Whether the product is done in int8.
        dtype: Of input and output.
        layout: Of the weight that is to be stored.
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
    dtype: ir.DataType = ir.DataType.FLOAT
    layout: str = ""
    codes: ir.Value | None = None
    scale: ir.Value | None = None
    x_scale: ir.Value | None = None


def find_layers(
    model: ir.Model, precision: str, exclude: tuple[str, ...], device: str = "cpu"
) -> tuple[list[Layer], list[Skip]]:
    """Layers of the main graph in order, and those that cannot be replaced, with the reason.

    Args:
        model: A canonical graph.
        precision: "int8" rounds the weights of float layers.
        exclude: Patterns of names of weights.
        device: "cpu" multiplies float32, "cuda" float16 or bfloat16; both int8.
    """
    layers: list[Layer] = []
    skipped: list[Skip] = []
    for node in model.graph:
        found = _int8_at(node) or _body_at(node) or _float_at(node, precision)
        if isinstance(found, Layer) and matches(found.linear, exclude):
            found = "excluded"
        if isinstance(found, Layer):
            found = _with_activation(found, model.graph.opset_imports.get("", 23))
            found = _for_device(found if device == "cpu" else _narrowed(found), device)
        if isinstance(found, Layer):
            layers.append(found)
        elif found is not None:
            skipped.append(Skip(layer_name(node), found))
    return layers, skipped


def _narrowed(layer: Layer) -> Layer:
    """The int8 layer with the Casts around it, where it is float32 between 16 bits.

    So the operator's own body is spelled, of which input and output are of 16 bits.
    """
    widen = node_of(operand(layer.reader), "Cast") if layer.dtype == ir.DataType.FLOAT else None
    narrow = reader(layer.output, "Cast")
    if not layer.int8 or widen is None or narrow is None:
        return layer
    dtype = operand(widen).dtype
    if dtype not in HALF_TYPES or narrow.outputs[0].dtype != dtype:
        return layer
    return changed(layer, reader=widen, output=narrow.outputs[0], dtype=dtype)


def _for_device(layer: Layer, device: str) -> Layer | str:
    """The layer with the layout of the device's kernel, or why there is none."""
    if device == "cpu":
        if layer.dtype != ir.DataType.FLOAT:
            return f"it computes in {layer.dtype.name}, expected FLOAT"
        return changed(layer, layout="n16k4" if layer.int8 else "n64k1")
    if layer.dtype not in HALF_TYPES:
        return (
            f"it computes in {layer.dtype.name}; CUDA kernels take FLOAT16 or BFLOAT16: put fp16 "
            "or bf16 before sparse-matmul"
        )
    pairs = _in_pairs(layer) and measured_density(layer) > _PAIRS
    return changed(layer, layout=("sp" if pairs else "mma") + ("8" if layer.int8 else "16"))


def _in_pairs(layer: Layer) -> bool:
    try:
        check_24(_weight(layer))
    except ValueError:
        return False
    return True


def _float_at(node: ir.Node, precision: str) -> Layer | str | None:
    linear = linear_at(node)
    if not isinstance(linear, Linear):
        return linear
    if is_shared(linear):
        return SHARED
    tensor = graphs.constant(linear.weight)
    if tensor is None or tensor.dtype not in (ir.DataType.FLOAT, *HALF_TYPES):
        return f"its weight is {tensor.dtype.name if tensor else 'unknown'}, expected FLOAT"
    int8 = precision == "int8"
    if int8 and _rows(linear.weight) > MAX_K_INT8:
        return _OVERFLOW
    return Layer(
        str(linear.weight.name), linear, node, int8, "none", linear.output, dtype=tensor.dtype
    )


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
    quantize = _quantize(left)
    if isinstance(quantize, str):
        return quantize
    codes = stored(weight)
    if reason := _weight_refusal(weight, codes, dequantize):
        return reason
    if operand(quantize) is not linear.input or linear.output.producer() not in (node, linear.add):
        # Tokens that nodes of their own scale before and after: the product alone is replaced.
        linear = Linear(node, None, operand(quantize), weight, None, node.outputs[0])
    return Layer(
        str(codes.name),
        linear,
        quantize,
        int8=True,
        activation="none",
        output=linear.output,
        dtype=_type_of(operand(quantize, 1)),
        codes=codes,
        scale=dequantize.inputs[1],
        x_scale=operand(quantize, 1),
    )


def _type_of(value: ir.Value) -> ir.DataType:
    """Of a constant."""
    tensor = graphs.constant(value)
    return ir.DataType.UNDEFINED if tensor is None else tensor.dtype


def _quantize(left: ir.Value) -> ir.Node | str:
    """What rounds a layer's input with one static scale, or why there is no such node."""
    rounded = node_of(left, "DequantizeLinear")
    quantize = None if rounded is None else node_of(rounded.inputs[0], "QuantizeLinear")
    if rounded is None or quantize is None:
        return "its input is not rounded by QuantizeLinear"
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


def _weight(layer: Layer) -> np.ndarray:
    """[K, N]: the codes, of a layer that is int8 already."""
    weight = graphs.const(layer.codes or layer.linear.weight)
    assert weight is not None  # noqa: S101 - a layer has a constant weight
    return weight


def shape_of(layer: Layer) -> tuple[int, int]:
    """[K, N] of the weight."""
    k, n = _weight(layer).shape
    return k, n


def measured_density(layer: Layer) -> float:
    """Share of the weights that is not zero."""
    weight = _weight(layer)
    return float(np.mean(weight != 0)) if weight.size else 0.0

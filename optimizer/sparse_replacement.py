"""Puts ``SparseMatMul`` in the place of a layer that ``sparse_layers`` found."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.arrays import contiguous_copy
from optimizer.custom_ops.bodies import add_body
from optimizer.custom_ops.cuda_layout import LAYOUT_CODES, most_values, pack_cuda
from optimizer.custom_ops.declaration import DOMAIN, OP_TYPE, VERSION, declaration_hash
from optimizer.custom_ops.packing import pack
from optimizer.nodes import operand
from optimizer.sparse_layers import Layer


def replace(model: ir.Model, layer: Layer) -> int:
    """Put the operator in the layer's place; returns the bytes of the stored weight."""
    graph, linear = model.graph, layer.linear
    codes, scale = _numbers(layer)
    layout = layer.layout
    packed = (pack_cuda if layout in LAYOUT_CODES else pack)(codes, layout)
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
        inputs.append(_bias(model, layer, linear.bias))
    elif layer.int8:
        inputs.append(constant("bias", np.zeros(n, layer.dtype.numpy())))
    if scale is not None:
        inputs.append(constant("scale", scale.astype(np.float32)))
    if layer.x_scale is not None:
        number = np.array([graphs.scalar(layer.x_scale)], np.float32)
        inputs.append(constant("x_scale", number))
    attributes: dict[str, Any] = {
        "K": codes.shape[0],
        "N": n,
        "layout": layout,
        "activation": layer.activation,
        "num_inputs": len(inputs),
        "most_values": most_values(packed) if layout in LAYOUT_CODES else 0,
        "declaration": declaration_hash(),
    }
    anchor = layer.output.producer()
    output = graphs.insert(
        graph, anchor, OP_TYPE, inputs, attributes, domain=DOMAIN,
        name=f"{linear.matmul.name or layer.name}/sparse",
        dtype=layer.dtype, shape=layer.output.shape,
    )  # fmt: skip
    node = output.producer()
    assert node is not None  # noqa: S101 - just inserted
    add_body(model, node)
    model.graph.opset_imports.setdefault(DOMAIN, VERSION)
    model.ir_version = max(model.ir_version, 10)  # the first with overloads
    graphs.replace_value(layer.output, output, keep_name=True)
    return packed.nbytes


def _bias(model: ir.Model, layer: Layer, value: ir.Value) -> ir.Value:
    """The bias as one dimension of the type of x."""
    bias = graphs.const(value)
    if bias is None or (bias.ndim == 1 and bias.dtype == layer.dtype.numpy()):
        return value
    array = contiguous_copy(bias.reshape(-1).astype(layer.dtype.numpy()))
    return graphs.add_initializer(model.graph, f"{layer.name}.bias", array)


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
    weight = weight.astype(np.float32)
    top = np.abs(weight).max(axis=0)
    scale = np.where(top > 0, top / 127, 1).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale

"""What the ONNX parser of TensorRT 10.3 (JetPack 6) takes: checked before a bundle is written.

``tensorrt_10_3.json`` records it, with its source. A model that passes may still be refused by the
builder on the device (types of single operators are not recorded), but not for an operator that
its parser does not know.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.custom_ops.cuda_layout import LAYOUT_CODES
from optimizer.custom_ops.declaration import DOMAIN, OP_TYPE
from optimizer.errors import UnsupportedError

_FILE = Path(__file__).with_name("tensorrt_10_3.json")
_STANDARD = ("", "ai.onnx")
_QUANTIZING = ("QuantizeLinear", "DequantizeLinear")


@functools.cache
def _facts() -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(_FILE.read_text("utf-8"))
    return facts


def check_supported(model: ir.Model) -> None:
    """Refuse what the parser would refuse on the device, or read as something else.

    Args:
        model: Lowered for the target ``jetson``; bodies of our own operators do not count.

    Raises:
        UnsupportedError: The first node, initializer, input or output that is not taken.
    """
    found = next(_complaints(model), None)
    if found is not None:
        raise UnsupportedError(
            f"{found}; TensorRT {_facts()['tensorrt']} (JetPack 6) does not take it: lower the "
            "model with --target jetson, or change it where it was exported"
        )


def _complaints(model: ir.Model) -> Iterator[str]:
    opset, most = model.graph.opset_imports.get("", 0), _facts()["opsets"][1]
    if opset > most:
        yield f"the model has opset {opset}, expected at most {most}"
    taken = _facts()["interface_types"]
    for kind, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            if value.dtype is not None and value.dtype.name not in taken:
                yield f"{kind} '{value.name}' is {value.dtype.name}, expected {_either(taken)}"
    for graph in _graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield from _constant(f"initializer '{value.name}'", value.const_value)
    for node in _nodes(model):
        yield from _node(node, model)


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    yield model.graph
    for node in _nodes(model):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield attribute.as_graph()
            elif attribute.type == ir.AttributeType.GRAPHS:
                yield from attribute.as_graphs()


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Of all graphs and functions, without the bodies of our own operator."""
    yield from model.graph.all_nodes()
    for key, function in model.functions.items():
        if key[:2] != (DOMAIN, OP_TYPE):
            yield from function.all_nodes()


def _constant(where: str, tensor: ir.TensorProtocol) -> Iterator[str]:
    taken = _facts()["constant_types"]
    if tensor.dtype.name not in taken:
        yield f"{where} is {tensor.dtype.name}, expected {_either(taken)}"


def _node(node: ir.Node, model: ir.Model) -> Iterator[str]:
    where = f"node '{node.name}' ({node.op_type})"
    if node.domain not in _STANDARD:
        if (node.domain, node.op_type) == (DOMAIN, OP_TYPE):
            layout = node.attributes.get_string("layout", "")
            if layout not in LAYOUT_CODES:
                yield f"{where}: layout '{layout}', expected {_either(list(LAYOUT_CODES))}"
        elif node.op_identifier() not in model.functions:
            yield f"{where} is of the domain '{node.domain}', which has no plugin in the bundle"
        return
    if node.op_type not in _facts()["operators"]:
        yield f"{where}: the parser has no such operator"
        return
    for name in ("value", "value_float", "value_int"):
        value = node.attributes.get(name)
        if value is not None and value.type == ir.AttributeType.TENSOR:
            yield from _constant(where, value.as_tensor())
    yield from _restrictions(node, where)
    if node.op_type in _QUANTIZING:
        yield from _zero_point(node, where)


def _restrictions(node: ir.Node, where: str) -> Iterator[str]:
    facts = _facts()
    for index in facts["constant_inputs"].get(node.op_type, ()):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and graphs.const(value) is None:
            yield f"{where}: input {index} ('{value.name}') is computed, expected a constant"
    for name, only in facts["attributes"].get(node.op_type, {}).items():
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.value != only:
            yield f"{where}: attribute {name} is {attribute.value}, expected {only}"
    if node.op_type in facts["first_output_only"] and any(
        output.uses() or output.is_graph_output() for output in node.outputs[1:]
    ):
        yield f"{where}: an output other than its first is used"
    if node.op_type in ("Cast", "CastLike") and "to" in node.attributes:
        to = ir.DataType(node.attributes.get_int("to", 0)).name
        taken = {*facts["constant_types"], *facts["interface_types"]}
        if to not in taken:
            yield f"{where}: casts to {to}, expected {_either(sorted(taken))}"


def _zero_point(node: ir.Node, where: str) -> Iterator[str]:
    value = node.inputs[2] if len(node.inputs) > 2 else None
    if value is None:
        if node.op_type == "QuantizeLinear" and "output_dtype" not in node.attributes:
            yield f"{where} has no zero point, so its output is UINT8; expected an INT8 zero"
        return
    array = graphs.const(value)
    if array is None:
        yield f"{where}: zero point '{value.name}' is computed, expected zeros"
    elif np.any(array.astype(np.float32) != 0):
        yield f"{where}: zero point '{value.name}' is not zero, expected zeros"


def _either(names: list[str]) -> str:
    return f"one of {', '.join(names)}"

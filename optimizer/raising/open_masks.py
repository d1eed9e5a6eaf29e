"""Leaves out attention masks that cut nothing.

Exporters write a mask for every attention, also where all tokens attend to all: an Expand of True.
Kernels do not know that it changes nothing. ONNX Runtime's CUDA provider has no flash attention
with a mask (32 images through ViT-B in float16 on an H100: 430 us a layer instead of 40).
"""

from __future__ import annotations

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import operand, optional
from optimizer.raising.base import RuleReport, allow
from optimizer.raising.shapes import Shapes

#: What only moves, repeats or leaves out entries of its first input.
_MOVES = frozenset({
    "Cast", "Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose",
    "Unsqueeze",
})  # fmt: skip
#: Inputs of Attention.
_MASK, _PAST = 3, 4
#: Constants above are not read: they are data, not what an exporter makes of one number.
_LARGEST = 2**26


def run(model: ir.Model) -> RuleReport:
    """Remove them from every Attention of the main graph."""
    shapes = Shapes()
    known: dict[ir.Value, bool] = {}
    count = 0
    for node in model.graph:
        if node.op_type != "Attention" or node.domain != "":
            continue
        mask = optional(node, _MASK)
        if mask is None or not _is_open(mask, known) or not _spans(shapes, node, mask):
            continue
        if allow(node, "open mask"):
            node.replace_input_with(_MASK, None)
            if not any(node.inputs[_MASK:]):
                node.resize_inputs(_MASK)
            count += 1
    if count:
        graphs.remove_dead(model)
    return RuleReport(count)


def _spans(shapes: Shapes, node: ir.Node, mask: ir.Value) -> bool:
    """Whether the mask covers all keys. Keys beyond its end would be cut off (Attention-24)."""
    covered, keys = shapes.of(mask), shapes.of(operand(node, 1))
    if optional(node, _PAST) is not None or covered is None or keys is None:
        return False
    return covered[-1:] == keys[-2:-1]


def _is_open(mask: ir.Value, known: dict[ir.Value, bool]) -> bool:
    """Whether every entry is provably True, or a number 0 that is added."""
    if mask not in known:
        known[mask] = _find(mask, known)
    return known[mask]


def _find(mask: ir.Value, known: dict[ir.Value, bool]) -> bool:
    tensor = graphs.constant(mask)
    if tensor is not None:
        return tensor.nbytes <= _LARGEST and _opens(tensor)
    node = mask.producer()
    if node is None or node.domain != "":
        return False
    if node.op_type == "ConstantOfShape":
        value = node.attributes.get_tensor("value", None)
        return value is not None and value.dtype is ir.DataType.BOOL and _opens(value)
    inputs = [value for value in node.inputs if value is not None]
    if node.op_type in ("And", "Add", "Concat"):
        return all(_is_open(value, known) for value in inputs)
    if node.op_type == "Or":
        return any(_is_open(value, known) for value in inputs)
    if node.op_type == "Where":
        condition, chosen, rest = inputs
        only = _is_open(condition, known) and condition.dtype is ir.DataType.BOOL
        return _is_open(chosen, known) and (only or _is_open(rest, known))
    same_kind = inputs and (inputs[0].dtype is ir.DataType.BOOL) == (mask.dtype is ir.DataType.BOOL)
    return node.op_type in _MOVES and bool(same_kind) and _is_open(inputs[0], known)


def _opens(tensor: ir.TensorProtocol) -> bool:
    if tensor.dtype is ir.DataType.BOOL:
        return bool(tensor.numpy().all())
    return tensor.dtype.is_floating_point() and not tensor.numpy().any()

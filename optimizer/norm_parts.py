"""Recognises normalizations in a canonical graph, from the value they compute or the one they read.

A dynamic tanh is told from an activation by its scale: one constant number per channel multiplies
the Tanh, and one constant number at most its input. Whether it stands where a norm stands is up to
the block search, which asks what its input is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import dims, node_of, operand, operands, users
from optimizer.structure import Norm, NormKind, Slot

#: The norms that are one node.
NORMS = {"LayerNormalization": NormKind.LAYER, "RMSNormalization": NormKind.RMS}


def norm(output: ir.Value) -> Norm | None:
    """The normalization over the last axis whose result is ``output``."""
    node = output.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type in NORMS:
        return _one_node(node) if output.index() == 0 else None
    if node.op_type == "Cast":
        return _between_casts(output, operand(node))
    return _dynamic_tanh(node) if node.op_type in ("Add", "Mul") else None


def norms_reading(value: ir.Value) -> Iterator[Norm]:
    """The normalizations of ``value``, those of one node first."""
    ends = [node.outputs[0] for op_type in NORMS for node in users(value, op_type)]
    for cast in users(value, "Cast"):
        inner = (node for op_type in NORMS for node in users(cast.outputs[0], op_type))
        ends.extend(back.outputs[0] for node in inner for back in users(node.outputs[0], "Cast"))
    tanhs = list(users(value, "Tanh"))
    for scaled in users(value, "Mul"):
        tanhs.extend(users(scaled.outputs[0], "Tanh"))
    for tanh in tanhs:
        ends.extend(_end(scaled) for scaled in users(tanh.outputs[0], "Mul"))
    for end in ends:
        found = norm(end)
        if found is not None and found.input is value:
            yield found


def _end(scaled: ir.Node) -> ir.Value:
    """The result of a dynamic tanh from its product with the scale."""
    add = graphs.only_user(scaled.outputs[0])
    if add is not None and add.op_type == "Add" and norm(add.outputs[0]) is not None:
        return add.outputs[0]
    return scaled.outputs[0]


def _one_node(node: ir.Node) -> Norm | None:
    source, scale = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if source is None or scale is None or graphs.constant(scale) is None:
        return None
    if bias is not None and graphs.constant(bias) is None:
        return None
    if node.attributes.get_int("axis", -1) != -1:
        return None
    kind = NORMS[node.op_type]
    return Norm(
        node, kind, source, scale, bias, node.outputs[0],
        epsilon=float(node.attributes.get_float("epsilon", 1e-5)),
        reads=Slot(node, 0),
        scale_slot=Slot(node, 1),
        bias_slot=Slot(node, 2) if kind is NormKind.LAYER else None,
    )  # fmt: skip


def _between_casts(output: ir.Value, wide: ir.Value) -> Norm | None:
    """A norm in a wider type than the value it is of: cast, normalized, cast back."""
    inner = _one_node(node) if (node := node_of(wide, *NORMS)) is not None else None
    cast = None if inner is None else node_of(inner.input, "Cast")
    if inner is None or cast is None or len(wide.uses()) != 1 or wide.is_graph_output():
        return None
    source = operand(cast)
    if source.dtype is None or source.dtype != output.dtype:
        return None
    return replace(inner, input=source, output=output, reads=Slot(cast, 0))


def _dynamic_tanh(last: ir.Node) -> Norm | None:
    """``scale * tanh(alpha * x) + bias`` with the factors and summands in any order."""
    bias_slot, scaled = None, last
    if last.op_type == "Add":
        bias_slot = _vector(last)
        product = None if bias_slot is None else node_of(_beside(bias_slot), "Mul")
        if product is None or graphs.only_user(product.outputs[0]) is not last:
            return None
        scaled = product
    scale_slot = _vector(scaled)
    tanh = None if scale_slot is None else node_of(_beside(scale_slot), "Tanh")
    if tanh is None or scale_slot is None:
        return None
    scale = operand(*scale_slot)
    bias = None if bias_slot is None else operand(*bias_slot)
    if bias is not None and dims(bias) != dims(scale):
        return None
    reads, alpha = _slope(tanh)
    return Norm(
        reads.node, NormKind.TANH, operand(*reads), scale, bias, last.outputs[0],
        epsilon=0.0, reads=reads, scale_slot=scale_slot, bias_slot=bias_slot, alpha=alpha,
    )  # fmt: skip


def _slope(tanh: ir.Node) -> tuple[Slot, float]:
    """Where a Tanh's argument is read before it is multiplied by a number, and the number."""
    product = node_of(operand(tanh), "Mul")
    if product is not None:
        for index, value in enumerate(operands(product)):
            number, shape = graphs.scalar(value), dims(value)
            if number is not None and shape is not None and len(shape) <= 1:
                return Slot(product, 1 - index), float(number)
    return Slot(tanh, 0), 1.0


def _vector(node: ir.Node) -> Slot | None:
    """The operand of a binary node that has one constant number per channel."""
    for index, value in enumerate(operands(node)):
        shape = dims(value)
        if shape is not None and len(shape) == 1 and shape[0] > 1:
            return Slot(node, index)
    return None


def _beside(slot: Slot) -> ir.Value:
    return operands(slot.node)[1 - slot.position]

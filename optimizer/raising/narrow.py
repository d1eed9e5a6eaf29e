"""Copies linear layers, of float or int8, for a choice of their columns.

What follows a product acts on each column by itself as long as the other operands are numbers,
vectors with one number per column, or the product of both::

    MatMul (float weight)                  [Add b] [Q DQ]
    MatMul (dequantized weight)            [Add b] [Q DQ]
    MatMulInteger [Cast] [Mul (s * scales)] [Add b] [Q DQ]

A layer is copied with all of these steps, their vectors cut like the weight. Cutting codes, scales
and zero points alike changes no number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import dims, node_of, operand, operands

_PRODUCTS = frozenset({"MatMul", "MatMulInteger"})
_ROUNDING = frozenset({"DequantizeLinear", "QuantizeLinear"})
#: Cast, Mul, Add, Q, DQ.
_MAX_STEPS = 5


@dataclass(frozen=True)
class Layer:
    """A product by a constant matrix with the steps after it.

    Attributes:
        product: MatMul or MatMulInteger.
        steps: What follows, in order.
        width: N, the number of columns.
    """

    product: ir.Node
    steps: tuple[ir.Node, ...]
    width: int

    @property
    def last(self) -> ir.Node:
        """The node that gives ``output``."""
        return self.steps[-1] if self.steps else self.product

    @property
    def output(self) -> ir.Value:
        """The result, [..., N]."""
        return self.last.outputs[0]


def layer_at(product: ir.Node) -> Layer | None:
    """The layer of a product, None if its columns cannot be told apart."""
    if product.domain != "" or product.op_type not in _PRODUCTS:
        return None
    weight = operand(product, 1)
    node = node_of(weight, "DequantizeLinear")
    shape = dims(weight if node is None else operand(node))
    if shape is None or len(shape) != 2:
        return None
    width = shape[1]
    if not all(_cuttable(value, width) for value in (weight, *product.inputs[3:])):
        return None
    allowed = {"Add", *_ROUNDING}
    if product.op_type == "MatMulInteger":
        allowed |= {"Cast", "Mul"}
    steps: list[ir.Node] = []
    value = product.outputs[0]
    while len(steps) < _MAX_STEPS:
        step = graphs.only_user(value)
        if step is None or step.domain != "" or step.op_type not in allowed:
            break
        if step.op_type in _ROUNDING and not _rounds(step, value):
            break
        if not all(_cuttable(v, width) for v in step.inputs if v is not value):
            break
        steps.append(step)
        value = step.outputs[0]
    return Layer(product, tuple(steps), width)


def _rounds(step: ir.Node, value: ir.Value) -> bool:
    """Whether Q or DQ reads ``value`` as numbers, with one scale or one for each column."""
    if step.inputs[0] is not value:
        return False
    axis, shape = step.attributes.get_int("axis", 1), value.shape
    last = axis == -1 or (shape is not None and axis == len(shape) - 1)
    return last or _is_number(operand(step, 1))


def _cuttable(value: ir.Value | None, width: int) -> bool:
    """Whether it is known what of ``value`` belongs to which column."""
    if value is None or _is_number(value):
        return True
    shape = dims(value)
    if shape is not None:
        return len(shape) in (1, 2) and shape[-1] == width
    node = node_of(value, "DequantizeLinear", "Mul")
    if node is None:
        return False
    if node.op_type == "Mul":
        left, right = operands(node)
        vector = right if _is_number(left) else left
        shape = dims(vector)
        both = _is_number(left) or _is_number(right)
        return both and shape is not None and len(shape) == 1 and shape[0] == width
    codes, scale = operands(node)
    shape, scales = dims(codes), dims(scale)
    if shape is None or scales is None or len(shape) > 2 or shape[-1] != width:
        return False
    by_column = node.attributes.get_int("axis", 1) % len(shape) == len(shape) - 1
    return len(scales) < 2 or not by_column


def _is_number(value: ir.Value) -> bool:
    """Whether it holds a single number, known or not."""
    constant = dims(value)
    shape = value.shape if constant is None else constant
    return shape is not None and len(shape) <= 1 and all(d == 1 for d in shape)


def copy(graph: ir.Graph, layer: Layer, chosen: np.ndarray, number: int) -> ir.Value:
    """The layer's result for some of its columns alone, computed right before its last node.

    Args:
        graph: Of the layer.
        layer: To copy; it stays.
        chosen: [n] the columns, in the order wanted.
        number: Goes into the names.
    """
    cut = _Cut(graph, layer.last, chosen, number)
    product = layer.product
    left, weight, *points = product.inputs
    inputs = [left, cut.of(weight), *points[:1], *map(cut.of, points[1:])]
    old, new = product.outputs[0], cut.node(product, inputs)
    for step in layer.steps:
        new = cut.node(step, [new if v is old else cut.of(v) for v in step.inputs])
        old = step.outputs[0]
    return new


@dataclass(frozen=True)
class _Cut:
    graph: ir.Graph
    anchor: ir.Node
    chosen: np.ndarray
    number: int

    def node(self, old: ir.Node, inputs: list[ir.Value | None]) -> ir.Value:
        """``old`` again, of other inputs."""
        output = old.outputs[0]
        return graphs.insert(
            self.graph, self.anchor, old.op_type, inputs, dict(old.attributes),
            name=f"{output.name}_{self.number}", dtype=output.dtype,
        )  # fmt: skip

    def of(self, value: ir.Value | None) -> ir.Value | None:
        """What of an operand belongs to the chosen columns."""
        if value is None or _is_number(value):
            return value
        shape = dims(value)
        if shape is not None:
            picked = selector(self.chosen)
            size = (*shape[:-1], self.chosen.size)
            tensor = graphs.derived(value, size, lambda array: array[..., picked])
            return graphs.add_initializer(self.graph, f"{value.name}_{self.number}", tensor)
        node = value.producer()
        if node is None:
            msg = f"'{value.name}' has no columns"
            raise ValueError(msg)
        if node.op_type == "Mul":
            return self.node(node, [self.of(v) for v in node.inputs])
        axis = node.attributes.get_int("axis", 1)
        rank = len(dims(operand(node)) or ())
        along_rows = rank == 2 and axis % rank == 0
        inputs = [self.of(node.inputs[0])]
        for part in node.inputs[1:]:
            blocks = part is not None and len(dims(part) or ()) == 2
            inputs.append(part if along_rows and not blocks else self.of(part))
        return self.node(node, inputs)


def selector(chosen: np.ndarray) -> slice | np.ndarray:
    """A slice where the columns are neighbours: a view then, not a copy."""
    first, last = int(chosen[0]), int(chosen[-1])
    whole = np.array_equal(chosen, np.arange(first, last + 1))
    return slice(first, last + 1) if whole else chosen

"""The constants of a dynamic tanh get their plainest shapes.

Rewrite:      scale * tanh(alpha * x) + bias with alpha [1, .., 1], scale and bias [1, .., D]
              -> alpha [], scale and bias [D]
Applies when: x has at least as many axes as the constant, so that no axis is lost, and D is the
              size of its last axis, so that none is widened
Exactness:    bitwise
Source:       Zhu et al., Transformers without Normalization (2025), eq. 1
"""

from __future__ import annotations

from functools import partial

import onnx_ir as ir

from optimizer.graph import (
    add_initializer,
    constant,
    derived,
    inherit_name,
    only_user,
)
from optimizer.nodes import node_of
from optimizer.raising.base import RuleReport, sweep
from optimizer.raising.dims import Shape
from optimizer.raising.shapes import Shapes


def run(model: ir.Model) -> RuleReport:
    """Apply the rule at every Tanh."""
    return sweep(model, {"Tanh": partial(_plain, shapes=Shapes())})


def _plain(tanh: ir.Node, shapes: Shapes) -> bool:
    shape = shapes.of(tanh.inputs[0])
    scaled = [use.node for use in tanh.outputs[0].uses() if use.node.op_type == "Mul"]
    if not shape or not scaled:
        return False
    changed = False
    for product in scaled:
        if not _has_vector(product, shape):
            continue
        changed |= _flatten(product, shape)
        add = only_user(product.outputs[0])
        if add is not None and add.op_type == "Add":
            changed |= _flatten(add, shape)
        slope = node_of(tanh.inputs[0], "Mul")
        if slope is not None:
            changed |= _unwrap(slope, shapes)
    return changed


def _has_vector(node: ir.Node, shape: Shape) -> bool:
    return any(_is_vector(value, shape) for value in node.inputs)


def _is_vector(value: ir.Value | None, shape: Shape) -> bool:
    tensor = constant(value)
    if tensor is None:
        return False
    own = tuple(tensor.shape.numpy())
    return 0 < len(own) <= len(shape) and own[-1] == tensor.size == shape[-1] and own[-1] > 1


def _flatten(node: ir.Node, shape: Shape) -> bool:
    """[1, .., D] -> [D]."""
    for index, value in enumerate(node.inputs):
        tensor = constant(value)
        if tensor is not None and _is_vector(value, shape) and len(tensor.shape) > 1:
            return _replace(node, index, (tensor.size,))
    return False


def _unwrap(node: ir.Node, shapes: Shapes) -> bool:
    """[1, .., 1] -> []."""
    for index, value in enumerate(node.inputs):
        tensor, other = constant(value), shapes.of(node.inputs[1 - index])
        if (
            tensor is not None
            and tensor.size == 1
            and other
            and 0 < len(tensor.shape) <= len(other)
        ):
            return _replace(node, index, ())
    return False


def _replace(node: ir.Node, index: int, shape: tuple[int, ...]) -> bool:
    graph, old = node.graph, node.inputs[index]
    if old is None or not isinstance(graph, ir.Graph):
        return False
    tensor = derived(old, shape, lambda array: array.reshape(shape))
    new = add_initializer(graph, old.name or "dynamic_tanh", tensor)
    node.replace_input_with(index, new)
    inherit_name(graph, old, new)
    return True

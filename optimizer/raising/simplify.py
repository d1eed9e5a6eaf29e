"""Nodes that compute nothing go away, constant operands come second.

Rewrite:      Identity, Dropout at inference, Cast to the type it has, a Cast to a wider type before
              another, Transpose pairs, x + 0 and x * 1 go away; Sum of two -> Add; CastLike of a
              known type -> Cast; c + x -> x + c
Applies when: always, except where it would rename a graph input or output
Exactness:    bitwise (x + 0 turns -0 into 0)
"""

from __future__ import annotations

import onnx_ir as ir

from optimizer.graph import const, constant, insert, replace_value, scalar
from optimizer.nodes import node_of
from optimizer.raising.base import LocalRule, RuleReport, sweep
from optimizer.raising.reshapes import bypass

_MAX_SWEEPS = 8
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
#: The types that hold every number of another: a Cast to them loses nothing.
_HOLD_ALL: dict[ir.DataType | None, tuple[ir.DataType, ...]] = {
    ir.DataType.FLOAT16: _FLOATS,
    ir.DataType.BFLOAT16: _FLOATS,
    ir.DataType.FLOAT: (ir.DataType.DOUBLE,),
}


def run(model: ir.Model) -> RuleReport:
    """Apply the rules below until nothing changes."""
    total = 0
    for _ in range(_MAX_SWEEPS):
        report = sweep(model, _RULES)
        total += report.applied
        if not report.applied:
            break
    return RuleReport(total)


def _dropout(node: ir.Node) -> bool:
    training = const(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    if len(node.inputs) > 2 and node.inputs[2] is not None and (training is None or training.any()):
        return False
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return False
    return bypass(node)


def _cast(node: ir.Node) -> bool:
    source = node.inputs[0]
    if source is None or source.dtype is None:
        return False
    if source.dtype == ir.DataType(node.attributes["to"].as_int()):
        return bypass(node)
    inner = node_of(source, "Cast")
    before = None if inner is None else inner.inputs[0]
    if before is None or source.dtype not in _HOLD_ALL.get(before.dtype, ()):
        return False
    if node.attributes["to"].as_int() == ir.DataType.STRING:  # more digits of a wider type
        return False
    node.replace_input_with(0, before)
    return True


def _cast_like(node: ir.Node) -> bool:
    source, like, output, graph = node.inputs[0], node.inputs[1], node.outputs[0], node.graph
    if source is None or like is None or like.dtype is None or not isinstance(graph, ir.Graph):
        return False
    if source.dtype == like.dtype:
        return bypass(node)
    attributes: dict[str, int] = {"to": int(like.dtype)}
    if "saturate" in node.attributes:
        attributes["saturate"] = node.attributes["saturate"].as_int()
    new = insert(
        graph, node, "Cast", (source,), attributes, name=output.name, dtype=like.dtype,
        shape=output.shape,
    )  # fmt: skip
    replace_value(output, new, keep_name=True)
    return True


def _transpose(node: ir.Node) -> bool:
    perm = node.attributes.get_ints("perm", None)
    if perm is None:
        return False
    if list(perm) == list(range(len(perm))):
        return bypass(node)
    inner = node_of(node.inputs[0], "Transpose")
    first = None if inner is None else inner.attributes.get_ints("perm", None)
    if inner is None or first is None or inner.inputs[0] is None or len(first) != len(perm):
        return False
    order = [first[axis] for axis in perm]
    node.attributes["perm"] = ir.AttrInt64s("perm", order)
    node.replace_input_with(0, inner.inputs[0])
    if order == list(range(len(order))):
        bypass(node)
    return True


def _concat(node: ir.Node) -> bool:
    return len(node.inputs) == 1 and bypass(node)


def _sum(node: ir.Node) -> bool:
    if len(node.inputs) == 1:
        return bypass(node)
    graph, output = node.graph, node.outputs[0]
    if len(node.inputs) != 2 or not isinstance(graph, ir.Graph):
        return False
    new = insert(
        graph, node, "Add", node.inputs, name=output.name, dtype=output.dtype, shape=output.shape
    )
    replace_value(output, new, keep_name=True)
    return True


def _neutral(number: float, *, commutes: bool) -> LocalRule:
    """X + 0, x - 0, x * 1, x / 1 for a constant that does not widen x by broadcasting."""

    def rule(node: ir.Node) -> bool:
        first, second = node.inputs
        if commutes and constant(first) is not None and constant(second) is None:
            node.replace_input_with(0, second)
            node.replace_input_with(1, first)
            return True
        for kept, dropped in ((0, 1), (1, 0)) if commutes else ((0, 1),):
            value, other = node.inputs[kept], node.inputs[dropped]
            if value is None or other is None or constant(value) is not None:
                continue
            if scalar(other) != number or value.shape is None or other.shape is None:
                continue
            if len(other.shape) <= len(value.shape):
                return bypass(node, kept)
        return False

    return rule


_RULES: dict[str, LocalRule] = {
    "Identity": bypass,
    "Dropout": _dropout,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Transpose": _transpose,
    "Concat": _concat,
    "Sum": _sum,
    "Add": _neutral(0, commutes=True),
    "Sub": _neutral(0, commutes=False),
    "Mul": _neutral(1, commutes=True),
    "Div": _neutral(1, commutes=False),
}

"""Computes on [B, H, ..] what an exporter computes on [B*H, ..], heads counted as batch.

Rewrite: f(Reshape(x, [B*H, S, c])) -> Reshape(f(x), [B*H, ..]) for x [B, H, S, c]: products of two
         values flattened alike, transposes, activations, Softmax, sums with a mask or a bias. The
         Reshape wanders down until it meets the one that restores the heads, and both go away
         (``reshapes``).
Applies when: the first axis is proven to be the product of the two before, and f keeps it
Exactness: bitwise
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import node_of, operand, perm
from optimizer.raising import dims as dims_
from optimizer.raising.base import RuleReport, attempt
from optimizer.raising.rows import BINARY, UNARY
from optimizer.raising.shapes import Shapes

_RANK = 3


def run(model: ir.Model) -> RuleReport:
    """Move every Reshape of the main graph that merges two leading axes."""
    graph, shapes = model.graph, Shapes()
    applied = 0
    for node in list(graph):
        if node.domain == "" and len(node.outputs) == 1:
            applied += attempt(node, _move, graph, shapes, node)
    if applied:
        graphs.remove_dead(graph)
    return RuleReport(applied)


def _merged(shapes: Shapes, value: ir.Value | None) -> ir.Value | None:
    """X [B, H, S, c] where ``value`` is [B*H, S, c]."""
    reshape = node_of(value, "Reshape", "Flatten")
    source = None if reshape is None else operand(reshape)
    before, after = shapes.of(source), shapes.of(value)
    if before is None or after is None or (len(before), len(after)) != (_RANK + 1, _RANK):
        return None
    whole = before[2:] == after[1:] and dims_.multiply(*before[:2]) == after[0]
    return source if whole and before[1] != 1 else None


def _move(graph: ir.Graph, shapes: Shapes, node: ir.Node) -> bool:
    output = node.outputs[0]
    if output.is_graph_output() or len(shapes.of(output) or ()) != _RANK:
        return False
    sources = [_merged(shapes, value) for value in node.inputs]
    first = next((source for source in sources if source is not None), None)
    if first is None:
        return False
    inputs = _split_inputs(graph, shapes, node, sources, first)
    attributes = _attributes(node)
    if inputs is None or attributes is None:
        return False
    wide = graphs.insert(
        graph, node, node.op_type, inputs, attributes, name=f"{output.name}_split",
        dtype=output.dtype,
    )  # fmt: skip
    target = _merged_target(graph, shapes, node, wide, operand(node, sources.index(first)))
    flat = graphs.insert(
        graph, node, "Reshape", [wide, target], name=f"{output.name}_merged", dtype=output.dtype
    )
    graphs.replace_value(output, flat, keep_name=True)
    return True


def _attributes(node: ir.Node) -> dict[str, object] | None:
    """With axes counted in the higher rank; None where the first axis is not kept."""
    attributes: dict[str, object] = dict(node.attributes)
    if node.op_type == "Transpose":
        order = perm(node, _RANK)
        if order[0] != 0:
            return None
        return {"perm": [0, 1, *(axis + 1 for axis in order[1:])]}
    if node.op_type == "Softmax":
        if node.attributes.get_int("axis", -1) % _RANK == 0:
            return None
        return {"axis": node.attributes.get_int("axis", -1) % _RANK - _RANK}
    return attributes


def _split_inputs(
    graph: ir.Graph,
    shapes: Shapes,
    node: ir.Node,
    sources: list[ir.Value | None],
    first: ir.Value,
) -> list[ir.Value | None] | None:
    """The inputs with heads and batch apart; None where the node mixes them."""
    if node.op_type in UNARY or node.op_type in ("Softmax", "Transpose"):
        return [first, *node.inputs[1:]] if sources[0] is first else None
    if node.op_type == "MatMul":
        return list(sources) if all(_same_lead(shapes, s, first) for s in sources) else None
    if node.op_type not in (*BINARY, "Where"):
        return None
    found = [
        _other(graph, shapes, node, value, source, first)
        for value, source in zip(node.inputs, sources, strict=True)
    ]
    return None if any(value is None for value in found) else found


def _same_lead(shapes: Shapes, source: ir.Value | None, first: ir.Value) -> bool:
    left, right = shapes.of(source), shapes.of(first)
    return left is not None and right is not None and left[:2] == right[:2]


def _other(
    graph: ir.Graph,
    shapes: Shapes,
    node: ir.Node,
    value: ir.Value | None,
    source: ir.Value | None,
    first: ir.Value,
) -> ir.Value | None:
    """An operand of an element-wise node in the higher rank."""
    if source is not None:
        return source if _same_lead(shapes, source, first) else None
    own, lead = shapes.of(value), shapes.of(first)
    if value is None or own is None or lead is None:
        return None
    if len(own) < _RANK or own[0] == 1:  # broadcasts over the first axis in either rank
        return value
    if own[0] != dims_.multiply(*lead[:2]):
        return None
    if not isinstance(lead[1], int):
        return None
    integers = ir.DataType.INT64
    heads = graphs.add_initializer(graph, "heads", np.array([lead[1]], np.int64))
    both = _dims_of(graph, node, value, 0, 1)
    batch = graphs.insert(graph, node, "Div", [both, heads], dtype=integers)
    rest = _dims_of(graph, node, value, 1, _RANK)
    target = graphs.insert(graph, node, "Concat", [batch, heads, rest], {"axis": 0}, dtype=integers)
    name = f"{value.name}_split"
    return graphs.insert(graph, node, "Reshape", [value, target], name=name, dtype=value.dtype)


def _dims_of(graph: ir.Graph, node: ir.Node, value: ir.Value, start: int, end: int) -> ir.Value:
    return graphs.insert(
        graph, node, "Shape", [value], {"start": start, "end": end}, name=f"{value.name}_dims",
        dtype=ir.DataType.INT64,
    )  # fmt: skip


def _merged_target(
    graph: ir.Graph, shapes: Shapes, node: ir.Node, wide: ir.Value, merged: ir.Value
) -> ir.Value:
    """[B*H, S, T] for [B, H, S, T], where ``merged`` is [B*H, ..]."""
    sizes = (shapes.of(wide) or ())[2:]
    if all(isinstance(size, int) and size > 0 for size in sizes):
        whole = np.array([-1, *(size for size in sizes if isinstance(size, int))], np.int64)
        return graphs.add_initializer(graph, "merged", whole)
    leading = _dims_of(graph, node, merged, 0, 1)
    rest = _dims_of(graph, node, wide, 2, _RANK + 1)
    return graphs.insert(
        graph, node, "Concat", [leading, rest], {"axis": 0}, dtype=ir.DataType.INT64
    )

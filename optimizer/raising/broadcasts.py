"""Masks looked up by index grids become masks that broadcast.

Rewrite:      GatherND(m, grid of all indices (i, j, ...)) -> Unsqueeze(m), cut by Slice to the
              lengths of the grid where those are not proven to be m's own;
              Unsqueeze(Unsqueeze(x)) -> Unsqueeze(x); x And true -> x;
              Tile along axes of size 1 -> Expand
Applies when: the grid is a Concat of Range(0, n, 1), one per axis of m, each along one axis of the
              result, in order; the result has no other axis longer than 1
Exactness:    bitwise. A lookup beyond the end of m fails; a cut does not, and the shorter mask is
              refused by whatever combines it with another (or broadcasts, where it has length 1)
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from optimizer.graph import add_initializer, constant, insert, replace_value, scalar
from optimizer.nodes import node_of, operand
from optimizer.raising.base import LocalRule, RuleReport, opset_of, sweep
from optimizer.raising.reshapes import bypass
from optimizer.raising.shape_rules import axes_of
from optimizer.raising.shapes import Shapes

#: Since then Unsqueeze takes its axes as an input.
_OPSET = 13


def run(model: ir.Model) -> RuleReport:
    """Apply the rules to the main graph; what they write exists from opset 13 on."""
    if opset_of(model) < _OPSET:
        return RuleReport()
    shapes = Shapes()
    rules: dict[str, LocalRule] = {
        "GatherND": lambda node: _gather(shapes, node),
        "Unsqueeze": lambda node: _unsqueeze(shapes, node),
        "And": _and,
        "Tile": lambda node: _tile(shapes, node),
    }
    return sweep(model, rules)


def _and(node: ir.Node) -> bool:
    """A constant true of one element that adds no axis."""
    for kept, dropped in ((0, 1), (1, 0)):
        value, other = operand(node, kept), operand(node, dropped)
        if constant(value) is not None or value.shape is None or other.shape is None:
            continue
        if len(other.shape) <= len(value.shape) and scalar(other) is not None and scalar(other):
            return bypass(node, kept)
    return False


def _tile(shapes: Shapes, node: ir.Node) -> bool:
    """Repeats of what has one element along the axis are a broadcast."""
    source, repeats = shapes.of(operand(node)), shapes.vector(operand(node, 1))
    if source is None or repeats is None or len(source) != len(repeats):
        return False
    if any(count != 1 and size != 1 for size, count in zip(source, repeats, strict=True)):
        return False
    graph, output = node.graph, node.outputs[0]
    if not isinstance(graph, ir.Graph):
        return False
    new = insert(
        graph, node, "Expand", node.inputs[:2], name=output.name, dtype=output.dtype,
        shape=output.shape,
    )  # fmt: skip
    replace_value(output, new, keep_name=True)
    return True


def _axes(shapes: Shapes, node: ir.Node) -> list[int] | None:
    """The axes an Unsqueeze adds, from 0, in the rank of its output."""
    stored, shape = axes_of(node, 1), shapes.of(node.outputs[0])
    if stored is None or shape is None:
        return None
    return sorted(axis % len(shape) for axis in stored)


def _unsqueeze(shapes: Shapes, node: ir.Node) -> bool:
    inner = node_of(operand(node), "Unsqueeze")
    if inner is None or not isinstance(node.graph, ir.Graph):
        return False
    added, before = _axes(shapes, node), _axes(shapes, inner)
    result = shapes.of(node.outputs[0])
    if added is None or before is None or result is None:
        return False
    kept = [axis for axis in range(len(result)) if axis not in added]
    axes = sorted([*added, *(kept[axis] for axis in before)])
    _write_unsqueeze(node.graph, node, operand(inner), axes)
    return True


def _write_unsqueeze(graph: ir.Graph, node: ir.Node, value: ir.Value, axes: list[int]) -> None:
    """Replace the output of ``node`` by ``value`` with ``axes`` added."""
    output = node.outputs[0]
    where = add_initializer(graph, "axes", np.array(axes, np.int64))
    new = insert(
        graph, node, "Unsqueeze", [value, where], name=output.name, dtype=output.dtype,
        shape=output.shape,
    )  # fmt: skip
    replace_value(output, new, keep_name=True)


def _gather(shapes: Shapes, node: ir.Node) -> bool:
    graph, data = node.graph, operand(node)
    lengths, result = shapes.of(data), shapes.of(node.outputs[0])
    if node.attributes.get_int("batch_dims", 0) or lengths is None or result is None:
        return False
    grids = _grids(shapes, operand(node, 1), len(lengths), len(result))
    if grids is None or not isinstance(graph, ir.Graph):
        return False
    places = [place for place, _ in grids]
    if places != sorted(set(places)):
        return False
    if any(size != 1 for axis, size in enumerate(result) if axis not in places):
        return False
    cut = []
    for axis, (_, limit) in enumerate(grids):
        if shapes.vector(limit) != (lengths[axis],):
            cut.append((axis, limit))
    if cut:
        data = _slice(graph, node, data, cut)
    _write_unsqueeze(graph, node, data, [a for a in range(len(result)) if a not in places])
    return True


def _grids(
    shapes: Shapes, indices: ir.Value, rank: int, result_rank: int
) -> list[tuple[int, ir.Value]] | None:
    """Per axis of the data, the axis of the result it runs along and its length (a scalar)."""
    joined, shape = node_of(indices, "Concat"), shapes.of(indices)
    if joined is None or shape is None or len(joined.inputs) != rank or shape[-1] != rank:
        return None
    if joined.attributes["axis"].as_int() % len(shape) != len(shape) - 1:
        return None
    found = []
    for column in range(rank):
        last = node_of(operand(joined, column), "Unsqueeze")
        if last is None or _axes(shapes, last) != [len(shape) - 1]:
            return None
        grid = operand(last)
        expanded = node_of(grid, "Expand")
        run_along = _range(shapes, grid if expanded is None else operand(expanded), result_rank)
        if run_along is None:
            return None
        found.append(run_along)
    return found


def _range(shapes: Shapes, grid: ir.Value, result_rank: int) -> tuple[int, ir.Value] | None:
    """(axis, length) of Range(0, length, 1) laid along one axis of the result."""
    shape = shapes.of(grid)
    if shape is None or len(shape) > result_rank:
        return None
    kept = list(range(result_rank - len(shape), result_rank))
    while (spread := node_of(grid, "Unsqueeze")) is not None:
        axes = _axes(shapes, spread)
        if axes is None:
            return None
        kept = [place for axis, place in enumerate(kept) if axis not in axes]
        grid = operand(spread)
    source = node_of(grid, "Range")
    if source is None or len(kept) != 1:
        return None
    start, step = scalar(operand(source)), scalar(operand(source, 2))
    return (kept[0], operand(source, 1)) if (start, step) == (0, 1) else None


def _slice(
    graph: ir.Graph, node: ir.Node, data: ir.Value, cut: list[tuple[int, ir.Value]]
) -> ir.Value:
    """``data[:n]`` on each axis in ``cut``."""
    ends = [_vector(graph, node, limit) for _, limit in cut]
    end = ends[0]
    if len(ends) > 1:
        end = insert(graph, node, "Concat", ends, {"axis": 0}, dtype=ir.DataType.INT64)
    zeros = add_initializer(graph, "starts", np.zeros(len(cut), np.int64))
    axes = add_initializer(graph, "axes", np.array([axis for axis, _ in cut], np.int64))
    return insert(graph, node, "Slice", [data, zeros, end, axes], dtype=data.dtype)


def _vector(graph: ir.Graph, node: ir.Node, limit: ir.Value) -> ir.Value:
    """The scalar as a vector of one; where it came from one, that."""
    squeezed = node_of(limit, "Squeeze")
    if squeezed is not None:
        before = operand(squeezed)
        if before.shape is not None and before.shape.rank() == 1:
            return before
    axis = add_initializer(graph, "axes", np.zeros(1, np.int64))
    return insert(graph, node, "Unsqueeze", [limit, axis], dtype=ir.DataType.INT64)

"""Follows the columns of a linear layer through reshapes, transposes and selections."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import operand, perm
from optimizer.raising.dims import Dim, Shape
from optimizer.raising.shape_rules import numbers, slice_bounds
from optimizer.raising.shapes import Shapes

_RESHAPES = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})


@dataclass(frozen=True)
class Columns:
    """Which column of a linear layer is where in a value made from its result.

    Attributes:
        value: The value.
        order: For each of its axes the leading axis (batch, sequence, ...) of the layer's result it
            is, or None for an axis along which columns lie.
        index: The columns, with one axis for each None in ``order``.
    """

    value: ir.Value
    order: tuple[int | None, ...]
    index: np.ndarray

    @property
    def in_place(self) -> bool:
        """Whether the value has the shape of a linear layer's result: [..., columns]."""
        rank = len(self.order) - 1
        return self.order == (*range(rank), None)


def start(value: ir.Value, rank: int, width: int) -> Columns:
    """The result of a linear layer: [..., width]."""
    return Columns(value, (*range(rank - 1), None), np.arange(width))


def through(shapes: Shapes, columns: Columns, node: ir.Node) -> Columns | None:
    """The columns after a node that moves numbers but drops none; None for any other node."""
    if node.domain != "" or operand(node) is not columns.value:
        return None
    if node.op_type == "Transpose":
        return _transposed(columns, node)
    if node.op_type in _RESHAPES:
        return _reshaped(shapes, columns, node.outputs[0])
    return None


def _transposed(columns: Columns, node: ir.Node) -> Columns:
    axes = perm(node, len(columns.order))
    places = _places(columns.order)
    order = tuple(columns.order[axis] for axis in axes)
    moved = [places[axis] for axis in axes if columns.order[axis] is None]
    return Columns(node.outputs[0], order, columns.index.transpose(moved))


def _places(order: tuple[int | None, ...]) -> dict[int, int]:
    """Axis of the value -> axis of the index."""
    axes = [axis for axis, lead in enumerate(order) if lead is None]
    return {axis: place for place, axis in enumerate(axes)}


def _reshaped(shapes: Shapes, columns: Columns, output: ir.Value) -> Columns | None:
    """A reshape that keeps every leading axis and regroups the axes of columns between them."""
    source, target = shapes.of(columns.value), shapes.of(output)
    if source is None or target is None:
        return None
    remaining = list(target)
    order: list[int | None] = []
    sizes: list[int] = []
    places = iter(columns.index.shape)
    pending = 1  # product of the column axes not yet matched with axes of the target
    for axis, lead in enumerate(columns.order):
        if lead is None:
            pending *= next(places)
            continue
        if not _take_columns(remaining, pending, order, sizes, stop=source[axis]):
            return None
        pending = 1
        if not remaining or remaining[0] != source[axis]:
            return None
        remaining.pop(0)
        order.append(lead)
    if not _take_columns(remaining, pending, order, sizes, stop=None) or remaining:
        return None
    return Columns(output, tuple(order), columns.index.reshape(sizes))


def _take_columns(
    remaining: list[Dim],
    product: int,
    order: list[int | None],
    sizes: list[int],
    stop: Dim | None,
) -> bool:
    """Match leading axes of ``remaining`` with columns: their sizes must multiply to ``product``.

    Axes of size 1 that follow go along unless the next leading axis (of size ``stop``) is one.
    """
    while product > 1 or (remaining and remaining[0] == 1 and stop != 1):
        size = remaining[0] if remaining else None
        if not isinstance(size, int) or size < 1 or product % size:
            return False
        remaining.pop(0)
        product //= size
        order.append(None)
        sizes.append(size)
    return True


def parts(shapes: Shapes, columns: Columns, node: ir.Node) -> list[Columns] | None:
    """What a node selects along an axis of columns; None for a node that is no such selection."""
    shape = shapes.of(columns.value)
    if shape is None or node.domain != "" or operand(node) is not columns.value:
        return None
    chosen: list[tuple[ir.Value, slice | int]]
    match node.op_type:
        case "Split":
            axis = node.attributes.get_int("axis", 0) % len(shape)
            found = _split(shapes, node, axis)
        case "Slice":
            bounds = slice_bounds(node, len(shape))
            if bounds is None or len(bounds) != 1 or bounds[0][1].step != 1:
                return None
            axis, part = bounds[0]
            found = [(node.outputs[0], part)]
        case "Gather":
            axis = node.attributes.get_int("axis", 0) % len(shape)
            found = _gather(node)
        case "GatherND":
            axis, found = 0, _gather_nd(node)
        case _:
            return None
    if found is None or columns.order[axis] is not None:
        return None
    chosen = found
    place = _places(columns.order)[axis]
    return [_select(columns, value, axis, place, part) for value, part in chosen]


def _split(shapes: Shapes, node: ir.Node, axis: int) -> list[tuple[ir.Value, slice | int]] | None:
    result: list[tuple[ir.Value, slice | int]] = []
    position = 0
    for output in node.outputs:
        shape: Shape = shapes.of(output) or ()
        size = shape[axis] if shape else None
        if not isinstance(size, int):
            return None
        result.append((output, slice(position, position + size)))
        position += size
    return result


def _gather(node: ir.Node) -> list[tuple[ir.Value, slice | int]] | None:
    """One index; the axis stays only if the index is a vector."""
    index, tensor = numbers(node.inputs[1]), graphs.constant(node.inputs[1])
    if index is None or tensor is None or len(index) != 1:
        return None
    if len(tensor.shape) == 0:
        return [(node.outputs[0], index[0])]
    if len(tensor.shape) > 1:
        return None
    end = index[0] + 1
    return [(node.outputs[0], slice(index[0], end if end else None))]


def _gather_nd(node: ir.Node) -> list[tuple[ir.Value, slice | int]] | None:
    """One index of the first axis, which stays."""
    index, tensor = numbers(node.inputs[1]), graphs.constant(node.inputs[1])
    if index is None or tensor is None or node.attributes.get_int("batch_dims", 0) != 0:
        return None
    if list(tensor.shape) != [1, 1]:
        return None
    end = index[0] + 1
    return [(node.outputs[0], slice(index[0], end if end else None))]


def _select(columns: Columns, value: ir.Value, axis: int, place: int, part: slice | int) -> Columns:
    if isinstance(part, int):
        index = columns.index.take(part, axis=place)
        return Columns(value, columns.order[:axis] + columns.order[axis + 1 :], index)
    key = (slice(None),) * place + (part,)
    return Columns(value, columns.order, columns.index[key])

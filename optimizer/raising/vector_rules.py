"""How the numbers in small integer tensors follow from the inputs of a node (see ``shapes``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import node_of
from optimizer.raising import dims
from optimizer.raising.dims import Dim, Shape
from optimizer.raising.shape_rules import numbers, reduced_axes, slice_bounds, unknown

if TYPE_CHECKING:
    from optimizer.raising.shapes import Shapes

#: Longer conditions choose between no sizes.
_MAX_CHOICES = 64


def _vector_of_shape(shapes: Shapes, node: ir.Node) -> Shape | None:
    shape = shapes.of(node.inputs[0])
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    return None if shape is None else shape[start:end]


def _vector_of_concat(shapes: Shapes, node: ir.Node) -> Shape | None:
    parts = [shapes.vector_within(v) for v in node.inputs]
    known = [part for part in parts if part is not None]
    return sum(known, ()) if len(known) == len(parts) else None


def _vector_of_gather(shapes: Shapes, node: ir.Node) -> Shape | None:
    source, index = shapes.vector_within(node.inputs[0]), numbers(node.inputs[1])
    return None if source is None or index is None else tuple(source[i] for i in index)


def _vector_of_slice(shapes: Shapes, node: ir.Node) -> Shape | None:
    source, bounds = shapes.vector_within(node.inputs[0]), slice_bounds(node, 1)
    return None if source is None or bounds is None else source[bounds[0][1]]


def _vector_of_sum(shapes: Shapes, node: ir.Node) -> Shape | None:
    left, right = (shapes.vector_within(v) for v in node.inputs)
    if left is None or right is None:
        return None
    size = max(len(left), len(right))
    left, right = (s * size if len(s) == 1 else s for s in (left, right))
    operation = _ARITHMETIC[node.op_type]
    return tuple(operation(a, b) for a, b in zip(left, right, strict=True))


def _vector_of_quotient(shapes: Shapes, node: ir.Node) -> Shape | None:
    left, right = (shapes.vector_within(v) for v in node.inputs)
    if left is None or right is None or len(right) != 1:
        return None
    quotients = [dims.divide(dim, right[0]) for dim in left]
    sizes = all(dims.never_negative(dim) for dim in (*left, *right))
    if None in quotients and not (sizes and _is_integer(node)):
        return None  # what gets a symbol of its own must be a size, and whole
    return tuple(
        unknown(node.outputs[0], index) if quotient is None else quotient
        for index, quotient in enumerate(quotients)
    )


def _is_integer(node: ir.Node) -> bool:
    """Whether a quotient is rounded."""
    dtype = next((v.dtype for v in (*node.outputs, *node.inputs) if v and v.dtype), None)
    return dtype is not None and dtype.is_integer()


def _vector_of_product(shapes: Shapes, node: ir.Node) -> Shape | None:
    source = shapes.vector_within(node.inputs[0])
    removed = reduced_axes(node, 1)
    if source is None or removed is None:
        return None
    return (dims.product(source),) if removed else source


def _vector_of_choice(shapes: Shapes, node: ir.Node) -> Shape | None:
    """Where(c, x, y) if each c is known."""
    chosen = _choices(shapes, node.inputs[0])
    vectors = [shapes.vector_within(v) for v in node.inputs[1:]]
    if chosen is None or None in vectors or None in chosen:
        return None
    rows = _rows(chosen, *(v for v in vectors if v is not None))
    return tuple(same if first else other for first, same, other in rows)


def _vector_of_extreme(shapes: Shapes, node: ir.Node) -> Shape | None:
    """Min or Max of sizes: a size nothing else is known about, unless all are numbers."""
    vectors = [shapes.vector_within(v) for v in node.inputs]
    known = [v for v in vectors if v is not None and all(map(dims.never_negative, v))]
    if len(known) != len(vectors):
        return None
    pick = min if node.op_type == "Min" else max
    return tuple(
        pick(n for n in sizes if isinstance(n, int))
        if all(isinstance(n, int) for n in sizes)
        else unknown(node.outputs[0], index)
        for index, sizes in enumerate(_rows(*known))
    )


def _choices(shapes: Shapes, condition: ir.Value | None) -> list[bool | None] | None:
    """The elements of a condition, a constant or a == b: None what may be both. No size is < 0."""
    tensor = graphs.constant(condition)
    if tensor is not None:
        short = len(tensor.shape) <= 1 and tensor.size <= _MAX_CHOICES
        return [bool(c) for c in tensor.numpy().flat] if short else None
    equal = None if condition is None else node_of(condition, "Equal")
    if equal is None:
        return None
    left, right = (shapes.vector_within(v) for v in equal.inputs)
    if left is None or right is None:
        return None
    return [True if a == b else False if _differ(a, b) else None for a, b in _rows(left, right)]


def _rows(*vectors: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Elements that meet where vectors are broadcast."""
    size = max(map(len, vectors))
    return zip(*(list(v) * size if len(v) == 1 else v for v in vectors), strict=True)


def _differ(left: Dim, right: Dim) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        return left != right
    number, size = (left, right) if isinstance(left, int) else (right, left)
    if not isinstance(number, int) or isinstance(size, int):
        return False
    return number < 0 and all(count > 0 for _, count in size)


def vector_of_split(shapes: Shapes, node: ir.Node, value: ir.Value) -> Shape | None:
    """The part of a vector that ``value``, one output of a Split, is."""
    source = shapes.vector_within(node.inputs[0])
    sizes = numbers(node.inputs[1]) if len(node.inputs) > 1 else None
    index = value.index()
    if source is None or sizes is None or index is None:
        return None
    start = sum(sizes[:index])
    return source[start : start + sizes[index]]


def _vector_unchanged(shapes: Shapes, node: ir.Node) -> Shape | None:
    return shapes.vector_within(node.inputs[0])


#: Types that hold every size a tensor can have in practice; bool or int8 do not.
_WIDE = frozenset(
    {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.FLOAT, ir.DataType.DOUBLE}
)  # fmt: skip
#: Float32 holds every integer up to here.
_EXACT = 2**24


def _vector_of_cast(shapes: Shapes, node: ir.Node) -> Shape | None:
    vector = shapes.vector_within(node.inputs[0])
    target = ir.DataType(node.attributes["to"].as_int())
    if vector is None or target not in _WIDE:
        return None
    small = target is ir.DataType.INT64 or all(
        not isinstance(dim, int) or abs(dim) <= _EXACT for dim in vector
    )
    return vector if small else None


_ARITHMETIC: dict[str, Callable[[Dim, Dim], Dim]] = {
    "Add": dims.add,
    "Mul": dims.multiply,
    "Sub": dims.subtract,
}
VECTOR_RULES: dict[str, Callable[[Shapes, ir.Node], Shape | None]] = {
    "Add": _vector_of_sum,
    "Cast": _vector_of_cast,
    "Concat": _vector_of_concat,
    "Div": _vector_of_quotient,
    "Gather": _vector_of_gather,
    "Identity": _vector_unchanged,
    "Max": _vector_of_extreme,
    "Min": _vector_of_extreme,
    "Mul": _vector_of_sum,
    "ReduceProd": _vector_of_product,
    "Reshape": _vector_unchanged,
    "Shape": _vector_of_shape,
    "Slice": _vector_of_slice,
    "Squeeze": _vector_unchanged,
    "Sub": _vector_of_sum,
    "Unsqueeze": _vector_unchanged,
    "Where": _vector_of_choice,
}

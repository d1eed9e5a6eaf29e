"""How the numbers in small integer tensors follow from the inputs of a node (see ``shapes``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_ir as ir

from optimizer.raising import dims
from optimizer.raising.dims import Dim, Shape
from optimizer.raising.shape_rules import numbers, reduced_axes, slice_bounds, unknown

if TYPE_CHECKING:
    from optimizer.raising.shapes import Shapes


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
    """Where(a == b, x, y) if each pair is known to be equal or not: no size is negative."""
    equal = node.inputs[0].producer() if node.inputs[0] is not None else None
    if equal is None or equal.op_type != "Equal" or equal.domain != "":
        return None
    vectors = [shapes.vector_within(v) for v in (*equal.inputs, *node.inputs[1:])]
    known = [vector for vector in vectors if vector is not None]
    size = max((len(vector) for vector in known), default=0)
    if len(known) != len(vectors):
        return None
    left, right, same, other = (v * size if len(v) == 1 else v for v in known)
    result = []
    for a, b, x, y in zip(left, right, same, other, strict=True):
        if a != b and not _differ(a, b):
            return None
        result.append(x if a == b else y)
    return tuple(result)


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

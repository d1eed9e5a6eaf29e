"""How each operator's output shape follows from its inputs (see ``shapes``).

A rule may assume a valid node: whatever it raises on an invalid one counts as "not known".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.raising import dims
from optimizer.raising.dims import Dim, Shape

if TYPE_CHECKING:
    from optimizer.raising.shapes import Shapes

#: Longer integer vectors than this are data, not shapes.
_MAX_VECTOR = 16
#: A Slice that ends here or later ends with the axis, whatever its length; with steps backwards it
#: is empty by the standard, and to ONNX Runtime everything before the start.
_FAR = 2**31 - 1


def unknown(value: ir.Value, axis: int) -> Dim:
    """A dimension nothing is known about."""
    return dims.fresh(f"{value.name}.{axis}")


def joined(
    sizes: Sequence[Dim], value: ir.Value, axis: int, capped: Mapping[Dim, Dim] | None = None
) -> Dim:
    """The dimension that results from broadcasting ``sizes``.

    ``capped`` maps the size d of a Slice of the first E of n to E: beside E, d is E or 1 (anything
    else does not broadcast), so the result is E.
    """
    distinct = [size for size in dict.fromkeys(sizes) if size != 1]
    distinct = [size for size in distinct if (capped or {}).get(size) not in distinct]
    if len(distinct) <= 1:
        return distinct[0] if distinct else 1
    numbers = [size for size in distinct if isinstance(size, int)]
    # A symbol beside a number n > 1 is 1 or n, so the result is n; of two symbols either may be 1.
    return numbers[0] if numbers else unknown(value, axis)


def numbers(value: ir.Value | None) -> list[int] | None:
    """The numbers in a constant integer vector or scalar."""
    tensor = graphs.constant(value)
    if tensor is None or tensor.size > _MAX_VECTOR:
        return None
    return [int(n) for n in tensor.numpy().reshape(-1)]


def axes_of(node: ir.Node, index: int) -> list[int] | None:
    """Axes of an operator that takes them as an input, or as an attribute before opset 13."""
    if len(node.inputs) > index and node.inputs[index] is not None:
        return numbers(node.inputs[index])
    axes = node.attributes.get_ints("axes", None)
    return None if axes is None else list(axes)


def reduced_axes(node: ir.Node, rank: int) -> set[int] | None:
    """The axes that a reduction is over, None where they are computed."""
    axes = axes_of(node, 1)
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        return None
    if not axes:
        return set() if node.attributes.get_int("noop_with_empty_axes", 0) else set(range(rank))
    return {axis % rank for axis in axes}


def slice_bounds(node: ir.Node, rank: int) -> list[tuple[int, slice]] | None:
    """(axis, slice) pairs of a Slice with constant bounds that mean the same to everybody."""
    if len(node.inputs) < 3:
        return None
    vectors = [numbers(v) if v is not None else [] for v in node.inputs[1:]]
    if any(v is None for v in vectors):
        return None
    starts, ends, axes, steps = ([v or [] for v in vectors] + [[], []])[:4]
    axes = axes or list(range(len(starts)))
    steps = steps or [1] * len(starts)
    if any(s < 0 and (e >= _FAR or b < -1) for b, e, s in zip(starts, ends, steps, strict=False)):
        return None
    return [
        (axis % rank, slice(start, end, step))
        for start, end, axis, step in zip(starts, ends, axes, steps, strict=True)
    ]


def _matmul(shapes: Shapes, node: ir.Node, value: ir.Value) -> Shape | None:
    left, right = shapes.of(node.inputs[0]), shapes.of(node.inputs[1])
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    batch = shapes.broadcast(value, [left[:-2], right[:-2]])
    return None if batch is None else (*batch, left[-2], right[-1])


def _dynamic_quantize(shapes: Shapes, node: ir.Node, value: ir.Value) -> Shape | None:
    return shapes.of(node.inputs[0]) if value.index() == 0 else ()


def _gemm(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    left, right = shapes.of(node.inputs[0]), shapes.of(node.inputs[1])
    if left is None or right is None:
        return None
    rows = left[1] if node.attributes.get_int("transA", 0) else left[0]
    return rows, right[0] if node.attributes.get_int("transB", 0) else right[1]


def _gather(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    data, index = shapes.of(node.inputs[0]), shapes.of(node.inputs[1])
    if data is None or index is None:
        return None
    axis = node.attributes.get_int("axis", 0) % len(data)
    return *data[:axis], *index, *data[axis + 1 :]


def _gather_nd(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    data, index = shapes.of(node.inputs[0]), shapes.of(node.inputs[1])
    if data is None or index is None or not isinstance(index[-1], int):
        return None
    batch = node.attributes.get_int("batch_dims", 0)
    return *index[:-1], *data[batch + index[-1] :]


def _reshape(shapes: Shapes, node: ir.Node, value: ir.Value) -> Shape | None:
    target = shapes.vector_within(node.inputs[1])
    if target is None:
        return None
    source = shapes.of(node.inputs[0])
    result = list(target)
    if not node.attributes.get_int("allowzero", 0):
        for axis, dim in enumerate(result):
            if dim == 0:
                result[axis] = unknown(value, axis) if source is None else source[axis]
    if -1 in result:
        axis = result.index(-1)
        rest = [dim for dim in result if dim != -1]
        total = None if source is None else dims.left_over(source, rest)
        result[axis] = unknown(value, axis) if total is None else total
    return tuple(result) if source is None else dims.balanced(result, source)


def _transpose(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    source = shapes.of(node.inputs[0])
    if source is None:
        return None
    order = node.attributes.get_ints("perm", tuple(reversed(range(len(source)))))
    return tuple(source[axis] for axis in order)


def _unsqueeze(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    source, axes = shapes.of(node.inputs[0]), axes_of(node, 1)
    if source is None or axes is None:
        return None
    rank = len(source) + len(axes)
    added = {axis % rank for axis in axes}
    if len(added) != len(axes):
        return None
    rest = iter(source)
    return tuple(1 if axis in added else next(rest) for axis in range(rank))


def _flatten(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    source = shapes.of(node.inputs[0])
    if source is None:
        return None
    axis = node.attributes.get_int("axis", 1)
    axis = axis + len(source) if axis < 0 else axis
    return dims.product(source[:axis]), dims.product(source[axis:])


def _squeeze(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    source, axes = shapes.of(node.inputs[0]), axes_of(node, 1)
    if source is None:
        return None
    if axes is None:
        known = all(isinstance(dim, int) for dim in source)
        return tuple(dim for dim in source if dim != 1) if known else None
    removed = {axis % len(source) for axis in axes}
    return tuple(dim for axis, dim in enumerate(source) if axis not in removed)


def _concat(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    parts = [shapes.of(v) for v in node.inputs]
    first = parts[0]
    if first is None:
        return None
    axis = node.attributes["axis"].as_int() % len(first)
    total: Dim = 0
    for part in parts:
        if part is None:
            return None
        total = dims.add(total, part[axis])
    return *first[:axis], total, *first[axis + 1 :]


def _slice(shapes: Shapes, node: ir.Node, value: ir.Value) -> Shape | None:
    source = shapes.of(node.inputs[0])
    if source is None:
        return None
    bounds = slice_bounds(node, len(source))
    if bounds is None:
        return _slice_by_values(shapes, node, value, source)
    result = list(source)
    for axis, part in bounds:
        size = source[axis]
        if isinstance(size, int):
            result[axis] = len(range(size)[part])
        elif not _is_everything(part):
            result[axis] = unknown(value, axis)
    return tuple(result)


def _slice_by_values(shapes: Shapes, node: ir.Node, value: ir.Value, source: Shape) -> Shape:
    """A Slice whose bounds are computed."""
    axes = numbers(node.inputs[3]) if len(node.inputs) > 3 else None
    touched = range(len(source)) if axes is None else [axis % len(source) for axis in axes]
    start, end = (shapes.vector_within(v) for v in node.inputs[1:3])
    steps = numbers(node.inputs[4]) if len(node.inputs) > 4 else [1]
    single = len(touched) == 1 and steps == [1]
    if single and start is not None and end is not None:
        known = dims.never_negative(start[0]) and dims.never_negative(end[0])
        if known:
            shapes.capped[unknown(value, touched[0])] = dims.subtract(end[0], start[0])
    return tuple(unknown(value, a) if a in touched else d for a, d in enumerate(source))


def _is_everything(part: slice) -> bool:
    return bool(part.start == 0 and part.step == 1 and part.stop >= _FAR)


def _split(shapes: Shapes, node: ir.Node, value: ir.Value) -> Shape | None:
    source = shapes.of(node.inputs[0])
    if source is None:
        return None
    axis, index = node.attributes.get_int("axis", 0) % len(source), value.index() or 0
    size, count = source[axis], len(node.outputs)
    given = node.inputs[1] if len(node.inputs) > 1 else None
    sizes = numbers(given) or node.attributes.get_ints("split", None)  # before opset 13
    part: Dim = unknown(value, axis)
    if sizes is not None:
        part = sizes[index]
    elif given is None and isinstance(size, int):  # equal, only the last one may be smaller
        each = -(-size // count)
        part = min(each, size - each * index)
    return *source[:axis], part, *source[axis + 1 :]


def _expand(shapes: Shapes, node: ir.Node, value: ir.Value) -> Shape | None:
    source, target = shapes.of(node.inputs[0]), shapes.vector_within(node.inputs[1])
    return shapes.broadcast(value, [source, target])


def _tile(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    source, repeats = shapes.of(node.inputs[0]), shapes.vector_within(node.inputs[1])
    if source is None or repeats is None:
        return None
    return tuple(dims.multiply(size, count) for size, count in zip(source, repeats, strict=True))


def _shape(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    vector = shapes.vector_within(node.outputs[0])
    return None if vector is None else (len(vector),)


def _range(shapes: Shapes, node: ir.Node, value: ir.Value) -> Shape:
    start, limit, step = (shapes.vector_within(v) for v in node.inputs)
    if start == (0,) and step == (1,) and limit is not None:
        return limit
    return (unknown(value, 0),)


def _constant_of_shape(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    return shapes.vector_within(node.inputs[0])


def _attention(shapes: Shapes, node: ir.Node, value: ir.Value) -> Shape | None:
    query, values = shapes.of(node.inputs[0]), shapes.of(node.inputs[2])
    if query is None or values is None or value.index() != 0:
        return None
    if len(query) == 4:
        return *query[:3], values[3]
    heads = node.attributes["q_num_heads"].as_int()
    head = dims.divide(values[2], node.attributes["kv_num_heads"].as_int())
    return None if head is None else (*query[:2], dims.multiply(head, heads))


def _conv(shapes: Shapes, node: ir.Node, value: ir.Value) -> Shape | None:
    source, weight = shapes.of(node.inputs[0]), shapes.of(node.inputs[1])
    if source is None or weight is None:
        return None
    return source[0], weight[0], *_windows(node, value, source[2:], weight[2:])


def _pool(shapes: Shapes, node: ir.Node, value: ir.Value) -> Shape | None:
    source = shapes.of(node.inputs[0])
    if source is None or node.attributes.get_int("ceil_mode", 0) != 0:
        return None
    kernel = node.attributes["kernel_shape"].as_ints()
    return *source[:2], *_windows(node, value, source[2:], tuple(kernel))


def _windows(node: ir.Node, value: ir.Value, sizes: Shape, kernels: Shape) -> list[Dim]:
    """How many windows a Conv or a pooling places along each spatial axis."""
    rank = len(sizes)
    strides = node.attributes.get_ints("strides", (1,) * rank)
    dilations = node.attributes.get_ints("dilations", (1,) * rank)
    pads = node.attributes.get_ints("pads", (0,) * (2 * rank))
    auto = node.attributes.get_string("auto_pad", "NOTSET")
    result: list[Dim] = []
    for axis, (size, kernel) in enumerate(zip(sizes, kernels, strict=True)):
        if not isinstance(size, int) or not isinstance(kernel, int):
            result.append(unknown(value, axis + 2))
        elif auto.startswith("SAME"):
            result.append(-(-size // strides[axis]))
        else:
            padding = pads[axis] + pads[axis + rank] if auto == "NOTSET" else 0
            room = size + padding - dilations[axis] * (kernel - 1) - 1
            result.append(room // strides[axis] + 1)
    return result


def _like_index(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    return shapes.of(node.inputs[1])


def _reduce(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    source = shapes.of(node.inputs[0])
    if source is None or (removed := reduced_axes(node, len(source))) is None:
        return None
    keep = node.attributes.get_int("keepdims", 1)
    kept = [1 if axis in removed else dim for axis, dim in enumerate(source)]
    return tuple(dim for axis, dim in enumerate(kept) if keep or axis not in removed)


Rule = Callable[["Shapes", ir.Node, ir.Value], Shape | None]
RULES: dict[str, Rule] = {
    "Attention": _attention,
    "AveragePool": _pool,
    "Concat": _concat,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _like_index,
    "GatherND": _gather_nd,
    "Gemm": _gemm,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "MaxPool": _pool,
    "Range": _range,
    "ReduceMax": _reduce,
    "ReduceMean": _reduce,
    "ReduceMin": _reduce,
    "ReduceProd": _reduce,
    "ReduceSum": _reduce,
    "Reshape": _reshape,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}


def _grouped(shapes: Shapes, node: ir.Node, value: ir.Value) -> Shape | None:
    query = shapes.of(node.inputs[0])
    if query is None or value.index() != 0 or node.inputs[1] is None:
        return None
    return query


def _reordered(shapes: Shapes, node: ir.Node, value: ir.Value) -> Shape | None:
    """From a layout in blocks of channels back to the model's own."""
    source = shapes.of(node.inputs[0])
    if source is None or value.index() != 0:
        return None
    channels = node.attributes.get_int("channels", 0)
    if node.attributes.get_int("channels_last", 0):
        return source[0], *source[2:], channels
    return source[0], channels, *source[2:]


_BLOCKED = "com.microsoft.nchwc"
#: Of operators that ONNX Runtime adds.
CONTRIB_RULES: dict[tuple[str, str], Rule] = {
    ("com.microsoft", "GroupQueryAttention"): _grouped,
    (_BLOCKED, "AveragePool"): _pool,
    (_BLOCKED, "Conv"): _conv,
    (_BLOCKED, "MaxPool"): _pool,
    (_BLOCKED, "ReorderOutput"): _reordered,
}

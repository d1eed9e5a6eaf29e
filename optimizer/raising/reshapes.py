"""Shape arithmetic is computed where it is known, and reshapes get constant targets.

Rewrite:      Reshape(x, Concat(Shape(x)[0], Shape(x)[1], 12, 64)) -> Reshape(x, [0, 0, 12, 64])
              Reshape(Reshape(x)) -> Reshape(x); reshapes, expands and slices that change nothing
              go away; collapse, transpose, restore -> one Transpose;
              Concat with an operand without elements -> without it
Applies when: the symbolic shapes (``optimizer.raising.shapes``) prove it
Exactness:    bitwise
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from optimizer.graph import add_initializer, const, constant, insert, replace_value
from optimizer.nodes import node_of
from optimizer.raising import shape_rules
from optimizer.raising.base import LocalRule, Miss, RuleReport, allow, sweep
from optimizer.raising.constants import make_initializer
from optimizer.raising.dims import Shape
from optimizer.raising.shapes import Shapes

_ARITHMETIC = frozenset(
    {"Shape", "Gather", "Slice", "Concat", "Squeeze", "Unsqueeze", "Cast", "Reshape", "Size"}
    | {"Add", "Mul", "Sub", "Div", "Identity", "Where"}
)
_INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32})


def run(model: ir.Model) -> RuleReport:
    """Fold shape arithmetic, then simplify what moves no numbers."""
    folded = _fold_arithmetic(model.graph, Shapes())
    shapes = Shapes()
    rules: dict[str, LocalRule] = {
        "Reshape": _with(shapes, _reshape),
        "Flatten": _with(shapes, _reshape),
        "Expand": _with(shapes, _expand),
        "Slice": _with(shapes, _slice),
        "Squeeze": _with(shapes, _unchanged),
        "Unsqueeze": _with(shapes, _unchanged),
        "Transpose": _with(shapes, _restore),
        "Concat": _with(shapes, _concat),
    }
    return RuleReport.total([RuleReport(folded), sweep(model, rules)])


def _with(shapes: Shapes, rule: Callable[[ir.Node, Shapes], bool | Miss]) -> LocalRule:
    return lambda node: rule(node, shapes)


def _fold_arithmetic(graph: ir.Graph, shapes: Shapes) -> int:
    """Known integer vectors become constants, equal ones are computed once."""
    count = 0
    seen: dict[tuple[Shape, Shape, ir.DataType], ir.Value] = {}
    for node in graph:
        if node.domain or node.op_type not in _ARITHMETIC or len(node.outputs) != 1:
            continue
        output = node.outputs[0]
        dtype = output.dtype or (ir.DataType.INT64 if node.op_type == "Shape" else None)
        if dtype not in _INTEGERS or dtype is None or output.is_graph_output():
            continue
        shape, vector = shapes.of(output), shapes.vector(output)
        if shape is None or vector is None or len(shape) > 1:
            continue
        numbers = [dim for dim in vector if isinstance(dim, int)]
        if len(numbers) == len(vector):
            if not allow(node):
                continue
            array = np.array(numbers, dtype=dtype.numpy())
            make_initializer(graph, output, ir.Tensor(array.reshape(()) if not shape else array))
            graph.remove(node, safe=True)
            count += 1
            continue
        first = seen.setdefault((vector, shape, dtype), output)
        if first is not output and allow(node):
            replace_value(output, first)
            graph.remove(node, safe=True)
            count += 1
    return count


def _unchanged(node: ir.Node, shapes: Shapes) -> bool:
    """Remove a node whose output provably is its input."""
    source, output = node.inputs[0], node.outputs[0]
    if source is None or not shapes.same(source, output):
        return False
    return bypass(node)


def bypass(node: ir.Node, index: int = 0) -> bool:
    """Let users of the first output of ``node`` read one of its inputs, where names allow it."""
    source, output = node.inputs[index], node.outputs[0]
    if source is None or not _replaces(source, output):
        return False
    replace_value(output, source)
    return True


def _replaces(value: ir.Value, output: ir.Value) -> bool:
    """Whether no Identity is needed to let ``value`` stand for ``output``."""
    fixed = value.is_graph_input() or value.is_initializer() or value.is_graph_output()
    return not (output.is_graph_output() and fixed)


def _reshape(node: ir.Node, shapes: Shapes) -> bool:
    if _unchanged(node, shapes):
        return True
    source = node.inputs[0]
    outer = shapes.of(node.outputs[0])
    if source is None or outer is None:
        return False
    sources = [source]
    while (inner := node_of(sources[-1], "Reshape", "Flatten", "Squeeze", "Unsqueeze")) and (
        inner.inputs[0] is not None
    ):
        sources.append(inner.inputs[0])
    for value in reversed(sources):
        if shapes.same(value, node.outputs[0]) and _replaces(value, node.outputs[0]):
            replace_value(node.outputs[0], value)
            return True
        target = _target(shapes.of(value), outer)
        if target is not None and (_infers(node, shapes) or not _ambiguous(target)):
            return _set_target(node, value, target)
    return False


def _target(source: Shape | None, result: Shape) -> list[int] | None:
    """What to ask a Reshape of ``source`` for, None where it cannot be said with constants."""
    target: list[int] = []
    for axis, dim in enumerate(result):
        if isinstance(dim, int):
            if dim <= 0:  # would be read as "copy" or "infer"
                return None
            target.append(dim)
        elif source is not None and axis < len(source) and source[axis] == dim:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None


def _ambiguous(target: list[int]) -> bool:
    """Whether a target infers one size beside another that it copies.

    Where the copied size is 0, any other would do, and no runtime chooses one.
    """
    return -1 in target and 0 in target


def _infers(node: ir.Node, shapes: Shapes) -> bool:
    """Whether a Reshape asks for an inferred size itself."""
    target = shapes.vector(node.inputs[1]) if node.op_type == "Reshape" else None
    return target is not None and -1 in target


def _set_target(node: ir.Node, source: ir.Value, target: list[int]) -> bool:
    graph = node.graph
    current = const(node.inputs[1]) if node.op_type == "Reshape" else None
    same = current is not None and current.tolist() == target
    strict = node.attributes.get_int("allowzero", 0) == 1
    if (same and source is node.inputs[0] and not strict) or not isinstance(graph, ir.Graph):
        return False
    shape = _constant_vector(graph, node, target)
    output = node.outputs[0]
    new = insert(
        graph, node, "Reshape", (source, shape), name=output.name, dtype=output.dtype,
        shape=output.shape,
    )  # fmt: skip
    replace_value(output, new, keep_name=True)
    return True


def _constant_vector(graph: ir.Graph, node: ir.Node, numbers: list[int]) -> ir.Value:
    name = f"{node.outputs[0].name}/shape"
    return add_initializer(graph, name, np.array(numbers, dtype=np.int64))


def _expand(node: ir.Node, shapes: Shapes) -> bool:
    if _unchanged(node, shapes):
        return True
    source, result = shapes.of(node.inputs[0]), shapes.of(node.outputs[0])
    graph = node.graph
    if source is None or result is None or constant(node.inputs[1]) is not None:
        return False
    padded = (1,) * (len(result) - len(source)) + source
    target = [1 if old == new else new for old, new in zip(padded, result, strict=True)]
    numbers = [dim for dim in target if isinstance(dim, int)]
    if len(numbers) != len(target) or not isinstance(graph, ir.Graph):
        return False
    node.replace_input_with(1, _constant_vector(graph, node, numbers))
    return True


def _slice(node: ir.Node, shapes: Shapes) -> bool:
    steps = shape_rules.numbers(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] else [1]
    backwards = steps is None or any(step < 0 for step in steps)
    if not backwards and _unchanged(node, shapes):
        return True
    source = shapes.of(node.inputs[0])
    bounds = [shapes.vector(value) for value in node.inputs[1:]]
    if source is None or len(bounds) < 2 or bounds[0] is None or bounds[1] is None:
        return False
    starts, ends = bounds[0], bounds[1]
    axes = bounds[2] if len(bounds) > 2 else tuple(range(len(starts)))
    if axes is None or steps is None or any(step != 1 for step in steps):
        return False
    for start, end, axis in zip(starts, ends, axes, strict=True):
        if start != 0 or not isinstance(axis, int) or not -len(source) <= axis < len(source):
            return False
        if source[axis] != end:
            return False
    return bypass(node)


def _concat(node: ir.Node, shapes: Shapes) -> bool:
    """Leave out what has no elements; one operand alone is the result."""
    sizes = [shapes.of(value) for value in node.inputs]
    axis = node.attributes["axis"].as_int()
    kept = [
        value
        for value, size in zip(node.inputs, sizes, strict=True)
        if size is None or not -len(size) <= axis < len(size) or size[axis] != 0
    ]
    graph, output = node.graph, node.outputs[0]
    if len(kept) in (0, len(node.inputs)) or not isinstance(graph, ir.Graph):
        return False
    if len(kept) == 1:
        return bypass(node, node.inputs.index(kept[0]))
    new = insert(
        graph, node, "Concat", kept, dict(node.attributes.items()), name=output.name,
        dtype=output.dtype, shape=output.shape,
    )  # fmt: skip
    replace_value(output, new, keep_name=True)
    return True


def _restore(node: ir.Node, shapes: Shapes) -> bool:
    """Reshape(Transpose(Reshape(x))) that treats leading dimensions as one.

    x (d1, .., dk, rest) -> (d1*..*dk, rest) -> rest permuted -> (d1, .., dk, permuted rest)
    """
    before = node_of(node.inputs[0], "Reshape")
    users = {use.node for use in node.outputs[0].uses()}
    after = next((user for user in users if user.op_type == "Reshape"), None)
    perm = node.attributes.get_ints("perm", None)
    if before is None or after is None or len(users) != 1 or not perm or perm[0] != 0:
        return False
    inner, outer = before.inputs[0], after.outputs[0]
    shape, middle, result = (shapes.of(v) for v in (inner, before.outputs[0], outer))
    if shape is None or middle is None or result is None or len(shape) != len(result):
        return False
    lead = len(shape) - len(middle) + 1
    order = (*range(lead), *(axis + lead - 1 for axis in perm[1:]))
    if lead < 1 or shape[lead:] != middle[1:] or result != tuple(shape[axis] for axis in order):
        return False
    graph = node.graph
    if not isinstance(graph, ir.Graph):
        return False
    new = insert(
        graph, after, "Transpose", (inner,), {"perm": order}, name=outer.name, dtype=outer.dtype,
        shape=outer.shape,
    )  # fmt: skip
    replace_value(outer, new, keep_name=True)
    return True

"""Decomposed normalizations become LayerNormalization and RMSNormalization over the last axis.

Rewrite:      x / sqrt(mean(x^2) + eps) * w -> RMSNormalization(x, w)
              d = x - mean(x);  d / sqrt(mean(d^2) + eps) * w + b -> LayerNormalization(x, w, b)
              in every order of factors: division, reciprocal or power -1/2; w first or last; w and
              b folded into the factors (x * (r * w) + (b - mean * (r * w))); casts to float around
              Norm(x, 1) * w -> Norm(x, w);  LayerNormalization(x, w) + b
              RMSNormalization(x - mean(x), w) -> LayerNormalization(x, w)
              Norm(Transpose(x), w) -> Transpose(Norm(x, w)): heads are found by their layout
Applies when: the mean is over the last axis only, eps is one constant number, w and b are constant
              vectors of its size, and no value in between is read by anything else
Exactness:    reassociated
Source:       Ba et al., Layer Normalization (2016), eq. 4; Zhang and Sennrich, Root Mean Square
              Layer Normalization (2019), eq. 4; stash_type = 1 is the ONNX name for float inside
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import onnx_ir as ir

from optimizer.graph import (
    add_initializer,
    const,
    constant,
    derived,
    inherit_name,
    insert,
    only_user,
    replace_value,
    scalar,
)
from optimizer.nodes import node_of, optional, other, perm, reader
from optimizer.raising.base import Miss, RuleReport, site, sweep
from optimizer.raising.dims import Dim, Shape
from optimizer.raising.norm_builder import Builder, Core, finite, shared_by, vector
from optimizer.raising.shapes import Shapes

#: A scale of ones is made for norms without one: not for whatever size a file declares.
_MAX_WIDTH = 1 << 22


def run(model: ir.Model) -> RuleReport:
    """Raise decomposed norms, then bring existing ones into the canonical form."""
    rules = {"Sqrt": partial(_raise, shapes=Shapes()), "Pow": partial(_raise, shapes=Shapes())}
    raised = sweep(model, rules)
    shapes = Shapes()
    existing = {
        "LayerNormalization": partial(_existing, shapes=shapes),
        "RMSNormalization": partial(_existing, shapes=shapes),
    }
    return RuleReport.total([raised, sweep(model, existing)])


def _raise(node: ir.Node, shapes: Shapes) -> bool | Miss:
    if node.op_type == "Pow" and scalar(node.inputs[1]) != -0.5:
        return False
    variance = _variance(node)
    if variance is None:
        return False
    mean_square, epsilon = variance
    squared = mean_square.inputs[0]
    source = _squared(squared)
    if source is None or squared is None:
        return False
    shape = shapes.of(source)
    if shape is None or not _over_last_axis(mean_square, len(shape)):
        return Miss(site(node), "the mean of squares is not over the last axis alone")
    if not isinstance(shape[-1], int) or shape[-1] > _MAX_WIDTH:
        return Miss(site(node), "the size of the normalized axis is not known, or no model's")
    core = _core(node, source, epsilon, shapes)
    if core is None:
        return Miss(site(node), "the root of the mean of squares does not divide what was squared")
    tails = shared_by(core, shape[-1])
    outcomes = [_build(node, core, shape[-1], shapes, t, tails) for t in tails or (None,)]
    return next((outcome for outcome in outcomes if outcome is not True), True)


def _build(
    root: ir.Node,
    core: Core,
    size: int,
    shapes: Shapes,
    tail: ir.Node | None,
    tails: frozenset[ir.Node],
) -> bool | Miss:
    outcome = Builder(root, core, size, shapes, tail=tail, tails=tails).build()
    if outcome is not True and core.x is not core.source:  # the casts may belong to the model
        wide = replace(core, x=core.source)
        again = Builder(root, wide, size, shapes, tail=tail, tails=tails).build()
        return True if again is True else outcome
    return outcome


def _variance(root: ir.Node) -> tuple[ir.Node, float] | None:
    """(ReduceMean, eps) of Sqrt(ReduceMean(..) + eps)."""
    total = node_of(root.inputs[0], "Add")
    if total is None:
        mean = node_of(root.inputs[0], "ReduceMean")
        return None if mean is None else (mean, 0.0)
    for index in (0, 1):
        mean = node_of(total.inputs[index], "ReduceMean")
        epsilon = scalar(total.inputs[1 - index])
        if mean is not None and epsilon is not None:
            return mean, float(epsilon)
    return None


def _squared(value: ir.Value | None) -> ir.Value | None:
    """The x of Pow(x, 2) or Mul(x, x)."""
    node = node_of(value, "Pow", "Mul")
    if node is None or node.inputs[0] is None:
        return None
    if node.op_type == "Pow":
        return node.inputs[0] if scalar(node.inputs[1]) == 2 else None
    return node.inputs[0] if node.inputs[0] is node.inputs[1] else None


def _over_last_axis(node: ir.Node, rank: int) -> bool:
    axes = const(node.inputs[1]) if len(node.inputs) > 1 else None
    listed = node.attributes.get_ints("axes", None) if axes is None else axes.reshape(-1).tolist()
    keep = node.attributes.get_int("keepdims", 1) == 1
    return listed is not None and [axis % rank for axis in listed] == [rank - 1] and keep


def _core(root: ir.Node, source: ir.Value, epsilon: float, shapes: Shapes) -> Core | None:
    centred = mean = None
    x = source
    minus = node_of(source, "Sub")
    if minus is not None and minus.inputs[0] is not None:
        reduce = node_of(minus.inputs[1], "ReduceMean")
        shape = shapes.of(minus.inputs[0])
        same = reduce is not None and reduce.inputs[0] is minus.inputs[0]
        if reduce is not None and same and shape and _over_last_axis(reduce, len(shape)):
            centred, mean, x = source, minus.inputs[1], minus.inputs[0]
    inverse = _inverse(root)
    divided = {source}
    if centred is not None:
        divided.update(_twins(x, mean))
    output = None
    for use in (inverse or root.outputs[0]).uses():
        user = use.node
        by_root = inverse is None and user.op_type == "Div" and use.idx == 1
        by_inverse = inverse is not None and user.op_type == "Mul"
        if (by_root or by_inverse) and user.inputs[1 - use.idx] in divided:
            output = user.outputs[0]
    cast = node_of(x, "Cast")
    widened = cast is not None and cast.inputs[0] is not None and _is_float(cast.inputs[0])
    before = cast.inputs[0] if cast is not None and widened else x
    if before is None or (output is None and inverse is None):
        return None
    return Core(before, x, centred, mean, inverse, output, epsilon)


def _twins(x: ir.Value, mean: ir.Value | None) -> list[ir.Value]:
    """Other computations of x - mean."""
    users = [use.node for use in x.uses() if use.node.op_type == "Sub" and use.idx == 0]
    return [user.outputs[0] for user in users if user.inputs[1] is mean]


def _inverse(root: ir.Node) -> ir.Value | None:
    """The reciprocal of the root, if it is computed as a value of its own."""
    if root.op_type == "Pow":
        return root.outputs[0]
    for use in root.outputs[0].uses():
        node = use.node
        if node.op_type == "Reciprocal":
            return node.outputs[0]
        if node.op_type == "Div" and use.idx == 1 and scalar(node.inputs[0]) == 1:
            return node.outputs[0]
    return None


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _existing(node: ir.Node, shapes: Shapes) -> bool | Miss:
    """Write axis = rank - 1 as -1; scale and bias [1, .., D] -> [D]."""
    shape = shapes.of(node.inputs[0])
    axis = node.attributes.get_int("axis", -1)
    if any(output.uses() for output in node.outputs[1:]):
        return Miss(site(node), "the mean or inverse deviation of the norm is read")
    if shape is None and axis != -1:
        return Miss(site(node), "the rank of what is normalized is not known")
    if shape is not None and axis % len(shape) != len(shape) - 1:
        return Miss(site(node), f"normalizes more than the last axis (axis = {axis})")
    changed = False
    if shape is not None:
        node, changed = _gathered(node, shape, shapes)
    if node.attributes.get_int("axis", None) != -1:
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        changed = True
    graph = node.graph
    for index, value in enumerate(node.inputs):
        tensor = constant(value)
        if index == 0 or value is None or tensor is None or not isinstance(graph, ir.Graph):
            continue
        own = tuple(tensor.shape.numpy())
        if len(own) > 1 and own[-1] == tensor.size:
            flat = derived(value, own[-1:], lambda array: array.reshape(-1))
            parameter = add_initializer(graph, value.name or "norm", flat)
            node.replace_input_with(index, parameter)
            inherit_name(graph, value, parameter)
            changed = True
    return changed


def _gathered(node: ir.Node, shape: Shape, shapes: Shapes) -> tuple[ir.Node, bool]:
    """The norm with what belongs to it but stands around it, and whether there was anything."""
    found = [_before_transpose(node, shape)]
    if node.op_type == "RMSNormalization":
        found.append(_centred_before(found[0] or node, shape, shapes))
    node = next((new for new in reversed(found) if new is not None), node)
    after = [step(node, shape[-1], shapes) for step in (_scaled_after, _shifted_after)]
    return node, any(after) or any(new is not None for new in found)


def _before_transpose(node: ir.Node, shape: Shape) -> ir.Node | None:
    """Norm(Transpose(x)) as Transpose(Norm(x)), where the last axis stays the last."""
    move, graph = node_of(node.inputs[0], "Transpose"), node.graph
    if move is None or not isinstance(graph, ir.Graph):
        return None
    x, order = move.inputs[0], perm(move, len(shape))
    if x is None or only_user(move.outputs[0]) is not node or order[-1] != len(shape) - 1:
        return None
    output = node.outputs[0]
    inside = insert(
        graph, node, node.op_type, [x, *node.inputs[1:]], dict(node.attributes),
        name=f"{output.name}_rows", dtype=output.dtype,
    )  # fmt: skip
    new = insert(
        graph, node, "Transpose", [inside], {"perm": list(order)},
        name=output.name, dtype=output.dtype, shape=output.shape,
    )  # fmt: skip
    replace_value(output, new, keep_name=True)
    return inside.producer()


def _centred_before(node: ir.Node, shape: Shape, shapes: Shapes) -> ir.Node | None:
    """RMSNormalization(x - mean(x), w), as a LayerNormalization(x, w) in its place."""
    minus, graph = node_of(node.inputs[0], "Sub"), node.graph
    mean = None if minus is None else node_of(minus.inputs[1], "ReduceMean")
    if minus is None or mean is None or not isinstance(graph, ir.Graph):
        return None
    x = minus.inputs[0]
    if x is None or mean.inputs[0] is not x or not _over_last_axis(mean, len(shape)):
        return None
    if not shapes.same(x, minus.outputs[0]):
        return None
    output = node.outputs[0]
    new = insert(
        graph, node, "LayerNormalization", [x, *node.inputs[1:]], dict(node.attributes),
        name=output.name, dtype=output.dtype, shape=output.shape,
    )  # fmt: skip
    replace_value(output, new, keep_name=True)
    return new.producer()


def _scaled_after(node: ir.Node, size: Dim, shapes: Shapes) -> bool:
    """Take the constant vector that alone multiplies the result for the scale, where that is 1."""
    ones = constant(node.inputs[1])
    if ones is None or len(node.inputs) > 2 or not (ones.numpy() == 1).all():
        return False
    return _take_vector(node, "Mul", size, shapes)


def _shifted_after(node: ir.Node, size: Dim, shapes: Shapes) -> bool:
    """Take the constant vector that alone is added to the result for the bias, if it has none."""
    if node.op_type != "LayerNormalization" or optional(node, 2) is not None:
        return False
    return _take_vector(node, "Add", size, shapes)


def _take_vector(node: ir.Node, op_type: str, size: Dim, shapes: Shapes) -> bool:
    """Let the norm do what a Mul or an Add by a vector does after it."""
    output = node.outputs[0]
    user = reader(output, op_type)
    if user is None or not isinstance(size, int):
        return False
    parameter = other(user, output)
    if not vector(parameter, size) or parameter.dtype != output.dtype or not parameter.shape:
        return False
    if not shapes.same(output, user.outputs[0]) or not finite(parameter):
        return False
    inputs = [*node.inputs[:1], parameter] if op_type == "Mul" else [*node.inputs[:2], parameter]
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    replace_value(user.outputs[0], output)
    if isinstance(node.graph, ir.Graph):
        node.graph.remove(user, safe=True)  # at once: it would count as a reader
    return True

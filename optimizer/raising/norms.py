"""Decomposed normalizations become LayerNormalization and RMSNormalization over the last axis.

Rewrite:      x / sqrt(mean(x^2) + eps) * w -> RMSNormalization(x, w)
              d = x - mean(x);  d / sqrt(mean(d^2) + eps) * w + b -> LayerNormalization(x, w, b)
              in every order of factors: division, reciprocal or power -1/2; w first or last; w and
              b folded into the factors (x * (r * w) + (b - mean * (r * w))); casts to float around
Applies when: the mean is over the last axis only, eps is one constant number, w and b are constant
              vectors of its size, and no value in between is read by anything else
Exactness:    reassociated
Source:       Ba et al., Layer Normalization (2016), eq. 4; Zhang and Sennrich, Root Mean Square
              Layer Normalization (2019), eq. 4; stash_type = 1 is the ONNX name for float inside
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import onnx_ir as ir

from optimizer.graph import (
    add_initializer,
    const,
    constant,
    derived,
    inherit_name,
    insert,
    replace_value,
    scalar,
)
from optimizer.nodes import node_of
from optimizer.raising.base import Miss, RuleReport, site, sweep
from optimizer.raising.shapes import Shapes


@dataclass(frozen=True)
class _Core:
    """The part without scale: what is normalized, and the first value that is.

    Attributes:
        x: What the mean is taken of, before any cast to float.
        source: ``x``, after the cast to float if there is one.
        centred: x - mean(x) for LayerNormalization, None for RMSNormalization.
        mean: mean(x), or None.
        inverse: 1 / sqrt(..), or None where the division is one node.
        output: x or centred, divided by sqrt(..); None where the scale comes first.
        epsilon: The constant under the root.
    """

    x: ir.Value
    source: ir.Value
    centred: ir.Value | None
    mean: ir.Value | None
    inverse: ir.Value | None
    output: ir.Value | None
    epsilon: float


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
    if not isinstance(shape[-1], int):
        return Miss(site(node), "the size of the normalized axis is not known")
    core = _core(node, source, epsilon, shapes)
    if core is None:
        return Miss(site(node), "the root of the mean of squares does not divide what was squared")
    outcome = _Builder(node, core, shape[-1], shapes).build()
    if outcome is not True and core.x is not core.source:  # the casts may belong to the model
        wide = _Builder(node, replace(core, x=core.source), shape[-1], shapes).build()
        return True if wide is True else outcome
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


def _core(root: ir.Node, source: ir.Value, epsilon: float, shapes: Shapes) -> _Core | None:
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
    return _Core(before, x, centred, mean, inverse, output, epsilon)


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


def _vector(value: ir.Value | None, size: int) -> bool:
    """Whether a constant has one number per channel and no other axis."""
    tensor = constant(value)
    if tensor is None:
        return False
    shape = tuple(tensor.shape.numpy())
    return tensor.size == size and (size == 1 or shape[-1:] == (size,))


@dataclass
class _Builder:
    """Finds scale and bias after a core and writes the node."""

    root: ir.Node
    core: _Core
    size: int
    shapes: Shapes
    scale: ir.Value | None = None
    bias: ir.Value | None = None

    def build(self) -> bool | Miss:
        """Write the normalization, or say what keeps it from being one."""
        core = self.core
        end = self._folded() if core.output is None else self._plain(core.output)
        if end is None:
            return Miss(site(self.root), "what follows the root is no scale and shift per channel")
        inside = self._read_elsewhere(end)
        if inside is not None:
            return Miss(site(self.root), f"value '{inside.name}' within the norm is read elsewhere")
        dtype = end.dtype or core.x.dtype
        graph = self.root.graph
        types = {v.dtype for v in (core.x, end, self.scale, self.bias) if v is not None}
        if dtype is None or len(types) > 1 or not isinstance(graph, ir.Graph):
            return Miss(site(self.root), "input, scale and output differ in element type")
        anchor = end.producer()
        kind = "RMSNormalization" if core.centred is None else "LayerNormalization"
        inputs = [core.x, self._parameter(graph, self.scale, dtype)]
        if self.bias is not None:
            inputs.append(self._parameter(graph, self.bias, dtype))
        attributes = {"axis": -1, "epsilon": core.epsilon, "stash_type": 1}
        new = insert(
            graph, anchor, kind, inputs, attributes, name=end.name, dtype=dtype, shape=end.shape
        )
        replace_value(end, new, keep_name=True)
        return True

    def _plain(self, value: ir.Value) -> ir.Value:
        """Follow y -> [cast] -> y * w -> [cast] -> y + b; stops where it ends."""
        end = value
        for wanted in ("Mul", "Add"):
            if wanted == "Add" and (self.scale is None or self.core.centred is None):
                break
            here = self._through_cast(end)
            step = self._with_vector(here, wanted)
            if step is None:
                break
            end, parameter = step
            if wanted == "Mul":
                self.scale = parameter
            else:
                self.bias = parameter
        if end.dtype != self.core.x.dtype:
            end = self._through_cast(end)
        return end

    def _through_cast(self, value: ir.Value) -> ir.Value:
        """The cast back to the type before the norm, if that is all that reads ``value``."""
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != "Cast":
            return value
        output = uses[0].node.outputs[0]
        to = ir.DataType(uses[0].node.attributes["to"].as_int())
        return output if to == self.core.x.dtype else value

    def _with_vector(self, value: ir.Value, op_type: str) -> tuple[ir.Value, ir.Value] | None:
        uses = list(value.uses())
        if len(uses) != 1 or value.is_graph_output():
            return None
        node, index = uses[0].node, uses[0].idx
        if node.op_type != op_type or node.domain != "" or len(node.inputs) != 2:
            return None
        other = node.inputs[1 - index]
        if other is None or not _vector(other, self.size):
            return None
        if not self.shapes.same(value, node.outputs[0]):
            return None
        return node.outputs[0], other

    def _folded(self) -> ir.Value | None:
        """The end of x * (r * w) + (b - mean * (r * w)), r the inverse of the root."""
        core = self.core
        factor = None if core.inverse is None else self._widened(core.inverse)
        if factor is None:
            return None
        scaled, self.scale = factor
        products = {
            use.node.inputs[1 - use.idx]: use.node.outputs[0]
            for use in scaled.uses()
            if use.node.op_type == "Mul" and len(use.node.inputs) == 2
        }
        if core.centred is None:
            return products.get(core.source)
        if core.centred in products:
            return self._shifted(products[core.centred])
        if core.mean is None or core.source not in products or core.mean not in products:
            return None
        subtracted = products[core.mean]
        shift = next((use.node for use in subtracted.uses()), None)
        if shift is None or shift.op_type != "Sub" or shift.inputs[1] is not subtracted:
            return None
        self.bias = shift.inputs[0]
        last = next((use.node for use in shift.outputs[0].uses()), None)
        if last is None or last.op_type != "Add" or products[core.source] not in last.inputs:
            return None
        return last.outputs[0] if _vector(self.bias, self.size) else None

    def _shifted(self, value: ir.Value) -> ir.Value:
        step = self._with_vector(value, "Add")
        if step is None:
            return value
        end, self.bias = step
        return end

    def _widened(self, value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        """Product of a value [.., 1] with a vector, and the vector."""
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type != "Mul":
            return None
        node = uses[0].node
        other = node.inputs[1 - uses[0].idx]
        if other is None or not _vector(other, self.size):
            return None
        return node.outputs[0], other

    def _read_elsewhere(self, end: ir.Value) -> ir.Value | None:
        """A value strictly between x and ``end`` that something else reads."""
        inside: dict[ir.Value, None] = {}
        stack: list[ir.Value | None] = [end]
        while stack:
            value = stack.pop()
            producer = None if value is None else value.producer()
            if value is None or producer is None or value is self.core.x or value in inside:
                continue
            inside[value] = None
            stack.extend(producer.inputs)
        nodes = {value.producer() for value in inside}
        del inside[end]
        cast_only = self.core.source
        for value in inside:
            if value is cast_only and value is not self.core.x:
                continue  # a cast that others read as well simply stays
            if value.is_graph_output() or any(use.node not in nodes for use in value.uses()):
                return value
        return None

    def _parameter(self, graph: ir.Graph, value: ir.Value | None, dtype: ir.DataType) -> ir.Value:
        """Scale or bias as [size]; ones where there is none."""
        if value is None:
            name = f"{self.root.outputs[0].name}/scale"
            return add_initializer(graph, name, np.ones(self.size, dtype=dtype.numpy()))
        if value.shape is not None and len(value.shape) == 1:
            return value
        flat = derived(value, (self.size,), lambda array: array.reshape(-1))
        return add_initializer(graph, value.name or "scale", flat)


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
            vector = add_initializer(graph, value.name or "norm", flat)
            node.replace_input_with(index, vector)
            inherit_name(graph, value, vector)
            changed = True
    return changed

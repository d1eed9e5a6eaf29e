"""Writes a normalization in the place of its spelled-out form, once its core has been found."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer.graph import add_initializer, constant, derived, insert, replace_value
from optimizer.raising.base import Miss, site
from optimizer.raising.shapes import Shapes


@dataclass(frozen=True)
class Core:
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


def vector(value: ir.Value | None, size: int) -> bool:
    """Whether a constant has one number per channel and no other axis."""
    tensor = constant(value)
    if tensor is None:
        return False
    shape = tuple(tensor.shape.numpy())
    return tensor.size == size and (size == 1 or shape[-1:] == (size,))


def finite(value: ir.Value | None) -> bool:
    """Whether a scale or shift, if there is one, holds numbers; a norm with others is refused."""
    tensor = constant(value)
    return tensor is None or bool(np.isfinite(tensor.numpy().astype(np.float32)).all())


def shared_by(core: Core, size: int) -> frozenset[ir.Node]:
    """The products with a scale that share the core's result: norms of one value, merged."""
    users = [] if core.output is None else [use.node for use in core.output.uses()]
    scaled = all(
        user.op_type == "Mul" and any(vector(value, size) for value in user.inputs)
        for user in users
    )
    return frozenset(users) if scaled and len(users) > 1 else frozenset()


@dataclass
class Builder:
    """Finds scale and bias after a core and writes the node.

    Attributes:
        tail: Which of ``tails`` is built, where several norms share the core.
        tails: See ``shared_by``.
    """

    root: ir.Node
    core: Core
    size: int
    shapes: Shapes
    scale: ir.Value | None = None
    bias: ir.Value | None = None
    tail: ir.Node | None = None
    tails: frozenset[ir.Node] = frozenset()

    def build(self) -> bool | Miss:
        """Write the normalization, or say what keeps it from being one."""
        core = self.core
        end = self._folded() if core.output is None else self._plain(core.output)
        if end is None:
            return Miss(site(self.root), "what follows the root is no scale and shift per channel")
        if not self.shapes.same(core.x, end):  # a constant [1, .., 1] of a higher rank
            return Miss(site(self.root), "a constant within the norm adds an axis")
        if not finite(self.scale) or not finite(self.bias):
            return Miss(site(self.root), "the scale or shift of the norm is not finite")
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
        shared = self.tail is not None and value is self.core.output
        uses = [use for use in value.uses() if not shared or use.node is self.tail]
        if len(uses) != 1 or value.is_graph_output():
            return None
        node, index = uses[0].node, uses[0].idx
        if node.op_type != op_type or node.domain != "" or len(node.inputs) != 2:
            return None
        other = node.inputs[1 - index]
        if other is None or not vector(other, self.size):
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
        return last.outputs[0] if vector(self.bias, self.size) else None

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
        if other is None or not vector(other, self.size):
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
        nodes = {node for value in inside if (node := value.producer()) is not None}
        del inside[end]
        cast_only = self.core.source
        for value in inside:
            if value is cast_only and value is not self.core.x:
                continue  # a cast that others read as well simply stays
            readers = {use.node for use in value.uses()} - self.tails
            if value.is_graph_output() or not readers <= nodes:
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

"""Writes a plan into the graph: types, constants, and a Cast wherever two types meet.

A value is cast once, right before the first node that asks, and all who ask read the result. What
a Cast has made from another type is not cast again but made from that type, so no two casts follow
each other. Constants are stored in the type in which they are read; weights are converted when they
are written to disk.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import node_of
from optimizer.precision.constants import narrowed
from optimizer.precision.limits import FLOATS, Format
from optimizer.precision.plan import Plan, is_cast
from optimizer.raising.reshapes import bypass

_FLOAT = ir.DataType.FLOAT
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
_SCALE = 1


def write(model: ir.Model, format_: Format, plan: Plan) -> None:
    """Rewrite ``model`` in place."""
    _Writer(model, format_, plan).write()


class _Writer:
    """Goes through a graph once, in order."""

    def __init__(self, model: ir.Model, format_: Format, plan: Plan) -> None:
        self._model, self._graph = model, model.graph
        self._format, self._half, self._plan = format_, format_.dtype, plan
        self._wanted = dict(self._reads())
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._stored: list[tuple[ir.Value, ir.Value]] = []
        self._rounded = self._rounded_scales()

    def write(self) -> None:
        """Inputs, nodes, outputs, and what is left over."""
        half, interface = self._half, self._plan.interface
        outputs = [half if v in interface else v.dtype for v in self._graph.outputs]
        for value in self._graph.inputs:
            if value in interface:
                value.type = ir.TensorType(half)
        for node in list(self._graph):
            if is_cast(node):
                self._cast(node)
                continue
            self._read(node, node)
            change = self._plan.retyping.get(node)
            for index in () if change is None else change.outputs:
                node.outputs[index].type = ir.TensorType(self._half)
            if change is not None and "stash_type" in node.attributes:
                node.attributes["stash_type"] = ir.AttrInt64("stash_type", _FLOAT.value)
            self._inner(node)
        for index, value in enumerate(list(self._graph.outputs)):
            self._output(value, outputs[index])
        graphs.remove_dead(self._model)
        for old, new in self._stored:
            graphs.inherit_name(self._graph, old, new)

    def _reads(self) -> Iterator[tuple[tuple[ir.Node, int], ir.DataType]]:
        """The type in which each input is read, before anything changes."""
        for node in self._graph.all_nodes():
            change = self._plan.retyping.get(node)
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype in FLOATS:
                    converted = change is not None and index in change.inputs
                    yield (node, index), self._half if converted else value.dtype

    def _cast(self, node: ir.Node) -> None:
        """A Cast to the type that its input has now does nothing."""
        source, output = node.inputs[0], node.outputs[0]
        if source is not None and source.dtype in FLOATS and source.dtype == output.dtype:
            bypass(node)

    def _read(self, node: ir.Node, anchor: ir.Node) -> None:
        """Give every input the type in which it is read."""
        for index, value in enumerate(node.inputs):
            wanted = self._wanted.get((node, index))
            if value is None or wanted is None:
                continue
            if value.dtype != wanted:
                node.replace_input_with(index, self._as(value, wanted, anchor))
            elif value in self._rounded and index == _SCALE and node.op_type in _QUANTIZERS:
                node.replace_input_with(index, self._rounded_scale(value))

    def _inner(self, node: ir.Node) -> None:
        """Subgraphs read the values of this graph in the types of before."""
        for subgraph in graphs.attribute_graphs(node):
            for inner in subgraph.all_nodes():
                self._read(inner, node)

    def _output(self, value: ir.Value, wanted: ir.DataType | None) -> None:
        if wanted is None or value.dtype == wanted:
            return
        cast = self._made.get((value, wanted))
        if cast is None:
            cast = self._insert(value, wanted, None)
        graphs.replace_output(value, cast)

    def _as(self, value: ir.Value, dtype: ir.DataType, anchor: ir.Node) -> ir.Value:
        """``value`` in another type, made at most once."""
        if value.dtype == dtype:
            return value
        if graphs.constant(value) is not None:
            return self._constant(value, dtype)
        cast = node_of(value, "Cast")
        source = value if cast is None or cast.inputs[0] is None else cast.inputs[0]
        if source.dtype == dtype:
            return source
        if (source, dtype) not in self._made:
            self._made[source, dtype] = self._insert(source, dtype, anchor, name=str(value.name))
        return self._made[source, dtype]

    def _insert(
        self, value: ir.Value, dtype: ir.DataType, anchor: ir.Node | None, name: str | None = None
    ) -> ir.Value:
        short = self._format.name if dtype == self._half else dtype.name.lower()
        return graphs.insert(
            self._graph, anchor, "Cast", (value,), {"to": dtype.value},
            name=f"{name or value.name}_{short}", dtype=dtype, shape=value.shape,
        )  # fmt: skip

    def _constant(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if (value, dtype) not in self._made:
            tensor = narrowed(value, dtype)
            new = graphs.add_initializer(self._graph, f"{value.name}_{self._format.name}", tensor)
            self._made[value, dtype] = new
            self._stored.append((value, new))
        return self._made[value, dtype]

    def _rounded_scales(self) -> frozenset[ir.Value]:
        """Scales read in both types: quantizing and dequantizing must use the same number."""
        read: dict[bool, set[ir.Value]] = {True: set(), False: set()}
        for node in self._graph:
            scale = node.inputs[_SCALE] if node.op_type in _QUANTIZERS else None
            if scale is not None and graphs.constant(scale) is not None:
                change = self._plan.retyping.get(node)
                read[change is not None and _SCALE in change.inputs].add(scale)
        return frozenset(read[True] & read[False])

    def _rounded_scale(self, value: ir.Value) -> ir.Value:
        """The number that half precision makes of a scale, in the type of before."""
        assert value.dtype is not None  # noqa: S101 - a constant
        half = self._constant(value, self._half)
        return self._constant(half, value.dtype)

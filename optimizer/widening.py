"""Half-precision models computed in float32, with or without their roundings.

Not every runtime has kernels for float16 and bfloat16. ONNX Runtime has none for most operators on
x86 processors: float16 it converts to float32 by itself, but leaves out the roundings (and with
them the overflows) between its nodes; bfloat16 it refuses. Two forms of such a model help:

rounded:  every value is float32 and holds what the half-precision model would hold, because it is
          rounded after the operator that computed it. This is how numbers are measured.
stored:   weights and interface stay in half precision, everything else is float32. This is how a
          model is written for a runtime that only stores the type.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from optimizer import graph as graphs
from optimizer.gate import in_force
from optimizer.half_weights import HALF_TYPES, Widened, widened
from optimizer.raising import value_info
from optimizer.raising.base import allow
from optimizer.raising.reshapes import bypass
from optimizer.targets import Target

_FLOAT = ir.DataType.FLOAT

#: Their result holds numbers that they have read, or the sign of such numbers changed: there is
#: nothing to round.
EXACT = frozenset(
    {
        "Abs", "Clip", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements",
        "GatherND", "Identity", "Max", "MaxPool", "Min", "Neg", "Pad", "ReduceMax", "ReduceMin",
        "Relu", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "TopK",
        "Transpose", "Trilu", "Unsqueeze", "Where",
    }
)  # fmt: skip
#: Attributes that name an element type.
_TYPE_ATTRIBUTES = ("dtype", "output_dtype", "softmax_precision", "stash_type")


def half_types(model: ir.Model) -> frozenset[ir.DataType]:
    """The half-precision types that occur anywhere in ``model``."""
    return frozenset(dtype for dtype in _types(model) if dtype in HALF_TYPES)


def _types(model: ir.Model) -> Iterator[ir.DataType | None]:
    for graph in (model.graph, *model.graph.subgraphs()):
        yield from (value.dtype for value in (*graph.inputs, *graph.initializers.values()))
    bodies = (function.all_nodes() for function in model.functions.values())
    for node in itertools.chain(model.graph.all_nodes(), *bodies):
        yield from (value.dtype for value in node.outputs)
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor().dtype
            elif attribute.name == "to" and attribute.type == ir.AttributeType.INT:
                yield ir.DataType(attribute.as_int())


@dataclass(frozen=True)
class Rounded:
    """The rounded form of a model.

    Attributes:
        model: Float32 in the place of half precision, all names kept; shares the weights.
        types: The half-precision type of every value that had one, by name.
    """

    model: ir.Model
    types: Mapping[str, ir.DataType]


def rounded(model: ir.Model) -> Rounded:
    """The rounded form; the same model where there is nothing to do.

    There is nothing to do without half precision, and nothing can be done where the body of an If
    or a Loop has it, or a sequence of tensors.
    """
    types = half_types(model)
    if not types:
        return Rounded(model, {})
    copy = model.clone()
    if copy.functions:
        common_passes.InlinePass()(copy)
    widener = _Widener(copy, types, rounding=True)
    return Rounded(copy, widener.types) if widener.run() else Rounded(model, {})


def store(model: ir.Model, types: Collection[ir.DataType]) -> int:
    """Bring ``model`` into the stored form, in place.

    Returns:
        How many nodes compute in float32 now; 0 also where a body of an If or a Loop, or a sequence
        of tensors, keeps the model as it is.
    """
    return _Widener(model, types, rounding=False).run()


def store_for(model: ir.Model, target: Target) -> int:
    """``store`` of what ``target`` does not compute in, as one rewrite.

    Returns:
        Whether there was something to do.
    """
    types = {t for t in half_types(model) if target.only_stores(t.name.lower())}
    if not types or not allow(model.graph.name or "graph"):
        return 0
    done = store(model, types) > 0
    if not done:
        in_force().withdraw()
    return int(done)


def write_stored(model: ir.Model) -> int:
    """Store constants that half-precision ones were widened to as those, with a Cast each.

    Returns:
        How many there were.
    """
    graph = model.graph
    nodes = list(graph)
    order = {node: index for index, node in enumerate(nodes)}
    found = [v for v in graph.initializers.values() if isinstance(v.const_value, Widened)]
    count = 0
    for value in found:
        tensor = value.const_value
        assert isinstance(tensor, Widened)  # noqa: S101 - chosen for that
        readers = [order.get(node, 0) for node, _ in value.uses()]
        if not readers or value.is_graph_output() or not allow(str(value.name)):
            continue
        stored = graphs.add_initializer(graph, f"{value.name}_stored", tensor.stored)
        wide = graphs.insert(
            graph, nodes[min(readers)], "Cast", (stored,), {"to": _FLOAT.value},
            name=f"{value.name}_float32", dtype=_FLOAT, shape=value.shape,
        )  # fmt: skip
        graphs.replace_value(value, wide)
        graphs.inherit_name(graph, value, stored)
        count += 1
    return count


class _Widener:
    """Rewrites one model in place."""

    def __init__(self, model: ir.Model, types: Collection[ir.DataType], *, rounding: bool) -> None:
        self._model, self._graph = model, model.graph
        self._types, self._rounding = types, rounding
        #: Types of half-precision values by name.
        self.types: dict[str, ir.DataType] = {}
        #: Half-precision values, and the same as float32.
        self._wide: dict[ir.Value, ir.Value] = {}

    def run(self) -> int:
        """Rewrite inputs and nodes of the main graph; returns how many changed."""
        value_info.fill(self._model)
        inner = (node for sub in self._graph.subgraphs() for node in sub)
        if any(self._is_half(v) for node in inner for v in (*node.inputs, *node.outputs)):
            return 0
        whole = (*self._graph.inputs, *(v for node in self._graph for v in node.outputs))
        if any(self._is_half(v) and not isinstance(v.type, ir.TensorType) for v in whole):
            return 0
        self.types = {
            str(value.name): value.dtype
            for value in (*self._graph.inputs, *(v for n in self._graph for v in n.outputs))
            if value.dtype is not None and self._is_half(value)
        }
        count = 0
        for value in self._graph.inputs:
            if self._rounding and self._is_half(value) and not value.is_initializer():
                value.type = ir.TensorType(_FLOAT)
                count += 1
        nodes = list(self._graph)
        followers = [*nodes[1:], None]
        count += sum(self._node(*pair) for pair in zip(nodes, followers, strict=False))
        if not self._rounding:  # values that nothing reads may be asked for of the rounded form
            self._narrow_outputs()
            for half, wide in self._wide.items():
                graphs.inherit_name(self._graph, half, wide)
            graphs.remove_dead(self._model)
        return count

    def _is_half(self, value: ir.Value | None) -> bool:
        return value is not None and value.dtype in self._types

    def _node(self, node: ir.Node, following: ir.Node | None) -> bool:
        """Let a node read and write float32; whether that changed anything."""
        narrow = {value: value.dtype for value in node.outputs if self._is_half(value)}
        halves = [i for i, value in enumerate(node.inputs) if self._is_half(value)]
        if node.op_type == "Cast" and node.domain == "":  # it reads whatever type there is
            return self._cast(node, following)
        for index in halves:
            node.replace_input_with(index, self._read(node.inputs[index], node))
        if halves or narrow:
            self._widen_attributes(node)
            for value, dtype in narrow.items():
                value.type = ir.TensorType(_FLOAT)
                if self._rounding and node.op_type not in EXACT and value.name:
                    self._round(value, dtype, following)
        return bool(halves or narrow)

    def _read(self, value: ir.Value | None, anchor: ir.Node) -> ir.Value:
        """``value`` as float32, from right before the first node that asks."""
        assert value is not None  # noqa: S101 - the caller looked at its type
        if value not in self._wide:
            tensor = graphs.constant(value)
            name = f"{value.name}_float32"
            if tensor is not None and tensor.size == 1:
                array = tensor.numpy().astype(np.float32)
                self._wide[value] = graphs.add_initializer(self._graph, name, array)
            elif tensor is not None and not self._rounding:
                wide = widened(value)
                self._wide[value] = graphs.add_initializer(self._graph, name, wide)
            else:
                self._wide[value] = self._cast_to(value, _FLOAT, anchor, name)
        return self._wide[value]

    def _cast_to(
        self, value: ir.Value, dtype: ir.DataType, anchor: ir.Node | None, name: str
    ) -> ir.Value:
        return graphs.insert(
            self._graph, anchor, "Cast", (value,), {"to": dtype.value},
            name=name, dtype=dtype, shape=value.shape,
        )  # fmt: skip

    def _cast(self, node: ir.Node, following: ir.Node | None) -> bool:
        """A Cast to half precision is a rounding; without roundings it is one to float32."""
        value = node.outputs[0]
        last = value.is_graph_output() and not value.uses()
        halves = self._is_half(value) and (self._rounding or not last)
        if halves:
            dtype = value.dtype
            node.attributes["to"] = ir.AttrInt64("to", _FLOAT.value)
            node.attributes.pop("saturate", None)
            value.type = ir.TensorType(_FLOAT)
            if self._rounding:
                self._round(value, dtype, following)
        source = node.inputs[0]
        if not self._rounding and source is not None and source.dtype == value.dtype:
            bypass(node)
        return halves

    def _round(self, value: ir.Value, dtype: ir.DataType | None, following: ir.Node | None) -> None:
        """Put a Cast to ``dtype`` and one back between ``value`` and all who read it."""
        assert dtype is not None  # noqa: S101 - half precision
        narrow = self._cast_to(value, dtype, following, f"{value.name}_narrow")
        wide = self._cast_to(narrow, _FLOAT, following, f"{value.name}_exact")
        graphs.replace_value(value, wide, keep_name=True)
        cast = narrow.producer()
        assert cast is not None  # noqa: S101 - made above
        cast.replace_input_with(0, value)

    def _narrow_outputs(self) -> None:
        """Give the graph's outputs back the types that they had."""
        for value in list(self._graph.outputs):
            dtype = self.types.get(str(value.name))
            if dtype is not None and value.dtype != dtype:
                name = f"{value.name}_float32"
                graphs.replace_output(value, self._cast_to(value, dtype, None, name))

    def _widen_attributes(self, node: ir.Node) -> None:
        for name, attribute in list(node.attributes.items()):
            if name in _TYPE_ATTRIBUTES and ir.DataType(attribute.as_int()) in self._types:
                node.attributes[name] = ir.AttrInt64(name, _FLOAT.value)
            elif attribute.type == ir.AttributeType.TENSOR:
                tensor = attribute.as_tensor()
                if tensor.dtype in self._types:
                    wide = ir.tensor(tensor.numpy().astype(np.float32))
                    node.attributes[name] = ir.AttrTensor(name, wide)

"""Which inputs and outputs of a node change their type with it, by the operator's definition.

Types are tied to each other by the type variables of ``onnx.defs``: of a LayerNormalization, input,
scale, bias and result share one; of a Resize the scales are float32 whatever the image is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx.defs import OpSchema

from optimizer import graph as graphs
from optimizer.precision.limits import Format


@dataclass(frozen=True)
class Retyping:
    """What of a node becomes half precision, by position; nothing where nothing is floating."""

    inputs: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()


class Retyper:
    """Answers for the nodes of one model.

    Args:
        model: Says which version of each operator set it uses.
        format_: What values become.
        written: Version of the standard operators that the result is lowered to; an operator that
            it has must take the type there, too.
    """

    def __init__(self, model: ir.Model, format_: Format, written: int) -> None:
        self._opsets = dict(model.opset_imports)
        self._written = written
        self._sources = format_.sources
        self._text = f"tensor({format_.dtype.name.lower()})"
        self._name = format_.dtype.name

    def of(self, node: ir.Node) -> Retyping | str:
        """What changes, or why ``node`` cannot be had in this type."""
        values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name]
        if any(True for _ in graphs.attribute_graphs(node)):
            return "it holds a subgraph, whose values keep their types"
        unknown = next((v for v in values if v.dtype is None), None)
        if unknown is not None:
            return f"the element type of '{unknown.name}' is not known"
        if not any(value.dtype in self._sources for value in values):
            return Retyping()
        version = self._opsets.get(node.domain, 1)
        schema = _schema(node, version)
        if schema is None:
            name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            return f"the ONNX standard does not define the types of {name}"
        inputs: dict[int, str] = {}
        for index, value in enumerate(node.inputs):
            formal = _formal(schema.inputs, index)
            if value is None or value.dtype not in self._sources or "(" in formal.type_str:
                continue
            if not self._takes(schema, index):
                return self._refusal(node, formal.name, version)
            inputs[index] = formal.type_str
        older = _schema(node, self._written) if not node.domain else None
        if older is not None and older.since_version != schema.since_version:
            missing = next((i for i in inputs if not self._takes(older, i)), None)
            if missing is not None:
                name = _formal(schema.inputs, missing).name
                return self._refusal(node, name, self._written)
        return Retyping(frozenset(inputs), self._outputs(node, schema, inputs))

    def _takes(self, schema: OpSchema, index: int) -> bool:
        """Whether an input of an operator may have the type."""
        formal = _formal(schema.inputs, index)
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        return self._text in allowed.get(formal.type_str, ()) and formal.is_homogeneous

    def _refusal(self, node: ir.Node, name: str, version: int) -> str:
        return f"{node.op_type} takes no {self._name} as '{name}' in opset {version}"

    def _outputs(
        self, node: ir.Node, schema: OpSchema, inputs: Mapping[int, str]
    ) -> frozenset[int]:
        """Results whose type is tied to that of an input which changes."""
        if node.op_type == "DequantizeLinear" and "output_dtype" not in node.attributes:
            return frozenset({0} if 1 in inputs else ())  # of the scale's type, in any opset
        return frozenset(
            index
            for index, value in enumerate(node.outputs)
            if value.dtype in self._sources
            and _formal(schema.outputs, index).type_str in inputs.values()
        )


def _schema(node: ir.Node, version: int) -> OpSchema | None:
    try:
        return onnx.defs.get_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError:
        return None


def _formal(parameters: Sequence[OpSchema.FormalParameter], index: int) -> OpSchema.FormalParameter:
    """A parameter; the last one may stand for any number of them."""
    return parameters[min(index, len(parameters) - 1)]

"""Lowers the operators of the canonical opset to earlier ones, by rules of our own.

What has no rule must mean the same in both versions: the same definition, or one that only gained
types, optional inputs and attributes since. Anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
from onnx.defs import OpSchema

from optimizer import graph as graphs
from optimizer.errors import UnsupportedError
from optimizer.legalize import decompose
from optimizer.raising.base import allow

#: Operators with a rule: the opset they need, and the rule.
RULES: dict[str, tuple[int, Callable[[decompose.Pen], None]]] = {
    "Attention": (23, decompose.attention),
    "RMSNormalization": (23, decompose.rms_normalization),
    "RotaryEmbedding": (23, decompose.rotary_embedding),
    "Gelu": (20, decompose.gelu),
}
#: Operators whose meaning, not only their signature, changed at that opset.
_CHANGED = {"GroupNormalization": 21}
#: Pooling with ceil_mode counts its windows differently before; without, it means the same.
_CEIL_FIXED = {"AveragePool": 19, "LpPool": 22, "MaxPool": 22}


def lower(model: ir.Model, opset: int) -> int:
    """Bring ``model`` to ``opset``; returns the number of nodes rewritten.

    Raises:
        UnsupportedError: There is no rule for something in the model.
    """
    own = model.graph.opset_imports.get("", opset)
    if own <= opset:
        return 0
    count, complete = 0, True
    shared: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        since, rule = RULES.get(node.op_type, (0, None))
        if node.domain == "" and rule is not None and opset < since:
            if not allow(node, "opset"):
                complete = False
                continue
            rule(decompose.Pen(model.graph, node, shared))
            count += 1
    graphs.remove_dead(model)
    if not complete or not allow(f"opset {own} -> {opset}", "opset"):
        return count
    for node in model.graph.all_nodes():
        if node.domain == "":
            reason = _problem(node, own, opset)
            if reason is not None:
                msg = (
                    f"opset {opset}: node '{node.name}': {reason}; "
                    "choose a higher --opset, or a --target that takes one"
                )
                raise UnsupportedError(msg)
            node.version = None
    model.graph.opset_imports[""] = opset
    return max(count, 1)


def _schema(op_type: str, version: int) -> OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None


def _problem(node: ir.Node, own: int, opset: int) -> str | None:
    """Why a node cannot be written in ``opset``; drops attributes that say what was the rule."""
    name = node.op_type
    new, old = _schema(name, own), _schema(name, opset)
    if old is None:
        return f"{name} does not exist in opset {opset}"
    if new is None or new.since_version == old.since_version:
        return None
    if old.since_version < _CHANGED.get(name, 0):
        return f"{name} means something else before opset {_CHANGED[name]}"
    if old.since_version < _CEIL_FIXED.get(name, 0) and node.attributes.get_int("ceil_mode", 0):
        return f"{name} with ceil_mode means something else before opset {_CEIL_FIXED[name]}"
    for key, attribute in list(node.attributes.items()):
        if key in old.attributes:
            continue
        default = new.attributes[key].default_value if key in new.attributes else None
        if default is None or onnx.helper.get_attribute_value(default) != attribute.value:
            return f"attribute '{key}' of {name} does not exist in opset {opset}"
        del node.attributes[key]
    if len(node.inputs) > old.max_input:
        return f"{name} takes only {old.max_input} inputs in opset {opset}"
    return _type_problem(node, old, opset)


def _type_problem(node: ir.Node, old: OpSchema, opset: int) -> str | None:
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in old.type_constraints}
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype is None:
            continue
        formal = old.inputs[min(index, len(old.inputs) - 1)]
        types = allowed.get(formal.type_str)
        if types is not None and f"tensor({_type_name(value.dtype)})" not in types:
            return f"{node.op_type} takes no {value.dtype.name.lower()} in opset {opset}"
    return None


def _type_name(dtype: ir.DataType) -> str:
    return str(dtype.name).lower()

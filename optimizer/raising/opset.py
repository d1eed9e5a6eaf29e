"""Raises the version of the standard operators to that of the canonical dialect.

Rewrite:      opset 7 .. 22 -> 23
Applies when: every operator of the model means the same in both versions: its definition is the
              same, or only gained optional inputs and attributes, or a rule below adapts it. One
              operator of which this is not known keeps the whole model at its version.
Exactness:    bitwise
Source:       the version history of the ONNX operators, as ``onnx.defs`` holds it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.defs import OpSchema

from optimizer.graph import add_initializer, insert, replace_value, unique_name
from optimizer.raising.base import Miss, RuleReport, allow, opset_of, site
from optimizer.raising.shapes import Shapes

CANONICAL = 23
_OLDEST = 7
#: Version 10 of the file format is the oldest with every type and field used here.
_IR_VERSION = 10

#: Operators whose meaning changed although their signature did not break, and since when.
_CHANGED: dict[str, int] = {"GroupNormalization": 21, "Resize": 11, "RoiAlign": 16, "Scan": 9}
#: Operators of which ONNX Runtime 1.32 has no kernel since opset 22, with any type.
_LEFT_BEHIND = frozenset(
    {
        "Bernoulli", "GlobalLpPool", "MaxRoiPool", "Multinomial", "RandomNormal",
        "RandomNormalLike", "RandomUniform", "RandomUniformLike", "RoiAlign",
    }
)  # fmt: skip
#: Operators that ONNX Runtime writes out in float64, where it has no kernel, up to opset 18 only.
_FUNCTIONS = frozenset(
    {
        "Elu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Selu", "Softplus",
        "Softsign", "ThresholdedRelu",
    }
)  # fmt: skip
#: Pooling with ceil_mode counts its windows differently from here on.
_CEIL_FIXED: dict[str, int] = {"AveragePool": 19, "LpPool": 22, "MaxPool": 22}


def run(model: ir.Model) -> RuleReport:
    """Adapt every node, or none."""
    version = opset_of(model)
    if version >= CANONICAL:
        return RuleReport()
    if version < _OLDEST:
        reason = f"operators of version {version} (before {_OLDEST}) are not raised to {CANONICAL}"
        return RuleReport(0, (Miss(model.graph.name or "graph", reason),))
    shapes = Shapes()
    nodes = [node for node in model.graph.all_nodes() if node.domain == ""]
    misses = {
        node.op_type: Miss(site(node), f"{problem}; the model keeps opset {version}")
        for node in reversed(nodes)
        if (problem := _problem(node, version, shapes)) is not None
    }
    if misses:
        return RuleReport(0, tuple(misses[op_type] for op_type in sorted(misses)))
    if not allow(f"opset {version} -> {CANONICAL}"):
        return RuleReport()
    for node in nodes:
        adapt = _ADAPTERS.get(node.op_type)
        node.version = None
        if adapt is not None:
            adapt(model.graph, node, version)
    model.graph.opset_imports[""] = CANONICAL
    model.ir_version = max(model.ir_version, _IR_VERSION)
    return RuleReport(1)


def _schema(op_type: str, version: int) -> OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None


def _problem(node: ir.Node, version: int, shapes: Shapes) -> str | None:
    """Why this node may mean something else in the canonical version."""
    name = node.op_type
    old, new = _schema(name, version), _schema(name, CANONICAL)
    if name in _FUNCTIONS and _is_double(node):
        return f"ONNX Runtime has no {name} of opset {CANONICAL} for float64"
    if old is None or (new is not None and old.since_version == new.since_version):
        return None  # no standard operator, or one that did not change
    gone = new is None or new.deprecated
    if new is None or gone or name in _LEFT_BEHIND:
        return f"{name} does not exist in {'' if gone else 'ONNX Runtime in '}opset {CANONICAL}"
    if old.since_version < _CHANGED.get(name, 0):
        return f"{name} means something else since opset {_CHANGED[name]}"
    if old.since_version < _CEIL_FIXED.get(name, 0) and node.attributes.get_int("ceil_mode", 0):
        return f"{name} with ceil_mode means something else since opset {_CEIL_FIXED[name]}"
    if name in _CHECKS:
        return _CHECKS[name](node, old.since_version, shapes)
    if name in _ADAPTERS or _extends(old, new):
        return None
    return f"{name} changed between opset {version} and {CANONICAL}"


def _is_double(node: ir.Node) -> bool:
    return any(v is not None and v.dtype == ir.DataType.DOUBLE for v in node.inputs)


def _extends(old: OpSchema, new: OpSchema) -> bool:
    """Whether ``new`` reads every node of ``old`` the same way."""
    for key, attribute in old.attributes.items():
        other = new.attributes.get(key)
        if other is None or str(other.default_value) != str(attribute.default_value):
            return False
    added = [a for key, a in new.attributes.items() if key not in old.attributes]
    optional = OpSchema.FormalParameterOption.Optional
    extra = new.inputs[len(old.inputs) :]
    return (
        not any(attribute.required for attribute in added)
        and len(old.inputs) <= len(new.inputs)
        and all(parameter.option == optional for parameter in extra)
        and len(old.outputs) <= len(new.outputs)
    )


def _dropout_check(node: ir.Node, since: int, shapes: Shapes) -> str | None:
    del shapes
    mask = node.outputs[1] if len(node.outputs) > 1 else None
    if since < 12 and mask is not None and (mask.uses() or mask.is_graph_output()):
        return "the mask of Dropout means something else since opset 12"
    return None


def _batch_norm_check(node: ir.Node, since: int, shapes: Shapes) -> str | None:
    del shapes
    if len(node.outputs) > 1 and since < 14:
        return "BatchNormalization is in training mode"
    if node.attributes.get_int("spatial", 1) != 1:
        return "BatchNormalization is not per channel"
    return None


def _limits_check(node: ir.Node, since: int, shapes: Shapes) -> str | None:
    del since, shapes
    if _type_of(node) is None and not {"max", "min", "value"}.isdisjoint(node.attributes):
        return f"the type of what {node.op_type} gives is not known"
    return None


def _type_of(node: ir.Node) -> ir.DataType | None:
    """The type of the first output, which is that of the first input."""
    source = node.inputs[0]
    return node.outputs[0].dtype or (None if source is None else source.dtype)


_CHECKS: dict[str, Callable[[ir.Node, int, Shapes], str | None]] = {
    "BatchNormalization": _batch_norm_check,
    "Clip": _limits_check,
    "Dropout": _dropout_check,
    "Pad": _limits_check,
}


def _attribute_to_input(
    graph: ir.Graph, node: ir.Node, attribute: str, index: int, dtype: ir.DataType | None = None
) -> None:
    """Move an attribute to input ``index``, as a constant."""
    if attribute not in node.attributes:
        return
    held = node.attributes.pop(attribute)
    kind = np.dtype(np.int64) if dtype is None else dtype.numpy()
    value = add_initializer(
        graph, f"{node.outputs[0].name}/{attribute}", np.array(held.value, dtype=kind)
    )
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _axes(graph: ir.Graph, node: ir.Node, _: int) -> None:
    _attribute_to_input(graph, node, "axes", 1)


def _split(graph: ir.Graph, node: ir.Node, _: int) -> None:
    _attribute_to_input(graph, node, "split", 1)
    if (len(node.inputs) < 2 or node.inputs[1] is None) and "num_outputs" not in node.attributes:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _slice(graph: ir.Graph, node: ir.Node, _: int) -> None:
    _attribute_to_input(graph, node, "starts", 1)
    _attribute_to_input(graph, node, "ends", 2)
    _attribute_to_input(graph, node, "axes", 3)


def _clip(graph: ir.Graph, node: ir.Node, _: int) -> None:
    _attribute_to_input(graph, node, "min", 1, _type_of(node))
    _attribute_to_input(graph, node, "max", 2, _type_of(node))


def _pad(graph: ir.Graph, node: ir.Node, _: int) -> None:
    _attribute_to_input(graph, node, "pads", 1)
    _attribute_to_input(graph, node, "value", 2, _type_of(node))


def _top_k(graph: ir.Graph, node: ir.Node, _: int) -> None:
    if "k" in node.attributes:
        node.attributes["k"] = ir.AttrInt64s("k", [node.attributes["k"].as_int()])
        _attribute_to_input(graph, node, "k", 1)


def _dropout(graph: ir.Graph, node: ir.Node, version: int) -> None:
    del graph
    if version < 12:  # the ratio matters in training only
        node.attributes.pop("ratio", None)


def _softmax(graph: ir.Graph, node: ir.Node, version: int) -> None:
    """Before opset 13 it is over all axes from ``axis`` on together."""
    if version >= 13:
        return
    axis, source = node.attributes.get_int("axis", 1), node.inputs[0]
    node.attributes["axis"] = ir.AttrInt64("axis", -1)
    rank = None if source is None or source.shape is None else len(source.shape)
    own = node.graph
    if axis == -1 or (rank is not None and axis % rank == rank - 1):
        return
    if source is None or not isinstance(own, ir.Graph):
        msg = f"node '{node.name}' ({node.op_type}) lacks its input"
        raise ValueError(msg)
    output = node.outputs[0]

    def write(op_type: str, inputs: list[ir.Value], dtype: ir.DataType | None, **more: int) -> Any:
        name = unique_name(graph, f"{output.name}/{op_type.lower()}")
        return insert(own, node, op_type, inputs, more, name=name, dtype=dtype)

    rows = write("Flatten", [source], output.dtype, axis=axis)
    rows = write(node.op_type, [rows], output.dtype, axis=-1)
    shape = write("Shape", [source], ir.DataType.INT64)
    whole = write("Reshape", [rows, shape], output.dtype, allowzero=1)
    replace_value(output, whole, keep_name=True)
    own.remove(node, safe=True)


def _batch_norm(graph: ir.Graph, node: ir.Node, _: int) -> None:
    del graph
    node.attributes.pop("spatial", None)


def _grid_sample(graph: ir.Graph, node: ir.Node, version: int) -> None:
    del graph
    renamed = {"bilinear": "linear", "bicubic": "cubic"}
    mode = node.attributes.get_string("mode", "bilinear")
    if version < 20:
        node.attributes["mode"] = ir.AttrString("mode", renamed.get(mode, mode))


_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
_ADAPTERS: dict[str, Callable[[ir.Graph, ir.Node, int], None]] = {
    **{f"Reduce{name}": _axes for name in _REDUCTIONS},
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Dropout": _dropout,
    "GridSample": _grid_sample,
    "Hardmax": _softmax,
    "LogSoftmax": _softmax,
    "Pad": _pad,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Squeeze": _axes,
    "TopK": _top_k,
    "Unsqueeze": _axes,
}

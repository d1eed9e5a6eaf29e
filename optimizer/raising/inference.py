"""ONNX's own type and shape inference: what it finds, and where it stops.

It is a help and no authority. Where it fails, the values behind have no type, and whatever rule
needs one leaves its site alone.
"""

from __future__ import annotations

import re

import onnx
import onnx_ir as ir

from optimizer.nodes import node_of
from optimizer.raising.base import site

#: Constants up to this many bytes may be shapes, which inference must see.
_SHAPE_BYTES = 1024
#: A graph with a longer vector than this is not asked for the numbers in any.
_LONGEST_VECTOR = 1 << 16
_INTEGERS = (ir.DataType.INT32.value, ir.DataType.INT64.value)
_WIDE_FLOATS = (ir.DataType.FLOAT.value, ir.DataType.DOUBLE.value)
#: Operators that ONNX follows numbers through.
_FOLLOWED = frozenset(
    {
        "Add", "Cast", "Concat", "Constant", "Div", "Gather", "Identity", "Mul", "Reshape",
        "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze",
    }
)  # fmt: skip
_CONSEQUENCE = "what needs the types of its results is left alone"


def infer(model: ir.Model) -> tuple[dict[str, ir.Value], tuple[str, str] | None]:
    """Values of the main graph as inference sees them, and where it stopped.

    Returns:
        The values by name; and, where a node of the standard got no type although all of its
        operands have one, (what a report calls it, why).
    """
    bare = _without_weights(model)
    proto = ir.to_proto(bare)
    tame = _is_tame(bare)
    try:
        found = onnx.shape_inference.infer_shapes(proto, data_prop=tame)
        values = {
            info.name: ir.serde.deserialize_value_info_proto(info, None)
            for info in found.graph.value_info
        }
    except Exception as error:  # the library raises whatever it likes
        reason = f"shape inference fails: {_plain(str(error))}; {_CONSEQUENCE}"
        return {}, (model.graph.name or "graph", reason)
    stop = _where_it_stopped(bare, values)
    if stop is None:
        return values, None
    return values, (site(stop), f"{_why(proto, stop, data_prop=tame)}; {_CONSEQUENCE}")


def _without_weights(model: ir.Model) -> ir.Model:
    bare = model.clone()
    for node in bare.graph.all_nodes():
        for output in node.outputs:
            if output.dtype is None:  # half a declaration cannot be written
                output.shape = None
    for name, value in list(bare.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _SHAPE_BYTES:
            del bare.graph.initializers[name]
            value.const_value = None
            bare.graph.inputs.append(value)
    return bare


def _where_it_stopped(model: ir.Model, found: dict[str, ir.Value]) -> ir.Node | None:
    """The first node of the standard whose operands have a type and whose results have none."""

    def typed(value: ir.Value | None) -> bool:
        return value is None or value.type is not None or str(value.name) in found

    for node in model.graph:
        silent = not all(typed(output) for output in node.outputs if output.name)
        if silent and node.domain == "" and all(map(typed, node.inputs)):
            return node
    return None


def _why(proto: onnx.ModelProto, node: ir.Node, *, data_prop: bool) -> str:
    """What inference says about a node when it has to say something."""
    try:
        onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=data_prop)
    except Exception as error:
        said = re.search(rf"\(op_type:{node.op_type}\b[^)]*\): *(?P<text>[^\n]*)", str(error))
        if said is not None:
            return f"shape inference fails at this {node.op_type}: {_plain(said['text'])}"
    return f"shape inference gives this {node.op_type} no type"


def _plain(text: str) -> str:
    """One short line, without the names of the library's errors."""
    return re.sub(r"\[\w+\] *", "", " ".join(text.split()))[:200].rstrip(".")


def _is_tame(model: ir.Model) -> bool:
    """Whether ONNX can be asked for the numbers in vectors (onnx 1.23).

    It follows those of every constant through Concat, however many they become, and through casts
    to types that do not hold them.
    """
    lengths: dict[ir.Value, int] = {}
    for node in model.graph:
        if node.op_type not in _FOLLOWED:
            continue
        sizes = [lengths.get(v, 0) or _held(v) for v in node.inputs if v is not None]
        length = sum(sizes) if node.op_type == "Concat" else max(sizes, default=0)
        if length > _LONGEST_VECTOR or _is_cast_back(node):
            return False
        lengths.update(dict.fromkeys(node.outputs, length))
    return True


def _is_cast_back(node: ir.Node) -> bool:
    """Whether a Cast makes integers of another's result that may not be what they were."""
    before = node_of(node.inputs[0], "Cast") if node.op_type == "Cast" and node.inputs else None
    if before is None or node.attributes.get_int("to", 0) not in _INTEGERS:
        return False
    return before.attributes.get_int("to", 0) not in (*_INTEGERS, *_WIDE_FLOATS)


def _held(value: ir.Value) -> int:
    """Numbers in a constant, or in a vector of known length."""
    if value.const_value is not None:
        return int(value.const_value.size)
    shape = value.shape
    whole = shape is not None and len(shape) == 1 and shape.is_static()
    return int(shape.numpy()[0]) if shape is not None and whole else 0

"""Types and shapes of intermediate values: filled in before the rules, refreshed after them."""

from __future__ import annotations

import logging

import onnx
import onnx_ir as ir

from optimizer.nodes import node_of
from optimizer.raising.base import RuleReport
from optimizer.raising.dims import Dim, Shape
from optimizer.raising.shapes import Shapes

_LOGGER = logging.getLogger(__name__)
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


def fill(model: ir.Model) -> RuleReport:
    """Infer types and shapes of values that have none.

    What the model declares is kept. Weights are not read.
    """
    missing = [
        value
        for node in model.graph.all_nodes()
        for value in node.outputs
        if value.name and (value.dtype is None or value.shape is None)
    ]
    if missing:
        inferred = _inferred(model)
        for value in missing:
            known = inferred.get(value.name or "")
            if known is not None:
                value.type = value.type or known.type
                value.shape = value.shape or _numbers(known.shape)
    return RuleReport()


def refresh(model: ir.Model) -> RuleReport:
    """Write what the shapes of the inputs prove; drop declarations that contradict it.

    If one declaration is wrong (a model whose batch was made dynamic, say), no other declaration
    of the same model is believed either.
    """
    graph, shapes = model.graph, Shapes()
    values = [v for node in graph for v in node.outputs if not v.is_graph_output()]
    proven = {value: shapes.of(value) for value in values}
    stale = any(_contradicts(value.shape, proven[value]) for value in values)
    for value in values:
        shape = proven[value]
        if shape is not None:
            value.shape = _written(shape, None if stale else value.shape)
        elif stale:
            value.shape = None
    return fill(model)


def _contradicts(declared: ir.Shape | None, proven: Shape | None) -> bool:
    if declared is None or proven is None:
        return False
    if len(declared) != len(proven):
        return True
    return any(
        isinstance(old, int) and old != new and not _is_unknown(new)
        for old, new in zip(declared, proven, strict=True)
    )


def _written(proven: Shape, declared: ir.Shape | None) -> ir.Shape:
    """A shape in ONNX's terms; the model's own word for what has no name otherwise."""
    dims: list[int | str | None] = []
    for axis, dim in enumerate(proven):
        own = declared[axis] if declared is not None else None
        if isinstance(dim, int):
            dims.append(dim)
        elif not _is_unknown(dim):
            dims.append(_text(dim))
        else:
            dims.append(own if isinstance(own, int) or own is None else own.value)
    return ir.Shape(dims)


def _is_unknown(dim: Dim) -> bool:
    return not isinstance(dim, int) and any(
        name.startswith("?") for names, _ in dim for name in names
    )


def _text(dim: Dim) -> str:
    if isinstance(dim, int):
        return str(dim)
    text = ""
    for names, count in dim:
        factors = [*([] if abs(count) == 1 and names else [str(abs(count))]), *names]
        sign = ("-" if count < 0 else "") if not text else (" - " if count < 0 else " + ")
        text += sign + "*".join(factors)
    return text


def _numbers(shape: ir.Shape | None) -> ir.Shape | None:
    """Without names: those that inference makes up say nothing, those it follows may be wrong.

    It follows them through Slice with a negative step, and through casts to bool (onnx 1.23); what
    is proven is written by ``refresh``.
    """
    return None if shape is None else ir.Shape([d if isinstance(d, int) else None for d in shape])


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


def _inferred(model: ir.Model) -> dict[str, ir.Value]:
    """Values of the main graph as ONNX's shape inference sees them."""
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
    try:
        proto = onnx.shape_inference.infer_shapes(ir.to_proto(bare), data_prop=_is_tame(bare))
    except Exception as error:  # inference is a help; a graph may be beyond it
        _LOGGER.debug("shape inference failed: %s", error)
        return {}
    values = {}
    for info in proto.graph.value_info:
        values[info.name] = ir.serde.deserialize_value_info_proto(info, None)
    return values

"""Types and shapes of intermediate values: filled in before the rules, refreshed after them."""

from __future__ import annotations

import logging

import onnx
import onnx_ir as ir

from optimizer.raising.base import RuleReport
from optimizer.raising.dims import Dim, Shape
from optimizer.raising.shapes import Shapes

_LOGGER = logging.getLogger(__name__)
#: Constants up to this many bytes may be shapes, which inference must see.
_SHAPE_BYTES = 1024


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
                value.shape = value.shape or _unnamed(known.shape)
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


def _unnamed(shape: ir.Shape | None) -> ir.Shape | None:
    """Without the names that shape inference makes up."""
    if shape is None:
        return None
    named = [d if isinstance(d, int) else d.value for d in shape]
    return ir.Shape([None if str(d).startswith("unk__") else d for d in named])


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
        proto = onnx.shape_inference.infer_shapes(ir.to_proto(bare), data_prop=True)
    except Exception as error:  # inference is a help; a graph may be beyond it
        _LOGGER.debug("shape inference failed: %s", error)
        return {}
    values = {}
    for info in proto.graph.value_info:
        values[info.name] = ir.serde.deserialize_value_info_proto(info, None)
    return values

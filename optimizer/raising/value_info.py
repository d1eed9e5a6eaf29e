"""Types and shapes of intermediate values: filled in before the rules, refreshed after them."""

from __future__ import annotations

import onnx_ir as ir

from optimizer.raising import inference
from optimizer.raising.base import Miss, RuleReport
from optimizer.raising.dims import Dim, Shape
from optimizer.raising.shapes import Shapes


def fill(model: ir.Model) -> RuleReport:
    """Infer types and shapes of values that have none.

    What the model declares is kept. Weights are not read. A miss names the node at which inference
    failed: what needs types behind it is left alone.
    """
    missing = [
        value
        for node in model.graph.all_nodes()
        for value in node.outputs
        if value.name and (value.dtype is None or value.shape is None)
    ]
    if not missing:
        return RuleReport()
    inferred, problem = inference.infer(model)
    for value in missing:
        known = inferred.get(value.name or "")
        if known is not None:
            value.type = value.type or known.type
            value.shape = value.shape or _numbers(known.shape)
    return RuleReport(0, () if problem is None else (Miss(*problem),))


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

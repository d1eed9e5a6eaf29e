"""Shapes of what sorts, pads and scatters, which token reduction is written with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.raising import dims
from optimizer.raising.dims import Shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from optimizer.raising.shapes import Shapes


def _topk(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    source, count = shapes.of(node.inputs[0]), shapes.vector_within(node.inputs[1])
    if source is None or count is None:
        return None
    axis = node.attributes.get_int("axis", -1) % len(source)
    return (*source[:axis], count[0], *source[axis + 1 :])


def _pad(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    source, pads = shapes.of(node.inputs[0]), graphs.const(node.inputs[1])
    some_axes = len(node.inputs) > 3 and node.inputs[3] is not None
    if source is None or pads is None or some_axes:
        return None
    before, after = pads[: len(source)], pads[len(source) :]
    sizes = zip(source, before, after, strict=True)
    return tuple(dims.add(size, int(first) + int(last)) for size, first, last in sizes)


def _like_data(shapes: Shapes, node: ir.Node, _: ir.Value) -> Shape | None:
    return shapes.of(node.inputs[0])


INDEXED_RULES: dict[str, Callable[[Shapes, ir.Node, ir.Value], Shape | None]] = {
    "Pad": _pad,
    "ScatterElements": _like_data,
    "ScatterND": _like_data,
    "TopK": _topk,
}

"""The two layouts of a value with heads: [B, S, H*c] and [B, H, S, c], and the way between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import node_of, operand, perm
from optimizer.raising.shapes import Shapes

_SWAP = (0, 2, 1, 3)


@dataclass(frozen=True)
class Heads:
    """A value [B, H, S, c] seen as [B, S, H*c].

    Attributes:
        source: [B, S, H*c], or [B, S, H, c] where ``joined`` is False.
        joined: Whether the heads are one axis in ``source``.
        count: H.
        size: c.
    """

    source: ir.Value
    joined: bool
    count: int
    size: int


def swapped(value: ir.Value | None) -> ir.Value | None:
    """The input of the Transpose that exchanges the axes 1 and 2 to give ``value``."""
    node = node_of(value, "Transpose")
    return node.inputs[0] if node is not None and perm(node, 4) == _SWAP else None


def find(shapes: Shapes, value: ir.Value) -> Heads | str:
    """The heads of ``value`` [B, H, S, c], or why they cannot be joined."""
    shape = shapes.of(value)
    if shape is None or len(shape) != 4:
        return "the rank is not 4 or not known"
    count, size = shape[1], shape[3]
    if not isinstance(count, int) or not isinstance(size, int):
        return "the number of heads or their size is not fixed"
    rows = swapped(value)
    if rows is None and count == 1:
        return _single(shapes, value, size)
    if rows is None:
        return "it does not come from a Transpose of [batch, sequence, heads, size]"
    reshape = node_of(rows, "Reshape")
    if reshape is not None:
        source = operand(reshape)
        if shapes.of(source) == (shape[0], shape[2], count * size):
            return Heads(source, joined=True, count=count, size=size)
    return Heads(rows, joined=False, count=count, size=size)


def _single(shapes: Shapes, value: ir.Value, size: int) -> Heads | str:
    """One head: an Unsqueeze or Reshape adds the axis, without any Transpose."""
    node = node_of(value, "Unsqueeze", "Reshape")
    shape = shapes.of(value)
    if node is not None and shape is not None:
        source = operand(node)
        if shapes.of(source) == (shape[0], shape[2], size):
            return Heads(source, joined=True, count=1, size=size)
    return "it does not come from a Transpose of [batch, sequence, heads, size]"


def join(graph: ir.Graph, anchor: ir.Node, heads: Heads) -> ir.Value:
    """[B, S, H*c], available before ``anchor``."""
    if heads.joined:
        return heads.source
    target = graphs.add_initializer(
        graph, "joined_heads", np.array([0, 0, heads.count * heads.size], np.int64)
    )
    name = f"{heads.source.name}_joined"
    return graphs.insert(
        graph, anchor, "Reshape", [heads.source, target], name=name, dtype=heads.source.dtype
    )


def swap(graph: ir.Graph, anchor: ir.Node, value: ir.Value) -> ir.Value:
    """``value`` with its axes 1 and 2 exchanged, inserted before ``anchor``."""
    name = f"{value.name}_swapped"
    return graphs.insert(
        graph, anchor, "Transpose", [value], {"perm": list(_SWAP)}, name=name, dtype=value.dtype
    )


def split(graph: ir.Graph, anchor: ir.Node, value: ir.Value, count: int, size: int) -> ir.Value:
    """[B, H, S, c] of ``value`` [B, S, H*c], inserted before ``anchor``."""
    target = graphs.add_initializer(graph, "split_heads", np.array([0, 0, count, size], np.int64))
    name = f"{value.name}_heads"
    rows = graphs.insert(graph, anchor, "Reshape", [value, target], name=name, dtype=value.dtype)
    return swap(graph, anchor, rows)

"""Packing: several linears written as one."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from optimizer.fusion.weights import Affine, beside, stacked
from optimizer.fusion.writer import Writer
from optimizer.graph import replace_value
from optimizer.structure import Linear


def pack_beside(graph: ir.Graph, linears: Sequence[Linear], anchor: ir.Node, name: str) -> None:
    """Linears that read the same value as one linear and a Split, in place.

    Args:
        graph: Where they are.
        linears: Two or more with the same input and constant weights.
        anchor: The first of their nodes.
        name: Prefix of the new names.
    """
    w = Writer(graph, anchor, name)
    parts = [Affine.of(linear) for linear in linears]
    x = linears[0].matmul.inputs[0]  # read from the graph: an earlier rewrite may have replaced it
    assert x is not None  # noqa: S101  (a MatMul has two inputs)
    wide = w.linear(x, beside(parts, "all"), "all")
    pieces = w.split(wide, [part.outputs for part in parts], "part")
    for linear, piece in zip(linears, pieces, strict=True):
        replace_value(linear.output, piece, keep_name=True)


def pack_stacked(
    graph: ir.Graph, linears: Sequence[Linear], anchor: ir.Node, name: str
) -> ir.Value:
    """The sum of linears as one linear of their concatenated inputs.

    Args:
        graph: Where they are.
        linears: Two or more with outputs of the same width and constant weights.
        anchor: The new nodes come before it.
        name: Prefix of the new names.

    Returns:
        The sum.
    """
    w = Writer(graph, anchor, name)
    parts = [Affine.of(linear) for linear in linears]
    joined = w.op("Concat", [linear.input for linear in linears], "inputs", {"axis": -1})
    return w.linear(joined, stacked(parts, "sum"), "sum")

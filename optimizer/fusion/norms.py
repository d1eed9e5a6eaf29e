"""Norm folding: the scale and the bias of a norm move into the linears that read it."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from optimizer.fusion.weights import Affine, beside, overflows, unit_scale
from optimizer.fusion.writer import Writer
from optimizer.graph import remove_dead, replace_value
from optimizer.structure import Linear, Norm, NormKind


def fold_norm(graph: ir.Graph, norm: Norm, linears: Sequence[Linear]) -> str | None:
    """Rewrite ``norm`` to scale 1 and bias 0 by changing the linears that read it.

    ``W' = scale * W`` (rows) and ``b' = b + bias W``, in float64, rounded once.

    Args:
        graph: Where they are.
        norm: The norm.
        linears: Every linear that reads it.

    Returns:
        None, or why it was refused; then nothing has changed.
    """
    if norm.kind is NormKind.TANH:
        return "a dynamic tanh keeps its scale: without it, it is no longer told from an activation"
    matmuls = {id(linear.matmul) for linear in linears}
    for use in sorted(norm.output.uses(), key=lambda use: (use.node.name or "", use.idx)):
        if id(use.node) not in matmuls:
            return f"the norm is also read by node '{use.node.name}', which cannot absorb its scale"
    if norm.output.is_graph_output():
        return "the normalized value is a graph output"
    for linear in linears:
        if len(linear.weight.uses()) > 1:
            return f"weight '{linear.weight.name}' is shared with another node"
        if overflows(Affine.of(linear, norm)):
            return f"folding the norm's scale into '{linear.weight.name}' overflows float16"
    for linear in linears:
        _absorb(graph, linear, Affine.of(linear, norm))
    norm.node.replace_input_with(1, unit_scale(graph, norm.scale))
    if norm.bias is not None:
        norm.node.replace_input_with(2, None)
        norm.node.resize_inputs(2)
    remove_dead(graph)
    return None


def _absorb(graph: ir.Graph, linear: Linear, affine: Affine) -> None:
    base = linear.weight.name or "linear"
    writer = Writer(graph, linear.matmul, f"{base}.folded")
    output = writer.linear(linear.input, beside([affine], base), "linear")
    replace_value(linear.output, output, keep_name=True)

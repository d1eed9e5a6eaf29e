"""Finds the token that a head takes out of each row by a computed position: the end of a text.

Exporters write it as GatherND with pairs (row, position), or as Gather from all rows in one, at
row * N + position. What is found is only used to protect that token, so that a token which is none
costs a little accuracy at most.
"""

from __future__ import annotations

import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.nodes import ancestors, node_of, operands, users
from optimizer.tokens.flow import Flow, Reader


def taken_position(flow: Flow) -> ir.Value | None:
    """Whole numbers [B], computed from something else than tokens; None where there are none."""
    for reader in flow.readers:
        position = _of_pairs(reader) or _of_flat(reader)
        if position is None:
            continue
        nodes, _, _ = ancestors(position)
        if not any(value in flow.rows for node in nodes for value in node.outputs):
            return position
    return None


def _of_pairs(reader: Reader) -> ir.Value | None:
    node = reader.node
    if node is None or node.op_type != "GatherND" or node.inputs[0] is not reader.value:
        return None
    joined = node_of(node.inputs[1], "Concat")
    columns = [] if joined is None else [node_of(value, "Unsqueeze") for value in joined.inputs]
    if node.attributes.get_int("batch_dims", 0) or len(columns) != 2:
        return None
    rows, positions = (None if c is None else c.inputs[0] for c in columns)
    return positions if _counts(rows) else None


def _of_flat(reader: Reader) -> ir.Value | None:
    node = reader.node
    if node is None or node.op_type != "Reshape" or node.inputs[0] is not reader.value:
        return None
    for gather in users(node.outputs[0], "Gather"):
        added = node_of(gather.inputs[1], "Add")
        if added is None or gather.attributes.get_int("axis", 0) != 0:
            continue
        for position, start in (operands(added), operands(added)[::-1]):
            product = node_of(start, "Mul")
            if product is not None and any(_counts(value) for value in operands(product)):
                return position
    return None


def _counts(value: ir.Value | None) -> bool:
    """Whether the numbers are 0, 1, 2, ..."""
    node = node_of(value, "Range")
    return node is not None and [graphs.scalar(node.inputs[i]) for i in (0, 2)] == [0, 1]

"""Attention of merged tokens without a mask, for ONNX Runtime's CUDA provider.

With a mask it has no flash attention. Logarithms of sizes, which are added to the scores of every
query alike, can be carried by the keys instead, in channels of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from optimizer import graph as graphs
from optimizer.attention_masks import MASK
from optimizer.nodes import operand, optional
from optimizer.raising.base import allow
from optimizer.raising.shapes import Shapes

#: Constants beside the logarithms, such as what hides padding; float16 holds them.
_LARGEST = 1e4

#: Channels that a head gets beside its own: flash attention takes multiples of eight.
_MORE = 8
#: What moves logarithms from one entry per token to one per key.
_MASK_MOVES = ("Cast", "Expand", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def join_key_masks(model: ir.Model) -> int:
    """Let keys carry the logarithms that are added to their scores, in channels of their own.

    softmax(scale q k + log s) = softmax(scale [q, 1, .., 1] [k, e, .., e]), e = log s / (8 scale):
    the proportional attention of merged tokens (ToMe, arXiv 2210.09461, eq. 1). With a mask, ONNX
    Runtime has no flash attention.
    """
    shapes = Shapes()
    count = 0
    for node in list(model.graph):
        heads = _heads_with_log_mask(shapes, node)
        if heads is not None and allow(node, "key mask"):
            _join(model.graph, node, *heads)
            count += 1
    if count:
        graphs.remove_dead(model)
    return count


def _heads_with_log_mask(shapes: Shapes, node: ir.Node) -> tuple[int, int, int] | None:
    """Query heads, key heads and channels of an attention that this is about."""
    if node.op_type != "Attention" or node.domain != "" or len(node.inputs) != MASK + 1:
        return None
    query, key, value = (operand(node, index) for index in range(3))
    mask = optional(node, MASK)
    queries, keys = (node.attributes.get_int(f"{side}_num_heads", 0) for side in ("q", "kv"))
    if not queries or not keys or len(node.outputs) != 1 or query.dtype != ir.DataType.FLOAT16:
        return None
    if node.attributes.get_float("softcap", 0.0) or mask is None or not _is_logarithm(mask):
        return None
    widths = [(shapes.of(side) or (None,))[-1] for side in (query, key, value)]
    sizes = [
        width // heads if isinstance(width, int) else None
        for width, heads in zip(widths, (queries, keys, keys), strict=True)
    ]
    covered, given = shapes.of(mask), shapes.of(key)
    if sizes[0] is None or len(set(sizes)) > 1 or covered is None or given is None:
        return None
    if covered != (given[0], 1, 1, given[1]):
        return None
    return queries, keys, sizes[0]


def _is_logarithm(value: ir.Value) -> bool:
    """Whether all that is added are logarithms, or finite constants in their place."""
    node = value.producer()
    if node is None:
        numbers = graphs.const(value)
        return numbers is not None and bool((abs(numbers.astype(float)) <= _LARGEST).all())
    if node.op_type == "Where":
        return all(_is_logarithm(operand(node, index)) for index in (1, 2))
    return node.op_type == "Log" or (node.op_type in _MASK_MOVES and _is_logarithm(operand(node)))


def _join(graph: ir.Graph, node: ir.Node, queries: int, keys: int, size: int) -> None:
    found = node.outputs[0]
    base, scale = str(found.name), node.attributes.get_float("scale", float(size) ** -0.5)
    wide = size + _MORE

    def put(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        return graphs.insert(
            graph, node, op_type, inputs, attributes, name=base, dtype=ir.DataType.FLOAT16
        )

    def held(name: str, array: Any) -> ir.Value:
        return graphs.add_initializer(graph, f"{base}/{name}", np.asarray(array))

    def heads(value: ir.Value, count: int, width: int) -> ir.Value:
        return put("Reshape", value, held("heads", [0, 0, count, width]))

    def joined(value: ir.Value, count: int, width: int) -> ir.Value:
        return put("Reshape", value, held("joined", [0, 0, count * width]))

    query, key, value, mask = (operand(node, index) for index in range(4))
    pads, one, zero = held("pads", [0] * 7 + [_MORE]), *(np.float16(n) for n in (1, 0))
    query = put("Pad", heads(query, queries, size), pads, held("one", one))
    value = put("Pad", heads(value, keys, size), pads, held("zero", zero))
    share = np.full((1, 1, keys, _MORE), 1 / (_MORE * scale), np.float16)
    logs = put("Mul", put("Transpose", mask, perm=(0, 3, 1, 2)), held("share", share))
    key = put("Concat", heads(key, keys, size), logs, axis=3)
    sides = joined(query, queries, wide), joined(key, keys, wide), joined(value, keys, wide)
    made = put("Attention", *sides, **{**node.attributes, "scale": scale})
    graphs.carry_notes(node, made)
    start, end, axis = held("start", [0]), held("end", [size]), held("axis", [3])
    own = put("Slice", heads(made, queries, wide), start, end, axis)
    graphs.replace_value(found, joined(own, queries, size), keep_name=True)
